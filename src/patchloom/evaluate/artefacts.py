"""`patchloom clean diagnose`: are there artefacts in the patch features of an encoder, and is cleaning worth trying?"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchloom.base.sizes import pair
from patchloom.data import EvalTransform, make_loader, open_source
from patchloom.data.base import Source, StreamSource
from patchloom.data.kinds import require_kind
from patchloom.data.pixels import unit
from patchloom.data.subset import SubsetSource
from patchloom.encoders import create_backbone, grid_size, image_size, in_chans, kind_of, normalize, set_image_size
from patchloom.encoders.properties import sides_of
from patchloom.errors import UsageError
from patchloom.evaluate.artefacts_config import ArtefactsConfig
from patchloom.features.artefacts import Artefacts, Dense, dense_features, find_artefacts, stride_of
from patchloom.features.extract import torch_device
from patchloom.io import write_bytes
from patchloom.models.bundle import open_encoder
from patchloom.systems.ph_reg.saved import is_dense, load_dense

SHOWN = 6


class Diagnose:
    """Patterns of place, outlying norms and features of nothing: is cleaning an encoder worth trying?"""

    config_class = ArtefactsConfig
    kinds = ("image",)

    def __init__(self, config: ArtefactsConfig) -> None:
        self.config = config

    def run(self) -> dict[str, Any]:
        """Return the figures.

        Returns:
            `norm_outliers` (share of tokens above the median by 6 median absolute deviations), `artifact_share` (the
            same by quartiles, as `evaluate health` has it), `position_explained_variance`, `position_leakage` (R²),
            `constant_image_pattern`, `shift_consistency`; `verdict` in words; `n`, `dim`, `grid` and `seconds`.

        Raises:
            UsageError: No encoder, too few readable images, or a size that patches do not fill.
        """
        start, config = time.perf_counter(), self.config
        encoder, dense = self._opened()
        device = torch_device(config.device)
        encoder = encoder.eval().to("cpu")
        stride = stride_of(encoder)
        encoder = encoder.to(device)
        images = self._images(encoder, stride)
        size = image_size(encoder)
        found = find_artefacts(
            lambda part: dense(part.to(device)), normalize(images, encoder), size, stride, config.batch_size
        )
        figures: dict[str, Any] = {
            **found.figures,
            "verdict": found.verdict,
            "n": len(images),
            "dim": int(found.features.shape[-1]),
            "grid": list(found.features.shape[1:3]),
            "seconds": round(time.perf_counter() - start, 2),
        }
        self._draw(images[..., : size[0], : size[1]], found, figures)
        return figures

    def _opened(self) -> tuple[nn.Module, Dense]:
        """Return the encoder, and what gives its features: those of a dense CLIP tower are in the space of texts."""
        name = self.config.encoder
        if isinstance(name, nn.Module) or not is_dense(name):
            encoder = self._encoder()
            return encoder, dense_features(encoder)
        tower = load_dense(name)
        print(f"note: {name} is a dense CLIP tower; its patches are looked at in the space of texts", file=sys.stderr)
        size = self.config.image_size
        encoder = tower.encoder if size is None else set_image_size(tower.encoder, size)

        def in_text_space(images: Tensor) -> Tensor:
            device = next(tower.encoder.parameters()).device
            return tower.to(device)(images).unflatten(1, grid_size(encoder, sides_of(images)))

        return encoder, in_text_space

    def _encoder(self) -> nn.Module:
        config = self.config
        fresh = (
            config.untrained and not isinstance(config.encoder, nn.Module) and not Path(str(config.encoder)).exists()
        )
        if fresh:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                encoder: nn.Module = create_backbone(str(config.encoder))
        elif config.untrained:
            raise UsageError(f"untrained is for names of timm models, and {config.encoder} has weights; leave it out")
        else:
            encoder = open_encoder(config.encoder)
        if (kind := kind_of(encoder)) not in self.kinds:
            raise UsageError(f"the encoder takes {kind}s, and artefacts are looked for in features of images")
        return encoder if config.image_size is None else set_image_size(encoder, config.image_size)

    def _images(self, encoder: nn.Module, stride: tuple[int, int]) -> Tensor:
        """Return images (N, C, H', W') in [0, 1], larger than the encoder's by the shift."""
        config = self.config
        source = self._sample(
            open_source(
                config.data,
                in_chans=in_chans(encoder),
                seed=config.seed,
                model=encoder,
                by_index=True,
                **config.source_options(),
            )
        )
        height, width = image_size(encoder)
        larger = pair((height + config.shift * stride[0], width + config.shift * stride[1]))
        batches = make_loader(
            source,
            EvalTransform(larger),
            config.batch_size,
            seed=config.seed,
            shuffle=False,
            num_workers=config.num_workers,
        )
        parts = [unit(batch["image"]) for batch in batches if batch["key"]]
        if not parts:
            raise UsageError(f"{source.name} holds no readable image")
        return torch.cat(parts)

    def _sample(self, source: Source | StreamSource) -> Source:
        require_kind(source, self.kinds, "clean diagnose")
        if not isinstance(source, Source):
            raise UsageError(f"{source.name} can only be read from front to back; unpack the shards to .tar")
        generator = torch.Generator().manual_seed(self.config.seed)
        chosen = torch.randperm(len(source), generator=generator)[: self.config.images].sort().values
        return SubsetSource(source, chosen.numpy())

    def _draw(self, images: Tensor, found: Artefacts, figures: dict[str, Any]) -> None:
        """Write the picture and the page, where they are asked for."""
        from patchloom.report import Section, write_report
        from patchloom.report.artefacts import TITLES, WITHOUT, feature_figure, pattern_figure

        config = self.config
        if config.report is None and config.picture is None:
            return
        seen = slice(0, None, max(1, len(images) // SHOWN))
        pictured = feature_figure(images[seen][:SHOWN], {"": found.features[seen][:SHOWN]})
        if config.picture is not None:
            write_bytes(config.picture, pictured.png)
        if config.report is None:
            return
        name = "a module" if isinstance(config.encoder, nn.Module) else str(config.encoder)
        table: list[dict[str, object]] = [
            {"figure": TITLES[figure], "value": value, "without artefacts": WITHOUT[figure]}
            for figure, value in found.figures.items()
        ]
        patterns = pattern_figure({"": found.features}, {"": found.empty})
        write_report(
            config.report,
            title="Artefacts of patch features",
            subtitle=f"{name}, {figures['n']} images of {config.data}",
            facts={"images": figures["n"], "patches": "x".join(map(str, figures["grid"])), "width": figures["dim"]},
            sections=[
                Section(title="Figures", table=table),
                Section(title="What features show", figures=[pictured]),
                Section(title="What does not depend on the image", figures=[patterns]),
            ],
            command=_command(config, name),
            verdict=figures["verdict"],
        )


def _command(config: ArtefactsConfig, encoder: str) -> str:
    """Return the command that repeats the diagnosis."""
    words = ["patchloom", "clean", "diagnose", "--encoder", encoder]
    for one in fields(config):
        value = getattr(config, one.name)
        if one.name == "encoder" or value == one.default:
            continue
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += [f"--{one.name}", shown.lower() if isinstance(value, bool) else shown]
    return shlex.join(words)
