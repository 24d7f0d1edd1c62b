"""Several explanations side by side, each with what it is worth: insertion and deletion scores on the same model.

All maps are judged by the probability that one and the same classifier gives to one and the same class, so a number
compares maps and not models. A random map is the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchloom.encoders import grid_size
from patchloom.encoders.insertion import active, insertions
from patchloom.errors import UsageError, unknown_name
from patchloom.explain.attention import (
    check_target,
    class_token_maps,
    encoder_of,
    grad_cam,
    gradient_attention,
    rollout,
)
from patchloom.explain.faithfulness import Faithfulness, insertion_deletion
from patchloom.explain.prompt_cam import class_attention_maps
from patchloom.systems.prompt_cam.model import ClassPrompts

Explainer = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Takes a classifier, normalised images and a class for each, and returns maps (B, h, w)."""


def prompt_map(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Return where the class's prompt looks, mean over heads."""
    return class_attention_maps(model, images, target).mean(1)


def random_map(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Return noise, the same for the same images: what any map has to beat."""
    size = grid_size(encoder_of(model), (images.shape[-2], images.shape[-1]))
    generator = torch.Generator().manual_seed(0)
    return torch.rand(len(images), *size, generator=generator).to(images.device)


EXPLAINERS: dict[str, Explainer] = {
    "prompt_cam": prompt_map,
    "class_attention": lambda model, images, target: class_token_maps(model, images).mean(1),
    "rollout": lambda model, images, target: rollout(model, images),
    "grad_cam": grad_cam,
    "gradient_attention": gradient_attention,
    "random": random_map,
}
TITLES = {
    "prompt_cam": "Prompt-CAM",
    "class_attention": "class-token attention",
    "rollout": "attention rollout",
    "grad_cam": "Grad-CAM",
    "gradient_attention": "gradient-weighted attention",
    "random": "random map",
}
SHORT = {
    "prompt_cam": "Prompt-CAM",
    "class_attention": "class token",
    "rollout": "rollout",
    "grad_cam": "Grad-CAM",
    "gradient_attention": "gradients",
    "random": "random",
}
"""What stands above a picture."""


@dataclass(frozen=True)
class Compared:
    """One explanation of a batch of images."""

    maps: Tensor
    """(B, h, w)."""
    scores: Faithfulness


def explainers_for(model: nn.Module, names: Sequence[str] = ()) -> list[str]:
    """Return the explanations that a model has, or those named.

    Raises:
        UsageError: An unknown one, one twice, or Prompt-CAM for a model without class prompts.
    """
    encoder = encoder_of(model)
    has_prompts = isinstance(insertions(encoder).get(active(encoder) or ""), ClassPrompts)
    for name in names:
        if name not in EXPLAINERS:
            raise unknown_name("explanation", name, EXPLAINERS)
    if len(set(names)) < len(names):
        raise UsageError(f"an explanation is named twice in {', '.join(names)}")
    if "prompt_cam" in names and not has_prompts:
        raise UsageError("the model has no class prompts; train them with: patchloom adapt prompt_cam")
    return list(names) or [name for name in EXPLAINERS if has_prompts or name != "prompt_cam"]


def compare(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    names: Sequence[str] = (),
    *,
    steps: int = 50,
    batch_size: int = 128,
    judge: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Compared]:
    """Return the maps and scores of several explanations.

    Args:
        model: The classifier that is explained.
        images: (B, 3, H, W), normalised.
        target: (B,) int64, class of each image.
        names: Explanations; default: all that the model has.
        steps: Steps of insertion and deletion.
        batch_size: Images at a time.
        judge: The classifier whose probability is followed; default: the model.

    Raises:
        UsageError: An explanation or a class that the model does not have.
    """
    check_target(model, images, target)
    by_method = {}
    for name in explainers_for(model, names):
        parts = zip(images.split(batch_size), target.split(batch_size), strict=True)
        maps = torch.cat([EXPLAINERS[name](model, part, classes) for part, classes in parts])
        scores = insertion_deletion(judge or model, images, maps, target, steps, batch_size=batch_size)
        by_method[name] = Compared(maps.detach(), scores)
    return by_method
