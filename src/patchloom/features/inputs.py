"""Which samples an encoder takes, and what it is shown of them: by the kind of the source, see `data.kinds`."""

from __future__ import annotations

from patchloom.data.base import Source, StreamSource
from patchloom.data.kinds import KINDS, require_kind
from patchloom.encoders import Encoder, kind_of
from patchloom.errors import UsageError


def kinds_of(encoder: Encoder | None) -> tuple[str, ...]:
    """Return the kinds of samples an encoder takes; without one (raw pixels), all that are measured."""
    if encoder is None:
        return tuple(kind.name for kind in KINDS.values() if kind.measured)
    return (kind_of(encoder),)


def require_taken(source: Source | StreamSource, encoder: Encoder | None) -> None:
    """Refuse a source whose samples an encoder does not take.

    Raises:
        UsageError: Names both kinds, and the methods that take the source's.
    """
    require_kind(source, kinds_of(encoder), "a vector of raw pixels" if encoder is None else "the encoder")


def require_image_encoder(encoder: Encoder, what: str) -> None:
    """Refuse an encoder of anything but images.

    Args:
        encoder: The encoder.
        what: What needs one of images, such as `evaluate segmentation`.

    Raises:
        UsageError: Names what it takes.
    """
    if (kind := kind_of(encoder)) != "image":
        plural = KINDS[kind].plural
        raise UsageError(
            f"the encoder takes {plural}, and {what} is for encoders of images; evaluate knn and linear measure it on "
            f"{plural}"
        )
