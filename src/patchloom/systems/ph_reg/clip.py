"""CLIP towers that say of every patch what it is, in the space of texts: PH-Reg's teacher and student of CLIP.

The last block is cut down. The student's keeps the values of attention alone, each patch its own (MaskCLIP, Zhou et al.
2022, arXiv 2112.01071); the teacher's lets each patch look at those like it nearby (NACLIP, Hajimiri et al. 2025, arXiv
2404.08181). The final norm and the projection to the space of texts follow.

>>> from patchloom.encoders import create_encoder
>>> tower = create_encoder("vit_base_patch16_clip_quickgelu_224", image_size=64, embed_dim=64, depth=2, num_heads=2)
>>> DenseCLIP(tower, torch.randn(64, 24))(torch.randn(2, 3, 64, 64)).shape
torch.Size([2, 16, 24])
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.encoders import Encoder, depth, embed_dim, grid_size, num_prefix_tokens, run_blocks
from patchloom.encoders.anysize import DINOV2_RULE, embed_any_size
from patchloom.encoders.patches import Grid
from patchloom.encoders.precision import at_least_float32
from patchloom.encoders.properties import sides_of
from patchloom.errors import UsageError
from patchloom.systems.ph_reg.model import DenoisedTeacher, PHReg

Readout = Literal["values", "neighbours"]
NEIGHBOUR_STD = 5.0


class ValueOnlyLastBlock(nn.Module):
    """What each token's value is, projected: no attention, no residual, no MLP (MaskCLIP).

    Args:
        block: A block of timm's ViT, of which the first norm, the values and the projection are read.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Return (B, P + N, C) of (B, P + N, C); the grid plays no part."""
        block: Any = self.block
        qkv, width = block.attn.qkv, x.shape[-1]
        bias = None if qkv.bias is None else qkv.bias[2 * width :]
        values = F.linear(block.norm1(x), qkv.weight[2 * width :], bias)
        projected: Tensor = block.attn.proj(values)
        return projected


class NeighbourhoodAttentionLastBlock(nn.Module):
    """Attention of keys to keys, with more for patches nearby; no residual, no MLP (NACLIP).

    softmax(k kᵀ / √d + Ω) v, where Ω between patches is exp(-|distance|² / 2σ²) in patches, and 0 for prefix tokens.

    Args:
        block: A block of timm's ViT, of which the first norm, keys, values and the projection are read.
        std: σ; NACLIP: 5.
        num_prefix_tokens: P, tokens in front of the patches.
    """

    def __init__(self, block: nn.Module, std: float = NEIGHBOUR_STD, num_prefix_tokens: int = 1) -> None:
        super().__init__()
        if std <= 0:
            raise UsageError(f"neighbour_std is {std}; it must be above 0")
        self.block, self.std, self.num_prefix_tokens = block, std, num_prefix_tokens

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Return (B, P + N, C) of (B, P + N, C), N patches of a grid (h, w)."""
        block: Any = self.block
        batch, count, width = x.shape
        heads = int(block.attn.num_heads)
        qkv = block.attn.qkv(block.norm1(x)).reshape(batch, count, 3, heads, width // heads)
        _, keys, values = qkv.permute(2, 0, 3, 1, 4)
        nearness = F.pad(neighbourhood(grid, self.std), (self.num_prefix_tokens, 0, self.num_prefix_tokens, 0))
        mixed = F.scaled_dot_product_attention(keys, keys, values, attn_mask=nearness.to(keys))
        projected: Tensor = block.attn.proj(mixed.transpose(1, 2).flatten(2))
        return projected


def neighbourhood(grid: Grid, std: float = NEIGHBOUR_STD) -> Tensor:
    """Return how near patches of a grid (h, w) are: (N, N) in (0, 1], 1 for a patch and itself."""
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], 1)
    squares = (places[:, None] - places[None]).square().sum(-1)
    return torch.exp(-squares / (2 * std**2)).float()


class DenseCLIP(nn.Module):
    """A CLIP tower that gives every patch a vector in the space of texts.

    Args:
        encoder: Its ViT of timm, with registers or without.
        projection: (C, E), to the space of texts.
        readout: How the last block is read: `values` (MaskCLIP; the student) or `neighbours` (NACLIP; the teacher).
        neighbour_std: σ of the latter, in patches.

    Raises:
        UsageError: A projection of another width, or an encoder that is no such tower.
    """

    projection: Tensor

    def __init__(
        self,
        encoder: Encoder,
        projection: Tensor,
        readout: Readout = "values",
        neighbour_std: float = NEIGHBOUR_STD,
    ) -> None:
        super().__init__()
        if projection.ndim != 2 or projection.shape[0] != embed_dim(encoder):
            raise UsageError(
                f"the projection to the space of texts is {tuple(projection.shape)}, and the tower is "
                f"{embed_dim(encoder)} wide"
            )
        last: Any = encoder.blocks[-1]
        if not hasattr(getattr(last, "attn", None), "qkv"):
            raise UsageError(f"a {type(encoder).__name__} has no attention with joined values; take a CLIP ViT of timm")
        self.encoder = encoder
        self.readout: Readout = readout
        self.neighbour_std = neighbour_std
        self.register_buffer("projection", projection.detach().clone())

    def last_block(self) -> nn.Module:
        """Return the encoder's last block as it is read here."""
        block = self.encoder.blocks[-1]
        if self.readout == "values":
            return ValueOnlyLastBlock(block)
        return NeighbourhoodAttentionLastBlock(block, self.neighbour_std, num_prefix_tokens(self.encoder))

    def forward(self, images: Tensor) -> Tensor:
        """Return a vector (B, N, E) for every patch of normalised images (B, 3, H, W), of any size patches fill."""
        embedded = embed_any_size(self.encoder, images, rule=DINOV2_RULE)
        x, _ = run_blocks(self.encoder, embedded, stop=depth(self.encoder) - 1)
        x = self.last_block()(x, grid_size(self.encoder, sides_of(images)))
        patches = self.encoder.norm(x)[:, num_prefix_tokens(self.encoder) :]
        return patches @ self.projection.to(patches)


