"""Hyena ViTs of clips and of volumes: the operator on grids of three axes, as timm models.

Zimerman and Wolf 2024, "Multi-Dimensional Hyena for Spatial Inductive Bias", AISTATS (arXiv 2309.13600). Patches and
positions are those of `video` and `volume`; blocks, hybrids and filters those of `hyena_vit`. Filters are resampled for
clips and volumes of any size.

>>> import torch
>>> from patchloom.encoders import create_encoder, feature_map, grid_size
>>> clips = create_encoder("hyena_video_micro_patch8", image_size=(4, 16, 24))
>>> feature_map(clips, torch.randn(1, 3, 4, 16, 24)).shape
torch.Size([1, 96, 2, 2, 3])
>>> grid_size(create_encoder("hyena_volume_micro_patch4", image_size=(8, 16, 16), patch_size=(2, 4, 4), in_chans=1))
(4, 4, 4)
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from patchloom.encoders.families import Family, register
from patchloom.encoders.hyena_vit import SIZES, SUFFIXES, HyenaTransformer, HyenaTransformers, Mixer
from patchloom.encoders.patches import Grid
from patchloom.encoders.video import VideoTransformer, VideoTransformers
from patchloom.encoders.video import _cfg as _video_cfg
from patchloom.encoders.volume import VolumeTransformer, VolumeTransformers
from patchloom.encoders.volume import _cfg as _volume_cfg


class HyenaVideoTransformer(HyenaTransformer, VideoTransformer):
    """A ViT of clips in tubes with the Hyena operator in the place of attention, in all blocks or in some.

    Args:
        **model_args: Those of `HyenaTransformer` and of `VideoTransformer`; `direction` counts the corners of three
            axes, 8.
    """

    def __init__(self, **model_args: Any) -> None:
        super().__init__(**model_args)
        # As many tokens of another grid would go through, with each in another's place.
        self.patch_embed.strict_img_size = True


class AttentionVideoTransformer(HyenaVideoTransformer):
    """The same with attention in all blocks."""


class HyenaVolumeTransformer(HyenaTransformer, VolumeTransformer):
    """A ViT of volumes in boxes with the Hyena operator in the place of attention, in all blocks or in some.

    Args:
        **model_args: Those of `HyenaTransformer` and of `VolumeTransformer`.
    """


class AttentionVolumeTransformer(HyenaVolumeTransformer):
    """The same with attention in all blocks."""


class _HyenaGrids(HyenaTransformers):
    """What grids of three axes have in common; the family of their patches comes second."""

    def resize(self, encoder: Any, size: Grid) -> None:
        """Set the encoder up for inputs of another size, in place: positions and filters are resampled."""
        super().resize(encoder, size)
        encoder.resize_filters()

    def classifier_arguments(self, encoder: Any, mean: bool) -> dict[str, Any]:
        """Return the arguments of a classifier of the mean over patches, or of the first, behind the norm of all."""
        return Family.classifier_arguments(self, encoder, mean)


@register(HyenaVideoTransformer)
class HyenaVideos(_HyenaGrids, VideoTransformers):
    """Clips whose tubes stay in their grid."""


@register(AttentionVideoTransformer)
class AttentionVideos(HyenaVideos):
    """Attention reads whatever tubes there are."""

    drops_tokens = True


@register(HyenaVolumeTransformer)
class HyenaVolumes(_HyenaGrids, VolumeTransformers):
    """Volumes whose boxes stay in their grid."""


@register(AttentionVolumeTransformer)
class AttentionVolumes(HyenaVolumes):
    """Attention reads whatever boxes there are."""

    drops_tokens = True


MICRO = {"embed_dim": 96, "depth": 4, "num_heads": 3}
CLASSES: dict[str, tuple[type[HyenaTransformer], type[HyenaTransformer]]] = {
    "video": (HyenaVideoTransformer, AttentionVideoTransformer),
    "volume": (HyenaVolumeTransformer, AttentionVolumeTransformer),
}
"""With the operator somewhere, and with attention alone."""
SIDES = {"video": {4: 32, 8: 64, 16: 224}, "volume": {4: 32, 8: 64, 16: 96}}
"""Sides of frames and of volumes by those of the patches; clips have 16 frames, in tubes of 2."""
SMALLEST = {"video": 8, "volume": 4}
"""Patches of the micro size."""
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    f"hyena_{kind}_{size}_patch{patch}": (kind, {**shape, "patch_size": patch, "img_size": side})
    for kind, sides in SIDES.items()
    for size, shape in {"micro": MICRO, **SIZES}.items()
    for patch, side in sides.items()
    if size != "micro" or patch == SMALLEST[kind]
}

default_cfgs = generate_default_cfgs(
    {
        name + suffix: (_video_cfg if kind == "video" else _volume_cfg)(shape["img_size"])
        for name, (kind, shape) in MODELS.items()
        for suffix in SUFFIXES
    }
)


def _create(kind: str, variant: str, pretrained: bool, **model_args: Any) -> HyenaTransformer:
    made_of = CLASSES[kind][model_args.get("mixer") == "attention"]
    made: HyenaTransformer = build_model_with_cfg(made_of, variant, pretrained, **model_args)
    return made


def _register(name: str, kind: str, shape: dict[str, int], mixer: Mixer) -> None:
    def make(pretrained: bool = False, **kwargs: Any) -> HyenaTransformer:
        return _create(kind, name, pretrained, **{**shape, "mixer": mixer, **kwargs})

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"Of {kind}s: width {shape['embed_dim']}, {shape['depth']} blocks; mixer: {mixer}."
    register_model(make)


for _name, (_kind, _shape) in MODELS.items():
    for _suffix, _mixer in SUFFIXES.items():
        _register(_name + _suffix, _kind, _shape, _mixer)
