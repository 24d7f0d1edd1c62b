"""`patchloom clean dvt decompose`: the first stage of DVT over a source of images, many at once, and its page."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchloom.base.progress import Ticker, duration
from patchloom.base.sizes import size_text
from patchloom.data import open_source
from patchloom.data.base import Source, StreamSource, UnreadableImageError
from patchloom.data.kinds import require_kind
from patchloom.data.pixels import resize, unit
from patchloom.encoders import Encoder, in_chans
from patchloom.errors import UsageError
from patchloom.io import raw_name, write_bytes
from patchloom.report import Section, write_report
from patchloom.report.figures import pca_colours
from patchloom.report.page import Figure
from patchloom.report.tiles import enlarged, labelled, pixels_of, png, strip
from patchloom.systems.dvt.config import DecomposeConfig
from patchloom.systems.dvt.decompose import DenoisedImage, bytes_of_image, denoise_images, opened
from patchloom.systems.dvt.folder import PICTURES, FeatureFolder, kept_parts, open_folder
from patchloom.training.trial import free_memory

MOST_AT_ONCE = 16
ON_PAGE = 8
TILE = 160


def decompose_source(config: DecomposeConfig) -> dict[str, Any]:
    """Run the first stage; see `commands.decompose` for what comes out and is raised."""
    device, encoder, found = opened(config)
    source = _images(config, encoder)
    folder = open_folder(encoder, config, found)
    count = len(source) if config.images is None else min(config.images, len(source))
    to_do = [number for number in range(count) if not folder.has(source.key(number))]
    at_once = config.images_at_once or images_that_fit(config, found, device)
    _announce(config, found, len(to_do), count - len(to_do), at_once)
    started, new, skipped = time.monotonic(), 0, []
    pace = _Pace(len(to_do))
    group: list[tuple[int, str, Tensor]] = []
    for number in [*to_do, None]:
        if number is not None:
            try:
                sample = source.read(number)
            except UnreadableImageError as error:
                skipped.append({"file": error.key, "reason": error.reason})
                pace.drop()
                continue
            group.append((number, sample.key, sample.image))
        if group and (number is None or len(group) == at_once):
            done = denoise_images(
                encoder,
                [image for _, _, image in group],
                config,
                found,
                [each for each, _, _ in group],
                device,
                partial(pace.reach, len(group)),
            )
            for (_, key, image), result in zip(group, done, strict=True):
                folder.add(key, result, kept_parts(config.keep), config.dtype)
                if sum(1 for _ in _drawn(folder)) < config.pictures:
                    _draw(folder, key, image, result, found["image_size"])
            folder.save()
            new += len(group)
            pace.finish(len(group))
            group = []
    if not folder.images:
        raise UsageError(f"{source.name} holds no readable image")
    seconds = time.monotonic() - started
    per_minute = 60 * new / seconds if new else None
    report = _write_page(folder, config, per_minute)
    for each in skipped:
        print(f"left out {each['file']}: {each['reason']}", file=sys.stderr)
    return {
        "images": len(folder.images),
        "new": new,
        "skipped": skipped,
        "images_per_minute": None if per_minute is None else round(per_minute, 3),
        "artifact_share": round(artifact_share(folder), 4),
        "out": str(folder.path),
        "report": str(report),
    }


def artifact_share(folder: FeatureFolder) -> float:
    """Return the mean over images of the artefact's variance by that of the raw features."""
    return float(np.mean([entry["artifact_share"] for entry in folder.images.values()]))


def images_that_fit(config: DecomposeConfig, found: dict[str, Any], device: torch.device) -> int:
    """Return how many images memory holds side by side, with half of it to spare.

    At most 16 on a GPU, in the same operations; on a CPU as many as there are cores to use, each on its own.
    """
    fitting = int(0.5 * free_memory(device) / bytes_of_image(config, found))
    return max(1, min(torch.get_num_threads() if device.type == "cpu" else MOST_AT_ONCE, fitting))


def _images(config: DecomposeConfig, encoder: Encoder) -> Source:
    opened_source = open_source(config.data, in_chans=in_chans(encoder), model=encoder, **config.source_options())
    require_kind(opened_source, ("image",), "clean dvt decompose")
    return opened_source.by_index() if isinstance(opened_source, StreamSource) else opened_source


