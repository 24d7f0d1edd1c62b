"""Images and masks are the same wherever they are stored, and what does not fit is refused."""

from __future__ import annotations

import io
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from patchloom.data.base import UnreadableImageError
from patchloom.data.segmentation import open_segmentation
from patchloom.errors import UsageError

datasets = pytest.importorskip("datasets")
pytest.importorskip("webdataset")
pytest.importorskip("pyarrow")

COUNT = 4


def image(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (10, 14, 3), dtype=np.uint8)


def mask(number: int) -> np.ndarray:
    return np.random.default_rng(number + 50).integers(0, 3, (10, 14), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_tar(path: Path, files: dict[str, bytes], mode: Any = "w") -> str:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def folder(root: Path, pictures: str, masks: str) -> str:
    """Write images and masks under names with * for the number."""
    for number in range(COUNT):
        put(root / pictures.replace("*", str(number)), png(image(number)))
        put(root / masks.replace("*", str(number)), png(mask(number)))
    return str(root)


def table(root: Path, column: str, suffix: str = "csv") -> str:
    folder(root, "a/*.png", "b/*.png")
    rows = {"file": [f"a/{n}.png" for n in range(COUNT)], column: [f"b/{n}.png" for n in range(COUNT)]}
    rows["site"] = [f"site {n}" for n in range(COUNT)]
    if suffix == "csv":
        lines = [",".join(rows), *(",".join(row) for row in zip(*rows.values(), strict=True))]
        (root / "a.csv").write_text("\n".join(lines))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(rows), root / "a.parquet")
    return f"{root}/a.{suffix}"


def shards(root: Path, ending: str) -> str:
    files = {}
    for number in range(COUNT):
        files |= {f"{number}.{ending}": png(mask(number)), f"{number}.png": png(image(number)), f"{number}.cls": b"1"}
    return write_tar(root / "a.tar", files)


def hub(root: Path, column: str) -> str:
    folder(root / "files", "a/*.png", "b/*.png")
    rows = {
        column: [f"{root}/files/b/{n}.png" for n in range(COUNT)],
        "pixel_values": [f"{root}/files/a/{n}.png" for n in range(COUNT)],
    }
    made = datasets.Dataset.from_dict(rows)
    for name in rows:
        made = made.cast_column(name, datasets.Image())
    made.save_to_disk(root / "set")
    return f"hf:{root}/set"


@pytest.mark.parametrize(
    ("made", "options"),
    [
        (lambda root: folder(root, "images/*.png", "masks/*.png"), {}),
        (lambda root: folder(root, "*.png", "*_mask.png"), {}),
        (lambda root: folder(root, "x/*.png", "x/*_seg.png"), {}),
        (lambda root: folder(root, "*.jpeg", "*.png"), {"mask_field": ".png"}),
        (lambda root: folder(root, "*.png", "*.truth.png"), {"mask_field": ".truth.png"}),
        (lambda root: folder(root, "p1/*.png", "p1/seg/*.png"), {"mask_field": "seg/"}),
        (lambda root: folder(root, "p1/rgb/*.png", "p1/seg/*.png"), {"mask_field": "seg/", "image_field": "rgb/"}),
        (lambda root: folder(root, "*_rgb.png", "*_gt.png"), {"mask_field": "_gt", "image_field": "_rgb"}),
        (lambda root: table(root, "mask"), {}),
        (lambda root: table(root, "Annotation", "parquet"), {}),
        (lambda root: table(root, "truth"), {"mask_field": "truth"}),
        (lambda root: shards(root, "mask.png"), {}),
        (lambda root: shards(root, "seg.png"), {}),
        (lambda root: shards(root, "truth.png"), {"mask_field": "truth", "image_field": "png"}),
        (lambda root: hub(root, "annotation"), {}),
        (lambda root: hub(root, "label"), {}),
        (lambda root: hub(root, "truth"), {"mask_field": "truth"}),
    ],
)
def test_masks_are_the_same_wherever_they_stand(tmp_path, made, options):
    source = open_segmentation(made(tmp_path), **options)
    assert len(source) == COUNT
    assert source.class_names == ["0", "1", "2"]
    assert source.coding.reading() == "class numbers 0 to 2"
    for number in range(COUNT):
        sample = source.read(number)
        assert np.array_equal(sample.image.numpy(), image(number).transpose(2, 0, 1))
        assert np.array_equal(sample.named["mask"].numpy(), mask(number))
        assert sample.key == source.key(number)
    assert len(list(source.stored(2))) == 2
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint() == source.fingerprint()
    assert np.array_equal(again.read_mask(1).numpy(), mask(1))


def test_images_without_a_mask_are_left_out_and_told(tmp_path, capsys):
    table(tmp_path, "mask")
    text = (tmp_path / "a.csv").read_text().replace("b/2.png", "")
    (tmp_path / "a.csv").write_text(text)
    source = open_segmentation(f"{tmp_path}/a.csv")
    assert [source.key(index) for index in range(len(source))] == ["a/0.png", "a/1.png", "a/3.png"]
    assert "1 of 4 images have no mask and are left out: a/2.png" in capsys.readouterr().err
    files = {"1.png": png(image(1)), "2.png": png(image(2)), "2.mask.png": png(mask(2))}
    source = open_segmentation(write_tar(tmp_path / "a.tar", files))
    assert [source.key(index) for index in range(len(source))] == ["a.tar/2.png"]
    assert np.array_equal(source.read_mask(0).numpy(), mask(2))
    assert "1 of 2 images have no mask and are left out: a.tar/1.png" in capsys.readouterr().err


