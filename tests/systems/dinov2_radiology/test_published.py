"""The radiology benchmark's decoders and linear probes, one and several in a file."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import patchloom as pl
from patchloom.errors import UsageError


def unet_layout(width: int, classes: int) -> dict[str, torch.Tensor]:
    state = {}
    widths = [width, width // 2, width // 4, width // 8, classes]
    for number in range(1, 5):
        into, out = widths[number - 1], widths[number]
        up = f"up{number}"
        state |= {f"{up}.upconv.weight": torch.randn(into, out, 2, 2), f"{up}.upconv.bias": torch.randn(out)}
        for part, channels in (("conv", 2 * out), ("skip_conv", width)):
            state |= {
                f"{up}.{part}.0.weight": torch.randn(out, channels, 3, 3) * 0.1,
                f"{up}.{part}.0.bias": torch.randn(out),
            }
            state |= {f"{up}.{part}.1.{name}": torch.randn(out) for name in ("weight", "bias", "running_mean")}
            state |= {f"{up}.{part}.1.running_var": torch.rand(out) + 0.5}
    return state


def unet(state, f, size):
    """The published forward pass on maps f0 … f4."""

    def conv(name, x):
        x = F.conv2d(x, state[f"{name}.0.weight"], state[f"{name}.0.bias"], padding=1)
        running = [state[f"{name}.1.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(x, *running))

    x = f[4]
    for number, skip in enumerate((f[3], f[2], f[1], f[0]), start=1):
        x = F.conv_transpose2d(x, state[f"up{number}.upconv.weight"], state[f"up{number}.upconv.bias"], stride=2)
        enlarge = nn.Upsample(size=x.shape[-2:], mode="bilinear", align_corners=True)
        x = conv(f"up{number}.conv", torch.cat([x, enlarge(conv(f"up{number}.skip_conv", skip))], 1))
    return F.interpolate(x, size=size, mode="bicubic", align_corners=False, antialias=True)


def test_decoders_of_several_learning_rates():
    torch.manual_seed(0)
    first = {"decoder.weight": torch.randn(3, 16, 1, 1), "decoder.bias": torch.randn(3)}
    second = unet_layout(16, 3)
    state = {f"module.decoders_dict.linear:lr=0_0010000000.{k}": v for k, v in first.items()}
    state |= {f"module.decoders_dict.unet:lr=0_0500000000.{k}": v for k, v in second.items()}
    tokens = [torch.randn(2, 12, 16) for _ in range(5)]
    maps = [x.transpose(1, 2).reshape(2, 16, 3, 4) for x in tokens]
    found = pl.load_reference("dinov2_radiology", {"model": state})
    assert list(found) == ["linear:lr=0_0010000000", "unet:lr=0_0500000000"]
    linear = F.conv2d(maps[4], first["decoder.weight"], first["decoder.bias"])
    linear = F.interpolate(linear, size=(42, 56), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found["linear:lr=0_0010000000"](tokens, (3, 4)), linear)
    one = pl.load_reference("dinov2_radiology", state, name="unet:lr=0_0500000000")
    with torch.no_grad():
        torch.testing.assert_close(one(tokens, (3, 4)), unet(second, maps, (42, 56)), atol=1e-5, rtol=1e-5)
        bare = pl.load_reference("dinov2_radiology", second, patch_size=16)
        torch.testing.assert_close(bare(tokens, (3, 4)), unet(second, maps, (48, 64)), atol=1e-5, rtol=1e-5)
        free = pl.load_reference("dinov2_radiology", second, final_relu=False)
        assert float(free(tokens, (3, 4)).min()) < -1


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda s: s.pop("up3.conv.1.bias"), {}, "missing: up3.conv.1.bias"),
        (lambda s: s.update({"up5.x": torch.zeros(1)}), {}, "unexpected: up5.x"),
        (lambda s: None, {"num_classes": 4}, "tensors say 3"),
        (lambda s: None, {"patchsize": 4}, "did you mean patch_size"),
        (lambda s: s.clear() or s.update(x=torch.zeros(1)), {}, "no tensor of a known decoder"),
    ],
)
def test_what_does_not_fit_is_refused(change, config, message):
    state = unet_layout(16, 3)
    change(state)
    with pytest.raises(UsageError, match=message):
        pl.load_reference("dinov2_radiology", state, **config)


def test_an_unknown_name_is_refused():
    state = {"decoders_dict.linear:lr=0_1.decoder.weight": torch.zeros(2, 8, 1, 1)}
    state["decoders_dict.linear:lr=0_1.decoder.bias"] = torch.zeros(2)
    with pytest.raises(UsageError, match="did you mean linear:lr=0_1"):
        pl.load_reference("dinov2_radiology", state, name="linear:lr=0_01")


def probe_layout(blocks: int, avgpool: bool, width: int = 8, classes: int = 3, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    return {
        "linear.weight": torch.randn(classes, (blocks + avgpool) * width, generator=draw, dtype=torch.float64),
        "linear.bias": torch.randn(classes, generator=draw, dtype=torch.float64),
    }


def layers(batch: int = 2, width: int = 8, seed: int = 0):
    """Four pairs of patches and class token."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [((batch, 5, width), (batch, width))] * 4
    return [tuple(torch.randn(s, generator=draw, dtype=torch.float64) for s in pair) for pair in shapes]


