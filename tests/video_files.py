"""Small video files of frames that are grey all over: number n has the value 12 n."""

from __future__ import annotations

import tarfile
from fractions import Fraction
from pathlib import Path

import numpy as np

CODECS = {"mp4": ("libx264", "yuv420p"), "webm": ("libvpx-vp9", "yuv420p"), "avi": ("mpeg4", "yuv420p"),
          "gif": ("gif", "gray"), "mkv": ("ffv1", "yuv420p")}  # fmt: skip


def write_video(path: Path, count: int = 20, size: tuple[int, int] = (32, 48), times=None, step: int = 12, group=5):
    """Write a video; `times` are the milliseconds at which frames are shown, by default 40 apart."""
    import av

    codec, pixels = CODECS[path.suffix[1:]]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"g": str(group)})
        stream.height, stream.width = size
        stream.pix_fmt = pixels
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), number * step, np.uint8), "rgb24")
            if times is not None:
                frame.pts, frame.time_base = int(times[number]), Fraction(1, 1000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return path


def write_sound(path: Path):
    """Write a file with sound and no pictures."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return path


def write_shard(path: Path, files: dict[str, Path | bytes]):
    """Write a shard of files by their names in it."""
    import io

    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path
