"""A training step with experts weights averaging against the plain one, and the folded model against the plain one.

    python -m benchmarks.ewa_step [--encoder vit_small_patch16_224] [--batch 8] [--rounds 7] [--write]

Every second feed-forward becomes four experts; forward, backward, fused AdamW, and the experts move towards each other.
The folded model is what is shipped; it has the plain model's modules, and is timed all the same.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, paired_ratio, rewrite
from patchloom.encoders import create_encoder, image_size
from patchloom.training.ewa import average_experts_, average_ffn, expand_ffn, experts_of

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


def stepper(model: nn.Module, images: torch.Tensor, precision: str) -> Callable[[], None]:
    """Return forward, backward, optimiser step and, where there are experts, their averaging."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average_experts_(experts_of(model), 0.1)
        if images.is_cuda:
            torch.cuda.synchronize()

    return step


def inference(model: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    """Return a forward pass in eval mode."""
    model.eval()

    @torch.no_grad()
    def run() -> None:
        model(images)
        if images.is_cuda:
            torch.cuda.synchronize()

    return run


def main() -> None:
    """Time in turn and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--write", action="store_true", help="write the table to docs/performance.md")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    plain = create_encoder(options.encoder).to(device)
    images = torch.randn(options.batch, 3, *image_size(plain), device=device)
    mixed = expand_ffn(copy.deepcopy(plain), options.experts)
    steps = {"plain": stepper(plain, images, options.precision), "experts": stepper(mixed, images, options.precision)}
    seconds = alternate(steps, rounds=options.rounds, warmup=2)
    folded = average_ffn(copy.deepcopy(mixed).eval())
    with torch.no_grad():
        difference = float((folded(images) - mixed.eval()(images)).abs().max())
    served = alternate(
        {"plain": inference(plain, images), "folded": inference(folded, images)}, rounds=options.rounds, warmup=1
    )
    step, forward = paired_ratio(seconds["experts"], seconds["plain"]), paired_ratio(served["folded"], served["plain"])
    rows = [
        [f"training step, {options.experts} experts", *_speeds(seconds, options.batch), f"{step:.2f} ×", "≤ 1.25 ×"],
        ["inference, folded", *_speeds(served, options.batch), f"{forward:.2f} ×", "1 ×"],
    ]
    parameters = [sum(p.numel() for p in m.parameters()) for m in (plain, mixed, folded)]
    header = [f"{options.encoder}, batch {options.batch}, {options.precision}", "plain, images/s", "this, images/s"]
    text = (
        f"{machine()}\n\n{markdown_table([*header, 'time over plain', 'target'], rows)}\n\n"
        f"Parameters: {parameters[0] / 1e6:.1f} M plain, {parameters[1] / 1e6:.1f} M while training, "
        f"{parameters[2] / 1e6:.1f} M folded. Largest difference between folded and averaging model: {difference:.1e}."
    )
    print(text)
    if options.write:
        rewrite(PAGE, "ewa_step", text)


def _speeds(seconds: dict[str, list[float]], batch: int) -> list[str]:
    return [mean_and_deviation([batch / s for s in times]) for times in seconds.values()]


if __name__ == "__main__":
    main()
