"""A training step of VideoMAE-B on 16 frames of 224 px against transformers' `VideoMAEForPreTraining`, of equal sizes.

    python -m benchmarks.videomae_step [--batch 1] [--rounds 5] [--clock process] [--write]

All: tube mask 90 %, decoder of 4 blocks of width 384, targets normalised per tube; forward, backward, fused AdamW. Ours
decodes all that is hidden, as the peer does, or half of all tokens by the running cell.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, paired_ratio, rewrite
from benchmarks.mae_step import multiply_adds, stepper
from patchloom.encoders.masking import draw_running_cell_mask, draw_tube_mask

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
GRID, TOKENS, VISIBLE = (8, 14, 14), 1568, 160
Step = Callable[[], None]


def masks(batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return what is hidden from the encoder and left out by the decoder, (B, N) bool."""
    generator = torch.Generator().manual_seed(seed)
    hidden = [draw_tube_mask(GRID, 0.9, generator).flatten() for _ in range(batch)]
    left_out = [draw_running_cell_mask(GRID, 0.5, generator).flatten() for _ in range(batch)]
    return torch.stack(hidden), torch.stack(left_out)


def ours(dual: bool) -> Callable[[int, str, str], Step]:
    """Return what makes one training step of ours, with the running cell or without."""

    def make(batch: int, device: str, precision: str) -> Step:
        from patchloom.encoders import create_encoder
        from patchloom.systems.videomae_v2.model import VideoMaskedAutoencoder, initialize_as_videomae

        clips = torch.rand(batch, 3, 16, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)
        hidden, left_out = (mask.to(device) for mask in masks(batch))
        encoder = create_encoder("videomae_base_patch16_224", fc_norm=False)
        initialize_as_videomae(encoder)
        model = VideoMaskedAutoencoder(encoder, 384, 4, 6)
        return stepper(model, lambda: model.loss(clips, hidden, left_out if dual else None, clips), device, precision)

    return make


def transformers_videomae(batch: int, device: str, precision: str) -> Step:
    """Return one training step of transformers' `VideoMAEForPreTraining`."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    clips = torch.rand(batch, 3, 16, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)
    hidden = masks(batch)[0].to(device)
    config: Any = VideoMAEConfig(norm_pix_loss=True)
    model = VideoMAEForPreTraining._from_config(config, attn_implementation="sdpa")
    frames = clips.transpose(1, 2)
    return stepper(model, lambda: model(frames, bool_masked_pos=hidden).loss, device, precision)


CANDIDATES: dict[str, Callable[[int, str, str], Step]] = {
    "ours, all that is hidden": ours(dual=False),
    "ours, running cell": ours(dual=True),
    "transformers": transformers_videomae,
}


def arithmetic() -> dict[str, float]:
    """Return the multiply-adds of one clip, forward, in billions."""
    encoder, token = multiply_adds(VISIBLE, 768, 12), 768 * 1536 / 1e9
    whole, cell = (multiply_adds(VISIBLE + count, 384, 4) + count * 384 * 1536 / 1e9 for count in (1408, 784))
    return {
        "ours, all that is hidden": encoder + VISIBLE * token + whole,
        "ours, running cell": encoder + VISIBLE * token + cell,
        "transformers": encoder + TOKENS * token + whole,  # which embeds hidden tokens, too
    }


def main() -> None:
    """Time all in turn and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--clock", choices=["wall", "process"], default="wall", help="process: the processor's time")
    parser.add_argument("--write", action="store_true", help="write the table to docs/performance.md")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def timed(call: Step) -> Step:
        def run() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    steps = {name: timed(make(options.batch, device, options.precision)) for name, make in CANDIDATES.items()}
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    seconds = alternate(steps, rounds=options.rounds, warmup=1 if device == "cpu" else 5, clock=clock)
    counted = arithmetic()
    rows = [
        [
            name,
            mean_and_deviation(seconds[name], 2),
            f"{paired_ratio(seconds['transformers'], seconds[name]):.2f} ×",
            f"{counted[name]:.1f}",
        ]
        for name in CANDIDATES
    ]
    what = "seconds" if options.clock == "wall" else "processor seconds"
    header = [
        f"step, batch {options.batch}, {options.precision}",
        what,
        "faster than transformers by",
        "10⁹ multiply-adds, forward",
    ]
    text = (
        f"{machine()}\n\n{markdown_table(header, rows)}\n\n"
        f"Target: at least 1.15 × without the running cell, at least 1.5 × with it."
    )
    print(text)
    if options.write:
        rewrite(PAGE, "videomae_step", text)


if __name__ == "__main__":
    main()
