"""A linear classifier on a frozen encoder, trained on augmented images: what every other method has to beat.

Behind a batch norm without parameters, as in AdaptFormer's comparison (arXiv 2205.13535, and its published code). No
gradient enters the encoder. `patchloom evaluate linear` fits the same kind of classifier on features computed once.

>>> import timm, torch
>>> from patchloom.encoders.insertion import insert
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
>>> insert(encoder, LinearHead(encoder, num_classes=5))
>>> encoder(torch.randn(2, 3, 224, 224)).shape
torch.Size([2, 5])
"""

from __future__ import annotations

from patchloom.encoders import Encoder
from patchloom.encoders.heads import Pool
from patchloom.encoders.insertion import Insertion
from patchloom.encoders.readout import Readout


class LinearHead(Readout, Insertion):
    """Nothing but a classifier.

    Args:
        encoder: What it is made for.
        num_classes: Outputs of the classifier.
        pool: What it reads, see `heads.pool_replacements`.
        train_pool_norm: Train the norm behind mean pooling, where there is one.
        own_pool_norm: Train a copy of the encoder's norm behind mean pooling in its place.
    """

    kind = "linear"
    mergeable = True

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int | None = None,
        pool: Pool = "auto",
        train_pool_norm: bool = True,
        own_pool_norm: bool = False,
    ) -> None:
        super().__init__()
        self.arguments = {
            "num_classes": num_classes,
            "pool": pool,
            "train_pool_norm": train_pool_norm,
            "own_pool_norm": own_pool_norm,
        }
        self.make_readout(encoder, num_classes, pool, train_pool_norm, own_pool_norm)

    def merge_into(self, encoder: Encoder) -> None:
        """Leave the weights as they are: the head is all there is.

        Raises:
            UsageError: The norm or the pooling of the head is not the encoder's.
        """
        self.check_merges()
