"""Clips a second from video files: ours beside a reader that decodes the window as torchvision's did, same transforms.

    python -m benchmarks.clip_loading [--clips 24] [--rounds 3] [--clock process] [--write]

Videos are made here with x264: photographs in motion, 480 x 270 pixels, 10 s, a key frame every 2 s. A clip is 16
frames 4 apart; its crop of random area is resized to 224 pixels with antialiasing. The peer seeks, decodes every frame
of the window to RGB and drops what it does not need, as `torchvision.io.read_video` (gone from newer releases) was
used; its transforms are torchvision's. Both take the same windows, in one process with one thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, paired_ratio, rewrite

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
FRAMES, STRIDE, SIDE, LENGTH, RATE = 16, 4, 224, 250, 25


def make_videos(folder: Path, count: int = 3) -> list[Path]:
    """Write videos that look like films: detail, motion, groups of frames of two seconds."""
    import av
    from torch.nn import functional as F

    from patchloom.data.moving import MovingSource

    paths = []
    for number in range(count):
        source = MovingSource(clip_frames=LENGTH, clip_size=96, clips=8)
        clip = source.read(number).value.transpose(0, 1).float()  # (T, C, S, S)
        path = folder / f"{number}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=RATE, options={"g": str(2 * RATE), "preset": "fast"})
            stream.width, stream.height, stream.pix_fmt = 480, 270, "yuv420p"
            for frame in clip:
                large = F.interpolate(frame[None], size=(270, 480), mode="bicubic")[0].clamp(0, 255)
                pixels = np.ascontiguousarray(large.byte().permute(1, 2, 0).numpy())
                for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")):
                    container.mux(packet)
            for packet in stream.encode(None):
                container.mux(packet)
        paths.append(path)
    return paths


def peer_window(path: Path, start: int) -> Tensor:
    """Return (T, C, H, W) of a window: every frame from its first to its last is decoded to RGB."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        step = int(1 / (RATE * stream.time_base))
        first, last = start * step, (start + (FRAMES - 1) * STRIDE) * step
        container.seek(first, stream=stream)
        frames = []
        for frame in container.decode(stream):
            if frame.pts >= first:
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
            if frame.pts >= last:
                break
    return torch.stack(frames)[::STRIDE].permute(0, 3, 1, 2)


def main() -> None:
    """Time both in turn and print or write the table."""
    from patchloom.data import open_source
    from patchloom.data.clip_sampling import window
    from patchloom.data.clip_views import ClipCrops

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=["wall", "process"], default="wall", help="process: the processor's time")
    parser.add_argument("--write", action="store_true", help="write the table to docs/performance.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = make_videos(Path(folder))
        source: Any = open_source(f"clips:{folder}", clip_frames=FRAMES, clip_stride=STRIDE)
        rng = np.random.default_rng(0)
        wanted = [
            (int(rng.integers(len(paths))), int(rng.integers(LENGTH - FRAMES * STRIDE))) for _ in range(options.clips)
        ]
        crop, theirs = ClipCrops(SIDE, (0.2, 1.0)), v2.RandomResizedCrop(SIDE, (0.2, 1.0), antialias=True)

        def ours() -> None:
            for number, start in wanted:
                sample = source.clip(number, window(LENGTH, FRAMES, STRIDE, start))
                crop(sample.value, torch.Generator().manual_seed(start))

        def peer() -> None:
            for number, start in wanted:
                theirs(peer_window(paths[number], start)).transpose(0, 1).contiguous()

        first = window(LENGTH, FRAMES, STRIDE, wanted[0][1])
        same = torch.equal(
            source.clip(wanted[0][0], first).value.transpose(0, 1), peer_window(paths[wanted[0][0]], first[0])
        )
        clock = time.perf_counter if options.clock == "wall" else time.process_time
        candidates: dict[str, Callable[[], None]] = {"ours": ours, "the window decoded to RGB": peer}
        seconds = alternate(candidates, rounds=options.rounds, clock=clock)
    unit = "clips/s" if options.clock == "wall" else "clips per processor second"
    rows = [
        [
            name,
            mean_and_deviation([options.clips / value for value in values], 1),
            f"{paired_ratio(seconds['the window decoded to RGB'], values):.2f} ×",
        ]
        for name, values in seconds.items()
    ]
    text = (
        f"{machine()}\n\n{markdown_table(['reader', unit, 'speed'], rows)}\n\n"
        f"Frames are {'the same to the bit' if same else 'NOT the same'}. Target: at least 1.3 ×."
    )
    print(text)
    if options.write:
        rewrite(PAGE, "clip_loading", text)


if __name__ == "__main__":
    main()
