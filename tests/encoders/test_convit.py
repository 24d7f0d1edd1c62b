"""ConViT as an encoder: its blocks, its initial locality, and what it cannot do."""

from __future__ import annotations

import pytest
import torch

from patchloom.encoders import create_encoder, embed, intermediate_layers, num_prefix_tokens, pooled, tokens
from patchloom.errors import UsageError


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    made = create_encoder("gcab_convit_micro_patch4_32", image_size=16).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def test_tokens_are_those_of_its_own_forward_pass(encoder):
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found = tokens(encoder, images)
        assert found.prefix.shape[1] == num_prefix_tokens(encoder) == 0
        torch.testing.assert_close(found.patches, encoder.forward_features(images))
        torch.testing.assert_close(pooled(encoder, images), encoder(images))
        assert len(intermediate_layers(encoder, images, [0, -1])) == 2


def test_heads_of_the_first_layers_look_at_the_neighbours_they_are_set_to():
    encoder = create_encoder("gcab_convit_micro_patch4_32")  # 4 heads: a kernel of 2 x 2
    block = encoder.blocks[0].attn
    assert torch.equal(block.v.weight, torch.eye(96))
    expected = {h1 + 2 * h2: [2 * (h2 - 0.5), 2 * (h1 - 0.5), -1.0] for h1 in range(2) for h2 in range(2)}
    assert dict(enumerate(block.pos_proj.weight.tolist())) == expected


def test_patches_cannot_be_left_out_of_a_row_that_attention_reads_places_from(encoder):
    with pytest.raises(UsageError, match="left out"):
        embed(encoder, torch.zeros(1, 3, 16, 16), keep=torch.tensor([[0, 3]]))
