"""Training one head on bags, and asking it: Adam, batches of padded bags, a curve of the validation metric.

As the published code of Phikon-v2's group (owkin/HistoSSLscaling) does. Lightning's trainer takes the steps;
the weights are those of a loop written out, to the bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import lightning.pytorch as lp
import numpy as np
import torch
from torch import Tensor

from patchloom.base.stopping import through_lightning
from patchloom.errors import UsageError
from patchloom.evaluate.slides.fit_config import FitSettings
from patchloom.evaluate.slides.tasks import Task
from patchloom.systems.phikon_v2.mil import HEADS, MILHead, pad_bags
from patchloom.training.callbacks import SignalsLeftToUs
from patchloom.training.hardware import on_device, quiet


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
    training = _HeadTraining(bags, targets, task, settings, validation)
    with torch.random.fork_rng(devices=[]), quiet(), through_lightning():
        torch.manual_seed(settings.seed)  # dropout
        trainer = lp.Trainer(
            **on_device(torch.device(settings.device)),
            max_epochs=settings.epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer._signal_connector = SignalsLeftToUs(trainer)
        trainer.fit(training, _Batches(len(bags), settings))
    return training.head.to(settings.device).eval(), training.curve


class _HeadTraining(lp.LightningModule):
    """A head with its bags; Adam, and the validation metric after every epoch."""

    def __init__(
        self,
        bags: Sequence[Tensor],
        targets: np.ndarray,
        task: Task,
        settings: FitSettings,
        validation: tuple[Sequence[Tensor], np.ndarray] | None,
    ) -> None:
        super().__init__()
        self.head = make_head(settings, int(bags[0].shape[1]), task.out_features)
        self.bags, self.task, self.settings, self.validation = bags, task, settings, validation
        self.targets = torch.from_numpy(np.asarray(targets))
        self.curve: list[float] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.head.parameters(), lr=self.settings.lr, weight_decay=self.settings.weight_decay)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = forward(self.head, [self.bags[number] for number in batch], self.settings.device)
        loss = self.task.loss(logits, self.targets[batch.cpu()].to(logits.device))
        if not bool(torch.isfinite(loss)):
            raise UsageError(f"the loss became {loss.item()} at lr {self.settings.lr}; set lr lower")
        return loss

    def on_train_epoch_end(self) -> None:
        if self.validation is not None:
            scores = self.task.scores(predict_logits(self.head, self.validation[0], self.settings.device))
            self.curve.append(self.task.metric(self.validation[1], scores))


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


class _Batches:
    """The numbers of the bags of each batch, shuffled anew in every epoch.

    An incomplete last batch is left out, unless it is the only one.
    """

    def __init__(self, count: int, settings: FitSettings) -> None:
        self.count, self.size = count, settings.batch_size
        self.generator = torch.Generator().manual_seed(settings.seed)

    def __len__(self) -> int:
        return max(1, self.count // self.size)

    def __iter__(self) -> Iterator[Tensor]:
        # Nothing is drawn before the first batch is asked for: the trainer begins an iteration only to see that it can.
        yield from torch.randperm(self.count, generator=self.generator).split(self.size)[: len(self)]
