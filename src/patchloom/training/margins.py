"""A margin for every class, the wider the rarer it is: the loss of LDAM, on cosines.

Cao et al. 2019, arXiv 1906.07413.

>>> loss = LDAM([5000, 50])
>>> [round(float(margin), 3) for margin in loss.margins]
[0.158, 0.5]
>>> round(float(loss(torch.tensor([[0.4, 0.1]]), torch.tensor([0]))), 4)  # 30 (0.4 - 0.158) against 30 · 0.1
0.0141
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.errors import UsageError


class LDAM(nn.Module):
    """Cross-entropy of scaled cosines, the right class's lowered by its margin Δ_c ~ n_c^(-1/4).

    Args:
        counts: (C,) training images of each class, at least 1.
        max_margin: Margin of the rarest class.
        scale: Factor on the cosines.

    Raises:
        UsageError: A class without image.
    """

    margins: Tensor

    def __init__(self, counts: Sequence[int] | Tensor, max_margin: float = 0.5, scale: float = 30.0) -> None:
        super().__init__()
        number = torch.as_tensor(counts, dtype=torch.float64)
        if bool((number < 1).any()):
            raise UsageError(f"class {int(number.argmin())} has no training image, so it has no margin; drop the class")
        raw = number.pow(-0.25)
        # It follows from the data, so a checkpoint need not hold it.
        self.register_buffer("margins", (max_margin * raw / raw.max()).float(), persistent=False)
        self.scale = scale

    def forward(self, cosines: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            cosines: (B, C) in [-1, 1].
            labels: (B,) int64, -1 where unknown.
            weights: (C,) weight of each class.
        """
        right = F.one_hot(labels.clamp_min(0), cosines.shape[1]).to(cosines)
        lowered = self.scale * (cosines - right * self.margins.to(cosines))
        return F.cross_entropy(
            lowered, labels, weight=None if weights is None else weights.to(cosines), ignore_index=-1
        )


def cosines(model: Any, images: Tensor) -> Tensor:
    """Return the cosine of each image's feature and each class's vector, (B, C) float32, of a timm classifier.

    Args:
        model: Its classifier is one linear layer; the bias takes no part.
        images: (B, 3, H, W), normalised.
    """
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    with torch.autocast(images.device.type, enabled=False):  # the scale would multiply what half precision rounds off
        return F.normalize(features.float(), dim=1) @ F.normalize(model.get_classifier().weight.float(), dim=1).T


@torch.no_grad()
def classify_by_angle_(model: Any) -> None:
    """Give a classifier class vectors of length 1 and no bias, so that its first choice is that of the cosines.

    What was trained on cosines is then a plain model: the length of the feature scales all logits alike.
    """
    head = model.get_classifier()
    head.weight.copy_(F.normalize(head.weight, dim=1))
    if head.bias is not None:
        head.bias.zero_()


def has_linear_head(model: Any) -> bool:
    """Return whether a model classifies by one linear layer on the features its `forward_head` gives."""
    head = getattr(model, "get_classifier", lambda: None)()
    return isinstance(head, nn.Linear) and hasattr(model, "forward_head")
