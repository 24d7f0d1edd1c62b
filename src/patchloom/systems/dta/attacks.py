"""Attacks on an encoder's features and on a classifier's answers: the parts of the Downstream Transfer Attack.

>>> from patchloom.encoders import create_encoder
>>> encoder = create_encoder("vit_tiny_patch16_224", image_size=32, depth=2, embed_dim=24, num_heads=2)
>>> images = torch.rand(2, 3, 32, 32)
>>> adversarial = FeatureAttack(encoder, layers=[0], eps=8 / 255, steps=2)(images)
>>> bool((adversarial - images).abs().max() <= 8 / 255 + 1e-6)
True
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from patchloom.encoders import Encoder
from patchloom.errors import UsageError, unknown_name
from patchloom.systems.dta.ball import (
    Loss,
    Steps,
    Watch,
    check_ball,
    check_images,
    descend,
    descend_tanh,
    gradient,
    inside,
    sometimes_diverse,
    still,
    uniform_noise,
)
from patchloom.systems.dta.features import BlockFeatures, Layer
from patchloom.systems.dta.losses import Similarity, TokenSet, similarity

Optimizer = Literal["sign", "adam_tanh"]
"""Steps against the sign of the gradient; or Adam on p of x + ε tanh(p), as OpenTAI's taiadv has it."""

EPS, STEP_SIZE, STEPS = 10 / 255, 2 / 255, 40
TANH_LR = 1.0


