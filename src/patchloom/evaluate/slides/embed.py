"""From slides to tile features: `patchloom slides tile` shows the tiles, `patchloom slides embed` makes their features.

>>> embed_tiles("runs/mine", "slides/", out="features/")  # doctest: +SKIP
{'slides': 40, 'tiles': 31290, …}
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from patchloom.base.progress import track
from patchloom.base.sizes import compact, size_text
from patchloom.data.base import UnreadableImageError
from patchloom.encoders import Encoder, image_size, in_chans, normalize, pooled, set_image_size
from patchloom.errors import UsageError
from patchloom.evaluate.slides.embed_config import EmbedConfig, TileConfig
from patchloom.evaluate.slides.figures import overview, thumbnail_picture
from patchloom.evaluate.slides.report import write_store_report
from patchloom.evaluate.slides.store import TileStore
from patchloom.evaluate.slides.tissue import Tiles, TileSettings, find_tiles
from patchloom.evaluate.slides.wsi import Slide, find_slides, need_openslide
from patchloom.features.extract import torch_device
from patchloom.features.inputs import require_image_encoder
from patchloom.io import write_json
from patchloom.training.config import config_from_mapping

SKIPPED = "skipped.json"
BATCHES_AHEAD = 2
TYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


def embed_tiles(encoder: Any, slides: str, out: str, **settings: Any) -> dict[str, Any]:
    """Make tile features; arguments are the fields of `EmbedConfig`, the result that of `run_embed`."""
    config_class: Any = EmbedConfig
    return run_embed(config_from_mapping(config_class, {"encoder": encoder, "slides": slides, "out": out, **settings}))


def run_tile(config: TileConfig) -> dict[str, Any]:
    """Find the tiles of slides.

    Returns:
        Number of `slides` and `tiles` in the folder, `new` slides, `skipped` ones with reasons, and the `report`.

    Raises:
        UsageError: There is no slide, none can be used, or the folder was made with other settings.
        MissingExtraError: OpenSlide is not installed.
    """
    about = {"encoder": None, "tiles": _settings_of(config)}
    return _for_each_slide(config, about, lambda slide, tiles: np.zeros((len(tiles), 0), np.float32))


def run_embed(config: EmbedConfig) -> dict[str, Any]:
    """Make tile features; a run that was stopped goes on where it was when started again.

    Returns:
        Number of `slides` and `tiles` in the folder, `new` slides, `skipped` ones with reasons, and the `report`.

    Raises:
        UsageError: There is no such encoder or no slide, none can be used, or the folder was made otherwise.
        MissingExtraError: OpenSlide is not installed.
    """
    need_openslide()
    encoder, device = _prepared(config), torch_device(config.device)
    encoder.to(device)
    about = {
        "encoder": type(config.encoder).__name__ if isinstance(config.encoder, nn.Module) else str(config.encoder),
        "weights": weights_fingerprint(encoder),
        "image_size": compact(image_size(encoder)),
        "pool": config.pool,
        "precision": config.precision,
        "dtype": config.dtype,
        "tiles": _settings_of(config),
    }

    def features_of(slide: Slide, tiles: Tiles) -> np.ndarray:
        return _features(encoder, slide, tiles, config, device)

    return _for_each_slide(config, about, features_of)


def weights_fingerprint(encoder: nn.Module) -> str:
    """Return a short hash of an encoder's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _for_each_slide(
    config: TileConfig | EmbedConfig, about: dict[str, Any], features_of: Callable[[Slide, Tiles], np.ndarray]
) -> dict[str, Any]:
    need_openslide()
    slides = find_slides(config.slides)
    store = TileStore(config.out, about)
    waiting = {name: path for name, path in slides.items() if name not in store}
    skipped: list[dict[str, str]] = []
    for name, path in track(waiting.items(), "slides", unit="slide"):
        try:
            with Slide(path, config.slide_mpp, name) as slide:
                tiles = find_tiles(slide, config)
                features = features_of(slide, tiles)
                _write(store, slide, tiles, features)
        except UnreadableImageError as error:
            skipped.append({"slide": name, "reason": error.reason})
            tqdm.write(f"left out {name}: {error.reason}", file=sys.stderr)
    write_json(store.path / SKIPPED, {"skipped": skipped})
    here = [name for name in slides if name in store]
    if not here:
        first = f"{skipped[0]['slide']}: {skipped[0]['reason']}"
        raise UsageError(f"none of the {len(slides)} slides in {config.slides} can be used; {first}")
    report = write_store_report(store, here, skipped, _command(config))
    return {
        "slides": len(here),
        "tiles": sum(store.slide(name)["tiles"] for name in here),
        "new": len(waiting) - len(skipped),
        "skipped": skipped,
        "report": str(report),
    }


