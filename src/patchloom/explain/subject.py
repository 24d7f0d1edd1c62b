"""What is explained, and on which images: the settings all explanations share."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patchloom.data import SubsetSource, make_loader, open_source, sample_indices
from patchloom.data.base import Source
from patchloom.data.kinds import require_kind
from patchloom.data.loader import gathered
from patchloom.data.pixels import unit
from patchloom.encoders import Encoder, in_chans, input_size, normalize
from patchloom.errors import UsageError, unknown_name
from patchloom.explain.attention import class_count, encoder_of
from patchloom.explain.config import ExplainConfig
from patchloom.features.extract import torch_device
from patchloom.features.inputs import require_taken
from patchloom.models.bundle import open_encoder
from patchloom.systems.prompt_cam.model import PromptCAM


@dataclass(frozen=True)
class Subject:
    """A model and the images it is explained on."""

    model: nn.Module
    """In eval mode, on its device."""
    pictures: Tensor
    """(n, C, H, W) uint8; or clips or volumes."""
    keys: list[str]
    """Names of the images."""
    true: Tensor
    """(n,) int64 true class in the model's numbering, -1 where it is not known."""
    class_names: list[str]
    """Names of the model's classes; empty for an encoder without classes."""
    skipped: list[Any]
    """Images that could not be read."""

    @property
    def inputs(self) -> Tensor:
        """Images as the model takes them, on its device."""
        encoder = encoder_of(self.model)
        device = next(self.model.parameters()).device
        return normalize(self.shown.to(device), encoder)

    @property
    def shown(self) -> Tensor:
        """Images in [0, 1]."""
        return unit(self.pictures)

    def name_of(self, number: int) -> str:
        """Return the name of a class."""
        return self.class_names[number] if number >= 0 else "unknown"


def open_subject(
    config: ExplainConfig, *, needs_classes: bool, of_class: str | None = None, kinds: Collection[str] = ("image",)
) -> Subject:
    """Open the model and read the images.

    Args:
        config: Settings.
        needs_classes: Refuse a model without classes.
        of_class: Where the images are labelled, draw them from this class alone.
        kinds: What else than images the explanation is of.

    Raises:
        UsageError: There is no such model, class or image.
    """
    model = open_model(config)
    encoder = encoder_of(model)
    names = _class_names(model) if needs_classes or _has_classes(model) else []
    if config.class_name is not None and config.class_name not in names:
        raise unknown_name("class", config.class_name, names)
    source = open_source(
        config.images,
        in_chans=in_chans(encoder),
        seed=config.seed,
        model=encoder,
        by_index=True,
        **config.source_options(),
    )
    require_kind(source, kinds, "explain")
    require_taken(source, encoder)
    if not isinstance(source, Source):
        raise UsageError(f"{config.images} can only be read from front to back; unpack the shards to .tar")
    labels_known = source.labels is not None and source.labels.ndim == 1 and source.class_names is not None
    if of_class is not None and labels_known:
        if of_class not in (source.class_names or []):
            raise UsageError(f"{config.images} has no images of class {of_class}; give a folder that does")
        members = np.asarray(source.labels) == (source.class_names or []).index(of_class)
        source = SubsetSource(source, np.flatnonzero(members))
    chosen = SubsetSource(source, sample_indices(source, config.limit, seed=config.seed))
    view = source.kind.eval_view("crop", input_size(encoder))
    loader = make_loader(chosen, view, config.batch_size, seed=0, shuffle=False, num_workers=config.num_workers)
    pictures, labels_by_image, keys, skipped = gathered(loader, config.images, source.kind.name)
    true = (
        torch.full((len(keys),), -1)
        if labels_by_image.ndim > 1
        else _renumbered(labels_by_image, source.class_names, names)
    )
    return Subject(model, pictures, keys, true, names, skipped)


def open_model(config: ExplainConfig) -> nn.Module:
    """Return the model in eval mode on its device.

    Raises:
        UsageError: There is no such model or device, or the adapters are not its own.
    """
    model = config.model
    if not isinstance(model, PromptCAM):
        model = open_encoder(model)
        if config.adapters:
            from patchloom.models.adapters import add_adapters

            model = add_adapters(model, config.adapters)
    return model.eval().to(torch_device(config.device))


def class_number(name: str, class_names: list[str]) -> int:
    """Return the number of a class.

    Raises:
        UsageError: There is no such class.
    """
    if name not in class_names:
        raise unknown_name("class", name, class_names)
    return class_names.index(name)


def _has_classes(model: nn.Module) -> bool:
    try:
        class_count(model)
    except UsageError:
        return False
    return True


def _class_names(model: nn.Module) -> list[str]:
    count = class_count(model)
    encoder: Encoder = encoder_of(model)
    known = list((getattr(encoder, "pretrained_cfg", None) or {}).get("label_names") or [])
    return [str(name) for name in known] if len(known) == count else [str(number) for number in range(count)]


def _renumbered(labels: Tensor, theirs: list[str] | None, ours: list[str]) -> Tensor:
    """Return labels in the model's numbering, -1 for classes it does not have."""
    numbers = np.array([ours.index(name) if name in ours else -1 for name in theirs or []], dtype=np.int64)
    if not len(numbers):
        return torch.full_like(labels, -1)
    return torch.where(labels >= 0, torch.from_numpy(numbers)[labels.clamp(min=0)], -1)
