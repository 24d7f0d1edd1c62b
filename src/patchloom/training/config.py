"""Settings every training command shares, and how they are read, checked and written.

A method adds its own by subclassing `TrainConfig`. The text under each field is the only place where its
meaning stands: `--help` and the docs are made from it.

>>> from patchloom.training.config import TrainConfig, config_from_mapping
>>> config = config_from_mapping(TrainConfig, {"data": "photos", "out": "runs/a", "encoder": "vit_tiny_patch16_224"})
>>> config.epochs
300
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Le

from patchloom.base.ranges import Count, Fraction, NonNegative, Positive, PositiveInt, Proportion, Share, inside
from patchloom.base.sizes import Size, is_size, parse_size
from patchloom.base.source_options import SourceOptions, words
from patchloom.errors import UsageError, unknown_name
from patchloom.io import encodable, write_text
from patchloom.training.places import PLACES, absolute, same_place

CONFIG = "config.yaml"

# What may differ between a run and its continuation: it changes where and how fast, not what is computed.
FREE_ON_RESUME = frozenset(
    {"data", "out", "resume", "overwrite", "accelerator", "devices", "nodes", "num_workers", "log_every"}
    | {"checkpoint_every", "compile", "grad_checkpointing", "probe_every", "probe_data", "health_every", "report"}
    | {"shown_channels"}
)


AUTO = ("batch_size", "num_workers")
"""Settings that `auto` leaves to a short trial before the run."""


class Auto(int):
    """A number that is to be settled before the run; until then it is the recipe's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(SourceOptions):
    """Settings of the engine.

    Attributes:
        PRESETS: Named recipes of a method: for each, the fields whose defaults it replaces.
        SETTLED: Fields that `auto` leaves to a short trial.
        ABLATIONS: Fields a paper varied and its users leave alone; a help page has them last.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    ABLATIONS: ClassVar[tuple[str, ...]] = ()
    SETTLED: ClassVar[tuple[str, ...]] = AUTO

    data: str
    """Images to train on: a folder, shards (train-{000000..000099}.tar), photos, digits, torchvision:NAME or hf:NAME"""
    out: str
    """Run folder; must be empty or absent unless resume or overwrite is set"""
    preset: str | None = None
    """Named recipe of the method that replaces the defaults below; what is given beside it wins"""
    encoder: str = "ccvit_base_patch16_224"
    """Name of a timm model, or the path of a bundle or run to start from"""
    image_size: Size | None = None
    """Side of the training images in pixels, or height and width (256,128); default: what the encoder was made for"""
    in_chans: PositiveInt = 3
    """Channels of the images: 3 (grey ones are repeated), 1, or as many as the files have"""
    channel_mean: tuple[float, ...] | None = None
    """Mean per channel, in [0, 1], that images are normalised by, kept in the bundle; default: the encoder's own, and
    of images of other than 1 or 3 channels what a sample of them has"""
    channel_std: tuple[Positive, ...] | None = None
    """Standard deviation per channel, likewise"""
    shown_channels: str | None = None
    """Channels that pictures in the report show as red, green and blue, or one as grey, such as 4,2,0; default: the
    first three"""
    epochs: PositiveInt = 300
    """Passes over the images; where not given, more than the recipe's if the images are few"""
    max_steps: PositiveInt | None = None
    """Stop after this many optimiser steps, whatever epochs says (the schedule ends there too)"""
    batch_size: PositiveInt = 128
    """Images per device and forward pass, or auto: the largest that fits into memory and is as fast as any, by a trial
    of at most 30 seconds; where not given, fewer than the recipe's if the images are few"""
    accumulate: PositiveInt = 1
    """Forward passes per optimiser step; the global batch is batch_size * accumulate * devices * nodes"""
    lr: Positive = 1.5e-3
    """Peak learning rate, for a global batch of lr_base_batch where that is set"""
    lr_base_batch: PositiveInt | None = None
    """Scale lr by global batch / lr_base_batch (the field's linear rule uses 256); null: lr is used as it is"""
    min_lr: NonNegative = 1e-5
    """Learning rate at the end of the cosine"""
    warmup_epochs: NonNegative = 10.0
    """Epochs of linear warm-up from 0; at most a fifth of the run is used"""
    weight_decay: NonNegative = 0.05
    """Weight decay; not on biases, norms, position embeddings and class tokens where nothing else is said"""
    weight_decay_end: NonNegative | None = None
    """Weight decay at the end of its cosine; null: constant"""
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    """AdamW betas"""
    eps: NonNegative = 1e-8
    """AdamW epsilon"""
    clip_grad: Positive | None = 3.0
    """Largest global L2 norm of the gradient; null for no clipping"""
    layer_decay: Share = 1.0
    """Factor on the learning rate from each block to the one below it, in (0, 1]"""
    drop_path: Fraction = 0.0
    """Stochastic depth rate of the last block, in [0, 1)"""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """Arithmetic; auto is bf16-mixed on a GPU that has it and 32-true elsewhere"""
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """Kind of device"""
    devices: Count = 1
    """Devices (processes) per node; 0 means all there are"""
    nodes: PositiveInt = 1
    """Number of machines; start the same command on each (SLURM and torchrun are recognised)"""
    strategy: Literal["auto", "ddp", "ddp_spawn", "fsdp"] = "auto"
    """How processes share the work; auto is ddp when there is more than one"""
    num_workers: Count = 2
    """Processes per device that read and augment images, or auto: as many as keep up with training"""
    seed: Count = 0
    """Seed of weights, order, augmentation and masks"""
    resume: bool = False
    """Go on with the run in out where it stopped; starts it if there is none"""
    overwrite: bool = False
    """Delete an earlier run in out first"""
    compile: bool = False
    """Compile the encoder's blocks with torch.compile (worth it for long runs)"""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time"""
    ema: Proportion | None = None
    """Decay per step of a moving average of the encoder, in (0, 1); the bundle then holds the average"""
    experts: Count = 0
    """Feed-forwards in place of one while training, averaged at the end (experts weights averaging); 0 for none"""
    expert_layers: Literal["alternate", "last_half", "all"] = "alternate"
    """Blocks whose feed-forward becomes experts: alternate (every second), last_half or all"""
    share_rate: Fraction = 0.3
    """How far experts move towards each other at a step, at the end of share_schedule; at most 1 - 1 / experts"""
    share_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the share rate gets there, from 0"""
    init_from: str | None = None
    """Bundle, run or timm model (its published weights) whose weights the encoder starts from (same architecture)"""
    checkpoint_every: PositiveInt = 500
    """Optimiser steps between checkpoints; one is also written when an epoch and when the run ends"""
    probe_data: str | None = None
    """Labelled held-out images for the k-NN probe and the report's pictures; default: part of data"""
    probe_every: Count = 10
    """Epochs between probes (k-NN accuracy where labels exist, feature health always); 0 for none at all"""
    report: bool = True
    """Write report.html at the end"""
    health_every: Count = 100
    """Optimiser steps between looks at the encoder's features, so that a collapse is named early; 0 for none"""
    log_every: PositiveInt = 20
    """Optimiser steps between rows of metrics.csv and of TensorBoard"""

    def __post_init__(self) -> None:
        """Refuse values no run can have.

        Raises:
            UsageError: With the value and what would be right.
        """
        for name in AUTO:
            if getattr(self, name) == "auto":
                recipe: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(self)}
                recipe |= preset_values(type(self), self.preset)
                object.__setattr__(self, name, Auto(recipe[name]))
        super().__post_init__()
        if self.experts:
            inside("experts", self.experts, Annotated[int, Ge(2)])
            inside("share_rate", self.share_rate, Annotated[float, Ge(0), Le((self.experts - 1) / self.experts)])
            if self.strategy == "fsdp":
                raise UsageError("experts cannot be averaged while fsdp holds them in shards; use strategy=ddp")
        if self.in_chans == 3 and (named := self.use_channels or self.channel_files):
            object.__setattr__(self, "in_chans", len(words(named)))
        if (self.channel_mean is None) != (self.channel_std is None):
            raise UsageError("channel_mean and channel_std belong together; give both or neither")
        for name in ("channel_mean", "channel_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.in_chans:
                raise UsageError(f"{name} has {len(values)} values; give one for each of {self.in_chans} channels")
        if self.resume and self.overwrite:
            raise UsageError("resume keeps the run and overwrite deletes it; set one of them")


Config = TypeVar("Config", bound=TrainConfig)


def preset_values(config_class: type, name: str | None) -> Mapping[str, Any]:
    """Return the fields a preset of a settings class replaces; none without a name.

    Raises:
        UsageError: The class has no such preset; names those it has.
    """
    if name is None:
        return {}
    presets: Mapping[str, Mapping[str, Any]] = getattr(config_class, "PRESETS", {})
    if not presets:
        raise UsageError(f"preset is {name!r}, but this method has none; leave it out")
    if name not in presets:
        raise unknown_name("preset", name, presets)
    return presets[name]


def config_from_mapping(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """Return settings from names and values; where they name a preset, it stands in for what they leave out.

    Raises:
        UsageError: An unknown name (with the nearest), a missing one, or a value of the wrong kind.
    """
    values = {**preset_values(config_class, values.get("preset")), **values}
    known = {field.name: field for field in dataclasses.fields(config_class)}
    for name in values:
        if name not in known:
            raise unknown_name("setting", name, known)
    missing = [
        name
        for name, field in known.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UsageError(f"missing {' and '.join(missing)}")
    hints = get_type_hints(config_class)
    return config_class(**{name: _converted(name, value, hints[name]) for name, value in values.items()})


def write_config(config: TrainConfig, path: Path, command: str) -> None:
    """Write the settings as YAML that `patchloom COMMAND --config` reads back."""
    dump_config(plain_settings(config), path, command)


def plain_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of a run as plain values; places on disk lead there from any folder."""
    values = dataclasses.asdict(config) | {"resume": False, "overwrite": False}
    values |= {name: absolute(name, value) for name, value in values.items() if name in PLACES and value is not None}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def dump_config(settings: Mapping[str, Any], path: Path, command: str) -> None:
    """Write plain settings as YAML, whole or not at all, with their number, which tells when some are lost."""
    text = f"# patchloom {command} --config {path.name}\n# {len(settings)} settings\n"
    text += yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
    write_text(path, text)


def refuse_changes(saved: Mapping[str, Any], config: TrainConfig) -> None:
    """Refuse to go on with a run under settings that would make it another run.

    Raises:
        UsageError: Names the setting and both values.
    """
    for name, value in dataclasses.asdict(config).items():
        if name in FREE_ON_RESUME or name not in saved:
            continue
        before = tuple(saved[name]) if isinstance(saved[name], list) else saved[name]
        if name in PLACES and before and value and same_place(name, value, saved, Path(config.out)):
            continue
        if before != value:
            raise UsageError(
                f"the run in {config.out} has {name}={before}, not {value}; resume it unchanged, or start a new run "
                f"(init_from={config.out} takes its weights)"
            )


def _converted(name: str, value: Any, hint: Any) -> Any:
    """Let YAML's and Python's near misses in: 1e-3 as text, whole numbers as floats, lists as tuples, paths."""
    kinds = get_args(hint) if get_origin(hint) not in (Literal, tuple, dict, list) else (hint,)
    kinds = kinds or (hint,)
    if name in AUTO and value == "auto":
        return value
    if is_size(hint):
        return None if value is None else parse_size(value)
    if isinstance(value, str | Path):
        # Names that are not UTF-8 are kept as text that finds them again; what is written goes to a name as it is.
        value = str(value) if name in ("out", "predictions", "report", "picture") else encodable(str(value))
    if value is None and type(None) in kinds:
        return None
    if any(get_origin(kind) is tuple for kind in kinds) and isinstance(value, (list, tuple)):
        return tuple(value)
    plain = [kind for kind in kinds if kind in (int, float, str, bool)]
    if not plain or type(value) in plain:
        return value
    if float in plain and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if int in plain and hasattr(value, "__index__") and not isinstance(value, bool):
        return int(value)
    if float in plain and isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    expected = " or ".join(kind.__name__ for kind in plain)
    raise UsageError(f"{name} is {value!r}; expected {expected}")
