"""DVT at small scale (arXiv 2401.02957): is a pattern that was planted found, taken out, and unlearnt?

    python -m benchmarks.claims.dvt --write                                   # under 20 minutes of a core
    python -m benchmarks.claims.dvt --images 250 --views 768 --steps 2000 --train_steps 4000   # for a GPU

Three parts, each over several seeds:

- a mixture whose parts are known: a smooth random content, a pattern of the position, noise; F against the mean of the
  views' tokens, each put back where it looked;
- an encoder with a pattern planted behind its norm, over crops of photographs: how near the features are to those
  without the pattern (spatial means taken out), and how much of their variance the position explains;
- the denoiser on images it has not seen, with positions and without.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import patchloom as pl
from benchmarks.harness import machine, markdown_table, mean_and_deviation, rewrite
from patchloom.encoders import create_encoder
from patchloom.features.artefacts import position_explained_variance
from patchloom.systems.dvt.commands import decompose
from patchloom.systems.dvt.config import DecomposeConfig
from patchloom.systems.dvt.fit import FitSettings, fit
from patchloom.systems.dvt.folder import FeatureFolder
from patchloom.systems.dvt.model import SingleImageDenoiser
from patchloom.systems.dvt.views import draw_views, view_coords

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "dvt.md"
WIDTH, GRID = 32, 8


class Planted(nn.Module):
    """A norm with a pattern behind it that is added to the patch tokens, the same for every image."""

    def __init__(self, norm: nn.Module, pattern: Tensor, prefix: int) -> None:
        super().__init__()
        self.norm, self.prefix = norm, prefix
        self.register_buffer("pattern", pattern)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, P + N, D)."""
        x = self.norm(x)
        return torch.cat([x[:, : self.prefix], x[:, self.prefix :] + self.pattern], dim=1)


def centred_cosine(a: Tensor, b: Tensor) -> float:
    """Return the mean cosine of maps (N, C) after their spatial means are taken out."""
    return float(F.cosine_similarity(a - a.mean(0), b - b.mean(0), dim=-1).mean())


def mixture(seed: int, steps: int) -> dict[str, float]:
    """Return the cosines to the true content: of the raw features, of the mean over views, of F."""
    generator = torch.Generator().manual_seed(seed)
    control = torch.randn(1, WIDTH, 6, 6, generator=generator)
    crops = draw_views(64, (64, 64), (0.1, 0.5), 0.5, generator)
    coords = torch.stack([view_coords(view, (64, 64), (GRID, GRID)).reshape(-1, 2) for view in crops])
    read = F.grid_sample(control, 2 * coords[None] - 1, mode="bicubic", padding_mode="border", align_corners=True)
    clean = read[0].permute(1, 2, 0)
    clean = clean / clean.std()
    pattern = 0.9 * torch.randn(GRID * GRID, WIDTH, generator=generator)
    features = clean + pattern + 0.05 * torch.randn(clean.shape, generator=generator)
    torch.manual_seed(seed)
    model = SingleImageDenoiser(
        WIDTH, (GRID, GRID), hidden_dim=4 * WIDTH, n_levels=4, base_resolution=4, max_resolution=32
    )
    fit(model, features[None], coords[None], [generator], FitSettings(steps, 1024))
    found = model.decompose(features[-1].reshape(GRID, GRID, -1), coords[-1].reshape(GRID, GRID, 2))
    # Every token counts by how near it looks to the place in question.
    distance = torch.cdist(coords[-1], coords.reshape(-1, 2))
    weights = torch.softmax(-(distance.square()) / (2 * (0.5 / GRID) ** 2), dim=1)
    averaged = weights @ features.reshape(-1, WIDTH)
    return {
        "raw": centred_cosine(features[-1], clean[-1]),
        "mean over views": centred_cosine(averaged, clean[-1]),
        "F": centred_cosine(found["denoised"].reshape(-1, WIDTH), clean[-1]),
    }


