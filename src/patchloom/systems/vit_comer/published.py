"""Published ViT-CoMer checkpoints: backbones for segmentation and for detection, and whole UPerNets.

Xia et al. 2024 (arXiv 2403.07392), github.com/Traffic-X/ViT-CoMer. The two versions of its code have the same names;
they differ in the width of the receptive-field pyramids and in which of the ViT's tokens are added to the maps.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from patchloom.encoders import create_encoder
from patchloom.errors import UsageError, unknown_name
from patchloom.models.published import fill, has, require
from patchloom.models.published_settings import Hidden, Settings, name_of
from patchloom.segment.pyramid_backbone import SegmentationModel
from patchloom.systems.segmentation_heads import published as segmentation_heads
from patchloom.systems.vit_comer.model import STRIDE, ViTCoMer
from patchloom.systems.vit_comer.presets import PRESETS

FLAVOURS = {"segmentation": "per_stage", "detection": "last"}
"""Versions of the published code, and which of the ViT's tokens each adds to the maps."""
HEADS = ("decode_head.", "auxiliary_head.")
OF_DETECTORS = ("neck.", "rpn_head.", "roi_head.")
OF_ENCODER = re.compile(r"pos_embed|patch_embed\.|blocks\.")
# What a plain ViT has behind its blocks, or in front of its patches, takes no part.
IDLE = re.compile(r"(cls_token|(norm|head)\.(weight|bias))$")
GAMMAS = {".gamma1": ".ls1.gamma", ".gamma2": ".ls2.gamma"}
SWITCHES = ("use_CTI_toV", "use_CTI_toC", "cnn_feature_interaction")
SETTINGS = Settings(
    obeyed=(
        *("num_heads", "interaction_indexes", "deform_num_heads", "n_points", "add_vit_feature", "flavour"),
        *("vit_features", "window_attn", "window_size", "drop_path"),
    ),
    idle=(
        *("init_values", "with_cp", "drop_rate", "attn_drop_rate", "img_size", "pretrained", "init_cfg", "type"),
        *("norm_layer", "norm_cfg", "weight_init", "num_classes", "pretrained_type", "freeze_vit"),
    ),
    fixed={"with_cffn": (True,), "act_layer": ("gelu",), "qk_scale": (None,)},
    other_names={
        "drop_path_rate": "drop_path",
        "conv_width": "conv_inplane",
        "num_points": "n_points",
        "deform_heads": "deform_num_heads",
        "mrfp_ratio": "dim_ratio",
        "use_to_vit": "use_CTI_toV",
        "use_to_cnn": "use_CTI_toC",
        "cnn_interaction": "cnn_feature_interaction",
        "num_extra": "extra_num",
        "vit_feature_source": "vit_features",
        "flavor": "flavour",
    },
    read={"act_layer": name_of},
)


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return a published ViT-CoMer.

    Args:
        state: Tensors of a backbone, bare or under `backbone.`; of a segmentation model with its heads
            (`decode_head.`, `auxiliary_head.`); or of a detector, of which the backbone is taken, with a warning.
        **config: What shapes do not tell: `flavour` (`segmentation`, `detection`, or `auto`: as the heads in the file
            or else the width of the receptive-field pyramids tell, which is said), or `vit_features` (`per_stage`,
            `last`) itself; `num_heads` (default: 64 wide each), `n_points` (4) or `deform_num_heads`,
            `interaction_indexes` (four equal stages), `window_attn` and `window_size` (none), `add_vit_feature` (True),
            `drop_path_rate`. `preset`, one of `PRESETS`, stands in for what is not given and is checked against the
            tensors. Settings of heads as for `segmentation_heads`. A model's whole configuration may be given, in its
            groups `backbone`, `decode_head` and `auxiliary_head`; what tensors tell has to agree.

    Returns:
        `ViTCoMer`: images to four maps; with heads a `SegmentationModel`: images to logits.

    Raises:
        UsageError: Unknown or contradicting settings, or tensors missing or left over.
    """
    heads = {name: value for name, value in state.items() if name.startswith(HEADS)}
    detector = [name for name in state if name.startswith(OF_DETECTORS)]
    rest = {
        name.removeprefix("backbone."): value
        for name, value in state.items()
        if not name.startswith((*HEADS, *OF_DETECTORS)) and not IDLE.match(name.removeprefix("backbone."))
    }
    if detector:
        warnings.warn(f"{len(detector)} tensors of the detector behind the backbone are left out", stacklevel=4)
    require(rest, "patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "spm.stem.0.weight")
    inferred = _inferred(rest)
    of_backbone, of_heads = _parted(dict(config), inferred)
    if of_heads and not heads:
        raise UsageError(f"{next(iter(of_heads))} is given, and the checkpoint has no head it could be for")
    if "flavour" not in of_backbone or of_backbone["flavour"] in (None, "auto"):
        of_backbone["flavour"] = _flavour(heads, detector, inferred, of_backbone)
    backbone = _backbone(rest, of_backbone, inferred)
    if not heads:
        return backbone.eval()
    return SegmentationModel(backbone, segmentation_heads.load(heads, **of_heads)).eval()


def _parted(config: dict[str, Any], inferred: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of the backbone, on top of those of a preset, and those of the heads."""
    known = {*SETTINGS.obeyed, *SETTINGS.idle, *SETTINGS.fixed, *SETTINGS.other_names, *inferred}
    around = ("train_cfg", "test_cfg", "data_preprocessor", "pretrained", "type", "init_cfg")
    preset = config.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise unknown_name("preset", str(preset), PRESETS)
    given: dict[str, Any] = dict(config.pop("backbone", None) or {})
    heads: dict[str, Any] = {}
    for name, value in config.items():
        if name in ("decode_head", "auxiliary_head") or (name not in known and name not in around):
            heads[name] = value
        elif name not in around:
            given[name] = value
    ours = SETTINGS.renamed(given)
    return {**SETTINGS.renamed(PRESETS[preset] if preset else {}), **ours}, heads


