"""What aligned towers can do without further training: name classes by sentences, find captions and images.

Classes by sentences as in CLIP (Radford et al. 2021, arXiv 2103.00020, section 3.1.4): the normalised features of all
sentences of a class are averaged, and normalised once more.

>>> images = torch.eye(3)
>>> retrieval(images, torch.eye(3)[[0, 0, 1, 2]], torch.tensor([0, 0, 1, 2]))["image_to_text_r1"]
1.0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.data.pixels import unit
from patchloom.data.transforms import EvalTransform
from patchloom.encoders import image_size, normalize
from patchloom.errors import UsageError
from patchloom.systems.clip.config import TEMPLATES
from patchloom.systems.clip.model import CLIP
from patchloom.systems.clip.text import readable_name, tokenize_all

RANKS = (1, 5, 10)
TEXTS_AT_ONCE = 256


@torch.no_grad()
def text_features(model: CLIP, texts: Sequence[str]) -> Tensor:
    """Return the normalised features (n, D) of sentences."""
    device = model.logit_scale.device
    tokens = tokenize_all(texts, model.text.context_length)
    return torch.cat([model.encode_text(part.to(device), normalize=True) for part in tokens.split(TEXTS_AT_ONCE)])


def class_features(model: CLIP, class_names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
    """Return one normalised feature per class, (C, D): the mean of those of its sentences.

    Args:
        model: Aligned towers.
        class_names: Names, whose underscores are read as blanks.
        templates: Sentences with {} where the name goes.

    Raises:
        UsageError: A template without {}, or none.
    """
    if not templates or any("{}" not in sentence for sentence in templates):
        raise UsageError("a template has {} where the name of a class goes, as in: a photo of a {}.")
    texts = [sentence.format(readable_name(name)) for name in class_names for sentence in templates]
    features = text_features(model, texts).unflatten(0, (len(class_names), len(templates)))
    return F.normalize(features.mean(1), dim=-1)


class ZeroShotClassifier(nn.Module):
    """Tells classes by their names.

    Args:
        model: Aligned towers.
        class_names: Names of the classes.
        templates: Sentences with {} where a name goes.
    """

    classes: Tensor

    def __init__(self, model: CLIP, class_names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> None:
        super().__init__()
        self.model, self.class_names = model, list(class_names)
        self.register_buffer("classes", class_features(model, class_names, templates))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, C) of images (B, C, H, W) normalised as the trunk takes them: 100 times the cosines."""
        return 100.0 * self.model.encode_image(images, normalize=True) @ self.classes.T

    @torch.no_grad()
    def predict(self, images: Tensor) -> list[str]:
        """Return the name of the likeliest class of each image (B, C, H, W), uint8 or float in [0, 1], of any size."""
        trunk = self.model.visual.trunk
        view = EvalTransform(image_size(trunk), 1.0)
        seen = unit(torch.stack([view(image)["image"] for image in images])).to(self.classes.device)
        return [self.class_names[number] for number in self(normalize(seen, trunk)).argmax(1).tolist()]


class Accuracy(NamedTuple):
    """How often the right class is the first, or among the first five."""

    top1: float
    top5: float


def zero_shot_accuracy(images: Tensor, classes: Tensor, labels: Tensor) -> Accuracy:
    """Return the accuracy of naming images by classes.

    Args:
        images: (n, D), normalised.
        classes: (C, D), see `class_features`.
        labels: (n,) int64 from 0 to C - 1.
    """
    ranked = (images @ classes.T).topk(min(5, len(classes)), dim=1).indices
    hits = ranked == labels[:, None]
    return Accuracy(float(hits[:, 0].float().mean()), float(hits.any(1).float().mean()))


def by_image(keys: Sequence[str]) -> tuple[list[int], Tensor]:
    """Return where each image comes first, and of every place the number of its image: captions may share an image.

    >>> by_image(["a.jpg", "b.jpg", "a.jpg"])
    ([0, 1], tensor([0, 1, 0]))
    """
    number: dict[str, int] = {}
    owners = [number.setdefault(key, len(number)) for key in keys]
    first = {owner: place for place, owner in reversed(list(enumerate(owners)))}
    return [first[owner] for owner in range(len(number))], torch.tensor(owners)


def retrieval(
    images: Tensor, texts: Tensor, owners: Tensor, same: Tensor | None = None, by_query: bool = False
) -> dict[str, Any]:
    """Return how often the right partner is among the first 1, 5 and 10, in both directions, and their mean.

    An image finds its text where any of its captions is among the first; every caption looks for its image.

    Args:
        images: (n, D), normalised.
        texts: (m, D), normalised.
        owners: (m,) int64, the image each text belongs to.
        same: (m,) int64, equal where texts say the same: they count once among what images find, and an image with
            such a text is right, too. None: all differ.
        by_query: Return whether each query finds what is right, as tensors of 0 and 1, and no mean.
    """
    belongs = torch.zeros(len(images), len(texts), dtype=torch.bool, device=images.device)
    belongs[owners, torch.arange(len(texts), device=images.device)] = True
    similarity = images @ texts.T
    looked_for, belonging = similarity, belongs  # what images look for: different texts, each once
    if same is not None:  # an image owns all texts that say what one of its own says
        kinds = same.unique(return_inverse=True)[1]
        count = int(kinds.max()) + 1
        first = torch.full((count,), len(texts)).scatter_reduce(0, kinds, torch.arange(len(texts)), "amin")
        belonging = torch.zeros(len(images), count, dtype=torch.bool, device=images.device)
        belonging[owners, kinds] = True
        looked_for, belongs = similarity[:, first], belonging[:, kinds]
    figures: dict[str, Any] = {}
    for name, scores, right in (
        ("image_to_text", looked_for, belonging),
        ("text_to_image", similarity.T, belongs.T),
    ):
        ranked = right.gather(1, scores.topk(min(max(RANKS), scores.shape[1]), dim=1).indices)
        for rank in RANKS:
            hits = ranked[:, :rank].any(1).float()
            figures[f"{name}_r{rank}"] = hits if by_query else float(hits.mean())
    if by_query:
        return figures
    return {**figures, "retrieval_mean_recall": sum(figures.values()) / len(figures)}
