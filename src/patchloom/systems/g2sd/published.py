"""G2SD's published checkpoints: generic students with their prediction networks, classifiers, dense students.

Huang et al. 2023, arXiv 2302.14771; github.com/pengzhiliang/G2SD.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from patchloom.encoders import Encoder
from patchloom.encoders.masked_autoencoder import MaskedAutoencoder
from patchloom.errors import UsageError
from patchloom.models.published import fill, has, read_state, require
from patchloom.models.published_settings import Settings, agree
from patchloom.systems.g2sd.generic import DistilledAutoencoder, GenericDistiller
from patchloom.systems.g2sd.pyramid import PyramidAdapter
from patchloom.systems.g2sd.specific import DistilledVisionTransformer
from patchloom.systems.mae import published as mae
from patchloom.systems.segmentation_heads import published_dense as dense

ADAPTER = "student.stu_adapter."
PREDICTORS = ("encoderfeature_pred.", "decoderfeature_pred.")
# Settings of its scripts that concern training, or a teacher's model that is given as such.
IDLE = (
    *("teacher_model", "student_model", "teacher_path", "mask", "pixel_loss", "loss_type", "beta", "target_prenorm"),
    *("target_patchem", "qkv_relation_loss", "qkv_relation_weight", "last_layer_weight", "distillation"),
)
DECODER_HEADS = {512: 16, 256: 8, 192: 6, 128: 4, 64: 2}
"""Heads of the published decoders by width."""


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return our module with a published state dict in it.

    Args:
        state: Tensors under the published names.
        **config: Those of `mae` (`num_heads`, `decoder_num_heads`, `image_size` …); for a generic student `teacher`:
            the full MAE checkpoint of the teacher (a mapping or a path), `teacher_config` with its settings, and
            `layer_index` (4), `supervise_all` (True), `mask_ratio`; for a classifier `eval_head`.

    Returns:
        `DistilledAutoencoder` for a generic student (`GenericDistiller` when the teacher is given),
        `DistilledVisionTransformer` for a specific one; of segmentation what `published_dense.load` makes; of detection
        the student's `PyramidAdapter`.

    Raises:
        UsageError: Unknown setting; tensors missing or left over; a teacher without its decoder.
    """
    config = {
        {"suplayer": "layer_index"}.get(name, name): value
        for name, value in config.items()
        # The published constructor has a switch of the teacher's name.
        if name not in IDLE and not (name == "teacher" and isinstance(value, bool))
    }
    if "dist_token" in state:
        return _classifier(dict(state), config)
    if has(state, ADAPTER, ADAPTER.removeprefix("student.")):
        return _pyramid_adapter(state, config)
    if dense.is_dense(state):
        return dense.load(state, config)
    if not any(name.startswith(PREDICTORS) for name in state):
        raise UsageError("the checkpoint has neither decoderfeature_pred nor dist_token, so it is none of G2SD's")
    own_settings = (
        *("teacher", "teacher_config", "layer_index", "supervise_all", "encoder_loss_weight"),
        *("encoder_pred_channel", "decoder_pred_channel"),
    )
    settings = {name: value for name, value in config.items() if name not in own_settings}
    width = len(state["decoder_embed.weight"]) if "decoder_embed.weight" in state else 0
    settings.setdefault("decoder_num_heads", DECODER_HEADS.get(width, 4))
    plain = {name: value for name, value in state.items() if not name.startswith(PREDICTORS)}
    autoencoder = mae.load(plain, **settings)
    if not isinstance(autoencoder, MaskedAutoencoder):
        raise UsageError("the checkpoint has no decoder; a generic student needs decoder_embed and decoder_blocks")
    try:
        dims = [len(state[f"{prefix}fc2.weight"]) for prefix in PREDICTORS]
    except KeyError as error:
        raise UsageError(f"the checkpoint lacks {error.args[0]}") from error
    agree(config, {"encoder_pred_channel": dims[0], "decoder_pred_channel": dims[1]})
    student = DistilledAutoencoder(autoencoder, dims[0], dims[1])
    predictors = {name: value for name, value in state.items() if name.startswith(PREDICTORS)}
    fill(student, {**{f"autoencoder.{n}": v for n, v in autoencoder.state_dict().items()}, **predictors})
    if config.get("teacher") is None:
        return student
    teacher = mae.load(read_state(config["teacher"]), **(config.get("teacher_config") or {}))
    if not isinstance(teacher, MaskedAutoencoder):
        raise UsageError(
            "the teacher's checkpoint has no decoder (decoder_embed, decoder_blocks, mask_token are missing); "
            "give the full pre-training checkpoint, with decoder"
        )
    everything, weight = bool(config.get("supervise_all", True)), float(config.get("encoder_loss_weight", 0.0))
    layer = int(config.get("layer_index", 4))
    return GenericDistiller(teacher, student, layer, "all" if everything else "masked", encoder_loss_weight=weight)


def _pyramid_adapter(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """Return the adapter of a detector's student; the detector itself is detectron2's, and left out."""
    mark = ADAPTER.removeprefix("student.")
    adapter_state = {name.partition(mark)[2]: value for name, value in state.items() if mark in name}
    require(adapter_state, "conv.0.weight")
    levels, channels = 1 + max(int(name.split(".")[1]) for name in adapter_state), len(adapter_state["conv.0.weight"])
    Settings().settle(config, {"levels": levels, "channels": channels})
    if left := len(state) - len(adapter_state):
        warnings.warn(f"{left} tensors of the detector are left out: only its adapter is loaded here", stacklevel=4)
    adapter = PyramidAdapter(levels, channels)
    return fill(adapter, adapter_state, published=lambda name: f"{mark}{name}").eval()


def _classifier(state: dict[str, Tensor], config: dict[str, Any]) -> nn.Module:
    eval_head = config.pop("eval_head", "mean")
    if "enable_nkd" in config:  # the script's word for it
        config.setdefault("use_distoken", not config.pop("enable_nkd"))
    if "use_distoken" in config:
        eval_head = "mean" if config.pop("use_distoken") else "cls"
    head_state = {name: state.pop(name) for name in list(state) if name.startswith(("dist_token", "head"))}
    for name in ("head.weight", "head_dist.weight"):
        if name not in head_state:
            raise UsageError(f"the checkpoint lacks {name}")
    agree(mae.SETTINGS.renamed(config), {"num_classes": len(head_state["head.weight"])})
    encoder = cast(Encoder, mae.load(state, **config))
    model = DistilledVisionTransformer(encoder, len(head_state["head.weight"]), eval_head)
    return fill(model, {**{f"encoder.{n}": v for n, v in encoder.state_dict().items()}, **head_state})
