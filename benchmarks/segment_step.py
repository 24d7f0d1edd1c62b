"""What training a decoder costs over a bare torch loop, and whole images in windows: ours, and MONAI's inferer.

    python -m benchmarks.segment_step [--steps 30] [--rounds 3] [--size 1024] [--window 256] [--write]

A step is that of `segment linear` on a frozen ViT-Ti/16 with batches in memory; the loop has the same encoder, 1x1
convolution, optimiser and loss, written with torch alone. Windows go through the same network, a 1x1 convolution on
patches at the size of the window, at the same places, and end in the class of every pixel. Processor seconds; memory is
how far each, in a process of its own, rises above what it was with network and image in place.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import machine, markdown_table, mean_and_deviation, paired_ratio, rewrite
from patchloom.segment.inference import SlidingWindowSegmenter
from patchloom.segment.method import LinearMethod
from patchloom.segment.segment_config import SegmentConfig
from patchloom.training.callbacks import ContinuedMetrics, Interruption, Progress, SkippedImages
from patchloom.training.metrics import CSVMetrics

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
SKIPPED, CLASSES, SIDE = 5, 11, 224


class Prepared(LinearMethod):
    """A linear decoder with its batches in memory, so that steps alone are timed."""

    batches: list[dict[str, Any]]

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
        self.end = time.process_time()
        if trainer.global_step == SKIPPED:
            self.start = self.end


def batches(steps: int, batch_size: int) -> list[dict[str, Any]]:
    """Return random images with masks, the same whenever asked for."""
    generator = torch.Generator().manual_seed(0)
    found: list[dict[str, Any]] = []
    for _ in range(steps):
        image = torch.randint(0, 256, (batch_size, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        mask = torch.randint(0, CLASSES, (batch_size, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        found.append({"image": image, "mask": mask, "key": ["x"] * batch_size, "skipped": []})
    return found


def method(folder: Path, steps: int, batch_size: int) -> Prepared:
    """Return the method with its batches."""
    from patchloom.data.segmentation import open_segmentation

    for part in ("images", "masks"):
        (folder / "data" / part).mkdir(parents=True)
    mask = (np.arange(32 * 32) % CLASSES).reshape(32, 32).astype(np.uint8)
    Image.fromarray(mask).save(folder / "data" / "masks" / "a.png")
    Image.fromarray(np.repeat(mask[..., None], 3, 2)).save(folder / "data" / "images" / "a.png")
    settings: dict[str, Any] = {"encoder": "vit_tiny_patch16_224", "untrained": True, "image_size": SIDE}
    settings |= {"data": str(folder / "data"), "out": str(folder), "max_steps": steps, "batch_size": batch_size}
    config = SegmentConfig(num_workers=0, precision="32-true", accelerator="cpu", log_every=20, **settings)
    made = Prepared(config, open_segmentation(config.data))
    made.batches = batches(steps, batch_size)
    return made


def in_the_engine(steps: int, batch_size: int) -> float:
    """Return seconds per step in a training run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made, metrics, clock = method(folder, steps, batch_size), CSVMetrics(folder / "metrics.csv"), Clock()
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
        trainer.fit(made)
        return (clock.end - clock.start) / (steps - SKIPPED)


