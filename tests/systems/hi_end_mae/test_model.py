"""The module: what reaches what, sizes of the published models, bad input."""

from __future__ import annotations

import pytest
import torch

from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.systems.hi_end_mae.model import HiEndMAE, hi_end_mae


def small(**settings):
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 12, "num_heads": 2, "decoder_embed_dim": 12}
    return hi_end_mae(**{**sizes, "decoder_num_heads": 2, **settings})


@pytest.mark.parametrize(
    ("arguments", "total", "encoder", "decoder", "patches", "visible"),
    [
        ((96, 16), 101.61, 88.20, 12.23, 216, 54),
        ((96, 12, 1, 1536, 12, 16, 528, 16), 366.92, 342.64, 21.03, 512, 128),
    ],
)
def test_published_sizes(arguments, total, encoder, decoder, patches, visible):
    with torch.device("meta"):
        model = hi_end_mae(*arguments)
    counts = [
        sum(p.numel() for p in part.parameters() if p.requires_grad) / 1e6
        for part in (model, model.encoder, model.decoder)
    ]
    assert [round(count, 2) for count in counts] == [total, encoder, decoder]
    assert (model.patches, model.visible) == (patches, visible)
    assert model.decoder.head.out_features == arguments[1] ** 3


def test_the_order_of_visible_patches_says_nothing_and_which_they_are_does():
    model, volumes = small(mask_ratio=0.5), torch.rand(2, 1, 8, 8, 8)
    order = torch.stack([torch.randperm(8) for _ in range(2)])
    loss = model(volumes, order).loss
    turned = torch.cat([order[:, :4].flip(1), order[:, 4:]], 1)
    torch.testing.assert_close(model(volumes, turned).loss, loss)
    swapped = order.clone()
    swapped[:, [0, 7]] = order[:, [7, 0]]
    assert abs(float((model(volumes, swapped).loss - loss).detach())) > 1e-4


def test_the_loss_alone_is_that_of_the_forward_pass():
    model, volumes, noise = small(), torch.rand(2, 1, 8, 8, 8), torch.rand(2, 8)
    torch.testing.assert_close(model.loss(volumes, noise), model(volumes, noise.argsort(1)).loss)


def test_zero_predictions_cost_the_variance_of_the_targets_and_air_nothing():
    model = small()
    for parameter in model.decoder.head.parameters():
        torch.nn.init.zeros_(parameter)
    volumes = torch.rand(2, 1, 8, 8, 8)
    variance = volumes.unfold(2, 4, 4).unfold(3, 4, 4).unfold(4, 4, 4).flatten(5).var(-1, correction=0).flatten(1)
    output = model(volumes)
    hidden = variance.gather(1, output.shuffle_indices[:, output.n_visible :])
    torch.testing.assert_close(output.loss, (hidden / (hidden + 1e-6)).mean())
    assert float(model(torch.zeros(2, 1, 8, 8, 8)).loss.detach()) == 0


def test_shallow_blocks_learn_through_their_own_memory():
    """Blocks 0 to 3 get gradients by the first bridge alone, where nothing comes through the later blocks."""
    model = small()
    model.encoder.blocks[4].register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(),))
    model.loss(torch.rand(2, 1, 8, 8, 8)).backward()
    assert all(float(model.encoder.blocks[n].mlp.fc2.weight.grad.abs().sum()) > 0 for n in range(4))
    assert float(model.encoder_to_decoder[0].weight.grad.abs().sum()) > 0


def test_reconstruction_keeps_what_was_visible():
    model, volumes = small(), torch.rand(1, 1, 8, 8, 8)
    order = torch.tensor([[5, 0, 1, 2, 3, 4, 6, 7]])
    made = model.reconstruct(volumes, order)
    assert torch.allclose(made[..., 4:, :4, 4:], volumes[..., 4:, :4, 4:])
    assert not torch.allclose(made[..., 4:, 4:, 4:], volumes[..., 4:, 4:, 4:])


def test_encode_returns_all_blocks_of_whole_volumes():
    model, volumes = small(), torch.rand(1, 1, 8, 8, 8)
    tokens, hidden = model.encode(volumes)
    assert len(hidden) == 12
    torch.testing.assert_close(model.encoder.norm(hidden[-1]), tokens)
    torch.testing.assert_close(model.encoder.forward_features(volumes), tokens)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"depth": 9}, "asks blocks 3, 6, 9 .from 0., and the encoder has 9; take one of at least 10"),
        ({"decoder_embed_dim": 16}, "width divisible by 6, not 16"),
        ({"decoder_num_heads": 5}, "decoder_dim 12 is not divisible by decoder_heads 5"),
        ({"embed_dim": 20}, "width divisible by 6, not 20"),
        ({"img_size": 10}, "10 is not divisible by patch size 4"),
        ({"mask_ratio": 0.9}, "leaves none of 8 patches visible"),
        ({"mask_ratio": 0.0}, "must be above 0 and below 1"),
        ({"memory_layers": (6, 3, 9)}, "memory_layers is .6, 3, 9.; give blocks from 0, shallow ones first"),
    ],
)
def test_models_that_cannot_be_are_refused(settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        small(**settings)


def test_volumes_that_cannot_be_are_refused():
    model = small()
    with pytest.raises(UsageError, match="volumes of 2 channels; the encoder takes 1"):
        model(torch.rand(1, 2, 8, 8, 8))
    with pytest.raises(UsageError, match="volumes of 8x8x12 voxels; the model was made for 8x8x8"):
        model(torch.rand(1, 1, 8, 8, 12))
    with pytest.raises(UsageError, match="NaN or infinite"):
        model(torch.full((1, 1, 8, 8, 8), float("nan")))
    with pytest.raises(UsageError, match="no order of 8 patches"):
        model(torch.rand(1, 1, 8, 8, 8), torch.zeros(1, 8, dtype=torch.int64))
    with pytest.warns(UserWarning, match="CT numbers as stored; bring them to"):
        model(torch.rand(1, 1, 8, 8, 8) * 1000)
    with pytest.raises(UsageError, match="for encoders of volumes, and this one takes images"):
        HiEndMAE(create_encoder("vit_tiny_patch16_224"))
