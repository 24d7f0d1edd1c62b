"""What watches a run: progress, the k-NN probe and feature health, interruption, failure."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from tqdm import tqdm

from patchloom.base import stopping
from patchloom.base.progress import Meter
from patchloom.data.base import Source
from patchloom.encoders import Encoder
from patchloom.features.health import Start, verdict
from patchloom.io import write_json, write_rows
from patchloom.training.failure import NonFiniteLossError
from patchloom.training.method import Method
from patchloom.training.metrics import CSVMetrics, read_metrics


class Progress(Callback):
    """A live bar on a terminal, plain lines elsewhere: epoch, loss, images per second, time left.

    Time the step spends waiting for images is shown when it is worth mending.
    """

    def __init__(self) -> None:
        self.started = self.batch_ended = 0.0
        self.waited = 0.0
        self.images = 0
        self.meter: Meter | None = None

    def on_train_start(self, trainer: lp.Trainer, pl_module: lp.LightningModule) -> None:
        """Start the clock."""
        assert isinstance(pl_module, Method)
        self.started = self.batch_ended = time.monotonic()
        if not trainer.is_global_zero:
            return
        first, total = pl_module.step, pl_module.total_steps
        if first:
            print(f"going on after step {first} of {total}", file=sys.stderr, flush=True)
        self.meter = Meter("step", total, unit=None, first=first, stays=True)

    def on_train_batch_start(
        self, trainer: lp.Trainer, pl_module: lp.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the time spent waiting for the batch."""
        if self.images:  # the first batch waits for the workers to start
            self.waited += time.monotonic() - self.batch_ended

    def on_train_batch_end(
        self, trainer: lp.Trainer, pl_module: lp.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say how it goes."""
        assert isinstance(pl_module, Method)
        now = self.batch_ended = time.monotonic()
        self.images += len(batch["key"]) * trainer.world_size
        if self.meter is not None:
            self.meter.reach(pl_module.step, lambda: self.figures(pl_module, now))

    def on_train_end(self, trainer: lp.Trainer, pl_module: lp.LightningModule) -> None:
        """Close the bar."""
        if self.meter is not None:
            self.meter.close()

    def figures(self, method: Method, now: float) -> str:
        """Return epoch, loss, speed and, when it matters, the share of time spent waiting for images."""
        epoch = method.epochs(method.batches_done)
        epochs = method.epochs(method.total_steps * method.config.accumulate)
        parts = [f"epoch {epoch:.1f}/{epochs:.0f}" if epochs >= 10 else f"epoch {epoch:.1f}/{epochs:.1f}"]
        if (loss := method.latest.get("loss")) is not None:
            parts.append(f"loss {loss:.3f}")
        elapsed = max(now - self.started, 1e-9)
        parts.append(f"{self.images / elapsed:.0f} images/s")
        share = self.waited / elapsed
        if share > 0.2 and elapsed > 20:
            parts.append(f"{share:.0%} of the time waits for images (raise num_workers)")
        return "  ".join(parts)


class ContinuedMetrics(Callback):
    """Lets `metrics.csv` go on from the step a run resumes at."""

    def __init__(self, metrics: CSVMetrics) -> None:
        self.metrics = metrics

    def on_train_start(self, trainer: lp.Trainer, pl_module: lp.LightningModule) -> None:
        """Drop what was logged after the checkpoint."""
        assert isinstance(pl_module, Method)
        self.metrics.forget_after(pl_module.step)


class SkippedImages(Callback):
    """Lists the images that could not be read, in `skipped.csv` of the run folder."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "skipped.csv"
        self.reasons = read_skipped(self.path)  # of the run that is being resumed

    def on_train_batch_end(
        self, trainer: lp.Trainer, pl_module: lp.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the batch's unreadable images."""
        self.add(batch.get("skipped", ()))

    def add(self, skipped: Any) -> None:
        """Note unreadable images, each once."""
        new = {key: reason for key, reason in skipped if key not in self.reasons}
        if not new:
            return
        if not self.reasons:
            key, reason = next(iter(new.items()))
            print(f"skipping unreadable images, listed in {self.path}: {key} ({reason}) …", file=sys.stderr)
        self.reasons.update(new)
        write_skipped(self.path, self.reasons)


class Probe(Callback):
    """Every so many epochs: k-NN where labels exist, feature health always, the method's own validation.

    Attributes:
        latest: Figures of the latest probe.
    """

    def __init__(self, run_dir: Path, data: ProbeData, every: int, batch_size: int) -> None:
        self.run_dir = run_dir
        self.data = data
        self.every = every
        self.batch_size = batch_size
        self.latest: dict[str, Any] = {}
        self.start: Start | None = None

    def on_train_start(self, trainer: lp.Trainer, pl_module: lp.LightningModule) -> None:
        """Measure the untrained encoder: what training is compared with."""
        assert isinstance(pl_module, Method)
        if self.every and pl_module.step == 0:
            self.run(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: lp.Trainer, pl_module: lp.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Probe where an epoch that calls for it ends."""
        assert isinstance(pl_module, Method)
        if not self.every or not pl_module.at_epoch_end() or pl_module.step == pl_module.total_steps:
            return
        if trainer.should_stop:  # the checkpoint comes first, then the probe of the end
            return
        if round(pl_module.epochs(pl_module.batches_done)) % self.every == 0:
            self.run(trainer, pl_module)

    def on_train_end(self, trainer: lp.Trainer, pl_module: lp.LightningModule) -> None:
        """Probe the result; without probes only the method's own validation is left."""
        self.run(trainer, pl_module)

    def judge(self, method: Method) -> str:
        """Return what the figures say of the features, beside those before training."""
        rank, cosine = self.latest["rankme"], self.latest["mean_cosine"]
        if method.step == 0:
            self.start = rank, cosine
        elif self.start is None:  # a run that is resumed
            rows = [row for row in read_metrics(self.run_dir / "metrics.csv") if row["step"] == 0 and "rankme" in row]
            self.start = (rows[0]["rankme"], rows[0]["mean_cosine"]) if rows else None
        width, images = self.data.width, self.data.images
        return verdict(rank, cosine, width, images, start=self.start, labelled=method.needs_labels)

    def run(self, trainer: lp.Trainer, pl_module: lp.LightningModule) -> None:
        """Measure, log and print. One process does it; the others wait at their next exchange."""
        assert isinstance(pl_module, Method)
        if not trainer.is_global_zero:
            return
        self.latest = {}
        if self.every:
            self.latest = self.data.measure(pl_module.bundle_model(), self.batch_size, pl_module.device)
            if self.latest:
                self.latest["verdict"] = self.judge(pl_module)
        self.latest |= pl_module.validate(pl_module.device)
        numbers = {name: value for name, value in self.latest.items() if isinstance(value, (int, float))}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=pl_module.step)
        if not numbers:
            return
        line = "  ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in numbers.items())
        text = f"step {pl_module.step}: {line}"
        if verdict := self.latest.get("verdict"):
            text += f"  ({verdict})"
        tqdm.write(text, file=sys.stderr)


class ProbeData:
    """The images the probe looks at: reference and query halves, fixed for the whole run; None where there are none."""

    def __init__(self, reference: Source | None, queries: Source | None) -> None:
        self.reference = reference
        self.queries = queries
        self.images = self.width = 0

    def measure(self, encoder: Encoder, batch_size: int, device: torch.device) -> dict[str, Any]:
        """Return `rankme`, `mean_cosine` and, with labels, the figures of k-NN.

        These are `knn_accuracy`, `knn_balanced_accuracy` and `knn_majority_share`, the accuracy of naming the
        commonest class of the queries every time.
        """
        if self.queries is None:
            return {}
        from patchloom.features.extract import extract
        from patchloom.features.health import mean_pairwise_cosine, rankme
        from patchloom.features.knn import knn_scores

        def features(source: Source) -> Any:
            return extract(encoder, source, batch_size=batch_size, num_workers=0, device=str(device), progress=False)

        queries = features(self.queries)
        spread, cosine = rankme(queries.vectors), mean_pairwise_cosine(queries.vectors)
        figures: dict[str, Any] = {"rankme": spread, "mean_cosine": cosine}
        self.images, self.width = queries.vectors.shape
        if self.reference is not None:
            reference = features(self.reference)
            figures |= knn_scores(
                reference.vectors, reference.labels, queries.vectors, queries.labels, k=min(20, len(reference.labels))
            ).named("knn_")
        return figures


class Interruption(Callback):
    """A signal lets the step finish, then ends the run in order; a second one, or one before any step, ends it now.

    Of several processes any may have got the signal: they agree on it after every step.

    Attributes:
        number: The signal that ends the run, once one does.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.deferring = False

    def setup(self, trainer: lp.Trainer, pl_module: lp.LightningModule, stage: str) -> None:
        """Hear signals that were held back while processes started, and in processes that were spawned."""
        stopping.watch()

    def on_train_batch_start(
        self, trainer: lp.Trainer, pl_module: lp.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """From the first step on there is something to lose."""
        if not self.deferring:
            stopping.defer("stopping after this step")
            self.deferring = True

    def on_train_batch_end(
        self, trainer: lp.Trainer, pl_module: lp.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask for the end, before other callbacks hear of this batch's: the checkpoint is written by one of them."""
        assert isinstance(pl_module, Method)
        if pl_module.batches_done % pl_module.config.accumulate:  # a half-accumulated gradient would be lost
            return
        number = stopping.received() or 0
        if trainer.world_size > 1:
            number = int(trainer.strategy.reduce(torch.tensor(number, device=pl_module.device), reduce_op="max"))
        if number:
            self.number = number
            trainer.should_stop = True
        elif pl_module.step == pl_module.total_steps:
            stopping.defer("the last step is done; stopping after the report")

    def teardown(self, trainer: lp.Trainer, pl_module: lp.LightningModule, stage: str) -> None:
        """Let signals end what follows at once."""
        stopping.end_deferral()


class SignalsLeftToUs(_SignalConnector):
    """Takes SIGTERM from Lightning, which would leave the run without checkpoint and report, with exit code 0.

    What it does under SLURM to requeue a job stays.
    """

    def register_signal_handlers(self) -> None:
        """Register Lightning's handlers, then put that of SIGTERM back."""
        ours = signal.getsignal(signal.SIGTERM)
        super().register_signal_handlers()
        self._register_signal(signal.SIGTERM, ours)


class FailureNote(Callback):
    """Writes `failure.json` when a loss is not finite: step, learning rate, file names of the batch."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "failure.json"

    def on_exception(self, trainer: lp.Trainer, pl_module: lp.LightningModule, exception: BaseException) -> None:
        """Note what is needed to look into it."""
        if not isinstance(exception, NonFiniteLossError) or not isinstance(pl_module, Method):
            return
        note = {
            "reason": str(exception),
            "step": pl_module.step,
            "lr": [group["lr"] for group in trainer.optimizers[0].param_groups][:1],
            "files": pl_module.last_batch_keys,
        }
        write_json(self.path, note)


def read_skipped(path: Path) -> dict[str, str]:
    """Return the unreadable images listed so far: file to reason."""
    import csv

    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["file"]: row["reason"] for row in csv.DictReader(file)}


def write_skipped(path: Path, skipped: dict[str, str]) -> None:
    """Write the list of unreadable images: file, reason."""
    write_rows(path, ["file", "reason"], skipped.items())
