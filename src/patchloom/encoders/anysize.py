"""Images of another size than an encoder is set up for, in the same forward pass and with gradients.

Multi-crop training shows one encoder crops of two sizes. Absolute positions, relative-position tables and rotary
positions are made for the crop's grid from those of the encoder, so that crops of every size train them.

>>> import timm, torch
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0)
>>> embed_any_size(encoder, torch.randn(2, 3, 96, 96)).x.shape
torch.Size([2, 37, 192])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from patchloom.encoders.encoder import Encoder
from patchloom.encoders.families import Embedded, family_of
from patchloom.encoders.positions import DINOV2_RULE, TIMM_RULE, PositionRule, resample_positions
from patchloom.encoders.properties import grid_size, input_size, sides_of
from patchloom.encoders.stages import embed, insert_mask_token, normed_in_front, run_blocks
from patchloom.errors import UsageError

__all__ = [
    "DINOV2_RULE",
    "TIMM_RULE",
    "AnySizeVisionTransformer",
    "PositionRule",
    "embed_any_size",
    "resample_positions",
    "take_any_size",
]


def embed_any_size(
    encoder: Encoder,
    images: Tensor,
    masked: Tensor | None = None,
    mask_token: Tensor | None = None,
    rule: PositionRule = TIMM_RULE,
) -> Embedded:
    """Return the tokens that enter the first block, for images of any size patches fill.

    Args:
        encoder: The encoder.
        images: (B, C, H, W), normalised; or what else the encoder takes, clips (B, C, T, H, W).
        masked: (B, N) bool over the grid of these images, see `embed`.
        mask_token: (1, 1, D) or (1, D); needed with `masked`.
        rule: How absolute positions are resampled where the size is not the encoder's own.

    Raises:
        UsageError: A side is not divisible by the patch size, or the encoder cannot work at two sizes at once.
    """
    size = sides_of(images)
    if size == input_size(encoder):
        return embed(encoder, images, masked=masked, mask_token=mask_token)
    family = family_of(encoder)
    family.check(encoder, images)
    grid = grid_size(encoder, size)
    x = family.embed_patches(encoder, images, any_size=True)
    if masked is not None:
        x = insert_mask_token(x, masked, mask_token)
    return normed_in_front(encoder, family.add_positions_at(encoder, x, grid, rule))


class AnySizeVisionTransformer(VisionTransformer):
    """A timm ViT that takes images of any size patches fill, as the published DINOv2 does.

    It is made of a `VisionTransformer` by `take_any_size`, has its weights and saves as it does.
    """

    position_rule: PositionRule

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the normed tokens (B, P + N, D) of (B, C, H, W) normalised images."""
        if sides_of(x) == input_size(self):
            return super().forward_features(x, attn_mask, is_causal)
        if attn_mask is not None or is_causal:
            raise UsageError(f"attention masks are for images of {input_size(self)} pixels only")
        encoder = cast(Encoder, self)  # as registered
        last, _ = run_blocks(encoder, embed_any_size(encoder, x, rule=self.position_rule))
        normed: Tensor = self.norm(last)
        return normed

    def get_intermediate_layers(  # type: ignore[override]
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Return patch tokens after some blocks, as the method of this name in DINOv2's code does.

        Args:
            x: (B, C, H, W) normalised images.
            n: How many of the last blocks, or which, from 0.
            reshape: Give maps (B, D, h, w) instead of tokens (B, N, D).
            return_class_token: Give pairs of patches and class token (B, D).
            norm: Pass each through the final norm.
        """
        total = len(self.blocks)
        numbers = [number + 1 for number in (range(total - n, total) if isinstance(n, int) else n)]
        encoder = cast(Encoder, self)
        embedded = embed_any_size(encoder, x, rule=self.position_rule)
        _, taps = run_blocks(encoder, embedded, stop=max(numbers), taps=numbers)
        grid = grid_size(self, sides_of(x))
        found: list[Any] = []
        for number in numbers:
            out = self.norm(taps[number]) if norm else taps[number]
            patches = out[:, self.num_prefix_tokens :]
            if reshape:
                patches = patches.transpose(1, 2).reshape(len(x), -1, *grid)
            found.append((patches, out[:, 0]) if return_class_token else patches)
        return tuple(found)


def take_any_size(encoder: Encoder, rule: PositionRule = TIMM_RULE) -> Encoder:
    """Let a `VisionTransformer` take images of any size from now on, in place, and return it."""
    model: Any = encoder
    model.__class__ = AnySizeVisionTransformer
    model.position_rule = rule
    return encoder
