"""What a sample is: an image, a clip, a volume, points, a signal or text.

A source says its kind, and whatever handles samples asks the kind: how they lie in a batch, what an encoder is shown of
them when it is measured, how a report draws them (`report.pictures`). A batch holds the samples under the name of their
kind: `batch["image"]`, `batch["clip"]`.

>>> KINDS["clip"].batch_axes
('B', 'C', 'T', 'H', 'W')
>>> KINDS["image"].eval_view("crop", 32)
EvalTransform(size=32, crop_pct=0.875, interpolation='bicubic')
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patchloom import registry
from patchloom.errors import UsageError

if TYPE_CHECKING:
    from patchloom.base.choices import View
    from patchloom.data.base import Source, StreamSource
    from patchloom.data.sample import Transform


@dataclass(frozen=True)
class Kind:
    """A kind of sample."""

    name: str
    """Its name, under which a batch holds its samples."""
    plural: str
    """What several of them are called."""
    axes: tuple[str, ...]
    """Axes of one sample: channels C, time T, depth D, height H, width W, points N with features F, length L."""
    views: str | None = None
    """Where the function stands that makes the view of evaluations, `module:function`: (view, size) -> transform; None
    where an encoder embeds no such samples by itself, so that nothing looks at them unasked."""
    crops: str | None = None
    """Where the maker of plain training views stands, `module:name`: (size, scale=, flip=, color_jitter=) -> transform;
    None where there are none."""
    recipe: str | None = None
    """Where the maker of timm's augmentation for training classifiers stands, likewise: (size, mean=, std=, scale=,
    flip=, auto_augment=, color_jitter=, erasing=, padding=) -> transform, whose samples are normalised."""
    grey_levels: str | None = None
    """What that does to grey levels in place of RandAugment, in words; None where it is RandAugment."""

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """Axes of a batch: B in front of those of a sample."""
        return ("B", *self.axes)

    @property
    def measured(self) -> bool:
        """Whether an encoder can be measured on such samples: by the probe, by health, by `evaluate` and `embed`."""
        return self.views is not None

    def eval_view(self, view: View, size: Any) -> Transform:
        """Return what an encoder is shown of a sample when it is measured.

        Args:
            view: `crop`, the middle, or `whole`, all of it out of proportion with each channel stretched.
            size: Sides of the result without channels; of images also one number for both.

        Raises:
            UsageError: There is no such view, or it is not defined for this kind.
        """
        if self.views is None:
            raise UsageError(f"{self.plural} are not embedded by an encoder alone, so there is no view of them")
        made: Transform = registry.load(self.views)(view, size)
        return made

    def training_view(self, size: Any, **crops: Any) -> Transform:
        """Return the random crops, mirror images and colours that an encoder is shown while it is trained.

        Args:
            size: Sides of the result without channels.
            **crops: See `crops`.

        Raises:
            UsageError: They are not defined for this kind.
        """
        return self._made(self.crops, size, crops)

    def classifier_view(self, size: Any, **recipe: Any) -> Transform:
        """Return timm's augmentation for training classifiers; its samples are normalised.

        Args:
            size: Sides of the result without channels.
            **recipe: See `recipe`.

        Raises:
            UsageError: It is not defined for this kind.
        """
        return self._made(self.recipe, size, recipe)

    def _made(self, place: str | None, size: Any, settings: dict[str, Any]) -> Transform:
        if place is None:
            raise UsageError(f"no augmentation is defined for {self.plural}, so this method does not train on them")
        made: Transform = registry.load(place)(size, **settings)
        return made


FOLDERS = {"clip": "clips:FOLDER", "volume": "volumes:FOLDER"}
"""How folders are named whose files are no images, by kind."""
SHOWN = 3
"""Methods that an error names."""
IMAGE = Kind(
    *("image", "images", ("C", "H", "W"), "data.transforms:eval_view"),
    crops="data.transforms:PairedViews",
    recipe="data.transforms:FinetuneTransform",
)
CLIP = Kind(
    *("clip", "clips", ("C", "T", "H", "W"), "data.clip_views:eval_view"),
    crops="data.clip_views:ClipCrops",
    recipe="data.clip_views:ClipRecipe",
)
VOLUME = Kind(
    *("volume", "volumes", ("C", "D", "H", "W"), "data.volume_views:eval_view"),
    crops="data.volume_crops:VolumeTraining",
    recipe="data.volume_crops:VolumeRecipe",
    grey_levels="contrast and brightness, up to a fifth",
)
KINDS = {
    kind.name: kind
    for kind in (
        IMAGE,
        CLIP,
        VOLUME,
        Kind("points", "clouds of points", ("N", "F")),
        Kind("signal", "signals", ("C", "L")),
        Kind("text", "texts", ("L",)),
    )
}


def require_kind(source: Source | StreamSource, kinds: Collection[str], what: str) -> None:
    """Refuse a source of another kind than is taken.

    Args:
        source: What is to be read.
        kinds: Names of the kinds that are taken.
        what: What takes them, such as `pretrain mae` or `this encoder`.

    Raises:
        UsageError: Names both kinds, and the methods that take the source's.
    """
    kind = source.kind
    if kind.name in kinds:
        return
    wanted = " or ".join(KINDS[name].plural for name in kinds)
    takers = registry.taking(kind.name)
    shown = ", ".join(takers[:SHOWN]) + (f" and {len(takers) - SHOWN} more" if len(takers) > SHOWN else "")
    who = f"{shown} {'take' if len(takers) > 1 else 'takes'} them" if takers else "no method takes them yet"
    if kind.measured:
        who += f", and an encoder of {kind.plural} is measured on them"
    if kind is IMAGE and (prefixes := [FOLDERS[name] for name in kinds if name in FOLDERS]):
        who += f"; a folder of {wanted} is named {' or '.join(prefixes)}"
    raise UsageError(f"{source.name} holds {kind.plural}, and {what} takes {wanted}; {who}")
