"""DINOv2's linear probe: a grid of learning rates, blocks and poolings, all heads trained at once.

Oquab et al. 2023, arXiv 2304.07193. Features come from the cache, so training images are not augmented.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from patchloom.encoders import depth, embed_dim, num_prefix_tokens, require_tokens
from patchloom.encoders.probe import probe_columns
from patchloom.errors import UsageError
from patchloom.evaluate.grid import HeadGrid, Kind, fit_heads
from patchloom.evaluate.linear_grid_config import LinearGridConfig
from patchloom.evaluate.protocol import Evaluation
from patchloom.evaluate.subset import learning_features, taken
from patchloom.evaluate.target import labelled_features, resolve_encoder
from patchloom.features.extract import Features, torch_device
from patchloom.statistics.metrics import Score, accuracy

FEWEST_STEPS, PASSES = 1000, 10


class LinearGrid(Evaluation):
    """DINOv2's linear probe: rates, blocks and poolings in one pass, the best on validation images counts."""

    config_class = LinearGridConfig

    def figures(self) -> dict[str, Any]:
        """Return accuracy (a fraction) and what goes with it."""
        train, test, names, logits, chosen = self.best_head(accuracy)
        return {**self.classified(logits, train, test, names), **chosen}

    def best_head(self, score: Score, several: bool = False) -> tuple[Features, Features, list[str], Tensor, Any]:
        """Train the grid and return train, test, names, the best head's logits of test, and what was chosen.

        Args:
            score: What validation images are judged by.
            several: Images have several labels each.
        """
        config = self.config
        train, val, test, names, inputs = probe_features(config, several)
        kind: Kind = "labels" if several else "classes"
        factor = config.probe_batch / 256 if config.scale_lr else 1.0
        settings: dict[str, Any] = {
            "num_classes": len(names),
            "steps": config.steps or max(FEWEST_STEPS, PASSES * len(train.labels) // config.probe_batch),
            "batch_size": config.probe_batch,
            "kind": kind,
            "seed": config.seed,
            "device": torch_device(config.device),
        }
        columns = list(inputs.values())
        grid = fit_heads(
            train.vectors, train.labels, inputs=columns, lrs=[lr * factor for lr in config.lrs], **settings
        )
        values = [_value(score, grid, number, val) for number in range(len(grid.heads))]
        if all(np.isnan(values)):
            raise UsageError("no head of the grid learnt anything that can be measured; lower lrs")
        best = int(np.nanargmax(values))  # the first of equals
        which, _ = grid.heads[best]
        lr = config.lrs[best % len(config.lrs)]
        logits = grid.logits(test.vectors, best).cpu()
        refit = config.refit and config.shots is None  # few shots would not be few with validation images among them
        if refit:
            x, y = torch.cat([train.vectors, val.vectors]), torch.cat([train.labels, val.labels])
            logits = fit_heads(x, y, inputs=[columns[which]], lrs=[lr * factor], **settings).logits(test.vectors, 0)
        described = [
            {"input": list(inputs)[i], "lr": config.lrs[number % len(config.lrs)], "validation": value}
            for number, ((i, _), value) in enumerate(zip(grid.heads, values, strict=True))
        ]
        chosen = {
            "selected_on": config.val or "a held-out tenth of train",
            "best": described[best],
            "steps": settings["steps"],
            "refit": refit,
            **config.drawn(),
            "heads": described,
        }
        return train, test, names, logits.cpu(), chosen


def probe_features(config: Any, several: bool) -> tuple[Features, Features, Features, list[str], dict[str, slice]]:
    """Return training, validation and test features, the names, and the columns of each input of the grid.

    The vectors hold the class tokens of the last blocks, oldest first, then the mean over the last block's patches; an
    encoder without class token has the mean over patches of each block instead, and raw pixels are one input.
    """
    encoder = resolve_encoder(config)
    layers: Sequence[int] | None = None
    most = max(config.blocks)
    if encoder is not None:
        require_tokens(encoder)
        if most > depth(encoder):
            raise UsageError(f"blocks holds {most}; the encoder has {depth(encoder)} blocks")
        layers = tuple(range(-most, 0))
    has_class_token = encoder is not None and num_prefix_tokens(encoder) > 0
    how: dict[str, Any] = {"layers": layers, "pool": "cls+avg" if has_class_token else "avg", "several": several}
    if encoder is None:
        how["pool"] = None
    train, test, names = learning_features(config, **how)
    if config.val is not None:
        _, val, _ = labelled_features(replace(config, test=config.val), **how)
    else:
        train, val = _split(train, config.seed)
    if encoder is None:
        return train, val, test, names, {"pixels": slice(0, train.vectors.shape[1])}
    width = embed_dim(encoder)
    if not has_class_token:
        inputs = {f"mean over patches of {n} blocks": probe_columns(width, n, most=most) for n in config.blocks}
        return train, val, test, names, inputs
    order = [2 * layer for layer in range(most)] + [2 * most - 1]
    columns = torch.cat([torch.arange(part * width, (part + 1) * width) for part in order])
    train, val, test = (one._replace(vectors=one.vectors[:, columns]) for one in (train, val, test))
    inputs = {
        f"class token of {n} block{'s' * (n > 1)}{', mean over patches' * added}": probe_columns(width, n, added, most)
        for n in config.blocks
        for added in config.avgpool
    }
    return train, val, test, names, inputs


def _split(train: Features, seed: int) -> tuple[Features, Features]:
    """Return nine tenths to train on and one to choose on, each class in both where it has images enough."""
    labels = train.labels.numpy() if train.labels.ndim == 1 else None
    total = len(train.labels)
    if total < 2:
        raise UsageError(f"{total} training image is too few to choose a head on; give val")
    held = max(1, round(0.1 * total))
    sizes = np.zeros(0) if labels is None else np.unique(labels, return_counts=True)[1]
    fits = len(sizes) > 0 and sizes.min() >= 2 and len(sizes) <= min(held, total - held)
    parts = train_test_split(np.arange(total), test_size=held, random_state=seed, stratify=labels if fits else None)
    first, second = (torch.from_numpy(np.sort(part)) for part in parts)
    return taken(train, first), taken(train, second)._replace(skipped=[])


def _value(score: Score, grid: HeadGrid, number: int, val: Features) -> float:
    """Return the score of a head on validation images; NaN where it diverged."""
    logits = grid.logits(val.vectors, number).cpu()
    if not bool(torch.isfinite(logits).all()):
        return float("nan")
    predicted = logits.argmax(1) if score.needs == "classes" else logits.sigmoid()
    return float(score(predicted.numpy(), val.labels.numpy()))
