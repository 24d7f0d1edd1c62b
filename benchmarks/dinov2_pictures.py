"""The picture of the docs that shows what the presets of DINOv2 make of an image.

python -m benchmarks.dinov2_pictures
"""

from __future__ import annotations

from pathlib import Path

import torch
from skimage import data
from torch import Tensor
from torch.nn import functional as F

from patchloom.data.multicrop import MultiCrop
from patchloom.report import image_grid
from patchloom.systems.dinov2.method import Dinov2Config
from patchloom.training.config import config_from_mapping

PAGE = Path(__file__).parents[1] / "docs" / "pictures" / "multicrop.png"
SIDE, LOCAL, TILE = 72, 31, 72


def views(image: Tensor, preset: str) -> Tensor:
    """Return the image and crops of it under a preset, the local ones enlarged, (8, 3, SIDE, SIDE) in [0, 1]."""
    config = config_from_mapping(Dinov2Config, {"data": "-", "out": "-", "preset": preset})
    crops = MultiCrop(SIDE, LOCAL, 5, config.global_scale, config.local_scale, config.augmentation())
    made = crops(image, torch.Generator().manual_seed(4))
    whole = F.interpolate(image[None].float(), (SIDE, SIDE), mode="area")
    local = F.interpolate(made["local"].float(), (SIDE, SIDE), mode="nearest")
    return torch.cat([whole, made["global"].float(), local]) / 255


def main() -> None:
    """Write the picture: a photograph, a grey one and stained tissue, each under the preset made for its kind."""
    grey = torch.from_numpy(data.camera()).expand(3, -1, -1).contiguous()
    images = {
        "vitl16_short": torch.from_numpy(data.astronaut()).permute(2, 0, 1),
        "rad_dino": grey,
        "phikon_v2": torch.from_numpy(data.immunohistochemistry()).permute(2, 0, 1),
    }
    rows = {
        f"{preset}: the image, two global crops, five of the local ones": views(image, preset)
        for preset, image in images.items()
    }
    PAGE.write_bytes(image_grid(rows, tile=TILE).png)


if __name__ == "__main__":
    main()
