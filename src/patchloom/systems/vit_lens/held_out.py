"""Held-out samples of a sense: what they are found by, and which classes they are named."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from patchloom.data import make_loader
from patchloom.data.base import Source
from patchloom.errors import UsageError
from patchloom.systems.clip.held_out import HeldOut
from patchloom.systems.clip.model import CLIP
from patchloom.systems.clip.zero_shot import class_features, retrieval, zero_shot_accuracy
from patchloom.systems.vit_lens.cache import Cached, chosen_view
from patchloom.systems.vit_lens.model import ModalityEncoder
from patchloom.systems.vit_lens.views import SenseView


@torch.no_grad()
def embed(
    encoder: ModalityEncoder,
    source: Source,
    *,
    batch_size: int,
    num_workers: int = 0,
    context_length: int | None = None,
) -> HeldOut:
    """Return the features of all samples of a source, as `images`; those that cannot be read are listed.

    Args:
        encoder: In eval mode.
        source: Samples of its sense.
        batch_size: Samples at once.
        num_workers: Processes that read.
        context_length: Tokens of a caption, where captions are to be told apart; None: they are not read.

    Raises:
        UsageError: None can be read.
    """
    device = next(encoder.parameters()).device
    kind = source.kind.name
    loader = make_loader(
        source, SenseView(kind, context_length, False), batch_size, seed=0, shuffle=False, num_workers=num_workers
    )
    found = HeldOut(*(torch.empty(0),) * 4, indices=[], keys=[], skipped=[], cut=0)
    features, labels, ids = [], [], []
    for batch in loader:
        found.skipped += batch["skipped"]
        if not batch["key"]:
            continue
        features.append(encoder.encode(batch[kind].to(device)).cpu())
        labels.append(batch["label"])
        found.indices += batch["index"].tolist()
        found.keys += batch["key"]
        if "text_id" in batch:
            ids.append(batch["text_id"])
    if not features:
        why = f"; the first is '{found.skipped[0][0]}': {found.skipped[0][1]}" if found.skipped else ""
        raise UsageError(f"{source.name} holds nothing readable{why}")
    found.images, found.labels = torch.cat(features), torch.cat(labels)
    if ids:
        found.text_ids = torch.cat(ids)
    return found


def measure(
    encoder: ModalityEncoder,
    towers: CLIP,
    source: Source,
    cached: Cached,
    *,
    templates: Sequence[str],
    batch_size: int,
    num_workers: int = 0,
) -> HeldOut:
    """Return the features of samples with recall and, where there are classes, zero-shot accuracy.

    Figures are `sense_to_text_r1`, `_r5`, `_r10`, `text_to_sense_…`, the same of images where there are any,
    `accuracy`, `accuracy_top5`, `balanced_accuracy` and `majority_share`.
    """
    found = embed(
        encoder,
        source,
        batch_size=batch_size,
        num_workers=num_workers,
        context_length=int(towers.text.context_length),
    )
    everything = torch.arange(len(found.keys))
    found.texts = cached.texts[found.indices]
    recalls = retrieval(found.images, found.texts, everything, found.text_ids)
    found.figures = {_named(name, "text"): value for name, value in recalls.items()}
    pictures = chosen_view(cached.images[found.indices], mean=True) if cached.images.shape[1] else None
    if pictures is not None and not pictures.isnan().any():
        found.figures |= {_named(n, "image"): v for n, v in retrieval(found.images, pictures, everything).items()}
    known = found.labels >= 0 if found.labels.ndim == 1 else torch.zeros(len(found.labels), dtype=torch.bool)
    if source.class_names and len(source.class_names) > 1 and known.any():
        classes = class_features(towers, source.class_names, templates).cpu()
        features, labels = found.images[known], found.labels[known]
        accuracy = zero_shot_accuracy(features, classes, labels)
        right = (features @ classes.T).argmax(1) == labels
        counts = np.bincount(labels.numpy(), minlength=len(classes))
        there = np.flatnonzero(counts)
        shares = [float(right[labels == number].float().mean()) for number in there]
        found.per_class = dict(zip([source.class_names[number] for number in there], shares, strict=True))
        found.figures |= {
            "accuracy": accuracy.top1,
            "accuracy_top5": accuracy.top5,
            "balanced_accuracy": float(np.mean(shares)),
            "majority_share": float(counts.max() / counts.sum()),
        }
    return found


def _named(name: str, other: str) -> str:
    """Return the name of a figure of `retrieval`, where a sense stands for the images and `other` for the texts."""
    if name == "retrieval_mean_recall":
        return f"{other}_{name}"
    return name.replace("text", "OTHER").replace("image", "sense").replace("OTHER", other)
