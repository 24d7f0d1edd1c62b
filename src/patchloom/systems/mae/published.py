"""Published MAE checkpoints: the pre-training, encoder-only and fine-tuning layouts (arXiv 2111.06377)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from patchloom.encoders import Encoder, create_encoder
from patchloom.encoders.masked_autoencoder import MaskedAutoencoder
from patchloom.encoders.patches import Grid, patch_grid
from patchloom.errors import UsageError
from patchloom.models.published import fill, has, require
from patchloom.models.published_settings import Hidden, Settings, epsilon_of, name_of, set_epsilon
from patchloom.systems.mae.published_names import from_transformers, is_transformers

SETTINGS = Settings(
    obeyed=(
        *("num_heads", "decoder_num_heads", "norm_pix_loss", "mask_ratio", "image_size", "drop_path"),
        "layer_norm_eps",
    ),
    idle=(
        *("drop_rate", "attn_drop_rate", "model", "init_scale", "weight_init", "embed_layer", "layer_scale"),
        # Of the chest X-ray recipe's scripts.
        *("vit_dropout_rate", "mask_strategy", "random_resize_range", "datasets_names", "fixed_lr", "loss_func"),
        *("norm_stats", "checkpoint_type", "train_list", "val_list", "test_list", "aug_strategy", "eval_interval"),
        *("build_timm_transform", "ThreeAugment", "src"),
    ),
    fixed={
        "hidden_act": ("gelu",),
        "qk_scale": (None,),
        "class_token": (True,),
        "representation_size": (None, False, 0),
        "distilled": (False,),
    },
    other_names={
        "img_size": "image_size",
        "input_size": "image_size",
        "drop_path_rate": "drop_path",
        "nb_classes": "num_classes",
        "decoder_dim": "decoder_embed_dim",
        "decoder_heads": "decoder_num_heads",
        "norm_layer": "layer_norm_eps",
        "act_layer": "hidden_act",
        # Those of transformers.
        "hidden_size": "embed_dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
        "num_channels": "in_chans",
        "decoder_hidden_size": "decoder_embed_dim",
        "decoder_num_hidden_layers": "decoder_depth",
        "decoder_num_attention_heads": "decoder_num_heads",
    },
    read={"layer_norm_eps": epsilon_of, "hidden_act": name_of},
)
# What transformers' class has where its configuration says nothing.
OF_TRANSFORMERS = {"layer_norm_eps": 1e-12, "norm_pix_loss": False}
DECODER = ("mask_token", "decoder_")
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
"""Attention heads of the published widths; others have one for 64 channels."""


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return our module with a published state dict in it.

    Args:
        state: Tensors under the published names.
        **config: What shapes do not tell: `num_heads` (default: the published sizes'), `decoder_num_heads` (16),
            `norm_pix_loss` (True), `mask_ratio` (0.75), `drop_path` (0, of the encoder's last block in training),
            `layer_norm_eps` (1e-6), and `image_size`: (H, W) for a grid that is not square, or another size than the
            checkpoint's, to which its positions are then resized bicubically. Names of the published code and of
            transformers are understood; what shapes tell may be given and has to agree. In the layout of transformers
            `layer_norm_eps` is 1e-12 and `norm_pix_loss` False unless its configuration says otherwise.

    Returns:
        `MaskedAutoencoder` for a pre-training checkpoint with its decoder; a timm `VisionTransformer` without head for
        an encoder alone; one with its classifier for a fine-tuned or linearly probed one.

    Raises:
        UsageError: Unknown setting, or tensors missing or left over.
    """
    return load_with({"norm_pix_loss": True, "mask_ratio": 0.75}, state, **config)


