"""What adapters cost a ViT-B at 224 pixels: forward pass, training step, memory, switching; beside the plain encoder.

    python -m benchmarks.adapt_speed --write

Forward passes and training steps of all candidates are timed in turn (processor time where there is no GPU). A step's
memory is the GPU's, or that of a process of its own beyond what Python and the libraries take. Every step is AdamW's.
`--write` puts the table into docs/adapt.md.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn import functional as F

from benchmarks.harness import alternate, machine, markdown_table, paired_ratio, rewrite
from patchloom.encoders.insertion import activate, insert, insertions
from patchloom.systems.adaptformer.model import AdaptFormer
from patchloom.systems.bitfit.model import BitFit
from patchloom.systems.dvpt.model import DVPT
from patchloom.systems.linear.model import LinearHead
from patchloom.systems.lora.model import LoRA
from patchloom.systems.vpt.model import VisualPrompts

PAGE = Path(__file__).parents[1] / "docs" / "adapt.md"
CLASSES = 100
ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "AdaptFormer, bottleneck 64": lambda encoder: AdaptFormer(encoder, 64, num_classes=CLASSES),
    "LoRA, rank 8, q and v": lambda encoder: LoRA(encoder, 8, num_classes=CLASSES),
    "VPT deep, 10 prompts": lambda encoder: VisualPrompts(encoder, 10, num_classes=CLASSES),
    "DVPT, 50 prompts": lambda encoder: DVPT(encoder, num_classes=CLASSES),
    "BitFit": lambda encoder: BitFit(encoder, num_classes=CLASSES),
    "linear": lambda encoder: LinearHead(encoder, num_classes=CLASSES),
}
FULL = "full fine-tuning"


def model(name: str, device: str) -> Any:
    """Return a ViT-B/16 with an adapter, or with a classifier and all weights to train."""
    torch.manual_seed(0)
    encoder = timm.create_model("vit_base_patch16_224", num_classes=CLASSES if name == FULL else 0).to(device)
    if name != FULL:
        insert(encoder, ADAPTERS[name](encoder))
    return encoder


def forward(name: str, batch: int, device: str) -> Callable[[], None]:
    """Return one forward pass without gradients."""
    encoder = model(name, device).eval()
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)

    @torch.no_grad()
    def call() -> None:
        encoder(images)
        _finish(device)

    return call


def step(name: str, batch: int, device: str) -> Callable[[], None]:
    """Return one training step."""
    encoder = model(name, device).train()
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(batch, device=device) % CLASSES
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def call() -> None:
        loss = F.cross_entropy(encoder(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        _finish(device)

    return call


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def memory(name: str, batch: int, device: str) -> float:
    """Return the peak memory of three steps in GiB, model included."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        call = step(name, batch, device)
        for _ in range(3):
            call()
        return torch.cuda.max_memory_allocated() / 2**30
    command = [sys.executable, "-m", "benchmarks.adapt_speed", "--batch", str(batch), "--memory", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _resident(which: str) -> float:
    """Return the memory of this process in GiB, now (VmRSS) or at most so far (VmHWM)."""
    # Not getrusage: what it says of a child begins with the peak of the parent.
    return int(Path("/proc/self/status").read_text().split(f"{which}:")[1].split()[0]) / 2**20


def switching(device: str) -> float:
    """Return the milliseconds of a switch between two adapters on one ViT-B, the median of many."""
    encoder = model("AdaptFormer, bottleneck 64", device)
    insert(encoder, ADAPTERS["LoRA, rank 8, q and v"](encoder), "second", activate_it=False)
    seconds = []
    for _ in range(20):
        for name in insertions(encoder):
            start = time.perf_counter()
            activate(encoder, name)
            seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def main() -> None:
    """Measure and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(ADAPTERS), help="adapters to measure")
    parser.add_argument("--write", action="store_true", help="write the table to docs/adapt.md")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.memory:
        before = _resident("VmRSS")
        call = step(options.memory, options.batch, device)
        for _ in range(3):
            call()
        print(_resident("VmHWM") - before)
        return
    names = [FULL, *options.only]
    clock = time.perf_counter if device == "cuda" else time.process_time
    calls = {n: forward(n, options.batch, device) for n in names}
    passes = alternate(calls, rounds=3 * options.rounds, clock=clock)
    calls = {n: step(n, options.batch, device) for n in names}
    steps = alternate(calls, rounds=options.rounds, clock=clock)
    del calls
    peaks = {name: memory(name, options.batch, device) for name in names}
    rows = []
    for name in names:
        trained = sum(p.numel() for p in model(name, "cpu").parameters() if p.requires_grad)
        rows.append(
            [
                name,
                f"{trained:,}",
                f"{paired_ratio(passes[name], passes[FULL]):.2f} ×",
                f"{paired_ratio(steps[name], steps[FULL]):.2f} ×",
                f"{peaks[name]:.2f} GiB ({peaks[name] / peaks[FULL]:.2f} ×)",
            ]
        )
    header = [f"ViT-B/16, batch {options.batch}", "trained", "forward / plain", "step / full", "peak memory / full"]
    text = (
        f"{machine()}\n\n{markdown_table(header, rows)}\n\n"
        f"A switch between two adapters takes {switching(device):.1f} ms. Targets for AdaptFormer: forward at most "
        f"1.08 ×, step at most 0.75 × the time and 0.6 × the memory; a switch at most 50 ms."
    )
    print(text)
    if options.write:
        rewrite(PAGE, "adapt_speed", text)


if __name__ == "__main__":
    main()