class CLIPTeacher(DenoisedTeacher):
    """A `DenoisedTeacher` whose features are a CLIP tower's, read by neighbourhood attention.

    Args:
        encoder: The tower's ViT.
        projection: (C, E).
        neighbour_std: σ in patches.
        views: As for `DenoisedTeacher`.
        shift_fraction: Likewise.
        chunk: Likewise.
    """

    def __init__(
        self,
        encoder: Encoder,
        projection: Tensor,
        neighbour_std: float = NEIGHBOUR_STD,
        views: int = 10,
        shift_fraction: float = 0.15,
        chunk: int | None = None,
    ) -> None:
        super().__init__(encoder, views, shift_fraction, chunk)
        self.dense = DenseCLIP(encoder, projection, "neighbours", neighbour_std).eval()

    def features(self, images: Tensor) -> Tensor:
        """Return the features (B, n, n, E) of normalised images as they are."""
        return at_least_float32(self.dense(images)).unflatten(1, (self.grid, self.grid))


class CLIPPHReg(PHReg):
    """PH-Reg of a CLIP tower: both last blocks are cut down, and features are compared in the space of texts.

    Args:
        encoder: The tower's ViT.
        projection: (C, E), to the space of texts; it stays.
        neighbour_std: σ of the teacher's last block, in patches.
        unlock_blocks: How many of the last blocks train; published: 2.
        views: As for `PHReg`.
        shift_fraction: Likewise.
        teacher_chunk: Likewise.
        **settings: What else `PHReg` takes.
    """

    def __init__(
        self,
        encoder: Encoder,
        projection: Tensor,
        neighbour_std: float = NEIGHBOUR_STD,
        unlock_blocks: int = 2,
        views: int = 10,
        shift_fraction: float = 0.15,
        teacher_chunk: int | None = None,
        **settings: Any,
    ) -> None:
        teacher = CLIPTeacher(encoder, projection, neighbour_std, views, shift_fraction, teacher_chunk)
        super().__init__(encoder, unlock_blocks=unlock_blocks, teacher=teacher, **settings)
        self.dense = DenseCLIP(self.student, projection, "values")
        # What the student's last block is not read for gets no gradient, which parallel training takes amiss.
        last: Any = self.student.blocks[-1]
        for part in (last.norm2, last.mlp, last.ls1, last.ls2):
            part.requires_grad_(False)
        self.trained = [name for name, parameter in self.student.named_parameters() if parameter.requires_grad]

    def features(self, images: Tensor) -> Tensor:
        """Return the student's features (B, n, n, E) of normalised images."""
        return at_least_float32(self.dense(images)).unflatten(1, (self.teacher.grid, self.teacher.grid))
