"""Teacher, student and projectors together: any families, the gradient's ways, the published names."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from patchloom import load_reference
from patchloom.errors import UsageError
from patchloom.systems.scalekd.model import ScaleKD, StudentTaps
from patchloom.systems.scalekd.split_teacher import Teacher


def vit(name="vit_tiny_patch16_224", **changes):
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    return timm.create_model(name, **{**settings, **changes})


def swin(**changes):
    settings = {"img_size": 64, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1, 1, 1)}
    settings |= {"num_heads": (1, 1, 2, 2), "num_classes": 5, **changes}
    return timm.create_model("swin_tiny_patch4_window7_224", **settings)


def eva():
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    return timm.create_model("eva02_tiny_patch14_224", **settings)


TEACHERS = {
    "vit": lambda: vit(),
    "registers": lambda: vit(reg_tokens=2, class_token=True),
    "beit": lambda: vit("beit_base_patch16_224", init_values=0.5),
    "eva": eva,
    "swin": swin,
}  # fmt: skip


@pytest.mark.parametrize("kind", TEACHERS)
def test_the_tail_of_the_teachers_own_tokens_is_its_own_map(kind):
    torch.manual_seed(0)
    model = TEACHERS[kind]().eval()
    images = torch.randn(2, 3, *((64, 64) if kind == "swin" else (32, 32)))
    teacher = Teacher(model)
    seen = teacher(images)
    again = teacher.tail(seen.tokens, seen)
    torch.testing.assert_close(again, seen.features.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(seen.logits, model(images), rtol=1e-4, atol=1e-5)
    assert not seen.features.requires_grad


def test_a_teacher_stays_in_eval_mode():
    teacher = Teacher(vit(drop_path_rate=0.5))
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    noisy = Teacher(vit(drop_path_rate=0.5), drop_path=True).train()
    assert any(module.training for module in noisy.modules())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet18", {}),
        ("mobilenetv3_small_050", {}),
        ("convnext_atto", {}),
        ("vit_tiny_patch16_224", {"img_size": 64, "embed_dim": 24, "depth": 4, "num_heads": 2}),
        ("mixer_s32_224", {"img_size": 64}),
    ],
)
def test_students_of_every_kind_learn(name, arguments):
    torch.manual_seed(0)
    student = timm.create_model(name, num_classes=5, **arguments)
    model = ScaleKD(student, swin(), student_size=(64, 64), num_heads=(2, 2), scale="per_token")
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 3])
    losses = model.train()(images, labels)
    assert set(losses) == {"loss", "ori_loss", "loss_kd", "loss_s3", "loss_s3_alt", "loss_s4", "loss_s4_alt", "logits"}
    losses["loss"].backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    untouched = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert untouched == []


def test_the_last_stage_trains_the_earlier_projector_through_the_tail():
    model = ScaleKD(
        timm.create_model("resnet18", num_classes=5), swin(), student_size=(64, 64), num_heads=(2, 2), kd=False
    )
    losses = model.train()(torch.randn(2, 3, 64, 64), torch.tensor([0, 3]))
    (losses["loss_s4"] + losses["loss_s4_alt"]).backward()
    assert model.stage3[0].k.weight.grad.any()
    assert model.stage3[1].k.weight.grad.any()


def test_ablations_and_their_parts():
    student = timm.create_model("resnet18", num_classes=5)
    batch = (torch.randn(2, 3, 64, 64), torch.tensor([0, 3]))
    parts = {
        ("kd",): {"ori_loss", "loss_s3", "loss_s3_alt", "loss_s4", "loss_s4_alt"},
        ("tpp",): {"ori_loss", "loss_kd", "loss_s4", "loss_s4_alt"},
        ("dfm",): {"ori_loss", "loss_kd", "loss_s3", "loss_s4"},
        ("cap", "dfm", "kd"): {"ori_loss", "loss_s4"},
    }
    for off, expected in parts.items():
        model = ScaleKD(student, swin(), student_size=(64, 64), num_heads=(2, 2), **dict.fromkeys(off, False))
        assert set(model(*batch)) == expected | {"loss", "logits"}


def test_the_total_is_half_the_labels_half_the_teacher_and_the_maps():
    model = ScaleKD(
        timm.create_model("resnet18", num_classes=5), swin(), student_size=(64, 64), num_heads=(2, 2)
    ).eval()
    images, labels = torch.randn(3, 3, 64, 64), torch.tensor([0, 3, 1])
    losses = model(images, labels)
    logits, answers = losses["logits"], model.teacher(images).logits
    torch.testing.assert_close(losses["ori_loss"], 0.5 * nn.functional.cross_entropy(logits, labels))
    torch.testing.assert_close(losses["loss_kd"], -0.5 * (answers.softmax(1) * logits.log_softmax(1)).sum(1).mean())
    total = sum(value for name, value in losses.items() if name not in ("loss", "logits"))
    torch.testing.assert_close(losses["loss"], total)


def test_taps_follow_timms_feature_information():
    resnet = StudentTaps(timm.create_model("resnet18", num_classes=5).eval())
    maps = resnet(torch.randn(1, 3, 64, 64))
    assert (maps.third.shape, maps.fourth.shape) == ((1, 256, 4, 4), (1, 512, 2, 2))
    model = vit(depth=4).eval()
    images = torch.randn(1, 3, 32, 32)
    maps = StudentTaps(model)(images)
    with torch.no_grad():
        tokens = model.forward_features(images)[:, 1:]
    torch.testing.assert_close(maps.fourth.flatten(2).transpose(1, 2), tokens)
    torch.testing.assert_close(maps.logits, model(images))


def test_what_does_not_fit_is_refused():
    student = timm.create_model("resnet18", num_classes=5)
    with pytest.raises(UsageError, match="the teacher has 7 classes and the student 5"):
        ScaleKD(student, swin(num_classes=7), student_size=(64, 64), num_heads=(2, 2))
    with pytest.raises(UsageError, match="no classifier"):
        ScaleKD(student, swin(num_classes=0), student_size=(64, 64), num_heads=(2, 2))
    with pytest.raises(UsageError, match="tpp_blocks is 3; it must be 1 to 2"):
        Teacher(vit(), 3)
    with pytest.raises(UsageError, match="a ResNet cannot be this teacher"):
        Teacher(student)
    with pytest.raises(UsageError, match="student_stages is"):
        StudentTaps(student, (3, 9))
    with pytest.raises(UsageError, match="not divisible by num_heads"):
        ScaleKD(student, swin(), student_size=(64, 64), num_heads=(3, 3))


def published_projector(student=6, teacher=8, grid=(3, 3), queries=4):
    """A projector in the published layout, random."""
    shapes = {
        "proj_pos.0.weight": (teacher, teacher, 1, 1), "proj_pos.0.bias": (teacher,),
        "proj_student.0.weight": (student, student, 3, 3), "proj_student.0.bias": (student,),
        "proj_student.1.weight": (student,), "proj_student.1.bias": (student,),
        "proj_student.1.running_mean": (student,), "proj_student.1.running_var": (student,),
        "pos_embed": (1, student, *grid),
        "pos_attention.q.weight": (teacher, teacher), "pos_attention.q.bias": (teacher,),
        "pos_attention.k.weight": (teacher, student), "pos_attention.k.bias": (teacher,),
        "pos_attention.v.weight": (teacher, student), "pos_attention.v.bias": (teacher,),
        "pos_attention.proj.weight": (teacher, teacher), "pos_attention.proj.bias": (teacher,),
        "ffn.layers.0.0.weight": (4 * teacher, teacher), "ffn.layers.0.0.bias": (4 * teacher,),
        "ffn.layers.1.weight": (teacher, 4 * teacher), "ffn.layers.1.bias": (teacher,),
        "norm.weight": (teacher,), "norm.bias": (teacher,),
    }  # fmt: skip
    state = {name: torch.rand(shape) for name, shape in shapes.items()}
    state["proj_student.1.num_batches_tracked"] = torch.tensor(3)
    if queries:
        state["query.weight"] = torch.randn(queries, teacher)
    return state


def test_published_projectors_load_whole():
    torch.manual_seed(0)
    state = {}
    for stage, queries in ((3, 16), (4, 0)):
        for view in (0, 1):
            for name, value in published_projector(queries=queries).items():
                state[f"distill_losses.loss_fmd_s{stage}.projector_{view}.{name}"] = value
    state |= {"linear.weight": torch.zeros(2, 2), "linear.bias": torch.zeros(2), "student.fc.weight": torch.zeros(2, 2)}
    module = load_reference("scalekd", {"state_dict": state}, num_heads=(2, 4), query_grid=(2, 2))
    assert [p.num_heads for p in (*module.stage3, *module.stage4)] == [2, 2, 4, 4]
    whole = {"student_dims": (6, 6), "teacher_dims": 8, "query_hw": (2, 2), "pos_hw": (3, 3), "pos_dims": (6, 6)}
    again = load_reference(
        "scalekd", state, **whole, num_heads=(2, 4), self_query=(True, False), window_shapes=(1, 1), alpha=[0.08, 0.06]
    )
    assert [p.num_heads for p in (*again.stage3, *again.stage4)] == [2, 2, 4, 4]
    with pytest.raises(UsageError, match="teacher_dims=16, but the checkpoint's tensors say 8"):
        load_reference("scalekd", state, num_heads=(2, 4), query_grid=(2, 2), teacher_dims=16)
    assert module.stage3[1].query_grid == (4, 4)
    x = torch.randn(1, 6, 3, 3)
    out = module(x, x, [torch.randn(1, 4, 8)] * 2)
    assert [t.shape[1] for t in out["stage3"] + out["stage4"]] == [16, 16, 4, 4]
    key = "distill_losses.loss_fmd_s3.projector_0.pos_attention.k.weight"
    assert torch.equal(module.stage3[0].k.weight, state[key])
    del state[key]
    with pytest.raises(UsageError, match=r"missing: k\.weight"):
        load_reference("scalekd", {"state_dict": state}, num_heads=(2, 4), query_grid=(2, 2))


def test_a_published_swin_gives_its_outputs():
    """mmcls merges patches channel by channel, written out here; the rest of the names map one to one."""
    torch.manual_seed(0)
    model = swin(img_size=64).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs = {}
    for name, value in model.state_dict().items():
        if name.endswith(("relative_position_index", "attn_mask")):
            continue
        if ".downsample." in name:
            stage, rest = int(name.split(".")[1]) - 1, name.split(".downsample.")[1]
            four = value.shape[-1] // 4
            channel = torch.empty_like(value)
            for c in range(four):
                for row in range(2):
                    for column in range(2):
                        channel[..., c * 4 + row * 2 + column] = value[..., (column * 2 + row) * four + c]
            theirs[f"stages.{stage}.downsample.{rest}"] = channel
            continue
        name = name.replace("patch_embed.proj", "patch_embed.projection").replace("layers.", "stages.")
        name = name.replace("mlp.fc1", "ffn.layers.0.0").replace("mlp.fc2", "ffn.layers.1")
        for part in ("qkv", "proj", "relative_position_bias_table"):
            name = name.replace(f".attn.{part}", f".attn.w_msa.{part}")
        theirs[f"norm3.{name[5:]}" if name.startswith("norm.") else name] = value
    timm.models.register_model(_tiny_swin)
    loaded = load_reference("scalekd", theirs, model="_tiny_swin")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-5, atol=1e-5)


def _tiny_swin(pretrained=False, **kwargs):
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(name, None)
    return swin(**kwargs)
