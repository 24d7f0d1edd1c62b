"""What ViT-VQGAN is trained by besides squared error: logit-Laplace, perception, and a critic with its penalty.

Yu et al. 2022, arXiv 2110.04627; github.com/thuanz123/enhancing-transformers (`losses/vqperceptual.py`). All functions
take and return plain tensors; losses are scalars.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.errors import UsageError
from patchloom.models.published import fill, read_state

Adversarial = Literal["vanilla", "hinge", "least_squares"]
LAPLACE_EPS = 0.1


def logit_laplace_loss(output: Tensor, images: Tensor, eps: float = LAPLACE_EPS) -> Tensor:
    """Return the negative log-likelihood of images under a Laplace distribution of their logits, the mean over values.

    Ramesh et al. 2021, arXiv 2102.12092, appendix A.3. Values y = (1 - 2 eps) x + eps stay off the ends of [0, 1].

    Args:
        output: (B, 2 C, H, W), mean and log scale in the logit's space; or (B, C, H, W) images, whose logits are the
            mean of a scale of 1.
        images: (B, C, H, W) in [0, 1].
        eps: Of the map above.
    """
    y = (1 - 2 * eps) * images + eps
    if output.shape[1] == images.shape[1]:
        mean = ((1 - 2 * eps) * output.clamp(0, 1) + eps).logit()
        log_scale = torch.zeros_like(mean)
    else:
        mean, log_scale = output.chunk(2, 1)
    away = (y.logit() - mean).abs() * (-log_scale).exp()
    return (math.log(2) + log_scale + (y * (1 - y)).log() + away).mean()


def discriminator_loss(real: Tensor, fake: Tensor, kind: Adversarial = "vanilla") -> Tensor:
    """Return how wrong a critic is, from its logits (B,) of real and of made images."""
    if kind == "vanilla":
        return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return ((1 - real).square().mean() + (1 + fake).square().mean()) / 2


def generator_loss(fake: Tensor, kind: Adversarial = "vanilla", legacy: bool = False) -> Tensor:
    """Return how little a critic is deceived, from its logits (B,) of made images.

    `legacy`: of least squares the published code's, which leads made images to 0 instead of to where real ones are.
    """
    if kind == "vanilla":
        return F.softplus(-fake).mean()
    if kind == "hinge":
        return -fake.mean()
    return fake.square().mean() if legacy else (1 - fake).square().mean()


def r1_penalty(critic: Callable[[Tensor], Tensor], real: Tensor) -> Tensor:
    """Return the mean squared length of the critic's gradient at real images (Mescheder et al. 2018, arXiv 1801.04406).

    It can be differentiated once more. The loss has γ / 2 of it, times the steps from one to the next.
    """
    images = real.detach().requires_grad_(True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(critic(images).sum(), images, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """Return the factor that makes the critic's gradient at the last layer as long as that of the other losses.

    Esser et al. 2021, arXiv 2012.09841, equation 7; in [0, 1e4], and not differentiated.
    """
    lengths = [
        torch.autograd.grad(loss, last, retain_graph=True)[0].detach().norm() for loss in (reconstruction, adversarial)
    ]
    return (lengths[0] / (lengths[1] + 1e-4)).clamp(0, 1e4)


class PerceptualLoss(nn.Module):
    """LPIPS on VGG-16 (Zhang et al. 2018, arXiv 1801.03924), by torchmetrics, with weights from a local file.

    Nothing is downloaded. The weights of the linear layers come with torchmetrics; those of VGG are ImageNet's, as
    torchvision has them (`vgg16-397923af.pth`).

    Args:
        weights: File of VGG-16's weights; None: drawn at random, which is of no use but for tests.

    Raises:
        UsageError: There is no such file, or it holds other tensors.
    """

    def __init__(self, weights: str | Path | None) -> None:
        super().__init__()
        from torchmetrics.functional.image.lpips import _LPIPS

        network: Any = _LPIPS(pretrained=True, net="vgg", pnet_rand=True, eval_mode=True)
        if weights is not None:
            state = {name: value for name, value in read_state(weights).items() if name.startswith("features.")}
            own = {f"features.{_number(name)}": name for name in network.net.state_dict()}
            fill(network.net, {own.get(name, name): value for name, value in state.items()})
        self.network = network.requires_grad_(False).eval()

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Return the mean distance of images (B, 3, H, W) in [0, 1]."""
        distance: Tensor = self.network(2 * images - 1, 2 * others - 1)
        return distance.mean()

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Stay in eval mode."""
        return super().train(False)


def vgg_weights(given: str | None) -> Path | None:
    """Return the file of VGG-16's weights: the one given, or what torchvision has fetched before; None: there is none.

    Raises:
        UsageError: The one given does not exist.
    """
    if given is not None:
        if not Path(given).is_file():
            raise UsageError(f"there is no file of VGG-16's weights at {given}; give perceptual_weights another path")
        return Path(given)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"
    return cached if cached.is_file() else None


def _number(name: str) -> str:
    """Return a tensor's number and leaf as torchvision names it: slice1.0.weight → 0.weight."""
    return re.sub(r"^slice\d+\.", "", name)
