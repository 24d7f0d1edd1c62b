"""DeiT-LT's published checkpoints: students in timm's names, and CNN teachers trained by PaCo or LDAM.

Rangwani et al. 2024, arXiv 2404.02900; github.com/val-iisc/DeiT-LT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn

from patchloom.errors import UsageError
from patchloom.models.published import fill
from patchloom.models.published_settings import Hidden, Settings, epsilon_of, name_of, set_epsilon
from patchloom.systems.deit_lt.cnn_teachers import CIFARResNet, PaCoTeacher
from patchloom.systems.deit_lt.model import DeiTLT

HEADS = {192: 3, 384: 6, 768: 12}
TRAINING_ONLY = ("encoder_k.", "linear_k.", "queue", "encoder_q.fc.")
SETTINGS = Settings(
    obeyed=("num_heads", "image_size", "teacher", "teacher_size", "drop_path", "layer_norm_eps"),
    idle=(
        *("model", "drop", "drop_rate", "attn_drop_rate", "init_values", "distillation_type", "distillation_alpha"),
        *("distillation_tau", "teacher_model", "teacher_path", "weighted_baseloss", "weighted_distillation", "gamma"),
        *("imb_type", "imb_factor", "drw", "no_mixup_drw", "student_transform", "teacher_transform", "sam_teacher"),
        *("moco_t", "moco_k", "moco_m", "categories", "log_results", "arch", "mlp", "paco", "three_augment", "src"),
        *("ThreeAugment", "train_mode", "unscale_lr", "bce_loss", "cosub", "attn_only", "eval_crop_ratio", "alpha"),
        *("beta", "custom_model", "inat_category", "weight_init", "representation_size"),
    ),
    fixed={"distilled": (True,), "act_layer": ("gelu",), "qk_scale": (None,)},
    other_names={
        "img_size": "image_size",
        "input_size": "image_size",
        "drop_path_rate": "drop_path",
        "nb_classes": "num_classes",
        "norm_layer": "layer_norm_eps",
    },
    read={"layer_norm_eps": epsilon_of, "act_layer": name_of},
)
# Of a teacher, what the student's configuration says of it or of the student means nothing.
OF_TEACHERS = Settings(
    idle=(*SETTINGS.obeyed, *SETTINGS.idle, "feat_dim", "moco_dim", "dim", "K", "m", "T", "use_norm", "depth"),
    other_names=SETTINGS.other_names,
)


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return our module with a published state dict in it.

    Args:
        state: Tensors under the published names.
        **config: `num_heads` of a student (default: the published sizes') and `image_size` (for grids that are not
            square), `drop_path`, `layer_norm_eps`; `teacher`, a module, with `teacher_size`. What shapes tell may be
            given and has to agree.

    Returns:
        `DeiTLT` for a student; `PaCoTeacher` or `CIFARResNet` for a teacher. What a teacher needed for its own training
        only (the second encoder, queues, the projection) is left behind.

    Raises:
        UsageError: Unknown setting, or tensors missing or left over.
    """
    if "dist_token" in state:
        return _student(state, config)
    head = next((state[name] for name in ("linear.weight", "fc.weight") if name in state), None)
    # A cosine classifier has its classes across.
    across = head is not None and not any(name in state for name in ("linear.bias", "fc.bias"))
    OF_TEACHERS.settle(config, {"num_classes": None if head is None else head.shape[1 if across else 0]})
    if any(name.startswith("encoder_q.") for name in state):
        return _paco(state)
    if "layer3.0.conv1.weight" in state and "layer4.0.conv1.weight" not in state:
        return fill(_cifar_resnet(state), _as_ours(state))
    raise UsageError("the checkpoint is neither a distilled DeiT (dist_token) nor a CNN teacher (encoder_q, layer3)")


def _student(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    for name in ("patch_embed.proj.weight", "head.weight", "blocks.0.mlp.fc1.weight"):
        if name not in state:
            raise UsageError(f"the checkpoint lacks {name}")
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    hidden = Hidden(width, len(state["blocks.0.mlp.fc1.weight"]))
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    config = SETTINGS.settle(
        config,
        {
            "embed_dim": width,
            "depth": depth,
            "patch_size": patch,
            "in_chans": channels,
            "mlp_ratio": hidden,
            "qkv_bias": any(name.endswith(".attn.qkv.bias") for name in state),
            "num_classes": len(state["head.weight"]),
        },
    )
    patches = state["pos_embed"].shape[1] - 2
    size = config.get("image_size") or round(patches**0.5) * patch
    model = timm.create_model(
        "deit_base_distilled_patch16_224",
        num_classes=len(state["head.weight"]),
        img_size=size,
        patch_size=patch,
        in_chans=channels,
        embed_dim=width,
        depth=depth,
        num_heads=int(config.get("num_heads") or HEADS.get(width) or max(1, width // 64)),
        mlp_ratio=hidden.ratio,
        drop_path_rate=float(config.get("drop_path", 0.0)),
    )
    fill(model, state)
    set_epsilon(model, config.get("layer_norm_eps"))
    return DeiTLT(model, teacher=config.get("teacher"), teacher_size=config.get("teacher_size"))


def _paco(state: Mapping[str, Tensor]) -> nn.Module:
    encoder = {
        name.removeprefix("encoder_q."): value
        for name, value in state.items()
        if name.startswith("encoder_q.") and not name.startswith(TRAINING_ONLY)
    }
    linear = {name: value for name, value in state.items() if name.startswith("linear.")}
    known = ("encoder_q.", "linear.", *TRAINING_ONLY)
    if left := [name for name in state if not name.startswith(known)]:
        raise UsageError(f"unexpected tensors in the teacher's checkpoint: {', '.join(left[:4])}")
    if "linear.weight" not in linear:
        raise UsageError("the teacher's checkpoint lacks linear.weight")
    classes, width = linear["linear.weight"].shape
    backbone: Any
    if "layer4.0.conv1.weight" in encoder:
        kind = "resnet50" if "layer1.0.conv3.weight" in encoder else "resnet18"
        backbone = timm.create_model(kind, num_classes=0)
    else:
        backbone = _cifar_resnet(encoder)
    module = PaCoTeacher(backbone, width, classes)
    return fill(module, {**{f"backbone.{name}": value for name, value in encoder.items()}, **linear})


def _cifar_resnet(state: Mapping[str, Tensor]) -> CIFARResNet:
    layers = 6 * len({name.split(".")[1] for name in state if name.startswith("layer1.")}) + 2
    head = next((state[name] for name in ("fc.weight", "linear.weight") if name in state), None)
    cosine = head is not None and "fc.bias" not in state and "linear.bias" not in state
    classes = 0 if head is None else head.shape[1] if cosine else head.shape[0]
    name = f"cifar_resnet{layers}"
    if not timm.is_model(name):
        return CIFARResNet(layers, classes, cosine)
    # By its name, so that a bundle can hold it.
    model: Any = timm.create_model(name, num_classes=classes, cosine_head=cosine)
    model.patchloom_args = {"architecture": name, "model_args": {"cosine_head": True} if cosine else {}}
    network: CIFARResNet = model
    return network


def _as_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a plain CIFAR ResNet's tensors, its classifier under our name."""
    return {
        f"fc.{name.removeprefix('linear.')}" if name.startswith("linear.") else name: v for name, v in state.items()
    }
