"""The images of a run: opened, and how their values are read settled once for all of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from patchloom.data import open_source
from patchloom.data.base import Source, StreamSource, UnreadableImageError, none_readable
from patchloom.data.reading import reading_options
from patchloom.data.survey import channel_statistics, notice
from patchloom.encoders import Encoder, input_size, kind_of, set_image_size
from patchloom.models.bundle import bundle_channels, read_reading
from patchloom.training.config import Config
from patchloom.training.options import start_of


def open_training_images(config: Config, **about_masks: Any) -> tuple[Source | StreamSource, Config]:
    """Return the images to train on, and the settings with what was settled about them.

    The value range is that of the settings, else that of the model training starts from, else found by a look at the
    images. Where the settings leave the number of channels as it is and that model takes another, it is the model's. Of
    images of other than one or three channels mean and standard deviation are taken of a sample.

    Args:
        config: The settings.
        **about_masks: What a source with masks takes besides.

    Raises:
        UsageError: The images cannot be opened or read as asked.
    """
    start: dict[str, Any] = {}
    path = next((path for path in (start_of(config), config.encoder) if path and Path(path).exists()), None)
    if path is not None:
        start = read_reading(path)
        channels = bundle_channels(path)
        left = next(field.default for field in dataclasses.fields(config) if field.name == "in_chans")
        if channels not in (None, left) and config.in_chans == left:
            notice(f"{path} takes {channels} channels, so images are read as {channels}")
            config = dataclasses.replace(config, in_chans=channels)
    if len(str(start.get("use_channels", "")).split(",")) != config.in_chans:
        start.pop("use_channels", None)
    source = open_source(
        config.data, in_chans=config.in_chans, seed=config.seed, model=start, **config.source_options(), **about_masks
    )
    settled: dict[str, Any] = reading_options(source)
    if (
        config.in_chans not in (1, 3)
        and config.channel_mean is None
        and _of_files(source)
        and not _has_statistics(config)
    ):
        try:
            mean, std = channel_statistics(source)
        except UnreadableImageError as error:
            raise none_readable(source, error.key, error.reason) from error
        settled |= {"channel_mean": _rounded(mean.tolist()), "channel_std": _rounded(std.tolist())}
        notice(
            f"{source.name}: {config.in_chans} channels of mean {settled['channel_mean']} and standard deviation "
            f"{settled['channel_std']}; colour changes are those of brightness and contrast, all channels alike"
        )
    return source, dataclasses.replace(config, **settled)


def read_as(encoder: Encoder, config: Any) -> Encoder:
    """Let an encoder know how its training images are read, and the statistics of the settings; returns it."""
    settled = {
        "value_range": config.value_range if config.value_range != "auto" else None,
        "use_channels": config.use_channels,
        "clip_frames": config.clip_frames,
        "clip_stride": config.clip_stride,
        "clip_sampling": config.clip_sampling,
    }
    known = {name: value for name, value in settled.items() if value is not None}
    if kind_of(encoder) == "clip" and config.clip_frames is not None:
        set_image_size(encoder, (config.clip_frames, *input_size(encoder)[1:]))
    statistics = {} if config.channel_mean is None else {"mean": config.channel_mean, "std": config.channel_std}
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, **statistics, **({"reading": known} if known else {})}
    return encoder


def _of_files(source: Source | StreamSource) -> bool:
    return type(source).stored is not (Source.stored if isinstance(source, Source) else StreamSource.stored)


def _has_statistics(config: Config) -> bool:
    """Return whether the run starts from a model of as many channels, which has its own."""
    return any(
        path and Path(path).exists() and bundle_channels(path) == config.in_chans
        for path in (start_of(config), config.encoder)
    )


def _rounded(values: list[float]) -> tuple[float, ...]:
    return tuple(round(value, 5) for value in values)
