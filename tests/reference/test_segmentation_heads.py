"""Published decoders: both spellings go in and give the published logits."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn import functional as F

import patchloom as pl
from patchloom.errors import UsageError
from patchloom.segment import BNHead, FCNHead, LinearHead, MultiLevelNeck, SETRUPHead, SimpleFeaturePyramid, ViTNeck
from segment_support import conv_bn, fcn_layout, randomised, upernet, upernet_layout

WIDTHS = (6, 8, 10, 12)


@pytest.fixture
def maps():
    torch.manual_seed(0)
    return [
        torch.randn(2, width, *size) for width, size in zip(WIDTHS, ((16, 20), (8, 10), (4, 5), (2, 3)), strict=True)
    ]


@pytest.mark.parametrize(("norm", "last"), [("bn", "conv_seg"), ("batch_norm", "classifier")])
def test_a_whole_model_gives_the_published_logits(maps, norm, last):
    head, auxiliary = upernet_layout(WIDTHS, 7, 5, norm, last), fcn_layout(10, 9, 5, norm, last)
    state = {f"decode_head.{k}": v for k, v in head.items()} | {f"auxiliary_head.{k}": v for k, v in auxiliary.items()}
    model = pl.load_reference("segmentation_heads", {"state_dict": state})
    torch.testing.assert_close(model(maps), upernet(head, maps, norm, last), atol=1e-5, rtol=1e-5)
    x = conv_bn(auxiliary, "convs.0", maps[2], norm)
    expected = F.conv2d(x, auxiliary[f"{last}.weight"], auxiliary[f"{last}.bias"])
    torch.testing.assert_close(model.auxiliary_head(maps), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.auxiliary_logits(maps), expected, atol=1e-5, rtol=1e-5)
    assert not model.training


def test_upernet_equals_the_port_in_transformers(maps):
    transformers = pytest.importorskip("transformers")
    from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

    config = transformers.UperNetConfig(
        backbone_config=transformers.ResNetConfig(),
        hidden_size=8,
        auxiliary_channels=6,
        auxiliary_in_channels=10,
        auxiliary_concat_input=True,
        num_labels=5,
    )
    theirs = UperNetHead(config, in_channels=list(WIDTHS)), UperNetFCNHead(config, in_channels=list(WIDTHS))
    for head in theirs:
        randomised(head).float()
        ours = pl.load_reference("segmentation_heads", head.state_dict(), num_labels=5)
        with torch.no_grad():
            torch.testing.assert_close(ours(maps), head(maps), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("module", "shapes", "config"),
    [
        (BNHead([4, 5], 3), [(4, 4, 4), (5, 2, 2)], {"in_channels": 9}),
        (LinearHead(4, 3), [(4, 4, 4)], {}),
        (LinearHead(4, 3, norm="ln"), [(4, 4, 4)], {}),
        (SETRUPHead(4, 3, channels=5, num_convs=3), [(4, 2, 2)], {"up_scale": 2}),
        (SETRUPHead(4, 3, channels=5, num_convs=1, up_scale=4), [(4, 2, 2)], {}),
        (FCNHead(4, 3, channels=5, num_convs=2, concat_input=True, in_index=0), [(4, 4, 4)], {"in_index": 0}),
        (MultiLevelNeck([4, 4, 4, 4], 3), [(4, 4, 4)] * 4, {}),
        (ViTNeck("beit", 4), [(4, 4, 4)] * 4, {}),
        (SimpleFeaturePyramid(8, 6), [(8, 4, 4)], {}),
    ],
)
def test_every_decoder_is_told_by_its_tensors(module, shapes, config):
    randomised(module).float()
    loaded = pl.load_reference("segmentation_heads", module.state_dict(), **config)
    assert type(loaded) is type(module)
    maps = [torch.randn(1, *shape) for shape in shapes]
    torch.testing.assert_close(loaded(maps), module(maps))


def test_dinov3s_linear_head_drops_first_and_norms_then():
    state = {"conv.weight": torch.randn(3, 8, 1, 1), "conv.bias": torch.randn(3)}
    for part in ("weight", "bias", "running_mean"):
        state[f"batchnorm_layer.{part}"] = torch.randn(8)
    state["batchnorm_layer.running_var"] = torch.rand(8) + 0.5
    head = pl.load_reference("segmentation_heads", state, dropout=0.1)
    x = torch.randn(2, 8, 3, 3)
    normed = F.batch_norm(
        x, *(state[f"batchnorm_layer.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
    )
    torch.testing.assert_close(head([x]), F.conv2d(normed, state["conv.weight"], state["conv.bias"]))
    assert head.dropout_first


def test_an_encoder_in_the_checkpoint_is_left_out_aloud():
    state = {f"decode_head.{k}": v for k, v in upernet_layout(WIDTHS, 4, 3).items()}
    with pytest.warns(UserWarning, match="1 tensors of the backbone are left out"):
        pl.load_reference("upernet", {**state, "backbone.cls_token": torch.zeros(1, 1, 4)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pl.load_reference("upernet", state)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda s: s.pop("decode_head.bottleneck.bn.bias"), {}, "missing: bottleneck.bn.bias"),
        (lambda s: s.update({"decode_head.extra": torch.zeros(1)}), {}, "unexpected: extra"),
        (lambda s: s.update({"head.weight": torch.zeros(1)}), {}, "unexpected: head.weight"),
        (lambda s: None, {"num_classes": 9}, "num_classes=9, but the checkpoint's tensors say 3"),
        (lambda s: None, {"pool_scale": 9}, "did you mean pool_scales"),
        (lambda s: None, {"pool_scales": (1, 2)}, "pools at 4 scales"),
    ],
)
def test_what_does_not_fit_is_refused(change, config, message):
    state = {f"decode_head.{k}": v for k, v in upernet_layout(WIDTHS, 4, 3).items()}
    change(state)
    with pytest.raises(UsageError, match=message):
        pl.load_reference("segmentation_heads", state, **config)


def test_tensors_of_no_decoder_are_refused():
    with pytest.raises(UsageError, match=r"no tensor of a known decoder; it has norm\.scale"):
        pl.load_reference("segmentation_heads", {"norm.scale": torch.zeros(1)})
