"""A trained segmentation model on disk: the encoder's bundle, and the decoder's tensors and settings beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from patchloom import registry
from patchloom.base.sizes import Size, checked_size, compact, pair
from patchloom.data.mask_survey import RGB
from patchloom.data.mask_transforms import resized_size
from patchloom.data.mask_values import MaskCoding
from patchloom.encoders import Encoder, normalize
from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError
from patchloom.io import write_json
from patchloom.segment.build import Parts, build_parts
from patchloom.segment.inference import SlidingWindowSegmenter, WholeSegmenter, published_step
from patchloom.segment.layers import resize

WEIGHTS, ABOUT = "decoder.safetensors", "decoder.json"
FORMAT = 1
OF_ENCODER = "backbone.encoder."


class Segmenter(nn.Module):
    """An encoder with its decoder, for images of any size.

    Attributes:
        kind: What it takes.
        full_size: Whether it gives logits of the images' size, as `pl.load` sets it, or of the decoder's.

    Args:
        parts: Backbone, neck and head.
        head_name: Name of the decoder.
        width: Its width.
        crop: Side of the windows the encoder sees, or (height, width).
        short_side: Shorter side images are resized to; None: as they are.
        coding: How the masks were read that it learnt from.
        palette: Colours by class.
        class_names: Names by class; default: those of the coding.
        settings: Further settings of a decoder that is a system of its own.
        inference: In windows (`slide`), or images as a `whole`.
    """

    kind = "image"
    full_size = False

    def __init__(
        self,
        parts: Parts,
        head_name: str,
        width: int,
        crop: Size,
        short_side: int | None,
        coding: MaskCoding | None,
        palette: list[RGB],
        class_names: list[str] | None = None,
        settings: dict[str, Any] | None = None,
        inference: Literal["slide", "whole"] = "slide",
    ) -> None:
        super().__init__()
        self.inference = inference
        self.backbone, self.neck, self.head = parts.backbone, parts.neck, parts.head
        self.head_name, self.width, self.crop, self.short_side = head_name, width, crop, short_side
        self.coding, self.palette, self.settings = coding, palette, dict(settings or {})
        self.class_names = list(coding.names) if coding is not None else list(class_names or [])

    @property
    def encoder(self) -> Encoder:
        """The encoder."""
        return self.backbone.encoder

    @property
    def pretrained_cfg(self) -> Any:
        """What timm knows of the encoder: mean and standard deviation, which `encoders.normalize` takes."""
        return self.encoder.pretrained_cfg

    @property
    def stride(self) -> Size:
        """Step between windows: two thirds of one."""
        return compact(published_step(pair(self.crop)))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K, h, w) of normalised images (B, C, H, W); with `full_size` (B, K, H, W)."""
        logits = self.decoded(images)
        return resize(at_least_float32(logits), images.shape[-2:]) if self.full_size else logits

    def decoded(self, images: Tensor) -> Tensor:
        """Return logits (B, K, h, w) of normalised images (B, C, H, W), as large as the decoder makes them."""
        logits: Tensor = Parts(self.backbone, self.neck, self.head, None).logits(images)
        return logits

    def segmenter(self, batch_size: int = 8) -> SlidingWindowSegmenter | WholeSegmenter:
        """Return what segments images of any size by it, so many windows at a time."""
        if self.inference == "whole":
            return WholeSegmenter(self.decoded)
        return SlidingWindowSegmenter(self.decoded, self.crop, self.stride, batch_size)

    @torch.no_grad()
    def segment(self, image: Tensor, size: tuple[int, ...] | None = None, batch_size: int = 8) -> Tensor:
        """Return the class of every pixel, (H, W) uint8, of an image (C, h, w) in [0, 1]; default: at its own size."""
        output_size = size or tuple(image.shape[-2:])
        side = resized_size((image.shape[-2], image.shape[-1]), self.short_side)
        pixels = image[None] if side == tuple(image.shape[-2:]) else resize(image[None], side).clamp(0, 1)
        return self.segmenter(batch_size).classes(normalize(pixels, self.backbone.encoder), output_size)[0]

    def sides(self, size: Any = None) -> tuple[int, ...]:
        """Return the sides of what goes through it at once: given, or those of the windows it was trained on."""
        return pair(self.crop if size is None else checked_size("image_size", size))

    def about(self) -> dict[str, Any]:
        """Return what makes it again around its tensors."""
        return {
            "format": FORMAT,
            "head": self.head_name,
            "layers": list(self.backbone.layers),
            "apply_norm": self.backbone.apply_norm,
            "width": self.width,
            "settings": self.settings,
            "crop": self.crop,
            "short_side": self.short_side,
            "inference": self.inference,
            "class_names": self.class_names,
            "palette": [list(colour) for colour in self.palette],
            "masks": None if self.coding is None else self.coding.describe(),
        }

    @classmethod
    def made_from(cls, parts: Parts, about: dict[str, Any]) -> Segmenter:
        """Return a model of parts, with what `about` said of it."""
        palette = [(int(r), int(g), int(b)) for r, g, b in about["palette"]]
        sizes = (about["width"], checked_size("crop", about["crop"]), about["short_side"])
        return cls(
            parts,
            about["head"],
            *sizes,
            None,
            palette,
            about["class_names"],
            about.get("settings"),
            about.get("inference", "slide"),
        )


