"""A trained EAR model on disk: the repair network, what was calibrated, and which encoder it needs.

The frozen encoder is not stored: `ear.json` has its name, where it lies from here, and its hash; another is refused.

>>> saved = load_ear("runs/bottle")  # doctest: +SKIP
>>> saved.model(images)["pred_score"]  # doctest: +SKIP
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from patchloom.base.sizes import checked_size, pair
from patchloom.base.stored import read_tensors
from patchloom.base.version import __version__
from patchloom.encoders import Encoder, create_encoder, num_prefix_tokens
from patchloom.errors import UsageError
from patchloom.io import make_folder, write_json, written_whole
from patchloom.models.adapters import encoder_hash
from patchloom.models.bundle import LINEAGE, fetch_encoder, read_lineage
from patchloom.models.published import fill
from patchloom.models.start import start_encoder
from patchloom.systems.ear.config import NO_ENCODER
from patchloom.systems.ear.model import EAR, AttentionSaliency
from patchloom.systems.ear.saliency import Saliency
from patchloom.systems.ear.unet import RecoveryUNet

WEIGHTS, ABOUT = "ear.safetensors", "ear.json"
FORMAT = 1
MASKED_AUTOENCODERS = ("pretrain mae", "pretrain ccvit", "import mae")
"""What makes encoders whose class token looks at nothing in particular."""


@dataclass(frozen=True)
class SavedEAR:
    """A trained model, and how images come to it."""

    model: EAR
    image_size: tuple[int, int]
    """Height and width images are resized to."""
    reading: dict[str, Any]
    """Options the training images were read by, for `open_source`."""
    about: dict[str, Any]
    """What `ear.json` says."""


@dataclass(frozen=True)
class EncoderAsked:
    """The frozen encoder of a model: what it is called, and which it is."""

    name: str
    """As the user named it; none for none."""
    hash: str | None
    """Of its tensors, as it was opened."""

    def of_file(self, folder: Path) -> dict[str, Any]:
        """Return what a file in a folder says of it."""
        there = self.name != NO_ENCODER and Path(self.name).exists()
        return {
            "encoder": self.name,
            "encoder_hash": self.hash,
            **({"encoder_from_here": os.path.relpath(self.name, folder)} if there else {}),
        }


def open_saliency(
    name: str, kind: str = "auto", *, in_chans: int = 3, head_fusion: Any = "mean"
) -> tuple[AttentionSaliency, EncoderAsked]:
    """Return what says what stands out, for settings of a run.

    Args:
        name: Bundle, run or timm model whose weights are fetched; none for edges.
        kind: As for `AttentionSaliency`; auto: see `EARConfig.saliency`.
        in_chans: Channels of the images.
        head_fusion: As for `AttentionSaliency`.

    Raises:
        UsageError: There is no such encoder, or it lacks what is asked of it.
    """
    if name == NO_ENCODER:
        return AttentionSaliency(None, "gradient"), EncoderAsked(name, None)
    if Path(name).exists():
        encoder = start_encoder(name, create_encoder, in_chans=in_chans)
    else:
        encoder = fetch_encoder(name, create_encoder, in_chans=in_chans)
    asked = EncoderAsked(name, encoder_hash(encoder))
    chosen: Any = choose_kind(encoder, name) if kind == "auto" else kind
    return AttentionSaliency(encoder, chosen, head_fusion), asked


def choose_kind(encoder: Encoder, name: str) -> Saliency:
    """Return the kind of saliency that suits an encoder: attention, unless its class token says nothing."""
    masked = ".mae" in name or name.startswith("ccvit")
    if Path(name).exists():
        masked = str(read_lineage(name).get("made_by", "")).startswith(MASKED_AUTOENCODERS)
    return "pca" if masked or not num_prefix_tokens(encoder) else "cls_attention"


def save_ear(
    model: EAR,
    path: Path,
    *,
    image_size: tuple[int, int],
    asked: EncoderAsked,
    reading: dict[str, Any],
    calibration: dict[str, Any],
    lineage: dict[str, Any] | None = None,
) -> Path:
    """Write a model to a folder, in place of one that is there.

    Args:
        model: The pipeline; its encoder is named, not stored.
        path: The folder.
        image_size: Height and width images are resized to.
        asked: The encoder.
        reading: Options the training images were read by.
        calibration: What the threshold was set on.
        lineage: What made the model.
    """
    folder = make_folder(path)
    network = model.unet
    assert isinstance(network, RecoveryUNet)
    saliency = model.saliency
    assert isinstance(saliency, AttentionSaliency)
    versions = {"patchloom": __version__, "torch": torch.__version__, "timm": timm.__version__}
    about = {
        "format": FORMAT,
        "image_size": list(image_size),
        "pipeline": model.arguments(),
        "unet": network.arguments(),
        "saliency": {"kind": saliency.kind, "head_fusion": saliency.head_fusion, "cell": saliency.cell},
        **asked.of_file(folder),
        "reading": reading,
        "calibration": calibration,
        "versions": versions,
    }
    state = {name: value.detach().cpu().contiguous() for name, value in stored_state(model).items()}
    with written_whole(folder / WEIGHTS) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)
    write_json(folder / LINEAGE, {"lineage": lineage or {}, "versions": versions}, default=str)
    write_json(folder / ABOUT, about)
    return folder


def stored_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that are stored: those of the network and of calibration, not the encoder's."""
    return {name: value for name, value in model.state_dict().items() if not name.startswith("saliency.")}


