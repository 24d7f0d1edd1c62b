"""BitFit: the biases of an encoder train, everything else stays as it is.

"BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models", ACL 2022,
arXiv 2106.10199.

>>> import timm
>>> from patchloom.encoders.insertion import insert
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
>>> insert(encoder, BitFit(encoder, num_classes=5))
>>> sum(p.numel() for p in encoder.parameters() if p.requires_grad)
26693
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from patchloom.encoders import Encoder
from patchloom.encoders.heads import Pool, needs_pool_norm
from patchloom.encoders.insertion import Insertion, Replacement
from patchloom.encoders.readout import Readout
from patchloom.errors import UsageError


class BitFit(Readout, Insertion):
    """Trainable copies of all biases of an encoder, which stand in for them.

    Args:
        encoder: What it is made for.
        num_classes: Outputs of the classifier; None: none.
        pool: What the classifier reads, see `heads.pool_replacements`.
        train_pool_norm: Train the norm behind mean pooling, where there is one.

    Raises:
        UsageError: The encoder has no biases.
    """

    kind = "bitfit"
    mergeable = True

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int | None = None,
        pool: Pool = "auto",
        train_pool_norm: bool = True,
    ) -> None:
        super().__init__()
        self.arguments = {"num_classes": num_classes, "pool": pool, "train_pool_norm": train_pool_norm}
        self.names = [name for name, _ in encoder.named_parameters() if _is_bias(name)]
        if needs_pool_norm(encoder, pool):  # then that norm gives way to one behind the pooling
            self.names.remove("norm.bias")
        if not self.names:
            raise UsageError("the encoder has no biases, so bitfit has nothing to train; use lora or adaptformer")
        self.biases = nn.ParameterList(
            nn.Parameter(encoder.get_parameter(name).detach().clone()) for name in self.names
        )
        self.make_readout(encoder, num_classes, pool, train_pool_norm)

    def replacements(self, encoder: Encoder) -> Iterable[Replacement]:
        """Return the biases in their places."""
        for name, bias in zip(self.names, self.biases, strict=True):
            owner, _, last = name.rpartition(".")
            yield encoder.get_submodule(owner), last, bias
        yield from super().replacements(encoder)

    @torch.no_grad()
    def merge_into(self, encoder: Encoder) -> None:
        """Write the biases into the encoder."""
        self.check_merges()
        for name, bias in zip(self.names, self.biases, strict=True):
            parameter: Tensor = encoder.get_parameter(name)
            parameter.copy_(bias)


def _is_bias(name: str) -> bool:
    # Not the heads' (they are replaced), nor what an adapter brought along. `q_bias` and `v_bias` are BEiT's and EVA's.
    last = name.rpartition(".")[2]
    return last in ("bias", "q_bias", "v_bias") and not name.startswith(("head.", "adapters."))
