"""Where CNN and ViT exchange features: deformable attention towards the ViT, a sum and deformable attention back.

Xia et al. 2024 (ViT-CoMer, arXiv 2403.07392). The published code is followed where the paper describes it otherwise:
attention has no residual on the way to the ViT, and starts from normalised tokens on the way back. Parameters bear the
published names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.systems.vit_comer.deformable import MultiScaleDeformableAttention, reference_points
from patchloom.systems.vit_comer.layers import (
    ConvFFN,
    MultiReceptiveFieldPyramid,
    as_map,
    as_tokens,
    pyramid_shapes,
    split_levels,
)

EPSILON = 1e-6


class _Attending(nn.Module):
    """Norms, deformable attention of a pyramid to itself, and a feed-forward layer: what all exchanges are made of."""

    def __init__(
        self, dim: int, num_heads: int, num_points: int, value_ratio: float, cffn_ratio: float, drop_path: float
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=EPSILON)
        self.feat_norm = nn.LayerNorm(dim, eps=EPSILON)
        self.attn = MultiScaleDeformableAttention(dim, num_heads, 3, num_points, value_ratio)
        self.ffn = ConvFFN(dim, int(dim * cffn_ratio))
        self.ffn_norm = nn.LayerNorm(dim, eps=EPSILON)
        self.drop_path = DropPath(drop_path)

    def attend(self, query: Tensor, feat: Tensor, height: int, width: int) -> Tensor:
        """Return what tokens of a pyramid see of another, (B, 21 n, D)."""
        shapes = pyramid_shapes(height, width)
        points = reference_points(shapes, query)
        attended: Tensor = self.attn(self.query_norm(query), points, self.feat_norm(feat), shapes)
        return attended

    def fed_forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Return tokens with what the feed-forward layer adds to them."""
        added: Tensor = self.drop_path(self.ffn(self.ffn_norm(tokens), height, width))
        return tokens + added


class ToViT(_Attending):
    """CTI towards the ViT: the pyramid attends to itself, and its three maps are added to the tokens.

    Args:
        dim: Width D.
        num_heads: Heads of deformable attention.
        num_points: Places per head and map.
        value_ratio: Width of the values by D.
        cffn_ratio: Width of the middle of the feed-forward layer by D.
        drop_path: Stochastic depth.
        init_values: Start of the factor γ on what is added; at 0 the ViT begins as it was.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 6,
        num_points: int = 4,
        value_ratio: float = 1.0,
        cffn_ratio: float = 0.25,
        drop_path: float = 0.0,
        init_values: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, num_points, value_ratio, cffn_ratio, drop_path)
        self.gamma = nn.Parameter(torch.full((dim,), float(init_values)))

    def forward(self, x: Tensor, c: Tensor, height: int, width: int) -> Tensor:
        """Return the ViT's tokens (B, N, D) with what the pyramid c (B, 21 n, D) has for them."""
        a = self.fed_forward(self.attend(c, c, height, width), height, width)
        fine, same, coarse = split_levels(a, height, width)
        shapes = pyramid_shapes(height, width)
        for tokens, shape in ((fine, shapes[0]), (coarse, shapes[2])):
            same = same + as_tokens(_resized(as_map(tokens, shape), (height, width)))
        return x + self.gamma * same


class Extractor(_Attending):
    """What the pyramid learns of itself: deformable attention and a feed-forward layer, each with a residual."""

    def forward(self, query: Tensor, feat: Tensor, height: int, width: int) -> Tensor:
        """Return (B, 21 n, D)."""
        return self.fed_forward(query + self.attend(query, feat, height, width), height, width)


