"""Volumes (CT, MR): whole, or slice by slice as images: windowed, with square pixels, right way up.

A volume is brought to the axes of the body first (left to right, back to front, feet to head), so that scanners that
store it otherwise make no difference; masks predicted on it go back to the file's own axes and affine. The windows
are those of the DINOv2 radiology benchmark (arXiv 2312.02366).

>>> source = open_volumes("scans")  # doctest: +SKIP
>>> source.read(0).value.shape  # doctest: +SKIP
torch.Size([1, 55, 512, 512])
>>> volume = source.volume(0)  # doctest: +SKIP
>>> volume.slices.shape, volume.spacing  # doctest: +SKIP
(torch.Size([55, 512, 512]), (2.5, 0.7, 0.7))
"""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchloom.base.choices import Plane, Window
from patchloom.base.mask_settings import MaskSettings
from patchloom.base.progress import track
from patchloom.data.base import Sample, Source, UnreadableImageError, spread
from patchloom.data.kinds import VOLUME
from patchloom.data.mask_settling import settle
from patchloom.data.mask_survey import Survey
from patchloom.data.mask_values import MaskCoding, MaskShares, UnknownValueError, wrong_value
from patchloom.data.nifti import (
    BODY,
    IN_PLANE,
    as_slices,
    body_axes,
    by,
    channel_volumes,
    import_nibabel,
    single_volume,
    spacing_of,
)
from patchloom.data.pixels import resize
from patchloom.data.segmentation import colours
from patchloom.data.value_range import ValueRange
from patchloom.data.volume_files import SUFFIXES, bare_name, find_volumes, load_volume
from patchloom.errors import UsageError, unknown_name
from patchloom.io import existing, printable, written_whole

