"""`patchloom data inspect | dedup | split | curate | shards` on a folder with planted copies."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from patchloom.cli import main
from patchloom.curation.config import CurateConfig, DedupConfig, InspectConfig, ShardsConfig, SplitConfig
from patchloom.curation.curate import run_curate
from patchloom.curation.dedup import run_dedup
from patchloom.curation.inspect import run_inspect
from patchloom.curation.shards import run_shards
from patchloom.curation.split import run_split
from patchloom.data import open_source
from patchloom.encoders import create_encoder
from patchloom.errors import UsageError

QUICK = {"num_workers": 0, "device": "cpu"}


def picture(seed: int, size: tuple[int, int] = (60, 80)) -> Image.Image:
    """Return a picture with structure at many scales."""
    rng = np.random.default_rng(seed)
    layers = [
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize(
            size[::-1], Image.Resampling.BICUBIC
        )
        for side in (3, 6, 12)
    ]
    mixed = np.mean([np.asarray(layer, dtype=float) for layer in layers], axis=0)
    return Image.fromarray(mixed.astype(np.uint8))


@pytest.fixture(scope="module")
def pile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty-five pictures of two classes; copies of seven, one of them in the other class; three in the test, too."""
    root = tmp_path_factory.mktemp("pile")
    for number in range(55):
        folder = root / "train" / ("cat" if number % 3 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / f"{number:03d}.png")
    cats = root / "train" / "cat"
    for number in (1, 2):
        picture(number).save(cats / f"copy-jpeg-{number}.jpg", quality=50)
    for number in (4, 5):
        picture(number).resize((40, 30)).save(cats / f"copy-small-{number}.png")
    for number in (7, 8):
        ImageEnhance.Brightness(picture(number)).enhance(1.15).save(cats / f"copy-bright-{number}.png")
    picture(3).save(cats / "copy-other-class-3.jpg", quality=60)
    (cats / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no image")
    Image.new("RGB", (60, 60), (7, 30, 60)).save(cats / "plain.png")
    for number in [10, 11, 12, *range(200, 210)]:
        folder = root / "test" / "cat"
        folder.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / f"{number}.jpg", quality=70)
    return root


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_inspect_finds_every_planted_fault(pile: Path, tmp_path: Path) -> None:
    figures = run_inspect(
        InspectConfig(data=str(pile / "train"), test=str(pile / "test"), out=str(tmp_path / "look"), **QUICK)
    )
    planted = {"images": 63, "broken": 1, "plain": 1, "copies": 7, "groups": 7, "labelled_apart": 1, "leaked": 3}
    assert {name: figures[name] for name in planted} == planted
    assert figures["classes"] == {"cat": 44, "dog": 19}
    assert "3 images have a copy in the test" in figures["verdict"]
    rows = {row["file"]: row for row in rows_of(tmp_path / "look" / "images.csv")}
    assert rows["cat/010.png"]["copy_in_test"] == "cat/10.jpg"
    assert rows["cat/broken.png"]["broken"]
    assert rows["cat/001.png"]["group"] == rows["cat/copy-jpeg-1.jpg"]["group"] != ""
    assert json.loads((tmp_path / "look" / "summary.json").read_text())["copies"] == 7
    page = (tmp_path / "look" / "report.html").read_text()
    assert all(title in page for title in ("Copies in the test", "Copies with different labels", "Near-duplicates"))
    with pytest.raises(UsageError, match="earlier look"):
        run_inspect(InspectConfig(data=str(pile / "train"), out=str(tmp_path / "look"), **QUICK))


def test_dedup_keeps_the_largest_of_each_and_can_be_read_as_data(pile: Path, tmp_path: Path) -> None:
    out = tmp_path / "lists" / "kept.csv"
    figures = run_dedup(DedupConfig(data=str(pile / "train"), against=str(pile / "test"), out=str(out), **QUICK))
    assert (figures["kept"], figures["copies"], figures["leaked"]) == (53, 7, 3)
    left_out = {Path(row["file"]).name: row for row in rows_of(out.with_name("kept-left-out.csv"))}
    assert {"copy-small-4.png", "copy-small-5.png", "010.png", "011.png"} <= left_out.keys()
    assert left_out["copy-small-4.png"]["copy_of"] == "cat/004.png"
    source = open_source(str(out), quiet=True)
    assert len(source) == 53
    assert source.class_names == ["cat", "dog"]
    assert source.read(0).image.shape == (3, 60, 80)


