"""Encoders in the layout of BEiT's code, which CCViT's and G2SD's dense models share, as timm's `Beit`.

Relative positions of one table for all blocks or one for each, layer scale as `gamma_1` and `gamma_2`, biases of
queries and values apart (or, in MAE's dense code, one bias of queries, keys and values).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from patchloom.encoders import create_encoder, grid_size
from patchloom.encoders.anysize import DINOV2_RULE, resample_positions
from patchloom.encoders.patches import patch_grid
from patchloom.encoders.relative_positions import EXTRA_ROWS
from patchloom.encoders.resize import set_image_size
from patchloom.errors import UsageError
from patchloom.models.published import require
from patchloom.models.published_settings import Hidden, Settings, epsilon_of, name_of

SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
OWN_TABLE = "blocks.0.attn.relative_position_bias_table"
INDEX = "relative_position_index"
SETTINGS = Settings(
    obeyed=("num_heads", "image_size", "drop_path", "layer_norm_eps"),
    idle=(
        "drop_rate",
        "attn_drop_rate",
        "init_values",
        "layer_scale_init_value",
        "init_std",
        "init_scale",
        "model",
        "rel_pos_bias",
    ),
    fixed={
        "qk_scale": (None,),
        "attn_head_dim": (None,),
        "act_layer": ("gelu",),
        "hybrid_backbone": (None,),
    },
    other_names={
        "img_size": "image_size",
        "input_size": "image_size",
        "drop_path_rate": "drop_path",
        "norm_layer": "layer_norm_eps",
        "hidden_act": "act_layer",
        "nb_classes": "num_classes",
        "abs_pos_emb": "use_abs_pos_emb",
    },
    read={"layer_norm_eps": epsilon_of, "act_layer": name_of},
)


def without_indices(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the indices into tables of relative positions, which are computed.

    Raises:
        UsageError: There is an index and no table.
    """
    indices = [name for name in state if name.endswith(INDEX)]
    require(state, *(name.removesuffix("index") + "bias_table" for name in indices))
    return {name: value for name, value in state.items() if name not in indices}


def inferred_from(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the published settings that an encoder's tensors tell."""
    kernel = state["patch_embed.proj.weight"]
    hidden, width = state["blocks.0.mlp.fc1.weight"].shape
    return {
        "embed_dim": width,
        "in_chans": kernel.shape[1],
        "patch_size": kernel.shape[2],
        "mlp_ratio": Hidden(width, hidden),
        "qkv_bias": has_qkv_bias(state),
        "depth": count(state, "blocks"),
        "use_shared_rel_pos_bias": SHARED_TABLE in state,
        "use_rel_pos_bias": OWN_TABLE in state,
        "use_abs_pos_emb": "pos_embed" in state,
    }


def make_encoder(state: Mapping[str, Tensor], config: Mapping[str, Any], **model_args: Any) -> Any:
    """Return a fresh encoder of the shapes in the state dict, at the size its positions are for."""
    kernel = state["patch_embed.proj.weight"]
    width, channels, patch, _ = kernel.shape
    table = state.get(SHARED_TABLE, state.get(OWN_TABLE))
    heads = int(config.get("num_heads") or (table.shape[1] if table is not None else max(1, width // 64)))
    if width % heads:
        raise UsageError(f"num_heads={heads} does not divide the width of {width}")
    return create_encoder(
        "ccvit_base_patch16_224",
        image_size=_image_size(state, config, table, patch),
        in_chans=channels,
        drop_path=float(config.get("drop_path", 0.0)),
        patch_size=patch,
        embed_dim=width,
        depth=count(state, "blocks"),
        num_heads=heads,
        mlp_ratio=inferred_from(state)["mlp_ratio"].ratio,
        qkv_bias=has_qkv_bias(state),
        # timm takes None for "as the model has it".
        init_values=0.1 if any(name.startswith("blocks.0.gamma_") for name in state) else 0.0,
        use_abs_pos_emb="pos_embed" in state,
        use_rel_pos_bias=OWN_TABLE in state,
        use_shared_rel_pos_bias=SHARED_TABLE in state,
        **model_args,
    )


def resize(encoder: Any, size: int | tuple[int, int]) -> None:
    """Set an encoder up for another size; absolute positions as the published forward pass resamples them."""
    positions, old = encoder.pos_embed, grid_size(encoder)
    set_image_size(encoder, size if isinstance(size, int) else (int(size[0]), int(size[1])))
    if positions is not None:
        with torch.no_grad():
            encoder.pos_embed.copy_(resample_positions(positions, old, grid_size(encoder), 1, DINOV2_RULE))


def has_qkv_bias(state: Mapping[str, Tensor]) -> bool:
    """Return whether queries and values have a bias."""
    return any(name.endswith((".attn.q_bias", ".attn.v_bias", ".attn.qkv.bias")) for name in state)


def count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Return the number of modules in a list, by the names of its tensors."""
    return len({name.split(".")[1] for name in state if name.startswith(f"{prefix}.")})


def _image_size(
    state: Mapping[str, Tensor], config: Mapping[str, Any], table: Tensor | None, patch: int
) -> tuple[int, int]:
    """Return the checkpoint's (H, W): as told where its positions are of that grid or there are none, else a square."""
    given_size = config.get("image_size")
    size = (
        (given_size, given_size)
        if isinstance(given_size, int)
        else (int(given_size[0]), int(given_size[1]))
        if given_size is not None
        else None
    )
    if table is not None:
        rows, what = table.shape[0], f"relative table of {table.shape[0]} rows"
        side = (math.isqrt(rows - EXTRA_ROWS) + 1) // 2
        is_square = (2 * side - 1) ** 2 + EXTRA_ROWS == rows
    elif "pos_embed" in state:
        rows, what = state["pos_embed"].shape[1], f"pos_embed of {state['pos_embed'].shape[1]} rows"
        side = math.isqrt(rows - 1)
        is_square = side**2 + 1 == rows
    elif size is not None:
        return size
    else:
        raise UsageError("the checkpoint has no positions to tell the image size from; give image_size")
    if size is not None:
        h, w = patch_grid(size, patch)
        if rows == ((2 * h - 1) * (2 * w - 1) + EXTRA_ROWS if table is not None else h * w + 1):
            return size
    if not is_square:
        given = "" if size is None else f", nor of {size[0]}x{size[1]} pixels"
        raise UsageError(f"the {what} is of no square grid{given}; give image_size=(H, W)")
    return side * patch, side * patch