def _announce(config: DecomposeConfig, found: dict[str, Any], to_do: int, there: int, at_once: int) -> None:
    height, width = found["grid"]
    size = 2 if config.dtype == "float16" else 4
    each = height * width * found["width"] * size * len(kept_parts(config.keep))
    already = f" ({there:,} are there)" if there else ""
    print(
        f"{to_do:,} images to take apart{already}, {at_once} side by side; an image takes "
        f"{bytes_of_image(config, found) / 1e6:,.0f} MB of memory while it is fitted and {each / 1e6:.2g} MB on disk, "
        f"{to_do * each / 1e9:.2g} GB in all",
        file=sys.stderr,
    )


class _Pace:
    """Says how many images there are a minute, and what is left."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = total, 0, time.monotonic()
        self.ticker = Ticker(None)

    def drop(self) -> None:
        self.total -= 1

    def reach(self, count: int, share: float) -> None:
        """Say how far it is, where it is time to: a share of the work on so many images is done."""
        if self.ticker.due(-1):
            self.say(self.done + share * count)

    def finish(self, count: int) -> None:
        self.done += count
        self.say(self.done)

    def say(self, done: float) -> None:
        rate = done / max(time.monotonic() - self.started, 1e-9)
        left = f"  {duration((self.total - done) / rate)} left" if rate else ""
        print(f"decomposed {done:.1f} of {self.total} images  {60 * rate:.3g} images/min{left}", file=sys.stderr)


def _drawn(folder: FeatureFolder) -> Iterator[Path]:
    return (folder.path / PICTURES).rglob("*.png")


def figure_of(image: Tensor, found: DenoisedImage) -> bytes:
    """Return an image beside what its features were taken apart into, as PNG.

    Raw and denoised features have their colours in common, spatial means taken out, because a constant may drift
    between field and artefact; artefact and residual have colours of their own.

    Args:
        image: (C, height, width) in [0, 1].
        found: Its parts.
    """
    grid = (found.raw.shape[0], found.raw.shape[1])

    def painted(*parts: Tensor) -> list[Tensor]:
        return list(pca_colours(torch.stack(parts).flatten(1, 2), grid))

    raw, denoised = painted(*(part - part.mean((0, 1)) for part in (found.raw, found.denoised)))
    tiles = {"image": image, "raw": raw, "denoised": denoised}
    tiles |= {"artefact": painted(found.artifact)[0], "residual": painted(found.residual)[0]}
    return png(strip([labelled(name, enlarged(pixels_of(tile), TILE)) for name, tile in tiles.items()]))


def _draw(folder: FeatureFolder, key: str, image: Tensor, found: DenoisedImage, size: tuple[int, int]) -> None:
    place = folder.path / PICTURES / Path(raw_name(folder.images[key]["file"])).with_suffix(".png")
    write_bytes(place, figure_of(resize(unit(image), size), found))


def _write_page(folder: FeatureFolder, config: DecomposeConfig, per_minute: float | None) -> Path:
    index = folder.index
    figures = [
        Figure(path.read_bytes(), f"Features of {path.stem} taken apart", path.stem)
        for path in sorted(_drawn(folder))[:ON_PAGE]
    ]
    share = artifact_share(folder)
    text = (
        "Three principal components of the features as red, green and blue, spatial means taken out; raw and denoised "
        "features of an image have their colours in common. Denoised: what belongs to the image wherever a view shows "
        f"it. Artefact: what belongs to the position whatever is there; it has {share:.1%} of the variance of the raw "
        "features. Residual: what depends on both."
    )
    table = [{"setting": name, "value": str(value)} for name, value in index["settings"].items()]
    facts = {
        "images": len(folder.images),
        "artefact share": f"{share:.1%}",
        "tokens": f"{folder.grid[0]} x {folder.grid[1]}",
        "width": folder.width,
        **({} if per_minute is None else {"images/min": f"{per_minute:.3g}"}),
    }
    return write_report(
        folder.path / "report.html",
        title=f"clean dvt decompose: {config.data}",
        subtitle=f"{index['encoder']}, block {index['layer']}, {size_text(tuple(index['image_size']))} pixels",
        facts=facts,
        sections=[
            *([Section(title="Features taken apart", text=text, figures=figures)] if figures else []),
            Section(title="Settings", table=table),
        ],
        command=f"patchloom clean dvt decompose --encoder {shlex.quote(str(index['encoder']))} "
        f"--data {shlex.quote(config.data)} --out {shlex.quote(config.out)}",
    )
