"""What a linear probe reads of the last blocks, written out, and what it makes of volumes."""

from __future__ import annotations

import pytest
import torch

from patchloom.encoders import create_encoder, intermediate_layers
from patchloom.encoders.probe import LinearProbe, LinearProbes, probe_columns, probe_input
from patchloom.errors import UsageError

D, C = 6, 3


def layers(count: int, batch: int = 2, seed: int = 0):
    """Pairs of patches and class token, as published."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [((batch, 7, D), (batch, D)) for _ in range(count)]
    return [tuple(torch.randn(s, generator=draw, dtype=torch.float64) for s in pair) for pair in shapes]


def randomised(**settings) -> LinearProbe:
    torch.manual_seed(1)
    probe = LinearProbe(D, C, **settings).double()
    for parameter in probe.parameters():
        parameter.data.normal_()
    return probe


def by_hand(probe: LinearProbe, given, row: int) -> torch.Tensor:
    """The input of one image or slice, number by number."""
    read = [float(value) for _, token in given[-probe.blocks :] for value in token[row]]
    if probe.avgpool:
        patches = given[-1][0][row]
        read += [sum(float(patch[column]) for patch in patches) / len(patches) for column in range(D)]
    return torch.tensor(read, dtype=torch.float64)


def answer(probe: LinearProbe, read: torch.Tensor) -> torch.Tensor:
    weight, bias = probe.linear.weight, probe.linear.bias
    return torch.stack([sum(w * x for w, x in zip(weight[c], read, strict=True)) + bias[c] for c in range(C)])


@pytest.mark.parametrize("avgpool", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_logits_are_those_of_the_last_class_tokens_and_the_mean(blocks, avgpool):
    probe, given = randomised(blocks=blocks, avgpool=avgpool), layers(4)
    expected = torch.stack([answer(probe, by_hand(probe, given, row)) for row in range(2)])
    torch.testing.assert_close(probe(given), expected)
    torch.testing.assert_close(probe([pair[:] for pair in given][-blocks:]), expected)
    assert probe([(p[:1], c[:1]) for p, c in given]).shape == (1, C)  # the published one breaks on a single image


def test_an_encoders_own_tokens_are_read_as_the_published_pairs():
    encoder = create_encoder("vit_tiny_patch16_224", image_size=32, embed_dim=D, depth=3, num_heads=2, reg_tokens=2)
    probe = randomised(blocks=2, avgpool=True)
    with torch.no_grad():
        tokens = intermediate_layers(encoder, torch.randn(2, 3, 32, 32), [-2, -1])
        pairs = [(layer.patches.double(), layer.prefix[:, 0].double()) for layer in tokens]
        torch.testing.assert_close(probe(tokens), probe(pairs))


def test_fewer_blocks_read_columns_of_more():
    given = layers(4)
    whole = probe_input(given, 4, True)
    for blocks in (1, 3, 4):
        for avgpool in (False, True):
            columns = probe_columns(D, blocks, avgpool, most=4)
            assert torch.equal(whole[:, columns], probe_input(given, blocks, avgpool))


def test_what_is_read_of_a_volumes_slices_is_averaged_first():
    probe = randomised(blocks=2, avgpool=True, volumes=True)
    volumes = [layers(3, batch=5, seed=1), layers(3, batch=2, seed=2)]
    expected = []
    for volume in volumes:
        rows = [by_hand(probe, volume, row) for row in range(len(volume[0][1]))]
        expected.append(answer(probe, sum(rows) / len(rows)))
    expected = torch.stack(expected)
    torch.testing.assert_close(probe(volumes), expected)
    torch.testing.assert_close(probe(volumes[0]), expected[:1])
    # As published: volumes of slices, each slice a batch of one.
    published = [
        [[(p[row : row + 1], c[row : row + 1]) for p, c in volume] for row in range(len(volume[0][1]))]
        for volume in volumes
    ]
    torch.testing.assert_close(probe(published), expected)


def test_several_probes_answer_by_name():
    probes = LinearProbes({"one": randomised(blocks=1), "four": randomised(blocks=4, avgpool=True)})
    given = layers(4)
    found = probes(given)
    assert list(found) == ["one", "four"]
    assert torch.equal(found["four"], probes["four"](given))


def test_what_cannot_be_read_is_refused():
    with pytest.raises(UsageError, match="reads the last 4 blocks and gets 2"):
        randomised(blocks=4)(layers(2))
    with pytest.raises(UsageError, match="trained on an encoder of width 6"):
        randomised()([(torch.zeros(1, 4, 5), torch.zeros(1, 5))])
    with pytest.raises(UsageError, match="a volume without slices"):
        randomised(volumes=True)([layers(1), []])
    encoder = create_encoder("vit_tiny_patch16_224", image_size=32, embed_dim=D, depth=1, num_heads=2,
                             class_token=False, global_pool="avg")  # fmt: skip
    with torch.no_grad(), pytest.raises(UsageError, match="this encoder has none"):
        randomised()(intermediate_layers(encoder, torch.randn(1, 3, 32, 32), [-1]))
