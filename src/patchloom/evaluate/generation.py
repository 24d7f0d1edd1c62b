"""`patchloom generate probe`: what each block of a model that makes images knows of their classes.

Chen et al. 2020 (iGPT) and Yu et al. 2022, arXiv 2110.04627, section 4.3: the mean over an image's tokens after each
block, and a linear classifier on it. The best block is in the middle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from patchloom.base.ranges import Positive, PositiveInt, checked
from patchloom.errors import UsageError
from patchloom.io import check_place, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from patchloom.data.base import Source
    from patchloom.systems.vim.saved import VIM


@checked
def probe_blocks(
    run: str,
    train: str,
    test: str,
    out: str | None = None,
    layers: str = "all",
    c: Positive = 0.1,
    batch_size: PositiveInt = 64,
    limit: PositiveInt | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Measure the features of each block of a trained model: a linear classifier on the mean over an image's tokens.

    Args:
        run: Run of `patchloom generate vim` (without conditional=true), or its model.
        train: Labelled images to learn from.
        test: Labelled images to measure on.
        out: Also write the figures to this JSON file.
        layers: Numbers of blocks, separated by commas, from 1, 0 being the embedding of the tokens; or all.
        c: Inverse strength of the classifier's penalty, as in scikit-learn.
        batch_size: Images at a time.
        limit: Take so many images of each at most, drawn at random.
        device: Where to compute: auto, cpu, cuda or cuda:1.

    Returns:
        `accuracy` of each block by its number, the `best` of them, its `best_accuracy`, and the number of images.

    Raises:
        UsageError: No such model or block, a model of classes, or images without labels.
    """
    import torch

    from patchloom.data import open_source
    from patchloom.data.base import Source, no_labels
    from patchloom.evaluate.logistic import fit_logistic
    from patchloom.features.extract import torch_device
    from patchloom.systems.vim.saved import load_vim

    if out is not None:
        check_place(out)
    model = load_vim(run).to(torch_device(device))
    asked = _numbers(layers, len(model.transformer.blocks))
    sets = []
    for name in (train, test):
        source = open_source(name, in_chans=model.tokenizer.in_chans, **model.reading)
        if not isinstance(source, Source) or source.class_names is None or source.multilabel:
            raise no_labels(source, "generate probe needs one label an image, and ")
        sets.append(source)
    if sets[0].class_names != sets[1].class_names:
        raise UsageError(f"{train} and {test} have other classes: {sets[0].class_names} and {sets[1].class_names}")
    (x, y), (x_test, y_test) = (_block_features(model, source, asked, batch_size, limit) for source in sets)
    if len(y.unique()) < 2:
        raise UsageError(f"{train} has one class only; a classifier needs two")
    accuracy = {}
    for layer in asked:
        fitted = fit_logistic(x[layer], y, len(sets[0].class_names or ()), c=c)
        accuracy[str(layer)] = float((fitted.predict(x_test[layer]) == y_test).double().mean())
    best = max(accuracy, key=lambda name: accuracy[name])
    figures = {
        "accuracy": accuracy,
        "best": int(best),
        "best_accuracy": accuracy[best],
        "blocks": len(model.transformer.blocks),
        "train_images": len(y),
        "n": len(y_test),
        "majority_share": float(torch.bincount(y_test).max() / len(y_test)),
    }
    if out is not None:
        write_json(out, {"run": run, "train": train, "test": test, "c": c, **figures})
    return figures


def _numbers(layers: str, blocks: int) -> list[int]:
    if layers == "all":
        return list(range(blocks + 1))
    try:
        asked = sorted({int(word) for word in layers.split(",")})
    except ValueError:
        asked = [-1]
    if not asked or asked[0] < 0 or asked[-1] > blocks:
        raise UsageError(f"layers is {layers!r}; give all, or numbers from 0 to {blocks} separated by commas")
    return asked


def _block_features(
    model: VIM, source: Source, layers: list[int], batch_size: int, limit: int | None
) -> tuple[dict[int, Tensor], Tensor]:
    """Return the features of each block, (n, D), of the labelled images of a source, and their labels."""
    import numpy as np
    import torch

    from patchloom.data import SubsetSource
    from patchloom.data.pixels import unit
    from patchloom.training.held_out import read_views

    known = np.flatnonzero(source.labelled())
    if limit is not None and len(known) > limit:
        known = np.sort(np.random.default_rng(0).permutation(known)[:limit])
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    labels = []
    for first in range(0, len(known), batch_size):
        images, found = read_views(SubsetSource(source, known[first : first + batch_size]), model.image_size)
        for layer, vectors in model.features(unit(images), layers).items():
            parts[layer].append(vectors.cpu())
        labels.append(found)
    return {layer: torch.cat(found) for layer, found in parts.items()}, torch.cat(labels)
