"""Checkpoints of the published code of Hyena N-D (github.com/Itamarzimm/HyenaND; arXiv 2309.13600): DeiT's layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from patchloom.encoders.hyena import DIRECTIONS, HyenaND
from patchloom.encoders.hyena_vit import MIXERS, is_hyena
from patchloom.encoders.implicit_filters import HIDDEN_LAYERS, WINDOWS
from patchloom.errors import UsageError, unknown_name
from patchloom.models.published import fill, require
from patchloom.models.published_settings import Hidden, OneOf, Settings, set_epsilon

SETTINGS = Settings(
    obeyed=(
        *("mixer", "direction", "sqrt_decay", "conv_scale", "num_heads", "global_pool", "drop_path"),
        *("paper_optim", "layer_norm_eps"),
    ),
    idle=(
        *("model", "drop", "attn_drop", "grad_accum", "grad_cp", "debug_small_dataset", "dp", "subset_data"),
        *("filter_dropout", "dropout", "bce_loss", "name"),
    ),
    fixed={"use_cls_token": (False,), "distilled": (False,)},
    other_names={
        "method": "mixer",
        "directional_mode": "direction",
        "hyena_order": "order",
        "hyena_filter_order": "filter_width",
        "filter_order": "filter_width",
        "hyena2d_sqrt_decay": "sqrt_decay",
        "window_mode": "window",
        "pool": "global_pool",
        "d_model": "embed_dim",
        "dim": "embed_dim",
        "heads": "num_heads",
        "l_max": "side",
        "input_size": "img_size",
        "image_size": "img_size",
        "nb_classes": "num_classes",
    },
    read={
        "direction": lambda word: DIRECTIONS.get(word, word),
        "window": lambda word: WINDOWS.get(word, word),
        "mixer": lambda word: MIXERS.get(word, word),
    },
)
AXES = "XY"
HEADS = {192: 3, 384: 6, 768: 12}
"""Of DeiT's sizes, by their widths."""


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return the ViT of a published checkpoint, or the operator alone where the state is that of one.

    Args:
        state: Tensors named `blocks.0.attn.in_proj.weight`, `blocks.0.attn.filter_fn.…` and so on, without class token;
            or those of one `HyenaOperator2d` or `HyenaOperator` (`in_proj.weight`, `filter_fn.…`).
        **config: `mixer` (or `method`) and `direction` (`directional_mode`) under our or the published names, which
            tensors do not tell (but for `parallel`, `4dir` and `4dirp`); `sqrt_decay`, `conv_scale` (official),
            `num_heads` of hybrids (those of DeiT's size), `global_pool` (first), `drop_path`. What shapes tell may be
            given and has to agree.

    Returns:
        A `HyenaTransformer` with its classifier, or a `HyenaND`.

    Raises:
        UsageError: A setting that is unknown, missing or contradicts the tensors; tensors missing or left over; a class
            token, or positions that are no square.
    """
    state = dict(state)
    if "in_proj.weight" in state:
        return _operator(state, config)
    if "cls_token" in state:
        raise UsageError("the checkpoint has a class token, which has no place in the square grid of a 2-D operator")
    require(state, "patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "norm.weight")
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name)))
    own = [f"blocks.{number}.attn.qkv.weight" not in state for number in range(depth)]
    first = next((f"blocks.{number}.attn." for number in range(depth) if own[number]), None)
    side = round(state["pos_embed"].shape[1] ** 0.5)
    if side**2 != state["pos_embed"].shape[1]:
        raise UsageError(f"pos_embed has {state['pos_embed'].shape[1]} positions, which are no square grid")
    found = _structure(state, first)
    hidden = Hidden(width, len(state["blocks.0.mlp.fc1.weight"]))
    classes = len(state["head.weight"]) if "head.weight" in state else 0
    shape = {"embed_dim": width, "depth": depth, "patch_size": patch, "in_chans": channels, "img_size": side * patch}
    told = {name: value for name, value in found.items() if name != "rank"}
    settled = SETTINGS.settle(config, {**told, **shape, "side": None, "mlp_ratio": hidden, "num_classes": classes})
    mixer = _mixer(settled.get("mixer"), own, found["rank"])
    model = timm.create_model(
        "hyena_vit_tiny_patch16",
        **shape,
        **_arguments(found, settled, needed=first is not None and mixer != "sequence"),
        num_classes=classes,
        num_heads=int(settled.get("num_heads") or HEADS.get(width) or max(1, width // 64)),
        mlp_ratio=hidden.ratio,
        mixer=mixer,
        global_pool=settled.get("global_pool", "first"),
        drop_path_rate=float(settled.get("drop_path", 0.0)),
        paper_optim=bool(settled.get("paper_optim", False)),
    )
    converted, names = dict(state), dict[str, str]()
    for number in range(depth):
        if own[number]:
            _convert(converted, names, f"blocks.{number}.attn.", found)
    _fill(model, converted, names)
    set_epsilon(model, settled.get("layer_norm_eps"))
    return model


def _operator(state: dict[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """Return the operator alone."""
    found = _structure(state, "")
    width = int(state["in_proj.weight"].shape[1])
    place = next((state[name] for name in ("filter_fn.pos_emb.z", "filter") if name in state), None)
    if place is None:
        raise UsageError("missing: filter_fn.pos_emb.z")
    side = int(place.shape[1] if place.ndim == 3 else place.shape[-1])
    told = {name: value for name, value in found.items() if name != "rank"}
    settled = SETTINGS.settle(config, {**told, "embed_dim": width, "side": side})
    row = found["rank"] == 1
    arguments = _arguments(found, settled, needed=not row)
    module = HyenaND(width, (side,) * found["rank"], **arguments, causal=row)
    names: dict[str, str] = {}
    _convert(state, names, "", found)
    return _fill(module, state, names)


def _structure(state: Mapping[str, Tensor], prefix: str | None) -> dict[str, Any]:
    """Return what the tensors of an operator tell of it; None of what they do not tell."""
    told: dict[str, Any] = dict.fromkeys(
        ("order", "filter_width", "emb_dim", "filter_kind", "hyena2d_filter", "direct_paramtrization", "window",
         "direction", "rank")
    )  # fmt: skip
    if prefix is None:
        return told
    require(state, f"{prefix}in_proj.weight", f"{prefix}short_filter.weight")
    inner, width = state[f"{prefix}in_proj.weight"].shape
    smoothing = state[f"{prefix}short_filter.weight"]
    told["order"], told["rank"] = inner // width - 1, smoothing.ndim - 2
    if told["rank"] == 2:
        told["direction"] = OneOf(("forward", "reverse_first"))
    if len(smoothing) == 4 * inner:
        told["direction"] = "shared4"
    elif (mix := state.get(f"{prefix}linear_mix.weight")) is not None:
        told["direction"] = "four_shared" if tuple(mix.shape) == (1, 4) else "four_full"

    def any_of(part: str) -> bool:
        return any(name.startswith(f"{prefix}{part}") for name in state)

    if not any_of("filter_fn."):
        return told | {"filter_kind": "explicit", "direct_paramtrization": True}
    kind = "product" if any_of("filter_fn.Ximplicit_filter.") or any_of("filter_fn.Yimplicit_filter.") else "joint"
    network = f"{prefix}filter_fn.{'X' * (kind == 'product')}implicit_filter.0.weight"
    require(state, network, f"{prefix}filter_fn.pos_emb.z")
    told |= {
        "filter_kind": kind,
        "hyena2d_filter": kind == "joint" if told["rank"] == 2 else None,
        "direct_paramtrization": False,
        "filter_width": len(state[network]),
        "emb_dim": int(state[f"{prefix}filter_fn.pos_emb.z"].shape[-1]),
    }
    learned = any(any_of(f"filter_fn.{axis}modulation.shift") for axis in ("", *AXES))
    if not any(any_of(f"filter_fn.{axis}modulation.") for axis in ("", *AXES)):
        told["window"] = "none"
    elif told["rank"] == 2 and any_of("filter_fn.modulation.deltas"):
        told["window"] = "symmetric"
    else:
        told["window"] = "learned" if learned else "exp"
    return told


def _arguments(found: Mapping[str, Any], settled: Mapping[str, Any], needed: bool) -> dict[str, Any]:
    """Return the arguments of an operator.

    Args:
        found: What the tensors tell.
        settled: What was given and is obeyed.
        needed: The direction makes a difference.

    Raises:
        UsageError: The direction is neither given nor told by tensors.
    """
    direction = settled.get("direction")
    if isinstance(found["direction"], str):
        direction = found["direction"]
    if direction is None and needed:
        raise UsageError(
            "the tensors do not tell in which direction convolutions run; give direction=standard, or direction=seq"
        )
    told = {name: found[name] for name in ("order", "filter_width", "emb_dim", "filter_kind", "window")}
    arguments = {name: value for name, value in told.items() if value is not None}
    if found["filter_kind"] == "joint":  # the published code passes it over in the other cases
        arguments["sqrt_decay"] = bool(settled.get("sqrt_decay", False)) and found["rank"] == 2
    return {
        **arguments,
        "direction": (direction if needed else None) or "forward",
        "conv_scale": settled.get("conv_scale", "official"),
    }


def _mixer(given: str | None, own: list[bool], rank: int | None) -> str:
    """Return which blocks have the operator, as was given.

    Raises:
        UsageError: It was not given, or is not what the blocks of the checkpoint are.
    """
    words = (*MIXERS, *MIXERS.values(), "hyena", "attention")
    if given is None:
        raise UsageError(f"give mixer=…, which blocks have the operator: one of {', '.join(dict.fromkeys(words))}")
    if given == "attentionec":
        raise UsageError("mixer=attentionec is a baseline with a convolutional stem, which is not computed here")
    mixer = "sequence" if given == "hyena" and rank == 1 else given
    if mixer not in (*MIXERS.values(), "sequence", "attention"):
        raise unknown_name("mixer", given, words)
    expected = [is_hyena(mixer, number, len(own)) for number in range(len(own))]
    if expected != own or (rank == 1) != (mixer == "sequence"):
        blocks = ", ".join("hyena" if each else "attention" for each in own)
        over = " over rows of tokens" if rank == 1 else ""
        raise UsageError(f"mixer={given}, but the checkpoint's blocks are {blocks}{over}")
    return mixer


def _convert(state: dict[str, Tensor], names: dict[str, str], prefix: str, found: Mapping[str, Any]) -> None:
    """Put the tensors of an operator under our names, in place.

    Args:
        state: All tensors.
        names: Takes what published tensors a tensor of ours is made of, for messages.
        prefix: Before all names of the operator.
        found: What its tensors tell of it.

    Raises:
        UsageError: Tensors that are one in the published module differ.
    """
    for ours, theirs in _sources(found).items():
        published = [f"{prefix}{name}" for name in theirs]
        missing = [name for name in published if name not in state]
        names[f"{prefix}{ours}"] = ", ".join(missing or published)
        tensors = [state.pop(name) for name in published if name in state]
        if missing:
            continue
        if ours == "filters.freq":
            for name, tensor in zip(published, tensors, strict=True):
                if not torch.equal(tensor, tensors[0]):
                    raise UsageError(f"{published[0]} and {name} differ; in the published module they are one tensor")
            value = tensors[0]
        elif ours in ("filters.deltas", "filters.shift"):
            value = torch.cat([tensor.flatten(0, -2) for tensor in tensors])
        elif found["filter_kind"] == "explicit" and ours in ("filters.filter", "skip"):
            value = tensors[0][: found["order"] - 1]  # the last one is never used
            value = value.flatten() if ours == "skip" else value
        else:
            value = tensors[0]
        state[f"{prefix}{ours}"] = value


def _sources(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the published tensors by our names, for what has another name there."""
    names: dict[str, list[str]] = {}
    if found["direction"] in ("four_shared", "four_full"):
        names |= {f"mix.{part}": [f"linear_mix.{part}"] for part in ("weight", "bias")}
    if found["filter_kind"] == "explicit":
        return names | {"filters.filter": ["filter"], "skip": ["bias"]}
    names |= {"skip": ["filter_fn.bias"]}
    names |= {f"filters.{place}.0": [f"filter_fn.pos_emb.{place}"] for place in "zt"}
    networks = [f"{axis}implicit_filter" for axis in (AXES if found["filter_kind"] == "product" else ("",))]
    layers = HIDDEN_LAYERS + 2
    names["filters.freq"] = [f"filter_fn.{net}.{2 * n + 1}.freq" for net in networks for n in range(layers - 1)]
    for number, network in enumerate(networks):
        for layer in range(layers):
            for part in ("weight", "bias")[: 2 if layer < layers - 1 else 1]:
                names[f"filters.networks.{number}.{layer}.{part}"] = [f"filter_fn.{network}.{2 * layer}.{part}"]
    window = found["window"]
    if window != "none":
        if found["filter_kind"] == "product":
            parts = {part: [f"filter_fn.{axis}modulation.{part}" for axis in AXES] for part in ("deltas", "shift")}
        else:
            one = window == "symmetric" or found["rank"] == 1
            rates = [""] if one else list(AXES)
            parts = {"deltas": [f"filter_fn.modulation.{axis}deltas" for axis in rates]}
            parts["shift"] = ["filter_fn.modulation.shift"]
        names["filters.deltas"] = parts["deltas"]
        if window != "exp":
            names["filters.shift"] = parts["shift"]
    return names


def _fill(module: nn.Module, state: Mapping[str, Tensor], names: Mapping[str, str]) -> nn.Module:
    ours = [name for name in module.state_dict() if name.endswith("filters.trained_grid")]
    return fill(module, state, may_lack=ours, published=lambda name: names.get(name, name))
