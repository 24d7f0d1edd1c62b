"""The attacks by name: made batch by batch, kept in a folder, read from it when the command goes on.

Every image has noise of its own to begin with, drawn from the seed and its place, so that what is made of it depends
neither on the size of batches nor on where an earlier command stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from patchloom.attack.subjects import Subjects, Victim, has_classes
from patchloom.base.progress import track
from patchloom.data.survey import notice
from patchloom.encoders import depth, has_tokens
from patchloom.errors import UsageError
from patchloom.io import make_folder, write_json, written_whole
from patchloom.systems.dta.attacks import PGD, FeatureAttack, FeatureNorm, RandomNoise, universal_noise
from patchloom.systems.dta.ball import inside, quantised, still, uniform_noise
from patchloom.systems.dta.config import DTAConfig
from patchloom.systems.dta.features import FINAL, PixelClassifier
from patchloom.systems.dta.model import DownstreamTransferAttack

DELTAS, ABOUT, PICTURES = "deltas.safetensors", "attack.json", "images"
FEWEST_CLASSES = 4
"""AutoAttack's targeted losses compare the logits of so many classes."""
UNIVERSAL_PASSES = 5
"""Times a universal noise goes through the images it is made on."""

TITLES = {
    "noise": "random noise",
    "pgd": "PGD on the encoder's own classes",
    "feature_l2": "distance of the last block's features",
    "last": "token cosine, last block",
    "middle": "token cosine, middle block",
    "flat": "cosine of all final features",
    "pap": "length of the first block's features, one noise for all (PAP)",
    "mi": "token cosine, last block, with momentum (MI)",
    "di": "token cosine, last block, with input diversity (DI)",
    "ti": "token cosine, last block, with smoothed gradients (TI)",
    "dta": "Downstream Transfer Attack",
    "universal": "Downstream Transfer Attack, one noise for all",
    "white_box": "PGD on the victim itself",
    "auto_attack": "AutoAttack on the victim itself",
}
"""What each attack is, for people."""


