"""Groups of settings that a run is composed of; a method takes those that mean something there.

`TrainConfig` is what every run has. What concerns an encoder whose weights train (`EncoderOptions`, `AverageOptions`,
`ExpertOptions`) and what is done to images (`CropOptions`, `ViewOptions`) is taken by the methods that do it.

>>> from dataclasses import fields
>>> [field.name for field in fields(ViewOptions)]
['crop_scale', 'flip', 'color_jitter']
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from patchloom.base.fractions import parse_epsilon
from patchloom.base.ranges import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    PositiveInt,
    Probability,
    Proportion,
    Share,
    Shares,
    inside,
)
from patchloom.base.settings import Settings
from patchloom.base.sizes import Size
from patchloom.base.source_options import SourceOptions, words
from patchloom.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class RunOptions(Settings):
    """Where a run is kept, and how it goes on."""

    out: str
    """Run folder; must be empty or absent unless resume or overwrite is set"""
    preset: str | None = None
    """Named recipe of the method that replaces the defaults below; what is given beside it wins"""
    seed: Count = 0
    """Seed of weights, order, augmentation and masks"""
    resume: bool = False
    """Go on with the run in out where it stopped; starts it if there is none"""
    overwrite: bool = False
    """Delete an earlier run in out first"""
    checkpoint_every: PositiveInt = 500
    """Optimiser steps between checkpoints; one is also written when an epoch and when the run ends"""
    log_every: PositiveInt = 20
    """Optimiser steps between rows of metrics.csv and of TensorBoard"""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        super().__post_init__()
        if self.resume and self.overwrite:
            raise UsageError("resume keeps the run and overwrite deletes it; set one of them")


@dataclass(frozen=True, kw_only=True)
class DataOptions(SourceOptions):
    """What is learnt from, and by which encoder."""

    data: str
    """Images to train on: a folder, shards (train-{000000..000099}.tar), photos, digits, torchvision:NAME or hf:NAME"""
    encoder: str = "ccvit_base_patch16_224"
    """Name of a timm model, or the path of a bundle or run to start from"""
    image_size: Size | None = None
    """Side of the training images in pixels, or height and width (256,128); default: what the encoder was made for"""
    in_chans: PositiveInt = 3
    """Channels of the images: 3 (grey ones are repeated), 1, or as many as the files have"""
    channel_mean: tuple[float, ...] | None = None
    """Mean per channel, in [0, 1], that images are normalised by, kept in the bundle; default: the encoder's own, and
    of images of other than 1 or 3 channels what a sample of them has"""
    channel_std: tuple[Positive, ...] | None = None
    """Standard deviation per channel, likewise"""

    def __post_init__(self) -> None:
        """Count the channels that are named, and refuse statistics of other ones."""
        super().__post_init__()
        if self.in_chans == 3 and (named := self.use_channels or self.channel_files):
            object.__setattr__(self, "in_chans", len(words(named)))
        if (self.channel_mean is None) != (self.channel_std is None):
            raise UsageError("channel_mean and channel_std belong together; give both or neither")
        for name in ("channel_mean", "channel_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.in_chans:
                raise UsageError(f"{name} has {len(values)} values; give one for each of {self.in_chans} channels")


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions(Settings):
    """How long is learnt, and from how many images at once."""

    epochs: PositiveInt = 300
    """Passes over the images; where not given, more than the recipe's if the images are few"""
    max_steps: PositiveInt | None = None
    """Stop after this many optimiser steps, whatever epochs says (the schedule ends there too)"""
    batch_size: PositiveInt = 128
    """Images per device and forward pass, or auto: the largest that fits into memory and is as fast as any, by a trial
    of at most 30 seconds; where not given, fewer than the recipe's if the images are few"""
    accumulate: PositiveInt = 1
    """Forward passes per optimiser step; the global batch is batch_size * accumulate * devices * nodes"""
    warmup_epochs: NonNegative = 10.0
    """Epochs of linear warm-up from 0; at most a fifth of the run is used"""
    min_lr: NonNegative = 1e-5
    """Learning rate at the end of the cosine"""


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(Settings):
    """How weights follow gradients."""

    lr: Positive = 1.5e-3
    """Peak learning rate, for a global batch of lr_base_batch where that is set"""
    lr_base_batch: PositiveInt | None = None
    """Scale lr by global batch / lr_base_batch (the field's linear rule uses 256); null: lr is used as it is"""
    weight_decay: NonNegative = 0.05
    """Weight decay; not on biases, norms, position embeddings and class tokens where nothing else is said"""
    weight_decay_end: NonNegative | None = None
    """Weight decay at the end of its cosine; null: constant"""
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    """AdamW betas"""
    eps: NonNegative = 1e-8
    """AdamW epsilon"""
    clip_grad: Positive | None = 3.0
    """Largest global L2 norm of the gradient; null for no clipping"""
    drop_path: Fraction = 0.0
    """Stochastic depth rate of the last block, in [0, 1)"""


