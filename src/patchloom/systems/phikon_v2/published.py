"""Published slide-level heads of Phikon-v2's group, and its tile encoder (arXiv 2409.09173).

The names of the tensors tell which head it is, their shapes nearly all else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from patchloom.errors import UsageError, unknown_name
from patchloom.models.published import fill, has
from patchloom.models.published_settings import Settings
from patchloom.systems.dinov2 import published as dinov2
from patchloom.systems.phikon_v2.mil import HEADS

# A tensor that only this head has. A mean pool has nothing but its classifier.
# Modules that only one of the heads has; what all have comes last.
TELLS = {
    "abmil": "attention_layer.",
    "dsmil": "tiles_queries.",
    "chowder": "score_model.",
    "transmil": "cor.",
    "hiptmil": "gat.",
    "meanpool": "mlp.",
}
# Names the head itself may go by.
SPELLINGS = {"mean_pool": "meanpool", "hipt": "hiptmil", "hipt_mil": "hiptmil", "trans_mil": "transmil"}
# What shapes do not tell.
UNTOLD = {
    "abmil": ("temperature", "mlp_activation", "mlp_dropout"),
    "dsmil": ("passing_values", "out_logits", "mlp_activation", "mlp_dropout"),
    "chowder": ("n_top", "n_bottom", "mlp_activation", "mlp_dropout"),
    "transmil": ("proj_dropout",),
    "hiptmil": (),
    "meanpool": ("activation", "dropout"),
}
# Shorter names of settings, as descriptions of the heads have them.
SHORT = {
    "d": "d_model_attention",
    "d_attention": "d_model_attention",
    "d_queries": "d_tiles_queries",
    "d_values": "d_tiles_values",
    "tiles_mlp": "tiles_mlp_hidden",
    "scores_mlp": "tiles_scores_mlp_hidden",
    "queries_mlp": "tiles_queries_mlp_hidden",
    "values_mlp": "tiles_values_mlp_hidden",
    "mlp": "mlp_hidden",
    "activation": "mlp_activation",
    "dropout": "mlp_dropout",
    "hidden": "mlp_hidden",
    "heads": "num_heads",
    "num_classes": "out_features",
    "num_attention_heads": "num_heads",
}
# What all published heads of a kind have.
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "transmil": {"position_encoding": ("ppeg", "PPEG")},
    "meanpool": {"bias": (True,)},
}
# Of TransMIL's two blocks, each with settings of its own: with the published defaults.
BLOCKS = {"cor": "kw_cor", "agg": "kw_agg"}
OF_BLOCKS = {"num_heads": 8, "num_landmarks": 256, "attn_dropout": 0.0, "block_dropout": 0.0}
TOLD_OF_BLOCKS = ("attention_type", "qkv_bias", "residual_kernel_size")
BLOCK = Settings(
    obeyed=(*OF_BLOCKS, "residual_kernel_size"),
    idle=("mlp_multiplier", "mlp_dropout", "mlp_activation"),  # of a part its authors left out
    other_names={"num_attention_heads": "num_heads", "proj_dropout": "block_dropout"},
)


def load(state: Mapping[str, Tensor], head: str | None = None, **config: Any) -> nn.Module:
    """Return a multiple-instance head with a published state dict in it.

    Args:
        state: Tensors under the published names.
        head: Name of the head (or give it as `model`); default: what the names of the tensors say.
        **config: Arguments of the head under their published names; those that shapes tell may be given, and have to
            agree. What they do not tell is the published default: `temperature` 1 (ABMIL), `n_top` half of the
            scores (Chowder), `passing_values` as far as the classifier's width tells and `out_logits` mean (DSMIL),
            `num_heads` 8 and `num_landmarks` 256 (TransMIL: for both blocks, or for each in `kw_cor` and `kw_agg`),
            and the activation of the classifier (ReLU for ABMIL, otherwise sigmoid).
            `metadata_cols` (3): bags may come with so many columns in front of their features, or without.

    Returns:
        The head: `forward(bags, mask)` gives logits.

    Raises:
        UsageError: Unknown head or setting, one that contradicts the tensors, or tensors missing or left over.
    """
    head = config.pop("model", head)
    if head is None and dinov2.is_dinov2(state):
        return dinov2.load(state, **config)  # the tile encoder
    head_name = next((name for name, module in TELLS.items() if has(state, module)), None)
    if head is not None:
        head = SPELLINGS.get(head.lower(), head.lower())
        if head not in HEADS:
            raise unknown_name("head", head, HEADS)
        if head_name is not None and head != head_name:
            raise UsageError(f"the checkpoint's tensors are those of {head_name}, not of {head}")
    if head_name is None:
        raise UsageError(f"the checkpoint has no tensor of a known head ({', '.join(HEADS)}); it has {list(state)[:4]}")
    inferred = _inferred_from_shapes(head_name, state)
    names = (
        {"num_classes": "out_features", "mlp_hidden": "hidden", "mlp": "hidden"} if head_name == "meanpool" else SHORT
    )
    settings = Settings(obeyed=("metadata_cols", *UNTOLD[head_name]), fixed=FIXED.get(head_name, {}), other_names=names)
    config = dict(config)
    blocks = _blocks_of_transmil(state, config) if head_name == "transmil" else {}
    if head_name == "chowder" and (extreme := config.pop("n_extreme", None)) is not None:
        config |= {"n_top": extreme, "n_bottom": extreme}
    arguments = {"metadata_cols": 3, **inferred, **settings.settle(config, inferred), **blocks}
    if head_name == "chowder":
        arguments |= _extremes(arguments, state)
    if head_name == "dsmil":
        arguments["passing_values"] = _passes_values(arguments, state)
    return fill(HEADS[head_name](**arguments), state).eval()


# A loader for each head by its own name.
load_meanpool = partial(load, head="meanpool")
load_abmil = partial(load, head="abmil")
load_chowder = partial(load, head="chowder")
load_dsmil = partial(load, head="dsmil")
load_transmil = partial(load, head="transmil")
load_hiptmil = partial(load, head="hiptmil")


def _inferred_from_shapes(head: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of a head that its tensors tell."""
    if head == "meanpool":
        widths = _mlp_widths(state)
        return {"in_features": widths[0], "hidden": widths[1:-1], "out_features": widths[-1]}
    if head == "abmil":
        tiles, mlp = _tile_widths(state, "tiles_emb"), _mlp_widths(state)
        return {
            "in_features": tiles[0],
            "tiles_mlp_hidden": tiles[1:-1],
            "d_model_attention": tiles[-1],
            "mlp_hidden": mlp[1:-1],
            "out_features": mlp[-1],
            "bias": _has_bias(state, "tiles_emb"),
        }
    if head == "chowder":
        tiles = _tile_widths(state, "score_model")
        return {
            "in_features": tiles[0],
            "tiles_mlp_hidden": tiles[1:-1],
            "out_features": tiles[-1],
            "mlp_hidden": _mlp_widths(state)[1:-1],
            "bias": _has_bias(state, "score_model"),
        }
    if head == "dsmil":
        scores, values, queries = (_tile_widths(state, f"tiles_{name}") for name in ("scores", "values", "queries"))
        return {
            "in_features": scores[0],
            "out_features": scores[-1],
            "d_tiles_values": values[-1],
            "d_tiles_queries": queries[-1],
            "tiles_scores_mlp_hidden": scores[1:-1],
            "tiles_values_mlp_hidden": values[1:-1],
            "tiles_queries_mlp_hidden": queries[1:-1],
            "mlp_hidden": _mlp_widths(state)[1:-1],
            "bias": _has_bias(state, "tiles_"),
        }
    if head == "transmil":
        return _transmil(state)
    return {"in_features": _width_in(state, "phi.0.weight"), "out_features": len(_tensor(state, "classifier.weight"))}


