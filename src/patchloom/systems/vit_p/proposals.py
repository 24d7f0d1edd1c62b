"""What draws masks for points to be classified in: superpixels, models of torchvision and transformers, our segmenters.

A generator takes an image and gives `MaskProposals`. Superpixels (scikit-image) need no weights and no network.

>>> proposals = SuperpixelProposals(4)(torch.rand(3, 16, 24))
>>> proposals.partition.shape, proposals.class_logits
(torch.Size([16, 24]), None)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.base.hub import fetching, reason
from patchloom.data.mask_transforms import resized_size
from patchloom.encoders import normalize
from patchloom.errors import MissingExtraError, UsageError, unknown_name
from patchloom.segment.inference import SlidingWindowSegmenter
from patchloom.segment.layers import resize
from patchloom.segment.saved import load_segmenter
from patchloom.systems.vit_p.inference import PointMode, inner_pixel, mask_points

SURE = 20.0
"""Logit of a mask of yes or no."""
NEVER = -1e4


@dataclass(frozen=True)
class MaskProposals:
    """Masks of one image, and what their maker says of their classes."""

    size: tuple[int, int]
    """(H, W) of the image."""
    masks: Tensor | None = None
    """(Q, H, W), logits or bool; None for a partition."""
    partition: Tensor | None = None
    """(H, W) int64: the number of the mask each pixel belongs to, 0 … Q - 1, -1 for none; masks that do not overlap
    take the memory of one."""
    class_logits: Tensor | None = None
    """(Q, K + 1), the last "no object"; None where classes are not named."""
    scores: Tensor | None = None
    """(Q,) quality in [0, 1] of masks without classes."""

    def __len__(self) -> int:
        """Return the number of masks."""
        if self.masks is not None:
            return len(self.masks)
        return 0 if self.partition is None else int(self.partition.max()) + 1

    @property
    def soft(self) -> bool:
        """Whether masks are logits."""
        return self.masks is not None and self.masks.is_floating_point()

    def mask_logits(self) -> Tensor:
        """Return all masks as logits (Q, H, W)."""
        if self.masks is not None and self.soft:
            return self.masks.float()
        masks = self.masks
        if masks is None:
            assert self.partition is not None
            masks = self.partition == torch.arange(len(self), device=self.partition.device)[:, None, None]
        return masks.float() * (2 * SURE) - SURE

    def points(self, mode: PointMode | None = None) -> Tensor:
        """Return the point of each mask, see `mask_points`; default: argmax of soft masks, distance of others."""
        if self.partition is None:
            if self.masks is None or not len(self):
                return torch.zeros(0, 2)
            mode = mode or ("argmax" if self.soft else "distance")
            if mode == "argmax":
                return mask_points(self.masks)
            return mask_points(self.masks > 0 if self.soft else self.masks, mode)
        from scipy.ndimage import find_objects

        numbers = self.partition.cpu().numpy()
        places = []
        for number, box in enumerate(find_objects(numbers + 1, max_label=len(self))):
            row, column = (0, 0)
            if box is not None:
                part = numbers[box] == number
                if mode == "argmax":
                    row, column = (int(x) for x in np.argwhere(part)[0])
                else:
                    row, column = inner_pixel(part, mode or "distance")
                row, column = row + box[0].start, column + box[1].start
            places.append((row, column))
        return torch.tensor(places).float().reshape(-1, 2) / torch.tensor(self.size).float() * 2 - 1


class MaskProposalGenerator(Protocol):
    """What draws masks."""

    class_names: Sequence[str] | None
    """Names of the classes of its logits; None where it names none."""

    def __call__(self, image: Tensor) -> MaskProposals:
        """Return masks of an image (C, H, W) in [0, 1]."""
        ...


class SuperpixelProposals:
    """Superpixels of scikit-image: a partition of the image along its edges.

    Args:
        count: About how many (`slic`); of `felzenszwalb`, pixels that the smallest has at least.
        method: `slic` (Achanta et al. 2012) or `felzenszwalb` (Felzenszwalb and Huttenlocher 2004).
        compactness: Of `slic`: how square they are.
    """

    class_names: Sequence[str] | None = None

    def __init__(self, count: int = 150, method: str = "slic", compactness: float = 10.0) -> None:
        if method not in ("slic", "felzenszwalb"):
            raise unknown_name("kind of superpixels", method, ("slic", "felzenszwalb"))
        if count < 1:
            raise UsageError(f"{count} superpixels are none; give 1 or more")
        self.count, self.method, self.compactness = count, method, compactness

    def __call__(self, image: Tensor) -> MaskProposals:
        """Return the superpixels of an image (C, H, W) in [0, 1]."""
        from skimage.segmentation import felzenszwalb, slic

        pixels = image.detach().cpu().float().permute(1, 2, 0).numpy()
        if self.method == "felzenszwalb":
            labels = felzenszwalb(pixels, scale=100, sigma=0.8, min_size=self.count, channel_axis=-1)
        else:
            labels = slic(
                pixels, self.count, compactness=self.compactness, sigma=1.0, start_label=0, channel_axis=-1,
                convert2lab=pixels.shape[-1] == 3,
            )  # fmt: skip
        _, numbers = np.unique(labels, return_inverse=True)
        partition = torch.from_numpy(numbers.reshape(labels.shape).astype(np.int64))
        return MaskProposals((pixels.shape[0], pixels.shape[1]), partition=partition)


class ComponentProposals:
    """Connected components of a label map: of the truth, for studies and tests, or of what a segmenter says.

    Args:
        segment: Label map (H, W) of an image (C, H, W) in [0, 1], 255 where there is none; with it, class logits
            (K, H, W) or None.
        class_names: Names of the classes of these logits.
    """

    def __init__(
        self, segment: Callable[[Tensor], tuple[Tensor, Tensor | None]], class_names: Sequence[str] | None = None
    ) -> None:
        self.segment, self.class_names = segment, class_names

    def __call__(self, image: Tensor) -> MaskProposals:
        """Return the components; classes are the mean of the segmenter's probabilities over each."""
        labels, logits = self.segment(image)
        numbers, count = components(labels)
        size = (labels.shape[-2], labels.shape[-1])
        if logits is None or not count:
            return MaskProposals(size, partition=numbers)
        shares = logits.float().softmax(0).flatten(1).cpu()
        inside = numbers.flatten() >= 0
        sums = shares.new_zeros(count, len(shares)).index_add(0, numbers.flatten()[inside], shares.T[inside])
        means = sums / numbers.flatten()[inside].bincount(minlength=count)[:, None]
        known = means.clamp(min=1e-12).log()
        return MaskProposals(size, partition=numbers, class_logits=F.pad(known, (0, 1), value=NEVER))


