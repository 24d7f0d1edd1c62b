"""Published PH-Reg checkpoints: students of DINOv2, and of CLIP in both layouts of the published code.

Chen et al. 2025 (arXiv 2505.21501), github.com/0raiser0/PH-Reg.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchloom.errors import UsageError, unknown_name
from patchloom.models.published import has, read_state
from patchloom.models.published_settings import Settings, name_of
from patchloom.systems.dinov2 import published as dinov2
from patchloom.systems.ph_reg.clip import DenseCLIP
from patchloom.systems.ph_reg.towers import tower_of

REGISTERS, CLIP_REGISTERS = "registers", "register_tokens"
# A student registers its backbone twice; the second time by its parts.
ALIASES = {"embed.": "model.embeddings.", "encoder.": "model.encoder.", "layernorm.": "model.layernorm."}
CLIP_PREFIXES = ("vit.", "original_image_encoder.")
INTERPOLATIONS = {"timm": True, "reference": False}
"""How positions are resampled to another size than theirs, and whether that smooths them."""
READOUTS = {
    **dict.fromkeys(("student", "values", "maskclip"), "values"),
    **dict.fromkeys(("teacher", "neighbours", "naclip"), "neighbours"),
}
OF_CLIP = Settings(
    obeyed=("num_heads", "form", "neighbour_std"),
    idle=("image_size", "drop_path", "drop_rate", "pretrained", "model_name"),
    fixed={"hidden_act": ("quick_gelu",)},
    other_names={
        "heads": "num_heads",
        "readout": "form",
        "last_block": "form",
        "std": "neighbour_std",
        "sigma": "neighbour_std",
        "gaussian_std": "neighbour_std",
        "num_register_tokens": "num_registers",
        "width": "embed_dim",
        "layers": "depth",
        "output_dim": "embed_text",
    },
    read={"hidden_act": name_of},
)


def load(
    state: Mapping[str, Tensor],
    *,
    interpolation: str = "timm",
    source: Mapping[str, Any] | str | Path | None = None,
    **config: Any,
) -> nn.Module:
    """Return a published PH-Reg student, or the CLIP teacher.

    Args:
        state: Of DINOv2 tensors under `model.` (with or without the aliases `embed.`, `encoder.`, `layernorm.`) and
            `registers`; of CLIP those under `vit.` or, from an earlier version, `original_image_encoder.`, and
            `register_tokens`.
        interpolation: How positions are resampled where images have another size than theirs: `timm` smooths them,
            `reference` does not, as the published code of DINOv2; CLIP's are always resampled as published.
        source: The model a file of trained tensors alone (`trainable_state_dict`) belongs to, under the names of
            transformers: a state dict or the path of one.
        **config: What shapes do not tell: `num_heads` (default: 64 wide each); of DINOv2 further what `dinov2` takes,
            such as `image_size`; of CLIP `form`, how the last block is read, `student` (default; values alone) or
            `teacher` (neighbourhood attention), and its `neighbour_std` (5).

    Returns:
        Of DINOv2 a timm `VisionTransformer` with `reg_token`, which takes images of any size patches fill; of CLIP a
        `DenseCLIP`: normalised images to a vector (B, N, E) for every patch.

    Raises:
        UsageError: Unknown settings, tensors missing or left over, or aliases that differ.
    """
    if interpolation not in INTERPOLATIONS:
        raise unknown_name("interpolation", str(interpolation), INTERPOLATIONS)
    if CLIP_REGISTERS in state or "class_embedding" in state or has(state, *CLIP_PREFIXES):
        if source is not None:
            raise UsageError("source is for files of DINOv2's trained tensors alone; leave it out")
        return _clip(state, config)
    tensors = _student(state)
    if source is not None:
        tensors = _of_source(read_state(source)) | tensors
    elif "model.layernorm.weight" not in tensors:
        raise UsageError("the checkpoint holds what was trained alone; give the model it belongs to as source")
    if REGISTERS not in tensors:
        raise UsageError(f"missing: {REGISTERS}; a model without them is loaded by dinov2")
    backbone = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    _refuse(name for name in tensors if not name.startswith("model.") and name != REGISTERS)
    registers = tensors[REGISTERS]
    backbone["embeddings.register_tokens"] = registers.reshape(1, -1, registers.shape[-1])
    # It hides patches in training, and has no part in what is computed.
    backbone.setdefault("embeddings.mask_token", torch.zeros(1, registers.shape[-1]))
    rule = {"interpolate_antialias": INTERPOLATIONS[interpolation], **config}
    return dinov2.load(backbone, **rule)


def _student(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a student once each, under `model.`."""
    tensors = {name: value for name, value in state.items() if not name.startswith(tuple(ALIASES))}
    for name, value in state.items():
        alias = next((alias for alias in ALIASES if name.startswith(alias)), None)
        if alias is None:
            continue
        whole = ALIASES[alias] + name.removeprefix(alias)
        if whole in tensors and not torch.equal(tensors[whole], value):
            raise UsageError(f"{name} and {whole} are one tensor in the published code, and differ in the checkpoint")
        tensors.setdefault(whole, value)
    return tensors


def _of_source(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a model of transformers under `model.`."""
    whole = "embeddings.patch_embeddings.projection.weight"
    found = next((name for name in state if name.endswith(whole)), None)
    if found is None:
        raise UsageError("the source is no Dinov2Model of transformers: it has no patch embeddings of that name")
    prefix = found.removesuffix(whole)
    return {f"model.{name.removeprefix(prefix)}": value for name, value in state.items() if name.startswith(prefix)}


def _refuse(names: Iterable[str]) -> None:
    """Refuse tensors that belong to nothing that is loaded."""
    if left := list(names):
        raise UsageError(f"unexpected: {', '.join(left[:6])}{f' and {len(left) - 6} more' if len(left) > 6 else ''}")


def _clip(state: Mapping[str, Tensor], config: dict[str, Any]) -> nn.Module:
    prefix = next((prefix for prefix in CLIP_PREFIXES if has(state, prefix)), "")
    tower = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    _refuse(name for name in state if not name.startswith(prefix) and name != CLIP_REGISTERS)
    registers = None
    if CLIP_REGISTERS in state:
        tower[CLIP_REGISTERS], registers = state[CLIP_REGISTERS].flatten(0, -2), CLIP_REGISTERS
    inferred = {
        "num_registers": None if registers is None else len(tower[CLIP_REGISTERS]),
        "embed_dim": None if "class_embedding" not in tower else tower["class_embedding"].shape[-1],
        "patch_size": None if "conv1.weight" not in tower else tower["conv1.weight"].shape[-1],
        "depth": None,
        "embed_text": None if "proj" not in tower else tower["proj"].shape[-1],
    }
    settings = OF_CLIP.settle(config, inferred)
    form = settings.get("form", "student")
    if form not in READOUTS:
        raise unknown_name("form", str(form), READOUTS)
    made = tower_of(tower, num_heads=settings.get("num_heads"), registers=registers)
    readout: Any = READOUTS[form]
    return DenseCLIP(made.encoder, made.projection, readout, float(settings.get("neighbour_std", 5.0))).eval()