def load_ear(path: str | Path, encoder: Encoder | None = None) -> SavedEAR:
    """Return a trained model from a run of `patchloom anomaly ear` or its model, in eval mode.

    Args:
        path: The run, or its model.
        encoder: The frozen encoder, where it is not to be found where the model says; it must be the same.

    Raises:
        UsageError: There is no model, it is damaged, or its encoder is not there or another one.
    """
    folder = next((place for place in (Path(path), Path(path) / "model") if (place / ABOUT).exists()), None)
    if folder is None:
        raise UsageError(f"{path} holds no anomaly model; train one: patchloom anomaly ear --data … --out …")
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        network = RecoveryUNet(**about["unet"])
        saliency, arguments = about["saliency"], about["pipeline"]
        size = pair(checked_size("image_size", about["image_size"]))
        named, wanted = about["encoder"], about["encoder_hash"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder / ABOUT} is damaged ({' '.join(str(error).split())[:100]}); train it again"
        ) from error
    if named != NO_ENCODER:
        encoder = _encoder_of(about, folder, network.in_channels) if encoder is None else encoder
        if (found := encoder_hash(encoder)) != wanted:
            raise UsageError(
                f"{path} was trained with the encoder {wanted} ({named}), and this one is {found}: what stands out to "
                f"it is something else; give the one it was trained with"
            )
    elif encoder is not None:
        raise UsageError(f"{path} was trained without an encoder; leave it out")
    model = EAR(AttentionSaliency(encoder, **saliency), network, **arguments)
    stored = read_tensors(folder / WEIGHTS, "train it again")
    own = {f"saliency.{name}": value for name, value in model.saliency.state_dict().items()}
    fill(model, {**stored, **own})
    return SavedEAR(model.eval(), size, dict(about.get("reading") or {}), about)


def _encoder_of(about: dict[str, Any], folder: Path, in_chans: int) -> Encoder:
    beside = about.get("encoder_from_here")
    for place in (folder / beside if beside else None, Path(about["encoder"])):
        if place is not None and place.exists():
            return start_encoder(str(place), create_encoder, in_chans=in_chans)
    if timm.is_model(about["encoder"]):
        return fetch_encoder(about["encoder"], create_encoder, in_chans=in_chans)
    raise UsageError(
        f"the model in {folder} needs the encoder {about['encoder_hash']}, which is no longer at {about['encoder']}; "
        f"give its place now as encoder"
    )
