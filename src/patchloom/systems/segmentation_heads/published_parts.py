"""One head or neck of a published segmentation model: which it is, and what its shapes tell.

The names of the tensors tell which decoder it is, their shapes nearly all else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from patchloom.errors import UsageError
from patchloom.models.published import fill, has
from patchloom.models.published_settings import Settings
from patchloom.segment.heads import BNHead, FCNHead, LinearHead, SETRUPHead
from patchloom.segment.necks import MultiLevelNeck, SimpleFeaturePyramid, ViTNeck
from patchloom.segment.upernet import UPerHead

# What a name begins with that only this decoder has; the first that fits counts.
TELLS = {
    "upernet": ("psp_modules.", "fpn_convs.", "fpn_bottleneck.", "bottleneck."),
    "setr_pup": ("up_convs.",),
    "simple_fpn": ("simfp_",),
    "beit_neck": ("fpn1.", "fpn2."),
    "multi_level_neck": ("lateral_convs.",),
    "fcn": ("convs.", "conv_cat."),
    "bn": ("bn.",),
    "linear": ("conv_seg.",),
}
# What shapes do not tell.
UNTOLD = {
    "upernet": ("dropout", "pool_scales", "in_index"),
    "setr_pup": ("dropout", "up_scale", "in_index"),
    "multi_level_neck": ("scales",),
    "simple_fpn": ("top",),
    "beit_neck": (),
    "fcn": ("dropout", "in_index"),
    "bn": ("dropout", "resize_factors", "in_index"),
    "linear": ("dropout", "dropout_first", "in_index"),
}
# How the published head joins the maps it takes; None for one map as it is.
JOINED: dict[str, tuple[str | None, ...]] = {
    "upernet": ("multiple_select",),
    "setr_pup": (None,),
    "fcn": (None, "resize_concat"),
    "bn": (None, "resize_concat"),
    "linear": (None, "resize_concat"),
}
OTHER_NAMES = {"num_labels": "num_classes", "hidden_size": "channels", "dropout_ratio": "dropout"}
# Settings of mmsegmentation's heads that concern training, or that it is built with.
IDLE = (
    *("type", "norm_cfg", "conv_cfg", "act_cfg", "init_cfg", "loss_decode", "ignore_index", "sampler", "threshold"),
    *("train_cfg", "test_cfg", "num_outs", "use_batchnorm", "use_cls_token", "enforce_decoder_input_project"),
)
# Spellings of transformers (UPerNet) and of DINOv3's evaluation, in mmsegmentation's; and what they are known by.
DIALECTS = (
    ((".batch_norm.", "classifier."), {".batch_norm.": ".bn.", "classifier.": "conv_seg."}),
    (("batchnorm_layer.",), {"batchnorm_layer.": "norm.", "conv.": "conv_seg."}),
    (("cls_seg.",), {"cls_seg.": "conv_seg."}),
)


class Part:
    """The tensors of one head or neck, under mmsegmentation's names.

    Args:
        state: Tensors without what stands in front of their names.
        prefix: What stands there in the checkpoint; messages speak of its names.
    """

    def __init__(self, state: Mapping[str, Tensor], prefix: str = "") -> None:
        self.prefix = prefix
        self.dialects = [
            spellings for marks, spellings in DIALECTS if any(mark in name for name in state for mark in marks)
        ]
        self.names = {self._ours(name): name for name in state}
        self.state = {ours: state[name] for ours, name in self.names.items()}

    def published(self, name: str) -> str:
        """Return the name a tensor has, or would have, in the checkpoint."""
        if name not in self.names:
            for spellings in self.dialects:
                name = _replaced(name, {ours: theirs for theirs, ours in spellings.items()})
        return self.prefix + self.names.get(name, name)

    def kernel(self, name: str) -> tuple[int, ...]:
        """Return the shape (out, in, h, w) of a convolution's weight.

        Raises:
            UsageError: It is missing, or of another number of axes.
        """
        if name not in self.state:
            raise UsageError(f"missing: {self.published(name)}")
        shape = tuple(self.state[name].shape)
        if len(shape) != 4:
            raise UsageError(f"{self.published(name)} has the shape {shape}; the weight of a convolution has four axes")
        return shape

    def count(self, *lists: str) -> int:
        """Return how many modules the longest of some lists has, by the highest number in the names."""
        numbers = [
            int(name.split(".")[1])
            for name in self.state
            if name.split(".")[0] in lists and name.split(".")[1].isdigit()
        ]
        return 1 + max(numbers, default=-1)

    def _ours(self, name: str) -> str:
        for spellings in self.dialects:
            name = _replaced(name, spellings)
        return name


def load_part(
    state: Mapping[str, Tensor], config: Mapping[str, Any], prefix: str = "", in_index: int | None = None
) -> nn.Module:
    """Return one head or neck.

    Args:
        state: Its tensors, without what stands in front of their names.
        config: Settings under published names.
        prefix: What stands in front of the names in the checkpoint.
        in_index: Which map a head of one map takes where the settings do not tell.

    Raises:
        UsageError: No known decoder, unknown or contradicting settings, or tensors missing or left over.
    """
    part = Part(state, prefix)
    kind = next((kind for kind, tells in TELLS.items() if has(part.state, *tells)), None)
    if kind is None:
        names = ", ".join(prefix + name for name in list(state)[:4])
        raise UsageError(f"the checkpoint has no tensor of a known decoder; it has {names}")
    inferred = _inferred(kind, part)
    given = _given(kind, config, inferred)
    if in_index is not None and kind in ("fcn", "setr_pup"):
        given.setdefault("in_index", in_index)
    module = _build(kind, {**inferred, **given}, part)
    counters = [name for name in module.state_dict() if name.endswith("num_batches_tracked")]
    return fill(module, part.state, may_lack=counters, published=part.published).eval()


def _replaced(name: str, spellings: Mapping[str, str]) -> str:
    """Return a name in other words: those that begin with a dot anywhere, others at its beginning."""
    for old, new in spellings.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
        if old.startswith(".") and old in name:
            return name.replace(old, new, 1)
    return name


def _given(kind: str, config: Mapping[str, Any], inferred: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings under our names, checked against what the tensors tell and what the heads here do."""
    given = {OTHER_NAMES.get(name, name): value for name, value in config.items()}
    # Of the norm over all maps only their sum is known.
    if kind in ("bn", "linear", "fcn") and isinstance(widths := given.get("in_channels"), Sequence):
        given["in_channels"] = sum(widths)
    fixed: dict[str, tuple[Any, ...]] = {"align_corners": (False,), "dilation": (1,)} if kind in JOINED else {}
    obeyed = (*UNTOLD[kind], *(("input_transform",) if kind in JOINED else ()))
    settings = Settings(obeyed=obeyed, idle=IDLE, fixed=fixed, other_names=OTHER_NAMES).settle(given, inferred)
    # None is a choice here: all maps, or one as it is.
    chosen_none = {name: None for name in obeyed if name in given and given[name] is None}
    given = {name: value for name, value in given.items() if name in inferred} | settings | chosen_none
    if "input_transform" in given and (joined := given.pop("input_transform")) not in JOINED[kind]:
        known = " or ".join(map(str, JOINED[kind]))
        raise UsageError(f"input_transform={joined!r} does not go with this head; it is {known}")
    if kind == "setr_pup" and not isinstance(given.get("in_index", -1), int):
        raise UsageError(f"SETR's head takes one map; in_index is {given['in_index']}")
    if kind == "upernet" and given.get("in_index") is not None:
        chosen, levels = given["in_index"], len(inferred["in_channels"])
        if isinstance(chosen, int) or len(chosen) != levels:
            raise UsageError(f"UPerNet takes {levels} maps here; in_index is {chosen}")
    return given


