"""ViTamin's published layout: towers, trunk and layers, compared with open_clip and with formulas written out."""

import pytest
import torch
import torch.nn.functional as F

import patchloom as pl
from patchloom.encoders.vitamin import build_vitamin

open_clip = pytest.importorskip("open_clip")


def randomised(module, seed=0):
    """Draw all parameters anew, those that begin at zero or one, too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim:
                drawn = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.copy_(drawn + ("norm" in name and name.endswith("weight")))
    return module.eval()


@pytest.fixture(scope="module")
def published():
    """A tiny model made by open_clip."""
    text = {"context_length": 16, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2}
    vision = {"timm_model_name": "vitamin_tiny_64", "timm_pool": "", "timm_proj": "linear", "image_size": 64}
    return randomised(open_clip.CustomTextCLIP(24, vision, text))


@pytest.fixture(scope="module")
def pairs():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.zeros(3, 16, dtype=torch.int64)
    for row, length in enumerate((4, 16, 9)):
        tokens[row, :length] = torch.randint(1, 58, (length,), generator=generator)
        tokens[row, 0], tokens[row, length - 1] = 58, 59
    return torch.randn(3, 3, 64, 64, generator=generator), tokens


@pytest.mark.parametrize("at_the_top", [False, True], ids=["custom_text", "text at the top"])
def test_both_towers_answer_as_those_of_open_clip(published, pairs, at_the_top):
    state = {f"module.{n.removeprefix('text.') if at_the_top else n}": v for n, v in published.state_dict().items()}
    model = pl.load_reference("vitamin", {"state_dict": state}, text_heads=2)
    with torch.no_grad():
        for found, expected in zip(model(*pairs), published(*pairs), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.encode_image(pairs[0]), published.encode_image(pairs[0]), atol=1e-5, rtol=0)


def test_the_image_tower_alone_and_the_trunk_alone(published, pairs):
    visual = {n: v for n, v in published.state_dict().items() if n.startswith("visual.")}
    tower = pl.load_reference("vitamin", visual, num_heads=3, image_size=64)
    trunk = pl.load_reference(
        "vitamin", {n.removeprefix("visual.trunk."): v for n, v in visual.items() if "trunk" in n}
    )
    with torch.no_grad():
        torch.testing.assert_close(tower(pairs[0]), published.visual(pairs[0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(trunk(pairs[0]), published.visual.trunk(pairs[0]), atol=1e-5, rtol=0)
        maps = tower.intermediates(pairs[0])
        pooled = published.visual.trunk.fc_norm(maps["dense"].mean((2, 3)))
        torch.testing.assert_close(pooled, published.visual.trunk(pairs[0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("drop", ["visual.trunk.blocks.1.mlp.w1.weight", "visual.head.proj.weight", "logit_scale"])
def test_what_is_missing_or_left_over_is_named(published, drop):
    state = dict(published.state_dict())
    state.pop(drop)
    if drop == "visual.head.proj.weight":  # a trunk with text beside it
        drop = "text."
    with pytest.raises(pl.UsageError, match=drop.replace(".", r"\.")):
        pl.load_reference("vitamin", state, text_heads=2)


def test_heads_that_no_tensor_tells_are_asked_for(published):
    with pytest.raises(pl.UsageError, match="give text_heads"):
        pl.load_reference("vitamin", published.state_dict())
    with pytest.raises(pl.UsageError, match="7, which does not divide"):
        pl.load_reference("vitamin", published.state_dict(), num_heads=7, text_heads=2)


def layer_norm(x, weight, bias, axis):
    centred = x - x.mean(axis, keepdim=True)
    shape = [-1 if number == axis % x.ndim else 1 for number in range(x.ndim)]
    scaled = centred / (centred.square().mean(axis, keepdim=True) + 1e-6).sqrt()
    return scaled * weight.view(shape) + bias.view(shape)


@pytest.mark.parametrize(("channels", "stride"), [((6, 10), 2), ((8, 8), 2), ((8, 8), 1)])
def test_an_inverted_bottleneck_is_its_formula(channels, stride):
    entering, leaving = channels
    generator = torch.Generator().manual_seed(2)
    middle = 4 * leaving
    shapes = {
        "pre_norm.weight": (entering,),
        "pre_norm.bias": (entering,),
        "conv1_1x1.weight": (middle, entering, 1, 1),
        "conv1_1x1.bias": (middle,),
        "conv2_kxk.weight": (middle, 1, 3, 3),
        "conv2_kxk.bias": (middle,),
        "conv3_1x1.weight": (leaving, middle, 1, 1),
        "conv3_1x1.bias": (leaving,),
    }
    if stride == 2 and entering != leaving:
        shapes |= {"shortcut.expand.weight": (leaving, entering, 1, 1), "shortcut.expand.bias": (leaving,)}
    state = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    x = torch.randn(2, entering, 9, 7, generator=generator, dtype=torch.float64)
    block = pl.load_reference("vitamin", state, stride=stride).double()
    block.load_state_dict(state)
    y = layer_norm(x, state["pre_norm.weight"], state["pre_norm.bias"], 1)
    y = F.gelu(
        torch.einsum("bchw,oc->bohw", y, state["conv1_1x1.weight"][..., 0, 0]) + state["conv1_1x1.bias"][:, None, None]
    )
    y = F.gelu(F.conv2d(y, state["conv2_kxk.weight"], state["conv2_kxk.bias"], stride, 1, groups=middle))
    y = torch.einsum("bchw,oc->bohw", y, state["conv3_1x1.weight"][..., 0, 0]) + state["conv3_1x1.bias"][:, None, None]
    shortcut = x
    if stride == 2:
        ones = torch.ones_like(x[:, :1])
        window = torch.ones(1, 1, 3, 3, dtype=torch.float64)
        sums = F.conv2d(x.flatten(0, 1)[:, None], window, stride=2, padding=1).unflatten(0, x.shape[:2])[:, :, 0]
        shortcut = sums / F.conv2d(ones, window, stride=2, padding=1)  # the mean of what lies inside the image
    if "shortcut.expand.weight" in state:
        weight = state["shortcut.expand.weight"][..., 0, 0]
        shortcut = torch.einsum("bchw,oc->bohw", shortcut, weight) + state["shortcut.expand.bias"][:, None, None]
    torch.testing.assert_close(block(x), y + shortcut, atol=1e-10, rtol=0)


def test_the_gated_feed_forward_has_a_norm_of_its_own():
    generator = torch.Generator().manual_seed(3)
    shapes = {"norm.weight": (6,), "norm.bias": (6,)}
    shapes |= {f"w{n}.weight": (12, 6) for n in (0, 1)} | {f"w{n}.bias": (12,) for n in (0, 1)}
    shapes |= {"w2.weight": (6, 12), "w2.bias": (6,)}
    state = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    x = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    mlp = pl.load_reference("vitamin", state).double()
    mlp.load_state_dict(state)
    y = layer_norm(x, state["norm.weight"], state["norm.bias"], -1)
    gated = F.gelu(y @ state["w0.weight"].T + state["w0.bias"]) * (y @ state["w1.weight"].T + state["w1.bias"])
    torch.testing.assert_close(mlp(x), gated @ state["w2.weight"].T + state["w2.bias"], atol=1e-10, rtol=0)


def test_a_tower_without_positions_and_one_of_another_grid(pairs):
    for arguments, side in (({"pos_embed": "none", "img_size": 64}, 64), ({"img_size": 96}, 96)):
        trunk = randomised(build_vitamin("vitamin_tiny_64", num_classes=0, depth=3, num_heads=3, **arguments))
        loaded = pl.load_reference("vitamin", trunk.state_dict(), img_size=side)
        images = torch.randn(1, 3, side, side)
        with torch.no_grad():
            torch.testing.assert_close(loaded(images), trunk(images), atol=1e-5, rtol=0)


def test_published_sizes_are_those_of_timm_by_name(tmp_path):
    import timm

    trunk = timm.create_model("vitamin_small_224", num_classes=0)
    loaded = pl.load_reference("vitamin", {f"visual.trunk.{n}": v for n, v in trunk.state_dict().items()})
    assert loaded.patchloom_args["architecture"] == "vitamin_small_224"


def test_an_imported_checkpoint_is_a_bundle_with_both_towers(published, pairs, tmp_path):
    from safetensors.torch import save_file

    from patchloom.systems.clip.saved import load_clip

    save_file({name: value.contiguous() for name, value in published.state_dict().items()}, tmp_path / "x.safetensors")
    out = pl.import_reference("vitamin", str(tmp_path / "x.safetensors"), str(tmp_path / "b"), {"text_heads": 2})
    with torch.no_grad():
        torch.testing.assert_close(pl.load(out)(pairs[0]), published.visual.trunk(pairs[0]), atol=1e-5, rtol=0)
        expected = published.encode_text(pairs[1])
        torch.testing.assert_close(load_clip(out).encode_text(pairs[1]), expected, atol=1e-5, rtol=0)


def test_other_heads_than_usual_are_obeyed(published, pairs):
    trunk = randomised(build_vitamin("vitamin_tiny_64", num_classes=0, depth=3, num_heads=4))
    loaded = pl.load_reference("vitamin", trunk.state_dict(), num_heads=4)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pairs[0]), trunk(pairs[0]), atol=1e-5, rtol=0)
