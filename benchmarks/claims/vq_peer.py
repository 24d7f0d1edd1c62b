"""The parametric tokenizer that the centroid tokenizer is measured against: a small ViT-VQGAN without its GAN.

A Vision Transformer encodes each patch to a unit vector, the nearest of K learned unit vectors is its token, and a
second Vision Transformer decodes the tokens to pixels. Trained by reconstruction error, straight-through estimator
and commitment loss (van den Oord et al. 2017; Yu et al. 2022, arXiv 2110.04627, factorised and normalised codes).
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.patches import patchify, unpatchify


class VQPeer(nn.Module):
    """Encoder, quantiser and decoder on one patch grid.

    Args:
        image_size: Side of the square images, in pixels.
        patch_size: Side of a patch, in pixels.
        num_codes: Size of the codebook.
        dim: Width of both transformers.
        depth: Blocks of each.
        code_dim: Length of a code.
        beta: Weight of the commitment loss.
    """

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 4,
        num_codes: int = 512,
        dim: int = 128,
        depth: int = 4,
        code_dim: int = 32,
        beta: float = 0.25,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.num_codes = num_codes
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.beta = beta
        common = {
            "embed_dim": dim,
            "depth": depth,
            "num_heads": dim // 32,
            "num_classes": 0,
            "global_pool": "",
            "class_token": False,
        }
        self.encoder = VisionTransformer(img_size=image_size, patch_size=patch_size, **common)
        self.to_code = nn.Linear(dim, code_dim)
        self.codebook = nn.Parameter(F.normalize(torch.randn(num_codes, code_dim), dim=-1))
        self.decoder = VisionTransformer(img_size=self.grid, patch_size=1, in_chans=code_dim, **common)
        self.to_pixels = nn.Linear(dim, 3 * patch_size**2)

    def _vectors(self, images: Tensor) -> Tensor:
        return F.normalize(self.to_code(self.encoder(images * 2 - 1)), dim=-1)

    def encode(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) in [0, 1] → ids (B, h, w)."""
        nearest = (self._vectors(images) @ F.normalize(self.codebook, dim=-1).T).argmax(-1)
        return nearest.view(-1, *self.grid)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: (B, 3, H, W) in [0, 1] → (reconstruction of the same shape, scalar training loss)."""
        vectors = self._vectors(images)
        codes = F.normalize(self.codebook, dim=-1)
        quantised = codes[(vectors @ codes.T).argmax(-1)]
        passed = vectors + (quantised - vectors).detach()  # straight-through
        lattice = passed.transpose(1, 2).unflatten(2, self.grid)  # (B, code_dim, h, w)
        pixels = self.to_pixels(self.decoder(lattice))
        commitment = self.beta * (vectors - quantised.detach()).square().sum(-1).mean()
        attraction = (quantised - vectors.detach()).square().sum(-1).mean()
        loss = F.mse_loss(pixels, patchify(images * 2 - 1, self.patch_size)) + commitment + attraction
        return (unpatchify(pixels, self.patch_size, self.grid) + 1) / 2, loss
