"""What values of masks are taken for: recognised, asked about, never silently wrong."""

from __future__ import annotations

import io
import json
import pickle

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageFilter

from patchloom.base.mask_settings import MaskSettings
from patchloom.data.mask_settling import settle
from patchloom.data.mask_survey import Survey, open_mask, survey_files
from patchloom.data.mask_table import parse_table, read_table
from patchloom.data.mask_values import check_shares
from patchloom.errors import UsageError

BLOB = np.zeros((60, 80), np.uint8)
BLOB[20:40, 10:50] = 1
THREE = BLOB.copy()
THREE[5:15, 60:75] = 2
PHOTO = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)


def grey(values):
    return Image.fromarray(np.asarray(values, np.uint8))


def jpeg(values, quality=75):
    kept = io.BytesIO()
    Image.fromarray(values).save(kept, "JPEG", quality=quality)
    return Image.open(kept)


def indexed(values, colours):
    image = Image.frombytes("P", values.shape[::-1], values.tobytes())
    image.putpalette(np.asarray(colours, np.uint8).ravel().tolist())
    return image


def survey_of(*images):
    survey = Survey()
    for number, image in enumerate(images):
        survey.add(image, f"{number}.png")
    return survey


def read(*images, names=None, **settings):
    survey = survey_of(*images)
    coding = settle(survey, "set", MaskSettings(**settings), names=names)
    return coding, coding.decode(images[-1]), coding.shares(survey)


@pytest.mark.parametrize(
    "image",
    [
        grey(BLOB),
        grey(BLOB * 255),
        grey(BLOB * 128),
        grey(BLOB * 193 + 7),
        grey(BLOB * 255).convert("1"),
        jpeg(BLOB * 255),
        jpeg(BLOB * 255, 30),
        jpeg(np.repeat(BLOB[..., None] * 255, 3, 2)),
        Image.fromarray(np.repeat(BLOB[..., None] * 200, 3, 2)),
        Image.fromarray(BLOB.astype(np.uint16) * 65535),
        Image.fromarray(BLOB.astype(np.float32)),
        Image.fromarray(np.dstack([np.full((60, 80, 3), 9, np.uint8), BLOB * 255])),
        indexed(BLOB, COLOURS),
        indexed(1 - BLOB, [[255] * 3, [0] * 3]),
        Image.fromarray(COLOURS[BLOB]),
    ],
)
def test_binary_masks_of_every_kind_mean_the_same(image):
    coding, classes, shares = read(image)
    assert np.array_equal(classes, BLOB)
    assert classes.dtype == np.int64
    assert list(shares.classes.values()) == pytest.approx([1 - BLOB.mean(), BLOB.mean()])
    assert shares.ignored == 0
    # What was taken can be said, and then reads the same masks the same.
    again = settle(survey_of(image), "set", MaskSettings(mask_values=json.dumps(coding.table())))
    assert np.array_equal(again.decode(image), classes)
    assert pickle.loads(pickle.dumps(coding)) == coding


@pytest.mark.parametrize("image", [grey(THREE), indexed(THREE, COLOURS), Image.fromarray(THREE.astype(np.uint16))])
def test_class_numbers_are_themselves(image):
    coding, classes, _ = read(image)
    assert np.array_equal(classes, THREE)
    assert coding.names == ("0", "1", "2")
    assert not coding.guess


def test_255_beside_class_numbers_is_unknown_and_alone_beside_0_the_object():
    values = THREE.copy()
    values[:4] = 255
    coding, classes, shares = read(grey(values))
    assert np.array_equal(classes, values)
    assert shares.ignored == pytest.approx(4 / 60)
    assert "--mask_values 0,1,2,255" in coding.guess
    coding, classes, shares = read(grey(BLOB * 255))
    assert (coding.names, shares.ignored) == (("background", "foreground"), 0)
    assert "--ignore_label 255" in coding.guess
    line = coding.line("set", shares)
    assert line.startswith("masks of set: 0 is background, 255 is foreground; background: 83.3 %, foreground: 16.7 %")
    assert "a guess" in line
    assert np.array_equal(read(grey(values), ignore_label="none", mask_values="0,1,2,255")[1] == 3, values == 255)
    names = ["a", "b", "c"]  # with three classes, 255 cannot be the second
    assert int((read(grey(BLOB * 255), names=names)[1] == 255).sum()) == BLOB.sum()


