"""Published CCViT checkpoints: the pre-training and the fine-tuning layout (specification, section 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from timm.models.beit import Beit
from torch import Tensor, nn

from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.pretrain.centroid_mim import CentroidMIM
from patchloom.reference.state import check_settings, fill

# What shapes do not tell, and what they do: the latter may be given all the same, and has to agree.
SETTINGS = ("early_layers", "num_heads", "image_size", "img_size", "input_size", "drop_path")
# Settings of the published scripts that change training or initial values, not what a trained model computes.
WITHOUT_EFFECT = ("drop_path_rate", "drop_rate", "attn_drop_rate", "init_values", "init_std", "init_scale")
RENAMED = {
    "mask_token": "mask_token",
    "cls_pt_layers.": "condenser.",
    "cls_pt_norm.": "condenser_norm.",
    "cls_pt_lm_head.": "condenser_head.",
    "lm_head.": "token_head.",
}


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return our module with a published state dict in it.

    Args:
        state: Tensors under the published names.
        **config: `early_layers` (default: the paper's for the depth), and what shapes do not tell: `num_heads`
            (without relative positions), `image_size` (H, W) for a grid that is not square. Shapes tell the rest.

    Returns:
        `CentroidMIM` for a pre-training checkpoint, a timm `Beit` with its classifier for a fine-tuned one.

    Raises:
        UsageError: Unknown setting, or tensors missing or left over.
    """
    state = {name: value for name, value in state.items() if not name.endswith("relative_position_index")}
    for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
        if name not in state:
            raise UsageError(f"the checkpoint has no {name}, so it is no CCViT encoder")
    told = _told_by_shapes(state)
    check_settings(config, (*SETTINGS, *WITHOUT_EFFECT, *told))
    for name, value in told.items():
        if config.get(name, value) != value:
            raise UsageError(f"{name}={config[name]}, but the checkpoint's tensors say {value}; leave it out")
    if "lm_head.weight" in state or "mask_token" in state:
        return _pretrained(state, config)
    return _finetuned(state, config)


def _told_by_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the published settings that the tensors themselves tell."""
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    return {
        "embed_dim": width,
        "in_chans": channels,
        "patch_size": patch,
        "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / width,
        "qkv_bias": "blocks.0.attn.q_bias" in state,
        "depth": _count(state, "blocks"),
        "head_layers": _count(state, "cls_pt_layers"),
        "vocab_size": len(state["lm_head.weight"]) if "lm_head.weight" in state else None,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else None,
        "shared_lm_head": "cls_pt_lm_head.weight" not in state,
        "use_shared_rel_pos_bias": "rel_pos_bias.relative_position_bias_table" in state,
        "use_rel_pos_bias": "blocks.0.attn.relative_position_bias_table" in state,
        "use_abs_pos_emb": "pos_embed" in state,
        "use_mean_pooling": "fc_norm.weight" in state,
    }


def _pretrained(state: dict[str, Tensor], config: Mapping[str, Any]) -> CentroidMIM:
    if "lm_head.weight" not in state:
        raise UsageError("the checkpoint has a mask_token but no lm_head.weight: a pre-training layout has both")
    encoder = _encoder(state, config, global_pool="avg", use_fc_norm=False)
    vocab = state["lm_head.weight"].shape[0]
    own_head = "cls_pt_lm_head.weight" in state
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
    return fill(model, {_our_name(name): value for name, value in state.items()}).eval()  # type: ignore[return-value]


def _finetuned(state: dict[str, Tensor], config: Mapping[str, Any]) -> Beit:
    mean_pooled = "fc_norm.weight" in state
    model = _encoder(state, config, global_pool="avg" if mean_pooled else "token", use_fc_norm=mean_pooled)
    if "head.weight" in state:
        model.reset_classifier(state["head.weight"].shape[0])
    return fill(model, state).eval()  # type: ignore[return-value]


def _encoder(state: Mapping[str, Tensor], config: Mapping[str, Any], **model_args: Any) -> Any:
    """Return a fresh encoder of the shapes in the state dict."""
    kernel = state["patch_embed.proj.weight"]
    width, channels, patch, _ = kernel.shape
    shared = state.get("rel_pos_bias.relative_position_bias_table")
    per_block = state.get("blocks.0.attn.relative_position_bias_table")
    table = shared if shared is not None else per_block
    heads = config.get("num_heads") or (table.shape[1] if table is not None else width // 64)
    layer_scale = state.get("blocks.0.gamma_1")
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
        qkv_bias="blocks.0.attn.q_bias" in state,
        init_values=None if layer_scale is None else 0.1,
        use_abs_pos_emb="pos_embed" in state,
        use_rel_pos_bias=per_block is not None,
        use_shared_rel_pos_bias=shared is not None,
        **model_args,
    )


def _image_size(
    state: Mapping[str, Tensor], config: Mapping[str, Any], table: Tensor | None, patch: int
) -> tuple[int, int]:
    """Return (H, W): as told, or from the relative table or the absolute positions of a square grid."""
    told = config.get("image_size") or config.get("img_size") or config.get("input_size")
    if told is not None:
        return (told, told) if isinstance(told, int) else (int(told[0]), int(told[1]))
    if table is not None:
        side = (math.isqrt(table.shape[0] - 3) + 1) // 2
        rows = (2 * side - 1) ** 2 + 3
        if rows != table.shape[0]:
            raise UsageError(
                f"the relative table of {table.shape[0]} rows is of no square grid; give image_size=(H, W)"
            )
    elif "pos_embed" in state:
        side = math.isqrt(state["pos_embed"].shape[1] - 1)
    else:
        raise UsageError("the checkpoint has no positions to tell the image size from; give image_size")
    return side * patch, side * patch


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Return the number of modules in a list, by the names of its tensors."""
    return len({name.split(".")[1] for name in state if name.startswith(f"{prefix}.")})


def _our_name(name: str) -> str:
    for published, ours in RENAMED.items():
        if name.startswith(published):
            return ours + name.removeprefix(published)
    return f"encoder.{name}"
