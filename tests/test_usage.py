"""Bad usage of every command from the command line: one clear sentence, exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from patchloom import cli

PRETRAIN = ["pretrain", "ccvit", "--out", "{tmp}/run", "--encoder", "ccvit_tiny_patch8_64"]
CASES = [
    (["pretrain", "mea", "--data", "photos"], "unknown pretrain method 'mea'"),
    ([*PRETRAIN, "--data", "photos", "--encoder", "ccvit_tiny_patch8_46"], "did you mean ccvit_tiny_patch8_64"),
    (
        [*PRETRAIN, "--data", "photos", "--image_size", "60"],
        "image size 60 is not divisible by patch size 8; use 56 or 64",
    ),
    (
        [*PRETRAIN, "--data", "photos", "--codebook", "{codebook}"],
        "codebook is of patch size 4, the encoder of patch size 8",
    ),
    ([*PRETRAIN, "--data", "{images}", "--k", "4000"], "k is 4000, but"),
    ([*PRETRAIN, "--data", "{tmp}/nowhere"], "nowhere does not exist"),
    ([*PRETRAIN, "--data", "{empty}"], "no image in"),
    ([*PRETRAIN, "--data", "photos", "--out", "{images}"], "is not empty; resume goes on with it"),
    ([*PRETRAIN, "--data", "photos", "--precision", "fp8"], "--precision"),
    (["adapt", "finetune", "--data", "{images}", "--out", "{tmp}/run"], "needs labels"),
    (["adapt", "finetun", "--data", "{images}"], "did you mean finetune"),
    (["evaluate", "knn", "--encoder", "pixels", "--train", "{images}", "--test", "digits"], "has no labels"),
    (["evaluate", "knn", "--encoder", "{tmp}/no/run", "--train", "digits", "--test", "digits:test"], "no/run"),
    (["evaluate", "linear", "--encoder", "pixels", "--train", "digits"], "missing --test"),
    (["tokenize", "fit", "--data", "{images}", "--k", "1000000", "--image_size", "64", "--out", "{tmp}/c"], "1000000"),
    (["tokenize", "fit", "--data", "{empty}", "--out", "{tmp}/c"], "no image in"),
    (["tokenize", "show", "{tmp}/nothing"], "nothing"),
    (["embed", "{tmp}/nothing", "--data", "photos", "--out", "{tmp}/v.npz"], "nothing"),
    (["embed", "ccvit_tiny_patch8_64", "--data", "photos", "--out", "{tmp}/v.csv"], ".parquet or .npz"),
    (["export", "{tmp}/nothing", "--out", "{tmp}/m.onnx"], "nothing"),
    (["import", "ccvti", "{tmp}/x.pth", "--out", "{tmp}/b"], "did you mean ccvit"),
    (["import", "ccvit", "{tmp}/x.pth", "--out", "{tmp}/b"], "there is no checkpoint file"),
    (["demo", "--out", "{images}"], "is not empty"),
    (["list", "--verb", "pretrian"], "did you mean pretrain"),
]


@pytest.mark.parametrize(
    ("arguments", "expected"), CASES, ids=[" ".join(a[:2]) + f" {i}" for i, (a, _) in enumerate(CASES)]
)
def test_one_sentence_and_exit_code_2(arguments, expected, tmp_path, capsys):
    import torch

    from patchloom.tokenizers.centroid import CentroidTokenizer

    places = {name: tmp_path / name for name in ("images", "empty", "codebook")}
    for place in places.values():
        place.mkdir()
    for number in range(4):
        Image.new("L", (70, 90), number * 60).save(places["images"] / f"{number}.png")
    CentroidTokenizer(torch.rand(8, 48), 4).save(places["codebook"] / "codebook.safetensors")
    before = listing(tmp_path)
    code = cli.main([argument.format(tmp=tmp_path, **places) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    assert expected in captured.err
    *notices, sentence = captured.err.splitlines()
    assert sentence.startswith("patchloom: ")
    assert all(line.startswith("settings for ") for line in notices)  # what was settled before the refusal
    assert listing(tmp_path) == before


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
