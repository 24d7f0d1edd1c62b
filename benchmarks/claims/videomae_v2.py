"""VideoMAE V2's small-scale claims on photographs in motion (arXiv 2303.16727): does the method do what its paper says?

    python -m benchmarks.claims.videomae_v2 [--steps 200] [--seeds 3] [--large] --out scratch/claims/videomae_v2

The clips are the embedded set `moving`, whose class is the motion. Every run leaves its figures in `--out`, so an
interrupted series goes on where it stopped; `--large` takes a larger encoder and ten times as many steps; `--write`
puts the table into docs/systems/videomae_v2.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import register_model

import patchloom as pl
from benchmarks.claims.ccvit import Series
from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, paired_ratio, rewrite
from patchloom.encoders import create_encoder
from patchloom.encoders.masking import draw_running_cell_mask, draw_tube_mask
from patchloom.models.bundle import save_bundle
from patchloom.systems.videomae_v2.model import VideoMaskedAutoencoder, initialize_as_videomae

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "videomae_v2.md"
ENCODER = "videomae_claims_patch8_32"
VARIANTS: dict[str, dict[str, Any]] = {
    "cell": {},
    "none": {"decoder_mask": "none"},
    "all": {"loss_on": "decoded"},
}
LABELLED = 200


@register_model
def videomae_claims_patch8_32(pretrained: bool = False, **kwargs: Any) -> Any:
    """The encoder the claims are measured with: width 96, depth 4, three heads, tubes of 2 x 8 x 8 pixels."""
    arguments = {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3, **kwargs}
    return timm.create_model("videomae_tiny_patch16_224", pretrained=pretrained, **arguments)


def cost() -> dict[str, Any]:
    """Claim 1: processor seconds of a step with the running cell and without, the decoder as large as the encoder."""
    torch.manual_seed(0)
    encoder = create_encoder(ENCODER, image_size=(16, 80, 80), fc_norm=False)
    model = VideoMaskedAutoencoder(encoder, 96, 4, 3).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    generator = torch.Generator().manual_seed(0)
    clips = torch.rand(4, 3, 16, 80, 80, generator=generator)
    hidden = torch.stack([draw_tube_mask(model.grid, 0.9, generator).flatten() for _ in clips])
    left_out = torch.stack([draw_running_cell_mask(model.grid, 0.5, generator).flatten() for _ in clips])

    def step(decoder_mask: torch.Tensor | None) -> None:
        optimizer.zero_grad()
        model.loss(clips, hidden, decoder_mask).backward()
        optimizer.step()

    candidates = {"cell": lambda: step(left_out), "none": lambda: step(None)}
    seconds = alternate(candidates, rounds=12, warmup=2, clock=time.process_time)
    return {
        **{name: statistics.median(values) for name, values in seconds.items()},
        "ratio": paired_ratio(seconds["none"], seconds["cell"]),
    }


def pretrain(series: Series, name: str, seed: int, steps: int, **changes: Any) -> None:
    """Pre-train (once); the model is in `runs/name`."""
    settings: dict[str, Any] = {
        "data": "moving",
        "encoder": ENCODER,
        "image_size": 32,
        "clip_frames": 8,
        "clip_stride": 2,
        "batch_size": 16,
        "views_per_clip": 2,
        "mask_ratio": 0.75,
        "decoder_dim": 96,
        "decoder_depth": 2,
        "decoder_heads": 3,
        "lr": 1.5e-3,
        "lr_base_batch": None,
        "max_steps": steps,
        "num_workers": 1,
        "probe_every": 0,
        "health_every": 0,
        "report": False,
        "precision": "32-true",
        "seed": seed,
        "overwrite": True,
        **changes,
    }
    series.get(name, lambda: pl.pretrain("videomae_v2", out=str(series.out / "runs" / name), **settings).summary)


def fresh_encoder(folder: Path, name: str, size: int, seed: int) -> str:
    """Return the bundle of an encoder as pre-training begins with."""
    if not folder.exists():
        torch.manual_seed(seed)
        encoder = create_encoder(name, image_size=(8, size, size), fc_norm=False)
        initialize_as_videomae(encoder)
        save_bundle(encoder, folder)
    return str(folder)


def finetune(series: Series, name: str, encoder: str, seed: int, epochs: int, size: int = 32) -> float:
    """Return the test accuracy after fine-tuning on 200 labelled clips."""
    settings: dict[str, Any] = {
        "data": "moving",
        "test": "moving:test",
        "shots": LABELLED // 8,
        "encoder": encoder,
        "image_size": size,
        "clip_frames": 8,
        "clip_stride": 2,
        "epochs": epochs,
        "batch_size": 20,
        "lr": 1e-3,
        "lr_base_batch": None,
        "warmup_epochs": 1,
        "layer_decay": 1.0,
        "drop_path": 0.0,
        "auto_augment": None,
        "color_jitter": 0.0,
        "erasing": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "flip": 0.0,  # it would turn left into right
        "crop_scale": (0.5, 1.0),
        "init_scale": 1.0,
        "num_workers": 1,
        "probe_every": 0,
        "health_every": 0,
        "report": False,
        "precision": "32-true",
        "seed": seed,
        "overwrite": True,
    }
    out = str(series.out / "runs" / f"tuned_{name}")
    return float(series.get(f"tuned_{name}", lambda: pl.adapt("finetune", out=out, **settings).summary)["accuracy"])


def table(series: Series, seeds: list[int], steps: int) -> str:
    """Return the claims with what was measured and whether the check holds; those without figures are left out."""
    seconds = series.known("cost") or {}
    rows: list[list[Any]] = [
        [
            "1 the running cell saves time (decoder as deep and wide as the encoder, mask 90 %, processor time)",
            f"{1000 * seconds['cell']:.0f} ms against {1000 * seconds['none']:.0f} ms: {seconds['ratio']:.2f} ×",
            "≥ 1.3 ×",
            seconds["ratio"] >= 1.3,
        ]
    ]
    claims = [
        (f"2 and keeps quality ({steps} steps, fine-tuned)", "none", -3.0),
        ("3 loss on what the encoder did not see ≥ loss on all decoded", "all", 0.0),
        (f"4 pre-training helps ({LABELLED} labelled clips)", "scratch", 5.0),
    ]
    for claim, other, least in claims:
        figures = [(series.known(f"tuned_cell_{seed}"), series.known(f"tuned_{other}_{seed}")) for seed in seeds]
        pairs = [(100 * ours["accuracy"], 100 * theirs["accuracy"]) for ours, theirs in figures if ours and theirs]
        if not pairs:
            continue
        ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
        gains = [a - b for a, b in pairs]
        told = f"{mean_and_deviation(ours, 1)} % against {mean_and_deviation(theirs, 1)} %"
        rows.append(
            [
                claim,
                f"{told}: {mean_and_deviation(gains, 1)} points, seeds: {len(pairs)}",
                f"≥ {least:+g} points",
                statistics.mean(gains) >= least,
            ]
        )
    marked = [[*row[:3], "yes" if row[3] else "**no**"] for row in rows]
    return f"{machine()}\n\n" + markdown_table(["claim", "measured", "check", "holds"], marked)


def main() -> None:
    """Run what is missing, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scratch/claims/videomae_v2"))
    parser.add_argument("--steps", type=int, default=200, help="of pre-training")
    parser.add_argument("--epochs", type=int, default=15, help="of fine-tuning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--large", action="store_true", help="videomae_small_patch16_224 on 64 pixels, ten times the steps"
    )
    parser.add_argument("--write", action="store_true", help="write the table to docs/systems/videomae_v2.md")
    options = parser.parse_args()
    series, start = Series(options.out), time.monotonic()
    larger: dict[str, Any] = {"encoder": "videomae_small_patch16_224", "image_size": 64, "decoder_dim": None}
    steps, changes = options.steps * (10 if options.large else 1), larger if options.large else {}
    size = int(changes.get("image_size", 32))
    series.get("cost", cost)
    seeds = list(range(options.seeds))
    for seed in seeds:
        fresh = fresh_encoder(series.out / "fresh" / str(seed), changes.get("encoder", ENCODER), size, seed)
        for name, variant in VARIANTS.items():
            pretrain(series, f"{name}_{seed}", seed, steps, **changes, **variant)
            trained = str(series.out / "runs" / f"{name}_{seed}" / "model")
            finetune(series, f"{name}_{seed}", trained, seed, options.epochs, size)
            finetune(series, f"scratch_{seed}", fresh, seed, options.epochs, size)
    text = table(series, seeds, steps)
    print(f"{text}\n\n{time.monotonic() - start:.0f} s")
    if options.write:
        rewrite(PAGE, "claims", text)


if __name__ == "__main__":
    main()
