"""BEiT: the network says which token a frozen tokenizer gave each hidden patch.

"BEiT: BERT Pre-Training of Image Transformers" (Bao et al. 2021, arXiv 2106.08254); BEiT v2 (Peng et al. 2022, arXiv
2208.06366) says it a second time, from an early block's patches and the last block's class token, by the same norm and
head, so that the class token has to know about the whole image. CCViT is a fork of its code, so the network is shared.

>>> from patchloom.encoders import create_encoder
>>> model = TokenMIM(create_encoder("ccvit_tiny_patch4_32"), vocab_size=512, head_layers=2)
>>> masked = torch.rand(2, 64) < 0.4
>>> output = model(torch.randn(2, 3, 32, 32), masked)
>>> output.token_logits.shape == output.condenser_logits.shape == (masked.sum(), 512)
True
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from patchloom.encoders import Encoder
from patchloom.encoders.precision import at_least_float32
from patchloom.systems.ccvit.model import CentroidMIM, MIMOutput


class TokenMIM(CentroidMIM):
    """An encoder with a mask token, a token head and, in BEiT v2, the blocks of the second branch.

    Args:
        backbone: Encoder without head that has a class token.
        vocab_size: Size K of the tokenizer's vocabulary.
        head_layers: Blocks of the second branch; BEiT: 0, BEiT v2: 2.
        early_layers: Block (1-based) whose patch tokens it takes; paper: 9 of 12, 21 of 24. Default: three before the
            last, fewer for encoders of less than six blocks.
        init_condenser: `default` leaves its linear layers at PyTorch's initialisation, as published; `trunc` treats
            them as the encoder's.
        drop_path: Stochastic depth rate of the schedule its blocks take part in.

    Raises:
        UsageError: `early_layers` outside 1 … depth, or an encoder without class token.
    """

    def __init__(
        self,
        backbone: Encoder,
        vocab_size: int,
        head_layers: int = 0,
        early_layers: int | None = None,
        init_condenser: Literal["default", "trunc"] = "default",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(
            backbone,
            vocab_size,
            early_layers=early_layers,
            head_layers=head_layers,
            shared_head=True,
            init_condenser=init_condenser,
            drop_path=drop_path,
        )


def token_loss(output: MIMOutput, ids: Tensor) -> dict[str, Tensor]:
    """Return `loss` and its parts: the cross-entropy of each branch (arXiv 2208.06366, equation 6).

    Args:
        output: Predictions for M patches.
        ids: (M,) int64, their tokens.
    """
    branches = {"token_loss": output.token_logits, "condenser_token_loss": output.condenser_logits}
    parts = {
        name: F.cross_entropy(at_least_float32(logits), ids) for name, logits in branches.items() if logits is not None
    }
    return {"loss": torch.stack(list(parts.values())).sum(), **parts}
