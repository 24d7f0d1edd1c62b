"""The first stage of DVT: many images at once, against one after the other, and against the published loop.

    python -m benchmarks.dvt_speed [--images 16] [--steps 20] [--views 32] [--rounds 3] [--threads 2] [--write]

Features of ViT-S (width 384) at 224 pixels, 14 x 14 tokens, 2048 tokens a step, half of the steps with residuals. The
published loop is one image after the other with the losses in plain operations; its field has the same encoding as ours
(tiny-cuda-nn is not asked for). What making the features of views takes is left out: it is the same for all.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import alternate, machine, markdown_table, paired_ratio, rewrite
from patchloom.systems.dvt.fit import FitSettings, fit, fit_in_threads
from patchloom.systems.dvt.model import SingleImageDenoiser

PAGE = Path(__file__).parents[1] / "docs" / "systems" / "dvt.md"
WIDTH, GRID, RESOLUTION = 384, 14, 64


class Published(SingleImageDenoiser):
    """The losses as the published code writes them."""

    def losses(self, raw: Tensor, coords: Tensor, artifact_coords: Tensor) -> dict[str, Tensor]:
        """Return `loss`."""
        explained = self.neural_field.at(coords) + self.artifacts(artifact_coords)
        residual = self.residual_predictor(raw) if self.in_residual_phase and self.residual_predictor else None
        predicted = explained if residual is None else explained + residual.detach()
        loss = F.mse_loss(predicted, raw) + 1 - F.cosine_similarity(predicted, raw, dim=-1).mean()
        if residual is not None:
            left = F.mse_loss(residual, (raw - explained).detach())
            loss = loss + 0.1 * left + 0.02 * residual.abs().mean()
        return {"loss": loss}


def main() -> None:
    """Measure, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--views", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", action="store_true", help=f"write the table to docs/systems/{PAGE.name}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(0)
    shape = (options.images, options.views, GRID * GRID)
    features = torch.randn(*shape, WIDTH, generator=generator).to(device)
    coords = torch.rand(*shape, 2, generator=generator).to(device)
    settings = FitSettings(options.steps)

    def made(kind: type[SingleImageDenoiser]) -> list[SingleImageDenoiser]:
        return [kind(WIDTH, (GRID, GRID), max_resolution=RESOLUTION).to(device) for _ in range(options.images)]

    def draws() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(number) for number in range(options.images)]

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def at_once() -> None:
        models: Any = made(SingleImageDenoiser)
        if device.type == "cpu":
            fit_in_threads(models, features, coords, draws(), settings)
        else:
            fit(SingleImageDenoiser.stack(models).to(device), features, coords, draws(), settings)
        wait()

    def one_by_one(kind: type[SingleImageDenoiser]) -> None:
        for number, (model, draw) in enumerate(zip(made(kind), draws(), strict=True)):
            own = slice(number, number + 1)
            fit(model, features[own], coords[own], [draw], settings)
        wait()

    seconds = alternate(
        {
            "all at once": at_once,
            "one after the other": lambda: one_by_one(SingleImageDenoiser),
            "published loop, one after the other": lambda: one_by_one(Published),
        },
        rounds=options.rounds,
    )
    ours = seconds["all at once"]
    rows = [
        [
            name,
            f"{1000 * statistics.median(taken) / options.images / options.steps:.1f}",
            f"{60 * options.images / (statistics.median(taken) * 25_000 / options.steps):.3g}",
            f"{paired_ratio(taken, ours):.2f} ×",
        ]
        for name, taken in seconds.items()
    ]
    text = (
        f"`python -m benchmarks.dvt_speed --images {options.images} --steps {options.steps}`, {machine()}.\n\n"
        + markdown_table(["", "ms a step and image", "images/min at 25,000 steps", "time by that of all at once"], rows)
    )
    print(text)
    if options.write:
        rewrite(PAGE, "dvt_speed", text)


if __name__ == "__main__":
    main()
