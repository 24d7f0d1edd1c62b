"""The first author's U-Net: the published layout gives the published outputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import patchloom as pl
from patchloom.errors import UsageError

WIDTHS = (4, 6, 8, 10)
LEVELS = len(WIDTHS)


def layers(channels: int = 3) -> list[tuple[str, int, int, bool]]:
    """Published name, channels in and out, whether there is a norm; in the published order."""
    found, before = [], channels
    for level, width in enumerate(WIDTHS[:-1], 1):
        found += [(f"conv.enc_{level}_{k}", before if k == 1 else width, width, True) for k in (1, 2, 3)]
        before = width
    found += [(f"conv.enc_5_{k}", before if k == 1 else WIDTHS[-1], WIDTHS[-1], True) for k in (1, 2)]
    before = WIDTHS[-1]
    for level, width in enumerate(reversed(WIDTHS[:-1]), 1):
        found.append((f"upconv.dec_{level}_1", before, width, True))
        found += [(f"conv.dec_{level}_{k}", 2 * width if k == 2 else width, width, True) for k in (2, 3)]
        before = width
    return [*found, ("conv.dec_4_out", before, channels, False)]


def published(channels: int = 3, kernel: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    state = {}
    for number, (name, before, after, normed) in enumerate(layers(channels)):
        place = f"modules.{number}.{name}"
        state[f"{place}_conv.weight"] = draw(after, before, kernel, kernel) / (kernel * before**0.5)
        state[f"{place}_conv.bias"] = draw(after) / 3
        if normed:
            state[f"{place}_bn.weight"] = 1 + draw(after) / 5
            state[f"{place}_bn.bias"] = draw(after) / 5
            state[f"{place}_bn.running_mean"] = draw(after) / 5
            state[f"{place}_bn.running_var"] = 0.5 + draw(after).abs()
            state[f"{place}_bn.num_batches_tracked"] = torch.tensor(7)
    return state


def repaired(state: dict[str, torch.Tensor], images: torch.Tensor, kernel: int = 3) -> torch.Tensor:
    """The published network in float64, from its tensors alone."""
    state = {name: value.double() for name, value in state.items()}
    x, skips = images.double(), []
    for number, (name, _, _, normed) in enumerate(layers(images.shape[1])):
        place = f"modules.{number}.{name}"
        if name.startswith("upconv"):
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        stride = 2 if name.startswith("conv.enc") and name.endswith("_3") else 1
        x = F.conv2d(x, state[f"{place}_conv.weight"], state[f"{place}_conv.bias"], stride, kernel // 2)
        if normed:
            norm = [
                state[f"{place}_bn.{part}"].view(1, -1, 1, 1)
                for part in ("running_mean", "running_var", "weight", "bias")
            ]
            x = (x - norm[0]) / (norm[1] + 1e-5).sqrt() * norm[2] + norm[3]
            x = torch.where(x > 0, x, 0.01 * x)
        if name.startswith("conv.enc") and name.endswith("_2") and "_5_" not in name:
            skips.append(x)
        if name.startswith("upconv"):
            skip = skips.pop()
            x = torch.cat([x[:, :, : skip.shape[2], : skip.shape[3]], skip], 1)
    return x.clamp(1e-12, 1 - 1e-12)


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("size", [(32, 32), (37, 30), (8, 21)])
def test_the_published_layout_gives_the_published_outputs(channels, size):
    state = published(channels)
    images = torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(1))
    model = pl.load_reference("ear", {"state_dict": state}, filters=[channels, *WIDTHS], dim_c=channels, ksize=3)
    expected = repaired(state, images)
    assert float(((expected > 0.01) & (expected < 0.99)).double().mean()) > 0.1  # not all is clamped
    torch.testing.assert_close(model(images).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.double()(images.double()), expected, atol=1e-10, rtol=1e-10)


def test_another_kernel_is_told_by_the_shapes():
    state = published(kernel=5)
    images = torch.rand(1, 3, 24, 24)
    torch.testing.assert_close(
        pl.load_reference("ear", state)(images).double(), repaired(state, images, 5), atol=1e-5, rtol=1e-5
    )


def test_missing_and_left_over_tensors_are_named_as_in_the_file():
    state = published()
    lacking = {name: value for name, value in state.items() if name != "modules.11.upconv.dec_1_1_bn.bias"}
    with pytest.raises(UsageError, match=r"missing: modules\.11\.upconv\.dec_1_1_bn\.bias"):
        pl.load_reference("ear", lacking)
    with pytest.raises(UsageError, match=r"unexpected: modules\.20\.conv\.dec_4_out_bn\.weight"):
        pl.load_reference("ear", {**state, "modules.20.conv.dec_4_out_bn.weight": torch.ones(3)})
    with pytest.raises(UsageError, match=r"missing: modules\.0\.conv\.enc_1_1_conv\.weight"):
        pl.load_reference("ear", {"encoder.weight": torch.ones(1)})


@pytest.mark.parametrize(
    ("setting", "value"), [("filters", [3, 64, 128, 256, 512]), ("ksize", 5), ("dim_c", 1), ("width", 64)]
)
def test_settings_that_contradict_the_tensors_are_refused(setting, value):
    with pytest.raises(UsageError, match="tensors say"):
        pl.load_reference("ear", published(), **{setting: value})
