"""PH-Reg's small-scale claims (arXiv 2505.21501): does it do, on a small encoder, what its paper says?

    python -m benchmarks.claims.ph_reg --write
    python -m benchmarks.claims.ph_reg --data CAMVID/train/images --test CAMVID/test/images --steps 1000

Small encoders have no artefacts of their own to speak of, so some are planted: a ViT (width 96, depth 4, patches of 8
pixels at 64) with positions of standard deviation 0.2 is trained to tell the embedded photographs apart, and its
position embedding is scaled up by three before it is taken as the teacher. Every run leaves its figures in `--out`, so
an interrupted series goes on where it stopped; `--write` puts the table into docs/systems/ph_reg.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import patchloom as pl
from benchmarks.claims.adaptformer import yes
from benchmarks.claims.ccvit import Series
from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, paired_ratio, rewrite
from patchloom.data import EvalTransform, open_source
from patchloom.data.pixels import unit
from patchloom.encoders import Encoder, create_encoder, normalize
from patchloom.features.artefacts import position_explained_variance
from patchloom.models.bundle import load, save_bundle
from patchloom.systems.ph_reg.model import DenoisedTeacher, feature_loss, patch_features
from patchloom.systems.ph_reg.views import make_views

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "ph_reg.md"
SEEDS = (0, 1, 2)
SIDE, PATCH = 64, 8
LEARNT, PLANTED = 10.0, 3.0
"""How much larger than timm's initial ones positions are from the start, as long training leaves them, and how much
larger again they are made in the teacher."""
HELD_OUT, TIMED = 200, 32
ENGINE = {"num_workers": 0, "probe_every": 0, "health_every": 0, "precision": "32-true", "accelerator": "cpu"}
RUNS: dict[str, dict[str, Any]] = {
    "full": {"registers": 4},
    "registers alone": {"registers": 4, "unlock_blocks": 0, "unlock_pos_embed": False, "unlock_patch_embed": False},
    "without registers": {"registers": 0},
}
"""What trains: as published; registers and nothing else; everything else."""


def teacher(series: Series, seed: int) -> Path:
    """Return the bundle of a small encoder with a planted pattern of places, training it once."""
    bundle = series.out / f"teacher_{seed}"
    if not bundle.exists():
        torch.manual_seed(seed)
        size = {"image_size": SIDE, "patch_size": PATCH, "embed_dim": 96, "depth": 4, "num_heads": 3}
        fresh = create_encoder("vit_tiny_patch16_224", **size)
        with torch.no_grad():
            fresh.pos_embed.mul_(LEARNT)
        start = save_bundle(fresh, series.out / f"fresh_{seed}", overwrite=True)
        run = pl.adapt(
            "finetune",
            data="photos",
            encoder=str(start),
            out=str(series.out / f"teacher_run_{seed}"),
            seed=seed,
            max_steps=60,
            batch_size=64,
            lr=1e-3,
            lr_base_batch=None,
            layer_decay=1.0,
            warmup_epochs=1,
            mixup=0.0,
            cutmix=0.0,
            auto_augment=None,
            pool="cls",
            resume=True,
            **ENGINE,
        )
        encoder = load(run.model)
        encoder.reset_classifier(0)
        with torch.no_grad():
            encoder.pos_embed.mul_(PLANTED)
        save_bundle(encoder, bundle)
    return bundle


def held_out(name: str, encoder: Encoder) -> Tensor:
    """Return up to 200 normalised images of a source, spread over it."""
    source = open_source(name)
    step = max(1, len(source) // HELD_OUT)
    view = EvalTransform(SIDE)
    images = [view(source.read(number).image)["image"] for number in range(0, len(source), step)][:HELD_OUT]
    return normalize(unit(torch.stack(images)), encoder)


def in_parts(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return what is computed of images, a few at a time."""
    with torch.no_grad():
        return torch.cat([run(part) for part in images.split(20)])


def averaging(bundle: Path, test: str, seed: int) -> dict[str, Any]:
    """Claim 1: what place explains of features as they are, of one shifted view, and of the mean over views."""
    encoder = load(bundle)
    model, images = DenoisedTeacher(encoder), held_out(test, encoder)
    generator = torch.Generator().manual_seed(seed)
    offsets, flips = model.draw(len(images), generator)

    def shifted(part: Tensor) -> Tensor:
        views, _ = make_views(part, offsets[: len(part), 1:2], torch.zeros(len(part), 1).bool(), PATCH, model.fill)
        return model.features(views[:, 0])

    def mean(number: Tensor) -> Tensor:
        return model(images[number], offsets[number], flips[number])

    raw = in_parts(model.features, images)
    return {
        "raw": position_explained_variance(raw),
        "shifted": position_explained_variance(in_parts(shifted, images)),
        "mean": position_explained_variance(in_parts(mean, torch.arange(len(images)))),
    }


def learning(bundle: Path, student: Path, test: str, seed: int) -> dict[str, Any]:
    """Claims 2 and 4: how far the untouched model and the student are from the mean over views, and place in both."""
    original, learnt = load(bundle), load(student)
    model, images = DenoisedTeacher(original), held_out(test, original)
    offsets, flips = model.draw(len(images), torch.Generator().manual_seed(seed))
    target = in_parts(lambda number: model(images[number], offsets[number], flips[number]), torch.arange(len(images)))
    figures: dict[str, Any] = {}
    for name, encoder in (("before", original), ("after", learnt)):
        found = in_parts(partial(patch_features, encoder), images)
        figures[name] = float(feature_loss(target, found)["loss"])
        figures[f"place_{name}"] = position_explained_variance(found)
    return figures


