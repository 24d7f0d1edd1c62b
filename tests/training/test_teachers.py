"""Teachers: opened as named, frozen, shown what they know, asked about the same classes."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn import functional as F

from patchloom.encoders import create_backbone, grid_size, image_size, normalize
from patchloom.errors import UsageError
from patchloom.training.teachers import FrozenTeacher, denormalize, open_teacher
from small_teachers import write_teacher


def classifier(names: list[str] | None = None, count: int = 3) -> torch.nn.Module:
    torch.manual_seed(0)
    model = create_backbone("cifar_resnet20")
    model.reset_classifier(count)
    if names is not None:
        model.pretrained_cfg = {**model.pretrained_cfg, "label_names": names}
    return model


def test_it_stays_frozen_and_without_gradient():
    teacher = FrozenTeacher(classifier(), "cnn")
    holder = torch.nn.ModuleList([teacher]).train()
    assert not any(module.training for module in holder[0].modules() if module is not teacher.order)
    before = teacher.model.bn1.running_mean.clone()
    logits = teacher(torch.rand(4, 3, 32, 32, requires_grad=True))
    assert not logits.requires_grad
    assert torch.equal(before, teacher.model.bn1.running_mean)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_it_sees_the_students_images_normalised_its_own_way_and_resized():
    teacher, student = FrozenTeacher(classifier(), "cnn"), timm.create_model("vit_tiny_patch16_224", num_classes=3)
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    shown = normalize(images, student)
    torch.testing.assert_close(denormalize(shown, student), images)
    mean, std = (torch.tensor(teacher.model.pretrained_cfg[k]).double().view(1, 3, 1, 1) for k in ("mean", "std"))
    expected = (F.interpolate(images, (32, 32), mode="bilinear", antialias=True, align_corners=False) - mean) / std
    torch.testing.assert_close(teacher.view(shown, student), expected, atol=1e-6, rtol=0)
    own = normalize(images[..., :32, :32], teacher.model)
    assert teacher.view(own, teacher.model) is own


def test_classes_are_matched_by_name_where_names_are_known():
    model = classifier(["red", "blue", "green"])
    teacher = FrozenTeacher(model, "cnn")
    images = torch.rand(2, 3, 32, 32)
    teacher.check_classes(["blue", "green", "red"])
    with torch.no_grad():
        assert torch.equal(teacher(images), model(images)[:, [1, 2, 0]])
    with pytest.raises(UsageError, match="tells other classes apart than the data's: it does not know cyan"):
        teacher.check_classes(["blue", "cyan", "red"])
    with pytest.raises(UsageError, match="it also knows green"):
        teacher.check_classes(["blue", "red"])
    nameless = FrozenTeacher(classifier(), "cnn")
    nameless.check_classes(["a", "b", "c"])
    assert nameless.order is None
    with pytest.raises(UsageError, match="tells 3 classes apart, and the data has 2"):
        nameless.check_classes(["a", "b"])
    with pytest.raises(UsageError, match="the teacher cnn has no classifier"):
        FrozenTeacher(classifier(count=0), "cnn").check_classes(["a", "b"])


def test_another_image_size_is_said(tmp_path):
    path = write_teacher(tmp_path / "t")
    teacher, notices = open_teacher(path)
    assert (teacher.size, notices) == ((16, 16), [])
    assert teacher.class_names == ["blue", "green", "red"]
    teacher, (notice,) = open_teacher(path, size=32)
    assert (image_size(teacher.model), grid_size(teacher.model)) == ((32, 32), (8, 8))
    assert notice.startswith("the teacher's positions were resampled from 4x4 to 8x8 patches")
    assert teacher(torch.rand(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("nowhere/at/all", {}, "there is no teacher 'nowhere/at/all'"),
        ("vit_tiny_patch8_84", {}, "the teacher vit_tiny_patch8_84 has no published weights"),
        ("{bundle}", {"channels": 1}, "takes images of 3 channels, not 1"),
        ("{bundle}", {"size": 30}, "30"),
    ],
)
def test_teachers_that_cannot_be_had_are_refused_in_a_sentence(tmp_path, name, settings, said):
    write_teacher(tmp_path / "t")
    with pytest.raises(UsageError, match=said):
        open_teacher(name.format(bundle=tmp_path / "t"), **settings)


def test_an_oblong_teacher_is_shown_oblong_images(tmp_path):
    teacher, notices = open_teacher(write_teacher(tmp_path / "o", image_size=(16, 32)))
    assert (teacher.size, notices) == ((16, 32), [])
    assert teacher.view(torch.rand(2, 3, 24, 24), teacher.model).shape == (2, 3, 16, 32)
    teacher, notices = open_teacher(str(tmp_path / "o"), size=(32, 16))
    assert teacher.size == (32, 16)
    assert "from 4x8 to 8x4 patches for images of 32x16 pixels; it was trained with 16x32" in notices[0]


def test_weights_that_cannot_be_fetched_are_said_in_a_sentence(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no way out")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(UsageError, match=r"could not be fetched \(ConnectionError: no way out\)"):
        open_teacher("resnet18")
