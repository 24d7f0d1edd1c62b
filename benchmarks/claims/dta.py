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


def public_encoder(options: argparse.Namespace, seed: int) -> str:
    """Return the encoder the attacker knows: the one that was named, or MAE on the training images."""
    if options.encoder is not None:
        return str(options.encoder)
    run = pl.pretrain(
        "mae",
        data=options.data,
        encoder=ENCODER,
        out=options.out / str(seed) / "mae",
        epochs=options.pretrain,
        seed=seed,
        **DECODER,
        **SHARED,
    )
    return str(run.model)


def adapted(options: argparse.Namespace, seed: int, label: str, method: str, encoder: str, **settings: Any) -> str:
    """Return a run of `patchloom adapt`, kept under its label."""
    run = pl.adapt(
        method,
        data=options.data,
        test=options.test,
        encoder=encoder,
        out=options.out / str(seed) / label.replace(", ", "_"),
        epochs=options.epochs,
        batch_size=64,
        seed=seed,
        **SHARED,
        **settings,
    )
    return str(run.path)


def victims_of(options: argparse.Namespace, seed: int, encoder: str) -> dict[str, str]:
    """Return the runs of all schemes, by label."""
    victims = {}
    for name, settings in SCHEMES.items():
        victims[name] = adapted(options, seed, name, name, encoder, **settings)
        if name in options.hardened:
            label = f"{name}, adversarial"
            more = {"adversary": "dta", "adversary_eps": EPS}
            victims[label] = adapted(options, seed, label, name, encoder, **settings, **more)
    return victims


def attacked(
    options: argparse.Namespace, seed: int, encoder: str, victims: dict[str, str], attacks: tuple[str, ...] = ATTACKS
) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the figures of each attack on each victim; attacks made before are kept."""
    run = pl.attack(
        "dta",
        encoder=encoder,
        victim=victims,
        data=options.test,
        out=options.out / str(seed) / "attacks",
        eps=EPS,
        attacks=attacks,
        steps=options.steps,
        limit=options.limit,
        curve_images=0,
        pictured=0,
        seed=seed,
        num_workers=1,
        resume=True,
    )
    return {(row["attack"], row["victim"]): row for row in run.summary["table"]}


def measured(options: argparse.Namespace, seed: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the figures of each attack on each victim for a seed."""
    encoder = public_encoder(options, seed)
    return attacked(options, seed, encoder, victims_of(options, seed, encoder))


def arguments(text: str | None) -> argparse.ArgumentParser:
    """Return the options that this script and that of all defences share."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="labelled training images, any source")
    parser.add_argument("--test", required=True, help="labelled test images")
    parser.add_argument("--encoder", help="a bundle to start from; default: MAE on --data")
    parser.add_argument("--out", type=Path, default=Path("scratch/claims/dta"))
    parser.add_argument("--per_class", type=int, default=0, help="images of each class of --data; 0 for all")
    parser.add_argument("--pretrain", type=int, default=20, help="epochs of MAE")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of adapting")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--hardened", nargs="*", default=list(HARDENED), help="schemes with adversarial training, too")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write the tables to the page")
    return parser


def opened(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, str]:
    """Return the options, with as many images of each class as were asked for, and what they say of the size."""
    options = parser.parse_args()
    if options.per_class:
        options.data = str(subset(Path(options.data), options.out / "images", options.per_class, seed=0))
    learnt = f"{options.per_class or 'all'} images of each class, {options.pretrain} + {options.epochs} epochs"
    return (
        options,
        f"{options.seeds} seed(s); {learnt}; {options.limit} images attacked, ε {EPS}, {options.steps} steps",
    )


def main() -> None:
    """Compute what is missing and print or write the tables."""
    options, said = opened(arguments(__doc__))
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
    claims = [
        ["DTA over noise, the least of all schemes", over_noise, "≥ 40", over_noise.mean() >= 40],
        ["searched block over the last, mean of schemes", over_last, "≥ −2", over_last.mean() >= -2],
        ["linear over fine-tuned", linear_over_full, "≥ −3", linear_over_full.mean() >= -3],
    ]
    for name in options.hardened:
        lower = values("dta", name) - values("dta", f"{name}, adversarial")
        lost = values("dta", name, "clean") - values("dta", f"{name}, adversarial", "clean")
        claims += [
            [f"ASR that adversarial training takes away ({name})", lower, "≥ 15", lower.mean() >= 15],
            [f"clean accuracy it costs ({name})", lost, "≤ 5", lost.mean() <= 5],
        ]
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