class ToCNN(nn.Module):
    """CTI towards the CNN: the ViT's tokens are added to the map of their stride, and the pyramid attends to itself.

    Args:
        dim: Width D.
        interaction: Let the pyramid attend to itself; without, the sum is all.
        ffn: Pass the sum through a feed-forward layer first, as the extra exchanges behind the last stage do.
        num_heads: Heads of deformable attention.
        num_points: Places per head and map.
        value_ratio: Width of the values by D.
        cffn_ratio: Width of the middle of feed-forward layers by D.
        drop_path: Stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        interaction: bool = True,
        ffn: bool = False,
        num_heads: int = 6,
        num_points: int = 4,
        value_ratio: float = 1.0,
        cffn_ratio: float = 0.25,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if ffn:
            self.ffn_norm = nn.LayerNorm(dim, eps=EPSILON)
            self.ffn = ConvFFN(dim, int(dim * cffn_ratio))
            self.drop_path = DropPath(drop_path)
        if interaction:
            self.query_norm = nn.LayerNorm(dim, eps=EPSILON)
            self.feat_norm = nn.LayerNorm(dim, eps=EPSILON)
            self.cfinter = Extractor(dim, num_heads, num_points, value_ratio, cffn_ratio, drop_path)
        self.has_ffn, self.interacts = ffn, interaction

    def forward(self, c: Tensor, x: Tensor, height: int, width: int) -> Tensor:
        """Return the pyramid (B, 21 n, D) with the ViT's tokens x (B, N, D) in it."""
        fine, same, coarse = split_levels(c, height, width)
        c = torch.cat([fine, same + x, coarse], dim=1)
        if self.has_ffn:
            c = c + self.drop_path(self.ffn(self.ffn_norm(c), height, width))
        if self.interacts:
            # The residual starts from the normed tokens: the pyramid as it was does not go on.
            c = self.cfinter(self.query_norm(c), self.feat_norm(c), height, width)
        return c


class ConvTransformerInteraction(nn.Module):
    """A stage: the pyramid's receptive fields, an exchange, some blocks of the ViT, an exchange back.

    Args:
        dim: Width D.
        mrfp_dim: Width of the middle of the receptive-field pyramid.
        num_heads: Heads of deformable attention.
        num_points: Places per head and map.
        value_ratio: Width of the values by D.
        cffn_ratio: Width of the middle of feed-forward layers by D.
        drop_path: Stochastic depth, the same in all modules.
        init_values: Start of γ, see `ToViT`.
        use_to_vit: Exchange towards the ViT; without, the receptive fields are left out, too.
        use_to_cnn: Exchange towards the CNN.
        cnn_interaction: Let the pyramid attend to itself on the way back.
        num_extra: Further exchanges towards the CNN behind it, for the last stage.
    """

    def __init__(
        self,
        dim: int,
        mrfp_dim: int,
        num_heads: int = 6,
        num_points: int = 4,
        value_ratio: float = 1.0,
        cffn_ratio: float = 0.25,
        drop_path: float = 0.0,
        init_values: float = 0.0,
        use_to_vit: bool = True,
        use_to_cnn: bool = True,
        cnn_interaction: bool = True,
        num_extra: int = 0,
    ) -> None:
        super().__init__()
        sizes = (num_heads, num_points, value_ratio, cffn_ratio, drop_path)
        self.mrfp = MultiReceptiveFieldPyramid(dim, mrfp_dim) if use_to_vit else None
        self.cti_tov = ToViT(dim, *sizes, init_values) if use_to_vit else None
        self.cti_toc = ToCNN(dim, cnn_interaction, False, *sizes) if use_to_cnn else None
        self.extra_CTIs = nn.ModuleList(ToCNN(dim, cnn_interaction, True, *sizes) for _ in range(num_extra))

    def forward(
        self, x: Tensor, c: Tensor, blocks: Iterable[Callable[[Tensor], Tensor]], height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Return the ViT's tokens (B, N, D) and the pyramid (B, 21 n, D) after the stage.

        Args:
            x: The ViT's tokens, N = height * width.
            c: The pyramid.
            blocks: The ViT's blocks of this stage, one after the other.
            height: Rows of the ViT's grid, even.
            width: Columns, even.

        Raises:
            UsageError: A grid with odd sides, or of another number of tokens.
        """
        if self.mrfp is not None and self.cti_tov is not None:
            fine, same, coarse = split_levels(self.mrfp(c, height, width), height, width)
            c = torch.cat([fine, same + x, coarse], dim=1)  # and so it goes on
            x = self.cti_tov(x, c, height, width)
        for block in blocks:
            x = block(x)
        if self.cti_toc is not None:
            c = self.cti_toc(c, x, height, width)
        for extra in self.extra_CTIs:
            c = extra(c, x, height, width)
        return x, c


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
