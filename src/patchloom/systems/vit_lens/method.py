"""Teaches a frozen ViT another sense: ViT-Lens (Lei et al. 2024, arXiv 2311.16081)."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patchloom.data import open_source
from patchloom.data.base import Source, StreamSource
from patchloom.data.subset import SubsetSource
from patchloom.encoders import Encoder
from patchloom.errors import UsageError
from patchloom.systems.clip.captions import NO_CAPTION, captioned, origin_of
from patchloom.systems.clip.saved import load_clip, save_clip
from patchloom.systems.vit_lens import cache
from patchloom.systems.vit_lens.config import VitLensConfig
from patchloom.systems.vit_lens.held_out import HeldOut, measure
from patchloom.systems.vit_lens.model import tri_modal_contrastive_loss
from patchloom.systems.vit_lens.saved import build, save_lens
from patchloom.systems.vit_lens.views import SenseView
from patchloom.training.callbacks import read_skipped
from patchloom.training.inputs import open_training_images
from patchloom.training.method import Method
from patchloom.training.metrics import read_metrics
from patchloom.training.selection import hold_out

if TYPE_CHECKING:
    from patchloom.report import Section

MOST_HELD_OUT = 1000
FEATURES = "features.safetensors"
"""Of pictures and captions, in the run folder."""


class VitLensMethod(Method):
    """Clouds or sounds through a lens into a frozen ViT, beside images and texts (ViT-Lens; extra: clip)."""

    config_class = VitLensConfig
    config: VitLensConfig
    kinds = ("points", "signal")
    any_backbone = True
    probed = False

    def __init__(self, config: VitLensConfig, source: Source | StreamSource) -> None:
        if not isinstance(source, Source):
            raise UsageError(f"{source.name} can only be read from front to back; give a folder")
        named = source if source.captions else captioned(source, origin_of(source, config.captions), config.templates)
        assert isinstance(named, Source)
        learnt, test = _held_out(config, named)
        super().__init__(config, learnt)
        torch.manual_seed(config.seed)
        self.about = {**dataclasses.asdict(config), "kind": source.kind.name}
        self.modality = build(self.towers, self.about)
        if config.vit == "random":
            _forget(self.modality)
        first = self.towers.logit_scale.detach().clone()
        self.logit_scale = nn.Parameter(
            first if config.temperature is None else -torch.tensor(config.temperature).log()
        )
        self.learnt, self.test = learnt, test
        self.cached: cache.Cached | None = None
        self.latest_held_out: HeldOut | None = None
        self.test_cached: cache.Cached | None = None
        self.train(self.training)

    @classmethod
    def open_data(cls, config: Any) -> tuple[Source | StreamSource, Any]:
        """Return samples with captions, and the settings with what was settled about them.

        Raises:
            UsageError: There are neither captions nor classes, or no encoder was given.
        """
        if not config.encoder:
            raise UsageError("encoder is not given; name a run of patchloom align clip, whose towers stay as they are")
        source, config = open_training_images(config)
        if source.kind.name not in cls.kinds:
            return source, config  # refused by its kind, in one way everywhere
        _sized(source, config)
        origin = origin_of(source, config.captions)
        if origin == "labels" and config.captions == "auto":
            print(f"{source.name} has no captions; they are made of its class names (captions=labels)", file=sys.stderr)
        return captioned(source, origin, config.templates), dataclasses.replace(config, captions=origin)

    def build_encoder(self) -> Encoder:
        """Return the image tower, which stays as it is.

        Raises:
            UsageError: `encoder` is no run of align clip.
        """
        self.towers = load_clip(self.config.encoder)
        self.towers.requires_grad_(False)
        trunk: Any = self.towers.visual.trunk
        encoder: Encoder = trunk
        return encoder

    def train(self, mode: bool = True) -> VitLensMethod:
        """Set the mode; the towers of images and texts stay in that of evaluation."""
        super().train(mode)
        if hasattr(self, "towers"):
            self.towers.eval()
        return self

    def prepare(self, source: Source | StreamSource, run_dir: Path) -> None:
        """Look at all pictures and captions once."""
        for samples, name in ((self.learnt, FEATURES), (self.test, f"test_{FEATURES}")):
            if samples is not None and not (run_dir / name).exists():
                cache.save(cache.make(self.towers, samples, self.device), run_dir / name)

    def load_prepared(self, run_dir: Path) -> None:
        """Load what was seen."""
        self.cached = cache.load(run_dir / FEATURES, len(self.learnt))
        if self.test is not None:
            self.test_cached = cache.load(run_dir / f"test_{FEATURES}", len(self.test))
        if not self.has_images() and self.config.align_to != "texts":
            if self.config.align_to == "images":
                raise UsageError(f"align_to=images, and {self.source.name} has no pictures beside its samples")
            print(
                f"{self.source.name} has no pictures beside its samples: it is aligned to texts alone", file=sys.stderr
            )

    def has_images(self) -> bool:
        """Return whether all samples that can be read have a picture."""
        assert self.cached is not None
        readable = ~self.cached.texts.isnan().any(-1)
        there = ~self.cached.images[readable].isnan().any(-1)
        return bool(self.cached.images.shape[1]) and bool(there.any(1).all())

    def transform(self) -> SenseView:
        """Return what data workers do to a sample and its caption."""
        return SenseView(self.source.kind.name, int(self.towers.text.context_length), varied=True)

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the contrastive loss against images and texts, and how often a sample finds its text."""
        if self.cached is None:  # a few steps outside a run, for what they cost
            self.cached = cache.Cached(*(torch.randn(len(self.learnt), *rest) for rest in self._widths()))
        config = self.config
        features = self.modality.encode(batch[self.source.kind.name])
        index = batch["index"].cpu()
        texts = self.cached.texts[index].to(features)
        images = None
        if config.align_to != "texts" and self.has_images():
            images = cache.chosen_view(self.cached.images[index]).to(features)
        by_class = config.captions == "labels" and batch["label"].ndim == 1
        ids = batch["label" if by_class else "text_id"] if config.mask_duplicates else None
        loss = tri_modal_contrastive_loss(
            images, None if config.align_to == "images" else texts, features, self.logit_scale, ids
        )
        found = (features.detach() @ texts.T).argmax(1)
        right = (texts[found] == texts).all(1).float().mean()
        return {"loss": loss, "pair_accuracy": right, "logit_scale": self.logit_scale.detach().exp()}

    def _widths(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        width = int(self.towers.text.output_dim)
        return (1, width), (width,)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies: as in open_clip, to all but vectors, biases, norms and the scale."""
        return parameter.ndim >= 2 and not name.endswith("bias")

    def after_step(self) -> None:
        """Keep the factor on similarities in its bounds."""
        with torch.no_grad():
            self.logit_scale.clamp_(0, math.log(self.config.max_logit_scale))

    def validate(self, device: torch.device) -> dict[str, Any]:
        """Return recall and, where there are classes, zero-shot accuracy on the held-out samples."""
        if self.test is None or self.test_cached is None:
            return {}
        training = self.training
        self.eval()
        try:
            self.latest_held_out = measure(
                self.modality,
                self.towers,
                self.test,
                self.test_cached,
                templates=self.config.templates,
                batch_size=self.config.batch_size,
                num_workers=self.config.num_workers,
            )
        finally:
            self.train(training)
        return self.latest_held_out.figures

    def report_sections(self, images: Tensor) -> list[Section]:
        """Return samples as they are drawn, what was measured on held-out ones, and what is found for what."""
        from patchloom.systems.vit_lens.report import sections
        from patchloom.training.report import samples_section

        drawn = samples_section(self.source)
        if self.latest_held_out is None:
            self.validate(self.device)
        found = [] if drawn is None else [drawn]
        if self.latest_held_out is None or self.test is None:
            return found
        rows = read_metrics(Path(self.config.out) / "metrics.csv")
        return [*found, *sections(self.latest_held_out, self.test, rows)]

    def describe(self) -> dict[str, Any]:
        """Return what the log and the report say about the model."""
        known = super().describe()
        total = sum(parameter.numel() for parameter in self.modality.parameters())
        return {**known, "parameters": total, "trained_parameters": self.modality.trained()}

    def summary(self) -> dict[str, Any]:
        """Return where captions are from, whether there are pictures, and what was measured at the end."""
        skipped = read_skipped(Path(self.config.out) / "skipped.csv")
        if self.latest_held_out is None and self.config.probe_every:
            self.validate(self.device)
        return {
            "captions": self.config.captions,
            "aligned_to_images": self.config.align_to != "texts" and self.cached is not None and self.has_images(),
            "samples_without_caption": sum(reason == NO_CAPTION for reason in skipped.values()),
            "held_out_samples": 0 if self.test is None else len(self.test),
            "trained_share": self.modality.trained() / sum(p.numel() for p in self.modality.parameters()),
            "final_logit_scale": float(self.logit_scale.detach().exp()),
            **({} if self.latest_held_out is None else self.latest_held_out.figures),
        }

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write the bundle of the image tower, both frozen towers, and the encoder of the sense beside them."""
        super().save_model(model, path, lineage)
        save_clip(self.towers, path)
        save_lens(self.modality, self.logit_scale, self.about, path)


def _sized(source: Source | StreamSource, config: VitLensConfig) -> None:
    """Let a source hand out as many points or frames as are asked for."""
    known: Any = source
    if source.kind.name == "points":
        known.num_points = config.num_points
    elif hasattr(known, "frames"):
        known.frames = config.frames


def _forget(encoder: nn.Module) -> None:
    """Draw the weights of the ViT anew."""
    vit: Any = encoder.vit
    for module in vit.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.reset_parameters()
    with torch.no_grad():
        vit.cls_token.normal_(std=0.02)
        vit.pos_embed.normal_(std=0.02)


def _held_out(config: VitLensConfig, source: Source) -> tuple[Source, Source | None]:
    """Return the samples to learn from, and those to measure on."""
    if config.test is not None:
        test = open_source(config.test, in_chans=config.in_chans, seed=config.seed, **config.source_options())
        if not isinstance(test, Source) or test.kind.name != source.kind.name:
            raise UsageError(f"{config.test} holds {test.kind.plural}, and {config.data} {source.kind.plural}")
        _sized(test, config)
        test = captioned(test, origin_of(test, "labels" if config.captions == "labels" else "auto"), config.templates)
        return source, test if len(test) <= MOST_HELD_OUT else SubsetSource(test, _some(len(test), config.seed))
    if not config.val_fraction or len(source) < 2:
        return source, None
    return hold_out(source, min(config.val_fraction, MOST_HELD_OUT / len(source)), config.seed)


def _some(count: int, seed: int) -> Any:
    import numpy as np

    return np.sort(np.random.default_rng(seed).permutation(count)[:MOST_HELD_OUT])
