"""Published checkpoints in: one file per system, key conversion only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchloom.errors import UsageError, unknown_name
from patchloom.io import check_place
from patchloom.registry import REFERENCES, load

if TYPE_CHECKING:
    from torch import nn


# A probe of volumes is one of slices within `model.`.
MEANT = {"dinov2_radiology": ("model.",)}


def list_references() -> list[str]:
    """Return the names of the systems whose published checkpoints can be loaded."""
    return sorted(REFERENCES)


def load_reference(system: str, checkpoint: Mapping[str, Any] | str | Path, **config: Any) -> nn.Module:
    """Return our module with the weights of a published implementation's checkpoint, in eval mode.

    Args:
        system: Name of the system, see `list_references`.
        checkpoint: State dict (wrapper keys such as `model` or `module.` are handled) or the path of one.
        **config: What shapes do not tell, under the names of the published implementation, whose configuration may be
            given whole, see `patchloom.models.published_settings`.

    Raises:
        UsageError: Unknown system or setting, or tensors missing or left over (they are named).
    """
    import torch

    from patchloom.models.published import read_state

    if system not in REFERENCES:
        raise unknown_name("system", system, REFERENCES)
    # Building a module draws initial weights; whoever loads weights does not expect their random state to move.
    with torch.random.fork_rng(devices=[]):
        module: nn.Module = load(REFERENCES[system])(read_state(checkpoint, MEANT.get(system, ())), **config)
    return module.eval()


def import_reference(
    system: str,
    checkpoint: str,
    out: str,
    settings: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> str:
    """Turn a published checkpoint into a bundle that timm and every command here can open.

    Args:
        system: Name of the system; `patchloom list references` shows them.
        checkpoint: File of the published checkpoint.
        out: Folder of the bundle.
        settings: What the tensors do not tell, under the names of the system's docs page, such as
            --settings.num_heads 12.
        overwrite: Replace a bundle already there.

    Returns:
        The folder of the bundle, or of the tokenizer; an adapter of the checkpoint is in `adapter/` inside, which opens
        like a run, and what else a masked model has (decoder or mask token) in `pretraining.safetensors`.

    Raises:
        UsageError: Unknown system, or a checkpoint that does not fit.
    """
    from torch import Tensor

    from patchloom.encoders.mask_token import MaskTokenEncoder
    from patchloom.encoders.masked_autoencoder import MaskedAutoencoder
    from patchloom.models.adapters import KINDS, insert, insertions, remove, save_adapter
    from patchloom.models.bundle import save_bundle
    from patchloom.models.parts import save_parts
    from patchloom.segment.saved import Segmenter, save_segmenter
    from patchloom.systems.ccvit.model import CentroidMIM
    from patchloom.systems.dinov2.model import DINOv2
    from patchloom.systems.g2sd.specific import DistilledVisionTransformer, as_timm
    from patchloom.systems.ph_reg.clip import DenseCLIP
    from patchloom.systems.ph_reg.saved import save_dense
    from patchloom.tokenizers.tokenizer import Tokenizer

    if check_place(out).exists() and not overwrite:
        raise UsageError(f"{out} exists; choose another out, or set overwrite to replace it")
    config = settings or {}
    module: Any = load_reference(system, checkpoint, **config)
    if isinstance(module, Tokenizer):
        module.facts["checkpoint"] = Path(checkpoint).name
        return str(module.save(out, overwrite=overwrite))
    if callable(turned := getattr(module, "for_scans", None)):  # published for volumes that lie otherwise than here
        module = turned()
    module = getattr(module, "autoencoder", module)  # of a student of G2SD
    module = module.teacher if isinstance(module, DINOv2) else module  # what its authors ship
    if isinstance(module, DistilledVisionTransformer):
        module = as_timm(module)
    encoder = getattr(module, "encoder", module)
    if not hasattr(encoder, "pretrained_cfg"):
        raise UsageError(f"a {system} checkpoint holds no encoder that could be saved as a bundle")
    lineage = {"made_by": f"import {system}", "checkpoint": Path(checkpoint).name, "settings": config, "from": None}
    inserted = insertions(encoder)
    remove(encoder)  # a bundle is the plain encoder; without anything inserted this does nothing
    save_bundle(encoder, out, lineage=lineage, overwrite=overwrite)
    if isinstance(module, (MaskedAutoencoder, CentroidMIM)) or hasattr(module, "decoder_settings"):
        save_parts(module, out)
    elif isinstance(token := getattr(module, "mask_token", None), Tensor) and bool(token.any()):
        # A checkpoint that has none is given zeros, with which training starts anyway.
        save_parts(MaskTokenEncoder(encoder, token.detach().reshape(1, 1, -1)), out)
    if isinstance(module, Segmenter):
        save_segmenter(module, Path(out))
    if isinstance(module, DenseCLIP):
        save_dense(module, Path(out))
    if hasattr(module, "visual"):  # towers that meet, of which a bundle is the trunk alone
        from patchloom.systems.clip.saved import save_clip

        save_clip(module, Path(out))
    for name, insertion in inserted.items():
        if getattr(insertion, "kind", None) in KINDS:
            insert(encoder, insertion, name)
            save_adapter(encoder, Path(out) / "adapter", encoder_path=out, lineage=lineage)
    return out
