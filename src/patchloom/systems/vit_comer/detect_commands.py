"""Commands of `patchloom detect` besides training; what they need is loaded when they run."""

from __future__ import annotations

from typing import Any


def predict(
    run: str,
    images: str,
    out: str,
    *,
    overlays: bool = False,
    least_score: float = 0.05,
    device: str = "auto",
    include: str | None = None,
) -> dict[str, Any]:
    """Write the objects a trained detector finds in images, as COCO has them.

    Args:
        run: Run of `patchloom detect`, or its model.
        images: Folder of images.
        out: Folder to write to; empty or absent. `objects.json` holds COCO's results: image, class, score, box (left,
            top, width, height) and run lengths of the mask; `index.json` what the numbers of images and classes mean.
        overlays: Also draw boxes on each image, to `overlays/a/b.png`.
        least_score: Objects below this score are left out.
        device: Where to compute: auto, cpu, cuda or cuda:1.
        include: Only images that fit one of these globs, separated by commas.

    Returns:
        `images` (how many), `objects`, `per_class` (objects of each), the folder `out`, and `skipped` images.

    Raises:
        UsageError: No such model, no image, a folder that is not empty, or a score outside [0, 1].
        MissingExtraError: pycocotools is not installed.
    """
    import json
    from pathlib import Path

    import torch
    from PIL import Image

    from patchloom.base.progress import track
    from patchloom.data import open_source
    from patchloom.data.base import StreamSource, UnreadableImageError
    from patchloom.data.kinds import require_kind
    from patchloom.data.pixels import unit
    from patchloom.encoders import in_chans
    from patchloom.errors import MissingExtraError, UsageError
    from patchloom.features.extract import torch_device
    from patchloom.io import check_place, make_folder, write_json, write_text
    from patchloom.report.boxes import with_boxes
    from patchloom.segment.objects import has_pycocotools
    from patchloom.segment.predict import run_lengths
    from patchloom.systems.vit_comer.detect_saved import load_detector

    if not 0 <= least_score <= 1:
        raise UsageError(f"least_score is {least_score}; it must be in [0, 1]")
    if not has_pycocotools():
        raise MissingExtraError("pycocotools", "detection", "writing objects as COCO's results")
    folder = check_place(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{out} exists and is not an empty folder; choose another out")
    model = load_detector(run).to(torch_device(device))
    options: dict[str, Any] = {} if include is None else {"include": include}
    opened = open_source(images, in_chans=in_chans(model.encoder), model=model.encoder, **options)
    require_kind(opened, ("image",), "detect predict")
    source = opened.by_index() if isinstance(opened, StreamSource) else opened
    make_folder(folder)
    results: list[dict[str, Any]] = []
    index: list[dict[str, Any]] = []
    skipped = []
    for number in track(range(len(source)), "detecting"):
        try:
            sample = source.read(number)
        except UnreadableImageError as error:
            skipped.append({"file": error.key, "reason": error.reason})
            continue
        image = unit(sample.image)
        found = model.detect(image)
        keep = found["scores"] >= least_score
        found = {name: value[keep] for name, value in found.items()}
        identity = len(index) + 1
        index.append({"id": identity, "file_name": sample.key, "height": image.shape[-2], "width": image.shape[-1]})
        for place, (left, top, right, bottom) in enumerate(found["boxes"].tolist()):
            results.append(
                {
                    "image_id": identity,
                    "category_id": int(found["labels"][place]),
                    "score": float(found["scores"][place]),
                    "bbox": [left, top, right - left, bottom - top],
                    "segmentation": run_lengths(found["masks"][place].numpy()),
                }
            )
        if overlays:
            pixels = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
            levels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            drawn = with_boxes(levels, found["boxes"], found["labels"], found["scores"])
            place_of = folder / "overlays" / Path(sample.key).with_suffix(".png")
            make_folder(place_of.parent)
            Image.fromarray(drawn).save(place_of)
    if not index:
        raise UsageError(f"{images} holds no readable image")
    names = model.class_names
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    write_text(folder / "objects.json", json.dumps(results))
    write_json(folder / "index.json", {"images": index, "categories": categories})
    counts = {name: sum(one["category_id"] == number for one in results) for number, name in enumerate(names)}
    return {"images": len(index), "objects": len(results), "per_class": counts, "out": str(folder), "skipped": skipped}
