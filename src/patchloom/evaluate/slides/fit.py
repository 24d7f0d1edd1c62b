"""Training one head on bags, and asking it: Adam, batches of padded bags, a curve of the validation metric.

As the published code of Phikon-v2's group (owkin/HistoSSLscaling) does.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from patchloom.errors import UsageError
from patchloom.evaluate.slides.fit_config import FitSettings
from patchloom.evaluate.slides.tasks import Task
from patchloom.systems.phikon_v2.mil import HEADS, MILHead, pad_bags


def make_head(settings: FitSettings, in_features: int, out_features: int) -> MILHead:
    """Return a fresh head; its weights depend on the seed alone.

    Raises:
        UsageError: The head has no such argument, or not such a value.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        try:
            return HEADS[settings.head](in_features, out_features, **settings.head_args)
        except TypeError as error:
            raise UsageError(f"head_args {dict(settings.head_args)} do not fit {settings.head}: {error}") from error


def fit(
    bags: Sequence[Tensor],
    targets: np.ndarray,
    task: Task,
    settings: FitSettings,
    validation: tuple[Sequence[Tensor], np.ndarray] | None = None,
) -> tuple[MILHead, list[float]]:
    """Train a head.

    Args:
        bags: (n_i, D) each.
        targets: (bags,) class numbers or signed times.
        task: What is asked.
        settings: How.
        validation: Bags and targets on which the metric is taken after every epoch.

    Returns:
        The head after the last epoch, in eval mode, and the metric after each epoch (none without `validation`).

    Raises:
        UsageError: The loss is not finite.
    """
    head = make_head(settings, int(bags[0].shape[1]), task.out_features).to(settings.device)
    optimizer = torch.optim.Adam(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    order = torch.Generator().manual_seed(settings.seed)
    goal = torch.from_numpy(np.asarray(targets)).to(settings.device)
    curve: list[float] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # dropout
        for _ in range(settings.epochs):
            head.train()
            for batch in _batches(len(bags), settings.batch_size, order):
                logits = forward(head, [bags[number] for number in batch], settings.device)
                loss = task.loss(logits, goal[batch])
                if not bool(torch.isfinite(loss)):
                    raise UsageError(f"the loss became {loss.item()} at lr {settings.lr}; set lr lower")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            if validation is not None:
                scores = task.scores(predict_logits(head, validation[0], settings.device))
                curve.append(task.metric(validation[1], scores))
    return head.eval(), curve


def forward(head: MILHead, bags: Sequence[Tensor], device: str = "cpu") -> Tensor:
    """Return logits (bags, out): one padded tensor, or bag by bag where padding would change them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a bag has fewer than")  # Chowder's zeros are what is meant here
        if head.needs_single_bags:
            return torch.cat([head(bag[None].to(device).float()) for bag in bags])
        x, mask = pad_bags(bags, head.min_tiles)
        # Without padding the mask has nothing to say.
        return head(x.to(device).float(), mask.to(device) if bool(mask.any()) else None)


@torch.inference_mode()
def predict_logits(head: MILHead, bags: Sequence[Tensor], device: str = "cpu", batch_size: int = 16) -> np.ndarray:
    """Return the logits (bags, out) float64 of a head in eval mode; bags of like length share a batch."""
    was_training = head.training
    head.eval()
    order = sorted(range(len(bags)), key=lambda number: len(bags[number]))
    logits = np.zeros((len(bags), head.out_features))
    for start in range(0, len(bags), batch_size):
        batch = order[start : start + batch_size]
        logits[batch] = forward(head, [bags[number] for number in batch], device).double().cpu().numpy()
    head.train(was_training)
    return logits


def _batches(count: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """Return shuffled batches; an incomplete last one is left out, unless it is the only one."""
    batches = list(torch.randperm(count, generator=generator).split(size))
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) < size else batches
