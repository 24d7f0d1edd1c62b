"""Excision And Recovery: what stands out is cut out and repaired, and where the repair differs there is a defect.

Park et al. 2023, "Excision And Recovery: Visual Defect Obfuscation Based Self-Supervised Anomaly Detection Strategy",
arXiv 2310.04010; Scientific Reports 14:18872 (2024). The network and its losses are those of the first author's public
code of random-mask inpainting; how maps become scores follows Zavrtanik et al. 2021 (RIAD).

>>> model = EAR(None, RecoveryUNet(widths=(4, 8, 16)), mosaic_cell=8).eval()
>>> found = model(torch.rand(2, 3, 64, 64))
>>> found["anomaly_map"].shape, found["pred_score"].shape
(torch.Size([2, 1, 64, 64]), torch.Size([2]))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.encoders import Encoder, has_tokens
from patchloom.errors import UsageError, unknown_name
from patchloom.systems.ear.excision import (
    QUANTILE,
    Hint,
    Scope,
    apply_hint,
    estimate_mosaic_scale,
    excise,
    mosaic,
    row_quantile,
)
from patchloom.systems.ear.losses import (
    MSGMSLoss,
    RecoveryLoss,
    SSIMLoss,
    gms_map,
    msgms_map,
    squared_error,
    ssim_map,
)
from patchloom.systems.ear.saliency import AttentionSaliency
from patchloom.systems.ear.unet import RecoveryUNet

__all__ = [
    "EAR",
    "AttentionSaliency",
    "MSGMSLoss",
    "RecoveryLoss",
    "RecoveryUNet",
    "SSIMLoss",
    "apply_hint",
    "calibrate_threshold",
    "estimate_mosaic_scale",
    "excise",
    "gms_map",
    "image_scores",
    "mosaic",
    "msgms_map",
    "recovery_map",
    "ssim_map",
]

Score = Literal["msgms_max", "l2", "mean"]
SMOOTHING = 21
GOOD_PERCENTILE = 0.995


class EAR(nn.Module):
    """The whole pipeline, from an image to a map of its defects and a score.

    Args:
        encoder: Where saliency comes from: a module from images (B, C, H, W) in [0, 1] to (B, 1, H, W) in [0, 1], such
            as `AttentionSaliency`; a ViT of timm, whose class token's attention is taken; or None for edges.
        unet: The network that repairs.
        quantile: Quantile of the saliency from which on is excised.
        mosaic_cell: Side of the mosaic's cells in pixels.
        smoothing: Side of the mean filter on the map, odd; 1 for none.
        score: `msgms_max`, the greatest value of the smoothed map; `mean`, its mean; `l2`, the mean squared error.
        hint: What stands in place of what was excised, see `apply_hint`.
        scope: Whether the quantile is that of each image or of the batch.
        excises: Without, nothing is cut out: a plain autoencoder with skips, for comparison.

    Attributes:
        threshold: Score from which on an image counts as defect, a buffer; NaN before `calibrate`.
        pixel_threshold: Value of the map from which on a pixel does, likewise.
        score_min: Least score of the images calibrated on.
        score_max: Greatest.

    Raises:
        UsageError: A value outside its range.
    """

    threshold: Tensor
    pixel_threshold: Tensor
    score_min: Tensor
    score_max: Tensor

    def __init__(
        self,
        encoder: Encoder | nn.Module | None,
        unet: nn.Module,
        quantile: float = QUANTILE,
        mosaic_cell: int = 16,
        smoothing: int = SMOOTHING,
        score: Score = "msgms_max",
        hint: Hint = "mosaic",
        scope: Scope = "image",
        excises: bool = True,
    ) -> None:
        super().__init__()
        if score not in get_args(Score):
            raise unknown_name("score", score, get_args(Score))
        if smoothing < 1 or smoothing % 2 == 0:
            raise UsageError(f"smoothing is {smoothing}; the side of the mean filter is odd")
        if not 0 <= quantile <= 1:
            raise UsageError(f"quantile is {quantile}; it must be in [0, 1]")
        if encoder is None:
            encoder = AttentionSaliency(kind="gradient")
        elif has_tokens(encoder):
            encoder = AttentionSaliency(encoder)
        self.saliency: nn.Module = encoder
        self.unet = unet
        self.quantile, self.mosaic_cell, self.smoothing = quantile, mosaic_cell, smoothing
        self.score, self.hint, self.scope, self.excises = score, hint, scope, excises
        for name in ("threshold", "pixel_threshold", "score_min", "score_max"):
            self.register_buffer(name, torch.tensor(float("nan")))

    def mask(self, images: Tensor) -> Tensor:
        """Return what is excised of images (B, C, H, W), (B, 1, H, W)."""
        if not self.excises:
            return torch.zeros_like(images[:, :1])
        return excise(images, self.saliency(images), self.quantile, self.scope)

    def hinted(self, images: Tensor, mask: Tensor) -> Tensor:
        """Return what the network is given: images with a hint in place of what is excised."""
        return apply_hint(images, mask, self.hint, self.mosaic_cell)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return what was made of images, and what it says.

        Args:
            images: (B, C, H, W) in [0, 1], sides of at least 11 pixels.

        Returns:
            `recovered`, `input` (B, C, H, W) in [0, 1], `mask` (B, 1, H, W), `anomaly_map` (B, 1, H, W) and
            `pred_score` (B,).
        """
        mask = self.mask(images)
        given = self.hinted(images, mask)
        recovered = self.unet(given)
        recovery = recovery_map(images, recovered, self.smoothing)
        score = image_scores(images, recovered, recovery, self.score)
        return {"recovered": recovered, "mask": mask, "input": given, "anomaly_map": recovery, "pred_score": score}

    def calibrate(
        self, scores: Sequence[float] | Tensor, peaks: Sequence[float] | Tensor, labels: Sequence[int] | None = None
    ) -> None:
        """Set thresholds and the range of scores, see `calibrate_threshold`.

        Args:
            scores: `pred_score` of images the network did not learn from.
            peaks: Greatest value of each of their maps.
            labels: 1 for each that has a defect, 0 for good; default: all are good.
        """
        known = torch.as_tensor(scores, dtype=torch.float64)
        self.threshold.fill_(calibrate_threshold(known, labels))
        self.pixel_threshold.fill_(calibrate_threshold(torch.as_tensor(peaks, dtype=torch.float64), labels))
        self.score_min.fill_(float(known.min()))
        self.score_max.fill_(float(known.max()))

    def normalized(self, score: Tensor) -> Tensor:
        """Return scores in [0, 1], 0.5 at the threshold: how far beyond it, in parts of the range calibrated on."""
        spread = (torch.maximum(self.score_max, self.threshold) - self.score_min).clamp(min=1e-12)
        return ((score - self.threshold) / spread + 0.5).clamp(0, 1)

    def arguments(self) -> dict[str, Any]:
        """Return what rebuilds the pipeline around its two networks."""
        names = ("quantile", "mosaic_cell", "smoothing", "score", "hint", "scope", "excises")
        return {name: getattr(self, name) for name in names}