class FeatureAttack:
    """Moves images so that an encoder's features of them no longer resemble those of the clean images.

    Args:
        encoder: A timm model, whose own mean and standard deviation are applied inside; or several (an ensemble), whose
            similarities are averaged. Eval mode and frozen parameters are seen to, and undone afterwards.
        objective: What is made small: `tokens`, the mean cosine of tokens (paper); `flat`, the cosine of all features
            as one vector (taiadv); `l2`, minus their distance; `norm`, minus their length.
        layers: Blocks whose features count, averaged; counted from 0, negative from the end, `final` for what
            `forward_features` gives. Of an ensemble also a list for each. A model without tokens has `final` alone, and
            its cosine is that of all features as one vector.
        eps: ε, the largest change of a pixel value in [0, 1].
        step_size: α of a step; for `adam_tanh` Adam's learning rate is 1 whatever this is.
        steps: Number of steps.
        optimizer: How steps are taken.
        momentum: 1.0 for momentum (MI), 0 for none.
        random_start: Begin at noise; without it the mean cosine has no gradient to follow.
        generator: Where noise and diversity are drawn from; default: torch's.
        diversity: Chance of input diversity (DI), as published 0.5; 0 for none.
        smoothing: Smooth gradients (TI).
        tokens: Which tokens count in `tokens`: all, patches (no class token, no registers) or cls.
        restarts: Starts of which each image keeps the best.
        deterministic: Use attention that gives the same numbers every time on a GPU, too; slower.

    Raises:
        UsageError: ε, steps or their size that cannot be, a block the encoder does not have, unknown words.
    """

    def __init__(
        self,
        encoder: Encoder | Sequence[Encoder],
        objective: Similarity = "tokens",
        layers: Sequence[Layer] | Sequence[Sequence[Layer]] = (-1,),
        eps: float = EPS,
        step_size: float = STEP_SIZE,
        steps: int = STEPS,
        optimizer: Optimizer = "sign",
        momentum: float = 0.0,
        random_start: bool = True,
        generator: torch.Generator | None = None,
        *,
        diversity: float = 0.0,
        smoothing: bool = False,
        tokens: TokenSet = "all",
        restarts: int = 1,
        deterministic: bool = False,
    ) -> None:
        check_ball(eps, step_size, steps)
        for name, value, choices in (
            ("objective", objective, get_args(Similarity)),
            ("optimizer", optimizer, get_args(Optimizer)),
            ("tokens", tokens, get_args(TokenSet)),
        ):
            if value not in choices:
                raise unknown_name(name, value, choices)
        if restarts < 1:
            raise UsageError(f"restarts is {restarts}; it must be at least 1")
        if optimizer == "adam_tanh" and (momentum or smoothing):
            raise UsageError("momentum and smoothing belong to optimizer=sign; Adam has its own")
        self.encoders = [BlockFeatures(one) for one in _listed(encoder)]
        self.objective, self.tokens = objective, tokens
        self.layers = _layers_of(self.encoders, layers)
        self.eps, self.step_size, self.steps = eps, step_size, steps
        self.optimizer = optimizer
        self.how = Steps(momentum, diversity, smoothing)
        self.random_start, self.restarts = random_start, restarts
        self.deterministic = deterministic
        self.generator = generator

    def __call__(self, images: Tensor, init: Tensor | None = None, watch: Watch | None = None) -> Tensor:
        """Return attacked images, within ε of the images and in [0, 1].

        Args:
            images: (B, C, H, W) floats in [0, 1].
            init: Noise to begin with, instead of drawn noise, of the images' shape; for `adam_tanh` p.
            watch: Told of the start (0 steps done) and of every step, with the images at that point.

        Raises:
            UsageError: Images outside [0, 1] (normalised ones, mostly), or of other channels than the encoder takes.
        """
        check_images(images)
        with self.still():
            loss = self.loss(images)
            best = self._once(images, loss, init, watch)
            if self.restarts == 1:
                return best
            with torch.no_grad():
                least = loss(best)
                for _ in range(self.restarts - 1):
                    again = self._once(images, loss, None, None)
                    value = loss(again)
                    better = value < least
                    best = torch.where(better[:, None, None, None], again, best)
                    least = torch.where(better, value, least)
        return best

    def loss(self, images: Tensor) -> Loss:
        """Return what this makes small: (B, C, H, W) attacked images to (B,). The clean features are computed once."""
        clean = []
        with torch.no_grad():
            for features, layers in zip(self.encoders, self.layers, strict=True):
                clean.append(None if self.objective == "norm" else features(images, layers))

        def alike(x: Tensor) -> Tensor:
            values = []
            for number, features in enumerate(self.encoders):
                tokens = features(x, self.layers[number])
                before = clean[number] or tokens
                kind = self._kind(features)
                layers = [
                    similarity(a, b, kind, self.tokens, features.num_prefix)
                    for a, b in zip(tokens, before, strict=True)
                ]
                values.append(torch.stack(layers).mean(0))
            return torch.stack(values).mean(0)

        return alike

    def still(self) -> Any:
        """Return the context in which the encoders hold still."""
        return still(*(features.encoder for features in self.encoders), deterministic=self.deterministic)

    def on(self, layers: Sequence[Sequence[Layer]], **changes: Any) -> FeatureAttack:
        """Return the same attack on other layers, one list for each encoder, and with other settings where given."""
        settings: dict[str, Any] = {
            "encoder": [features.encoder for features in self.encoders],
            "objective": self.objective,
            "eps": self.eps,
            "step_size": self.step_size,
            "steps": self.steps,
            "optimizer": self.optimizer,
            "momentum": self.how.momentum,
            "random_start": self.random_start,
            "generator": self.generator,
            "diversity": self.how.diversity,
            "smoothing": self.how.smoothing,
            "tokens": self.tokens,
            "restarts": self.restarts,
            "deterministic": self.deterministic,
        }
        return FeatureAttack(layers=layers, **(settings | changes))

    def start(self, images: Tensor) -> Tensor | None:
        """Return noise to begin with: between -ε and ε, or p in (-1, 1); None without a random start."""
        if self.optimizer == "adam_tanh":
            return uniform_noise(images, 1.0, self.generator) if self.random_start else torch.zeros_like(images)
        return uniform_noise(images, self.eps, self.generator) if self.random_start else None

    def again_from(self, x: Tensor, images: Tensor) -> Tensor:
        """Return the `init` that goes on from attacked images."""
        if self.optimizer == "sign":
            return x - images
        nearly_one = 1 - torch.finfo(x.dtype).eps
        return torch.atanh(((x - images) / self.eps).clamp(-nearly_one, nearly_one))

    def _kind(self, features: BlockFeatures) -> Similarity:
        return "flat" if self.objective == "tokens" and not features.depth else self.objective

    def _once(self, images: Tensor, loss: Loss, init: Tensor | None, watch: Watch | None) -> Tensor:
        init = self.start(images) if init is None else init
        if self.optimizer == "adam_tanh":
            assert init is not None
            return descend_tanh(
                images,
                loss,
                eps=self.eps,
                lr=TANH_LR,
                steps=self.steps,
                init=init,
                diversity=self.how.diversity,
                generator=self.generator,
                watch=watch,
            )
        return descend(
            images,
            loss,
            eps=self.eps,
            step_size=self.step_size,
            steps=self.steps,
            init=init,
            how=self.how,
            generator=self.generator,
            watch=watch,
        )


