"""TOV-VICReg as a training method: settings, triplets of frames, LARS, what the report shows.

The algorithm itself is in `vicreg`. Paper: "Pretraining the Vision Transformer using self-supervised methods for vision
based Deep Reinforcement Learning", arXiv 2209.10901.

>>> import patchloom as pl
>>> run = pl.pretrain("tov_vicreg", data="atari:Pong,Freeway", out="runs/frames")  # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchloom.data import open_source
from patchloom.data.base import Source, StreamSource
from patchloom.data.frame_views import TripletViews
from patchloom.data.frames import FrameSource, TripletSource
from patchloom.encoders import depth, normalize
from patchloom.errors import UsageError
from patchloom.features.representation import observe, representation_report
from patchloom.systems.tov_vicreg.config import TOVVICRegConfig
from patchloom.systems.tov_vicreg.model import TOVVICReg, initialize_as_dino
from patchloom.training.gather import gathered
from patchloom.training.lars import Lars
from patchloom.training.method import Method, Transform
from patchloom.training.optim import parameter_groups

if TYPE_CHECKING:
    from patchloom.report import Section

__all__ = ["TOVVICReg", "TOVVICRegConfig", "TOVVICRegMethod"]

CONSTANT_LOSS = 0.4506
"""What a head that always says "shuffled" reaches where one triplet in six is in place."""
HELD_OUT, OBSERVED = 384, 256


class TOVVICRegMethod(Method):
    """VICReg on stacks of frames with temporal order verification (TOV-VICReg)."""

    config_class = TOVVICRegConfig
    config: TOVVICRegConfig

    def __init__(self, config: TOVVICRegConfig, source: Source | StreamSource) -> None:
        self.triplets = self._triplets(config, source)
        self.held_out = self._held_out(config)
        super().__init__(config, source)
        if config.init_from is None and not Path(config.encoder).exists():
            initialize_as_dino(self.encoder)
            # Published encoders see frames as they are, in [0, 1], whatever images the architecture was made for.
            plain = {"mean": (0.0,) * config.frames, "std": (1.0,) * config.frames}
            self.encoder.pretrained_cfg = {**dict(self.encoder.pretrained_cfg), **plain}
        self.model = TOVVICReg(
            self.encoder,
            projector=config.projector,
            sim=config.sim,
            std=config.std,
            cov=config.cov,
            temporal=config.temporal,
            balanced=config.balanced,
            chronological=config.chronological,
        )

    @staticmethod
    def _triplets(config: TOVVICRegConfig, source: Source | StreamSource) -> TripletSource:
        if not isinstance(source, FrameSource):
            raise UsageError(
                f"tov_vicreg needs frames in time order and {source.name} are images without one; name a folder of "
                f"recordings (frames:FOLDER) or games (atari:Pong,Freeway)"
            )
        return source.triplets(respect_episodes=config.respect_episodes, drop_blank=config.drop_blank)

    def _held_out(self, config: TOVVICRegConfig) -> TripletSource | None:
        """Return the triplets order verification is validated on, where `probe_data` names some."""
        if config.probe_data is None:
            return None
        options = config.source_options()
        held_out = open_source(config.probe_data, in_chans=config.frames, seed=config.seed, **options)
        return self._triplets(config, held_out)

    def training_source(self) -> TripletSource:
        """Return the frames as triplets."""
        return self.triplets

    def transform(self) -> Transform:
        """Return the augmentation of triplets."""
        config = self.config
        return TripletViews(
            self.input_size, config.frames, config.crop_scale, config.blur_sigma, config.flip, config.balanced
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return LARS, or AdamW where the settings say so."""
        config = self.config
        if config.optimizer == "adamw":
            return super().configure_optimizers()
        groups = parameter_groups(
            self, layer_decay=config.layer_decay, layer=self.layer, depth=depth(self.encoder), decay=_is_matrix
        )
        return Lars(groups, momentum=config.momentum, trust=config.trust)

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss, VICReg's three terms, the order loss and how often the order is told."""
        views = (normalize(self.pixels(batch[name]), self.encoder) for name in ("view1", "view2", "previous", "next"))
        losses, logits, targets = self.model.losses(self.model.represent(*views), gathered(batch["order"]))
        with torch.no_grad():
            losses["order_accuracy"] = ((logits > 0) == (targets > 0.5)).float().mean()
        losses["order_loss"] = losses.pop("temporal")
        return losses

    @torch.no_grad()
    def validate(self, device: torch.device) -> dict[str, Any]:
        """Return order verification on held-out triplets, each in all six orders.

        Once as in training, and once without augmentation: in training the observation at t is cropped and its
        neighbours are not, which tells four of the five wrong orders without any knowledge of time.
        """
        if self.held_out is None:
            return {}
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        views = self.transform()
        logits: dict[str, list[Tensor]] = {"shown": [], "plain": []}
        count = len(self.held_out)
        places = range(0, count, max(1, count // HELD_OUT))
        for start in range(0, len(places), 32):
            triplets = [(place, self.held_out.read(place).image) for place in places[start : start + 32]]
            samples = [views(image, torch.Generator().manual_seed(place)) for place, image in triplets]
            shown = [torch.stack([s[name] for s in samples]) for name in ("view1", "previous", "next")]
            plain = self._sized(torch.stack([image for _, image in triplets])).split(self.config.frames, dim=1)
            for name, parts in (("shown", shown), ("plain", plain)):
                logits[name].append(self._order_logits([self.pixels(part).to(device) for part in parts]).cpu())
        for module, training in modes:
            module.training = training
        shown_logits, plain_logits = torch.cat(logits["shown"]), torch.cat(logits["plain"])
        targets = (torch.arange(6) != 0).float().expand_as(shown_logits)
        return {
            "held_out_order_loss": float(F.binary_cross_entropy_with_logits(shown_logits, targets)),
            "held_out_order_accuracy": float(((shown_logits > 0) == (targets > 0.5)).float().mean()),
            "held_out_order_auroc": auroc(shown_logits.flatten(), targets.flatten()),
            "held_out_order_auroc_plain": auroc(plain_logits.flatten(), targets.flatten()),
        }

    def _order_logits(self, parts: list[Tensor]) -> Tensor:
        """Return the head's (n, 6) logits for (at t, before, after) in all six orders."""
        now, before, after = (self.encoder(normalize(part, self.encoder)) for part in parts)
        items = [before, now, after] if self.config.chronological else [now, before, after]
        labels = torch.arange(6, device=now.device)
        logits = [self.model.order_head(items, label.expand(len(now)))[0] for label in labels]
        return torch.cat(logits, dim=1).float()

    def _sized(self, triplets: Tensor) -> Tensor:
        """Return triplets at the encoder's size."""
        from torchvision.transforms.v2.functional import resize

        size = self.input_size
        return triplets if tuple(triplets.shape[-2:]) == size else resize(triplets, list(size), antialias=True)

    def summary(self) -> dict[str, Any]:
        """Return the triplets trained on and the representation's figures."""
        features = observe(self.bundle_model(), self.source, OBSERVED, self.device)
        figures = representation_report(features.features, features.groups, features.attentions, features.blocks)
        return {
            "triplets": len(self.triplets),
            "order_loss_of_a_constant": CONSTANT_LOSS,
            **{name: value for name, value in figures.items() if isinstance(value, (int, float))},
        }

    def report_sections(self, images: Tensor) -> list[Section]:
        """Return the triplets as the network sees them, order verification, the three terms, the representation."""
        from patchloom.report.frames import order_section, representation_section, terms_section, triplet_section
        from patchloom.training.metrics import read_metrics

        config = self.config
        rows = read_metrics(Path(config.out) / "metrics.csv")
        views = self.transform()
        generator = torch.Generator().manual_seed(config.seed)
        places = torch.linspace(0, len(self.triplets) - 1, 8).long().tolist()
        samples = [(image, views(image, generator)) for image in (self.triplets.read(place).image for place in places)]
        observed = observe(self.bundle_model(), self.source, OBSERVED, self.device)
        sections = [
            triplet_section(samples, config.frames),
            order_section(rows, balanced=config.balanced, chronological=config.chronological),
            terms_section(rows),
            representation_section(observed),
        ]
        return [section for section in sections if section is not None]


def auroc(scores: Tensor, targets: Tensor) -> float:
    """Return the area under the ROC curve: how often a positive scores above a negative, ties counting half.

    Args:
        scores: (n,).
        targets: (n,), above 0.5 for positives.
    """
    from torchmetrics.functional.classification import binary_auroc

    return float(binary_auroc(scores.sigmoid(), (targets > 0.5).long()))


def _is_matrix(name: str, parameter: torch.nn.Parameter) -> bool:
    return parameter.ndim > 1
