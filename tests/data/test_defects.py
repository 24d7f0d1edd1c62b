"""Images of good and defect parts: the layouts of published sets, masks by name, and what is refused."""

from __future__ import annotations

import csv
import gzip
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from patchloom.data.defect_masks import find_masks, read_defect
from patchloom.data.defects import open_defects, open_tested
from patchloom.errors import UsageError

SIZE = (20, 16)  # width, height


def picture(path, seed=0, size=SIZE, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(path)


def mask(path, box=(2, 3, 5, 6), size=SIZE, value=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", size)
    if box:
        image.paste(value, box)
    image.save(path)


def mvtec(root, good="good"):
    for number in range(6):
        picture(root / "train" / good / f"{number:03}.png", number)
    for number in range(2):
        picture(root / "test" / good / f"{number:03}.png", 10 + number)
        picture(root / "test/crack" / f"{number:03}.png", 20 + number)
        mask(root / "ground_truth/crack" / f"{number:03}_mask.png")
    picture(root / "test/hole/000.png", 30)
    mask(root / "ground_truth/hole/000_mask.png", (0, 0, 4, 4))
    return root


@pytest.mark.parametrize(("good", "name"), [("good", "mvtec:{}:bottle"), ("ok", "{}/bottle")])
def test_mvtec_and_btech(tmp_path, good, name):
    mvtec(tmp_path / "bottle", good)
    sets = open_defects(name.format(tmp_path))
    assert len(sets.good) == 6
    assert sets.test.kinds == ["crack", "crack", "good", "good", "hole"] if good == "good" else True
    assert sets.test.labels.tolist() == [int(kind != "good") for kind in sets.test.kinds]
    crack = sets.test.kinds.index("crack")
    expected = torch.zeros(16, 20, dtype=torch.uint8)
    expected[3:6, 2:5] = 1
    assert torch.equal(sets.test.read(crack).named["mask"], expected)
    assert not sets.test.read(sets.test.kinds.index("good")).named["mask"].any()
    assert sets.test.read(crack).value.shape == (3, 16, 20)


def test_a_folder_per_kind_is_split_and_masks_lie_beside(tmp_path):
    for number in range(10):
        picture(tmp_path / "MT_Free/Imgs" / f"{number}.jpg", number, mode="L")
        mask(tmp_path / "MT_Free/Imgs" / f"{number}.png", None)
    for number in range(3):
        picture(tmp_path / "MT_Crack/Imgs" / f"{number}.jpg", 20 + number, mode="L")
        mask(tmp_path / "MT_Crack/Imgs" / f"{number}.png")
    sets = open_defects(str(tmp_path), good="mt_free", test_share=0.3)
    assert len(sets.good) == 7
    assert sorted(sets.test.kinds) == ["MT_Crack"] * 3 + ["good"] * 3
    learnt = {sets.good.key(index) for index in range(7)}
    assert not learnt & {sets.test.key(index) for index in range(6)}
    assert all(sets.test.read(number).named["mask"].any() == (sets.test.labels[number] == 1) for number in range(6))
    again = open_defects(str(tmp_path), good="mt_free", test_share=0.3)
    assert [again.good.key(index) for index in range(7)] == [sets.good.key(index) for index in range(7)]


def test_masks_beside_defects_may_be_told_by_their_ending(tmp_path):
    for number in range(4):
        picture(tmp_path / "ok" / f"{number}.png", number)
        picture(tmp_path / "bent" / f"{number}.png", number)
        mask(tmp_path / "bent" / f"{number}_mask.png")
    sets = open_defects(str(tmp_path), test_share=0.5)
    assert len(sets.good) == 2
    assert sorted(sets.test.kinds) == ["bent"] * 4 + ["good"] * 2
    assert sets.test.has_masks


@pytest.mark.parametrize("apart", [False, True])
def test_without_folders_of_kinds_masks_say_which_images_are_good(tmp_path, apart):
    for number in range(10):
        picture(tmp_path / "data" / f"kos{number:02}" / "Part0.jpg", number)
        beside = tmp_path / "data" / f"kos{number:02}" / "Part0_label.bmp"
        mask(
            tmp_path / "masks" / f"kos{number:02}" / "Part0.png" if apart else beside,
            None if number < 7 else (1, 1, 4, 4),
        )
    sets = open_defects(str(tmp_path / "data"), masks=str(tmp_path / "masks") if apart else None, test_share=0.3)
    assert len(sets.good) == 5
    assert sorted(sets.test.kinds) == ["defect"] * 3 + ["good"] * 2
    assert {sets.test.key(number)[:5] for number in np.flatnonzero(sets.test.labels)} == {"kos07", "kos08", "kos09"}


def test_good_images_alone_have_nothing_to_measure_on(tmp_path):
    for number in range(3):
        picture(tmp_path / f"{number}.png", number)
    sets = open_defects(str(tmp_path))
    assert len(sets.good) == 3
    assert sets.test is None


def test_what_is_measured_on_may_lie_elsewhere(tmp_path):
    for number in range(3):
        picture(tmp_path / "parts" / f"{number}.png", number)
        picture(tmp_path / "check/good" / f"{number}.png", number)
        picture(tmp_path / "check/bent" / f"{number}.png", number)
        mask(tmp_path / "masks" / f"bent/{number}.png", value=1)
    sets = open_defects(str(tmp_path / "parts"), test=str(tmp_path / "check"), masks=str(tmp_path / "masks"))
    assert sets.test.kinds == ["bent"] * 3 + ["good"] * 3
    assert int(sets.test.read(0).named["mask"].sum()) == 9
    without = open_defects(str(tmp_path / "parts"), test=str(tmp_path / "check"))
    assert not without.test.has_masks
    assert "mask" not in without.test.read(0).named


def test_visa_is_read_by_its_table(tmp_path):
    rows = [("candle", "train", "normal", f"candle/Data/Images/Normal/{n}.JPG", "") for n in range(3)]
    rows += [("candle", "test", "normal", "candle/Data/Images/Normal/3.JPG", "")]
    rows += [("candle", "test", "anomaly", "candle/Data/Images/Anomaly/0.JPG", "candle/Data/Masks/Anomaly/0.png")]
    for row in rows:
        picture(tmp_path / row[3])
        if row[4]:
            mask(tmp_path / row[4], value=3)
    (tmp_path / "split_csv").mkdir()
    with (tmp_path / "split_csv/1cls.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("object", "split", "label", "image", "mask"), *rows])
    sets = open_defects(f"visa:{tmp_path}:candle")
    assert len(sets.good) == 3
    assert sets.test.labels.tolist() == [0, 1]
    assert int(sets.test.read(1).named["mask"].sum()) == 9
    with pytest.raises(UsageError, match="no object 'pcb'"):
        open_defects(f"visa:{tmp_path}:pcb")


def test_a_soft_mask_is_cut_at_half(tmp_path):
    values = np.tile(np.linspace(0, 200, 40).astype(np.uint8), (4, 1))
    Image.fromarray(values).save(tmp_path / "soft.png")
    assert torch.equal(read_defect(tmp_path / "soft.png", "soft"), torch.tensor((values >= 100).astype(np.uint8)))
    Image.fromarray((np.eye(4) * 65535).astype(np.uint16)).save(tmp_path / "deep.png")
    assert torch.equal(read_defect(tmp_path / "deep.png", "deep"), torch.eye(4, dtype=torch.uint8))


def test_a_mask_of_two_candidates_is_refused(tmp_path):
    mask(tmp_path / "a.png")
    mask(tmp_path / "a_mask.png")
    with pytest.raises(UsageError, match="holds two masks for a"):
        find_masks(["a.jpg"], tmp_path)


def test_masks_in_one_folder_are_found_by_name_alone_where_that_says_which(tmp_path):
    mask(tmp_path / "0.png")
    assert find_masks(["bent/0.png", "bent/1.png"], tmp_path) == [tmp_path / "0.png", None]
    with pytest.raises(UsageError, match="may be of several images called 0"):
        find_masks(["bent/0.png", "cut/0.png"], tmp_path)


def test_wrong_folders_are_refused_with_what_would_be_right(tmp_path):
    root = mvtec(tmp_path / "bottle")
    with pytest.raises(UsageError, match="there are bottle"):
        open_defects(f"mvtec:{tmp_path}:cup")
    with pytest.raises(UsageError, match="--good names it"):
        open_defects(str(root), good="fine")
    picture(root / "test/hole/001.png")
    with pytest.raises(UsageError, match=r"hole/001\.png .* has no mask"):
        open_defects(str(root))
    mask(root / "ground_truth/hole/001_mask.png", size=(9, 9))
    with pytest.raises(UsageError, match="is 9x9 and its image 20x16"):
        open_defects(str(root))


def test_a_defect_among_the_good_images_is_refused(tmp_path):
    root = mvtec(tmp_path / "bottle")
    mask(root / "ground_truth/good/003_mask.png")
    with pytest.raises(UsageError, match=r"003\.png is to be learnt from as good"):
        open_defects(str(root))
    mask(root / "ground_truth/good/003_mask.png", None)
    assert len(open_defects(str(root)).good) == 6


def test_deep_grey_images_are_read_by_one_range_and_repeated_to_three_channels(tmp_path):
    for number, top in enumerate((400, 4000)):
        pixels = np.linspace(0, top, SIZE[0] * SIZE[1]).reshape(SIZE[1], SIZE[0]).astype(np.uint16)
        path = tmp_path / "good" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    dark, bright = (open_defects(str(tmp_path)).good.read(number).image for number in range(2))
    assert dark.shape == (3, SIZE[1], SIZE[0])
    assert torch.equal(dark[0], dark[2])
    assert float(dark.max() / bright.max()) == pytest.approx(0.1, rel=0.02)


def test_of_defects_alone_every_image_has_one(tmp_path):
    picture(tmp_path / "crack/0.png")
    assert open_tested(str(tmp_path)).labels.tolist() == [1]


def shards(path, parts):
    """Write images with what belongs to each: name to (class or None, box of the mask, or None for no mask)."""
    with tarfile.open(path, "w") as archive:
        for number, (name, (kind, box)) in enumerate(parts.items()):
            files = {"png": io.BytesIO()}
            rng = np.random.default_rng(number)
            Image.fromarray(rng.integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)).save(files["png"], "PNG")
            if box is not None:
                files["mask.png"] = io.BytesIO()
                drawn = Image.new("L", SIZE)
                if box:
                    drawn.paste(255, box)
                drawn.save(files["mask.png"], "PNG")
            if kind is not None:
                files["cls"] = io.BytesIO(kind.encode())
            for ending, content in files.items():
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content.getvalue())
                archive.addfile(member, io.BytesIO(content.getvalue()))
    return str(path)


BOX = (2, 3, 5, 6)


def test_masks_in_shards_say_which_images_are_good(tmp_path):
    pytest.importorskip("webdataset")
    parts = {f"{n:03}": (None, BOX if n % 3 == 0 else () if n % 3 == 1 else None) for n in range(9)}
    sets = open_defects(shards(tmp_path / "parts.tar", parts), test_share=0.5)
    assert len(sets.good) == 3
    assert sorted(sets.test.labels.tolist()) == [0] * 3 + [1] * 3
    for index, label in enumerate(sets.test.labels):
        assert int(sets.test.read(index).named["mask"].sum()) == 9 * label
    assert sets.test.has_masks


def test_classes_in_shards_say_which_images_are_good(tmp_path):
    pytest.importorskip("webdataset")
    parts = {f"{n:03}": (kind, BOX if kind == "hole" else None) for n, kind in enumerate(["good"] * 6 + ["hole"] * 2)}
    name = shards(tmp_path / "parts.tar", parts)
    sets = open_defects(name, test_share=0.5)
    assert sets.test.kinds == ["good"] * 3 + ["hole"] * 2
    assert open_tested(name).labels.tolist() == [0] * 6 + [1] * 2
    alone = open_defects(shards(tmp_path / "good.tar", {f"{n}": (None, None) for n in range(4)}), test=name)
    assert (len(alone.good), len(alone.test)) == (4, 8)


@pytest.mark.parametrize(
    ("parts", "options", "match"),
    [
        ({"0": ("good", BOX), "1": ("hole", BOX)}, {}, "said to be good, and its mask shows a defect"),
        ({"0": ("good", None), "1": (None, None)}, {}, "has no class, where others have one"),
        ({"0": ("good", None), "1": ("hole", BOX), "2": ("hole", None)}, {}, r"/2\.png .*has no mask, where others"),
        ({"0": ("good", None)}, {"masks": "elsewhere"}, "masks of shards lie in them"),
    ],
)
def test_shards_that_contradict_themselves_are_refused(tmp_path, parts, options, match):
    pytest.importorskip("webdataset")
    with pytest.raises(UsageError, match=match):
        open_defects(shards(tmp_path / "parts.tar", parts), **options)


def test_compressed_shards_are_refused_for_defects(tmp_path):
    pytest.importorskip("webdataset")
    name = shards(tmp_path / "parts.tar", {"0": (None, None)})
    packed = tmp_path / "parts.tar.gz"
    packed.write_bytes(gzip.compress((tmp_path / "parts.tar").read_bytes()))
    assert len(open_defects(name).good) == 1
    with pytest.raises(UsageError, match=r"compressed shards give none; unpack them to \.tar"):
        open_defects(str(packed))