def test_masks_of_which_some_hold_1_and_others_255_are_asked_about():
    ones, tops = grey(BLOB), grey(BLOB * 255)
    with pytest.raises(
        UsageError, match=r"some .* hold 0 and 1 \(0.png\), others 0 and 255 \(1.png\), and none holds both"
    ):
        read(ones, tops)
    with pytest.raises(UsageError, match="--mask_values 0=soil,1=crop,255=crop"):
        read(ones, tops, names=["soil", "crop"])
    assert np.array_equal(read(ones, tops, mask_values="0=soil,1=crop,255=crop")[1], BLOB)
    assert read(ones, tops, ignore_label="255")[2].ignored == pytest.approx(BLOB.mean() / 2)
    both = BLOB.copy()
    both[0] = 255
    assert read(ones, tops, grey(both))[2].ignored > 0  # 255 stands beside 1, so it is another thing


def test_names_apply_to_two_levels_and_to_as_many_levels_as_there_are_names():
    assert read(grey(BLOB * 255), names=["crack"])[0].names == ("background", "crack")
    assert read(jpeg(BLOB * 255), names=["soil", "crop"])[0].names == ("soil", "crop")
    coding, classes, _ = read(grey(THREE * 100), names=["soil", "crop", "weed"])
    assert np.array_equal(classes, THREE)
    assert "in order of the names" in coding.guess


def test_colours_are_classes_in_the_order_of_a_table_or_of_their_codes():
    image = Image.fromarray(COLOURS[THREE])
    coding, classes, _ = read(image)
    assert coding.names == ("#000000", "#00ff00", "#ff0000")
    assert coding.palette == ((0, 0, 0), (0, 255, 0), (255, 0, 0))
    table = "#000000=soil,#ff0000=crop,#00ff00=weed"
    assert np.array_equal(read(image, mask_values=table)[1], THREE)
    noisy = np.kron(THREE, np.ones((4, 4), np.uint8))
    classes = read(jpeg(COLOURS[noisy], 95), mask_values=table)[1]
    assert (classes == noisy).mean() > 0.99
    assert np.array_equal(read(image, foreground="#ff0000")[1], THREE == 1)
    # The same colours at other indices: the colours count.
    other = indexed(np.array([0, 2, 1], np.uint8)[THREE], COLOURS[[0, 2, 1]])
    assert np.array_equal(read(indexed(THREE, COLOURS), other, mask_values=table)[1], THREE)
    assert np.array_equal(read(indexed(THREE, COLOURS), other)[1], np.array([0, 2, 1])[THREE])


@pytest.mark.parametrize(
    ("foreground", "expected"),
    [(128, lambda x: x >= 128), ("100..200", lambda x: (x >= 100) & (x <= 200)), ("..99", lambda x: x <= 99)],
)
def test_soft_masks_take_a_threshold_or_a_range(foreground, expected):
    soft = np.asarray(grey(BLOB * 255).filter(ImageFilter.GaussianBlur(6)))
    assert np.array_equal(read(grey(soft), foreground=foreground)[1], expected(soft))
    shares = np.asarray(soft, np.float32) / 255
    assert np.array_equal(read(Image.fromarray(shares), foreground="0.5")[1], shares >= 0.5)


