"""Published CCViT checkpoints: the pre-training and the fine-tuning layout (specification, section 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.models.beit import Beit
from torch import Tensor, nn

from patchloom.encoders import create_encoder, grid_size
from patchloom.encoders.anysize import DINOV2_RULE, resample_positions
from patchloom.encoders.resize import EXTRA_ROWS, set_image_size
from patchloom.errors import UsageError
from patchloom.patches import patch_grid
from patchloom.pretrain.centroid_mim import CentroidMIM
from patchloom.reference.state import agree, check_settings, fill, has, require

# What shapes do not tell, and what they do: the latter may be given all the same, and has to agree.
SETTINGS = ("early_layers", "num_heads", "image_size", "drop_path")
# Settings of the published scripts that change training or initial values, not what a trained model computes.
WITHOUT_EFFECT = ("drop_rate", "attn_drop_rate", "init_values", "init_std", "init_scale")
OTHER_NAMES = {
    "img_size": "image_size",
    "input_size": "image_size",
    "drop_path_rate": "drop_path",
    "shared_lm_head": "shared_head",
    "nb_classes": "num_classes",
}
RENAMED = {
    "mask_token": "mask_token",
    "cls_pt_layers.": "condenser.",
    "cls_pt_norm.": "condenser_norm.",
    "cls_pt_lm_head.": "condenser_head.",
    "lm_head.": "token_head.",
}
OWN_HEAD = ("cls_pt_norm.", "cls_pt_lm_head.")
"""What the condenser has where it doesn't share the token head."""


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return our module with a published state dict in it.

    Args:
        state: Tensors under the published names.
        **config: `early_layers` (default: the paper's for the depth), and what shapes do not tell: `num_heads`
            (without relative positions), and `image_size`: (H, W) for a grid that is not square, or another size
            than the checkpoint's, to which positions are then resampled. Shapes tell the rest.

    Returns:
        `CentroidMIM` for a pre-training checkpoint, a timm `Beit` with its classifier for a fine-tuned one.

    Raises:
        UsageError: Unknown setting, or tensors missing or left over.
    """
    config = {OTHER_NAMES.get(name, name): value for name, value in config.items()}
    for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
        if name not in state:
            raise UsageError(f"the checkpoint has no {name}, so it is no CCViT encoder")
    indices = [name for name in state if name.endswith("relative_position_index")]
    require(state, *(name.removesuffix("index") + "bias_table" for name in indices))
    state = {name: value for name, value in state.items() if name not in indices}
    told = _told_by_shapes(state)
    check_settings(config, (*SETTINGS, *WITHOUT_EFFECT, *told))
    agree(config, told)
    model = _pretrained(state, config) if has(state, "lm_head.", "mask_token") else _finetuned(state, config)
    if (size := config.get("image_size")) is not None:
        _resize(model.encoder if isinstance(model, CentroidMIM) else model, size)
    return model


def _resize(encoder: Any, size: int | tuple[int, int]) -> None:
    """Set an encoder up for another size; absolute positions as the published forward pass resamples them."""
    positions, old = encoder.pos_embed, grid_size(encoder)
    set_image_size(encoder, size if isinstance(size, int) else (int(size[0]), int(size[1])))
    if positions is not None:
        with torch.no_grad():
            encoder.pos_embed.copy_(resample_positions(positions, old, grid_size(encoder), 1, DINOV2_RULE))


def _told_by_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the published settings that the tensors themselves tell."""
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    return {
        "embed_dim": width,
        "in_chans": channels,
        "patch_size": patch,
        "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / width,
        "qkv_bias": _has_qkv_bias(state),
        "depth": _count(state, "blocks"),
        "head_layers": _count(state, "cls_pt_layers"),
        "vocab_size": len(state["lm_head.weight"]) if "lm_head.weight" in state else None,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else None,
        "shared_head": not has(state, *OWN_HEAD),
        "use_shared_rel_pos_bias": "rel_pos_bias.relative_position_bias_table" in state,
        "use_rel_pos_bias": "blocks.0.attn.relative_position_bias_table" in state,
        "use_abs_pos_emb": "pos_embed" in state,
        "use_mean_pooling": has(state, "fc_norm."),
    }


def _pretrained(state: dict[str, Tensor], config: Mapping[str, Any]) -> CentroidMIM:
    own_head = has(state, *OWN_HEAD)
    require(state, "mask_token", "lm_head.weight", *(["cls_pt_lm_head.weight"] if own_head else []))
    encoder = _encoder(state, config, global_pool="avg", use_fc_norm=False)
    vocab = state["lm_head.weight"].shape[0]
    condenser_outputs = state["cls_pt_lm_head.weight"].shape[0] if own_head else vocab
    pixels = state["patch_embed.proj.weight"][0].numel()
    # A pixel head and a token head of the same size are told apart by nothing; the recipe's is the pixel head.
    head_kind = "pixels" if condenser_outputs == pixels else "tokens"
    model = CentroidMIM(
        encoder,
        vocab_size=vocab,
        early_layers=config.get("early_layers"),
        head_layers=_count(state, "cls_pt_layers"),
        shared_head=not own_head,
        condenser_head="pixels" if head_kind == "pixels" else "tokens",
        drop_path=float(config.get("drop_path", 0.0)),
    )
    fill(model, {_our_name(name): value for name, value in state.items()}, published=_published_name)
    return model.eval()


def _finetuned(state: dict[str, Tensor], config: Mapping[str, Any]) -> Beit:
    mean_pooled = has(state, "fc_norm.")
    model = _encoder(state, config, global_pool="avg" if mean_pooled else "token", use_fc_norm=mean_pooled)
    if has(state, "head."):
        require(state, "head.weight")
        model.reset_classifier(state["head.weight"].shape[0])
    return fill(model, state).eval()  # type: ignore[return-value]


def _encoder(state: Mapping[str, Tensor], config: Mapping[str, Any], **model_args: Any) -> Any:
    """Return a fresh encoder of the shapes in the state dict."""
    kernel = state["patch_embed.proj.weight"]
    width, channels, patch, _ = kernel.shape
    shared = state.get("rel_pos_bias.relative_position_bias_table")
    per_block = state.get("blocks.0.attn.relative_position_bias_table")
    table = shared if shared is not None else per_block
    heads = int(config.get("num_heads") or (table.shape[1] if table is not None else width // 64))
    if width % heads:
        raise UsageError(f"num_heads={heads} does not divide the width of {width}")
    return create_encoder(
        "ccvit_base_patch16_224",
        image_size=_image_size(state, config, table, patch),
        in_chans=channels,
        drop_path=float(config.get("drop_path", 0.0)),
        patch_size=patch,
        embed_dim=width,
        depth=_count(state, "blocks"),
        num_heads=heads,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        qkv_bias=_has_qkv_bias(state),
        init_values=0.1 if has(state, "blocks.0.gamma_") else 0.0,  # timm takes None for "as the model has it"
        use_abs_pos_emb="pos_embed" in state,
        use_rel_pos_bias=per_block is not None,
        use_shared_rel_pos_bias=shared is not None,
        **model_args,
    )


def _image_size(
    state: Mapping[str, Tensor], config: Mapping[str, Any], table: Tensor | None, patch: int
) -> tuple[int, int]:
    """Return the checkpoint's (H, W): as told where its positions are of that grid or there are none, else a square."""
    told = config.get("image_size")
    size = (told, told) if isinstance(told, int) else (int(told[0]), int(told[1])) if told is not None else None
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


def _has_qkv_bias(state: Mapping[str, Tensor]) -> bool:
    return any(name.endswith((".attn.q_bias", ".attn.v_bias")) for name in state)


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Return the number of modules in a list, by the names of its tensors."""
    return len({name.split(".")[1] for name in state if name.startswith(f"{prefix}.")})


def _our_name(name: str) -> str:
    for published, ours in RENAMED.items():
        if name.startswith(published):
            return ours + name.removeprefix(published)
    return f"encoder.{name}"


def _published_name(name: str) -> str:
    for published, ours in RENAMED.items():
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    return name.removeprefix("encoder.")
