"""The masked autoencoder: hide most patches, encode the rest, regress the pixels of what was hidden.

The encoder sees visible patches only, so a step at 75 % costs it a quarter; a small decoder, thrown away afterwards,
sees all positions. "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377.

>>> import torch
>>> from patchloom.encoders import create_encoder
>>> encoder = create_encoder("vit_tiny_patch16_224", image_size=32, patch_size=4)
>>> model = MaskedAutoencoder(encoder, decoder_dim=64, decoder_depth=2, decoder_heads=4)
>>> output = model(torch.randn(2, 3, 32, 32), mask_ratio=0.75)
>>> output.pred.shape, int(output.mask.sum(1)[0])
(torch.Size([2, 64, 48]), 48)
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from patchloom.base.ranges import PositiveInt, checked
from patchloom.encoders import (
    Encoder,
    embed,
    embed_dim,
    family_of,
    final_norm,
    grid_size,
    in_chans,
    kind_of,
    num_prefix_tokens,
    patch_shape,
    patch_size,
    run_blocks,
    sides_of,
)
from patchloom.encoders.attend import Group, attend_block
from patchloom.encoders.patches import Grid, normalize_patches, patchify, shown, unpatchify
from patchloom.encoders.positions import patch_positions, sincos_positions
from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError


class MAEOutput(NamedTuple):
    """What a masked autoencoder makes of a batch."""

    loss: Tensor
    """(): mean squared error over the hidden patches."""
    pred: Tensor
    """(B, N, C p²): predicted patches, elements in the order row, column, channel."""
    mask: Tensor
    """(B, N) float: 1 where hidden."""
    latent: Tensor
    """(B, P + n, D): prefix and visible tokens after the encoder's norm, in the order they were drawn in."""
    ids_restore: Tensor
    """(B, N) int64: place of every patch of the image in the drawn order."""