def _inferred(kind: str, part: Part) -> dict[str, Any]:
    """Return the arguments that tensors tell."""
    if kind in ("multi_level_neck", "simple_fpn", "beit_neck"):
        return _inferred_for_neck(kind, part)
    classes, channels, *_ = part.kernel("conv_seg.weight")
    inferred: dict[str, Any] = {"num_classes": classes, "channels": channels}
    if kind == "upernet":
        levels = part.count("lateral_convs", "fpn_convs")
        widths = [part.kernel(f"lateral_convs.{level}.conv.weight")[1] for level in range(levels)]
        return inferred | {"in_channels": [*widths, part.kernel("psp_modules.0.1.conv.weight")[1]]}
    if kind == "setr_pup":
        _, width, side, _ = part.kernel("up_convs.0.0.conv.weight")
        return inferred | {"in_channels": width, "kernel_size": side, "num_convs": part.count("up_convs")}
    if kind == "fcn":
        concat = has(part.state, "conv_cat.")
        if not (convs := part.count("convs")):
            # No convolution but the joining one, which sees the map twice.
            _, joined, side, _ = part.kernel("conv_cat.conv.weight")
            width = joined - channels
        else:
            _, width, side, _ = part.kernel("convs.0.conv.weight")
        return inferred | {"in_channels": width, "kernel_size": side, "num_convs": convs, "concat_input": concat}
    return inferred | {"in_channels": channels}


def _inferred_for_neck(kind: str, part: Part) -> dict[str, Any]:
    if kind == "simple_fpn":
        return {"embed_dim": part.kernel("simfp_2.0.weight")[0], "out_channels": part.kernel("simfp_4.0.weight")[0]}
    if kind == "beit_neck":
        return {"embed_dim": part.kernel("fpn1.0.weight")[0]}
    levels = part.count("lateral_convs")
    if levels > 1:  # a single map may serve all levels
        levels = max(levels, part.count("convs"))
    kernels = [part.kernel(f"lateral_convs.{level}.conv.weight") for level in range(levels)]
    return {"in_channels": [width for _, width, *_ in kernels], "out_channels": kernels[0][0]}


def _build(kind: str, arguments: dict[str, Any], part: Part) -> nn.Module:
    """Return the decoder, untrained."""
    if kind == "upernet":
        scales = arguments.setdefault("pool_scales", (1, 2, 3, 6))
        if (count := part.count("psp_modules")) != len(scales):
            raise UsageError(f"the checkpoint pools at {count} scales; give pool_scales with as many")
        return UPerHead(**arguments)
    if kind == "setr_pup":
        return SETRUPHead(**{"up_scale": 2 if arguments["num_convs"] > 1 else 4, **arguments})
    if kind == "fcn":
        return FCNHead(**arguments)
    if kind == "multi_level_neck":
        scales = arguments.setdefault("scales", (4, 2, 1, 0.5))
        if (count := part.count("convs")) > len(scales):
            raise UsageError(f"the checkpoint makes {count} levels; give scales with as many")
        return MultiLevelNeck(**arguments)
    if kind == "simple_fpn":
        return SimpleFeaturePyramid(**arguments)
    if kind == "beit_neck":
        # Maps of stride 8 are a convolution nearer to stride 4.
        return ViTNeck("beit", **arguments, stride=16 if has(part.state, "fpn1.1.", "fpn1.3.", "fpn2.") else 8)
    arguments.pop("channels")  # in front of the classifier, and so those of the maps
    if kind == "bn":
        return BNHead(**arguments)
    norm = "none" if not has(part.state, "norm.") else "bn" if has(part.state, "norm.running_") else "ln"
    return LinearHead(**{"norm": norm, "dropout_first": norm == "bn", **arguments})