def test_rows_of_a_split_are_images_with_masks_of_their_own(tmp_path):
    name = table(tmp_path, "mask")
    lines = (tmp_path / "a.csv").read_text().splitlines()
    splits = ["split", "train", "train", "test", "train"]
    (tmp_path / "a.csv").write_text("\n".join(f"{line},{split}" for line, split in zip(lines, splits, strict=True)))
    train = open_segmentation(f"{name}:train")
    test = open_segmentation(f"{name}:test", coding=train.coding)
    assert (len(train), len(test), test.key(0)) == (3, 1, "a/2.png")
    assert np.array_equal(test.read_mask(0).numpy(), mask(2))
    assert train.fingerprint() != test.fingerprint()


def test_classes_are_named_by_a_file_beside_a_table_or_shards(tmp_path):
    for name in (table(tmp_path / "t", "mask"), shards(tmp_path / "t", "seg.png")):
        (tmp_path / "t" / "classes.txt").write_text("road\nsky\ntree\n")
        assert open_segmentation(name).class_names == ["road", "sky", "tree"]


def spoilt(root: Path, name: str) -> str:
    """Return a table or shards of which a mask is of another size than its image."""
    wrong = png(np.zeros((5, 5), np.uint8))
    if name == "table":
        made = table(root, "mask")
        (root / "b" / "1.png").write_bytes(wrong)
        return made
    return write_tar(root / "a.tar", {"1.png": png(image(1)), "1.mask.png": wrong})


@pytest.mark.parametrize(("name", "file"), [("table", "b/1.png"), ("shards", "a.tar/1.mask.png")])
def test_a_mask_of_another_size_is_refused_by_name(tmp_path, name, file):
    made = spoilt(tmp_path, name)
    with pytest.raises(UsageError, match=rf"the mask .*{file} is 5x5 and its image 14x10; they must be of one size"):
        open_segmentation(made)


def test_masks_that_are_not_there_are_named(tmp_path):
    name = table(tmp_path, "mask")
    (tmp_path / "b" / "3.png").unlink()
    with pytest.raises(UsageError, match=r"1 of 4 masks listed are not below .*: b/3.png$"):
        open_segmentation(name)
    folder(tmp_path / "f", "*.png", "*_gt.png")
    (tmp_path / "f" / "2_gt.png").unlink()
    with pytest.raises(UsageError, match=r"the image 2.png has no mask of that name in"):
        open_segmentation(str(tmp_path / "f"), mask_field="_gt")


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (lambda root: table(root, "truth"), {}, r"has no column of masks \(its columns: file, truth, site\); --mask"),
        (lambda root: table(root, "truth"), {"mask_field": "trut"}, r"mask_field is trut, and .* did you mean truth\?"),
        (lambda root: shards(root, "truth.png"), {}, r"has no masks \(its files and keys: cls, png, truth.png\)"),
        (
            lambda root: shards(root, "seg.png"),
            {"mask_field": "seq.png"},
            r"mask_field is seq.png, and .*mean seg.png\?",
        ),
        (lambda root: hub(root, "truth"), {}, r"has no column of masks \(its columns: truth, pixel_values\)"),
        (
            lambda root: hub(root, "truth"),
            {"mask_field": "truths"},
            r"mask_field is truths, and .* did you mean truth\?",
        ),
        (lambda root: folder(root, "*.png", "*_gt.png"), {"mask_field": "_tg"}, "mask_field is _tg, and no file in"),
        (lambda root: folder(root, "*.png", "*_gt.png"), {}, r"a mask beside each image .* --mask_field says"),
        (lambda root: shards(root, "mask.png"), {"include": "*.png"}, "include is .* cannot obey"),
    ],
)
def test_fields_that_are_not_there_are_refused_with_those_that_are(tmp_path, made, options, message):
    with pytest.raises(UsageError, match=message):
        open_segmentation(made(tmp_path), **options)


def test_compressed_shards_cannot_be_read_by_number(tmp_path):
    files = {"1.png": png(image(1)), "1.mask.png": png(mask(1))}
    with pytest.raises(UsageError, match=r"a\.tar\.gz is compressed"):
        open_segmentation(write_tar(tmp_path / "a.tar.gz", files, "w:gz"))


def test_a_broken_mask_in_shards_is_an_unreadable_image(tmp_path):
    files = {"1.png": png(image(1)), "1.mask.png": png(mask(1)), "2.png": png(image(2)), "2.mask.png": b"junk"}
    source = open_segmentation(write_tar(tmp_path / "a.tar", files))
    with pytest.raises(UnreadableImageError, match=r"a.tar/2.mask.png.*its mask cannot be read"):
        source.read(1)
    shutil.rmtree(tmp_path)