def test_foreground_is_a_value_where_there_are_few_and_the_rest_is_background():
    values = np.array([[0, 5, 15, 255]], np.uint8)
    assert read(grey(values), foreground=15)[1].tolist() == [[0, 0, 1, 255]]
    assert read(grey(values), foreground=15, ignore_label="none")[1].tolist() == [[0, 0, 1, 0]]
    assert read(grey([[7, 200]]), foreground=7)[1].tolist() == [[1, 0]]
    assert read(grey([[0, 128, 255]]), foreground=255, ignore_label=128)[1].tolist() == [[0, 255, 1]]
    assert read(grey([[0, 128, 255]]), ignore_label=128)[1].tolist() == [[0, 255, 1]]
    assert read(grey([[0, 255]]), foreground=128)[1].tolist() == [[0, 1]]
    assert read(grey([[0, 90, 200]]), mask_values="..99=a,100..=b", ignore_label="90")[1].tolist() == [[0, 255, 1]]


def test_soft_edges_of_two_levels_are_a_guess_with_a_threshold():
    large = np.kron(BLOB, np.ones((20, 20), np.uint8)) * 255
    soft = np.asarray(grey(large).filter(ImageFilter.GaussianBlur(2)))
    coding, classes, _ = read(grey(soft))
    assert np.array_equal(classes, soft >= 128)
    assert "--foreground takes another threshold" in coding.guess


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            grey(np.arange(4800).reshape(60, 80) % 48 * 5),
            r"hold 48 values: .*0 \(.*235 \(.*and others.*--foreground 1",
        ),
        (
            grey(np.arange(4800).reshape(60, 80) % 48),
            r"hold 48 values.*--mask_values 0\.\.47 if they",
        ),
        (grey(BLOB * 255).filter(ImageFilter.GaussianBlur(6)), r"hold \d+ values: .*--foreground"),
        (grey([[0, 128, 255]]), r"hold 3 values: 0 \(33\.3 %\), 128 .*--mask_values 0,128,255"),
        (jpeg(BLOB), r"values \(JPEG\): 0"),
        (jpeg(COLOURS[THREE]), r"JPEGs in colour, with \d+ colours .*--mask_values '#000000=background"),
        (
            Image.fromarray(PHOTO),
            "images in colour, with more",
        ),
        (grey(np.full((4, 4), 255)), "hold no class, only the value 255"),
    ],
)
def test_what_could_mean_many_things_is_asked_about(image, message):
    with pytest.raises(UsageError, match=message):
        read(image)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"foreground": 300}, r"foreground is 300\.\., and no mask of set holds that; they hold 0 "),
        ({"foreground": "white"}, "foreground holds 'white'; give a value"),
        ({"foreground": 255, "mask_values": "0,255"}, "give one of them"),
        ({"foreground": 255, "ignore_label": 255}, "and no mask of set holds that"),
        ({"mask_values": "0=a,0..255=b"}, r"0\.\.255 and 0 of masks overlap"),
        (
            {"mask_values": "0=a,128=b", "ignore_label": "none"},
            r"the value 255, which has no class; .* 0 is a, 128 is b",
        ),
        ({"mask_values": "none.txt"}, "there is no such file"),
        ({"ignore_label": "rest"}, "one mask for each image, so there is no rest"),
    ],
)
def test_settings_that_contradict_the_masks_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        read(grey(BLOB * 255), **settings)


def test_one_class_left_is_refused_and_much_ignored_is_said_or_refused():
    coding, _, shares = read(grey(BLOB * 255), ignore_label=255)
    with pytest.raises(UsageError, match=r"hold one class only, 0, and 16\.7 % is ignored"):
        check_shares(coding, shares, "set")
    values = THREE.copy()
    values[:, 40:] = 255
    values[50:, :30] = 2
    values[:10] = 255
    coding, _, shares = read(grey(values))
    with pytest.raises(UsageError, match=r"are ignored, which was a guess; 255 is taken as unknown"):
        check_shares(coding, shares, "set")
    coding, _, shares = read(grey(values), ignore_label=255)
    assert "of the pixels of the masks of set are ignored" in check_shares(coding, shares, "set")
    assert check_shares(*read(grey(THREE))[::2], "set") is None


