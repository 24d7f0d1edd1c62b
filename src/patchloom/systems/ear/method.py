"""Training the network that repairs: good images, cut where they stand out, and nothing else.

>>> import patchloom as pl
>>> run = pl.anomaly("ear", data="parts/bottle", encoder="runs/parts", out="runs/bottle")  # doctest: +SKIP
>>> run.summary["image_auroc"]  # doctest: +SKIP
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from patchloom.base.sizes import Size, pair, size_text
from patchloom.data import SubsetSource
from patchloom.data.base import Source, StreamSource
from patchloom.data.reading import reading_options
from patchloom.data.sample import Transform
from patchloom.data.survey import notice
from patchloom.encoders import Encoder
from patchloom.errors import UsageError
from patchloom.io import write_json
from patchloom.models.published import fill
from patchloom.systems.ear.config import EARConfig
from patchloom.systems.ear.data import GoodView, good_views, open_sets, open_validation
from patchloom.systems.ear.excision import (
    RANDOM_CELLS,
    RANDOM_SETS,
    apply_hint,
    estimate_mosaic_scale,
    random_sets,
)
from patchloom.systems.ear.losses import RecoveryLoss
from patchloom.systems.ear.model import EAR
from patchloom.systems.ear.saved import SavedEAR, load_ear, open_saliency, save_ear
from patchloom.systems.ear.unet import RecoveryUNet
from patchloom.training.frozen import leave_out, put_back
from patchloom.training.method import Method
from patchloom.training.optim import adamw, parameter_groups

if TYPE_CHECKING:
    from patchloom.report import Section

MOSAIC = "mosaic.json"
LOOKED_AT = 64
FEW = 20
"""Of fewer good images none is held out to set the threshold on."""
MOST_MASKS = 100_000
"""Masks that are kept once they are made."""
SHOWN = 6


class EARMethod(Method):
    """What stands out is excised and repaired; where the repair differs there is a defect (EAR).

    Attributes:
        saliency: What stands out; frozen.
        held_out: Good images the threshold is set on.
        tested: Images that are named for it instead; None where there are none.
        mosaic_cell: Side of the mosaic's cells; known once training begins.
        calibration: What the threshold was set on and what it is; empty before.
    """

    config_class = EARConfig
    config: EARConfig
    source: Source
    probed = False

    def __init__(self, config: EARConfig, source: Source | StreamSource) -> None:
        if not isinstance(source, Source):
            raise UsageError(f"{source.name} is a stream; anomaly takes images by number: a folder, or an embedded set")
        learnt, held_out = split_good(source, config)
        super().__init__(config, learnt)
        self.held_out: Source = held_out
        self.tested = open_validation(config, source)
        if self.tested is not None and self.tested.labels.all():
            raise UsageError(
                f"val_data={config.val_data} has no good images ({config.good}), and a threshold needs some"
            )
        self.saliency, self.asked = open_saliency(
            config.encoder, config.saliency, in_chans=config.in_chans, head_fusion=config.head_fusion
        )
        self.saliency(torch.zeros(1, config.in_chans, *self.input_size))  # now, not amid training, it is set to size
        self.loss = RecoveryLoss(config.l2, config.ssim, config.msgms)
        self.mosaic_cell = config.mosaic_scale or 16
        self.mosaic_costs: dict[int, float] = {}
        self.calibration: dict[str, Any] = {}
        self.thresholds: dict[str, Tensor] = {}
        self._masks: dict[str, np.ndarray] = {}

    @classmethod
    def open_data(cls, config: Any) -> tuple[Source | StreamSource, Any]:
        """Return the good images, and the settings with their shape and value range."""
        sets, config = open_sets(config)
        return sets.good, config

    @classmethod
    def images_to_learn_from(cls, config: Any, source: Source | StreamSource) -> int | None:
        """Return how many images remain to learn from."""
        return len(split_good(cast(Source, source), config)[0])

    def build_encoder(self) -> Encoder:
        """Return the network that repairs, with the weights of another run where `init_from` names one.

        Raises:
            UsageError: They are of another width, or of another number of channels.
        """
        config = self.config
        widths = tuple(config.width * 2**level for level in range(4))
        network = RecoveryUNet(config.in_chans, widths, config.output)
        network.pretrained_cfg = {"input_size": (config.in_chans, *self.input_size)}
        if config.init_from is not None:
            fill(network, load_ear(config.init_from).model.unet.state_dict())
        return cast(Encoder, network)  # what trains stands where other methods have their encoder

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the training images in pixels."""
        return pair(cast(Size, self.config.image_size))

    def transform(self) -> Transform:
        """Return what data workers do to an image."""
        return GoodView(self.input_size, self.config.augment == "texture")

    def prepare(self, source: Source | StreamSource, run_dir: Path) -> None:
        """Settle the cells of the mosaic on good images."""
        if self.config.mosaic_scale is not None or (run_dir / MOSAIC).exists() or self.config.hint != "mosaic":
            return
        if self.config.masking != "saliency":
            return
        cell, costs = estimate_mosaic_scale(self._excised_good())
        write_json(run_dir / MOSAIC, {"cell": cell, "detail_lost": {str(size): cost for size, cost in costs.items()}})
        told = ", ".join(f"{size}: {cost:.3f}" for size, cost in costs.items())
        notice(f"mosaic of {cell} x {cell} pixels (detail lost in the excised part, by side of the cells: {told})")

    def _excised_good(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.source)
        chosen = np.unique(np.linspace(0, count - 1, min(count, LOOKED_AT)).round().astype(int))
        for images, _, _ in self.views(SubsetSource(self.source, chosen), 1):
            images = images.to(self.device)
            yield images, self.pipeline(self.encoder).mask(images)

    def load_prepared(self, run_dir: Path) -> None:
        """Take the cells of the mosaic."""
        if (run_dir / MOSAIC).exists() and self.config.mosaic_scale is None:
            found = json.loads((run_dir / MOSAIC).read_text(encoding="utf-8"))
            self.mosaic_cell = int(found["cell"])
            self.mosaic_costs = {int(size): float(cost) for size, cost in found["detail_lost"].items()}

    def pipeline(self, network: nn.Module) -> EAR:
        """Return everything from an image to its score, around a repair network."""
        config = self.config
        model = EAR(
            self.saliency,
            network,
            config.quantile,
            self.mosaic_cell,
            config.smoothing,
            config.score,
            config.hint,
            config.scope,
            excises=config.masking != "none",
        )
        for name, value in self.thresholds.items():
            getattr(model, name).copy_(value)
        return model.to(self.device)

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss of a batch and its parts, and the greatest loss of an image."""
        images = self.pixels(batch["image"])
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            mask = self._training_masks(batch["key"], images)
            hint = "empty" if self.config.masking == "random" else self.config.hint
            given = apply_hint(images, mask, hint, self.mosaic_cell)
        found = self.loss.per_image(images, self.encoder(given))
        return {**{name: value.mean() for name, value in found.items()}, "worst_loss": found["loss"].detach().max()}

    def _training_masks(self, keys: list[str], images: Tensor) -> Tensor:
        """Return what is excised; of images that always look the same, as it was found the first time."""
        if self.config.masking == "random":
            return torch.cat([_random_mask(images[:1]) for _ in keys])
        model = self.pipeline(self.encoder)
        if self.config.augment != "none" or self.config.scope == "batch" or len(self.source) > MOST_MASKS:
            return model.mask(images)
        new = [number for number, key in enumerate(keys) if key not in self._masks]
        if new:
            for number, mask in zip(new, model.mask(images[new]).bool().cpu().numpy(), strict=True):
                self._masks[keys[number]] = np.packbits(mask)
        height, width = self.input_size
        bits = np.stack([np.unpackbits(self._masks[key], count=height * width) for key in keys])
        return torch.from_numpy(bits.reshape(-1, 1, height, width)).to(images)

    def configure_optimizers(self) -> Any:
        """Return Adam, with decoupled weight decay where that is asked for."""
        config = self.config
        return adamw(parameter_groups(self), betas=config.betas, eps=config.eps, fused=config.precision != "16-mixed")

    @torch.no_grad()
    def validate(self, device: torch.device) -> dict[str, Any]:
        """Set the threshold, and return it with the loss on the images it was set on."""
        if self.step == 0:
            return {}
        network = self.bundle_model()
        training = network.training
        model = self.pipeline(network.eval())
        scores, peaks, losses, labels = [], [], [], []
        tested = self.tested
        for images, _, truth in self.views(self.held_out if tested is None else tested, self.config.score_batch_size):
            images = images.to(device)
            found = model(images)
            scores += found["pred_score"].tolist()
            peaks += found["anomaly_map"].amax((1, 2, 3)).tolist()
            losses += self.loss.per_image(images, found["recovered"])["loss"].tolist()
            labels += truth
        network.train(training)
        known = None if tested is None else labels
        model.calibrate(scores, peaks, known)
        names = ("threshold", "pixel_threshold", "score_min", "score_max")
        self.thresholds = {name: getattr(model, name).detach().cpu() for name in names}
        by_f1 = known is not None and any(known)
        self.calibration = {
            "images": len(scores),
            "learnt_from": tested is None and self.held_out is self.source,
            "rule": "best F1" if by_f1 else "99.5th percentile of good images",
            **{name: float(value) for name, value in self.thresholds.items()},
        }
        return {"held_out_loss": float(np.mean(losses)), "threshold": self.calibration["threshold"]}

    def views(self, source: Source, batch_size: int) -> Iterator[tuple[Tensor, list[str], list[int]]]:
        """Yield images of the network's size, see `good_views`."""
        return good_views(source, self.input_size, batch_size, self.config.num_workers)

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write the pipeline around the network, without the frozen encoder."""
        save_ear(
            self.pipeline(model),
            path,
            image_size=self.input_size,
            asked=self.asked,
            reading=reading_options(self.source),
            calibration=self.calibration,
            lineage=lineage,
        )

    def saved(self) -> SavedEAR:
        """Return the model as it is, as `load_ear` would."""
        about = {"calibration": self.calibration}
        return SavedEAR(self.pipeline(self.bundle_model()).eval(), self.input_size, reading_options(self.source), about)

    @torch.no_grad()
    def report_sections(self, images: Tensor) -> list[Section]:
        """Return good images, what was excised of them, and how they were repaired."""
        from patchloom.report import Section
        from patchloom.systems.ear.report import recovery_figure

        saved = self.saved()
        chosen = np.unique(np.linspace(0, len(self.held_out) - 1, SHOWN).round().astype(int))
        pictures = torch.cat([images for images, _, _ in self.views(SubsetSource(self.held_out, chosen), 1)])
        found = [saved.model(picture[None].to(self.device)) for picture in pictures]
        how = "learnt from" if self.calibration.get("learnt_from") else "not learnt from"
        text = (
            f"Good images that were {how}. {self._excision_text()} Where a repaired image differs there is a defect; "
            f"on these there should be none. Threshold of the score: "
            f"{self.calibration.get('threshold', float('nan')):.4g} ({self.calibration.get('rule', 'not set')}, "
            f"{self.calibration.get('images', 0)} images)."
        )
        figure = recovery_figure(pictures, found, highest=self.calibration.get("pixel_threshold"))
        return [Section(title="Excision and recovery", text=text, figures=[figure])]

    def _excision_text(self) -> str:
        """Return what is excised and what is left in its place, in a sentence."""
        if self.config.masking == "none":
            return "Nothing is excised: the network gives back what it sees."
        left = {
            "mosaic": f"a mosaic of {self.mosaic_cell} x {self.mosaic_cell} pixels is left as a hint",
            "blur": "a blurred image is left as a hint",
            "empty": "nothing is left in its place",
        }[self.config.hint]
        return f"What stands out (by {self.saliency.kind}) is excised, {left}, and the network repairs it."

    def summary(self) -> dict[str, Any]:
        """Return how images are cut and judged."""
        return {
            "saliency": self.saliency.kind,
            "mosaic_scale": self.mosaic_cell,
            "detail_lost": {str(cell): cost for cell, cost in self.mosaic_costs.items()},
            "calibration": self.calibration,
            "image_size": list(self.input_size),
        }

    def describe(self) -> dict[str, Any]:
        """Return what the log and the report say about the network."""
        count = sum(parameter.numel() for parameter in self.encoder.parameters())
        return {
            "encoder": f"U-Net of width {self.config.width} on {size_text(self.input_size)} pixels",
            "width": self.config.width,
            "depth": len(cast(RecoveryUNet, self.encoder).widths),
            "parameters": count,
            "trained_parameters": count,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        leave_out(checkpoint, "saliency", self.saliency)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        put_back(checkpoint, "saliency", self.saliency, self.config.encoder)


def split_good(source: Source, config: EARConfig) -> tuple[Source, Source]:
    """Return good images to learn from, and those the threshold is set on: others, where there are enough.

    Raises:
        UsageError: Fewer than two images.
    """
    if len(source) < 2:
        raise UsageError(f"{source.name} has {len(source)} good image; batch norm needs at least 2 to learn from")
    if config.val_data is not None:
        return source, source
    if len(source) < FEW:
        return source, source
    count = max(1, round(config.calibration_share * len(source)))
    order = np.random.default_rng(config.seed).permutation(len(source))
    return SubsetSource(source, np.sort(order[count:])), SubsetSource(source, np.sort(order[:count]))


def say_calibration(source: Source, config: EARConfig) -> None:
    """Say what the threshold is set on."""
    learnt, held_out = split_good(source, config)
    if config.val_data is not None:
        notice(f"the threshold is set on {config.val_data}")
    elif learnt is held_out:
        notice(
            f"{len(source)} good images are too few to hold some out: the threshold is set on images that are learnt "
            f"from, and will be low; --val_data names others"
        )
    else:
        notice(f"{len(learnt)} good images are learnt from, and the threshold is set on {len(held_out)} others")


def _random_mask(image: Tensor) -> Tensor:
    """Return one of the sets of random cells that the random-mask baseline empties, (1, 1, H, W)."""
    cell = RANDOM_CELLS[int(torch.randint(len(RANDOM_CELLS), ()))]
    return random_sets((image.shape[-2], image.shape[-1]), cell, RANDOM_SETS)[:1].to(image)
