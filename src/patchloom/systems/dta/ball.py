"""Images within ε of an image: how one gets there step by step, and stays on the grid of 8 bits.

Everything is in pixel space, [0, 1]; what normalises pixels belongs to the model that is attacked. Projected gradient
descent (Madry et al. 2018, arXiv 1706.06083) with, if asked for, momentum (MI, Dong et al. 2018, arXiv 1710.06081),
input diversity (DI, Xie et al. 2019, arXiv 1803.06978) and smoothed gradients (TI, Dong et al. 2019, arXiv 1904.02884).

>>> x = torch.tensor([[[[0.0, 0.5]]]])
>>> brighter = descend(x, lambda y: -y.sum((1, 2, 3)), eps=0.1, step_size=0.06, steps=3)
>>> [round(value, 3) for value in brighter.flatten().tolist()]
[0.1, 0.6]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from patchloom.errors import UsageError

Loss = Callable[[Tensor], Tensor]
"""Takes images (B, C, H, W) in [0, 1], returns what is to become small, (B,)."""
Watch = Callable[[int, Tensor], None]
"""Is told the number of steps done and the images at that point."""

RESIZE_RATE, DIVERSITY = 0.9, 0.5
"""Smallest size of input diversity and how often it acts, as in torchattacks."""
KERNEL, DEVIATIONS = 15, 3.0
"""Width of the kernel that smooths gradients, and how many standard deviations it reaches to either side."""
# How far float32 may be from a multiple of 1/255 that is meant, in units of 1/255.
GRID_TOLERANCE = 3e-5


@dataclass(frozen=True)
class Steps:
    """How steps are taken besides their size and number; the plain ones are projected gradient descent."""

    momentum: float = 0.0
    """Of gradients divided by their mean absolute value, as published 1.0 (MI); 0 for none."""
    diversity: float = 0.0
    """Chance that an image is shrunk and padded at random before a step (DI), in [0, 1]; as published 0.5."""
    smoothing: bool = False
    """Smooth gradients with a Gaussian of 15 x 15 pixels (TI)."""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        if self.momentum < 0:
            raise UsageError(f"momentum is {self.momentum}; it must be at least 0")
        if not 0 <= self.diversity <= 1:
            raise UsageError(f"diversity is {self.diversity}; it is a chance, in [0, 1]")


PLAIN = Steps()


def check_images(images: Tensor) -> None:
    """Refuse images that are not (B, C, H, W) floats in [0, 1].

    Raises:
        UsageError: Of another shape, not floating point, not finite, or outside [0, 1]: normalised already, mostly.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise UsageError(
            f"images of shape {tuple(images.shape)} and type {images.dtype}; an attack takes floats (B, C, H, W) in "
            f"[0, 1]"
        )
    low, high = (float(end) for end in images.aminmax()) if images.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1):
        raise UsageError(
            f"pixels are between {low:.3g} and {high:.3g}; an attack takes images in [0, 1], before they are "
            f"normalised (the encoder's own mean and std are applied inside)"
        )


def check_ball(eps: float, step_size: float, steps: int) -> None:
    """Refuse an attack that cannot move.

    Raises:
        UsageError: ε outside (0, 1], or steps or their size not above 0.
    """
    if not 0 < eps <= 1:
        raise UsageError(f"eps is {eps:g}; it must be above 0 and at most 1, such as 8/255")
    if not step_size > 0:
        raise UsageError(f"step_size is {step_size:g}; it must be above 0, such as 2/255")
    if steps < 1:
        raise UsageError(f"steps is {steps}; it must be at least 1")


def uniform_noise(images: Tensor, eps: float, generator: torch.Generator | None = None) -> Tensor:
    """Return noise between -ε and ε of the images' shape and type; drawn on the CPU, so alike on every device."""
    drawn = torch.rand(images.shape, generator=generator, dtype=torch.float64)
    return ((2 * drawn - 1) * eps).to(images)


def inside(x: Tensor, images: Tensor, eps: float) -> Tensor:
    """Return what of `x` is nearest within ε of `images` and in [0, 1]."""
    low, high = _ends(images, eps)
    return x.clamp(low, high)


