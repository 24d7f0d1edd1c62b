"""ScaleKD: a strong vision transformer teaches any student by three aligned views of its features.

Cross-attention projectors turn the student's last two maps into tokens of the teacher; there they are compared as they
are and without their mean, and the earlier ones pass the teacher's own frozen tail first. Fan et al. 2024,
arXiv 2411.06786, and the published code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from patchloom.encoders import in_chans
from patchloom.errors import UsageError
from patchloom.systems.scalekd.projector import (
    CrossAttentionProjector,
    Scale,
    default_heads,
    mimic_alternative,
    mimic_spatial,
)
from patchloom.systems.scalekd.split_teacher import Teacher, TeacherOutput
from patchloom.training.distillation import kd_loss


class StudentMaps(NamedTuple):
    """What a student gives for distillation."""

    third: Tensor
    """(B, C3, H3, W3), the map at a sixteenth of the image, or of the block at three quarters of the depth."""
    fourth: Tensor
    """(B, C4, H4, W4), the last map."""
    logits: Tensor
    """(B, classes)."""


class Projected(NamedTuple):
    """A student's features in the teacher's space, one entry for each view."""

    perceived: list[Tensor]
    """Of the earlier map, (B, h·w, Ct) after the teacher's tail; empty without it."""
    last: list[Tensor]
    """Of the last map, (B, h·w, Ct)."""