class FeatureL2(FeatureAttack):
    """Projected gradient descent that moves the features of the last block as far as it can; see `FeatureAttack`."""

    def __init__(self, encoder: Encoder | Sequence[Encoder], layers: Sequence[Layer] = (-1,), **settings: Any) -> None:
        super().__init__(encoder, "l2", layers, **settings)


class FeatureNorm(FeatureAttack):
    """Makes the features of the first block large, as PAP does (arXiv 2210.04087); see `FeatureAttack`."""

    def __init__(self, encoder: Encoder | Sequence[Encoder], layers: Sequence[Layer] = (0,), **settings: Any) -> None:
        super().__init__(encoder, "norm", layers, **settings)


class RandomNoise:
    """Noise between -ε and ε: what an attack has to be better than.

    Args:
        eps: ε.
        generator: Where it is drawn from.
    """

    def __init__(self, eps: float = EPS, generator: torch.Generator | None = None) -> None:
        check_ball(eps, 1.0, 1)
        self.eps = eps
        self.generator = generator

    def __call__(self, images: Tensor, init: Tensor | None = None) -> Tensor:
        """Return images (B, C, H, W) in [0, 1] with noise on them; `init` is used instead of drawn noise."""
        check_images(images)
        noise = uniform_noise(images, self.eps, self.generator) if init is None else init
        return inside(images + noise, images, self.eps)