def descend(
    images: Tensor,
    loss: Loss,
    *,
    eps: float,
    step_size: float,
    steps: int,
    init: Tensor | None = None,
    how: Steps = PLAIN,
    generator: torch.Generator | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Return images within ε on which a loss is small: steps against the sign of its gradient.

    Args:
        images: (B, C, H, W) in [0, 1].
        loss: What is to become small. Images do not influence one another.
        eps: ε, in pixel values of [0, 1].
        step_size: α, likewise.
        steps: Number of steps.
        init: Noise to begin with, of the images' shape; default: none.
        how: Momentum, diversity, smoothing.
        generator: Where diversity draws from.
        watch: Told of the start (0 steps done) and of every step.
    """
    low, high = _ends(images, eps)
    x = images if init is None else (images + init.to(images)).clamp(low, high)
    pace = torch.zeros_like(images)
    kernel = gaussian_kernel().to(images) if how.smoothing else None
    for number in range(steps):
        if watch is not None:
            watch(number, x)
        g = gradient(x, loss, how.diversity, generator)
        if kernel is not None:
            g = smoothed(g, kernel)
        if how.momentum:
            size = g.abs().mean((1, 2, 3), keepdim=True)
            g = pace = how.momentum * pace + g / size.clamp_min(torch.finfo(g.dtype).tiny)
        x = (x - step_size * g.sign()).clamp(low, high)
    if watch is not None:
        watch(steps, x)
    return x


def descend_tanh(
    images: Tensor,
    loss: Loss,
    *,
    eps: float,
    lr: float,
    steps: int,
    init: Tensor,
    diversity: float = 0.0,
    generator: torch.Generator | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Return images x' = clip(x + ε tanh(p), 0, 1) on which a loss is small: Adam on p, as OpenTAI's taiadv has it.

    Args:
        images: (B, C, H, W) in [0, 1].
        loss: What is to become small.
        eps: ε.
        lr: Adam's learning rate; as published 1.0.
        steps: Number of steps; the images are those after the last.
        init: p to begin with, of the images' shape.
        diversity: Chance of input diversity.
        generator: Where diversity draws from.
        watch: Told of the start and of every step.
    """
    p = init.to(images).clone()
    adam = torch.optim.Adam([p], lr=lr)

    def shown() -> Tensor:
        return (images + eps * p.tanh()).clamp(0, 1)

    for number in range(steps):
        if watch is not None:
            watch(number, shown().detach())
        with torch.enable_grad():
            p.requires_grad_(True)
            total = loss(sometimes_diverse(shown(), diversity, generator)).sum()
            (p.grad,) = torch.autograd.grad(total, p)
        p.requires_grad_(False)
        adam.step()
    adversarial = inside(shown().detach(), images, eps)
    if watch is not None:
        watch(steps, adversarial)
    return adversarial


def gradient(x: Tensor, loss: Loss, diversity: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """Return the gradient of a loss by images, (B, C, H, W); parameters of what computes it take none."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(loss(sometimes_diverse(x, diversity, generator)).sum(), x)
    return slope.detach()


def quantised(x: Tensor, images: Tensor, eps: float) -> Tensor:
    """Return attacked images as 8 bits hold them: rounded towards the clean image, so that they stay within ε.

    Args:
        x: (B, C, H, W) attacked images.
        images: (B, C, H, W) clean images, in [0, 1].
        eps: ε. Where no multiple of 1/255 is within ε of a clean value, it becomes the multiple nearest to that.

    Returns:
        Multiples of 1/255, of the type of `x`.
    """
    wide, clean = x.double() * 255, images.double() * 255
    least = torch.ceil((clean - 255 * eps).clamp_min(0) - GRID_TOLERANCE)
    most = torch.floor((clean + 255 * eps).clamp_max(255) + GRID_TOLERANCE)
    towards = torch.where(wide >= clean, torch.floor(wide + GRID_TOLERANCE), torch.ceil(wide - GRID_TOLERANCE))
    levels = torch.where(least <= most, towards.maximum(least).minimum(most), clean.round())
    return (levels / 255).to(x.dtype)


def diverse(x: Tensor, generator: torch.Generator | None = None, rate: float = RESIZE_RATE) -> Tensor:
    """Return images shrunk to a random size, at least `rate` of theirs, and padded with 0 at a random place.

    Args:
        x: (B, C, H, W).
        generator: Where size and place are drawn from.
        rate: Smallest share of the size.
    """
    height, width = x.shape[-2:]
    share = rate + (1 - rate) * float(torch.rand((), generator=generator))
    h, w = max(1, int(height * share)), max(1, int(width * share))
    top = int(torch.randint(height - h + 1, (), generator=generator))
    left = int(torch.randint(width - w + 1, (), generator=generator))
    small = F.interpolate(x, size=(h, w), mode="bilinear", align_corners=False)
    return F.pad(small, (left, width - w - left, top, height - h - top))


def sometimes_diverse(x: Tensor, chance: float, generator: torch.Generator | None = None) -> Tensor:
    """Return `diverse` images with some chance in [0, 1], otherwise the images as they are."""
    if not chance or float(torch.rand((), generator=generator)) >= chance:
        return x
    return diverse(x, generator)


def gaussian_kernel(width: int = KERNEL, deviations: float = DEVIATIONS) -> Tensor:
    """Return the kernel that smooths gradients, (width, width) float64, of sum 1."""
    row = torch.exp(-torch.linspace(-deviations, deviations, width, dtype=torch.float64).square() / 2)
    return torch.outer(row, row) / row.sum().square()


def smoothed(g: Tensor, kernel: Tensor) -> Tensor:
    """Return each channel of gradients (B, C, H, W) under a kernel (k, k); beyond the border there is nothing."""
    channels = g.shape[1]
    weight = kernel.expand(channels, 1, -1, -1)
    return F.conv2d(g, weight, padding=kernel.shape[-1] // 2, groups=channels)


@contextmanager
def still(*modules: nn.Module, deterministic: bool = False) -> Iterator[None]:
    """Hold models still while gradients go through them to an image: eval mode, frozen parameters, full precision.

    Everything is put back on leaving.

    Args:
        modules: The models.
        deterministic: Use the attention whose backward pass gives the same numbers every time on a GPU, too.
    """
    modes = [(part, part.training) for module in modules for part in module.modules()]
    learning = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    kinds = {parameter.device.type for module in modules for parameter in module.parameters()} or {"cpu"}
    kernel: Any = sdpa_kernel(SDPBackend.MATH) if deterministic else nullcontext()
    try:
        for module in modules:
            module.eval()
        for parameter in learning:
            parameter.requires_grad_(False)
        with kernel, torch.autocast(next(iter(kinds)), enabled=False):
            yield
    finally:
        for part, training in modes:
            part.training = training
        for parameter in learning:
            parameter.requires_grad_(True)


def _ends(images: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return (images - eps).clamp_min(0), (images + eps).clamp_max(1)
