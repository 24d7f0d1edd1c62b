"""How far made images are from real ones: Fréchet distances, in features that are named, and FID where it can be had.

The Fréchet inception distance (Heusel et al. 2017, arXiv 1706.08500) is that of one network's features; the same
distance in any other features is another number, and is called by their name here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from patchloom.data.base import Sample, Source
from patchloom.data.subset import MemorySource, SubsetSource
from patchloom.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from patchloom.systems.vim.saved import VIM

PIXELS = "pixels"
MOST_REAL = 50_000


def frechet_distance(one: Tensor, two: Tensor) -> float:
    """Return |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½) of two sets of features, in float64.

    Args:
        one: (n, D), n of at least 2.
        two: (m, D).

    Raises:
        UsageError: Fewer than two vectors in a set.
    """
    if min(len(one), len(two)) < 2:
        raise UsageError(f"a Fréchet distance needs at least two images in each set, not {len(one)} and {len(two)}")
    first, second = one.double(), two.double()
    away = (first.mean(0) - second.mean(0)).square().sum()
    spread_one, spread_two = (
        torch.cov(first.T).reshape(first.shape[1], -1),
        torch.cov(second.T).reshape(first.shape[1], -1),
    )
    # (Σ₁ Σ₂)^½ has the trace of (S Σ₂ S)^½, S the root of Σ₁, which is symmetric.
    values, vectors = torch.linalg.eigh(spread_one)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    common = torch.linalg.eigvalsh(root @ spread_two @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float(away + spread_one.trace() + spread_two.trace() - 2 * common))


def distances(
    images: Tensor, reference: str, model: VIM, *, features: str, inception: str | None, device: str = "auto"
) -> dict[str, Any]:
    """Return the Fréchet distance of made images from real ones, and FID and inception score where weights are given.

    Args:
        images: (n, C, H, W) in [0, 1].
        reference: Real images, as `--data` takes them.
        model: What made the images; real ones are read as those it learned from.
        features: Bundle, run, timm model, or pixels.
        inception: File of the Inception network's weights; None: no FID.
        device: Where features are computed.

    Raises:
        UsageError: The real images or the encoder cannot be opened, or sets too small for a distance.
        MissingExtraError: `inception` without torch-fidelity.
    """
    from patchloom.data import open_source
    from patchloom.features.extract import extract
    from patchloom.models.bundle import open_encoder
    from patchloom.training.held_out import read_views

    source = open_source(reference, in_chans=model.tokenizer.in_chans, **model.reading)
    if not isinstance(source, Source):
        raise UsageError(f"reference {reference} is a stream; name a folder or a set of images")
    if len(source) > MOST_REAL:
        chosen = np.random.default_rng(0).permutation(len(source))[:MOST_REAL]
        source = SubsetSource(source, np.sort(chosen))
    real, _ = read_views(source, model.image_size)
    made = (images * 255).round().byte()
    encoder = None if features == PIXELS else open_encoder(features)
    size: Any = {"image_size": model.image_size} if encoder is None else {}
    both = [
        extract(encoder, _in_memory(part), num_workers=0, device=device, progress=False, **size).vectors
        for part in (made, real)
    ]
    known = "pixels" if encoder is None else features
    found: dict[str, Any] = {"frechet_distance": frechet_distance(*both), "frechet_features": known}
    found |= {"real_images": len(real)}
    if len(made) <= both[0].shape[1]:
        found["note"] = (
            f"{len(made)} images are fewer than the {both[0].shape[1]} features: the distance is too large; compare "
            f"only figures of as many images"
        )
    return found | ({} if inception is None else _inception(made, real, inception))


def _in_memory(images: Tensor) -> MemorySource:
    samples = [Sample(image, -1, str(number)) for number, image in enumerate(images)]
    return MemorySource("images", samples, None)


def _inception(made: Tensor, real: Tensor, weights: str) -> dict[str, float]:
    """Return FID and inception score by torchmetrics, from a local file of weights."""
    if not Path(weights).is_file():
        raise UsageError(
            f"there is no file of Inception weights at {weights}; leave inception out for another distance"
        )
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3
        from torchmetrics.image.inception import InceptionScore

        asked = ["2048", "logits_unbiased"]
        pool, logits = (NoTrainInceptionV3("inception-v3-compat", [name], str(weights)) for name in asked)
    except (ModuleNotFoundError, ImportError) as error:
        raise MissingExtraError("torch-fidelity", "generate", "FID and the inception score") from error
    score = InceptionScore(feature=logits)
    vectors = []
    for part in (made, real):
        vectors.append(torch.cat([pool(_three(batch)) for batch in part.split(64)]))
    for batch in made.split(64):
        score.update(_three(batch))
    mean, deviation = score.compute()
    return {"fid": frechet_distance(*vectors), "inception_score": float(mean), "inception_score_std": float(deviation)}


def _three(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
