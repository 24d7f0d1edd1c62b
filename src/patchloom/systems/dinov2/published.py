"""Published DINOv2 checkpoints: backbones, training checkpoints with heads, and the layout of transformers.

DINOv2's own (arXiv 2304.07193), RAD-DINO's (arXiv 2401.10815) and Phikon-v2's (arXiv 2409.09173). A backbone
becomes a timm `VisionTransformer`; with heads it becomes `Distilled` (one network) or `DINOv2` (student and teacher).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from patchloom.encoders import Encoder, create_encoder
from patchloom.encoders.anysize import DINOV2_RULE, TIMM_RULE, PositionRule, resample_positions, take_any_size
from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError
from patchloom.models.published import fill, require
from patchloom.models.published_settings import Hidden, OneOf, Settings, epsilon_of, name_of, set_epsilon
from patchloom.systems.dinov2.model import DINOHead, DINOv2, Distilled
from patchloom.systems.dinov2.published_names import from_transformers, is_transformers, renamed

# Of the published training, those of the losses; a backbone is told them with the rest of a configuration.
LOSS_SETTINGS = (
    *("centering", "dino_weight", "ibot_weight", "koleo_weight", "student_temp", "center_momentum"),
    *("koleo_topk", "koleo_across", "koleo_group"),
)
OF_HEADS = {
    "head_n_prototypes": "out_dim",
    "head_bottleneck_dim": "bottleneck_dim",
    "head_hidden_dim": "hidden_dim",
    "head_nlayers": "nlayers",
}
SETTINGS = Settings(
    obeyed=(
        *("num_heads", "image_size", "interpolate_offset", "interpolate_antialias", "drop_path", "layer_norm_eps"),
        *LOSS_SETTINGS,
    ),
    idle=(
        *("init_values", "layerscale", "layerscale_value", "drop_path_uniform", "block_chunks", "arch"),
        *("pretrained_weights", "head_norm_last_layer", "norm_last_layer", "global_ignore_diagonal"),
        *("mask_sample_probability", "mask_ratio_min_max", "drop_rate", "attn_drop_rate", "in_dim"),
        *("apply_layernorm", "reshape_hidden_states", "use_mask_token", "out_features", "out_indices", "stage_names"),
        *("img_size_of_training", "teacher_temp", "warmup_teacher_temp", "warmup_teacher_temp_epochs"),
        *("momentum_teacher", "final_momentum_teacher", "act_layer"),
    ),
    fixed={"hidden_act": ("gelu",)},
    other_names={
        **OF_HEADS,
        "dino_loss_weight": "dino_weight",
        "ibot_loss_weight": "ibot_weight",
        "koleo_loss_weight": "koleo_weight",
        "koleo_loss_distributed": "koleo_across",
        "koleo_distributed_loss_group_size": "koleo_group",
        "n_heads": "num_heads",
        "img_size": "image_size",
        "drop_path_rate": "drop_path",
        "norm_layer": "layer_norm_eps",
        # Those of transformers.
        "hidden_size": "embed_dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
        "num_channels": "in_chans",
    },
    sections={
        "dino": {"loss_weight": "dino_weight"},
        "ibot": {"loss_weight": "ibot_weight", **{name: f"ibot_{ours}" for name, ours in OF_HEADS.items()}},
        "student": {},
        "train": {},
        **dict.fromkeys(("MODEL", "compute_precision", "teacher", "optim", "crops", "evaluation", "hydra", "defaults")),
        **dict.fromkeys(("gram", "distillation", "multidistillation", "hrft", "checkpointing", "schedules")),
    },
    read={"layer_norm_eps": epsilon_of, "hidden_act": name_of},
)
# Entries of the training's section that say how it ran.
OF_TRAINING = (
    *("batch_size_per_gpu", "dataset_path", "saveckp_freq", "OFFICIAL_EPOCH_LENGTH", "cache_dataset", "checkpointing"),
    *("train_dataset_str", "val_dataset_str", "nb_knn", "temperature", "gather_on_cpu", "n_per_class_list", "n_tries"),
    *("finetune_dataset_str", "finetune_on_val", "metric_type", "train_features_device", "train_dtype"),
    *("max_train_iters", "data_config", "monitor_gradient_norm", "compile", "cudagraphs"),
)
SETTINGS = replace(SETTINGS, idle=(*SETTINGS.idle, *OF_TRAINING))
OF_BACKBONES = (
    *("patch_size", "embed_dim", "depth", "in_chans", "num_register_tokens", "qkv_bias", "proj_bias", "ffn_bias"),
    *("mlp_ratio", "ffn_layer", "use_swiglu_ffn"),
)
"""What a backbone's tensors tell."""
CENTRES = {"dino_loss.center": "dino_centering.center", "ibot_patch_loss.center": "ibot_centering.center"}
NAMES = {384: "small", 768: "base", 1024: "large"}
IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
MIMIC_CXR = ((0.5307,) * 3, (0.2583,) * 3)


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return our module with a published DINOv2 state dict in it.

    Args:
        state: Tensors under the published names.
        **config: What shapes do not tell: `num_heads` (default: width / 64); `image_size`, a side or (H, W) in pixels
            to set the model up for (default: what the positions are for); `interpolate_offset` and
            `interpolate_antialias`, how positions are resampled to it (default: 0.1 without antialiasing, or, with
            registers, 0 with it; the layout of transformers has no offset); `layer_norm_eps` (1e-6). With student and
            teacher also `centering`, `dino_weight`, `ibot_weight`, `koleo_weight`, `student_temp`. A published
            configuration may be given whole, the training's with its groups or that of transformers: what shapes tell
            has to agree.

    Returns:
        A timm `VisionTransformer` for a backbone, its forward the normed class token, with `mask_token` (1, D) beside
        its weights, which takes images of any size patches fill; a `DINOHead` for a head alone; a `Distilled` for a
        backbone with heads; a `DINOv2` for student and teacher.

    Raises:
        UsageError: Unknown setting, or tensors missing or left over.
    """
    return _load(state, IMAGENET, config)


def load_rad_dino(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return our module with a RAD-DINO state dict in it, normalising as it did; see `load`."""
    return _load(state, MIMIC_CXR, config)


