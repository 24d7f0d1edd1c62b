"""TOV-VICReg's small-scale claims on Atari frames (arXiv 2209.10901): does the method do what its paper says?

    python -m benchmarks.claims.tov_vicreg --out scratch/claims/tov_vicreg --write

Frames are recorded with a random player on first use (extra `rl`). Every run leaves its figures in `--out`, so an
interrupted series goes on where it stopped; `--write` puts the tables into docs/systems/tov_vicreg.md. One
pre-training run of 250 steps takes about two minutes on one slow core; `--rl` is the reinforcement-learning part.
"""

from __future__ import annotations

import argparse
import itertools
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.models import register_model
from torch import Tensor

import patchloom as pl
from benchmarks.claims.ccvit import Series
from benchmarks.harness import machine, markdown_table, mean_and_deviation, rewrite
from patchloom.data import open_source
from patchloom.data.frames import FrameSource, TripletSource
from patchloom.encoders import Encoder, create_encoder
from patchloom.encoders import frames as encoders
from patchloom.features.representation import representation_report

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "tov_vicreg.md"
ENCODER = "frames_claims_patch12_84"
SEEDS = (0, 1, 2)
GAMES = "Breakout,Freeway,Pong"
TRAIN, TEST = f"atari:{GAMES}@3000", f"atari:{GAMES}@1500:test"
STEPS = 250
RECIPE: dict[str, Any] = {
    "encoder": ENCODER,
    "optimizer": "adamw",
    "lr": 1e-3,
    "lr_base_batch": None,
    "weight_decay": 0.01,
    "betas": (0.9, 0.98),
    "batch_size": 32,
    "projector": "256-256-256",
    "max_steps": STEPS,
    "num_workers": 0,
    "probe_every": 0,
    "log_every": 10,
    "precision": "32-true",
    "accelerator": "cpu",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "order": {"temporal": 1.0},
    "vicreg": {"temporal": 0.0},
    "invariance": {"temporal": 0.0, "std": 0.0, "cov": 0.0},
    "order 0.1": {"temporal": 0.1},
}
# Where the games keep what is seen, as published by "Unsupervised State Representation Learning in Atari".
POSITIONS = {
    ("Breakout", 72): "Breakout paddle",
    ("Breakout", 99): "Breakout ball x",
    ("Freeway", 14): "Freeway chicken",
    ("Pong", 51): "Pong paddle",
    ("Pong", 54): "Pong ball y",
}


@register_model
def frames_claims_patch12_84(pretrained: bool = False, **kwargs: Any) -> Any:
    """The encoder the claims were measured with: width 64, depth 3, two heads, patches of 12 pixels."""
    shape = {"embed_dim": 64, "depth": 3, "num_heads": 2, "patch_size": 12}
    return encoders.vit_tiny_patch8_84(pretrained, **{**shape, **kwargs})


def pretrain(series: Series, variant: str, seed: int) -> dict[str, Any]:
    """Pre-train (once) and return the figures of the run."""
    name = slug(variant, seed)

    def compute() -> dict[str, Any]:
        run = pl.pretrain(
            "tov_vicreg",
            data=TRAIN,
            probe_data=TEST,
            out=str(series.out / "runs" / name),
            seed=seed,
            overwrite=True,
            **RECIPE,
            **VARIANTS[variant],
        )
        return run.summary

    return series.get(name, compute)


def slug(variant: str, seed: int) -> str:
    """Return the name of a run's files."""
    return f"{variant.replace(' ', '_').replace('.', '')}_{seed}"


def encoder_of(series: Series, variant: str, seed: int) -> Encoder:
    """Return a pre-trained encoder, or a fresh one for `random`."""
    if variant == "random":
        torch.manual_seed(1000 + seed)
        return create_encoder(ENCODER).eval()
    return pl.load(series.out / "runs" / slug(variant, seed) / "model")


@torch.no_grad()
def features(encoder: Encoder, stacks: Tensor) -> np.ndarray:
    """Return the class tokens of (n, 3, 84, 84) uint8 stacks."""
    return torch.cat([encoder(part.float() / 255) for part in stacks.split(128)]).numpy()


@cache
def frames(name: str) -> FrameSource:
    """Return a source of stacks."""
    source = open_source(name)
    assert isinstance(source, FrameSource)
    return source


