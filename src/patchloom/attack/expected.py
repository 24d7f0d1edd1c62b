"""How long attacks will take, said before they are made: steps are passes forward and back, by the thousand."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchloom.attack.craft import ABOUT, UNIVERSAL_PASSES
from patchloom.base.progress import duration
from patchloom.data.survey import notice
from patchloom.encoders import Encoder
from patchloom.systems.dta.ball import still
from patchloom.systems.dta.config import OF_VICTIM, DTAConfig
from patchloom.systems.dta.features import PixelClassifier

SHORT = 60.0
"""Seconds that need no announcement."""
SMALLER: dict[str, int] = {"limit": 50, "search_images": 32, "curve_images": 0}
"""What takes a fraction of the time, and still shows whether a model is fooled."""
TIMED = 4
"""Images of the passes that are timed."""
STOPS_EARLY = {"middle": 0.5, "dta": 0.6, "pap": 0.1, "universal": 0.6}
"""Share of the encoder that a step of an attack takes, about; of others all of it."""
PASSES_OF_AUTO_ATTACK = 1000
"""Passes of each image, at most about."""


def passes(config: DTAConfig, names: Collection[str], images: int, victims: int, blocks: int) -> float:
    """Return how often an image goes through a whole model forward and back, about, in all attacks together.

    Args:
        config: The settings.
        names: Attacks that are to be made.
        images: Images to attack.
        victims: Models.
        blocks: Blocks of the encoder.
    """
    steps, searched = config.steps * config.restarts, min(config.search_images, images)
    total = 0.0
    for name in names:
        share = STOPS_EARLY.get(name, 1.0)
        if name == "noise":
            continue
        if name in ("pap", "universal"):
            rounds = max(UNIVERSAL_PASSES, -(-config.steps // -(-searched // config.batch_size)))
            total += share * rounds * searched
        elif name == "auto_attack":
            total += PASSES_OF_AUTO_ATTACK * images * victims
        else:
            total += share * steps * images * (victims if name in OF_VICTIM else 1)
    if {"dta", "universal"} & set(names):
        tried = len(config.candidates) or blocks
        total += STOPS_EARLY["dta"] * tried * config.search_steps * (images if config.per == "sample" else searched)
    if "dta" in names and config.curve_images:
        lengths = len(set(config.curve_levels)) + sum((0.025, 0.125, 0.25, 0.5, 1))
        total += STOPS_EARLY["dta"] * steps * lengths * min(config.curve_images, images)
    return total


def pace(encoders: Sequence[Encoder], images: Tensor) -> float:
    """Return the seconds an image takes forward and back through all encoders, in a pass that is timed.

    Args:
        encoders: The models.
        images: (n, C, H, W) in [0, 1], where they compute.
    """
    seconds = 0.0
    for encoder in encoders:
        model = PixelClassifier(encoder)  # resizes for encoders of another size
        with still(model):
            for _ in range(2):  # the first makes ready
                x = images.clone().requires_grad_(True)
                begun = time.perf_counter()
                (slope,) = torch.autograd.grad(model(x).float().square().sum(), x)
                float(slope.sum())  # waits for a GPU
                last = time.perf_counter() - begun
        seconds += last
    return seconds / len(images)


def announce(
    config: DTAConfig,
    names: Sequence[str],
    encoders: Sequence[Encoder],
    shown: Tensor,
    images: int,
    victims: Sequence[str],
    blocks: int,
    out: Path,
) -> None:
    """Say how long it will take, and what would take less, where it takes longer than a minute.

    Args:
        config: The settings.
        names: The attacks.
        encoders: What they go through.
        shown: (n, C, H, W) in [0, 1], where they compute: a few, to time a pass on.
        images: Images that are attacked.
        victims: Names of the models.
        blocks: Blocks of the encoder.
        out: Where attacks are kept; those that are complete are not made again.
    """
    left = [name for name in names if not _complete(out / name, victims if name in OF_VICTIM else [])]
    if not left:
        return
    each = pace(encoders, shown)
    seconds = each * passes(config, left, images, len(victims), blocks)
    if seconds < SHORT:
        return
    text = f"about {duration(seconds)}: {len(left)} attacks of {config.steps} steps on {images} images"
    smaller = _smaller(config)
    if smaller:
        changed = replace(config, **smaller)
        fewer = each * passes(changed, left, min(images, changed.limit), len(victims), blocks)
        options = " ".join(f"--{name} {value}" for name, value in smaller.items())
        text += f"; {options} takes about {duration(fewer)}"
    notice(text)


def _smaller(config: DTAConfig) -> dict[str, Any]:
    return {name: value for name, value in SMALLER.items() if getattr(config, name) > value}


def _complete(folder: Path, victims: Sequence[str]) -> bool:
    return all((folder / victim / ABOUT).exists() for victim in victims) if victims else (folder / ABOUT).exists()