def bare(steps: int, batch_size: int) -> float:
    """Return seconds per step in a loop of plain torch."""
    import timm

    torch.manual_seed(0)
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    head = nn.Conv2d(encoder.embed_dim, CLASSES, 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
    mean, std = (torch.tensor(encoder.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    start = 0.0
    for number, batch in enumerate(batches(steps, batch_size)):
        images, target = (batch["image"] / 255 - mean) / std, batch["mask"].long()
        with torch.no_grad():
            tokens = encoder.forward_features(images)[:, encoder.num_prefix_tokens :]
        maps = tokens.transpose(1, 2).unflatten(2, encoder.patch_embed.grid_size)
        logits = F.interpolate(head(maps), size=target.shape[-2:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, target, ignore_index=255)
        with torch.no_grad():  # the figure that a progress line has
            float((logits.argmax(1) == target).float().mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number + 1 == SKIPPED:
            start = time.process_time()
    return (time.process_time() - start) / (steps - SKIPPED)


class Patches(nn.Module):
    """Logits at the size of the image, of patches of 16 pixels: what windows cost, and little else."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, CLASSES, 16, 16)

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, K, H, W)."""
        return F.interpolate(self.patches(images), size=images.shape[-2:], mode="bilinear", align_corners=False)


def by_monai(net: nn.Module, image: Tensor, window: int, batch_size: int) -> Tensor:
    """Return the class of every pixel."""
    from monai.inferers import sliding_window_inference

    logits = sliding_window_inference(image, (window, window), batch_size, net, overlap=0.5)
    return logits[0].argmax(0).to(torch.uint8)


def by_ours(net: nn.Module, image: Tensor, window: int, batch_size: int) -> Tensor:
    """Return the class of every pixel."""
    return SlidingWindowSegmenter(net, window, window // 2, batch_size).classes(image)[0]


def windows_child(options: argparse.Namespace) -> None:
    """Segment an image one way, and print what it took."""
    torch.manual_seed(0)
    net = Patches().eval()
    image = torch.rand(1, 3, options.size, options.size, generator=torch.Generator().manual_seed(1))
    run: Callable[..., Tensor] = {"ours": by_ours, "monai": by_monai}[options.child]
    with torch.inference_mode():
        run(net, image[..., : 2 * options.window, : options.window], options.window, options.batch)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds = []
        for _ in range(options.rounds):
            start = time.process_time()
            classes = run(net, image, options.window, options.batch)
            seconds.append(time.process_time() - start)
    rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    counts = classes.flatten().bincount(minlength=CLASSES).tolist()
    print(json.dumps({"seconds": seconds, "bytes": rise, "counts": counts}))


def main() -> None:
    """Time all in turn and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--child", choices=("ours", "monai"), help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write the tables to docs/performance.md")
    options = parser.parse_args()
    if options.child:
        windows_child(options)
        return
    engine, loop = [], []
    for _ in range(options.rounds):
        engine.append(in_the_engine(options.steps, options.batch))
        loop.append(bare(options.steps, options.batch))
    told: dict[str, dict[str, Any]] = {}
    for name in ("ours", "monai"):
        command = [sys.executable, "-m", "benchmarks.segment_step", *sys.argv[1:], "--child", name]
        told[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    changed = int((torch.tensor(told["ours"]["counts"]) - torch.tensor(told["monai"]["counts"])).abs().sum())
    steps = [
        ["`segment linear`", mean_and_deviation([1000 * x for x in engine], 1), f"{paired_ratio(engine, loop):.3f} ×"],
        ["bare torch loop", mean_and_deviation([1000 * x for x in loop], 1), "at most 1.03 ×"],
    ]
    named = (("ours, strip by strip", "ours"), ("MONAI's inferer and argmax", "monai"))
    rows = [
        [label, mean_and_deviation([1000 * x for x in told[name]["seconds"]], 0), f"{told[name]['bytes'] / 2**20:.0f}"]
        for label, name in named
    ]
    faster = paired_ratio(told["monai"]["seconds"], told["ours"]["seconds"])
    text = (
        f"{machine()}\n\n"
        f"{markdown_table([f'step of {options.batch} images of {SIDE} px, ViT-Ti/16', 'ms', 'ratio'], steps)}\n\n"
        f"{markdown_table([f'{options.size} px in windows of {options.window}, overlap 0.5', 'ms', 'MiB'], rows)}\n\n"
        f"Windows: {faster:.2f} × as fast as MONAI (at least 1.1); {changed} of {options.size**2:,} pixels counted "
        f"otherwise. {options.rounds} rounds in turn, median; processor seconds."
    )
    print(text)
    if options.write:
        rewrite(PAGE, "segment_step", text)


if __name__ == "__main__":
    main()
