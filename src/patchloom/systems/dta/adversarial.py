"""Adversarial training: any way to learn from labels learns from attacked images, too.

The loss of a step is (1 - λ) times that of its images and λ times that of the same images attacked. Images attacked
through a frozen public encoder (the Downstream Transfer Attack, arXiv 2408.01705) cost no pass through the model that
learns; those of projected gradient descent through the model itself (Madry et al. 2018, arXiv 1706.06083) cost one for
every step. Images are attacked after augmentation and before they are normalised. Withstanding transfer attacks is not
withstanding an attacker who knows the model.

>>> fit("adapt linear", LinearMethod, config, attach=[AdversarialTraining("dta", eps=8 / 255)])  # doctest: +SKIP
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from patchloom.base.fractions import parse_epsilon
from patchloom.data.pixels import unit
from patchloom.data.survey import notice
from patchloom.encoders import Encoder
from patchloom.encoders.insertion import remove
from patchloom.errors import UsageError, unknown_name
from patchloom.models.bundle import open_encoder
from patchloom.systems.dta.attacks import EPS, STEP_SIZE
from patchloom.systems.dta.ball import descend, still, uniform_noise
from patchloom.systems.dta.model import SEARCH_BATCH, DownstreamTransferAttack
from patchloom.training.adapter import AdapterMethod
from patchloom.training.attachment import Attachment
from patchloom.training.labelled import LabelledMethod
from patchloom.training.options import start_of

if TYPE_CHECKING:
    from patchloom.report import Section
    from patchloom.training.method import Method
    from patchloom.training.options import AdversaryOptions

Losses = dict[str, Tensor]
STEPS = 5
"""Steps of an attack on the fly."""


class AdversarialTraining(Attachment):
    """Adds attacked images to what a method learns from; for methods that learn from labels.

    Args:
        adversary: `dta` attacks through the encoder the run starts from, at the block a search on images of the first
            step finds most vulnerable; `pgd` through the model that learns. Or an attack of your own, from images
            (B, C, H, W) in [0, 1] to attacked ones, for which nothing but `mix` counts.
        mix: λ, the share of the loss that is on attacked images; at 0 the run is the plain one.
        eps: ε, the largest change of a pixel value in [0, 1].
        steps: Steps of each attack; each goes 2/255, or as far as it takes to cross the ball.
        encoder: Another public encoder: bundle, run, timm model or module.

    Raises:
        UsageError: Values that cannot be.
    """

    def __init__(
        self,
        adversary: Literal["dta", "pgd"] | Callable[[Tensor], Tensor] = "dta",
        mix: float = 0.5,
        eps: float = EPS,
        steps: int = STEPS,
        encoder: Any = None,
    ) -> None:
        self.own = adversary if callable(adversary) else None
        if self.own is None and adversary not in ("dta", "pgd"):
            raise unknown_name("adversary", str(adversary), ("dta", "pgd"))
        if not 0 <= mix <= 1:
            raise UsageError(f"mix is {mix}; it is a share, in [0, 1]")
        if adversary == "pgd" and encoder is not None:
            raise UsageError("pgd goes through the model that learns; another encoder belongs to adversary=dta")
        self.adversary = adversary if isinstance(adversary, str) else type(adversary).__name__
        self.mix, self.eps, self.steps = mix, parse_epsilon("eps", eps), steps
        self.step_size = max(STEP_SIZE, self.eps / steps)
        self.named = encoder
        self.attack: DownstreamTransferAttack | None = None
        self.layers: list[tuple[Any, ...]] = []

    @classmethod
    def of(cls, config: AdversaryOptions) -> AdversarialTraining:
        """Return what the settings of a run ask for."""
        kind: Any = config.adversary
        eps = parse_epsilon("adversary_eps", config.adversary_eps)
        return cls(kind, config.adversary_mix, eps, config.adversary_steps, config.adversary_encoder)

    def attach(self, method: Method) -> None:
        """Let the method's loss be that of images and attacked images.

        Raises:
            UsageError: A method without labels or of several optimisers, or fresh weights to attack through.
        """
        if not isinstance(method, LabelledMethod) or method.phases():
            raise UsageError("adversarial training is for methods that learn from labels, with one optimiser")
        if method.source.kind.name != "image":
            raise UsageError(f"adversarial training is for images, not {method.source.kind.plural}; set adversary=none")
        if self.adversary == "pgd" and method.config.strategy == "fsdp":
            raise UsageError("adversary=pgd goes through the model within a step, which fsdp does not allow; use ddp")
        if self.own is None and self.adversary == "dta":
            self.attack = DownstreamTransferAttack(
                self._public(method), self.eps, self.step_size, self.steps, self.steps, warm_start=False
            )
        method.training_loss = partial(self._mixed, method, method.training_loss)  # type: ignore[method-assign]

    def attacked(self, method: Method, batch: dict[str, Any], loss: Callable[[dict[str, Any]], Losses]) -> Tensor:
        """Return the images of a batch attacked, in the form in which the method takes them.

        Args:
            method: The method.
            batch: With `image` (B, C, H, W): uint8, floats in [0, 1], or normalised floats.
            loss: The method's own loss.
        """
        given = batch["image"]
        # Some methods' workers hand out normalised images, in which erased places may lie outside [0, 1].
        scale = _scale(method, given)
        shown = unit(given) if scale is None else (given * scale[1] + scale[0]).clamp(0, 1)
        shown = shown.float()
        generator = torch.Generator().manual_seed(torch.initial_seed())  # seeded by the place of the batch
        start = uniform_noise(shown, self.eps, generator)
        if self.own is not None:
            x = self.own(shown)
        elif self.attack is not None:
            x = self._through_encoder(method, shown, start)
        else:

            def lost(y: Tensor) -> Tensor:
                return -loss({**_copied(batch), "image": _as_given(y, shown, given, scale)})["loss"][None]

            with still(method):
                x = descend(shown, lost, eps=self.eps, step_size=self.step_size, steps=self.steps, init=start)
        return _as_given(x, shown, given, scale)

    def _mixed(self, method: Method, loss: Callable[[dict[str, Any]], Losses], batch: dict[str, Any]) -> Losses:
        if not self.mix:
            return loss(batch)
        other = {**_copied(batch), "image": self.attacked(method, batch, loss)}
        clean = loss(batch)
        hard = loss(other)["loss"]
        both = (1 - self.mix) * clean["loss"] + self.mix * hard
        return {**clean, "loss": both, "clean_loss": clean["loss"].detach(), "adversarial_loss": hard.detach()}

    def _through_encoder(self, method: Method, images: Tensor, start: Tensor) -> Tensor:
        assert self.attack is not None
        for features in self.attack.attack.encoders:
            features.encoder.to(images.device)
        if not self.layers:
            self.attack.search(images[:SEARCH_BATCH], start[:SEARCH_BATCH])
            alone = method._trainer is None  # outside a run
            self.layers = self.attack.layers if alone else method.trainer.strategy.broadcast(self.attack.layers)
            said = ", ".join(map(str, self.layers[0]))
            notice(
                f"adversarial training: images are attacked at block {said}, found most vulnerable on the first step"
            )
        self.attack.layers = self.layers
        return self.attack(images, start)

    def _public(self, method: LabelledMethod) -> Encoder:
        """Return the encoder that is attacked through: a copy, which does not learn."""
        if self.named is not None:
            public = copy.deepcopy(open_encoder(self.named))
        else:
            config = method.config
            trained = isinstance(method, AdapterMethod) or start_of(config) or Path(config.encoder).exists()
            if not trained:
                raise UsageError(
                    f"{config.encoder} starts from fresh weights, and there is nothing public to attack through; name "
                    f"adversary_encoder, or take adversary=pgd"
                )
            public = copy.deepcopy(method.encoder)
            if isinstance(method, AdapterMethod):
                remove(public)
        return public.float().eval().requires_grad_(False)

    # What is kept and said.

    def state_dict(self) -> dict[str, Any]:
        """Return what goes into checkpoints: the blocks that were chosen."""
        return {"layers": [list(layers) for layers in self.layers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the blocks of a checkpoint."""
        self.layers = [tuple(layers) for layers in state_dict["layers"]]

    def summary(self, method: Method) -> dict[str, Any]:
        """Return what images were attacked by."""
        about: dict[str, Any] = {"kind": self.adversary, "mix": self.mix}
        if self.own is None:
            about |= {"eps": self.eps, "steps": self.steps, "step_size": self.step_size}
        if self.layers:
            about["layers"] = [list(layers) for layers in self.layers]
        return {"adversary": about}

    def report_sections(self, method: Method) -> list[Section]:
        """Return what was learnt from, and how to measure what it is worth."""
        from patchloom.report import Section

        where = f" at block {', '.join(map(str, self.layers[0]))}" if self.layers else ""
        how = {
            "dta": f"attacked through the public encoder{where} (Downstream Transfer Attack)",
            "pgd": "attacked through the model itself (projected gradient descent)",
        }.get(self.adversary, f"attacked by {self.adversary}")
        size = "as it was made" if self.own is not None else f"ε {self.eps * 255:g}/255, {self.steps} steps"
        text = (
            f"{self.mix:.0%} of the loss was on images {how}, {size}. Measure "
            f"what it is worth by attacks that were not trained against: patchloom attack dta --encoder ENCODER "
            f"--victim {method.config.out} --data TEST. Withstanding attacks through the encoder is not withstanding "
            f"an attacker who knows the model."
        )
        return [Section("Adversarial training", text)]


def _scale(method: Method, images: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return mean and standard deviation that a batch was normalised by; None where it was not."""
    if not isinstance(method, LabelledMethod) or not method.normalises:
        return None
    config = method.encoder.pretrained_cfg
    mean, std = (torch.tensor(config[name]) for name in ("mean", "std"))
    if len(mean) != images.shape[1]:
        mean, std = mean.mean().expand(images.shape[1]), std.mean().expand(images.shape[1])
    return mean.to(images).view(1, -1, 1, 1), std.to(images).view(1, -1, 1, 1)


def _as_given(x: Tensor, shown: Tensor, given: Tensor, scale: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return images in [0, 1] in the form of a batch; of a normalised one only the change is taken over."""
    return x * 1 if scale is None else given + (x - shown) / scale[1]


def _copied(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch whose tensors may be changed in place."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