def read(tokens, blocks: int, avgpool: bool):
    """The published input of a probe: class tokens, oldest first, then the mean patch of the last block."""
    return torch.cat([*(c for _, c in tokens[-blocks:]), *([tokens[-1][0].mean(1)] if avgpool else [])], 1)


def answer(state, x):
    return x @ state["linear.weight"].T + state["linear.bias"]


SPELLED = {
    "dinov2": lambda n, b: f"classifier_{n}_blocks_avgpool_{b}_lr_0_00250",
    "radiology": lambda n, b: f"linear:blocks={n}:avgpool={b}:lr=0_0010000000",
}
GRID = [(1, False), (1, True), (4, False), (4, True)]


@pytest.mark.parametrize("ddp", ["", "module."])
@pytest.mark.parametrize("volumes", ["", "model."])
@pytest.mark.parametrize("spelling", SPELLED)
def test_probes_of_every_spelling_give_the_published_logits(spelling, volumes, ddp, tmp_path):
    states = {SPELLED[spelling](n, b): probe_layout(n, b, seed=i) for i, (n, b) in enumerate(GRID)}
    whole = {
        f"{ddp}classifiers_dict.{name}.{volumes}{key}": value
        for name, one in states.items()
        for key, value in one.items()
    }
    path = tmp_path / "model_final.pth"  # as fvcore writes it
    torch.save({"model": whole, "optimizer": {"state": {}}, "scheduler": {"last_epoch": 3}, "iteration": 9}, path)
    found = pl.load_reference("dinov2_radiology", path, num_classes=3, embed_dim=8)
    assert list(found) == list(states)
    assert not found.training
    tokens = layers()
    logits = found([tokens] if volumes else tokens)
    for (blocks, avgpool), (name, state) in zip(GRID, states.items(), strict=True):
        x = read(tokens, blocks, avgpool)
        torch.testing.assert_close(logits[name], answer(state, x.mean(0, keepdim=True) if volumes else x))
        one = pl.load_reference("dinov2_radiology", {"model": whole}, classifier=name)
        assert (one.blocks, one.avgpool, one.embed_dim, one.num_classes) == (blocks, avgpool, 8, 3)
        assert one.volumes == bool(volumes)
        assert torch.equal(one.linear.weight, state["linear.weight"])


def test_a_probe_alone_needs_no_name_where_it_is_told_what_it_reads():
    state = probe_layout(4, True)
    tokens = layers()
    for prefix in ("", "classifiers_dict.best."):
        named = {f"{prefix}{key}": value for key, value in state.items()}
        probe = pl.load_reference("dinov2_radiology", named, blocks=4, avgpool=True)
        torch.testing.assert_close(probe(tokens), answer(state, read(tokens, 4, True)))
    one = {f"classifiers_dict.{SPELLED['dinov2'](4, True)}.{k}": v.float() for k, v in state.items()}
    probe = pl.load_reference("dinov2_radiology", one)
    assert probe.linear.weight.dtype == torch.float32
    assert pl.load_reference("dinov2_radiology", one, name="classifier_4_blocks_avgpool_True_lr_0.00250").blocks == 4