class MaskedAutoencoder(nn.Module):
    """An encoder of visible patches and a decoder of all positions (He et al. 2021, arXiv 2111.06377, section 3).

    Args:
        encoder: Encoder without head; its positions may be absolute, relative or rotary.
        decoder_dim: Width of the decoder, divisible by 4; paper: 512.
        decoder_depth: Blocks of the decoder; paper: 8.
        decoder_heads: Attention heads of a decoder block; paper: 16.
        norm_pix_loss: Normalise every target patch by its own mean and variance; paper: yes.
        mask_ratio: Share of the patches hidden where a call doesn't say, in (0, 1).
        decoder_mlp_ratio: Hidden width of a decoder block's MLP over the decoder's; paper: 4.

    Raises:
        UsageError: A decoder whose width heads or positions do not divide, or without blocks; an encoder whose blocks
            need the whole grid of patches.
    """

    @checked
    def __init__(
        self,
        encoder: Encoder,
        decoder_dim: int = 512,
        decoder_depth: PositiveInt = 8,
        decoder_heads: int = 16,
        norm_pix_loss: bool = True,
        mask_ratio: float = 0.75,
        decoder_mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if decoder_heads < 1 or decoder_dim % decoder_heads:
            raise UsageError(f"decoder_dim {decoder_dim} is not divisible by decoder_heads {decoder_heads}")
        if not family_of(encoder).drops_tokens:
            raise UsageError(
                f"masked autoencoders show the encoder some patches only, and the blocks of a {type(encoder).__name__} "
                f"need the whole grid; take another encoder, or a method that keeps all patches (dinov2)"
            )
        self.encoder = encoder
        self.norm_pix_loss = norm_pix_loss
        self.mask_ratio = mask_ratio
        self.patch_shape = patch_shape(encoder)
        self.in_chans = in_chans(encoder)
        self.grid = grid_size(encoder)
        self.prefix = num_prefix_tokens(encoder)
        self.decoder_embed = nn.Linear(embed_dim(encoder), decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        positions = sincos_positions(decoder_dim, self.grid, self.prefix)
        self.decoder_pos_embed: Tensor
        self.register_buffer("decoder_pos_embed", positions.unsqueeze(0))
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, decoder_heads, mlp_ratio=decoder_mlp_ratio, qkv_bias=True, norm_layer=norm_layer)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, self.in_chans * math.prod(self.patch_shape))
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_norm, self.decoder_pred):
            part.apply(_init_layer)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, mask_ratio: float | None = None, noise: Tensor | None = None) -> MAEOutput:
        """Hide patches, predict all, and compare those that were hidden.

        Args:
            images: (B, C, H, W) normalised.
            mask_ratio: Share of the patches hidden, in (0, 1); int(N (1 - mask_ratio)) stay visible. Default: the
                model's.
            noise: (B, N) numbers whose n smallest in each image mark the visible patches; default: drawn uniformly.

        Raises:
            UsageError: A ratio that hides no patch or leaves none visible, or noise of another shape.
        """
        latent, mask, ids_restore = self.encode(images, mask_ratio, noise)
        pred = self.decode(latent, ids_restore)
        return MAEOutput(self.loss_of(images, pred, mask), pred, mask, latent, ids_restore)

    def loss(self, images: Tensor, mask_ratio: float | None = None, noise: Tensor | None = None) -> Tensor:
        """Return the loss alone, as `forward` has it, without predicting what is visible.

        Args:
            images: (B, C, H, W) normalised.
            mask_ratio: Share of the patches hidden.
            noise: (B, N), see `forward`.
        """
        order, visible = self._order(images, mask_ratio, noise)
        latent = self._encode(images, order[:, :visible])
        x = self._decode(latent, order, blocks=len(self.decoder_blocks) - 1)
        encoded, hidden = x.split((latent.shape[1], x.shape[1] - latent.shape[1]), dim=1)
        # What the last block would make of visible tokens, nobody asks for: they are keys and values only.
        decoded, _ = attend_block(self.decoder_blocks[-1], Group(hidden), Group(encoded, is_guest=True))
        pred = self.decoder_pred(self.decoder_norm(decoded))
        targets = _rows(patchify(images, self.patch_shape, "hwc"), order[:, visible:])
        return F.mse_loss(at_least_float32(pred), self._as_target(targets))

    def encode(
        self, images: Tensor, mask_ratio: float | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return `latent`, `mask` and `ids_restore` of `MAEOutput`; only visible patches pass the blocks."""
        order, visible = self._order(images, mask_ratio, noise)
        ids_restore = order.argsort(dim=1)
        mask = (ids_restore >= visible).float()
        return self._encode(images, order[:, :visible]), mask, ids_restore

    def decode(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Return predictions of all patches.

        Args:
            latent: (B, P + n, D) of `encode`.
            ids_restore: (B, N) of `encode`.

        Returns:
            (B, N, C p²), in the order of the image.
        """
        decoded = self._decode(latent, ids_restore.argsort(dim=1))[:, self.prefix :]
        return _rows(self.decoder_pred(self.decoder_norm(decoded)), ids_restore)

    def decode_hidden(self, latent: Tensor, ids_restore: Tensor, num_blocks: int | None = None) -> Tensor:
        """Return what the decoder's residual stream holds after its first blocks, before its norm.

        Args:
            latent: (B, P + n, D) of `encode`.
            ids_restore: (B, N) of `encode`.
            num_blocks: Decoder blocks to run; default: all.

        Returns:
            (B, P + N, D'), prefix first, patches in the order of the image.
        """
        x = self._decode(latent, ids_restore.argsort(dim=1), num_blocks)
        return torch.cat([x[:, : self.prefix], _rows(x[:, self.prefix :], ids_restore)], dim=1)

    @property
    def patch_size(self) -> int:
        """Side of a patch, where it is the same along every axis."""
        return patch_size(self.encoder)

    @property
    def hidden_dim(self) -> int:
        """Width of what `hidden` returns."""
        return int(self.decoder_embed.out_features)

    @property
    def hidden_blocks(self) -> int:
        """Most blocks `hidden` can run."""
        return len(self.decoder_blocks)

    def hidden(
        self,
        images: Tensor,
        mask_ratio: float | None = None,
        noise: Tensor | None = None,
        num_blocks: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what the decoder holds of masked images, see `decode_hidden`, and the mask of `MAEOutput`."""
        latent, mask, ids_restore = self.encode(images, mask_ratio, noise)
        return self.decode_hidden(latent, ids_restore, num_blocks), mask

    def loss_of(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Return the mean squared error over the hidden patches, see `mae_loss`."""
        return mae_loss(patchify(images, self.patch_shape, "hwc"), pred, mask, self.norm_pix_loss)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask_ratio: float | None = None, noise: Tensor | None = None) -> Tensor:
        """Return images whose hidden patches are predicted and whose visible ones are as they were.

        With normalised targets the network says nothing of a patch's brightness and contrast; these are taken from
        the original.

        Args:
            images: (B, C, H, W) normalised.
            mask_ratio: Share of the patches hidden.
            noise: (B, N), see `forward`.

        Returns:
            (B, C, H, W) in the space of `images`.
        """
        output = self(images, mask_ratio, noise)
        patches = at_least_float32(patchify(images, self.patch_shape, "hwc"))
        prediction = at_least_float32(output.pred)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=1)
            prediction = prediction * (variance + 1e-6).sqrt() + mean
        filled = torch.where(output.mask.unsqueeze(-1) > 0, prediction, patches)
        return unpatchify(filled, self.patch_shape, self._grid_of(images), self.in_chans, "hwc")

    def _order(self, images: Tensor, mask_ratio: float | None, noise: Tensor | None) -> tuple[Tensor, int]:
        """Return (B, N) int64, the patches of each image, those that stay visible first; and how many these are."""
        shape = (len(images), math.prod(self._grid_of(images)))
        if noise is None:
            noise = torch.rand(shape, device=images.device)
        elif tuple(noise.shape) != shape:
            raise UsageError(f"the noise has shape {tuple(noise.shape)}; one number per patch is {shape}")
        visible = visible_count(shape[1], self.mask_ratio if mask_ratio is None else mask_ratio)
        return noise.argsort(dim=1, stable=True), visible

    def _grid_of(self, images: Tensor) -> Grid:
        grid = grid_size(self.encoder, sides_of(images))
        if grid != self.grid:
            made_for = tuple(n * side for n, side in zip(self.grid, self.patch_shape, strict=True))
            raise UsageError(
                f"{kind_of(self.encoder)}s of {shown(sides_of(images))} pixels; "
                f"the model was made for {shown(made_for)}"
            )
        return grid

    def _encode(self, images: Tensor, keep: Tensor) -> Tensor:
        last, _ = run_blocks(self.encoder, embed(self.encoder, images, keep=keep))
        return final_norm(self.encoder, last)

    def _decode(self, latent: Tensor, order: Tensor, blocks: int | None = None) -> Tensor:
        """Return (B, P + N, D') tokens after all or the first few blocks, before the norm, patches in the drawn order.

        Attention doesn't mind the order, so the hidden ones stay at the end, where they can be cut off.
        """
        prefix, patches = self.decoder_pos_embed.split((self.prefix, order.shape[1]), dim=1)
        positions = torch.cat([prefix.expand(len(order), -1, -1), patches[0][order]], dim=1)
        num_visible = latent.shape[1]
        x = self.decoder_embed(latent)
        x = torch.cat(
            [x + positions[:, :num_visible], (self.mask_token + positions[:, num_visible:]).to(x.dtype)], dim=1
        )
        for block in list(self.decoder_blocks)[:blocks]:
            x = block(x)
        return x

    def _as_target(self, patches: Tensor) -> Tensor:
        return normalize_patches(patches) if self.norm_pix_loss else at_least_float32(patches)


