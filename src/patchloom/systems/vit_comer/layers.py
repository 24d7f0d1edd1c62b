"""The CNN beside the ViT, and what mixes neighbours within the tokens of a pyramid.

Xia et al. 2024 (ViT-CoMer, arXiv 2403.07392) and its published code. The tokens of a pyramid are three maps one after
the other, each row by row: strides 8, 16 and 32, of (2H, 2W), (H, W) and (H/2, W/2) tokens, where (H, W) is the grid of
the ViT. Parameters bear the published names.

>>> c1, c2, c3, c4 = SpatialPriorCNN(width=8, embed_dim=16)(torch.randn(2, 3, 64, 96))
>>> tuple(c1.shape), tuple(c2.shape), tuple(c4.shape)
((2, 16, 16, 24), (2, 96, 16), (2, 6, 16))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.errors import UsageError


def pyramid_shapes(height: int, width: int) -> list[tuple[int, int]]:
    """Return (height, width) of the maps of strides 8, 16 and 32, of the ViT's grid."""
    return [(2 * height, 2 * width), (height, width), (height // 2, width // 2)]


def split_levels(tokens: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens of strides 8, 16 and 32 of a pyramid (B, 21 n, D), of the ViT's grid.

    Raises:
        UsageError: The grid has odd sides, or the pyramid is of another.
    """
    if height % 2 or width % 2:
        raise UsageError(f"a grid of {height} x {width} has no half; sides of images must be multiples of 32")
    sizes = [h * w for h, w in pyramid_shapes(height, width)]
    if sum(sizes) != tokens.shape[1]:
        raise UsageError(
            f"a pyramid around a grid of {height} x {width} has {sum(sizes)} tokens, not {tokens.shape[1]}"
        )
    first, second, third = tokens.split(sizes, dim=1)
    return first, second, third


def as_map(tokens: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return tokens (B, h w, D) as a map (B, D, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, shape)


def as_tokens(maps: Tensor) -> Tensor:
    """Return a map (B, D, h, w) as tokens (B, h w, D)."""
    return maps.flatten(2).transpose(1, 2)


def _conv_bn(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


class SpatialPriorCNN(nn.Module):
    """The CNN branch: maps of strides 4, 8, 16 and 32 of an image.

    Args:
        width: Channels of the stem; the stages behind it have 2, 4 and 4 times as many.
        embed_dim: Width D of all that comes out.
        in_chans: Channels of the images.
    """

    def __init__(self, width: int = 64, embed_dim: int = 384, in_chans: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            *_conv_bn(in_chans, width, 2), *_conv_bn(width, width, 1), *_conv_bn(width, width, 1), nn.MaxPool2d(3, 2, 1)
        )
        self.conv2 = nn.Sequential(*_conv_bn(width, 2 * width, 2))
        self.conv3 = nn.Sequential(*_conv_bn(2 * width, 4 * width, 2))
        self.conv4 = nn.Sequential(*_conv_bn(4 * width, 4 * width, 2))
        self.fc1 = nn.Conv2d(width, embed_dim, 1)
        self.fc2 = nn.Conv2d(2 * width, embed_dim, 1)
        self.fc3 = nn.Conv2d(4 * width, embed_dim, 1)
        self.fc4 = nn.Conv2d(4 * width, embed_dim, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the map (B, D, H/4, W/4) and tokens (B, n, D) of strides 8, 16, 32 of normalised (B, C, H, W)."""
        x1 = self.stem(images)
        x2 = self.conv2(x1)
        x3 = self.conv3(x2)
        x4 = self.conv4(x3)
        return self.fc1(x1), as_tokens(self.fc2(x2)), as_tokens(self.fc3(x3)), as_tokens(self.fc4(x4))


class _DepthwiseConv(nn.Module):
    """One depthwise convolution for all three maps of a pyramid; under the name `dwconv`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        levels = zip(split_levels(tokens, height, width), pyramid_shapes(height, width), strict=True)
        return torch.cat([as_tokens(self.dwconv(as_map(x, shape))) for x, shape in levels], dim=1)


class ConvFFN(nn.Module):
    """A feed-forward layer with a depthwise convolution in its middle.

    Args:
        dim: Width D of the tokens.
        hidden_dim: Width of the middle.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = _DepthwiseConv(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Return (B, 21 n, D) of the tokens of a pyramid around a grid of (height, width)."""
        out: Tensor = self.fc2(F.gelu(self.dwconv(self.fc1(tokens), height, width)))
        return out


class _TwoFieldConvs(nn.Module):
    """Two depthwise convolutions for each map, 3x3 on one half of the channels, 5x5 on the other; then a norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        for level in range(3):
            setattr(self, f"dwconv{2 * level + 1}", nn.Conv2d(half, half, 3, padding=1, groups=half))
            setattr(self, f"dwconv{2 * level + 2}", nn.Conv2d(half, half, 5, padding=2, groups=half))
            setattr(self, f"bn{level + 1}", nn.BatchNorm2d(dim))

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        out = []
        levels = zip(split_levels(tokens, height, width), pyramid_shapes(height, width), strict=True)
        for level, (x, shape) in enumerate(levels):
            small, large = getattr(self, f"dwconv{2 * level + 1}"), getattr(self, f"dwconv{2 * level + 2}")
            first, second = as_map(x, shape).chunk(2, dim=1)
            mixed = torch.cat([small(first), large(second)], dim=1)
            out.append(as_tokens(F.gelu(getattr(self, f"bn{level + 1}")(mixed))))
        return torch.cat(out, dim=1)


class MultiReceptiveFieldPyramid(nn.Module):
    """MRFP: two receptive fields in each map of the pyramid. What comes out replaces what went in.

    Args:
        dim: Width D of the tokens.
        hidden_dim: Width of the middle, even.

    Raises:
        UsageError: It is odd, and has no two halves.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        if hidden_dim % 2 or hidden_dim < 2:
            raise UsageError(
                f"the middle of the receptive-field pyramid is {hidden_dim} wide, and must be even: choose another "
                f"mrfp_ratio (a width of {dim} times the ratio, cut off)"
            )
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = _TwoFieldConvs(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Return (B, 21 n, D) of the tokens of a pyramid around a grid of (height, width)."""
        # The published code has a second GELU behind the one within the convolutions.
        out: Tensor = self.fc2(F.gelu(self.dwconv(self.fc1(tokens), height, width)))
        return out
