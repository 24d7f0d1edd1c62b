"""Training ViT-P's point classifier as a run, on masks, boxes or points.

Shahabodini et al. 2025 (arXiv 2505.19795).

>>> import patchloom as pl
>>> run = pl.segment("point", data="camvid:data/camvid:train", probe_data="camvid:data/camvid:val",
...                  encoder="runs/mine", out="runs/streets")  # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.base.sizes import pair
from patchloom.base.source_options import refuse_untaken
from patchloom.data.base import Source, StreamSource
from patchloom.data.coco import CocoSource
from patchloom.data.mask_values import MaskCoding, check_shares
from patchloom.data.pixels import unit
from patchloom.data.point_table import PointTableSource, columns_of
from patchloom.data.reading import Reading, reading_options
from patchloom.data.segmentation import MaskSource, colours, open_segmentation, refuse_unmasked
from patchloom.data.survey import notice
from patchloom.encoders import Encoder, create_encoder, image_size, normalize, patch_size, set_image_size
from patchloom.encoders.denoised import refuse_denoised
from patchloom.errors import UsageError
from patchloom.models.bundle import fetch_encoder, read_reading
from patchloom.models.start import load_weights, start_encoder
from patchloom.segment.class_weights import use_class_weights
from patchloom.segment.image_scores import ImageScores
from patchloom.segment.words import between, rate
from patchloom.systems.vit_comer.parts import takes_any_size
from patchloom.systems.vit_p.config import PointConfig
from patchloom.systems.vit_p.measure import measure
from patchloom.systems.vit_p.model import PointViT, check_sides
from patchloom.systems.vit_p.proposals import in_order, open_proposals
from patchloom.systems.vit_p.sampling import NO_CLASS, PointSampler, PointView
from patchloom.systems.vit_p.saved import save_points
from patchloom.systems.vit_p.segmenter import PointSegmenter
from patchloom.systems.vit_p.weak import WeakSource
from patchloom.training.inputs import read_as
from patchloom.training.method import Method, Transform
from patchloom.training.optim import make_optimizer, parameter_groups

if TYPE_CHECKING:
    from patchloom.report import Section

READS = {"masks": ("mask",), "boxes": ("boxes", "box_classes"), "points": ("points", "point_classes")}
POINT_LR = 1e-2


class PointMethod(Method):
    """A ViT classifies masks, which others draw, at their points (ViT-P).

    Attributes:
        classifier: The whole of what trains; its parts are modules of the method.
        test: Images with masks that it is measured on; None where there are none.
    """

    config_class = PointConfig
    config: PointConfig
    class_weights: Tensor | None
    probed = False

    def __init__(self, config: PointConfig, source: Source | StreamSource) -> None:
        super().__init__(config, source)
        assert source.class_names is not None
        self.class_names = list(source.class_names)
        check_sides(self.input_size, patch_size(self.encoder))
        refuse_denoised(self.encoder, "points have tokens of their own, for which a denoiser (DVT) has no places")
        classifier = PointViT(
            self.encoder, len(self.class_names), config.interpolate_offset or None, config.point_start
        )
        self.cls_embeddings, self.head = classifier.cls_embeddings, classifier.head
        self.classifier = (classifier,)  # its parts are modules here already
        self.known = known_of(config, source)
        masks = source.source if isinstance(source, WeakSource) else source
        self.masks = masks if isinstance(masks, MaskSource) else None
        shares = None if self.masks is None else self.masks.shares.classes
        self.weights = use_class_weights(self, config.class_weights, shares, self.class_names)
        self.test = self._open_test()
        self.generator: Any = None
        self.scores: ImageScores | None = None
        self.figures: dict[str, Any] = {}
        # What cannot be is refused before anything is trained.
        self.segmenter(config.proposals)
        names = open_proposals(config.proposals).class_names
        if names is not None and config.alpha != 1:
            in_order(torch.zeros(0, len(names) + 1), names, self.class_names, config.proposals)

    @classmethod
    def open_data(cls, config: Any) -> tuple[Source | StreamSource, Any]:
        """Return the images with what is known of them, and the settings with their value range."""
        start = next((path for path in (config.init_from, config.encoder) if path and Path(path).exists()), None)
        options = {**({} if start is None else read_reading(start)), **config.source_options()}
        source = open_known(config, options)
        return source, dataclasses.replace(config, **reading_options(source))

    def build_encoder(self) -> Encoder:
        """Return the encoder with its own positions; one that is tied to a size is set up for that of training."""
        config = self.config
        more: dict[str, Any] = {"in_chans": config.in_chans, "drop_path": config.drop_path, "image_size": None}
        if Path(config.encoder).exists() or config.untrained or config.init_from is not None:
            encoder = start_encoder(config.encoder, create_encoder, **more)
        else:
            encoder = fetch_encoder(config.encoder, create_encoder, **more)
        if config.init_from is not None:
            load_weights(encoder, config.init_from, self.starting_weights)
        if config.image_size is not None and not takes_any_size(encoder):
            set_image_size(encoder, pair(config.image_size))
        return read_as(encoder, config)

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width that the classifier sees every image at, in pixels."""
        size = self.config.image_size
        return image_size(self.encoder) if size is None else pair(size)

    def transform(self) -> Transform:
        """Return crops at the size of training, turned and mirrored, with points drawn on them."""
        config = self.config
        return PointView(
            self.input_size,
            PointSampler(config.num_points, config.sampling == "balanced"),
            READS[self.known],
            crop_scale=config.crop_scale,
            rotate=config.rotate,
            flip=config.flip,
            colours=config.colours,
            nearest=config.nearest,
        )

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the cross-entropy of the points whose class is known, and the share that is right."""
        images = normalize(self.pixels(batch["image"]), self.encoder)
        logits, classes = self.classifier[0](images, batch["points"]).flatten(0, 1), batch["classes"].flatten()
        known = classes != NO_CLASS
        count, weights = known.sum().clamp(min=1), self.class_weights
        loss = F.cross_entropy(logits.float(), classes, weights, ignore_index=NO_CLASS, reduction="sum")
        loss = loss / (count if weights is None else weights[classes[known]].sum().clamp(min=1e-12))
        return {"loss": loss, "point_accuracy": (logits.argmax(1) == classes)[known].sum() / count}

    def configure_optimizers(self) -> Any:
        """Return SGD or AdamW; the map from places to tokens has a rate of its own."""
        config = self.config
        layers: dict[str, Any] = {
            "layer_decay": config.layer_decay,
            "layer": self.layer,
            "depth": len(self.encoder.blocks),
        }
        groups = parameter_groups(
            self, **layers, decay=self.decays, select=lambda name: not name.startswith("cls_embeddings.")
        )
        places = parameter_groups(self, decay=self.decays, select=lambda name: name.startswith("cls_embeddings."))
        own = config.point_lr or (POINT_LR if config.optimizer == "sgd" else self.peak_lr())
        for group in places:
            group["lr_scale"] = own / self.peak_lr()
        fused = self.fused and config.precision != "16-mixed"
        return make_optimizer(
            config.optimizer,
            [*groups, *places],
            betas=config.betas,
            eps=config.eps,
            momentum=config.momentum,
            fused=fused,
        )

    def segmenter(self, generator: Any) -> PointSegmenter:
        """Return the model as it is, with what draws masks for it."""
        config = self.config
        return PointSegmenter(
            self.classifier[0],
            generator,
            self.input_size,
            self.class_names,
            self.masks.palette if self.masks is not None else colours(len(self.class_names)),
            alpha=config.alpha,
            renormalize=config.renormalize,
            point_mode=config.point_mode,
            chunk=config.chunk,
            things=config.thing_names,
            object_mask_threshold=config.object_mask_threshold,
            overlap_threshold=config.overlap_threshold,
            top_k=config.top_k,
        )

    @torch.no_grad()
    def validate(self, device: torch.device) -> dict[str, Any]:
        """Return what the segmenter is worth on the test images, once it has learnt something."""
        if self.test is None or self.step == 0:
            return {}
        model = self.segmenter(self._generator()).eval()
        self.scores = ImageScores(self.class_names)
        self.figures = measure(model, self.test, self.config.seed, self.scores)
        self.train()
        return self.figures

    def summary(self) -> dict[str, Any]:
        """Return what was learnt from and what draws masks."""
        about: dict[str, Any] = {"head": "vit_p", "proposals": self.config.proposals, "learnt_from": self.known}
        if self.weights is not None:
            about["class_weights"] = self.weights
        if self.masks is not None:
            about["masks"] = self.masks.coding.describe()
            about["masks"]["train"] = {"class_shares": self.masks.shares.classes}
        return about

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write the encoder as a bundle, and the classifier beside it."""
        super().save_model(model, path, lineage)
        named = self.config.proposals
        coding = self.masks.coding if self.masks is not None else None
        save_points(self.segmenter(named), path, str(Path(named).resolve()) if Path(named).exists() else named, coding)

    @torch.no_grad()
    def report_sections(self, images: Tensor) -> list[Section]:
        """Return images, their masks, what the segmenter says and where it is wrong; and the figures by class."""
        from patchloom.report import Section
        from patchloom.segment.pictures import Segmented, choose_shown, error_figures, figures_section

        source = self.test or self.masks
        if source is None:
            return []
        model = self.segmenter(self._generator()).eval()

        def segmented(index: int) -> Segmented:
            sample = source.read(index)
            pixels = unit(sample.image)
            return Segmented(pixels, torch.as_tensor(sample.named["mask"]), model.segment(pixels))

        shown = choose_shown(self.scores, len(source), self.config.seed)
        figures = error_figures(shown, segmented, source.palette, self.class_names)
        self.train()
        which = "Test images" if self.test is not None else "Training images"
        text = (
            f"{which}, their masks, the classes of the masks that {self.config.proposals} draws, and where they are "
            f"wrong. {source.said()}"
        )
        sections = [Section(title="Segmentation masks and predictions", text=text, figures=figures)]
        if self.figures:
            sections.append(figures_section(self.figures, self.class_names, self._said()))
        return sections

    def _said(self) -> str:
        figures = self.figures
        text = (
            f"Were every mask given the class it overlaps most, mean IoU would be {rate(figures['oracle_miou'])}: what "
            f"is above that, {self.config.proposals} would have to draw."
        )
        if figures.get("pq") is not None:
            text += f" Panoptic quality {rate(figures['pq'])}{between(figures['pq_interval'])}."
        if figures.get("mask_ap") is not None and figures["mask_ap"] == figures["mask_ap"]:
            text += f" Mask AP {rate(figures['mask_ap'])}{between(figures['mask_ap_interval'])}."
        return text

    def describe(self) -> dict[str, Any]:
        """Return what the log and the report say."""
        return {**super().describe(), "decoder": "vit_p", "classes": len(self.class_names)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["masks"] = self._read_as()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if checkpoint["masks"] != self._read_as():
            raise UsageError(
                f"the classes of {self.config.data} are others now, or read otherwise, than when the run in "
                f"{self.config.out} began; put the files back, or start a new run"
            )

    def _read_as(self) -> str:
        coding = None if self.masks is None else self.masks.coding
        return repr((None if coding is None else coding.table(), self.class_names, self.known))

    def _generator(self) -> Any:
        if self.generator is None:
            self.generator = open_proposals(self.config.proposals, self.device)
        return self.generator

    def _open_test(self) -> MaskSource | None:
        config = self.config
        if config.probe_data is None:
            return None
        options = {**config.source_options(), **reading_options(self.masks or self.source)}
        coding: MaskCoding | None = None if self.masks is None else self.masks.coding
        test = open_segmentation(config.probe_data, in_chans=config.in_chans, coding=coding, settings=config, **options)
        if self.masks is not None:
            test.palette = self.masks.palette
        elif test.class_names != self.class_names:
            raise UsageError(
                f"the masks of {test.name} are of the classes {', '.join(test.class_names[:12])}, and {config.data} "
                f"has {', '.join(self.class_names[:12])}; name them alike and in the same order, by classes.txt "
                f"beside them"
            )
        notice(test.said())
        check_shares(test.coding, test.shares, test.name)
        return test


def open_known(config: PointConfig, options: dict[str, Any]) -> Source:
    """Return the images that a run learns from, with masks, boxes or points.

    Raises:
        UsageError: They cannot be opened, or have other labels than asked for.
    """
    path = Path(config.data)
    if path.suffix.lower() == ".json" or columns_of(path) is not None:
        opener: Any = CocoSource if path.suffix.lower() == ".json" else PointTableSource
        kind = "boxes" if opener is CocoSource else "points"
        if config.labels not in ("auto", kind):
            raise UsageError(f"{config.data} has {kind}, and labels is {config.labels}; leave it out")
        chosen = {name: options[name] for name in ("include", "exclude") if name in options}
        refuse_untaken(opener, config.data, {n: v for n, v in config.source_options().items() if n not in _READING})
        source = opener(config.data, in_chans=config.in_chans, **chosen)
        source = Reading.of({name: value for name, value in options.items() if name in _READING}).given_to(source)
        found: Source = source
        notice(f"{found.name}: {kind} of {len(source.class_names)} classes: {', '.join(source.class_names[:12])}")
        return found
    refuse_unmasked(config.data, config.source_options())
    masks = open_segmentation(config.data, in_chans=config.in_chans, settings=config, **options)
    notice(masks.said())
    if (more := check_shares(masks.coding, masks.shares, masks.name)) is not None:
        notice(more)
    if config.labels in ("auto", "masks"):
        return masks
    notice(f"{masks.name}: learning from {config.labels} made of the masks")
    return WeakSource(masks, config.labels, config.points_per_class, config.seed)


def known_of(config: PointConfig, source: Source | StreamSource) -> str:
    """Return what is known of the images of a source: `masks`, `boxes` or `points`.

    Raises:
        UsageError: Nothing of that.
    """
    if isinstance(source, WeakSource):
        return source.known
    if isinstance(source, CocoSource):
        return "boxes"
    if isinstance(source, PointTableSource):
        return "points"
    if isinstance(source, MaskSource):
        return "masks"
    raise UsageError(
        f"{source.name} has no masks, boxes or points; segment point takes images with masks, FILE.json of COCO's "
        f"layout, or FILE.csv with the columns file, row, column, label"
    )


_READING = ("value_range", "no_data", "use_channels")
