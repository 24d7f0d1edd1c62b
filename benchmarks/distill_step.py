"""A distillation step against its parts: the teacher's forward pass and the student's own training step, each alone.

    python -m benchmarks.distill_step [--teacher vit_base_patch16_224] [--student resnet50] [--batch 8] [--write]

Plain distillation adds nothing but a loss, so its step should cost what its parts do. ScaleKD's step has projectors and
the teacher's last blocks besides, forward and backward; it is timed beside it. All with a fused AdamW.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, paired_ratio, rewrite
from patchloom import registry
from patchloom.data import open_source
from patchloom.encoders import create_backbone
from patchloom.models.bundle import save_bundle
from patchloom.training.config import config_from_mapping
from patchloom.training.optim import set_rates
from patchloom.training.supervised import as_classifier

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def method(name: str, teacher: Path, options: argparse.Namespace, device: str) -> Any:
    """Return a distillation method with the models of the benchmark."""
    settings = {
        "data": "digits",
        "out": "unused",
        "teacher": str(teacher),
        "encoder": options.student,
        "image_size": options.size,
        "optimizer": "adamw",
        "mixup": 0.0,
        "cutmix": 0.0,
        "val_fraction": 0.0,
    }
    kind = registry.method_class("distill", name)
    return kind(config_from_mapping(kind.config_class, settings), open_source("digits")).to(device).train()


def stepper(made: Any, loss: Callable[[], torch.Tensor], device: str, precision: str) -> Callable[[], None]:
    """Return forward, backward and optimiser step."""
    optimizer = made.configure_optimizers()
    set_rates(optimizer, 1e-5, 0.05)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def main() -> None:
    """Time all in turn and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="vit_base_patch16_224")
    parser.add_argument("--student", default="resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--write", action="store_true", help="write the table to docs/performance.md")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        taught = as_classifier(create_backbone(options.teacher, image_size=options.size), 10)
        teacher = save_bundle(taught, Path(folder) / "teacher")
        logits, scalekd = (method(name, teacher, options, device) for name in ("logits", "scalekd"))
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    batch = {"image": images, "label": torch.arange(options.batch, device=device) % 10}

    def answers() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=options.precision == "bf16"):
            logits.teacher(logits.teacher.view(images, logits.encoder))
        if device == "cuda":
            torch.cuda.synchronize()

    def own() -> torch.Tensor:
        value: torch.Tensor = logits.targets.loss(logits.encoder(images), batch["label"])
        return value

    steps = {
        "teacher, forward": answers,
        "student alone": stepper(logits, own, device, options.precision),
        "distil logits": stepper(logits, lambda: logits.training_loss(batch)["loss"], device, options.precision),
        "distil scalekd": stepper(scalekd, lambda: scalekd.training_loss(batch)["loss"], device, options.precision),
    }
    seconds = alternate(steps, rounds=options.rounds, warmup=1 if device == "cpu" else 5)
    parts = [a + b for a, b in zip(seconds["teacher, forward"], seconds["student alone"], strict=True)]
    rows = []
    for name, measured in {**seconds, "teacher and student, the sum": parts}.items():
        ratio = f"{paired_ratio(measured, parts):.2f} ×" if name.startswith("distil") else ""
        rows.append([name, mean_and_deviation([1000 * s for s in measured], 0), ratio])
    header = [
        f"{options.teacher} teaches {options.student}, batch {options.batch}, {options.precision}",
        "ms",
        "against the sum",
    ]
    text = f"{machine()}\n\n{markdown_table(header, rows)}\n\nTarget: distil logits at most 1.05 × the sum."
    print(text)
    if options.write:
        rewrite(PAGE, "distill_step", text)


if __name__ == "__main__":
    main()
