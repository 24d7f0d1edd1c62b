"""Checkpoints of the published DVT: denoisers, distilled encoders, and models of the first stage."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from patchloom.encoders import create_encoder
from patchloom.encoders.denoised import Denoiser
from patchloom.errors import UsageError
from patchloom.models.published import fill, has, require
from patchloom.systems.dvt.field import FeatureField
from patchloom.systems.dvt.model import SingleImageDenoiser

OF_FIELD = ("n_levels", "n_features_per_level", "base_resolution", "max_resolution", "log2_hashmap_size")
OTHER_NAMES = {
    "base_res": "base_resolution",
    "max_res": "max_resolution",
    "n_features": "n_features_per_level",
    "model_name": "encoder",
    "model_type": "encoder",
    "vit_type": "encoder",
}
IN_FRONT = "vit.model."


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return our module with a state dict of the published code in it.

    A denoiser (`denoiser.*`, with `pos_embed` or without): `Denoiser`; with `encoder`, the name of the timm model in
    front of it, and its weights (`vit.model.*`), one that takes normalised images. A neural field (`mlp.*` and
    `neural_field.params`, or `params`): `FeatureField`; with `shared_artifacts` or `residual_predictor.*`,
    `SingleImageDenoiser`. Anything else: a distilled encoder, whose name `encoder` gives.

    Args:
        state: Tensors by name.
        **config: `encoder` (or `model_name`), name of a timm model. Of a field `n_levels` (10), `n_features_per_level`
            (8), `base_resolution` (16), `max_resolution` (1024), `log2_hashmap_size` (20). Of a denoiser `grid_size`
            (H, W), where it is not square.

    Raises:
        UsageError: Unknown setting, tensors missing or left over, or a grid that is not square.
    """
    config = {OTHER_NAMES.get(name, name): value for name, value in config.items()}
    known = {"encoder", "grid_size", "feat_dim", "hidden_dim", "num_blocks", "norm", *OF_FIELD}
    if unknown := sorted(set(config) - known):
        raise UsageError(f"unknown setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
    if "params" in state or has(state, "neural_field.", "shared_artifacts", "residual_predictor."):
        return _first_stage(state, config)
    if has(state, "denoiser.", IN_FRONT) or (
        has(state, "norm1.", "0.norm1.") and has(state, "pos_embed", "attn.", "0.")
    ):
        return _denoiser(state, config)
    return _distilled(state, config)


def _denoiser(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    prefix = "denoiser." if has(state, "denoiser.") else ""
    several = f"{prefix}0.norm1.weight" in state
    first = f"{prefix}0." if several else prefix
    require(state, f"{first}norm1.weight")
    width = len(state[f"{first}norm1.weight"])
    blocks = {int(match[1]) for name in state if (match := re.match(rf"{re.escape(prefix)}(\d+)\.", name))}
    count = max(blocks) + 1 if several else 1
    positions = state.get("pos_embed")
    grid = _grid(positions, config.get("grid_size"))
    encoder = None
    if config.get("encoder") is not None:
        side = round(math.sqrt(math.prod(grid)))
        encoder = create_encoder(str(config["encoder"]))
        of_vit = {name.removeprefix(IN_FRONT): value for name, value in state.items() if name.startswith(IN_FRONT)}
        if of_vit:
            encoder = _filled_encoder(str(config["encoder"]), of_vit, side)
    model = Denoiser(width, grid, count, positions is not None, encoder, bool(config.get("norm", True)))
    found = {}
    for name, value in state.items():
        if name.startswith("vit."):
            continue
        if name.startswith(prefix) and name != "pos_embed":
            rest = name.removeprefix(prefix)
            found[f"blocks.{rest}" if several else f"blocks.0.{rest}"] = value
        else:
            found[name] = value

    def published(name: str) -> str:
        inner = name.removeprefix("blocks." if several else "blocks.0.")
        return f"{prefix}{inner}" if inner != name else name

    of_encoder = [name for name in model.state_dict() if name.startswith("encoder.")]
    return fill(model, found, may_lack=of_encoder, published=published)


def _grid(positions: Tensor | None, given: Any) -> tuple[int, int]:
    """Return the grid that positions are of."""
    if given is not None:
        height, width = (given, given) if isinstance(given, int) else (int(given[0]), int(given[1]))
        if positions is not None and height * width != positions.shape[1]:
            raise UsageError(
                f"grid_size {height} x {width} has {height * width} tokens, and pos_embed has {positions.shape[1]}"
            )
        return height, width
    if positions is None:
        return 37, 37  # nothing hangs on it
    side = math.isqrt(positions.shape[1])
    if side**2 != positions.shape[1]:
        raise UsageError(f"pos_embed has {positions.shape[1]} tokens, which are no square; give grid_size as (H, W)")
    return side, side


def _first_stage(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    found = dict(state)
    # Inside the module the field's own names are repeated.
    for name in list(found):
        if name.startswith("neural_field.") and name != "neural_field.params":
            found[name.removeprefix("neural_field.").replace("neural_field.params", "params")] = found.pop(name)
    if "params" in found:
        found["neural_field.params"] = found.pop("params")
    require(found, "neural_field.params", "mlp.0.weight", "mlp.2.weight")
    hidden, width = len(found["mlp.0.weight"]), len(found["mlp.2.weight"])
    per_level = int(config.get("n_features_per_level", 8))
    inputs = found["mlp.0.weight"].shape[1]
    field: dict[str, Any] = {
        "hidden_dim": hidden,
        "encoder": "hash",
        "n_levels": int(config.get("n_levels", inputs // per_level)),
        "n_features_per_level": per_level,
        "base_resolution": int(config.get("base_resolution", 16)),
        "max_resolution": int(config.get("max_resolution", 1024)),
        "log2_hashmap_size": int(config.get("log2_hashmap_size", 20)),
    }
    if field["n_levels"] * per_level != inputs:
        raise UsageError(
            f"{field['n_levels']} levels of {per_level} features make {field['n_levels'] * per_level}, and "
            f"mlp.0.weight takes {inputs}; give n_levels and n_features_per_level"
        )
    whole = has(found, "shared_artifacts", "residual_predictor.")
    ours = {("neural_field." if whole else "") + _field_name(n): v for n, v in found.items() if _is_field(n)}
    rest = {name: value for name, value in found.items() if not _is_field(name)}
    model: nn.Module
    if whole:
        artifacts = found.get("shared_artifacts")
        grid = (1, 1) if artifacts is None else (int(artifacts.shape[2]), int(artifacts.shape[3]))
        residual = has(found, "residual_predictor.")
        model = SingleImageDenoiser(width, grid, residual, artifacts is not None, **field)
    else:
        model = FeatureField(width, **field)
    # Our modules hold several images side by side; a published one is of one.
    single = {name: value.unsqueeze(0) for name, value in ours.items()}
    single |= {n: v if n == "shared_artifacts" else v.unsqueeze(0) for n, v in rest.items()}
    return fill(model, single, published=_published_field)


def _is_field(name: str) -> bool:
    return name == "neural_field.params" or name.startswith("mlp.")


def _field_name(name: str) -> str:
    return "encoding.params" if name == "neural_field.params" else name


def _published_field(name: str) -> str:
    inner = name.removeprefix("neural_field.")
    return "neural_field.params" if inner == "encoding.params" else inner


def _distilled(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    name = config.get("encoder")
    if name is None:
        raise UsageError("a distilled checkpoint is a whole ViT; give the name of its timm model as encoder")
    require(state, "patch_embed.proj.weight")
    return _filled_encoder(str(name), state, None)


def _filled_encoder(name: str, state: Mapping[str, Tensor], side: int | None) -> Any:
    """Return a timm ViT with tensors in it, for the size that its positions, or a grid of so many tokens, are of."""
    model: Any = create_encoder(name)
    patch = state["patch_embed.proj.weight"].shape[-1]
    positions = state.get("pos_embed")
    if positions is not None:
        prefix = 0 if getattr(model, "no_embed_class", False) else int(model.num_prefix_tokens)
        side = math.isqrt(positions.shape[1] - prefix)
    if side is not None:
        model = create_encoder(name, image_size=side * patch)
    heads = {n: v for n, v in state.items() if not n.startswith("head.")}
    return fill(cast(nn.Module, model), heads)
