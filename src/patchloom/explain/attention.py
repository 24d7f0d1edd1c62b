"""Where a Vision Transformer looks, without training anything: attention, rollout, and maps weighted by gradients.

These are the explanations that others are measured against. Each takes a classifier (a timm model with logits, with
adapters or without) and normalised images, and returns a map over the grid of patches. Attention is computed openly in
the blocks that are asked for and nowhere else.

Rollout: Abnar and Zuidema, arXiv 2005.00928. Grad-CAM: Selvaraju et al., arXiv 1610.02391. Gradient times attention:
Chefer, Gur and Wolf, arXiv 2103.15679, equation 5, in one block.

>>> import timm, torch
>>> model = timm.create_model("vit_tiny_patch16_224", num_classes=7).eval()
>>> images = torch.randn(2, 3, 224, 224)
>>> rollout(model, images).shape, grad_cam(model, images, torch.tensor([0, 6])).shape
(torch.Size([2, 14, 14]), torch.Size([2, 14, 14]))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from patchloom.base.ranges import Fraction, checked
from patchloom.encoders import (
    Embedded,
    Encoder,
    Grid,
    depth,
    embed,
    grid_size,
    input_size,
    num_prefix_tokens,
    run_blocks,
    sides_of,
)
from patchloom.encoders.insertion import active, insertions, plain
from patchloom.encoders.patches import shown
from patchloom.errors import UsageError
from patchloom.systems.prompt_cam.model import ClassPrompts, PromptCAM

Fusion = Literal["mean", "max", "min"]
FUSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda a: a.mean(1),
    "max": lambda a: a.amax(1),
    "min": lambda a: a.amin(1),
}


def attention_probabilities(model: nn.Module, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """Return the attention of given blocks.

    Class prompts are left out: this is where the encoder itself looks.

    Args:
        model: A timm ViT, with or without adapters, or a `PromptCAM`.
        images: (B, 3, H, W), normalised; or what else the encoder takes.
        layers: Blocks, counted from 0; negative ones from the end.

    Returns:
        One (B, H, P + N, P + N) per layer; rows are queries. What tokens inserted by an adapter receive is taken out
        and the rest scaled to sum to 1.

    Raises:
        UsageError: A block the encoder does not have, or images of another size.
    """
    encoder = encoder_of(model)
    check_images(encoder, images)
    numbers = [block_number(encoder, layer) for layer in layers]
    probabilities: dict[int, Tensor] = {}
    num_tokens = num_prefix_tokens(encoder) + _patches(encoder, images)
    with _plain_of_prompts(encoder):
        embedded = embed(encoder, images)
        x = embedded.x
        for number in range(max(numbers, default=-1) + 1):
            with ExitStack() as opened:
                recorded = opened.enter_context(explicit_attention(encoder, number)) if number in numbers else []
                x, _ = run_blocks(encoder, replace(embedded, x=x), start=number, stop=number + 1)
            if recorded:
                rows = recorded[-1][:, :, -num_tokens:, -num_tokens:]
                probabilities[number] = rows / rows.sum(-1, keepdim=True).clamp(min=1e-12)
    return [probabilities[number] for number in numbers]


@torch.no_grad()
def class_token_maps(model: nn.Module, images: Tensor, layer: int = -1) -> Tensor:
    """Return where the class token of a block looks, (B, H, *grid) by head; without one, where all tokens look.

    Raises:
        UsageError: A block the encoder does not have, or images of another size.
    """
    encoder = encoder_of(model)
    (attention,) = attention_probabilities(model, images, [layer])
    return _class_rows(encoder, attention).unflatten(-1, _grid(encoder, images))


@torch.no_grad()
@checked
def rollout(
    model: nn.Module, images: Tensor, fusion: Fusion = "mean", discard: Fraction = 0.0, start: int = 0
) -> Tensor:
    """Return attention multiplied through the blocks: how much of each patch reaches the class token.

    In each block the heads become one matrix, half of the identity is added for the residual connection, and rows
    are scaled to sum to 1.

    Args:
        model: The classifier or encoder.
        images: (B, 3, H, W), normalised.
        fusion: How heads become one: `mean`, `max` or `min`.
        discard: Share of the smallest entries between patches set to 0 in each block, in [0, 1).
        start: First block that counts.

    Returns:
        (B, h, w); without a class token the mean over all tokens.

    Raises:
        UsageError: An unknown fusion, a share outside its range, or a block the encoder does not have.
    """
    encoder = encoder_of(model)
    check_images(encoder, images)
    first = block_number(encoder, start)
    reached: Tensor | None = None
    for attention in attention_probabilities(model, images, range(first, depth(encoder))):
        fused = FUSIONS[fusion](attention)
        if discard:
            fused = _without_smallest(fused, discard, num_prefix_tokens(encoder))
        step = 0.5 * fused + 0.5 * torch.eye(fused.shape[-1]).to(fused)
        step = step / step.sum(-1, keepdim=True)
        reached = step if reached is None else step @ reached
    assert reached is not None
    return _class_rows(encoder, reached[:, None])[:, 0].unflatten(-1, _grid(encoder, images))


def grad_cam(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Return Grad-CAM on the last block's first norm: features weighted by their mean gradient, positive part.

    Args:
        model: The classifier.
        images: (B, 3, H, W), normalised.
        target: (B,) int64, class of each image.

    Returns:
        (B, h, w), at least 0.

    Raises:
        UsageError: A class the model does not have, or a model without classes.
    """
    encoder = encoder_of(model)
    entering = entering_last(encoder, images)
    x = entering.x.detach().requires_grad_()
    features: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if inputs[0] is x or inputs[0].shape[1] > x.shape[1]:  # prompts may pass the norm by themselves
            features.append(output)

    hook = encoder.blocks[-1].norm1.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            score = _scores(encoder, replace(entering, x=x), target)
            (gradient,) = torch.autograd.grad(score, features[0])
    finally:
        hook.remove()
    count = _patches(encoder, images)
    weights = gradient[:, -count:].mean(1, keepdim=True)
    cam = (weights * features[0].detach()[:, -count:]).sum(-1).relu()
    return cam.unflatten(-1, _grid(encoder, images))