def load_with(defaults: Mapping[str, Any], state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return our module with a published state dict in it, see `load`; `defaults` stand in for what is not given."""
    if is_transformers(state):
        state = from_transformers(state)
        config = {**OF_TRANSFORMERS, **config}
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if name not in state:
            raise UsageError(f"the checkpoint has no {name}, so it is no ViT of MAE")
    if config.get("global_pool") in ("avg", "token"):  # timm's words for the published switch
        config["global_pool"] = config["global_pool"] == "avg"
    config = SETTINGS.settle(config, _inferred_from_shapes(state))
    if has(state, *DECODER):
        return _autoencoder(dict(state), {**defaults, **config})
    pooled = has(state, "fc_norm.")
    encoder, state = _encoder(state, config, "avg" if pooled else "token")
    if has(state, "head.weight", "head.bias"):
        require(state, "head.weight")
        encoder.reset_classifier(len(state["head.weight"]))
    elif has(state, "head."):  # a linear probe: statistics of the feature, then the classifier
        require(state, "head.1.weight")
        classes, width = state["head.1.weight"].shape
        encoder.reset_classifier(classes)
        encoder.head = nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), nn.Linear(width, classes))
    set_epsilon(encoder, config.get("layer_norm_eps"))
    return fill(encoder, state).eval()


def _autoencoder(state: dict[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    decoder_state = {name: value for name, value in state.items() if name.startswith(DECODER)}
    require(state, "decoder_embed.weight", "decoder_blocks.0.mlp.fc1.weight")
    encoder, rest = _encoder(
        {name: value for name, value in state.items() if name not in decoder_state}, config, "token"
    )
    model = MaskedAutoencoder(
        encoder,
        decoder_dim=len(decoder_state["decoder_embed.weight"]),
        decoder_depth=_count(decoder_state, "decoder_blocks"),
        decoder_heads=int(config.get("decoder_num_heads", 16)),
        norm_pix_loss=bool(config["norm_pix_loss"]),
        mask_ratio=float(config["mask_ratio"]),
        decoder_mlp_ratio=_hidden(decoder_state, "decoder_blocks").ratio,
    )
    set_epsilon(model, config.get("layer_norm_eps"))
    encoder.pos_embed.requires_grad_(False)  # sines and cosines, stored but not trained
    positions = decoder_state.get("decoder_pos_embed")
    if positions is not None and positions.shape[1] != model.decoder_pos_embed.shape[1]:
        decoder_state["decoder_pos_embed"] = _resized(positions, model.grid)
    tensors = {**{f"encoder.{name}": value for name, value in rest.items()}, **decoder_state}
    return fill(model, tensors, published=lambda name: name.removeprefix("encoder.")).eval()


def _encoder(
    state: Mapping[str, Tensor], config: Mapping[str, Any], global_pool: str
) -> tuple[Encoder, dict[str, Tensor]]:
    """Return a fresh encoder of the shapes in the state dict, and the state with positions of the encoder's grid."""
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    positions = state["pos_embed"]
    size = _image_size(positions, patch, config)
    heads = int(config.get("num_heads") or HEADS.get(width) or max(1, width // 64))
    if width % heads:
        raise UsageError(f"num_heads={heads} does not divide the width of {width}")
    encoder = create_encoder(
        "vit_base_patch16_224",
        image_size=size,
        in_chans=channels,
        patch_size=patch,
        embed_dim=width,
        depth=_count(state, "blocks"),
        num_heads=heads,
        mlp_ratio=_hidden(state, "blocks").ratio,
        qkv_bias=_has_qkv_bias(state),
        drop_path=float(config.get("drop_path", 0.0)),
        global_pool=global_pool,
    )
    grid = patch_grid(size, patch)
    if positions.shape[1] - 1 != grid[0] * grid[1]:
        positions = _resized(positions, grid)
    return encoder, {**state, "pos_embed": positions}


def _image_size(positions: Tensor, patch: int, config: Mapping[str, Any]) -> tuple[int, int]:
    """Return (H, W): as told, or of a square grid."""
    if (size := config.get("image_size")) is not None:
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    side = math.isqrt(positions.shape[1] - 1)
    if side**2 != positions.shape[1] - 1:
        raise UsageError(f"{positions.shape[1] - 1} positions are of no square grid; give image_size=(H, W)")
    return side * patch, side * patch


def _resized(positions: Tensor, grid: Grid) -> Tensor:
    """Return positions for another grid, as the published fine-tuning resizes them: bicubic, without antialiasing."""
    side = math.isqrt(positions.shape[1] - 1)
    if side**2 != positions.shape[1] - 1:
        raise UsageError(f"positions of {positions.shape[1] - 1} patches are of no square grid and cannot be resized")
    return resample_abs_pos_embed(positions, list(grid), [side, side], num_prefix_tokens=1, antialias=False)


def _inferred_from_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the published settings that the tensors themselves tell."""
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    head = state.get("head.weight", state.get("head.1.weight"))
    has_decoder, pretraining = "decoder_embed.weight" in state, has(state, *DECODER)
    decoder = _hidden(state, "decoder_blocks") if "decoder_blocks.0.mlp.fc1.weight" in state else None
    return {
        "embed_dim": width,
        "in_chans": channels,
        "patch_size": patch,
        "depth": _count(state, "blocks"),
        "mlp_ratio": _hidden(state, "blocks"),
        "intermediate_size": _hidden(state, "blocks").hidden,
        "decoder_intermediate_size": None if decoder is None else decoder.hidden,
        "qkv_bias": _has_qkv_bias(state),
        "global_pool": None if pretraining else has(state, "fc_norm."),
        "num_classes": None if head is None else len(head),
        "decoder_embed_dim": len(state["decoder_embed.weight"]) if has_decoder else None,
        "decoder_depth": _count(state, "decoder_blocks") if has_decoder else None,
    }


def _hidden(state: Mapping[str, Tensor], blocks: str) -> Hidden:
    """Return the width of the blocks' MLPs."""
    hidden, width = state[f"{blocks}.0.mlp.fc1.weight"].shape
    return Hidden(width, hidden)


def _has_qkv_bias(state: Mapping[str, Tensor]) -> bool:
    return any(name.endswith(".attn.qkv.bias") for name in state)


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Return the number of modules in a list, by the names of its tensors."""
    return len({name.split(".")[1] for name in state if name.startswith(f"{prefix}.")})
