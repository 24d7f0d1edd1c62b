"""Hi-End-MAE's small-scale claims on generated volumes (arXiv 2502.08347): does the method do what its paper says?

    python -m benchmarks.claims.hi_end_mae --out scratch/claims/hi_end_mae [--seeds 0 1 2] [--steps 400] [--write]

Volumes are those of `shapes3d`, the encoder has 512 tokens of width 96 and 12 blocks, the decoder a width of 48. Every
part leaves its figures in `--out`, so that an interrupted series goes on where it stopped.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from benchmarks.claims.ccvit import Series
from benchmarks.harness import machine, markdown_table, mean_and_deviation, rewrite
from patchloom.data.shapes3d import Shapes3dSource
from patchloom.encoders import Encoder, create_encoder, intermediate_layers
from patchloom.encoders.masked_autoencoder import MaskedAutoencoder, initialize_as_mae
from patchloom.models.bundle import load, save_bundle
from patchloom.segment.volume_config import UNETRConfig
from patchloom.segment.volume_method import UNETRMethod
from patchloom.systems.hi_end_mae.model import HiEndMAE
from patchloom.training.config import config_from_mapping
from patchloom.training.run import fit

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "hi_end_mae.md"
ENCODER = "volume_vit_micro_patch4_32"
WIDTH, HEADS, SELF, CROSS = 48, 6, 2, 3
LAYERS = (3, 6, 9, 11)
"""Blocks whose patches are probed; the last is the twelfth."""


def volumes(split: str, count: int) -> tuple[Tensor, Tensor]:
    """Return volumes (n, 1, 32, 32, 32) in [0, 1] and the class of the centre voxel of each patch (n, 512)."""
    source = Shapes3dSource(split, volumes=count)
    samples = [source.read(number) for number in range(count)]
    values = torch.stack([sample.value for sample in samples]).float() / 255
    named: list[Any] = [sample.named for sample in samples]
    masks = torch.stack([each["mask"] for each in named])
    return values, masks[:, 2::4, 2::4, 2::4].flatten(1).long()


def pretrained(out: Path, method: str, seed: int, steps: int, ratio: float = 0.75) -> dict[str, Any]:
    """Pre-train an encoder, save it, and return the losses on the way; both methods see the same volumes."""
    torch.manual_seed(seed)
    encoder = create_encoder(ENCODER, in_chans=1)
    initialize_as_mae(encoder, fixed_positions=False)
    model: Any
    if method == "hi_end_mae":
        model = HiEndMAE(encoder, WIDTH, HEADS, SELF, mask_ratio=ratio)
    else:
        model = MaskedAutoencoder(encoder, WIDTH, SELF + CROSS, HEADS, mask_ratio=ratio)
    values, _ = volumes("train", 200)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        batch = values[torch.randint(len(values), (8,), generator=generator)]
        for axis in (2, 3, 4):
            batch = batch.flip(axis) if float(torch.rand((), generator=generator)) < 0.5 else batch
        loss = model.loss(batch, noise=torch.rand(len(batch), 512, generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        losses.append(float(loss.detach()))
    save_bundle(encoder.eval(), out, overwrite=True)
    return {"losses": losses}


def dice_of(out: Path, encoder: str, seed: int, steps: int) -> float:
    """Return foreground Dice on 40 held-out volumes after UNETR learnt from four."""
    settings = {
        "data": "shapes3d",
        "probe_data": "shapes3d:test",
        "encoder": encoder,
        "out": str(out),
        "width": 4,
        "crops": 1,
        "batch_size": 1,
        "max_steps": steps,
        "lr": 1e-3,
        "probe_every": 0,
        "num_workers": 0,
        "report": False,
        "seed": seed,
        "overwrite": True,
        "precision": "32-true",
    }
    config = config_from_mapping(UNETRConfig, settings)
    run = fit("segment unetr", UNETRMethod, config, source=Shapes3dSource(volumes=4, seed=100 + seed))
    return float(run.summary["dice"])


@torch.no_grad()
def probed(encoder: Encoder) -> list[float]:
    """Return the accuracy of a linear probe of each of four blocks, the classes of centre voxels balanced."""
    parts = [volumes("train", 24), volumes("test", 24)]
    accuracies = []
    for layer in LAYERS:
        tokens = [intermediate_layers(encoder, x, [layer], norm=False)[0].patches.flatten(0, 1) for x, _ in parts]
        mean, scale = tokens[0].mean(0), tokens[0].std(0)
        rows = [((x - mean) / scale).numpy() for x in tokens]
        labels = [y.flatten().numpy() for _, y in parts]
        probe = LogisticRegression(class_weight="balanced", max_iter=200).fit(rows[0][::2], labels[0][::2])
        right = probe.predict(rows[1]) == labels[1]
        accuracies.append(float(statistics.mean(right[labels[1] == kind].mean() for kind in range(4))))
    return accuracies


def main() -> None:
    """Run what is missing, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--segment_steps", type=int, default=200)
    parser.add_argument("--loss_steps", type=int, default=300)
    parser.add_argument("--write", action="store_true", help="write the table to docs/systems/hi_end_mae.md")
    options = parser.parse_args()
    series = Series(options.out)
    dice: dict[str, list[float]] = {"fresh": [], "mae": [], "hi_end_mae": []}
    layers: dict[str, list[list[float]]] = {"mae": [], "hi_end_mae": []}
    losses = {}
    for ratio in (0.75, 0.5):
        name = f"loss_{ratio}"
        told = series.get(
            name, lambda r=ratio, n=name: pretrained(options.out / n, "hi_end_mae", 0, options.loss_steps, r)
        )
        losses[ratio] = statistics.mean(told["losses"][-20:])
    for seed in options.seeds:
        for method in ("hi_end_mae", "mae"):
            path = options.out / f"{method}_{seed}"
            series.get(path.name, lambda p=path, m=method, s=seed: pretrained(p, m, s, options.steps))
            found = series.get(f"probe_{path.name}", lambda p=path: {"accuracies": probed(load(p))})
            layers[method].append(found["accuracies"])
        fresh = options.out / f"fresh_{seed}"
        series.get(fresh.name, lambda p=fresh, s=seed: pretrained(p, "hi_end_mae", s, 1))  # one step: as good as none
        for method, values in dice.items():
            name = f"{method}_{seed}"
            measure = lambda n=name, s=seed: {  # noqa: E731 - bound to this turn of the loop
                "dice": dice_of(options.out / f"unetr_{n}", str(options.out / n), s, options.segment_steps)
            }
            values.append(series.get(f"dice_{name}", measure)["dice"])
    shallow = {name: [statistics.mean(row[:3]) for row in rows] for name, rows in layers.items()}
    rows = [
        ["UNETR after Hi-End-MAE, Dice", *(f"{100 * x:.1f}" for x in dice["hi_end_mae"])],
        ["UNETR after MAE, Dice", *(f"{100 * x:.1f}" for x in dice["mae"])],
        ["UNETR from fresh weights, Dice", *(f"{100 * x:.1f}" for x in dice["fresh"])],
        ["blocks 3, 6, 9 after Hi-End-MAE, accuracy", *(f"{100 * x:.1f}" for x in shallow["hi_end_mae"])],
        ["blocks 3, 6, 9 after MAE, accuracy", *(f"{100 * x:.1f}" for x in shallow["mae"])],
    ]
    lead = [a - b for a, b in zip(dice["hi_end_mae"], dice["mae"], strict=True)]
    gain = [a - b for a, b in zip(dice["hi_end_mae"], dice["fresh"], strict=True)]
    text = (
        f"`python -m benchmarks.claims.hi_end_mae --steps {options.steps} --segment_steps {options.segment_steps}`; "
        f"{machine()}. Per cent.\n\n"
        f"{markdown_table(['', *(f'seed {seed}' for seed in options.seeds)], rows)}\n\n"
        f"Hi-End-MAE leads MAE by {mean_and_deviation([100 * x for x in lead])} points of Dice, and fresh weights by "
        f"{mean_and_deviation([100 * x for x in gain])}. After {options.loss_steps} steps the loss is "
        f"{losses[0.75]:.2f} with 75 % hidden and {losses[0.5]:.2f} with 50 %; predicting zero costs 1."
    )
    print(text)
    if options.write:
        rewrite(PAGE, "claims", text)


if __name__ == "__main__":
    main()
