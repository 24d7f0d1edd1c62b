"""G2SD's second stage for detectors: a student's feature pyramid and objectness are held to a teacher's.

Written for lists of maps, whatever detector they come from. "Generic-to-Specific Distillation of Masked Autoencoders",
arXiv 2302.14771, and the detection part of its published code.

>>> adapter = PyramidAdapter(levels=2, channels=8)
>>> student, teacher = ([torch.randn(1, 8, side, side) for side in (4, 2)] for _ in range(2))
>>> seen, wanted = ([torch.randn(1, 3, side, side) for side in (4, 2)] for _ in range(2))
>>> loss = pyramid_distillation_loss(adapter(student), teacher, seen, wanted, step=500)
>>> loss.shape
torch.Size([])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.base.ranges import PositiveInt, checked
from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError


class PyramidAdapter(nn.Module):
    """A 3x3 convolution for each level of a student's pyramid, in front of the comparison with the teacher's.

    Args:
        levels: Levels of the pyramid; paper: 5 (strides 4 to 64).
        channels: Channels of every level; paper: 256.

    Raises:
        UsageError: No level, or no channel.
    """

    @checked
    def __init__(self, levels: PositiveInt = 5, channels: PositiveInt = 256) -> None:
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(levels))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return (B, channels, h, w) per level, of as many maps of that shape.

        Raises:
            UsageError: Another number of maps than levels.
        """
        if len(maps) != len(self.conv):
            raise UsageError(f"the adapter was made for {len(self.conv)} levels and gets {len(maps)}")
        return [conv(x) for conv, x in zip(self.conv, maps, strict=True)]


def pyramid_distillation_loss(
    feats_s: Sequence[Tensor],
    feats_t: Sequence[Tensor],
    obj_s: Sequence[Tensor],
    obj_t: Sequence[Tensor],
    weights: tuple[float, float] = (1e-3, 0.1),
    warmup: int = 500,
    *,
    step: int | None = None,
) -> Tensor:
    """Return what is added to a student detector's own losses.

    Args:
        feats_s: The student's maps (B, C, h, w), one per level, behind its `PyramidAdapter`.
        feats_t: The teacher's, of the same shapes; no gradient.
        obj_s: The student's objectness logits (B, A, h, w) of the A anchors at each place, one per level.
        obj_t: The teacher's; no gradient.
        weights: Of the feature and of the objectness term; paper: 0.001 and 0.1.
        warmup: Steps over which both weights rise from 0; paper: 500.
        step: The step, from 0; None: past the warm-up.

    Returns:
        Scalar, in float32 at least: a half's weights may underflow to a sum of 0.

    Raises:
        UsageError: Levels that differ in number, shape or place.
    """
    feature, objectness = pyramid_distillation_terms(feats_s, feats_t, obj_s, obj_t)
    risen = 1.0 if step is None or warmup <= 0 else min(step / warmup, 1.0)
    return (weights[0] * feature + weights[1] * objectness) * risen


def pyramid_distillation_terms(
    feats_s: Sequence[Tensor], feats_t: Sequence[Tensor], obj_s: Sequence[Tensor], obj_t: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the feature and the objectness term, unweighted; arguments as for `pyramid_distillation_loss`.

    With w the largest of the teacher's objectness over the anchors of a place: the squared difference of features,
    summed over channels, and the binary cross-entropy of objectness, summed over anchors, each averaged over the places
    of all images with the weights w. Levels are summed.
    """
    _check(feats_s, feats_t, obj_s, obj_t)
    features, answers = [], []
    for ours, theirs, student_objectness, teacher_objectness in zip(feats_s, feats_t, obj_s, obj_t, strict=True):
        student_objectness, teacher_objectness = (
            at_least_float32(student_objectness),
            at_least_float32(teacher_objectness.detach()).sigmoid(),
        )
        places = teacher_objectness.amax(1, keepdim=True)
        difference = (at_least_float32(theirs.detach()) - at_least_float32(ours)).square()
        entropy = F.binary_cross_entropy_with_logits(student_objectness, teacher_objectness, reduction="none")
        features.append((difference * places).sum() / places.sum())
        answers.append((entropy * places).sum() / places.sum())
    return torch.stack(features).sum(), torch.stack(answers).sum()


def _check(
    feats_s: Sequence[Tensor], feats_t: Sequence[Tensor], obj_s: Sequence[Tensor], obj_t: Sequence[Tensor]
) -> None:
    """Refuse pyramids that do not belong together."""
    counts = [len(each) for each in (feats_s, feats_t, obj_s, obj_t)]
    if len(set(counts)) > 1 or not counts[0]:
        raise UsageError(f"the pyramids have {', '.join(map(str, counts))} levels; give the same, at least one")
    for level, (ours, theirs, student_objectness, teacher_objectness) in enumerate(
        zip(feats_s, feats_t, obj_s, obj_t, strict=True)
    ):
        if ours.shape != theirs.shape or student_objectness.shape != teacher_objectness.shape:
            raise UsageError(
                f"level {level}: student and teacher have features {tuple(ours.shape)} and {tuple(theirs.shape)}, "
                f"objectness {tuple(student_objectness.shape)} and {tuple(teacher_objectness.shape)}; they must agree"
            )
        if (len(ours), *ours.shape[2:]) != (len(student_objectness), *student_objectness.shape[2:]):
            raise UsageError(
                f"level {level}: features {tuple(ours.shape)} and objectness {tuple(student_objectness.shape)} differ"
            )
