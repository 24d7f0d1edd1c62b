"""What turns clouds of points, depth maps, spectrograms and EEG into tokens (ViT-Lens, arXiv 2311.16081, section 3.2).

Each gives its tokens and their positions, which are added before the lens.

>>> tokens, positions = PointTokenizer(num_groups=4, group_size=8, embed_dim=32)(torch.randn(2, 64, 3))
>>> tokens.shape, positions.shape
(torch.Size([2, 4, 32]), torch.Size([2, 4, 32]))
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.errors import UsageError
from patchloom.systems.vit_lens.points import (
    ball_group,
    check_points,
    farthest_point_sample,
    gathered_points,
    knn_group,
)


class Tokens(NamedTuple):
    """Tokens and where they are."""

    tokens: Tensor
    """(B, n, D)."""
    pos: Tensor | None
    """(B or 1, n, D), to be added; None where tokens tell it themselves."""


class MiniPointNet(nn.Module):
    """A vector of each group of points, whatever their order: Point-BERT's embedding of a patch.

    Args:
        out_dim: Its width.
    """

    def __init__(self, out_dim: int) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(nn.Conv1d(3, 128, 1), nn.BatchNorm1d(128), nn.ReLU(), nn.Conv1d(128, 256, 1))
        self.second_conv = nn.Sequential(
            nn.Conv1d(512, 512, 1), nn.BatchNorm1d(512), nn.ReLU(), nn.Conv1d(512, out_dim, 1)
        )

    def forward(self, groups: Tensor) -> Tensor:
        """Return (B, G, out_dim) of groups (B, G, K, 3), each around 0."""
        shape = groups.shape[:3]  # (B, G, K)
        conv: Any
        conv, norm, act, last = self.first_conv
        rows = norm(_per_point(conv, groups.flatten(0, 2)))
        local = _per_point(last, act(rows))
        whole = local.unflatten(0, shape).amax(2)  # (B, G, 256)
        conv, norm, act, last = self.second_conv
        # The first 256 channels are the same for all points of a group, so they are multiplied once for each group.
        weight = conv.weight.squeeze(-1)
        ahead = F.linear(whole, weight[:, : whole.shape[-1]], conv.bias)
        mixed = F.linear(local, weight[:, whole.shape[-1] :]).unflatten(0, shape) + ahead[:, :, None]
        rows = act(norm(mixed.flatten(0, 2)))
        return _per_point(last, rows).unflatten(0, shape).amax(2)


def _per_point(conv: nn.Module, rows: Tensor) -> Tensor:
    """Return what a convolution over single points makes of points (n, C), as a product of matrices."""
    weight: Tensor = conv.weight  # type: ignore[assignment]
    return F.linear(rows, weight.flatten(1), conv.bias)  # type: ignore[arg-type]


class _Grouped(nn.Module):
    """Groups of points around centres far from one another."""

    num_groups: int

    def centres(self, points: Tensor, start_index: int | Tensor | None) -> Tensor:
        """Return the numbers (B, G) of the centres; the first is drawn in training and is point 0 else."""
        if start_index is None and self.training:
            start_index = torch.randint(points.shape[1], (len(points),), device=points.device)
        return farthest_point_sample(points, self.num_groups, start_index)


class PointTokenizer(_Grouped):
    """Tokens of a cloud: its points in groups of nearest neighbours, each around its centre (Point-BERT).

    Args:
        num_groups: Tokens G of a cloud.
        group_size: Points K of a group.
        encoder_dim: Width of what the points of a group become.
        embed_dim: Width D of the tokens.
    """

    def __init__(
        self, num_groups: int = 512, group_size: int = 32, encoder_dim: int = 256, embed_dim: int = 384
    ) -> None:
        super().__init__()
        self.num_groups, self.group_size, self.embed_dim = num_groups, group_size, embed_dim
        self.encoder = MiniPointNet(encoder_dim)
        self.reduce_dim = nn.Linear(encoder_dim, embed_dim)
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, embed_dim))

    @property
    def num_tokens(self) -> int:
        """Tokens of a sample."""
        return self.num_groups

    def forward(self, points: Tensor, start_index: int | Tensor | None = None) -> Tokens:
        """Return the tokens (B, G, D) of clouds (B, N, 3) and the embeddings of their centres (B, G, D).

        Args:
            points: Around 0, within a sphere of radius 1.
            start_index: The point that centres are chosen from; default: 0, and any in training.

        Raises:
            UsageError: Fewer points than groups or than a group has, values that are not finite, another shape.
        """
        check_points(points, 3)
        centres = gathered_points(points, self.centres(points, start_index))
        groups = gathered_points(points, knn_group(points, centres, self.group_size)) - centres[:, :, None]
        return Tokens(self.reduce_dim(self.encoder(groups)), self.pos_embed(centres))


class SetAbstraction(nn.Module):
    """Three layers over the points of a group, and their maximum (PointNet++, Qi et al. 2017, arXiv 1706.02413).

    Args:
        in_channels: Features of a point, besides where it lies in its group.
        widths: Of the layers.
    """

    def __init__(self, in_channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        sizes = [in_channels + 3, *widths]
        self.mlp_convs = nn.ModuleList(nn.Conv2d(*pair, 1) for pair in pairwise(sizes))
        self.mlp_bns = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)

    def forward(self, groups: Tensor) -> Tensor:
        """Return (B, G, width) of groups (B, G, K, 3 + in_channels)."""
        rows = groups.flatten(0, 2)
        for conv, norm in zip(self.mlp_convs, self.mlp_bns, strict=True):
            # A batch norm of maps takes (n, C, H, W); statistics of a channel are the same over either form.
            rows = torch.relu(norm(_per_point(conv, rows)[..., None, None])[..., 0, 0])
        return rows.unflatten(0, groups.shape[:3]).amax(2)


class _Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class SetAbstractionTokenizer(_Grouped):
    """Tokens of a cloud with colours: its points in balls (OpenShape's tokenizer, Liu et al. 2023, arXiv 2305.10764).

    Args:
        num_groups: Tokens G of a cloud.
        group_size: Points K of a group.
        radius: Of the ball that a group lies in.
        in_channels: Features of a point: 6 for coordinates and colour.
        encoder_dim: Width of what the points of a group become.
        embed_dim: Width D of the tokens.
        hidden: Widths of the layers before.
    """

    def __init__(
        self,
        num_groups: int = 512,
        group_size: int = 64,
        radius: float = 0.2,
        in_channels: int = 6,
        encoder_dim: int = 256,
        embed_dim: int = 256,
        hidden: tuple[int, int] = (64, 64),
    ) -> None:
        super().__init__()
        self.num_groups, self.group_size, self.radius = num_groups, group_size, radius
        self.in_channels, self.embed_dim = in_channels, embed_dim
        self.sa = SetAbstraction(in_channels, (*hidden, encoder_dim))
        self.lift = nn.Sequential(nn.Conv1d(encoder_dim + 3, embed_dim, 1), _Transposed(), nn.LayerNorm(embed_dim))

    @property
    def num_tokens(self) -> int:
        """Tokens of a sample."""
        return self.num_groups

    def forward(
        self, points: Tensor, features: Tensor | None = None, start_index: int | Tensor | None = None
    ) -> Tokens:
        """Return the tokens (B, G, D) of clouds; positions are part of them.

        Args:
            points: (B, N, 3), or (B, N, in_channels) with coordinates first where there are no `features`.
            features: (B, N, in_channels): coordinates and colour.
            start_index: The point that centres are chosen from; default: 0, and any in training.

        Raises:
            UsageError: Fewer points than groups or than a group has, values that are not finite, another shape.
        """
        features = check_points(points if features is None else features, self.in_channels)
        places = check_points(points)[..., :3]
        centres = gathered_points(places, self.centres(places, start_index))
        numbers = ball_group(places, centres, self.radius, self.group_size)
        offsets = gathered_points(places, numbers) - centres[:, :, None]
        found = self.sa(torch.cat([offsets, gathered_points(features, numbers)], -1))
        return Tokens(self.lift(torch.cat([centres, found], -1).transpose(1, 2)), None)


def _positions(count: int, width: int) -> nn.Parameter:
    return nn.Parameter(width**-0.5 * torch.randn(count, width))


class _Convolved(nn.Module):
    """Tokens by a convolution, with learnt positions."""

    pos_emb: nn.Parameter

    @property
    def num_tokens(self) -> int:
        """Tokens of a sample."""
        return len(self.pos_emb)

    def placed(self, tokens: Tensor, given: Tensor) -> Tokens:
        """Return tokens (B, n, W) with their positions (1, n, W)."""
        if tokens.shape[1] != self.num_tokens:
            raise UsageError(
                f"{tuple(given.shape)} gives {tokens.shape[1]} tokens, and there are positions for {self.num_tokens}"
            )
        return Tokens(tokens, self.pos_emb[None])


def _check(values: Tensor, axes: str, fits: bool) -> None:
    """Refuse a batch of another shape, or with values that are not finite.

    Raises:
        UsageError: Names the shape.
    """
    if not fits:
        raise UsageError(f"a batch of the shape {axes} is wanted, and this is {tuple(values.shape)}")
    if not values.is_floating_point():
        raise UsageError(f"values are floats, and these are {str(values.dtype).removeprefix('torch.')}")
    if not torch.isfinite(values).all():
        raise UsageError("a batch holds NaN or infinite values; take those samples out")


class DepthTokenizer(_Convolved):
    """Tokens of a depth map, or of any image: patches that do not overlap.

    The published models take disparity: baseline times focal length over metres, clamped to 0.01 … 75, divided by 75
    and normalised by mean 0.0418 and deviation 0.0295. Maps in other units look like nothing they know.

    Args:
        image_size: Side of a map, or height and width.
        patch_size: Of a patch, likewise.
        width: Of the tokens, W.
        in_chans: Channels.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 14,
        width: int = 1024,
        in_chans: int = 1,
    ) -> None:
        super().__init__()
        size, patch = (value if isinstance(value, tuple) else (value, value) for value in (image_size, patch_size))
        if any(side % step for side, step in zip(size, patch, strict=True)):
            raise UsageError(f"maps of {size[0]} x {size[1]} do not divide into patches of {patch[0]} x {patch[1]}")
        self.in_chans, self.embed_dim = in_chans, width
        self.conv1 = nn.Conv2d(in_chans, width, patch, patch, bias=False)
        self.pos_emb = _positions((size[0] // patch[0]) * (size[1] // patch[1]), width)

    def forward(self, maps: Tensor) -> Tokens:
        """Return the tokens of maps (B, 1, H, W)."""
        _check(maps, f"(batch, {self.in_chans}, height, width)", maps.ndim == 4 and maps.shape[1] == self.in_chans)
        return self.placed(self.conv1(maps).flatten(2).transpose(1, 2), maps)


class SpectrogramTokenizer(_Convolved):
    """Tokens of a spectrogram: patches that overlap (AST, Gong et al. 2021, arXiv 2104.01778), low tones first.

    Args:
        frames: Frames T.
        bins: Tones of a frame.
        patch_size: Of a patch, tones and frames.
        stride: From patch to patch, of tones and of frames.
        width: Of the tokens, W.
    """

    def __init__(
        self,
        frames: int = 512,
        bins: int = 128,
        patch_size: int | tuple[int, int] = 14,
        stride: int | tuple[int, int] = 10,
        width: int = 1024,
    ) -> None:
        super().__init__()
        patch, step = (value if isinstance(value, tuple) else (value, value) for value in (patch_size, stride))
        if bins < patch[0] or frames < patch[1]:
            raise UsageError(f"{frames} frames of {bins} tones are less than a patch of {patch[0]} x {patch[1]}")
        self.bins, self.embed_dim = bins, width
        self.conv1 = nn.Conv2d(1, width, patch, step, bias=False)
        counts = [(side - p) // s + 1 for side, p, s in zip((bins, frames), patch, step, strict=True)]
        self.pos_emb = _positions(counts[0] * counts[1], width)

    def forward(self, spectrograms: Tensor) -> Tokens:
        """Return the tokens of spectrograms (B, T, bins)."""
        fits = spectrograms.ndim == 3 and spectrograms.shape[2] == self.bins
        _check(spectrograms, f"(batch, frames, {self.bins})", fits)
        images = spectrograms.transpose(1, 2)[:, None]
        return self.placed(self.conv1(images).flatten(2).transpose(1, 2), spectrograms)


class SignalTokenizer(_Convolved):
    """Tokens of a signal of several channels, such as EEG: windows of all channels.

    Args:
        in_chans: Channels C.
        length: Values L of a channel.
        width: Of the tokens, W.
        window: Values of a token.
        stride: From token to token.
    """

    def __init__(
        self, in_chans: int = 128, length: int = 512, width: int = 1024, window: int = 1, stride: int = 1
    ) -> None:
        super().__init__()
        if length < window:
            raise UsageError(f"signals of {length} values are shorter than a window of {window}")
        self.in_chans, self.embed_dim = in_chans, width
        self.proj = nn.Conv1d(in_chans, width, window, stride)
        self.pos_emb = _positions((length - window) // stride + 1, width)

    def forward(self, signals: Tensor) -> Tokens:
        """Return the tokens of signals (B, C, L)."""
        _check(signals, f"(batch, {self.in_chans}, values)", signals.ndim == 3 and signals.shape[1] == self.in_chans)
        return self.placed(self.proj(signals).transpose(1, 2), signals)
