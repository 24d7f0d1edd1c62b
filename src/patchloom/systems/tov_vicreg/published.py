"""Published TOV-VICReg checkpoints: the bare encoder and the full training module (arXiv 2209.10901)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.encoders import Encoder, create_encoder
from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError
from patchloom.models.published import bare, fill, require
from patchloom.models.published_settings import Hidden, Settings, agree, epsilon_of, name_of, set_epsilon
from patchloom.systems.tov_vicreg.model import TOVVICReg

FRAME_SIDE = 84
OF_LOSS = ("sim", "std", "cov", "temporal", "balanced", "chronological")
SETTINGS = Settings(
    obeyed=("num_heads", "image_size", "layer_norm_eps", *OF_LOSS),
    # `img_size` and `input_size` size the table of positions, which the checkpoint holds.
    idle=(
        *("img_size", "input_size", "drop_rate", "attn_drop_rate", "drop_path_rate", "arch", "encoder", "frames"),
        *("data_path_tuning", "games", "replay_capacity", "stack", "frame_stack", "accumulation_steps", "exp_dir"),
        *("lr_backbone", "wd", "optimizer_name", "steps", "checkpoint_freq", "stop_gradient", "permutations"),
    ),
    fixed={"qk_scale": (None,), "act_layer": ("gelu",)},
    other_names={
        "sim_coeff": "sim",
        "std_coeff": "std",
        "cov_coeff": "cov",
        "temporal_coeff": "temporal",
        "mlp": "projector",
        "norm_layer": "layer_norm_eps",
    },
    read={"layer_norm_eps": epsilon_of, "act_layer": name_of},
)
# Where other methods' checkpoints, which the published loader takes too, keep their encoder.
PREFIXES = ("backbone.", "base_encoder.", "vit.", "encoder.")
HEADS = ("projector.", "temporal_order_predictor.")
NORM = re.compile(r"projector\.(\d+)\.running_mean")
PROJECTOR = re.compile(r"projector\.(\d+)\.weight")


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return our module with a published state dict in it.

    Positions are resampled to the grid of the frames exactly as the published forward pass resamples them each time.

    Args:
        state: Tensors under the published names.
        **config: `num_heads` (default: width / 64), `image_size` of the frames (default: 84), and for the full
            training module the weights of the loss: `sim`, `std`, `cov`, `temporal`. Shapes tell the rest.

    Returns:
        `TOVVICReg` for the full training module, a timm `VisionTransformer` that returns its class token for an
        encoder alone.

    Raises:
        UsageError: Unknown setting, or tensors missing or left over.
    """
    whole = any(name.startswith("backbone.") for name in state) and any(name.startswith(HEADS) for name in state)
    encoder_state = _encoder_tensors(state, whole)
    for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "pos_embed"):
        if name not in encoder_state:
            raise UsageError(f"the checkpoint has no {name}, so it is no TOV-VICReg encoder")
    inferred = _inferred_from_shapes(encoder_state)
    given = SETTINGS.renamed(config)
    config = SETTINGS.settle(config, {**inferred, "projector": None})
    encoder = _encoder(encoder_state, inferred, config)
    set_epsilon(encoder, config.get("layer_norm_eps"))
    grid = encoder.patch_embed.grid_size
    encoder_state["pos_embed"] = resampled_positions(
        encoder_state["pos_embed"], (int(grid[0]), int(grid[1])), _size(config)
    )
    if not whole:
        return fill(encoder, encoder_state).eval()
    heads = {name: value for name, value in state.items() if name.startswith(HEADS)}
    return _training_module(encoder, encoder_state, heads, config, given.get("projector"))


