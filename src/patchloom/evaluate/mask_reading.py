"""How the masks of a measurement are read: said on stderr, refused where nothing can be told, kept with the result."""

from __future__ import annotations

import sys
from typing import Any

from patchloom.data.mask_values import MaskCoding, MaskShares, check_shares


def report_masks(coding: MaskCoding, train: tuple[str, MaskShares], test: tuple[str, MaskShares]) -> dict[str, Any]:
    """Print what was taken for the masks, a line for each source, and return what goes into results.

    Args:
        coding: How the masks of both are read.
        train: Name and shares of what is learnt from.
        test: Name and shares of what is measured on.

    Raises:
        UsageError: One class is left, or most of the pixels are ignored by a guess.
    """
    notices = [found for name, shares in (test, train) if (found := check_shares(coding, shares, name)) is not None]
    lines = [*notices, *(coding.line(name, shares) for name, shares in (train, test))]
    print("\n".join(lines), file=sys.stderr, flush=True)
    by_role = {
        role: {"class_shares": shares.classes, "ignored_share": shares.ignored, "masks_looked_at": shares.masks}
        for role, (_, shares) in (("train", train), ("test", test))
    }
    notice = {"notice": "; ".join(notices)} if notices else {}
    return {**notice, "masks": {**coding.describe(), **by_role}}
