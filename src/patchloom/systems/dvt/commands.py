"""Commands of `patchloom clean dvt` besides training; what they need is loaded when they run."""

from __future__ import annotations

from typing import Any

from patchloom.systems.dvt.config import DecomposeConfig


def decompose(config: DecomposeConfig) -> dict[str, Any]:
    """Take the features of images apart and write them to a folder.

    Returns:
        `images` in the folder, `new` ones, `skipped` ones, `images_per_minute`, the mean `artifact_share` (variance of
        the artefact by that of the raw features), the folder `out`, its `report`.

    Raises:
        UsageError: No such encoder or images, or a folder that holds something else.
    """
    from patchloom.systems.dvt.run import decompose_source

    return decompose_source(config)


def apply(run: str, out: str, *, encoder: str | None = None, overwrite: bool = False) -> str:
    """Put a trained denoiser behind its encoder and write both as a bundle, which every command takes.

    Args:
        run: Run of patchloom clean dvt train, or its model.
        out: Folder of the bundle.
        encoder: The encoder the denoiser was trained for, where it is no longer where it was; another is refused.
        overwrite: Replace a bundle that is there.

    Returns:
        The folder of the bundle.

    Raises:
        UsageError: No such run, its encoder is another or gone, or `out` exists.
    """
    from patchloom.systems.dvt.saved import write_bundle

    return write_bundle(run, out, encoder=encoder, overwrite=overwrite)