def gradient_attention(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Return the last block's attention times the gradient of the class score, positive part, mean over heads.

    The row is that of the class token; for class prompts that of the target's prompt; where patches are pooled it is
    the mean over all rows.

    Args:
        model: The classifier.
        images: (B, 3, H, W), normalised.
        target: (B,) int64, class of each image.

    Returns:
        (B, h, w), at least 0.

    Raises:
        UsageError: A class the model does not have, or a model without classes.
    """
    encoder = encoder_of(model)
    check_target(encoder, images, target)
    prompts = insertions(encoder).get(active(encoder) or "")
    with torch.enable_grad():
        if isinstance(prompts, ClassPrompts):
            with torch.no_grad():
                before = prompts.before_last(images)
            logits, attention = prompts.last(before._replace(x=before.x.detach().requires_grad_()), explicit=True)
            assert attention is not None
            (gradient,) = torch.autograd.grad(_chosen(logits, target), attention)
            rows = torch.arange(len(images), device=images.device)
            weighted = (gradient * attention.detach()).relu()[rows, :, target]
        else:
            entering = entering_last(encoder, images)
            with explicit_attention(encoder, depth(encoder) - 1) as recorded:
                score = _scores(encoder, replace(entering, x=entering.x.detach().requires_grad_()), target)
            (gradient,) = torch.autograd.grad(score, recorded[-1])
            num_tokens = num_prefix_tokens(encoder) + _patches(encoder, images)
            gradient = gradient[:, :, -num_tokens:, -num_tokens:]
            everything = (gradient * recorded[-1].detach()[:, :, -num_tokens:, -num_tokens:]).relu()
            # Where patches are pooled, nothing depends on what the class token of the last block sees.
            reads_class_token = num_prefix_tokens(encoder) and bool(gradient[:, :, 0].any())
            weighted = everything[:, :, 0] if reads_class_token else everything.mean(2)
    return weighted.mean(1)[:, -_patches(encoder, images) :].unflatten(-1, _grid(encoder, images))


# What the explanations share.


def encoder_of(model: nn.Module) -> Encoder:
    """Return the timm module whose forward pass gives the model's logits."""
    return model.encoder if isinstance(model, PromptCAM) else cast(Encoder, model)


def class_count(model: nn.Module) -> int:
    """Return the number of classes of a classifier.

    Raises:
        UsageError: It has none.
    """
    encoder = encoder_of(model)
    added = insertions(encoder).get(active(encoder) or "")
    if isinstance(added, ClassPrompts):
        return added.num_classes
    head = added.head if added is not None and added.head is not None else getattr(encoder, "head", None)
    linear = [module for module in head.modules() if isinstance(module, nn.Linear)] if head is not None else []
    if not linear:
        raise UsageError("the model has no classes to explain; give a classifier (patchloom adapt trains one)")
    return linear[-1].out_features


def block_number(encoder: Encoder, layer: int) -> int:
    """Return the 0-based number of a block that may be counted from the end.

    Raises:
        UsageError: There is no such block.
    """
    count = depth(encoder)
    if not -count <= layer < count:
        raise UsageError(f"there is no block {layer}; the encoder has blocks 0 to {count - 1}")
    return layer % count


def check_images(encoder: Encoder, images: Tensor) -> None:
    """Refuse images the encoder does not take.

    Raises:
        UsageError: The module is no ViT with attention, or the images are of another size.
    """
    if not hasattr(encoder, "blocks") or not hasattr(encoder, "patch_embed"):
        raise UsageError(f"a {type(encoder).__name__} has no blocks with attention to show; give a ViT of timm")
    size, given = input_size(encoder), sides_of(images)
    if given != size and getattr(encoder.patch_embed, "strict_img_size", True):
        raise UsageError(f"the images are {shown(given)} pixels and the encoder takes {shown(size)}; resize them")


def check_target(model: nn.Module, images: Tensor, target: Tensor) -> None:
    """Refuse classes the model does not have.

    Raises:
        UsageError: Names the class and the valid ones.
    """
    classes = class_count(model)
    if target.shape != (len(images),):
        raise UsageError(f"{len(images)} images have {tuple(target.shape)} targets; give one class for each image")
    for index in target.tolist():
        if not 0 <= index < classes:
            raise UsageError(f"there is no class {index}; the model has classes 0 to {classes - 1}")


def entering_last(encoder: Encoder, images: Tensor) -> Embedded:
    """Return what enters the last block, computed without gradient."""
    check_images(encoder, images)
    with torch.no_grad():
        embedded = embed(encoder, images)
        x, _ = run_blocks(encoder, embedded, stop=depth(encoder) - 1)
    return replace(embedded, x=x)


@contextmanager
def explicit_attention(encoder: Encoder, number: int) -> Iterator[list[Tensor]]:
    """Let one block compute its attention openly for a while; what it was is put into the list, (B, H, T, T).

    Raises:
        UsageError: The block has no attention of this kind.
    """
    block = encoder.blocks[number]
    attention: Any = getattr(block, "attn", block)  # blocks with attention and MLP side by side attend by themselves
    drop = getattr(attention, "attn_drop", None)
    if drop is None or not hasattr(attention, "fused_attn"):
        raise UsageError(
            f"the attention of a {type(block).__name__} cannot be read; give a plain ViT, BEiT or EVA model"
        )
    recorded: list[Tensor] = []
    # Unfused, every attention of timm passes its softmax through this dropout.
    hook = drop.register_forward_hook(lambda module, inputs, output: recorded.append(output))
    fused = attention.fused_attn
    attention.fused_attn = False
    try:
        yield recorded
    finally:
        attention.fused_attn = fused
        hook.remove()


@contextmanager
def _plain_of_prompts(encoder: Encoder) -> Iterator[None]:
    added = insertions(encoder).get(active(encoder) or "")
    with plain(encoder) if isinstance(added, ClassPrompts) else nullcontext():
        yield


def _scores(encoder: Encoder, entering: Embedded, target: Tensor) -> Tensor:
    last, _ = run_blocks(encoder, entering, start=depth(encoder) - 1)
    logits = encoder.forward_head(encoder.norm(last))
    check_target(encoder, last, target)
    return _chosen(logits, target)


def _chosen(logits: Tensor, target: Tensor) -> Tensor:
    return logits.gather(1, target[:, None]).sum()


def _patches(encoder: Encoder, images: Tensor) -> int:
    return math.prod(_grid(encoder, images))


def _grid(encoder: Encoder, images: Tensor) -> Grid:
    return grid_size(encoder, sides_of(images))


def _class_rows(encoder: Encoder, attention: Tensor) -> Tensor:
    """Return the class token's row (the mean row without one) over the patches, (B, H, T, T) -> (B, H, N)."""
    prefix = num_prefix_tokens(encoder)
    rows = attention[:, :, 0] if prefix else attention.mean(2)
    return rows[:, :, prefix:]


def _without_smallest(fused: Tensor, share: float, prefix: int) -> Tensor:
    """Set the smallest entries of each matrix to 0, but for those of prefix tokens."""
    patches = fused[:, :, prefix:]
    flat = patches.flatten(1)
    lost = flat.argsort(dim=1)[:, : int(flat.shape[1] * share)]
    thinned = flat.scatter(1, lost, 0.0).view_as(patches)
    return torch.cat([fused[:, :, :prefix], thinned], dim=2)
