"""The auto-encoder of ViT-VQGAN: a ViT makes codes of patches, another makes patches of codes.

"Vector-quantized Image Modeling with Improved VQGAN" (Yu et al. 2022, arXiv 2110.04627). Its authors published no code;
this follows github.com/thuanz123/enhancing-transformers (`modules/stage1/layers.py`, `models/stage1_vqgan.py`).

>>> model = ViTVQGAN(image_size=32, patch_size=8, encoder=SIZES["vit_vqgan_micro"], num_codes=64, code_dim=8)
>>> out = model(torch.rand(2, 3, 32, 32))
>>> out.images.shape, out.ids.shape
(torch.Size([2, 3, 32, 32]), torch.Size([2, 16]))
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from patchloom.base.sizes import Size, pair, size_text
from patchloom.encoders.patches import patch_grid
from patchloom.errors import UsageError
from patchloom.systems.vit_vqgan.config import SIZES, TransformerSize
from patchloom.systems.vit_vqgan.quantizer import Quantized, VectorQuantizer

__all__ = ["SIZES", "Reconstruction", "TransformerSize", "ViTVQGAN", "sincos_positions"]


class Reconstruction(NamedTuple):
    """What the auto-encoder makes of images."""

    images: Tensor
    """(B, C, H, W), not clamped; (B, 2 C, H, W) where the decoder gives log scales as well."""
    loss: Tensor
    """Scalar: that of the quantiser."""
    ids: Tensor
    """(B, N) int64, of M levels (B, N, M)."""
    z_q: Tensor
    """(B, N, d) codes."""
    latents: Tensor
    """(B, N, d) what was quantised."""


class ViTVQGAN(nn.Module):
    """Images in [0, 1] to codes of a learned table, and back.

    Args:
        image_size: Side of the images, or (height, width), pixels; others are taken as well, see `positions_of`.
        patch_size: Side of a patch.
        encoder: Size of the encoder.
        decoder: Size of the decoder; None: as the encoder.
        num_codes: Codes in the table.
        code_dim: Length of a code.
        in_chans: Channels of the images.
        with_scale: The decoder gives mean and log scale of each value (logit-Laplace), 2 C channels.
        **quantizer: Further arguments of `VectorQuantizer`.

    Raises:
        UsageError: A side is not divisible by the patch size, or a width not by 4.
    """

    def __init__(
        self,
        image_size: Size = 256,
        patch_size: int = 8,
        encoder: TransformerSize = SIZES["vit_vqgan_base"],
        decoder: TransformerSize | None = None,
        num_codes: int = 8192,
        code_dim: int = 32,
        in_chans: int = 3,
        with_scale: bool = False,
        **quantizer: Any,
    ) -> None:
        super().__init__()
        decoder = encoder if decoder is None else decoder
        self.sizes = encoder, decoder
        self.patch_size, self.in_chans, self.with_scale = patch_size, in_chans, with_scale
        self.image_size = pair(image_size)
        grid = self.grid_of(self.image_size)
        self.encoder = PatchEncoder(in_chans, patch_size, grid, encoder)
        self.decoder = PatchDecoder(in_chans * (2 if with_scale else 1), patch_size, grid, decoder)
        self.quantizer = VectorQuantizer(num_codes, code_dim, **quantizer)
        self.pre_quant = nn.Linear(encoder.dim, code_dim)
        self.post_quant = nn.Linear(code_dim, decoder.dim)
        self.apply(_initialize)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks once more in the backward pass, which takes less memory."""
        self.encoder.transformer.recompute = self.decoder.transformer.recompute = enable

    def arguments(self) -> dict[str, Any]:
        """Return plain values that `from_arguments` makes the same module of."""
        quantizer = self.quantizer
        return {
            "image_size": list(self.image_size),
            "patch_size": self.patch_size,
            "encoder": dataclasses.asdict(self.sizes[0]),
            "decoder": dataclasses.asdict(self.sizes[1]),
            "num_codes": quantizer.num_codes,
            "code_dim": quantizer.embedding.embedding_dim,
            "in_chans": self.in_chans,
            "with_scale": self.with_scale,
            "beta": quantizer.beta,
            "l2_normalize": quantizer.l2_normalize,
            "num_residual": quantizer.num_residual,
            "detach_residual": quantizer.detach_residual,
            "kind": quantizer.kind,
            "temperature": quantizer.temperature,
        }

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> ViTVQGAN:
        """Return a module of `arguments`, with fresh weights."""
        height, width = arguments["image_size"]
        sizes = {name: TransformerSize(**arguments[name]) for name in ("encoder", "decoder")}
        return cls(**{**arguments, **sizes, "image_size": (int(height), int(width))})

    def forward(self, images: Tensor) -> Reconstruction:
        """Reconstruct images (B, C, H, W) in [0, 1]."""
        latents = self.latents(images)
        z_q, ids, loss = self.quantizer(latents)
        grid = self.grid_of((images.shape[-2], images.shape[-1]))
        return Reconstruction(self.decode(z_q, grid), loss, ids, z_q, latents)

    def encode(self, images: Tensor) -> Quantized:
        """Return the codes (B, N, d), their ids (B, N) and the quantiser's loss of images (B, C, H, W) in [0, 1]."""
        quantized: Quantized = self.quantizer(self.latents(images))
        return quantized

    def latents(self, images: Tensor) -> Tensor:
        """Return what is quantised, (B, N, d), of images (B, C, H, W) in [0, 1]."""
        self.grid_of((images.shape[-2], images.shape[-1]))
        latents: Tensor = self.pre_quant(self.encoder(images))
        return latents

    @torch.no_grad()
    def encode_ids(self, images: Tensor) -> Tensor:
        """Return (B, N) ids, of M levels (B, N, M); nothing is drawn, in whichever mode."""
        training = self.quantizer.training
        self.quantizer.eval()
        try:
            return self.encode(images).ids
        finally:
            self.quantizer.train(training)

    def decode(self, z_q: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return images (B, C, H, W), not clamped, of codes (B, N, d) on a grid (default: that of `image_size`)."""
        images: Tensor = self.decoder(self.post_quant(z_q), grid)
        return images

    def decode_ids(self, ids: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return images (B, C, H, W), not clamped, of ids (B, N)."""
        return self.decode(self.quantizer.lookup(ids), grid)

    def pictures(self, output: Tensor) -> Tensor:
        """Return what the decoder gives as images in [0, 1]; of a head with scales the mean, in the logit's range."""
        return unlogit(output[:, : self.in_chans]) if self.with_scale else output.clamp(0, 1)

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the patches (h, w) of an image of a size."""
        h, w = patch_grid(size, self.patch_size)
        return h, w


class PatchEncoder(nn.Module):
    """Patches to vectors: (B, C, H, W) → (B, N, D)."""

    pos_embed: Tensor

    def __init__(self, in_chans: int, patch_size: int, grid: tuple[int, int], size: TransformerSize) -> None:
        super().__init__()
        self.grid = grid
        self.proj = nn.Conv2d(in_chans, size.dim, patch_size, patch_size)
        self.register_buffer("pos_embed", sincos_positions(size.dim, grid))
        self.transformer = Transformer(size)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images."""
        x = self.proj(images)
        grid = (x.shape[-2], x.shape[-1])
        encoded: Tensor = self.transformer(x.flatten(2).mT + positions_of(self.pos_embed, self.grid, grid))
        return encoded


class PatchDecoder(nn.Module):
    """Vectors to patches: (B, N, D) → (B, C, H, W)."""

    pos_embed: Tensor

    def __init__(self, out_chans: int, patch_size: int, grid: tuple[int, int], size: TransformerSize) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("pos_embed", sincos_positions(size.dim, grid))
        self.transformer = Transformer(size)
        self.proj = nn.ConvTranspose2d(size.dim, out_chans, patch_size, patch_size)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Decode vectors on a grid; None: that of the positions."""
        grid = self.grid if grid is None else grid
        if x.shape[1] != grid[0] * grid[1]:
            raise UsageError(
                f"{x.shape[1]} tokens do not make a grid of {size_text(grid)}; the model was made for "
                f"{size_text(self.grid)}: name the grid they are of"
            )
        x = self.transformer(x + positions_of(self.pos_embed, self.grid, grid))
        images: Tensor = self.proj(x.mT.unflatten(2, grid))
        return images


class Transformer(nn.Module):
    """Pre-norm blocks and a last norm; heads are of a width of their own, and the MLP's activation is tanh."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.dim)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens (B, N, D)."""
        for block in self.blocks:
            again = self.recompute and self.training
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        normed: Tensor = self.norm(x)
        return normed


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside its input."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.dim)
        self.attn = Attention(size)
        self.norm2 = nn.LayerNorm(size.dim)
        self.mlp = nn.Sequential(nn.Linear(size.dim, size.mlp_dim), nn.Tanh(), nn.Linear(size.mlp_dim, size.dim))

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens (B, N, D)."""
        x = x + self.attn(self.norm1(x))
        added: Tensor = x + self.mlp(self.norm2(x))
        return added


class Attention(nn.Module):
    """Self-attention whose heads are `head_dim` wide whatever the tokens' width (timm's are a share of it)."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        inner = size.heads * size.head_dim
        self.heads = size.heads
        self.qkv = nn.Linear(size.dim, 3 * inner, bias=False)
        alone = size.heads == 1 and inner == size.dim
        self.proj = nn.Identity() if alone else nn.Linear(inner, size.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend: (B, N, D) → (B, N, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return attended


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Return the fixed positions of a grid (h, w), (1, h * w, dim): first half by column, second by row (MAE's order).

    Raises:
        UsageError: `dim` is not divisible by 4.
    """
    if dim % 4:
        raise UsageError(f"positions by sines and cosines need a width divisible by 4, not {dim}")
    quarter = dim // 4
    omega = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [places.reshape(-1, 1) * omega for places in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1).float()[None]


def positions_of(own: Tensor, own_grid: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Return the positions of a grid: a model's own, or for another than its own those computed anew."""
    return own if grid == own_grid else sincos_positions(own.shape[-1], grid).to(own)


def unlogit(mean: Tensor, eps: float = 0.1) -> Tensor:
    """Return values in [0, 1] of a mean in the logit's space (Ramesh et al. 2021, arXiv 2102.12092, appendix A.3)."""
    return ((mean.sigmoid() - eps) / (1 - 2 * eps)).clamp(0, 1)


def _initialize(module: nn.Module) -> None:
    """Initialise as published: Xavier's uniform, kernels as the matrices (first axis, rest)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight.data.flatten(1))
