"""Names for given masks by words: the out-of-vocabulary head of FC-CLIP with ViTamin (arXiv 2308.02487, 2404.02132).

Dense features are averaged inside each mask, go through the image tower's last layers, and are compared with sentences
of each class. Where a decoder trained on some classes has an opinion of its own, both are multiplied, by one exponent
for the classes it was trained on and another for the rest.

>>> import timm, torch, patchloom
>>> from patchloom.systems.clip.model import CLIP, TextTower
>>> trunk = timm.create_model("vitamin_tiny_64", num_classes=0)
>>> model = CLIP(trunk, TextTower(context_length=16, width=32, heads=2, layers=1, output_dim=24)).eval()
>>> classifier = OpenVocabularyMaskClassifier(model, ["sky", "road,street"])
>>> dense = SlidingWindowFeatures(trunk.eval())(torch.zeros(1, 3, 64, 96))["dense"]
>>> classifier(dense, torch.ones(1, 5, 64, 96)).shape
torch.Size([1, 5, 2])
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.errors import UsageError
from patchloom.systems.clip.model import CLIP
from patchloom.systems.clip.zero_shot import class_features
from patchloom.systems.vitamin.model import SlidingWindowFeatures

__all__ = ["VILD_TEMPLATES", "OpenVocabularyMaskClassifier", "SlidingWindowFeatures", "fused", "mask_pooled"]

VILD_TEMPLATES = (
    "a photo of a {}.",
    "This is a photo of a {}",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    "a photo of a small {}.",
    "a photo of a medium {}.",
    "a photo of a large {}.",
    "This is a photo of a small {}.",
    "This is a photo of a medium {}.",
    "This is a photo of a large {}.",
    "There is a small {} in the scene.",
    "There is a medium {} in the scene.",
    "There is a large {} in the scene.",
)
"""Sentences of ViLD (Gu et al. 2022, arXiv 2104.13921), as FC-CLIP uses them."""


def mask_pooled(dense: Tensor, masks: Tensor) -> Tensor:
    """Return the mean feature inside each mask.

    Args:
        dense: (B, D, h, w).
        masks: (B, Q, H, W), what is above 0 is inside (logits, or 0 and 1); resampled to the map bilinearly.

    Returns:
        (B, Q, D); zeros where nothing is inside.
    """
    masks = masks.to(dense.dtype)
    if masks.shape[-2:] != dense.shape[-2:]:
        masks = F.interpolate(masks, size=dense.shape[-2:], mode="bilinear", align_corners=False)
    inside = (masks > 0).to(dense.dtype)
    weights = inside / (inside.sum((-1, -2), keepdim=True) + 1e-8)
    return torch.einsum("bdhw,bqhw->bqd", dense, weights)


def fused(seen_logits: Tensor, words_logits: Tensor, seen: Tensor, alpha: float = 0.45, beta: float = 0.7) -> Tensor:
    """Return log-probabilities of classes and of no object, of a decoder's opinion and one by words.

    With p and q the softmax of both over classes, g = p^(1-a) q^a, a = alpha for classes the decoder was trained on and
    beta for others; r = g / sum g; classes get r (1 - v), v being the decoder's probability of no object.

    Args:
        seen_logits: (…, K + 1) of the decoder, the last of no object.
        words_logits: (…, K).
        seen: (K,) bool, whether the decoder was trained on a class.
        alpha: Exponent of the opinion by words for classes that are seen, in [0, 1].
        beta: The same for others.

    Returns:
        (…, K + 1).
    """
    nothing = seen_logits.softmax(-1)[..., -1:]
    share = torch.where(seen, alpha, beta).to(words_logits)
    mixed = (1 - share) * seen_logits[..., :-1].log_softmax(-1) + share * words_logits.log_softmax(-1)
    return torch.cat([mixed.softmax(-1) * (1 - nothing), nothing], -1).add(1e-8).log()


class OpenVocabularyMaskClassifier(nn.Module):
    """Names masks by classes that are given as words.

    Args:
        model: Towers whose trunk has the dense features.
        class_names: Names; synonyms of a class stand behind one another with commas between, and the best one counts.
        templates: Sentences with {} where a name goes.
        alpha: See `fused`.
        beta: See `fused`.
        seen: Names (as in `class_names`) of the classes that the decoder was trained on, where there is one.

    Raises:
        UsageError: No class, a template without {}, a seen class that is none, or an exponent outside [0, 1].
    """

    text: Tensor
    seen: Tensor
    owners: Tensor

    def __init__(
        self,
        model: CLIP,
        class_names: Sequence[str],
        templates: Sequence[str] = VILD_TEMPLATES,
        alpha: float = 0.45,
        beta: float = 0.7,
        seen: Collection[str] = (),
    ) -> None:
        super().__init__()
        if not class_names:
            raise UsageError("there is no class to name masks by; give class_names")
        if unknown := [name for name in seen if name not in class_names]:
            raise UsageError(f"seen names {unknown[0]!r}, which is none of class_names")
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not 0 <= value <= 1:
                raise UsageError(f"{name} is {value}; it must be from 0 to 1")
        synonyms = [[word.strip() for word in name.split(",") if word.strip()] for name in class_names]
        if empty := [name for name, words in zip(class_names, synonyms, strict=True) if not words]:
            raise UsageError(f"{empty[0]!r} is no name of a class")
        self.model, self.class_names, self.alpha, self.beta = model, list(class_names), alpha, beta
        self.register_buffer("text", class_features(model, [word for words in synonyms for word in words], templates))
        owners = [number for number, words in enumerate(synonyms) for _ in words]
        self.register_buffer("owners", torch.tensor(owners, device=self.text.device))
        self.register_buffer("seen", torch.tensor([name in seen for name in class_names], device=self.text.device))

    def mask_features(self, dense: Tensor, masks: Tensor) -> Tensor:
        """Return the normalised feature of each mask in the common space, (B, Q, E); see `mask_pooled`."""
        trunk: Any = self.model.visual.trunk
        pooled = mask_pooled(dense, masks)
        for name in ("fc_norm", "head_drop", "head"):
            pooled = getattr(trunk, name, nn.Identity())(pooled)
        return F.normalize(self.model.visual.head(pooled).float(), dim=-1)

    def forward(self, dense: Tensor, masks: Tensor, in_vocab_logits: Tensor | None = None) -> Tensor:
        """Return logits of the classes.

        Args:
            dense: (B, D, h, w), such as `dense` of `SlidingWindowFeatures`.
            masks: (B, Q, H, W), of the pixels that the map is of; what is above 0 is inside.
            in_vocab_logits: (B, Q, K + 1) of a decoder, the last of no object; None: words alone decide.

        Returns:
            (B, Q, K); with `in_vocab_logits` log-probabilities (B, Q, K + 1).

        Raises:
            UsageError: Batches or numbers of classes that do not belong together.
        """
        if dense.ndim != 4 or masks.ndim != 4 or len(dense) != len(masks):
            raise UsageError(
                f"dense is (B, D, h, w) and masks (B, Q, H, W); these are {tuple(dense.shape)} and {tuple(masks.shape)}"
            )
        scale = self.model.logit_scale.exp().clamp(max=100.0)
        words = scale * self.mask_features(dense, masks) @ self.text.T
        best = words.new_full((*words.shape[:-1], len(self.class_names)), -torch.inf)
        logits = best.scatter_reduce(-1, self.owners.expand_as(words), words, "amax")
        if in_vocab_logits is None:
            return logits
        if in_vocab_logits.shape != (*logits.shape[:-1], logits.shape[-1] + 1):
            raise UsageError(
                f"in_vocab_logits is {tuple(in_vocab_logits.shape)}; {logits.shape[-1]} classes and no object need "
                f"{(*logits.shape[:-1], logits.shape[-1] + 1)}"
            )
        return fused(in_vocab_logits, logits, self.seen, self.alpha, self.beta)

    @torch.no_grad()
    def semantic(self, dense: Tensor, masks: Tensor) -> Tensor:
        """Return the class of every pixel, (B, H, W) int64: that of its mask; where masks overlap, of the surest one.

        Pixels of no mask are 255.
        """
        probabilities, classes = self(dense, masks).softmax(-1).max(-1)  # (B, Q)
        inside = masks > 0
        sure = torch.where(inside, probabilities[..., None, None], -1.0).argmax(1)
        named = classes.gather(1, sure.flatten(1)).view_as(sure)
        return torch.where(inside.any(1), named, 255)