def components(labels: Tensor, ignore: int = 255) -> tuple[Tensor, int]:
    """Return the number of the connected component of each pixel (H, W), -1 where unknown, and how many there are."""
    from skimage.measure import label

    values = labels.cpu().numpy().astype(np.int64)
    found, count = label(values, background=ignore, return_num=True, connectivity=1)
    return torch.from_numpy(found.astype(np.int64)) - 1, int(count)


class TransformersProposals:
    """Mask2Former, MaskFormer or OneFormer of transformers (extra `proposals`).

    Args:
        name: Name on the hub, or a folder.
        device: Where it computes.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        transformers = _need_transformers("mask classifiers as generators of masks")
        with _fetched(name):
            self.processor = transformers.AutoImageProcessor.from_pretrained(name)
            self.model = transformers.AutoModelForUniversalSegmentation.from_pretrained(name).eval().to(device)
        names = self.model.config.id2label
        self.class_names: Sequence[str] | None = [str(names[number]) for number in sorted(names)]
        self.device = device

    @torch.no_grad()
    def __call__(self, image: Tensor) -> MaskProposals:
        """Return the masks of all queries, with their classes."""
        size = (image.shape[-2], image.shape[-1])
        words: dict[str, Any] = {"task_inputs": ["semantic"]} if "OneFormer" in type(self.model).__name__ else {}
        inputs = self.processor(images=_as_levels(image), return_tensors="pt", **words).to(self.device)
        out = self.model(**inputs)
        queries, masks = out.class_queries_logits[0].cpu(), out.masks_queries_logits
        masks = F.interpolate(masks, size=size, mode="bilinear", align_corners=False)[0].cpu()
        return MaskProposals(size, masks, class_logits=queries)


class SamProposals:
    """Automatic masks of SAM and its kin, by transformers' mask generation (extra `proposals`).

    Args:
        name: Name on the hub, or a folder.
        device: Where it computes.
    """

    class_names: Sequence[str] | None = None

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        transformers = _need_transformers("SAM as a generator of masks")
        with _fetched(name):
            self.pipeline = transformers.pipeline("mask-generation", model=name, device=device)

    def __call__(self, image: Tensor) -> MaskProposals:
        """Return the masks with their quality."""
        from PIL import Image

        size = (image.shape[-2], image.shape[-1])
        found = self.pipeline(Image.fromarray(_as_levels(image).permute(1, 2, 0).numpy()))
        masks = [torch.as_tensor(np.asarray(mask)).bool() for mask in found["masks"]]
        if not masks:
            return MaskProposals(size, torch.zeros(0, *size, dtype=torch.bool))
        scores = torch.as_tensor([float(score) for score in found["scores"]]).clamp(0, 1)
        return MaskProposals(size, torch.stack(masks), scores=scores)


class MaskRCNNProposals:
    """Mask R-CNN of torchvision: things only.

    Args:
        model: A detector of torchvision; default: `maskrcnn_resnet50_fpn_v2` with the weights of COCO, fetched.
        class_names: Names of its classes, background first and left out here; default: those of COCO.
        device: Where it computes.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        class_names: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if model is None:
            from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights, maskrcnn_resnet50_fpn_v2

            weights = MaskRCNN_ResNet50_FPN_V2_Weights.DEFAULT
            with _fetched("maskrcnn_resnet50_fpn_v2"):
                model = maskrcnn_resnet50_fpn_v2(weights=weights)
            class_names = weights.meta["categories"]
        self.model = model.eval().to(device)
        self.class_names: Sequence[str] | None = None if class_names is None else list(class_names)[1:]
        self.device = device

    @torch.no_grad()
    def __call__(self, image: Tensor) -> MaskProposals:
        """Return the pasted masks, with their label's score; the rest of it is that there is nothing."""
        size = (image.shape[-2], image.shape[-1])
        found = {name: value.cpu() for name, value in self.model([image.float().to(self.device)])[0].items()}
        masks = torch.logit(found["masks"][:, 0], eps=1e-6)
        if self.class_names is None:
            return MaskProposals(size, masks, scores=found["scores"])
        count = len(self.class_names)
        logits = torch.full((len(masks), count + 1), NEVER)
        rows = torch.arange(len(masks))
        scores = found["scores"].clamp(1e-6, 1 - 1e-6)
        logits[rows, found["labels"] - 1] = scores.log()
        logits[:, -1] = (1 - scores).log()
        return MaskProposals(size, masks, class_logits=logits)


