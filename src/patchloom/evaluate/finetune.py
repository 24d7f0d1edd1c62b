"""What an encoder becomes when it is trained further: `patchloom adapt` as an evaluation.

End-to-end fine-tuning and the frugal kinds (LoRA, BitFit, prompts, adapters) are measured like every frozen probe: the
same test images, the same figures with intervals, predictions that `patchloom evaluate compare` takes.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from patchloom.data import EvalTransform, make_loader, open_alike
from patchloom.data.base import Source
from patchloom.data.pixels import unit
from patchloom.data.reading import reading_options
from patchloom.encoders import embed_dim, image_size, in_chans, normalize
from patchloom.errors import UsageError
from patchloom.evaluate.finetune_config import FinetuneEvaluationConfig
from patchloom.evaluate.kept import claim
from patchloom.evaluate.protocol import Evaluation
from patchloom.evaluate.target import resolve_encoder
from patchloom.features.extract import NO_LABEL, Features, torch_device
from patchloom.features.fingerprint import weights_hash
from patchloom.io import check_place
from patchloom.models.bundle import load, save_bundle


class Finetune(Evaluation):
    """Train the encoder further on train by a method of patchloom adapt, and measure the classifier on test."""

    config_class = FinetuneEvaluationConfig

    def figures(self) -> dict[str, Any]:
        """Return accuracy (a fraction), what goes with it, and what an adapter costs to store."""
        from patchloom import registry
        from patchloom.training.run import train as train_by

        config = self.config
        registry.entry("adapt", config.method)  # refuses an unknown one before anything is loaded
        encoder = resolve_encoder(config)
        if encoder is None:
            raise UsageError("raw pixels cannot be trained further; name an encoder")
        channels = in_chans(encoder)
        options = config.source_options()
        train, test = open_alike(
            (config.train, config.test), in_chans=channels, seed=config.seed, model=encoder, by_index=True, **options
        )
        options |= reading_options(train)
        if train.fingerprint() == test.fingerprint():
            raise UsageError(
                f"train {config.train} and test {config.test} are the same images; measure on images apart from them"
            )
        if not isinstance(train, Source) or not isinstance(test, Source) or train.multilabel or test.multilabel:
            raise UsageError("this evaluation compares classes of images read by index; use adapt itself for others")
        device = torch_device(config.device)
        with ExitStack() as stack:
            run_folder = config.run or stack.enter_context(tempfile.TemporaryDirectory(prefix="patchloom-finetune-"))
            folder = check_place(run_folder)
            # What is meant by the encoder (published weights, fresh ones, a module) is settled here, not by adapt.
            bundle = folder / "encoder"
            ours = {
                "data": config.train,
                "test": config.test,
                "encoder": str(bundle),
                "out": str(folder / "adapted"),
                "seed": config.seed,
                "num_workers": config.num_workers,
                "image_size": config.image_size,
                "in_chans": channels,
                "accelerator": "cpu" if device.type == "cpu" else "gpu",
            }
            asked = {**config.settings, **options, **ours}
            claim(folder, {"method": config.method, "weights": weights_hash(encoder), **asked})
            if not bundle.exists():
                save_bundle(encoder, bundle)
            go_on = None if config.run is None else "the same command"
            done = train_by("adapt", config.method, {**asked, "resume": True}, go_on)
            model = load(done.path)
            names = list(done.summary["class_names"])
            logits, measured = self._predict(model, test, names, device)
        shape = (1, embed_dim(encoder))
        learnt = Features(torch.zeros(shape).expand(len(train), -1), torch.from_numpy(train.labels), [], [])
        figures = self.classified(logits, learnt, measured, names)
        figures |= {"method": config.method, "settings": dict(config.settings), "run": config.run}
        for name in ("adapter_bytes", "head_parameters"):
            if name in done.summary:
                figures[name] = done.summary[name]
        return figures

    @torch.no_grad()
    def _predict(self, model: Any, test: Source, names: list[str], device: torch.device) -> tuple[Tensor, Features]:
        """Return the logits (n, K) of the test images, and these with their classes in the order of `names`."""
        config = self.config
        classifier: nn.Module = model.eval().to(device)
        logits, labels, keys, skipped = [], [], [], []
        for batch in make_loader(
            test,
            EvalTransform(image_size(model)),
            config.batch_size,
            seed=0,
            shuffle=False,
            num_workers=config.num_workers,
        ):
            skipped += batch["skipped"]
            if batch["key"]:
                images = unit(batch["image"].to(device))
                logits.append(classifier(normalize(images, model)).float().cpu())
                labels.append(batch["label"])
                keys += batch["key"]
        if not logits:
            raise UsageError(f"{test.name} holds no readable image")
        place = torch.tensor([names.index(name) for name in test.class_names or names])
        outputs, known = torch.cat(logits), torch.cat(labels)
        labelled = known >= 0
        skipped += [(key, NO_LABEL) for key, keep in zip(keys, labelled.tolist(), strict=True) if not keep]
        keys = [key for key, keep in zip(keys, labelled.tolist(), strict=True) if keep]
        vectors = torch.zeros(1, embed_dim(model)).expand(int(labelled.sum()), -1)
        return outputs[labelled], Features(vectors, place[known[labelled]], keys, skipped)
