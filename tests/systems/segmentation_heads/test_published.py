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
        (lambda s: s.pop("decode_head.bottleneck.bn.bias"), {}, r"missing: decode_head\.bottleneck\.bn\.bias"),
        (lambda s: s.update({"decode_head.extra": torch.zeros(1)}), {}, r"unexpected: decode_head\.extra"),
        (lambda s: s.update({"head.weight": torch.zeros(1)}), {}, "unexpected: head.weight"),
        (lambda s: None, {"num_classes": 9}, "num_classes=9, but the checkpoint's tensors say 3"),
        (lambda s: None, {"pool_scale": 9}, "did you mean pool_scales"),
        (lambda s: None, {"pool_scales": (1, 2)}, "pools at 4 scales"),
        (lambda s: s.pop("decode_head.conv_seg.weight"), {}, r"missing: decode_head\.conv_seg\.weight"),
        (
            lambda s: s.pop("decode_head.psp_modules.1.1.conv.weight"),
            {},
            r"missing: .*psp_modules\.1\.1\.conv",
        ),
        (
            lambda s: s.pop("decode_head.lateral_convs.1.conv.weight"),
            {},
            r"missing: .*lateral_convs\.1\.conv",
        ),
        (lambda s: s.update({"decode_head.conv_seg.weight": torch.zeros(3)}), {}, r"has the shape \(3,\)"),
        (lambda s: None, {"align_corners": True}, "align_corners=True is not computed here"),
        (lambda s: None, {"input_transform": "resize_concat"}, "it is multiple_select"),
        (lambda s: None, {"in_index": 2}, "UPerNet takes 4 maps here; in_index is 2"),
        (
            lambda s: None,
            {"auxiliary_in_index": 2},
            "checkpoint has no auxiliary_head",
        ),
        (lambda s: None, {"neck_scales": (1, 2)}, "neck_scales is given and the checkpoint has no neck"),
        (lambda s: s.update({"fpn1.0.weight": s["decode_head.bottleneck.conv.weight"]}), {}, "missing: fpn1.0.bias"),
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


def alone(state, start):
    """Return the tensors whose names begin with `start`."""
    return {name: tensor for name, tensor in state.items() if name.startswith(start)}


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def square_maps(width, side=6):
    return [torch.randn(1, width, side, side) for _ in range(4)]


@pytest.mark.parametrize("prefix", ["backbone.", "neck.", ""])
def test_the_neck_is_found_in_the_encoder_beside_the_head_and_under_its_own_name(prefix):
    torch.manual_seed(1)
    neck, head = randomised(ViTNeck("beit", 6)).float(), upernet_layout((6,) * 4, 5, 3)
    state = under(prefix, neck.state_dict()) | under("decode_head.", head)
    model = pl.load_reference("segmentation_heads", state)
    maps = square_maps(6)
    torch.testing.assert_close(model(maps), upernet(head, neck(maps)), atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="1 tensors of the backbone are left out"):
        pl.load_reference("segmentation_heads", state | {"backbone.blocks.0.norm1.weight": torch.randn(6)})


@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_detectron2s_pyramid_is_loaded_without_the_encoder_inside(prefix):
    torch.manual_seed(2)
    neck = randomised(SimpleFeaturePyramid(8, 6)).float()
    state = under(prefix, neck.state_dict()) | {f"{prefix}net.patch_embed.proj.weight": torch.randn(8, 3, 4, 4)}
    with pytest.warns(UserWarning, match="1 tensors of the backbone are left out"):
        loaded = pl.load_reference("segmentation_heads", state, top=True)
    maps = [torch.randn(1, 8, 4, 4)]
    found = loaded(maps)
    for ours, theirs in zip(found, neck(maps), strict=False):
        torch.testing.assert_close(ours, theirs)
    assert len(found) == 5


