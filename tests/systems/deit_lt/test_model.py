"""DeiT-LT: unequal classes, two heads, CNN teachers, published names; formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from patchloom import load_reference
from patchloom.errors import UsageError
from patchloom.models.bundle import load
from patchloom.systems.deit_lt.cnn_teachers import CIFARResNet, PaCoTeacher
from patchloom.systems.deit_lt.model import DeiTLT, DistillationTokenLoss, resized_positions
from patchloom.systems.published import import_reference
from patchloom.training.long_tail import (
    class_groups,
    effective_number_weights,
    group_accuracy,
    long_tail_counts,
    long_tail_subset,
)


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand_like(tensor) + 0.5 if tensor.ndim == 1 else torch.randn_like(tensor) * 0.2)
    return module


def student(**changes):
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("deit_tiny_distilled_patch16_224", **{**settings, **changes})


def test_published_counts():
    assert sum(long_tail_counts(10, 5000, 100)) == 12406
    assert sum(long_tail_counts(100, 500, 100)) == 10847
    assert long_tail_counts(4, 10, 5, kind="step") == [10, 10, 2, 2]
    with pytest.raises(UsageError, match="leaves the rarest class none of 10 images"):
        long_tail_counts(10, 10, 100)


def test_subsets_are_drawn_by_the_legacy_generator_class_by_class():
    labels = np.array([1, 0, 1, 0, 1, 0, 0])
    np.random.seed(0)  # noqa: NPY002
    first, second = np.where(labels == 0)[0], np.where(labels == 1)[0]
    np.random.shuffle(first)  # noqa: NPY002
    np.random.shuffle(second)  # noqa: NPY002
    assert long_tail_subset(labels, [3, 1]).tolist() == [*first[:3], *second[:1]]
    with pytest.raises(UsageError, match="class 1 has 3 images and 5"):
        long_tail_subset(labels, [1, 5])


def test_weights_are_those_of_effective_numbers():
    counts, beta = [5000, 387, 50], 0.9999
    raw = [(1 - beta) / (1 - beta**n) for n in counts]
    expected = [3 * w / sum(raw) for w in raw]
    assert effective_number_weights(counts).tolist() == pytest.approx(expected, rel=1e-6)
    assert effective_number_weights([7, 7]).tolist() == pytest.approx([1, 1])
    with pytest.raises(UsageError, match="class 1 has no training image"):
        effective_number_weights([3, 0])


def test_groups_by_rank_and_by_count():
    groups = class_groups(long_tail_counts(10, 5000, 100))
    assert groups == {"head": [0, 1, 2], "mid": [3, 4, 5, 6], "tail": [7, 8, 9]}
    hundred = class_groups(long_tail_counts(100, 500, 100))
    assert [len(group) for group in hundred.values()] == [36, 35, 29]
    assert class_groups([500, 100, 20, 19], by="count") == {"head": [0], "mid": [1, 2], "tail": [3]}
    assert group_accuracy([1.0, 0.5, 0.0], {"head": [0, 1], "mid": [], "tail": [2]}) == {"head": 0.75, "tail": 0.0}


@pytest.mark.parametrize("soft_labels", [True, False])
def test_the_loss_and_its_weighted_form(soft_labels):
    torch.manual_seed(0)
    cls, dist, teacher = (torch.randn(6, 3, dtype=torch.float64) for _ in range(3))
    labels = torch.rand(6, 3, dtype=torch.float64).softmax(1) if soft_labels else torch.tensor([0, 1, 2, 0, 0, 1])
    weights = torch.tensor([0.5, 1.0, 1.5])
    loss = DistillationTokenLoss(alpha=0.3, class_weights=weights)
    plain, weighted = loss(cls, dist, labels, teacher), loss(cls, dist, labels, teacher, weighted=True)
    rows = cls - cls.logsumexp(1, keepdim=True)
    shares = labels if soft_labels else F.one_hot(labels, 3).double()
    base = -(shares * rows).sum(1).mean()
    t = teacher.argmax(1)
    ce = -(dist - dist.logsumexp(1, keepdim=True)).gather(1, t[:, None])[:, 0]
    assert float(plain["base"]) == pytest.approx(float(0.7 * base))
    assert float(plain["distill"]) == pytest.approx(float(0.3 * ce.mean()))
    assert float(weighted["distill"]) == pytest.approx(
        float(0.3 * (weights[t] * ce).sum() / weights[t].sum()), rel=1e-6
    )
    assert float(plain["loss"]) == pytest.approx(float(plain["base"] + plain["distill"]))


def test_with_equal_counts_weights_change_nothing():
    torch.manual_seed(1)
    cls, dist, teacher = (torch.randn(8, 4) for _ in range(3))
    loss = DistillationTokenLoss(class_weights=effective_number_weights([9] * 4))
    labels = torch.arange(8) % 4
    one, other = (loss(cls, dist, labels, teacher, weighted=w)["loss"] for w in (False, True))
    assert abs(float(one - other)) < 1e-6


def test_soft_and_no_teacher_and_classes_in_another_order():
    torch.manual_seed(2)
    cls, dist, teacher = (torch.randn(5, 3, dtype=torch.float64) for _ in range(3))
    labels = torch.tensor([0, 1, 2, 0, 1])
    soft = DistillationTokenLoss(kind="soft", temperature=3.0)(cls, dist, labels, teacher)["distill"]
    p, q = (dist / 3).log_softmax(1), (teacher / 3).log_softmax(1)
    assert float(soft) == pytest.approx(float(0.5 * (q.exp() * (q - p)).sum() * 9 / 15))
    none = DistillationTokenLoss(kind="none")(cls, dist, labels)
    assert float(none["distill"]) == pytest.approx(float(0.5 * F.cross_entropy(dist, labels)))
    order = torch.tensor([2, 0, 1])
    mapped = DistillationTokenLoss(class_map=order)(cls, dist, labels, teacher)["distill"]
    assert float(mapped) == pytest.approx(float(0.5 * F.cross_entropy(dist, order[teacher.argmax(1)])))


def test_losses_that_make_no_sense_are_refused():
    with pytest.raises(UsageError, match="cannot be weighted"):
        DistillationTokenLoss(kind="soft", class_weights=torch.ones(3))
    with pytest.raises(UsageError, match="all class weights are zero"):
        DistillationTokenLoss(class_weights=torch.zeros(3))
    loss = DistillationTokenLoss()
    with pytest.raises(UsageError, match="the teacher tells 4 classes apart and the student 3"):
        loss(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 4))
    with pytest.raises(UsageError, match="no class weights"):
        loss(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 3), weighted=True)


def test_a_published_students_settings_are_taken_whole():
    state = randomised(student()).state_dict()
    config = {
        "model": "deit_base_distilled_patch16_224",
        "input_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "nb_classes": 5,
        "drop_path": 0.1,
        "distillation_type": "hard",
        "imb_factor": 0.01,
        "lr": 5e-4,
    }
    model = load_reference("deit_lt", {"model": state}, **config)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(images)["avg"], load_reference("deit_lt", state, num_heads=2)(images)["avg"])
    with pytest.raises(UsageError, match="num_classes=1000, but the checkpoint's tensors say 5"):
        load_reference("deit_lt", state, **{**config, "nb_classes": 1000})


def test_a_published_student_gives_both_heads():
    """The published forward, written out over its state dict."""
    state = {name: value.clone() for name, value in randomised(student()).state_dict().items()}
    model = load_reference("deit_lt", {"model": state}, num_heads=2)
    images = torch.randn(2, 3, 32, 32)
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8)
    x = torch.cat(
        [state["cls_token"].expand(2, -1, -1), state["dist_token"].expand(2, -1, -1), x.flatten(2).transpose(1, 2)], 1
    )
    x = x + state["pos_embed"]
    for i in range(2):
        s = {name.removeprefix(f"blocks.{i}."): v for name, v in state.items() if name.startswith(f"blocks.{i}.")}
        h = F.layer_norm(x, (24,), s["norm1.weight"], s["norm1.bias"], 1e-6)
        q, k, v = F.linear(h, s["attn.qkv.weight"], s["attn.qkv.bias"]).view(2, 18, 3, 2, 12).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(-1, -2) / math.sqrt(12)).softmax(-1) @ v
        x = x + F.linear(a.transpose(1, 2).flatten(2), s["attn.proj.weight"], s["attn.proj.bias"])
        h = F.layer_norm(x, (24,), s["norm2.weight"], s["norm2.bias"], 1e-6)
        x = x + F.linear(
            F.gelu(F.linear(h, s["mlp.fc1.weight"], s["mlp.fc1.bias"])), s["mlp.fc2.weight"], s["mlp.fc2.bias"]
        )
    x = F.layer_norm(x, (24,), state["norm.weight"], state["norm.bias"], 1e-6)
    cls = F.linear(x[:, 0], state["head.weight"], state["head.bias"])
    dist = F.linear(x[:, 1], state["head_dist.weight"], state["head_dist.bias"])
    out = model(images)
    torch.testing.assert_close(out["cls"], cls, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["dist"], dist, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["avg"], (cls + dist) / 2, rtol=1e-4, atol=1e-5)
    cosine = (x[:, 0] * x[:, 1]).sum(1) / (x[:, 0].norm(dim=1) * x[:, 1].norm(dim=1))
    torch.testing.assert_close(model.student_outputs(images).cosine, cosine, rtol=1e-4, atol=1e-5)


def test_positions_of_another_size_are_resized_by_the_published_factor():
    positions = torch.randn(1, 2 + 16, 6)
    resized = resized_positions(positions, (6, 6))
    patches = positions[:, 2:].view(1, 4, 4, 6).permute(0, 3, 1, 2)
    expected = F.interpolate(patches, scale_factor=(6.1 / 4, 6.1 / 4), mode="bicubic", align_corners=False)
    assert torch.equal(resized[:, :2], positions[:, :2])
    torch.testing.assert_close(resized[:, 2:], expected.flatten(2).transpose(1, 2))
    by_size = F.interpolate(patches, size=(6, 6), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    assert not torch.allclose(resized[:, 2:], by_size)
    model = DeiTLT(student())
    assert model(torch.randn(1, 3, 48, 48))["avg"].shape == (1, 5)


@pytest.mark.parametrize("cosine", [False, True])
def test_the_cifar_resnet_is_the_published_one(cosine):
    net = randomised(CIFARResNet(8, 5, cosine)).eval()
    x = torch.randn(2, 3, 32, 32)

    def bn(y, layer):
        shape = (1, -1, 1, 1)
        unit = (y - layer.running_mean.view(shape)) / (layer.running_var.view(shape) + layer.eps).sqrt()
        return unit * layer.weight.view(shape) + layer.bias.view(shape)

    y = bn(F.conv2d(x, net.conv1.weight, padding=1), net.bn1).relu()
    for stage, (layer, channels) in enumerate(zip((net.layer1, net.layer2, net.layer3), (16, 32, 64), strict=True)):
        block, stride = layer[0], 1 if stage == 0 else 2
        out = bn(F.conv2d(y, block.conv1.weight, stride=stride, padding=1), block.bn1).relu()
        out = bn(F.conv2d(out, block.conv2.weight, padding=1), block.bn2)
        shortcut = y
        if stage:
            shortcut = torch.zeros_like(out)
            shortcut[:, channels // 4 : channels // 4 + channels // 2] = y[:, :, ::2, ::2]
        y = (out + shortcut).relu()
    feature = y.mean((2, 3))
    if cosine:
        w = net.fc.weight / net.fc.weight.norm(dim=0, keepdim=True)
        expected = feature / feature.norm(dim=1, keepdim=True) @ w
    else:
        expected = feature @ net.fc.weight.T + net.fc.bias
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    loaded = load_reference("deit_lt", {"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}})
    torch.testing.assert_close(loaded(x), net(x))


@pytest.mark.parametrize("kind", ["cifar", "resnet50"])
def test_a_published_paco_teacher_is_its_pooled_feature_and_a_linear_map(kind):
    backbone = CIFARResNet(8, 0) if kind == "cifar" else timm.create_model("resnet50", num_classes=0)
    width = 64 if kind == "cifar" else 2048
    teacher = randomised(PaCoTeacher(backbone, width, 7)).eval()
    if kind == "resnet50":  # random norms of fifty layers overflow
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data.mul_(0.3)
    state = {}
    for name, value in teacher.state_dict().items():
        state[name.replace("backbone.", "module.encoder_q.") if "backbone." in name else f"module.{name}"] = value
    for name in ("encoder_q.fc.0.weight", "encoder_k.conv1.weight", "linear_k.weight", "queue", "queue_l", "queue_ptr"):
        state[f"module.{name}"] = torch.zeros(3)
    x = torch.randn(2, 3, 32, 32)
    loaded = load_reference("deit_lt", {"state_dict": state})
    with torch.no_grad():
        expected = F.linear(
            backbone(x) if kind == "resnet50" else backbone.features(x), teacher.linear.weight, teacher.linear.bias
        )
        torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)
    del state["module.linear.weight"]
    with pytest.raises(UsageError, match=r"lacks linear\.weight"):
        load_reference("deit_lt", {"state_dict": state})


@pytest.mark.parametrize("kind", ["paco", "ldam", "paco_resnet50"])
def test_published_teachers_are_imported_as_bundles(kind, tmp_path):
    if kind == "ldam":
        model = randomised(CIFARResNet(20, 7, True)).eval()
        state = {f"module.{name}": value for name, value in model.state_dict().items()}
    else:
        backbone = CIFARResNet(20, 0) if kind == "paco" else timm.create_model("resnet50", num_classes=0)
        model = PaCoTeacher(backbone, 64 if kind == "paco" else 2048, 7).eval()
        state = {
            name.replace("backbone.", "module.encoder_q.") if "backbone." in name else f"module.{name}": value
            for name, value in model.state_dict().items()
        }
    torch.save({"state_dict": state}, tmp_path / "published.pth")
    import_reference("deit_lt", str(tmp_path / "published.pth"), str(tmp_path / "bundle"))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(load(tmp_path / "bundle")(images), model(images), rtol=1e-4, atol=1e-5)


def test_the_teacher_sees_the_students_input_made_small_and_stays_in_eval_mode():
    seen = {}

    class Spy(nn.Module):
        def forward(self, x):
            seen["x"] = x
            return x.mean((2, 3)) @ torch.ones(3, 5)

    model = DeiTLT(student(), teacher=Spy(), teacher_size=16).train()
    images = torch.randn(2, 3, 32, 32)
    model.teacher_logits(images)
    expected = F.interpolate(images, (16, 16), mode="bicubic", align_corners=False, antialias=False)
    assert torch.equal(seen["x"], expected)
    assert model.encoder.training
    assert not model.teacher.training


def test_students_without_a_distillation_token_are_refused():
    with pytest.raises(UsageError, match="has no distillation token"):
        DeiTLT("vit_tiny_patch16_224")
    with pytest.raises(UsageError, match="unknown student"):
        DeiTLT("deit_distild")
    with pytest.raises(UsageError, match="depth is 18"):
        CIFARResNet(18)
