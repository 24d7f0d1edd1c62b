"""Published ViT-CoMer checkpoints against the forward pass written out by hand, every tensor drawn at random."""

from __future__ import annotations

import pytest
import torch

import comer_formulas as formulas
import patchloom as pl
from comer_formulas import layout
from patchloom.errors import UsageError
from patchloom.systems.published import import_reference
from patchloom.systems.vit_comer.model import ViTCoMer
from segment_support import fcn_layout, upernet, upernet_layout

STAGES = [(0, 0), (1, 1), (2, 2), (3, 3)]
ABOUT = {"heads": 3, "deform_heads": 3, "points": 2, "stages": STAGES, "windows": [None] * 4, "vit": "per_stage"}
TOLD = {"num_heads": 3, "n_points": 2}


def images(*sides):
    return torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(1))


def expected_of(state, pictures, **about):
    doubled = {name: value.double() for name, value in state.items()}
    return formulas.backbone(doubled, pictures.double(), {**ABOUT, **about})


def same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
@pytest.mark.parametrize("sides", [(64, 64), (64, 96)])
@torch.no_grad()
def test_a_backbone_for_segmentation(prefix, sides):
    state = layout()
    wrapped = {"meta": {}, "state_dict": {f"{prefix}{name}": value for name, value in state.items()}}
    model = pl.load_reference("vit_comer", wrapped, flavour="segmentation", **TOLD)
    assert isinstance(model, ViTCoMer)
    assert not model.training
    same(model(images(*sides)), expected_of(state, images(*sides)))


@pytest.mark.parametrize("sides", [(64, 64), (64, 96)])
@torch.no_grad()
def test_a_backbone_for_detection(sides, capsys):
    state = layout(middle=6, values=6, extra=2)
    published = {
        "window_attn": [True, True, False, True],
        "window_size": [3, 3, None, 3],
        "cnn_feature_interaction": [True] * 4,
        "interaction_indexes": [[number, number] for number in range(4)],
        "deform_num_heads": 3,
        "deform_ratio": 0.5,
        "conv_inplane": 4,
        "extra_num": 2,
        "pretrain_size": 64,
        "num_heads": 3,
        "embed_dim": 12,
        "drop_path_rate": 0.2,
    }
    model = pl.load_reference("vit_comer", state, **published)
    assert "taken for a backbone of the published detection code" in capsys.readouterr().err
    expected = expected_of(state, images(*sides), windows=[3, 3, None, 3], vit="last")
    same(model(images(*sides)), expected)
    assert model.encoder.blocks[-1].drop_path2.drop_prob == pytest.approx(0.2)
    assert model.adapter.interactions[0].cti_tov.drop_path.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize("unused", [True, False])
@torch.no_grad()
def test_exchanges_that_are_left_out_may_have_unused_tensors(unused):
    state = layout(to_vit=(True, False, False, True), interacts=False, gammas=False, unused=unused)
    switches = {"use_CTI_toV": [True, False, False, True], "cnn_feature_interaction": False}
    model = pl.load_reference("vit_comer", state, flavour="segmentation", **switches, **TOLD)
    same(model(images(64, 64)), expected_of(state, images(64, 64)))


@torch.no_grad()
def test_a_whole_upernet_checkpoint():
    heads = {f"decode_head.{name}": value for name, value in upernet_layout((12,) * 4, 8, 5).items()}
    heads |= {f"auxiliary_head.{name}": value for name, value in fcn_layout(12, 6, 5).items()}
    state = layout()
    whole = heads | {f"backbone.{name}": value for name, value in state.items()}
    groups = {
        "backbone": {"type": "ViTCoMer", **TOLD, "dim_ratio": 1.5, "pretrain_size": 64},
        "decode_head": {"type": "UPerHead", "in_channels": [12] * 4, "num_classes": 5, "channels": 8},
    }
    model = pl.load_reference("vit_comer", whole, pretrained=None, **groups)
    maps = expected_of(state, images(64, 64))
    decoder = {name.removeprefix("decode_head."): value.double() for name, value in heads.items()}
    expected = upernet(decoder, maps)
    scale = expected.abs().max()
    torch.testing.assert_close(model(images(64, 64)).double() / scale, expected / scale, atol=1e-5, rtol=1e-5)
    assert model.decoder.auxiliary_logits(model.backbone(images(64, 64))).shape == (2, 5, 4, 4)


def test_a_detector_gives_its_backbone():
    whole = {f"backbone.{name}": value for name, value in layout(middle=6).items()}
    whole |= {"neck.lateral_convs.0.conv.weight": torch.zeros(1), "rpn_head.rpn_conv.weight": torch.zeros(1)}
    with pytest.warns(UserWarning, match="2 tensors of the detector behind the backbone are left out"):
        model = pl.load_reference("vit_comer", whole, **TOLD)
    assert model.vit_features == "last"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.2.gamma1"), "missing: blocks.2.gamma1"),
        (
            lambda s: s.pop("interactions.3.extra_CTIs.1.ffn.fc1.bias"),
            "missing: interactions.3.extra_CTIs.1.ffn.fc1.bias",
        ),
        (lambda s: s.update({"surprise": torch.zeros(1)}), "unexpected: surprise"),
        (lambda s: s.update({"up.bias": torch.zeros(3)}), r"up.bias \(3,\) instead of \(12,\)"),
        (lambda s: s.pop("spm.stem.0.weight"), "missing: spm.stem.0.weight"),
        (lambda s: s.update({"pos_embed": torch.zeros(1, 16, 12)}), "pos_embed has 16 rows"),
        (lambda s: [s.pop(name) for name in list(s) if name.startswith("inter")], "none of what ViT-CoMer adds"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message):
    state = layout()
    change(state)
    with pytest.raises(UsageError, match=message):
        pl.load_reference("vit_comer", state, flavour="segmentation", **TOLD)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"depth": 12}, "depth=12, but the checkpoint's tensors say 4"),
        ({"dim_ratio": 6.0}, "dim_ratio=6.0, but the checkpoint's tensors say 1.5"),
        ({"use_CTI_toV": False}, "use_CTI_toV"),
        ({"deform_num_heads": 4}, "18 weights of deformable attention are not 3 maps times 4 heads times 2 points"),
        ({"flavour": "beit"}, "flavour"),
        ({"preset": "upernet_s"}, "embed_dim=384, but the checkpoint's tensors say 12"),
        ({"preset": "upernet"}, "preset"),
        ({"num_classes_": 3}, "num_classes_ is given, and the checkpoint has no head"),
        ({"window_attn": [True]}, "window_attn has 1 values"),
        ({"interaction_indexes": [[0, 1], [2, 2], [3, 3]]}, "there are 3 stages"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, message):
    with pytest.raises(UsageError, match=message):
        pl.load_reference("vit_comer", layout(), **{**TOLD, "flavour": "segmentation", **config})


def test_a_checkpoint_is_imported_as_its_encoder(tmp_path):
    torch.save({"state_dict": layout()}, tmp_path / "comer.pth")
    settings = {**TOLD, "flavour": "segmentation"}
    out = import_reference("vit_comer", str(tmp_path / "comer.pth"), str(tmp_path / "bundle"), settings=settings)
    encoder = pl.load(out)
    assert torch.equal(encoder.blocks[3].ls1.gamma, layout()["blocks.3.gamma1"])
    assert encoder.forward_features(images(64, 64)).shape == (2, 16, 12)
