"""Video in place of images: tubes of pixels as patches, for timm's `VisionTransformer`.

>>> import torch
>>> from patchloom.encoders import create_encoder
>>> encoder = create_encoder("vit_tiny_patch16_224", image_size=32, class_token=False, global_pool="avg",
...                          pos_embed="none", embed_layer=TubeletEmbed)
>>> encoder(torch.randn(2, 3, 8, 32, 32)).shape
torch.Size([2, 192])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from patchloom.encoders.patches import patch_grid
from patchloom.errors import UsageError


class TubeletEmbed(nn.Module):
    """Patch embedding of clips, with fixed positions: a stand-in for timm's `PatchEmbed` (VideoMAE).

    Tubes of `tubelet_size` frames are embedded by one convolution; tokens come frame by frame, then row by row, with
    a 1-D sine-cosine position added that runs over all of them.

    Args:
        img_size: Side of the frames, or (H, W), pixels.
        patch_size: Side of a patch.
        in_chans: Channels of a frame.
        embed_dim: Width D of the tokens.
        bias: The convolution has a bias.
        tubelet_size: Frames in a tube.
        **unused: What timm passes to `PatchEmbed` and has no meaning here.

    Raises:
        UsageError: Patches do not fill the frames.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        tubelet_size: int = 2,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))
        side = patch_size if isinstance(patch_size, int) else int(patch_size[0])
        self.patch_size, self.tubelet_size = (side, side), tubelet_size
        self.grid_size = patch_grid(self.img_size, side)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        kernel = (tubelet_size, side, side)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel, stride=kernel, bias=bias)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Return how many pixels go to a token, as timm's patch embeddings do."""
        return self.patch_size[0] if as_scalar else self.patch_size

    def forward(self, clips: Tensor) -> Tensor:
        """Return tokens (B, N, D) of clips (B, C, T, H, W), positions included.

        Raises:
            UsageError: No clips, or frames that tubes and patches do not fill.
        """
        if clips.ndim != 5:
            raise UsageError(f"the encoder takes clips (B, C, T, H, W), and was given shape {tuple(clips.shape)}")
        if clips.shape[2] % self.tubelet_size:
            raise UsageError(f"{clips.shape[2]} frames are not divisible by the tubelet size {self.tubelet_size}")
        patch_grid((int(clips.shape[3]), int(clips.shape[4])), self.patch_size[0])
        tokens: Tensor = self.proj(clips).flatten(2).transpose(1, 2)
        table = sine_cosine_table(tokens.shape[1], tokens.shape[2])
        return tokens + table.to(tokens)


def sine_cosine_table(positions: int, width: int) -> Tensor:
    """Return the (positions, width) float32 table of VideoMAE: sine on even and cosine on odd columns.

    The angle of position p in column j is p / 10000^(2 ⌊j/2⌋ / width), computed in float64.
    """
    columns = torch.arange(width, dtype=torch.float64)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] / 10000 ** (2 * (columns // 2) / width)
    return torch.where(columns % 2 == 0, angles.sin(), angles.cos()).float()
