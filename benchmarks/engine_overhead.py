"""What the engine costs: the same model, batches and optimiser in a training run and in a bare torch loop.

    python -m benchmarks.engine_overhead [--steps 40] [--rounds 5] [--write]

Counted are the steps between the fifth and the last of each, with logging, progress and signal handling in the run;
checkpoints, probes and the report, which come between epochs, are not.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.harness import machine, markdown_table, mean_and_deviation, paired_ratio, rewrite
from patchloom.data import make_loader, open_source
from patchloom.systems.ccvit.method import CCViTConfig, CCViTMethod
from patchloom.tokenizers.centroid import CentroidTokenizer
from patchloom.training.callbacks import ContinuedMetrics, Interruption, Progress, SkippedImages
from patchloom.training.metrics import CSVMetrics
from patchloom.training.optim import set_rates

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
SKIPPED = 5
SETTINGS: dict[str, Any] = {
    "data": "photos",
    "encoder": "ccvit_tiny_patch8_64",
    "batch_size": 16,
    "k": 256,
    "num_workers": 0,
    "precision": "32-true",
    "accelerator": "cpu",
    "log_every": 20,
}


class Prepared(CCViTMethod):
    """CCViT with its batches in memory and a codebook at hand, so that steps alone are timed."""

    batches: list[dict[str, Any]]

    def prepare(self, source: Any, run_dir: Path) -> None:
        """Leave the codebook as it is."""

    def load_prepared(self, run_dir: Path) -> None:
        """Leave the codebook as it is."""

    def train_dataloader(self) -> Any:
        """Return the prepared batches."""
        self.total_steps = len(self.batches)
        self.steps_per_epoch = len(self.batches) + 1
        return InMemory(self.batches)


class InMemory:
    """Batches as a loader; a plain list would be taken for one loader per entry."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.batches)


class Clock(Callback):
    """Times the steps after the first few."""

    def on_train_batch_end(
        self, trainer: lp.Trainer, pl_module: lp.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start after the last step that is not counted; the final reading is the end."""
        self.end = time.perf_counter()
        if trainer.global_step == SKIPPED:
            self.start = self.end


def make(folder: Path, steps: int) -> Prepared:
    """Return the method with its batches."""
    config = CCViTConfig(out=str(folder), max_steps=steps, **SETTINGS)
    source = open_source(config.data)
    method = Prepared(config, source)
    method.tokenizer = CentroidTokenizer(torch.rand(256, 192, generator=torch.Generator().manual_seed(0)), 8)
    loader = make_loader(source, method.transform(), config.batch_size, seed=0, shuffle=True, num_workers=0)
    method.batches = [batch for batch, _ in zip(loader, range(steps), strict=False)]
    return method


def in_the_engine(steps: int) -> float:
    """Return seconds per step in a training run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        method = make(folder, steps)
        metrics, clock = CSVMetrics(folder / "metrics.csv"), Clock()
        trainer = lp.Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            callbacks=[Interruption(), ContinuedMetrics(metrics), SkippedImages(folder), Progress(), clock],
            logger=[metrics],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(method)
        return (clock.end - clock.start) / (steps - SKIPPED)


def bare(steps: int) -> float:
    """Return seconds per step in a loop of plain torch."""
    with tempfile.TemporaryDirectory() as name:
        method = make(Path(name), steps)
        method.total_steps, method.steps_per_epoch = steps, steps + 1
        optimizer = method.configure_optimizers()
        parameters = [p for p in method.parameters() if p.requires_grad]
        method.train()
        start = 0.0
        for number, batch in enumerate(method.batches):
            lr, weight_decay = method.rates(number)
            set_rates(optimizer, lr, weight_decay)
            optimizer.zero_grad()
            loss = method.training_loss(batch)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 3.0)
            optimizer.step()
            if number + 1 == SKIPPED:
                start = time.perf_counter()
        return (time.perf_counter() - start) / (steps - SKIPPED)


def main() -> None:
    """Time both in turn and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write the table to docs/performance.md")
    options = parser.parse_args()
    engine, loop = [], []
    for _ in range(options.rounds):
        engine.append(in_the_engine(options.steps))
        loop.append(bare(options.steps))
    overhead = paired_ratio(engine, loop) - 1
    rows = [
        ["training run", mean_and_deviation([1000 * s for s in engine], 1), f"{100 * overhead:+.1f} %"],
        ["bare torch loop", mean_and_deviation([1000 * s for s in loop], 1), ""],
    ]
    header = ["CCViT-Ti/8 at 64 px, batch 16", "ms per step", "overhead"]
    note = f"Target: at most 3 %. {options.rounds} rounds in turn, median."
    text = f"{machine()}\n\n{markdown_table(header, rows)}\n\n{note}"
    print(text)
    if options.write:
        rewrite(PAGE, "engine_overhead", text)


if __name__ == "__main__":
    main()
