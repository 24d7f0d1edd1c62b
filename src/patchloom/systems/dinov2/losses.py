"""The losses of self-distillation: tensors in, tensors out, on one process or several.

DINO (arXiv 2104.14294), iBOT (arXiv 2111.07832), KoLeo (arXiv 1806.03198) and Sinkhorn-Knopp centring (SwAV, arXiv
2006.09882), as the published code of DINOv2 (arXiv 2304.07193) joins them. All of them compute in float32 at least,
whatever autocast says: exp(z / temperature) overflows a half.

>>> import torch
>>> teacher = sinkhorn_knopp(torch.randn(8, 32), temperature=0.04)
>>> torch.allclose(teacher.sum(1), torch.ones(8))
True
>>> bool(dino_loss([torch.randn(8, 32)], teacher[None]) > 0)
True
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError
from patchloom.training.gather import gathered


class SoftmaxCentering(nn.Module):
    """Teacher probabilities by subtracting a running mean of the logits: softmax((z - c) / temperature).

    The centre starts at 0 and moves, in training mode, after it was used: c <- m c + (1 - m) mean(z), the mean being
    that over the rows of all processes. Rows are counted, so that processes may have different numbers of them.

    Args:
        out_dim: Number of prototypes K.
        momentum: Share m of the centre that is kept, in [0, 1]; DINOv2: 0.9.
    """

    center: Tensor

    def __init__(self, out_dim: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """Return (B, K) rows that sum to 1, for (B, K) logits."""
        logits = at_least_float32(logits)
        probabilities = ((logits - self.center) / temperature).softmax(-1)
        if self.training:
            self.update(logits)
        return probabilities

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """Move the centre towards the mean of (B, K) logits over all processes."""
        total = torch.cat([logits.sum(0), logits.new_tensor([float(len(logits))])])
        total = _over_ranks(total)
        if total[-1] > 0:
            self.center.lerp_((total[:-1] / total[-1]).to(self.center)[None], 1 - self.momentum)


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, n_samples: int | None = None, n_iterations: int = 3) -> Tensor:
    """Return teacher probabilities in which all prototypes are used about equally.

    Rows and columns of exp(logits / temperature) are scaled in turn, over the samples of all processes.

    Args:
        logits: (B, K) of this process; B may be 0 and differ between processes.
        temperature: Lower is sharper.
        n_samples: Samples of all processes together; default: counted.
        n_iterations: Rounds of scaling; DINOv2: 3.

    Returns:
        (B, K), rows sum to 1.
    """
    scaled = at_least_float32(logits) / temperature
    if n_samples is None:
        n_samples = int(_over_ranks(torch.tensor(float(len(logits)), device=logits.device)))
    if n_samples == 0:
        return scaled
    # The largest value of the whole matrix cancels; without it the exponential overflows.
    largest = scaled.max() if scaled.numel() else scaled.new_tensor(float("-inf"))
    q = scaled.sub_(_over_ranks(largest, dist.ReduceOp.MAX)).exp_()
    tiny = torch.finfo(q.dtype).tiny  # a prototype nobody is near stays at 0 instead of becoming 0 / 0
    q /= _over_ranks(q.sum())
    prototypes = q.shape[1]
    for _ in range(n_iterations):
        q /= _over_ranks(q.sum(0, keepdim=True)).clamp(min=tiny) * prototypes
        q /= q.sum(1, keepdim=True).clamp(min=tiny) * n_samples
    return q.mul_(n_samples)


def dino_loss(student: Sequence[Tensor] | Tensor, teacher: Tensor, temp: float = 0.1) -> Tensor:
    """Return the cross-entropy of every student crop with every teacher crop, each a mean over the batch, summed.

    Args:
        student: S tensors (B, K) of logits, or one of (S, B, K).
        teacher: (G, B, K) probabilities.
        temp: Temperature of the student; DINOv2: 0.1.

    Returns:
        Scalar: sum over s and g of mean over b of -sum_k t_gbk log softmax(s_sbk / temp).
    """
    logits = student if isinstance(student, Tensor) else torch.stack(list(student))
    # The cross-entropy is linear in the teacher: its crops can be added up before the softmax is taken once.
    targets = teacher.sum(0)
    weights = targets.new_full((len(targets),), 1 / len(targets))
    return soft_cross_entropy(logits, targets, weights, temp)


def ibot_loss(student: Tensor, teacher: Tensor, masks: Tensor, temp: float = 0.1) -> Tensor:
    """Return the patch loss: cross-entropy at masked patches, a mean within each image and then over the images.

    Args:
        student: (M, K) logits of the masked patches, image by image.
        teacher: (M, K) probabilities of the same patches, which the teacher saw unmasked.
        masks: (N, T) bool, M true entries; images without any count in the mean and contribute 0.
        temp: Temperature of the student; DINOv2: 0.1.

    Returns:
        Scalar; 0 where nothing is masked.
    """
    masks = masks.flatten(1)
    per_image = masks.sum(1)
    # Entries of one image share its weight: 1 / (masked patches in it).
    weights = (1 / per_image.clamp(min=1).to(teacher.dtype)).repeat_interleave(per_image, output_size=len(student))
    return soft_cross_entropy(student[None], teacher, weights / len(masks), temp)


def koleo_loss(
    x: Tensor, eps: float = 1e-8, topk: int = 1, across_processes: bool = False, group_size: int | None = None
) -> Tensor:
    """Return the Kozachenko-Leonenko regulariser: it pushes each feature away from its nearest neighbours.

    By default computed among the features given, that is, by publication, per process and per crop: more processes with
    smaller batches each do not give the loss of one with a large batch. DINOv3's distributed form looks for neighbours
    in the batch of all processes, or of groups of them.

    Args:
        x: (B, D) features, not normalised.
        eps: Added where a length or a distance might be 0.
        topk: Neighbours of each feature; DINOv2: 1.
        across_processes: Look among the features of all processes, which all have B of them.
        group_size: Across processes: features that are looked among, those of neighbouring ranks; None: all.

    Returns:
        Scalar: -mean log(‖x_i - x_n‖ + eps) of the normalised features, over the neighbours n of each.

    Raises:
        UsageError: There are fewer neighbours than `topk`, or groups that no whole number of processes fills.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(at_least_float32(x), eps=eps)
        others, own_start = (x, 0) if not across_processes else _group_of(gathered(x), len(x), group_size)
        if topk < 1 or len(others) <= topk:
            raise UsageError(
                f"KoLeo needs at least {max(topk, 1) + 1} images per process for {topk} neighbours, and has "
                f"{len(others)}; raise batch_size, or set koleo_weight=0"
                if topk != 1
                else "KoLeo needs at least 2 images per process; raise batch_size, or set koleo_weight=0"
            )
        with torch.no_grad():
            similarity = x @ others.T
            rows = torch.arange(len(x), device=x.device)
            similarity[rows, rows + own_start] = -1
            nearest = similarity.topk(topk, dim=1).indices
        distances = F.pairwise_distance(x[:, None].expand(-1, topk, -1), others[nearest], p=2, eps=eps)
        return -(distances + eps).log().mean()


