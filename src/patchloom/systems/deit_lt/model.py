"""DeiT-LT: a ViT with one head for the labels and one for what a CNN says, on classes that are very unequal.

The labels' head ends up good at frequent classes, the distillation head at rare ones; their mean is the answer.
Rangwani et al. 2024, arXiv 2404.02900; where paper and published code differ, the code is followed.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import timm
import torch
from timm.models import checkpoint_seq
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.base.sizes import Size, pair
from patchloom.errors import UsageError
from patchloom.training.distillation import soft_distillation_loss


class TwoHeads(NamedTuple):
    """What the student gives while training."""

    cls: Tensor
    """(B, C) logits of the labels' head."""
    dist: Tensor
    """(B, C) logits of the distillation head."""
    cosine: Tensor
    """(B,) cosine of the two features the heads read; they drift apart where the teacher teaches something else."""


class DeiTLT(nn.Module):
    """A distilled DeiT of timm that keeps its two answers apart, and its teacher.

    Args:
        encoder: Name of a distilled DeiT, or such a model.
        num_classes: C.
        teacher: Any classifier of the same classes; frozen, in eval mode always. None: both heads learn from labels.
        teacher_size: Side of the images the teacher sees; the student's very input is resized to it, bicubically.
        antialias: Smooth before shrinking; the published results were made without.
        **model_args: Arguments of the timm model.

    Raises:
        UsageError: A model without distillation token, or a teacher of other classes.
    """

    def __init__(
        self,
        encoder: str | nn.Module = "deit_base_distilled_patch16_224",
        num_classes: int = 1000,
        teacher: nn.Module | None = None,
        teacher_size: int | None = None,
        antialias: bool = False,
        **model_args: Any,
    ) -> None:
        super().__init__()
        if isinstance(encoder, str):
            if not timm.is_model(encoder):
                raise UsageError(
                    f"unknown student {encoder!r}; use a distilled DeiT such as deit_tiny_distilled_patch16_224"
                )
            encoder = timm.create_model(encoder, num_classes=num_classes, **model_args)
        require_two_heads(encoder)
        self.encoder: Any = encoder
        self.teacher = teacher.requires_grad_(False).eval() if teacher is not None else None
        self.teacher_size, self.antialias = teacher_size, antialias

    def train(self, mode: bool = True) -> DeiTLT:
        """Train the student; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def student_outputs(self, images: Tensor) -> TwoHeads:
        """Return the logits of both heads, and how alike their features are."""
        return two_heads(self.encoder, images)

    @torch.no_grad()
    def teacher_logits(self, images: Tensor) -> Tensor | None:
        """Return what the teacher says of the student's very input: augmented, mixed, normalised, then resized."""
        if self.teacher is None:
            return None
        images = teacher_view(images, self.teacher_size, self.antialias)
        logits: Tensor = self.teacher(images)
        return logits

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the logits `cls`, `dist` and their mean `avg`, (B, C) each."""
        cls, dist, _ = self.student_outputs(images)
        return {"cls": cls, "dist": dist, "avg": (cls + dist) / 2}


def require_two_heads(model: nn.Module) -> None:
    """Refuse a model without distillation token.

    Raises:
        UsageError: With its kind and what to use.
    """
    if not isinstance(model, VisionTransformerDistilled):
        raise UsageError(
            f"a {type(model).__name__} has no distillation token; use a distilled DeiT such as "
            f"deit_tiny_distilled_patch16_224"
        )


def two_heads(model: Any, images: Tensor) -> TwoHeads:
    """Return the answers of a distilled DeiT with its heads apart, whatever mode it is in.

    Args:
        model: The DeiT.
        images: (B, 3, H, W), normalised, of any size that patches fill.
    """
    x = model.patch_embed.proj(images)
    grid = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2)
    prefix = torch.cat([model.cls_token, model.dist_token], 1).expand(len(x), -1, -1)
    x = model.pos_drop(
        torch.cat([prefix, x], 1)
        + resized_positions(model.pos_embed, (grid[0], grid[1]), stored_grid=model.patch_embed.grid_size)
    )
    recompute = model.grad_checkpointing and torch.is_grad_enabled()
    x = model.norm(checkpoint_seq(model.blocks, x) if recompute else model.blocks(x))
    label, taught = x[:, 0], x[:, 1]
    cosine = F.cosine_similarity(label, taught, dim=1, eps=1e-6)
    return TwoHeads(model.head(label), model.head_dist(taught), cosine)


def teacher_view(images: Tensor, size: Size | None, antialias: bool = False) -> Tensor:
    """Return the student's very input at the size a teacher sees, resized bicubically; None: as it is."""
    if size is None or tuple(images.shape[-2:]) == pair(size):
        return images
    return F.interpolate(images, pair(size), mode="bicubic", align_corners=False, antialias=antialias)