class StudentTaps(nn.Module):
    """Any timm model, giving its last two maps beside its logits.

    Hierarchical models give the maps of reduction 16 and 32 (or their last two), plain ones the output of the block at
    three quarters of the depth and the last one after the final norm. Found by timm's own feature information.

    Args:
        model: A timm model with a classifier.
        stages: Numbers of the two feature levels to take, in place of the rule.

    Attributes:
        reductions: How many times smaller than the image the two maps are.
        substituted: A hierarchical model without maps of reduction 16 and 32: its last two are taken.

    Raises:
        UsageError: A model without intermediate features, or fewer than two of them.
    """

    def __init__(self, model: Any, stages: tuple[int, int] | None = None) -> None:
        super().__init__()
        if not hasattr(model, "forward_intermediates") or not getattr(model, "feature_info", None):
            raise UsageError(f"a {type(model).__name__} has no intermediate features; choose another student of timm")
        self.model: Any = model
        info = list(model.feature_info)
        if len(info) < 2:
            raise UsageError(f"a {type(model).__name__} has {len(info)} feature level, and two are needed")
        reductions = [int(level["reduction"]) for level in info]
        self.is_plain = len(set(reductions)) == 1
        self.substituted = stages is None and not self.is_plain and not {16, 32} <= set(reductions)
        if stages is None:
            stages = self._rule(reductions)
        if not all(0 <= stage < len(info) for stage in stages):
            raise UsageError(f"student_stages is {stages}; this student has levels 0 to {len(info) - 1}")
        self.stages = stages
        self.reductions = tuple(reductions[stage] for stage in stages)
        self.dims = tuple(int(info[stage]["num_chs"]) for stage in stages)

    def _rule(self, reductions: list[int]) -> tuple[int, int]:
        levels = len(reductions)
        if self.is_plain:
            return max(0, levels * 3 // 4 - 1), levels - 1
        if 16 in reductions and 32 in reductions:
            fine, coarse = (levels - 1 - reductions[::-1].index(reduction) for reduction in (16, 32))
            return fine, coarse
        return levels - 2, levels - 1

    def forward(self, images: Tensor) -> StudentMaps:
        """Return maps and logits for (B, C, H, W) normalised images."""
        last, maps = self.model.forward_intermediates(images, indices=list(self.stages), output_fmt="NCHW")
        third, fourth = maps
        if self.is_plain and self.stages[1] == len(self.model.feature_info) - 1:
            prefix = int(getattr(self.model, "num_prefix_tokens", 0))
            # The last one is normed; where that is done after pooling, the norm there serves.
            norm, behind_pool = getattr(self.model, "norm", None), getattr(self.model, "fc_norm", None)
            late = isinstance(norm, nn.Identity) and isinstance(behind_pool, nn.Module)
            normed = last if behind_pool is None or not late else behind_pool(last)
            fourth = normed[:, prefix:].transpose(1, 2).reshape(fourth.shape)
        return StudentMaps(third, fourth, self.model.forward_head(last))


class ScaleKD(nn.Module):
    """Student, teacher and the projectors between them.

    Args:
        student: A timm model with a classifier.
        teacher: A ViT, BEiT, EVA or Swin of timm.
        student_size: (H, W) of the student's images in pixels.
        teacher_size: (H, W) of the teacher's; default: the student's.
        kd: Also learn the teacher's answers; needs a teacher that tells the same classes apart.
        tpp: Send the earlier map through the teacher's tail (teacher parameter perception).
        dfm: Compare without the mean too (dual-view feature mimicking).
        cap: Project by cross-attention; False is plain feature distillation through a 1x1 convolution.
        alpha: Weights of the two views.
        num_heads: Heads of the projectors of the earlier and the last map; default: 64 channels each.
        softmax_scale: Factor on the scores of the projectors, for both or for each.
        tpp_blocks: Blocks of a plain teacher's tail.
        student_stages: Feature levels to take.
        scale: Weight of grids of other sizes than 7 x 7, see `mimic_spatial`.
        norm: Norm of the projectors: `batch`, or `layer` for ConvNeXt students.
        kd_weight: Weight of the teacher's answers; the labels have the rest.
        temperature: Of the teacher's answers.
        criterion: Loss of logits against labels.
        teacher_drop_path: See `Teacher`.
        recompute_tail: Recompute the tail's activations in the backward pass.

    Attributes:
        student_grid: (H, W) of the student's last map.
        last_grid: (h, w) of the teacher's.

    Raises:
        UsageError: Teacher and student do not fit as asked.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        *,
        student_size: tuple[int, int],
        teacher_size: tuple[int, int] | None = None,
        kd: bool = True,
        tpp: bool = True,
        dfm: bool = True,
        cap: bool = True,
        alpha: tuple[float, float] = (0.08, 0.06),
        num_heads: tuple[int, int] | None = None,
        softmax_scale: float | tuple[float, float] = 5.0,
        tpp_blocks: int | None = None,
        student_stages: tuple[int, int] | None = None,
        scale: Scale = "sum",
        norm: str = "batch",
        kd_weight: float = 0.5,
        temperature: float = 1.0,
        criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        teacher_drop_path: bool = False,
        recompute_tail: bool = False,
    ) -> None:
        super().__init__()
        self.student = StudentTaps(student, student_stages)
        self.teacher = Teacher(teacher, tpp_blocks, teacher_drop_path)
        self.kd_weight, self.temperature = kd_weight, temperature
        self.criterion, self.recompute_tail = criterion, recompute_tail
        self.alpha, self.dfm, self.tpp, self.cap, self.scale = alpha, dfm, tpp and cap, cap, scale
        classes = int(student.num_classes)
        self.kd = kd
        if kd and int(teacher.num_classes) != classes:
            has = f"{teacher.num_classes} classes" if teacher.num_classes else "no classifier"
            raise UsageError(f"the teacher has {has} and the student {classes}; fine-tune the teacher, or set kd=false")
        grid3, grid4 = self.teacher.grids(teacher_size or student_size)
        dim3, dim4 = self.teacher.dims
        with torch.no_grad():
            modes = [(module, module.training) for module in student.modules()]
            third, fourth, _ = self.student.eval()(torch.zeros(1, in_chans(student), *student_size))
            for module, training in modes:
                module.training = training
        self.last_grid = grid4
        self.student_grid = (int(fourth.shape[-2]), int(fourth.shape[-1]))
        heads3, heads4 = num_heads or (default_heads(dim3), default_heads(dim4))
        scale3, scale4 = softmax_scale if isinstance(softmax_scale, tuple) else (softmax_scale, softmax_scale)
        views = 2 if dfm else 1

        def projectors(x: Tensor, dim: int, grid: Any, heads: int, self_query: bool, sharp: float) -> nn.ModuleList:
            if not cap:
                return nn.ModuleList(nn.Conv2d(x.shape[1], dim, 1) for _ in range(views))
            shape = (int(x.shape[-2]), int(x.shape[-1]))
            return nn.ModuleList(
                CrossAttentionProjector(x.shape[1], dim, shape, grid, heads, self_query, sharp, norm)  # type: ignore[arg-type]
                for _ in range(views)
            )

        self.stage3 = projectors(third, dim3, grid3, heads3, True, scale3) if self.tpp else nn.ModuleList()
        self.stage4 = projectors(fourth, dim4, grid4, heads4, not self.tpp, scale4)

    def forward(self, images: Tensor, labels: Tensor, teacher_images: Tensor | None = None) -> dict[str, Tensor]:
        """Return the losses of a batch.

        Args:
            images: (B, C, H, W), normalised for the student.
            labels: (B,) classes or (B, classes) shares.
            teacher_images: The same images, sized and normalised for the teacher; default: `images`.

        Returns:
            `loss`, those parts of it in force (`ori_loss`, `loss_kd`, `loss_s3`, `loss_s3_alt`, `loss_s4`,
            `loss_s4_alt`), and the student's `logits`.
        """
        third, fourth, logits = self.student(images)
        teacher_output = self.teacher(images if teacher_images is None else teacher_images)
        return self.losses_from_features(third, fourth, logits, teacher_output, labels)

    def losses_from_features(
        self, third: Tensor, fourth: Tensor, logits: Tensor, teacher_output: TeacherOutput, labels: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses for given features, see `forward`."""
        target = teacher_output.features
        parts: dict[str, Tensor] = {}
        for stage, projections in zip(("s3", "s4"), self.project(third, fourth, teacher_output), strict=True):
            for view, tokens in enumerate(projections):
                parts[f"loss_{stage}_alt" if view else f"loss_{stage}"] = self._mimic(view, tokens, target)
        weight = self.kd_weight if self.kd else 0.0
        parts["ori_loss"] = (1 - weight) * self.criterion(logits.float(), labels)
        if self.kd:
            if teacher_output.logits is None:
                raise UsageError("the teacher gave no answers to learn from; set kd=false")
            parts["loss_kd"] = kd_loss(logits, teacher_output.logits, self.temperature, weight)
        return {"loss": torch.stack(list(parts.values())).sum(), **parts, "logits": logits}

    def project(self, third: Tensor, fourth: Tensor, teacher_output: TeacherOutput) -> Projected:
        """Return both maps of the student in the teacher's space."""
        perceived = [self._tail(projector(third), teacher_output) for projector in self.stage3]
        # Not detached: the last stage trains the earlier one too.
        queries: Sequence[Tensor | None] = perceived or [None] * len(self.stage4)
        last = [
            projector(fourth, query) if self.cap else _resized(projector(fourth), teacher_output.features)
            for projector, query in zip(self.stage4, queries, strict=True)
        ]
        return Projected(perceived, last)

    def _tail(self, tokens: Tensor, teacher_output: TeacherOutput) -> Tensor:
        if self.recompute_tail and torch.is_grad_enabled():
            recomputed: Tensor = checkpoint(self.teacher.tail, tokens, teacher_output, use_reentrant=False)
            return recomputed
        return self.teacher.tail(tokens, teacher_output)

    def _mimic(self, view: int, tokens: Tensor, target: Tensor) -> Tensor:
        compare = mimic_alternative if view else mimic_spatial
        return compare(tokens, target, self.alpha[view], self.scale)


def _resized(features: Tensor, target: Tensor) -> Tensor:
    """Return a map as tokens on the target's grid."""
    if features.shape[-2:] != target.shape[-2:]:
        features = F.interpolate(features, target.shape[-2:], mode="bilinear", antialias=True)
    return features.flatten(2).transpose(1, 2)
