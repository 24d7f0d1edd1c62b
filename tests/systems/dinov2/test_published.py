"""Published DINOv2 checkpoints: every layout gives what the published code computes."""

from __future__ import annotations

import pytest
import torch

import patchloom as pl
from dinov2_layout import (
    GRID,
    HEADS,
    PATCH,
    PROTOTYPES,
    WIDTH,
    backbone,
    forward,
    head,
    logits,
    prefixed,
    transformers_layout,
)
from patchloom.encoders import embed, run_blocks, tokens
from patchloom.encoders.anysize import DINOV2_RULE, embed_any_size
from patchloom.errors import UsageError
from patchloom.models.parts import load_mask_token, load_masked_model
from patchloom.systems.dinov2.model import DINOHead, DINOv2, Distilled
from patchloom.systems.published import import_reference

SIDE = GRID * PATCH


def images(n: int = 2, height: int = SIDE, width: int = SIDE, seed: int = 9) -> torch.Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize(("gated", "scale"), [(False, False), (False, True), (True, True)])
def test_an_official_backbone_gives_the_published_tokens(registers, gated, scale):
    state = backbone(registers, gated, scale)
    model = pl.load_reference("dinov2", state, num_heads=HEADS)
    expected = forward(state, images())
    found = tokens(model, images())
    same(torch.cat([found.prefix, found.patches], dim=1), expected)
    same(model(images()), expected[:, 0])
    assert not model.training


def test_the_mask_token_is_kept_beside_the_encoder_and_out_of_its_bundle(tmp_path):
    state = backbone()
    model = pl.load_reference("dinov2", state, num_heads=HEADS)
    masks = torch.rand(2, GRID**2, generator=torch.Generator().manual_seed(0)) < 0.4
    last, _ = run_blocks(model, embed(model, images(), masked=masks, mask_token=model.mask_token))
    same(model.norm(last), forward(state, images(), masks))
    torch.save(state, tmp_path / "dinov2.pth")
    bundle = import_reference(
        "dinov2", str(tmp_path / "dinov2.pth"), out=str(tmp_path / "bundle"), settings={"num_heads": HEADS}
    )
    same(pl.load(bundle)(images()), forward(state, images())[:, 0])


def test_an_imported_backbone_keeps_its_mask_token_beside_the_bundle(tmp_path):
    masks = torch.rand(2, GRID**2, generator=torch.Generator().manual_seed(0)) < 0.4
    expected = {"dinov2": backbone(), "rad_dino": backbone(registers=2, seed=4)}
    for system, state in expected.items():
        torch.save(state, tmp_path / f"{system}.pth")
        out = import_reference(system, str(tmp_path / f"{system}.pth"), str(tmp_path / system), {"num_heads": HEADS})
        assert torch.equal(load_mask_token(out).flatten(), state["mask_token"].flatten())
        model = load_masked_model(out)
        last, _ = run_blocks(model.encoder, embed(model.encoder, images(), masks, model.mask_token))
        same(model.encoder.norm(last), forward(state, images(), masks))
    without = {n: v for n, v in backbone(scale=False).items() if n != "mask_token"}  # as Phikon's first version
    torch.save(without, tmp_path / "none.pth")
    out = import_reference("dinov2", str(tmp_path / "none.pth"), str(tmp_path / "none"), {"num_heads": HEADS})
    assert load_mask_token(out) is None


@pytest.mark.parametrize("of", ["both", "teacher"])
def test_a_training_checkpoint_is_imported_as_the_teachers_encoder(of, tmp_path):
    state = training_state(True)
    teacher = network_of(state, "teacher.")
    torch.save({"model": state} if of == "both" else {"teacher": teacher}, tmp_path / "training.pth")
    out = import_reference("dinov2", str(tmp_path / "training.pth"), str(tmp_path / "out"), {"num_heads": HEADS})
    inner = network_of(teacher, "backbone.")
    same(pl.load(out)(images()), forward(inner, images())[:, 0])
    assert torch.equal(load_mask_token(out).flatten(), inner["mask_token"].flatten())