@pytest.mark.parametrize(("prefix", "config"), [("neck.", {"neck_scales": (2, 1)}), ("neck.", {"scales": (2, 1)})])
def test_a_neck_alone_is_that_neck(prefix, config):
    neck = randomised(MultiLevelNeck([4, 5], 3, scales=(2, 1))).float()
    loaded = pl.load_reference("segmentation_heads", under(prefix, neck.state_dict()), **config)
    maps = [torch.randn(1, 4, 4, 4), torch.randn(1, 5, 4, 4)]
    for ours, theirs in zip(loaded(maps), neck(maps), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("config", [{"auxiliary_in_index": 1}, {"in_index": 1}])
def test_an_auxiliary_head_alone_is_that_head(maps, config):
    state = fcn_layout(8, 9, 5, "batch_norm", "classifier")
    head = pl.load_reference("upernet", under("auxiliary_head.", state), **config)
    expected = F.conv2d(
        conv_bn(state, "convs.0", maps[1], "batch_norm"), state["classifier.weight"], state["classifier.bias"]
    )
    torch.testing.assert_close(head(maps), expected, atol=1e-5, rtol=1e-5)


def test_several_auxiliary_heads_take_one_map_each():
    torch.manual_seed(3)
    main = randomised(SETRUPHead(4, 3, channels=5)).float()
    heads = [randomised(SETRUPHead(4, 3, channels=5, num_convs=1, up_scale=4)).float() for _ in range(3)]
    state = under("decode_head.", main.state_dict())
    for number, head in enumerate(heads):
        state |= under(f"auxiliary_head.{number}.", head.state_dict())
    maps = square_maps(4, 2)
    model = pl.load_reference("segmentation_heads", state)
    torch.testing.assert_close(model(maps), main(maps))
    for number, (found, head) in enumerate(zip(model.auxiliary_logits(maps), heads, strict=True)):
        torch.testing.assert_close(found, head([maps[number]]))
    own = {"auxiliary_in_index": [3, 1, 2]}
    chosen = pl.load_reference("segmentation_heads", alone(state, "auxiliary_head."), **own)
    for index, found, head in zip((3, 1, 2), chosen, heads, strict=True):
        torch.testing.assert_close(found(maps), head([maps[index]]))
    with pytest.raises(UsageError, match="auxiliary_in_index has 2 values for 3 heads"):
        pl.load_reference("segmentation_heads", state, auxiliary_in_index=[0, 1])
    gap = {name: tensor for name, tensor in state.items() if not name.startswith("auxiliary_head.1.")}
    with pytest.raises(UsageError, match=r"missing: auxiliary_head\.1\."):
        pl.load_reference("segmentation_heads", gap)


@pytest.mark.parametrize(
    ("module", "config", "picked"),
    [
        (LinearHead(4, 3), {"in_index": 2, "input_transform": None}, [2]),
        (BNHead([4, 4], 3), {"in_index": [3, 0], "in_channels": [4, 4], "channels": 8}, [3, 0]),
        (BNHead(16, 3), {"input_transform": "resize_concat", "align_corners": False}, [0, 1, 2, 3]),
        (FCNHead(8, 3, channels=5, kernel_size=1, in_index=(0, 1)), {"in_index": [1, 2], "kernel_size": 1}, [1, 2]),
    ],
)
def test_published_settings_do_what_they_say(module, config, picked):
    randomised(module).float()
    loaded = pl.load_reference("segmentation_heads", module.state_dict(), **config, dropout_ratio=0.3)
    maps = square_maps(4)
    torch.testing.assert_close(loaded(maps), module([maps[index] for index in picked]))
    assert loaded.dropout.p == 0.3


def test_upernet_takes_its_maps_in_the_order_named(maps):
    head = upernet_layout(WIDTHS, 7, 5)
    loaded = pl.load_reference("upernet", head, in_index=[3, 2, 1, 0], input_transform="multiple_select")
    torch.testing.assert_close(loaded(maps[::-1]), upernet(head, maps), atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="there are 3 maps"):
        loaded(maps[1:])


@pytest.mark.parametrize(
    "layout",
    [
        upernet_layout(WIDTHS, 4, 3),
        upernet_layout(WIDTHS, 4, 3, "batch_norm", "classifier"),
        fcn_layout(10, 9, 5, concat=True),
        SETRUPHead(4, 3, channels=5).state_dict(),
        BNHead(8, 3).state_dict(),
        LinearHead(8, 3).state_dict(),
        MultiLevelNeck([4] * 4, 3).state_dict(),
        ViTNeck("beit", 4).state_dict(),
        SimpleFeaturePyramid(8, 6).state_dict(),
        {
            **under("batchnorm_layer.", torch.nn.BatchNorm2d(8).state_dict()),
            **under("conv.", torch.nn.Conv2d(8, 3, 1).state_dict()),
        },
    ],
)
def test_whichever_tensor_is_missing_is_named_as_the_file_has_it(layout):
    is_neck = "conv_seg.bias" not in layout and "classifier.bias" not in layout and "conv.bias" not in layout
    state = under("" if is_neck else "decode_head.", layout)
    for name in state:
        without = {other: tensor for other, tensor in state.items() if other != name}
        if name.endswith("num_batches_tracked"):
            pl.load_reference("segmentation_heads", without)
            continue
        with pytest.raises(UsageError) as error:
            pl.load_reference("segmentation_heads", without)
        assert f"missing: {name}" in str(error.value)


def test_tensors_of_no_part_are_named_beside_the_parts(maps):
    state = fcn_layout(10, 9, 5) | {"decode_head.extra": torch.zeros(1)}
    with pytest.raises(UsageError, match=r"unexpected: convs\.0\.conv\.weight.*beside decode_head\.extra"):
        pl.load_reference("segmentation_heads", state)
    necks = under("neck.", ViTNeck("beit", 4).state_dict()) | under("backbone.", ViTNeck("beit", 4).state_dict())
    with pytest.raises(UsageError, match="necks under"):
        pl.load_reference("segmentation_heads", necks)
