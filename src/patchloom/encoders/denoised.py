"""A block behind an encoder that takes out of its features what hangs on the position alone.

Second stage of "Denoising Vision Transformers" (Yang et al. 2024, arXiv 2401.02957): positions are added to the patch
features and one transformer block is run on them. `denoised` puts it in the place of an encoder's final norm, behind
that norm; the result is an encoder as any other, which timm makes by the name `dvt_denoised_vit`.

>>> import torch
>>> Denoiser(64, (4, 4))(torch.randn(2, 4, 4, 64)).shape
torch.Size([2, 4, 4, 64])
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models import register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from patchloom.base.ranges import PositiveInt, checked
from patchloom.encoders.anysize import embed_any_size
from patchloom.encoders.encoder import Encoder
from patchloom.encoders.properties import grid_size, num_prefix_tokens, plane_size
from patchloom.encoders.stages import run_blocks
from patchloom.errors import UsageError

ARCHITECTURE = "dvt_denoised_vit"
HEAD_WIDTH = 64
START = 0.02


def heads_of(width: int) -> int:
    """Return the attention heads of a block of a width: width / 64, or the most below that divide it.

    >>> heads_of(768), heads_of(100), heads_of(32), heads_of(200)
    (12, 1, 1, 2)
    """
    return next(heads for heads in range(max(1, width // HEAD_WIDTH), 0, -1) if width % heads == 0)


class Denoiser(nn.Module):
    """Positions and transformer blocks that turn features of an encoder into those without artefacts.

    Neither a norm nor a skip follows: the block's own residuals carry the features through.

    Args:
        feat_dim: Width C of the features.
        grid_size: (H, W), the grid that positions are made for; they are resampled for another.
        num_blocks: Blocks (1).
        pos_embed: Add positions. Without, the gain is mostly gone, as the paper finds.
        encoder: A frozen encoder in front; the denoiser then takes images.
        norm: Apply the encoder's final norm to its features.

    Attributes:
        heads: Attention heads of a block.
    """

    pos_embed: nn.Parameter | None

    @checked
    def __init__(
        self,
        feat_dim: PositiveInt,
        grid_size: tuple[int, int],
        num_blocks: PositiveInt = 1,
        pos_embed: bool = True,
        encoder: Encoder | None = None,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.feat_dim, self.grid_size = feat_dim, (int(grid_size[0]), int(grid_size[1]))
        count = self.grid_size[0] * self.grid_size[1]
        self.pos_embed = nn.Parameter(START * torch.randn(1, count, feat_dim)) if pos_embed else None
        self.heads = heads_of(feat_dim)
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)  # timm's blocks take what makes a norm, and say a class
        self.blocks = nn.Sequential(
            *(Block(feat_dim, self.heads, qkv_bias=True, norm_layer=norm_layer) for _ in range(num_blocks))
        )
        self.norm = norm
        self.encoder = encoder
        if encoder is not None:
            encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Denoiser:
        """Set the mode; the encoder in front stays in eval mode."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

    def tokens(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return denoised tokens (B, N, C) of tokens (B, N, C) in a grid, row by row."""
        if self.pos_embed is not None:
            positions: Tensor = self.pos_embed
            if grid != self.grid_size:
                positions = resample_abs_pos_embed(positions, list(grid), list(self.grid_size), num_prefix_tokens=0)
            x = x + positions.to(x.dtype)
        denoised: Tensor = self.blocks(x)
        return denoised

    def forward(
        self, x: Tensor, return_class_token: bool = False, channels_first: bool = False, return_dict: bool = False
    ) -> Any:
        """Return denoised features.

        Args:
            x: Features (B, H, W, C); with an encoder in front, normalised images (B, channels, height, width).
            return_class_token: Return (features, class token (B, C)), the latter as the encoder has it.
            channels_first: Return (B, C, H, W) in place of (B, H, W, C).
            return_dict: Return `denoised_feats`, `original_feats` and, of an encoder, `class_tokens`.

        Raises:
            UsageError: Features of another width, or a class token where there is none.
        """
        class_token = None
        if self.encoder is not None:
            with torch.no_grad():
                x, prefix = encoder_features(self.encoder, x, norm=self.norm)
            class_token = prefix[:, 0] if prefix.shape[1] else None
        if x.ndim != 4 or x.shape[-1] != self.feat_dim:
            raise UsageError(f"features are (B, H, W, {self.feat_dim}) here, and these are {tuple(x.shape)}")
        if return_class_token and class_token is None:
            raise UsageError("there is no class token: it comes from an encoder in front that has one")
        found = self.tokens(x.flatten(1, 2), (x.shape[1], x.shape[2])).unflatten(1, x.shape[1:3])
        if channels_first:
            found, x = found.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)
        if return_dict:
            return {"denoised_feats": found, "original_feats": x, "class_tokens": class_token}
        return (found, class_token) if return_class_token else found


def denoising_loss(pred: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return how far features (…, C) are from others: `l2`, `cosine` (1 minus the mean cosine) and their sum `loss`."""
    l2 = F.mse_loss(pred, target)
    cosine = 1 - F.cosine_similarity(pred, target, dim=-1).mean()
    return {"l2": l2, "cosine": cosine, "loss": l2 + cosine}


def encoder_features(
    encoder: Encoder, images: Tensor, layer: int | None = None, norm: bool = True
) -> tuple[Tensor, Tensor]:
    """Return what is denoised: patch features (B, H, W, C) behind the final norm, and prefix tokens (B, P, C).

    Args:
        encoder: The encoder.
        images: (B, C, height, width), normalised, of any size that patches fill.
        layer: Block, from 0; default: the last.
        norm: Apply the final norm, whatever the layer, as timm's `forward_intermediates` does.
    """
    x, _ = run_blocks(encoder, embed_any_size(encoder, images), stop=None if layer is None else layer + 1)
    x = encoder.norm(x) if norm else x
    prefix = num_prefix_tokens(encoder)
    height, width = grid_size(encoder, (images.shape[-2], images.shape[-1]))
    return x[:, prefix:].unflatten(1, (height, width)), x[:, :prefix]


class DenoisedNorm(nn.Module):
    """An encoder's final norm with a denoiser behind it, which leaves prefix tokens alone.

    Args:
        encoder: Whose norm it is; the grid of each forward pass is what its patch embedding is given.
        denoiser: What comes behind.

    Attributes:
        norm: The encoder's own norm, which stays that of its other layers.
    """

    def __init__(self, encoder: Encoder, denoiser: Denoiser) -> None:
        super().__init__()
        self.norm: nn.Module = encoder.norm
        self.denoiser = denoiser
        self.num_prefix_tokens = int(encoder.num_prefix_tokens)
        self.grid = denoiser.grid_size
        encoder.patch_embed.register_forward_pre_hook(self._note_grid)

    def _note_grid(self, stem: Any, inputs: tuple[Tensor, ...]) -> None:
        kernel, stride = stem.proj.kernel_size, stem.proj.stride
        height, width = ((s - k) // t + 1 for s, k, t in zip(inputs[0].shape[-2:], kernel, stride, strict=True))
        self.grid = (height, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, P + N, D) of tokens of the last block (B, P + N, D).

        Raises:
            UsageError: Patches are missing, so that it is not known where the others are.
        """
        x = self.norm(x)
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        if patches.shape[1] != math.prod(self.grid):
            raise UsageError(
                f"a denoised encoder was given {patches.shape[1]} patches of a grid of {self.grid[0]} x "
                f"{self.grid[1]}; it needs them all, so methods that hide patches take the encoder it was made from"
            )
        return torch.cat([prefix, self.denoiser.tokens(patches, self.grid)], dim=1)


def denoised(encoder: Encoder, denoiser: Denoiser, layer: int | None = None) -> Encoder:
    """Put a denoiser behind an encoder's final norm, in place, and return the encoder.

    Args:
        encoder: A ViT of images.
        denoiser: Of its width.
        layer: Block whose features the denoiser was made for, from 0; blocks behind it are cut off. Default: the last.

    Raises:
        UsageError: Another width, no images, a block it does not have, or an encoder that is denoised already.
    """
    if isinstance(encoder.norm, DenoisedNorm):
        raise UsageError("the encoder is denoised already; give the one it was made from")
    plane_size(encoder, "the maps that are denoised")
    if encoder.embed_dim != denoiser.feat_dim:
        raise UsageError(
            f"the denoiser is for features of width {denoiser.feat_dim}, and these are {encoder.embed_dim}"
        )
    blocks = list(encoder.blocks)
    if layer is not None:
        if not 0 <= layer < len(blocks):
            raise UsageError(f"there is no block {layer}; the encoder has blocks 0 to {len(blocks) - 1}")
        encoder.blocks = encoder.blocks[: layer + 1]
    made: dict[str, Any] = encoder.patchloom_args
    encoder.norm = DenoisedNorm(encoder, denoiser)
    encoder.patchloom_args = {
        "architecture": ARCHITECTURE,
        "model_args": {
            "base": made["architecture"],
            "grid": tuple(denoiser.grid_size),
            "num_blocks": len(denoiser.blocks),
            "positions": denoiser.pos_embed is not None,
            "layer": len(blocks) - 1 if layer is None else layer,
            **made["model_args"],
        },
    }
    return encoder


def refuse_denoised(encoder: Encoder, why: str, remedy: str = "") -> None:
    """Refuse an encoder with a denoiser behind its final norm.

    Args:
        encoder: Any encoder.
        why: What cannot be, as a sentence.
        remedy: What else may be given than an encoder that has learnt to be clean by itself.

    Raises:
        UsageError: There is a denoiser.
    """
    if isinstance(encoder.norm, DenoisedNorm):
        raise UsageError(f"{why}; give {remedy}an encoder that patchloom clean dvt distill has left")


def refuse_unread_denoiser(encoder: Encoder, reader: str, remedy: str = "") -> None:
    """Refuse a denoiser that what reads the encoder's blocks as they are would pass over, see `refuse_denoised`."""
    why = f"{reader} reads blocks without the final norm, and the encoder's denoiser (DVT) behind that would do nothing"
    refuse_denoised(encoder, why, remedy)


@register_model
def dvt_denoised_vit(
    pretrained: bool = False,
    base: str = "vit_tiny_patch16_224",
    grid: tuple[int, int] = (14, 14),
    num_blocks: int = 1,
    positions: bool = True,
    layer: int | None = None,
    **model_args: Any,
) -> Any:
    """Return a ViT of timm with a denoiser behind its final norm (DVT).

    Args:
        pretrained: There are no published weights of the whole.
        base: timm's name of the encoder.
        grid: Grid of the denoiser's positions.
        num_blocks: Its blocks.
        positions: Whether it has positions.
        layer: Last block of the encoder, from 0; default: all there are.
        **model_args: Arguments of the encoder.
    """
    model_args = {name: value for name, value in model_args.items() if value is not None or name == "global_pool"}
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        model_args.pop(name, None)
    encoder: Any = timm.create_model(base, pretrained=False, **model_args)
    encoder.patchloom_args = {"architecture": base, "model_args": model_args}
    denoiser = Denoiser(int(encoder.embed_dim), (int(grid[0]), int(grid[1])), num_blocks, positions)
    return denoised(cast(Encoder, encoder), denoiser, layer)
