"""A point classifier and what draws masks for it, as one segmenter of images of any size.

>>> from patchloom.encoders import create_encoder
>>> from patchloom.systems.vit_p.model import PointViT
>>> from patchloom.systems.vit_p.proposals import SuperpixelProposals
>>> encoder = create_encoder("vit_tiny_patch16_224", image_size=64, embed_dim=24, depth=2, num_heads=3)
>>> model = PointSegmenter(PointViT(encoder, 2), SuperpixelProposals(9), (64, 64), ["soil", "crop"]).eval()
>>> model.segment(torch.rand(3, 50, 70)).shape
torch.Size([50, 70])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from patchloom.data.mask_survey import RGB
from patchloom.encoders import Encoder, in_chans, normalize
from patchloom.errors import UsageError, unknown_name
from patchloom.segment.layers import resize
from patchloom.systems.vit_p.inference import (
    TINY,
    Instances,
    Panoptic,
    PointMode,
    Task,
    fuse_mask_scores,
    instance_inference,
    panoptic_inference,
    semantic_inference,
)
from patchloom.systems.vit_p.model import PointViT
from patchloom.systems.vit_p.proposals import MaskProposalGenerator, MaskProposals, in_order, open_proposals

ALPHA = 0.4
UNKNOWN = 255


class PointSegmenter(nn.Module):
    """Classifies the masks of a generator at their points.

    Args:
        classifier: The point classifier.
        generator: What draws masks, or its name, see `open_proposals`, opened when it is first needed.
        image_size: (H, W) that the classifier sees every image at, whatever its proportions.
        class_names: K names.
        palette: Colours by class.
        alpha: Weight of the points beside the generator's own classes; None: 0.4, or 1 where it names none.
        renormalize: See `fuse_mask_scores`.
        point_mode: See `mask_points`; None: argmax of soft masks, distance of others.
        chunk: Points asked at a time; None: all of an image.
        things: Classes of which objects are told apart.
        object_mask_threshold: See `panoptic_inference`.
        overlap_threshold: Likewise.
        top_k: See `instance_inference`.

    Raises:
        UsageError: A class of `things` that is none.
    """

    def __init__(
        self,
        classifier: PointViT,
        generator: MaskProposalGenerator | str,
        image_size: tuple[int, int],
        class_names: Sequence[str],
        palette: Sequence[RGB] = (),
        *,
        alpha: float | None = None,
        renormalize: bool = True,
        point_mode: PointMode | None = None,
        chunk: int | None = None,
        things: Sequence[str] = (),
        object_mask_threshold: float = 0.0,
        overlap_threshold: float = 0.8,
        top_k: int = 100,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.image_size = image_size
        self.class_names, self.palette = list(class_names), list(palette)
        self.alpha, self.renormalize, self.point_mode, self.chunk = alpha, renormalize, point_mode, chunk
        self.things = list(things)
        for name in self.things:
            if name not in self.class_names:
                raise unknown_name("class in things", name, self.class_names)
        self.thing_numbers = {self.class_names.index(name) for name in self.things}
        self.object_mask_threshold, self.overlap_threshold, self.top_k = object_mask_threshold, overlap_threshold, top_k
        self._generator = generator

    @property
    def encoder(self) -> Encoder:
        """The ViT."""
        return self.classifier.encoder

    @property
    def generator(self) -> MaskProposalGenerator:
        """What draws masks."""
        if isinstance(self._generator, str):
            self._generator = open_proposals(self._generator, next(self.classifier.parameters()).device)
        return self._generator

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K, H, W), logarithms of the classes' scores, of normalised images (B, C, H, W)."""
        with torch.no_grad():
            scores = torch.stack([self.semantic(image) for image in self._unnormalized(images)])
        return torch.log(scores + TINY).to(images.device)

    @torch.no_grad()
    def point_logits(
        self, image: Tensor, points: Tensor, pad: str = "none", generator: torch.Generator | None = None
    ) -> Tensor:
        """Return logits (Q, K) at points (Q, 2) of an image (C, H, W) in [0, 1].

        Args:
            image: Shown to the classifier at `image_size`, smoothed.
            points: (row, column) in [-1, 1].
            pad: Points that the last chunk is short of: `none`, or `random` ones, as published; they change its answers
                slightly.
            generator: Where these are drawn.
        """
        if pad not in ("none", "random"):
            raise unknown_name("padding", pad, ("none", "random"))
        place = next(self.classifier.parameters())
        if not len(points):
            return place.new_zeros(0, len(self.class_names))
        pixels = transforms.resize(image[None].to(place), list(self.image_size), antialias=True)
        view = normalize(pixels.clamp(0, 1), self.encoder)
        found = []
        for part in points.to(place).split(self.chunk or len(points)):
            asked = part
            if pad == "random" and self.chunk and len(part) < self.chunk:
                more = torch.rand(self.chunk - len(part), 2, generator=generator).to(part) * 2 - 1
                asked = torch.cat([part, more])
            found.append(self.classifier(view, asked[None])[0, : len(part)])
        return torch.cat(found)

    def scored(self, image: Tensor, proposals: MaskProposals | None = None) -> tuple[MaskProposals, Tensor]:
        """Return the masks of an image (C, H, W) in [0, 1], and their fused class logits (Q, K + 1)."""
        proposals = self.generator(image) if proposals is None else proposals
        return proposals, self.fused(proposals, self.point_logits(image, proposals.points(self.point_mode)).cpu())

    def fused(self, proposals: MaskProposals, point_logits: Tensor) -> Tensor:
        """Return class logits (Q, K + 1) of masks whose points have logits (Q, K)."""
        named = proposals.class_logits
        if named is None or self.alpha == 1:
            void = None if named is None else named.float().softmax(-1)[:, -1]
            if named is None and proposals.scores is not None:
                void = 1 - proposals.scores
            return fuse_mask_scores(None, point_logits, renormalize=self.renormalize, void=void)
        names = self.generator.class_names
        if names is not None:
            named = in_order(named, names, self.class_names, "the generator of masks")
        elif named.shape[-1] != len(self.class_names) + 1:
            raise UsageError(
                f"the generator of masks has {named.shape[-1] - 1} classes and the classifier {len(self.class_names)}; "
                f"give class_names, or set alpha to 1"
            )
        return fuse_mask_scores(named, point_logits, ALPHA if self.alpha is None else self.alpha, self.renormalize)

    def semantic(self, image: Tensor, proposals: MaskProposals | None = None) -> Tensor:
        """Return the score of each class, (K, H, W), of an image (C, H, W) in [0, 1]; 0 where there is no mask."""
        found, logits = self.scored(image, proposals)
        return semantic_scores(found, logits)

    @torch.no_grad()
    def segment(self, image: Tensor, size: tuple[int, ...] | None = None, batch_size: int = 8) -> Tensor:
        """Return the class of every pixel, (H, W) uint8, 255 where no mask is, of an image (C, h, w) in [0, 1]."""
        return self.labels(*self.scored(image), size=size)

    def labels(self, proposals: MaskProposals, logits: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """Return the class of every pixel, (H, W) uint8, 255 where no mask is, of masks and their class logits."""
        if proposals.partition is not None:
            best = F.pad(logits[:, :-1].argmax(1).to(torch.uint8), (0, 1), value=UNKNOWN)
            predicted = best[proposals.partition.cpu()]  # -1 is the last
        else:
            scores = semantic_scores(proposals, logits)
            predicted = scores.argmax(0).to(torch.uint8)
            predicted[scores.amax(0) <= 0] = UNKNOWN
        if size is None or tuple(predicted.shape) == tuple(size):
            return predicted
        return F.interpolate(predicted[None, None], size=tuple(size), mode="nearest-exact")[0, 0]

    @torch.no_grad()
    def predict(self, image: Tensor, task: Task = "semantic") -> Tensor | Panoptic | Instances:
        """Return what an image (C, H, W) in [0, 1] shows.

        Args:
            image: The image.
            task: `semantic`: as `segment`; `panoptic`, `instance`: see there.

        Raises:
            UsageError: Unknown task, or one that tells objects apart without `things`.
        """
        if task not in ("semantic", "panoptic", "instance"):
            raise unknown_name("task", task, ("semantic", "panoptic", "instance"))
        if task == "semantic":
            return self.segment(image)
        if not self.things:
            raise UsageError(
                f"{task} segmentation tells objects apart, and no class is said to be one; name them by things"
            )
        found, logits = self.scored(image)
        return self.panoptic(found, logits) if task == "panoptic" else self.instances(found, logits)

    def panoptic(self, proposals: MaskProposals, logits: Tensor) -> Panoptic:
        """Return a segment for each pixel, of masks and their class logits."""
        if not len(proposals):
            return Panoptic(torch.zeros(proposals.size, dtype=torch.int32), [])
        masks = proposals.mask_logits().cpu()
        return panoptic_inference(logits, masks, self.thing_numbers, self.object_mask_threshold, self.overlap_threshold)

    def instances(self, proposals: MaskProposals, logits: Tensor) -> Instances:
        """Return objects, of masks and their class logits."""
        if not len(proposals):
            empty = torch.zeros(0, *proposals.size, dtype=torch.bool)
            return Instances(empty, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
        return instance_inference(logits, proposals.mask_logits().cpu(), self.top_k, self.thing_numbers)

    def _unnormalized(self, images: Tensor) -> Tensor:
        channels = in_chans(self.encoder)
        zero, one = (torch.full((1, channels, 1, 1), value) for value in (0.0, 1.0))
        low, high = (normalize(value, self.encoder).to(images) for value in (zero, one))
        return ((images - low) / (high - low)).clamp(0, 1)


def semantic_scores(proposals: MaskProposals, logits: Tensor) -> Tensor:
    """Return the score of each class, (K, H, W), of masks and their class logits (Q, K + 1)."""
    if proposals.partition is not None:
        shares = F.pad(logits.softmax(-1)[:, :-1], (0, 0, 0, 1))
        return shares[proposals.partition.cpu()].permute(2, 0, 1)
    if not len(proposals):
        return torch.zeros(logits.shape[-1] - 1, *proposals.size)
    return semantic_inference(logits, resize_masks(proposals.mask_logits(), proposals.size))


def resize_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Return mask logits (Q, H, W) at the size of the image."""
    return masks if tuple(masks.shape[-2:]) == size else resize(masks[None], size)[0]


def oracle_logits(proposals: MaskProposals, truth: Tensor, num_classes: int) -> Tensor:
    """Return class logits (Q, K + 1) that name, of each mask, the class of the truth it overlaps most: an upper bound.

    Args:
        proposals: Masks.
        truth: (H, W) classes, 255 where unknown; a mask on nothing known is no object.
        num_classes: K.
    """
    count = len(proposals)
    known = truth.long().flatten()
    counts = torch.zeros(count, num_classes)
    if proposals.partition is not None:
        numbers = proposals.partition.cpu().flatten()
        both = (known < num_classes) & (numbers >= 0)
        flat = (numbers[both] * num_classes + known[both]).bincount(minlength=count * num_classes)
        counts = flat.reshape(count, num_classes).float()
    else:
        for number, mask in enumerate(proposals.mask_logits().cpu() > 0):
            seen = known[mask.flatten()]
            counts[number] = seen[seen < num_classes].bincount(minlength=num_classes).float()
    logits = torch.full((count, num_classes + 1), -20.0)
    best = torch.where(counts.sum(1) > 0, counts.argmax(1), num_classes)
    logits[torch.arange(count), best] = 20.0
    return logits


def arguments(model: PointSegmenter) -> dict[str, Any]:
    """Return what a segmenter was made with besides its classifier and generator, as plain values."""
    names = ("alpha", "renormalize", "point_mode", "chunk", "things")
    more = ("object_mask_threshold", "overlap_threshold", "top_k")
    return {name: getattr(model, name) for name in (*names, *more)}
