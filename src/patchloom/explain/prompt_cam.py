"""What a Prompt-CAM model decided by: maps per class and head, which heads matter, what tells two classes apart.

A head of the last block is a candidate trait: its map of a class shows where that class's prompt looks. Blurring a head
(letting the prompt look everywhere alike) shows what the decision owes to it. Prompt-CAM, arXiv 2501.09333, and
its published code.

>>> import timm, torch
>>> from patchloom.systems.prompt_cam.model import PromptCAM
>>> model = PromptCAM(timm.create_model("vit_tiny_patch16_224", num_classes=0), num_classes=4).eval()
>>> images = torch.randn(2, 3, 224, 224)
>>> rank_heads(model, images, torch.tensor([1, 3])).order.shape
torch.Size([2, 3])
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from patchloom.encoders import Encoder
from patchloom.encoders.attend import Rewrite
from patchloom.errors import UsageError, unknown_name
from patchloom.explain.attention import check_target, encoder_of
from patchloom.systems.prompt_cam.model import ClassPrompts, LastInput, PromptCAM

Normalize = Literal["none", "sum", "max"]
ROWS_AT_A_TIME = 256
"""Images times candidate heads in one pass of the last block."""


class HeadRanking(NamedTuple):
    """Heads in the order of what the class owes to them."""

    order: Tensor
    """(B, H) int64, most important first."""
    probabilities: Tensor
    """(B, H): probability of the target after 1, 2, … H heads were blurred, least important first."""
    kept: list[list[int]]
    """For each image the heads that are left, most important first."""


class Contrast(NamedTuple):
    """What tells class A from class B on given images."""

    order: Tensor
    """(H,) int64, heads by what A's lead over B owes to them, most first."""
    drops: Tensor
    """(B, H): how much of A's lead over B (difference of logits) is lost when a head of both prompts is blurred."""
    lead: Tensor
    """(B,): A's lead over B."""
    maps_a: Tensor
    """(B, H, h, w): where A's prompt looks."""
    maps_b: Tensor
    """(B, H, h, w): where B's prompt looks on the same images."""


@torch.no_grad()
def class_attention_maps(
    model: nn.Module, images: Tensor, classes: Tensor | int | None = None, normalize: Normalize = "none"
) -> Tensor:
    """Return where the prompt of a class looks, by head.

    Args:
        model: A `PromptCAM`, or an encoder with class prompts active.
        images: (B, 3, H, W), normalised.
        classes: A class for all images, (B,) int64 for one each, or None for the predicted ones.
        normalize: `none`: attention as it is, whose sum over the map is below 1; `sum` or `max`: scaled to 1.

    Returns:
        (B, H, h, w).

    Raises:
        UsageError: A class the model does not have, no class prompts, or images of another size.
    """
    if normalize not in ("none", "sum", "max"):
        raise unknown_name("normalize", normalize, ("none", "sum", "max"))
    logits, maps = _wrapped(model).forward_with_attention(images)
    chosen = targets_of(model, images, classes, logits)
    picked = maps[torch.arange(len(images), device=maps.device), :, chosen]
    if normalize == "none":
        return picked
    total = picked.sum((-2, -1), keepdim=True) if normalize == "sum" else picked.amax((-2, -1), keepdim=True)
    return picked / total.clamp(min=1e-12)


def targets_of(model: nn.Module, images: Tensor, classes: Tensor | int | None, logits: Tensor | None = None) -> Tensor:
    """Return a class for each image, (B,) int64: as told, or as predicted where `classes` is None.

    Raises:
        UsageError: A class the model does not have.
    """
    if classes is None:
        logits = _wrapped(model)(images) if logits is None else logits
        return logits.argmax(1)
    chosen = torch.full((len(images),), classes) if isinstance(classes, int) else classes
    chosen = chosen.to(images.device)
    check_target(model, images, chosen)
    return chosen


