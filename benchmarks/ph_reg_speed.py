"""One pass of a PH-Reg student against the teacher's ten views, and against the untouched encoder.

    python -m benchmarks.ph_reg_speed [--encoder vit_small_patch16_224] [--batch 8] [--rounds 5] [--write]

All forward alone, from normalised images to patch features; the teacher shifts, mirrors, computes and averages.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, paired_ratio, rewrite

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
REGISTERS = 16


def candidates(name: str, batch: int, device: str) -> dict[str, Callable[[], Tensor]]:
    """Return what is timed, by name."""
    from patchloom.encoders import create_encoder, image_size
    from patchloom.systems.ph_reg.model import DenoisedTeacher, patch_features
    from patchloom.systems.ph_reg.registers import add_registers

    encoder = create_encoder(name).eval().to(device)
    student = add_registers(encoder, REGISTERS).eval().to(device)
    teacher = DenoisedTeacher(encoder)
    images = torch.randn(batch, 3, *image_size(encoder), device=device)
    offsets, flips = (drawn.to(device) for drawn in teacher.draw(batch, torch.Generator().manual_seed(0)))
    return {
        "the untouched encoder": lambda: patch_features(encoder, images),
        f"student, {REGISTERS} registers": lambda: patch_features(student, images),
        "teacher, mean over 10 views": lambda: teacher(images, offsets, flips),
    }


def main() -> None:
    """Time all in turn and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="vit_small_patch16_224", help="a timm ViT; weights play no part")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write the table to docs/performance.md")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def timed(call: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                call()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    calls = candidates(options.encoder, options.batch, device)
    clock = time.perf_counter if device == "cuda" else time.process_time
    seconds = alternate({name: timed(call) for name, call in calls.items()}, rounds=options.rounds, clock=clock)
    plain, student, teacher = seconds
    rows = [
        [
            name,
            mean_and_deviation([options.batch / one for one in seconds[name]], 1),
            f"{paired_ratio(seconds[name], seconds[plain]):.2f} ×",
        ]
        for name in seconds
    ]
    faster = paired_ratio(seconds[teacher], seconds[student])
    header = [f"{options.encoder}, batch {options.batch}", "images/s", "time over the untouched"]
    text = (
        f"{machine()}\n\n{markdown_table(header, rows)}\n\n"
        f"The student is {faster:.1f} × as fast as the teacher. Target: at least 8 ×, and at most 1.1 × the time of "
        f"the untouched encoder."
    )
    print(text)
    if options.write:
        rewrite(PAGE, "ph_reg_speed", text)


if __name__ == "__main__":
    main()
