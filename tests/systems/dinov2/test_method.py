"""DINOv2 as a method: what it refuses, its schedules and groups, a run from images to bundle and on from there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch

import patchloom as pl
from patchloom.data import open_source
from patchloom.encoders.mask_token import MaskTokenEncoder
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle
from patchloom.models.parts import save_parts
from patchloom.systems.dinov2.method import PRESETS, Dinov2Config, Dinov2Method, linear, local_size
from patchloom.training.config import config_from_mapping

SMALL = {
    "data": "digits",
    "encoder": "vit_dinov2_test_patch4_16",
    "local_size": 8,
    "local_crops": 2,
    "batch_size": 8,
    "max_steps": 3,
    "out_dim": 32,
    "head_hidden_dim": 24,
    "bottleneck_dim": 16,
    "num_workers": 0,
    "probe_every": 0,
    "report": False,
    "log_every": 1,
    "precision": "32-true",
    "accelerator": "cpu",
}


@timm.models.register_model
def vit_dinov2_test_patch4_16(pretrained: bool = False, **kwargs: Any) -> Any:
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
    return timm.models.vision_transformer.vit_tiny_patch16_224(pretrained, **{**shape, **kwargs})


def method(**settings: Any) -> Dinov2Method:
    config = Dinov2Config(out="unused", **{**SMALL, **settings})
    return Dinov2Method(config, open_source(config.data, in_chans=config.in_chans))


def batch(made: Dinov2Method, count: int = 4) -> dict[str, torch.Tensor]:
    transform = made.transform()
    samples = [transform(made.source.read(i).image, torch.Generator().manual_seed(i)) for i in range(count)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"local_size": 32}, "local_size 32 exceeds the global crops of 16 pixels"),
        ({"local_size": 6}, "image size 6 is not divisible by patch size 4"),
        ({"image_size": 18}, "image size 18 is not divisible by patch size 4"),
        ({"batch_size": 1}, "batch_size=1 leaves KoLeo no neighbour"),
        ({"ema": 0.9}, "its teacher is a moving average already"),
        ({"strategy": "fsdp"}, "use ddp"),
        ({"centering": "sinkhorn"}, "did you mean sinkhorn_knopp"),
        ({"teacher_temp": 0.0}, "teacher_temp is 0.0; it must be above 0"),
        ({"teacher_momentum": 1.5}, r"teacher_momentum is 1.5; it must be at least 0 and at most 1"),
        ({"mask_ratio": (0.5, 0.1)}, r"mask_ratio is \(0.5, 0.1\); give numbers of which none is below"),
        ({"freeze_backbone_steps": -1}, "freeze_backbone_steps is -1"),
        ({"blur": (0.1, 0.2, 3.0)}, "each must be at least 0 and at most 1"),
        ({"pixel_mean": (0.5,)}, "set both or neither"),
        ({"out_dim": 1}, "it must be at least 2"),
        ({"heads_from": "no/such/run"}, "there are no heads at no/such/run"),
        ({"init_from": "no_such_model"}, "unknown encoder 'no_such_model'"),
        ({"encoder": "ccvit_tiny_patch4_32", "image_size": 16, "registers": 2}, "a Beit has no register tokens"),
        ({"preset": "rad_dinos"}, "did you mean rad_dino"),
        ({"koleo_topk": 8}, "koleo_topk=8 neighbours are more than 8 images have"),
        ({"koleo_group": 8}, "koleo_group is for koleo_across=true"),
        ({"gram_from": "runs/x"}, "gram_from is for a frozen anchor"),
        ({"gram_weight": 1.0, "gram_tokens": "masked"}, "tokens=masked differ in number"),
        ({"gram_weight": 1.0, "gram_crop_size": 18}, "gram_crop_size is 18; it must be at least the crops' 16"),
        ({"gram_weight": 1.0, "gram_from": "no_such_model"}, "unknown encoder 'no_such_model'"),
        ({"gram_weight": 1.0, "gram_update_every": -1}, "gram_update_every is -1"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(settings, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        pl.pretrain("dinov2", **{**SMALL, "out": str(tmp_path / "run"), **settings})
    assert not (tmp_path / "run").exists()


def test_the_local_size_is_the_papers_share_in_whole_patches():
    assert local_size(None, 224, 16) == 96
    assert local_size(None, 224, 14) == 98
    assert local_size(None, 32, 4) == 12
    assert local_size(24, 32, 4) == 24


def test_crops_reach_the_model_crop_major():
    made = method()
    views = torch.arange(4 * 2, dtype=torch.uint8).view(4, 2, 1, 1, 1).expand(4, 2, 3, 16, 16)
    seen = made.crops(views)
    order = (seen[:, 0, 0, 0] * 0.5 + 0.5) * 255  # the encoder's own mean and deviation
    torch.testing.assert_close(order, torch.tensor([0.0, 2, 4, 6, 1, 3, 5, 7]), atol=1e-3, rtol=0)


def test_schedules_are_the_published_arrays():
    made = method(epochs=20, max_steps=None, lr=1e-2, lr_base_batch=512, warmup_epochs=2, teacher_temp_epochs=5)
    made.steps_per_epoch, made.total_steps = 10, 200
    peak = 1e-2 * math.sqrt(8 / 512)
    warmup = torch.linspace(0, peak, 20, dtype=torch.float64)
    i = torch.arange(180, dtype=torch.float64)
    lr = torch.cat([warmup, 1e-6 + 0.5 * (peak - 1e-6) * (1 + torch.cos(math.pi * i / 180))])
    j = torch.arange(200, dtype=torch.float64)
    decay = 0.4 + 0.5 * (0.04 - 0.4) * (1 + torch.cos(math.pi * j / 200))
    momentum = 1 + 0.5 * (0.992 - 1) * (1 + torch.cos(math.pi * j / 200))
    temperature = torch.cat(
        [torch.linspace(0.04, 0.07, 50, dtype=torch.float64), torch.full((150,), 0.07, dtype=torch.float64)]
    )
    for step in range(200):
        assert made.rates(step) == pytest.approx((float(lr[step]), float(decay[step])), rel=1e-9)
        assert made.teacher_momentum(step) == pytest.approx(float(momentum[step]), rel=1e-12)
        assert made.teacher_temperature(step) == pytest.approx(float(temperature[step]), rel=1e-9)
    assert linear(0, 0, 1.0, 2.0) == 2.0


def test_the_prototypes_wait_an_epoch_and_the_backbone_as_long_as_asked():
    made = method(freeze_backbone_steps=5)
    made.steps_per_epoch, made.total_steps = 10, 200
    assert made.frozen(0) == {"last_layer", "backbone"}
    assert made.frozen(5) == {"last_layer"}
    assert made.frozen(10) == set()
    made.total_steps = 20  # a tenth at most
    assert made.frozen(2) == set()


def test_parameters_learn_and_decay_as_published():
    made = method(separate_head=True, registers=2, layer_decay=0.5)
    groups = made.configure_optimizers().param_groups
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    decays = {name: group["decays"] for group in groups for name in group["names"]}
    part = {name: group["part"] for group in groups for name in group["names"]}
    assert scale["encoder.patch_embed.proj.weight"] == pytest.approx(0.2 * 0.5**4)
    for name in ("encoder.cls_token", "encoder.pos_embed", "encoder.reg_token", "model.student.mask_token"):
        assert scale[name] == pytest.approx(0.5**4)
        assert decays[name]
    assert scale["encoder.blocks.0.attn.qkv.weight"] == pytest.approx(0.5**3)
    assert scale["encoder.norm.weight"] == 1
    assert scale["model.student.ibot_head.mlp.0.weight"] == 1
    assert not decays["encoder.blocks.1.ls1.gamma"]
    assert not decays["encoder.norm.weight"]
    assert not decays["encoder.blocks.1.mlp.fc1.bias"]
    gain = "model.student.dino_head.last_layer.parametrizations.weight.original0"
    assert decays[gain]
    assert part[gain] == "last_layer"
    assert part["model.student.dino_head.mlp.0.weight"] == "heads"
    assert not any("teacher" in name for name in scale)
    assert len(scale) == len({name for name, p in made.named_parameters() if p.requires_grad})


def test_gradients_are_clipped_apart():
    made = method(clip_grad=1.0)
    student = made.model.student
    for parameter in made.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.logs_now = lambda: False  # type: ignore[method-assign]
    made.configure_gradient_clipping(None)
    for part in (student.encoder, student.dino_head):
        total = torch.stack([p.grad.norm() for p in part.parameters() if p.grad is not None]).norm()
        assert float(total) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"separate_head": True, "centering": "sinkhorn_knopp", "ibot_bottleneck_dim": 8},
        {"ibot_weight": 0.0, "separate_head": True},
        {"local_crops": 0},
        {"koleo_weight": 0.0, "drop_path": 0.05},
        {"in_chans": 1, "registers": 2},
        {"encoder": "ccvit_tiny_patch4_32", "image_size": 16},
        {"encoder": "eva02_tiny_patch14_224", "image_size": 28, "local_size": 14},
        {"grad_checkpointing": True},
        {"gram_weight": 1.0, "gram_crop_size": 24, "koleo_topk": 2},
        {"gram_weight": 1.0, "gram_anchor": "teacher", "gram_level": "batch", "gram_tokens": "unmasked"},
        {"head_bias": False, "head_batch_norm": True, "head_layers": 2},
        {"separate_head": True, "ibot_out_dim": 12, "ibot_hidden_dim": 10, "ibot_layers": 2, "head_layers": 1},
    ],
)
def test_every_variant_trains_all_its_parameters(settings):
    made = method(**settings).train()
    losses = made.training_loss(batch(made))
    assert torch.isfinite(losses["loss"])
    terms = [value for name, value in losses.items() if name.endswith("_loss")]
    torch.testing.assert_close(losses["loss"], torch.stack(terms).sum())
    losses["loss"].backward()
    assert [name for name, p in made.named_parameters() if p.requires_grad and p.grad is None] == []
    if settings.get("ibot_weight") == 0.0:
        assert float(losses["ibot_loss"].detach()) == 0


def test_presets_are_the_papers():
    assert set(PRESETS) == {"vitl16_short", "vitl14", "vitg14", "rad_dino", "phikon_v2"}
    xray = config_from_mapping(Dinov2Config, {"data": "x", "out": "y", "preset": "rad_dino"})
    assert (xray.out_dim, xray.separate_head, xray.head_hidden_dim, xray.bottleneck_dim) == (65536, False, 2048, 256)
    assert (xray.image_size, xray.encoder) == (518, "vit_base_patch14_dinov2")
    assert xray.pixel_mean == (0.5307,) * 3
    assert xray.pixel_std == (0.2583,) * 3
    assert (xray.solarize, xray.jitter[3], xray.grayscale) == (0, 0, 0)
    tiles = config_from_mapping(Dinov2Config, {"data": "x", "out": "y", "preset": "phikon_v2"})
    assert (tiles.centering, tiles.separate_head, tiles.encoder) == ("sinkhorn_knopp", True, "vit_large_patch16_224")
    assert (tiles.rotate, tiles.vertical_flip) == (True, 0.5)
    assert tiles.global_scale == (0.32, 1.0)
    for name in PRESETS:
        config_from_mapping(Dinov2Config, {"data": "x", "out": "y", "preset": name})


def test_published_blur_probabilities_are_an_option():
    assert method().config.augmentation().blur == (0.0, 0.9, 0.5)
    assert method(blur_as_published=True).config.augmentation().blur == (1.0, 0.1, 0.5)


def test_a_fresh_vit_gets_layer_scale_and_registers_and_others_keep_theirs():
    made = method(registers=3)
    assert float(made.encoder.blocks[0].ls1.gamma[0].detach()) == pytest.approx(1e-5)
    assert made.encoder.num_prefix_tokens == 4
    assert isinstance(method(layer_scale=None).encoder.blocks[0].ls1, torch.nn.Identity)
    beit = method(encoder="ccvit_tiny_patch4_32", image_size=16).encoder
    assert float(beit.blocks[0].gamma_1[0].detach()) == pytest.approx(0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("runs") / "digits"
    statistics = {"pixel_mean": (0.3, 0.3, 0.3), "pixel_std": (0.2, 0.2, 0.2)}
    return pl.pretrain(
        "dinov2", **{**SMALL, "out": str(out), "probe_data": "digits:test", "report": True, **statistics}
    )


def test_a_run_ends_with_bundle_figures_and_report(run):
    assert run.summary["steps"] == 3
    assert run.summary["prototypes"] == 32
    assert 0 <= run.summary["teacher_entropy"] <= 1
    assert {"dino_global_loss", "dino_local_loss", "ibot_loss", "koleo_loss"} <= run.summary.keys()
    page = run.report.read_text()
    for title in ("Teacher and student", "Prototypes", "Entropy of the teacher", "Attention", "Repeat this run"):
        assert title in page


@pytest.mark.parametrize(("every", "ahead"), [(3, True), (2, False)])
def test_a_run_with_an_anchor_takes_it_anew_and_keeps_it(every, ahead, tmp_path):
    settings = {
        **SMALL,
        "max_steps": 4,
        "lr": 0.1,
        "lr_base_batch": None,
        "warmup_epochs": 0.0,
        "teacher_momentum": 0.5,
        "gram_weight": 1.0,
        "gram_update_every": every,
        "gram_start": 1,
        "out": str(tmp_path / "anchored"),
    }
    made = pl.pretrain("dinov2", **settings)
    assert made.summary["anchor"] == "frozen"
    assert made.summary["gram_loss"] > 0
    checkpoint = torch.load(made.path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    names = [name for name in checkpoint if ".anchor." in name]
    teacher = [checkpoint[name.replace("anchor.", "teacher.encoder.")] for name in names]
    # Taken after the third step of four, the teacher is a step ahead; after the fourth, it is the teacher.
    same = all(torch.equal(checkpoint[name], value) for name, value in zip(names, teacher, strict=True))
    assert same != ahead
    if every == 2:
        on = {"max_steps": 1, "heads_from": str(made.path), "out": str(tmp_path / "on")}
        assert pl.pretrain("dinov2", **{**SMALL, **on}).summary["steps"] == 1


def test_the_anchor_may_be_that_of_an_earlier_run(run):
    made = method(gram_weight=1.0, gram_from=str(run.path))
    wanted = pl.load(run.path).state_dict()
    found = made.model.anchor.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    made.train()
    made.training_loss(batch(made))
    assert all(torch.equal(value, wanted[name]) for name, value in made.model.anchor.state_dict().items())
    assert not made.model.anchor.training


def test_the_student_sees_the_anchors_crops_at_its_own_size():
    made = method(gram_weight=1.0, gram_crop_size=32)
    views = batch(made)["global"]
    assert views.shape[-2:] == (32, 32)
    small = made.crops(views, 16)
    assert small.shape == (8, 3, 16, 16)
    low = torch.nn.functional.interpolate(
        views.transpose(0, 1).flatten(0, 1).float() / 255, (16, 16), mode="bicubic", antialias=True
    )
    low = low.clamp(views.min() / 255, views.max() / 255)
    torch.testing.assert_close(small * 0.5 + 0.5, low, atol=1e-5, rtol=1e-5)


def test_the_bundle_is_the_teachers_and_opens_with_timm(run):
    model = timm.create_model(f"local-dir:{run.model}", pretrained=True).eval()
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(model(images), pl.load(run.path)(images))
    checkpoint = torch.load(run.path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    teacher = {k.removeprefix("model.teacher.encoder."): v for k, v in checkpoint.items() if ".teacher.encoder." in k}
    assert all(torch.equal(value, teacher[name]) for name, value in model.state_dict().items())
    assert pl.load(run.path).pretrained_cfg["mean"] == [0.3, 0.3, 0.3]


def test_training_goes_on_from_encoder_and_heads(run, tmp_path):
    settings = {**SMALL, "max_steps": 1, "lr": 1e-12, "out": str(tmp_path / "on"), "heads_from": str(run.path)}
    again = pl.pretrain("dinov2", **{**settings, "encoder": str(run.path), "image_size": 24, "local_size": 12})
    before, after = pl.load(run.path).state_dict(), pl.load(again.path).state_dict()
    same = [name for name in before if name != "pos_embed"]
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in same)
    assert after["pos_embed"].shape[1] == 1 + 36  # a higher resolution, the last phase of the paper
    with pytest.raises(UsageError, match=r"do not fit: .* use the out_dim"):
        pl.pretrain("dinov2", **{**settings, "out": str(tmp_path / "other"), "out_dim": 40})


@pytest.mark.parametrize("setting", ["init_from", "encoder"])
def test_the_students_mask_token_starts_from_that_of_the_bundle(setting, run, tmp_path):
    plain = method(**{setting: str(run.model)})
    assert not plain.model.student.mask_token.any()
    encoder = pl.load(run.model)
    token = torch.randn(1, 1, 32)
    save_bundle(encoder, tmp_path / "bundle")
    save_parts(MaskTokenEncoder(encoder, token), tmp_path / "bundle")
    made = method(**{setting: str(tmp_path / "bundle")})
    for network in (made.model.student, made.model.teacher):
        assert torch.equal(network.mask_token, token[0])
    assert made.model.student.mask_token.requires_grad
    assert not any(name.endswith("encoder.mask_token") for name in made.state_dict())
    on = pl.pretrain("dinov2", **{**SMALL, "max_steps": 1, setting: str(tmp_path / "bundle")}, out=str(tmp_path / "on"))
    assert pl.load(on.model)(torch.randn(1, 3, 16, 16)).shape == (1, 32)


def test_init_from_names_the_architecture(run, tmp_path):
    settings = {**SMALL, "max_steps": 1, "out": str(tmp_path / "on"), "init_from": str(run.path)}
    del settings["encoder"]
    assert pl.pretrain("dinov2", **settings).summary["width"] == 32
    with pytest.raises(UsageError, match="holds a vit_dinov2_test_patch4_16, not a vit_small_patch16_224"):
        pl.pretrain("dinov2", **{**settings, "out": str(tmp_path / "no"), "encoder": "vit_small_patch16_224"})
    with pytest.raises(UsageError, match="registers are for fresh encoders"):
        pl.pretrain("dinov2", **{**settings, "out": str(tmp_path / "no"), "registers": 4})


def test_experts_are_averaged_in_the_teacher_that_is_shipped(tmp_path):
    settings = {**SMALL, "experts": 2, "max_steps": 2, "drop_path": 0.3, "out": str(tmp_path / "experts")}
    run = pl.pretrain("dinov2", **settings)
    checkpoint = torch.load(run.path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    experts = [v for k, v in checkpoint.items() if ".teacher.encoder." in k and k.endswith("mlp.experts.0.fc1.weight")]
    others = [v for k, v in checkpoint.items() if ".teacher.encoder." in k and k.endswith("mlp.experts.1.fc1.weight")]
    shipped = pl.load(run.path).blocks
    means = [(a + b) / 2 for a, b in zip(experts, others, strict=True)]
    assert means
    assert all(any(torch.allclose(mean, block.mlp.fc1.weight, atol=1e-6) for block in shipped) for mean in means)


def test_grey_images_of_one_channel_train_from_the_command_line(tmp_path):
    from patchloom.cli import main

    out = tmp_path / "grey"
    settings = {**SMALL, "out": out, "preset": "rad_dino", "in_chans": 1, "image_size": 16, "max_steps": 2}
    assert main(["pretrain", "dinov2", *[f"--{name}={value}" for name, value in settings.items()]]) == 0
    assert pl.load(out)(torch.rand(1, 1, 16, 16)).shape == (1, 32)
