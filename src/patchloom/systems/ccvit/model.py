"""CCViT: masked image modelling against a k-means codebook of raw patches.

Some patches are hidden, some are overwritten by their nearest centroid; the network says which centroid each of
them is (from its last block) and what its pixels are (from an early block joined with the last block's class
token, so that the class token has to know about the whole image). "Centroid-centered Modeling for Efficient
Vision Transformer Pre-training", arXiv 2303.04664.

>>> import torch
>>> from patchloom.encoders import create_encoder
>>> model = CentroidMIM(create_encoder("ccvit_tiny_patch4_32"), vocab_size=512)
>>> masked = torch.rand(2, 64) < 0.4
>>> output = model(torch.randn(2, 3, 32, 32), masked)
>>> output.token_logits.shape == (masked.sum(), 512), output.pixels.shape == (masked.sum(), 48)
(True, True)
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from patchloom.encoders import (
    Encoder,
    depth,
    embed,
    embed_dim,
    final_norm,
    in_chans,
    new_blocks,
    num_prefix_tokens,
    patch_size,
    run_block,
    run_blocks,
)
from patchloom.encoders.patches import normalize_patches, patchify
from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError

Mode = Literal["dual", "token", "pixel", "soft_centroid"]


class MIMOutput(NamedTuple):
    """What the two branches say about M supervised patches, batch-major and then row by row."""

    token_logits: Tensor
    """(M, K): main branch, one score per centroid."""
    pixels: Tensor | None
    """(M, C p²): condenser branch, normalised pixels; None when that branch has a token head or does not exist."""
    condenser_logits: Tensor | None = None
    """(M, K): condenser branch, when it has a token head."""


class CentroidMIM(nn.Module):
    """An encoder with a mask token, a condenser branch and the two heads (arXiv 2303.04664).

    Args:
        backbone: Encoder without head that has a class token.
        vocab_size: Number of centroids K.
        early_layers: Block (1-based) whose patch tokens the condenser takes; paper: 9 of 12, 21 of 24. Default:
            three blocks before the last, fewer for encoders of less than six blocks.
        head_layers: Blocks of the condenser; 0 leaves the branch away (plain BEiT).
        shared_head: Let both branches use the same norm and token head (BEiT v2); no pixels are predicted then.
        condenser_head: What the condenser predicts when its head is its own.
        init_condenser: `default` leaves the condenser's linear layers at PyTorch's initialisation, as published;
            `trunc` treats them as the encoder's.
        drop_path: Stochastic depth rate of the schedule the condenser blocks take part in.

    Raises:
        UsageError: `early_layers` outside 1 … depth, or an encoder without class token.
    """

    def __init__(
        self,
        backbone: Encoder,
        vocab_size: int,
        early_layers: int | None = None,
        head_layers: int = 2,
        shared_head: bool = False,
        condenser_head: Literal["pixels", "tokens"] = "pixels",
        init_condenser: Literal["default", "trunc"] = "default",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        blocks, width = depth(backbone), embed_dim(backbone)
        early_layers = default_early_layers(blocks) if early_layers is None else early_layers
        if not 1 <= early_layers <= blocks:
            raise UsageError(f"early_layers is {early_layers}; it must be 1 to {blocks}, the encoder's depth")
        require_class_token(backbone)
        self.encoder = backbone
        self.vocab_size = vocab_size
        self.early_layers = early_layers
        self.shared_head = shared_head
        self.condenser_head_kind = "tokens" if shared_head else condenser_head
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.token_head = nn.Linear(width, vocab_size)
        self.condenser = new_blocks(backbone, head_layers)
        own_head = head_layers > 0 and not shared_head
        outputs = vocab_size if condenser_head == "tokens" else in_chans(backbone) * patch_size(backbone) ** 2
        self.condenser_norm = nn.LayerNorm(width, eps=1e-6) if own_head else None
        self.condenser_head = nn.Linear(width, outputs) if own_head else None
        rates = torch.linspace(0, drop_path, max(blocks, early_layers + head_layers)).tolist()
        for number, block in enumerate(self.condenser):
            _set_drop_path(block, rates[early_layers + number])
        self._init_own(init_condenser)

    def _init_own(self, init_condenser: str) -> None:
        """Initialise what is not the encoder's, as the published code does."""
        _truncated(self.mask_token)
        for head in (self.token_head, self.condenser_head):
            if head is not None:
                _init_layer(head)
        for number, block in enumerate(self.condenser):
            if init_condenser == "trunc":
                block.apply(_init_layer)
            _rescale(block, self.early_layers + number + 1)

    def forward(
        self, x: Tensor, masked: Tensor | None = None, targets: Tensor | None = None, return_all_tokens: bool = False
    ) -> MIMOutput:
        """Predict tokens and pixels of the supervised patches.

        Args:
            x: (B, C, H, W) corrupted images, normalised.
            masked: (B, N) or (B, h, w) bool, True where the mask token replaces the patch embedding; None hides
                nothing.
            targets: (B, N) or (B, h, w) bool, patches to predict (masked and replaced); default: `masked`, or all.
            return_all_tokens: Predict every patch, whatever `targets` says.

        Returns:
            Predictions for M = number of true entries of `targets` (or B·N), batch-major.
        """
        positions = targets if targets is not None else masked
        rows = None if positions is None or return_all_tokens else positions.flatten(1)
        main, early = self.forward_features(x, masked, rows)
        if rows is not None:
            main, early = main[rows], early[rows] if early is not None else None
        else:
            main, early = main.flatten(0, 1), early.flatten(0, 1) if early is not None else None
        # The norms act on each token alone, so only the rows that are asked for go through them.
        logits = self.token_head(final_norm(self.encoder, main))
        if early is None:
            return MIMOutput(logits, None)
        if self.condenser_norm is None or self.condenser_head is None:
            return MIMOutput(logits, None, self.token_head(final_norm(self.encoder, early)))
        predicted = self.condenser_head(self.condenser_norm(early))
        if self.condenser_head_kind == "tokens":
            return MIMOutput(logits, None, predicted)
        return MIMOutput(logits, predicted)

    def forward_features(
        self, x: Tensor, masked: Tensor | None = None, read: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the patch tokens of the main and of the condenser branch, both before their norms.

        Args:
            x: (B, C, H, W) normalised images.
            masked: (B, N) or (B, h, w) bool, see `forward`.
            read: (B, N) bool, the patches whose output is read; the last block of a branch leaves the others
                unfinished. Default: all.

        Returns:
            Two tensors (B, N, D); the second is None without condenser.
        """
        hidden = masked.flatten(1) if masked is not None else None
        embedded = embed(self.encoder, x, masked=hidden, mask_token=self.mask_token if hidden is not None else None)
        prefix = num_prefix_tokens(self.encoder)
        # The condenser reads the prefix of the last block, and all patches of the early one.
        tapped_last = self.early_layers == depth(self.encoder)
        rows = F.pad(read, (prefix, 0), value=True) if read is not None else None
        last, taps = run_blocks(self.encoder, embedded, taps=(self.early_layers,), rows=None if tapped_last else rows)
        if len(self.condenser) == 0:
            return last[:, prefix:], None
        joined = torch.cat([last[:, :prefix], taps[self.early_layers][:, prefix:]], dim=1)
        for number, block in enumerate(self.condenser, start=1):
            joined = run_block(block, joined, embedded.block_kwargs, rows if number == len(self.condenser) else None)
        return last[:, prefix:], joined[:, prefix:]


class CentroidMIMLoss(nn.Module):
    """Cross-entropy on tokens plus mean squared error on normalised pixels (arXiv 2303.04664).

    Args:
        token_weight: Weight of the token loss.
        pixel_weight: Weight of the pixel loss.
        mode: `dual` (the paper's), `token` (both branches predict tokens), `pixel` (pixels alone), or the
            experimental `soft_centroid`: the expected centroid under the predicted distribution against the
            normalised pixels. The last compares un-normalised centroids with normalised targets, as published.

    Raises:
        UsageError: Unknown mode.
    """

    def __init__(self, token_weight: float = 1.0, pixel_weight: float = 1.0, mode: Mode = "dual") -> None:
        super().__init__()
        if mode not in ("dual", "token", "pixel", "soft_centroid"):
            raise UsageError(f"unknown loss mode {mode!r}; use dual, token, pixel or soft_centroid")
        self.token_weight = token_weight
        self.pixel_weight = pixel_weight
        self.mode = mode

    def forward(
        self, output: MIMOutput, token_targets: Tensor, pixel_targets: Tensor, centroids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return `loss` and its parts.

        Args:
            output: Predictions for M patches.
            token_targets: (M,) int64 centroid numbers of the clean patches.
            pixel_targets: (M, C p²) clean patches, normalised each by its own mean and unbiased variance.
            centroids: (K, C p²), for `soft_centroid` only.

        Raises:
            UsageError: The output lacks what the mode needs.
        """
        if self.mode == "soft_centroid":
            return self._soft_centroid(output, pixel_targets, centroids)
        parts: dict[str, Tensor] = {}
        if self.mode != "pixel":
            parts["token_loss"] = _cross_entropy(output.token_logits, token_targets)
        if self.mode == "token":
            if output.condenser_logits is not None:
                parts["condenser_token_loss"] = _cross_entropy(output.condenser_logits, token_targets)
        elif output.pixels is None:
            raise UsageError(f"the {self.mode} loss needs a pixel head; a shared head or none predicts tokens only")
        else:
            parts["pixel_loss"] = _squared_error(output.pixels, pixel_targets)
        weights = {"pixel_loss": self.pixel_weight}
        weighted = [weights.get(name, self.token_weight) * value for name, value in parts.items()]
        return {"loss": torch.stack(weighted).sum(), **parts}

    def _soft_centroid(self, output: MIMOutput, targets: Tensor, centroids: Tensor | None) -> dict[str, Tensor]:
        if centroids is None or output.condenser_logits is None:
            raise UsageError("soft_centroid needs the centroids and a condenser with a token head")
        parts = {
            name: _squared_error(_expected(logits, centroids), targets)
            for name, logits in (
                ("soft_loss", output.token_logits),
                ("condenser_soft_loss", output.condenser_logits),
            )
        }
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(at_least_float32(logits), targets)


def _squared_error(predictions: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(at_least_float32(predictions), at_least_float32(targets))


def _expected(logits: Tensor, centroids: Tensor) -> Tensor:
    """Return the mean centroid (M, C p²) under the predicted shares."""
    shares = at_least_float32(logits).softmax(-1)
    return shares @ centroids.to(shares)


def pixel_targets(images: Tensor, size: int) -> Tensor:
    """Return the regression targets of all patches, as the published code does.

    Args:
        images: (B, C, H, W) clean, in [0, 1], not normalised.
        size: Side of a patch in pixels.

    Returns:
        (B, N, C p²) float32, each patch normalised by its own mean and unbiased variance.
    """
    return normalize_patches(patchify(images, size))


def default_early_layers(blocks: int) -> int:
    """Return the paper's depth of the early tap (9 of 12, 21 of 24), or the like for other depths."""
    return blocks - 3 if blocks >= 6 else max(1, blocks - 1)


def require_class_token(encoder: Encoder) -> None:
    """Refuse an encoder without class token.

    Raises:
        UsageError: It has none.
    """
    if num_prefix_tokens(encoder) == 0:
        raise UsageError("modelling of tokens needs an encoder with a class token, and this one has none")


def initialize_as_beit(encoder: Encoder) -> None:
    """Initialise an encoder as the published pre-training code of BEiT and CCViT does.

    Linear and convolution weights and class token: normal with σ = 0.02 cut at ±σ; biases 0; norms (1, 0); then
    the output projections of block i divided by √(2i).
    """
    encoder.apply(_init_layer)
    for name in ("cls_token", "reg_token", "pos_embed"):
        if isinstance(parameter := getattr(encoder, name, None), nn.Parameter):
            _truncated(parameter)
    for number, block in enumerate(encoder.blocks):
        _rescale(block, number + 1)


def _init_layer(layer: nn.Module) -> None:
    if isinstance(layer, (nn.Linear, nn.Conv2d)):
        _truncated(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.LayerNorm) and layer.elementwise_affine:
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)


def _truncated(tensor: Tensor, std: float = 0.02) -> None:
    trunc_normal_(tensor, std=std, a=-std, b=std)


def _rescale(block: Any, number: int) -> None:
    with torch.no_grad():
        block.attn.proj.weight.div_(math.sqrt(2.0 * number))
        block.mlp.fc2.weight.div_(math.sqrt(2.0 * number))


def _set_drop_path(block: nn.Module, rate: float) -> None:
    for name in ("drop_path1", "drop_path2"):
        if hasattr(block, name):
            setattr(block, name, DropPath(rate) if rate > 0 else nn.Identity())
