"""The Downstream Transfer Attack: what a public encoder gives away about every model made from it.

Someone who knows the encoder a model was fine-tuned from, but neither its task nor its weights, moves each image within
ε so that the encoder's tokens point elsewhere, at the layer where that does most damage. Zheng et al. 2024, "Downstream
Transfer Attack: Adversarial Attacks on Downstream Models with Pre-trained Vision Transformers" (arXiv 2408.01705).
Meant for measuring, and mending, one's own models.

>>> from patchloom.encoders import create_encoder
>>> encoder = create_encoder("vit_tiny_patch16_224", image_size=32, depth=2, embed_dim=24, num_heads=2)
>>> images = torch.rand(2, 3, 32, 32)
>>> attack = DownstreamTransferAttack(encoder, eps=8 / 255, search_steps=1, steps=2)
>>> adversarial = attack(images)
>>> bool((adversarial - images).abs().max() <= 8 / 255 + 1e-6), len(attack.layers[0])
(True, 1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from patchloom.encoders import Encoder
from patchloom.errors import UsageError, unknown_name
from patchloom.systems.dta.attacks import EPS, STEP_SIZE, STEPS, FeatureAttack
from patchloom.systems.dta.ball import Watch, check_ball, check_images
from patchloom.systems.dta.features import FINAL, BlockFeatures, Layer
from patchloom.systems.dta.losses import Similarity, similarity

Score = Literal["last", "own", "mean"]
"""Where the damage of an attack on a layer is measured: at the last block, at that layer, or over all blocks."""
Per = Literal["dataset", "sample"]
"""One choice of layers for all images, or one for each."""

SEARCH_STEPS = 10
# Images whose layers are searched at a time.
SEARCH_BATCH = 32


@dataclass(frozen=True)
class LayerScores:
    """How far an attack on each layer of an encoder has come; the smaller the score, the more vulnerable the layer."""

    layers: tuple[Layer, ...]
    """The candidates, in their order."""
    scores: Tensor
    """(B, L) average token cosine similarity of each image after the attack on each layer."""
    top_k: int = 1
    """How many layers are taken."""

    @property
    def mean(self) -> Tensor:
        """Scores over all images, (L,)."""
        return self.scores.mean(0)

    @property
    def best(self) -> tuple[Layer, ...]:
        """The layers chosen for all images together, best first."""
        order = self.mean.argsort(stable=True)[: self.top_k]
        return tuple(self.layers[number] for number in order.tolist())

    @property
    def best_of_each(self) -> list[tuple[Layer, ...]]:
        """The layers chosen for each image, best first."""
        order = self.scores.argsort(dim=1, stable=True)[:, : self.top_k]
        return [tuple(self.layers[number] for number in row) for row in order.tolist()]


class DownstreamTransferAttack:
    """Searches an encoder's most vulnerable layer, then attacks the images there.

    Args:
        encoder: As for `FeatureAttack`; of several encoders each has its own layers searched.
        eps: ε.
        step_size: α.
        search_steps: Steps on each candidate.
        steps: Steps on the layers that were chosen.
        candidates: `all` blocks, or some by number.
        score: Where the damage is measured. `last` asks whether it reaches what a head reads.
        per: `dataset`: one choice, from the images first searched, that later calls keep; `sample`: one for each image.
        top_k: How many layers are attacked together.
        warm_start: Go on from where the search has brought the images; of one encoder, and of the images searched.
        **settings: Further ones of `FeatureAttack`.

    Attributes:
        scores: What the search found for each encoder; empty before it.
        layers: The layers chosen for each encoder, of `per="dataset"`; empty before the search.

    Raises:
        UsageError: Settings that cannot be.
    """

    def __init__(
        self,
        encoder: Encoder | Sequence[Encoder],
        eps: float = EPS,
        step_size: float = STEP_SIZE,
        search_steps: int = SEARCH_STEPS,
        steps: int = STEPS,
        candidates: Literal["all"] | Sequence[int] = "all",
        score: Score = "last",
        per: Per = "dataset",
        top_k: int = 1,
        warm_start: bool = True,
        **settings: Any,
    ) -> None:
        check_ball(eps, step_size, search_steps)
        for name, value, choices in (("score", score, get_args(Score)), ("per", per, get_args(Per))):
            if value not in choices:
                raise unknown_name(name, value, choices)
        self.attack = FeatureAttack(encoder, eps=eps, step_size=step_size, steps=steps, **settings)
        self.search_steps = search_steps
        self.score, self.per = score, per
        self.warm_start = warm_start
        self.candidates = [self._candidates(features, candidates) for features in self.attack.encoders]
        fewest = min(map(len, self.candidates))
        if not 1 <= top_k <= fewest:
            raise UsageError(f"top_k is {top_k}; it must be at least 1 and at most {fewest}, the number of candidates")
        self.top_k = top_k
        self.scores: list[LayerScores] = []
        self.layers: list[tuple[Layer, ...]] = []

    @property
    def eps(self) -> float:
        """ε."""
        return self.attack.eps

    def search(self, images: Tensor, init: Tensor | None = None) -> LayerScores:
        """Attack every candidate from the same start, and choose the layers that later calls attack.

        Args:
            images: (n, C, H, W) in [0, 1]; 32 to 256 of the kind that will be attacked.
            init: Noise to begin with, instead of drawn noise.

        Returns:
            The scores; of several encoders those of the first, `scores` has all.

        Raises:
            UsageError: As for `FeatureAttack`.
        """
        self._search(images, init, keep=False)
        return self.scores[0]

    def __call__(self, images: Tensor, init: Tensor | None = None, watch: Watch | None = None) -> Tensor:
        """Return attacked images, within ε of the images and in [0, 1].

        With `per="dataset"` the first call searches on its own images, where `search` was not called before.

        Args:
            images: (B, C, H, W) floats in [0, 1].
            init: Noise to begin with, instead of drawn noise.
            watch: Told of the start (0 steps done) and of every step on the layers chosen, with the images.

        Raises:
            UsageError: As for `FeatureAttack`.
        """
        check_images(images)
        if self.per == "dataset" and self.layers:
            return self.chosen()(images, init, watch)
        reached = self._search(images, init, keep=self.warm_start)
        if self.per == "dataset":
            choices = [tuple(self.layers)] * len(images)
        else:
            choices = list(zip(*(scores.best_of_each for scores in self.scores), strict=True))
        warm = self.warm_start and len(self.attack.encoders) == 1
        adversarial = torch.empty_like(images)
        for choice in sorted(set(choices), key=str):
            rows = torch.tensor([number for number, one in enumerate(choices) if one == choice], device=images.device)
            attack, part = self.attack.on(choice), images[rows]
            begin = None if init is None else init[rows]
            if warm:
                place = self.scores[0].layers.index(choice[0][0])
                begin = attack.again_from(reached[place][rows], part)
            adversarial[rows] = attack(part, begin, watch)
        return adversarial

    def chosen(self) -> FeatureAttack:
        """Return the attack on the layers that were chosen for all images.

        Raises:
            UsageError: Nothing was searched yet.
        """
        if not self.layers:
            raise UsageError("no layer was chosen yet; call search first")
        return self.attack.on(self.layers)

    def _search(self, images: Tensor, init: Tensor | None, keep: bool) -> list[Tensor]:
        """Score all candidates and remember what was chosen.

        Returns:
            With `keep`, what the search through the first encoder made of the images, by candidate; else nothing.
        """
        check_images(images)
        start = self.attack.start(images) if init is None else init
        self.scores = []
        first: list[Tensor] = []
        for number, candidates in enumerate(self.candidates):
            features = self.attack.encoders[number]
            columns, reached = [], []
            for layer in candidates:
                attack = self.attack.on([[layer]], encoder=features.encoder, steps=self.search_steps, restarts=1)
                parts, values = [], []
                for place in range(0, len(images), SEARCH_BATCH):
                    some = slice(place, place + SEARCH_BATCH)
                    x = attack(images[some], None if start is None else start[some])
                    parts += [x] if keep else []
                    values.append(self._score(features, x, images[some], layer))
                if keep:
                    reached.append(torch.cat(parts))
                columns.append(torch.cat(values))
            self.scores.append(LayerScores(tuple(candidates), torch.stack(columns, 1), self.top_k))
            first = first or reached
        self.layers = [scores.best for scores in self.scores] if self.per == "dataset" else []
        return first

    def _score(self, features: BlockFeatures, x: Tensor, images: Tensor, layer: Layer) -> Tensor:
        if not features.depth:
            read: list[Layer] = [FINAL]
        elif self.score == "mean":
            read = list(range(features.depth))
        else:
            read = [-1 if self.score == "last" else layer]
        kind: Similarity = "tokens" if features.depth else "flat"
        with self.attack.still(), torch.no_grad():
            pairs = zip(features(x, read), features(images, read), strict=True)
            values = [similarity(a, b, kind, self.attack.tokens, features.num_prefix) for a, b in pairs]
        return torch.stack(values).mean(0)

    def _candidates(self, features: BlockFeatures, candidates: Literal["all"] | Sequence[int]) -> list[Layer]:
        if not features.depth:
            return [FINAL]
        if candidates == "all":
            return list(range(features.depth))
        if isinstance(candidates, str) or not candidates:
            raise UsageError(f"candidates is {candidates!r}; give all, or numbers of blocks")
        return list(dict.fromkeys(features.layer(int(layer)) for layer in candidates))
