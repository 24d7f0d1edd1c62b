"""Centroids against learned tokens at the same k and grid, and the small-scale claims of ViT-VQGAN and VIM.

    python -m benchmarks.claims.tokenizers --out scratch/claims/tokenizers [--data CIFAR10_TRAIN --test CIFAR10_TEST]
        [--steps 1000] [--vim_steps 500] [--seeds 1] [--pretrain] [--write]

What each costs to build, how well it gives images back, how far noise moves its tokens, what is made of them, and with
--pretrain what CCViT learns from them. The defaults take less than 20 minutes of one core; the claims of the papers are
for longer runs. Every run leaves its figures in `--out`, so an interrupted series goes on where it stopped; `--write`
puts the tables into docs/systems/vit_vqgan.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import patchloom as pl
from benchmarks.claims.ccvit import Series
from benchmarks.harness import machine, markdown_table, mean_and_deviation, rewrite
from patchloom.data import SubsetSource, open_source
from patchloom.data.base import Source
from patchloom.evaluate.generation import probe_blocks
from patchloom.evaluate.logistic import fit_logistic
from patchloom.systems.vim.config import SIZES, GPTSize
from patchloom.systems.vim.distance import frechet_distance
from patchloom.tokenizers import Tokenizer
from patchloom.training.held_out import read_views

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "vit_vqgan.md"
SIDE, PATCH, CODES, CODE_DIM = 32, 4, 256, 8
BATCH, TEST, DRAWN = 32, 500, 400
NOISE = (0.02, 0.05, 0.1)
VIM = "vim_claims"
SIZES[VIM] = GPTSize(64, 6, 2)
COMMON: dict[str, Any] = {
    "image_size": SIDE,
    "batch_size": BATCH,
    "num_workers": 0,
    "probe_every": 0,
    "log_every": 50,
    "checkpoint_every": 100_000,
    "epochs": 1000,
    "warmup_epochs": 0.2,
    "report": False,
    "precision": "32-true",
    "overwrite": True,
}
LEARNED: dict[str, Any] = {
    **COMMON,
    "encoder": "vit_vqgan_nano",
    "patch_size": PATCH,
    "num_codes": CODES,
    "code_dim": CODE_DIM,
    "lr": 1e-3,
    "adversarial": 0.0,
    "perceptual": 0.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "learned": {"revive_every": 20},
    "short_l2": {},
    "long_plain": {"l2_normalize": False, "code_dim": 64},
}
"""The tokenizer that is compared, and the two of claim 1, whose codes that nothing uses stay as they are."""


def images_of(name: str, count: int) -> tuple[Tensor, Tensor]:
    """Return up to so many images of a source in [0, 1], spread over it, and their labels."""
    source = open_source(name)
    assert isinstance(source, Source)
    chosen = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int))
    images, labels = read_views(SubsetSource(source, chosen), SIDE)
    return images.float() / 255, labels


class Comparison:
    """The runs of one seed."""

    def __init__(self, series: Series, options: argparse.Namespace, seed: int) -> None:
        self.series, self.options, self.seed = series, options, seed
        self.data, self.test = options.data, options.test

    def place(self, name: str) -> Path:
        """Return where a run lies."""
        return self.series.out / "runs" / f"{name}_{self.seed}"

    def build(self, name: str) -> dict[str, Any]:
        """Make a tokenizer (once); return its cost and its figures on test images."""

        def compute() -> dict[str, Any]:
            start, out = time.process_time(), self.place(name)
            if name == "centroids":
                book = {"k": CODES, "patch_size": PATCH, "image_size": SIDE, "images": 2000, "iters": 10}
                pl.fit_codebook(self.data, str(out), seed=self.seed + 1, overwrite=True, **book)
            else:
                settings = {**LEARNED, **VARIANTS[name], "data": self.data, "max_steps": self.options.steps}
                pl.train_tokenizer("vit_vqgan", out=out, seed=self.seed, **settings)
            seconds = time.process_time() - start
            tokenizer = pl.load_tokenizer(out)
            images, _ = images_of(self.test, TEST)
            return {"seconds": seconds, **tokenizer.report(images), **self.under_noise(tokenizer, images)}

        return self.series.get(f"{name}_{self.seed}", compute)

    def under_noise(self, tokenizer: Tokenizer, images: Tensor) -> dict[str, float]:
        """Return the share of tokens that noise changes, and the error of what they give against the clean image."""
        clean, found = tokenizer.encode(images), {}
        for sigma in NOISE:
            noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(self.seed))
            ids = tokenizer.encode((images + sigma * noise).clamp(0, 1))
            found[f"moved_{sigma}"] = float((ids != clean).double().mean())
            found[f"noisy_mse_{sigma}"] = tokenizer.squared_error(images, ids) / images.numel()
        return found

    def generate(self, tokens: str, conditional: bool = False) -> dict[str, Any]:
        """Train VIM on a tokenizer's tokens (once); return how well it foretells them and how its images lie."""
        name = f"vim_{tokens}{'_classes' if conditional else ''}"

        def compute() -> dict[str, Any]:
            out = self.place(name)
            settings = {**COMMON, "encoder": VIM, "lr": 2e-3, "dropout": 0.0, "samples": 0, "val_images": TEST}
            settings |= {"max_steps": self.options.vim_steps, "seed": self.seed, "conditional": conditional}
            start = time.process_time()
            run = pl.generate(
                "vim", tokenizer=self.place(tokens), data=self.data, probe_data=self.test, out=out, **settings
            )
            found = {"seconds": time.process_time() - start}
            for each in ("held_out_cross_entropy", "frequency_cross_entropy", "held_out_token_accuracy"):
                found[each] = run.summary[each]
            if conditional:
                return found
            model: Any = pl.load(run.model)
            real, _ = images_of(self.test, DRAWN)
            drawn = torch.cat([model.sample(100, seed=self.seed + part, top_k=100) for part in range(DRAWN // 100)])
            through = model.tokenizer.decode(model.tokenizer.encode(real)).clamp(0, 1)
            others = images_of(self.data, DRAWN)[0]
            for key, images in (("drawn", drawn), ("through", through), ("train", others)):
                found[f"distance_{key}"] = frechet_distance(small(images), small(real))
            return found

        return self.series.get(f"{name}_{self.seed}", compute)

    def probe(self, tokens: str) -> dict[str, Any]:
        """Return the accuracy of a linear classifier on each block, and on the mean of the codes alone."""

        def compute() -> dict[str, Any]:
            model: Any = pl.load(self.place(f"vim_{tokens}") / "model")
            found = probe_blocks(str(self.place(f"vim_{tokens}")), self.data, self.test, limit=1500, c=1.0)
            train, y = images_of(self.data, 1500)
            test, y_test = images_of(self.test, 1500)
            codes = model.transformer.code_embed.weight.detach()
            if hasattr(model.tokenizer, "network"):
                codes = model.tokenizer.network.quantizer.lookup(torch.arange(CODES)).detach()
            x, x_test = (codes[model.tokenizer.encode(part).flatten(1)].mean(1) for part in (train, test))
            fitted = fit_logistic(x, y, int(max(y.max(), y_test.max())) + 1, c=1.0)
            codes_alone = float((fitted.predict(x_test) == y_test).double().mean())
            return {**found, "codes": codes_alone}

        return self.series.get(f"probe_{tokens}_{self.seed}", compute)

    def pretrain(self, tokens: str) -> dict[str, Any]:
        """Pre-train CCViT on a tokenizer's tokens (once) and return the accuracy of a linear probe."""

        def compute() -> dict[str, Any]:
            out = self.place(f"ccvit_{tokens}")
            settings = {**COMMON, "encoder": "ccvit_tiny_patch4_32", "max_steps": self.options.pretrain_steps}
            run = pl.pretrain(
                "ccvit", data=self.data, out=out, codebook=str(self.place(tokens)), seed=self.seed, **settings
            )
            found = pl.evaluate("linear", encoder=run.model, train=self.data, test=self.test, num_workers=0)
            return {"accuracy": found["accuracy"]}

        return self.series.get(f"ccvit_{tokens}_{self.seed}", compute)


def small(images: Tensor) -> Tensor:
    """Return what Fréchet distances are taken in here: images of 8 x 8 pixels, (n, 192)."""
    return F.adaptive_avg_pool2d(images, 8).flatten(1)


def run_all(series: Series, options: argparse.Namespace) -> None:
    """Compute what is not there yet."""
    for seed in range(options.seeds):
        one = Comparison(series, options, seed)
        for tokens in ("centroids", "learned"):
            one.build(tokens)
            one.generate(tokens)
            if options.pretrain:
                one.pretrain(tokens)
        one.probe("learned")
        one.generate("learned", conditional=True)
        for variant in ("short_l2", "long_plain"):
            one.build(variant)


def figures(series: Series, name: str, seeds: int) -> list[dict[str, Any]]:
    """Return the figures of a name for all seeds that are there."""
    found = [series.known(f"{name}_{seed}") for seed in range(seeds)]
    return [one for one in found if one is not None]


def comparison_table(series: Series, seeds: int) -> str:
    """Return both tokenizers side by side."""

    def cell(name: str, key: str, scale: float = 1, digits: int = 2) -> str:
        values = [scale * one[key] for one in figures(series, name, seeds) if key in one]
        return mean_and_deviation(values, digits).removesuffix(" (one run)") if values else "not run"

    rows = [
        ["processor seconds to build", *(cell(name, "seconds", digits=0) for name in ("centroids", "learned"))],
        ["test MSE × 1000", *(cell(name, "mse", 1000) for name in ("centroids", "learned"))],
        ["codes in use, %", *(cell(name, "usage", 100, 0) for name in ("centroids", "learned"))],
        ["perplexity", *(cell(name, "perplexity", digits=0) for name in ("centroids", "learned"))],
    ]
    for sigma in NOISE:
        rows.append(
            [
                f"tokens moved by noise of σ = {sigma}, %",
                *(cell(name, f"moved_{sigma}", 100, 0) for name in ("centroids", "learned")),
            ]
        )
        rows.append(
            [
                f"MSE × 1000 against the clean image, σ = {sigma}",
                *(cell(name, f"noisy_mse_{sigma}", 1000) for name in ("centroids", "learned")),
            ]
        )
    both = ("vim_centroids", "vim_learned")
    rows += [
        ["VIM: cross-entropy of a held-out token, nats", *(cell(name, "held_out_cross_entropy") for name in both)],
        ["by frequency alone", *(cell(name, "frequency_cross_entropy") for name in both)],
        ["Fréchet distance of drawn images, 8 × 8 pixels", *(cell(name, "distance_drawn", 1, 3) for name in both)],
        ["of real ones through the tokenizer", *(cell(name, "distance_through", 1, 3) for name in both)],
        ["of training images", *(cell(name, "distance_train", 1, 3) for name in both)],
        [
            "CCViT on the tokens, linear probe, %",
            *(cell(n, "accuracy", 100, 1) for n in ("ccvit_centroids", "ccvit_learned")),
        ],
    ]
    return markdown_table([f"k = {CODES}, {SIDE // PATCH} × {SIDE // PATCH} tokens", "centroids", "learned"], rows)


def claims_table(series: Series, seeds: int) -> str:
    """Return the claims with what was measured and whether the check holds."""
    short, plain = (figures(series, name, seeds) for name in ("short_l2", "long_plain"))
    usage = [[100 * one["usage"] for one in group] for group in (short, plain)]
    times = statistics.mean(usage[0]) / max(statistics.mean(usage[1]), 1e-9)
    centroids, learned = (figures(series, name, seeds) for name in ("centroids", "learned"))
    ratio = [two["mse"] / one["mse"] for one, two in zip(centroids, learned, strict=False)]
    probes = figures(series, "probe_learned", seeds)
    best = [one["best"] for one in probes]
    gain = [100 * (one["best_accuracy"] - one["codes"]) for one in probes]
    inner = all(0 < one["best"] < one["blocks"] for one in probes)
    free, classes = (figures(series, name, seeds) for name in ("vim_learned", "vim_learned_classes"))
    lower = [
        100 * (1 - two["held_out_cross_entropy"] / one["held_out_cross_entropy"])
        for one, two in zip(free, classes, strict=False)
    ]
    below = [100 * (1 - one["held_out_cross_entropy"] / one["frequency_cross_entropy"]) for one in free]
    rows = [
        [
            "1 short codes of length 1 are used better (d = 8, normalised, against d = 64, not)",
            f"{mean_and_deviation(usage[0], 0)} % of the codes against {mean_and_deviation(usage[1], 0)} %",
            "≥ 1.5 ×",
            times >= 1.5,
        ],
        [
            "2 learned tokens give images back better than centroids",
            f"{mean_and_deviation(ratio)} × the squared error, "
            f"{statistics.mean(one['seconds'] for one in learned):.0f} s against "
            f"{statistics.mean(one['seconds'] for one in centroids):.0f} s",
            "≤ 1.0 ×",
            statistics.mean(ratio) <= 1,
        ],
        [
            "3 the probe of VIM is best inside",
            f"best after block {', '.join(map(str, best))} of 6; {mean_and_deviation(gain, 1)} points above the codes",
            "not the last, ≥ +2 points",
            inner and statistics.mean(gain) >= 2,
        ],
        [
            "4 classes help to foretell tokens, and tokens are no independent draws",
            f"{mean_and_deviation(lower)} % lower with the class; {mean_and_deviation(below, 1)} % below frequencies",
            "≥ 0.5 %, ≥ 10 %",
            statistics.mean(lower) >= 0.5 and statistics.mean(below) >= 10,
        ],
    ]
    shown = [[claim, measured, check, "holds" if holds else "**fails**"] for claim, measured, check, holds in rows]
    return markdown_table(["claim", "measured", "check", ""], shown)


def shown(source: str) -> str:
    """Return the name of a source; of a folder the last two parts of its path."""
    return "/".join(Path(source).parts[-2:])


def main() -> None:
    """Run what is missing, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="photos")
    parser.add_argument("--test", default="photos:test")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000, help="of a learned tokenizer")
    parser.add_argument("--vim_steps", type=int, default=500)
    parser.add_argument("--pretrain_steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--pretrain", action="store_true", help="pre-train CCViT on each as well")
    parser.add_argument("--write", action="store_true", help="write the tables to docs/systems/vit_vqgan.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    series = Series(options.out)
    run_all(series, options)
    how = (
        f"{machine()}; {shown(options.data)} and {shown(options.test)}, {options.steps} steps of {BATCH} "
        f"images, VIM {options.vim_steps}, {options.seeds} seed{'s' if options.seeds > 1 else ''}"
    )
    tables = {"comparison": comparison_table(series, options.seeds), "claims": claims_table(series, options.seeds)}
    for name, table in tables.items():
        print(f"{how}\n\n{table}\n")
        if options.write:
            rewrite(PAGE, name, f"{how}\n\n{table}")


if __name__ == "__main__":
    main()
