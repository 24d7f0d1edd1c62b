"""Nystrom's approximation of self-attention, for bags of many thousand tiles.

Xiong et al., "Nyströmformer", arXiv 2102.03902, in the form TransMIL's published code uses it.

>>> NystromAttention(16, num_heads=2, num_landmarks=4)(torch.zeros(1, 10, 16)).shape
torch.Size([1, 10, 16])
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NystromAttention(nn.Module):
    """Attention by way of landmarks: means of consecutive tokens.

    Args:
        width: Width of the tokens.
        num_heads: Heads.
        qkv_bias: Bias of queries, keys and values.
        num_landmarks: Landmarks m; tokens are padded in front to a multiple of it.
        residual_kernel_size: Width of the convolution along the values, one per head.
        iterations: Steps of the pseudo-inverse.
        dropout: Dropout of the output.
    """

    def __init__(
        self,
        width: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        num_landmarks: int = 256,
        residual_kernel_size: int = 33,
        iterations: int = 6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_landmarks = num_landmarks
        self.iterations = iterations
        self.to_qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))
        self.res_conv = nn.Conv2d(
            num_heads,
            num_heads,
            (residual_kernel_size, 1),
            padding=(residual_kernel_size // 2, 0),
            groups=num_heads,
            bias=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, width) for tokens (B, N, width)."""
        n, m = x.shape[1], self.num_landmarks
        per_landmark = -(-n // m)
        x = F.pad(x, (0, 0, per_landmark * m - n, 0))
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q = q * q.shape[-1] ** -0.5
        q_marks, k_marks = (t.unflatten(2, (m, per_landmark)).mean(3) for t in (q, k))
        to_marks = (q @ k_marks.transpose(-2, -1)).softmax(-1)
        between = (q_marks @ k_marks.transpose(-2, -1)).softmax(-1)
        from_marks = (q_marks @ k.transpose(-2, -1)).softmax(-1)
        out = to_marks @ pseudo_inverse(between, self.iterations) @ (from_marks @ v) + self.res_conv(v)
        return self.to_out(out.transpose(1, 2).flatten(2))[:, -n:]


def pseudo_inverse(matrices: Tensor, iterations: int = 6) -> Tensor:
    """Return the Moore-Penrose inverse of (…, m, m) matrices, approached step by step.

    The first guess is scaled by the largest row and column sums of the whole tensor, as published: what comes out for
    one matrix depends a little on the others.
    """
    sizes = matrices.abs()
    z = matrices.transpose(-2, -1) / (sizes.sum(-1).max() * sizes.sum(-2).max())
    one = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    for _ in range(iterations):
        product = matrices @ z
        z = 0.25 * z @ (13 * one - product @ (15 * one - product @ (7 * one - product)))
    return z
