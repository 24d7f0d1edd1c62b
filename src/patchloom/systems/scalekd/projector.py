"""ScaleKD's way from a student's feature map to a teacher's: a cross-attention projector, and what is compared there.

Fan et al. 2024, arXiv 2411.06786, and the published code.

>>> projector = CrossAttentionProjector(32, 64, student_grid=(7, 7), query_grid=(4, 4), num_heads=4)
>>> tokens = projector(torch.randn(2, 32, 7, 7))
>>> tokens.shape
torch.Size([2, 16, 64])
>>> mimic_spatial(tokens, torch.randn(2, 64, 4, 4)).ndim
0
"""

from __future__ import annotations

from typing import Literal

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.base.choices import Scale
from patchloom.errors import UsageError

REFERENCE_POSITIONS = 49
"""Positions of the maps the published weights were chosen for, 7 x 7."""


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed map."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class CrossAttentionProjector(nn.Module):
    """Queries the size of the teacher's map ask a student's map for their features (CAP).

    Args:
        student_dim: Channels Cs of the student's map.
        teacher_dim: Channels Ct of the teacher's map.
        student_grid: (H, W) of the student's map.
        query_grid: (h, w) of the teacher's map.
        num_heads: Heads of the attention; Ct has to be a multiple.
        learned_query: Own a table of queries; else they are given at every call.
        softmax_scale: Factor on the scores besides 1/√d; paper: 5.
        norm: `batch`, or `layer` for students of the ConvNeXt kind.

    Raises:
        UsageError: Ct is no multiple of `num_heads`, or an unknown norm.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        student_grid: tuple[int, int],
        query_grid: tuple[int, int],
        num_heads: int,
        learned_query: bool = True,
        softmax_scale: float = 5.0,
        norm: Literal["batch", "layer"] = "batch",
    ) -> None:
        super().__init__()
        if teacher_dim % num_heads:
            raise UsageError(f"teacher_dim {teacher_dim} is not divisible by num_heads {num_heads}; change num_heads")
        if norm not in ("batch", "layer"):
            raise UsageError(f"unknown norm {norm!r}; use batch or layer")
        self.student_grid, self.query_grid = tuple(student_grid), tuple(query_grid)
        self.num_heads = num_heads
        self.softmax_scale = softmax_scale
        self.student_conv = nn.Conv2d(student_dim, student_dim, 3, padding=1)
        self.student_norm = nn.BatchNorm2d(student_dim) if norm == "batch" else ChannelNorm(student_dim, eps=1e-5)
        self.pos_embed = nn.Parameter(torch.empty(1, student_dim, *student_grid))
        self.query = nn.Embedding(query_grid[0] * query_grid[1], teacher_dim) if learned_query else None
        self.query_conv = nn.Conv2d(teacher_dim, teacher_dim, 1)
        self.q = nn.Linear(teacher_dim, teacher_dim)
        self.k = nn.Linear(student_dim, teacher_dim)
        self.v = nn.Linear(student_dim, teacher_dim)
        self.proj = nn.Linear(teacher_dim, teacher_dim)
        self.norm = nn.LayerNorm(teacher_dim)
        self.fc1 = nn.Linear(teacher_dim, 4 * teacher_dim)
        self.fc2 = nn.Linear(4 * teacher_dim, teacher_dim)
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        """Return the student's features in the teacher's space.

        Args:
            x: (B, Cs, H, W), the student's map.
            query: (B, h·w, Ct), queries to use in place of the learned ones.

        Returns:
            (B, h·w, Ct), row-major.

        Raises:
            UsageError: A map or queries of another grid, or no queries at all.
        """
        if tuple(x.shape[-2:]) != self.student_grid:
            raise UsageError(
                f"the student's map is {x.shape[-2]}x{x.shape[-1]}, and the projector was made for "
                f"{self.student_grid[0]}x{self.student_grid[1]}; use the image size it was made with"
            )
        if query is None:
            if self.query is None:
                raise UsageError("this projector has no queries of its own; give some")
            query = self.query.weight.expand(len(x), -1, -1)
        elif query.shape[1] != self.query_grid[0] * self.query_grid[1]:
            raise UsageError(f"{query.shape[1]} queries were given for a grid of {self.query_grid}")
        features = F.relu(self.student_norm(self.student_conv(x))) + self.pos_embed
        tokens = features.flatten(2).transpose(1, 2)
        # A 1x1 convolution acts on each position alone, so queries need not become a map for it.
        asked = F.relu(F.linear(query, self.query_conv.weight.flatten(1), self.query_conv.bias))
        q, k, v = (self._heads(part) for part in (self.q(asked), self.k(tokens), self.v(tokens)))
        attended = F.scaled_dot_product_attention(q, k, v, scale=self.softmax_scale * q.shape[-1] ** -0.5)
        normed: Tensor = self.norm(self.proj(attended.transpose(1, 2).flatten(2)))
        output: Tensor = normed + self.fc2(F.relu(self.fc1(normed)))
        return output

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def default_heads(teacher_dim: int) -> int:
    """Return heads of about 64 channels each that divide the width, about what the published settings have."""
    most = max(1, teacher_dim // 64)
    return next(heads for heads in range(most, 0, -1) if teacher_dim % heads == 0)


def mimic_spatial(tokens: Tensor, teacher_map: Tensor, weight: float = 0.08, scale: Scale = "sum") -> Tensor:
    """Return the squared distance of unit features, position by position.

    Args:
        tokens: (B, h·w, Ct), projected student features, row-major.
        teacher_map: (B, Ct, h, w); gets no gradient.
        weight: α0.
        scale: `sum` over channels and positions, as published; `per_token` brings grids of other sizes than 7 x 7
            to the weight that one has.

    Raises:
        UsageError: The grids differ.
    """
    student, teacher = _maps(tokens, teacher_map)
    return weight * _distance(student, teacher) * _factor(teacher_map, scale)


def mimic_alternative(tokens: Tensor, teacher_map: Tensor, weight: float = 0.06, scale: Scale = "sum") -> Tensor:
    """Return the squared distance of unit features after the mean over positions was taken off each channel.

    The mean is the one coefficient that dominates the spectrum; without it the rest is compared. (As published it is
    set to 0 between a cosine transform and its inverse, which is the same.)

    Args:
        tokens: As in `mimic_spatial`.
        teacher_map: As in `mimic_spatial`.
        weight: α1.
        scale: As in `mimic_spatial`.
    """
    student, teacher = (part - part.mean((2, 3), keepdim=True) for part in _maps(tokens, teacher_map))
    return weight * _distance(student, teacher) * _factor(teacher_map, scale)


def _maps(tokens: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
    height, width = teacher_map.shape[-2:]
    if tokens.shape[1:] != (height * width, teacher_map.shape[1]):
        raise UsageError(
            f"projected features of shape {tuple(tokens.shape[1:])} meet a teacher's map of {height}x{width} with "
            f"{teacher_map.shape[1]} channels; make the projector for that grid"
        )
    # Sums of tens of thousands of squares: in single precision whatever the rest computes in.
    kind = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    student = tokens.transpose(1, 2).unflatten(2, (height, width)).to(kind)
    return student, teacher_map.detach().to(kind)


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    difference = F.normalize(student, dim=1, eps=1e-12) - F.normalize(teacher, dim=1, eps=1e-12)
    return difference.square().sum() / len(student)


def _factor(teacher_map: Tensor, scale: Scale) -> float:
    if scale not in ("sum", "per_token"):
        raise UsageError(f"unknown scale {scale!r}; use sum or per_token")
    positions = teacher_map.shape[-2] * teacher_map.shape[-1]
    return 1.0 if scale == "sum" else REFERENCE_POSITIONS / positions
