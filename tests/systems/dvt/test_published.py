"""Published checkpoints: names of tensors in, our modules out."""

import math

import pytest
import torch

import patchloom as pl
from patchloom.encoders import create_encoder
from patchloom.encoders.denoised import Denoiser, encoder_features
from patchloom.errors import UsageError
from patchloom.systems.dvt.field import FeatureField
from patchloom.systems.dvt.model import SingleImageDenoiser

BLOCK = {
    "norm1.weight": (1,),
    "norm1.bias": (1,),
    "attn.qkv.weight": (3, 1),
    "attn.qkv.bias": (3,),
    "attn.proj.weight": (1, 1),
    "attn.proj.bias": (1,),
    "norm2.weight": (1,),
    "norm2.bias": (1,),
    "mlp.fc1.weight": (4, 1),
    "mlp.fc1.bias": (4,),
    "mlp.fc2.weight": (1, 4),
    "mlp.fc2.bias": (1,),
}


def denoiser_state(width=128, side=3, blocks=1, positions=True):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: 0.3 * torch.randn(shape, generator=generator)  # noqa: E731
    state = {"pos_embed": draw(1, side * side, width)} if positions else {}
    for number in range(blocks):
        prefix = f"denoiser.{number}." if blocks > 1 else "denoiser."
        state |= {prefix + name: draw(*(width * part for part in shape)) for name, shape in BLOCK.items()}
    return state


def field_state(levels=3, features=4, base=4, finest=20, log2=20, width=8):
    generator = torch.Generator().manual_seed(0)
    factor = math.exp((math.log(finest) - math.log(base)) / (levels - 1))
    sides = [math.ceil(base * factor**level - 1 - 1e-9) + 1 for level in range(levels)]
    count = sum(min(math.ceil(side**2 / 8) * 8, 2**log2) for side in sides) * features
    shapes = {"mlp.0.weight": (width // 2, levels * features), "mlp.0.bias": (width // 2,)}
    shapes |= {"mlp.2.weight": (width, width // 2), "mlp.2.bias": (width,), "neural_field.params": (count,)}
    settings = {"n_features_per_level": features, "base_resolution": base, "max_resolution": finest}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, settings


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("positions", [True, False])
def test_a_denoiser(blocks, positions):
    state = denoiser_state(blocks=blocks, positions=positions)
    model = pl.load_reference("dvt", {"denoiser": state, "step": 3})
    assert isinstance(model, Denoiser)
    assert not model.training
    assert len(model.blocks) == blocks
    prefix = "denoiser.1." if blocks == 2 else "denoiser."
    assert torch.equal(model.blocks[blocks - 1].mlp.fc2.weight, state[prefix + "mlp.fc2.weight"])
    assert (model.pos_embed is not None) == positions
    assert model(torch.randn(1, 3, 3, 128)).shape == (1, 3, 3, 128)
    # The encoder it was trained behind is left out.
    again = pl.load_reference("dvt", state | {"vit.model.cls_token": torch.zeros(1, 1, 128)})
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_a_denoiser_with_its_encoder_in_front():
    encoder = create_encoder("vit_tiny_patch16_224", image_size=48).eval()
    state = denoiser_state(width=192) | {f"vit.model.{name}": value for name, value in encoder.state_dict().items()}
    model = pl.load_reference("dvt", state, encoder="vit_tiny_patch16_224")
    images = torch.randn(1, 3, 48, 48)
    alone = pl.load_reference("dvt", denoiser_state(width=192))
    torch.testing.assert_close(model(images), alone(encoder_features(encoder, images)[0]))


def test_a_neural_field():
    state, settings = field_state()
    model = pl.load_reference("dvt", state, **settings)
    assert isinstance(model, FeatureField)
    assert torch.equal(model.encoding.params[0], state["neural_field.params"])
    assert torch.equal(model.mlp[2].weight[0], state["mlp.2.weight"])
    assert model(torch.rand(5, 2)).shape == (5, 8)


def test_a_model_of_the_first_stage():
    state, settings = field_state()
    generator = torch.Generator().manual_seed(1)
    state["shared_artifacts"] = torch.randn(1, 8, 3, 2, generator=generator)
    for layer, (out, into) in {0: (2, 8), 2: (2, 2), 4: (8, 2)}.items():
        state[f"residual_predictor.{layer}.weight"] = torch.randn(out, into, generator=generator)
        state[f"residual_predictor.{layer}.bias"] = torch.randn(out, generator=generator)
    model = pl.load_reference("dvt", state, **settings)
    assert isinstance(model, SingleImageDenoiser)
    found = model.decompose(torch.randn(3, 2, 8), torch.rand(3, 2, 2))
    torch.testing.assert_close(found["artifact"], state["shared_artifacts"][0].permute(1, 2, 0))


def test_a_distilled_encoder():
    encoder = create_encoder("vit_tiny_patch16_224", image_size=64).eval()
    wrapped = {f"model.{name}": value for name, value in encoder.state_dict().items()}
    for key in ("model", "denoiser"):
        model = pl.load_reference("dvt", {key: wrapped, "step": 1}, model_name="vit_tiny_patch16_224")
        images = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(model.forward_features(images), encoder.forward_features(images))
    with pytest.raises(UsageError, match="timm model as encoder"):
        pl.load_reference("dvt", wrapped)


def test_what_does_not_fit_is_named():
    state = denoiser_state()
    with pytest.raises(UsageError, match=r"unexpected: denoiser.norm3.weight"):
        pl.load_reference("dvt", state | {"denoiser.norm3.weight": torch.zeros(128)})
    with pytest.raises(UsageError, match=r"missing: denoiser.mlp.fc2.bias"):
        pl.load_reference("dvt", {name: value for name, value in state.items() if not name.endswith("fc2.bias")})
    oblong = state | {"pos_embed": torch.zeros(1, 6, 128)}
    with pytest.raises(UsageError, match="6 tokens, which are no square"):
        pl.load_reference("dvt", oblong)
    assert pl.load_reference("dvt", oblong, grid_size=(2, 3)).grid_size == (2, 3)
    with pytest.raises(UsageError, match="grid_size 3 x 3 has 9 tokens, and pos_embed has 6"):
        pl.load_reference("dvt", oblong, grid_size=3)
    with pytest.raises(UsageError, match="unknown setting 'grid'"):
        pl.load_reference("dvt", state, grid=3)
    field, settings = field_state()
    with pytest.raises(UsageError, match="give n_levels"):
        pl.load_reference("dvt", field, **{**settings, "n_levels": 10})
