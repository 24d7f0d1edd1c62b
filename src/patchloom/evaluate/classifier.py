"""A classifier as it stands, on labelled images or clips; of videos the mean answer over several clips and crops.

The probabilities of all views of a video are averaged, and its class is that of the greatest: VideoMAE V2 tests 5 clips
x 3 crops where frames are sampled densely and 2 x 3 where sparsely (Wang et al. 2023, arXiv 2303.16727, appendix).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchloom.data import make_loader, open_source
from patchloom.data.base import Source, no_labels
from patchloom.data.clip_views import SideCrops
from patchloom.data.pixels import unit
from patchloom.data.sample import Transform
from patchloom.data.subset import SeveralViews
from patchloom.encoders import embed_dim, in_chans, input_size, normalize
from patchloom.errors import UsageError
from patchloom.evaluate.classifier_config import ClassifierConfig
from patchloom.evaluate.protocol import Evaluation
from patchloom.evaluate.statistics.figures import classification_figures
from patchloom.evaluate.statistics.predictions import Predictions
from patchloom.features.extract import NO_LABEL, Features, torch_device
from patchloom.features.inputs import require_taken
from patchloom.models.bundle import load
from patchloom.training.teachers import FrozenTeacher

TOP = 5


class Classifier(Evaluation):
    """A trained classifier as it stands, on test; answers may be averaged over clips and crops of a video."""

    config_class = ClassifierConfig
    config: ClassifierConfig

    def figures(self) -> dict[str, Any]:
        """Return accuracy (a fraction), that of the five likeliest classes, and what goes with them."""
        config = self.config
        model = config.encoder if isinstance(config.encoder, torch.nn.Module) else load(str(config.encoder))
        teacher = FrozenTeacher(model, str(config.encoder))
        names = teacher.class_names
        if names is None:
            raise UsageError(
                f"{config.encoder} is no classifier, or does not know the names of its classes; train one by patchloom "
                f"adapt"
            )
        test = self._test(model, names)
        probabilities, measured = self._answers(teacher, test, names)
        self.predictions = Predictions(
            measured.keys,
            probabilities.argmax(1).numpy(),
            measured.labels.numpy(),
            "accuracy",
            names,
            probabilities.numpy(),
            {"encoder": str(config.encoder), "train": "", "test": config.test, "protocol": "classifier"},
            self.groups_of(measured.keys),
        )
        figures = classification_figures(self.predictions, measured, measured, **self.drawing())
        figures.pop("train_images")
        likeliest = probabilities.topk(min(TOP, len(names)), dim=1).indices
        found = (likeliest == measured.labels.unsqueeze(1)).any(1)
        return {**figures, f"top{TOP}": float(found.double().mean()), "views": config.clips * config.crops}

    def _test(self, model: Any, names: list[str]) -> Source:
        config = self.config
        test = open_source(
            config.test,
            in_chans=in_chans(model),
            seed=config.seed,
            model=model,
            by_index=True,
            **config.source_options(),
        )
        require_taken(test, model)
        if test.class_names is None:
            raise no_labels(test, "evaluate classifier needs labels and ")
        if not isinstance(test, Source) or test.multilabel:
            raise UsageError("evaluate classifier measures one class per sample, of samples read by number")
        if unknown := [name for name in test.class_names if name not in names]:
            raise UsageError(
                f"{config.encoder} does not know the class {unknown[0]} of {config.test}; it knows "
                f"{', '.join(names[:8])}"
            )
        if config.clips * config.crops > 1 and test.kind.name != "clip":
            raise UsageError(
                f"clips and crops are of videos, and {config.test} holds {test.kind.plural}; leave them out"
            )
        return test

    @torch.no_grad()
    def _answers(self, teacher: FrozenTeacher, test: Source, names: list[str]) -> tuple[Tensor, Features]:
        """Return probabilities (n, K) of the labelled samples, and these with their classes in the order of names."""
        config, model = self.config, teacher.model
        device = torch_device(config.device)
        teacher.to(device)
        several = config.clips * config.crops > 1
        source: Source = SeveralViews(test, config.clips) if several else test
        size = input_size(model)
        view: Transform = SideCrops(size, config.crops) if several else test.kind.eval_view("crop", size)
        loader = make_loader(source, view, config.batch_size, seed=0, shuffle=False, num_workers=config.num_workers)
        told, labels, keys, skipped = [], [], [], []
        for batch in loader:
            skipped += batch["skipped"]
            if not batch["key"]:
                continue
            samples = batch[test.kind.name]
            views = samples.flatten(0, 1) if several else samples
            answers = [
                model(normalize(unit(chunk.to(device)), model)).float().softmax(1).cpu()
                for chunk in views.split(config.batch_size)
            ]
            told.append(torch.cat(answers).unflatten(0, (len(samples), -1)).mean(1))
            labels.append(batch["label"])
            keys += batch["key"]
        if not told:
            raise UsageError(f"{test.name} holds no readable {test.kind.name}")
        place = torch.tensor([names.index(name) for name in test.class_names or names])
        probabilities, known = torch.cat(told), torch.cat(labels)
        labelled = known >= 0
        skipped += [(key, NO_LABEL) for key, keep in zip(keys, labelled.tolist(), strict=True) if not keep]
        keys = [key for key, keep in zip(keys, labelled.tolist(), strict=True) if keep]
        vectors = torch.zeros(1, embed_dim(model)).expand(int(labelled.sum()), -1)
        return probabilities[labelled], Features(vectors, place[known[labelled]], keys, skipped)