def _transmil(state: Mapping[str, Tensor]) -> dict[str, Any]:
    projected = "proj.0.weight" in state
    width = len(_tensor(state, "cor.norm1.weight"))
    return {
        "in_features": _width_in(state, "proj.0.weight") if projected else width,
        "proj_dim": width if projected else None,
        "out_features": len(_tensor(state, "head.weight")),
        "depthwise": _tensor(state, "pos_enc.group_conv1.weight").shape[1] == 1 < width,
    }


def _blocks_of_transmil(state: Mapping[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of TransMIL's blocks; their settings are taken out of `config`."""
    names = (*OF_BLOCKS, *TOLD_OF_BLOCKS, "num_attention_heads", "heads")
    both = {SHORT.get(name, name): config.pop(name) for name in list(config) if name in names}
    first, second = (
        {**OF_BLOCKS, **BLOCK.settle({**both, **(config.pop(group, None) or {})}, inferred), **inferred}
        for group, inferred in ((group, _inferred_from_block(state, block)) for block, group in BLOCKS.items())
    )
    return {**first, "second_block": {name: value for name, value in second.items() if first.get(name) != value}}


def _inferred_from_block(state: Mapping[str, Tensor], block: str) -> dict[str, Any]:
    """Return the settings that the tensors of one of TransMIL's blocks tell."""
    if f"{block}.attn.to_qkv.weight" not in state:
        return {"attention_type": "original", "qkv_bias": f"{block}.attn.qkv.bias" in state}
    kernel = _tensor(state, f"{block}.attn.res_conv.weight")
    return {
        "attention_type": "nystrom",
        "qkv_bias": f"{block}.attn.to_qkv.bias" in state,
        "num_heads": len(kernel),
        "residual_kernel_size": kernel.shape[2],
    }


def _extremes(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return how many top and bottom scores there are; together they are the width of the classifier."""
    both = _mlp_widths(state)[0]
    top, bottom = arguments.get("n_top"), arguments.get("n_bottom")
    if top is None and bottom is None and both % 2:
        raise UsageError(f"the classifier takes {both} scores; give n_top or n_bottom")
    if top is None:
        top = both // 2 if bottom is None else both - bottom
    if bottom is None:
        bottom = both - top
    if top + bottom != both:
        raise UsageError(f"n_top={top} and n_bottom={bottom}, but the checkpoint's classifier takes {both} scores")
    return {"n_top": top, "n_bottom": bottom}


def _passes_values(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> bool:
    """Return whether learnt values are pooled: the classifier's width tells, where it can."""
    width = _mlp_widths(state)[0]
    possible = {
        passing
        for passing, fits in ((True, arguments["d_tiles_values"]), (False, arguments["in_features"]))
        if fits == width
    }
    asked = arguments.get("passing_values")
    if asked is not None and asked not in possible:
        raise UsageError(f"passing_values={asked}, but the checkpoint's classifier takes {width} values; leave it out")
    return bool(asked) if asked is not None else possible == {True}


def _mlp_widths(state: Mapping[str, Tensor]) -> list[int]:
    """Return the widths from the input to the output of `mlp`."""
    last = max((int(match[1]) for name in state if (match := re.match(r"mlp\.(\d+)\.", name))), default=0)
    names = [f"mlp.{number}.0.weight" for number in range(last)] + [f"mlp.{last}.weight"]
    return _widths([_tensor(state, name) for name in names])


def _tile_widths(state: Mapping[str, Tensor], name: str) -> list[int]:
    """Return the widths from the input to the output of a network on tiles, whose activations count as layers."""
    prefix = f"{name}.hidden_layers."
    layer = re.compile(rf"{re.escape(prefix)}(\d+)\.")
    numbers = sorted({int(match[1]) for key in state if (match := layer.match(key))})
    return _widths([_tensor(state, f"{prefix}{number}.weight") for number in numbers or [0]])


def _has_bias(state: Mapping[str, Tensor], name: str) -> bool:
    return any(key.startswith(name) and ".hidden_layers." in key and key.endswith(".bias") for key in state)


def _widths(weights: list[Tensor]) -> list[int]:
    return [weights[0].shape[1], *(len(weight) for weight in weights)]


def _width_in(state: Mapping[str, Tensor], name: str) -> int:
    return int(_tensor(state, name).shape[1])


def _tensor(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise UsageError(f"the checkpoint has no {name}; missing: {name}")
    return state[name]
