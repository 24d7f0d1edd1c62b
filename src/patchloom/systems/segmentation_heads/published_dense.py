"""Published segmentation models of BEiT's code: CCViT's, and G2SD's students and teachers.

arXiv 2303.04664 and arXiv 2302.14771, on BEiT's (arXiv 2106.08254). The backbone is the encoder without its final norm,
the neck stands inside it (`fpn1`, `fpn2`), positions are one table for each block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from patchloom.errors import UsageError, unknown_name
from patchloom.models.published import fill, has, require
from patchloom.models.published_beit import SETTINGS as OF_ENCODERS
from patchloom.models.published_beit import inferred_from, make_encoder, resize, without_indices
from patchloom.models.published_settings import set_epsilon
from patchloom.segment.pyramid_backbone import PyramidBackbone, SegmentationModel
from patchloom.systems.segmentation_heads import published as segmentation_heads

PARTS = ("student", "teacher")
OUT_INDICES = {12: (3, 5, 7, 11), 24: (7, 11, 15, 23)}
"""The blocks whose maps are taken, by depth."""
HEADS = ("decode_head.", "auxiliary_head.")
NECK = ("fpn1.", "fpn2.")
SETTINGS = replace(
    OF_ENCODERS,
    obeyed=(*OF_ENCODERS.obeyed, "out_indices"),
    # Classes are the heads' matter; the published backbone is told a number that it does not use.
    idle=(*OF_ENCODERS.idle, "num_classes", "use_checkpoint", "fpn1_norm", "type", "pretrained", "init_cfg"),
)
IN_FRONT = ("backbone", "decode_head", "auxiliary_head", "neck")
AROUND = ("type", "pretrained", "train_cfg", "test_cfg", "init_cfg", "data_preprocessor")
"""Entries of a model's configuration beside its parts."""


def is_dense(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict is of a segmentation model, or of its backbone."""
    return any(name.startswith(("backbone.", "student.backbone.", "teacher.backbone.", *NECK)) for name in state)


def load(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """Return a published segmentation model, or its backbone.

    Args:
        state: Tensors of a backbone, bare or under `backbone.`; of a model with its heads; or of G2SD's distillation
            under `student.` and `teacher.`, with the outputs its code keeps beside them, which are left out.
        config: `out_indices` (four blocks, counted from 0; default: the paper's for depths of 12 and 24), `num_heads`
            (without relative positions), `image_size`, `drop_path`, `layer_norm_eps`; `part` (`student` or
            `teacher`). Settings of heads as for `segmentation_heads.load`. A model's whole configuration may be
            given, in its groups `backbone`, `decode_head` and `auxiliary_head`.

    Returns:
        `PyramidBackbone`: images to four maps; with heads a `SegmentationModel`: images to logits.

    Raises:
        UsageError: Unknown or contradicting settings, or tensors missing or left over.
    """
    config = dict(config)
    state = _part(state, config.pop("part", None))
    heads = {name: value for name, value in state.items() if name.startswith(HEADS)}
    rest = {name.removeprefix("backbone."): value for name, value in state.items() if name not in heads}
    require(rest, "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "fpn1.0.weight")
    of_backbone, of_heads = _parted(config, inferred_from(rest))
    if of_heads and not heads:
        raise UsageError(f"{next(iter(of_heads))} is given, and the checkpoint has no head it could be for")
    backbone = _backbone(rest, of_backbone)
    if not heads:
        return backbone
    decoder = segmentation_heads.load(heads, **of_heads)
    return SegmentationModel(backbone, decoder).eval()


def _part(state: Mapping[str, Tensor], part: str | None) -> dict[str, Tensor]:
    """Return the tensors of one model of a distillation, or all where there is one."""
    if part not in (None, *PARTS):
        raise unknown_name("part", str(part), PARTS)
    parts = [each for each in PARTS if has(state, f"{each}.")]
    if not parts:
        if part is not None:
            raise UsageError(f"part={part}, and the checkpoint holds one model; leave it out")
        return dict(state)
    chosen = part or parts[0]
    if chosen not in parts:
        raise UsageError(f"part={chosen}, and the checkpoint holds its {' and '.join(parts)} only")
    # Outputs the distillation's hooks left among the tensors: student_decode_head_conv_seg and its teacher's.
    prefixes = tuple(f"{each}{mark}" for each in PARTS for mark in "._")
    if left := [name for name in state if not name.startswith(prefixes)]:
        raise UsageError(f"unexpected: {', '.join(left[:6])}; beside {chosen}. stand a teacher and kept outputs")
    return {name.removeprefix(f"{chosen}."): v for name, v in state.items() if name.startswith(f"{chosen}.")}


def _parted(config: Mapping[str, Any], inferred: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of the backbone, known or told by its tensors, and those of the heads."""
    known = {*SETTINGS.obeyed, *SETTINGS.idle, *SETTINGS.fixed, *SETTINGS.other_names, *inferred}
    backbone: dict[str, Any] = dict(config.get("backbone") or {})
    heads: dict[str, Any] = {}
    for name, value in config.items():
        if name in IN_FRONT or name in AROUND:
            if name in IN_FRONT[1:]:
                heads[name] = value
        elif name in known and name != "num_classes":
            backbone[name] = value
        else:
            heads[name] = value
    return backbone, heads


def _backbone(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> PyramidBackbone:
    state = without_indices(state)
    settings = SETTINGS.settle(config, inferred_from(state))
    neck = {name: value for name, value in state.items() if name.startswith(NECK)}
    backbone_state = _with_split_biases({name: value for name, value in state.items() if name not in neck})
    # Without a norm per token; the one behind pooling, which a classifier would train, is fresh and takes no part.
    encoder = make_encoder(backbone_state, settings, global_pool="avg", use_fc_norm=True)
    encoder.fc_norm.requires_grad_(False)
    depth = len(encoder.blocks)
    indices = settings.get("out_indices") or OUT_INDICES.get(depth)
    if indices is None:
        raise UsageError(f"no published model has {depth} blocks; give out_indices, the four whose maps are taken")
    keys = {name: backbone_state.pop(name) for name in list(backbone_state) if name.endswith(".attn.k_bias")}
    model = PyramidBackbone(encoder, tuple(int(index) for index in indices))
    fresh = [name for name in model.state_dict() if ".fc_norm." in name or name.endswith("num_batches_tracked")]
    ours = {f"backbone.encoder.{name}": value for name, value in backbone_state.items()}
    ours |= {f"neck.{name}": value for name, value in neck.items()}
    fill(
        model, ours, may_lack=fresh, published=lambda name: name.removeprefix("backbone.encoder.").removeprefix("neck.")
    )
    with torch.no_grad():
        for name, value in keys.items():
            encoder.blocks[int(name.split(".")[1])].attn.k_bias.copy_(value)
    set_epsilon(model, settings.get("layer_norm_eps"))
    if (size := settings.get("image_size")) is not None:
        resize(encoder, size)
    return model.eval()


def _with_split_biases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with one bias of queries, keys and values, as MAE's code has it, in timm's three."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(".attn.qkv.bias"):
            owner = name.removesuffix("qkv.bias")
            tensors |= dict(zip((f"{owner}q_bias", f"{owner}k_bias", f"{owner}v_bias"), value.chunk(3), strict=True))
        else:
            tensors[name] = value
    return tensors