def test_colours_that_no_eye_tells_apart_are_no_classes():
    soft = Image.fromarray(COLOURS[BLOB]).filter(ImageFilter.BoxBlur(0.3))
    with pytest.raises(UsageError, match=r"some are nearly alike.*rest=ignore"):
        read(soft)
    _, classes, shares = read(soft, mask_values="#000000=background,#ff0000=object,rest=ignore")
    assert np.array_equal(classes == 1, np.asarray(soft)[..., 0] == 255)
    assert 0 < shares.ignored < 0.1


@pytest.mark.parametrize("quality", [30, 80])
def test_webp_with_loss_is_taken_as_jpeg_is(tmp_path, quality):
    for number, settings in enumerate([{"quality": quality}, {"lossless": True}]):
        grey(BLOB * 255).save(tmp_path / f"{number}.webp", **settings)
        mask = open_mask(tmp_path / f"{number}.webp", "a.webp")
        assert survey_of(mask).lossy == (number == 0)
    classes = read(open_mask(tmp_path / "0.webp", "a"), mask_values="#000000=soil,#ffffff=crop")[1]
    assert np.array_equal(classes, BLOB)


@pytest.mark.parametrize("kind", ["float64", "float16", "int64", "uint32", ">u2"])
def test_numbers_of_any_type_are_class_numbers(tmp_path, kind):
    tifffile.imwrite(tmp_path / "a.tif", THREE.astype(kind))
    np.save(tmp_path / "a.npy", THREE.astype(kind))
    for name in ("a.tif", "a.npy"):
        assert np.array_equal(read(open_mask(tmp_path / name, name))[1], THREE)


def test_masks_none_of_which_can_be_read_say_why(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    tifffile.imwrite(tmp_path / "b.tif", np.stack([BLOB, BLOB]), photometric="minisblack")
    for name, reason in (("a.png", "it is no image"), ("b.tif", "it holds 2 pages; store one mask a file")):
        with pytest.raises(UsageError, match=f"none of 1 masks can be read; of the first, {name}, .*{reason}"):
            survey_files([(tmp_path / name, name)])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "0 soil\n100 crop\n200 weed\n"),
        ("a.csv", "name,value\nsoil,0\ncrop,100\nweed,200\n"),
        ("a.json", '{"0": "soil", "100": "crop", "200": "weed"}'),
        ("label_colors.txt", "0 0 0 soil\n255 0 0\tcrop\n0 255 0\tweed\n"),
        ("class_dict.csv", "name,r,g,b\nsoil,0,0,0\ncrop,255,0,0\nweed,0,255,0\n"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nsoil:0,0,0::\ncrop:255,0,0::\nweed:0,255,0::\n"),
    ],
)
def test_tables_in_files_are_read_in_the_layouts_people_have(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    image = grey(THREE * 100) if name.startswith("a.") else Image.fromarray(COLOURS[THREE])
    coding, classes, _ = read(image, mask_values=str(tmp_path / name))
    assert coding.names == ("soil", "crop", "weed")
    assert np.array_equal(classes, THREE)
    assert [entry.name for entry in read_table(tmp_path / name)] == ["soil", "crop", "weed"]


def test_values_of_one_name_are_one_class_and_ignore_is_none():
    coding, classes, _ = read(grey([[0, 1, 2, 3]]), mask_values="0=road,1=car,2=car,3=ignore")
    assert classes.tolist() == [[0, 1, 1, 255]]
    assert coding.names == ("road", "car")
    assert len(parse_table("0..149")) == 1


def test_a_count_is_kept_on_disk_and_dozens_of_levels_are_refused_before_all_is_read(tmp_path, monkeypatch):
    files = []
    for number in range(40):
        grey(THREE).save(tmp_path / f"{number}.png")
        files.append((tmp_path / f"{number}.png", f"{number}.png"))
    monkeypatch.setattr("patchloom.data.mask_survey.SLOW", -1.0)
    seen = []
    first = survey_files(files, "stamp", lambda survey: seen.append(survey.masks))
    assert seen == [32]
    for file, _ in files:
        file.unlink()
    again = survey_files(files, "stamp")
    assert again == first
    assert again.masks == 40