@pytest.mark.parametrize("registers", [0, 2])
def test_other_sizes_take_positions_by_the_published_rule(registers):
    state = backbone(registers)
    larger = images(2, 28, 24)
    model = pl.load_reference("dinov2", state, num_heads=HEADS, image_size=(28, 24))
    same(model(larger), forward(state, larger)[:, 0])
    told = pl.load_reference(
        "dinov2", state, num_heads=HEADS, image_size=(28, 24), interpolate_offset=0.0, interpolate_antialias=True
    )
    same(told(larger), forward(state, larger, offset=None, antialias=True)[:, 0])
    if not registers:
        own = pl.load_reference("dinov2", state, num_heads=HEADS)
        last, _ = run_blocks(own, embed_any_size(own, larger, rule=DINOV2_RULE))
        same(own.norm(last), forward(state, larger))


@pytest.mark.parametrize("registers", [0, 2])
def test_a_backbone_takes_images_of_any_size_as_published(registers):
    state = backbone(registers)
    model = pl.load_reference("dinov2", state, num_heads=HEADS)
    for size in ((28, 24), (SIDE, SIDE), (12, 36)):
        same(model(images(2, *size)), forward(state, images(2, *size))[:, 0])
    with pytest.raises(UsageError, match="not divisible by patch size 4"):
        model(images(1, 30, 30))


def test_intermediate_layers_are_normed_as_published():
    state = backbone(2)
    model = pl.load_reference("dinov2", state, num_heads=HEADS)
    expected = forward(state, images(2, 28, 24))
    ((patches, class_token),) = model.get_intermediate_layers(images(2, 28, 24), 1, return_class_token=True)
    same(class_token, expected[:, 0])
    same(patches, expected[:, 3:])
    maps = model.get_intermediate_layers(images(2, 28, 24), [0, 2], reshape=True)
    same(maps[1], expected[:, 3:].transpose(1, 2).reshape(2, WIDTH, 7, 6))
    assert maps[0].shape == maps[1].shape
    assert not torch.allclose(model.get_intermediate_layers(images(), 1, norm=False)[0], patches[:, :25])


@pytest.mark.parametrize("registers", [0, 2])
def test_half_precision_weights_lose_nothing_more(registers):
    halves = {name: value.half() for name, value in backbone(registers).items()}
    exact = {name: value.float() for name, value in halves.items()}
    model = pl.load_reference("dinov2", halves, num_heads=HEADS, image_size=(28, 24))
    torch.testing.assert_close(model(images(2, 28, 24)), forward(exact, images(2, 28, 24))[:, 0], atol=1e-5, rtol=1e-5)


def test_training_goes_on_from_the_published_mask_token():
    model = pl.load_reference("dinov2", backbone(), num_heads=HEADS)
    student = DINOv2(model, out_dim=8, hidden_dim=8, bottleneck_dim=4).student
    torch.testing.assert_close(student.mask_token.detach(), backbone()["mask_token"])


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(("registers", "gated"), [(0, False), (0, True), (2, False)])
def test_the_layout_of_transformers_gives_the_same(in_memory, registers, gated):
    state = backbone(registers, gated)
    published = transformers_layout(state, in_memory)
    for system in ("rad_dino", "phikon_v2", "dinov2"):
        model = pl.load_reference(system, published, num_heads=HEADS)
        same(model(images()), forward(state, images())[:, 0])
    larger = images(2, 28, 28)
    resized = pl.load_reference("rad_dino", published, num_attention_heads=HEADS, image_size=28)
    same(resized(larger), forward(state, larger, offset=None, antialias=registers > 0)[:, 0])


def test_a_classifier_of_transformers_is_read_for_its_backbone():
    state = backbone()
    published = transformers_layout(state, prefix="dinov2.")
    same(pl.load_reference("dinov2", published, num_heads=HEADS)(images()), forward(state, images())[:, 0])


def test_images_are_normalised_as_each_system_did():
    published = transformers_layout(backbone())
    means = {
        s: pl.load_reference(s, published, num_heads=HEADS).pretrained_cfg["mean"][0] for s in ("rad_dino", "dinov2")
    }
    assert means == {"rad_dino": 0.5307, "dinov2": 0.485}
    tiles = pl.load_reference("phikon_v2", published, num_heads=HEADS)
    assert tiles.pretrained_cfg["std"][0] == 0.229


