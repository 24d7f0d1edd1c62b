"""ScaleKD as a training method: recipes, the teacher's view of the images, what the report shows.

The algorithm itself is in `feature_mimicking`. Fan et al. 2024, arXiv 2411.06786.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.data.base import Source, StreamSource
from patchloom.encoders import normalize
from patchloom.systems.scalekd.config import ScaleKDConfig
from patchloom.systems.scalekd.model import ScaleKD
from patchloom.training.config import TrainConfig
from patchloom.training.teachers import DistillMethod

if TYPE_CHECKING:
    from patchloom.report import Section


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
            student_size=self.input_size,
            teacher_size=self.teacher.image_size,
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
        student_grid = self.model.student_grid
        if student_grid != (height, width):
            how = "cross-attention" if self.config.cap else "bilinear resampling"
            self.notice(
                f"the student's last map of {student_grid[0]}x{student_grid[1]} meets the teacher's of "
                f"{height}x{width} by {how}"
            )

    def label_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss against labels (B,) or shares (B, C)."""
        if self.config.loss == "ce":
            return self.targets.loss(logits, labels)
        targets = F.one_hot(labels, logits.shape[1]) if labels.ndim == 1 else labels
        return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="sum") / len(logits)

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss and those parts of it that are in force, see `ScaleKD`."""
        images, labels = self.mixed(batch)
        third, fourth, logits = self.model.student(images)
        losses = self.model.losses_from_features(third, fourth, logits, self.teacher_output(images), labels)
        del losses["logits"]
        return losses

    def teacher_output(self, images: Tensor) -> Any:
        """Return what the teacher makes of images normalised for the student."""
        output = self.model.teacher(self.teacher.view(images, self.encoder))
        return output if output.logits is None else replace(output, logits=self.teacher.in_order(output.logits))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # The student stands under `encoder`, the teacher where it lies.
        for name in [name for name in checkpoint["state_dict"] if name.startswith(SHARED)]:
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        for prefix, ours in zip(SHARED, ("encoder.", "teacher.model."), strict=True):
            state |= {prefix + name.removeprefix(ours): value for name, value in state.items() if name.startswith(ours)}

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
            distances, _ = self.outputs(self._distances_of, self.device, self.model)
            names = ("spatial_distance", "frequency_distance")
            self._distances = dict(zip(names, distances.mean(0).tolist(), strict=True))
        return self._distances

    def _distances_of(self, images: Tensor) -> Tensor:
        """Return (B, 2), see `distances`, of images in [0, 1]."""
        tokens, target = self.projected(normalize(images, self.encoder))
        rows = []
        for without_mean, predicted in ((False, tokens[0]), (True, tokens[-1])):
            held, projected = (
                part.float() for part in (target, predicted.transpose(1, 2).unflatten(2, target.shape[-2:]))
            )
            if without_mean:
                held, projected = (part - part.mean((2, 3), keepdim=True) for part in (held, projected))
            rows.append((F.normalize(projected, dim=1) - F.normalize(held, dim=1)).square().sum(1).mean((1, 2)))
        return torch.stack(rows, 1)

    def projected(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the projections of the student's last map, one for each view, and the teacher's map.

        Args:
            images: (B, C, H, W), normalised for the student.

        Returns:
            Tokens (B, h·w, Ct), and (B, Ct, h, w).
        """
        third, fourth, _ = self.model.student(images)
        teacher_output = self.teacher_output(images)
        return self.model.project(third, fourth, teacher_output).last, teacher_output.features

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
        return [first, Section(title="Student and teacher features", text=text, figures=[figure]), *rest]


# Where modules stand a second time within the method.
SHARED = ("model.student.model.", "model.teacher.model.")
