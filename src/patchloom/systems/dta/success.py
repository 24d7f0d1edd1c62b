"""Whether an attack succeeded: what a classifier said before and after.

>>> import torch
>>> clean = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
>>> attacked = torch.tensor([[0.0, 2.0], [2.0, 0.0], [0.0, 2.0]])
>>> found = attack_success(clean, attacked, torch.tensor([0, 0, 0]))
>>> found["asr"], round(found["clean"], 1)
(50.0, 66.7)
"""

from __future__ import annotations

from torch import Tensor

from patchloom.errors import UsageError


def attack_success(clean_logits: Tensor, adv_logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return how well a classifier stood up to an attack, in percent.

    Args:
        clean_logits: (n, classes) answers on clean images.
        adv_logits: (n, classes) answers on the attacked ones, in the same order.
        labels: (n,) int64 true classes.

    Returns:
        `asr`, the attack success rate: of the images that were right, the share that is wrong now (NaN where none was
        right: mistakes on clean images are no success). Of all images: `clean`, right before; `robust`, right now;
        `error`, wrong now; `flip`, the answer is another one now.

    Raises:
        UsageError: No image, or lengths that differ.
    """
    if not len(labels) or not len(clean_logits) == len(adv_logits) == len(labels):
        raise UsageError(
            f"{len(clean_logits)} answers on clean images and {len(adv_logits)} on attacked ones do not belong to "
            f"{len(labels)} labels"
        )
    before, now = clean_logits.argmax(1), adv_logits.argmax(1)
    right, still_right = before == labels, now == labels
    robust = 100 * float(still_right.double().mean())
    return {
        "asr": 100 * float((~still_right[right]).double().mean()),
        "error": 100 - robust,
        "flip": 100 * float((before != now).double().mean()),
        "robust": robust,
        "clean": 100 * float(right.double().mean()),
    }
