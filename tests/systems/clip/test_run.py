"""Runs of `align clip`: bad captions, resumed runs, locked towers, what open_clip opens."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("open_clip")

import patchloom as pl
from patchloom.data import open_source
from patchloom.errors import UsageError
from patchloom.systems.clip.captions import NO_CAPTION, captioned
from patchloom.systems.clip.config import ClipConfig
from patchloom.systems.clip.method import ClipMethod, _held_out
from patchloom.systems.clip.saved import load_clip
from patchloom.training.metrics import read_metrics

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}
TINY = {
    "encoder": "vitamin_tiny_32",
    "text_width": 16,
    "text_heads": 2,
    "text_layers": 1,
    "context_length": 8,
    "batch_size": 8,
    "drop_path": 0.0,
    "num_workers": 0,
    "probe_every": 0,
    "health_every": 0,
    "report": False,
    "accelerator": "cpu",
    "log_every": 1,
}


def picture(name, seed):
    noise = np.random.default_rng(seed).normal(0, 20, (24, 24, 3))
    return Image.fromarray(np.clip(noise + COLOURS[name], 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A table of images with captions: some are missing, empty, too long, or of files that are none."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for number in range(40):
        name = list(COLOURS)[number % 4]
        picture(name, number).save(folder / f"{number}.png")
        rows.append((f"{number}.png", f"a {name} square number {number}"))
    rows[3] = ("3.png", "")
    rows[4] = ("4.png", "   ")
    rows[5] = ("5.png", "a white square " * 20)
    (folder / "6.png").write_bytes(b"no image at all")
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "caption"), *rows])
    return folder / "pairs.csv"


@pytest.fixture(scope="module")
def run(pairs, tmp_path_factory):
    settings = {**TINY, "max_steps": 8, "val_fraction": 0.2, "report": True}
    return pl.align("clip", data=pairs, out=tmp_path_factory.mktemp("runs") / "one", **settings)


def test_pairs_that_are_none_are_skipped_listed_and_counted(run):
    with (run.path / "skipped.csv").open() as file:
        skipped = {row["file"]: row["reason"] for row in csv.DictReader(file)}
    # What was held out is listed where it is measured.
    missing = [key for key, reason in skipped.items() if reason == NO_CAPTION]
    assert set(skipped) - {"6.png"} == set(missing) <= {"3.png", "4.png"}
    assert run.summary["images_without_caption"] == len(missing)
    assert run.summary["pairs_seen"] == 64
    assert run.summary["captions_cut"] > 0
    assert run.summary["captions"] == "data"
    assert 0 <= run.summary["image_to_text_r1"] <= run.summary["image_to_text_r10"] <= 1
    assert "accuracy" not in run.summary  # there are no classes


def test_the_report_shows_what_is_found(run):
    page = run.report.read_text(encoding="utf-8")
    for words in ("Captions found for images", "Images found for captions", "R@5", "square number"):
        assert words in page


def test_broken_off_and_resumed_equals_never_broken_off(pairs, run, tmp_path, monkeypatch):
    from patchloom.systems.clip.method import ClipMethod

    settings = {**TINY, "max_steps": 8, "val_fraction": 0.2, "checkpoint_every": 3, "out": tmp_path / "cut"}
    after = ClipMethod.after_step

    def cut(method):
        after(method)
        if method.step == 4:
            raise RuntimeError("the power is off")

    monkeypatch.setattr(ClipMethod, "after_step", cut)
    with pytest.raises(RuntimeError, match="the power is off"):
        pl.align("clip", data=pairs, **settings)
    monkeypatch.setattr(ClipMethod, "after_step", after)
    again = pl.align("clip", out=tmp_path / "cut", resume=True)
    whole, resumed = load_clip(run.path).state_dict(), load_clip(again.path).state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    first, second = (
        [(row["step"], row["loss"]) for row in read_metrics(path / "metrics.csv") if "loss" in row]
        for path in (run.path, again.path)
    )
    assert first == second
    assert again.summary["pairs_seen"] == 64


def test_the_encoder_is_a_bundle_and_the_towers_come_back(run):
    towers = load_clip(run.path)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(pl.load(run.model)(images), towers.visual.trunk(images))


@pytest.mark.slow
def test_open_clip_alone_gives_the_same_features(pairs, tmp_path):
    """Of a model that timm has by name, and of one whose size the name does not tell."""
    for size in (None, 32):
        settings = {**TINY, "encoder": "vit_tiny_patch16_224", "max_steps": 1, "batch_size": 2, "val_fraction": 0.0}
        run = pl.align("clip", data=pairs, out=tmp_path / f"run{size}", image_size=size, **settings)
        towers = load_clip(run.path)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(1, 3, size or 224, size or 224, generator=generator)
        from patchloom.systems.clip.text import tokenize_all

        with torch.no_grad():
            expected = {
                "images": towers.encode_image(images),
                "texts": towers.encode_text(tokenize_all(["a red cat"], 8)),
            }
        code = (
            "import sys, torch, open_clip\n"
            f"name = 'local-dir:' + {str(run.model / 'open_clip')!r}\n"
            "model = open_clip.create_model(name).eval()\n"
            "tokens = open_clip.get_tokenizer(name)(['a red cat'])\n"
            f"images = torch.randn(1, 3, {size or 224}, {size or 224}, generator=torch.Generator().manual_seed(0))\n"
            "assert 'patchloom' not in sys.modules\n"
            "with torch.no_grad():\n"
            "    found = {'images': model.encode_image(images), 'texts': model.encode_text(tokens)}\n"
            f"torch.save(found, {str(tmp_path / 'found.pt')!r})\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
        found = torch.load(tmp_path / "found.pt", weights_only=True)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0)


def test_a_locked_text_tower_stays_to_the_bit(run, pairs, tmp_path):
    settings = {**TINY, "max_steps": 3, "val_fraction": 0.0, "lock": "text", "text_from": run.path}
    locked = pl.align("clip", data=pairs, out=tmp_path / "locked", **settings)
    before, after = load_clip(run.path), load_clip(locked.path)
    for name, value in before.text.state_dict().items():
        assert torch.equal(value, after.text.state_dict()[name]), name
    assert not torch.equal(before.visual.head.proj.weight, after.visual.head.proj.weight)
    assert before.logit_scale != after.logit_scale


def test_a_locked_encoder_stays_to_the_bit(run, pairs, tmp_path):
    settings = {**TINY, "encoder": str(run.model), "max_steps": 3, "val_fraction": 0.0, "lock": "image"}
    locked = pl.align("clip", data=pairs, out=tmp_path / "locked", **settings)
    before, after = load_clip(run.path), load_clip(locked.path)
    for name, value in before.visual.trunk.state_dict().items():
        assert torch.equal(value, after.visual.trunk.state_dict()[name]), name
    assert not torch.equal(before.text.text_projection, after.text.text_projection)


def test_chunks_learn_what_the_whole_batch_learns(run, pairs, tmp_path):
    settings = {**TINY, "max_steps": 8, "val_fraction": 0.2, "chunk_size": 2}
    chunks = pl.align("clip", data=pairs, out=tmp_path / "chunks", **settings)
    losses = [
        [row["loss"] for row in read_metrics(path / "metrics.csv") if "loss" in row] for path in (run.path, chunks.path)
    ]
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)
    assert losses[0] == pytest.approx(losses[1], abs=2e-2)  # AdamW makes much of what is nearly nothing


def test_labels_make_captions_and_classes_are_named_without_training(tmp_path, capsys):
    for name in COLOURS:
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(6):
            picture(name, number).save(tmp_path / "images" / name / f"{number}.png")
    run = pl.align(
        "clip", data=tmp_path / "images", out=tmp_path / "run", **{**TINY, "max_steps": 2, "val_fraction": 0.3}
    )
    assert "has no captions; they are made of its class names" in capsys.readouterr().err
    assert run.summary["captions"] == "labels"
    assert 0 <= run.summary["accuracy"] <= run.summary["accuracy_top5"] <= 1
    assert run.summary["majority_share"] == pytest.approx(0.25, abs=0.1)
    assert json.loads((run.model / "open_clip" / "open_clip_config.json").read_text())["model_cfg"]["embed_dim"] == 16


def refused(match, **settings):
    with pytest.raises(pl.UsageError, match=match):
        pl.align("clip", **{**TINY, **settings})


def test_what_cannot_be_is_refused_in_one_sentence(pairs, run, tmp_path):
    (tmp_path / "bare").mkdir()
    picture("red", 0).save(tmp_path / "bare" / "0.png")
    out = {"out": tmp_path / "run", "max_steps": 1}
    refused("has no captions or classes: give a table", data=tmp_path / "bare", **out)
    refused("lock=text needs a trained text tower", data=pairs, lock="text", **out)
    refused(
        "lock=image keeps the encoder as it is, and vitamin_tiny_32 has random weights", data=pairs, lock="image", **out
    )
    refused(
        r"embed_dim is 32, and the text tower of .* puts captions in a space of 16; leave embed_dim out",
        data=pairs,
        text_from=run.path,
        embed_dim=32,
        **out,
    )
    refused("batch_size 8 is not a multiple of chunk_size 3", data=pairs, chunk_size=3, **out)
    refused("normalises by batch", data=pairs, encoder="resnet10t", chunk_size=4, **out)
    refused("there are no aligned towers at", data=pairs, text_from=tmp_path / "bare", **out)
    refused("'a photo' has not", data=pairs, templates=("a photo",), **out)


def test_a_table_without_any_caption_is_refused(tmp_path):
    picture("red", 0).save(tmp_path / "0.png")
    picture("red", 1).save(tmp_path / "1.png")
    (tmp_path / "empty.csv").write_text("file,caption\n0.png,\n1.png,\n")
    refused("no image of .*empty.csv' is readable; the first is '0.png': it has no caption|no captions or classes",
            data=tmp_path / "empty.csv", out=tmp_path / "run", max_steps=1, val_fraction=0.0)  # fmt: skip


def test_an_image_with_several_captions_is_a_pair_with_each_on_one_side(pairs, tmp_path):
    table = pairs.parent / "several.csv"
    rows = [f"{number}.png,{text} {number}" for number in range(10, 30) for text in ("a square", "a picture")]
    table.write_text("\n".join(["file,caption", *rows]))
    source = captioned(open_source(str(table)), "data", ())
    assert [source.read(index).named["caption"] for index in (0, 1, 2)] == [
        "a square 10",
        "a picture 10",
        "a square 11",
    ]
    learnt, held = _held_out(ClipConfig(data=str(table), out=str(tmp_path), val_fraction=0.25), source)
    assert (len(learnt), len(held)) == (30, 10)
    names = [{part.key(index) for index in range(len(part))} for part in (learnt, held)]
    assert not names[0] & names[1]


def test_a_column_of_sentences_is_not_taken_for_classes(pairs):
    table = pairs.parent / "otherwise.csv"
    table.write_text(pairs.read_text().replace("caption", "beschreibung"))
    with pytest.raises(UsageError, match=r"look like captions .*caption_field"):
        ClipMethod.open_data(ClipConfig(data=str(table), out="unused"))


def test_pairs_of_shards_are_streamed_and_tests_are_named_apart(pairs, tmp_path, capsys):
    pytest.importorskip("webdataset")
    import io
    import tarfile

    with tarfile.open(tmp_path / "train-000000.tar", "w") as shard:
        for number in range(24):
            buffer = io.BytesIO()
            picture(list(COLOURS)[number % 4], number).save(buffer, "JPEG")
            files = {"jpg": buffer.getvalue(), "txt": f"a {list(COLOURS)[number % 4]} square".encode()}
            if number == 5:
                files.pop("txt")
            if number == 6:
                files["txt"] = b"\xff\xfe not UTF-8 \xff"
            for ending, content in files.items():
                entry = tarfile.TarInfo(f"{number:04d}.{ending}")
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))
    settings = {**TINY, "max_steps": 6, "test": pairs}
    run = pl.align("clip", data=str(tmp_path / "train-000000.tar"), out=tmp_path / "run", **settings)
    assert run.summary["images_without_caption"] == 1
    assert run.summary["unreadable_images"] == 2
    assert run.summary["held_out_pairs"] == 40
    assert "image_to_text_r1" in run.summary
    bare = pl.align("clip", data=str(tmp_path / "train-000000.tar"), out=tmp_path / "bare", **TINY, max_steps=1)
    assert "is a stream: no pairs of it are held out" in capsys.readouterr().err
    assert "image_to_text_r1" not in bare.summary


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_whole_batch(tmp_path):
    losses = []
    for count in (1, 2):
        settings = {**TINY, "batch_size": 8 // count, "max_steps": 3, "val_fraction": 0.0, "devices": count}
        command = [
            sys.executable,
            "-m",
            "patchloom",
            "align",
            "clip",
            "--data",
            "photos",
            "--out",
            tmp_path / str(count),
        ]
        command += [f"--{name}={value}" for name, value in settings.items()]
        subprocess.run(list(map(str, command)), check=True, cwd=tmp_path, capture_output=True)
        rows = read_metrics(tmp_path / str(count) / "metrics.csv")
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
