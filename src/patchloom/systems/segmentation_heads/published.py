"""Published decoders: mmsegmentation's and transformers' UPerNet and FCN heads, DINOv2's and DINOv3's, SETR's, necks.

A checkpoint holds one head or neck, or a whole model: its parts are told apart here, and made in `segmentation_parts`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from patchloom.errors import UsageError
from patchloom.systems.segmentation_heads.published_parts import load_part

PARTS = {"decode_head": "", "auxiliary_head": "auxiliary_", "neck": "neck_"}
"""Parts of a whole model, and what settings of theirs begin with."""
# BEiT's and MAE's code keep the neck inside the encoder, detectron2 around it: these names are the neck's all the same.
OF_NECKS = ("fpn1.", "fpn2.", "fpn3.", "fpn4.", "simfp_")
ENCODERS = ("backbone.", "net.")


class Decoder(nn.Module):
    """The decoding half of a published segmentation model.

    Args:
        decode_head: The head.
        auxiliary_head: The head that takes part in training only, an `nn.ModuleList` of several, or None.
        neck: What stands between encoder and heads, or None.
    """

    def __init__(self, decode_head: nn.Module, auxiliary_head: nn.Module | None, neck: nn.Module | None) -> None:
        super().__init__()
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head
        self.neck = neck

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the head's logits (B, K, h, w) of a list of maps."""
        logits: Tensor = self.decode_head(maps if self.neck is None else self.neck(maps))
        return logits

    def auxiliary_logits(self, maps: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Return the auxiliary head's logits, a list of them where there are several heads.

        Raises:
            UsageError: There is no auxiliary head.
        """
        if self.auxiliary_head is None:
            raise UsageError("the checkpoint has no auxiliary head")
        levels = maps if self.neck is None else self.neck(maps)
        if isinstance(self.auxiliary_head, nn.ModuleList):
            return [head(levels) for head in self.auxiliary_head]
        logits: Tensor = self.auxiliary_head(levels)
        return logits


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return a decoder with a published state dict in it.

    Args:
        state: Tensors of one head or neck; or of a whole model, under `decode_head.`, `auxiliary_head.` (or
            `auxiliary_head.0.` and on) and `neck.`. The encoder (`backbone.`, detectron2's `net.`) is left out, with a
            warning, but for the neck that BEiT's and MAE's code keep in it.
        **config: What shapes do not tell: `pool_scales`, `in_index`, `up_scale`, `scales`, `dropout_ratio`,
            `resize_factors`; for the parts of a whole model as `auxiliary_in_index` and so on, of several auxiliary
            heads a value for all or a list of one each (`in_index`: 0, 1, 2 … if not given). What they tell
            (`num_classes`, `channels`, `in_channels`) may be given and has to agree. mmsegmentation's configuration
            of the model may be given whole, in its groups `decode_head`, `auxiliary_head` and `neck`.

    Returns:
        Of a single part that part, of several auxiliary heads alone an `nn.ModuleList`; a `Decoder` of a whole model,
        and of all that has a `decode_head.`.

    Raises:
        UsageError: No known decoder, unknown settings, or tensors missing or left over.
    """
    config = _flat(config)
    parts, bare, left = _taken_apart(state)
    if bare and (others := [name for part in parts.values() for name in part] + left):
        names = ", ".join(bare[:6]) + (f" and {len(bare) - 6} more" if len(bare) > 6 else "")
        raise UsageError(f"unexpected: {names}; beside {others[0]}, a decoder's tensors begin with {', '.join(PARTS)}")
    if not parts:
        return load_part({name: state[name] for name in bare or state}, config)
    if left:
        warnings.warn(f"{len(left)} tensors of the backbone are left out: only decoders are loaded here", stacklevel=4)
    if "decode_head" not in parts:
        if len(parts) > 1:
            raise UsageError("the checkpoint has a neck and an auxiliary head and no decode_head")
        (name,) = parts
        return _build(name, parts, state, {k.removeprefix(PARTS[name]): v for k, v in config.items()}).eval()
    settings: dict[str, dict[str, Any]] = {name: {} for name in PARTS}
    for key, value in config.items():
        name = next((name for name, start in PARTS.items() if start and key.startswith(start)), "decode_head")
        if name not in parts:
            raise UsageError(f"{key} is given and the checkpoint has no {name}")
        settings[name][key.removeprefix(PARTS[name])] = value
    modules = {name: _build(name, parts, state, settings[name]) for name in parts}
    return Decoder(modules["decode_head"], modules.get("auxiliary_head"), modules.get("neck")).eval()


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings taken out of the groups of a model's configuration; those of the encoder are left out."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key in PARTS and isinstance(value, Mapping):
            flat |= {PARTS[key] + name: content for name, content in value.items()}
        elif key == "auxiliary_head" and isinstance(value, Sequence):
            names = dict.fromkeys(name for head in value for name in head)
            flat |= {PARTS[key] + name: [head.get(name) for head in value] for name in names}
        elif key not in (*PARTS, "backbone", "pretrained", "type", "train_cfg", "test_cfg", "data_preprocessor"):
            flat[key] = value
    return flat


def _taken_apart(state: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, str]], list[str], list[str]]:
    """Return the names of each part (those in the part by those in the checkpoint), of no part, and of the encoder."""
    parts: dict[str, dict[str, str]] = {}
    bare, left = [], []
    for name in state:
        first, _, rest = name.partition(".")
        inside = name.removeprefix("backbone.").removeprefix("net.")
        if first in PARTS:
            parts.setdefault(first, {})[name] = rest
        elif inside.startswith(OF_NECKS):
            parts.setdefault("neck", {})[name] = inside
        elif name.startswith(ENCODERS):
            left.append(name)
        else:
            bare.append(name)
    neck = parts.get("neck", {})
    starts = {name.removesuffix(inside) for name, inside in neck.items()}
    if len(starts) > 1:
        raise UsageError(f"the checkpoint has necks under {' and '.join(sorted(map(repr, starts)))}; give one of them")
    return parts, bare, left


def _build(
    name: str, parts: Mapping[str, Mapping[str, str]], state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> nn.Module:
    """Return a part; several auxiliary heads as an `nn.ModuleList`."""
    inside = {rest: state[whole] for whole, rest in parts[name].items()}
    whole, rest = next(iter(parts[name].items()))
    prefix = whole.removesuffix(rest)
    if name != "auxiliary_head" or not all(rest.partition(".")[0].isdigit() for rest in inside):
        return load_part(inside, config, prefix)
    heads: dict[int, dict[str, Tensor]] = {}
    for rest, tensor in inside.items():
        number, _, inner = rest.partition(".")
        heads.setdefault(int(number), {})[inner] = tensor
    if missing := sorted(set(range(max(heads))) - set(heads)):
        raise UsageError(f"missing: {prefix}{missing[0]}.*")
    for key, value in config.items():
        if isinstance(value, (list, tuple)) and len(value) != len(heads):
            raise UsageError(f"auxiliary_{key} has {len(value)} values for {len(heads)} heads; give one each, or one")
    return nn.ModuleList(
        load_part(
            heads[number],
            {key: value[number] if isinstance(value, (list, tuple)) else value for key, value in config.items()},
            f"{prefix}{number}.",
            in_index=number,
        )
        for number in range(len(heads))
    )
