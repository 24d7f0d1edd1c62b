"""What towers that meet in one space are worth without training: classes named by sentences, captions and images found.

Zero-shot classification and the recall of retrieval are CLIP's (Radford et al. 2021, arXiv 2103.00020).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from patchloom.data import open_source
from patchloom.data.base import Source, no_labels
from patchloom.data.kinds import require_kind
from patchloom.data.subset import labelled_images
from patchloom.errors import UsageError
from patchloom.evaluate.protocol import Evaluation
from patchloom.evaluate.statistics.figures import classification_figures
from patchloom.evaluate.statistics.predictions import Predictions
from patchloom.evaluate.words_config import CaptionRetrievalConfig, TowersConfig, ZeroShotConfig
from patchloom.features.extract import Features, torch_device
from patchloom.models.bundle import read_lineage


class _Towers(Evaluation):
    """What both share: the towers, their templates, the images."""

    config: Any
    takes_senses = False
    """Whether samples of a run of align vit_lens are taken, too"""
    sense: Any = None

    def opened(self) -> tuple[Any, Source, tuple[str, ...]]:
        """Return the towers, the images, and the templates.

        Raises:
            UsageError: There are no towers, or no images by number.
        """
        from patchloom.systems.clip.model import CLIP
        from patchloom.systems.clip.saved import load_clip

        config: TowersConfig = self.config
        model = config.encoder if isinstance(config.encoder, CLIP) else load_clip(config.encoder)
        model = model.to(torch_device(config.device)).eval()
        source = open_source(config.test, by_index=True, model=model.visual.trunk, **config.source_options())
        self.sense = self.sense_of(source, model)
        require_kind(source, ("image",) if self.sense is None else (source.kind.name,), "aligned towers")
        if not isinstance(source, Source):
            raise UsageError(f"{config.test} can only be read from front to back; unpack the shards to .tar")
        return model, source, _templates(config)

    def sense_of(self, source: Any, model: Any) -> Any:
        """Return the encoder of samples that are no images, where the towers have one; None: images are measured."""
        from patchloom.systems.vit_lens.saved import find_lens, load_lens, sized

        where = self.config.encoder
        if not self.takes_senses or not isinstance(where, str | Path) or find_lens(where) is None:
            return None
        lens = load_lens(where)
        if source.kind.name != lens.about["kind"]:
            return None
        sized(source, lens.about)
        return lens.visual.to(model.logit_scale.device)

    def about(self) -> dict[str, Any]:
        """Return what predictions are told apart by."""
        config, kind = self.config, type(self.config.encoder)
        name = str(config.encoder) if isinstance(config.encoder, str | Path) else kind.__name__
        return {"encoder": name, "test": config.test, "protocol": type(self).__name__.lower()}


class ZeroShot(_Towers):
    """Classes named by sentences, without any training on them; needs towers of align clip (extra: clip)."""

    config_class = ZeroShotConfig
    takes_senses = True

    def figures(self) -> dict[str, Any]:
        """Return the accuracy, that of the first five, and what goes with them."""
        from patchloom.systems.clip.held_out import embed_images
        from patchloom.systems.clip.zero_shot import class_features

        config: ZeroShotConfig = self.config
        model, source, templates = self.opened()
        if source.class_names is None or source.multilabel:
            raise no_labels(source, "evaluate zero_shot needs one class per image and ")
        source, _ = labelled_images(source)
        names = list(source.class_names or [])
        spoken = list(config.class_names or names)
        if len(spoken) != len(names):
            raise UsageError(f"class_names has {len(spoken)} names, and {config.test} has {len(names)} classes")
        classes = class_features(model, spoken, templates).cpu()
        reading = {"batch_size": config.batch_size, "num_workers": config.num_workers}
        if self.sense is None:
            found = embed_images(model, source, **reading)
        else:
            from patchloom.systems.vit_lens.held_out import embed

            found = embed(self.sense, source, **reading)
        scores = 100.0 * found.images @ classes.T
        test = Features(found.images, found.labels, found.keys, found.skipped)
        self.predictions = Predictions(
            test.keys,
            scores.argmax(1).numpy(),
            test.labels.numpy(),
            "accuracy",
            names,
            scores.numpy(),
            self.about(),
            self.groups_of(test.keys),
        )
        figures = classification_figures(self.predictions, test, test, **self.drawing())
        del figures["train_images"]
        ranked = scores.topk(min(5, len(names)), dim=1).indices
        figures["accuracy_top5"] = float((ranked == test.labels[:, None]).any(1).float().mean())
        return {**figures, "templates": list(templates)}


class CaptionRetrieval(_Towers):
    """How often an image finds its caption, and a caption its image; needs towers of align clip (extra: clip)."""

    config_class = CaptionRetrievalConfig

    def figures(self) -> dict[str, Any]:
        """Return recall in both directions, and what goes with it."""
        from patchloom.systems.clip.captions import NO_CAPTION, captioned, origin_of
        from patchloom.systems.clip.held_out import embed_pairs
        from patchloom.systems.clip.zero_shot import by_image, retrieval

        model, source, templates = self.opened()
        origin = origin_of(source, self.config.captions)
        source = captioned(source, origin, templates)
        found = embed_pairs(model, source, batch_size=self.config.batch_size, num_workers=self.config.num_workers)
        first, owners = by_image(found.keys)
        images = found.images[first]
        figures = retrieval(images, found.texts, owners, found.text_ids)
        hits = retrieval(images, found.texts, owners, found.text_ids, by_query=True)
        keys = [found.keys[number] for number in first]
        values = np.asarray(hits["image_to_text_r1"], dtype=np.float64)
        self.predictions = Predictions(
            keys, values, np.zeros(len(keys)), "mean_value", about=self.about(), groups=self.groups_of(keys)
        )
        interval = replace(self.predictions, predicted=values).interval(**self.drawing())
        missing = sum(reason == NO_CAPTION for _, reason in found.skipped)
        return {
            "score": figures["retrieval_mean_recall"],
            "score_name": "retrieval_mean_recall",
            **figures,
            "intervals": {"image_to_text_r1": interval.ends},
            "n": len(first),
            "captions": len(found.texts),
            "different_captions": len(found.text_ids.unique()),
            "captions_from": origin,
            "captions_cut": found.cut,
            "images_without_caption": missing,
            "unreadable_images": len(found.skipped) - missing,
            "skipped": [{"file": key, "reason": reason} for key, reason in found.skipped],
            "dim": int(found.images.shape[1]),
        }


def _templates(config: TowersConfig) -> tuple[str, ...]:
    """Return the templates of the settings, else of the run that made the towers, else the usual ones."""
    from patchloom.systems.clip.config import TEMPLATES

    if config.templates is not None:
        return tuple(config.templates)
    if not isinstance(config.encoder, str | Path):
        return TEMPLATES
    try:
        settings = read_lineage(config.encoder).get("settings", {})
    except (UsageError, json.JSONDecodeError):  # a folder of open_clip, which says nothing of templates
        return TEMPLATES
    return tuple(settings.get("templates") or TEMPLATES)