# The axis of the body (left-right, back-front, feet-head) along which slices follow one another.
AXES: dict[str, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
FOLDERS = (("images", "masks"), ("images", "labels"), ("imagesTr", "labelsTr"), ("imagesTs", "labelsTs"))
CT_WINDOW = (-1024.0, 600.0)
MR_PERCENTILES = (5.0, 95.0)
# Pixels whose sides differ by more than this are made square.
SQUARE = 0.02
KEPT = 8


class Origin(NamedTuple):
    """How a file lies in the body."""

    axes: np.ndarray
    """(3, 2): where each axis of the file goes in the body, and which way it runs (nibabel's orientation)."""
    affine: np.ndarray
    """(4, 4): voxels to millimetres."""


@dataclass(frozen=True)
class Volume:
    """A sample of volumes as a stack of slices."""

    slices: Tensor
    """(S, H, W) float32, as the source reads it; along the axis of the plane, pixels not yet square."""
    mask: Tensor | None
    """(S, H, W) uint8, 255 where unknown; None without masks."""
    spacing: tuple[float, float, float]
    """Distance of slices, height and width of a pixel, in mm."""
    key: str
    """Name of the file."""
    label: int
    """Class of the volume, -1 where unknown."""
    origin: Origin = field(repr=False)
    """How the file lies in the body, for writing a mask back."""

    @classmethod
    def of(cls, sample: Sample) -> Volume:
        """Return a sample of `VolumeSource` as slices."""
        named: Any = sample.named
        apart, down, across = named["spacing"].tolist()
        origin = Origin(named["orientation"].numpy(), named["affine"].numpy())
        spacing, label = (apart, down, across), int(sample.label)
        return cls(sample.value[0], named.get("mask"), spacing, sample.key, label, origin)

    @property
    def square_size(self) -> tuple[int, int]:
        """Return the (H, W) of a slice whose pixels are square, at the finer of the two spacings."""
        _, down, across = self.spacing
        height, width = self.slices.shape[1:]
        if abs(down / across - 1) <= SQUARE:
            return height, width
        finer = min(down, across)
        return max(1, round(height * down / finer)), max(1, round(width * across / finer))


class VolumeSource(Source):
    """Volumes of a folder, with a class each (sub-folders), with a mask each, or with neither.

    A sample is (C, D, H, W) float32, D along the axis of the plane. Values are as stored, in the unit of the file; once
    a value range is settled (`survey.settle`, as `open_source("volumes:…")` does), they are in [0, 1].

    Args:
        path: One volume, or a folder of `.nii`, `.nii.gz` and `.npy` files and of folders of DICOM slices: in
            sub-folders, which are classes; or `images` beside `masks` (also `labels`, and `imagesTr` beside
            `labelsTr`), paired by name.
        plane: Along which axis of the body slices follow one another.
        channel: Which of the images of a 4-D file; default: such files are refused.
        settings: What the user says of the values of masks; default: they are recognised (see `mask_values`). Names
            of the classes are in `classes.txt` in the folder.
        coding: How masks are read, as settled on another source, instead.

    Attributes:
        in_chans: Channels C of a sample: those of 4-D files; a grey volume is repeated.
        coding: How masks are read, None without masks.
        shares: What the masks hold, None without masks.
        mask_names: Names of the classes of voxels, None without masks.

    Raises:
        UsageError: No such folder, no volume in it, volumes without their mask, or masks whose meaning has to be said.
    """

    kind = VOLUME
    in_chans = 1
    usual_range = ValueRange(percentiles=(0.5, 99.5))

    def __init__(
        self,
        path: str,
        plane: Plane = "axial",
        channel: int | None = None,
        settings: MaskSettings | None = None,
        coding: MaskCoding | None = None,
    ) -> None:
        if plane not in AXES:
            raise unknown_name("plane", plane, AXES)
        self.name, self.plane, self.channel = printable(path), plane, channel
        root = existing(path)
        alone = root.is_file() and root.name.endswith(SUFFIXES)
        if not root.is_dir() and not alone:
            raise UsageError(f"there is no folder of volumes {path}")
        self.masks: list[Path] | None = None
        names: list[str] | None = None
        paired = next((pair for pair in FOLDERS if all((root / part).is_dir() for part in pair)), None)
        if paired is not None:
            images, masks = (_volumes_by_name(root / part) for part in paired)
            _check_pairs(images, masks, root / paired[0], root / paired[1])
            self.files = [images[name] for name in sorted(images)]
            self.masks = [masks[name] for name in sorted(images)]
            names = _listed_names(root)
        else:
            self.files = [root] if alone else find_volumes(root)
            if root in self.files:  # one volume: a file, or the folder of its slices
                root = root.parent
            tops = [printable(file.relative_to(root).parts[0]) for file in self.files]
            if len(set(tops)) > 1 and all(len(file.relative_to(root).parts) > 1 for file in self.files):
                names = sorted(set(tops))
                self.labels = np.array([names.index(top) for top in tops], dtype=np.int64)
        if not self.files:
            raise UsageError(
                f"no volume in {path} or below (looked for {', '.join(SUFFIXES)} and folders of DICOM slices)"
            )
        self.root = root
        self.coding: MaskCoding | None = None
        self.shares: MaskShares | None = None
        if self.masks is not None:
            survey = self._survey()
            self.coding = coding or settle(survey, path, settings, names=names)
            try:
                self.shares = self.coding.shares(survey)
            except UnknownValueError as error:
                file = f"the mask {survey.place(error.value, 'values')}"
                raise wrong_value(file, error.value, self.coding, path) from error
            names = list(self.coding.names)
        self.class_names = names
        self.mask_names = names if self.masks is not None else None
        self.palette = colours(len(names)) if names else []
        if self.masks is not None and names is not None:
            self.palette = [(0, 0, 0), *colours(len(names))][: len(names)]

    def __len__(self) -> int:
        """Return the number of volumes."""
        return len(self.files)

    def key(self, index: int) -> str:
        """Return the path of a volume below the folder, as `patchloom.io.printable` writes it."""
        return printable(self.files[index].relative_to(self.root))

    def volume(self, index: int) -> Volume:
        """Return volume number `index` as a stack of slices; raises as `read`."""
        return Volume.of(self.read(index))

    def read(self, index: int) -> Sample:
        """Return volume number `index`, (C, D, H, W) float32.

        Returns:
            With `mask` (D, H, W) uint8, 255 where unknown, where there are masks; `spacing` (3,) float64, the distance
            of slices and height and width of a pixel in mm; `orientation` (3, 2) and `affine` (4, 4) float64 of the
            file.

        Raises:
            UnreadableImageError: The file cannot be decoded.
            UsageError: It is no single volume, or its mask does not fit it.
        """
        image = load_volume(self.files[index], self.key(index))
        values = self._channels(index, image)
        axes = body_axes(image, self.files[index])
        axis = AXES[self.plane]
        spacing = spacing_of(image, axes, self.files[index])
        stack = np.stack([as_slices(channel, axes, axis).astype(np.float32) for channel in values])
        if not np.isfinite(stack).all():
            taken = "the low end of the range" if self.values.known else "0"
            told = f"{self.files[index]} holds values that are not finite; they are taken as {taken}"
            warnings.warn(told, stacklevel=2)
            if not self.values.known:
                stack = np.nan_to_num(stack, nan=0.0, posinf=0.0, neginf=0.0)
        named = {
            "spacing": torch.tensor(spacing[[axis, *IN_PLANE[axis]]], dtype=torch.float64),
            "orientation": torch.tensor(axes, dtype=torch.float64),
            "affine": torch.tensor(image.affine, dtype=torch.float64),
        }
        if self.masks is not None:
            named["mask"] = self._mask(index, image, axis)
        label = -1 if self.labels is None else int(self.labels[index])
        if self.values.known:
            stack = self.values.applied(stack)
        value = torch.from_numpy(np.ascontiguousarray(stack)).expand(self.in_chans, -1, -1, -1)
        return Sample(value, label, self.key(index), named)

    def stored(self, count: int) -> Iterator[tuple[str, Path | bytes]]:
        """Yield names and paths of up to `count` volumes."""
        for index in spread(len(self), count):
            yield self.key(index), self.files[index]

    def arrays(self, count: int) -> Iterator[np.ndarray]:
        """Yield the stored values (1, X, Y, Z) of up to `count` volumes; those that cannot be read are passed over."""
        for index in spread(len(self), count):
            try:
                image = load_volume(self.files[index], self.key(index))
                yield self._channels(index, image)
            except UnreadableImageError:
                continue

    def _channels(self, index: int, image: Any) -> np.ndarray:
        """Return the stored values (C, X, Y, Z): all that are asked for, or one volume that is to be repeated."""
        file, key = self.files[index], self.key(index)
        if self.channel is None and (self.channels is not None or self.in_chans > 1) and len(image.shape) > 3:
            return channel_volumes(image, file, self.channels, self.in_chans, key)
        return single_volume(image, file, self.channel, key)[None]

    def depth(self, index: int) -> int:
        """Return the number of slices of a volume, from its header alone.

        Raises:
            UnreadableImageError: The file cannot be decoded.
        """
        image = load_volume(self.files[index], self.key(index))
        axes = body_axes(image, self.files[index])
        return int(image.shape[axes[:, 0].astype(int).tolist().index(AXES[self.plane])])

    def fingerprint(self) -> str:
        """Return a short hash of names, sizes and times."""
        digest = hashlib.sha256(f"{self.plane} {self.channel}".encode())
        for file in [*self.files, *(self.masks or [])]:
            about = file.stat()
            digest.update(f"{printable(file.relative_to(self.root))}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    def _mask(self, index: int, image: Any, axis: int) -> Tensor:
        assert self.masks is not None
        file = self.masks[index]
        mask = load_volume(file, file.name)
        values = single_volume(mask, file, None, file.name)
        if values.shape != tuple(image.shape[:3]):
            raise UsageError(
                f"the mask {file} has {by(values.shape)} voxels and its volume {by(image.shape[:3])}; both must agree"
            )
        if not np.allclose(mask.affine, image.affine, atol=1e-2, rtol=1e-3):
            warnings.warn(
                f"the mask {file} lies elsewhere in space than its volume; their voxels are taken to belong together",
                stacklevel=3,
            )
        assert self.coding is not None
        try:
            classes = self.coding.decode(_cleaned(values, file))
        except UnknownValueError as error:
            raise wrong_value(f"the mask {file}", error.value, self.coding, self.name) from error
        # The mask lies on its volume voxel by voxel, so it turns as its volume does.
        turned = as_slices(classes, body_axes(image, file), axis)
        return torch.from_numpy(np.ascontiguousarray(turned).astype(np.uint8))

    def _survey(self) -> Survey:
        """Return the count over the masks; those that cannot be read are passed over."""
        assert self.masks is not None
        survey = Survey()
        for file in track(self.masks, "looking at masks", unit="mask"):
            try:
                survey.add_array(_cleaned(np.asanyarray(load_volume(file, file.name).dataobj), file), str(file))
            except UnreadableImageError:
                continue
        return survey


class SliceSource(Source):
    """The slices of volumes as images with their mask, for training a decoder.

    Args:
        volumes: With masks.
        window: How grey values become 0 … 255, see `windowed`.
        in_chans: Channels of the encoder; the grey image is repeated.
    """

    def __init__(self, volumes: VolumeSource, window: Window = "minmax", in_chans: int = 3) -> None:
        if volumes.masks is None:
            raise UsageError(f"{volumes.name} has no masks; put volumes in images and masks of the same names in masks")
        self.volumes, self.window, self.in_chans = volumes, window, in_chans
        self.name, self.class_names = volumes.name, volumes.class_names
        self.broken: list[tuple[str, str]] = []
        self.places: list[tuple[int, int]] = []
        for index in range(len(volumes)):
            try:
                count = volumes.depth(index)
            except UnreadableImageError as error:
                self.broken.append((error.key, error.reason))
                continue
            self.places += [(index, number) for number in range(count)]
        if not self.places:
            raise UsageError(f"no volume of {volumes.name} is readable; the first is {self.broken[0][0]!r}")
        self._kept: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self.places)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the volumes in memory behind: each worker reads its own."""
        return {**vars(self), "_kept": OrderedDict()}

    def key(self, index: int) -> str:
        """Return the volume's name and the slice's number."""
        volume, number = self.places[index]
        return f"{self.volumes.key(volume)}#{number}"

    def read(self, index: int) -> Sample:
        """Return slice number `index` (C, H, W) uint8, pixels square, with its `mask` (H, W)."""
        volume, number = self.places[index]
        if volume not in self._kept:
            found = self.volumes.volume(volume)
            assert found.mask is not None
            self._kept[volume] = as_images(found, self.window), square_masks(found)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(volume)
        images, masks = self._kept[volume]
        picture = images[number].expand(self.in_chans, -1, -1)
        return Sample(picture, -1, self.key(index), {"mask": masks[number]})

    def fingerprint(self) -> str:
        """Return the fingerprint of the volumes."""
        return self.volumes.fingerprint()


def open_volumes(
    path: str,
    *,
    plane: Plane = "axial",
    channel: int | None = None,
    settings: MaskSettings | None = None,
    coding: MaskCoding | None = None,
) -> VolumeSource:
    """Return the volumes of a folder, see `VolumeSource`.

    Raises:
        UsageError: As `VolumeSource`.
        MissingExtraError: Without nibabel.
    """
    import_nibabel()
    return VolumeSource(path.removeprefix("volumes:"), plane, channel, settings, coding)


def open_samples(
    path: Path, in_chans: int = 1, settings: MaskSettings | None = None, coding: MaskCoding | None = None
) -> VolumeSource:
    """Open `volumes:PATH`: whole volumes for encoders of them; raises as `open_volumes`."""
    source = open_volumes(str(path), settings=settings, coding=coding)
    source.name, source.in_chans = f"volumes:{source.name}", in_chans
    return source


def as_images(volume: Volume, window: Window = "minmax") -> Tensor:
    """Return the slices as grey images (S, 1, H, W) uint8, windowed, with square pixels.

    Pixels that are not square are resampled to square ones, with a warning.
    """
    grey = windowed(volume.slices, window)
    size = volume.square_size
    if size != tuple(grey.shape[1:]):
        _, down, across = volume.spacing
        warnings.warn(
            f"{volume.key} has pixels of {down:.3g} x {across:.3g} mm; its slices are resampled to square ones "
            f"({by(grey.shape[1:])} to {by(size)})",
            stacklevel=2,
        )
    images = (grey * 255).round().to(torch.uint8)[:, None]
    return torch.stack([resize(image, size, "bilinear") for image in images])


def square_masks(volume: Volume) -> Tensor:
    """Return the masks (S, H, W) uint8 at the size of `as_images`, by the nearest voxel."""
    assert volume.mask is not None
    size = volume.square_size
    if size == tuple(volume.mask.shape[1:]):
        return volume.mask
    return torch.nn.functional.interpolate(volume.mask[:, None], size=size, mode="nearest-exact")[:, 0]


def windowed(slices: Tensor, window: Window = "minmax") -> Tensor:
    """Return grey values in [0, 1].

    Args:
        slices: (S, H, W).
        window: `minmax`: each slice from its least to its greatest value, as published; `ct`: -1024 to 600 Hounsfield
            units; `mr`: the 5th to the 95th percentile of the volume. A constant slice or volume is 0.

    Raises:
        UsageError: Unknown window.
    """
    if window == "minmax":
        low, high = slices.amin((1, 2), keepdim=True), slices.amax((1, 2), keepdim=True)
    elif window == "ct":
        low, high = torch.tensor(CT_WINDOW[0]), torch.tensor(CT_WINDOW[1])
    elif window == "mr":
        ends = np.percentile(slices.numpy(), MR_PERCENTILES)
        low, high = torch.tensor(float(ends[0])), torch.tensor(float(ends[1]))
    else:
        raise unknown_name("window", str(window), ("minmax", "ct", "mr"))
    spread = high - low
    return torch.where(spread > 0, (slices - low) / spread.clamp(min=1e-12), 0.0).clamp(0, 1)


def save_mask(mask: Tensor, volume: Volume, plane: Plane, path: Path) -> None:
    """Write a mask (S, H, W) of a volume as NIfTI, on the file's own axes and with its affine; atomically."""
    nibabel = import_nibabel()
    axes, affine = volume.origin
    axis = AXES[plane]
    body = np.flip(mask.numpy(), 1).transpose(np.argsort((axis, *IN_PLANE[axis])))
    back = nibabel.orientations.ornt_transform(BODY, axes)
    stored = nibabel.orientations.apply_orientation(body, back).astype(np.uint8)
    with written_whole(path) as temporary:
        nibabel.save(nibabel.Nifti1Image(stored, affine), temporary)


def _cleaned(values: np.ndarray, file: Path) -> np.ndarray:
    """Return the values of a mask, those that are whole but for rounding as whole numbers."""
    if not np.issubdtype(values.dtype, np.floating):
        return values
    if not np.isfinite(values).all():
        raise UsageError(f"the mask {file} holds values that are not finite")
    whole = np.rint(values)
    return whole if np.allclose(values, whole, atol=1e-3) else values


def _volumes_by_name(folder: Path) -> dict[str, Path]:
    """Return the volumes of a folder by what pairs them: their name without suffix and nnU-Net's channel number."""
    found: dict[str, Path] = {}
    for file in find_volumes(folder):
        stem = bare_name(file, folder).removesuffix("_0000")
        if stem in found:
            raise UsageError(f"{folder} holds two volumes for {stem}: {found[stem].name} and {file.name}")
        found[stem] = file
    return found


def _check_pairs(images: dict[str, Path], masks: dict[str, Path], image_root: Path, mask_root: Path) -> None:
    for have, lack, kind, other, root in (
        (images, masks, "volume", "mask", mask_root),
        (masks, images, "mask", "volume", image_root),
    ):
        lone = sorted(set(have) - set(lack))
        if lone:
            more = f" (and {len(lone) - 1} more)" if len(lone) > 1 else ""
            raise UsageError(f"the {kind} {have[lone[0]].name}{more} has no {other} of that name in {root}")


def _listed_names(root: Path) -> list[str] | None:
    for place in (root, root.parent):
        if (place / "classes.txt").is_file():
            lines = (place / "classes.txt").read_text(encoding="utf-8").splitlines()
            return [line.strip() for line in lines if line.strip()]
    return None
