"""Does cleaning features help segmentation? CCViT pre-trained, cleaned by DVT, segmented by ViT-CoMer, on CamVid.

    python -m benchmarks.claims.dense_chain --camvid CAMVID_FOLDER --write            # sized for one GPU
    python -m benchmarks.claims.dense_chain --camvid CAMVID_FOLDER --small --write    # for two cores

Three ways to the encoder of one segmenter, `segment vit_comer`, everything else alike:

- `cleaned`: pre-trained by CCViT on the training images without their labels, then DVT in all its stages (`clean dvt
  decompose`, `train` and `distill`) on the same images;
- `pretrained`: the same encoder without the middle;
- `scratch`: fresh weights, labels alone.

DVT stands in the middle and not PH-Reg, which refuses CCViT: its tables of relative positions have no entry for
registers. The denoiser is distilled into the encoder since ViT-CoMer reads blocks, and a denoiser stands behind them.

CamVid's folder holds train, val and test of SegNet's split; mean IoU is measured on the test images. Every run and
every figure is kept in `--out`, so that an interrupted series goes on where it stopped, in the middle of a run, too.
`--write` puts the table into docs/segmentation.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import patchloom as pl
from benchmarks.claims.ccvit import SEEDS, Series
from benchmarks.claims.vit_p import smaller
from benchmarks.harness import machine, markdown_table, mean_and_deviation, rewrite
from patchloom.encoders import create_encoder
from patchloom.models.bundle import save_bundle
from patchloom.systems.dvt.commands import decompose
from patchloom.systems.dvt.config import DecomposeConfig

PAGE = Path(__file__).parents[2] / "docs" / "segmentation.md"
WAYS = {
    "cleaned": "CCViT → DVT → ViT-CoMer",
    "pretrained": "CCViT → ViT-CoMer",
    "scratch": "supervised from scratch",
}


@dataclass(frozen=True)
class Setting:
    """How large everything is."""

    side: int
    """Shorter side of the images."""
    encoder: str
    """Of CCViT's family."""
    size: int
    """Side of the images of pre-training and of what DVT sees."""
    pretrain: dict[str, Any]
    decompose: dict[str, Any]
    train: dict[str, Any]
    distill: dict[str, Any]
    segment: dict[str, Any]
    images: int | None = None
    """The first so many of each split; None: all."""


GPU = Setting(
    side=360,
    encoder="ccvit_small_patch16_224",
    size=224,
    pretrain={"batch_size": 256, "max_steps": 20_000, "epochs": 20_000, "k": 8192, "num_workers": 8},
    decompose={"num_views": 768, "steps": 10_000},
    train={"max_steps": 20_000, "batch_size": 32},
    distill={"max_steps": 2000, "epochs": 200, "batch_size": 32, "num_workers": 8},
    segment={
        "image_size": 352,
        "batch_size": 16,
        "max_steps": 8000,
        "epochs": 8000,
        "lr": 3e-4,
        "width": 256,
        "num_workers": 8,
    },
)
SMALL = Setting(
    side=96,
    encoder="ccvit_tiny_patch8_64",
    size=64,
    pretrain={"batch_size": 32, "max_steps": 300, "epochs": 1000, "k": 512, "lr": 1.5e-3, "num_workers": 0},
    decompose={"images": 64, "num_views": 64, "steps": 300, "batch_tokens": 512, "levels": 4},
    train={"max_steps": 400, "batch_size": 16, "num_workers": 0},
    distill={"max_steps": 150, "epochs": 1000, "batch_size": 16, "num_workers": 0},
    segment={
        "image_size": 96,
        "batch_size": 8,
        "max_steps": 300,
        "epochs": 1000,
        "lr": 3e-4,
        "width": 64,
        "num_workers": 0,
    },
)
SMOKE = Setting(
    side=64,
    encoder="ccvit_tiny_patch8_64",
    size=64,
    pretrain={"batch_size": 4, "max_steps": 2, "epochs": 1, "k": 16, "num_workers": 0},
    decompose={"images": 4, "num_views": 8, "steps": 4, "batch_tokens": 64, "levels": 2},
    train={"max_steps": 2, "batch_size": 2, "num_workers": 0, "held_out": 0.25},
    distill={"max_steps": 1, "epochs": 1, "batch_size": 2, "num_workers": 0},
    segment={"image_size": 64, "batch_size": 2, "max_steps": 1, "epochs": 1, "width": 16, "num_workers": 0},
    images=8,
)


