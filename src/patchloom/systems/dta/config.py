"""Settings of the Downstream Transfer Attack and what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MinLen

from patchloom.base.fractions import parse_epsilon, parse_fraction
from patchloom.base.ranges import Count, NonNegative, PositiveInt, Probability
from patchloom.base.source_options import SourceOptions
from patchloom.errors import UsageError

AttackName = Literal[
    "noise",
    "pgd",
    "feature_l2",
    "last",
    "middle",
    "flat",
    "pap",
    "mi",
    "di",
    "ti",
    "dta",
    "universal",
    "white_box",
    "auto_attack",
]
"""What can be tried; `systems/dta.md` in the documentation has a line on each."""
Level = Annotated[int, Ge(1), Le(255)]
"""A change of a pixel in 1/255."""
OF_VICTIM: frozenset[str] = frozenset({"white_box", "auto_attack"})
"""Attacks that know the victim, and are made for each."""
DEFAULT_ATTACKS: tuple[AttackName, ...] = (
    "noise",
    "pgd",
    "feature_l2",
    "last",
    "middle",
    "flat",
    "pap",
    "dta",
    "white_box",
)


@dataclass(frozen=True, kw_only=True)
class DTAConfig(SourceOptions):
    """Settings of the Downstream Transfer Attack and what it is compared with."""

    encoder: Any
    """Public encoder the attacker knows: bundle, run or timm model; several (a,b) are attacked together"""
    victim: Any
    """Models to attack, made from it: runs of patchloom adapt (adapters, too) or bundles, such as runs/a,runs/b"""
    data: str
    """Labelled images to attack: a folder with a folder per class, FILE.csv, torchvision:NAME:test …"""
    out: str
    """Folder for attacked images, figures and report; empty or absent unless resume or overwrite is set"""
    attacks: Annotated[tuple[AttackName, ...], MinLen(1)] = DEFAULT_ATTACKS
    """Attacks to make, such as [noise,dta,white_box]; also mi, di, ti, universal and auto_attack (torchattacks)"""
    eps: str | float = "10/255"
    """ε, the largest change of a pixel value in [0, 1], such as 8/255"""
    step_size: str | float = "2/255"
    """α, how far a step goes"""
    steps: PositiveInt = 40
    """Steps of every attack"""
    search_steps: PositiveInt = 10
    """Steps on each block in the search for the most vulnerable one"""
    search_images: PositiveInt = 128
    """Images the search looks at"""
    candidates: tuple[int, ...] = ()
    """Blocks searched, from 0, such as [3,5,7]; default: all"""
    score: Literal["last", "own", "mean"] = "last"
    """Where an attack on a block is judged: at the last block, at that block, or over all"""
    per: Literal["dataset", "sample"] = "dataset"
    """One choice of block for all images, or one for each (as many searches)"""
    top_k: PositiveInt = 1
    """Blocks attacked together"""
    tokens: Literal["all", "patches", "cls"] = "all"
    """Tokens whose cosine counts; patches leaves out class token and registers"""
    optimizer: Literal["sign", "adam_tanh"] = "sign"
    """How feature attacks step: signs of gradients (paper), or Adam on a tanh (OpenTAI's taiadv)"""
    momentum: NonNegative = 0.0
    """Momentum of dta's steps; 1 as published for MI"""
    diversity: Probability = 0.0
    """Chance that images are shrunk and padded at random before a step of dta; 0.5 as published for DI"""
    smoothing: bool = False
    """Smooth dta's gradients, as TI does"""
    restarts: PositiveInt = 1
    """Random starts of which each image keeps the best"""
    quantise: bool = True
    """Measure attacked images as 8 bits store them, rounded towards the clean ones"""
    limit: PositiveInt = 200
    """Most images attacked, drawn at random"""
    curve_images: Count = 64
    """Images of the curves over ε and steps; 0 for no curves"""
    curve_levels: Annotated[tuple[Level, ...], MinLen(2)] = (1, 2, 4, 8, 16)
    """ε of the curve, in 1/255"""
    pictured: Count = 6
    """Images drawn in the report"""
    save_images: bool = True
    """Write attacked images as PNG, beside the perturbations"""
    deterministic: bool = False
    """Use attention whose gradients are the same every time on a GPU, too; slower"""
    batch_size: PositiveInt = 32
    """Images at a time"""
    num_workers: Count = 2
    """Processes that read images"""
    device: str = "auto"
    """Where the models compute: auto, cpu, cuda or cuda:1"""
    seed: Count = 0
    """Seed of the draw of images and of random starts"""
    resume: bool = False
    """Go on with the attacks in out: those that are complete are not made again"""
    overwrite: bool = False
    """Replace earlier attacks in out"""

    @property
    def epsilon(self) -> float:
        """ε as a number."""
        return parse_fraction("eps", self.eps)

    @property
    def alpha(self) -> float:
        """α as a number."""
        return parse_fraction("step_size", self.step_size)

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        for name in ("eps", "step_size"):
            object.__setattr__(self, name, parse_fraction(name, getattr(self, name)))
        parse_epsilon("eps", self.eps)
        if not self.alpha > 0:
            raise UsageError(f"step_size is {self.alpha:g}; it must be above 0, such as 2/255")
        if self.optimizer == "adam_tanh" and (self.momentum or self.smoothing):
            raise UsageError("momentum and smoothing belong to optimizer=sign; Adam has its own")
        if "universal" in self.attacks and self.per == "sample":
            raise UsageError("universal is one noise for all images, so there is no per=sample for it; leave one out")
        if self.resume and self.overwrite:
            raise UsageError("resume keeps the attacks in out and overwrite deletes them; set one of them")


def listed(names: Any) -> list[Any]:
    """Return what was named, one or several: text with commas, a list, or a module by itself."""
    if isinstance(names, str):
        return [name.strip() for name in names.split(",") if name.strip()]
    return list(names) if isinstance(names, Sequence) else [names]
