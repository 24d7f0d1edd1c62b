"""A decoder on a frozen encoder, trained to be measured: what the segmentation probes of images and of volumes share.

The training itself is `segment.frozen`'s, on the engine of every other run.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import warnings
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from patchloom.data.base import Source
from patchloom.encoders import Encoder, image_size, in_chans, patch_size, set_image_size
from patchloom.evaluate.kept import claim
from patchloom.features.extract import torch_device
from patchloom.features.fingerprint import weights_hash
from patchloom.io import check_place
from patchloom.segment.decoder_config import DecoderConfig
from patchloom.segment.frozen import FrozenMethod
from patchloom.segment.inference import Size, published_step
from patchloom.segment.saved import WEIGHTS, Segmenter, fill_decoder
from patchloom.training.callbacks import read_skipped
from patchloom.training.config import TrainConfig, preset_values
from patchloom.training.run import fit


class Trained(NamedTuple):
    """A decoder that has been trained."""

    module: Segmenter
    crop: Size
    """The window the encoder sees."""
    resize: Size | None
    """Size of images out of proportion, or None."""
    stride: Size
    """Step between windows in testing where the settings name none: two thirds of the window that was asked for."""
    parameters: int
    """Trained parameters."""
    loss_first: float
    """Of the first step."""
    loss_last: float
    """Mean over the last twenty."""
    skipped: list[tuple[str, str]]
    """Name and reason of images that could not be read."""
    device: torch.device


def train_decoder(encoder: Encoder, source: Source, config: DecoderConfig, name: str) -> Trained:
    """Train a decoder on the maps of a frozen encoder; the encoder given is left as it is.

    Args:
        encoder: The encoder.
        source: Images with their masks.
        config: What to train, and how.
        name: The evaluation, for the run's folder and messages.

    Raises:
        UsageError: A crop that patches do not fill, blocks the encoder does not have, no readable image, or a run
            folder that holds something else.
        Stopped: A signal ended the training; where the run is kept, the same command goes on with it.
    """
    device, encoder = torch_device(config.device), copy.deepcopy(encoder)
    wanted = config.crop or config.resize or image_size(encoder)
    config = _fitted(config, encoder)
    crop = config.crop or config.resize or image_size(encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # windows need not be square
        set_image_size(encoder, crop)
    method = FrozenMethod.of(encoder, config)
    with ExitStack() as stack, torch.random.fork_rng(devices=[]):
        made = config.run or stack.enter_context(tempfile.TemporaryDirectory(prefix="patchloom-decoder-"))
        folder = check_place(made)
        if config.run is not None:
            claim(folder, {"evaluation": name, "weights": weights_hash(encoder), **_asked(config, source)})
        settings = TrainConfig(
            data=source.name,
            out=str(folder / "decoder"),
            encoder=type(encoder).__name__,
            in_chans=in_chans(encoder),
            max_steps=config.steps,
            batch_size=config.batch_size,
            lr=config.lr,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.999),
            clip_grad=config.clip_grad,
            precision="bf16-mixed" if config.precision == "bf16" else "32-true",
            num_workers=config.num_workers,
            seed=config.seed,
            checkpoint_every=500 if config.run else config.steps,
            resume=True,
            probe_every=0,
            report=False,
        )
        go_on = None if config.run is None else "the same command"
        done = fit(f"evaluate {name}", method, settings, source=source, go_on=go_on)
        module = method(settings, source).segmenter()
        fill_decoder(module, load_file(done.model / WEIGHTS))
        skipped = list(read_skipped(done.path / "skipped.csv").items())
    return Trained(
        module=module.to(device).eval(),
        crop=crop,
        resize=config.resize,
        stride=published_step(wanted),
        parameters=done.summary["trained_parameters"],
        loss_first=done.summary["loss_first"],
        loss_last=done.summary["loss_last"],
        skipped=skipped,
        device=device,
    )


def _asked(config: DecoderConfig, source: Source) -> dict[str, Any]:
    """Return what makes a decoder what it is, besides the encoder."""
    free = ("device", "num_workers", "run")
    names = [field.name for field in dataclasses.fields(DecoderConfig) if field.name not in free]
    data = {"data": source.fingerprint(), "classes": source.class_names}
    return data | {name: getattr(config, name) for name in names}


def _fitted(config: DecoderConfig, encoder: Encoder) -> DecoderConfig:
    """Return settings whose sizes, where a preset gave them, are multiples of the encoder's patch.

    Presets are made for patches of 14 or 16 pixels and name one size for all; sizes that were given stay as they are.
    """
    patch, preset = patch_size(encoder), preset_values(type(config), config.preset)
    changed: dict[str, Any] = {}
    for name in ("crop", "resize"):
        size = getattr(config, name)
        if size is None or size != preset.get(name):
            continue
        nearest = tuple(max(1, round(side / patch)) * patch for side in size)
        if nearest != size:
            changed[name] = nearest
            warnings.warn(
                f"{name} {size} of preset {config.preset} is no multiple of the encoder's patch of {patch} pixels; "
                f"the nearest is used: {nearest}",
                stacklevel=2,
            )
    return dataclasses.replace(config, **changed)
