"""Evaluations end to end on small images; what they refuse."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score

import patchloom as pl
from patchloom import registry
from patchloom.data import open_source
from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.evaluate.statistics.figures import classification_figures
from patchloom.evaluate.statistics.predictions import Predictions
from patchloom.evaluate.target import EvaluationConfig, labelled_features, resolve_encoder
from patchloom.features.extract import Features
from patchloom.features.knn import knn_predict
from patchloom.models.bundle import load, save_bundle
from patchloom.statistics.intervals import bootstrap_interval
from patchloom.statistics.metrics import SCORES, exact_share
from patchloom.terminal.options import help_texts
from small_images import CLASSIFIERS, QUICK, TINY, write_images


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("data")
    return {
        "train": str(write_images(root / "train", 12)),
        "test": str(write_images(root / "test", 8, seed=1)),
    }


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> str:
    torch.manual_seed(0)
    encoder = create_encoder("ccvit_tiny_patch4_32", image_size=16, **TINY)
    with torch.no_grad():
        encoder.norm.weight.fill_(0.5)  # tells these weights from fresh ones
    return str(save_bundle(encoder, tmp_path_factory.mktemp("bundles") / "b"))


@pytest.mark.parametrize("protocol", CLASSIFIERS)
@pytest.mark.parametrize("kind", ["bundle", "pixels", "untrained"])
def test_every_protocol_measures_every_kind_of_encoder(protocol, kind, bundle, data):
    encoder = {"bundle": bundle, "pixels": "pixels", "untrained": bundle}[kind]
    result = pl.evaluate(protocol, encoder=encoder, untrained=kind == "untrained", **data, **QUICK)
    assert 0.34 < result["accuracy"] <= 1
    assert result["n"] == 24
    assert result["train_images"] == 36
    assert result["dim"] == (3 * 32 * 32 if kind == "pixels" else 48)
    low, high = result["interval"]
    assert 0 <= low < result["accuracy"] <= high + 1e-9 <= 1 + 1e-9
    assert list(result["per_class_accuracy"]) == ["blue", "green", "red"]
    assert result["balanced_accuracy"] == pytest.approx(np.mean(list(result["per_class_accuracy"].values())))
    assert result["skipped"] == []
    json.dumps(result)


@pytest.mark.parametrize("protocol", CLASSIFIERS)
def test_the_same_request_gives_the_same_figures(protocol, bundle, data):
    first, second = (pl.evaluate(protocol, encoder=bundle, untrained=True, **data, **QUICK) for _ in range(2))
    del first["seconds"], second["seconds"]
    assert first == second


def test_knn_is_the_vote_over_these_features(bundle, data):
    train, test, _ = labelled_features(EvaluationConfig(encoder=bundle, **data, **QUICK))
    said = knn_predict(train.vectors, train.labels, test.vectors, k=3, temperature=0.1, num_classes=3)
    result = pl.evaluate("knn", encoder=bundle, k=3, temperature=0.1, **data, **QUICK)
    assert result["accuracy"] == pytest.approx(float((said == test.labels).double().mean()))
    assert pl.evaluate("knn", encoder=bundle, k=1000, **data, **QUICK)["k"] == 36


def test_the_linear_probe_never_chooses_its_penalty_on_the_test_images(bundle, data, tmp_path):
    other = str(write_images(tmp_path / "other", 5, seed=7))
    choices = {
        pl.evaluate("linear", encoder=bundle, train=data["train"], test=test, **QUICK)["c"]
        for test in (data["test"], other)
    }
    assert len(choices) == 1
    assert pl.evaluate("linear", encoder=bundle, c=0.03, **data, **QUICK)["c"] == 0.03


def test_an_encoder_may_be_a_module(bundle, data):
    module = load(bundle).train()
    by_path, by_module = (pl.evaluate("knn", encoder=encoder, **data, **QUICK) for encoder in (Path(bundle), module))
    assert by_path["accuracy"] == by_module["accuracy"]
    assert module.training


def test_untrained_means_fresh_weights_of_the_same_shape(bundle):
    trained = load(bundle)
    for named in (bundle, trained):
        fresh, again, other = (
            resolve_encoder(EvaluationConfig(encoder=named, train="a", test="b", untrained=True, seed=seed))
            for seed in (0, 0, 1)
        )
        assert {k: v.shape for k, v in fresh.state_dict().items()} == {
            k: v.shape for k, v in trained.state_dict().items()
        }
        assert float(fresh.norm.weight.detach()[0]) == 1.0
        weights = [encoder.blocks[0].attn.qkv.weight for encoder in (fresh, again, other)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])
    assert float(trained.norm.weight.detach()[0]) == 0.5


def test_drawing_fresh_weights_leaves_the_callers_randomness_alone(bundle):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    resolve_encoder(EvaluationConfig(encoder=bundle, train="a", test="b", untrained=True))
    assert torch.equal(torch.rand(1), expected)


def test_a_name_without_published_weights_is_not_measured_as_if_it_had_some(data):
    with pytest.raises(UsageError, match="ccvit_tiny_patch4_32 has no published weights"):
        pl.evaluate("knn", encoder="ccvit_tiny_patch4_32", **data, **QUICK)
    name = EvaluationConfig(encoder="ccvit_tiny_patch4_32", untrained=True, image_size=16, train="a", test="b")
    assert resolve_encoder(name).patch_embed.img_size == (16, 16)


def test_a_timm_name_means_its_published_weights(monkeypatch):
    asked = {}

    def create(name, **kwargs):
        asked.update(kwargs, name=name)
        return create_encoder(name, image_size=32, **TINY)

    monkeypatch.setattr("patchloom.encoders.create_backbone", create)
    resolve_encoder(EvaluationConfig(encoder="vit_tiny_patch16_224", train="a", test="b"))
    assert asked == {"name": "vit_tiny_patch16_224", "pretrained": True}


def test_weights_that_cannot_be_fetched_are_said_in_one_sentence(monkeypatch):
    def create(name, **kwargs):
        raise FileNotFoundError("no connection\nto the hub")

    monkeypatch.setattr("patchloom.encoders.create_backbone", create)
    with pytest.raises(UsageError, match=r"vit_tiny_patch16_224 could not be fetched .*connection to the hub\); give"):
        resolve_encoder(EvaluationConfig(encoder="vit_tiny_patch16_224", train="a", test="b"))


def test_another_image_size_is_taken(bundle, data):
    result = pl.evaluate("knn", encoder=bundle, image_size=24, **data, **QUICK)
    assert result["dim"] == 48
    with pytest.raises(UsageError, match="not divisible by patch size 4"):
        pl.evaluate("knn", encoder=bundle, image_size=18, **data, **QUICK)


def test_grey_encoders_get_grey_images(tmp_path, data):
    encoder = create_encoder("ccvit_tiny_patch4_32", image_size=16, in_chans=1, **TINY)
    save_bundle(encoder, tmp_path / "grey")
    assert pl.evaluate("knn", encoder=str(tmp_path / "grey"), **data, **QUICK)["n"] == 24


def test_test_images_may_lack_a_class(bundle, data, tmp_path):
    some = str(write_images(tmp_path / "some", 8, classes=("green", "red"), seed=1))
    result = pl.evaluate("knn", encoder="pixels", train=data["train"], test=some, **QUICK)
    assert list(result["per_class_accuracy"]) == ["green", "red"]
    assert result["accuracy"] > 0.34  # labels are matched by name, not by number


def test_a_broken_image_is_left_out_and_listed(data, tmp_path):
    folder = write_images(tmp_path / "t", 4, seed=3)
    (folder / "red" / "broken.png").write_bytes(b"not an image")
    result = pl.evaluate("knn", encoder="pixels", train=data["train"], test=str(folder), **QUICK)
    assert result["n"] == 12
    assert result["unreadable_images"] == 1
    assert result["skipped"][0]["file"] == "red/broken.png"


def test_figures_are_written_when_asked_for(bundle, data, tmp_path):
    out = tmp_path / "deep" / "figures.json"
    result = pl.evaluate("knn", encoder=bundle, out=str(out), **data, **QUICK)
    assert json.loads(out.read_text()) == result
    with pytest.raises(UsageError, match="exists; choose another out"):
        pl.evaluate("knn", encoder=bundle, out=str(out), **data, **QUICK)


def test_figures_are_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    truth, said = (torch.randint(0, 4, (50,), generator=generator) for _ in range(2))
    truth[truth == 2] = 1  # a class that does not occur
    features = Features(torch.zeros(50, 2), truth, [""] * 50, [("x", "y")])
    predictions = Predictions([""] * 50, said.numpy(), truth.numpy(), "accuracy", list("abcd"))
    found = classification_figures(predictions, features, features._replace(keys=[""] * 50))
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, said))
    present = [0, 1, 3]
    recall = recall_score(truth, said, labels=present, average=None, zero_division=0)
    assert list(found["per_class_accuracy"].values()) == pytest.approx(list(recall))
    assert list(found["per_class_accuracy"]) == ["a", "b", "d"]
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, said))
    assert found["unreadable_images"] == 2


@pytest.mark.parametrize(("right", "n"), [(0, 5), (3, 7), (90, 100), (5, 5)])
def test_the_interval_of_an_accuracy_is_exact(right, n):
    expected = binomtest(right, n).proportion_ci(method="exact")
    assert exact_share(right, n, 0.95) == pytest.approx((expected.low, expected.high))


def test_naming_the_larger_class_everywhere_has_an_interval_and_is_seen_through():
    truth = torch.tensor([0] * 28 + [1] * 12)
    features = Features(torch.zeros(40, 2), truth, [str(n) for n in range(40)], [])
    predictions = Predictions(features.keys, np.zeros(40, dtype=int), truth.numpy(), "accuracy", ["a", "b"])
    found = classification_figures(predictions, features, features)
    assert (found["accuracy"], found["balanced_accuracy"], found["majority_share"]) == (0.7, 0.5, 0.7)
    assert found["interval"] == pytest.approx([0.5347, 0.8344], abs=1e-4)
    for low, high in found["intervals"].values():
        assert high - low > 0.1


def test_it_is_said_why_an_interval_is_not_to_be_trusted():
    truth = np.arange(12) % 2
    keys = [str(number) for number in range(12)]
    few = Predictions(keys, truth, truth, "accuracy", ["a", "b", "c"], groups=np.arange(12) % 4)
    assert few.doubts() == ["4 groups of test images are too few for an interval to be trusted"]
    absent = Predictions(keys, truth, truth, "accuracy", ["a", "b", "c"])
    assert absent.doubts() == ["no test image of c: figures and intervals say nothing of them"]
    assert Predictions(keys, truth, truth, "accuracy", ["a", "b"]).doubts() == []
    with pytest.raises(UsageError, match="leave one of resample and groups out"):
        EvaluationConfig(encoder="x", train="a", test="b", groups="g.csv", resample="classes")
    with pytest.raises(UsageError, match="unknown resample 'class'; did you mean classes"):
        EvaluationConfig(encoder="x", train="a", test="b", resample="class")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kk": 3}, "unknown setting 'kk'; did you mean k"),
        ({"k": 0}, "k is 0"),
        ({"k": "many"}, "k is 'many'; expected int"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"pool": "average"}, "unknown pool 'average'; did you mean avg"),
        ({"precision": "8"}, "unknown precision '8'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"image_size": 0}, "image_size is 0"),
        ({"untrained": True}, "raw pixels have no weights"),
        ({"encoder": "vit_tinny_patch16_224"}, "unknown encoder .* did you mean vit_tiny_patch16_224"),
        ({"encoder": torch.nn.Linear(2, 2)}, "a Linear has no name to be made again by"),
        ({"device": "gpu"}, "there is no device 'gpu'"),
    ],
)
def test_what_cannot_be_is_refused(settings, message, data):
    with pytest.raises(UsageError, match=message):
        pl.evaluate("knn", **({"encoder": "pixels"} | data | QUICK | settings))


@pytest.mark.parametrize(("settings", "message"), [({"c": 0.0}, "c is 0.0"), ({"max_iter": 0}, "max_iter is 0")])
def test_the_linear_probe_refuses_what_cannot_be(settings, message, data):
    with pytest.raises(UsageError, match=message):
        pl.evaluate("linear", encoder="pixels", **data, **settings)


def test_missing_settings_are_named():
    with pytest.raises(UsageError, match="missing train and test"):
        pl.evaluate("linear", encoder="pixels")


def test_data_that_cannot_be_used_is_refused(data, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (16, 16)).save(flat / "a.png")
    with pytest.raises(UsageError, match="flat has no labels; put each class in a folder of its own"):
        pl.evaluate("knn", encoder="pixels", train=str(flat), test=data["test"], **QUICK)
    with pytest.raises(UsageError, match="are the same images"):
        pl.evaluate("linear", encoder="pixels", train=data["train"], test=data["train"], **QUICK)
    few = str(write_images(tmp_path / "few", 3, classes=("green", "red")))
    with pytest.raises(UsageError, match=r"classes that .*few does not have: blue"):
        pl.evaluate("knn", encoder="pixels", train=few, test=data["test"], **QUICK)


@pytest.mark.parametrize("protocol", registry.METHODS["evaluate"])
def test_every_setting_has_its_meaning_beside_it(protocol):
    settings_class = registry.settings_class("evaluate", protocol)
    meanings = help_texts(settings_class)
    for field in fields(settings_class):
        assert len(meanings[field.name].split()) > 2, field.name


def test_our_names_are_timms_too():
    assert not timm.models.is_model_pretrained("ccvit_tiny_patch4_32")


def test_every_score_has_an_interval_around_it(bundle, data):
    result = pl.evaluate("knn", encoder=bundle, **data, **QUICK)
    assert (result["score"], result["score_name"]) == (result["accuracy"], "accuracy")
    assert set(result["intervals"]) == {"accuracy", "balanced_accuracy", "macro_f1", "auroc"}
    for name, (low, high) in result["intervals"].items():
        assert low <= result[name] <= high, name
    assert result["interval"] == result["intervals"]["accuracy"]


def test_all_right_is_not_all_sure():
    truth = torch.arange(30) % 3
    features = Features(torch.zeros(30, 2), truth, [str(n) for n in range(30)], [])
    predictions = Predictions(features.keys, truth.numpy(), truth.numpy(), "accuracy", list("abc"))
    found = classification_figures(predictions, features, features)
    assert found["interval"] == pytest.approx(exact_share(30, 30, 0.95))
    assert found["interval"][0] < 0.9


def test_several_numbers_of_neighbours_come_in_one_pass(bundle, data):
    found = pl.evaluate("knn", encoder=bundle, k=5, ks=[1, 3, 1000], **data, **QUICK)["accuracy_by_k"]
    assert list(found) == ["1", "3", "5", "36"]
    for k, accuracy in found.items():
        alone = pl.evaluate("knn", encoder=bundle, k=int(k), **data, **QUICK)["accuracy"]
        assert alone == pytest.approx(accuracy)


def test_images_are_measured_by_the_others_where_train_is_test(bundle, data, tmp_path):
    result = pl.evaluate("knn", encoder=bundle, k=3, train=data["train"], test=data["train"], **QUICK)
    assert result["leave_one_out"]
    assert result["n"] == 36
    features, _, _ = labelled_features(EvaluationConfig(encoder=bundle, **data, **QUICK))
    right = 0
    for number in range(36):
        others = torch.arange(36) != number
        said = knn_predict(features.vectors[others], features.labels[others], features.vectors[[number]], k=3)
        right += int(said) == int(features.labels[number])
    assert result["accuracy"] == pytest.approx(right / 36)
    lone = write_images(tmp_path / "lone", 3)
    for extra in ("0.png", "1.png"):
        (lone / "red" / extra).unlink()
    notes = pl.evaluate("knn", encoder=bundle, train=str(lone), test=str(lone), **QUICK)["notes"]
    assert notes == ["one image only, which nothing can tell: red"]


def test_predictions_are_written_when_asked_for(bundle, data, tmp_path):
    from patchloom.evaluate.statistics.predictions import Predictions

    path = tmp_path / "deep" / "said.npz"
    result = pl.evaluate("knn", encoder=bundle, predictions=str(path), **data, **QUICK)
    said = Predictions.load(path)
    assert float((said.predicted == said.targets).mean()) == pytest.approx(result["accuracy"])
    assert list(said.interval()[1:3]) == pytest.approx(result["interval"])
    assert said.class_names == ["blue", "green", "red"]
    assert said.keys[0] == "blue/0.png"
    assert (said.scores.argmax(1) == said.predicted).all()
    assert said.about["encoder"] == bundle
    with pytest.raises(UsageError, match="exists; choose another file for predictions"):
        pl.evaluate("knn", encoder=bundle, predictions=str(path), **data, **QUICK)
    with pytest.raises(UsageError, match=r"ends in \.npz"):
        pl.evaluate("knn", encoder=bundle, predictions="said.csv", **data, **QUICK)


def test_broken_weights_are_not_measured(data):
    encoder = create_encoder("ccvit_tiny_patch4_32", image_size=16, **TINY)
    with torch.no_grad():
        encoder.blocks[0].mlp.fc1.weight[0, 0] = float("nan")
    for protocol in ("knn", "linear"):
        with pytest.raises(UsageError, match=r"36 of the 36 features of .* NaN or infinity, the first those of blue"):
            pl.evaluate(protocol, encoder=encoder, **data, **QUICK)


def test_the_second_evaluation_extracts_nothing(bundle, data, tmp_path, monkeypatch):
    first = pl.evaluate("knn", encoder=bundle, cache=str(tmp_path / "c"), **data, **QUICK)

    def never(*args, **kwargs):
        raise AssertionError("extracted again")

    monkeypatch.setattr("patchloom.features.cache.extract_into", never)
    again = pl.evaluate("knn", encoder=bundle, cache=str(tmp_path / "c"), **data, **QUICK)
    assert again["accuracy"] == first["accuracy"]
    pl.evaluate("linear", encoder=bundle, cache=str(tmp_path / "c"), **data, **QUICK)
    with pytest.raises(AssertionError, match="extracted again"):
        pl.evaluate("knn", encoder=bundle, cache=str(tmp_path / "other"), **data, **QUICK)


def test_images_of_one_patient_are_drawn_together(bundle, data, tmp_path):
    """As if each patient were one draw: the interval is that of the statistics with groups, and the files keep them."""
    test = open_source(data["test"])
    keys = [test.key(index) for index in range(len(test))]
    file, kept = tmp_path / "patients.csv", tmp_path / "said.npz"
    file.write_text("key,group\n" + "".join(f"{key},{number // 12}\n" for number, key in enumerate(keys)))
    asked = {"encoder": bundle, "untrained": True, **data, **QUICK}
    alone, together = pl.evaluate("knn", **asked), pl.evaluate("knn", groups=str(file), predictions=str(kept), **asked)
    said = Predictions.load(kept)
    owners = np.array([keys.index(key) // 12 for key in said.keys])
    drawn = {"draws": asked.get("draws", 1000), "seed": asked.get("seed", 0)}
    wanted = bootstrap_interval(SCORES["accuracy"], said.predicted, said.targets, groups=owners, **drawn)
    assert together["accuracy"] == alone["accuracy"] < 1
    assert together["interval"] == [wanted.low, wanted.high] != alone["interval"]
    assert said.interval(**drawn) == wanted
    file.write_text("key,group\nsomebody,1\n")
    with pytest.raises(UsageError, match="names no group for 24 of 24 images"):
        pl.evaluate("knn", groups=str(file), **asked)
    with pytest.raises(UsageError, match="few_shot draws episodes"):
        pl.evaluate("few_shot", groups=str(file), **asked)


def test_what_has_no_label_is_left_out_counted_and_listed(data, tmp_path):
    rows = [f"{path.relative_to(data['test'])}" for path in sorted(Path(data["test"]).rglob("*.png"))]
    said = [f"{row},{'' if number == 0 else row.split('/')[0]}" for number, row in enumerate(rows)]
    (Path(data["test"]) / "labels.csv").write_text("\n".join(["file,label", *said]))
    settings = {"encoder": "pixels", "train": data["train"], "cache": "none", "num_workers": 0}
    found = pl.evaluate("knn", test=f"{data['test']}/labels.csv", **settings)
    assert (found["n"], found["unlabelled_images"], found["unreadable_images"]) == (len(rows) - 1, 1, 0)
    assert found["skipped"] == [{"file": rows[0], "reason": "it has no label"}]


def test_numbers_of_classes_in_shards_are_those_of_named_ones_in_order(data, tmp_path, capsys):
    pytest.importorskip("webdataset")
    images = sorted(Path(data["train"]).glob("*/*.png"))
    numbers = {name: number for number, name in enumerate(sorted({image.parent.name for image in images}))}
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for place, image in enumerate(images):
            for ending, content in (("cls", b"%d" % numbers[image.parent.name]), ("png", image.read_bytes())):
                member = tarfile.TarInfo(f"{place:02}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    shards = {"train": f"{tmp_path}/a.tar", "test": data["test"]}
    result = pl.evaluate("knn", encoder="pixels", **shards, **QUICK)
    assert result["accuracy"] == pl.evaluate("knn", encoder="pixels", **data, **QUICK)["accuracy"]
    assert "a.tar has numbers of classes, and they are taken as those of" in capsys.readouterr().err


def test_shards_without_labels_are_refused_before_an_image_is_read(data, tmp_path):
    pytest.importorskip("webdataset")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(next(Path(data["train"]).glob("*/*.png")), "0001.png")
    with pytest.raises(UsageError, match=r"a\.tar has no label \(its files and keys: png\)"):
        pl.evaluate("knn", encoder="pixels", train=f"{tmp_path}/a.tar", test=data["test"], **QUICK)
