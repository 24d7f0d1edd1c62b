"""The agent's parts against their formulas: replay, projection, noise, networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.evaluate.atari.agent import AgentConfig, RainbowAgent, project
from patchloom.evaluate.atari.networks import NoisyLinear, RainbowNetwork, make_vision, rebuild_vision, vision_of
from patchloom.evaluate.atari.replay import Replay
from patchloom.evaluate.atari.scores import human_normalized


def filled(n_step: int = 3, steps: int = 20, path=None) -> Replay:
    """Frames that hold their number; episodes of 7 steps; a life lost at step 9."""
    memory = Replay(32, frames=3, size=2, n_step=n_step, discount=0.5, path=path)
    for step in range(steps):
        over = step % 7 == 6 or step == 9
        memory.add(np.full((2, 2), step, np.uint8), step % 4, float(step), over, step % 7 == 0)
    return memory


def numbers(stack) -> list[int]:
    return np.asarray(stack)[:, 0, 0].tolist()


def test_stacks_do_not_reach_back_over_an_episode_s_start():
    memory = filled()
    assert numbers(memory.stack(5)) == [3, 4, 5]
    assert numbers(memory.stack(0)) == [0, 0, 0]
    assert numbers(memory.stack(8)) == [7, 7, 8]
    assert numbers(memory.stack(11)) == [9, 10, 11]  # a lost life is not a new episode


def test_returns_are_written_out_for_every_transition():
    memory = filled()
    drawn = memory.sample(400, np.random.default_rng(0))
    assert set(drawn.places.tolist()) == set(range(17))
    for row, place in enumerate(drawn.places.tolist()):
        total, alive = 0.0, True
        for k in range(3):
            if alive:
                total += 0.5**k * (place + k)
                alive = not memory.over[place + k]
        assert drawn.returns[row] == pytest.approx(total)
        assert drawn.discounts[row] == (0.125 if alive else 0)
        assert drawn.actions[row] == place % 4
        assert numbers(drawn.following[row]) == numbers(memory.stack(place + 3))


def test_draws_follow_priorities_and_weights_undo_them():
    memory = filled()
    memory.update(np.arange(17), np.arange(17) + 1.0)
    drawn = memory.sample(20_000, np.random.default_rng(1), beta=1.0)
    shares = np.bincount(drawn.places, minlength=17) / 20_000
    expected = np.sqrt(np.arange(17) + 1.0)
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.01)
    weight = dict(zip(drawn.places.tolist(), drawn.weights.tolist(), strict=True))
    assert weight[0] == pytest.approx(1)
    assert weight[8] == pytest.approx(expected[0] / expected[8], rel=1e-4)


def test_a_break_without_an_end_is_never_learnt_from():
    memory = Replay(32, frames=2, size=2, n_step=3)
    for step in range(12):
        memory.add(np.zeros((2, 2), np.uint8), 0, 0.0, False, step in (0, 6))  # gone on with after a kill
    drawn = memory.sample(300, np.random.default_rng(0))
    assert set(drawn.places.tolist()) == {0, 1, 2, 6, 7, 8}


def test_memory_goes_on_from_its_file_and_state(tmp_path):
    memory = filled(path=tmp_path / "frames.raw")
    state = memory.state()
    again = Replay(32, frames=3, size=2, n_step=3, discount=0.5, path=tmp_path / "frames.raw")
    again.load_state(state)
    a, b = (m.sample(50, np.random.default_rng(2)) for m in (memory, again))
    assert all(torch.equal(x, y) for x, y in zip(a[:-1], b[:-1], strict=True))


def test_projection_shares_each_value_between_its_neighbours():
    support = torch.linspace(-2, 2, 5)
    values = torch.tensor([[-9.0, -0.25, 0.0, 1.0, 9.0]])
    shares = torch.tensor([[0.1, 0.4, 0.2, 0.2, 0.1]])
    expected = torch.tensor([[0.1, 0.4 * 0.25, 0.4 * 0.75 + 0.2, 0.2, 0.1]])
    torch.testing.assert_close(project(values, shares, support), expected)
    random = torch.rand(6, 5).softmax(1)
    laid = project(1 + 0.5 * support.expand(6, 5), random, support)
    torch.testing.assert_close(laid.sum(1), torch.ones(6))


def test_the_aim_is_double_q_learning_over_n_steps():
    torch.manual_seed(0)
    config = AgentConfig(hidden=8, atoms=7, largest=3, sigma=0.0)
    agent = RainbowAgent(make_vision("data_efficient", frames=2), 3, config)
    with torch.no_grad():
        for parameter in agent.target.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    following, returns, discounts = (
        torch.rand(4, 2, 84, 84),
        torch.tensor([0.5, -1, 0, 2]),
        torch.tensor([0.9, 0, 0.9, 0]),
    )
    aim = agent.aim(returns, discounts, following)
    support = torch.linspace(-3, 3, 7)
    for row in range(4):
        worth = (agent.online(following[row : row + 1])[0].exp() * support).sum(1)
        later = agent.target(following[row : row + 1])[0, worth.argmax()].exp()
        moved = returns[row] + discounts[row] * support
        torch.testing.assert_close(aim[row], project(moved[None], later[None], support)[0])


def test_learning_raises_what_was_rewarded_and_leaves_a_frozen_encoder_alone():
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch8_84", image_size=16, in_chans=2, embed_dim=16, depth=1, num_heads=2)
    for freeze in (True, False):
        agent = RainbowAgent(
            vision_of(encoder), 3, AgentConfig(hidden=16, lr=3e-3, freeze=freeze, batch_size=16, n_step=1)
        )
        memory = Replay(200, frames=2, size=16, n_step=1)
        generator = np.random.default_rng(0)
        for step in range(200):
            action = step % 3
            memory.add(np.full((16, 16), 7, np.uint8), action, float(action == 1), True, True)
        before = [p.clone() for p in agent.online.vision.parameters()]
        losses = [agent.learn(memory, generator, 0.4) for _ in range(60)]
        after = list(agent.online.vision.parameters())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) is freeze
        assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
        assert agent.act(np.full((2, 16, 16), 7, np.uint8), noisy=False) == 1
        values = agent.online.eval().values(torch.full((1, 2, 16, 16), 7 / 255))[0]
        assert values[1] > values[0] + 0.3


def test_noise_is_factorised_and_absent_in_eval_mode():
    layer = NoisyLinear(4, 3, 0.5)
    x = torch.randn(2, 4)
    plain = x @ layer.weight.T + layer.bias
    torch.testing.assert_close(layer.eval()(x), plain)
    layer.train().draw_noise()
    noisy = x @ (layer.weight + layer.weight_noise * layer.drawn_out[:, None] * layer.drawn_in[None]).T
    torch.testing.assert_close(layer(x), noisy + layer.bias + layer.bias_noise * layer.drawn_out)
    assert layer.weight_noise[0, 0].item() == pytest.approx(0.25)


@pytest.mark.parametrize("kind", ["nature", "data_efficient", "timm"])
def test_what_sees_can_be_rebuilt(kind):
    if kind == "timm":
        encoder = create_encoder("vit_tiny_patch8_84", in_chans=4, embed_dim=24, depth=1, num_heads=2)
        encoder.pretrained_cfg = {**dict(encoder.pretrained_cfg), "mean": (0.5,) * 4, "std": (0.2,) * 4}
        vision = vision_of(encoder)
    else:
        vision = make_vision(kind, frames=4)
    again = rebuild_vision(vision.settings)
    again.load_state_dict(vision.state_dict())
    stacks = torch.rand(2, 4, 84, 84)
    torch.testing.assert_close(again.eval()(stacks), vision.eval()(stacks))
    assert vision(stacks).shape == (2, vision.width)
    probabilities = RainbowNetwork(vision, 5)(stacks).exp().sum(-1)
    torch.testing.assert_close(probabilities, torch.ones(2, 5))
    with pytest.raises(UsageError, match="nature or data_efficient"):
        make_vision("resnet")


def test_scores_are_on_the_human_scale():
    assert human_normalized("Breakout", 16.1) == pytest.approx(0.5)
    assert human_normalized("Adventure", 3) is None