PROBE = f"classifiers_dict.{SPELLED['dinov2'](4, True)}."


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda s: s.pop(f"{PROBE}linear.bias"), {}, f"missing: {PROBE}linear.bias$"),
        (lambda s: s.update({f"{PROBE}x": torch.zeros(1)}), {}, f"unexpected: {PROBE}x$"),
        (
            lambda s: s.update({f"{PROBE}linear.wieght": s.pop(f"{PROBE}linear.weight")}),
            {},
            f"missing: {PROBE}linear.weight; unexpected: {PROBE}linear.wieght",
        ),
        (lambda s: s.update({"head.bias": torch.zeros(1)}), {}, "unexpected: head.bias; a probe's tensors stand under"),
        (
            lambda s: s.update({f"{PROBE}linear.bias": torch.zeros(4)}),
            {},
            rf"{PROBE}linear.bias \(4,\) instead of \(3,\)",
        ),
        (lambda s: s.update({f"{PROBE}linear.weight": torch.zeros(3)}), {}, "a probe's is"),
        (
            lambda s: s.update({f"{PROBE}linear.weight": torch.zeros(3, 41)}),
            {},
            "41 columns, which 4 class tokens and a",
        ),
        (lambda s: None, {"num_classes": 4}, "num_classes=4, but the checkpoint's tensors say 3"),
        (lambda s: None, {"embed_dim": 16}, "embed_dim=16, but the checkpoint's tensors say 8"),
        (lambda s: None, {"blocks": 1}, "blocks=1, but"),
        (lambda s: None, {"avgpool": False}, "avgpool=False, but"),
        (lambda s: None, {"patch_sizes": 14}, "unknown setting 'patch_sizes'"),
        (lambda s: None, {"classifier": "classifier_4_blocks_avgpool_True_lr_1"}, "did you mean classifier_4_blocks"),
        (
            lambda s: s.update({f"{PROBE}model.linear.bias": s.pop(f"{PROBE}linear.bias")}),
            {},
            f"missing: {PROBE}linear.bias; unexpected: {PROBE}model.linear.bias",
        ),
        (
            lambda s: s.update({k.replace("_4_", "_3_"): v for k, v in s.items()}),
            {},
            "width 8 and classifier_3_blocks_avgpool_True_lr_0_00250 one of width 10",
        ),
    ],
)
def test_a_probe_that_does_not_fit_is_refused_by_its_published_names(change, config, message):
    state = {f"{PROBE}{key}": value for key, value in probe_layout(4, True).items()}
    change(state)
    with pytest.raises(UsageError, match=message):
        pl.load_reference("dinov2_radiology", state, **config)


@pytest.mark.parametrize("config", [{}, {"blocks": 4}, {"avgpool": True}, {"blocks": 0, "avgpool": True}])
def test_a_name_that_tells_nothing_needs_settings(config):
    with pytest.raises(UsageError, match="give how many blocks it reads"):
        pl.load_reference("dinov2_radiology", probe_layout(4, True), **config)


@pytest.mark.parametrize("prefix", ["", "module.decoders_dict.unet:lr=0_1.module."])
@pytest.mark.parametrize("kind", ["linear", "unet"])
def test_whichever_tensor_is_missing_is_named_as_the_file_has_it(kind, prefix):
    linear = {"decoder.weight": torch.randn(3, 16, 1, 1), "decoder.bias": torch.randn(3)}
    state = {prefix + name: tensor for name, tensor in (linear if kind == "linear" else unet_layout(16, 3)).items()}
    for name in state:
        with pytest.raises(UsageError) as error:
            pl.load_reference("dinov2_radiology", {k: v for k, v in state.items() if k != name})
        assert f"missing: {name.removeprefix('module.')}" in str(error.value)