def _write(store: TileStore, slide: Slide, tiles: Tiles, features: np.ndarray) -> None:
    thumbnail, thumbnail_mpp = thumbnail_picture(tiles)
    about = {
        "file": str(slide.path.resolve()),
        "size": list(slide.size),
        "mpp": slide.mpp,
        "tiles": len(tiles),
        "tile_size": tiles.size,
        "tile_mpp": tiles.mpp,
        "tissue": float(tiles.mask.mean()),
        "thumbnail_mpp": thumbnail_mpp,
    }
    pictures = {"thumbnail": thumbnail, "overview": overview(tiles, slide.name).png}
    store.write(slide.name, tiles.level, tiles.places, features, about, **pictures)


def _prepared(config: EmbedConfig) -> Encoder:
    """Return the encoder in eval mode, set up for the tiles; a caller's module is left as it is."""
    from patchloom.evaluate.target import EvaluationConfig, resolve_encoder

    chosen = {name: getattr(config, name) for name in ("encoder", "untrained", "image_size", "seed")}
    encoder = resolve_encoder(EvaluationConfig(train="", test="", **chosen))
    if encoder is None:
        raise UsageError("raw pixels are no tile features; name an encoder")
    require_image_encoder(encoder, "slides embed")
    if in_chans(encoder) != 3:
        raise UsageError(f"the encoder takes {in_chans(encoder)} channels; slides have 3 (RGB)")
    encoder = copy.deepcopy(encoder) if isinstance(config.encoder, nn.Module) else encoder
    if config.image_size is not None and image_size(encoder) != (config.image_size, config.image_size):
        set_image_size(encoder, config.image_size)
    if not isinstance(size := compact(image_size(encoder)), int):
        raise UsageError(f"the encoder takes images of {size_text(size)}, and tiles are square; set image_size")
    return encoder.eval().requires_grad_(False)


@torch.inference_mode()
def _features(encoder: Encoder, slide: Slide, tiles: Tiles, config: EmbedConfig, device: torch.device) -> np.ndarray:
    """Return the features of the tiles of a slide, (n, D)."""
    size, features = image_size(encoder), []
    with closing(_batches(slide, tiles, config.batch_size, config.num_workers)) as batches:
        for batch in batches:
            images = torch.from_numpy(batch).to(device).permute(0, 3, 1, 2).float().div_(255)
            if tuple(images.shape[-2:]) != size:
                images = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp_(0, 1)
            with torch.autocast(device.type, dtype=TYPES[config.precision], enabled=config.precision != "32"):
                vectors: Tensor = pooled(encoder, normalize(images, encoder), config.pool)
            features.append(vectors.float().cpu().numpy())
    return np.concatenate(features).astype(config.dtype)


def _batches(slide: Slide, tiles: Tiles, batch_size: int, num_workers: int) -> Generator[np.ndarray]:
    """Yield the tiles (b, size, size, 3) uint8 in order; threads read ahead of whoever takes them."""

    def read(place: np.ndarray) -> np.ndarray:
        return slide.tile(tiles.level, int(place[0]), int(place[1]), tiles.size)

    chunks = [tiles.places[start : start + batch_size] for start in range(0, len(tiles), batch_size)]
    if num_workers == 0 or not slide.many_readers:
        yield from (np.stack([read(place) for place in chunk]) for chunk in chunks)
        return
    with ThreadPoolExecutor(num_workers) as threads:
        ahead: deque[list[Future[np.ndarray]]] = deque()
        try:
            for chunk in chunks:
                ahead.append([threads.submit(read, place) for place in chunk])
                if len(ahead) > BATCHES_AHEAD:
                    yield np.stack([tile.result() for tile in ahead.popleft()])
            while ahead:
                yield np.stack([tile.result() for tile in ahead.popleft()])
        finally:
            threads.shutdown(cancel_futures=True)


def _settings_of(config: TileSettings) -> dict[str, Any]:
    """Return what decides which tiles there are."""
    return {field.name: getattr(config, field.name) for field in fields(TileSettings)}


def _command(config: TileConfig | EmbedConfig) -> str:
    """Return the command that repeats this."""
    verb = "embed" if isinstance(config, EmbedConfig) else "tile"
    words = [f"patchloom slides {verb}"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            words.append(f"--{field.name} {value}")
    return " ".join(words)