def is_dinov2(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict is of a layout that is read here."""
    return is_transformers(state) or any(name.endswith("patch_embed.proj.weight") for name in state)


def _load(state: Mapping[str, Tensor], statistics: tuple[Any, Any], config: dict[str, Any]) -> nn.Module:
    if is_transformers(state):
        state = from_transformers(state)
        config = _settled(config, state)
        return _encoder(state, config, PositionRule(antialias="register_tokens" in state), statistics)[0]
    state = renamed(state)
    student, teacher = (_part(state, f"{name}.") for name in ("student", "teacher"))
    if student and teacher and _heads(student):
        return _both(state, student, teacher, config, statistics)
    # One network is enough; where there are two without heads, the teacher is what is shipped.
    network = teacher or student or dict(state)
    if not _has_layer_scale(network):  # Phikon's first version: iBOT's teacher comes with its head
        network = {name: value for name, value in network.items() if not name.startswith("head.")}
    if teacher or student:
        _refuse(name for name in state if not name.startswith(("student.", "teacher.", *CENTRES)))
    backbone = _part(network, "backbone.")
    if not _heads(network):
        if "mlp.0.weight" in network or "mlp.weight" in network:
            alone = _head(network)
            _settled(config, None, alone)
            return fill(alone, network).eval()
        if backbone:
            _refuse(name for name in network if not name.startswith("backbone."))
        config = _settled(config, backbone or network)
        return _encoder(backbone or network, config, None, statistics)[0]
    if not backbone:
        raise UsageError("the checkpoint has heads and no backbone; load each head alone, without its prefix")
    return _distilled(network, config, statistics).eval()


def _settled(
    config: Mapping[str, Any],
    backbone: Mapping[str, Tensor] | None,
    head: DINOHead | None = None,
    ibot_head: DINOHead | None = None,
) -> dict[str, Any]:
    """Return the settings to obey, after all were checked against a backbone and heads; None: not there."""
    inferred: dict[str, Any] = dict.fromkeys(OF_BACKBONES) if backbone is None else inferred_from_backbone(backbone)
    # Heads that are not there have settings in a configuration all the same.
    of_heads = ("in_dim", *OF_HEADS.values(), "use_bn", "mlp_bias")
    both = head is not None and backbone is not None
    inferred |= dict.fromkeys((*of_heads, *(f"ibot_{name}" for name in OF_HEADS.values())))
    inferred |= {} if head is None else _shape_of(head)
    inferred |= {} if ibot_head is None else {f"ibot_{name}": _shape_of(ibot_head)[name] for name in OF_HEADS.values()}
    return SETTINGS.settle(config, {**inferred, "separate_head": ibot_head is not None if both else None})


def _refuse(names: Iterable[str]) -> None:
    """Refuse tensors that belong to nothing that is loaded."""
    if left := list(names):
        raise UsageError(f"unexpected: {', '.join(left[:6])}{f' and {len(left) - 6} more' if len(left) > 6 else ''}")


def _both(
    state: Mapping[str, Tensor],
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    config: dict[str, Any],
    statistics: tuple[Any, Any],
) -> nn.Module:
    """Return student and teacher with their losses."""
    networks = {
        name: _distilled(each, config, statistics) for name, each in (("student", student), ("teacher", teacher))
    }
    head, ibot_head = networks["student"].dino_head, networks["student"].ibot_head
    config = _settled(config, _part(student, "backbone."), head, ibot_head)
    model = DINOv2(
        networks["student"].encoder,
        **_widths(head),
        separate_head=ibot_head is not None,
        **{f"ibot_{name}": _widths(ibot_head or head)[name] for name in OF_HEADS.values()},
        rule=networks["student"].rule,
        drop_path=float(config.get("drop_path", 0.0)),
        **{name: config[name] for name in LOSS_SETTINGS if name in config},
    )
    ours = {f"{name}.{inner}": value for name, each in networks.items() for inner, value in each.state_dict().items()}
    rest = {n: v for n, v in state.items() if not n.startswith(("student.", "teacher."))}
    for published, name in CENTRES.items():
        if published in rest:
            ours[name] = rest.pop(published).reshape(1, -1)
    # Sinkhorn-Knopp has no centres, and a file without them goes on from zeros, as training starts.
    return fill(model, {**ours, **rest}, may_lack=CENTRES.values()).eval()


def _distilled(network: Mapping[str, Tensor], config: dict[str, Any], statistics: tuple[Any, Any]) -> Distilled:
    """Return an encoder with its heads."""
    heads = {name: _head(_part(network, f"{name}.")) for name in _heads(network)}
    if "dino_head" not in heads:
        raise UsageError("the checkpoint has an ibot_head and no dino_head")
    backbone = _part(network, "backbone.")
    config = _settled(config, backbone, heads["dino_head"], heads.get("ibot_head"))
    encoder, rule = _encoder(backbone, config, None, statistics)
    distilled = Distilled(encoder, heads["dino_head"], heads.get("ibot_head"), rule)
    mask_token = encoder.mask_token
    del encoder.mask_token  # it stands beside the encoder here
    ours = {f"encoder.{name}": value for name, value in encoder.state_dict().items()} | {"mask_token": mask_token}
    ours |= {name: value for name, value in network.items() if not name.startswith("backbone.")}
    fill(distilled, ours, published=lambda name: name.replace("encoder.", "backbone.", 1))
    return distilled


def _has_layer_scale(state: Mapping[str, Tensor]) -> bool:
    return any(".ls1." in name or ".ls2." in name for name in state)


def _heads(network: Mapping[str, Tensor]) -> list[str]:
    return [name for name in ("dino_head", "ibot_head") if _part(network, f"{name}.")]


def _head(state: Mapping[str, Tensor]) -> DINOHead:
    """Return a fresh head of the shapes in a state dict."""
    v = state.get("last_layer.parametrizations.weight.original1")
    linear = sorted(
        (name for name, value in state.items() if re.fullmatch(r"mlp(\.\d+)?\.weight", name) and value.ndim == 2),
        key=lambda name: int(name.split(".")[1]) if name.count(".") == 2 else 0,
    )
    if v is None or not linear:
        raise UsageError(f"the head lacks its mlp or last_layer; it has {', '.join(list(state)[:4])}")
    return DINOHead(
        state[linear[0]].shape[1],
        len(v),
        hidden_dim=len(state[linear[0]]) if len(linear) > 1 else 1,
        bottleneck_dim=v.shape[1],
        nlayers=len(linear),
        use_bn=any(name.endswith("running_mean") for name in state),
        mlp_bias=linear[0].removesuffix("weight") + "bias" in state,
    )


def _widths(head: DINOHead) -> dict[str, Any]:
    """Return the arguments that make a head of the same shape."""
    layers = [module for module in head.mlp.modules() if isinstance(module, nn.Linear)]
    return {
        "out_dim": head.out_dim,
        "hidden_dim": layers[0].out_features,
        "bottleneck_dim": layers[-1].out_features,
        "nlayers": len(layers),
        "use_bn": any(isinstance(module, nn.BatchNorm1d) for module in head.mlp.modules()),
        "mlp_bias": layers[0].bias is not None,
    }


def _shape_of(head: DINOHead) -> dict[str, Any]:
    """Return the settings that a head tells: of a single layer nothing tells the width of hidden ones."""
    widths = _widths(head)
    layers = [module for module in head.mlp.modules() if isinstance(module, nn.Linear)]
    return {**widths, "hidden_dim": widths["hidden_dim"] if len(layers) > 1 else None, "in_dim": layers[0].in_features}


def inferred_from_backbone(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings that a backbone tells, under the official names.

    Raises:
        UsageError: It is none.
    """
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "cls_token"):
        if name not in state:
            raise UsageError(f"the checkpoint has no {name}, so it is no DINOv2 backbone")
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    gated = "blocks.0.mlp.w12.weight" in state
    require(state, f"blocks.0.mlp.{'w3' if gated else 'fc1'}.weight")
    hidden = state["blocks.0.mlp.w3.weight"].shape[1] if gated else len(state["blocks.0.mlp.fc1.weight"])
    words = ("swiglu", "swiglufused", "swiglu_fused") if gated else ("mlp",)
    inferred = {
        "patch_size": patch,
        "embed_dim": width,
        "depth": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        "in_chans": channels,
        "num_register_tokens": state["register_tokens"].shape[1] if "register_tokens" in state else 0,
        "qkv_bias": any(key.endswith(".attn.qkv.bias") for key in state),
        "proj_bias": any(key.endswith(".attn.proj.bias") for key in state),
        "ffn_bias": any(key.endswith((".mlp.fc1.bias", ".mlp.w12.bias")) for key in state),
        "mlp_ratio": Hidden(width, hidden, gated),
        "ffn_layer": OneOf(words),
        "use_swiglu_ffn": gated,
    }
    assert set(inferred) == set(OF_BACKBONES)
    return inferred