class PGD:
    """Projected gradient descent against a classifier's answers (Madry et al. 2018, arXiv 1706.06083).

    Args:
        model: Takes images (B, C, H, W) in [0, 1], gives logits (B, classes); a `PixelClassifier` for models of timm.
        eps: ε.
        step_size: α.
        steps: Number of steps.
        momentum: 1.0 for MI, 0 for none.
        random_start: Begin at noise.
        generator: Where noise and diversity are drawn from.
        diversity: Chance of input diversity (DI).
        smoothing: Smooth gradients (TI).
        restarts: Starts of which each image keeps the one with the largest cross-entropy.
        deterministic: As for `FeatureAttack`.

    Raises:
        UsageError: ε, steps or their size that cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = EPS,
        step_size: float = STEP_SIZE,
        steps: int = STEPS,
        momentum: float = 0.0,
        random_start: bool = True,
        generator: torch.Generator | None = None,
        *,
        diversity: float = 0.0,
        smoothing: bool = False,
        restarts: int = 1,
        deterministic: bool = False,
    ) -> None:
        check_ball(eps, step_size, steps)
        if restarts < 1:
            raise UsageError(f"restarts is {restarts}; it must be at least 1")
        self.model = model
        self.eps, self.step_size, self.steps = eps, step_size, steps
        self.how = Steps(momentum, diversity, smoothing)
        self.random_start, self.restarts = random_start, restarts
        self.deterministic = deterministic
        self.generator = generator

    def __call__(
        self, images: Tensor, labels: Tensor | None = None, init: Tensor | None = None, watch: Watch | None = None
    ) -> Tensor:
        """Return attacked images, within ε of the images and in [0, 1].

        Args:
            images: (B, C, H, W) floats in [0, 1].
            labels: (B,) int64 classes to lead away from; default: what the model says of the clean images.
            init: Noise to begin with, instead of drawn noise.
            watch: As for `FeatureAttack`.

        Raises:
            UsageError: Images outside [0, 1].
        """
        check_images(images)
        with still(self.model, deterministic=self.deterministic):
            if labels is None:
                with torch.no_grad():
                    labels = self.model(images).argmax(1)
            truth = labels

            def loss(x: Tensor) -> Tensor:
                return -nn.functional.cross_entropy(self.model(x), truth, reduction="none")

            best, least = images, None
            for number in range(self.restarts):
                noise = init if number == 0 else None
                if noise is None and self.random_start:
                    noise = uniform_noise(images, self.eps, self.generator)
                adversarial = descend(
                    images,
                    loss,
                    eps=self.eps,
                    step_size=self.step_size,
                    steps=self.steps,
                    init=noise,
                    how=self.how,
                    generator=self.generator,
                    watch=watch if number == 0 else None,
                )
                if self.restarts == 1:
                    return adversarial
                with torch.no_grad():
                    value = loss(adversarial)
                better = torch.ones_like(value, dtype=torch.bool) if least is None else value < least
                best = torch.where(better[:, None, None, None], adversarial, best)
                least = value if least is None else torch.where(better, value, least)
        return best


def universal_noise(
    attack: FeatureAttack,
    batches: Sequence[Tensor] | Iterable[Tensor],
    *,
    passes: int = 1,
    init: Tensor | None = None,
) -> Tensor:
    """Return one noise for all images, (1, C, H, W) between -ε and ε: a step on each batch in turn.

    Args:
        attack: What is made small; by sign steps of its size, whatever its `steps`.
        batches: Images (B, C, H, W) in [0, 1], all of one size; gone through `passes` times, so no iterator.
        passes: How often.
        init: Noise to begin with; default: drawn.

    Raises:
        UsageError: No batch, or images that are not in [0, 1].
    """
    noise = init
    for _ in range(passes):
        for images in batches:
            check_images(images)
            if noise is None:
                noise = uniform_noise(images[:1], attack.eps, attack.generator)
            with attack.still():
                own_noise = noise.to(images)
                loss = partial(_of_shifted, images, attack.loss(images), attack)
                g = gradient(own_noise, loss)
            noise = (own_noise - attack.step_size * g.sign()).clamp(-attack.eps, attack.eps)
    if noise is None:
        raise UsageError("a universal noise needs images to be made on")
    return noise


def _of_shifted(images: Tensor, loss: Loss, attack: FeatureAttack, shift: Tensor) -> Tensor:
    return loss(sometimes_diverse((images + shift).clamp(0, 1), attack.how.diversity, attack.generator))


def _listed(encoder: Encoder | Sequence[Encoder]) -> list[Encoder]:
    encoders = [encoder] if isinstance(encoder, nn.Module) else list(encoder)
    if not encoders:
        raise UsageError("an attack needs at least one encoder")
    return encoders


def _layers_of(
    encoders: Sequence[BlockFeatures], layers: Sequence[Layer] | Sequence[Sequence[Layer]]
) -> list[list[Layer]]:
    """Return the layers of each encoder, counted from 0."""
    if not layers:
        raise UsageError("layers is empty; name at least one block")
    nested: list[Any] = list(layers)
    if not isinstance(nested[0], (list, tuple)):
        nested = [nested] * len(encoders)
    if len(nested) != len(encoders):
        raise UsageError(f"{len(nested)} lists of layers do not belong to {len(encoders)} encoders")
    return [[features.layer(layer) for layer in chosen] for features, chosen in zip(encoders, nested, strict=True)]