def resampled_positions(positions: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return the positions a published encoder adds to the tokens of frames of `size`.

    The published code enlarges the wanted grid by 0.1 before it divides, against rounding, and lets that scale (10.1 /
    28, not 10 / 28) drive the sampling; where the token counts agree and the frame is square it takes them as they are.

    Args:
        positions: (1, 1 + n², D), class position first, of a square grid.
        grid: (h, w) wanted.
        size: (H, W) of the frames in pixels.

    Returns:
        (1, 1 + h·w, D).

    Raises:
        UsageError: The positions are of no square grid.
    """
    positions = at_least_float32(positions)  # resampled half-precision values would lose digits
    patches = positions[:, 1:]
    side = math.isqrt(patches.shape[1])
    if side**2 != patches.shape[1]:
        raise UsageError(f"pos_embed holds {patches.shape[1]} positions besides the class token's, which is no square")
    if side**2 == grid[0] * grid[1] and size[0] == size[1]:
        return positions
    maps = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
    maps = F.interpolate(maps, scale_factor=scale, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], maps.flatten(2).transpose(1, 2)], dim=1)


def _encoder_tensors(state: Mapping[str, Tensor], whole: bool) -> dict[str, Tensor]:
    """Return the encoder's tensors under timm's names; a head of another method is left out."""
    names = {bare(name): value for name, value in state.items()}
    if whole:
        return {n.removeprefix("backbone."): v for n, v in names.items() if not n.startswith(HEADS)}
    prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in names)), "")
    if prefix == "base_encoder.":  # MoCo v3 keeps its momentum encoder and predictor beside it
        names = {name: value for name, value in names.items() if name.startswith(prefix)}
    stripped = {name.removeprefix(prefix): value for name, value in names.items()}
    return {name: value for name, value in stripped.items() if not name.startswith("head.")}


def _inferred_from_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the published settings that the tensors themselves tell."""
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    return {
        "embed_dim": width,
        "in_chans": channels,
        "patch_size": patch,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "mlp_ratio": Hidden(width, len(state["blocks.0.mlp.fc1.weight"])),
        "qkv_bias": any(name.endswith(".attn.qkv.bias") for name in state),
        "num_classes": None,  # an encoder alone has no classifier, whatever it was called with
    }


def _size(config: Mapping[str, Any]) -> tuple[int, int]:
    given = config.get("image_size", FRAME_SIDE)
    return (given, given) if isinstance(given, int) else (int(given[0]), int(given[1]))


def _encoder(state: Mapping[str, Tensor], inferred: Mapping[str, Any], config: Mapping[str, Any]) -> Encoder:
    """Return a fresh encoder of the shapes in the state dict, for frames of the wanted size.

    A side may have a remainder: the published patches leave it out, and so do timm's.
    """
    shape = {name: inferred[name] for name in ("embed_dim", "depth", "qkv_bias", "patch_size")}
    shape["mlp_ratio"] = inferred["mlp_ratio"].ratio
    heads = config.get("num_heads") or max(1, inferred["embed_dim"] // 64)
    return create_encoder(
        "vit_tiny_patch8_84", image_size=_size(config), in_chans=inferred["in_chans"], num_heads=int(heads), **shape
    )


def _training_module(
    encoder: Encoder,
    encoder_state: Mapping[str, Tensor],
    heads: Mapping[str, Tensor],
    config: Mapping[str, Any],
    projector: str | None,
) -> nn.Module:
    linear = {int(match[1]): v for n, v in heads.items() if (match := PROJECTOR.fullmatch(n)) and v.ndim == 2}
    places = sorted(linear)
    norms = [int(match[1]) for name in heads if (match := NORM.fullmatch(name))]
    require(heads, *(f"projector.{norm + 2}.weight" for norm in norms))  # a linear layer follows
    widths = "-".join(str(len(linear[place])) for place in places)
    if projector is not None:
        agree({"projector": projector}, {"projector": widths})
    weights = {name: config[name] for name in OF_LOSS if name in config}
    model = TOVVICReg(encoder, projector=widths, **weights)
    tensors = {f"encoder.{name}": value for name, value in encoder_state.items()}
    tensors |= {
        name.replace("temporal_order_predictor.0.", "order_head.linear."): value for name, value in heads.items()
    }
    counters = [name for name in model.state_dict() if name.endswith("num_batches_tracked")]
    return fill(model, tensors, may_lack=counters, published=_published_name).eval()


def _published_name(name: str) -> str:
    if name.startswith("encoder."):
        return f"backbone.{name.removeprefix('encoder.')}"
    return name.replace("order_head.linear.", "temporal_order_predictor.0.")
