"""What decoders are trained with: cross-entropy at the size of the mask, and Dice.

>>> logits, mask = torch.zeros(1, 2, 2, 2), torch.tensor([[[0, 1, 255, 255]] * 4])
>>> round(float(segmentation_loss(logits, mask)), 4)
0.6931
>>> round(float(segmentation_loss(logits, mask, average="all")), 4)
0.3466
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.encoders.precision import at_least_float32
from patchloom.errors import unknown_name
from patchloom.segment.layers import resize
from patchloom.segment.metrics import IGNORED

AUXILIARY_WEIGHT = 0.4


def segmentation_loss(
    logits: Tensor,
    target: Tensor,
    *,
    average: Literal["valid", "all"] = "valid",
    ignore_index: int = IGNORED,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy of logits resized to the mask, in float32 (float64 where they are).

    Args:
        logits: (B, K, h, w).
        target: (B, H, W) int64.
        average: Over pixels whose truth is known, or over `all`, the others counting as zero (mmsegmentation 0.20).
        ignore_index: Truth of pixels that do not count.
        class_weights: (K,) weight of the pixels of each class; the mean over those that are known is weighted, too.

    Returns:
        A scalar; 0 where no pixel counts.

    Raises:
        UsageError: Unknown average.
    """
    if average not in ("valid", "all"):
        raise unknown_name("average", average, ("valid", "all"))
    scaled = resize(at_least_float32(logits), target.shape[-2:])
    weights = None if class_weights is None else class_weights.to(scaled.dtype)
    total = F.cross_entropy(scaled, target, weights, ignore_index=ignore_index, reduction="sum")
    if average == "all":
        return total / target.numel()
    known = target != ignore_index
    if weights is not None:
        return total / weights[target[known]].sum().clamp(min=torch.finfo(weights.dtype).tiny)
    count = known.sum().clamp(min=1)
    return total / count


def dice_loss(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = IGNORED,
    smooth: float = 1e-5,
    background: bool = True,
    squared_pred: bool = False,
    batch: bool = False,
    smooth_dr: float | None = None,
) -> Tensor:
    """Return 1 - soft Dice, averaged over images and classes, of softmax probabilities at the size of the mask.

    The names are MONAI's: without ignored pixels this is its `DiceLoss(softmax=True, to_onehot_y=True, …)`. Its
    defaults, plain denominators per image, are those of every protocol here but DVPT's, which sets both switches.

    Args:
        logits: (B, K, h, w); of volumes (B, K, D, H, W), of the size of the mask.
        target: (B, H, W) int64, or (B, D, H, W); `ignore_index` where unknown, which counts nowhere.
        ignore_index: Truth of pixels that do not count.
        smooth: Added to numerator and denominator.
        background: Count class 0 too.
        squared_pred: Add up squares in the denominator: 1 - (2 Σ p t + s) / (Σ p² + Σ t² + s).
        batch: Add up over the whole batch, not over each image.
        smooth_dr: Added to the denominator instead.
    """
    logits = resize(at_least_float32(logits), target.shape[-2:])
    known = (target != ignore_index).unsqueeze(1)
    classes = F.one_hot(target.where(known[:, 0], 0), logits.shape[1]).movedim(-1, 1) * known
    shares = logits.softmax(1) * known
    over, first = (*([0] if batch else []), *range(2, logits.ndim)), 0 if background else 1
    both = (shares * classes).sum(over)[..., first:]
    # A truth of zeros and ones is its own square.
    sizes = ((shares.square() if squared_pred else shares).sum(over) + classes.sum(over))[..., first:]
    return (1 - (2 * both + smooth) / (sizes + (smooth if smooth_dr is None else smooth_dr))).mean()


def decoder_loss(
    logits: Tensor,
    auxiliary: Tensor | None,
    target: Tensor,
    *,
    kind: Literal["ce", "dice", "dice+ce"] = "ce",
    average: Literal["valid", "all"] = "valid",
    dice: Literal["image", "batch"] = "image",
    class_weights: Tensor | None = None,
) -> Tensor:
    """Return the loss of a decoder: cross-entropy, Dice, or their sum; that of an auxiliary head counts 0.4.

    Args:
        logits: (B, K, h, w).
        auxiliary: Likewise, of a second head in training; None where there is none.
        target: (B, H, W) int64.
        kind: What is added up.
        average: What cross-entropy is averaged over, see `segmentation_loss`.
        dice: Dice of each `image` with plain denominators, or of the whole `batch` with squared ones (DVPT).
        class_weights: (K,) of cross-entropy, see `segmentation_loss`.
    """
    loss = logits.new_zeros((), dtype=torch.float32)
    if "ce" in kind:
        loss = loss + segmentation_loss(logits, target, average=average, class_weights=class_weights)
    if "dice" in kind:
        loss = loss + dice_loss(logits, target, squared_pred=dice == "batch", batch=dice == "batch")
    if auxiliary is None:
        return loss
    options: dict[str, Any] = {"kind": kind, "average": average, "dice": dice, "class_weights": class_weights}
    return loss + AUXILIARY_WEIGHT * decoder_loss(auxiliary, None, target, **options)


def pixel_accuracy(logits: Tensor, target: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Return the share (float64) of known pixels that the logits, resized to the mask, get right."""
    # A quarter of the time of argmax along the classes, on a CPU.
    predicted = resize(at_least_float32(logits), target.shape[-2:]).max(1).indices
    known = target != ignore_index
    return ((predicted == target) & known).sum().double() / torch.clamp(known.sum(), min=1)
