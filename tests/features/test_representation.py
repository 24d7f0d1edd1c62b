"""The four diagnostics against their definitions, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from patchloom.data.frames import FrameSource, Recording
from patchloom.encoders import create_encoder
from patchloom.features.representation import hoyer_sparsity, observe, representation_report


def test_collapse_figures():
    features = torch.randn(40, 6, dtype=torch.float64)
    features[:, 4:] = 3.0  # dead, but not zero
    figures = representation_report(features)
    values = np.linalg.svd((features - features.mean(0)).numpy(), compute_uv=False)
    np.testing.assert_allclose(figures["singular_values"], values, atol=1e-9)
    shares = values[values > 1e-9] / values.sum()
    assert figures["effective_rank"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-6)
    assert figures["dead_dimensions"] == 2
    assert representation_report(torch.ones(5, 3))["effective_rank"] == 0


def test_similarities_leave_an_observation_s_own_out():
    features, groups = torch.randn(9, 5, dtype=torch.float64), torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
    figures = representation_report(features, groups, following=torch.tensor([0.5, 1.0]))

    def cosine(i, j):
        return float(features[i] @ features[j] / features[i].norm() / features[j].norm())

    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    within = np.mean([cosine(i, j) for i, j in pairs if groups[i] == groups[j]])
    between = np.mean([cosine(i, j) for i, j in pairs if groups[i] != groups[j]])
    assert figures["within_similarity"] == pytest.approx(within)
    assert figures["between_similarity"] == pytest.approx(between)
    assert figures["similarity_gap"] == pytest.approx(within - between)
    assert figures["similarity"][0][1] == pytest.approx(np.mean([cosine(i, j) for i in range(4) for j in (4, 5, 6)]))
    assert figures["sequence_similarity"] == 0.75
    assert "similarity_gap" not in representation_report(features)


def test_sparsity_and_attention_have_their_ends():
    one, all_alike = torch.zeros(1, 16), torch.full((1, 16), -2.0)
    one[0, 3] = 5
    assert hoyer_sparsity(one).item() == pytest.approx(1)
    assert hoyer_sparsity(all_alike).item() == pytest.approx(0, abs=1e-6)
    figures = representation_report(torch.randn(4, 16), blocks=[one, all_alike])
    assert figures["near_zero"] == [15 / 16, 0]
    attention = torch.stack([torch.full((10,), 0.1), torch.eye(10)[2]])[None]
    looked = representation_report(torch.randn(4, 16), attentions=attention)
    assert looked["attention_entropy"] == pytest.approx([1, 0], abs=1e-6)
    assert looked["attention_focus"] == pytest.approx(0.5)


def test_an_encoder_is_observed_over_the_whole_source():
    frames = np.random.default_rng(0).integers(0, 256, (30, 16, 16), dtype=np.uint8)
    source = FrameSource("x", [Recording("A", frames), Recording("B", frames[::-1].copy())])
    encoder = create_encoder("vit_tiny_patch8_84", image_size=16, embed_dim=24, depth=2, num_heads=2).train()
    observed = observe(encoder, source, count=20)
    assert observed.features.shape == (20, 24)
    assert observed.attentions.shape == (20, 2, 4)
    assert [block.shape for block in observed.blocks] == [(20, 24)] * 2
    assert observed.groups.bincount().tolist() == [10, 10]
    assert encoder.training
    encoder.eval()
    first = encoder(source.read(0).image[None].float() / 255)
    torch.testing.assert_close(observed.features[:1], first.detach())
    torch.testing.assert_close(encoder.norm(observed.blocks[1])[:1], first.detach())
    figures = representation_report(*observed[:2], observed.attentions, observed.blocks, observed.following)
    assert len(figures["hoyer"]) == 2
