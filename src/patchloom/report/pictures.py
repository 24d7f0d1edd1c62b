"""How a sample of each kind is drawn: an image as it is, a clip as a strip of frames, a volume as three slices.

Points are drawn as seen along their third axis, signals as lines, text as its words. A new kind of sample is an entry
in `PICTURES`.

>>> import torch
>>> sample = Sample(torch.rand(3, 16, 40, 60), 0, "clip")
>>> PICTURES["clip"](sample).shape  # eight frames side by side
(72, 892, 4)
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from patchloom.data.kinds import Kind
from patchloom.data.pixels import unit
from patchloom.data.sample import Sample
from patchloom.report.page import Figure
from patchloom.report.plots import COLOURS, GRID
from patchloom.report.tiles import GROUND, INK, enlarged, finite, labelled, pixels_of, png, stack, strip

SIDE, FRAMES, WORDS, POINTS = 108, 8, 400, 4000
"""Side of a picture in pixels; frames of a clip, letters of a text and points of a cloud that are shown at most."""


def sample_figure(kind: Kind, samples: Sequence[Sample], caption: str = "") -> Figure:
    """Return samples one below the other, each under its name.

    Args:
        kind: What they are.
        samples: At least one; pixels in [0, 1] or uint8.
        caption: What to look for.
    """
    rows = [labelled(sample.key, PICTURES[kind.name](sample)) for sample in samples]
    names = ", ".join(sample.key for sample in samples)
    return Figure(png(stack(rows)), f"{kind.plural.capitalize()}: {names}", caption)


def middle_images(inputs: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return what lies in the middle of clips or volumes as images, and the same of maps over their patches.

    Args:
        inputs: (n, C, *sides); images come back as they are.
        maps: (n, K, *grid), as many axes.

    Returns:
        (n, C, H, W) and (n, K, h, w).
    """
    while inputs.ndim > 4:
        place = maps.shape[2] // 2
        # The input is longer than the grid: what is shown lies in the middle of the patch.
        inputs = inputs.select(2, int((place + 0.5) * inputs.shape[2] / maps.shape[2]))
        maps = maps.select(2, place)
    return inputs, maps


def _image(sample: Sample) -> np.ndarray:
    return enlarged(pixels_of(unit(sample.value)), SIDE)


def _clip(sample: Sample) -> np.ndarray:
    count = sample.value.shape[1]
    chosen = np.linspace(0, count - 1, min(count, FRAMES)).round().astype(int).tolist()
    return strip([enlarged(pixels_of(unit(sample.value[:, number])), SIDE) for number in chosen])


def _volume(sample: Sample) -> np.ndarray:
    """Return the slices in the middle of each axis, of the shape they have in the body where the spacing is known."""
    value = finite(unit(sample.value))
    spacing = sample.named.get("spacing")
    apart = spacing.tolist() if isinstance(spacing, Tensor) else [1.0] * 3
    tiles = []
    for axis in range(3):
        image = value.select(1 + axis, value.shape[1 + axis] // 2)
        down, across = (step for number, step in enumerate(apart) if number != axis)
        sides = [
            max(1, round(side * step / min(down, across)))
            for side, step in zip(image.shape[1:], (down, across), strict=True)
        ]
        tiles.append(enlarged(pixels_of(F.interpolate(image[None].float(), size=sides, mode="nearest-exact")[0]), SIDE))
    return strip(tiles)


def _points(sample: Sample) -> np.ndarray:
    points = finite(sample.value.float())[:POINTS].numpy()
    columns = [points[:, number] if number < points.shape[1] else np.zeros(len(points)) for number in range(3)]

    def draw(axes: object) -> None:
        axes.scatter(columns[0], columns[1], c=columns[2], s=3, linewidths=0, cmap="viridis")  # type: ignore[attr-defined]
        axes.set_aspect("equal")  # type: ignore[attr-defined]

    return _drawn(draw, (SIDE, SIDE))


def _signal(sample: Sample) -> np.ndarray:
    channels = finite(sample.value.float()).numpy()

    def draw(axes: object) -> None:
        for number, values in enumerate(channels[: len(COLOURS)]):
            axes.plot(values, color=COLOURS[number], linewidth=1)  # type: ignore[attr-defined]

    return _drawn(draw, (4 * SIDE, SIDE))


def _text(sample: Sample) -> np.ndarray:
    """Return the words, or the numbers of the tokens where there are no words."""
    words = sample.named.get("caption")
    told = words if isinstance(words, str) else " ".join(map(str, sample.value.flatten().tolist()))
    lines = textwrap.wrap(told if len(told) <= WORDS else told[: WORDS - 1] + "…", 70) or [""]
    font = ImageFont.load_default(size=13)
    letters = Image.new("L", (4 * SIDE, 18 * len(lines) + 4))
    ImageDraw.Draw(letters).text((1, 2), "\n".join(lines), fill=255, font=font)
    strength = np.asarray(letters)
    out = np.full((*strength.shape, 4), GROUND, np.uint8)
    out[strength > 0, :3] = INK
    out[..., 3] = strength
    return out


def _drawn(draw: Callable[[object], None], size: tuple[int, int]) -> np.ndarray:
    """Return a chart without words as a picture of a size (width, height) on a transparent ground."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(size[0] / 100, size[1] / 100), dpi=100, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    draw(axes)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color(GRID)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()


PICTURES: dict[str, Callable[[Sample], np.ndarray]] = {
    "image": _image,
    "clip": _clip,
    "volume": _volume,
    "points": _points,
    "signal": _signal,
    "text": _text,
}
"""(sample) -> (height, width, 4) uint8, by the name of the kind."""