def visible_count(patches: int, mask_ratio: float) -> int:
    """Return how many patches stay visible: int(N (1 - ratio)) in double precision, as published.

    Raises:
        UsageError: The ratio hides no patch, or leaves none visible.

    >>> visible_count(196, 0.75), visible_count(196, 0.9)
    (49, 19)
    """
    if not 0 < mask_ratio < 1:
        raise UsageError(f"mask_ratio is {mask_ratio}; it must be above 0 and below 1")
    visible = int(patches * (1 - mask_ratio))
    if visible == 0:
        raise UsageError(
            f"mask_ratio {mask_ratio:g} leaves none of {patches} patches visible; at most {1 - 1 / patches:.3g} does"
        )
    if visible == patches:
        raise UsageError(f"mask_ratio {mask_ratio:g} hides none of {patches} patches; raise it")
    return visible


def random_masking(x: Tensor, mask_ratio: float, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Keep a random part of the tokens of each image (`random_masking` of MAE's published code).

    Args:
        x: (B, N, D) tokens.
        mask_ratio: Share that is removed.
        noise: (B, N); the tokens with the smallest numbers stay. Default: drawn uniformly.

    Returns:
        Kept tokens (B, n, D) in ascending order of their noise; mask (B, N) float, 1 = removed; `ids_restore` (B, N).

    Raises:
        UsageError: A ratio that removes none or all.
    """
    noise = torch.rand(x.shape[:2], device=x.device) if noise is None else noise
    order = noise.argsort(dim=1, stable=True)
    visible = visible_count(x.shape[1], mask_ratio)
    ids_restore = order.argsort(dim=1)
    return _rows(x, order[:, :visible]), (ids_restore >= visible).float(), ids_restore


def mae_loss(patches: Tensor, pred: Tensor, mask: Tensor, norm_pix: bool = True) -> Tensor:
    """Return the mean squared error over hidden patches (`forward_loss` of MAE's published code).

    Args:
        patches: (B, N, C p²) patches of the normalised images, elements in the order of `pred`.
        pred: (B, N, C p²).
        mask: (B, N), 1 where hidden; not all 0.
        norm_pix: Compare with patches normalised by their own mean and unbiased variance.

    Returns:
        (), float32, or float64 where that came in.

    Raises:
        UsageError: Nothing is hidden.
    """
    hidden = mask.sum()
    if not hidden > 0:
        raise UsageError("no patch is hidden, so there is nothing to compare")
    targets = normalize_patches(patches) if norm_pix else at_least_float32(patches)
    per_patch = (at_least_float32(pred) - targets).square().mean(dim=-1)
    return (per_patch * mask).sum() / hidden


def initialize_as_mae(encoder: Encoder, fixed_positions: bool = True) -> None:
    """Initialise an encoder as the published pre-training does (`initialize_weights` of MAE's code).

    Linear weights and the flattened patch convolution Xavier-uniform, biases 0 (the convolution's as PyTorch has it),
    norms (1, 0), class and register tokens normal with σ = 0.02.

    Args:
        encoder: Encoder without head.
        fixed_positions: Let absolute positions be sines and cosines that are not trained.
    """
    encoder.apply(_init_layer)
    kernel = getattr(encoder.patch_embed.proj, "weight", None)
    if kernel is not None and kernel.ndim > 2:
        nn.init.xavier_uniform_(kernel.data.view(len(kernel), -1))
    for name in ("cls_token", "reg_token"):
        if isinstance(token := getattr(encoder, name, None), nn.Parameter):
            nn.init.normal_(token, std=0.02)
    if fixed_positions and isinstance(positions := getattr(encoder, "pos_embed", None), nn.Parameter):
        grid = grid_size(encoder)
        table = sincos_positions(embed_dim(encoder), grid, patch_positions(positions, grid))
        positions.data.copy_(table)
        positions.requires_grad_(False)


def has_fixed_positions(encoder: Encoder) -> bool:
    """Return whether an encoder's absolute positions are the sines and cosines of `sincos_positions`."""
    positions, grid = getattr(encoder, "pos_embed", None), grid_size(encoder)
    if not isinstance(positions, Tensor) or positions.shape[-1] % (2 * len(grid)) or positions.ndim != 3:
        return False
    table = sincos_positions(embed_dim(encoder), grid, patch_positions(positions, grid))
    return bool(torch.allclose(positions.detach().cpu()[0].float(), table, atol=1e-5))


def _init_layer(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.LayerNorm) and layer.elementwise_affine:
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Return rows (B, n, D) of x (B, N, D) by number (B, n)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
