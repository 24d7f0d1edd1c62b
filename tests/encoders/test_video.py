"""Encoders of clips: tubes, their order and positions, and all that is asked of an encoder."""

from __future__ import annotations

import math

import pytest
import timm
import torch

from patchloom.encoders import (
    create_encoder,
    feature_map,
    grid_size,
    image_size,
    in_chans,
    input_size,
    intermediate_layers,
    kind_of,
    normalize,
    patch_shape,
    patch_size,
    pooled,
    set_image_size,
    tokens,
)
from patchloom.encoders.anysize import embed_any_size
from patchloom.encoders.cosine_attention import CosineAttention
from patchloom.encoders.masked_autoencoder import MaskedAutoencoder
from patchloom.encoders.positions import running_positions
from patchloom.encoders.stages import embed, run_blocks
from patchloom.encoders.video import TubeletEmbed
from patchloom.errors import UsageError
from patchloom.models.bundle import load, save_bundle


def tiny(size=(4, 8, 12), **settings):
    shape = {"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, **settings}
    encoder = create_encoder("videomae_tiny_patch16_224", image_size=size, **shape)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return encoder.double().eval()


def clips(*size, count=2):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_tubes_come_frame_by_frame_then_row_by_row():
    embed_tubes = TubeletEmbed(8, 4, 3, 16)
    with torch.no_grad():
        embed_tubes.proj.weight.zero_()
        embed_tubes.proj.weight[0] = 1 / (3 * 2 * 16)  # the mean of a tube
        embed_tubes.proj.bias.zero_()
    clip = torch.arange(12.0).view(3, 2, 2)  # one value for each tube: time, row, column
    clip = clip.repeat_interleave(2, 0).repeat_interleave(4, 1).repeat_interleave(4, 2)
    torch.testing.assert_close(embed_tubes(clip.expand(1, 3, -1, -1, -1))[0, :, 0], torch.arange(12.0))


def test_it_answers_what_every_encoder_is_asked():
    encoder = tiny()
    assert kind_of(encoder) == "clip"
    assert (input_size(encoder), grid_size(encoder), patch_shape(encoder)) == ((4, 8, 12), (2, 2, 3), (2, 4, 4))
    assert grid_size(encoder, (8, 8, 8)) == (4, 2, 2)
    assert in_chans(encoder) == 3
    with pytest.raises(UsageError, match="patches of 2x4x4, and one side is asked for"):
        patch_size(encoder)
    with pytest.raises(UsageError, match="takes clips of 4x8x12, and this is for images"):
        image_size(encoder)
    with pytest.raises(UsageError, match=r"takes clips \(B, C, T, H, W\), and was given shape \(2, 3, 8, 12\)"):
        tokens(encoder, torch.zeros(2, 3, 8, 12, dtype=torch.float64))


def test_tokens_features_and_layers_are_those_of_its_own_forward_pass():
    encoder, x = tiny(), clips(4, 8, 12)
    whole = encoder.forward_features(x)
    prefix, patches = tokens(encoder, x)
    assert prefix.shape == (2, 0, 32)
    torch.testing.assert_close(patches, whole)
    found = feature_map(encoder, x)
    assert found.shape == (2, 32, 2, 2, 3)
    torch.testing.assert_close(found[:, :, 1, 0, 2], whole[:, 1 * 6 + 0 * 3 + 2])
    torch.testing.assert_close(pooled(encoder, x), encoder(x))
    torch.testing.assert_close(pooled(encoder, x, "avg"), whole.mean(1))
    (last,) = intermediate_layers(encoder, x, [-1], norm=False)
    torch.testing.assert_close(last.patches, whole)  # it norms what it pools, not its tokens


def test_clips_of_any_length_and_size_are_read_alike():
    encoder, x = tiny(), clips(6, 16, 8)
    last, _ = run_blocks(encoder, embed_any_size(encoder, x))
    torch.testing.assert_close(last, encoder.forward_features(x))
    assert feature_map(encoder, x).shape == (2, 32, 3, 4, 2)
    with pytest.raises(UsageError, match="5 frames are not divisible by the tubelet size 2"):
        encoder(clips(5, 8, 12))


def test_a_part_of_the_tubes_is_the_same_embedded_alone_or_with_all():
    encoder, x = tiny(), clips(4, 8, 12)
    keep = torch.stack([torch.randperm(12)[:5] for _ in range(2)])
    alone, all_of_them = embed(encoder, x, keep=keep), embed(encoder, x)
    torch.testing.assert_close(alone.x, all_of_them.x.gather(1, keep.unsqueeze(-1).expand(-1, -1, 32)))


def test_mask_tokens_stand_in_before_positions_are_added():
    encoder, x = tiny(), clips(4, 8, 12)
    masked, token = torch.zeros(2, 12, dtype=torch.bool), torch.full((1, 1, 32), 0.7, dtype=torch.float64)
    masked[:, 3] = True
    entered = embed(encoder, x, masked=masked, mask_token=token).x
    torch.testing.assert_close(entered[0, 3], token[0, 0] + running_positions(12, 32)[3].double())
    torch.testing.assert_close(entered[0, 2], embed(encoder, x).x[0, 2])


def test_a_masked_autoencoder_learns_on_clips():
    model = MaskedAutoencoder(tiny(), decoder_dim=36, decoder_depth=1, decoder_heads=2).double()
    x, noise = clips(4, 8, 12), torch.rand(2, 12)
    output = model(x, noise=noise)
    assert output.pred.shape == (2, 12, 3 * 2 * 4 * 4)
    torch.testing.assert_close(model.loss(x, noise=noise), output.loss)
    shown = model.reconstruct(x, noise=noise)
    visible = ~output.mask.bool().view(2, 2, 2, 3)
    pixels = visible.repeat_interleave(2, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)[:, None].expand_as(x)
    torch.testing.assert_close(shown[pixels], x[pixels])
    assert not torch.isclose(shown[~pixels], x[~pixels]).all()


def test_another_size_changes_nothing_but_what_it_says():
    encoder = tiny()
    before = encoder.state_dict()
    assert input_size(set_image_size(encoder, 16)) == (4, 16, 16)
    assert input_size(set_image_size(encoder, (8, 8, 12))) == (8, 8, 12)
    assert encoder.patchloom_args["model_args"]["num_frames"] == 8
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    with pytest.raises(UsageError, match="not divisible by patch size 2"):
        set_image_size(encoder, (7, 8, 12))
    with pytest.raises(UsageError, match="has 4 sides; this encoder takes clips of 3"):
        set_image_size(encoder, (1, 8, 8, 12))


def test_its_bundle_gives_it_back(tmp_path):
    encoder = tiny(num_frames=4).float()
    back = load(save_bundle(encoder, tmp_path / "model"))
    assert (kind_of(back), input_size(back), back.patchloom_args) == ("clip", (4, 8, 12), encoder.patchloom_args)
    x = clips(4, 8, 12).float()
    assert torch.equal(back(x), encoder(x))


def test_clips_are_normalised_per_channel():
    encoder = tiny()
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 4.0)}
    x = clips(2, 4, 4)
    found = normalize(x, encoder)
    for channel, (mean, std) in enumerate([(0.1, 1.0), (0.2, 2.0), (0.3, 4.0)]):
        torch.testing.assert_close(found[:, channel], (x[:, channel] - mean) / std, atol=1e-7, rtol=1e-6)


