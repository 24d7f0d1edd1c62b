"""Settings of DVPT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from patchloom.training.adapter_config import AdapterConfig

Pool = Literal["prompts+class", "class"]


@dataclass(frozen=True, kw_only=True)
class DVPTConfig(AdapterConfig):
    """Settings of DVPT; the defaults are the paper's for grading fundus photographs."""

    ABLATIONS: ClassVar[tuple[str, ...]] = ("share_every", "dynamic", "augment", "normalize")

    num_prompts: int = 50
    """Learnt prompts; paper: 50"""
    rank: int = 20
    """Width of the bottlenecks; paper: 20 for ViT-B"""
    share_every: int = 3
    """Consecutive blocks that share one bottleneck; paper: 3; 1 gives each its own"""
    dynamic: bool = True
    """Prompts read the image's tokens before the bottleneck (the paper's text); false is what its code computes"""
    pool: Pool = "prompts+class"  # type: ignore[assignment]
    """What the classifier reads: the mean over prompts and class token (paper), or the class token"""
    epochs: int = 60
    """Passes over the images; paper: 60"""
    batch_size: int = 50
    """Images per device and forward pass; paper: 50"""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """Optimiser; paper: AdamW"""
    lr: float = 5e-4
    """Peak learning rate; paper: 5e-4"""
    lr_base_batch: int | None = None
    """Scale lr by global batch / lr_base_batch; default: lr is used as it is"""
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up from 0; paper: 5; at most a fifth of the run is used"""
    weight_decay: float = 1e-4
    """Weight decay of whatever trains; paper: 1e-4"""
    clip_grad: float | None = 1.0
    """Largest global L2 norm of the gradient; paper: 1"""
    augment: Literal["grading", "crop"] = "grading"
    """Augmentation: the paper's for round photographs (any rotation, both flips), or crops and flips as set here"""
    normalize: bool = True
    """Normalise images by the encoder's own statistics; the published code leaves them in [0, 1]"""
