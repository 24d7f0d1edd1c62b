"""Published checkpoints of Hi-End-MAE (github.com/FengheTan9/Hi-End-MAE, arXiv 2502.08347): pre-training and UNETR.

Their volumes are (B, C, H, W, D), of which the axes come here in the same order as D, H and W.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from patchloom.encoders import Encoder, create_encoder
from patchloom.encoders.patches import Grid, patch_grid, shown
from patchloom.encoders.volume import volume_positions
from patchloom.errors import UsageError, unknown_name
from patchloom.models.published import fill, has, read_state, require
from patchloom.models.published_settings import Hidden, Settings
from patchloom.segment.unetr import OF_SEGMENTATION, UNETR
from patchloom.systems.hi_end_mae.model import HiEndMAE

SETTINGS = Settings(
    obeyed=("num_heads", "decoder_num_heads", "mask_ratio", "image_size", "patch_size", "memory_layers", "layers"),
    idle=("pos_embed_type", "dropout_rate", "drop_path_rate", "drop_rate", "attn_drop_rate", "norm_name", "model"),
    fixed={
        "classification": (False,),
        "conv_block": (True,),
        "res_block": (True,),
        "spatial_dims": (3,),
        "qkv_bias": (True,),
        "self_attn": (True,),
        "pos_embed": ("perceptron",),
        "proj_type": ("perceptron",),
    },
    other_names={
        "img_size": "image_size",
        "input_size": "image_size",
        "roi_size": "image_size",
        "in_channels": "in_chans",
        "out_channels": "num_classes",
        "hidden_size": "embed_dim",
        "num_layers": "depth",
        "mlp_dim": "intermediate_size",
        "decoder_dim": "decoder_embed_dim",
        "decoder_heads": "decoder_num_heads",
        "decoder_self_depth": "decoder_depth",
        "heads": "num_heads",
        "hidden": "embed_dim",
        "mlp": "intermediate_size",
    },
)
HEADS = {768: 12, 1536: 16}
DECODER_HEADS = {384: 12, 528: 16}
"""Heads by width, of the published sizes."""
OF_UNETR = "vit.patch_embedding.patch_embeddings.1.weight"
UNUSED = re.compile(r"vit\.blocks\.\d+\.(norm_cross_attn|cross_attn)\.")
"""What later versions of MONAI have in a block and do not use."""


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return our module with a published state dict in it.

    Args:
        state: Tensors under the published names, with or without `module.` in front.
        **config: What shapes do not tell. `num_heads` (default: the published sizes'), `decoder_num_heads` (likewise),
            `mask_ratio` (0.75), `memory_layers` (3, 6, 9), `image_size` for a grid that is no cube, and `patch_size`
            of a UNETR whose patches are none. Names of the published code and of MONAI are understood; what shapes
            tell may be given and has to agree.

    Returns:
        `HiEndMAE` of a pre-training checkpoint, `segment.unetr.UNETR` of one of a segmentation network.

    Raises:
        UsageError: Unknown setting, or tensors missing or left over.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    return _unetr(state, config) if OF_UNETR in state else _autoencoder(state, config)


def convert_hi_end_mae_checkpoint(state: Mapping[str, Any], target: str = "unetr") -> dict[str, Tensor]:
    """Return the tensors of a pre-training checkpoint under other published names.

    Args:
        state: The checkpoint, wrappers and `module.` on or off.
        target: `mae`: its own names, wrappers off. `unetr`: those of the encoder in the segmentation network; class
            token, bridges and decoder are left out. The kernel of several channels is turned to the order in which
            that network reads a patch, channels last, which the published conversion leaves out.

    Raises:
        UsageError: Unknown target, or tensors that are missing.
    """
    plain = read_state(state)
    if target == "mae":
        return plain
    if target != "unetr":
        raise unknown_name("target", target, ("mae", "unetr"))
    require(plain, "encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias", "encoder_pos_embed")
    place = "vit.patch_embedding."
    made = {
        OF_UNETR: plain["encoder.patch_embed.proj.weight"].permute(0, 2, 3, 4, 1).flatten(1),
        f"{place}patch_embeddings.1.bias": plain["encoder.patch_embed.proj.bias"],
        f"{place}position_embeddings": plain["encoder_pos_embed"],
    }
    for name, value in plain.items():
        if name.startswith(("encoder.blocks.", "encoder.norm.")):
            made[_renamed(name.replace("encoder.", "vit.", 1), TO_UNETR)] = value
    return made


TO_UNETR = {".attn.proj.": ".attn.out_proj.", ".mlp.fc1.": ".mlp.linear1.", ".mlp.fc2.": ".mlp.linear2."}
FROM_UNETR = {theirs: ours for ours, theirs in TO_UNETR.items()}


def _autoencoder(state: dict[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    require(
        state,
        *("encoder_pos_embed", "encoder.patch_embed.proj.weight", "encoder.blocks.0.mlp.fc1.weight", "mask_token"),
        *("encoder_to_decoder.0.weight", "decoder.head.weight"),
    )
    kernel, positions = state["encoder.patch_embed.proj.weight"], state["encoder_pos_embed"]
    width, channels, *patch = kernel.shape
    decoder_width = int(state["mask_token"].shape[-1])
    memories = _count(state, "decoder.cross_attention_blocks.")
    shape: dict[str, Any] = {
        "embed_dim": width,
        "in_chans": channels,
        "depth": _count(state, "encoder.blocks."),
        "intermediate_size": len(state["encoder.blocks.0.mlp.fc1.weight"]),
        "mlp_ratio": _hidden(state["encoder.blocks.0.mlp.fc1.weight"]),
        "decoder_embed_dim": decoder_width,
        "decoder_depth": _count(state, "decoder.blocks."),
        "cross_depth": memories,
    }
    settled = SETTINGS.settle(config, shape)
    if "patch_size" in settled and _three(settled["patch_size"]) != tuple(patch):
        raise UsageError(f"patch_size={settled['patch_size']}, but the checkpoint's patches have {shown(tuple(patch))}")
    layers = tuple(int(layer) for layer in settled.get("memory_layers", (3, 6, 9)))
    encoder = _encoder(
        settled,
        _size(settled, positions.shape[1], tuple(patch)),
        tuple(patch),
        shape,
        # A table that is none of sines and cosines was trained.
        positions="sincos" if _is_computed(positions, settled, tuple(patch)) else "learned",
    )
    model = HiEndMAE(
        encoder,
        decoder_dim=decoder_width,
        decoder_heads=_heads("decoder_num_heads", settled, decoder_width, DECODER_HEADS),
        decoder_depth=shape["decoder_depth"],
        memory_layers=layers,
        mask_ratio=float(settled.get("mask_ratio", 0.75)),
        decoder_mlp_ratio=_mlp_ratio(state, "decoder.cross_attention_blocks.0.mlp.fc1.weight"),
    )
    ours = {name if name != "encoder_pos_embed" else "encoder.pos_embed": value for name, value in state.items()}
    filled = fill(model, ours, published=lambda name: name.replace("encoder.pos_embed", "encoder_pos_embed"))
    return filled.eval()


def _unetr(state: dict[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    state = {name: value for name, value in state.items() if not UNUSED.match(name)}
    place = "vit.patch_embedding."
    require(
        state,
        *(f"{place}position_embeddings", "vit.blocks.0.mlp.linear1.weight", "out.conv.conv.weight"),
        *("encoder1.layer.conv1.conv.weight", "decoder5.transp_conv.conv.weight"),
    )
    linear, positions = state.pop(OF_UNETR), state[f"{place}position_embeddings"]
    (width, elements), (features, channels) = linear.shape, state["encoder1.layer.conv1.conv.weight"].shape[:2]
    shape: dict[str, Any] = {
        "embed_dim": width,
        "in_chans": channels,
        "depth": _count(state, "vit.blocks."),
        "intermediate_size": len(state["vit.blocks.0.mlp.linear1.weight"]),
        "mlp_ratio": _hidden(state["vit.blocks.0.mlp.linear1.weight"]),
        "feature_size": features,
        "num_classes": len(state["out.conv.conv.weight"]),
        "stock_upsampling": "decoder2.transp_conv.conv.weight" in state,
    }
    settled = SETTINGS.settle(config, shape)
    patch = _patch(settled, elements // channels)
    encoder = _encoder(
        settled,
        _size(settled, positions.shape[1], patch),
        patch,
        shape,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        **OF_SEGMENTATION,
    )
    layers = tuple(settled.get("layers") or settled.get("memory_layers") or (3, 6, 9))
    model = UNETR(encoder, shape["num_classes"], features, layers, shape["stock_upsampling"])
    names: dict[str, str] = {}
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        own = f"head.{name}"
        if name.startswith(place):
            part = name.removeprefix(place)
            own = f"backbone.encoder.{'pos_embed' if part == 'position_embeddings' else 'patch_embed.proj.bias'}"
        elif name.startswith("vit."):
            own = _renamed(name.replace("vit.", "backbone.encoder.", 1), FROM_UNETR)
        ours[own], names[own] = value, name
    kernel = "backbone.encoder.patch_embed.proj.weight"
    ours[kernel] = linear.unflatten(1, (*patch, channels)).permute(0, 4, 1, 2, 3).contiguous()
    names[kernel] = OF_UNETR
    return fill(model, ours, published=lambda name: names.get(name, name)).eval()


def _encoder(settled: Mapping[str, Any], size: Grid, patch: Grid, shape: Mapping[str, Any], **others: Any) -> Encoder:
    return create_encoder(
        "volume_vit_base_patch16_96",
        image_size=size,
        in_chans=shape["in_chans"],
        patch_size=patch,
        embed_dim=shape["embed_dim"],
        depth=shape["depth"],
        num_heads=_heads("num_heads", settled, shape["embed_dim"], HEADS),
        mlp_ratio=shape["mlp_ratio"].ratio,
        **others,
    )


def _heads(name: str, settled: Mapping[str, Any], width: int, known: Mapping[int, int]) -> int:
    """Return the number of heads, as told or of a published size.

    Raises:
        UsageError: Not told, or it does not divide the width.
    """
    heads = settled.get(name) or known.get(width)
    if heads is None:
        raise UsageError(f"the tensors do not tell how many heads a width of {width} has; give {name}")
    if width % int(heads):
        raise UsageError(f"{name}={heads} does not divide the width of {width}")
    return int(heads)


def _size(settled: Mapping[str, Any], tokens: int, patch: Grid) -> Grid:
    """Return the sides of the volumes: as told, or of a grid that is a cube.

    Raises:
        UsageError: It is no cube and not told, or there are other positions.
    """
    if (given := settled.get("image_size")) is not None:
        size = _three(given)
        grid = patch_grid(size, patch)
        if grid[0] * grid[1] * grid[2] != tokens:
            raise UsageError(f"image_size={shown(size)} has {shown(grid)} patches, and there are {tokens} positions")
        return size
    side = round(tokens ** (1 / 3))
    if side**3 != tokens:
        raise UsageError(f"{tokens} positions are of no cube; give image_size=(H, W, D)")
    return tuple(side * cut for cut in patch)


def _patch(settled: Mapping[str, Any], voxels: int) -> Grid:
    if (given := settled.get("patch_size")) is not None:
        patch = _three(given)
        if patch[0] * patch[1] * patch[2] != voxels:
            raise UsageError(f"patch_size={shown(patch)}, but the checkpoint's patches have {voxels} voxels")
        return patch
    side = round(voxels ** (1 / 3))
    if side**3 != voxels:
        raise UsageError(f"patches of {voxels} voxels are no cubes; give patch_size=(h, w, d)")
    return (side,) * 3


def _is_computed(positions: Tensor, settled: Mapping[str, Any], patch: Grid) -> bool:
    """Return whether a table is that of sines and cosines."""
    if positions.shape[-1] % 6:
        return False
    grid = patch_grid(_size(settled, positions.shape[1], patch), patch)
    table = volume_positions(positions.shape[-1], grid)
    return bool(torch.allclose(positions.float().cpu(), table, atol=1e-4))


def _three(sides: Any) -> Grid:
    return (int(sides),) * 3 if isinstance(sides, int) else tuple(int(side) for side in sides)


def _hidden(weight: Tensor) -> Hidden:
    hidden, width = weight.shape
    return Hidden(width, hidden)


def _mlp_ratio(state: Mapping[str, Tensor], name: str) -> float:
    require(state, name)
    return _hidden(state[name]).ratio


def _renamed(name: str, rules: Mapping[str, str]) -> str:
    """Return a name with one part replaced, as a rule says."""
    for part, other in rules.items():
        if part in name:
            return name.replace(part, other)
    return name


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Return the number of modules in a list, by the names of its tensors."""
    if not has(state, prefix):
        return 0
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})
