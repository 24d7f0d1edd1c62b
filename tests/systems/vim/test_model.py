"""The transformer of VIM: what each token sees, what the cache changes (nothing), and how tokens are drawn."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchloom.errors import UsageError
from patchloom.systems.vim.distance import frechet_distance
from patchloom.systems.vim.model import ImageGPT, draw_token, token_probabilities


def model(**changes) -> ImageGPT:
    torch.manual_seed(0)
    made = ImageGPT(**{"vocab": 11, "num_tokens": 6, "dim": 16, "depth": 2, "heads": 2, "num_classes": 4, **changes})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return made.eval()


@pytest.mark.parametrize("shift", [False, True])
def test_a_token_is_foretold_from_those_before_it_alone(shift):
    made, ids = model(token_shift=shift), torch.randint(11, (1, 6))
    cond = torch.tensor([[1]])
    logits = made(ids, cond)
    for place in range(6):
        other = ids.clone()
        other[0, place] = (other[0, place] + 1) % 11
        moved = (made(other, cond) - logits).abs().amax(-1)[0] > 1e-6
        assert not moved[: place + 1].any()
        assert place == 5 or moved[place + 1]
    assert ((made(ids, torch.tensor([[2]])) - logits).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("cond", [1, 2])
def test_tokens_drawn_with_the_cache_are_those_drawn_without(shift, cond):
    made = model(token_shift=shift, num_cond=cond)
    conds = torch.randint(4, (3, cond))
    drawn = [
        made.generate(conds, use_cache=cached, temperature=2.0, generator=torch.Generator().manual_seed(3))
        for cached in (True, False)
    ]
    assert torch.equal(*drawn)
    assert drawn[0].unique().numel() > 3


def test_a_model_of_no_class_needs_no_condition_and_one_of_classes_does():
    free = model(num_classes=None)
    assert free.generate(count=2).shape == (2, 6)
    assert free(torch.randint(11, (2, 6))).shape == (2, 6, 11)
    with pytest.raises(UsageError, match="4 classes; say which"):
        model().generate(count=2)


@given(st.integers(0, 2**31), st.integers(1, 9), st.floats(0.05, 1.0), st.floats(0.2, 3.0))
@settings(max_examples=25, deadline=None)
def test_top_k_and_top_p_keep_the_likeliest_and_their_proportions(seed, k, p, temperature):
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(seed))
    whole = (logits.double() / temperature).softmax(-1)[0]
    found = token_probabilities(logits, temperature, k, p)[0].double()
    order = whole.argsort(descending=True)
    among = whole[order[:k]] / whole[order[:k]].sum()
    kept, mass = 0, 0.0
    while kept < k and (kept == 0 or mass < p - 1e-6):
        mass += float(among[kept])
        kept += 1
    expected = torch.zeros(9, dtype=torch.float64)
    expected[order[:kept]] = among[:kept] / among[:kept].sum()
    if abs(mass - p) > 1e-5:  # at the border rounding decides
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_likeliest_alone_is_drawn_with_one_and_frequencies_are_the_probabilities():
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert int(draw_token(logits, top_k=1)) == 1
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw_token(logits.expand(2000, -1), generator=generator) for _ in range(2)])
    shares = torch.bincount(drawn.flatten(), minlength=3) / 4000
    torch.testing.assert_close(shares, logits.softmax(-1)[0], rtol=0, atol=0.03)


def test_features_are_the_stream_after_each_block_at_the_places_of_tokens():
    made, ids, cond = model(), torch.randint(11, (2, 6)), torch.tensor([[0], [3]])
    found = made.features(ids, cond)
    assert sorted(found) == [0, 1, 2]
    x = torch.cat([made.cond_embed(cond) + made.cond_pos, made.code_embed(ids) + made.code_pos], 1)
    torch.testing.assert_close(found[0], x[:, 1:])
    torch.testing.assert_close(found[1], made.blocks[0](x)[:, 1:])
    assert set(made.features(ids, cond, [2])) == {2}


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: m(torch.full((1, 6), 11), torch.zeros(1, 1, dtype=torch.long)), "tokens from 11 to 11; .* 0 to 10"),
        (lambda m: m(torch.zeros(1, 7, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)), "6 tokens an image"),
        (
            lambda m: m(torch.zeros(1, 6, dtype=torch.long), torch.tensor([[4]])),
            "class 4 is none of this model; .* 0 to 3",
        ),
        (lambda m: m(torch.zeros(1, 6, dtype=torch.long), torch.tensor([[-1]])), "class -1"),
        (lambda m: m.generate(torch.zeros(1, 1, dtype=torch.long), top_k=12), "top_k is 12; there are 11 tokens"),
        (lambda m: m.generate(torch.zeros(1, 1, dtype=torch.long), temperature=0.0), "temperature is 0; .* above 0"),
        (lambda m: m.generate(torch.zeros(1, 1, dtype=torch.long), top_p=0.0), "top_p is 0"),
        (lambda m: m.generate(torch.zeros(1, 1, dtype=torch.long), top_p=1.5), "top_p is 1.5"),
        (lambda m: m.train().generate(torch.zeros(1, 1, dtype=torch.long)), "eval mode"),
        (lambda m: m.features(torch.zeros(1, 6, dtype=torch.long), torch.tensor([[0]]), [3]), "no block 3"),
        (lambda m: ImageGPT(4, 4, 10, 1, 3), "3 heads do not divide a width of 10"),
    ],
)
def test_what_cannot_be_modelled_is_refused(act, message):
    with pytest.raises(UsageError, match=message):
        act(model())


def test_the_frechet_distance_of_normal_clouds_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    two = one * torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0]) + 2
    mine = [(one.mean(0), torch.cov(one.T)), (two.mean(0), torch.cov(two.T))]
    (m1, c1), (m2, c2) = mine
    cross = torch.linalg.eigvals(c1 @ c2).sqrt().real.sum()
    expected = float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross)
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(one[:, :1], one[:, :1] + 3) == pytest.approx(9, rel=1e-6)
    with pytest.raises(UsageError, match="at least two images"):
        frechet_distance(one[:1], two)


def test_a_new_model_guesses_all_codes_alike():
    torch.manual_seed(0)
    fresh = ImageGPT(64, 9, 32, 2, 4)
    logits = fresh.eval()(torch.randint(64, (4, 9)))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(64, (36,)))
    assert loss.item() == pytest.approx(math.log(64), abs=0.1)
