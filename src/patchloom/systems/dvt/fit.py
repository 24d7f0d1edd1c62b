"""Fitting the first stage of DVT: one image, or many side by side, each as if it were alone.

Yang et al. 2024 (arXiv 2401.02957). What an image draws (weights, tokens of each step) comes from a generator of its
own, and no operation mixes images: which others are fitted beside it changes nothing but the order of sums.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchloom.systems.dvt.model import SingleImageDenoiser

LR, END_LR, WARMUP_SHARE = 0.01, 0.001, 0.1
BETAS, EPS = (0.9, 0.99), 1e-15
WEIGHT_DECAY = 1e-5 / 1024
"""The published code multiplies the loss by 1024, which Adam does not notice, but the weight decay of 1e-5 does."""
DRAWN_AT_ONCE = 64
EVERY_SECONDS = 0.5


@dataclass(frozen=True)
class FitSettings:
    """How the first stage is fitted."""

    steps: int = 25_000
    """Steps; published: 25,000."""
    batch_tokens: int = 2048
    """Tokens of a step, of each image."""
    lr: float = LR
    """Highest learning rate."""
    end_lr: float = END_LR
    """Learning rate of the last step."""


def rate(step: int, steps: int, lr: float = LR, end_lr: float = END_LR) -> float:
    """Return the learning rate of a step, from 0: it rises over a tenth of the steps, and falls along half a cosine.

    >>> [round(rate(step, 25_000), 4) for step in (0, 1_250, 2_500, 13_750, 25_000)]
    [0.0, 0.005, 0.01, 0.0055, 0.001]
    """
    warmup = round(WARMUP_SHARE * steps)
    if step < warmup:
        return lr * step / warmup
    return end_lr + 0.5 * (lr - end_lr) * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def fit(
    model: SingleImageDenoiser,
    features: Tensor,
    coords: Tensor,
    generators: Sequence[torch.Generator],
    settings: FitSettings | None = None,
    reach: Callable[[int], Any] = lambda step: None,
) -> dict[str, list[float]]:
    """Fit F and G, and in the second half of the steps F and h.

    Args:
        model: Of as many images side by side as there are features of.
        features: (images, V, N, C), of the tokens of all views.
        coords: (images, V, N, 2), where in the image they look.
        generators: One for each image, from which it draws its tokens.
        settings: Steps and rates; default: as published.
        reach: Called with the steps done.

    Returns:
        Losses of the last step by name, for each image; of images side by side their mean.
    """
    settings = settings or FitSettings()
    images, views, tokens, width = features.shape
    device = next(model.parameters()).device
    rows = features.reshape(-1, width)
    places = coords.reshape(-1, 2)
    first = torch.arange(images, device=rows.device).unsqueeze(1) * (views * tokens)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=settings.lr, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )
    drawn = torch.empty(0)
    for step in range(settings.steps):
        if step % DRAWN_AT_ONCE == 0:
            each = (DRAWN_AT_ONCE, settings.batch_tokens)
            drawn = torch.stack([torch.randint(views * tokens, each, generator=g) for g in generators], 1)
            drawn = drawn.to(rows.device)  # where the features are held
        if step > 0.5 * settings.steps and not model.in_residual_phase:
            model.start_residual()
        chosen = drawn[step % DRAWN_AT_ONCE]
        found = chosen + first
        raw, seen = F.embedding(found, rows), F.embedding(found, places)
        losses = model.losses(raw.to(device).float(), seen.to(device), (chosen % tokens).to(device))
        optimizer.param_groups[0]["lr"] = rate(step, settings.steps, settings.lr, settings.end_lr)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        optimizer.step()
        reach(step + 1)
    return {name: [float(value.detach()) / images] * images for name, value in losses.items()}


def fit_in_threads(
    models: Sequence[SingleImageDenoiser],
    features: Tensor,
    coords: Tensor,
    generators: Sequence[torch.Generator],
    settings: FitSettings | None = None,
    reach: Callable[[int], Any] = lambda step: None,
) -> dict[str, list[float]]:
    """Fit images on a CPU, each on a core of its own: what a step reads and writes then stays in that core's cache.

    Side by side in the same operations, as on a GPU, it would not.

    Args:
        models: One for each image.
        features: As for `fit`, and so are all others.
        coords: Likewise.
        generators: Likewise.
        settings: Likewise.
        reach: Called now and then with the steps done, on average.
    """
    before, stop, done = torch.get_num_threads(), threading.Event(), [0] * len(models)

    def one(number: int) -> dict[str, list[float]]:
        torch.set_num_threads(1)  # of this thread

        def note(step: int) -> None:
            done[number] = step
            if stop.is_set():
                raise InterruptedError

        own = slice(number, number + 1)
        return fit(models[number], features[own], coords[own], generators[own], settings, note)

    with ThreadPoolExecutor(min(len(models), before)) as pool:
        running = [pool.submit(one, number) for number in range(len(models))]
        try:
            while wait(running, timeout=EVERY_SECONDS).not_done:
                reach(sum(done) // len(done))
            found = [each.result() for each in running]
        finally:
            stop.set()
            torch.set_num_threads(before)
    return {name: [value for losses in found for value in losses[name]] for name in found[0]}
