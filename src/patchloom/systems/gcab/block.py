"""Class-attention with gates: one query, the token of a task, looks at all patches through the channels of that task.

Cotogni et al. 2022, arXiv 2211.12292, on the class-attention of CaiT (Touvron et al. 2021, arXiv 2103.17239).

>>> block = GatedClassAttentionBlock(dim=8, num_heads=2)
>>> gates = Gates(torch.ones(8), torch.ones(32))
>>> block(torch.zeros(1, 1, 8), torch.zeros(3, 5, 8), gates).shape
torch.Size([3, 1, 8])
"""

from __future__ import annotations

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.errors import UsageError
from patchloom.systems.gcab.gates import Gates


class GatedClassAttention(nn.Module):
    """Attention of the first token to all, every projection gated on its way in and, but for v, on its way out.

    Args:
        dim: D.
        num_heads: Heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise UsageError(f"num_heads={num_heads} does not divide the width of {dim}")
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, width: Tensor) -> Tensor:
        """Return what the first token takes from all.

        Args:
            x: (B, 1 + N, D), normed.
            width: (D,) gate.

        Returns:
            (B, 1, D).
        """
        gated = x * width
        q = self.q(gated[:, :1]) * width
        k, v = self.k(gated) * width, self.v(gated)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.proj(attended * width) * width
        return out


class GatedClassAttentionBlock(nn.Module):
    """The block that all tasks share, each through its gates and with a token of its own, which passes ungated.

    Args:
        dim: D.
        num_heads: Heads.
        mlp_ratio: Width of the MLP's middle over D.
        drop_path: Stochastic depth rate.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = GatedClassAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    @property
    def hidden(self) -> int:
        """H, the width of the MLP's middle."""
        return len(self.mlp.get_parameter("fc1.bias"))

    def forward(self, token: Tensor, patches: Tensor, gates: Gates) -> Tensor:
        """Return the token after it has seen the patches.

        Args:
            token: (1, 1, D) of the task.
            patches: (B, N, D).
            gates: Of the task.

        Returns:
            (B, 1, D).
        """
        token = token.expand(patches.shape[0], -1, -1)  # not len: in a graph for any batch that is a constant
        seen = self.attn(self.norm1(torch.cat([token, patches], dim=1)), gates.width)
        token = token + self.drop_path(seen)
        inner = self.mlp.act(self.mlp.fc1(self.norm2(token) * gates.width)) * gates.hidden
        out: Tensor = token + self.drop_path(self.mlp.fc2(inner) * gates.width)
        return out

    def reserved(self, gates: Gates) -> dict[str, Tensor]:
        """Return which entries of the block's parameters the tasks before use, by name: 1 where both ends are open.

        Args:
            gates: What those tasks have reserved.
        """
        width, hidden = gates
        square = torch.outer(width, width)
        return {
            **{f"attn.{name}.weight": square for name in ("q", "k", "v", "proj")},
            "attn.proj.bias": width,
            "mlp.fc1.weight": torch.outer(hidden, width),
            "mlp.fc1.bias": hidden,
            "mlp.fc2.weight": torch.outer(width, hidden),
            "mlp.fc2.bias": width,
        }
