"""CCViT's small-scale claims on CIFAR-10 (arXiv 2303.04664): does the method do what its paper says?

    python -m benchmarks.claims.ccvit --data CIFAR10_TRAIN_FOLDER --test CIFAR10_TEST_FOLDER --out scratch/claims

Folders hold one sub-folder of JPEGs per class. Every run leaves its figures in `--out`, so an interrupted series
goes on where it stopped; `--write` puts the tables into docs/systems/ccvit.md. One training run of 350 steps takes
two to four minutes on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import register_model
from torch import Tensor
from torch.nn import functional as F

import patchloom as pl
from benchmarks.claims.vq_peer import VQPeer
from benchmarks.harness import machine, markdown_table, mean_and_deviation, rewrite
from patchloom.data import open_source
from patchloom.encoders import ccvit as encoders_ccvit
from patchloom.encoders.patches import patchify
from patchloom.tokenizers.centroid import CentroidTokenizer

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "ccvit.md"
ENCODER = "ccvit_claims_patch4_32"
SEEDS = (0, 1, 2)
PRETRAIN_IMAGES, STEPS = 9000, 350
RECIPE = {
    "encoder": ENCODER,
    "batch_size": 128,
    "lr": 1.5e-3,
    "max_steps": STEPS,
    "epochs": 5,
    "early_layers": 4,
    "head_layers": 1,
    "k": 512,
    "codebook_images": 3000,
    "mask_ratio": 25 / 64,
    "replace_ratio": 6 / 64,
    "num_workers": 1,
    "probe_every": 0,
    "log_every": 10,
    "precision": "32-true",
}


@register_model
def ccvit_claims_patch4_32(pretrained: bool = False, **kwargs: Any) -> Any:
    """The encoder the claims were measured with: width 96, depth 5, three heads, patches of 4 pixels."""
    return encoders_ccvit.ccvit_tiny_patch4_32(pretrained, **{"embed_dim": 96, "depth": 5, "num_heads": 3, **kwargs})


class Series:
    """Named figures, kept in a file each, computed once."""

    def __init__(self, out: Path) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the figures of `name`, computing them where they are not there yet."""
        path = self.out / f"{name}.json"
        if not path.exists():
            print(f"== {name}", flush=True)
            path.write_text(json.dumps(compute(), indent=2))
        figures: dict[str, Any] = json.loads(path.read_text())
        return figures

    def known(self, name: str) -> dict[str, Any] | None:
        """Return the figures of `name`, or None where they were never computed."""
        path = self.out / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None


def subset(folder: Path, out: Path, per_class: int, seed: int) -> Path:
    """Copy `per_class` images of each class to `out` (once) and return it."""
    if not out.exists():
        generator = np.random.default_rng(seed)
        for class_folder in sorted(path for path in folder.iterdir() if path.is_dir()):
            files = sorted(class_folder.iterdir())
            (out / class_folder.name).mkdir(parents=True)
            for index in generator.permutation(len(files))[:per_class]:
                shutil.copy(files[index], out / class_folder.name)
    return out


def pixels(folder: Path) -> Tensor:
    """Return all images of a folder as (n, 3, 32, 32) floats in [0, 1]."""
    source = open_source(str(folder))
    return torch.stack([source.read(index).image for index in range(len(source))]).float() / 255


def tokenizer_claims(train: Tensor, test: Tensor) -> dict[str, Any]:
    """Claims 1 to 3: cost, reconstruction and local invariance of the tokenizer, beside a learned one."""
    start = time.perf_counter()
    tokenizers = {512: CentroidTokenizer.fit(train, 512, patch_size=4, iters=20, seed=1)}
    build = time.perf_counter() - start
    for k in (64, 256, 1024):
        tokenizers[k] = CentroidTokenizer.fit(train, k, patch_size=4, iters=20, seed=1)
    mse = {k: float(F.mse_loss(t.decode(t.encode(test)), test)) for k, t in sorted(tokenizers.items())}
    patches = patchify(test, 4)
    peer = VQPeer()
    seconds, curve = train_peer(peer, train, test, enough=mse[512], most_seconds=25 * build + 120)
    return {
        "build_seconds": build,
        "peer_seconds": seconds,
        "peer_mse": curve,
        "encode": images_per_second(tokenizers[512].encode, test),
        "peer_encode": images_per_second(peer.eval().encode, test),
        "peer_codes_used": int(peer.encode(test).unique().numel()),
        "codes_used": int(tokenizers[512].encode(test).unique().numel()),
        "patch_variance": float(patches.var(dim=(0, 1), correction=0).mean()),
        "mse": mse,
        "stability": {k: stability(t.encode, test) for k, t in sorted(tokenizers.items())},
        "peer_stability": stability(peer.eval().encode, test),
    }


