"""The transformer of vector-quantised image modelling: each token of an image from those before it, row by row.

Yu et al. 2022, arXiv 2110.04627, section 4. Options follow github.com/thuanz123/enhancing-transformers
(`modules/stage2/transformer.py`), whose checkpoints it reads: each token's input mixed with the one before it, and
squared ReLU. Their sampling mixes in zeros instead of the token before; here what is sampled with the cache and without
is the same.

>>> model = ImageGPT(vocab=16, num_tokens=9, dim=32, depth=2, heads=4, num_classes=3)
>>> cond = torch.tensor([[0], [2]])
>>> model(torch.randint(16, (2, 9)), cond).shape
torch.Size([2, 9, 16])
>>> model.generate(cond, temperature=0.9, top_k=8).shape
torch.Size([2, 9])
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from patchloom.errors import UsageError

Activation = Literal["gelu", "relu2"]


class ImageGPT(nn.Module):
    """A causal transformer over a condition and the tokens of an image.

    Args:
        vocab: K, the tokenizer's codes.
        num_tokens: N, tokens of an image.
        dim: Width D.
        depth: Blocks.
        heads: Attention heads.
        num_classes: Conditions; None: one, the start of any image.
        num_cond: Tokens of a condition.
        token_shift: Mix each token's input to attention with that of the token before.
        mlp: Activation of the MLPs, GELU or squared ReLU.
        mlp_dim: Width of the MLPs; None: 4 D.
        dropout: Probability of dropping a value, on embeddings, attention and what blocks add.
        qkv_bias: Whether queries, keys and values have a bias.
        mlp_bias: Whether the MLPs have one.

    Raises:
        UsageError: Heads that do not divide the width.
    """

    def __init__(
        self,
        vocab: int,
        num_tokens: int,
        dim: int,
        depth: int,
        heads: int,
        num_classes: int | None = None,
        *,
        num_cond: int = 1,
        token_shift: bool = False,
        mlp: Activation = "gelu",
        mlp_dim: int | None = None,
        dropout: float = 0.0,
        qkv_bias: bool = True,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise UsageError(f"{heads} heads do not divide a width of {dim}")
        self.vocab, self.num_tokens, self.num_cond = vocab, num_tokens, num_cond
        self.num_classes, self.conditional = num_classes or 1, (num_classes or 1) > 1
        self.settings = {
            "vocab": vocab,
            "num_tokens": num_tokens,
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "num_classes": num_classes,
            "num_cond": num_cond,
            "token_shift": token_shift,
            "mlp": mlp,
            "mlp_dim": mlp_dim,
            "qkv_bias": qkv_bias,
            "mlp_bias": mlp_bias,
        }
        self.cond_embed = nn.Embedding(self.num_classes, dim)
        self.code_embed = nn.Embedding(vocab, dim)
        self.cond_pos = nn.Parameter(torch.zeros(1, num_cond, dim))
        self.code_pos = nn.Parameter(torch.zeros(1, num_tokens, dim))
        self.drop = nn.Dropout(dropout)
        hidden = mlp_dim or 4 * dim
        self.blocks = nn.ModuleList(
            Block(dim, heads, hidden, token_shift, mlp, dropout, qkv_bias, mlp_bias, number, depth)
            for number in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        self.recompute = False
        self.apply(_initialize)

    def arguments(self) -> dict[str, Any]:
        """Return plain values that make the same module."""
        return dict(self.settings)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks once more in the backward pass, which takes less memory."""
        self.recompute = enable

    def forward(self, ids: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the logits of each token given the condition and all tokens before it.

        Args:
            ids: (B, N) int64.
            cond: (B, num_cond) int64; None: the start of any image.

        Returns:
            (B, N, K); the first token's are from the condition alone.

        Raises:
            UsageError: Ids or conditions outside the vocabularies, more tokens than the model has places for.
        """
        x = self._run(ids, cond)
        logits: Tensor = self.head(self.norm(x[:, self.num_cond - 1 : -1]))
        return logits

    def features(
        self, ids: Tensor, cond: Tensor | None = None, layers: Collection[int] | None = None
    ) -> dict[int, Tensor]:
        """Return what blocks add up to, before any further norm, at the places of the image's tokens.

        Args:
            ids: (B, N) int64.
            cond: As for `forward`.
            layers: Numbers of blocks, from 1; 0 is the embedding; None: all of them.

        Returns:
            Number to (B, N, D).

        Raises:
            UsageError: As `forward`, or a block there is not.
        """
        asked = set(range(len(self.blocks) + 1) if layers is None else layers)
        if beyond := asked - set(range(len(self.blocks) + 1)):
            raise UsageError(f"there is no block {min(beyond)}; blocks are 1 to {len(self.blocks)}, the embedding is 0")
        kept: dict[int, Tensor] = {}

        def keep(number: int, x: Tensor) -> None:
            if number in asked:
                kept[number] = x[:, self.num_cond :]

        self._run(ids, cond, keep)
        return kept

    @torch.no_grad()
    def generate(
        self,
        cond: Tensor | None = None,
        *,
        count: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Draw the tokens of images, one after another.

        Args:
            cond: (B, num_cond) conditions; None: the start of any image, `count` times.
            count: Images where there is no condition.
            temperature: Logits are divided by it; below 1 the likely becomes more likely.
            top_k: Draw from the k likeliest tokens alone.
            top_p: Draw from the fewest tokens that make up this probability.
            generator: Where draws come from, on the model's device.
            use_cache: Keep keys and values of past tokens; the same tokens without, and far slower.
            progress: Told the number of tokens done.

        Returns:
            (B, N) int64.

        Raises:
            UsageError: A condition outside the classes, or settings of sampling that make no sense.
        """
        check_sampling(self.vocab, temperature, top_k, top_p)
        if self.training:
            raise UsageError("images are drawn in eval mode; call eval() first")
        cond = self._condition(count if cond is None else len(cond), cond)
        ids = torch.empty(len(cond), 0, dtype=torch.int64, device=cond.device)
        cache = [Cache() for _ in self.blocks] if use_cache else None
        for place in range(self.num_tokens):
            if cache is None:
                x = self._run(ids, cond)
            elif place == 0:
                x = self._embed(ids, cond)
                for block, past in zip(self.blocks, cache, strict=True):
                    past.make_room(self.num_cond + self.num_tokens)
                    x = block(x, None, past)
            else:
                x = self.code_embed(ids[:, -1:]) + self.code_pos[:, place - 1 : place]
                for block, past in zip(self.blocks, cache, strict=True):
                    x = block(x, None, past)
            logits = self.head(self.norm(x[:, -1]))
            drawn = draw_token(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            ids = torch.cat([ids, drawn], 1)
            if progress is not None:
                progress(place + 1)
        return ids

    def _run(self, ids: Tensor, cond: Tensor | None, keep: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """Return the residual stream (B, num_cond + N, D) after all blocks."""
        if ids.ndim != 2 or ids.shape[1] > self.num_tokens:
            raise UsageError(
                f"tokens of shape {tuple(ids.shape)} for a model of {self.num_tokens} tokens an image; (B, N) of at "
                f"most so many fits"
            )
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < self.vocab):
            raise UsageError(f"tokens from {int(ids.min())} to {int(ids.max())}; this model has 0 to {self.vocab - 1}")
        x = self.drop(self._embed(ids, self._condition(len(ids), cond)))
        mask = self._mask(x)
        if keep is not None:
            keep(0, x)
        for number, block in enumerate(self.blocks, 1):
            again = self.recompute and self.training
            x = checkpoint(block, x, mask, use_reentrant=False) if again else block(x, mask)
            if keep is not None:
                keep(number, x)
        return x

    def _embed(self, ids: Tensor, cond: Tensor) -> Tensor:
        first = self.cond_embed(cond) + self.cond_pos
        return torch.cat([first, self.code_embed(ids) + self.code_pos[:, : ids.shape[1]]], 1)

    def _condition(self, count: int, cond: Tensor | None) -> Tensor:
        device = self.cond_pos.device
        if cond is None:
            if self.conditional:
                raise UsageError(f"this model makes images of {self.num_classes} classes; say which")
            return torch.zeros(count, self.num_cond, dtype=torch.int64, device=device)
        if tuple(cond.shape) != (count, self.num_cond):
            raise UsageError(f"conditions of shape {tuple(cond.shape)} for {count} images; ({count}, {self.num_cond})")
        if cond.numel() and not (int(cond.min()) >= 0 and int(cond.max()) < self.num_classes):
            beyond = int(cond.min()) if int(cond.min()) < 0 else int(cond.max())
            raise UsageError(f"class {beyond} is none of this model; it has 0 to {self.num_classes - 1}")
        return cond.to(device)

    def _mask(self, x: Tensor) -> Tensor | None:
        """Return who sees whom where a condition has several tokens, which see one another; None: all before it."""
        if self.num_cond == 1:
            return None
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        mask[: self.num_cond, : self.num_cond] = True
        return mask


class Cache:
    """Keys and values of the tokens so far, and the last input, of one block."""

    def __init__(self) -> None:
        self.length = 0
        self.room = 0
        self.keys = self.values = torch.empty(0)
        self.last: Tensor | None = None

    def make_room(self, length: int) -> None:
        """Reserve places for so many tokens."""
        self.room = length

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those (B, heads, n, d) of further tokens, and return all."""
        if not self.length:
            shape = (keys.shape[0], keys.shape[1], self.room, keys.shape[3])
            self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = keys, values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Block(nn.Module):
    """Causal attention and an MLP, each behind a norm and beside its input."""

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        token_shift: bool,
        mlp: Activation,
        dropout: float,
        qkv_bias: bool,
        mlp_bias: bool,
        number: int,
        depth: int,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CausalAttention(dim, heads, token_shift, dropout, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden, bias=mlp_bias)
        self.fc2 = nn.Linear(hidden, dim, bias=mlp_bias)
        self.activation: Activation = mlp
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Transform (B, T, D): all tokens, or with a cache those that follow what is in it."""
        x = x + self.drop(self.attn(self.norm1(x), mask, cache))
        hidden = self.fc1(self.norm2(x))
        hidden = F.gelu(hidden) if self.activation == "gelu" else F.relu(hidden).square()
        added: Tensor = x + self.drop(self.fc2(hidden))
        return added


class CausalAttention(nn.Module):
    """Self-attention to the tokens before, optionally on inputs mixed with the token before (RWKV's token shift)."""

    def __init__(self, dim: int, heads: int, token_shift: bool, dropout: float, bias: bool) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.proj = nn.Linear(dim, dim)
        share = torch.arange(dim, dtype=torch.float32) / max(dim - 1, 1)
        self.time_mix = nn.Parameter(share.view(1, 1, dim)) if token_shift else None

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Attend: (B, T, D) → (B, T, D)."""
        if self.time_mix is not None:
            x = self._mixed(x, cache)
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        first = cache is None or cache.length == 0
        if cache is not None:
            k, v = cache.extend(k, v)
        # What comes first may be a condition of several tokens, which see one another.
        causal = mask is None and cache is None
        assert first or x.shape[1] == 1
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, dropout_p=self.dropout if self.training else 0.0
        )
        projected: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return projected

    def _mixed(self, x: Tensor, cache: Cache | None) -> Tensor:
        before = torch.zeros_like(x[:, :1]) if cache is None or cache.last is None else cache.last
        shifted = torch.cat([before, x[:, :-1]], 1)
        if cache is not None:
            cache.last = x[:, -1:]
        assert self.time_mix is not None
        return x * self.time_mix + shifted * (1 - self.time_mix)


def check_sampling(vocab: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse settings of sampling that make no sense.

    Raises:
        UsageError: A temperature of 0 or below, more tokens than there are, or a probability outside (0, 1].
    """
    if not temperature > 0:
        raise UsageError(f"temperature is {temperature:g}; it must be above 0 (0.01 is close to taking the likeliest)")
    if top_k is not None and not 1 <= top_k <= vocab:
        raise UsageError(f"top_k is {top_k}; there are {vocab} tokens to draw from, so 1 to {vocab} (or leave it out)")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"top_p is {top_p:g}; a probability above 0, at most 1 (or leave it out)")


def draw_token(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return (B, 1) tokens drawn by logits (B, K), see `token_probabilities`."""
    return torch.multinomial(token_probabilities(logits, temperature, top_k, top_p), 1, generator=generator)


def token_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Return (B, K) probabilities: logits over temperature, the k likeliest of them, and of those the likely mass p."""
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    shares = logits.softmax(-1)
    if top_p is not None:
        ordered, order = shares.sort(dim=-1, descending=True)
        # Mass of what is likelier: the token that completes p is kept.
        beyond = ordered.cumsum(-1) - ordered >= top_p
        beyond[..., 0] = False
        shares = shares.scatter(-1, order, ordered.masked_fill(beyond, 0.0))
        shares = shares / shares.sum(-1, keepdim=True)
    return shares


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
