"""What happens to an image in the data worker: paired crops, evaluation crop, fine-tuning recipe.

Every transform is a picklable callable `(image (C, H, W), generator) -> dict of tensors`; images are uint8, or float32
in [0, 1] where they are stored deeper, and stay of their type. Draws come from the generator it is given and from
nothing else, so the same generator state gives the same views in any process.

>>> import torch
>>> image = torch.randint(0, 256, (3, 80, 120), dtype=torch.uint8)
>>> views = PairedViews(64)(image, torch.Generator().manual_seed(0))
>>> views["image"].shape
torch.Size([3, 64, 64])
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.data.transforms import ResizeKeepRatio
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, RandomCrop, Resize
from torchvision.transforms.v2 import functional as F

from patchloom.base.choices import View
from patchloom.base.ranges import Factors, Probability, Share, Shares, checked
from patchloom.base.sizes import Size, checked_size, pair
from patchloom.data.deep_recipe import finetune_views
from patchloom.data.pixels import INTERPOLATIONS, jitter_colors, random_box, resize, shaped, stretched, to_pil
from patchloom.errors import UsageError, unknown_name

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PairedViews:
    """One random flip and one random-resized crop, resized to one or two views (CCViT, spec 2.5).

    The flip comes first and the crop second, so the box is one of the flipped image. The same box gives both
    views. There is no second view where it would equal the first.

    Args:
        size: Side of the view "image", or its (height, width), pixels.
        second_size: The same of the view "target"; None: as `size`.
        scale: Share of the area that a crop covers, lowest and highest, in (0, 1].
        ratio: Width over height of a crop, lowest and highest, over that of the view: proportions change as much in
            oblong views as in square ones.
        interpolation: "bicubic", "bilinear" or "lanczos", always with antialiasing.
        second_interpolation: The same for the view "target".
        flip: Probability of the horizontal flip.
        color_jitter: Strength of brightness, contrast and saturation changes (0.4 in BEiT, 0 in CCViT); they
            are made on the whole image, so both views see the same colours.

    Raises:
        UsageError: A value lies outside its range, or the interpolation is unknown.
    """

    @checked
    def __init__(
        self,
        size: Size,
        second_size: Size | None = None,
        scale: Shares = (0.2, 1.0),
        ratio: Factors = (3 / 4, 4 / 3),
        interpolation: str = "bicubic",
        second_interpolation: str = "bicubic",
        flip: Probability = 0.5,
        color_jitter: Probability = 0.0,
    ) -> None:
        self.size = checked_size("size", size)
        self.second_size = self.size if second_size is None else checked_size("second_size", second_size)
        self.scale, self.ratio = scale, ratio
        self.interpolation = _known(interpolation)
        self.second_interpolation = _known(second_interpolation)
        self.flip = flip
        self.color_jitter = color_jitter

    @property
    def paired(self) -> bool:
        """Whether the second view differs from the first, and so is made at all."""
        return (self.size, self.interpolation) != (self.second_size, self.second_interpolation)

    def __call__(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return {"image": (C, *size)[, "target": (C, *second_size)]}, of the type of the image."""
        if self.color_jitter:
            image = jitter_colors(image, self.color_jitter, generator)
        height, width = image.shape[-2:]
        flipped = float(torch.rand((), generator=generator)) < self.flip
        top, left, h, w = random_box(height, width, self.scale, shaped(self.ratio, self.size), generator)
        if flipped:
            # The box counts from the flipped image's left edge. Cropping its mirror image and flipping the crop
            # picks the very same pixels, and moves only those of the crop.
            left = width - left - w
        crop = image[..., top : top + h, left : left + w]
        if flipped:
            crop = crop.flip(-1)
        views = {"image": resize(crop, pair(self.size), self.interpolation)}
        if self.paired:
            views["target"] = resize(crop, pair(self.second_size), self.second_interpolation)
        return views

    def __repr__(self) -> str:
        """Name the transform with its settings."""
        return _describe(self)


