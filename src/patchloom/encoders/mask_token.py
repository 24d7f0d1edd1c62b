"""An encoder that was trained to see mask tokens in place of hidden patches, as BEiT and CCViT are.

>>> from patchloom.encoders import create_encoder
>>> encoder = create_encoder("ccvit_tiny_patch4_32")
>>> model = MaskTokenEncoder(encoder, torch.zeros(1, 1, 192))
>>> hidden, mask = model.hidden(torch.randn(2, 3, 32, 32), mask_ratio=0.75, num_blocks=9)
>>> hidden.shape, int(mask.sum(1)[0])
(torch.Size([2, 65, 192]), 48)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from patchloom.encoders.encoder import Encoder
from patchloom.encoders.masked_autoencoder import visible_count
from patchloom.encoders.properties import (
    depth,
    embed_dim,
    grid_size,
    in_chans,
    num_prefix_tokens,
    patch_shape,
    patch_size,
)
from patchloom.encoders.stages import embed, run_blocks


class MaskTokenEncoder(nn.Module):
    """All positions pass the encoder; where a patch is hidden, the mask token stands in for its embedding.

    It answers the questions a `MaskedAutoencoder` answers: `hidden`, `hidden_dim`, `hidden_blocks`, `grid`, `prefix`.

    Args:
        encoder: Encoder without head.
        mask_token: (1, 1, D), what was trained with it.
    """

    def __init__(self, encoder: Encoder, mask_token: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_token = nn.Parameter(mask_token)
        self.patch_shape = patch_shape(encoder)
        self.in_chans = in_chans(encoder)
        self.grid = grid_size(encoder)
        self.prefix = num_prefix_tokens(encoder)
        self.hidden_dim = embed_dim(encoder)
        self.hidden_blocks = depth(encoder)

    @property
    def patch_size(self) -> int:
        """Side of a patch, where it is the same along every axis."""
        return patch_size(self.encoder)

    def hidden(
        self,
        images: Tensor,
        mask_ratio: float = 0.75,
        noise: Tensor | None = None,
        num_blocks: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what the residual stream holds after some blocks, and the mask.

        Args:
            images: (B, C, H, W) normalised.
            mask_ratio: Share of the patches hidden, in (0, 1).
            noise: (B, N) numbers whose smallest mark the visible patches; default: drawn uniformly.
            num_blocks: Blocks to run; default: all.

        Returns:
            (B, P + N, D), not normed, and (B, N) float, 1 where hidden.
        """
        patches = math.prod(self.grid)
        if noise is None:
            noise = torch.rand(len(images), patches, device=images.device)
        place = noise.argsort(dim=1, stable=True).argsort(dim=1)
        masked = place >= visible_count(patches, mask_ratio)
        embedded = embed(self.encoder, images, masked=masked, mask_token=self.mask_token)
        x, _ = run_blocks(self.encoder, embedded, stop=num_blocks)
        return x, masked.float()
