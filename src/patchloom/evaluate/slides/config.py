"""Settings of the slide-level evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, MinLen

from patchloom.base.choices import Average, MILHeadName, Pool, Precision, TileChoice
from patchloom.base.ranges import Count, NonNegative, Positive, PositiveInt
from patchloom.errors import UsageError
from patchloom.evaluate.slides.fit_config import FitSettings
from patchloom.evaluate.slides.tile_config import TileSettings


@dataclass(frozen=True, kw_only=True)
class SlidesConfig(TileSettings):
    """Settings of the slide-level evaluation."""

    train: str
    """Tile features of the training cohort (a folder made by slides embed); with encoder set: its slides"""
    train_labels: str
    """CSV with the columns slide and label, and patient where there are several slides of one"""
    test: str | None = None
    """Tile features (or slides) of a test cohort from elsewhere; default: cross-validation on train is all there is"""
    test_labels: str | None = None
    """CSV of the test cohort"""
    compare: str | None = None
    """Tile features of the same training slides by another encoder, to be compared slide by slide"""
    compare_test: str | None = None
    """Tile features of the same test slides by the other encoder"""
    encoder: Any = None
    """Make the features first, with this bundle, run or timm model; default: train and test hold features"""
    store: str = "tile-features"
    """Where features made with encoder are kept, a folder for each set of slides and encoder"""
    untrained: bool = False
    """Give the encoder fresh weights: what training has to beat"""
    image_size: PositiveInt | None = None
    """Side tiles are resized to; default: the encoder's"""
    pool: Pool = "auto"
    """How tokens become one vector: as the encoder does, class token, mean over patches, or both"""
    precision: Precision = "32"
    """Number format of the encoder's arithmetic"""
    num_workers: Count = 2
    """Threads that read tiles"""
    head: MILHeadName = "abmil"
    """How tiles become one answer"""
    head_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the head, such as --head_args.temperature 2"""
    task: Literal["auto", "binary", "multiclass", "survival"] = "auto"
    """What is asked; auto: two classes or several, as the labels say; survival: times, negative where censored"""
    label_column: str = "label"
    """Column of the label"""
    slide_column: str = "slide"
    """Column of the slide's name"""
    patient_column: str = "patient"
    """Column of the patient, if there is one"""
    missing: str | None = None
    """Words that stand for a missing label besides an empty cell, separated by commas (NA,?)"""
    n_tiles: PositiveInt | None = 1000
    """Most tiles of a slide that are read; null: all"""
    choice: TileChoice = "random"
    """Which: a random subset that is always the same, or the first ones"""
    folds: Annotated[int, Ge(2)] = 5
    """Parts of the training patients"""
    repeats: PositiveInt = 3
    """Times they are parted anew; folds x repeats models answer together"""
    lr: Annotated[tuple[Positive, ...], MinLen(1)] = (1e-3, 1e-4)
    """Learning rates of Adam to choose from"""
    weight_decay: Annotated[tuple[NonNegative, ...], MinLen(1)] = (0.0, 1e-4)
    """Weight decays to choose from"""
    epochs: PositiveInt = 50
    """Most passes over the slides; the best number is chosen"""
    batch_size: PositiveInt = 16
    """Slides per step"""
    average: Average = "probabilities"
    """What the models' answers are averaged as"""
    epoch_as_published: bool = False
    """Count the best epoch from 0, as the published code does"""
    nested: bool = False
    """Also choose inside outer folds (folds x folds x repeats): an unbiased score where there is no test cohort"""
    interval_kind: Literal["auto", "percentile", "basic"] = "auto"
    """Interval of the score; auto holds where patients are few, basic (a bootstrap) is the published benchmark's"""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or cuda:1"""
    seed: Count = 0
    """Seed of weights and of the order of the slides"""
    out: str | None = None
    """Also write a folder with report.html, summary.json, predictions.csv and the models; it must not exist yet"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        if (self.test is None) != (self.test_labels is None):
            raise UsageError("a test cohort needs both test and test_labels")
        if (self.compare_test is not None) != (self.compare is not None and self.test is not None):
            raise UsageError("a comparison needs compare, and compare_test where there is a test cohort")
        if self.compare is not None and self.encoder is not None:
            raise UsageError("compare takes tile features; make those of both encoders with patchloom slides embed")
        if self.out is not None and Path(self.out).exists():
            raise UsageError(f"{self.out} exists; choose another out")
        self.fit_settings()

    def fit_settings(self) -> FitSettings:
        """Return how heads are trained."""
        from patchloom.features.extract import torch_device

        return FitSettings(
            head=self.head,
            head_args=self.head_args,
            lr=self.lr[0],
            weight_decay=self.weight_decay[0],
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=self.seed,
            device=str(torch_device(self.device)),
        )