def train_peer(
    peer: VQPeer, train: Tensor, test: Tensor, enough: float, most_seconds: float
) -> tuple[float, list[Any]]:
    """Train the learned tokenizer until its test error is `enough` or time is up; return seconds and the curve."""
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-3, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    seconds, curve = 0.0, []
    for step in range(1, 1_000_000):
        start = time.perf_counter()
        batch = train[torch.randint(len(train), (64,), generator=generator)]
        loss = peer(batch)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds += time.perf_counter() - start
        if step % 50 == 0:
            with torch.no_grad():
                mse = float(F.mse_loss(peer.eval()(test[:500])[0], test[:500]))
                peer.train()
            curve.append([round(seconds, 1), mse])
            if mse <= enough or seconds > most_seconds:
                break
    return seconds, curve


@torch.no_grad()
def images_per_second(encode: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Return the best of five passes over 2 000 images, in batches of 256."""
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        for batch in images[:2000].split(256):
            encode(batch)
        rates.append(min(2000, len(images)) / (time.perf_counter() - start))
    return max(rates)


@torch.no_grad()
def stability(encode: Callable[[Tensor], Tensor], images: Tensor) -> dict[int, float]:
    """Return the share of patches that keep their token under Gaussian noise of σ / 255."""
    images, generator = images[:2000], torch.Generator().manual_seed(0)
    clean, kept = encode(images), {}
    for sigma in (2, 5, 10):
        noisy = (images + torch.randn(images.shape, generator=generator) * sigma / 255).clamp(0, 1)
        kept[sigma] = float((encode(noisy) == clean).float().mean())
    return kept


def unigram(folder: Path, run: Path) -> dict[str, float]:
    """Return entropy (nat) and majority share of the tokens of the training images."""
    tokenizer = CentroidTokenizer.load(run / "codebook.safetensors")
    shares = torch.bincount(tokenizer.encode(pixels(folder)).flatten(), minlength=tokenizer.num_codes).double()
    shares /= shares.sum()
    return {"entropy": float(-(shares * shares.clamp(min=1e-12).log()).sum()), "majority": float(shares.max())}


def pretrain(series: Series, name: str, folder: Path, seed: int, **changes: Any) -> dict[str, Any]:
    """Pre-train (once) and return the figures of the run; its model is in `runs/name`."""

    def compute() -> dict[str, Any]:
        run = pl.pretrain(
            "ccvit",
            data=str(folder),
            out=str(series.out / "runs" / name),
            seed=seed,
            overwrite=True,
            **{**RECIPE, **changes},
        )
        return run.summary

    return series.get(name, compute)


def model_of(series: Series, name: str) -> str:
    """Return the bundle of a pre-training run."""
    return str(series.out / "runs" / name / "model")


def linear(series: Series, name: str, train: Path, test: Path) -> float:
    """Return the accuracy of a linear probe on mean patch tokens."""
    figures = series.get(
        f"linear_{name}",
        lambda: pl.evaluate(
            "linear", encoder=model_of(series, name), train=str(train), test=str(test), pool="avg", num_workers=1
        ),
    )
    return float(figures["accuracy"])


def finetune(series: Series, name: str, encoder: str, train: Path, test: Path, seed: int) -> float:
    """Return the test accuracy after 12 epochs on the few labels."""

    def compute() -> dict[str, Any]:
        run = pl.adapt(
            "finetune",
            data=str(train),
            test=str(test),
            encoder=encoder,
            out=str(series.out / "runs" / f"finetune_{name}"),
            epochs=12,
            batch_size=64,
            lr=1e-3,
            lr_base_batch=None,
            warmup_epochs=2,
            layer_decay=0.75 if Path(encoder).exists() else 1.0,
            drop_path=0.0,
            auto_augment=None,
            color_jitter=0.0,
            erasing=0.0,
            mixup=0.0,
            cutmix=0.0,
            crop_scale=(0.4, 1.0),
            init_scale=1.0,
            probe_every=0,
            num_workers=1,
            precision="32-true",
            seed=seed,
            overwrite=True,
        )
        return run.summary

    return float(series.get(f"finetune_{name}", compute)["accuracy"])


def claims_table(series: Series, folder: Path) -> str:
    """Return the six claims with what was measured and whether the check holds."""
    t = series.known("tokenizer") or {}
    runs = [series.known(f"dual_{seed}") or {} for seed in SEEDS]
    words = unigram(folder, series.out / "runs" / "dual_0")
    rows: list[list[Any]] = []

    def add(claim: str, measured: str, check: str, holds: bool) -> None:
        rows.append([claim, measured, check, "yes" if holds else "**no**"])

    reached = t["peer_mse"][-1][1] <= t["mse"]["512"]
    peer_time = f"{t['peer_seconds']:.0f} s" + ("" if reached else f" (not reached: {t['peer_mse'][-1][1]:.4f})")
    add(
        "1a tokenizer is cheap to build (K=512, 3 000 images)",
        f"{t['build_seconds']:.1f} s; learned tokenizer to the same test error: {peer_time}",
        "< 60 s and ≤ 1/10 of the learned one",
        t["build_seconds"] < 60 and t["build_seconds"] <= t["peer_seconds"] / 10,
    )
    add(
        "1b and to use",
        f"{t['encode']:.0f} images/s against {t['peer_encode']:.0f}; {t['codes_used']} of 512 centroids used on test",
        "≥ 5 ×",
        t["encode"] >= 5 * t["peer_encode"],
    )
    mse = [t["mse"][k] for k in ("64", "256", "512", "1024")]
    add(
        "2 reconstruction improves with K",
        "test MSE "
        + ", ".join(f"K={k} {t['mse'][k]:.4f}" for k in ("64", "256", "512", "1024"))
        + f"; variance {t['patch_variance']:.4f}",
        "strictly decreasing; K=512 ≤ 0.10 × variance",
        all(a > b for a, b in itertools.pairwise(mse)) and t["mse"]["512"] <= 0.1 * t["patch_variance"],
    )
    kept, peer_kept = t["stability"]["512"], t["peer_stability"]
    add(
        "3 tokens survive noise (K=512)",
        "; ".join(f"σ={s}/255 {kept[s]:.3f} (learned {peer_kept[s]:.3f})" for s in ("2", "5", "10")),
        "≥ 0.85 at σ=5; ≥ the learned one's; decreasing",
        kept["5"] >= 0.85 and kept["5"] >= peer_kept["5"] and kept["2"] > kept["5"] > kept["10"],
    )
    ce = [run["token_loss"] for run in runs]
    accuracy = [run["token_accuracy"] for run in runs]
    error = [run["pixel_loss"] for run in runs]
    add(
        f"4 the pretext task is learnable ({STEPS} steps)",
        f"cross-entropy {mean_and_deviation(ce)} (unigram entropy {words['entropy']:.2f}); token accuracy "
        f"{mean_and_deviation([100 * a for a in accuracy], 1)} % (majority {100 * words['majority']:.1f} %; "
        f"masked only {mean_and_deviation([100 * r['masked_token_accuracy'] for r in runs], 1)} %, replaced only "
        f"{mean_and_deviation([100 * r['replaced_token_accuracy'] for r in runs], 1)} %); pixel MSE "
        f"{mean_and_deviation(error)}",
        "CE ≤ 0.85 × entropy; accuracy ≥ 8 × majority; pixel MSE ≤ 0.80",
        max(ce) <= 0.85 * words["entropy"] and min(accuracy) >= 8 * words["majority"] and max(error) <= 0.8,
    )
    tuned = [100 * series.known(f"finetune_dual_{s}")["accuracy"] for s in SEEDS]  # type: ignore[index]
    scratch = [100 * series.known(f"finetune_scratch_{s}")["accuracy"] for s in SEEDS]  # type: ignore[index]
    gain = [a - b for a, b in zip(tuned, scratch, strict=True)]
    add(
        "5 pre-training beats scratch (1 000 labels, 12 epochs)",
        f"{mean_and_deviation(tuned, 1)} % against {mean_and_deviation(scratch, 1)} %: "
        f"{mean_and_deviation(gain, 1)} points",
        "≥ +2 points",
        sum(gain) / len(gain) >= 2,
    )
    dual, token = ([100 * series.known(f"linear_{kind}_{s}")["accuracy"] for s in SEEDS] for kind in ("dual", "token"))  # type: ignore[index]
    difference = [a - b for a, b in zip(dual, token, strict=True)]
    add(
        "6 both targets ≥ one (linear probe, 5 000 labels)",
        f"dual {mean_and_deviation(dual, 1)} %, token only {mean_and_deviation(token, 1)} %: "
        f"{mean_and_deviation(difference, 1)} points",
        "≥ −1 point",
        sum(difference) / len(difference) >= -1,
    )
    return f"{machine()}\n\n" + markdown_table(["claim", "measured (3 seeds where ±)", "check", "holds"], rows)


ABLATIONS: dict[str, dict[str, Any]] = {
    "dual": {},
    "token": {"target": "token"},
    "pixel": {"target": "pixel"},
    "replace 0 %": {"replace_ratio": 0.0},
    "replace 5 %": {"replace_ratio": 3 / 64},
    "replace 20 %": {"replace_ratio": 13 / 64},
    "K = 128": {"k": 128},
    "K = 2048": {"k": 2048},
}


def slug(name: str) -> str:
    """Return a variant's name as a file name."""
    return "".join(letter if letter.isalnum() else "_" for letter in name).strip("_")


def ablation_table(series: Series) -> str:
    """Return the linear-probe accuracy of every variant that was run, with 95 % intervals of the mean."""
    rows = []
    for name in ABLATIONS:
        runs = [series.known(f"{slug(name)}_{seed}") for seed in SEEDS]
        scores = [series.known(f"linear_{slug(name)}_{seed}") for seed in SEEDS]
        values = [100 * score["accuracy"] for score in scores if score is not None]
        if not values:
            continue
        done = [run for run in runs if run is not None]
        token = [100 * run["token_accuracy"] for run in done if "token_accuracy" in run and name != "pixel"]
        masked = [100 * run["masked_token_accuracy"] for run in done if name != "pixel"]
        rows.append(
            [
                name,
                len(values),
                mean_and_deviation(values, 1) + interval(values),
                mean_and_deviation(token, 1) if token else "–",
                mean_and_deviation(masked, 1) if masked else "–",
            ]
        )
    return markdown_table(["variant", "seeds", "linear probe, %", "token accuracy, %", "on masked only, %"], rows)


def interval(values: list[float]) -> str:
    """Return the 95 % interval of the mean (Student's t) as text; nothing for fewer than three values."""
    if len(values) < 3:
        return ""
    half = 4.303 * float(np.std(values, ddof=1)) / math.sqrt(len(values))  # t quantile at two degrees of freedom
    return f" [{np.mean(values) - half:.1f}, {np.mean(values) + half:.1f}]"


def main() -> None:
    """Run what is not there yet and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 training folder, one sub-folder per class")
    parser.add_argument("--test", type=Path, required=True, help="CIFAR-10 test folder")
    parser.add_argument("--out", type=Path, default=Path("scratch/claims"), help="where runs and figures are kept")
    parser.add_argument("--ablations", nargs="*", default=[], help=f"variants to run as well: {', '.join(ABLATIONS)}")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each ablation")
    parser.add_argument("--write", action="store_true", help="write the tables to docs/systems/ccvit.md")
    options = parser.parse_args()
    series = Series(options.out)
    unlabelled = subset(options.data, options.out / "data" / "pretrain", PRETRAIN_IMAGES // 10, seed=0)
    probe = subset(options.data, options.out / "data" / "probe", 500, seed=1)
    few = subset(options.data, options.out / "data" / "few", 100, seed=2)
    test = subset(options.test, options.out / "data" / "test", 500, seed=3)
    series.get("tokenizer", lambda: tokenizer_claims(pixels(unlabelled)[::3], pixels(test)))
    for seed in SEEDS:
        for name in ("dual", "token"):
            pretrain(series, f"{name}_{seed}", unlabelled, seed, **ABLATIONS[name])
            linear(series, f"{name}_{seed}", probe, test)
        finetune(series, f"dual_{seed}", model_of(series, f"dual_{seed}"), few, test, seed)
        finetune(series, f"scratch_{seed}", ENCODER, few, test, seed)
    for seed in range(options.seeds):
        for name in options.ablations:
            pretrain(series, f"{slug(name)}_{seed}", unlabelled, seed, **ABLATIONS[name])
            linear(series, f"{slug(name)}_{seed}", probe, test)
    tables = {"claims": claims_table(series, unlabelled), "ablations": ablation_table(series)}
    for name, table in tables.items():
        print(f"\n{table}")
        if options.write:
            rewrite(PAGE, name, table)


if __name__ == "__main__":
    main()