@dataclass(frozen=True, kw_only=True)
class HardwareOptions(Settings):
    """What computes, and how the work is shared."""

    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """Arithmetic; auto is bf16-mixed on a GPU that has it and 32-true elsewhere"""
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """Kind of device"""
    devices: Count = 1
    """Devices (processes) per node; 0 means all there are"""
    nodes: PositiveInt = 1
    """Number of machines; start the same command on each (SLURM and torchrun are recognised)"""
    strategy: Literal["auto", "ddp", "ddp_spawn", "fsdp"] = "auto"
    """How processes share the work; auto is ddp when there is more than one"""
    num_workers: Count = 2
    """Processes per device that read and augment images, or auto: as many as keep up with training"""
    compile: bool = False
    """Compile the encoder's blocks with torch.compile (worth it for long runs)"""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time"""


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(Settings):
    """What is looked at on the way, and what the report shows."""

    probe_data: str | None = None
    """Labelled held-out images for the k-NN probe and the report's pictures; default: part of data"""
    probe_every: Count = 10
    """Epochs between probes (k-NN accuracy where labels exist, feature health always); 0 for none at all"""
    health_every: Count = 100
    """Optimiser steps between looks at the encoder's features, so that a collapse is named early; 0 for none"""
    report: bool = True
    """Write report.html at the end"""
    shown_channels: str | None = None
    """Channels that pictures in the report show as red, green and blue, or one as grey, such as 4,2,0; default: the
    first three"""


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(Settings):
    """Of an encoder whose own weights train: where they start, and how fast each block learns."""

    init_from: str | None = None
    """Bundle, run or timm model (its published weights) whose weights the encoder starts from (same architecture)"""
    layer_decay: Share = 1.0
    """Factor on the learning rate from each block to the one below it, in (0, 1]"""


@dataclass(frozen=True, kw_only=True)
class AverageOptions(Settings):
    """A moving average of the encoder."""

    ema: Proportion | None = None
    """Decay per step of a moving average of the encoder, in (0, 1); the bundle then holds the average"""


@dataclass(frozen=True, kw_only=True)
class ExpertOptions(HardwareOptions):
    """Experts weights averaging (Huang et al. 2023, arXiv 2308.06093)."""

    experts: Count = 0
    """Feed-forwards in place of one while training, averaged at the end (experts weights averaging); 0 for none"""
    expert_layers: Literal["alternate", "last_half", "all"] = "alternate"
    """Blocks whose feed-forward becomes experts: alternate (every second), last_half or all"""
    share_rate: Fraction = 0.3
    """How far experts move towards each other at a step, at the end of share_schedule; at most 1 - 1 / experts"""
    share_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the share rate gets there, from 0"""

    def __post_init__(self) -> None:
        """Refuse experts that cannot be averaged."""
        super().__post_init__()
        if self.experts:
            inside("experts", self.experts, Annotated[int, Ge(2)])
            inside("share_rate", self.share_rate, Annotated[float, Ge(0), Le((self.experts - 1) / self.experts)])
            if self.strategy == "fsdp":
                raise UsageError("experts cannot be averaged while fsdp holds them in shards; use strategy=ddp")


@dataclass(frozen=True, kw_only=True)
class AdversaryOptions(Settings):
    """Adversarial training, on images attacked within ε."""

    adversary: Literal["none", "dta", "pgd"] = "none"
    """Learn from attacked images, too: through the encoder the run starts from (dta), or the model itself (pgd)"""
    adversary_mix: Probability = 0.5
    """Share of the loss that is on attacked images"""
    adversary_eps: str | float = "10/255"
    """Largest change of a pixel value in [0, 1] by an adversary, such as 8/255"""
    adversary_steps: PositiveInt = 5
    """Steps of an adversary on each batch"""
    adversary_encoder: str | None = None
    """Public encoder of adversary=dta where it is another than the run starts from: bundle, run or timm model"""

    def __post_init__(self) -> None:
        """Refuse a change of pixels that cannot be, and an encoder that nothing is attacked through."""
        super().__post_init__()
        parse_epsilon("adversary_eps", self.adversary_eps)
        if self.adversary_encoder is not None and self.adversary != "dta":
            raise UsageError(f"adversary_encoder belongs to adversary=dta, and it is {self.adversary}; leave it out")


@dataclass(frozen=True, kw_only=True)
class CropOptions(Settings):
    """Random crops and mirror images."""

    crop_scale: Shares = (0.2, 1.0)
    """Least and most share of the image's area that a crop takes"""
    flip: Probability = 0.5
    """Probability of a horizontal flip; 0 where left and right differ, as in digits"""


@dataclass(frozen=True, kw_only=True)
class ViewOptions(CropOptions):
    """Random crops, mirror images and colours."""

    color_jitter: NonNegative = 0.0
    """Strength of changes of brightness, contrast and saturation"""


def start_of(config: Settings) -> str | None:
    """Return where the encoder's weights come from instead of being drawn, where a method has that setting."""
    return config.init_from if isinstance(config, EncoderOptions) else None
