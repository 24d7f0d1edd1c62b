"""Sources of images with masks: layouts, and what is refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from patchloom.base.mask_settings import MaskSettings
from patchloom.data import UnreadableImageError
from patchloom.data.segmentation import CAMVID, colours, open_segmentation
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
    assert sample.image.shape == (3, 40, 52)
    image, mask = sample.image, sample.named["mask"]
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
    ],
)
def test_what_cannot_be_paired_is_refused(tmp_path, change, message):
    root = paint_pairs(tmp_path / "set")
    change(root)
    with pytest.raises(UsageError, match=message):
        open_segmentation(str(root))


def test_no_such_folder_is_refused():
    for name in ("clips:nowhere", "volumes:nowhere", "frames:nowhere"):
        with pytest.raises(UsageError, match=f"{name} are no images with masks"):
            open_segmentation(name)
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
    assert torch.equal(source.read_mask(1), source.read(1).named["mask"])


def test_masks_with_a_file_per_class_are_put_together(tmp_path):
    for number in range(3):
        save(tmp_path / f"images/{number}.jpg", np.zeros((4, 4, 3)))
    half = np.array([[0, 0, 255, 255]] * 4)
    for layout, name in (("folder", "{c}/{n}.png"), ("ending", "{n}_{c}.png")):
        root = tmp_path / layout
        (root).mkdir()
        (root / "images").symlink_to(tmp_path / "images")
        for number in range(3):
            save(root / "masks" / name.format(c="traffic_light", n=number), half)
            if number:
                save(root / "masks" / name.format(c="car", n=number), half.T)
        source = open_segmentation(str(root))
        assert source.class_names == ["background", "car", "traffic_light"]
        assert source.read_mask(0).tolist() == [[0, 0, 2, 2]] * 4
        assert source.read_mask(1).tolist() == [[0, 0, 2, 2]] * 2 + [[1, 1, 2, 2]] * 2
        assert "one file per class" in source.said()
        assert "1 times a class has no file" in source.said()
        rest = open_segmentation(str(root), settings=MaskSettings(ignore_label="rest"))
        assert rest.class_names == ["car", "traffic_light"]
        assert rest.read_mask(0).tolist() == [[255, 255, 1, 1]] * 4
        (root / "classes.txt").write_text("traffic_light\ncar\n")
        assert open_segmentation(str(root)).class_names == ["background", "traffic_light", "car"]
        save(root / "masks" / name.format(c="depth", n=0), np.arange(16).reshape(4, 4) * 9)
        with pytest.raises(UsageError, match=r"several masks for each image .*two values each"):
            open_segmentation(str(root))


def test_masks_that_all_end_alike_are_one_mask_for_each_image(tmp_path):
    for number in range(2):
        save(tmp_path / f"images/{number}.jpg", np.zeros((4, 4, 3)))
        save(tmp_path / f"masks/{number}_seg.png", np.eye(4) * 255)
    assert open_segmentation(str(tmp_path)).read_mask(1).tolist() == np.eye(4, dtype=int).tolist()


def test_the_reading_settled_on_one_source_holds_for_another(tmp_path):
    for part, scale in (("train", 200), ("test", 200), ("other", 1)):
        save(tmp_path / part / "images/a.png", np.zeros((4, 4, 3)))
        save(tmp_path / part / "masks/a.png", np.eye(4) * scale)
    save(tmp_path / "test/masks/a.png", np.full((4, 4), 200))
    train = open_segmentation(str(tmp_path / "train"))
    assert open_segmentation(str(tmp_path / "test"), coding=train.coding).read_mask(0).tolist() == [[1] * 4] * 4
    with pytest.raises(UsageError, match=r"a\.png holds the value 1, which has no class; .* 0 is background, 200 is"):
        open_segmentation(str(tmp_path / "other"), coding=train.coding)


def test_a_table_beside_the_masks_names_their_colours(tmp_path):
    save(tmp_path / "images/a.png", np.zeros((2, 2, 3)))
    save(tmp_path / "masks/a.png", [[[0, 0, 0], [64, 128, 64]], [[64, 128, 64], [192, 0, 128]]])
    (tmp_path / "label_colors.txt").write_text("64 128 64\tAnimal\n192 0 128\tArchway\n0 0 0\tVoid\n")
    source = open_segmentation(str(tmp_path))
    assert source.class_names == ["Animal", "Archway"]
    assert source.palette == [(64, 128, 64), (192, 0, 128)]
    assert source.read_mask(0).tolist() == [[255, 0], [0, 1]]


def test_palettes_in_another_order_are_refused(tmp_path):
    for part, palette in (("train", [0, 0, 0, 255, 0, 0, 0, 0, 255]), ("test", [0, 0, 0, 0, 0, 255, 255, 0, 0])):
        save(tmp_path / part / "images/a.png", np.zeros((3, 3, 3)))
        mask = Image.frombytes("P", (3, 3), bytes([0, 1, 2] * 3))
        mask.putpalette(palette)
        (tmp_path / part / "masks").mkdir()
        mask.save(tmp_path / part / "masks/a.png")
    train = open_segmentation(str(tmp_path / "train"))
    with pytest.raises(UsageError, match="in another order: #0000ff is number 1, and 2 in those"):
        open_segmentation(str(tmp_path / "test"), coding=train.coding)
