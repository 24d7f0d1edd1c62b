"""What a student's outputs are held to: a teacher's soft or hard answers. Tensors in, a scalar out.

>>> student, teacher = torch.zeros(2, 3), torch.tensor([[9.0, 0, 0], [0, 9.0, 0]])
>>> round(float(hard_distillation_loss(student, teacher)), 4)  # ln 3
1.0986
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError

TARGET_LOWERED_BY = 1000.0


def hard_distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the cross-entropy against the teacher's first choice (DeiT; Touvron et al. 2021).

    Args:
        student: (B, C) logits.
        teacher: (B, C) logits.
    """
    return F.cross_entropy(at_least_float32(student), teacher.argmax(1))


def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0, weight: float = 0.5) -> Tensor:
    """Return the soft cross-entropy against the teacher's distribution, -a τ² mean Σ p_t log p_s (ScaleKD, 2.1).

    It differs from Hinton's divergence by the teacher's entropy, which has no gradient.

    Args:
        student: (B, C) logits.
        teacher: (B, C) logits; no gradient.
        temperature: τ.
        weight: a.
    """
    teacher_probs = F.softmax(at_least_float32(teacher.detach()) / temperature, dim=1)
    student_log_probs = F.log_softmax(at_least_float32(student) / temperature, dim=1)
    return -weight * temperature**2 * (teacher_probs * student_log_probs).sum(1).mean()


def soft_distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return DeiT's soft distillation: the divergence at a temperature, averaged over images *and* classes.

    Args:
        student: (B, C) logits.
        teacher: (B, C) logits; no gradient.
        temperature: T; the result is multiplied by T².
    """
    student_log_probs = F.log_softmax(at_least_float32(student) / temperature, dim=1)
    teacher_log_probs = F.log_softmax(at_least_float32(teacher.detach()) / temperature, dim=1)
    return (
        F.kl_div(student_log_probs, teacher_log_probs, reduction="sum", log_target=True)
        * temperature**2
        / student.numel()
    )


def logit_kl_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the divergence of class distributions at every position, averaged over all elements (G2SD, 2.5).

    Args:
        student: (B, C, …) logits.
        teacher: The same shape; no gradient.
        temperature: τ; the result is multiplied by τ².
    """
    student_log_probs = F.log_softmax(at_least_float32(student) / temperature, dim=1)
    teacher_probs = F.softmax(at_least_float32(teacher.detach()) / temperature, dim=1)
    return F.kl_div(student_log_probs, teacher_probs, reduction="mean") * temperature**2


def nkd_loss(student: Tensor, teacher: Tensor, target: Tensor, alpha: float = 1.0, tau: float = 1.0) -> Tensor:
    """Return normalised knowledge distillation (Yang et al. 2023; G2SD, 2.3).

    Args:
        student: (B, C) logits.
        teacher: (B, C) logits; no gradient.
        target: (B,) classes, or (B, C) soft labels whose largest entry is the target.
        alpha: Weight of the part that compares the other classes.
        tau: Temperature of that part.

    Returns:
        The target part, -mean p_t[target] log p_s[target], plus the distributed part. Classes whose teacher
        probability equals the target's are left out of the latter along with it, as published.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    label = (target.argmax(1) if target.ndim == 2 else target).unsqueeze(1)
    teacher_probs, student_log_probs = teacher.softmax(1), student.log_softmax(1)
    at_target = teacher_probs.gather(1, label)
    soft = -(at_target * student_log_probs.gather(1, label)).mean()
    lowered = torch.where(teacher_probs == at_target, TARGET_LOWERED_BY, 0.0).to(student)
    others = ((teacher - lowered) / tau).softmax(1)
    distributed = -(others * ((student - lowered) / tau).log_softmax(1)).sum(1).mean()
    return soft + alpha * tau**2 * distributed


def channel_wise_distillation(student: Tensor, teacher: Tensor, tau: float = 1.0, weight: float = 1.0) -> Tensor:
    """Return the cross-entropy of where each class is seen: softmax over positions, class by class (Shu et al. 2021).

    Args:
        student: (B, C, H, W) logits.
        teacher: The same shape; no gradient.
        tau: Temperature.
        weight: Factor; G2SD trains with 3, its configuration says 10.

    Raises:
        UsageError: The shapes differ.
    """
    if student.shape != teacher.shape:
        raise UsageError(f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} differ")
    student_log_probs = F.log_softmax(at_least_float32(student).flatten(2) / tau, dim=2)
    teacher_probs = F.softmax(at_least_float32(teacher.detach()).flatten(2) / tau, dim=2)
    return -weight * tau**2 * (teacher_probs * student_log_probs).sum() / (student.shape[0] * student.shape[1])