def _inferred(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the tensors tell."""
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    stages = _count(state, "interactions")
    if not stages:
        raise UsageError("missing: interactions.0.*; the checkpoint has a ViT and none of what ViT-CoMer adds to it")
    last = f"interactions.{stages - 1}."
    extra = _count(state, f"{last}extra_CTIs")

    def rows(ending: str) -> int | None:
        return next(
            (len(value) for name, value in state.items() if re.match(rf"interactions\..*\b{ending}$", name)), None
        )

    def ratio(ending: str) -> Hidden | None:
        found = rows(re.escape(ending))
        return None if found is None else Hidden(width, found)

    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    if side**2 != state["pos_embed"].shape[1] - 1:
        raise UsageError(
            f"pos_embed has {state['pos_embed'].shape[1]} rows; the published table has one for the class token and "
            f"those of a square grid"
        )
    interacts = [
        has(state, f"interactions.{n}.cti_toc.cfinter.")
        or (n == stages - 1 and has(state, f"{last}extra_CTIs.0.cfinter."))
        for n in range(stages)
    ]
    return {
        "embed_dim": width,
        "in_chans": channels,
        "patch_size": patch,
        "depth": _count(state, "blocks"),
        "pretrain_size": side * patch,
        "mlp_ratio": Hidden(width, len(state["blocks.0.mlp.fc1.weight"])),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "layer_scale": "blocks.0.gamma1" in state,
        "conv_inplane": len(state["spm.stem.0.weight"]),
        "dim_ratio": ratio("mrfp.fc1.weight"),
        "cffn_ratio": ratio("ffn.fc1.weight"),
        "deform_ratio": ratio("attn.value_proj.weight"),
        "deform_rows": rows(r"attn\.attention_weights\.weight"),
        "stages": stages,
        "use_CTI_toV": [has(state, f"interactions.{n}.cti_tov.") for n in range(stages)],
        "use_CTI_toC": [has(state, f"interactions.{n}.cti_toc.") for n in range(stages)],
        "cnn_feature_interaction": interacts,
        "use_extra_CTI": extra > 0,
        "extra_num": extra or None,
    }


def _flavour(
    heads: Mapping[str, Tensor], detector: Sequence[str], inferred: Mapping[str, Any], config: Mapping[str, Any]
) -> str:
    """Return which version of the published code a checkpoint is of; where that is a guess, it is said."""
    if heads or detector:
        return "segmentation" if heads else "detection"
    if config.get("vit_features") is not None or config.get("add_vit_feature") is False:
        return "segmentation"  # they differ in nothing else
    middle = inferred["dim_ratio"]
    found = "detection" if middle is not None and middle.hidden == int(0.5 * middle.width) else "segmentation"
    print(
        f"ViT-CoMer: taken for a backbone of the published {found} code, by the width of its receptive-field pyramids; "
        f"flavour=segmentation or flavour=detection says it",
        file=sys.stderr,
    )
    return found


def _backbone(state: dict[str, Tensor], config: dict[str, Any], inferred: Mapping[str, Any]) -> ViTCoMer:
    for name in SWITCHES:
        if isinstance(config.get(name), (bool, int)):
            config[name] = [bool(config[name])] * inferred["stages"]
    if isinstance(flags := config.get("cnn_feature_interaction"), (list, tuple)) and len(flags) == inferred["stages"]:
        # Of a stage without an exchange towards the CNN, tensors do not tell.
        told_of = [*inferred["use_CTI_toC"][:-1], inferred["use_CTI_toC"][-1] or inferred["use_extra_CTI"]]
        tensors = zip(flags, told_of, inferred["cnn_feature_interaction"], strict=True)
        config["cnn_feature_interaction"] = [flag if told else found for flag, told, found in tensors]
    told = {name: value for name, value in inferred.items() if name not in ("stages", "deform_rows")}
    settings = SETTINGS.settle(config, told)
    if inferred["patch_size"] != STRIDE:
        raise UsageError(f"patches of {inferred['patch_size']} pixels; all published models have {STRIDE}")
    if settings["flavour"] not in FLAVOURS:
        raise unknown_name("flavour", str(settings["flavour"]), (*FLAVOURS, "auto"))
    width, depth = inferred["embed_dim"], inferred["depth"]
    num_heads = int(settings.get("num_heads") or max(1, width // 64))
    if width % num_heads:
        raise UsageError(f"num_heads={num_heads} does not divide the width of {width}")
    deform_heads, points = _deformable(settings, inferred["deform_rows"])
    encoder = create_encoder(
        "vit_base_patch16_224",
        image_size=inferred["pretrain_size"],
        in_chans=inferred["in_chans"],
        drop_path=float(settings.get("drop_path") or 0.0),
        embed_dim=width,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=inferred["mlp_ratio"].ratio,
        qkv_bias=inferred["qkv_bias"],
        init_values=1.0 if inferred["layer_scale"] else None,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        final_norm=False,
    )
    vit_features: Any = settings.get("vit_features") or FLAVOURS[settings["flavour"]]
    ratios = {name: hidden.ratio for name in ("cffn_ratio", "deform_ratio") if (hidden := inferred[name]) is not None}
    middle = inferred["dim_ratio"]
    model = ViTCoMer(
        encoder,
        settings.get("interaction_indexes"),
        conv_width=inferred["conv_inplane"],
        deform_heads=deform_heads,
        num_points=points,
        mrfp_ratio=middle.ratio if middle is not None else 6.0,
        use_to_vit=inferred["use_CTI_toV"],
        use_to_cnn=inferred["use_CTI_toC"],
        cnn_interaction=inferred["cnn_feature_interaction"],
        num_extra=inferred["extra_num"] or 0,
        window_size=_windows(settings, depth),
        vit_features=vit_features if settings.get("add_vit_feature", True) else None,
        drop_path=float(settings.get("drop_path") or 0.0),
        **ratios,
    )
    unused = _unused(inferred)
    ours = {_our_name(name): value for name, value in state.items() if not unused.match(name)}
    ours["encoder.pos_embed"] = ours["encoder.pos_embed"][:, 1:]
    counters = [name for name in model.state_dict() if name.endswith("num_batches_tracked")]
    fill(model, ours, may_lack=counters, published=_published_name)
    return model


def _deformable(settings: Mapping[str, Any], rows: int | None) -> tuple[int, int]:
    """Return heads and points of deformable attention, of whose product with three levels there are so many rows."""
    heads, points = settings.get("deform_num_heads"), settings.get("n_points")
    if rows is None:
        return int(heads or 1), int(points or 4)
    heads = int(heads) if heads else rows // (3 * int(points or 4))
    points = int(points) if points else rows // (3 * max(1, heads))
    if heads * points * 3 != rows:
        raise UsageError(
            f"{rows} weights of deformable attention are not 3 maps times {heads} heads times {points} points; give "
            f"deform_num_heads and n_points"
        )
    return heads, points


def _windows(settings: Mapping[str, Any], depth: int) -> list[int | None] | None:
    """Return the side of each block's windows; `window_attn` says which blocks have those of `window_size`."""
    sizes: Any = settings.get("window_size")
    switches: Any = settings.get("window_attn")
    if switches is None:  # a list with gaps in it says both
        given = isinstance(sizes, (list, tuple)) and not all(sizes)
        return list(sizes) if given else None
    sizes = list(sizes) if isinstance(sizes, (list, tuple)) else [sizes or 14] * depth
    switches = list(switches) if isinstance(switches, (list, tuple)) else [switches] * depth
    if len(sizes) != depth or len(switches) != depth:
        raise UsageError(
            f"window_attn has {len(switches)} values, window_size {len(sizes)}, and the checkpoint {depth} blocks"
        )
    return [int(size) if switch and size else None for switch, size in zip(switches, sizes, strict=True)]


def _unused(inferred: Mapping[str, Any]) -> re.Pattern[str]:
    """Return what fits the tensors that the published code makes and never uses."""
    last, parts = inferred["stages"] - 1, [r"(?!)"]
    for number in range(inferred["stages"]):
        if not inferred["use_CTI_toV"][number]:
            parts.append(rf"interactions\.{number}\.mrfp\.")
        if not inferred["cnn_feature_interaction"][number]:
            parts.append(rf"interactions\.{number}\.cti_toc\.(query|feat)_norm\.")
            if number == last:
                parts.append(rf"interactions\.{number}\.extra_CTIs\.\d+\.(query|feat)_norm\.")
    return re.compile("|".join(parts))


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return max((int(match[1]) + 1 for name in state if (match := pattern.match(name))), default=0)


def _our_name(name: str) -> str:
    if not OF_ENCODER.match(name):
        return f"adapter.{name}"
    for published, ours in GAMMAS.items():
        name = name.removesuffix(published) + ours if name.endswith(published) else name
    return f"encoder.{name}"


def _published_name(name: str) -> str:
    name = name.removeprefix("adapter.").removeprefix("encoder.")
    for published, ours in GAMMAS.items():
        name = name.removesuffix(ours) + published if name.endswith(ours) else name
    return name