def training_state(separate: bool, chunks: bool = False, centres: bool = True) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for seed, network in ((1, "student."), (2, "teacher.")):
        inner = backbone(seed=seed)
        if chunks:
            inner = {
                f"blocks.{int(n.split('.')[1]) // 2}.{n.removeprefix('blocks.')}" if n.startswith("blocks.") else n: v
                for n, v in inner.items()
            }
        state |= prefixed(inner, f"{network}backbone.") | prefixed(head(seed), f"{network}dino_head.")
        if separate:
            state |= prefixed(head(seed + 5, prototypes=16, bottleneck=8), f"{network}ibot_head.")
    if centres:
        generator = torch.Generator().manual_seed(3)
        state["dino_loss.center"] = torch.randn(1, PROTOTYPES, generator=generator) * 0.1
        state["ibot_patch_loss.center"] = torch.randn(1, 1, 16 if separate else PROTOTYPES, generator=generator) * 0.1
    return state


def network_of(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@pytest.mark.parametrize("separate", [False, True])
def test_a_training_checkpoint_gives_the_published_losses(separate):
    state = training_state(separate)
    model = pl.load_reference("dinov2", {"model": state, "iteration": 5}, num_heads=HEADS)
    assert isinstance(model, DINOv2)
    batch, tau = 3, 0.05
    globals_, locals_ = images(2 * batch), images(2 * batch, 12, 12, seed=4)
    masks = torch.zeros(2 * batch, GRID**2, dtype=torch.bool)
    masks[1, 2:9], masks[4, 20:] = True, True
    losses = model(globals_, locals_, masks, tau)
    student, teacher = (network_of(state, f"{name}.backbone.") for name in ("student", "teacher"))
    heads = {name: network_of(state, f"{name}.") for name in ("student.dino_head", "teacher.dino_head")}
    patch = "ibot_head" if separate else "dino_head"
    seen, hidden, small = forward(teacher, globals_), forward(student, globals_, masks), forward(student, locals_)
    z = logits(heads["teacher.dino_head"], torch.cat([seen[batch:, 0], seen[:batch, 0]]))
    t = ((z - state["dino_loss.center"]) / tau).softmax(-1)
    z = logits(network_of(state, f"teacher.{patch}."), seen[:, 1:][masks])
    t_patch = ((z - state["ibot_patch_loss.center"][0]) / tau).softmax(-1)
    s = (logits(heads["student.dino_head"], hidden[:, 0]) / 0.1).log_softmax(-1)
    s_local = (logits(heads["student.dino_head"], small[:, 0]) / 0.1).log_softmax(-1)
    s_patch = (logits(network_of(state, f"student.{patch}."), hidden[:, 1:][masks]) / 0.1).log_softmax(-1)
    same(losses["dino_global_loss"], -(t * s).sum(-1).mean() * 2 / 6)
    local = sum(-(view * crop).sum(-1).mean() for crop in s_local.chunk(2) for view in t.chunk(2)) / 6
    same(losses["dino_local_loss"], torch.as_tensor(local))
    weights = torch.cat([torch.full((7,), 1 / 7), torch.full((5,), 1 / 5)])
    same(losses["ibot_loss"], -((t_patch * s_patch).sum(-1) * weights).sum() / (2 * batch))


def test_chunked_wrapped_and_centreless_checkpoints_are_the_same():
    plain, chunked = (training_state(True, chunks) for chunks in (False, True))
    wrapped = {f"module.{name}": value for name, value in chunked.items()}
    models = [pl.load_reference("dinov2", state, num_heads=HEADS) for state in (plain, chunked, wrapped)]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], each[name]) for each in states[1:] for name in states[0])
    without = pl.load_reference(
        "dinov2", training_state(False, centres=False), num_heads=HEADS, centering="sinkhorn_knopp"
    )
    assert without.centering == "sinkhorn_knopp"
    assert not without.dino_centering.center.any()


def test_a_teacher_alone_comes_with_its_heads():
    state = network_of(training_state(True), "teacher.")
    model = pl.load_reference("dinov2", {"teacher": state}, num_heads=HEADS)
    assert isinstance(model, Distilled)
    inner = network_of(state, "backbone.")
    same(model(images()), forward(inner, images())[:, 0])
    masks = torch.zeros(2, GRID**2, dtype=torch.bool)
    masks[0, 3:6] = True
    crops = model.crops(images(), masks, hide=True)
    expected = forward(inner, images(), masks)
    same(crops.classes, expected[:, 0])
    same(crops.patches, expected[:, 1:][masks])
    found = model.heads(crops.classes, crops.patches)
    same(found[0], logits(network_of(state, "dino_head."), expected[:, 0]))
    same(found[1], logits(network_of(state, "ibot_head."), expected[:, 1:][masks]))
    small = images(2, 12, 16)
    same(model(small), forward(inner, small)[:, 0])


