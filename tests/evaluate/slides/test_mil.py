"""Facts about the multiple-instance heads; their formulas are checked in tests/reference/test_phikon_v2.py."""

from __future__ import annotations

import pytest
import torch

from patchloom.errors import UsageError
from patchloom.systems.phikon_v2.mil import HEADS, TransMIL, pad_bags

WIDTH = 16
SMALL = {"chowder": {"n_top": 2, "n_bottom": 2}}


def head(name: str, **arguments):
    """Return a head with every parameter random, zero-initialised ones too."""
    torch.manual_seed(0)
    made = HEADS[name](WIDTH, **SMALL.get(name, {}), **arguments).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3)
    return made


@pytest.mark.parametrize("name", [name for name in HEADS if name != "transmil"])
def test_padding_changes_nothing(name):
    model, bag = head(name, out_features=2), torch.randn(1, 6, WIDTH)
    padded, mask = pad_bags([bag[0]], min_tiles=13)
    padded[:, 6:] = 100.0
    torch.testing.assert_close(model(padded, mask), model(bag), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(padded, mask[..., 0]), model(bag), atol=1e-5, rtol=1e-5)


def test_transmil_takes_padding_for_tiles_and_says_so():
    model, bag = head("transmil"), torch.randn(6, WIDTH)
    padded, mask = pad_bags([bag], min_tiles=13)
    assert (model(padded, mask) - model(bag[None])).abs().max() > 1e-3
    assert TransMIL.needs_single_bags


@pytest.mark.parametrize("name", HEADS)
def test_shapes_gradients_and_scores(name):
    model = head(name, out_features=3).train()
    x, mask = pad_bags([torch.randn(n, WIDTH) for n in (5, 8)])
    logits = model(x, mask)
    assert logits.shape == (2, 3)
    logits.sum().backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None}
    assert unused <= {n for n in unused if n.startswith("tiles_values")}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.eval().tile_scores(x, mask).shape == (2, 8)


@pytest.mark.parametrize("name", [name for name in HEADS if name not in ("transmil",)])
def test_the_order_of_tiles_does_not_matter(name):
    model, bag = head(name), torch.randn(1, 7, WIDTH)
    torch.testing.assert_close(model(bag[:, torch.randperm(7)]), model(bag), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_chowders_tile_scores_point_the_way_of_the_logit(sign):
    model = HEADS["chowder"](2, n_top=1, n_bottom=1, tiles_mlp_hidden=None, mlp_hidden=None).eval()
    with torch.no_grad():
        model.score_model.hidden_layers[0].weight.copy_(torch.tensor([[sign * 1.0, 0.0]]))
        model.mlp[0].weight.fill_(sign * 1.0)
    bag = torch.tensor([[[3.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]])
    assert model.tile_scores(bag)[0].argsort(descending=True).tolist() == [0, 2, 1]


def test_attention_sums_to_one_and_follows_temperature():
    bag = torch.randn(1, 7, WIDTH)
    spread = [float(head("abmil", temperature=t).attention(bag).detach().max()) for t in (0.2, 1.0, 50.0)]
    assert spread[0] > spread[1] > spread[2]
    assert spread[2] == pytest.approx(1 / 7, abs=0.02)
    torch.testing.assert_close(head("dsmil", out_features=2).attention(bag).sum(1), torch.ones(1, 2))


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (torch.zeros(1, 0, WIDTH), None, "at least one tile"),
        (torch.zeros(4, WIDTH), None, "bags come as"),
        (torch.zeros(1, 4, 5), None, "the bag's features are 5 wide, the model's 16"),
        (torch.zeros(1, 4, WIDTH), torch.ones(1, 4, dtype=torch.bool), "padding only"),
        (torch.zeros(1, 4, WIDTH), torch.ones(1, 3, dtype=torch.bool), "does not belong"),
        (torch.zeros(1, 4, WIDTH), torch.zeros(1, 4), "does not belong"),
    ],
)
@pytest.mark.parametrize("name", ["abmil", "transmil"])
def test_bags_that_cannot_be_are_refused(name, x, mask, message):
    with pytest.raises(UsageError, match=message):
        head(name)(x, mask)


def test_padding_bags():
    x, mask = pad_bags([torch.ones(2, 3), torch.ones(4, 3)])
    assert x.shape == (2, 4, 3)
    assert (x.sum(), int(mask.sum())) == (18, 2)
    with pytest.raises(UsageError, match="bag 1 is empty"):
        pad_bags([torch.ones(2, 3), torch.ones(0, 3)])
    with pytest.raises(UsageError, match="widths 3 and 4"):
        pad_bags([torch.ones(2, 3), torch.ones(2, 4)])
    with pytest.raises(UsageError, match="no bag"):
        pad_bags([])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("chowder", {"n_top": 0, "n_bottom": 0}, "at least one"),
        ("dsmil", {"out_logits": "men"}, "did you mean mean"),
        ("transmil", {"num_heads": 5}, "5 heads do not divide a width of 16"),
        ("transmil", {"attention_type": "nystroem"}, "did you mean nystrom"),
        ("abmil", {"mlp_dropout": [0.1]}, "1 dropout rates do not belong to 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(name, arguments, message):
    with pytest.raises(UsageError, match=message):
        HEADS[name](WIDTH, **arguments)
