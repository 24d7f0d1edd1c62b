"""Repair under many random masks: what EAR does with one mask takes twelve passes here.

RIAD (Zavrtanik et al. 2021, "Reconstruction by inpainting for visual anomaly detection", Pattern Recognition 112): the
image is cut into cells, which fall at random into disjoint sets; each set is emptied and repaired in turn, and the
repaired cells are put together. Maps are averaged over several sizes of cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from patchloom.systems.ear.excision import RANDOM_CELLS, RANDOM_SETS, random_sets
from patchloom.systems.ear.losses import squared_error
from patchloom.systems.ear.model import SMOOTHING, Score, recovery_map


class RandomMasks(nn.Module):
    """A repair network under random masks.

    Args:
        unet: The network, trained on images with random cells emptied.
        cells: Sides of the cells, in pixels.
        sets: Into how many sets the cells fall.
        smoothing: Side of the mean filter on the map.
        score: As for `EAR`.
        seed: Seed of the masks; None: others each time.
    """

    def __init__(
        self,
        unet: nn.Module,
        cells: Sequence[int] = RANDOM_CELLS,
        sets: int = RANDOM_SETS,
        smoothing: int = SMOOTHING,
        score: Score = "msgms_max",
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.cells, self.sets, self.smoothing, self.score, self.seed = tuple(cells), sets, smoothing, score, seed

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return `recovered`, of the largest cells, `anomaly_map` (B, 1, H, W) and `pred_score` (B,)."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        maps, errors = [], []
        recovered = images
        for cell in self.cells:
            recovered = torch.zeros_like(images)
            for mask in random_sets((images.shape[-2], images.shape[-1]), cell, self.sets, generator).to(images):
                recovered = recovered + self.unet(images * (1 - mask)) * mask
            maps.append(recovery_map(images, recovered, self.smoothing))
            errors.append(squared_error(images, recovered))
        found = torch.stack(maps).mean(0)
        score = {
            "msgms_max": lambda: found.amax((1, 2, 3)),
            "mean": lambda: found.mean((1, 2, 3)),
            "l2": lambda: torch.stack(errors).mean(0),
        }[self.score]()
        return {"recovered": recovered, "anomaly_map": found, "pred_score": score}