@torch.no_grad()
def blur_heads(model: nn.Module, images: Tensor, heads: Tensor, target: Tensor) -> Tensor:
    """Return logits (B, C) with some heads blurred for the target's prompt in the last block.

    Args:
        model: A `PromptCAM`, or an encoder with class prompts active.
        images: (B, 3, H, W), normalised.
        heads: (H,) or (B, H) bool, or the numbers of heads (k,) int64 for all images.
        target: (B,) int64, the class whose prompt it is.

    Raises:
        UsageError: A head or a class the model does not have.
    """
    prompts = _prompts_of(model)
    check_target(model, images, target)
    count = _head_count(prompts)
    if heads.dtype != torch.bool:
        if bool(((heads < 0) | (heads >= count)).any()):
            raise UsageError(f"the heads {heads.tolist()} are not all there; the last block has heads 0 to {count - 1}")
        heads = torch.zeros(count, dtype=torch.bool).index_fill(0, heads.cpu(), True)
    if heads.shape[-1] != count:
        raise UsageError(f"heads marks {heads.shape[-1]} heads; the last block has {count}")
    mask = heads.to(images.device).expand(len(images), count)
    return prompts.last(prompts.before_last(images), explicit=True, rewrite=blurred(mask, target))[0]


def blurred(mask: Tensor, *targets: Tensor) -> Rewrite:
    """Return what makes rows of attention uniform: those of given classes in the heads marked.

    Args:
        mask: (B, H) bool.
        *targets: (B,) int64 each: the classes whose rows are meant.
    """

    def rewrite(attention: Tensor) -> Tensor:
        rows = torch.zeros(attention.shape[0], attention.shape[2], dtype=torch.bool, device=attention.device)
        for target in targets:
            rows[torch.arange(len(rows), device=rows.device), target] = True
        chosen = mask[:, :, None, None] & rows[:, None, :, None]
        return torch.where(chosen, 1 / attention.shape[-1], attention)

    return rewrite


@torch.no_grad()
def rank_heads(
    model: nn.Module,
    images: Tensor,
    target: Tensor | int | None = None,
    keep: int | None = None,
    until: Literal["misclassified"] | None = None,
) -> HeadRanking:
    """Blur head after head, each time the one the class's probability owes least to, and return their order.

    Only the last block is run again, from its input; candidates go through it together.

    Args:
        model: A `PromptCAM`, or an encoder with class prompts active.
        images: (B, 3, H, W), normalised.
        target: (B,) int64 or one class for all; default: the predicted ones.
        keep: How many heads `kept` holds, 1 to H; default 4, or as many as there are.
        until: `misclassified`: `kept` holds instead the fewest heads with which the image is still taken for its
            target (all of them where it is not from the start).

    Raises:
        UsageError: A class the model does not have, or `keep` outside its range.
    """
    prompts = _prompts_of(model)
    count = _head_count(prompts)
    if keep is not None and not 1 <= keep <= count:
        raise UsageError(f"keep is {keep}; the last block has {count} heads, so 1 to {count} can be kept")
    if until not in (None, "misclassified"):
        raise unknown_name("until", str(until), ("misclassified",))
    if until is not None and keep is not None:
        raise UsageError("keep and until both say when to stop; give one of them")
    entering = prompts.before_last(images)
    plain_logits = prompts.last(entering)[0]
    chosen = targets_of(model, images, target, plain_logits)
    batch = len(images)
    rows = torch.arange(batch, device=images.device)
    mask = torch.zeros(batch, count, dtype=torch.bool, device=images.device)
    right = [plain_logits.argmax(1) == chosen]
    removed, probabilities = [], []
    for _ in range(count):
        # (B, H, H): for each head the mask with that head added; heads already blurred are no candidates.
        candidates = mask[:, None] | torch.eye(count, dtype=torch.bool, device=mask.device)
        logits = _last_blurred(prompts, entering, candidates, chosen)
        scores = logits.softmax(-1).gather(2, chosen[:, None, None].expand(-1, count, 1))[..., 0]
        best = scores.masked_fill(mask, -1.0).argmax(1)  # of equals the first
        removed.append(best)
        probabilities.append(scores[rows, best])
        right.append(logits[rows, best].argmax(1) == chosen)
        mask[rows, best] = True
    order = torch.stack(removed, 1).flip(1)
    if until is None:
        numbers = [min(keep or 4, count)] * batch
    else:
        # The heads blurred before the first wrong answer.
        still = torch.stack(right, 1).long().cumprod(1).sum(1) - 1
        numbers = (count - still.clamp(min=0)).tolist()
    kept = [row[:number] for row, number in zip(order.tolist(), numbers, strict=True)]
    return HeadRanking(order, torch.stack(probabilities, 1), kept)