def _group_of(rows: Tensor, count: int, size: int | None) -> tuple[Tensor, int]:
    """Return the rows of this process's group, and where its own `count` rows begin among them."""
    size = len(rows) if size is None else size
    if size % count or len(rows) % size:
        raise UsageError(
            f"KoLeo's groups of {size} features do not fit {len(rows)} of processes with {count} each; give a multiple "
            f"of the batch per process that divides the batch of all"
        )
    first = dist.get_rank() * count if len(rows) > count else 0
    group = first // size
    return rows[group * size : (group + 1) * size], first % size


def soft_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Return the weighted sum of cross-entropies between rows of logits and soft targets.

    The gradient is made in the forward pass, in the buffer of the softmax: with 65 536 prototypes, what autograd would
    keep for the same sum is four times as much.

    Args:
        logits: (S, B, K).
        targets: (B, K), shared by the S groups; non-negative, without gradient. A row may sum to other than 1.
        weights: (B,).
        temperature: Divides the logits.

    Returns:
        Scalar: -sum_s sum_b w_b sum_k t_bk log softmax(logits_sbk / temperature).
    """
    loss: Tensor = _SoftCrossEntropy.apply(logits, targets, weights, temperature)
    return loss


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor, temperature: float) -> Tensor:
        x = at_least_float32(logits) / temperature
        targets, weights = targets.to(x.dtype), weights.to(x.dtype)
        if x.numel() == 0:
            ctx.save_for_backward(x)
            ctx.kind = logits.dtype
            return x.sum()
        x -= x.amax(-1, keepdim=True)  # the softmax stays the same
        scores = torch.einsum("sbk,bk->sb", x, targets)
        total = x.exp_().sum(-1)
        mass = targets.sum(-1)
        loss = ((mass * total.log() - scores) * weights).sum()
        if ctx.needs_input_grad[0]:
            scale = weights / temperature
            x.mul_((mass * scale / total)[..., None]).addcmul_(targets, scale[:, None], value=-1)
            ctx.save_for_backward(x)
            ctx.kind = logits.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (ready,) = ctx.saved_tensors
        return (ready * gradient).to(ctx.kind), None, None, None


def _over_ranks(x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Return the sum (or what `op` says) over all processes; `x` itself where there is one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        x = x.contiguous()
        dist.all_reduce(x, op=op)
    return x
