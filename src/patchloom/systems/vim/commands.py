"""`patchloom generate sample`: images of a trained model, as files and as a grid, and their distance from real ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchloom.base.ranges import Count, Positive, PositiveInt, Share, checked
from patchloom.errors import UsageError
from patchloom.io import check_place, make_folder, write_bytes, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from patchloom.base.progress import Meter

GRID = 64
"""Most images of the grid."""


@checked
def sample_images(
    run: str,
    out: str,
    count: PositiveInt = 16,
    class_name: str | None = None,
    temperature: Positive = 1.0,
    top_k: PositiveInt | None = None,
    top_p: Share | None = None,
    batch_size: PositiveInt = 64,
    seed: Count = 0,
    device: str = "auto",
    reference: str | None = None,
    features: str = "pixels",
    inception: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Draw images by a trained model.

    The folder `out` gets the images (000000.png …), grid.png of the first of them, and samples.json with settings,
    figures and the class of each image.

    Args:
        run: Run of `patchloom generate vim`, or its model.
        out: Folder to write to; empty or absent.
        count: Images to draw.
        class_name: Class to draw, by name or number, of a model trained with conditional=true; default: all in turn.
        temperature: Logits are divided by it; below 1 images become more usual, and more alike.
        top_k: Draw each token from the k likeliest alone; default: from all.
        top_p: Draw each token from the fewest that make up this probability; default: from all.
        batch_size: Images drawn at once.
        seed: Of the draws; with the same batch_size the same images.
        device: Where to compute: auto, cpu, cuda or cuda:1.
        reference: Real images to measure against: the Fréchet distance between both sets in the space of `features`.
        features: What sees the images for that: a bundle, a run, a timm model, or the word pixels. The figure is named
            by it; it is no FID, which is that of one Inception network alone.
        inception: File of that network's weights (pt_inception-2015-12-05-6726825d.pth): gives FID and inception score
            as they are published (extra: generate). Nothing is downloaded.
        overwrite: Write into a folder that holds images already.

    Returns:
        The folder, the `grid`, how many images there are, seconds per image, and with `reference` the distance.

    Raises:
        UsageError: No such model or class, settings of sampling that make no sense, or a folder that is not empty.
    """
    import time

    import torch

    from patchloom.base.progress import Meter
    from patchloom.features.extract import torch_device
    from patchloom.systems.vim.model import check_sampling
    from patchloom.systems.vim.saved import load_vim

    folder = check_place(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise UsageError(f"{folder} is not an empty folder; give another --out or --overwrite")
    if inception is not None and reference is None:
        raise UsageError("inception compares with real images; name them as reference")
    model = load_vim(run)
    check_sampling(model.tokenizer.num_codes, temperature, top_k, top_p)
    conditions = model.conditions(count, class_name)
    model = model.to(torch_device(device))
    make_folder(folder)
    start, drawn = time.monotonic(), []
    tokens = model.transformer.num_tokens
    meter = Meter("token", tokens * -(-count // batch_size), unit=None, stays=True)
    generator = torch.Generator(model.transformer.code_pos.device).manual_seed(seed)
    for number, first in enumerate(range(0, count, batch_size)):
        size = min(batch_size, count - first)
        cond = None if conditions is None else conditions[first : first + size]
        ids = model.transformer.generate(
            cond,
            count=size,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            progress=partial(_tell, meter, number * tokens),
        )
        drawn.append(model.tokenizer.decode(ids.view(-1, *model.grid)).clamp(0, 1).cpu())
    meter.close()
    seconds = time.monotonic() - start
    images = torch.cat(drawn)
    _write_images(images, folder)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "class_name": class_name}
    figures: dict[str, Any] = {
        "out": str(folder),
        "grid": str(folder / "grid.png"),
        "images": count,
        "seconds_per_image": round(seconds / count, 3),
    }
    if reference is not None:
        from patchloom.systems.vim.distance import distances

        figures |= distances(images, reference, model, features=features, inception=inception, device=device)
    classes = {}
    if conditions is not None and model.class_names is not None:
        classes = {"classes": [model.class_names[number] for number in conditions.flatten().tolist()]}
    write_json(folder / "samples.json", {"run": run, **sampling, **figures, **classes})
    return figures


def _tell(meter: Meter, before: int, done: int) -> None:
    meter.reach(before + done)


def _write_images(images: Tensor, folder: Path) -> None:
    """Write images (n, C, H, W) in [0, 1], and a grid of the first of them."""
    import io

    import torch
    from PIL import Image

    from patchloom.report import image_grid
    from patchloom.report.tiles import as_colour

    for number, image in enumerate(images):
        pixels = (as_colour(image[None])[0] * 255).round().byte().permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        write_bytes(folder / f"{number:06d}.png", buffer.getvalue())
    side = min(8, len(images))
    shown = images[:GRID]
    blank = shown.new_ones(-len(shown) % side, *shown.shape[1:])  # so that the last row is as long as the others
    rows = {f"from {row * side}": part for row, part in enumerate(torch.cat([shown, blank]).split(side))}
    write_bytes(folder / "grid.png", image_grid(rows).png)
