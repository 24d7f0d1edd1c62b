"""The radiology benchmark's decoders, one and several in a file."""

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