def test_captions_go_along(pile: Path, tmp_path: Path) -> None:
    table = pile / "captions.csv"
    rows = [("001.png", "a cat"), ("copy-jpeg-1.jpg", "its copy"), ("002.png", "another")]
    table.write_text("file,caption\n" + "".join(f"train/cat/{name},{caption}\n" for name, caption in rows))
    out = tmp_path / "kept.csv"
    run_dedup(DedupConfig(data=str(table), out=str(out), threshold=0.7, **QUICK))
    assert [row["caption"] for row in rows_of(out)] == ["a cat", "another"]


def test_parts_share_no_copy_and_no_group_and_have_the_classes_of_the_whole(pile: Path, tmp_path: Path) -> None:
    names = [path for path in sorted((pile / "train").rglob("*.*")) if path.name != "broken.png"]
    groups = tmp_path / "groups.csv"
    keys = [path.relative_to(pile / "train").as_posix() for path in names]
    groups.write_text("key,group\n" + "".join(f"{key},{n if n > 4 else 0}\n" for n, key in enumerate(keys)))
    out = tmp_path / "split.csv"
    figures = run_split(
        SplitConfig(data=str(pile / "train"), out=str(out), parts="a=0.5,b=0.5", groups=str(groups), **QUICK)
    )
    part = {Path(row["file"]).name: row["split"] for row in rows_of(out)}
    assert part["001.png"] == part["copy-jpeg-1.jpg"]
    assert part["003.png"] == part["copy-other-class-3.jpg"]
    assert len({part[Path(key).name] for key in keys[:5]}) == 1
    assert [row["share"] for row in figures["parts"]] == pytest.approx([0.5, 0.5], abs=0.06)
    assert [row["dog"] / row["images"] for row in figures["parts"]] == pytest.approx([0.3, 0.3], abs=0.08)
    assert len(open_source(f"{out}:a", quiet=True)) + len(open_source(f"{out}:b", quiet=True)) == 63


def test_shards_hold_the_files_as_they_are_and_go_on(pile: Path, tmp_path: Path) -> None:
    config = ShardsConfig(data=str(pile / "train"), out=str(tmp_path / "shards"), shard_mb=1)
    figures = run_shards(config)
    source = open_source(figures["data"].replace("{000000..000000}", "000000"), quiet=True, by_index=True)
    folder = open_source(str(pile / "train"), quiet=True)
    assert source.class_names == folder.class_names
    labels = Counter(source.labels.tolist())
    assert labels == Counter(folder.labels.tolist())
    first = next(n for n in range(len(source)) if source.key(n).endswith("001.png"))
    there = next(n for n in range(len(folder)) if folder.key(n).endswith("001.png"))
    assert (source.read(first).image == folder.read(there).image).all()
    assert run_shards(config)["written"] == 0
    (tmp_path / "shards" / "images-000000.tar").unlink()
    assert run_shards(config)["written"] == 1
    with pytest.raises(UsageError, match="other images"):
        run_shards(ShardsConfig(data=str(pile / "test"), out=str(tmp_path / "shards")))


def test_an_encoder_finds_copies_and_chooses(pile: Path, tmp_path: Path) -> None:
    how = {**QUICK, "encoder": create_encoder("vit_micro_patch4_32")}
    figures = run_inspect(InspectConfig(data=str(pile / "train"), **how))
    assert figures["compared_by"] == "features of the encoder"
    assert figures["copies_made"] >= 200
    chosen = run_curate(CurateConfig(data=str(pile / "train"), out=str(tmp_path / "few.csv"), count=20, **how))
    assert (chosen["chosen"], chosen["levels"]) == (20, [15])
    assert len(open_source(str(tmp_path / "few.csv"), quiet=True)) == 20


def test_curating_needs_an_encoder(pile: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="encoder"):
        run_curate(CurateConfig(data=str(pile / "train"), out=str(tmp_path / "few.csv"), count=10, **QUICK))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("train=0.8", "sum to 1"),
        ("a=0.5,a=0.5", "names and shares"),
        ("train", "names and shares"),
        ("a=1,b=0", "above 0"),
    ],
)
def test_parts_that_are_no_shares_are_refused(parts: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SplitConfig(data="photos", out="x.csv", parts=parts)


def test_what_is_no_file_is_refused_in_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["data", "split", "digits", "--out", str(tmp_path / "x.csv"), "--together", "false"]) == 2
    assert "lists files" in capsys.readouterr().err
