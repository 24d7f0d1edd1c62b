"""What PH-Reg changed: artefacts of the original and of the student, and how far both are from the mean over views."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from patchloom.encoders import Encoder, image_size, normalize, patch_size
from patchloom.features.artefacts import Artefacts, Dense, find_artefacts, position_explained_variance
from patchloom.systems.ph_reg.model import feature_loss
from patchloom.training.probe_data import choose_probe_data
from patchloom.training.report import held_out_samples

if TYPE_CHECKING:
    from patchloom.systems.ph_reg.method import PHRegMethod

MOST, LEAST, AT_ONCE = 32, 4, 4


@dataclass(frozen=True)
class Comparison:
    """Artefacts before and after, of the same images."""

    before: Artefacts = field(repr=False)
    after: Artefacts = field(repr=False)
    distance: tuple[float, float]
    """1 - cosine + mean squared error to the mean over views, of the original and of the student."""
    target_explained: float
    """Share of the variance of the mean over views that place explains."""
    images: int

    @property
    def figures(self) -> dict[str, Any]:
        """All of it, for `summary.json`."""
        return {
            "artefacts_before": self.before.figures,
            "artefacts_after": self.after.figures,
            "distance_before": self.distance[0],
            "distance_after": self.distance[1],
            "target_position_explained_variance": self.target_explained,
            "compared_images": self.images,
            "cleaning": self.sentence,
        }

    @property
    def sentence(self) -> str:
        """What changed, in plain words."""
        start, end = self.distance
        before, after = (found.figures["position_explained_variance"] for found in (self.before, self.after))
        moved = f"{abs(1 - end / start):.0%} {'nearer to' if end < start else 'farther from'}" if start > 0 else "at"
        return (
            f"The student is {moved} the mean over views than its original; place explains {after:.0%} of what its "
            f"patch features differ by, and of its original's {before:.0%}."
        )


@torch.no_grad()
def compare(method: PHRegMethod) -> Comparison | None:
    """Return how original and student do on images of `probe_data`, else on some of the training images.

    None where there are fewer than 4 of them.
    """
    queries = choose_probe_data(method.source, method.config, method.encoder).queries
    if queries is None or len(queries) < LEAST:
        return None
    encoder: Encoder = method.encoder
    size, patch = image_size(encoder), patch_size(encoder)
    samples = held_out_samples(queries, (size[0] + patch, size[1] + patch), MOST)
    if len(samples) < LEAST:
        return None
    images = normalize(method.pixels(samples), encoder)
    was_training = encoder.training
    encoder.eval()
    model, device = method.model, method.device

    def found(features: Dense) -> Artefacts:
        return find_artefacts(lambda part: features(part.to(device)), images, size, (patch, patch), AT_ONCE)

    before, after = found(model.teacher.features), found(model.features)
    generator = torch.Generator().manual_seed(method.config.seed)
    targets = []
    for part in images[..., : size[0], : size[1]].split(AT_ONCE):
        offsets, flips = model.teacher.draw(len(part), generator)
        targets.append(model.teacher(part.to(device), offsets, flips).cpu())
    target = torch.cat(targets)
    encoder.train(was_training)
    scale = method.config.mse_scale
    distance = tuple(float(feature_loss(target, one.features, scale)["loss"]) for one in (before, after))
    explained = position_explained_variance(target)
    return Comparison(before, after, (distance[0], distance[1]), explained, len(images))
