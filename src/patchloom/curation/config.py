"""Settings of `patchloom data inspect`, `dedup`, `split`, `curate` and `shards`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from patchloom.base.ranges import Count, PositiveInt, Share
from patchloom.base.source_options import SourceOptions
from patchloom.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class LookOptions(SourceOptions):
    """How images are read and compared."""

    data: str
    """Images: a folder, a table, shards, or a source such as photos, digits, torchvision:CIFAR10"""
    in_chans: PositiveInt = 3
    """Channels the images are read as: 3 for RGB, 1 for grey, or as many as the files have"""
    encoder: Any = None
    """Compare images by an encoder's features (bundle, run, timm model), which see a copy behind a crop as well;
    default: by the coarse pattern of light and dark, which needs no model and tells recompressed, resized and
    brightened copies"""
    threshold: Share | None = None
    """Cosine similarity from which on two images are near-duplicates; default: what 95 of 100 copies reach that are
    made of a sample of the images (recompressed, half-sized, trimmed by 2 % at each side, brightened)"""
    batch_size: PositiveInt = 128
    """Images at a time"""
    num_workers: Count = 2
    """Processes that read images"""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or cuda:1"""
    seed: Count = 0
    """Seed of the sample that copies are made of, and of what is drawn"""


@dataclass(frozen=True, kw_only=True)
class InspectConfig(LookOptions):
    """What a pile of images holds, before anything is trained on it."""

    test: str | None = None
    """Images that are to be kept apart from these: their copies among `data` are a leak"""
    out: str | None = None
    """Folder to write to: report.html, images.csv (a row for each image), duplicates.csv, summary.json"""
    overwrite: bool = False
    """Replace files of an earlier look in `out`"""


@dataclass(frozen=True, kw_only=True)
class DedupConfig(LookOptions):
    """List the images without copies; no image is deleted or moved."""

    out: str
    """CSV file to write: the images to keep, to be given as data; NAME-left-out.csv beside it has the others"""
    against: str | None = None
    """Also leave out what is a copy of one of these images, such as those of the test"""
    overwrite: bool = False
    """Replace the files if they are there"""


@dataclass(frozen=True, kw_only=True)
class SplitConfig(LookOptions):
    """Divide images into parts that share no copy: by class where there are classes, groups kept together."""

    out: str
    """CSV file to write: file, label and split; FILE.csv:train, FILE.csv:val and so on are given as data then"""
    parts: str = "train=0.8,val=0.1,test=0.1"
    """Names of the parts and their shares, which sum to 1"""
    groups: str | None = None
    """CSV file (columns key and group) of images that belong together, such as those of a patient"""
    together: bool = True
    """Keep near-duplicates in one part"""
    overwrite: bool = False
    """Replace the file if it is there"""

    def __post_init__(self) -> None:
        """Refuse parts that are no shares of one."""
        super().__post_init__()
        shares = self.shares()
        if abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) <= 0:
            raise UsageError(f"the shares of parts={self.parts} are to be above 0 and to sum to 1")

    def shares(self) -> dict[str, float]:
        """Return the share of each part by its name.

        Raises:
            UsageError: It is not written as name=share,name=share, or a name comes twice.
        """
        shares: dict[str, float] = {}
        for text in self.parts.split(","):
            name, _, share = (word.strip() for word in text.partition("="))
            try:
                value = float(share)
            except ValueError:
                value = -1.0
            if not name or name in shares or value < 0:
                raise UsageError(f"parts is {self.parts}; write names and shares, such as train=0.8,val=0.1,test=0.1")
            shares[name] = value
        return shares


@dataclass(frozen=True, kw_only=True)
class CurateConfig(LookOptions):
    """Choose a balanced part of many images, so that what is rare is not drowned by what is common."""

    out: str
    """CSV file to write: the images chosen, to be given as data"""
    count: PositiveInt
    """Images to choose"""
    levels: tuple[PositiveInt, ...] | None = None
    """Clusters of each level, falling, such as 3000,300,30; default: a quarter of the images, and a tenth of each level
    below, down to 10 (paper: four levels)"""
    resampling: Count = 3
    """Times the clusters of each level above the first are made again from the points next to their centres"""
    iters: PositiveInt = 20
    """Iterations of k-means"""
    overwrite: bool = False
    """Replace the file if it is there"""

    def __post_init__(self) -> None:
        """Refuse levels that do not fall."""
        super().__post_init__()
        levels = self.levels or ()
        if any(low >= high for high, low in pairwise(levels)):
            raise UsageError(f"levels is {','.join(map(str, levels))}; the numbers of clusters are to fall")


@dataclass(frozen=True, kw_only=True)
class ShardsConfig(SourceOptions):
    """Write images as tar shards, their files as they are; a command that was stopped goes on where it was."""

    data: str
    """Folder of images, or a table that lists images"""
    out: str
    """Folder to write to: NAME-000000.tar and so on, and shards.json"""
    shard_mb: PositiveInt = 256
    """Size of a shard in mebibytes, at most (one image at least)"""
    shuffle: bool = True
    """Write the images in a random order, so that each shard is a sample of all"""
    seed: Count = 0
    """Seed of that order"""
    overwrite: bool = False
    """Replace shards that were made of other images or with other settings"""
