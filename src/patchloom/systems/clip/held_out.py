"""Held-out pairs as aligned towers see them: features, recall, zero-shot accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchloom.data import make_loader
from patchloom.data.base import Source
from patchloom.data.pixels import unit
from patchloom.data.sample import Transform
from patchloom.data.transforms import EvalTransform
from patchloom.encoders import image_size, normalize
from patchloom.errors import UsageError
from patchloom.systems.clip.captions import PairedWithText
from patchloom.systems.clip.model import CLIP
from patchloom.systems.clip.zero_shot import by_image, class_features, retrieval, zero_shot_accuracy


@dataclass
class HeldOut:
    """What the towers make of pairs."""

    images: Tensor
    """(n, D), normalised."""
    texts: Tensor
    """(n, D), normalised."""
    text_ids: Tensor
    """(n,) int64, equal where captions say the same."""
    labels: Tensor
    """(n,) int64, -1 where unknown."""
    indices: list[int]
    """Their numbers within the source."""
    keys: list[str]
    """Their names."""
    skipped: list[tuple[str, str]]
    """What could not be read."""
    cut: int
    """Captions that were longer than the context."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Recall and accuracies."""
    per_class: dict[str, float] = field(default_factory=dict)
    """Zero-shot accuracy of each class."""


def embed_images(model: CLIP, source: Source, *, batch_size: int, num_workers: int = 0) -> HeldOut:
    """Return the features of all images of a source, and none of texts; see `embed_pairs`."""
    return _embedded(model, source, EvalTransform(image_size(model.visual.trunk), 1.0), batch_size, num_workers)


def embed_pairs(model: CLIP, source: Source, *, batch_size: int, num_workers: int = 0) -> HeldOut:
    """Return the features of all pairs of a source.

    Args:
        model: The towers, in eval mode.
        source: Images with captions; those without are left out, and listed.
        batch_size: Pairs at once.
        num_workers: Processes that read.

    Raises:
        UsageError: No pair can be read.
    """
    view = PairedWithText(EvalTransform(image_size(model.visual.trunk), 1.0), model.text.context_length)
    return _embedded(model, source, view, batch_size, num_workers)


@torch.no_grad()
def _embedded(model: CLIP, source: Source, view: Transform, batch_size: int, num_workers: int) -> HeldOut:
    device, trunk = model.logit_scale.device, model.visual.trunk
    loader = make_loader(source, view, batch_size, seed=0, shuffle=False, num_workers=num_workers)
    images, texts, ids, labels = [], [], [], []
    found = HeldOut(*(torch.empty(0),) * 4, indices=[], keys=[], skipped=[], cut=0)
    for batch in loader:
        found.skipped += batch["skipped"]
        if not batch["key"]:
            continue
        images.append(model.encode_image(normalize(unit(batch["image"].to(device)), trunk), normalize=True).cpu())
        if "tokens" in batch:
            texts.append(model.encode_text(batch["tokens"].to(device), normalize=True).cpu())
            ids.append(batch["text_id"])
            found.cut += int(batch["cut"].sum())
        labels.append(batch["label"])
        found.indices += batch["index"].tolist()
        found.keys += batch["key"]
    if not images:
        why = f"; the first is '{found.skipped[0][0]}': {found.skipped[0][1]}" if found.skipped else ""
        what = "pair of a readable image and a caption" if "caption" in getattr(view, "reads", ()) else "readable image"
        raise UsageError(f"{source.name} holds no {what}{why}")
    found.images, found.labels = torch.cat(images), torch.cat(labels)
    if texts:
        found.texts, found.text_ids = torch.cat(texts), torch.cat(ids)
    return found


def measure(model: CLIP, source: Source, *, templates: Sequence[str], batch_size: int, num_workers: int = 0) -> HeldOut:
    """Return the features of pairs with their recall and, where each has one class, zero-shot accuracy.

    Figures are `image_to_text_r1`, `_r5`, `_r10`, the same of `text_to_image`, `retrieval_mean_recall`, and `accuracy`,
    `accuracy_top5`, `balanced_accuracy`, `majority_share` of naming classes by `templates`.
    """
    found = embed_pairs(model, source, batch_size=batch_size, num_workers=num_workers)
    first, owners = by_image(found.keys)
    found.figures = retrieval(found.images[first], found.texts, owners, found.text_ids)
    known = found.labels >= 0 if found.labels.ndim == 1 else torch.zeros(len(found.labels), dtype=torch.bool)
    if source.class_names and len(source.class_names) > 1 and known.any():
        classes = class_features(model, source.class_names, templates).cpu()
        images, labels = found.images[known], found.labels[known]
        accuracy = zero_shot_accuracy(images, classes, labels)
        right = (images @ classes.T).argmax(1) == labels
        counts = np.bincount(labels.numpy(), minlength=len(classes))
        shares = [float(right[labels == number].float().mean()) for number in np.flatnonzero(counts)]
        names = [source.class_names[number] for number in np.flatnonzero(counts)]
        found.per_class = dict(zip(names, shares, strict=True))
        found.figures |= {
            "accuracy": accuracy.top1,
            "accuracy_top5": accuracy.top5,
            "balanced_accuracy": float(np.mean(shares)),
            "majority_share": float(counts.max() / counts.sum()),
        }
    return found
