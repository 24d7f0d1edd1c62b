"""Anomalib's data and metrics with our detectors, where it is installed (https://github.com/open-edge-platform/anomalib).

Its data modules are read as sources of this library, our maps go into its metrics, and a trained detector becomes a
module that answers as its own do.

>>> from anomalib.data import MVTecAD  # doctest: +SKIP
>>> module = MVTecAD(root="data/mvtec", category="bottle")  # doctest: +SKIP
>>> run = pl.anomaly("ear", data=module, out="runs/bottle")  # doctest: +SKIP
>>> detector = to_anomalib(run)  # doctest: +SKIP
>>> anomalib_figures(score_images(detector.detector, defect_sets(module).test, (256, 256)))  # doctest: +SKIP
{'image_AUROC': 0.97, 'image_F1Max': 0.95, 'pixel_AUROC': 0.96, 'pixel_AUPRO': 0.91, 'pixel_F1Max': 0.6}
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patchloom.data.base import Sample, Source, spread
from patchloom.data.decode import decode_image
from patchloom.data.defects import DEFECT_CLASS, GOOD_CLASS, DefectSets, DefectSource
from patchloom.data.reading import Reading, reading_options
from patchloom.errors import MissingExtraError, UsageError
from patchloom.evaluate.anomaly.measure import Scored
from patchloom.io import printable
from patchloom.systems.ear.data import MODULE
from patchloom.systems.ear.saved import load_ear

Array = np.ndarray
IMAGE_METRICS, PIXEL_METRICS = ("AUROC", "F1Max"), ("AUROC", "AUPRO", "F1Max")


class AnomalibImages(Source):
    """The images of a data set of anomalib, read by this library: its files, without its transforms.

    Args:
        dataset: An `AnomalibDataset`, or anything else with a table `samples` of `image_path`.
        in_chans: Channels the images are read as, 3 or 1.

    Raises:
        UsageError: It lists no image.
    """

    def __init__(self, dataset: Any, in_chans: int = 3) -> None:
        self.name = f"{MODULE}{dataset.name}"
        self.files = [str(path) for path in dataset.samples["image_path"]]
        if not self.files:
            raise UsageError(f"{self.name} lists no image here")
        self.root = Path(_above_all(self.files))
        self.in_chans = in_chans

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def key(self, index: int) -> str:
        """Return the path of image number `index` below the folder all lie in."""
        return printable(Path(self.files[index]).absolute().relative_to(self.root).as_posix())

    def read(self, index: int) -> Sample:
        """Return image number `index`."""
        key = self.key(index)
        return Sample(
            decode_image(Path(self.files[index]), key, self.in_chans, "invert", self.values, self.channels), -1, key
        )

    def stored(self, count: int) -> Iterator[tuple[str, Path | bytes]]:
        """Yield names and paths of up to `count` images."""
        for index in spread(len(self), count):
            yield self.key(index), Path(self.files[index])

    def fingerprint(self) -> str:
        """Return a short hash of names, sizes and times."""
        digest = hashlib.sha256()
        for file in self.files:
            status = Path(file).stat()
            digest.update(repr((file, status.st_size, status.st_mtime_ns)).encode())
        return digest.hexdigest()[:16]


def defect_sets(module: Any, in_chans: int = 3, **options: Any) -> DefectSets:
    """Return the images of a data module of anomalib: good ones to learn from, and those to measure on.

    Its splits are taken as they are (`train_data`, `test_data`; its validation images are left alone), its transforms
    are not: images are read and resized as everywhere in this library.

    Args:
        module: An `AnomalibDataModule`; it is set up if it has not been.
        in_chans: Channels the images are read as, 3 or 1.
        **options: How pixels are read: `value_range`, `no_data`, `use_channels`.

    Raises:
        UsageError: No good image to learn from, an image with a defect among them, or a defect without its mask where
            others have one.
    """
    reading = Reading.of(options)
    if options:
        name, value = next(iter(options.items()))
        raise UsageError(f"{name} is {value}, which a data module of anomalib cannot obey; leave it out")
    if getattr(module, "train_data", None) is None:
        module.setup()
    learnt = module.train_data
    labels = _labels(learnt)
    if any(label == DEFECT_CLASS for label in labels):
        place = labels.index(DEFECT_CLASS)
        raise UsageError(f"{learnt.samples['image_path'][place]} is to be learnt from as good and labelled a defect")
    good = reading.given_to(AnomalibImages(learnt, in_chans))
    tested = getattr(module, "test_data", None)
    if tested is None or not len(tested):
        return DefectSets(good, None)
    images = Reading.of(reading_options(good)).given_to(AnomalibImages(tested, in_chans), quiet=True)
    return DefectSets(good, _tested(tested, images))


def _tested(dataset: Any, images: AnomalibImages) -> DefectSource:
    samples, labels = dataset.samples, _labels(dataset)
    if unknown := [number for number, label in enumerate(labels) if label not in (GOOD_CLASS, DEFECT_CLASS)]:
        raise UsageError(f"{samples['image_path'][unknown[0]]} is neither good nor a defect; label it or leave it out")
    named = list(samples["label"]) if "label" in samples else [""] * len(labels)
    kinds = [
        "good" if label == GOOD_CLASS else str(kind) or "defect" for label, kind in zip(labels, named, strict=True)
    ]
    given = list(samples["mask_path"]) if "mask_path" in samples else [None] * len(labels)
    masks = [
        Path(file) if label == DEFECT_CLASS and isinstance(file, str | Path) and str(file) else None
        for label, file in zip(labels, given, strict=True)
    ]
    defects = [number for number, label in enumerate(labels) if label == DEFECT_CLASS]
    lacking = [number for number in defects if masks[number] is None]
    if len(lacking) == len(defects):
        return DefectSource(images.name, images, labels, kinds)
    if lacking:
        raise UsageError(f"{samples['image_path'][lacking[0]]} has a defect and no mask, where others have one")
    return DefectSource(images.name, images, labels, kinds, masks)


class AnomalibDetector(nn.Module):
    """A detector of defects that answers as anomalib's models do when they are in eval mode.

    Args:
        detector: From images (B, C, H, W) in [0, 1] to `anomaly_map` and `pred_score`.
        threshold: Score from which on an image is called a defect.
        pixel_threshold: Value of the map from which on a pixel is.
    """

    def __init__(self, detector: nn.Module, threshold: float, pixel_threshold: float) -> None:
        super().__init__()
        self.detector = detector
        self.threshold, self.pixel_threshold = threshold, pixel_threshold

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        """Return an `InferenceBatch`: pred_score and pred_label (B,), anomaly_map and pred_mask (B, 1, H, W)."""
        found = self.detector(images)
        score, maps = found["pred_score"], found["anomaly_map"]
        return _anomalib("data").InferenceBatch(
            pred_score=score,
            pred_label=score >= self.threshold,
            anomaly_map=maps,
            pred_mask=maps >= self.pixel_threshold,
        )


def to_anomalib(run: Any) -> AnomalibDetector:
    """Return the trained detector of a run as a module that answers as anomalib's do.

    Images are (B, C, H, W) in [0, 1], of the size the detector was trained at.

    Args:
        run: What `patchloom.anomaly` returned, or its folder.

    Raises:
        UsageError: It is no run of `anomaly`, or its encoder is not to be found.
        MissingExtraError: Anomalib is not installed.
    """
    _anomalib("data")
    model = load_ear(getattr(run, "path", run)).model.eval()
    return AnomalibDetector(model, float(model.threshold), float(model.pixel_threshold)).eval()


def batches(scored: Scored, size: int = 32) -> Iterator[Any]:
    """Yield scores and maps as anomalib's `ImageBatch`, which all its metrics take.

    Images are left out of it: `image` is of zeros.

    Args:
        scored: Images as a detector sees them (`patchloom.evaluate.anomaly.measure.score_images`), with their maps.
        size: Images of a batch.

    Raises:
        MissingExtraError: Anomalib is not installed.
    """
    data = _anomalib("data")
    for start in range(0, len(scored.keys), size):
        some = slice(start, start + size)
        maps = torch.from_numpy(np.stack(scored.maps[some]))
        masks = None
        if scored.has_masks:
            empty = np.zeros(maps.shape[-2:], bool)
            masks = torch.from_numpy(np.stack([empty if mask is None else mask for mask in scored.masks[some]]))
        yield data.ImageBatch(
            image=torch.zeros(len(maps), 3, *maps.shape[-2:]),
            gt_label=torch.tensor(scored.labels[some]),
            gt_mask=masks,
            image_path=scored.keys[some],
            anomaly_map=maps,
            pred_score=torch.tensor(scored.scores[some]),
        )


def anomalib_figures(
    scored: Scored,
    image_metrics: Sequence[str] = IMAGE_METRICS,
    pixel_metrics: Sequence[str] = PIXEL_METRICS,
) -> dict[str, float]:
    """Return what scores and maps are worth by anomalib's own metrics.

    Args:
        scored: Images as a detector sees them, with their maps.
        image_metrics: Names in `anomalib.metrics` that are measured of scores.
        pixel_metrics: Names that are measured of maps; of none where masks are not known.

    Returns:
        Values by name, such as `image_AUROC` and `pixel_AUPRO`.

    Raises:
        UsageError: A name anomalib does not have.
        MissingExtraError: Anomalib is not installed.
    """
    metrics = _anomalib("metrics")
    made = [("image", name, ["pred_score", "gt_label"]) for name in image_metrics]
    if scored.has_masks:
        made += [("pixel", name, ["anomaly_map", "gt_mask"]) for name in pixel_metrics]
    if unknown := [name for _, name, _ in made if not hasattr(metrics, name)]:
        raise UsageError(f"anomalib has no metric {unknown[0]!r}; it has {', '.join(sorted(metrics.__all__))}")
    known = {f"{what}_{name}": getattr(metrics, name)(fields=fields) for what, name, fields in made}
    for batch in batches(scored):
        for metric in known.values():
            metric.update(batch)
    return {name: float(metric.compute()) for name, metric in known.items()}


def is_anomalib(data: Any) -> bool:
    """Tell whether something is a data module of anomalib, without importing it."""
    return not isinstance(data, str | Path) and hasattr(data, "setup") and hasattr(data, "train_dataloader")


def _labels(dataset: Any) -> list[int]:
    samples = dataset.samples
    return [int(label) for label in samples["label_index"]] if "label_index" in samples else [GOOD_CLASS] * len(samples)


def _above_all(files: Sequence[str]) -> str:
    """Return the deepest folder that all files lie in."""
    return os.path.commonpath([Path(file).absolute().parent for file in files])


def _anomalib(part: str) -> Any:
    """Return `anomalib.PART`.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return import_module(f"anomalib.{part}")
    except ImportError as error:
        raise MissingExtraError("anomalib", "anomalib", "this adapter") from error
