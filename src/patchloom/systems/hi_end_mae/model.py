"""Hi-End-MAE: a masked autoencoder of volumes whose decoder asks the encoder's layers for what is hidden.

The encoder sees the visible patches. Behind two blocks of self-attention the decoder has three whose tokens also attend
to the encoder: to the output of its tenth block first, then of the seventh, then of the fourth. So shallow blocks learn
what a segmentation network takes of them (Tan et al. 2025, arXiv 2502.08347, section 3).

>>> import torch
>>> from patchloom.encoders import create_encoder
>>> encoder = create_encoder("volume_vit_micro_patch4_32", image_size=16, in_chans=1)
>>> output = HiEndMAE(encoder, decoder_dim=48, decoder_heads=6)(torch.rand(2, 1, 16, 16, 16))
>>> output.pred.shape, output.n_visible
(torch.Size([2, 64, 64]), 16)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from patchloom.base.ranges import Count, PositiveInt, checked
from patchloom.encoders import (
    Encoder,
    create_encoder,
    depth,
    embed,
    embed_dim,
    family_of,
    final_norm,
    grid_size,
    in_chans,
    input_size,
    kind_of,
    num_prefix_tokens,
    patch_shape,
    run_blocks,
    sides_of,
)
from patchloom.encoders.masked_autoencoder import initialize_as_mae, visible_count
from patchloom.encoders.patches import patchify, shown, unpatchify
from patchloom.encoders.precision import at_least_float32
from patchloom.encoders.volume import VolumeTransformer, in_slices, volume_positions
from patchloom.errors import UsageError

MEMORY_LAYERS = (3, 6, 9)
"""Blocks, from 0, that the decoder asks; the last of them is asked first."""
EPS = 1e-6
LARGEST = 20.0
"""Above this, values are CT numbers that nobody has brought to [0, 1]."""


class HiEndMAEOutput(NamedTuple):
    """What the autoencoder makes of a batch."""

    loss: Tensor
    """(): mean squared error over the hidden patches."""
    pred: Tensor
    """(B, N, p C): predicted patches in the drawn order, the visible ones first; elements with the channel last."""
    shuffle_indices: Tensor
    """(B, N) int64: patches in the drawn order."""
    n_visible: int
    """How many of them, from the first, the encoder saw."""


class CrossAttention(nn.Module):
    """Attention of tokens to a memory.

    Args:
        dim: Width of both.
        num_heads: Heads; they divide it.
        qkv_bias: Queries, keys and values have a bias.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Return (B, N, D) of tokens (B, N, D) and a memory (B, M, D)."""
        queries = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        keys, values = self.kv(memory).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(queries, keys, values)
        out: Tensor = self.proj(seen.transpose(1, 2).flatten(2))
        return out


class CrossAttentionBlock(nn.Module):
    """Self-attention, attention to a memory, MLP; each behind a norm and added. The memory itself is not normed.

    Args:
        dim: Width.
        num_heads: Heads of both attentions.
        mlp_ratio: Width of the MLP's middle over `dim`.
        qkv_bias: Queries, keys and values have a bias.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True) -> None:
        super().__init__()
        self.norm0, self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=EPS) for _ in range(3))
        self.self_attn = Attention(dim, num_heads=num_heads, qkv_bias=qkv_bias)
        self.cross_attn = CrossAttention(dim, num_heads, qkv_bias)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Return (B, N, D) of tokens (B, N, D) and a memory (B, M, D)."""
        x = x + self.self_attn(self.norm0(x))
        x = x + self.cross_attn(self.norm1(x), memory)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class HiEndDecoder(nn.Module):
    """Blocks of self-attention, then one that asks for each memory, a norm and the head.

    Args:
        dim: Width.
        num_heads: Heads.
        out_dim: Elements of a patch.
        self_depth: Blocks before the first memory.
        memories: Memories, and blocks that ask for one.
        mlp_ratio: Width of an MLP's middle over `dim`.
    """

    def __init__(
        self, dim: int, num_heads: int, out_dim: int, self_depth: int = 2, memories: int = 3, mlp_ratio: float = 4.0
    ) -> None:
        super().__init__()
        norm_layer: Any = partial(nn.LayerNorm, eps=EPS)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm_layer) for _ in range(self_depth)
        )
        self.cross_attention_blocks = nn.ModuleList(
            CrossAttentionBlock(dim, num_heads, mlp_ratio) for _ in range(memories)
        )
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor, memories: Sequence[Tensor], first: int = 0) -> Tensor:
        """Return predictions (B, N - first, out_dim).

        Args:
            x: (B, N, D), positions added.
            memories: (B, M, D) each, in the order in which they are asked.
            first: Tokens before this one are not predicted.
        """
        for block in self.blocks:
            x = block(x)
        for block, memory in zip(self.cross_attention_blocks, memories, strict=True):
            x = block(x, memory)
        out: Tensor = self.head(self.norm(x[:, first:]))
        return out


class HiEndMAE(nn.Module):
    """An encoder of visible patches, and a decoder that asks three of its layers.

    Args:
        encoder: Encoder of volumes without head, with a class token (published) or without.
        decoder_dim: Width of the decoder, divisible by 6 and by its heads; paper: 384 for base, 528 for large.
        decoder_heads: Heads of the decoder.
        decoder_depth: Blocks of self-attention in front of those that ask a layer; paper: 2.
        memory_layers: Blocks, from 0, whose outputs are asked, shallow ones first; paper: 3, 6 and 9.
        mask_ratio: Share of the patches hidden, in (0, 1).
        decoder_mlp_ratio: Width of the middle of the decoder's MLPs over its own.

    Raises:
        UsageError: Widths that heads or positions do not divide; layers the encoder has not; a ratio that hides no
            patch or all; an encoder whose blocks need the whole grid, or of other inputs.
    """

    @checked
    def __init__(
        self,
        encoder: Encoder,
        decoder_dim: PositiveInt = 384,
        decoder_heads: PositiveInt = 12,
        decoder_depth: Count = 2,
        memory_layers: tuple[int, ...] = MEMORY_LAYERS,
        mask_ratio: float = 0.75,
        decoder_mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if kind_of(encoder) != "volume":
            raise UsageError(f"Hi-End-MAE is for encoders of volumes, and this one takes {kind_of(encoder)}s")
        if decoder_dim % decoder_heads:
            raise UsageError(f"decoder_dim {decoder_dim} is not divisible by decoder_heads {decoder_heads}")
        if not family_of(encoder).drops_tokens:
            raise UsageError(
                f"Hi-End-MAE shows the encoder some patches only, and the blocks of a {type(encoder).__name__} need "
                f"the whole grid; take an encoder with attention alone, such as volume_vit_base_patch16_96"
            )
        if not memory_layers or sorted(set(memory_layers)) != list(memory_layers) or memory_layers[0] < 0:
            raise UsageError(f"memory_layers is {tuple(memory_layers)}; give blocks from 0, shallow ones first: 3,6,9")
        if memory_layers[-1] >= depth(encoder):
            raise UsageError(
                f"the decoder asks blocks {', '.join(map(str, memory_layers))} (from 0), and the encoder has "
                f"{depth(encoder)}; take one of at least {memory_layers[-1] + 1}, or set memory_layers"
            )
        self.encoder, self.memory_layers, self.mask_ratio = encoder, tuple(memory_layers), mask_ratio
        self.patch_shape, self.grid, self.in_chans = patch_shape(encoder), grid_size(encoder), in_chans(encoder)
        self.patches, self.prefix = math.prod(self.grid), num_prefix_tokens(encoder)
        self.visible = visible_count(self.patches, mask_ratio)
        width = embed_dim(encoder)
        # One for each layer that is asked, then one for what the decoder begins with.
        self.encoder_to_decoder = nn.ModuleList(nn.Linear(width, decoder_dim) for _ in range(len(memory_layers) + 1))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(volume_positions(decoder_dim, self.grid), requires_grad=False)
        self.decoder = HiEndDecoder(
            decoder_dim,
            decoder_heads,
            self.in_chans * math.prod(self.patch_shape),
            decoder_depth,
            len(memory_layers),
            decoder_mlp_ratio,
        )
        for module in self.decoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(cast(Tensor, module.bias))
        for bridge in self.encoder_to_decoder:
            nn.init.xavier_uniform_(cast(nn.Linear, bridge).weight)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, volumes: Tensor, shuffle_indices: Tensor | None = None) -> HiEndMAEOutput:
        """Hide patches, predict all, and compare those that were hidden.

        Args:
            volumes: (B, C, D, H, W), normalised.
            shuffle_indices: (B, N) int64, the patches of each volume in an order whose first int(N (1 - r)) stay
                visible; default: drawn.

        Raises:
            UsageError: Volumes of other channels or of another size, values that are not finite, or an order of other
                patches.
        """
        self._check(volumes)
        order = self._order(volumes) if shuffle_indices is None else shuffle_indices
        if tuple(order.shape) != (len(volumes), self.patches) or not bool(
            (order.sort(1).values == torch.arange(self.patches, device=order.device)).all()
        ):
            raise UsageError(
                f"shuffle_indices is no order of {self.patches} patches for each of {len(volumes)} volumes "
                f"(its shape is {tuple(order.shape)})"
            )
        pred = self._decode(*self._encode(volumes, order), order, self.prefix)
        loss = F.mse_loss(at_least_float32(pred[:, self.visible :]), self._targets(volumes, order))
        return HiEndMAEOutput(loss, pred, order, self.visible)

    def loss(self, volumes: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the loss alone, without predicting what is visible.

        Args:
            volumes: (B, C, D, H, W), normalised.
            noise: (B, N) numbers, in whose order patches are taken; default: drawn.
        """
        self._check_shape(volumes)
        order = self._order(volumes, noise)
        pred = self._decode(*self._encode(volumes, order), order, self.prefix + self.visible)
        return F.mse_loss(at_least_float32(pred), self._targets(volumes, order))

    def encode(self, volumes: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the normed tokens (B, P + N, D) of whole volumes, and the outputs of all blocks, which are not."""
        self._check_shape(volumes)
        count = depth(self.encoder)
        last, taps = run_blocks(self.encoder, embed(self.encoder, volumes), taps=range(1, count + 1))
        return final_norm(self.encoder, last), [taps[number] for number in range(1, count + 1)]

    @torch.no_grad()
    def reconstruct(self, volumes: Tensor, shuffle_indices: Tensor | None = None) -> Tensor:
        """Return volumes (B, C, D, H, W) whose hidden patches are predicted, and whose visible ones are as they were.

        The network says nothing of a patch's brightness and contrast; these are taken from the original, with its
        unbiased deviation, as published.
        """
        output = self(volumes, shuffle_indices)
        patches = at_least_float32(_rows(patchify(volumes, self.patch_shape, "hwc"), output.shuffle_indices))
        spread = patches.std(-1, keepdim=True) + EPS
        predicted = at_least_float32(output.pred) * spread + patches.mean(-1, keepdim=True)
        drawn = torch.cat([patches[:, : self.visible], predicted[:, self.visible :]], dim=1)
        return unpatchify(
            _rows(drawn, output.shuffle_indices.argsort(1)), self.patch_shape, self.grid, self.in_chans, "hwc"
        )

    def decoder_settings(self) -> dict[str, Any]:
        """Return what the tensors beside the encoder do not tell."""
        block: Any = self.decoder.cross_attention_blocks[0]
        return {
            "decoder_heads": int(block.cross_attn.num_heads),
            "memory_layers": list(self.memory_layers),
            "mask_ratio": self.mask_ratio,
        }

    def for_scans(self) -> Encoder:
        """Return the encoder of a published checkpoint for volumes as they lie here (`encoders.volume.in_slices`)."""
        return cast(Encoder, in_slices(cast(VolumeTransformer, self.encoder)))

    def _order(self, volumes: Tensor, noise: Tensor | None = None) -> Tensor:
        if noise is None:
            noise = torch.rand(len(volumes), self.patches, device=volumes.device)
        elif tuple(noise.shape) != (len(volumes), self.patches):
            raise UsageError(
                f"the noise has shape {tuple(noise.shape)}; one number per patch is {(len(volumes), self.patches)}"
            )
        return noise.argsort(dim=1, stable=True)

    def _encode(self, volumes: Tensor, order: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return what the decoder begins with, and its memories in the order in which they are asked."""
        taps = [layer + 1 for layer in self.memory_layers]
        embedded = embed(self.encoder, volumes, keep=order[:, : self.visible])
        last, hidden = run_blocks(self.encoder, embedded, taps=taps)
        *bridges, into = self.encoder_to_decoder
        memories = [bridge(hidden[tap]) for bridge, tap in zip(bridges, taps, strict=True)]
        return into(final_norm(self.encoder, last)), memories[::-1]

    def _decode(self, x: Tensor, memories: list[Tensor], order: Tensor, first: int) -> Tensor:
        """Return predictions in the drawn order, of tokens from number `first` on."""
        positions = self.decoder_pos_embed[0][order]
        prefix, visible = x[:, : self.prefix], x[:, self.prefix :]
        hidden = self.mask_token + positions[:, self.visible :]
        tokens = torch.cat([prefix, visible + positions[:, : self.visible], hidden.to(x.dtype)], dim=1)
        predicted: Tensor = self.decoder(tokens, memories, first)
        return predicted

    def _targets(self, volumes: Tensor, order: Tensor) -> Tensor:
        """Return the hidden patches, each by its own mean and biased variance."""
        patches = _rows(patchify(volumes, self.patch_shape, "hwc"), order[:, self.visible :])
        return F.layer_norm(at_least_float32(patches), patches.shape[-1:], eps=EPS)

    def _check_shape(self, volumes: Tensor) -> None:
        family_of(self.encoder).check(self.encoder, volumes)
        if volumes.shape[1] != self.in_chans:
            raise UsageError(f"volumes of {volumes.shape[1]} channels; the encoder takes {self.in_chans}")
        if sides_of(volumes) != input_size(self.encoder):
            raise UsageError(
                f"volumes of {shown(sides_of(volumes))} voxels; the model was made for "
                f"{shown(input_size(self.encoder))}"
            )

    def _check(self, volumes: Tensor) -> None:
        self._check_shape(volumes)
        largest = float(volumes.detach().abs().max())
        if not math.isfinite(largest):
            raise UsageError("the volumes hold NaN or infinite values; clean them, or read them by a value_range")
        if largest > LARGEST:
            warnings.warn(
                f"values up to {largest:g}: these look like CT numbers as stored; bring them to [0, 1] "
                f"(value_range=-175,250 for soft tissue)",
                stacklevel=3,
            )


def hi_end_mae(
    img_size: int | tuple[int, ...] = 96,
    patch_size: int | tuple[int, ...] = 16,
    in_chans: int = 1,
    embed_dim: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    decoder_embed_dim: int = 384,
    decoder_num_heads: int = 12,
    decoder_self_depth: int = 2,
    mask_ratio: float = 0.75,
    memory_layers: tuple[int, ...] = MEMORY_LAYERS,
    mlp_ratio: float = 4.0,
    positions: str = "sincos",
) -> HiEndMAE:
    """Return a Hi-End-MAE with fresh weights, initialised as published; the defaults are those of the base model.

    Args:
        img_size: Side of the volumes, or each, voxels.
        patch_size: Side of the patches, or each.
        in_chans: Channels.
        embed_dim: Width of the encoder.
        depth: Its blocks.
        num_heads: Its heads.
        decoder_embed_dim: Width of the decoder.
        decoder_num_heads: Its heads.
        decoder_self_depth: Its blocks in front of those that ask a layer.
        mask_ratio: Share of the patches hidden.
        memory_layers: Blocks that are asked.
        mlp_ratio: Width of the middle of all MLPs over the blocks' own.
        positions: Of the encoder: sincos, or learned.

    Raises:
        UsageError: As `create_encoder` and `HiEndMAE`.
    """
    encoder = create_encoder(
        "volume_vit_base_patch16_96",
        image_size=img_size,
        in_chans=in_chans,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        positions=positions,
    )
    initialize_as_mae(encoder, fixed_positions=False)
    if positions == "learned":
        nn.init.normal_(encoder.pos_embed, std=0.02)
    decoder = (decoder_embed_dim, decoder_num_heads, decoder_self_depth)
    return HiEndMAE(encoder, *decoder, memory_layers, mask_ratio, mlp_ratio)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Return rows (B, n, D) of x (B, N, D) by number (B, n)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
