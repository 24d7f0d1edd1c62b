"""Who is attacked, through whom, and on which images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from patchloom.data import EvalTransform, SubsetSource, make_loader, open_source, sample_indices
from patchloom.data.base import Source, no_labels
from patchloom.data.kinds import require_kind
from patchloom.data.loader import gathered
from patchloom.data.pixels import unit
from patchloom.data.reading import remembered
from patchloom.data.subset import labelled_images
from patchloom.data.survey import notice
from patchloom.encoders import Encoder, image_size, in_chans
from patchloom.errors import UsageError
from patchloom.features.extract import torch_device
from patchloom.models.bundle import load_model, open_encoder
from patchloom.systems.dta.config import DTAConfig, listed
from patchloom.systems.dta.features import PixelClassifier, check_normalises


@dataclass(frozen=True)
class Victim:
    """A model that is attacked."""

    name: str
    model: PixelClassifier
    """Takes images in [0, 1], gives logits; in eval mode."""
    labels: Tensor
    """(n,) int64 true classes in the model's own numbering."""
    classes: int
    """Number of its classes."""


@dataclass(frozen=True)
class Subjects:
    """Encoders, victims and images of an attack."""

    encoders: list[Encoder]
    """What the attacker knows, in eval mode."""
    encoder_names: list[str]
    victims: list[Victim]
    images: Tensor
    """(n, C, H, W) clean images in [0, 1], of the first encoder's size, on the CPU."""
    keys: list[str]
    """Names of the images."""
    available: int
    """Labelled images there are in the data."""
    skipped: list[Any]
    """Images that could not be read."""
    device: torch.device


def open_subjects(config: DTAConfig) -> Subjects:
    """Open models and images.

    Raises:
        UsageError: There is no such model or image; a victim has no classes, or not those of the images.
    """
    device = torch_device(config.device)
    encoders = {name: _opened(one, device) for name, one in _named(config.encoder, "encoder").items()}
    models = {name: open_victim(one, device) for name, one in _named(config.victim, "victim").items()}
    first = next(iter(encoders.values()))
    for name, model in models.items():
        if not has_classes(model):
            raise UsageError(
                f"the victim {name} has no classes; give a run of patchloom adapt, or a bundle with a classifier"
            )
    for name, model in {**encoders, **models}.items():
        if in_chans(model) != in_chans(first):
            raise UsageError(
                f"{name} takes {in_chans(model)} channels and the first encoder {in_chans(first)}; an image has to fit "
                f"both"
            )
    source, available = _open_images(config, first, models)
    view = EvalTransform(image_size(first))
    loader = make_loader(source, view, config.batch_size, seed=0, shuffle=False, num_workers=config.num_workers)
    pictures, truth, keys, skipped = gathered(loader, config.data)
    shown = unit(pictures)
    victims = []
    for name, model in models.items():
        classifier = PixelClassifier(model).eval()
        with torch.no_grad():
            outputs = classifier(shown[:1].to(device)).shape[1]
        own = _renumbered(truth, list(source.class_names or []), name, class_names(model), outputs)
        victims.append(Victim(name, classifier, own, outputs))
    for name, model in models.items():
        if image_size(model) != image_size(first):
            notice(
                f"{name} takes images of {_said(model)} pixels and the encoder of {_said(first)}: attacked images are "
                f"resized for it, which weakens attacks"
            )
    return Subjects(list(encoders.values()), list(encoders), victims, shown, keys, available, skipped, device)


def class_names(model: Encoder) -> list[str]:
    """Return the names of a classifier's outputs, in their order; empty where it does not name them."""
    return [str(one) for one in (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or []]


def has_classes(model: Encoder) -> bool:
    """Return whether a model is a classifier: timm's, or an encoder with an adapter that has a head."""
    return bool(int(getattr(model, "num_classes", 0) or 0)) or bool(class_names(model))


def _open_images(config: DTAConfig, encoder: Encoder, models: Mapping[str, Encoder]) -> tuple[Source, int]:
    """Return the images to attack, read as the first victim reads them, and how many there were to draw from."""
    victim, *others = models.values()
    reader = victim if remembered(victim) else encoder
    if any(remembered(other) != remembered(victim) for other in others):
        notice("the victims were trained on images read in different ways; all read these as the first does")
    source = open_source(
        config.data,
        in_chans=in_chans(encoder),
        seed=config.seed,
        model=reader,
        by_index=True,
        **config.source_options(),
    )
    require_kind(source, ("image",), "attack")
    if not isinstance(source, Source):
        raise UsageError(f"{config.data} can only be read from front to back; unpack the shards to .tar")
    if source.class_names is None:
        raise no_labels(source, "an attack succeeds where an answer was right, so it needs labels and ")
    if source.multilabel:
        raise UsageError(f"images of {config.data} have several labels; attacks are measured where each has one class")
    source, _ = labelled_images(source)
    chosen = SubsetSource(source, sample_indices(source, config.limit, seed=config.seed))
    if len(chosen) < len(source):
        notice(f"{len(chosen)} of {len(source):,} images are attacked, drawn at random (limit)")
    return chosen, len(source)


def _named(given: Any, what: str) -> dict[str, Any]:
    """Return what is opened by a short name: of its run, or of its class where it is a module."""
    if isinstance(given, Mapping):
        named = {str(name): one for name, one in given.items()}
    else:
        named = {}
        for one in [given] if isinstance(given, nn.Module) else listed(given):
            name = _short(one)
            while name in named:
                name = f"{name}'"
            named[name] = one
    if not named:
        raise UsageError(f"{what} names no model")
    return named


def _short(one: Any) -> str:
    if isinstance(one, nn.Module):
        return type(one).__name__
    parts = [part for part in Path(str(one)).parts if part not in ("model", "adapter.safetensors", "/", ".")]
    return parts[-1] if parts else str(one)


def open_victim(one: Any, device: torch.device) -> Encoder:
    """Return a model to be attacked, in eval mode, as it answers: of a bundle that is more than an encoder the whole.

    Raises:
        UsageError: There is no such model, or it does not say how images are normalised.
    """
    if isinstance(one, nn.Module) or not Path(str(one)).exists():
        return _opened(one, device)
    return _ready(cast(Encoder, load_model(str(one))), device)


def _opened(one: Any, device: torch.device) -> Encoder:
    return _ready(open_encoder(one), device)


def _ready(model: Encoder, device: torch.device) -> Encoder:
    check_normalises(model)
    return model.eval().to(device)


def _said(model: Encoder) -> str:
    return "x".join(map(str, image_size(model)))


def _renumbered(labels: Tensor, theirs: list[str], name: str, ours: list[str], outputs: int) -> Tensor:
    """Return labels in a victim's numbering.

    Raises:
        UsageError: The images show a class the victim does not have.
    """
    if not ours:
        if len(theirs) != outputs:
            raise UsageError(
                f"the victim {name} tells {outputs} classes apart, without their names, and the images show "
                f"{len(theirs)}; give images of its own classes"
            )
        notice(f"{name} does not name its classes; they are taken to be those of the images, in their order")
        return labels
    if len(ours) != outputs:
        raise UsageError(f"the victim {name} names {len(ours)} classes and gives {outputs} numbers; write it again")
    shown = [theirs[number] for number in labels.unique().tolist()]
    if missing := [one for one in shown if one not in ours]:
        raise UsageError(f"the images show the class {missing[0]}, and the victim {name} has {', '.join(ours[:8])}")
    numbers = torch.from_numpy(np.array([ours.index(one) if one in ours else -1 for one in theirs], dtype=np.int64))
    return numbers[labels]
