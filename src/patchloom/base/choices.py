"""Words that settings choose among and that the code behind them knows, too.

They stand here, apart from that code, so that help pages and tab completion read them without loading it.
"""

from __future__ import annotations

from typing import Literal

Pool = Literal["auto", "cls", "avg", "cls+avg"]
"""How tokens become one vector: as the encoder does, class token, mean over patches, or both."""
HeadPool = Literal["auto", "cls", "avg"]
"""What the head of an adapted encoder reads."""
Precision = Literal["32", "bf16", "16"]
"""Number format of an encoder's arithmetic where it is only read."""
View = Literal["crop", "whole"]
"""What is shown of an image that is measured: its centre, or all of it out of proportion."""
Weighting = Literal["none", "balanced", "sqrt", "effective"]
"""How much a class counts in the loss."""
PromptDepth = Literal["deep", "shallow"]
"""Prompts of its own for every block, or one set through all blocks."""
Scale = Literal["sum", "per_token"]
"""What a loss over the tokens of an image is divided by."""
Window = Literal["minmax", "ct", "mr"]
"""How grey values of a volume become those of an image."""
Plane = Literal["axial", "coronal", "sagittal"]
"""Along which axis of the body slices follow one another."""
HeadName = Literal["linear", "bn", "dinov3", "multilayer", "upernet", "setr", "unet"]
"""Decoders of segmentation."""
DECODER_BLOCKS = {
    "linear": 1,
    "bn": 1,
    "dinov3": 1,
    "multilayer": 4,
    "upernet": 4,
    "setr": 1,
    "unet": 5,
    "vit_comer": 4,
}
"""Of how many blocks of an encoder each takes the maps."""
MILHeadName = Literal["meanpool", "abmil", "chowder", "dsmil", "transmil", "hiptmil"]
"""How the tiles of a slide become one answer."""
TileChoice = Literal["random", "first"]
"""Which tiles of a slide are read."""
Average = Literal["probabilities", "logits"]
"""What the answers of several models are averaged as."""

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Scales of images segmented at several of them (mmsegmentation's)."""
