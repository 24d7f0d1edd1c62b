"""`patchloom merge`: an adapter becomes part of its encoder."""

from __future__ import annotations

from patchloom.errors import UsageError
from patchloom.io import check_place


def merge_to_bundle(adapter: str, out: str, overwrite: bool = False) -> str:
    """Write an adapter into its encoder's weights, and the result as a bundle that timm opens by itself.

    Args:
        adapter: Run or adapter file whose mathematics allow it: lora, bitfit, linear.
        out: Folder of the bundle.
        overwrite: Replace a bundle already there.

    Returns:
        The folder of the bundle.

    Raises:
        UsageError: The adapter cannot be merged, or the folder exists.
    """
    from patchloom.models.adapters import load_adapted, merge, read_adapter
    from patchloom.models.bundle import holds_more, save_bundle

    if check_place(out).exists() and not overwrite:
        raise UsageError(f"{out} exists; choose another out, or set overwrite to replace it")
    if holds_more(adapter):
        raise UsageError(
            f"{adapter} holds no adapter but a whole model, of which nothing can be merged; it opens as it is, and its "
            f"encoder as a bundle"
        )
    encoder = load_adapted(adapter)
    about, _ = read_adapter(adapter)
    merge(encoder)
    lineage = {"made_by": f"merge of {about['kind']}", "adapter": str(adapter), "encoder": about["encoder"]}
    save_bundle(encoder, out, lineage=lineage, overwrite=overwrite)
    return out
