"""How the codes of a learned tokenizer are used: a warning where few are, and a section of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from patchloom.report import Section

COLLAPSE = 0.1
"""A vocabulary used as if it had less than this share of the codes it could show has collapsed."""


def collapse_of(measured: Mapping[str, Any], num_codes: int, changes: Sequence[str]) -> str | None:
    """Return a sentence where only few codes are in use, with what to change; None where all is well.

    Args:
        measured: `perplexity`, `dead` and `tokens` of held-out images; empty where nothing was measured.
        num_codes: Codes in the table.
        changes: What may help, in the imperative.
    """
    if not measured:
        return None
    possible = min(num_codes, measured["tokens"])
    if measured["perplexity"] >= COLLAPSE * possible:
        return None
    return (
        f"The codebook has collapsed: {num_codes - measured['dead']} of {num_codes} codes occur in "
        f"{measured['tokens']} held-out tokens, used as evenly as {measured['perplexity']:.1f} would be; "
        f"{', or '.join(changes)}"
    )


def use_section(counts: Tensor, measured: Mapping[str, Any], how: str, quality: str, warning: str | None) -> Section:
    """Return the report's section on the use of the codes.

    Args:
        counts: (K,) how often each code occurs in held-out images.
        measured: `usage`, `perplexity`, `dead` and `tokens` of them.
        how: Which images they are, in words.
        quality: What else was measured, as a sentence.
        warning: See `collapse_of`.
    """
    from patchloom.report import Section, curves

    num_codes = len(counts)
    shares = counts.double().sort(descending=True).values / counts.sum()
    ranks = list(range(1, num_codes + 1))
    figure = curves(
        {"share of the tokens": (ranks, shares.cumsum(0).tolist()), "all codes alike": ([0, num_codes], [0, 1])},
        x_label="codes, the most used first",
        y_label="share",
        title="Tokens that the most used codes make up",
    )
    text = (
        f"On {how}, {measured['tokens']} tokens: {num_codes - measured['dead']} of {num_codes} codes occur (usage "
        f"{measured['usage']:.1%}), {measured['dead']} do not (dead); perplexity {measured['perplexity']:.1f}: used as "
        f"evenly as so many codes would be. A code's even share is {1 / num_codes:.2%}, the most used has "
        f"{float(shares[0]):.2%}. {quality}"
    )
    if measured["tokens"] < 10 * num_codes:
        text += " The tokens are few for so many codes, so codes that are rare count as dead."
    text += f" Warning: {warning}." if warning else ""
    return Section(title="Use of the codes", text=text, figures=[figure])
