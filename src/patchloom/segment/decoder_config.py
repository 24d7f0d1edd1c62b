"""Settings of decoders trained on the maps of a frozen encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from patchloom.base.choices import DECODER_BLOCKS, HeadName
from patchloom.base.mask_settings import MaskSettings
from patchloom.base.ranges import Count, Factors, NonNegative, Positive, PositiveInt, Probability, Share
from patchloom.base.source_options import SourceOptions
from patchloom.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(MaskSettings, SourceOptions):
    """Settings of a decoder and of its training."""

    preset: str | None = None
    """Named recipe that replaces the defaults below; what is given beside it wins"""
    untrained: bool = False
    """Give the encoder fresh weights first: what training has to beat"""
    head: HeadName = "bn"
    """Decoder: linear, bn (DINOv2's), dinov3's, multilayer (bn on four blocks), upernet, setr, unet (radiology)"""
    layers: tuple[int, ...] | None = None
    """Blocks whose maps the decoder takes, from 0, negative from the end; default: as many of the last as it takes"""
    blocks: Literal["last", "spread"] = "last"
    """Where layers is not given: the last blocks, or blocks at equal parts of the depth (1/4, 2/4, 3/4, 4/4)"""
    apply_norm: bool | None = None
    """Apply the encoder's final norm to each map; default: yes, but for upernet"""
    channels: PositiveInt = 512
    """Width of upernet (a base encoder of BEiT's kind: 768) and, halved, of its auxiliary head and of setr"""
    crop: tuple[PositiveInt, PositiveInt] | None = None
    """Window the encoder sees, (height, width), multiples of its patch; default: resize, or the encoder's image size"""
    short_side: PositiveInt | None = None
    """Shorter side images are resized to before random scales and testing (the longer to at most four times that)"""
    resize: tuple[PositiveInt, PositiveInt] | None = None
    """(height, width) images are resized to instead, out of proportion; default: proportions are kept"""
    augment: bool = True
    """Random scales, crops, flips and colours; without, windows of the images are encoded once and kept in memory"""
    scale: Factors = (0.5, 2.0)
    """Least and most of the random factor on the size of the image"""
    flip: Probability = 0.5
    """Probability of the mirror image"""
    vertical_flip: Probability = 0.0
    """Probability of the image upside down"""
    rotate: NonNegative = 0.0
    """Most degrees of random rotation, either way"""
    colours: bool = True
    """Random changes of brightness, contrast, saturation and hue"""
    max_share: Share = 0.75
    """A crop is drawn anew, up to ten times, while one class fills more than this share of it"""
    minmax: bool = False
    """Stretch each channel of each resized image to its full range, as the radiology benchmark does"""
    steps: PositiveInt = 40_000
    """Optimiser steps in all"""
    batch_size: PositiveInt = 16
    """Windows per step"""
    lr: Positive = 1e-3
    """Peak learning rate of AdamW"""
    weight_decay: NonNegative = 1e-4
    """AdamW weight decay, not on vectors and biases"""
    warmup: Count = 1500
    """Steps of warm-up; at most a fifth of the run is used"""
    decay: Literal["poly", "one_cycle"] = "poly"
    """How the learning rate falls: poly, a power of what is left of the run, or one_cycle, half a cosine (DINOv3's)"""
    power: Positive = 1.0
    """Power of the polynomial decay of the learning rate"""
    clip_grad: Positive | None = None
    """Largest global L2 norm of the gradient; default: no clipping"""
    loss: Literal["ce", "dice", "dice+ce"] = "ce"
    """Cross-entropy, Dice, or their sum"""
    average: Literal["valid", "all"] = "valid"
    """What cross-entropy is averaged over: pixels whose class is known, or all (mmsegmentation 0.20)"""
    dice: Literal["image", "batch"] = "image"
    """Dice of each image with plain denominators (MONAI's), or of the whole batch with squared ones (DVPT's)"""
    precision: Literal["32", "bf16"] = "32"
    """Number format of the arithmetic"""
    num_workers: Count = 2
    """Processes that read images"""
    run: str | None = None
    """Folder where the run is kept, and gone on with by the same command once it was stopped; default: it is deleted"""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or cuda:1"""
    seed: Count = 0
    """Seed of fresh weights, order, crops and draws"""

    @property
    def image_size(self) -> None:
        """Images keep the size they have; the encoder is set up for `crop`."""
        return

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        if self.resize is not None and self.short_side is not None:
            raise UsageError(
                f"resize {self.resize} and short_side {self.short_side} exclude each other; set the other to null"
            )
        if (
            self.layers is not None
            and self.head in ("upernet", "unet")
            and len(self.layers) != DECODER_BLOCKS[self.head]
        ):
            raise UsageError(
                f"head {self.head} takes {DECODER_BLOCKS[self.head]} blocks; layers names {len(self.layers)}"
            )