class NoisyViews:
    """A view of an image and the numbers its mask is drawn by, from the sample's own generator."""

    def __init__(self, views: PairedViews, patches: int) -> None:
        self.views = views
        self.patches = patches

    def __call__(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        sample = self.views(image, generator)
        sample["noise"] = torch.rand(self.patches, generator=generator)
        return sample


class EvalTransform:
    """Resize the shorter side to `size / crop_pct`, then cut out the centre.

    Where the result is oblong, the image is resized as little as covers both sides, in proportion, as timm does. An
    image that already is of that size is returned as it is: nothing is gained by enlarging it first.

    Args:
        size: Side of the result, or its (height, width), pixels.
        crop_pct: Share of the resized shorter side that is kept (224 of 256: 0.875).
        interpolation: "bicubic", "bilinear" or "lanczos", always with antialiasing.

    Raises:
        UsageError: A value lies outside its range, or the interpolation is unknown.
    """

    @checked
    def __init__(self, size: Size, crop_pct: Share = 0.875, interpolation: str = "bicubic") -> None:
        self.size = checked_size("size", size)
        self.crop_pct = crop_pct
        self.interpolation = _known(interpolation)

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return {"image": (C, *size)} of the type of the image; the generator is not used."""
        size = pair(self.size)
        if tuple(image.shape[-2:]) == size:
            return {"image": image}
        high, wide = (math.floor(side / self.crop_pct) for side in size)
        height, width = image.shape[-2:]
        # As torchvision counts: the side that is longer than need be is truncated, not rounded.
        if height * wide <= width * high:
            height, width = high, max(wide, int(high * width / height))
        else:
            height, width = max(high, int(wide * height / width)), wide
        resized = resize(image, (height, width), self.interpolation)
        return {"image": F.center_crop(resized, list(size)).contiguous()}

    def __repr__(self) -> str:
        """Name the transform with its settings."""
        return _describe(self)


class WholeImageTransform:
    """Resize the whole image to one size, then stretch each channel to its full range (radiology benchmark).

    Nothing is cut off, and proportions are not kept: findings lie at the edge as often as in the middle. A channel of
    one value becomes black.

    Args:
        size: Side of the result, or its (height, width), pixels.
        interpolation: "bicubic", "bilinear" or "lanczos", always with antialiasing.

    Raises:
        UsageError: A size below 1, or the interpolation is unknown.
    """

    def __init__(self, size: Size, interpolation: str = "bicubic") -> None:
        self.size = checked_size("size", size)
        self.interpolation = _known(interpolation)

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return {"image": (C, *size)} of the type of the image; the generator is not used."""
        return {"image": stretched(resize(image, pair(self.size), self.interpolation))}

    def __repr__(self) -> str:
        """Name the transform with its settings."""
        return _describe(self)


# What an encoder is shown of an image when it is measured.


def eval_view(view: View, size: Size) -> EvalTransform | WholeImageTransform:
    """Return the transform of that name at a size.

    Raises:
        UsageError: There is no such view.
    """
    if view not in get_args(View):
        raise unknown_name("view", view, get_args(View))
    return EvalTransform(size) if view == "crop" else WholeImageTransform(size)


class FinetuneTransform:
    """timm's training recipe for fine-tuning: RandAugment, flip, random erasing, normalised (spec 3.2).

    timm draws from Python's, NumPy's and torch's global generators; here they are seeded from the sample's own
    generator for the length of the call and put back afterwards.

    Args:
        size: Side of the result, or its (height, width), pixels.
        mean: Mean per channel that is subtracted, in [0, 1].
        std: Standard deviation per channel that is divided by.
        scale: Share of the area that a crop covers, lowest and highest.
        ratio: Width over height of a crop, lowest and highest, over that of the result.
        interpolation: "bicubic", "bilinear" or "lanczos".
        flip: Probability of the horizontal flip.
        auto_augment: timm's RandAugment string; None: none, and colour jitter comes into force.
        color_jitter: Strength of the colour jitter, which timm leaves out when `auto_augment` is set.
        erasing: Probability of random erasing with normal noise.
        padding: Take a crop of the whole image with so many black pixels around it, in place of `scale` and `ratio`, as
            is the custom for images of 32 pixels; None: a crop of random area.

    Attributes:
        normalized: True: the image has left [0, 1] and must not be normalised again.

    Raises:
        UsageError: A value lies outside its range, or the interpolation is unknown.
    """

    normalized = True

    @checked
    def __init__(
        self,
        size: Size,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        scale: Shares = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str = "bicubic",
        flip: float = 0.5,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        color_jitter: float = 0.4,
        erasing: Probability = 0.25,
        padding: int | None = None,
    ) -> None:
        self.size = checked_size("size", size)
        self.padding = padding
        self.mean, self.std = tuple(mean), tuple(std)
        self.scale, self.ratio = scale, ratio
        self.interpolation = _known(interpolation)
        self.flip = flip
        self.auto_augment = auto_augment
        self.color_jitter = color_jitter
        self.erasing = erasing

    @cached_property
    def _recipe(self) -> Callable[[Image.Image], Tensor]:
        recipe = create_transform(
            self.size,
            is_training=True,
            scale=self.scale,
            ratio=shaped(self.ratio, self.size),
            hflip=self.flip,
            color_jitter=self.color_jitter,
            auto_augment=self.auto_augment,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            re_prob=self.erasing,
            re_mode="pixel",
            re_count=1,
        )
        for step in recipe.transforms:
            for operation in getattr(step, "ops", ()):
                if operation.name.startswith("Posterize"):
                    operation.aug_fn = _posterize
        if self.padding is None:
            return recipe
        covering: Callable[[Image.Image], Image.Image] = (
            Resize(self.size, InterpolationMode(self.interpolation))
            if isinstance(self.size, int)
            else ResizeKeepRatio(self.size, interpolation=self.interpolation)
        )
        whole = [covering, CenterCrop(self.size)]
        return Compose([*whole, RandomCrop(self.size, self.padding), *recipe.transforms[1:]])

    def __call__(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return {"image": (C, *size) float32, normalised}; see `deep_recipe` for images that are not 8-bit RGB.

        Raises:
            UsageError: The image is not 8-bit RGB, and the recipe asks for another policy than RandAugment.
        """
        if image.shape[0] != 3 or image.dtype != torch.uint8:
            return {"image": finetune_views(image, self, generator)}
        with seeded_globals(generator):
            return {"image": self._recipe(to_pil(image))}

    def __getstate__(self) -> dict[str, Any]:
        """Leave timm's pipeline behind: the worker builds its own."""
        return {name: value for name, value in vars(self).items() if name != "_recipe"}

    def __repr__(self) -> str:
        """Name the transform with its settings."""
        return _describe(self)


class PairwiseMixup(Mixup):
    """timm's Mixup that also takes a batch of odd length, and draws from a generator on request."""

    def __call__(self, x: Tensor, target: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return mixed images and their soft targets.

        Args:
            x: (B, C, H, W) float images; an even batch is mixed in place, as timm does.
            target: (B,) int64 class indices.
            generator: Where the draws come from; None: NumPy's global state.

        Returns:
            (B, C, H, W) images and (B, classes) float32 targets. In an odd batch the first image meets itself.
        """
        count = len(x)
        if count % 2:
            x, target = torch.cat([x, x[:1]]), torch.cat([target, target[:1]])
        if generator is None:
            mixed, soft = super().__call__(x, target)
        else:
            with seeded_globals(generator):
                mixed, soft = super().__call__(x, target)
        return mixed[:count], soft[:count]


def make_mixup(
    num_classes: int,
    *,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    switch_prob: float = 0.5,
    prob: float = 1.0,
    label_smoothing: float = 0.1,
    mode: str = "batch",
) -> PairwiseMixup:
    """Return timm's mixup and cutmix with the fine-tuning recipe's values (spec 3.2).

    Args:
        num_classes: Width of the soft targets.
        mixup: Alpha of mixup's beta distribution; 0: no mixup.
        cutmix: Alpha of cutmix's beta distribution; 0: no cutmix.
        switch_prob: Probability of cutmix where both are on.
        prob: Probability of mixing at all.
        label_smoothing: Share of the target spread over all classes.
        mode: "batch", "pair" or "elem": one draw for the batch, for a pair, for an image.

    Raises:
        UsageError: Neither alpha is positive, or the mode is unknown.
    """
    if mixup <= 0 and cutmix <= 0:
        raise UsageError("mixup and cutmix are both 0, so there is nothing to mix; leave mixing out instead")
    if mode not in ("batch", "pair", "elem"):
        raise unknown_name("mixup mode", mode, ("batch", "pair", "elem"))
    return PairwiseMixup(
        mixup_alpha=mixup,
        cutmix_alpha=cutmix,
        prob=prob,
        switch_prob=switch_prob,
        mode=mode,
        label_smoothing=label_smoothing,
        num_classes=_positive("num_classes", num_classes),
    )


@contextmanager
def seeded_globals(generator: torch.Generator) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's global generators (CPU) from `generator`, and restore them on leaving."""
    seed = int(torch.randint(2**32, (), generator=generator, device=generator.device))
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep so many bits of each channel; to keep none, as RandAugment may ask, is an error to newer Pillow."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise UsageError(f"{name} is {value}; it must be at least 1")
    return value


def _known(interpolation: str) -> str:
    if interpolation not in INTERPOLATIONS:
        raise unknown_name("interpolation", interpolation, INTERPOLATIONS)
    return interpolation


def _describe(transform: object) -> str:
    settings = ", ".join(f"{name}={value!r}" for name, value in vars(transform).items() if name[0] != "_")
    return f"{type(transform).__name__}({settings})"
