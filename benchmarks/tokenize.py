"""Tokenising 224-pixel images with 8192 centroids, beside encoders of the size learned tokenizers have.

    python -m benchmarks.tokenize            # about two minutes on two cores
    python -m benchmarks.tokenize --small    # a few seconds, to see that it runs

Peers: the forward pass of timm's ViT-B/16, which is the encoder of BEiT v2's VQ-KD tokenizer before its search for the
nearest code; and, with transformers installed, the encoder of DALL-E's tokenizer that BEiT uses (FLAVA's codebook;
112-pixel input gives the same 14 x 14 tokens). Weights are random: speed does not depend on them. Images are crops of
the photographs inside scikit-image; the codebook is fitted on others.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor

from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, paired_ratio, rewrite
from benchmarks.photographs import crops, images
from patchloom.encoders.patches import patchify
from patchloom.tokenizers import CentroidTokenizer
from patchloom.tokenizers.kmeans import kmeans

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
OURS = "ours, exact"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="few centroids; the page is left alone")
    parser.add_argument("--rounds", type=int, default=7, help="counted runs of each, in turn")
    parser.add_argument("--batch", type=int, default=16, help="images at once")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*fewer than 39 each.*")

    k, points = (512, 10_000) if arguments.small else (8192, 120_000)
    patches = torch.from_numpy(crops(points, 16, seed=1))
    tokenizer = CentroidTokenizer(kmeans(patches, k, iters=3).centroids, patch_size=16)
    batch = images(arguments.batch).float() / 255
    candidates = {OURS: lambda: tokenizer.encode(batch), "float32 product and argmax": _plain(tokenizer, batch)}
    candidates |= _peers(batch)
    with torch.inference_mode():
        seconds = alternate(candidates, rounds=arguments.rounds, warmup=2)

    rows = []
    for name, values in seconds.items():
        rate = [arguments.batch / value for value in values]
        ratio = f"{paired_ratio(values, seconds[OURS]):.1f}"
        rows.append([name, mean_and_deviation(rate, 1), f"{1000 * statistics.median(values):.0f}", ratio])
    text = f"{machine()}; `python -m benchmarks.tokenize`, batch {arguments.batch}, k = {k}\n\n"
    text += markdown_table(["", "images/s", "ms per batch", "ours is faster by"], rows)
    text += f"\n\n{_agreement(tokenizer, batch)}"
    print(text)
    if not arguments.small and PAGE.exists() and "<!-- tokenize -->" in PAGE.read_text():
        rewrite(PAGE, "tokenize", text)


def _plain(tokenizer: CentroidTokenizer, batch: Tensor) -> Callable[[], Tensor]:
    table = tokenizer.centroids
    half = table.square().sum(1) / 2
    return lambda: torch.addmm(-half, patchify(batch, 16).flatten(0, 1), table.T).argmax(1)


def _peers(batch: Tensor) -> dict[str, Callable[[], Tensor]]:
    vit = timm.create_model("vit_base_patch16_224", num_classes=0).eval()
    peers: dict[str, Callable[[], Tensor]] = {"ViT-B/16 forward (timm)": lambda: vit.forward_features(batch)}
    try:
        from transformers import FlavaImageCodebook, FlavaImageCodebookConfig
    except ImportError:
        return peers
    codebook = FlavaImageCodebook(FlavaImageCodebookConfig()).eval()
    small = torch.nn.functional.interpolate(batch, 112, mode="area")
    return peers | {"DALL-E tokenizer (transformers)": lambda: codebook.get_codebook_indices(small)}


def _agreement(tokenizer: CentroidTokenizer, batch: Tensor) -> str:
    """Compare the tokens with the nearest centroids in float64, by differences rather than products."""
    patches, table = patchify(batch, 16).flatten(0, 1).double(), tokenizer.centroids.double()
    ids = tokenizer.encode(batch).flatten()
    same, worst = 0, 0.0
    for start in range(0, len(patches), 64):
        distance = torch.cdist(patches[start : start + 64], table, compute_mode="donot_use_mm_for_euclid_dist")
        best, nearest = distance.square().min(1)
        chosen = distance.square().gather(1, ids[start : start + 64, None])[:, 0]
        same += int((nearest == ids[start : start + 64]).sum())
        worst = max(worst, float(((chosen - best) / best.clamp(min=1e-12)).max()))
    return (
        f"Tokens equal to the float64 nearest centroid: {same} of {len(ids)}; "
        f"greatest excess of a squared distance over the least, relative: {worst:.1e}."
    )


if __name__ == "__main__":
    main()
