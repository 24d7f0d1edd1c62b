"""ViT-P's point classifier: a pre-trained ViT that says what is at given points of an image.

Shahabodini et al. 2025, "The Missing Point in Vision Transformers for Universal Image Segmentation" (arXiv 2505.19795),
and its published code.

>>> from patchloom.encoders import create_encoder
>>> encoder = create_encoder("vit_tiny_patch16_224", image_size=64, embed_dim=24, depth=2, num_heads=3)
>>> classifier = PointViT(encoder, num_classes=5).eval()
>>> classifier(torch.randn(2, 3, 64, 96), torch.rand(2, 7, 2) * 2 - 1).shape
torch.Size([2, 7, 5])
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.encoders import Encoder, embed_dim, grid_size, num_prefix_tokens, patch_size, plane_size, run_blocks
from patchloom.encoders.anysize import embed_any_size
from patchloom.encoders.blocks import bias_of
from patchloom.encoders.families import Embedded, family_of
from patchloom.encoders.stages import final_norm, normed_in_front
from patchloom.errors import UsageError, unknown_name

Coords = Literal["rc", "xy"]
PointStart = Literal["place", "patch"]


class PointViT(nn.Module):
    """Classes of points, by tokens that take the place of the class token and attend along with the patches.

    The token of a point is a linear map of its place, plus the position of the class token. All tokens attend to all:
    what is said of a point depends slightly on the other points it is asked with. Absolute positions of patches are
    resampled as published: by the factor (grid + offset) / table for every image, also where the grid is the table's
    own, unless a single point is asked for there.

    Args:
        encoder: A ViT, BEiT or EVA model; its class token itself takes no part where the table of positions has a row
            for it. Where it has none (registers, relative and rotary positions), tokens of points begin as the class
            token.
        num_classes: K.
        interpolate_offset: Published: 0.1; None: scale by the sizes.
        start: What the token of a point has besides: nothing (`place`, published), or what the patch under it enters
            the blocks as (`patch`, ours): where an encoder has not learnt to find a place by its position, as after
            pre-training on little or none, the published token never comes to see what is there.

    Raises:
        UsageError: Unknown start, or the encoder is of another kind, or takes no images.
    """

    encoder: Encoder
    num_classes: int
    interpolate_offset: float | None
    start: PointStart
    cls_embeddings: nn.Linear
    head: nn.Linear

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        interpolate_offset: float | None = 0.1,
        start: PointStart = "place",
    ) -> None:
        super().__init__()
        if start not in ("place", "patch"):
            raise unknown_name("point_start", start, ("place", "patch"))
        plane_size(encoder, "points")
        if not isinstance(encoder, (VisionTransformer, Beit, Eva)):
            raise UsageError(
                f"tokens of points join those of patches in attention, and a {type(encoder).__name__} has none for "
                f"them; take a ViT, BEiT or EVA model"
            )
        self.encoder = encoder
        self.num_classes = num_classes
        self.interpolate_offset = interpolate_offset
        self.start = start
        width = embed_dim(encoder)
        self.cls_embeddings = nn.Linear(2, width, bias=False)
        self.head = nn.Linear(width, num_classes)
        nn.init.normal_(self.cls_embeddings.weight, std=1e-6)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        if self._absolute and self._class_row and encoder.cls_token is not None:
            encoder.cls_token.requires_grad_(False)  # no part of what is computed

    def forward(self, images: Tensor, points: Tensor, coords: Coords = "rc") -> Tensor:
        """Return logits (B, P, K) of points.

        Args:
            images: (B, C, H, W), normalised; patches fill them.
            points: (B, P, 2) in [-1, 1], -1 the first row or column: 2 · row / H - 1, 2 · column / W - 1.
            coords: Order of the two: row and column (`rc`), or column and row (`xy`).

        Raises:
            UsageError: Sides that patches do not fill, points of another shape, or an encoder tied to another size.
        """
        if coords not in ("rc", "xy"):
            raise unknown_name("order of coordinates", coords, ("rc", "xy"))
        if points.ndim != 3 or points.shape[-1] != 2 or points.shape[0] != images.shape[0]:
            raise UsageError(
                f"points are (B, P, 2), one row of them for each image, and have shape {tuple(points.shape)} for "
                f"{len(images)} images"
            )
        check_sides((images.shape[-2], images.shape[-1]), patch_size(self.encoder))
        if not points.shape[1]:
            return self.head.weight.new_zeros(images.shape[0], 0, self.num_classes)
        places = points if coords == "rc" else points.flip(-1)
        last, _ = run_blocks(self.encoder, self._embedded(images, places))
        logits: Tensor = self.head(final_norm(self.encoder, last[:, : points.shape[1]]))
        return logits

    @property
    def _absolute(self) -> bool:
        """Whether positions are a table that is added, and nothing else."""
        return getattr(type(self.encoder), "_pos_embed", None) is VisionTransformer._pos_embed

    @property
    def _class_row(self) -> bool:
        """Whether the table of positions has a row for the class token."""
        encoder: Any = self.encoder
        return encoder.pos_embed is not None and not encoder.no_embed_class and encoder.cls_token is not None

    def _embedded(self, images: Tensor, points: Tensor) -> Embedded:
        """Return what enters the first block: points, registers, patches."""
        if self._absolute:
            return self._with_table(images, points)
        encoder, count = self.encoder, points.shape[1]
        embedded = embed_any_size(encoder, images)
        prefix, x = num_prefix_tokens(encoder), embedded.x
        has_class = prefix > 0
        tokens = self._tokens(points, x[:, prefix:], images)
        tokens = tokens + x[:, :1] if has_class else tokens
        x = torch.cat([tokens, x[:, int(has_class) :]], dim=1)
        if isinstance(encoder, Beit):
            # To its tables a point is a class token.
            patches = torch.arange(1, x.shape[1] - count + 1, device=x.device)
            index = torch.cat([patches.new_zeros(count), patches]).expand(x.shape[0], -1)
            shared = embedded.block_kwargs.get("shared_rel_pos_bias")
            kwargs = {"shared_rel_pos_bias": None if shared is None else bias_of(shared, index)}
            block: Any = encoder.blocks[0]
            own = block.attn.relative_position_bias_table is not None
            return Embedded(x, kwargs, None, index if own else None)
        added = count - int(has_class)
        kwargs = {name: _unturned(value, added) for name, value in embedded.block_kwargs.items()}
        return replace(embedded, x=x, block_kwargs=kwargs, rope_by_block=_unturned(embedded.rope_by_block, added))

    def _tokens(self, points: Tensor, patches: Tensor, images: Tensor) -> Tensor:
        """Return the tokens (B, P, D) of points, of patches (B, N, D) that have their positions."""
        tokens: Tensor = self.cls_embeddings(points)
        if self.start == "place":
            return tokens
        size = torch.tensor(images.shape[-2:], device=points.device)
        grid = size // patch_size(self.encoder)
        pixels = (points.float() + 1) / 2 * size + 0.5  # the middle of a pixel lies on no border between patches
        places = (pixels / patch_size(self.encoder)).long()
        places = torch.minimum(places.clamp(min=0), grid - 1)
        index = places[..., 0] * grid[1] + places[..., 1]
        return tokens + patches.gather(1, index.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))

    def _with_table(self, images: Tensor, points: Tensor) -> Embedded:
        encoder: Any = self.encoder
        patches = family_of(encoder).embed_patches(encoder, images, any_size=True)
        patches = patches.flatten(1, -2) if patches.ndim == 4 else patches
        front = [token.expand(patches.shape[0], -1, -1) for token in (encoder.reg_token,) if token is not None]
        table = encoder.pos_embed
        if table is not None:
            own = grid_size(encoder)
            first = table.shape[1] - own[0] * own[1]
            grid = grid_size(encoder, (images.shape[-2], images.shape[-1]))
            patches = patches + self._resampled(table[:, first:], own, grid, points.shape[1])
            front = [token + table[:, 1:first] for token in front] if first > 1 else front
        tokens = self._tokens(points, patches, images)
        if self._class_row:
            tokens = tokens + table[:, :1]
        elif encoder.cls_token is not None:
            tokens = tokens + encoder.cls_token
        x = encoder.pos_drop(torch.cat([tokens, *front, patches], dim=1))
        return normed_in_front(encoder, Embedded(x))

    def _resampled(self, table: Tensor, own: tuple[int, ...], grid: tuple[int, ...], points: int) -> Tensor:
        """Return the positions (1, N, D) of patches for a grid."""
        if points == 1 and tuple(own) == tuple(grid):
            return table
        offset = self.interpolate_offset
        where: dict[str, Any] = {"size": tuple(grid)}
        if offset:
            where = {"scale_factor": tuple((n + offset) / o for n, o in zip(grid, own, strict=True))}
        maps = table.float().reshape(1, *own, -1).permute(0, 3, 1, 2)
        resampled = F.interpolate(maps, mode="bicubic", align_corners=False, antialias=False, **where)
        return resampled.flatten(2).transpose(1, 2).to(table)


def _unturned(rope: Any, added: int) -> Any:
    """Return rotary positions (…, N, 2 d) with those of tokens in front, which are not turned: sine 0, cosine 1."""
    if not isinstance(rope, Tensor) or not added:
        return rope
    half = rope.shape[-1] // 2
    still = torch.cat([rope.new_zeros(half), rope.new_ones(half)])
    return torch.cat([still.expand(*rope.shape[:-2], added, -1), rope], dim=-2)


def check_sides(size: tuple[int, int], patch: int) -> None:
    """Refuse images that patches do not fill.

    Raises:
        UsageError: Names the nearest sizes.
    """
    if any(side % patch for side in size):
        near = [[side // patch * patch, -(-side // patch) * patch] for side in size]
        fitting = " or ".join(f"{max(high, patch)}x{max(wide, patch)}" for high, wide in zip(*near, strict=True))
        raise UsageError(
            f"images of {size[0]}x{size[1]} pixels are not filled by patches of {patch}; the nearest sizes are "
            f"{fitting}"
        )
