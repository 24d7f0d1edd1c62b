"""A whole volume through UNETR in windows, to the class of every voxel: ours, and MONAI's inferer with argmax.

    python -m benchmarks.unetr_windows [--net unetr] [--side 256] [--window 96] [--width 2] [--classes 14] [--write]

Each is run in a process of its own, with the same network; what is read is the processor's time (a GPU's by the clock)
and how far the memory of the process rose above what it was with network and volume in place. `--net conv` has one
convolution for a network: what is left is what windows themselves cost.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import machine, markdown_table, rewrite
from patchloom.encoders import create_encoder
from patchloom.segment.unetr import UNETR
from patchloom.segment.volume_inference import sliding_classes

PAGE = Path(__file__).parents[1] / "docs" / "systems" / "hi_end_mae.md"


def network(options: argparse.Namespace) -> nn.Module:
    """Return the network, the same in both processes."""
    torch.manual_seed(0)
    if options.net == "conv":
        return nn.Conv3d(1, options.classes, 1).eval()
    encoder = create_encoder(
        "volume_vit_base_patch16_96",
        image_size=options.window,
        patch_size=options.patch,
        in_chans=1,
        embed_dim=options.dim,
        num_heads=options.heads,
        class_token=False,
        global_pool="avg",
    )
    return UNETR(encoder, options.classes, options.width).eval()


def by_monai(net: nn.Module, volume: Tensor, window: int) -> Tensor:
    """Return the class of every voxel."""
    from monai.inferers import sliding_window_inference

    with torch.inference_mode():
        logits = sliding_window_inference(volume[None], (window,) * 3, 1, net, overlap=0.5)
        return logits[0].argmax(0).to(torch.uint8).cpu()


def by_ours(net: nn.Module, volume: Tensor, window: int) -> Tensor:
    """Return the class of every voxel."""
    return sliding_classes(net, volume, (window,) * 3)


def child(options: argparse.Namespace) -> None:
    """Run one of them, and print what it took."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = network(options).to(device)
    volume = torch.rand(1, *[options.side] * 3, generator=torch.Generator().manual_seed(1)).to(device)
    run = {"ours": by_ours, "monai": by_monai}[options.child]
    run(net, volume[:, : options.window, : options.window, : options.window], options.window)  # one window, to warm up
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    classes = run(net, volume, options.window)
    seconds = clock() - start
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    counts = classes.flatten().bincount(minlength=options.classes).tolist()
    print(json.dumps({"seconds": seconds, "bytes": peak - before, "counts": counts}))


def main() -> None:
    """Run both in turn and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=("unetr", "conv"), default="unetr")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--window", type=int, default=96)
    parser.add_argument("--patch", type=int, default=12)
    parser.add_argument("--dim", type=int, default=48)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=2)
    parser.add_argument("--classes", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--child", choices=("ours", "monai"), help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write the table to docs/systems/hi_end_mae.md")
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    told: dict[str, list[dict[str, object]]] = {"ours": [], "monai": []}
    for _ in range(options.rounds):
        for name, found in told.items():
            command = [sys.executable, "-m", "benchmarks.unetr_windows", *sys.argv[1:], "--child", name]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    # A voxel may fall on either side where two classes are as likely to the last digit.
    counts = [torch.tensor(found[0]["counts"]) for found in told.values()]
    changed = int((counts[0] - counts[1]).abs().sum())
    best = {name: min(float(str(run["seconds"])) for run in found) for name, found in told.items()}
    memory = {name: min(int(str(run["bytes"])) for run in found) / 2**20 for name, found in told.items()}
    rows = [
        ["ours, slab by slab", f"{best['ours']:.1f}", f"{memory['ours']:.0f}"],
        ["MONAI's inferer and argmax", f"{best['monai']:.1f}", f"{memory['monai']:.0f}"],
        ["ratio", f"{best['monai'] / best['ours']:.2f} ×", f"{memory['ours'] / memory['monai']:.2f} ×"],
    ]
    header = ["", "processor seconds", "memory above the start, MiB"]
    text = (
        f"`python -m benchmarks.unetr_windows --net {options.net} --side {options.side} --window {options.window} "
        f"--width {options.width} --classes {options.classes}`: {options.side}³ voxels, windows of {options.window}³, "
        f"which overlap by half, float32; {changed} of {options.side**3:,} voxels counted otherwise; {machine()}.\n\n"
        f"{markdown_table(header, rows)}"
    )
    print(text)
    if options.write:
        rewrite(PAGE, "unetr_windows", text)


if __name__ == "__main__":
    main()