def triplets(name: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return evenly spread triplets (before, at, after) whose neighbours lie inside their episode."""
    source = TripletSource(frames(name), respect_episodes=True)
    places = np.linspace(0, len(source) - 1, count).astype(int)
    parts = torch.stack([source.read(int(place)).image for place in places]).split(3, dim=1)
    return parts[1], parts[0], parts[2]


def order_auroc(encoder: Encoder, seed: int) -> float:
    """Return how well a fresh linear probe on frozen triples tells chronological from shuffled ones (claim 2)."""
    rng = np.random.default_rng(seed)
    sets = []
    for name, count in ((TRAIN, 1800), (TEST, 900)):
        parts = np.stack([features(encoder, part) for part in triplets(name, count)], axis=1)  # (n, 3, D)
        shuffled = rng.random(count) < 0.5
        orders = np.array([rng.permutation(3) for _ in range(count)])
        same = (orders == np.arange(3)).all(1)
        orders[same] = [0, 2, 1]
        orders[~shuffled] = [0, 1, 2]
        sets.append((np.take_along_axis(parts, orders[:, :, None], 1).reshape(count, -1), shuffled))
    (x, y), (x_test, y_test) = sets
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500)).fit(x, y)
    return float(roc_auc_score(y_test, probe.decision_function(x_test)))


def position_scores(encoder: Encoder) -> dict[str, float]:
    """Return R² of a ridge probe for positions the console's memory holds, on other recordings (claim 3)."""
    scores: dict[str, float] = {}
    for game in GAMES.split(","):
        parts = []
        for name in (TRAIN, TEST):
            recording = next(r for r in frames(name).recordings if r.name == game)
            starts = np.arange(0, len(recording.frames) - 2)[:: 3 if name == TRAIN else 1][:1000]
            stacks = torch.from_numpy(np.stack([recording.frames[s : s + 3] for s in starts]))
            parts.append((features(encoder, stacks), recording.parts["ram"][starts + 2].astype(np.float64)))
        (x, ram), (x_test, ram_test) = parts
        for (owner, byte), label in POSITIONS.items():
            if owner == game:
                probe = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 4, 6))).fit(x, ram[:, byte])
                scores[label] = float(r2_score(ram_test[:, byte], probe.predict(x_test)))
    return scores


def probe(series: Series, variant: str, seed: int) -> dict[str, Any]:
    """Return (once) what frozen features of a variant know."""

    def compute() -> dict[str, Any]:
        encoder = encoder_of(series, variant, seed)
        source = frames(TEST)
        places = np.linspace(0, len(source) - 1, 600).astype(int)
        samples = [source.read(int(place)) for place in places]
        vectors = torch.from_numpy(features(encoder, torch.stack([sample.image for sample in samples])))
        report = representation_report(vectors, torch.tensor([sample.label for sample in samples]))
        return {
            "effective_rank": report["effective_rank"],
            "similarity_gap": report["similarity_gap"],
            "order_auroc": order_auroc(encoder, seed),
            "positions": position_scores(encoder),
        }

    return series.get(f"probe_{slug(variant, seed)}", compute)