def test_a_head_alone_is_a_head():
    state = head(seed=4)
    model = pl.load_reference("rad_dino", state)
    assert isinstance(model, DINOHead)
    x = torch.randn(3, WIDTH)
    same(model(x), logits(state, x))


def odd_head(layers: int, bias: bool, norm: bool, hidden: int = 10, prototypes: int = 6, bottleneck: int = 5):
    """A head of another build than the default: random tensors, and what it computes, in float64."""
    generator = torch.Generator().manual_seed(layers + 2 * bias + 4 * norm)
    state: dict[str, torch.Tensor] = {}
    step = 3 if norm else 2
    widths = [WIDTH, *[hidden] * (layers - 1), bottleneck]
    for number in range(layers):
        name = f"mlp.{number * step}" if layers > 1 else "mlp"
        state[f"{name}.weight"] = torch.randn(widths[number + 1], widths[number], generator=generator) * 0.4
        if bias:
            state[f"{name}.bias"] = torch.randn(widths[number + 1], generator=generator)
        if norm and number < layers - 1:
            for part in ("weight", "bias", "running_mean"):
                state[f"mlp.{number * step + 1}.{part}"] = torch.randn(hidden, generator=generator)
            state[f"mlp.{number * step + 1}.running_var"] = 0.5 + torch.rand(hidden, generator=generator)
            state[f"mlp.{number * step + 1}.num_batches_tracked"] = torch.tensor(9)
    state["last_layer.weight_g"] = torch.randn(prototypes, 1, generator=generator)
    state["last_layer.weight_v"] = torch.randn(prototypes, bottleneck, generator=generator)

    def forward(x: torch.Tensor) -> torch.Tensor:
        s, x = {name: value.double() for name, value in state.items()}, x.double()
        for number in range(layers):
            name = f"mlp.{number * step}" if layers > 1 else "mlp"
            x = x @ s[f"{name}.weight"].T + s.get(f"{name}.bias", torch.zeros(()).double())
            if number == layers - 1:
                break
            if norm:
                own = f"mlp.{number * step + 1}"
                x = (x - s[f"{own}.running_mean"]) / (s[f"{own}.running_var"] + 1e-5).sqrt()
                x = x * s[f"{own}.weight"] + s[f"{own}.bias"]
            x = torch.nn.functional.gelu(x)
        x = x / x.norm(dim=-1, keepdim=True)
        v = s["last_layer.weight_v"]
        return x @ (s["last_layer.weight_g"] * v / v.norm(dim=1, keepdim=True)).T

    return state, forward


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_heads_of_every_build_give_the_published_logits(layers, bias, norm):
    state, expected = odd_head(layers, bias, norm)
    told = {"mlp_bias": bias, "nlayers": layers, "head_n_prototypes": 6, "hidden_dim": 10, "in_dim": WIDTH}
    model = pl.load_reference("dinov2", state, **told, **({"use_bn": norm} if layers > 1 else {}))
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(model(x).double(), expected(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match=f"mlp_bias={not bias}, but the checkpoint's tensors say {bias}"):
        pl.load_reference("dinov2", state, mlp_bias=not bias)


@pytest.mark.parametrize(("bias", "norm"), [(True, False), (False, True)])
def test_the_patches_head_of_a_training_checkpoint_may_have_any_size(bias, norm):
    state: dict[str, torch.Tensor] = {}
    dino, of_classes = odd_head(3, bias, norm, hidden=10, prototypes=6, bottleneck=5)
    ibot, of_patches = odd_head(2, bias, norm, hidden=14, prototypes=9, bottleneck=4)
    for seed, network in ((1, "student."), (2, "teacher.")):
        state |= prefixed(backbone(seed=seed), f"{network}backbone.")
        state |= prefixed(dino, f"{network}dino_head.") | prefixed(ibot, f"{network}ibot_head.")
    state |= {"dino_loss.center": torch.zeros(1, 6), "ibot_patch_loss.center": torch.zeros(1, 1, 9)}
    config = {
        "dino": {"head_n_prototypes": 6, "head_bottleneck_dim": 5, "head_nlayers": 3, "head_hidden_dim": 10},
        "ibot": {"separate_head": True, "head_n_prototypes": 9, "head_bottleneck_dim": 4, "head_nlayers": 2},
    }
    model = pl.load_reference("dinov2", {"model": state}, num_heads=HEADS, **config)
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(6))
    classes, patches = model.teacher.heads(x, x)
    torch.testing.assert_close(classes.double(), of_classes(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patches.double(), of_patches(x), atol=1e-5, rtol=1e-5)
    config["ibot"]["head_n_prototypes"] = 6
    with pytest.raises(UsageError, match="ibot_out_dim=6, but the checkpoint's tensors say 9"):
        pl.load_reference("dinov2", {"model": state}, num_heads=HEADS, **config)


OFFICIAL = {
    "MODEL": {"WEIGHTS": ""},
    "compute_precision": {"grad_scaler": True},
    "dino": {"loss_weight": 1.0, "head_n_prototypes": PROTOTYPES, "head_bottleneck_dim": 12, "head_nlayers": 3}
    | {"head_hidden_dim": 20, "koleo_loss_weight": 0.1},
    "ibot": {"loss_weight": 1.0, "mask_sample_probability": 0.5, "mask_ratio_min_max": [0.1, 0.5]}
    | {"separate_head": False, "head_n_prototypes": 65536, "head_bottleneck_dim": 256, "head_nlayers": 3}
    | {"head_hidden_dim": 2048},
    "train": {"batch_size_per_gpu": 64, "dataset_path": "ImageNet:split=TRAIN", "output_dir": ".", "saveckp_freq": 20}
    | {"seed": 0, "num_workers": 10, "OFFICIAL_EPOCH_LENGTH": 1250, "cache_dataset": True, "centering": "centering"},
    "student": {"arch": "vit_large", "patch_size": PATCH, "drop_path_rate": 0.3, "layerscale": 1e-5, "block_chunks": 0}
    | {"drop_path_uniform": True, "pretrained_weights": "", "ffn_layer": "mlp", "qkv_bias": True, "proj_bias": True}
    | {"ffn_bias": True, "num_register_tokens": 0, "interpolate_antialias": False, "interpolate_offset": 0.1},
    "teacher": {"momentum_teacher": 0.992, "final_momentum_teacher": 1, "warmup_teacher_temp": 0.04},
    "optim": {"epochs": 100, "weight_decay": 0.04, "base_lr": 0.004},
    "crops": {"global_crops_scale": [0.32, 1.0], "local_crops_number": 8, "global_crops_size": 224},
    "evaluation": {"eval_period_iterations": 12500},
}


def test_the_official_configuration_is_taken_whole():
    for state in (backbone(), prefixed(backbone(), "teacher.backbone.")):
        same(
            pl.load_reference("dinov2", state, num_heads=HEADS, **OFFICIAL)(images()),
            forward(backbone(), images())[:, 0],
        )
    model = pl.load_reference("dinov2", {"model": training_state(False)}, num_heads=HEADS, **OFFICIAL)
    assert (model.koleo_weight, model.student.part_rate) == (0.1, 0.3)
    wrong = {**OFFICIAL, "student": {**OFFICIAL["student"], "patch_size": 14}}
    with pytest.raises(UsageError, match="patch_size=14, but the checkpoint's tensors say 4"):
        pl.load_reference("dinov2", backbone(), num_heads=HEADS, **wrong)
    with pytest.raises(UsageError, match="unknown setting 'heads_dim'"):
        pl.load_reference("dinov2", backbone(), num_heads=HEADS, **{**OFFICIAL, "dino": {"heads_dim": 3}})


def test_the_configuration_of_transformers_is_taken_whole_and_its_epsilon_obeyed():
    config = {
        "architectures": ["Dinov2Model"],
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": WIDTH,
        "image_size": SIDE,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1.0,
        "mlp_ratio": 4,
        "model_type": "dinov2",
        "num_attention_heads": HEADS,
        "num_channels": 3,
        "num_hidden_layers": 3,
        "out_features": ["stage3"],
        "out_indices": [3],
        "patch_size": PATCH,
        "qkv_bias": True,
        "stage_names": ["stem"],
        "torch_dtype": "float32",
        "transformers_version": "4.37.2",
        "use_swiglu_ffn": False,
        "apply_layernorm": True,
        "reshape_hidden_states": True,
    }
    state = transformers_layout(backbone())
    same(pl.load_reference("rad_dino", state, **config)(images()), forward(backbone(), images())[:, 0])
    with pytest.warns(UserWarning, match=r"epsilon 0\.01"):
        model = pl.load_reference("rad_dino", state, **{**config, "layer_norm_eps": 1e-2})
    assert {module.eps for module in model.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-2}
    with pytest.raises(UsageError, match="hidden_act=relu is not computed here"):
        pl.load_reference("rad_dino", state, **{**config, "hidden_act": "relu"})


def test_phikon_of_the_first_version_is_its_teacher():
    teacher = prefixed(backbone(scale=False, seed=1), "module.backbone.")
    student = prefixed(backbone(scale=False, seed=2), "module.backbone.")
    teacher["module.head.last_layer.weight"] = torch.randn(5, 5)
    model = pl.load_reference("phikon_v2", {"student": student, "teacher": teacher}, num_heads=HEADS)
    same(model(images()), forward(backbone(scale=False, seed=1), images())[:, 0])


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda s: s.pop("norm.weight"), {}, "missing: norm.weight"),
        (lambda s: s.update({"extra": torch.zeros(1)}), {}, "unexpected: extra"),
        (lambda s: s.pop("pos_embed"), {}, "has no pos_embed"),
        (lambda s: s.pop("cls_token"), {}, "has no cls_token"),
        (lambda s: s.pop("mask_token"), {}, "missing: mask_token"),
        (lambda s: s.update({"head.weight": torch.zeros(1)}), {}, "unexpected: head.weight"),
        (lambda s: None, {"depth": 7}, "depth=7, but the checkpoint's tensors say 3"),
        (
            lambda s: None,
            {"ffn_layer": "swiglufused"},
            "ffn_layer=swiglufused, but the checkpoint's tensors say mlp",
        ),
        (lambda s: None, {"num_head": 4}, "did you mean num_heads"),
        (lambda s: None, {"num_heads": 5}, "divisible by num_heads"),
        (lambda s: None, {"image_size": 30}, r"image_size \(30, 30\) is not divisible by the patch size 4"),
        (lambda s: s.update({"pos_embed": s["pos_embed"][:, :-1]}), {}, "24 positions are of no square grid"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, settings, message):
    state = backbone()
    change(state)
    with pytest.raises(UsageError, match=message):
        pl.load_reference("dinov2", state, **{"num_heads": HEADS, **settings})