class Chain:
    """The runs of one seed, each made once.

    Args:
        out: Where they are kept.
        setting: How large everything is.
        train: Images and masks that are learnt from.
        test: Those that are measured on.
        seed: Of everything.
    """

    def __init__(self, out: Path, setting: Setting, train: Path, test: Path, seed: int) -> None:
        self.out, self.setting, self.train, self.test, self.seed = out, setting, train, test, seed

    def run(self, verb: str, method: str, name: str, settings: dict[str, Any]) -> Path:
        """Return the folder of a run, begun, gone on with, or as it is."""
        folder = self.out / f"{name}_{self.seed}"
        if (folder / "summary.json").exists() and not summary_of(folder).get("interrupted"):
            return folder
        if (folder / "checkpoints" / "last.ckpt").exists():
            getattr(pl, verb)(method, out=folder, resume=True)
        else:
            settings = {"probe_every": 0, "report": False, "seed": self.seed, **settings}
            getattr(pl, verb)(method, out=folder, overwrite=True, **settings)
        return folder

    def pretrained(self) -> Path:
        """Return CCViT's run on the training images."""
        setting = self.setting
        settings = {"data": str(self.train / "images"), "encoder": setting.encoder, "image_size": setting.size}
        return self.run("pretrain", "ccvit", "pretrain", settings | setting.pretrain)

    def cleaned(self) -> Path:
        """Return the run in which the encoder learns to give denoised features by itself."""
        setting, encoder = self.setting, str(self.pretrained())
        features = self.out / f"features_{self.seed}"
        images = str(self.train / "images")
        wanted = {"image_size": setting.size, "seed": self.seed, "pictures": 4, **setting.decompose}
        decompose(DecomposeConfig(encoder=encoder, data=images, out=str(features), **wanted))  # goes on by itself
        denoiser = self.run("clean", "dvt_train", "denoiser", {"data": str(features), **setting.train})
        settings = {"teacher": str(denoiser), "data": images, **setting.distill}
        return self.run("clean", "dvt_distill", "distill", settings)

    def fresh(self) -> Path:
        """Return a bundle of the same architecture with fresh weights."""
        import torch

        out = self.out / f"fresh_{self.seed}"
        if not out.exists():
            torch.manual_seed(self.seed)
            save_bundle(create_encoder(self.setting.encoder, image_size=self.setting.size), out)
        return out

    def segmented(self, way: str) -> dict[str, Any]:
        """Return the figures of the segmenter on the encoder that a way leads to."""
        encoder = {"cleaned": self.cleaned, "pretrained": self.pretrained, "scratch": self.fresh}[way]()
        settings = {"data": str(self.train), "probe_data": str(self.test), "encoder": str(encoder)}
        folder = self.run("segment", "vit_comer", way, settings | self.setting.segment)
        summary = summary_of(folder)
        names = ("miou", "interval", "boundary_f", "pixel_accuracy_test", "seconds")
        return {name: summary.get(name) for name in names}


def summary_of(folder: Path) -> dict[str, Any]:
    """Return the figures of a run."""
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


def points(values: list[float]) -> str:
    """Return shares as percent."""
    if len(values) == 1:
        return f"{100 * values[0]:.1f}"
    return mean_and_deviation([100 * value for value in values], 1)


def table(found: dict[str, list[dict[str, Any]]], steps: int) -> str:
    """Return what each way came to, and whether the chain's claims hold, as sentences below it."""

    def of(way: str, name: str) -> list[float]:
        return [float(figures[name]) for figures in found[way]]

    def gain(way: str, other: str) -> list[float]:
        return [a - b for a, b in zip(of(way, "miou"), of(other, "miou"), strict=True)]

    rows = [
        [words, points(of(way, "miou")), points(of(way, "boundary_f")), points(of(way, "pixel_accuracy_test"))]
        for way, words in WAYS.items()
    ]
    count = len(found["cleaned"])
    held = "one seed" if count == 1 else f"{count} seeds"
    header = [f"way ({held}, {steps:,} steps of ViT-CoMer)", "mIoU %", "boundary F %", "pixels right %"]
    claims = [
        ("Pre-training against scratch", gain("pretrained", "scratch")),
        ("DVT in the middle against none", gain("cleaned", "pretrained")),
        ("The whole chain against scratch", gain("cleaned", "scratch")),
    ]
    said = [
        f"- {claim}: {points(values)} points; above 0 with {sum(value > 0 for value in values)} of {held}."
        for claim, values in claims
    ]
    return markdown_table(header, rows) + "\n\n" + "\n".join(said)


def main() -> None:
    """Run the chain for each seed, then write its table if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", type=Path, required=True, help="folder with train, val and test of SegNet's split")
    parser.add_argument("--out", type=Path, default=Path("scratch/claims/dense_chain"))
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--small", action="store_true", help="a tiny encoder on images of 96 pixels, for two cores")
    sizes.add_argument("--smoke", action="store_true", help="as little as can be: does the script run?")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--write", action="store_true", help=f"write the table to docs/{PAGE.name}")
    arguments = parser.parse_args()
    setting = SMOKE if arguments.smoke else SMALL if arguments.small else GPU
    seeds = SEEDS[: 1 if arguments.smoke else arguments.seeds]
    kind = "smoke" if arguments.smoke else "small" if arguments.small else "gpu"
    series = Series(arguments.out / kind)
    folders = {split: series.out / f"{split}_{setting.side}" for split in ("train", "test")}
    for split, folder in folders.items():
        smaller(arguments.camvid, split, setting.side, folder, setting.images)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for seed in seeds:
        chain = Chain(series.out, setting, folders["train"], folders["test"], seed)
        for way in reversed(WAYS):
            figures = series.get(f"figures_{way}_{seed}", lambda chain=chain, way=way: chain.segmented(way))
            print(seed, way, figures, flush=True)
            found[way].append(figures)
    text = table(found, setting.segment["max_steps"])
    print(text)
    if arguments.write:
        flag = "" if kind == "gpu" else f" --{kind}"
        how = (
            f"`python -m benchmarks.claims.dense_chain --camvid CamVid{flag} --write`: images of {setting.side} "
            f"pixels, {setting.encoder}; mean and deviation over seeds. {machine()}."
        )
        rewrite(PAGE, "dense_chain", f"{how}\n\n{text}")


if __name__ == "__main__":
    main()
