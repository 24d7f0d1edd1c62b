"""Published decoders: mmsegmentation's and transformers' UPerNet and FCN heads, DINOv2's and DINOv3's, SETR's, necks.

The names of the tensors tell which decoder it is, their shapes nearly all else (specification `segmentation_heads`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from patchloom.errors import UsageError, unknown_name
from patchloom.reference.state import agree, check_settings, fill
from patchloom.segment.heads import BNHead, FCNHead, LinearHead, SETRUPHead
from patchloom.segment.necks import MultiLevelNeck, SimpleFeaturePyramid, ViTNeck
from patchloom.segment.upernet import UPerHead

# Spellings of transformers (UPerNet) and of DINOv3's evaluation.
SPELLINGS = {
    ".batch_norm.": ".bn.",
    "classifier.": "conv_seg.",
    "batchnorm_layer.": "norm.",
    "cls_seg.": "conv_seg.",
}
# A tensor that only this decoder has; the first that fits counts.
TELLS = {
    "upernet": "psp_modules.0.1.conv.weight",
    "setr_pup": "up_convs.0.0.conv.weight",
    "multi_level_neck": "lateral_convs.0.conv.bias",
    "simple_fpn": "simfp_2.0.weight",
    "beit_neck": "fpn1.0.weight",
    "fcn": "convs.0.conv.weight",
    "bn": "bn.weight",
    "linear": "conv_seg.weight",
}
# What shapes do not tell.
UNTOLD = {
    "upernet": ("dropout", "pool_scales"),
    "setr_pup": ("dropout", "up_scale", "in_index"),
    "multi_level_neck": ("scales",),
    "simple_fpn": ("top",),
    "beit_neck": (),
    "fcn": ("dropout", "in_index"),
    "bn": ("dropout", "resize_factors"),
    "linear": ("dropout", "dropout_first"),
}
PARTS = ("neck", "decode_head", "auxiliary_head")


class Decoder(nn.Module):
    """The decoding half of a published segmentation model.

    Args:
        decode_head: The head.
        auxiliary_head: The head that takes part in training only, or None.
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

    def auxiliary_logits(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the auxiliary head's logits.

        Raises:
            UsageError: There is no auxiliary head.
        """
        if self.auxiliary_head is None:
            raise UsageError("the checkpoint has no auxiliary head")
        logits: Tensor = self.auxiliary_head(maps if self.neck is None else self.neck(maps))
        return logits


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return a decoder with a published state dict in it.

    Args:
        state: Tensors of one head or neck; or of a whole model, under `decode_head.`, `auxiliary_head.` and `neck.`.
            An encoder in it (`backbone.`) is left out, with a warning.
        **config: What shapes do not tell: `pool_scales`, `in_index`, `up_scale`, `scales`, `dropout`,
            `resize_factors`; for the parts of a whole model as `auxiliary_in_index` and so on. What they tell
            (`num_classes`, `channels`, `in_channels`) may be given and has to agree.

    Returns:
        The head or neck; of a whole model a `Decoder`.

    Raises:
        UsageError: No known decoder, unknown settings, or tensors missing or left over.
    """
    if not any(name.startswith(("decode_head.", "auxiliary_head.")) for name in state):
        return _part(state, config)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    left = []
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part in parts:
            parts[part][rest] = tensor
        elif part == "backbone":
            left.append(name)
        else:
            raise UsageError(f"unexpected: {name}; a decoder's tensors begin with {', '.join(PARTS)}")
    if left:
        warnings.warn(f"{len(left)} tensors of the backbone are left out: only decoders are loaded here", stacklevel=4)
    if not parts["decode_head"]:
        raise UsageError("the checkpoint has an auxiliary head and no decode_head")
    auxiliary = {k.removeprefix("auxiliary_"): v for k, v in config.items() if k.startswith("auxiliary_")}
    of_neck = {k.removeprefix("neck_"): v for k, v in config.items() if k.startswith("neck_")}
    own = {k: v for k, v in config.items() if not k.startswith(("auxiliary_", "neck_"))}
    return Decoder(
        _part(parts["decode_head"], own),
        _part(parts["auxiliary_head"], auxiliary) if parts["auxiliary_head"] else None,
        _part(parts["neck"], of_neck) if parts["neck"] else None,
    ).eval()


def _part(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """Return one head or neck."""
    state = {_spelled(name, state): tensor for name, tensor in state.items()}
    kind = next((kind for kind, tell in TELLS.items() if tell in state), None)
    if kind is None:
        raise UsageError(f"the checkpoint has no tensor of a known decoder; it has {', '.join(list(state)[:4])}")
    told = _told(kind, state)
    given = {("num_classes" if name == "num_labels" else name): value for name, value in config.items()}
    check_settings(given, (*UNTOLD[kind], *told))
    agree(given, told)
    arguments = {**told, **given}
    counters = [name.removesuffix("running_mean") + "num_batches_tracked" for name in state if "running_mean" in name]
    return fill(_made(kind, arguments, state), state, may_lack=counters).eval()


def _spelled(name: str, state: Mapping[str, Tensor]) -> str:
    """Return a tensor's name in mmsegmentation's spelling."""
    name = name.removeprefix("net.") if name.startswith("net.simfp") else name
    if "batchnorm_layer.weight" in state and name.startswith("conv."):
        return name.replace("conv.", "conv_seg.", 1)
    for theirs, ours in SPELLINGS.items():
        if theirs in name and (theirs.startswith(".") or name.startswith(theirs)):
            name = name.replace(theirs, ours, 1)
    return name


def _told(kind: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments that tensors tell."""
    shape = {name: tuple(tensor.shape) for name, tensor in state.items()}
    told: dict[str, Any] = {}
    if "conv_seg.weight" in shape:
        told["num_classes"] = shape["conv_seg.weight"][0]
    if kind == "upernet":
        levels = _count(state, "lateral_convs.{}.conv.weight")
        widths = [shape[f"lateral_convs.{level}.conv.weight"][1] for level in range(levels)]
        told |= {
            "in_channels": [*widths, shape[TELLS[kind]][1]],
            "channels": shape[TELLS[kind]][0],
        }
    elif kind == "setr_pup":
        told |= {
            "in_channels": shape[TELLS[kind]][1],
            "channels": shape[TELLS[kind]][0],
            "kernel_size": shape[TELLS[kind]][2],
            "num_convs": _count(state, "up_convs.{}.0.conv.weight"),
        }
    elif kind == "fcn":
        told |= {
            "in_channels": shape[TELLS[kind]][1],
            "channels": shape[TELLS[kind]][0],
            "num_convs": _count(state, "convs.{}.conv.weight"),
            "concat_input": "conv_cat.conv.weight" in shape,
        }
    elif kind == "multi_level_neck":
        levels = _count(state, "lateral_convs.{}.conv.weight")
        told |= {
            "in_channels": [shape[f"lateral_convs.{level}.conv.weight"][1] for level in range(levels)],
            "out_channels": shape["lateral_convs.0.conv.weight"][0],
        }
    elif kind == "simple_fpn":
        told |= {"embed_dim": shape["simfp_2.0.weight"][0], "out_channels": shape["simfp_4.0.weight"][0]}
    elif kind == "beit_neck":
        told |= {"embed_dim": shape["fpn1.0.weight"][0]}
    else:
        told |= {"in_channels": shape["conv_seg.weight"][1]}
    return told


def _made(kind: str, arguments: dict[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    if kind == "upernet":
        scales = arguments.setdefault("pool_scales", (1, 2, 3, 6))
        if (count := _count(state, "psp_modules.{}.1.conv.weight")) != len(scales):
            raise UsageError(f"the checkpoint pools at {count} scales; give pool_scales with as many")
        return UPerHead(**arguments)
    if kind == "setr_pup":
        return SETRUPHead(**{"up_scale": 2 if arguments["num_convs"] > 1 else 4, **arguments})
    if kind == "fcn":
        return FCNHead(**arguments)
    if kind == "bn":
        return BNHead(**arguments)
    if kind == "linear":
        normed = "norm.weight" in state
        kinds = "bn" if "norm.running_mean" in state else "ln"
        return LinearHead(**{"norm": kinds if normed else "none", "dropout_first": kinds == "bn", **arguments})
    if kind == "multi_level_neck":
        return MultiLevelNeck(**arguments)
    if kind == "simple_fpn":
        return SimpleFeaturePyramid(**arguments)
    if kind == "beit_neck":
        return ViTNeck("beit", **arguments)
    raise unknown_name("decoder", kind, TELLS)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    number = 0
    while pattern.format(number) in state:
        number += 1
    return number
