"""Masked reconstruction for convolutional networks: the matched baseline of the thorax paper (arXiv 2210.12843).

Hidden patches are set to zero, as a convolution cannot leave them out, and an image-to-image network paints the whole
image. "Delving into Masked Autoencoders for Multi-Label Thorax Disease Classification", arXiv 2210.12843.

>>> import torch
>>> model = MaskedAutoencoderCNN(torch.nn.Conv2d(3, 3, 3, padding=1), patch_size=16)
>>> output = model(torch.randn(2, 3, 64, 64))
>>> output.pred.shape, int(output.mask.sum(1)[0])
(torch.Size([2, 3, 64, 64]), 12)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from patchloom.encoders.masked_autoencoder import visible_count
from patchloom.encoders.patches import patch_grid
from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError


class CNNOutput(NamedTuple):
    """What the network makes of a batch."""

    loss: Tensor
    """(): mean squared error, of the whole image unless `masked_only`."""
    pred: Tensor
    """(B, C, H, W)."""
    mask: Tensor
    """(B, N) float: 1 where hidden, patches row by row."""


class MaskedAutoencoderCNN(nn.Module):
    """An image-to-image network that sees a quarter of the image and paints it all.

    Args:
        network: Takes and returns (B, C, H, W), such as a U-Net whose encoder is the CNN to pre-train.
        patch_size: Side of the hidden squares, pixels; paper: 16.
        mask_ratio: Share of the patches hidden, in (0, 1); paper: 0.75.
        masked_only: Compare hidden patches only; published: the whole image.
    """

    def __init__(
        self, network: nn.Module, patch_size: int = 16, mask_ratio: float = 0.75, masked_only: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        self.patch_size = patch_size
        self.mask_ratio = mask_ratio
        self.masked_only = masked_only

    def forward(self, images: Tensor, mask_ratio: float | None = None, noise: Tensor | None = None) -> CNNOutput:
        """Hide patches and paint the image.

        Args:
            images: (B, C, H, W) normalised.
            mask_ratio: Share of the patches hidden; default: the model's.
            noise: (B, N); the int(N (1 - mask_ratio)) patches with the smallest numbers stay. Default: drawn.

        Raises:
            UsageError: Images that patches do not fill, a ratio that hides nothing or all, noise or a prediction of
                another shape.
        """
        h, w = patch_grid((images.shape[-2], images.shape[-1]), self.patch_size)
        shape = (len(images), h * w)
        noise = torch.rand(shape, device=images.device) if noise is None else noise
        if tuple(noise.shape) != shape:
            raise UsageError(f"the noise has shape {tuple(noise.shape)}; one number per patch is {shape}")
        visible = visible_count(h * w, self.mask_ratio if mask_ratio is None else mask_ratio)
        mask = (noise.argsort(dim=1, stable=True).argsort(dim=1) >= visible).float()
        size = self.patch_size
        hidden = mask.view(-1, 1, h, w).repeat_interleave(size, 2).repeat_interleave(size, 3)
        pred = self.network(images * (1 - hidden))
        if pred.shape != images.shape:
            raise UsageError(f"the network returns {tuple(pred.shape)} for images of {tuple(images.shape)}")
        errors = (at_least_float32(pred) - at_least_float32(images)).square()
        if self.masked_only:
            loss = (errors * hidden).sum() / (hidden.sum() * images.shape[1])
        else:
            loss = errors.mean()
        return CNNOutput(loss, pred, mask)