@pytest.mark.parametrize("prefix", ["teacher.backbone.", "student.backbone.", "backbone."])
def test_what_belongs_to_no_part_is_refused(prefix):
    state = prefixed(backbone(), prefix)
    assert pl.load_reference("dinov2", state, num_heads=HEADS)
    with pytest.raises(UsageError, match="unexpected: junk"):
        pl.load_reference("dinov2", {**state, "junk.weight": torch.zeros(2)}, num_heads=HEADS)
    layout = transformers_layout(backbone(), prefix="dinov2.")
    with pytest.raises(UsageError, match="unexpected: junk"):
        pl.load_reference("dinov2", {**layout, "junk.weight": torch.zeros(2)}, num_heads=HEADS)


def test_a_grid_that_is_not_square_is_told():
    state = backbone()
    state["pos_embed"] = state["pos_embed"][:, :-1]
    model = pl.load_reference("dinov2", state, num_heads=HEADS, image_size=(16, 24))
    assert model(images(1, 16, 24)).shape == (1, WIDTH)


def test_the_default_number_of_heads_is_that_of_the_published_sizes():
    state = backbone()
    assert pl.load_reference("dinov2", state).blocks[0].attn.num_heads == 1


@pytest.mark.parametrize("gated", [False, True])
def test_transformers_own_model_and_configuration_agree(gated):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=20, patch_size=4, use_swiglu_ffn=gated
    )
    theirs = transformers.Dinov2Model(config).eval()
    generator = torch.Generator().manual_seed(0)
    for value in theirs.state_dict().values():
        value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    ours = pl.load_reference("rad_dino", theirs.state_dict(), **config.to_dict())
    with torch.no_grad():
        same(ours(images()), theirs(images()).pooler_output)