def planted(options: argparse.Namespace, seed: int) -> dict[str, float]:
    """Return the figures of an encoder with a planted pattern, through both stages."""
    torch.manual_seed(seed)
    size: dict[str, Any] = {"image_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}
    encoder: Any = create_encoder("vit_tiny_patch16_224", **size).eval().requires_grad_(False)
    with torch.no_grad():
        encoder.pos_embed.zero_()  # the pattern is to be the planted one alone
    pattern = options.strength * torch.randn(GRID * GRID, 64)
    plain, encoder.norm = encoder.norm, Planted(encoder.norm, pattern, encoder.num_prefix_tokens)
    folder = options.out / f"features-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    decompose(
        DecomposeConfig(
            encoder=encoder,
            data="photos",
            out=str(folder),
            images=options.images,
            num_views=options.views,
            steps=options.steps,
            batch_tokens=512,
            levels=4,
            dtype="float32",
            pictures=4,
            seed=seed,
            device=options.device,
        )
    )
    found = FeatureFolder(folder)
    raw, made = (torch.stack([found.read(key, part) for key in found.images]) for part in ("raw", "denoised"))
    clean = raw - pattern.reshape(GRID, GRID, -1)
    assert plain is encoder.norm.norm

    def mean_cosine(maps: Tensor) -> float:
        pairs = zip(maps.flatten(1, 2), clean.flatten(1, 2), strict=True)
        return float(np.mean([centred_cosine(a, b) for a, b in pairs]))

    figures = {
        "raw cosine": mean_cosine(raw),
        "denoised cosine": mean_cosine(made),
        "raw position": position_explained_variance(raw),
        "clean position": position_explained_variance(clean),
        "denoised position": position_explained_variance(made),
    }
    for name, positions in (("ratio", True), ("ratio without", False)):
        out = options.out / f"denoiser-{seed}-{positions}"
        shutil.rmtree(out, ignore_errors=True)
        run = pl.clean(
            "dvt_train",
            data=str(folder),
            out=str(out),
            pos_embed=positions,
            held_out=0.2,
            max_steps=options.train_steps,
            batch_size=16,
            lr=4e-3,
            lr_base_batch=None,
            num_workers=0,
            report=False,
            seed=seed,
        )
        figures[name] = run.summary["held_out_ratio"]
    return figures


def main() -> None:
    """Measure, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scratch/claims/dvt"))
    parser.add_argument("--images", type=int, default=32, help="images taken apart; a fifth is held out")
    parser.add_argument("--views", type=int, default=64, help="random crops of an image")
    parser.add_argument("--steps", type=int, default=300, help="steps for an image")
    parser.add_argument("--mixture_steps", type=int, default=2000, help="steps of the known mixture")
    parser.add_argument("--train_steps", type=int, default=500, help="steps of the denoiser")
    parser.add_argument("--strength", type=float, default=0.7, help="of the planted pattern; features are of about 1")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="as little as can be: does the script run?")
    parser.add_argument("--write", action="store_true", help=f"write the tables to docs/systems/{PAGE.name}")
    options = parser.parse_args()
    if options.smoke:
        options.images, options.steps, options.mixture_steps, options.train_steps, options.seeds = 8, 20, 20, 4, 1
    options.out.mkdir(parents=True, exist_ok=True)
    known = [mixture(seed, options.mixture_steps) for seed in range(options.seeds)]
    real = [planted(options, seed) for seed in range(options.seeds)]

    def values(rows: list[dict[str, float]], name: str) -> np.ndarray:
        return np.array([row[name] for row in rows])

    gain = values(known, "F") - values(known, "mean over views")
    position = values(real, "denoised position") / values(real, "raw position")
    nearer = values(real, "denoised cosine") - values(real, "raw cosine")
    without = values(real, "ratio without") / values(real, "ratio")
    claims = [
        ["known mixture: cosine of F to the content", values(known, "F"), "≥ 0.97", values(known, "F").mean() >= 0.97],
        ["known mixture: F above the mean over views", gain, "≥ 0.05", gain.mean() >= 0.05],
        ["planted: variance by position, denoised / raw", position, "≤ 0.6", position.mean() <= 0.6],
        ["planted: cosine to features without it, gain", nearer, "> 0", nearer.mean() > 0],
        [
            "unseen images: squared error / that of raw",
            values(real, "ratio"),
            "≤ 0.7",
            values(real, "ratio").mean() <= 0.7,
        ],
        ["without positions / with", without, "≥ 1.05", without.mean() >= 1.05],
    ]
    rows = [
        [what, mean_and_deviation(found.tolist(), 3), wanted, "yes" if holds else "**no**"]
        for what, found, wanted, holds in claims
    ]
    detail = [[name, mean_and_deviation(values(known, name).tolist(), 3)] for name in known[0]]
    detail += [[name, mean_and_deviation(values(real, name).tolist(), 3)] for name in real[0]]
    text = (
        f"`python -m benchmarks.claims.dvt --images {options.images} --views {options.views} --steps {options.steps} "
        f"--train_steps {options.train_steps}`, {options.seeds} seeds, {machine()}.\n\n"
        + markdown_table(["claim", "mean ± standard deviation", "wanted", "holds"], rows)
        + "\n\n"
        + markdown_table(["figure", "mean ± standard deviation"], detail)
    )
    print(text)
    if options.write:
        rewrite(PAGE, "dvt_claims", text)


if __name__ == "__main__":
    main()
