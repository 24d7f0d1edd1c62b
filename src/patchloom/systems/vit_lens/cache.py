"""Features of pictures and captions by frozen towers, made once for a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchloom.base.progress import track
from patchloom.data.base import Source, UnreadableImageError
from patchloom.data.pixels import unit
from patchloom.data.transforms import EvalTransform
from patchloom.encoders import image_size, normalize
from patchloom.errors import UsageError
from patchloom.io import written_whole
from patchloom.systems.clip.model import CLIP

AT_ONCE = 64


class Cached(NamedTuple):
    """What frozen towers make of what belongs to the samples of a source, by their numbers."""

    images: Tensor
    """(n, V, E), of length 1; V = 0 where there are no pictures, NaN where one has fewer or cannot be read."""
    texts: Tensor
    """(n, E), of length 1; NaN where there is no caption."""


@torch.no_grad()
def make(towers: CLIP, source: Source, device: torch.device) -> Cached:
    """Return the features of all pictures and captions of a source.

    Args:
        towers: Frozen.
        source: Samples with a `caption` and perhaps `pictures` (V, 3, H, W).
        device: Where they run.
    """
    from patchloom.systems.clip.zero_shot import text_features

    towers = towers.to(device).eval()
    trunk: Any = towers.visual.trunk
    view = EvalTransform(image_size(trunk), 1.0)
    said: dict[str, list[int]] = {}
    owners: list[tuple[int, int]] = []
    waiting: list[Tensor] = []
    features: list[Tensor] = []

    def go() -> None:
        if waiting:
            seen = normalize(unit(torch.stack(waiting)).to(device), trunk)
            features.append(towers.encode_image(seen, normalize=True).cpu())
            waiting.clear()

    for index in track(range(len(source)), "looking at pictures and captions", unit="sample"):
        try:
            named = source.read(index).named
            said.setdefault(str(named["caption"]), []).append(index)
            for number, picture in enumerate(named.get("pictures", ())):
                owners.append((index, number))
                waiting.append(view(torch.as_tensor(picture), torch.Generator())["image"])
                if len(waiting) == AT_ONCE:
                    go()
        except UnreadableImageError:  # training skips and lists it
            continue
    go()
    width = int(towers.text.output_dim)
    texts = torch.full((len(source), width), torch.nan)
    if said:
        for feature, places in zip(text_features(towers, list(said)).cpu(), said.values(), strict=True):
            texts[places] = feature
    most = 1 + max((number for _, number in owners), default=-1)
    images = torch.full((len(source), most, width), torch.nan)
    if owners:
        rows, columns = zip(*owners, strict=True)
        images[list(rows), list(columns)] = torch.cat(features)
    return Cached(images, texts)


def save(cached: Cached, path: Path) -> None:
    """Write features to a file."""
    with written_whole(path) as temporary:
        save_file({"images": cached.images.contiguous(), "texts": cached.texts.contiguous()}, temporary)


def load(path: Path, samples: int) -> Cached:
    """Return the features in a file.

    Raises:
        UsageError: It is damaged, or of another number of samples.
    """
    try:
        found = Cached(**load_file(path))
    except (OSError, TypeError, SafetensorError) as error:
        raise UsageError(f"{path} is damaged ({' '.join(str(error).split())[:120]}); delete it, and resume") from error
    if len(found.texts) != samples:
        raise UsageError(f"{path} is of {len(found.texts)} samples, and the data holds {samples}; begin the run anew")
    return found


def chosen_view(images: Tensor, mean: bool = False) -> Tensor:
    """Return one picture's features of each sample, (B, E), drawn, or the mean of all, of length 1.

    Args:
        images: (B, V, E); NaN where a sample has fewer. Those that have none come back as NaN.
        mean: Of all in place of one.
    """
    there = ~images.isnan().any(-1)  # (B, V)
    if mean:
        total = images.nan_to_num().sum(1)
        return torch.where(there.any(1)[:, None], F.normalize(total, dim=-1), torch.nan)
    weights = there.float() + (~there.any(1)).float()[:, None]
    number = torch.multinomial(weights.cpu(), 1).to(images.device)
    return images.gather(1, number[..., None].expand(-1, -1, images.shape[-1]))[:, 0]
