"""`patchloom tokenize fit` and `tokenize show`: what they write, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchloom.cli import main
from patchloom.tokenizers import CentroidTokenizer, fit_codebook, show_codebook
from patchloom.tokenizers.fitting import default_k

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 39 each.*")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve small noisy images and a broken one."""
    place = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = rng.integers(0, 256, (20 + number, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    (place / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    return place


@pytest.fixture(scope="module")
def codebook(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("books") / "book"
    with pytest.warns(UserWarning, match="could not be read"):
        fit_codebook(str(folder), str(out), k=12, patch_size=8, image_size=16, iters=3)
    return out


def test_fit_writes_codebook_summary_and_picture(codebook: Path):
    tokenizer = CentroidTokenizer.load(codebook)
    summary = json.loads((codebook / "summary.json").read_text())
    assert (tokenizer.num_codes, tokenizer.patch_size) == (12, 8)
    assert summary["fingerprint"] == tokenizer.fingerprint()
    assert (summary["images"], summary["unreadable"], summary["patches"]) == (12, 1, 48)
    assert len(summary["objective"]) == 3
    assert tokenizer.counts is not None
    assert int(tokenizer.counts.sum()) == 48
    with Image.open(codebook / "codebook.png") as picture:
        assert min(picture.size) > 8


def test_show_draws_mosaics_and_reconstructions(codebook: Path, folder: Path, tmp_path: Path):
    out = tmp_path / "pictures"
    shown = show_codebook(str(codebook), str(out), str(folder), images=3, image_size=16)
    assert 0 < shown["usage"] <= 1
    assert shown["tokens"] == 3 * 4
    show_codebook(str(codebook / "codebook.safetensors"), str(out), sort="frequency")
    assert sorted(path.name for path in out.iterdir()) == [
        "codebook-frequency.png",
        "codebook-hue.png",
        "reconstructions.png",
    ]
    with pytest.raises(ValueError, match="exists; give another --out"):
        show_codebook(str(codebook), str(out))
    picture = tmp_path / "deep" / "one.png"
    shown = show_codebook(str(codebook), str(picture), str(folder), images=3, image_size=16)
    assert (shown["mosaic"], shown["reconstructions"]) == (
        str(picture),
        str(picture.with_name("one-reconstructions.png")),
    )
    assert picture.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"one\.jpg; pictures are written as \.png"):
        show_codebook(str(codebook), str(picture.with_suffix(".jpg")))


def test_frequencies_of_a_bare_table_are_counted_on_images(codebook: Path, folder: Path, tmp_path: Path):
    bare = CentroidTokenizer.load(codebook).save(tmp_path / "bare.npy")
    with pytest.raises(ValueError, match="give --data to count"):
        show_codebook(str(bare), sort="frequency")
    shown = show_codebook(str(bare), data=str(folder), sort="frequency", image_size=16)
    assert Path(shown["mosaic"]).is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fit --data {folder} --out {codebook}", "is not an empty folder; give another --out or --overwrite"),
        ("fit --data {folder} --out {tmp} --image_size 225", "225 is not divisible by patch size 16; use 224 or 240"),
        ("fit --data {folder} --out {tmp} --image_size 16 --k 500", "k = 500 clusters need at least 500 points"),
        ("fit --data {folder} --out {tmp} --image_size 16 --init best", "random"),
        ("fit --data {folder} --out {tmp} --image_size 16 --device abacus", "no device 'abacus'"),
        ("fit --data {tmp}/nothing --out {tmp}", "does not exist"),
        ("show {tmp}/nothing", "no codebook at"),
        ("show {codebook} --sort size", "hue"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*could not be read.*")
def test_bad_usage_is_one_sentence_and_exit_code_2(words, message, folder, codebook, tmp_path, capsys):
    line = words.format(folder=folder, codebook=codebook, tmp=tmp_path)
    assert main(["tokenize", *line.split()]) == 2
    complaint = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint.startswith("patchloom: ")
    assert message in complaint
    assert not any(tmp_path.iterdir()), "nothing is written"


def test_default_number_of_centroids():
    assert default_k(10**7) == 8192
    assert default_k(39 * 1024) == 1024
    assert default_k(39 * 1024 - 1) == 512
    assert default_k(5) == 1
