"""Shapes that need no download: clouds of tables, mugs, rockets … of random proportions, with views and captions.

Made of trimesh's primitives (extra: points). `shapes`, `shapes:test` and `shapes:unseen` are clouds, of 18 classes and
of six others; `shapes:views` and `shapes:views_test` are pictures of all 24, for towers that know what words look like.

>>> source = ShapesSource("train", per_class=2)
>>> sample = source.read(0)
>>> sample.value.shape, sample.named["pictures"].shape, source.class_names[sample.label]
(torch.Size([512, 3]), torch.Size([6, 3, 48, 48]), 'arrow')
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from patchloom.base.ranges import PositiveInt, checked
from patchloom.data.base import Sample, Source
from patchloom.data.clouds import DRAWN, VIEW_SIDE, VIEWS, in_unit_sphere, rendered
from patchloom.data.kinds import IMAGE, KINDS
from patchloom.data.sample import OnDemand
from patchloom.errors import MissingExtraError, unknown_name

UNSEEN = ("capsule", "dumbbell", "hourglass", "ladder", "snowman", "table")
DEFAULT_PER_CLASS = {"train": 40, "test": 10, "unseen": 20, "views": 40, "views_test": 8}
SPLITS = {"train": 0, "test": 1, "unseen": 1, "views": 0, "views_test": 1}
"""Which shapes a split is of: those of `views` are those of `train`."""


class ShapesSource(Source):
    """Clouds or pictures of shapes; a shape is a function of (seed, class, number) alone.

    Args:
        split: `train`, `test`, `unseen`, `views` or `views_test`.
        per_class: Shapes of a class.
        num_points: Points of a cloud.
        seed: Seed of the shapes.
        in_chans: Channels of the pictures, 3 or 1.

    Raises:
        UsageError: Unknown split.
        MissingExtraError: trimesh is not here.
    """

    side = VIEW_SIDE

    @checked
    def __init__(
        self,
        split: str = "train",
        per_class: PositiveInt | None = None,
        num_points: PositiveInt = 512,
        seed: int = 0,
        in_chans: PositiveInt = 3,
    ) -> None:
        if split not in SPLITS:
            raise unknown_name("split of shapes", split, SPLITS)
        _trimesh()
        self.name = "shapes" if split == "train" else f"shapes:{split}"
        self.split, self.num_points, self.seed, self.in_chans = split, num_points, seed, in_chans
        self.kind = IMAGE if split.startswith("views") else KINDS["points"]
        self.per_class = DEFAULT_PER_CLASS[split] if per_class is None else per_class
        known = sorted(SHAPES)
        if split == "unseen":
            known = sorted(UNSEEN)
        elif self.kind is not IMAGE:
            known = [name for name in known if name not in UNSEEN]
        self.class_names = known
        self.labels = np.arange(self.per_class * len(known), dtype=np.int64) % len(known)

    def __len__(self) -> int:
        """Return the number of shapes."""
        assert self.labels is not None
        return len(self.labels)

    def key(self, index: int) -> str:
        """Return the name of a shape."""
        assert self.class_names is not None
        name = self.class_names[index % len(self.class_names)]
        return f"{name}-{self.split}-{index // len(self.class_names):04d}"

    def read(self, index: int) -> Sample:
        """Return shape number `index`: (N, 3) float32 with `pictures` (6, 3, 48, 48) uint8, or a picture."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no shape {index} among {len(self)}")
        assert self.class_names is not None
        label = index % len(self.class_names)
        if self.kind is IMAGE:
            picture = self._pictures(index)[index // len(self.class_names) % VIEWS, : self.in_chans]
            return Sample(picture, label, self.key(index))
        return Sample(torch.from_numpy(self._points(index, self.num_points)), label, self.key(index), self.named(index))

    def named(self, index: int) -> Mapping[str, Any]:
        """Return the pictures, made when they are asked for."""
        return OnDemand(pictures=partial(self._pictures, index))

    def _pictures(self, index: int) -> torch.Tensor:
        return torch.from_numpy(rendered(self._points(index, DRAWN), VIEWS, VIEW_SIDE))

    def _points(self, index: int, count: int) -> np.ndarray:
        assert self.class_names is not None
        name = self.class_names[index % len(self.class_names)]
        number = index // len(self.class_names)
        rng = np.random.default_rng((self.seed, sorted(SHAPES).index(name), number, SPLITS[self.split]))
        mesh = SHAPES[name](Builder(rng))
        seed = int(rng.integers(2**31))
        points, _ = _trimesh().sample.sample_surface(mesh, count, seed=seed)
        return in_unit_sphere(np.asarray(points, np.float64)).astype(np.float32)

    def fingerprint(self) -> str:
        """Return a short hash of the settings."""
        text = f"shapes {self.split} {self.per_class} {self.num_points} {self.seed}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _trimesh() -> Any:
    try:
        import trimesh
    except ImportError as error:
        raise MissingExtraError("trimesh", "points", "making shapes") from error
    return trimesh


class Builder:
    """Primitives at their places, of random proportions."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.make = rng, _trimesh().creation

    def __call__(self, *parts: Any) -> Any:
        """Return parts as one."""
        return _trimesh().util.concatenate(list(parts))

    def any(self, low: float, high: float) -> float:
        """Return a number between two."""
        return float(self.rng.uniform(low, high))

    def box(self, x: float, y: float, z: float, at: tuple[float, float, float] = (0, 0, 0)) -> Any:
        """Return a box of three sides, its middle at a place."""
        return self.make.box((x, y, z)).apply_translation(at)

    def ball(self, radius: float, at: tuple[float, float, float] = (0, 0, 0)) -> Any:
        """Return a ball."""
        return self.make.icosphere(2, radius).apply_translation(at)

    def rod(self, radius: float, height: float, at: tuple[float, float, float] = (0, 0, 0), along: str = "z") -> Any:
        """Return a cylinder along an axis."""
        return self._turned(self.make.cylinder(radius, height, sections=24), along).apply_translation(at)

    def cone(self, radius: float, height: float, at: tuple[float, float, float] = (0, 0, 0), down: bool = False) -> Any:
        """Return a cone, the middle of its base at a place."""
        cone = self.make.cone(radius, height, sections=24)
        if down:
            cone.apply_transform(_trimesh().transformations.rotation_matrix(np.pi, (1, 0, 0)))
        return cone.apply_translation(at)

    def ring(self, large: float, small: float, at: tuple[float, float, float] = (0, 0, 0), along: str = "z") -> Any:
        """Return a torus."""
        return self._turned(self.make.torus(large, small, 24, 12), along).apply_translation(at)

    def tube(self, inner: float, outer: float, height: float, at: tuple[float, float, float] = (0, 0, 0)) -> Any:
        """Return a hollow cylinder."""
        return self.make.annulus(inner, outer, height, sections=24).apply_translation(at)

    def _turned(self, mesh: Any, along: str) -> Any:
        axis = {"z": None, "x": (0, 1, 0), "y": (1, 0, 0)}[along]
        if axis is not None:
            mesh.apply_transform(_trimesh().transformations.rotation_matrix(np.pi / 2, axis))
        return mesh


def _legs(b: Builder, x: float, y: float, height: float, top: float) -> list[Any]:
    thick = b.any(0.04, 0.08)
    places = [(sx * x, sy * y, top - height / 2) for sx in (-1, 1) for sy in (-1, 1)]
    return [b.box(thick, thick, height, place) for place in places]


def _chair(b: Builder) -> Any:
    wide, height, back = b.any(0.4, 0.6), b.any(0.4, 0.6), b.any(0.5, 0.8)
    seat = b.box(wide, wide, 0.06)
    rest = b.box(wide, 0.06, back, (0, wide / 2, back / 2))
    return b(seat, rest, *_legs(b, wide * 0.45, wide * 0.45, height, 0))


def _table(b: Builder) -> Any:
    x, y, height = b.any(0.9, 1.4), b.any(0.6, 0.9), b.any(0.5, 0.8)
    return b(b.box(x, y, 0.07), *_legs(b, x * 0.45, y * 0.45, height, 0))


def _ladder(b: Builder) -> Any:
    wide, height, rungs = b.any(0.3, 0.45), b.any(1.4, 1.9), int(b.rng.integers(5, 8))
    sides = [b.box(0.06, 0.06, height, (side * wide / 2, 0, 0)) for side in (-1, 1)]
    steps = [b.rod(0.025, wide, (0, 0, z), "x") for z in np.linspace(-0.42, 0.42, rungs) * height]
    return b(*sides, *steps)


def _stairs(b: Builder) -> Any:
    count, wide, step = int(b.rng.integers(4, 7)), b.any(0.5, 0.9), b.any(0.15, 0.2)
    return b(*(b.box(wide, step, step * (n + 1), (0, n * step, step * (n + 1) / 2)) for n in range(count)))


def _tower(b: Builder) -> Any:
    count, radius = int(b.rng.integers(4, 6)), b.any(0.5, 0.7)
    return b(*(b.ring(radius * (1 - 0.16 * n), 0.09, (0, 0, 0.18 * n)) for n in range(count)))


def _wheel(b: Builder) -> Any:
    spokes = int(b.rng.integers(2, 4))
    turns = _trimesh().transformations.rotation_matrix
    rods = [b.rod(0.04, 1.2, along="x").apply_transform(turns(np.pi * n / spokes, (0, 0, 1))) for n in range(spokes)]
    return b(b.ring(0.62, b.any(0.06, 0.1)), *rods)


SHAPES: dict[str, Callable[[Builder], Any]] = {
    "arrow": lambda b: b(b.rod(0.08, b.any(0.8, 1.2)), b.cone(b.any(0.2, 0.3), 0.4, (0, 0, 0.45))),
    "ball": lambda b: b(b.ball(1.0)),
    "bottle": lambda b: b(
        b.rod(b.any(0.28, 0.36), 0.9), b.cone(0.3, 0.3, (0, 0, 0.45)), b.rod(0.09, 0.4, (0, 0, 0.75))
    ),
    "box": lambda b: b(b.box(b.any(0.8, 1.2), b.any(0.8, 1.2), b.any(0.7, 1.1))),
    "capsule": lambda b: b(b.make.capsule(height=b.any(0.8, 1.4), radius=b.any(0.3, 0.4))),
    "chair": _chair,
    "cone": lambda b: b(b.cone(b.any(0.4, 0.7), b.any(0.9, 1.3))),
    "cross": lambda b: b(b.box(b.any(0.7, 0.9), 0.16, 0.16, (0, 0, 0.25)), b.box(0.16, 0.16, b.any(1.2, 1.5))),
    "cylinder": lambda b: b(b.rod(b.any(0.3, 0.5), b.any(0.8, 1.4))),
    "dumbbell": lambda b: b(
        b.rod(0.08, 1.0, along="x"), *(b.ball(b.any(0.26, 0.36), (side * 0.55, 0, 0)) for side in (-1, 1))
    ),
    "hammer": lambda b: b(b.rod(0.06, b.any(1.0, 1.3)), b.box(b.any(0.5, 0.7), 0.2, 0.2, (0, 0, 0.55))),
    "hourglass": lambda b: b(
        b.cone(b.any(0.4, 0.5), 0.65, (0, 0, -0.6)), b.cone(b.any(0.4, 0.5), 0.65, (0, 0, 0.6), down=True)
    ),
    "ladder": _ladder,
    "lamp": lambda b: b(
        b.rod(0.35, 0.06, (0, 0, -0.7)), b.rod(0.04, 1.2), b.cone(b.any(0.35, 0.5), b.any(0.35, 0.5), (0, 0, 0.4))
    ),
    "mug": lambda b: b(b.tube(0.34, 0.4, b.any(0.7, 1.0)), b.ring(b.any(0.2, 0.26), 0.05, (0.45, 0, 0), along="y")),
    "mushroom": lambda b: b(b.rod(b.any(0.12, 0.2), 0.8), b.cone(b.any(0.5, 0.65), 0.4, (0, 0, 0.3))),
    "ring": lambda b: b(b.ring(0.7, b.any(0.12, 0.25))),
    "ring tower": _tower,
    "rocket": lambda b: b(
        b.rod(0.22, 1.1),
        b.cone(0.22, b.any(0.35, 0.5), (0, 0, 0.55)),
        b.box(0.9, 0.05, 0.3, (0, 0, -0.45)),
        b.box(0.05, 0.9, 0.3, (0, 0, -0.45)),
    ),
    "snowman": lambda b: b(b.ball(0.5), b.ball(b.any(0.33, 0.4), (0, 0, 0.65)), b.ball(b.any(0.2, 0.26), (0, 0, 1.15))),
    "stairs": _stairs,
    "table": _table,
    "tube": lambda b: b(b.tube(b.any(0.3, 0.36), 0.45, b.any(1.0, 1.6))),
    "wheel": _wheel,
}
"""Classes of shapes, and what makes one."""
