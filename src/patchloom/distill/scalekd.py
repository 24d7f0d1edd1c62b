"""ScaleKD as a training method: recipes, the teacher's view of the images, what the report shows.

The algorithm itself is in `feature_mimicking`. Fan et al. 2024, arXiv 2411.06786.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.data.base import Source, StreamSource
from patchloom.distill.feature_mimicking import ScaleKD
from patchloom.distill.projector import Scale
from patchloom.distill.teachers import DistillConfig, DistillMethod
from patchloom.encoders import normalize
from patchloom.errors import UsageError
from patchloom.training.config import TrainConfig

if TYPE_CHECKING:
    from patchloom.report import Section


@dataclass(frozen=True, kw_only=True)
class ScaleKDConfig(DistillConfig):
    """Settings of ScaleKD; the defaults are the paper's "traditional" recipe for convolutional students."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "traditional": {},
        "advanced_cnn": {
            "epochs": 300,
            "optimizer": "lamb",
            "lr": 5e-3,
            "lr_base_batch": 2048,
            "weight_decay": 0.02,
            "clip_grad": 5.0,
            "lr_drops": (),
            "min_lr": 0.0,
            "warmup_epochs": 5.0,
            "auto_augment": "rand-m7-n2-mstd0.5-inc1",
            "erasing": 0.25,
            "loss": "bce",
        },
        "advanced_vit": {
            "epochs": 300,
            "optimizer": "adamw",
            "lr": 1e-3,
            "lr_base_batch": 1024,
            "weight_decay": 0.05,
            "clip_grad": 5.0,
            "lr_drops": (),
            "min_lr": 1e-5,
            "warmup_epochs": 20.0,
            "auto_augment": "rand-m9-n2-mstd0.5-inc1",
            "erasing": 0.25,
            "label_smoothing": 0.1,
            "ema": 0.9999,
        },
    }

    encoder: str = "resnet50"
    """Student: any image model of timm, or the path of a bundle or run to start from; paper: ResNet-50 and others"""
    teacher: str
    """Path of a bundle or run, or a timm model with published weights: a ViT, BEiT, EVA or Swin"""
    kd: bool = True
    """Also learn the teacher's answers (paper); goes off by itself where the teacher knows other classes"""
    tpp: bool = True
    """Send the student's earlier map through the teacher's last blocks (teacher parameter perception)"""
    dfm: bool = True
    """Compare features without their mean too (dual-view feature mimicking)"""
    cap: bool = True
    """Project by cross-attention; off: a 1x1 convolution, plain feature distillation"""
    alpha: tuple[float, float] = (0.08, 0.06)
    """Weights of the comparison as it is and of that without the mean; paper: 0.08 and 0.06"""
    kd_weight: float = 0.5
    """Weight of the teacher's answers; the labels have the rest; paper: 0.5"""
    temperature: float = 1.0
    """Temperature of the teacher's answers; paper: 1"""
    num_heads: tuple[int, int] | None = None
    """Attention heads of the projectors of the earlier and the last map; default: 64 channels of the teacher each"""
    softmax_scale: float = 5.0
    """Factor on the projectors' attention scores besides 1/√d; paper: 5"""
    tpp_blocks: int | None = None
    """Blocks of a ViT teacher that the earlier map is sent through; default: a twelfth of them, at least 1"""
    student_stages: tuple[int, int] | None = None
    """Feature levels of the student, from 0; default: those at a 16th and a 32nd of the image, or the last two"""
    scale: Scale = "per_token"
    """How comparisons weigh in grids other than 7x7: as there (per_token), or summed over all positions (sum, paper)"""
    loss: Literal["ce", "bce"] = "ce"
    """Loss against the labels: cross-entropy, or one binary cross-entropy for each class, summed (advanced_cnn)"""
    teacher_drop_path: bool = False
    """Keep the teacher's stochastic depth at work, as the published training did by accident"""
    recompute_tail: bool = False
    """Recompute the teacher's last blocks in the backward pass: less memory, a little more time"""
    epochs: int = 100
    """Passes over the images; paper: 100, advanced recipes 300"""
    batch_size: int = 256
    """Images per device and forward pass; paper: 256 in all, 2048 and 1024 in the advanced recipes"""
    optimizer: Literal["adamw", "sgd", "lamb"] = "sgd"
    """Optimiser; paper: sgd, lamb (advanced_cnn), adamw (advanced_vit)"""
    lr: float = 0.1
    """Peak learning rate for a global batch of lr_base_batch; paper: 0.1"""
    lr_base_batch: int | None = 256
    """Scale lr by global batch / lr_base_batch; null uses lr as it is"""
    lr_drops: tuple[float, ...] = (0.3, 0.6, 0.9)
    """Shares of the run at which the learning rate is multiplied by lr_drop; paper: epochs 30, 60 and 90 of 100"""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0; paper: none, advanced recipes 5 and 20"""
    weight_decay: float = 1e-4
    """Weight decay (not on biases, norms, position embeddings and class tokens); paper: 1e-4"""
    mixup: float = 0.0
    """Alpha of mixup; paper: none"""
    cutmix: float = 0.0
    """Alpha of cutmix; paper: none"""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes; paper: none, 0.1 in advanced_vit"""
    auto_augment: str | None = None
    """RandAugment as timm spells it; paper: none, see the presets"""
    color_jitter: float = 0.0
    """Strength of colour jitter, in force without RandAugment only; paper: none"""
    erasing: float = 0.0
    """Probability of random erasing; paper: none, 0.25 in the advanced recipes"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if len(self.alpha) != 2 or min(self.alpha) < 0:
            raise UsageError(f"alpha is {self.alpha}; give two numbers that are at least 0")
        if not 0 < self.kd_weight <= 1:
            raise UsageError(f"kd_weight is {self.kd_weight}; it must be above 0 and at most 1 (kd=false for none)")
        if self.temperature <= 0:
            raise UsageError(f"temperature is {self.temperature}; it must be above 0")
        if self.softmax_scale <= 0:
            raise UsageError(f"softmax_scale is {self.softmax_scale}; it must be above 0")
        for name in ("num_heads", "student_stages"):
            if getattr(self, name) is not None and len(getattr(self, name)) != 2:
                raise UsageError(f"{name} is {getattr(self, name)}; give two numbers, for the earlier and the last map")


class ScaleKDMethod(DistillMethod):
    """Any student learns from a strong vision transformer by three aligned views of its features."""

    config_class: ClassVar[type[TrainConfig]] = ScaleKDConfig
    config: ScaleKDConfig

    def __init__(self, config: ScaleKDConfig, source: Source | StreamSource) -> None:
        super().__init__(config, source)
        reason = self.teacher.why_not(self.class_names) if config.kd else None
        if reason is not None:
            self.notice(f"{reason}, so its answers are not learnt and its features alone teach")
        self.kd = config.kd and reason is None
        self.model = ScaleKD(
            self.encoder,
            self.teacher.model,
            student_size=(self.input_size, self.input_size),
            teacher_size=self.teacher.size,
            kd=self.kd,
            tpp=config.tpp,
            dfm=config.dfm,
            cap=config.cap,
            alpha=config.alpha,
            num_heads=config.num_heads,
            softmax_scale=config.softmax_scale,
            tpp_blocks=config.tpp_blocks,
            student_stages=config.student_stages,
            scale=config.scale,
            norm="layer" if "convnext" in type(self.encoder).__name__.lower() else "batch",
            kd_weight=config.kd_weight,
            temperature=config.temperature,
            criterion=self.label_loss,
            teacher_drop_path=config.teacher_drop_path,
            recompute_tail=config.recompute_tail,
        )
        self._say_how_grids_meet()

    def _say_how_grids_meet(self) -> None:
        taps, (height, width) = self.model.student, self.model.last_grid
        if taps.substituted:
            levels = " and ".join(f"1/{reduction}" for reduction in taps.reductions)
            self.notice(f"the student has no maps at a 16th and a 32nd of the image; those at {levels} are taken")
        own = self.model.student_grid
        if own != (height, width):
            how = "cross-attention" if self.config.cap else "bilinear resampling"
            self.notice(f"the student's last map of {own[0]}x{own[1]} meets the teacher's of {height}x{width} by {how}")

    def label_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss against labels (B,) or shares (B, C)."""
        if self.config.loss == "ce":
            return self.targets.loss(logits, labels)
        wanted = F.one_hot(labels, logits.shape[1]) if labels.ndim == 1 else labels
        return F.binary_cross_entropy_with_logits(logits.float(), wanted.float(), reduction="sum") / len(logits)

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss and those parts of it that are in force, see `ScaleKD`."""
        images, labels = self.mixed(batch)
        third, fourth, logits = self.model.student(images)
        losses = self.model.losses_from_features(third, fourth, logits, self.seen(images), labels)
        del losses["logits"]
        return losses

    def seen(self, images: Tensor) -> Any:
        """Return what the teacher makes of images normalised for the student."""
        seen = self.model.teacher(self.teacher.view(images, self.encoder))
        return seen if seen.logits is None else replace(seen, logits=self.teacher.in_order(seen.logits))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # The student stands under `encoder`, the teacher where it lies.
        for name in [name for name in checkpoint["state_dict"] if name.startswith(SHARED)]:
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        for prefix, own in zip(SHARED, ("encoder.", "teacher.model."), strict=True):
            state |= {prefix + name.removeprefix(own): value for name, value in state.items() if name.startswith(own)}

    def summary(self) -> dict[str, Any]:
        """Return what the run learnt from, how both compare, and how near the projected features came."""
        return {**super().summary(), "kd": self.kd, **self.distances()}

    @torch.no_grad()
    def distances(self) -> dict[str, float]:
        """Return the mean squared distances of unit features on test images, as they are and without their mean.

        Without dual-view mimicking both are those of the one projection there is.
        """
        if self.test is None:
            return {}
        if not hasattr(self, "_distances"):
            found, _ = self.outputs(self._distances_of, self.device, self.model)
            names = ("spatial_distance", "frequency_distance")
            self._distances = dict(zip(names, found.mean(0).tolist(), strict=True))
        return self._distances

    def _distances_of(self, images: Tensor) -> Tensor:
        """Return (B, 2), see `distances`, of images in [0, 1]."""
        tokens, target = self.projected(normalize(images, self.encoder))
        rows = []
        for without_mean, said in ((False, tokens[0]), (True, tokens[-1])):
            held, told = (part.float() for part in (target, said.transpose(1, 2).unflatten(2, target.shape[-2:])))
            if without_mean:
                held, told = (part - part.mean((2, 3), keepdim=True) for part in (held, told))
            rows.append((F.normalize(told, dim=1) - F.normalize(held, dim=1)).square().sum(1).mean((1, 2)))
        return torch.stack(rows, 1)

    def projected(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the projections of the student's last map, one for each view, and the teacher's map.

        Args:
            images: (B, C, H, W), normalised for the student.

        Returns:
            Tokens (B, h·w, Ct), and (B, Ct, h, w).
        """
        third, fourth, _ = self.model.student(images)
        seen = self.seen(images)
        return self.model.project(third, fourth, seen).last, seen.features

    @torch.no_grad()
    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """Return rows of pictures: images, the teacher's last features in colours, the student's projected ones.

        Args:
            images: (n, C, H, W) uint8, or float in [0, 1].

        Returns:
            Each (n, 3, H, W) float in [0, 1], on the CPU; one set of colours for both models.
        """
        from patchloom.report.figures import pca_colours

        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        pixels = self.pixels(images).to(self.device)
        tokens, target = self.projected(normalize(pixels, self.encoder))
        for module, training in modes:
            module.training = training
        held, grid = target.flatten(2).transpose(1, 2), (int(target.shape[-2]), int(target.shape[-1]))
        both = F.normalize(torch.cat([held, tokens[0]]).float(), dim=-1).cpu()  # unit vectors, as they are compared
        painted = F.interpolate(pca_colours(both, grid), size=pixels.shape[-2:], mode="nearest")
        return {"image": pixels.cpu(), "teacher": painted[: len(held)], "student": painted[len(held) :]}

    def report_sections(self, images: Tensor) -> list[Section]:
        """Return how both compare, and the student's projected features beside the teacher's."""
        from patchloom.report import Section, image_grid

        first, *rest = super().report_sections(images)
        text = (
            "Held-out images; the teacher's last features as red, green and blue, and below what the projector makes "
            "of the student's, in the same colours: where they agree, the student has learnt what the teacher sees."
        )
        for name, value in self.distances().items():
            text += f" {name.replace('_', ' ').capitalize()} on the test images: {value:.3f} (0 to 4)."
        figure = image_grid(self.pictures(images))
        return [first, Section(title="Features of both", text=text, figures=[figure]), *rest]


# Where modules stand a second time within the method.
SHARED = ("model.student.model.", "model.teacher.model.")
