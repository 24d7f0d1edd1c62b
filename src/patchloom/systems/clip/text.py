"""The text tower of open_clip, its tokens, and sentences made of the names of classes.

The byte-pair vocabulary ships inside open_clip: nothing is fetched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchloom.errors import MissingExtraError

try:
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transformer import TextTransformer
except ImportError as error:  # the extra is not here
    raise MissingExtraError("open_clip_torch", "clip", "a text tower") from error

VOCABULARY = 49408


class TextTower(TextTransformer):
    """open_clip's causal text Transformer, which also takes rows of fewer tokens than its context.

    What stands behind the end of a caption has no part in its feature, so a batch may be cut at its longest caption.
    """

    def forward(self, text: Tensor, embedded: Tensor | None = None) -> Tensor:
        """Return (B, D) for tokens (B, L).

        Args:
            text: Tokens.
            embedded: (B, L, W), their embeddings, where these are made already.
        """
        x = self.token_embedding(text) if embedded is None else embedded
        length = text.shape[1]
        x = x + self.positional_embedding[:length].to(x.dtype)
        x = self.ln_final(self.transformer(x, attn_mask=self.attn_mask[:length, :length]))
        ends = x[torch.arange(len(x), device=x.device), text.argmax(-1)]  # the end has the largest number
        features: Tensor = ends @ self.text_projection
        return features


class Tokenized(NamedTuple):
    """A caption as tokens."""

    tokens: Tensor
    """(L,) int64: start, byte pairs, end, zeros."""
    text_id: Tensor
    """Scalar int64, equal for equal tokens."""
    cut: Tensor
    """Scalar bool: the caption was longer than the context."""


@cache
def tokenizer() -> Any:
    """Return open_clip's byte-pair tokenizer."""
    return SimpleTokenizer()


def tokenize(caption: str, context_length: int) -> Tokenized:
    """Return a caption as tokens, cut to the context.

    Args:
        caption: Any text.
        context_length: Tokens L, start and end among them.
    """
    words = tokenizer()
    tokens = [words.sot_token_id, *words.encode(caption), words.eot_token_id]
    cut = len(tokens) > context_length
    if cut:
        tokens = [*tokens[: context_length - 1], words.eot_token_id]
    row = torch.zeros(context_length, dtype=torch.int64)
    row[: len(tokens)] = torch.tensor(tokens)
    digest = hashlib.sha256(row.numpy().tobytes()).digest()[:8]
    return Tokenized(row, torch.tensor(int.from_bytes(digest, "little", signed=True)), torch.tensor(cut))


def tokenize_all(captions: Sequence[str], context_length: int) -> Tensor:
    """Return captions as tokens (n, L) int64."""
    return torch.stack([tokenize(caption, context_length).tokens for caption in captions])


def trimmed(tokens: Tensor) -> Tensor:
    """Return tokens (B, L) without the columns behind the longest caption's end."""
    return tokens[:, : int(tokens.argmax(1).max()) + 1]  # the end has the largest number


def readable_name(name: str) -> str:
    """Return the name of a class as it stands in a sentence.

    >>> readable_name("n01440764_fire_truck"), readable_name("fire_truck")
    ('n01440764 fire truck', 'fire truck')
    """
    return " ".join(name.replace("_", " ").split())
