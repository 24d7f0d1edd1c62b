"""Settings every evaluation of an encoder on labelled images shares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from annotated_types import Ge

from patchloom.base.choices import Pool, Precision, View
from patchloom.base.ranges import Count, PositiveInt
from patchloom.base.sizes import Size
from patchloom.base.source_options import SourceOptions
from patchloom.errors import UsageError, unknown_name

PIXELS = "pixels"


Resample = Literal["images", "classes"]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(SourceOptions):
    """Settings every evaluation shares."""

    encoder: Any
    """Bundle, run, timm model with published weights, or the word pixels for raw pixels; from Python also a module"""
    train: str
    """Labelled images to learn from: a folder with a sub-folder per class, photos, torchvision:NAME …"""
    test: str
    """Labelled images to measure on; their classes are among those of train"""
    untrained: bool = False
    """Give the encoder fresh weights first: what training has to beat"""
    image_size: Size | None = None
    """Side images are resized and cropped to, or height and width (256,128); default: the encoder's (32 for raw
    pixels)"""
    view: View = "crop"
    """What is shown of an image: crop, its centre; whole, all of it, out of proportion, each channel stretched to its
    full range (radiology)"""
    pool: Pool = "auto"
    """How tokens become one vector: as the encoder does, class token, mean over patches, or both"""
    precision: Precision = "32"
    """Number format of the encoder's arithmetic"""
    batch_size: PositiveInt = 128
    """Images at a time"""
    num_workers: Count = 2
    """Processes that read images"""
    device: str = "auto"
    """Where the encoder computes: auto, cpu, cuda or cuda:1"""
    seed: Count = 0
    """Seed of fresh weights and of whatever is drawn"""
    draws: Annotated[int, Ge(2)] = 1000
    """Bootstrap draws behind the 95 % interval of each score"""
    resample: Resample = "images"
    """What bootstrap draws choose from: images, all alike; or classes, as many images of each as there are, which takes
    the shares of the classes as given and is narrower"""
    groups: str | None = None
    """CSV file (columns key, group): test images of one group (patient, slide, scene) are not independent, so intervals
    and comparisons draw whole groups"""
    cache: str = "auto"
    """Folder where features are kept for the next evaluation (see patchloom cache); auto is its usual place, none keeps
    nothing"""
    predictions: str | None = None
    """Also write what was said of each test image to this .npz file, for patchloom evaluate compare"""
    out: str | None = None
    """Also write the figures to this JSON file; it must not exist yet"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        check_resample(self.resample, grouped=self.groups is not None)
        if self.out is not None and Path(self.out).exists():
            raise UsageError(f"{self.out} exists; choose another out")
        if self.predictions is not None:
            check_free(Path(self.predictions))
        if self.untrained and is_pixels(self.encoder):
            raise UsageError("raw pixels have no weights to leave untrained; drop untrained")


def is_pixels(encoder: Any) -> bool:
    """Tell whether raw pixels are meant in place of an encoder."""
    return isinstance(encoder, (str, Path)) and str(encoder) == PIXELS


def check_free(path: Path) -> None:
    """Refuse a place for predictions that is taken or ends in something else than .npz."""
    if path.suffix != ".npz":
        raise UsageError(f"predictions is {path}; name a file that ends in .npz")
    if path.exists():
        raise UsageError(f"{path} exists; choose another file for predictions")


def check_resample(resample: str, grouped: bool = False) -> None:
    """Refuse what the bootstrap cannot draw.

    Args:
        resample: What it is to choose from.
        grouped: Whether it draws whole groups.

    Raises:
        UsageError: Unknown, or classes where groups are drawn.
    """
    if resample not in get_args(Resample):
        raise unknown_name("resample", resample, get_args(Resample))
    if grouped and resample == "classes":
        raise UsageError("resample is classes, and groups are drawn whole; leave one of resample and groups out")
