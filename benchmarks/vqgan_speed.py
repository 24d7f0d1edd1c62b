"""A training step of ViT-VQGAN against a bare loop of the same parts, and VIM's sampling with its cache and without.

    python -m benchmarks.vqgan_speed [--steps 20] [--rounds 3] [--images 8] [--write]

The step has all there is: encoder, quantiser, decoder, discriminator, its penalty every 16th step, two AdamW. Timed is
the processor's time, which others on the machine add nothing to.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import torch
from torch.nn import functional as F

from benchmarks.engine_overhead import InMemory
from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, paired_ratio, rewrite
from patchloom.data import make_loader, open_source
from patchloom.systems.vim.config import SIZES
from patchloom.systems.vim.model import ImageGPT
from patchloom.systems.vit_vqgan.config import ViTVQGANConfig
from patchloom.systems.vit_vqgan.method import ViTVQGANMethod
from patchloom.training.callbacks import ContinuedMetrics, Interruption, Progress, SkippedImages
from patchloom.training.metrics import CSVMetrics

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
SKIPPED = 2
TOKENS = 256
SETTINGS: dict[str, Any] = {
    "data": "photos",
    "encoder": "vit_vqgan_tiny",
    "image_size": 64,
    "patch_size": 8,
    "num_codes": 512,
    "code_dim": 16,
    "disc_channels": 64,
    "batch_size": 8,
    "perceptual": 0.0,
    "num_workers": 0,
    "precision": "32-true",
    "accelerator": "cpu",
    "log_every": 20,
}


class Prepared(ViTVQGANMethod):
    """ViT-VQGAN with its batches in memory, so that steps alone are timed."""

    batches: list[dict[str, Any]]

    def train_dataloader(self) -> Any:
        """Return the prepared batches."""
        self.total_steps = len(self.batches)
        self.steps_per_epoch = len(self.batches) + 1
        return InMemory(self.batches)


class Clock(lp.Callback):
    """Times the steps after the first few."""

    def on_train_batch_end(
        self, trainer: lp.Trainer, pl_module: lp.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start after the last step that is not counted; the final reading is the end."""
        self.end = time.process_time()
        if batch_idx + 1 == SKIPPED:
            self.start = self.end


def make(folder: Path, steps: int) -> Prepared:
    """Return the method with its batches."""
    config = ViTVQGANConfig(out=str(folder), max_steps=steps, **SETTINGS)
    method = Prepared(config, open_source(config.data))
    loader = make_loader(method.source, method.transform(), config.batch_size, seed=0, shuffle=True, num_workers=0)
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
    """Return seconds per step of the same parts in a loop of plain torch."""
    with tempfile.TemporaryDirectory() as name:
        method = make(Path(name), steps)
        config, network, critic = method.config, method.network, method.discriminator
        network.train()
        of_network, of_critic = (
            torch.optim.AdamW(part.parameters(), lr=config.lr, betas=config.betas, weight_decay=1e-4, fused=True)
            for part in (network, critic)
        )
        start = 0.0
        for number, batch in enumerate(method.batches):
            images = batch["image"].float() / 255
            critic.requires_grad_(False)
            out = network(images)
            fake = F.softplus(-critic(out.images)).mean()
            (F.mse_loss(out.images, images) + out.loss + 0.1 * fake).backward()
            of_network.step()
            of_network.zero_grad()
            critic.requires_grad_(True)
            loss = (F.softplus(-critic(images)).mean() + F.softplus(critic(out.images.detach())).mean()) / 2
            if number % 16 == 0:
                real = images.clone().requires_grad_(True)
                (gradient,) = torch.autograd.grad(critic(real).sum(), real, create_graph=True)
                loss = loss + 5 * 16 * gradient.square().flatten(1).sum(1).mean()
            loss.backward()
            of_critic.step()
            of_critic.zero_grad()
            if number + 1 == SKIPPED:
                start = time.process_time()
        return (time.process_time() - start) / (steps - SKIPPED)


def sampling(images: int, rounds: int) -> dict[str, list[float]]:
    """Return seconds to draw images of 256 tokens with the cache and without."""
    size = SIZES["vim_tiny"]
    torch.manual_seed(0)
    model = ImageGPT(512, TOKENS, size.dim, size.depth, size.heads).eval()
    calls = {
        name: lambda cached=cached: model.generate(count=images, use_cache=cached)
        for name, cached in (("cache", True), ("none", False))
    }
    return alternate(calls, rounds=rounds, warmup=0, clock=time.process_time)


def main() -> None:
    """Measure and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--write", action="store_true", help="write the table to docs/performance.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine, loop = [], []
    for _ in range(options.rounds):
        engine.append(in_the_engine(options.steps))
        loop.append(bare(options.steps))
    drawn = sampling(options.images, 1)
    rows = [
        ["ViT-VQGAN, a training step of 8 images", mean_and_deviation([1000 * s for s in engine], 0), ""],
        [
            "a bare loop of the same parts",
            mean_and_deviation([1000 * s for s in loop], 0),
            f"{paired_ratio(engine, loop):.3f} × (at most 1.05)",
        ],
        [f"VIM, {options.images} images of {TOKENS} tokens, cache", f"{1000 * drawn['cache'][0]:.0f}", ""],
        [
            "the same without cache",
            f"{1000 * drawn['none'][0]:.0f}",
            f"{drawn['none'][0] / drawn['cache'][0]:.1f} × (at least 10)",
        ],
    ]
    table = markdown_table(["vit_vqgan_tiny at 64 px, vim_tiny", "ms", "ratio"], rows)
    text = f"{machine()}\n\n{table}\n\n{options.rounds} rounds in turn, median; processor seconds."
    print(text)
    if options.write:
        rewrite(PAGE, "vqgan_speed", text)


if __name__ == "__main__":
    main()