def claims_table(series: Series) -> str:
    """Return the four claims with what was measured and whether the check holds."""
    runs = [pretrain(series, "order", seed) for seed in SEEDS]
    for variant, seed in itertools.product(("vicreg", "invariance"), SEEDS):
        pretrain(series, variant, seed)
    done = {name: [probe(series, name, seed) for seed in SEEDS] for name in ("order", "vicreg", "invariance", "random")}
    ranks = {name: [figures["effective_rank"] for figures in done[name]] for name in done}
    auroc = {name: [figures["order_auroc"] for figures in done[name]] for name in done}
    places = {name: [float(np.mean(list(figures["positions"].values()))) for figures in done[name]] for name in done}
    by_place = "; ".join(
        f"{label} {np.mean([f['positions'][label] for f in done['order']]):.2f} "
        f"(random {np.mean([f['positions'][label] for f in done['random']]):.2f})"
        for label in POSITIONS.values()
    )
    gain = [a - b for a, b in zip(auroc["order"], auroc["vicreg"], strict=True)]
    better = [a - b for a, b in zip(places["order"], places["random"], strict=True)]
    held = [run["held_out_order_loss"] for run in runs]
    shown, plain = ([run[f"held_out_order_auroc{end}"] for run in runs] for end in ("", "_plain"))
    said = mean_and_deviation
    rows = [
        [
            "1 no collapse: effective rank of class tokens",
            f"order {said(ranks['order'], 1)}, VICReg {said(ranks['vicreg'], 1)}; invariance alone "
            f"{said(ranks['invariance'], 1)}; untrained {said(ranks['random'], 1)}",
            "≥ 3 × invariance alone, which stays below 3",
            min(ranks["order"]) >= 3 * max(ranks["invariance"]) and max(ranks["invariance"]) < 3,
        ],
        [
            "2 the order loss carries time: AUROC of a fresh linear probe, chronological against shuffled",
            f"order {said(auroc['order'], 3)}, VICReg {said(auroc['vicreg'], 3)}, untrained "
            f"{said(auroc['random'], 3)}; gain {said(gain, 3)}",
            "gain ≥ 0.03, both above 0.5",
            float(np.mean(gain)) >= 0.03 and min(auroc["vicreg"] + auroc["order"]) > 0.5,
        ],
        [
            "3 useful features: R² of a linear probe of positions in the console's memory",
            f"order {said(places['order'], 3)}, VICReg {said(places['vicreg'], 3)}, untrained "
            f"{said(places['random'], 3)}; gain over untrained {said(better, 3)}. {by_place}",
            "gain over untrained ≥ 0.05",
            float(np.mean(better)) >= 0.05,
        ],
        [
            "4 order loss on held-out frames (always the same answer: 0.4506)",
            f"{said(held, 3)}; AUROC of the head {said(shown, 3)}, without augmentation {said(plain, 3)}",
            "< 0.43",
            max(held) < 0.43,
        ],
    ]
    table = [[*row[:3], "yes" if row[3] else "**no**"] for row in rows]
    return f"{machine()}\n\n" + markdown_table(["claim", "measured (3 seeds)", "check", "holds"], table)


RL_GAME, RL_STEPS = "Breakout", 2000
RL_RECIPE: dict[str, Any] = {
    "game": RL_GAME,
    "steps": RL_STEPS,
    "seeds": 1,
    "warmup": 400,
    "update_every": 4,
    "target_every": 400,
    "eval_episodes": 5,
    "eval_steps": 1000,
    "checkpoint_every": 500,
    "device": "cpu",
}


def play(series: Series, name: str, seed: int) -> dict[str, Any]:
    """Let (once) an agent learn that sees through the pre-trained, the untrained or a convolutional encoder."""
    encoder = {
        "pre-trained": str(series.out / "runs" / slug("order", seed) / "model"),
        "untrained": ENCODER,
        "convolutional": "data_efficient",
    }[name]

    def compute() -> dict[str, Any]:
        out = series.out / "rl" / slug(name, seed)
        settings = {**RL_RECIPE, "frames": 3, "untrained": name == "untrained", "resume": True}
        return pl.evaluate("rl", encoder=encoder, out=str(out), seed=seed, **settings)

    return series.get(f"rl_{slug(name, seed)}", compute)


def rl_table(series: Series) -> str:
    """Return the scores of the agents on the short run."""
    rows = []
    for seed in SEEDS:
        pretrain(series, "order", seed)
    for name in ("pre-trained", "untrained", "convolutional"):
        figures = [play(series, name, seed) for seed in SEEDS]
        rows.append(
            [
                name,
                mean_and_deviation([one["training_score"] for one in figures], 1),
                mean_and_deviation([one["score"] for one in figures], 1),
                mean_and_deviation([one["human_normalized"] for one in figures], 3),
            ]
        )
    header = ["encoder", "last ten episodes of training", "final score, noise off", "on the human scale"]
    return markdown_table(header, rows)


def main() -> None:
    """Run what is not there yet and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scratch/claims/tov_vicreg"), help="where figures are kept")
    parser.add_argument("--rl", action="store_true", help="instead let agents learn a game through the encoders")
    parser.add_argument("--write", action="store_true", help="write the tables to docs/systems/tov_vicreg.md")
    options = parser.parse_args()
    series = Series(options.out)
    tables = {"rl": rl_table(series)} if options.rl else {"claims": claims_table(series)}
    for name, table in tables.items():
        print(f"\n{table}")
        if options.write:
            rewrite(PAGE, name, table)


if __name__ == "__main__":
    main()