def trained(series: Series, options: argparse.Namespace, bundle: Path, name: str, seed: int) -> dict[str, Any]:
    """Train a student and measure it."""
    run = pl.clean(
        "ph_reg",
        data=options.data,
        encoder=str(bundle),
        out=str(series.out / f"{name.replace(' ', '_')}_run_{seed}"),
        seed=seed,
        max_steps=options.steps,
        batch_size=16,
        lr=1e-3,
        report=False,
        resume=True,
        **ENGINE,
        **RUNS[name],
    )
    return learning(bundle, run.model, options.test, seed)


def speed(bundle: Path, student: Path) -> dict[str, Any]:
    """Claim 3: time of one pass of the student and of the teacher's ten, over that of the original."""
    original, learnt = load(bundle), load(student)
    model = DenoisedTeacher(original)
    images = torch.randn(TIMED, 3, SIDE, SIDE)
    offsets, flips = model.draw(TIMED)
    with torch.no_grad():
        seconds = alternate(
            {
                "original": lambda: patch_features(original, images),
                "student": lambda: patch_features(learnt, images),
                "mean": lambda: model(images, offsets, flips),
            },
            rounds=9,
            clock=time.process_time,
        )
    return {name: paired_ratio(seconds[name], seconds["original"]) for name in ("student", "mean")}


def table(series: Series) -> str:
    """Return the claims with what was measured."""
    seeds = [seed for seed in SEEDS if all(series.known(f"{name}_{seed}") for name in RUNS)]
    found = {name: [series.known(f"{name}_{seed}") or {} for seed in seeds] for name in (*RUNS, "averaging", "speed")}
    average = found["averaging"]
    falls = [one["mean"] / one["raw"] for one in average]
    single = [one["shifted"] / one["raw"] for one in average]
    reduction = {name: [100 * (1 - one["after"] / one["before"]) for one in found[name]] for name in RUNS}
    text = {name: mean_and_deviation(values, 1) for name, values in reduction.items()}
    place = [(one["place_before"], one["place_after"]) for one in found["full"]]
    students, means = ([one[name] for one in found["speed"]] for name in ("student", "mean"))
    rows = [
        [
            "1 averaging removes patterns of place",
            f"{mean_and_deviation(falls)} × of what place explains; of one shifted view {mean_and_deviation(single)} ×",
            "≤ 0.7 ×; of one view no such fall",
            yes(max(falls) <= 0.7 and min(single) > 0.9),
        ],
        [
            "2a the student learns it",
            f"distance to the mean over views {text['full']} % less",
            "≥ 25 % less",
            yes(sum(reduction["full"]) / len(seeds) >= 25),
        ],
        [
            "2b and place explains less of its features",
            f"{mean_and_deviation([a for a, _ in place])} before, {mean_and_deviation([b for _, b in place])} after",
            "less",
            yes(all(after < before for before, after in place)),
        ],
        [
            "3 one pass in place of ten",
            f"student {mean_and_deviation(students)} ×, mean over views {mean_and_deviation(means)} × the original",
            "≤ 1.1 × and ≥ 8 ×",
            yes(sum(students) / len(seeds) <= 1.1 and sum(means) / len(seeds) >= 8),
        ],
        [
            "4 unlocking matters",
            f"distance less by {text['registers alone']} % with registers alone, {text['full']} % with all",
            "more with all",
            yes(all(a < b for a, b in zip(reduction["registers alone"], reduction["full"], strict=True))),
        ],
        [
            "registers at the same unlocking",
            f"4: {text['full']} %, none: {text['without registers']} %",
            "reported",
            "–",
        ],
    ]
    return f"{machine()}\n\n" + markdown_table(
        ["claim", f"measured ({len(seeds)} of {len(SEEDS)} seeds)", "check", "holds"], rows
    )


def main() -> None:
    """Run what is not there yet and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="photos", help="images the student learns from; no labels are used")
    parser.add_argument("--test", default="photos:test", help="images it is measured on")
    parser.add_argument("--steps", type=int, default=80, help="steps of PH-Reg")
    parser.add_argument("--out", type=Path, default=Path("scratch/claims/ph_reg"), help="where figures are kept")
    parser.add_argument("--table", action="store_true", help="run nothing; take the seeds that are complete")
    parser.add_argument("--write", action="store_true", help="write the table to docs/systems/ph_reg.md")
    options = parser.parse_args()
    series = Series(options.out)
    for seed in () if options.table else SEEDS:
        bundle = teacher(series, seed)
        for name in RUNS:
            series.get(f"{name}_{seed}", partial(trained, series, options, bundle, name, seed))
        student = series.out / f"full_run_{seed}" / "model"
        series.get(f"averaging_{seed}", partial(averaging, bundle, options.test, seed))
        series.get(f"speed_{seed}", partial(speed, bundle, student))
    text = table(series)
    print(f"\n{text}")
    if options.write:
        rewrite(PAGE, "claims", text)


if __name__ == "__main__":
    main()
