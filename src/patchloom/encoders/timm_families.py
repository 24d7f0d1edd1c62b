"""The families of timm's `VisionTransformer`, `Beit` and `Eva`: where their positions come in and how they change."""

from __future__ import annotations

import copy
import warnings
from typing import Any, ClassVar

import torch
from timm.layers import PatchEmbed
from timm.models.beit import Beit, gen_relative_position_index
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchloom.encoders.blocks import bias_of
from patchloom.encoders.families import Embedded, Family, register
from patchloom.encoders.patches import Grid, plane
from patchloom.encoders.positions import PositionRule, resample_positions
from patchloom.encoders.relative_positions import EXTRA_ROWS, relative_matrix, resize_relative_table
from patchloom.errors import UsageError


@register(VisionTransformer)
class VisionTransformers(Family):
    """Absolute positions, class and register tokens."""

    patch_embeds: ClassVar[tuple[type[nn.Module], ...]] = (PatchEmbed,)
    takes_registers = True
    module: ClassVar[Any] = VisionTransformer

    def add_positions_at(self, encoder: Any, x: Tensor, grid: Grid, rule: PositionRule) -> Embedded:
        """Return what enters the first block, with positions resampled for another grid."""
        if type(encoder)._pos_embed is not self.module._pos_embed:
            return super().add_positions_at(encoder, x, grid, rule)
        tokens = [
            token.expand(x.shape[0], -1, -1) for token in (encoder.cls_token, encoder.reg_token) if token is not None
        ]
        positions = encoder.pos_embed
        if positions is not None:
            prefix = 0 if encoder.no_embed_class else int(encoder.num_prefix_tokens)
            positions = resample_positions(positions, self.grid_size(encoder), grid, prefix, rule)
            if encoder.no_embed_class:
                x = x + positions
        x = torch.cat([*tokens, x], dim=1)
        if positions is not None and not encoder.no_embed_class:
            x = x + positions
        return Embedded(encoder.pos_drop(x))


@register(VisionTransformerDistilled)
class DistilledVisionTransformers(VisionTransformers):
    """Class and distillation token are each read by a head of its own."""

    takes_registers = False

    def classifier_arguments(self, encoder: Any, mean: bool) -> dict[str, Any]:
        """Return the arguments that make a module of this sort for fine-tuning; it classifies by its tokens."""
        return {"global_pool": "token"}


@register(Eva)
class EvaModels(VisionTransformers):
    """Rotary positions besides, the same in all blocks or learnt for each."""

    register_argument = "num_reg_tokens"
    module = Eva

    def add_positions(self, encoder: Any, x: Tensor) -> Embedded:
        """Return what enters the first block, and the rotary positions of each."""
        x, rope = encoder._pos_embed(x)
        if getattr(encoder, "rope_mixed", False) and rope is not None:
            return Embedded(x, {"rope": rope[-1]}, rope)
        return Embedded(x, {"rope": rope})

    def add_positions_at(self, encoder: Any, x: Tensor, grid: Grid, rule: PositionRule) -> Embedded:
        """Return the same for another grid."""
        x = super().add_positions_at(encoder, x, grid, rule).x
        rope = getattr(encoder, "rope", None)
        if rope is None:
            return Embedded(x, {"rope": None})
        angles = _rotary(rope, grid)
        if getattr(encoder, "rope_mixed", False):
            return Embedded(x, {"rope": angles[-1]}, angles)
        return Embedded(x, {"rope": angles})

    def keep(self, encoder: Any, embedded: Embedded, keep: Tensor) -> Embedded:
        """Return what blocks need, with the rotary positions of the patches that stay."""
        kwargs, by_block = dict(embedded.block_kwargs), embedded.rope_by_block
        if by_block is not None:  # (blocks, heads, N, d) -> (blocks, B, heads, n, d)
            by_block = by_block[:, :, keep].transpose(1, 2)
            kwargs["rope"] = by_block[-1]
        elif kwargs.get("rope") is not None:  # (N, d) -> (B, 1, n, d)
            kwargs["rope"] = kwargs["rope"][keep].unsqueeze(1)
        return Embedded(embedded.x, kwargs, by_block)


