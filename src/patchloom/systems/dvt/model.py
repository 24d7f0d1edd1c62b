"""The first stage of DVT: the features of one image as meaning, artefact of the position, and residual.

Yang et al. 2024, "Denoising Vision Transformers" (arXiv 2401.02957). Of a token at position p of a view, which shows
the point u of the image:

    features ≈ F(u) + G[p] + h(features)

F, a neural field, has what belongs to the image wherever a view shows it; G what belongs to the position in the grid
whatever is shown there; h, a small network, what depends on both.

The denoiser of the second stage is `patchloom.encoders.denoised.Denoiser`.

>>> import torch
>>> model = SingleImageDenoiser(32, (4, 4), max_resolution=16)
>>> losses = model(torch.randn(9, 32), torch.rand(9, 2), torch.randint(16, (9,)))
>>> sorted(losses)
['cosine', 'l2', 'loss']
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.encoders.denoised import Denoiser, denoising_loss
from patchloom.errors import UsageError
from patchloom.systems.dvt.field import FeatureField, StackedLinear

__all__ = ["Denoiser", "FeatureField", "SingleImageDenoiser", "denoising_loss"]

ARTIFACT_START = 0.02
TINY = 1e-8
RESIDUAL_WEIGHT, SPARSITY_WEIGHT = 0.1, 0.02


class SingleImageDenoiser(nn.Module):
    """F, G and h of one image, or of several side by side that know nothing of each other.

    Args:
        feat_dim: Width C of the features.
        grid_size: (H, W), tokens of a view.
        residual: Have h.
        shared_artifacts: Have G.
        images: Images side by side; inputs then have a leading axis of this size, and losses are theirs in sum.
        **field: Arguments of `FeatureField`.

    Attributes:
        in_residual_phase: Whether G is frozen and h learns; see `start_residual`.
    """

    shared_artifacts: nn.Parameter | None

    def __init__(
        self,
        feat_dim: int,
        grid_size: tuple[int, int],
        residual: bool = True,
        shared_artifacts: bool = True,
        images: int = 1,
        **field: Any,
    ) -> None:
        super().__init__()
        self.feat_dim, self.grid_size, self.images = feat_dim, (int(grid_size[0]), int(grid_size[1])), images
        self.in_residual_phase = False
        self.neural_field = FeatureField(feat_dim, images=images, **field)
        self.shared_artifacts = (
            nn.Parameter(ARTIFACT_START * torch.randn(images, feat_dim, *self.grid_size)) if shared_artifacts else None
        )
        narrow = max(1, feat_dim // 4)
        self.residual_predictor = (
            nn.Sequential(
                StackedLinear(feat_dim, narrow, images),
                nn.ReLU(),
                StackedLinear(narrow, narrow, images),
                nn.ReLU(),
                StackedLinear(narrow, feat_dim, images),
            )
            if residual
            else None
        )

    @classmethod
    def stack(cls, models: Sequence[SingleImageDenoiser]) -> SingleImageDenoiser:
        """Return the models of several images as one, with copies of their weights.

        Args:
            models: Made with the same arguments.
        """
        stacked = models[0]._like(len(models))
        states = [model.state_dict() for model in models]
        stacked.load_state_dict({name: torch.cat([state[name] for state in states]) for name in states[0]})
        return stacked

    def member(self, number: int) -> SingleImageDenoiser:
        """Return the model of one of the images, with a copy of its weights."""
        single = self._like(1)
        single.load_state_dict({name: value[number : number + 1] for name, value in self.state_dict().items()})
        if self.in_residual_phase:
            single.start_residual()
        return single

    def _like(self, images: int) -> SingleImageDenoiser:
        """Return a model of the same shape, for another number of images, whose weights are to be loaded."""
        with torch.no_grad():
            made = copy.deepcopy(self)
            for name, parameter in list(made.named_parameters()):
                owner, _, leaf = name.rpartition(".")
                shape = (images, *parameter.shape[1:])
                setattr_parameter(made.get_submodule(owner), leaf, nn.Parameter(parameter.new_empty(shape)))
        made.images = made.neural_field.images = images
        made.in_residual_phase = False
        return made

    def start_residual(self) -> None:
        """Freeze G and let h learn from now on; the optimiser goes on as it is.

        Without a gradient (None, not zero) an optimiser leaves G where it is, moments or not.
        """
        self.in_residual_phase = True
        if self.shared_artifacts is not None:
            self.shared_artifacts.requires_grad_(False)
            self.shared_artifacts.grad = None

    def forward(self, raw: Tensor, coords: Tensor, artifact_coords: Tensor) -> dict[str, Tensor]:
        """Return `loss` and its parts, means over tokens and channels (summed over images side by side).

        Args:
            raw: (N, C), features of tokens; of several images (images, N, C), and so below.
            coords: (N, 2), where in the image the tokens look: x, y in [0, 1].
            artifact_coords: Where in the view they stand: (N, 2), x, y in [-1, 1], -1 and 1 being the first and last
                token; or (N,) int64, their numbers row by row, which says the same.

        Returns:
            `l2`, `cosine` and, in the residual phase, `residual` and `sparsity`, whose weighted sum is `loss`.

        Raises:
            UsageError: Coordinates outside of the image.
        """
        if not bool(((coords >= 0) & (coords <= 1)).all()):
            raise UsageError("coordinates lie outside of the image; x and y are from 0 to 1")
        if raw.ndim == 2:
            raw, coords, artifact_coords = raw[None], coords[None], artifact_coords[None]
        return self.losses(raw, coords, artifact_coords)

    def losses(self, raw: Tensor, coords: Tensor, artifact_coords: Tensor) -> dict[str, Tensor]:
        """Return what `forward` does, for inputs with the axis of images whose coordinates are known to be good."""
        explained = self.neural_field.at(coords)
        if self.shared_artifacts is not None:
            explained = explained + self.artifacts(artifact_coords)
        if not self.in_residual_phase or self.residual_predictor is None:
            l2, cosine = _Reconstruction.apply(explained, raw)
            return {"loss": l2 + cosine, "l2": l2, "cosine": cosine}
        residual = self.residual_predictor(raw)
        l2, cosine, left, sparsity = _Residual.apply(explained, residual, raw)
        loss = l2 + cosine + RESIDUAL_WEIGHT * left + SPARSITY_WEIGHT * sparsity
        return {"loss": loss, "l2": l2, "cosine": cosine, "residual": left, "sparsity": sparsity}

    def artifacts(self, places: Tensor) -> Tensor:
        """Return G (images, N, C) at places (images, N, 2) in [-1, 1], or at tokens (images, N) by number."""
        assert self.shared_artifacts is not None
        if not places.is_floating_point():
            count = self.grid_size[0] * self.grid_size[1]
            table = self.shared_artifacts.flatten(2).transpose(1, 2).reshape(-1, self.feat_dim)
            own = torch.arange(len(places), device=places.device).unsqueeze(1) * count
            return F.embedding(places + own, table)
        read = F.grid_sample(
            self.shared_artifacts, places.unsqueeze(1), mode="bilinear", padding_mode="border", align_corners=True
        )
        return read.squeeze(2).transpose(1, 2)

    @torch.no_grad()
    def decompose(self, raw: Tensor, coords: Tensor) -> dict[str, Tensor]:
        """Return the parts of the features of a view.

        Args:
            raw: (H, W, C); of several images (images, H, W, C).
            coords: (H, W, 2), where in the image the tokens look; likewise.

        Returns:
            `denoised`, F at these coordinates, which is what the second stage learns; `artifact`, G; `residual`, h;
            `subtracted`, what G and h leave of the features. All of the shape of `raw`.

        Raises:
            UsageError: Features of another grid than this model's, or coordinates outside of the image.
        """
        if tuple(raw.shape[-3:]) != (*self.grid_size, self.feat_dim):
            raise UsageError(
                f"features are of {tuple(raw.shape[-3:])}, and this model is of a grid of {self.grid_size} of width "
                f"{self.feat_dim}"
            )
        denoised = self.neural_field(coords)
        zero = torch.zeros_like(raw)
        artifact = zero
        if self.shared_artifacts is not None:
            artifact = self.shared_artifacts.detach().permute(0, 2, 3, 1).reshape(raw.shape)
        residual = zero
        if self.residual_predictor is not None:
            residual = self.residual_predictor(raw.reshape(self.images, -1, self.feat_dim)).reshape(raw.shape)
        return {
            "denoised": denoised,
            "artifact": artifact,
            "residual": residual,
            "subtracted": raw - artifact - residual,
        }


class _Reconstruction(torch.autograd.Function):
    """Mean squared error and one minus the mean cosine of predictions and features, with their gradient in two passes.

    In plain operations the gradients of the two losses take most of the time of a step.
    """

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return both for (images, N, C) each, means over tokens and channels, summed over images."""
        l2, cosine, rows = _compared(predicted, raw)
        ctx.save_for_backward(predicted, raw, *rows)
        return l2, cosine

    @staticmethod
    def backward(ctx: Any, of_l2: Tensor, of_cosine: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the predictions."""
        predicted, raw, product, long, wide = ctx.saved_tensors
        return _slope(predicted, raw, product, long, wide, of_l2, of_cosine), None


class _Residual(torch.autograd.Function):
    """The same where a residual is added that learns from terms of its own, and from these alone.

    What it is to match is what the rest leaves, so that its squared error is that of the whole.
    """

    @staticmethod
    def forward(ctx: Any, explained: Tensor, residual: Tensor, raw: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return squared error, one minus the cosine, squared error of the residual, and its mean size."""
        predicted = explained + residual
        l2, cosine, rows = _compared(predicted, raw)
        ctx.save_for_backward(predicted, raw, residual, *rows)
        return l2, cosine, l2.clone(), residual.abs().mean() * len(raw)

    @staticmethod
    def backward(
        ctx: Any, of_l2: Tensor, of_cosine: Tensor, of_residual: Tensor, of_sparsity: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of what is explained, and of the residual."""
        predicted, raw, residual, product, long, wide = ctx.saved_tensors
        each = len(raw) / raw.numel()
        own = (predicted - raw).mul_(of_residual * (2 * each)).add_(residual.sign().mul_(of_sparsity * each))
        return _slope(predicted, raw, product, long, wide, of_l2, of_cosine), own, None


def _compared(predicted: Tensor, raw: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return squared error, one minus the cosine, and of each token the product and the two lengths."""
    product = (predicted * raw).sum(-1, keepdim=True)
    long = torch.linalg.vector_norm(predicted, dim=-1, keepdim=True)
    wide = torch.linalg.vector_norm(raw, dim=-1, keepdim=True)
    l2 = (long.square() + wide.square() - 2 * product).sum().clamp(min=0) * (len(raw) / raw.numel())
    long, wide = long.clamp(min=TINY), wide.clamp(min=TINY)
    cosine = (1 - (product / (long * wide)).mean()) * len(raw)
    return l2, cosine, (product, long, wide)


def _slope(
    predicted: Tensor, raw: Tensor, product: Tensor, long: Tensor, wide: Tensor, of_l2: Tensor, of_cosine: Tensor
) -> Tensor:
    """Return the gradient of the predictions: so much of themselves, and so much of the features, for each token."""
    of_l2, of_cosine = of_l2 * (2 * len(raw) / raw.numel()), of_cosine * (len(raw) / product.numel())
    inverse = of_cosine / (long * wide)
    own = predicted * (of_l2 + inverse * product / long.square())
    return own.addcmul_(raw, -(of_l2 + inverse))


def setattr_parameter(owner: nn.Module, name: str, value: nn.Parameter) -> None:
    """Put a parameter in the place of another, in a module or a `ParameterList`."""
    if isinstance(owner, nn.ParameterList):
        owner[int(name)] = value
    else:
        setattr(owner, name, value)
