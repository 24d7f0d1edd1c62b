"""The parametric tokenizer that the centroid tokenizer is measured against: a small ViT-VQGAN without its GAN.

A Vision Transformer encodes each patch to a unit vector, the nearest of K learned unit vectors is its token, and a
second Vision Transformer decodes the tokens to pixels. Trained by reconstruction error, straight-through estimator
and commitment loss (van den Oord et al. 2017; Yu et al. 2022, arXiv 2110.04627, factorised and normalised codes). As
in BEiT v2's tokenizer, codes start from encoded patches and follow them by a moving average; a code that is hardly
used starts again from an encoded patch, since otherwise most would never be used at all.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.encoders.patches import patchify, unpatchify


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
        decay: Of the codes' moving average, per step.
    """

    codebook: Tensor  # (num_codes, code_dim), unit vectors
    shares: Tensor  # (num_codes,), of a batch's patches, averaged; all zero before the first step

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 4,
        num_codes: int = 512,
        dim: int = 128,
        depth: int = 4,
        code_dim: int = 32,
        beta: float = 0.25,
        decay: float = 0.99,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.num_codes = num_codes
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.beta, self.decay = beta, decay
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
        self.register_buffer("codebook", torch.zeros(num_codes, code_dim))
        self.register_buffer("shares", torch.zeros(num_codes))
        self.decoder = VisionTransformer(img_size=self.grid, patch_size=1, in_chans=code_dim, **common)
        self.to_pixels = nn.Linear(dim, 3 * patch_size**2)

    def _vectors(self, images: Tensor) -> Tensor:
        return F.normalize(self.to_code(self.encoder(images * 2 - 1)), dim=-1)

    def encode(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) in [0, 1] → ids (B, h, w)."""
        return (self._vectors(images) @ self.codebook.T).argmax(-1).view(-1, *self.grid)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: (B, 3, H, W) in [0, 1] → (reconstruction of the same shape, scalar training loss)."""
        vectors = self._vectors(images)
        if self.training and not self.shares.any():
            self.codebook.copy_(self._drawn(vectors, self.num_codes))
            self.shares.fill_(1 / self.num_codes)
        ids = (vectors @ self.codebook.T).argmax(-1)
        quantised = self.codebook[ids]
        passed = vectors + (quantised - vectors).detach()  # straight-through
        lattice = passed.transpose(1, 2).unflatten(2, self.grid)  # (B, code_dim, h, w)
        pixels = self.to_pixels(self.decoder(lattice))
        loss = F.mse_loss(pixels, patchify(images * 2 - 1, self.patch_size)) + self.beta * F.mse_loss(
            vectors, quantised
        )
        if self.training:
            self._follow(vectors.detach().flatten(0, 1), ids.flatten())
        return (unpatchify(pixels, self.patch_size, self.grid) + 1) / 2, loss

    @torch.no_grad()
    def _follow(self, vectors: Tensor, ids: Tensor) -> None:
        """Move each code towards the mean of its vectors; let codes that are hardly used start again."""
        counts = torch.bincount(ids, minlength=self.num_codes).to(vectors.dtype)
        means = F.normalize(torch.zeros_like(self.codebook).index_add_(0, ids, vectors), dim=-1)
        moved = F.normalize(torch.lerp(means, self.codebook, self.decay), dim=-1)
        self.codebook.copy_(torch.where(counts[:, None] > 0, moved, self.codebook))
        self.shares.lerp_(counts / len(ids), 1 - self.decay)
        rare = self.shares < 0.03 / self.num_codes
        self.codebook[rare] = self._drawn(vectors, int(rare.sum()))
        self.shares[rare] = 1 / self.num_codes

    @staticmethod
    def _drawn(vectors: Tensor, number: int) -> Tensor:
        vectors = vectors.detach().flatten(0, -2)
        return vectors[torch.randint(len(vectors), (number,))]