@dataclass
class Crafter:
    """Makes the attacks of a command.

    Attributes:
        config: The settings.
        subjects: Models and images.
        search: The search for layers, once it was made: the attack that has their choice.
    """

    config: DTAConfig
    subjects: Subjects
    search: DownstreamTransferAttack | None = None

    @cached_property
    def weights(self) -> dict[str, str]:
        """Hashes of the weights the attacker knows, by encoder."""
        return fingerprints(self.subjects.encoders, self.subjects.encoder_names)

    def names(self) -> tuple[list[str], list[str]]:
        """Return the attacks to make, and reasons why some that were asked for are not.

        Raises:
            UsageError: AutoAttack is asked for and is not installed, or a victim has too few classes for it.
        """
        wanted: list[str] = []
        reasons = []
        for name in dict.fromkeys(self.config.attacks):
            if name == "pgd" and not has_classes(self.subjects.encoders[0]):
                reasons.append(f"pgd is left out: {self.subjects.encoder_names[0]} has no classes of its own")
            else:
                wanted.append(name)
        if "auto_attack" in wanted:
            for victim in self.subjects.victims:
                _check_auto_attack(victim)
        return wanted, reasons

    def search_layers(self) -> DownstreamTransferAttack:
        """Return the attack with its layers searched on the first images; searched once."""
        if self.search is None:
            config = self.config
            attack = self.unsearched()
            if config.per == "dataset":
                count = min(config.search_images, len(self.subjects.keys))
                images = self.subjects.images[:count].to(self.subjects.device)
                blocks = ", ".join(str(len(one)) for one in attack.candidates)
                notice(f"searching the most vulnerable of {blocks} blocks on {count} images …")
                reach = 1.0 if config.optimizer == "adam_tanh" else config.epsilon
                attack.search(images, self._start(slice(0, count), reach))
            self.search = attack
        return self.search

    def craft(self, name: str, victim: Victim | None = None, rows: slice = slice(None)) -> Tensor:
        """Return attacked images (n, C, H, W) in [0, 1], on the CPU; as 8 bits store them where that is asked for.

        Args:
            name: The attack.
            victim: Whom a white-box attack is on.
            rows: Which of the images.
        """
        clean = self.subjects.images
        noise = self._universal(name) if name in ("pap", "universal") else None
        numbers = range(len(clean))[rows]
        made = []
        places = range(numbers.start, numbers.stop, self.config.batch_size)
        said = name if victim is None else f"{name} on {victim.name}"
        for place in track(places, said, unit="batch"):
            some = slice(place, min(place + self.config.batch_size, numbers.stop))
            if noise is not None:
                x = inside(clean[some] + noise, clean[some], self.config.epsilon)
            else:
                attack = self._attack(name, victim, torch.Generator().manual_seed(self._seed(place)))
                tanh = self.config.optimizer == "adam_tanh" and name in ("dta", "middle", "flat", "feature_l2", "last")
                start = self._start(some, 1.0 if tanh else self.config.epsilon)
                x = attack(clean[some].to(self.subjects.device), some, start).cpu()
            made.append(quantised(x, clean[some], self.config.epsilon) if self.config.quantise else x)
        return torch.cat(made)

    def _attack(self, name: str, victim: Victim | None, generator: torch.Generator) -> Callable[..., Tensor]:
        """Return what attacks a batch: (images, their rows, noise to begin with) to attacked images."""
        config, encoders = self.config, self.subjects.encoders
        shared: dict[str, Any] = {"eps": config.epsilon, "step_size": config.alpha, "steps": config.steps}
        shared |= {"restarts": config.restarts, "deterministic": config.deterministic, "generator": generator}
        aimed: dict[str, Any] = {"tokens": config.tokens, "optimizer": config.optimizer}
        if name == "noise":
            noise = RandomNoise(config.epsilon)
            return lambda images, rows, start: noise(images, start)
        if name in ("pgd", "white_box"):
            model = PixelClassifier(encoders[0]).eval() if victim is None else victim.model
            labels = None if victim is None else victim.labels
            pgd = PGD(model, **shared)
            return lambda images, rows, start: pgd(
                images, None if labels is None else labels[rows].to(images.device), start
            )
        if name == "auto_attack":
            assert victim is not None
            return partial(_auto_attack, victim, config.epsilon, int(generator.initial_seed() & 0x7FFF_FFFF))
        if name == "dta":
            search = self.search_layers()
            if config.per == "sample":
                attack: Any = self.unsearched()
                attack.attack.generator = generator
            else:
                attack = search.chosen().on(search.layers, **shared)
        elif name == "middle":
            layers = [[depth(one) // 2 - 1] if has_tokens(one) else [FINAL] for one in encoders]
            attack = FeatureAttack(encoders, "tokens", layers, **shared, **aimed)
        elif name == "flat":
            attack = FeatureAttack(encoders, "flat", [FINAL], **shared, **aimed)
        elif name == "feature_l2":
            attack = FeatureAttack(encoders, "l2", [-1], **shared, **aimed)
        elif name == "last":
            attack = FeatureAttack(encoders, "tokens", [-1], **shared, **aimed)
        else:
            ways: dict[str, dict[str, Any]] = {
                "mi": {"momentum": 1.0},
                "di": {"diversity": 0.5},
                "ti": {"smoothing": True},
            }
            attack = FeatureAttack(encoders, "tokens", [-1], tokens=config.tokens, **shared, **ways[name])

        return lambda images, rows, start: attack(images, start)

    def unsearched(self) -> DownstreamTransferAttack:
        """Return the attack as it is before the search.

        Raises:
            UsageError: Blocks the encoder does not have, or more of them than there are.
        """
        config = self.config
        return DownstreamTransferAttack(
            self.subjects.encoders,
            config.epsilon,
            config.alpha,
            config.search_steps,
            config.steps,
            candidates=config.candidates or "all",
            score=config.score,
            per=config.per,
            top_k=config.top_k,
            tokens=config.tokens,
            optimizer=config.optimizer,
            momentum=config.momentum,
            diversity=config.diversity,
            smoothing=config.smoothing,
            restarts=config.restarts,
            deterministic=config.deterministic,
            generator=torch.Generator().manual_seed(self._seed(0)),
        )

    def _universal(self, name: str) -> Tensor:
        """Return one noise for all images (1, C, H, W), made on the images the search looks at."""
        config, device = self.config, self.subjects.device
        generator = torch.Generator().manual_seed(self._seed(0))
        if name == "pap":
            attack: FeatureAttack = FeatureNorm(
                self.subjects.encoders, eps=config.epsilon, step_size=config.alpha, generator=generator
            )
        else:
            search = self.search_layers()
            attack = search.chosen().on(
                search.layers, eps=config.epsilon, step_size=config.alpha, generator=generator, optimizer="sign"
            )
        count = min(config.search_images, len(self.subjects.keys))
        images = self.subjects.images
        batches = [part.to(device) for part in images[:count].split(config.batch_size)]
        passes = max(UNIVERSAL_PASSES, -(-config.steps // len(batches)))
        return universal_noise(attack, batches, passes=passes).cpu()

    def _start(self, rows: slice, eps: float) -> Tensor:
        """Return the noise that images begin with, each its own."""
        images = self.subjects.images[rows]
        noises = [
            uniform_noise(image[None], eps, torch.Generator().manual_seed(self._seed(rows.start + number)))
            for number, image in enumerate(images)
        ]
        return torch.cat(noises).to(self.subjects.device)

    def _seed(self, place: int) -> int:
        return int(np.random.SeedSequence([self.config.seed, place]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _check_auto_attack(victim: Victim) -> None:
    try:
        import torchattacks  # noqa: F401
    except ImportError as error:
        raise UsageError("auto_attack is that of torchattacks; pip install torchattacks, or take white_box") from error
    if victim.classes < FEWEST_CLASSES:
        raise UsageError(
            f"{victim.name} has {victim.classes} classes and the losses of auto_attack compare {FEWEST_CLASSES}; take "
            f"white_box"
        )


def _auto_attack(victim: Victim, eps: float, seed: int, images: Tensor, rows: slice, start: Tensor) -> Tensor:
    """Return images attacked by AutoAttack (Croce and Hein 2020, arXiv 2003.01690), which begins where it wants to."""
    import torchattacks

    attack = torchattacks.AutoAttack(victim.model, eps=eps, n_classes=victim.classes, seed=seed)
    with torch.random.fork_rng(), still(victim.model):
        x: Tensor = attack(images, victim.labels[rows].to(images.device))
    return inside(x.detach(), images, eps)


def store(folder: Path, attacked: Tensor, images: Tensor, keys: Sequence[str], about: dict[str, Any]) -> None:
    """Keep an attack: perturbations (in 1/255 where they are whole), what it was, and pictures where `about` says so.

    What it was comes last: a folder without it is not complete.
    """
    if folder.exists():
        shutil.rmtree(folder)
    make_folder(folder)
    delta = (attacked - images) * 255
    whole = bool((delta - delta.round()).abs().max() < 1e-3)
    kept = delta.round().to(torch.int16) if whole else attacked - images
    with written_whole(folder / DELTAS) as temporary:
        save_file({"deltas": kept.contiguous()}, temporary, metadata={"unit": "1/255" if whole else "1"})
        temporary.chmod(0o644)
    if about["pictures"]:
        make_folder(folder / PICTURES)
        for number, (key, image) in enumerate(zip(keys, attacked, strict=True)):
            pixels = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
            name = f"{number:05d}_{Path(key).stem[:60]}.png"
            Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(folder / PICTURES / name)
    write_json(folder / ABOUT, {**about, "keys": list(keys)}, default=str)


def stored(folder: Path, images: Tensor, keys: Sequence[str]) -> tuple[Tensor, dict[str, Any]] | None:
    """Return attacked images as an earlier command kept them, and what it said of them; None where there are none.

    Raises:
        UsageError: They are of other images.
    """
    if not (folder / ABOUT).exists():
        return None
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        kept = load_file(folder / DELTAS)["deltas"]
    except (OSError, ValueError, KeyError, SafetensorError):
        return None  # damaged: made again
    if about.pop("keys", None) != list(keys) or kept.shape != images.shape:
        raise UsageError(f"{folder} holds attacks on other images than the data has now; choose another out")
    if kept.dtype == torch.int16:
        attacked = ((images * 255 + kept).round().double() / 255).to(images.dtype)
    else:
        attacked = images + kept
    return attacked, about


def fingerprints(models: Sequence[nn.Module], names: Sequence[str]) -> dict[str, str]:
    """Return a short hash of the weights of each model, heads and adapters included, by name."""
    found = {}
    for name, model in zip(names, models, strict=True):
        digest = hashlib.sha256()
        for key, value in sorted(model.state_dict().items()):
            tensor = value.detach().cpu().contiguous()
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.view(-1).view(torch.uint8).numpy())
        found[name] = digest.hexdigest()[:16]
    return found
