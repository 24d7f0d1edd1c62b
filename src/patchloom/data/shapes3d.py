"""Volumes that need no download: ellipsoids of three kinds in noise, each voxel's kind known.

A kind has its brightness and its texture: smooth, striped or speckled. The class of a volume is the kind that fills
most of it. A volume is a function of (seed, number) alone.

>>> source = Shapes3dSource(volumes=6)
>>> sample = source.read(0)
>>> sample.value.shape, sample.named["mask"].shape, source.class_names[sample.label]
(torch.Size([1, 32, 32, 32]), torch.Size([32, 32, 32]), 'smooth')
"""

from __future__ import annotations

import hashlib
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchloom.base.mask_settings import MaskSettings
from patchloom.base.ranges import PositiveInt, checked
from patchloom.data.base import Sample, Source
from patchloom.data.kinds import VOLUME
from patchloom.data.mask_values import MaskCoding, MaskShares
from patchloom.data.nifti import BODY
from patchloom.data.segmentation import colours
from patchloom.errors import UsageError, unknown_name

KINDS = ("smooth", "striped", "speckled")
BRIGHTNESS = (0.42, 0.55, 0.55)
AIR, NOISE, TEXTURE = 0.05, 0.07, 0.14
"""Brightness between the shapes; deviation of the noise on everything; strength of stripes and speckles."""
DEFAULT_VOLUMES = {"train": 200, "test": 40}
SHAPES = (3, 6)
LEAST = 8


class Shapes3dSource(Source):
    """Three to six ellipsoids in a volume, with a class and a mask; voxels of 1 mm.

    Args:
        split: `train` or `test`.
        size: Side of a volume, voxels.
        volumes: How many; default 200 for training and 40 for testing.
        seed: Seed of the shapes.
        in_chans: Channels; the grey volume is repeated.
        settings: What the user says of the values of masks, which are known here.
        coding: How masks were read elsewhere; not used.

    Raises:
        UsageError: Unknown split, volumes too small for shapes, or something said of the masks.
    """

    kind = VOLUME

    @checked
    def __init__(
        self,
        split: str = "train",
        size: PositiveInt = 32,
        volumes: PositiveInt | None = None,
        seed: int = 0,
        in_chans: int = 1,
        settings: MaskSettings | None = None,
        coding: MaskCoding | None = None,
    ) -> None:
        if split not in DEFAULT_VOLUMES:
            raise unknown_name("split of shapes3d", split, DEFAULT_VOLUMES)
        if size < LEAST:
            raise UsageError(f"size is {size}; shapes need volumes of at least {LEAST} voxels a side")
        for field in fields(MaskSettings) if settings is not None else ():
            if (value := getattr(settings, field.name)) is not None:
                raise UsageError(f"{field.name} is {value!r}, and the masks of shapes3d are known; leave it out")
        self.name = "shapes3d" if split == "train" else f"shapes3d:{split}"
        self.split, self.size, self.seed, self.in_chans = split, size, seed, in_chans
        self.volumes = DEFAULT_VOLUMES[split] if volumes is None else volumes
        self.class_names = list(KINDS)
        self.labels = np.arange(self.volumes, dtype=np.int64) % len(KINDS)
        self.mask_names = ["background", *KINDS]
        self.palette = [(0, 0, 0), *colours(len(self.mask_names))][: len(self.mask_names)]
        spans = tuple((float(number), float(number), number) for number in range(len(self.mask_names)))
        self.coding: MaskCoding | None = MaskCoding("values", spans, tuple(self.mask_names))
        self.shares: MaskShares | None = None
        self._drawn: dict[int, tuple[Tensor, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the volumes behind: each worker draws its own."""
        return {**vars(self), "_drawn": {}}

    def __len__(self) -> int:
        """Return the number of volumes."""
        return self.volumes

    def key(self, index: int) -> str:
        """Return the name of a volume."""
        return f"{KINDS[index % len(KINDS)]}-{self.split}-{index:05d}"

    def read(self, index: int) -> Sample:
        """Return volume number `index`, (C, D, H, W) uint8, with its `mask` (D, H, W), `spacing` and place in space."""
        if not 0 <= index < self.volumes:
            raise IndexError(f"there is no volume {index} among {self.volumes}")
        label = index % len(KINDS)
        if index not in self._drawn:
            rng = np.random.default_rng((self.seed, index, self.split == "test"))
            drawn, mask = draw_shapes(rng, self.size, label)
            self._drawn[index] = torch.from_numpy((drawn * 255).round().astype(np.uint8)), torch.from_numpy(mask)
        volume, classes = self._drawn[index]
        value = volume[None].expand(self.in_chans, -1, -1, -1)
        named = {
            "mask": classes,
            "spacing": torch.ones(3, dtype=torch.float64),
            "orientation": torch.tensor(BODY, dtype=torch.float64),
            "affine": torch.eye(4, dtype=torch.float64),
        }
        return Sample(value, label, self.key(index), named)

    def fingerprint(self) -> str:
        """Return a short hash of the settings."""
        text = f"shapes3d {self.split} {self.size} {self.volumes} {self.seed}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def draw_shapes(rng: np.random.Generator, size: int, kind: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a volume (S, S, S) in [0, 1] and its mask uint8, 0 between shapes and 1 + kind in them.

    Args:
        rng: Where draws come from.
        size: Side S.
        kind: The kind that fills most of it; drawn anew until it does.
    """
    while True:
        mask = np.zeros((size,) * 3, np.uint8)
        count = int(rng.integers(SHAPES[0], SHAPES[1] + 1))
        for number in range(count):
            drawn = kind if number == count - 1 else int(rng.integers(len(KINDS)))
            mask[_ellipsoid(rng, size)] = 1 + drawn
        filled = np.bincount(mask.ravel(), minlength=1 + len(KINDS))[1:]
        if filled.argmax() == kind and filled[kind] > filled.sum() - filled[kind] - filled[kind] // 2:
            break
    z, y, x = np.mgrid[:size, :size, :size]
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    waves = np.sin((np.cos(angle) * x + np.sin(angle) * y + z / 2) * (2 * np.pi / 5) + phase)
    grain = rng.choice([-1.0, 1.0], size=(-(-size // 2),) * 3).repeat(2, 0).repeat(2, 1).repeat(2, 2)
    textures = np.stack([np.zeros_like(waves), waves, grain[:size, :size, :size]])
    volume = np.full(mask.shape, AIR)
    for number in range(len(KINDS)):
        inside = mask == 1 + number
        volume[inside] = BRIGHTNESS[number] + TEXTURE * textures[number][inside]
    return (volume + NOISE * rng.standard_normal(mask.shape)).clip(0, 1), mask


def _ellipsoid(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return where an ellipsoid of any direction is, (S, S, S) bool."""
    radii = rng.uniform(0.13, 0.33, 3) * size
    centre = rng.uniform(0.2, 0.8, 3) * size
    turned, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    places = np.moveaxis(np.mgrid[:size, :size, :size], 0, -1) + 0.5 - centre
    return (((places @ turned) / radii) ** 2).sum(-1) < 1