BY_KIND = {"image": "segment.saved:Segmenter", "volume": "segment.volume_saved:VolumeSegmenter"}
"""Models by what they take."""


def save_segmenter(model: Segmenter, path: Path) -> None:
    """Write the decoder beside the encoder's bundle in a folder."""
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(OF_ENCODER)}
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, path / WEIGHTS)
    write_json(path / ABOUT, model.about())


def fill_decoder(model: Segmenter, state: dict[str, Tensor]) -> None:
    """Fill the decoder of a model with tensors that `save_segmenter` has written.

    Raises:
        ValueError: They are not those of such a decoder.
    """
    missing, extra = model.load_state_dict(state, strict=False)
    lost = [name for name in missing if not name.startswith(OF_ENCODER)]
    if lost or extra:
        raise ValueError(f"its tensors are not those of {model.head_name}: {', '.join([*lost, *extra][:4])}")


def open_segmenter(path: str | Path, **options: Any) -> Any:
    """Return the segmentation model of a run or bundle, whatever kind it is of, in eval mode.

    Args:
        path: The run or bundle.
        **options: What only some kinds take, such as `proposals`; None: not given.

    Raises:
        UsageError: There is none, its files are damaged, or it does not take what is given.
    """
    from patchloom.models.bundle import find_bundle

    folder = find_bundle(path)
    given = {name: value for name, value in options.items() if value is not None}
    opener = next((place for name, place in registry.SEGMENTERS.items() if (folder / name).exists()), None)
    if opener is not None:
        return registry.load(opener)(path, **given)
    if given:
        raise UsageError(f"{next(iter(given))} is for runs of segment point, and {path} is of another decoder")
    return load_segmenter(path)


def holds_segmenter(path: str | Path) -> bool:
    """Return whether a run or bundle holds a segmentation model of images."""
    for folder in (Path(path), Path(path) / "model"):
        if (folder / ABOUT).exists():
            try:
                return bool(json.loads((folder / ABOUT).read_text(encoding="utf-8")).get("kind", "image") == "image")
            except (ValueError, AttributeError):  # damaged, which opening it says
                return True
    return False


def load_segmenter(path: str | Path) -> Segmenter:
    """Return a trained segmentation model from a run or its model, in eval mode.

    Raises:
        UsageError: There is none, or its files are damaged.
    """
    from patchloom.models.bundle import find_bundle
    from patchloom.models.bundle import load as load_bundle

    folder = find_bundle(path)
    if not (folder / ABOUT).exists():
        if any((folder / name).exists() for name in registry.SEGMENTERS):
            raise UsageError(
                f"{path} is a run of segment point, which has no decoder of maps; give one of another method"
            )
        raise UsageError(f"{path} holds no decoder; train one: patchloom segment linear --data … --encoder … --out …")
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        state = load_file(folder / WEIGHTS)
        parts = build_parts(
            load_bundle(folder),
            len(about["class_names"]),
            about["head"],
            layers=tuple(about["layers"]),
            apply_norm=about["apply_norm"],
            width=about["width"],
            settings=about.get("settings"),
        )
        made: type[Segmenter] = registry.load(BY_KIND[about.get("kind", "image")])
        model = made.made_from(parts, about)
        fill_decoder(model, state)
    except UsageError:
        raise
    except Exception as error:  # JSON, safetensors and shapes fail in ways of their own
        raise UsageError(f"the decoder in {folder} is damaged: {' '.join(str(error).split())[:200]}") from error
    return model.eval()
