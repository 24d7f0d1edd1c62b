"""Feature health: does an encoder use its space, does it know too much about place, where does it know most?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from patchloom.data import make_loader, open_source
from patchloom.data.base import Source, StreamSource
from patchloom.data.kinds import Kind, require_kind
from patchloom.data.pixels import unit
from patchloom.data.subset import SubsetSource
from patchloom.encoders import (
    Encoder,
    attends,
    class_attention,
    depth,
    grid_size,
    in_chans,
    input_size,
    intermediate_layers,
    normalize,
)
from patchloom.encoders.patches import Grid
from patchloom.errors import UsageError
from patchloom.evaluate.health_config import HealthConfig
from patchloom.evaluate.logistic import fit_logistic
from patchloom.features.class_scores import ClassScores, class_scores
from patchloom.features.extract import torch_device
from patchloom.features.geometry import (
    alignment,
    artifact_share,
    attention_entropy,
    covariance_effective_rank,
    position_leakage,
    uniformity,
)
from patchloom.features.health import mean_pairwise_cosine, rankme, verdict
from patchloom.features.inputs import require_taken
from patchloom.models.bundle import open_encoder

PATCH_IMAGES = 64


class Health:
    """Rank, alignment, uniformity, attention, outlier tokens, position leakage and a probe of every layer."""

    config_class = HealthConfig
    kinds = ("image", "clip")

    def __init__(self, config: HealthConfig) -> None:
        self.config = config

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Return the figures.

        Returns:
            `rankme`, `effective_rank`, `cosine`, `alignment` (two augmented views), `uniformity`, `attention_entropy`
            (a share, by layer), `artifact_share` of patch tokens and `position_leakage` (R²), both by layer;
            `layer_accuracy`, `layer_balanced_accuracy` and `majority_share` where images have labels; `verdict` in
            words; `n` and `dim`.

        Raises:
            UsageError: No encoder, or no readable image.
        """
        start, config = time.perf_counter(), self.config
        encoder = open_encoder(config.encoder)
        device = torch_device(config.device)
        encoder = encoder.eval().to(device)
        source = self._sample(
            encoder,
            open_source(
                config.data,
                in_chans=in_chans(encoder),
                seed=config.seed,
                model=encoder,
                by_index=True,
                **config.source_options(),
            ),
        )
        pooled, labels, norms, patches, entropy = self._look(encoder, source, device)
        last = pooled[-1]
        rank, cosine = rankme(last), mean_pairwise_cosine(last)
        first, second = (self._views(encoder, source, device, name) for name in ("image", "target"))
        figures: dict[str, Any] = {
            "rankme": rank,
            "effective_rank": covariance_effective_rank(last),
            "cosine": cosine,
            "alignment": alignment(first, second),
            "uniformity": uniformity(last),
            "attention_entropy": entropy,
            "artifact_share": [artifact_share(layer) for layer in norms],
            "position_leakage": [position_leakage(layer, grid_size(encoder)) for layer in patches],
            "verdict": verdict(rank, cosine, last.shape[1], len(last)),
            "n": len(last),
            "dim": last.shape[1],
        }
        if (scores := self._layer_scores(pooled, labels)) is not None:
            figures["layer_accuracy"] = [one.accuracy for one in scores]
            figures["layer_balanced_accuracy"] = [one.balanced_accuracy for one in scores]
            figures["majority_share"] = scores[-1].majority_share
        figures["seconds"] = round(time.perf_counter() - start, 2)
        if config.report is not None:
            write_page(config, figures)
        return figures

    def _sample(self, encoder: Encoder, source: Source | StreamSource) -> Source:
        require_kind(source, self.kinds, "evaluate health")
        require_taken(source, encoder)
        if not isinstance(source, Source):
            raise UsageError(f"{source.name} can only be read from front to back; unpack the shards to .tar")
        generator = torch.Generator().manual_seed(self.config.seed)
        chosen = torch.randperm(len(source), generator=generator)[: self.config.images].sort().values
        return SubsetSource(source, chosen.numpy())

    def _batches(self, source: Source, transform: Any) -> Iterator[dict[str, Any]]:
        config = self.config
        for batch in make_loader(
            source, transform, config.batch_size, seed=config.seed, shuffle=False, num_workers=config.num_workers
        ):
            if batch["key"]:
                yield batch

    def _look(
        self, encoder: Encoder, source: Source, device: torch.device
    ) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor], list[float | None]]:
        """Return by layer: pooled features, norms and tokens of patches, entropy of attention; and the labels."""
        layers = range(depth(encoder))
        pooled: list[list[Tensor]] = [[] for _ in layers]
        norms: list[list[Tensor]] = [[] for _ in layers]
        patches: list[list[Tensor]] = [[] for _ in layers]
        entropy: list[list[Tensor]] = [[] for _ in layers]
        labels = []
        for batch in self._batches(source, source.kind.eval_view("crop", input_size(encoder))):
            images = normalize(unit(batch[source.kind.name].to(device)), encoder)
            labels.append(batch["label"])
            room = PATCH_IMAGES - sum(len(part) for part in patches[0])
            for number, tokens_of_layer in enumerate(intermediate_layers(encoder, images, list(layers))):
                vector = (
                    tokens_of_layer.prefix[:, 0] if tokens_of_layer.prefix.shape[1] else tokens_of_layer.patches.mean(1)
                )
                pooled[number].append(vector.float().cpu())
                norms[number].append(tokens_of_layer.patches.float().norm(dim=-1).cpu())
                if room > 0:
                    patches[number].append(tokens_of_layer.patches[:room].float().cpu())
                    if attends(encoder, number):
                        shares = attention_entropy(class_attention(encoder, images[:room], number))
                        entropy[number].append(shares.mean(0).cpu())
        if not labels:
            raise UsageError(f"{source.name} holds no readable image")
        return (
            [torch.cat(parts) for parts in pooled],
            torch.cat(labels),
            [torch.cat(parts) for parts in norms],
            [torch.cat(parts) for parts in patches],
            [float(torch.stack(parts).mean()) if parts else None for parts in entropy],
        )

    def _views(self, encoder: Encoder, source: Source, device: torch.device, which: str) -> Tensor:
        """Return the features of one of two random views of every image: crop, flip, colour."""
        transform = IndependentViews(source.kind, input_size(encoder))
        parts = []
        for batch in self._batches(source, transform):
            images = normalize(unit(batch[which].to(device)), encoder)
            tokens = intermediate_layers(encoder, images, [-1])[0]
            parts.append((tokens.prefix[:, 0] if tokens.prefix.shape[1] else tokens.patches.mean(1)).float().cpu())
        return torch.cat(parts)

    def _layer_scores(self, pooled: list[Tensor], labels: Tensor) -> list[ClassScores] | None:
        """Return how well logistic regression does on each layer, fitted on every second image of a class."""
        if labels.ndim > 1 or int((labels >= 0).sum()) < 20 or len(labels[labels >= 0].unique()) < 2:
            return None
        known = labels >= 0
        names, numbers = labels[known].unique(return_inverse=True)
        order = numbers.argsort(stable=True)
        learnt, judged = order[0::2], order[1::2]
        scores = []
        for layer in pooled:
            x = layer[known]
            model = fit_logistic(x[learnt], numbers[learnt], len(names), c=1.0, max_iter=100)
            scores.append(class_scores(model.predict(x[judged]), numbers[judged]))
        return scores