class DistillationTokenLoss(nn.Module):
    """(1 - α) cross-entropy with the labels on one head, α with the teacher's first choice on the other.

    Args:
        alpha: α.
        kind: `hard` (paper), `soft` (divergence at a temperature), or `none`: both heads learn from the labels.
        temperature: Of `soft`.
        class_weights: (C,) weights of the teacher's choices, in force where a call says so (deferred re-weighting).
        class_map: (C,) int64, the student's number of each class of the teacher.

    Raises:
        UsageError: An unknown kind, weights with `soft`, or all of them zero.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        kind: Literal["hard", "soft", "none"] = "hard",
        temperature: float = 1.0,
        class_weights: Tensor | None = None,
        class_map: Tensor | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("hard", "soft", "none"):
            raise UsageError(f"unknown distillation {kind!r}; use hard, soft or none")
        if kind == "soft" and class_weights is not None:
            raise UsageError("soft distillation cannot be weighted by class; use hard")
        if class_weights is not None and not bool((class_weights > 0).any()):
            raise UsageError("all class weights are zero; at least one has to count")
        self.alpha, self.kind, self.temperature = alpha, kind, temperature
        self.class_weights: Tensor | None
        self.class_map: Tensor | None
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.register_buffer("class_map", class_map, persistent=False)

    def forward(
        self,
        logits_cls: Tensor,
        logits_dist: Tensor,
        labels: Tensor,
        teacher_logits: Tensor | None = None,
        weighted: bool = False,
        weighted_base: bool = False,
    ) -> dict[str, Tensor]:
        """Return `loss` and its two addends `base` and `distill`.

        Args:
            logits_cls: (B, C).
            logits_dist: (B, C).
            labels: (B,) int64, or (B, C) mixed labels.
            teacher_logits: (B, C); not needed with `kind="none"`.
            weighted: Weigh the distillation by class.
            weighted_base: Weigh the labels' part too (whole labels only).

        Raises:
            UsageError: The teacher's answers are missing or of other classes, or weights are.
        """
        if (weighted or weighted_base) and self.class_weights is None:
            raise UsageError("there are no class weights to weigh with")
        base = self._labels(logits_cls, labels, weighted_base)
        if self.kind == "none":
            distill = self._labels(logits_dist, labels, weighted)
        else:
            if teacher_logits is None:
                raise UsageError("the teacher's answers are missing")
            if teacher_logits.shape[1] != logits_dist.shape[1] and self.class_map is None:
                raise UsageError(
                    f"the teacher tells {teacher_logits.shape[1]} classes apart and the student {logits_dist.shape[1]}"
                )
            distill = self._taught(logits_dist, teacher_logits, weighted)
        base, distill = (1 - self.alpha) * base, self.alpha * distill
        return {"loss": base + distill, "base": base, "distill": distill}

    def _labels(self, logits: Tensor, labels: Tensor, weighted: bool) -> Tensor:
        logits = _exact(logits)
        if labels.dtype.is_floating_point:
            return torch.sum(-labels * F.log_softmax(logits, dim=-1), dim=-1).mean()
        weights = self.class_weights.to(logits) if weighted and self.class_weights is not None else None
        return F.cross_entropy(logits, labels, weight=weights)

    def _taught(self, logits: Tensor, teacher: Tensor, weighted: bool) -> Tensor:
        if self.kind == "soft":
            return soft_distillation_loss(logits, teacher, self.temperature)
        target = teacher.argmax(1)
        if self.class_map is not None:
            target = self.class_map[target]
        weights = self.class_weights.to(_exact(logits)) if weighted and self.class_weights is not None else None
        return F.cross_entropy(_exact(logits), target, weight=weights)


def resized_positions(
    positions: Tensor, grid: tuple[int, int], prefix: int = 2, stored_grid: tuple[int, int] | None = None
) -> Tensor:
    """Return position embeddings for another grid, as published.

    Bicubic by a scale factor with 0.1 added to the target, which is not what naming the size gives: the factor sets the
    sampling points too.

    Args:
        positions: (1, prefix + n, D).
        grid: Rows and columns wanted.
        prefix: Entries of prefix tokens, which stay.
        stored_grid: Rows and columns there are; default: as many of both.
    """
    side = math.isqrt(positions.shape[1] - prefix)
    rows, columns = stored_grid or (side, side)
    if grid == (rows, columns):
        return positions
    patches = positions[:, prefix:].reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    factors = ((grid[0] + 0.1) / rows, (grid[1] + 0.1) / columns)
    patches = F.interpolate(patches, scale_factor=factors, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :prefix], patches.flatten(2).transpose(1, 2)], 1)


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