@register(Beit)
class BeitModels(Family):
    """Relative-position tables, one for all blocks or one in each, of grids of 2 axes; absolute positions or none."""

    patch_embeds = (PatchEmbed,)

    def shape_arguments(self, encoder: Any) -> dict[str, Any]:
        """Return all arguments that make a module of its shape, with the positions and the pooling it has."""
        block = encoder.blocks[0]
        return super().shape_arguments(encoder) | {
            "qkv_bias": block.attn.q_bias is not None,
            "init_values": block.init_values,
            "use_abs_pos_emb": encoder.pos_embed is not None,
            "use_rel_pos_bias": block.attn.relative_position_bias_table is not None,
            "use_shared_rel_pos_bias": encoder.rel_pos_bias is not None,
            "global_pool": encoder.global_pool,
            "use_fc_norm": not isinstance(encoder.fc_norm, nn.Identity),
        }

    def resize(self, encoder: Any, size: Grid) -> None:
        """Set the encoder up for images of another size, its tables by the published rule instead of timm's."""
        old_grid = plane(self.grid_size(encoder), "relative-position tables")
        tables = {
            name: module.relative_position_bias_table.detach().clone()
            for name, module in encoder.named_modules()
            if isinstance(getattr(module, "relative_position_bias_table", None), Tensor)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from timm's own resampling of the tables, which ours replaces
            super().resize(encoder, size)
        for name, table in tables.items():
            resized = resize_relative_table(table, old_grid, self.grid_size(encoder))
            with torch.no_grad():
                encoder.get_submodule(name).relative_position_bias_table.copy_(resized)

    def add_positions(self, encoder: Any, x: Tensor) -> Embedded:
        """Return what enters the first block, and the bias all blocks share."""
        x = torch.cat((encoder.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if encoder.pos_embed is not None:
            x = x + encoder.pos_embed
        bias = encoder.rel_pos_bias() if encoder.rel_pos_bias is not None else None
        return Embedded(encoder.pos_drop(x), {"shared_rel_pos_bias": bias})

    def add_positions_at(self, encoder: Any, x: Tensor, grid: Grid, rule: PositionRule) -> Embedded:
        """Return the same for another grid, with the shared table resampled."""
        if encoder.blocks[0].attn.relative_position_bias_table is not None:
            raise UsageError(
                "an encoder with a relative-position table in every block takes images of its own size only; let all "
                "crops have that size, or take one with a shared table (ccvit_*) or with absolute positions (vit_*)"
            )
        own = self.grid_size(encoder)
        x = torch.cat([encoder.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if encoder.pos_embed is not None:
            x = x + resample_positions(encoder.pos_embed, own, grid, 1, rule)
        bias = None
        if encoder.rel_pos_bias is not None:
            table = encoder.rel_pos_bias.relative_position_bias_table
            matrix = relative_matrix(own, grid).to(table)
            table = torch.cat([matrix @ table[:-EXTRA_ROWS], table[-EXTRA_ROWS:]])
            index = gen_relative_position_index(plane(grid, "relative-position tables")).to(table.device)
            bias = table[index].permute(2, 0, 1).contiguous()  # (heads, 1 + N, 1 + N)
        return Embedded(encoder.pos_drop(x), {"shared_rel_pos_bias": bias})

    def keep(self, encoder: Any, embedded: Embedded, keep: Tensor) -> Embedded:
        """Return what blocks need, with the biases between the tokens that stay."""
        kwargs, kept = dict(embedded.block_kwargs), None
        front = torch.arange(int(encoder.num_prefix_tokens), device=keep.device).expand(len(keep), -1)
        index = torch.cat([front, keep + encoder.num_prefix_tokens], dim=1)
        if encoder.blocks[0].attn.relative_position_bias_table is not None:
            kept = index
        if (bias := kwargs["shared_rel_pos_bias"]) is not None:
            kwargs["shared_rel_pos_bias"] = bias_of(bias, index)
        return Embedded(embedded.x, kwargs, None, kept)

    def classifier_arguments(self, encoder: Any, mean: bool) -> dict[str, Any]:
        """Return the arguments of a module with a norm behind its pooling, and a table in each block."""
        tables = {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": False}
        shared = encoder.rel_pos_bias is not None
        return super().classifier_arguments(encoder, mean) | {"use_fc_norm": mean} | (tables if shared else {})

    def classifier_state(self, encoder: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors with a copy of the shared table for each block."""
        state = dict(state)
        if (shared := state.pop("rel_pos_bias.relative_position_bias_table", None)) is not None:
            for number in range(len(encoder.blocks)):
                state[f"blocks.{number}.attn.relative_position_bias_table"] = shared.clone()
        return state


def _rotary(rope: Any, grid: Grid) -> Tensor:
    """Return the rotary positions of a grid; those with a cache of one grid get it made anew in a copy."""
    if not any(True for _ in rope.parameters()):  # learned frequencies are no cache, and must learn themselves
        rope = copy.deepcopy(rope)
        if getattr(rope, "feat_shape", None) is not None:
            rope.update_feat_shape(list(grid))
    angles: Tensor = rope.get_embed(shape=list(grid))
    return angles