class IndependentViews:
    """Two views of a sample drawn apart: crop, flip and colour, as contrastive methods see it."""

    def __init__(self, kind: Kind, size: Grid) -> None:
        self.kind = kind.name
        self.one = kind.training_view(size, scale=(0.4, 1.0), flip=0.5, color_jitter=0.4)

    def __call__(self, value: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return `image` and `target`, (C, *size), of the type of the sample."""
        return {name: self.one(value, generator)[self.kind] for name in ("image", "target")}


def write_page(config: HealthConfig, figures: dict[str, Any]) -> None:
    """Write the figures as a page of curves over the layers."""
    from patchloom.report import Section, curves, write_report

    titles = {
        "attention_entropy": ("How widely the class token looks", "entropy, share of the largest"),
        "artifact_share": ("Patch tokens of outlying norm", "share"),
        "position_leakage": ("Place read from a patch token", "R²"),
    }
    drawn = []
    if "layer_accuracy" in figures:
        blocks = range(len(figures["layer_accuracy"]))
        probed = {
            name: (blocks, figures[f"layer_{name.replace(' ', '_')}"]) for name in ("accuracy", "balanced accuracy")
        }
        naming = {"commonest class every time": figures["majority_share"]}
        title = "Linear probe by layer"
        drawn.append(curves(probed, x_label="block", y_label="share", title=title, references=naming))
    for name, (title, label) in titles.items():
        known = {block: value for block, value in enumerate(figures[name]) if value is not None}
        if known:
            line = {name: (list(known), list(known.values()))}
            drawn.append(curves(line, x_label="block", y_label=label, title=title))
    plain = {name: figures[name] for name in ("rankme", "effective_rank", "cosine", "alignment", "uniformity")}
    assert config.report is not None
    write_report(
        config.report,
        title="Feature health",
        subtitle=f"{figures['n']} images of {config.data}",
        facts={**plain, "width": figures["dim"]},
        sections=[Section(title="Features by layer", figures=drawn)],
        command=f"patchloom evaluate health --encoder {config.encoder} --data {config.data}",
        verdict=figures["verdict"],
    )