def open_proposals(name: str, device: torch.device | str = "cpu") -> MaskProposalGenerator:
    """Return a generator by name.

    Args:
        name: `superpixels` or `superpixels:300`; `felzenszwalb:50`; `maskrcnn`; `transformers:NAME` or `sam:NAME`, of
            the hub or a folder; or the path of a run of `patchloom segment`.
        device: Where models compute.

    Raises:
        UsageError: There is no such generator, or its weights cannot be fetched.
        MissingExtraError: Its package is not installed.
    """
    word, _, rest = name.partition(":")
    if word in ("superpixels", "felzenszwalb"):
        count = rest or ("150" if word == "superpixels" else "50")
        if not count.isdigit() or int(count) < 1:
            raise UsageError(f"proposals is {name!r}; give a number from 1 behind the colon, such as {word}:150")
        return SuperpixelProposals(int(count), "slic" if word == "superpixels" else "felzenszwalb")
    if name == "maskrcnn":
        return MaskRCNNProposals(device=device)
    if word in ("transformers", "sam") and rest:
        return TransformersProposals(rest, device) if word == "transformers" else SamProposals(rest, device)
    if Path(name).exists():
        return _segmenter_proposals(name, device)
    kinds = ("superpixels", "felzenszwalb", "maskrcnn", "transformers:NAME", "sam:NAME")
    raise UsageError(
        f"proposals is {name!r}; it is one of {', '.join(kinds)}, or the path of a run of patchloom segment"
    )


def in_order(logits: Tensor, names: Sequence[str], wanted: Sequence[str], source: str) -> Tensor:
    """Return class logits (Q, K + 1) of a generator in the order of other classes, matched by name.

    Raises:
        UsageError: A class is missing there.
    """
    if list(names) == list(wanted):
        return logits
    if missing := [name for name in wanted if name not in names]:
        raise UsageError(
            f"{source} knows no class {missing[0]!r} (it has {', '.join(list(names)[:8])}); set alpha to 1, so that "
            f"its masks alone count"
        )
    return logits[:, [*(list(names).index(name) for name in wanted), logits.shape[1] - 1]]


def _segmenter_proposals(path: str, device: torch.device | str) -> ComponentProposals:
    model = load_segmenter(path).to(device)
    slide = SlidingWindowSegmenter(model, model.crop, model.stride)

    @torch.no_grad()
    def segment(image: Tensor) -> tuple[Tensor, Tensor]:
        pixels = image[None].to(device)
        side = resized_size((image.shape[-2], image.shape[-1]), model.short_side)
        pixels = pixels if side == tuple(pixels.shape[-2:]) else resize(pixels, side).clamp(0, 1)
        logits = slide(normalize(pixels, model.backbone.encoder), image.shape[-2:])[0].cpu()
        return logits.argmax(0), logits

    return ComponentProposals(segment, model.class_names)


def _as_levels(image: Tensor) -> Tensor:
    """Return an image in [0, 1] as uint8 with three channels."""
    pixels = image if image.shape[0] == 3 else image[:1].expand(3, -1, -1)
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def _need_transformers(purpose: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "proposals", purpose) from error
    return transformers


@contextmanager
def _fetched(name: str) -> Iterator[None]:
    """Within it, weights are fetched; what goes wrong is said in a sentence."""
    try:
        with fetching():
            yield
    except UsageError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{name} could not be opened ({reason(error)}); give a folder that holds it") from error
