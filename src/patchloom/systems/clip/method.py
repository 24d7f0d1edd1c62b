"""Trains images and captions to meet: CLIP (Radford et al. 2021, arXiv 2103.00020), with one tower locked or none.

Locked-image tuning is of Zhai et al. 2022 (arXiv 2111.07991), locked-text tuning of Chen et al. 2024 (arXiv
2404.02132), the gradient cache of Gao et al. 2021 (arXiv 2101.06983). Weight decay and the bound on the scale are
open_clip's.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patchloom.data import PairedViews, open_source
from patchloom.data.base import Source, StreamSource
from patchloom.data.subset import SubsetSource
from patchloom.encoders import Encoder, normalize
from patchloom.errors import UsageError
from patchloom.systems.clip.captions import NO_CAPTION, CaptionedSource, PairedWithText, captioned, origin_of
from patchloom.systems.clip.config import ClipConfig
from patchloom.systems.clip.held_out import HeldOut, measure
from patchloom.systems.clip.losses import contrastive_loss
from patchloom.systems.clip.model import CLIP, chunked
from patchloom.systems.clip.saved import load_text, read_text_config, save_clip
from patchloom.systems.clip.text import TextTower
from patchloom.training.callbacks import read_skipped
from patchloom.training.method import Method
from patchloom.training.metrics import read_metrics
from patchloom.training.options import start_of
from patchloom.training.selection import hold_out

if TYPE_CHECKING:
    from patchloom.report import Section

MOST_HELD_OUT = 1000


class ClipMethod(Method):
    """Images and captions meet in one space (CLIP); one tower may be locked (extra: clip)."""

    config_class = ClipConfig
    config: ClipConfig
    any_backbone = True

    def __init__(self, config: ClipConfig, source: Source | StreamSource) -> None:
        if not source.captions:
            source = captioned(source, origin_of(source, config.captions), config.templates)
        learnt, test = _held_out(config, source)
        super().__init__(config, learnt)
        torch.manual_seed(config.seed)  # the text tower begins alike, whatever the image tower drew
        if config.text_from is None:
            text = TextTower(
                context_length=config.context_length,
                width=config.text_width,
                heads=config.text_heads,
                layers=config.text_layers,
                output_dim=config.embed_dim or config.text_width,
            )
        else:
            text = load_text(config.text_from)
        if config.grad_checkpointing:
            text.set_grad_checkpointing(True)
        self.towers = CLIP(self.encoder, text, config.temperature)
        self._lock()
        if config.chunk_size is not None and any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.modules()
        ):
            raise UsageError(
                f"{config.encoder} normalises by batch, and statistics of chunks are not those of the batch; leave "
                f"chunk_size out, or take an encoder with layer norm"
            )
        self.test = test
        self.pairs_seen = self.captions_cut = 0
        self.latest_held_out: HeldOut | None = None

    @classmethod
    def open_data(cls, config: Any) -> tuple[Source | StreamSource, Any]:
        """Return images with captions, and the settings with what was settled about them and about the towers.

        Raises:
            UsageError: There are neither captions nor classes, or the text tower is of another shape than asked for.
        """
        source, config = super().open_data(config)
        origin = origin_of(source, config.captions)
        if origin == "labels" and config.captions == "auto":
            _refuse_sentences(source)
            print(f"{source.name} has no captions; they are made of its class names (captions=labels)", file=sys.stderr)
        config = dataclasses.replace(config, captions=origin, **_tower_settings(config))
        return captioned(source, origin, config.templates), config

    def _lock(self) -> None:
        config = self.config
        if config.lock == "text":
            self.towers.text.requires_grad_(False)
        if config.lock == "image":
            if start_of(config) is None and not Path(config.encoder).exists():
                raise UsageError(
                    f"lock=image keeps the encoder as it is, and {config.encoder} has random weights; give the path of "
                    f"a bundle or run, or init_from"
                )
            self.encoder.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> ClipMethod:
        """Set the mode; what is locked stays in that of evaluation."""
        super().train(mode)
        if hasattr(self, "towers"):
            if self.config.lock == "text":
                self.towers.text.eval()
            if self.config.lock == "image":
                self.encoder.eval()
        return self

    def transform(self) -> PairedWithText:
        """Return what data workers do to an image and its caption."""
        config = self.config
        view = PairedViews(self.input_size, scale=config.crop_scale, flip=config.flip, color_jitter=config.color_jitter)
        return PairedWithText(view, self.towers.text.context_length)

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the contrastive loss of a batch of pairs, and how often an image finds its caption."""
        config, towers = self.config, self.towers
        images = normalize(self.pixels(batch["image"]), self.encoder)
        image_features = chunked(partial(towers.encode_image, normalize=True), images, size=config.chunk_size)
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.lock != "text"):
            text_features = towers.encode_text(batch["tokens"], normalize=True, chunk_size=config.chunk_size)
        scale = towers.logit_scale.exp()
        contrast = contrastive_loss(image_features, text_features, scale, self._ids(batch))
        if not self.repeating:
            self._count(batch)
        return {"loss": contrast.loss, "pair_accuracy": contrast.accuracy, "logit_scale": scale.detach()}

    def _ids(self, batch: dict[str, Any]) -> Tensor | None:
        """Return what is equal where pairs say the same: their captions or, where these are made of it, their class."""
        if not self.config.mask_duplicates:
            return None
        by_class = self.config.captions == "labels" and batch["label"].ndim == 1
        ids: Tensor = batch["label" if by_class else "text_id"]
        return ids

    def _count(self, batch: dict[str, Any]) -> None:
        cut = batch["cut"]
        self.pairs_seen += len(cut)
        count = int(cut.sum())
        if count and not self.captions_cut and self.global_rank == 0:
            key = batch["key"][int(cut.int().argmax())]
            length = self.towers.text.context_length
            print(f"captions longer than {length} tokens are cut; the first is that of {key}", file=sys.stderr)
        self.captions_cut += count

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies: as in open_clip, to all but vectors, biases, norms and the scale."""
        return parameter.ndim >= 2 and not name.endswith("bias")

    def after_step(self) -> None:
        """Keep the factor on similarities in its bounds."""
        self.towers.clamp_scale(self.config.max_logit_scale)

    def validate(self, device: torch.device) -> dict[str, Any]:
        """Return retrieval recall and, where there are classes, zero-shot accuracy on the held-out pairs."""
        if self.test is None:
            return {}
        config = self.config
        modes = [(module, module.training) for module in self.towers.modules()]
        self.towers.eval()
        try:
            self.latest_held_out = measure(
                self._shipped(self.bundle_model()),
                self.test,
                templates=config.templates,
                batch_size=config.chunk_size or config.batch_size,
                num_workers=config.num_workers,
            )
        finally:
            for module, training in modes:
                module.training = training
        return self.latest_held_out.figures

    def _shipped(self, model: Encoder) -> CLIP:
        """Return the towers with what an attachment puts in the encoder's place."""
        if model is self.encoder:
            return self.towers
        towers = copy.copy(self.towers)
        towers._modules = dict(self.towers._modules)
        towers.visual = copy.copy(self.towers.visual)
        towers.visual._modules = {**self.towers.visual._modules, "trunk": model}
        return towers

    def report_sections(self, images: Tensor) -> list[Section]:
        """Return what was measured on held-out pairs, and examples of what is found."""
        from patchloom.systems.clip.report import sections

        if self.latest_held_out is None:
            self.validate(self.device)
        if self.latest_held_out is None or self.test is None:
            return []
        return sections(self.latest_held_out, self.test, read_metrics(Path(self.config.out) / "metrics.csv"))

    def summary(self) -> dict[str, Any]:
        """Return how many captions were cut, how many images have none, and where captions are from."""
        skipped = read_skipped(Path(self.config.out) / "skipped.csv")
        return {
            "captions": self.config.captions,
            "pairs_seen": self.pairs_seen,
            "captions_cut": self.captions_cut,
            "images_without_caption": sum(reason == NO_CAPTION for reason in skipped.values()),
            "held_out_pairs": 0 if self.test is None else len(self.test),
            "embed_dim": int(self.towers.text.output_dim),
            "text_parameters": sum(parameter.numel() for parameter in self.towers.text.parameters()),
            "final_logit_scale": float(self.towers.logit_scale.detach().exp()),
        }

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write the bundle of the encoder, and both towers in a folder inside that open_clip opens."""
        super().save_model(model, path, lineage)
        save_clip(self._shipped(model), path)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["pairs"] = [self.pairs_seen, self.captions_cut]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.pairs_seen, self.captions_cut = checkpoint["pairs"]


def _refuse_sentences(source: Source | StreamSource) -> None:
    """Refuse classes that look like captions: a column of captions that is called otherwise is read as one of classes.

    Raises:
        UsageError: Most have four words or more, or there is more than one for every two images.
    """
    names = source.class_names or []
    images = len(source) if isinstance(source, Source) else source.num_samples
    if not names or source.multilabel:
        return
    long = sorted(names, key=lambda name: len(name.split()))[len(names) // 2]
    if len(long.split()) >= 4 or 2 * len(names) > max(images, 8):
        raise UsageError(
            f"{source.name} has no captions, and its {len(names)} classes of {images} images look like captions "
            f"({long[:60]!r}): name their column by caption_field, or say captions=labels if they are classes"
        )


def _tower_settings(config: ClipConfig) -> dict[str, Any]:
    """Return the settings of the text tower, of `text_from` where that is given.

    Raises:
        UsageError: It has another width than was asked for.
    """
    if config.text_from is None:
        return {"embed_dim": config.embed_dim or config.text_width}
    found = read_text_config(config.text_from)
    if config.embed_dim not in (None, found["embed_dim"]):
        raise UsageError(
            f"embed_dim is {config.embed_dim}, and the text tower of {config.text_from} puts captions in a space of "
            f"{found['embed_dim']}; leave embed_dim out"
        )
    names = {"width": "text_width", "heads": "text_heads", "layers": "text_layers", "context_length": "context_length"}
    return {"embed_dim": found["embed_dim"], **{names[key]: found[key] for key in names if key in found}}


def _held_out(config: ClipConfig, source: Source | StreamSource) -> tuple[Source | StreamSource, Source | None]:
    """Return the pairs to learn from, and those to measure on."""
    if config.test is not None:
        options = {"by_index": True, **config.source_options()}
        test = open_source(config.test, in_chans=config.in_chans, seed=config.seed, **options)
        if not isinstance(test, Source):
            raise UsageError(f"{config.test} can only be read from front to back; unpack the shards to .tar to test on")
        test = captioned(test, origin_of(test, "labels" if config.captions == "labels" else "auto"), config.templates)
        return source, _some(test, config.seed)
    if not config.val_fraction:
        return source, None
    if isinstance(source, StreamSource):
        print(f"{source.name} is a stream: no pairs of it are held out; test names some to measure on", file=sys.stderr)
        return source, None
    if len(source) < 2:
        return source, None
    share = min(config.val_fraction, MOST_HELD_OUT / len(source))
    if isinstance(source, CaptionedSource):  # all captions of an image on one side
        learnt, held = hold_out(source.source, share, config.seed)
        return CaptionedSource(learnt, source.texts), CaptionedSource(held, source.texts)
    return hold_out(source, share, config.seed)


def _some(source: Source, seed: int) -> Source:
    if len(source) <= MOST_HELD_OUT:
        return source
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(source))[:MOST_HELD_OUT]
    return SubsetSource(source, np.sort(order))