def test_positions_are_the_formula():
    table = running_positions(50, 12)
    for position in (0, 7, 49):
        for column in range(12):
            angle = position / 10000 ** (2 * (column // 2) / 12)
            wanted = math.sin(angle) if column % 2 == 0 else math.cos(angle)
            assert math.isclose(float(table[position, column]), wanted, abs_tol=1e-7)


def test_cosine_attention_is_the_formula_and_its_factor_ends_at_a_hundred():
    attention = CosineAttention(12, num_heads=3).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in attention.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    attention.scale.data = torch.tensor([0.5, 4.0, 9.0]).view(3, 1, 1).double()
    x = torch.randn(2, 5, 12, generator=generator, dtype=torch.float64)
    q, k, v = (x @ attention.qkv.weight.T).split(12, -1)
    q, v = q + attention.q_bias, v + attention.v_bias
    heads = []
    for head, factor in enumerate((math.exp(0.5), math.exp(4.0), math.exp(4.6052))):
        part = slice(4 * head, 4 * head + 4)
        q1, k1 = (t[..., part] / t[..., part].norm(dim=-1, keepdim=True) for t in (q, k))
        heads.append((factor * q1 @ k1.transpose(1, 2)).softmax(-1) @ v[..., part])
    expected = torch.cat(heads, -1) @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(x), expected)
    attention.fused_attn = False
    torch.testing.assert_close(attention(x), expected)


def test_a_pool_of_the_first_token_needs_no_class_token():
    encoder = create_encoder("videomae_tiny_patch16_224", image_size=(4, 32, 32), depth=1, global_pool="token").eval()
    clips = torch.randn(2, 3, 4, 32, 32)
    torch.testing.assert_close(encoder(clips), encoder.forward_features(clips)[:, 0])
    assert isinstance(encoder.norm, torch.nn.LayerNorm)


def test_huge_and_giant_have_the_papers_sizes():
    with torch.device("meta"):
        for name, millions, tokens in (("huge_patch16", 632, 1568), ("giant_patch14", 1012, 2048)):
            model = timm.create_model(f"videomae_{name}_224", num_classes=0)
            assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
            assert model.patch_embed.num_patches == tokens
        assert model.blocks[0].mlp.fc1.out_features == 6144
        base = timm.create_model("videomae_base_patch16_224", num_classes=400)
        # The published count is without biases of keys, which change nothing.
        assert sum(p.numel() for p in base.parameters()) == 86_534_800 + 12 * 768


def test_hidden_tubes_are_not_embedded_in_training_either():
    encoder = tiny().train()
    seen = []
    encoder.patch_embed.proj.forward = lambda clips: seen.append(clips.shape)
    keep = torch.tensor([[0, 3, 5]])
    clips = torch.randn(1, 3, 4, 8, 12, dtype=encoder.patch_embed.proj.weight.dtype)
    kept = embed(encoder, clips, keep=keep).x
    assert not seen
    del encoder.patch_embed.proj.forward
    torch.testing.assert_close(kept, embed(encoder, clips).x[:, keep[0]], atol=1e-5, rtol=1e-5)
