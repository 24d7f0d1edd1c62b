"""Sources of images with masks: layouts, and what is refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from patchloom.data import UnreadableImageError
from patchloom.data.segmentation import CAMVID, colours, open_segmentation, split_mask
from patchloom.errors import UsageError
from segment_support import paint_pairs


def save(path, values, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8), mode).save(path)


def test_paired_folders_read_indices_not_colours(tmp_path):
    source = open_segmentation(str(paint_pairs(tmp_path / "set")))
    assert len(source) == 4
    assert source.class_names == ["0", "1", "2"]
    assert source.palette[:3] == [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
    sample = source.read(2)
    assert sample.image.shape == (4, 40, 52)
    image, mask = split_mask(sample.image)
    expected = np.asarray(Image.open(tmp_path / "set/masks/2.png"))
    assert np.array_equal(mask.numpy(), expected)
    assert float(image[0][mask == 1].float().mean()) > 190
    assert pickle.loads(pickle.dumps(source)).fingerprint() == source.fingerprint()


def test_names_come_from_a_file_beside_and_masks_may_have_an_ending(tmp_path):
    for name in ("a/x", "b/x"):
        save(tmp_path / "train/images" / f"{name}.jpg", np.zeros((8, 8, 3)))
        save(tmp_path / "train/labels" / f"{name}_mask.png", np.full((8, 8), 1))
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    source = open_segmentation(str(tmp_path / "train"))
    assert source.class_names == ["road", "sky"]
    assert source.key(1) == "b/x.jpg"


@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_camvid_in_both_layouts(tmp_path, layout):
    images, masks = ("train", "trainannot") if layout == "flat" else ("train/images", "train/labels")
    save(tmp_path / images / "a.png", np.zeros((4, 6, 3)))
    save(tmp_path / masks / "a.png", np.arange(24).reshape(4, 6) % 12)
    source = open_segmentation(f"camvid:{tmp_path}:train")
    assert source.class_names == list(CAMVID)
    assert len(source.class_names) == 11
    mask = source.read_mask(0)
    assert int(mask[1, 5]) == 255  # 11 is void
    assert int(mask[1, 4]) == 10
    assert source.palette[0] == (128, 128, 128)
    with pytest.raises(UsageError, match="unknown split 'tests'; did you mean test"):
        open_segmentation(f"camvid:{tmp_path}:tests")
    with pytest.raises(UsageError, match="no CamVid in"):
        open_segmentation(f"camvid:{tmp_path}:val")


def test_ade20k_counts_from_one_and_zero_is_unknown(tmp_path):
    save(tmp_path / "images/training/a.jpg", np.zeros((2, 3, 3)))
    save(tmp_path / "annotations/training/a.png", [[0, 1, 2], [150, 0, 7]])
    source = open_segmentation(f"ade20k:{tmp_path}")
    assert source.read_mask(0).tolist() == [[255, 0, 1], [149, 255, 6]]
    assert len(source.class_names) == 150
    rows = "\n".join(f"{n}\t0.1\t1\t1\t0\tname {n}, other" for n in range(1, 151))
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n" + rows)
    assert open_segmentation(f"ade20k:{tmp_path}:train").class_names[1] == "name 2"
    save(tmp_path / "annotations/training/a.png", [[151, 1, 2], [3, 0, 7]])
    with pytest.raises(UsageError, match=r"holds the value 151; .* has 150 classes, numbered from 1"):
        open_segmentation(f"ade20k:{tmp_path}").read(0)


def test_changed_files_change_the_fingerprint(tmp_path):
    root = paint_pairs(tmp_path / "set")
    before = open_segmentation(str(root)).fingerprint()
    save(root / "masks/0.png", np.ones((40, 52)))
    assert open_segmentation(str(root)).fingerprint() != before


def test_colours_of_many_classes_differ():
    assert len(set(colours(150))) == 150


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "images/1.png").unlink(), r"the mask 1\.png has no image of that name"),
        (lambda root: (root / "masks/1.png").unlink(), r"the image 1\.png has no mask of that name"),
        (lambda root: [(root / f"masks/{n}.png").unlink() for n in (1, 2)], r"1\.png \(and 1 more\) has no mask"),
        (lambda root: save(root / "images/1.jpg", np.zeros((4, 4, 3))), "two files for 1"),
        (lambda root: [p.unlink() for p in (root / "masks").iterdir()], "no image in .*masks"),
        (lambda root: (root / "masks").rename(root / "truth"), "a folder images and a folder masks"),
        (lambda root: [save(p, np.full((40, 52), 255)) for p in (root / "masks").iterdir()], "hold no class"),
        (lambda root: save(root / "masks/0.png", np.zeros((40, 52, 3))), "is in colour"),
    ],
)
def test_what_cannot_be_paired_is_refused(tmp_path, change, message):
    root = paint_pairs(tmp_path / "set")
    change(root)
    with pytest.raises(UsageError, match=message):
        open_segmentation(str(root))


def test_no_such_folder_is_refused():
    with pytest.raises(UsageError, match="there is no folder 'nowhere'"):
        open_segmentation("nowhere")


def test_a_mask_that_does_not_fit_names_file_and_value(tmp_path):
    root = paint_pairs(tmp_path / "set")
    save(root / "masks/3.png", np.full((40, 52), 7))
    with pytest.raises(UsageError, match=r"3\.png holds the value 7; .* has 3 classes, numbered from 0, and 255"):
        open_segmentation(str(root), class_names=["a", "b", "c"]).read(3)
    save(root / "masks/3.png", np.zeros((40, 50)))
    with pytest.raises(UsageError, match=r"3\.png is 50x40 and its image 52x40"):
        open_segmentation(str(root)).read(3)


def test_a_broken_mask_is_an_unreadable_image(tmp_path):
    root = paint_pairs(tmp_path / "set")
    (root / "masks/0.png").write_bytes(b"no image")
    source = open_segmentation(str(root))
    with pytest.raises(UnreadableImageError, match="its mask cannot be read"):
        source.read(0)
    assert torch.equal(source.read_mask(1), source.read(1).image[-1])
