"""The Downstream Transfer Attack at small scale (arXiv 2408.01705): how far models are fooled through their encoder.

    python -m benchmarks.claims.dta --data CIFAR10_TRAIN --test CIFAR10_TEST --write   # for a GPU
    python -m benchmarks.claims.dta … --per_class 300 --steps 20 --epochs 4 --write   # for a core

A ViT of width 96 and depth 6 is pre-trained without labels (MAE), then adapted by each scheme, once more by linear
probing and fine-tuning with adversarial training, and 200 test images are attacked at ε 8/255. ASR is of images that
were right. Runs and attacks are kept in `--out`, so an interrupted series goes on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import patchloom as pl
from benchmarks.claims import ewa  # registers the encoder
from benchmarks.claims.ccvit import subset
from benchmarks.harness import machine, markdown_table, mean_and_deviation, rewrite

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "dta.md"
ENCODER = ewa.RECIPE["encoder"]
EPS = "8/255"
SCHEMES: dict[str, dict[str, Any]] = {
    "linear": {},
    "lora": {"targets": ("q", "v")},
    "adaptformer": {},
    "vpt": {},
    "finetune": {"mixup": 0.0, "cutmix": 0.0, "auto_augment": None, "erasing": 0.0, "layer_decay": 1.0},
}
HARDENED = ("linear", "finetune")
ATTACKS = ("noise", "feature_l2", "last", "middle", "flat", "pap", "dta", "white_box")
DECODER: dict[str, Any] = {"decoder_dim": 96, "decoder_depth": 2, "decoder_heads": 3}
"""As wide as the encoder: the published decoder is thirty times as large as this encoder."""
SHARED: dict[str, Any] = {"num_workers": 1, "probe_every": 0, "resume": True, "report": False}


def measured(options: argparse.Namespace, seed: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the figures of each attack on each victim for a seed."""
    folder = options.out / str(seed)
    encoder = options.encoder
    if encoder is None:
        made = pl.pretrain(
            "mae",
            data=options.data,
            encoder=ENCODER,
            out=folder / "mae",
            epochs=options.pretrain,
            seed=seed,
            **DECODER,
            **SHARED,
        )
        encoder = made.model
    victims = {}
    for name, settings in SCHEMES.items():
        for hardened in (False, True) if name in HARDENED else (False,):
            label = f"{name}, adversarial" if hardened else name
            more = {"adversary": "dta", "adversary_eps": EPS} if hardened else {}
            run = pl.adapt(
                name,
                data=options.data,
                test=options.test,
                encoder=encoder,
                out=folder / label.replace(", ", "_"),
                epochs=options.epochs,
                batch_size=64,
                seed=seed,
                **SHARED,
                **settings,
                **more,
            )
            victims[label] = str(run.path)
    run = pl.attack(
        "dta",
        encoder=encoder,
        victim=victims,
        data=options.test,
        out=folder / "attacks",
        eps=EPS,
        attacks=ATTACKS,
        steps=options.steps,
        limit=options.limit,
        curve_images=0,
        pictured=0,
        seed=seed,
        num_workers=1,
        resume=True,
    )
    return {(row["attack"], row["victim"]): row for row in run.summary["table"]}


def main() -> None:
    """Compute what is missing and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="labelled training images, any source")
    parser.add_argument("--test", required=True, help="labelled test images")
    parser.add_argument("--encoder", help="a bundle to start from; default: MAE on --data")
    parser.add_argument("--out", type=Path, default=Path("scratch/claims/dta"))
    parser.add_argument("--per_class", type=int, default=0, help="images of each class of --data; 0 for all")
    parser.add_argument("--pretrain", type=int, default=20, help="epochs of MAE")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of adapting")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=f"write the tables to docs/systems/{PAGE.name}")
    options = parser.parse_args()
    if options.per_class:
        options.data = str(subset(Path(options.data), options.out / "images", options.per_class, seed=0))
    runs = [measured(options, seed) for seed in range(options.seeds)]

    def values(attack: str, victim: str, figure: str = "asr") -> np.ndarray:
        found = [run[attack, victim][figure] for run in runs]
        return np.array([np.nan if value is None else value for value in found])

    victims = list(dict.fromkeys(victim for _, victim in runs[0]))
    rows = [
        [victim, mean_and_deviation(values("dta", victim, "clean").tolist(), 1)]
        + [mean_and_deviation(values(attack, victim).tolist(), 1) for attack in ATTACKS]
        for victim in victims
    ]
    over_noise = np.min([values("dta", name) - values("noise", name) for name in SCHEMES], axis=0)
    over_last = np.mean([values("dta", name) - values("last", name) for name in SCHEMES], axis=0)
    linear_over_full = values("dta", "linear") - values("dta", "finetune")
    full, hard = "finetune", "finetune, adversarial"
    lower = values("dta", full) - values("dta", hard)
    lost = values("dta", full, "clean") - values("dta", hard, "clean")
    claims = [
        ["DTA over noise, the least of all schemes", over_noise, "≥ 40", over_noise.mean() >= 40],
        ["searched block over the last, mean of schemes", over_last, "≥ −2", over_last.mean() >= -2],
        ["linear over fine-tuned", linear_over_full, "≥ −3", linear_over_full.mean() >= -3],
        ["ASR that adversarial fine-tuning takes away", lower, "≥ 15", lower.mean() >= 15],
        ["clean accuracy it costs", lost, "≤ 5", lost.mean() <= 5],
    ]
    said = f"{options.seeds} seeds, {options.limit} images, ε {EPS}, {options.steps} steps, {options.epochs} epochs"
    text = (
        f"{machine()}\n\n{said}. ASR in percent.\n\n{markdown_table(['victim', 'clean', *ATTACKS], rows)}\n\n"
        + markdown_table(
            ["claim, points", "measured", "check", "holds"],
            [[name, mean_and_deviation(v.tolist(), 1), gate, "yes" if h else "**no**"] for name, v, gate, h in claims],
        )
    )
    print(text)
    if options.write:
        rewrite(PAGE, "claims", text)


if __name__ == "__main__":
    main()
