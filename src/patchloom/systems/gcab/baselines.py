"""What learning without forgetting is compared with where the encoder stands still: a head for each task, class means.

Both have the interface of `model.GCAB`, and the tasks, images and figures of a run are the same.

>>> import timm
>>> model = NearestMean(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0))
>>> model.add_task(2)
>>> model.eval()(torch.zeros(3, 3, 32, 32)).shape
torch.Size([3, 2])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.encoders import Encoder, embed_dim, pooled
from patchloom.errors import UsageError
from patchloom.systems.gcab.model import Tasks


class FrozenFeatures(Tasks):
    """A frozen encoder with something for each task.

    Args:
        encoder: Becomes part of the model and is not changed.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.dim = embed_dim(encoder)

    def train(self, mode: bool = True) -> FrozenFeatures:
        """Set the mode of all parts but the encoder, which stands still."""
        super().train(mode)
        self.encoder.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """Return what the encoder pools of normalised images, (B, D), without gradient."""
        with torch.no_grad():
            found: Tensor = pooled(self.encoder, images)
        return found

    def make_head(self, num_classes: int) -> nn.Module:
        """Return what a task has."""
        raise NotImplementedError

    def add_task(self, num_classes: int) -> None:
        """Begin another task: the heads before it stand still from now on.

        Raises:
            UsageError: A task without classes.
        """
        if num_classes < 1:
            raise UsageError(f"task {len(self.heads) + 1} has no classes; leave it out")
        self.heads.requires_grad_(False)
        like = next(self.encoder.parameters())
        self.heads.append(self.make_head(num_classes).to(like))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes of all tasks) in the order of the tasks, for normalised images (B, C, H, W)."""
        features = self.features(images)
        return torch.cat([head(features) for head in self.heads], dim=1)


class TaskClassifier(nn.Linear):
    """Linear classifier of one task on features of mean 0 and variance 1 over their channels."""

    @property
    def num_classes(self) -> int:
        """Classes of the task."""
        return self.out_features

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, classes) of features (B, D)."""
        return super().forward(F.layer_norm(features, features.shape[-1:]))


class LinearHeads(FrozenFeatures):
    """A linear classifier for each task, learnt as the method learns: against all classes seen so far."""

    def make_head(self, num_classes: int) -> nn.Module:
        """Return a classifier."""
        head = TaskClassifier(self.dim, num_classes)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def training_losses(self, images: Tensor, targets: Tensor, s: float) -> dict[str, Tensor]:
        """Return the binary cross-entropy of a batch with all classes seen so far, see `GCAB.training_losses`."""
        logits = self(images)
        loss = F.binary_cross_entropy_with_logits(logits, F.one_hot(targets, logits.shape[1]).to(logits.dtype))
        return {"bce": loss, "loss": loss}


class ClassMeans(nn.Module):
    """Sums of what was seen of the classes of one task."""

    sums: Tensor
    counts: Tensor

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(num_classes, dim))
        self.register_buffer("counts", torch.zeros(num_classes))
        # An engine that goes down a slope needs one; this is flat.
        self.still = nn.Parameter(torch.zeros(()))

    @property
    def num_classes(self) -> int:
        """Classes of the task."""
        return len(self.counts)

    def forward(self, features: Tensor) -> Tensor:
        """Return cosines (B, classes) between features (B, D) and the means."""
        return F.normalize(features, dim=1) @ F.normalize(self.sums, dim=1).T


class NearestMean(FrozenFeatures):
    """Each class is the mean of its normalised features; nothing is learnt, and nothing forgotten (iCaRL's rule)."""

    def make_head(self, num_classes: int) -> nn.Module:
        """Return the means to be."""
        return ClassMeans(self.dim, num_classes)

    def training_losses(self, images: Tensor, targets: Tensor, s: float) -> dict[str, Tensor]:
        """Take in a batch of the newest task; the loss is 0."""
        head: Any = self.heads[-1]
        within = targets - self.class_slices()[-1].start
        features = F.normalize(self.features(images).float(), dim=1)
        with torch.no_grad():
            head.sums.index_add_(0, within, features.to(head.sums))
            head.counts.index_add_(0, within, torch.ones_like(within).to(head.counts))
        return {"loss": head.still * 0}
