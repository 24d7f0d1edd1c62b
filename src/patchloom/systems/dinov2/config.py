"""Settings of DINOv2 pre-training: the published recipes, and those of RAD-DINO and Phikon-v2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le

from patchloom.base.ranges import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    PositiveInt,
    Probability,
    Rising,
    Shares,
)
from patchloom.base.settings import Cited
from patchloom.base.sizes import Size
from patchloom.errors import UsageError
from patchloom.training.config import TrainConfig
from patchloom.training.options import EncoderOptions, ExpertOptions

if TYPE_CHECKING:
    from patchloom.data.multicrop import Augmentation
    from patchloom.systems.dinov2.gram import Gram

LARGE = {
    "image_size": 224,
    "out_dim": 131072,
    "separate_head": True,
    "bottleneck_dim": 384,
    "ibot_bottleneck_dim": 256,
    "centering": "sinkhorn_knopp",
    "drop_path": 0.4,
    "lr": 2e-4,
    "weight_decay_end": 0.2,
    "teacher_momentum": 0.994,
    "layer_decay": 1.0,
}
LONG = {"epochs": 500, "warmup_epochs": 80.0}

PRESETS: dict[str, dict[str, Any]] = {
    "vitl16_short": {"encoder": "vit_large_patch16_224"},
    "vitl14": {**LARGE, **LONG, "encoder": "vit_large_patch14_dinov2", "batch_size": 32},
    "vitg14": {**LARGE, **LONG, "encoder": "vit_giant_patch14_dinov2", "batch_size": 12},
    "rad_dino": {
        "encoder": "vit_base_patch14_dinov2",
        "image_size": 518,
        "batch_size": 40,
        "lr": 1e-3,
        "teacher_momentum": 0.996,
        "freeze_backbone_steps": 500,
        "global_scale": (0.5, 1.0),
        "local_scale": (0.2, 0.5),
        "jitter": (0.4, 0.4, 0.0, 0.0),
        "grayscale": 0.0,
        "solarize": 0.0,
        "pixel_mean": (0.5307, 0.5307, 0.5307),
        "pixel_std": (0.2583, 0.2583, 0.2583),
    },
    "phikon_v2": {
        **LARGE,
        "encoder": "vit_large_patch16_224",
        "batch_size": 32,
        "vertical_flip": 0.5,
        "rotate": True,
        "stain_jitter": 0.05,
    },
}


@dataclass(frozen=True, kw_only=True)
class Dinov2Config(ExpertOptions, EncoderOptions, TrainConfig):
    """Settings of DINOv2; the defaults are the published recipe for a large encoder, short schedule."""

    ABLATIONS: ClassVar[tuple[str, ...]] = (
        "batch_drop",
        "head_hidden_dim",
        "ibot_bottleneck_dim",
        "dino_weight",
        "ibot_weight",
        "koleo_weight",
        "student_temp",
        "teacher_temp",
        "teacher_temp_start",
        "teacher_temp_epochs",
        "teacher_momentum_end",
        "freeze_last_layer_epochs",
        "blur_as_published",
    )

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    RECIPE: ClassVar[Mapping[str, Any]] = {
        "encoder": "vit_large_patch16_224",
        "epochs": Cited(100, "paper: 100 or 500 of 1250 steps each"),
        "batch_size": Cited(64, "each gives 2 global and several local crops"),
        "lr": Cited(4e-3, "paper: 4e-3, large models 2e-4"),
        "min_lr": 1e-6,
        "weight_decay_end": Cited(0.4, "paper: 0.4, large models 0.2"),
        "betas": (0.9, 0.999),
        "layer_decay": Cited(0.9, "paper: 0.9, large models 1"),
    }

    WITHOUT: ClassVar[Mapping[str, Any]] = {"ema": Cited(None, "its teacher is a moving average already")}

    image_size: Size | None = None
    """Side of the global crops in pixels, or height and width; paper: 224. Default: what the encoder was made for"""
    lr_base_batch: PositiveInt | None = 1024
    """Scale lr by the square root of global batch / lr_base_batch; null: lr is used as it is"""
    weight_decay: NonNegative = 0.04
    """AdamW weight decay at the start (not on biases, norms and layer scale); paper: 0.04"""
    clip_grad: Positive | None = 3.0
    """Largest L2 norm of the gradient of the encoder and of each head, clipped separately; null for no clipping"""
    patch_embed_lr: NonNegative = 0.2
    """Factor on the learning rate of the patch embedding"""
    drop_path: Fraction = 0.3
    """Stochastic depth rate, the same in all blocks; paper: 0.3, large models 0.4"""
    batch_drop: bool = True
    """Above a rate of 0.1 leave whole samples out of a residual branch, which saves their cost, as published"""
    layer_scale: NonNegative | None = 1e-5
    """Initial layer scale of a fresh encoder whose architecture has none; paper: 1e-5. Null: as the architecture is"""
    registers: Count | None = None
    """Register tokens of a fresh encoder; default: as the architecture is"""
    init_from: str | None = None
    """Bundle, run or timm model with published weights to continue from; names the architecture too"""
    heads_from: str | None = None
    """Run whose heads, mask token and centres training goes on with; default: fresh ones"""
    freeze_backbone_steps: Count = 0
    """Steps in which only the heads learn, at most a tenth of the run: for fresh heads on a trained encoder"""

    out_dim: Annotated[int, Ge(2)] = 65536
    """Prototypes; paper: 65 536, large models 131 072"""
    head_hidden_dim: PositiveInt = 2048
    """Width of the heads' hidden layers; paper: 2048"""
    bottleneck_dim: PositiveInt = 256
    """Width of the vector that is compared with prototypes; paper: 256, large models 384"""
    separate_head: bool = False
    """Give the patches a head of their own; paper: large models do"""
    ibot_bottleneck_dim: PositiveInt | None = None
    """Bottleneck of the patches' own head; paper: 256. Default: as bottleneck_dim"""
    ibot_out_dim: PositiveInt | None = None
    """Prototypes of the patches' own head; DINOv3: 98 304 beside 262 144. Default: as out_dim"""
    ibot_hidden_dim: PositiveInt | None = None
    """Width of its hidden layers; DINOv3: 4096 beside 8192. Default: as head_hidden_dim"""
    head_layers: PositiveInt = 3
    """Linear layers of a head up to the bottleneck; paper: 3"""
    ibot_layers: PositiveInt | None = None
    """Those of the patches' own head. Default: as head_layers"""
    head_bias: bool = True
    """Biases in these layers; paper: yes"""
    head_batch_norm: bool = False
    """Batch normalisation after each hidden layer of the heads; paper: none"""
    centering: Literal["centering", "sinkhorn_knopp"] = "centering"
    """How teacher logits become probabilities; paper: large models use sinkhorn_knopp"""
    dino_weight: NonNegative = 1.0
    """Weight of the image-level loss"""
    ibot_weight: NonNegative = 1.0
    """Weight of the patch-level loss; 0: nothing is masked (plain DINO)"""
    koleo_weight: NonNegative = 0.1
    """Weight of the spread of features (KoLeo), computed per process and crop; paper: 0.1"""
    koleo_topk: PositiveInt = 1
    """Neighbours that a feature is pushed away from; paper: 1"""
    koleo_across: bool = False
    """Look for neighbours in the batch of all processes (DINOv3's distributed form)"""
    koleo_group: PositiveInt | None = None
    """Images looked among then, of neighbouring processes. Default: all"""
    gram_weight: NonNegative = 0.0
    """Weight of the Gram loss, which keeps the likenesses of patches as an anchor has them; DINOv3: 1, at high
    resolution 1.5; 0: none"""
    gram_anchor: Literal["frozen", "teacher"] = "frozen"
    """The anchor: an earlier teacher, frozen (DINOv3), or the teacher of the moment"""
    gram_from: str | None = None
    """Bundle or run of the frozen anchor. Default: the teacher as it is at step gram_start"""
    gram_start: Count = 0
    """Steps before the Gram loss counts; DINOv3: 1,000,000"""
    gram_update_every: Count = 10_000
    """Steps after which the frozen anchor is taken anew from the teacher; DINOv3: 10,000; 0: never"""
    gram_first_update: Count = 0
    """Steps before the first of these times; DINOv3: 1,010,000"""
    gram_updates: Count | None = 3
    """Most such times; DINOv3: 3. Null: any number"""
    gram_crop_size: Size | None = None
    """Side of the global crops as the frozen anchor sees them, pixels, or height and width; what it says is resampled
    to the student's grid (DINOv3: higher than theirs). Default: as they are"""
    gram_level: Literal["image", "batch"] = "image"
    """Compare the patches of each image (DINOv3), or those of the whole batch of a process"""
    gram_normalize: bool = True
    """Compare directions of patches (DINOv3); else plain products"""
    gram_negatives: Literal["none", "both", "anchor", "anchor_both"] = "none"
    """Negative similarities that count as 0: none (DINOv3), both matrices', the anchor's, or anchor_both: the anchor's,
    and the student's where both are negative (as another version of the published code has it)"""
    gram_tokens: Literal["all", "masked", "unmasked"] = "all"
    """Patches compared; masked or unmasked ones at gram_level=batch only"""
    student_temp: Positive = 0.1
    """Temperature of the student"""
    teacher_temp: Positive = 0.07
    """Temperature of the teacher after its warm-up"""
    teacher_temp_start: Positive = 0.04
    """Temperature of the teacher at the start"""
    teacher_temp_epochs: NonNegative = 30.0
    """Epochs over which the teacher's temperature rises; at most three tenths of the run are used"""
    teacher_momentum: Probability = 0.992
    """Share of the teacher kept at each step, at the start; paper: 0.992, large models 0.994"""
    teacher_momentum_end: Probability = 1.0
    """Share of the teacher kept at each step, at the end of its cosine"""
    freeze_last_layer_epochs: NonNegative = 1.0
    """Epochs in which the prototypes do not move; at most a tenth of the run is used"""
    mask_probability: Probability = 0.5
    """Share of the global crops that are masked"""
    mask_ratio: Annotated[tuple[Probability, Probability], Rising()] = (0.1, 0.5)
    """Least and most share of the patches hidden in a masked crop"""

    local_crops: Count = 8
    """Local crops of each image"""
    local_size: Size | None = None
    """Side of the local crops in pixels, or height and width; paper: 96, or 98 with patches of 14. Default: 3/7 of the
    global crops' sides"""
    global_scale: Shares = (0.32, 1.0)
    """Least and most share of the image's area that a global crop takes"""
    local_scale: Shares = (0.05, 0.32)
    """Least and most share of the image's area that a local crop takes"""
    flip: Probability = 0.5
    """Probability of a horizontal flip"""
    vertical_flip: Probability = 0.0
    """Probability of a vertical flip; for images without an up"""
    rotate: bool = False
    """Turn crops by right angles; for images without an up"""
    jitter: tuple[Probability, Probability, Probability, Annotated[float, Ge(0), Le(0.5)]] = (0.4, 0.4, 0.2, 0.1)
    """Strength of the changes of brightness, contrast, saturation and hue"""
    jitter_probability: Probability = 0.8
    """Probability of the colour jitter"""
    stain_jitter: Probability = 0.0
    """Strength of the change of the density of each stain; for stained tissue"""
    grayscale: Probability = 0.2
    """Probability that a crop loses its colour"""
    blur: tuple[Probability, Probability, Probability] = (0.0, 0.9, 0.5)
    """Probability of a blur of the first global, second global and local crops: what trained DINOv2 in truth"""
    blur_as_published: bool = False
    """Blur with the probabilities the paper states, 1, 0.1 and 0.5, instead"""
    solarize: Probability = 0.2
    """Probability that the second global crop is solarised"""
    pixel_mean: tuple[float, ...] | None = None
    """Mean of each channel, in [0, 1], that is subtracted; default: what the encoder was made for"""
    pixel_std: tuple[Positive, ...] | None = None
    """Standard deviation of each channel that is divided by; default: what the encoder was made for"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if self.strategy == "fsdp":
            raise UsageError("dinov2 trains two networks in step, which strategy=fsdp would tear apart; use ddp")
        if self.koleo_weight > 0 and self.batch_size < 2:
            raise UsageError("batch_size=1 leaves KoLeo no neighbour; raise batch_size, or set koleo_weight=0")
        if self.koleo_weight > 0 and self.koleo_topk >= self.batch_size and not self.koleo_across:
            raise UsageError(
                f"koleo_topk={self.koleo_topk} neighbours are more than {self.batch_size} images have; lower it, or "
                f"raise batch_size"
            )
        if self.koleo_group is not None and not self.koleo_across:
            raise UsageError("koleo_group is for koleo_across=true; set it, or leave the group out")
        for name in ("gram_from", "gram_crop_size"):
            if getattr(self, name) is not None and (self.gram_weight == 0 or self.gram_anchor == "teacher"):
                raise UsageError(f"{name} is for a frozen anchor; set gram_weight above 0 and gram_anchor=frozen")
        self.gram()
        if (self.pixel_mean is None) != (self.pixel_std is None):
            raise UsageError("pixel_mean and pixel_std belong together; set both or neither")
        self.augmentation()

    def gram(self) -> Gram | None:
        """Return how patches are anchored, or None where they are not."""
        if self.gram_weight == 0:
            return None
        from patchloom.systems.dinov2.gram import Gram

        return Gram(
            weight=self.gram_weight,
            anchor=self.gram_anchor,
            image_level=self.gram_level == "image",
            normalize=self.gram_normalize,
            remove_negatives=self.gram_negatives,
            tokens=self.gram_tokens,
        )

    def augmentation(self) -> Augmentation:
        """Return what is done to the crops."""
        from patchloom.data.multicrop import Augmentation

        return Augmentation(
            flip=self.flip,
            vertical_flip=self.vertical_flip,
            rotate=self.rotate,
            jitter=self.jitter,
            jitter_probability=self.jitter_probability,
            stain_jitter=self.stain_jitter,
            grayscale=self.grayscale,
            blur=(1.0, 0.1, 0.5) if self.blur_as_published else self.blur,
            solarize=self.solarize,
        )