@torch.no_grad()
def traits_between(model: nn.Module, images: Tensor, a: int, b: int) -> Contrast:
    """Return what tells class A from class B on images (of A, as a rule).

    A head matters as far as A's lead over B goes when neither prompt may look through it. Where both look at the same
    thing the maps agree; where A's is bright and B's dark is what B lacks.

    Args:
        model: A `PromptCAM`, or an encoder with class prompts active.
        images: (B, 3, H, W), normalised.
        a: A class.
        b: Another.

    Raises:
        UsageError: A class the model does not have, or twice the same.
    """
    if a == b:
        raise UsageError(f"class {a} cannot be told from itself; give two different classes")
    prompts = _prompts_of(model)
    first, second = (targets_of(model, images, one) for one in (a, b))
    count = _head_count(prompts)
    entering = prompts.before_last(images)
    logits, attention = prompts.last(entering, explicit=True)
    assert attention is not None
    candidates = torch.eye(count, dtype=torch.bool, device=images.device).expand(len(images), -1, -1)
    changed = _last_blurred(prompts, entering, candidates, first, second)
    lead = logits[:, a] - logits[:, b]
    drops = lead[:, None] - (changed[..., a] - changed[..., b])
    maps = prompts.maps(attention, entering.grid)
    order = drops.mean(0).argsort(descending=True, stable=True)
    return Contrast(order, drops, lead, maps[:, :, a], maps[:, :, b])


def _last_blurred(prompts: ClassPrompts, entering: LastInput, masks: Tensor, *targets: Tensor) -> Tensor:
    """Return logits (B, n, C) of the last block under n masks of heads for each image, (B, n, H)."""
    batch, candidates, _ = masks.shape
    rows_of_kwargs = entering.block_kwargs  # positions are those of the grid, alike for all images
    logits = []
    step = max(1, ROWS_AT_A_TIME // candidates)
    for start in range(0, batch, step):
        part = slice(start, min(start + step, batch))
        x = entering.x[part].repeat_interleave(candidates, dim=0)
        class_prompts = entering.prompts if len(entering.prompts) == 1 else entering.prompts[part]
        class_prompts = class_prompts if len(class_prompts) == 1 else class_prompts.repeat_interleave(candidates, dim=0)
        meant = [target[part].repeat_interleave(candidates) for target in targets]
        rewrite = blurred(masks[part].flatten(0, 1), *meant)
        repeated = LastInput(x, class_prompts, rows_of_kwargs, entering.grid)
        logits.append(prompts.last(repeated, explicit=True, rewrite=rewrite)[0].unflatten(0, (-1, candidates)))
    return torch.cat(logits)


def _wrapped(model: nn.Module) -> PromptCAM:
    return model if isinstance(model, PromptCAM) else PromptCAM.of(cast(Encoder, model))


def _prompts_of(model: nn.Module) -> ClassPrompts:
    return _wrapped(model).added


def _head_count(prompts: ClassPrompts) -> int:
    return int(encoder_of(prompts.encoder).blocks[-1].attn.num_heads)