def _encoder(
    state: Mapping[str, Tensor], config: Mapping[str, Any], rule: PositionRule | None, statistics: tuple[Any, Any]
) -> tuple[Encoder, PositionRule]:
    """Return the encoder of a backbone's state dict, in eval mode, and how its positions are resampled."""
    inferred = inferred_from_backbone(state)
    # Sums and resampling of half-precision values would lose digits.
    state = {name: at_least_float32(value) for name, value in state.items()}
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    rule = _rule(rule or (TIMM_RULE if registers else DINOV2_RULE), config)
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    plain = not _has_layer_scale(state)
    if not plain:
        require(state, "mask_token")
    mask_token = state.pop("mask_token", torch.zeros(1, width)).reshape(1, width)
    grid = _positions(state, config, patch, rule)
    if registers:
        # timm's class token has no position of its own where there are registers; the sum is the same.
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
        state["reg_token"] = state.pop("register_tokens")
    gated = "blocks.0.mlp.w12.weight" in state
    renames = {".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}
    for old, new in renames.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    hidden = len(state["blocks.0.mlp.fc1.weight"])
    ratio = hidden / width
    heads = int(config.get("num_heads") or max(1, width // 64))
    if width % heads:
        raise UsageError(f"the width {width} is not divisible by num_heads {heads}; give the number the model has")
    depth, biased = inferred["depth"], inferred["qkv_bias"]
    size = NAMES.get(width, "base")
    name = f"vit_{size}_patch16_224" if plain or patch == 16 else f"vit_{size}_patch14_dinov2"
    prefix: dict[str, Any] = {"reg_tokens": registers, "no_embed_class": True} if registers else {}
    encoder = create_encoder(
        "vit_giant_patch14_dinov2" if gated else name,
        image_size=(grid[0] * patch, grid[1] * patch),
        in_chans=channels,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        # The number of hidden units is cut off to a whole number, which must not lose one.
        mlp_ratio=ratio if int(width * ratio) == hidden else (hidden + 0.5) / width,
        qkv_bias=biased,
        init_values=None if plain else 1e-5,
        **prefix,
    )
    fill(encoder, state)
    set_epsilon(encoder, config.get("layer_norm_eps"))
    mean, std = statistics
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, "mean": mean, "std": std}
    # Beside the weights, not among them: a bundle holds timm's own tensors.
    encoder.register_buffer("mask_token", mask_token.clone(), persistent=False)
    return take_any_size(encoder, rule).eval(), rule


def _rule(rule: PositionRule, config: Mapping[str, Any]) -> PositionRule:
    """Return how positions are resampled, as told."""
    offset, antialias = config.get("interpolate_offset", rule.offset), config.get("interpolate_antialias")
    return PositionRule(
        antialias=rule.antialias if antialias is None else bool(antialias), offset=float(offset) if offset else None
    )


def _positions(state: dict[str, Tensor], config: Mapping[str, Any], patch: int, rule: PositionRule) -> tuple[int, int]:
    """Resample the positions, in place, to the image size that is wanted; return the grid."""
    if "pos_embed" not in state:
        raise UsageError("the checkpoint has no pos_embed, so it is no DINOv2 backbone")
    count = state["pos_embed"].shape[1] - 1
    side = round(count**0.5)
    asked = config.get("image_size")
    grid = None if asked is None else ((asked, asked) if isinstance(asked, int) else (int(asked[0]), int(asked[1])))
    if grid is not None and (grid[0] % patch or grid[1] % patch):
        raise UsageError(f"image_size {grid} is not divisible by the patch size {patch}")
    if side * side != count:
        if grid is None or grid[0] // patch * (grid[1] // patch) != count:
            raise UsageError(f"the {count} positions are of no square grid; give the image_size (H, W) they are for")
        return grid[0] // patch, grid[1] // patch
    old, new = (side, side), (side, side) if grid is None else (grid[0] // patch, grid[1] // patch)
    state["pos_embed"] = resample_positions(state["pos_embed"], old, new, 1, rule)
    return new


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