def recovery_map(images: Tensor, recovered: Tensor, smoothing: int = SMOOTHING) -> Tensor:
    """Return where a repaired image differs: 1 - MSGMS, the mean over channels, smoothed by a mean filter.

    Args:
        images: (B, C, H, W) in [0, 1].
        recovered: Likewise.
        smoothing: Side of the filter, odd; the border is reflected.

    Returns:
        (B, 1, H, W).

    Raises:
        UsageError: The images are too small for the filter.
    """
    recovery = (1 - msgms_map(images, recovered)).mean(1, keepdim=True)
    if smoothing == 1:
        return recovery
    around = smoothing // 2
    if min(recovery.shape[-2:]) <= around:
        raise UsageError(
            f"images of {recovery.shape[-2]}x{recovery.shape[-1]} pixels are too small for smoothing={smoothing}; a "
            f"side is at least {around + 1}"
        )
    return F.avg_pool2d(F.pad(recovery, (around,) * 4, mode="reflect"), smoothing, stride=1)


def image_scores(images: Tensor, recovered: Tensor, recovery: Tensor, score: Score = "msgms_max") -> Tensor:
    """Return the score of every image, (B,), higher where a defect is more likely; `recovery` is its `recovery_map`."""
    if score == "l2":
        return squared_error(images, recovered)
    return recovery.amax((1, 2, 3)) if score == "msgms_max" else recovery.mean((1, 2, 3))


def calibrate_threshold(scores: Tensor, labels: Sequence[int] | None = None) -> float:
    """Return the score from which on an image counts as defect.

    With good images alone their 99.5th percentile; where there are defects too, the score of the best F1.

    Args:
        scores: (n,).
        labels: 1 for a defect, 0 for good; default: all are good.

    Raises:
        UsageError: No score, or none of a good image.
    """
    if not len(scores):
        raise UsageError("a threshold is calibrated on good images, and there is none")
    truth = torch.zeros(len(scores), dtype=torch.bool) if labels is None else torch.as_tensor(labels).bool()
    if truth.all():
        raise UsageError("a threshold is calibrated on good images, and all there are have a defect")
    scores = scores.double().cpu()
    if not truth.any():
        return float(row_quantile(scores[None], GOOD_PERCENTILE))
    from sklearn.metrics import precision_recall_curve

    precision, recall, limits = precision_recall_curve(truth.numpy(), scores.numpy())
    f1 = 2 * precision * recall / (precision + recall).clip(min=1e-12)
    return float(limits[f1[:-1].argmax()])
