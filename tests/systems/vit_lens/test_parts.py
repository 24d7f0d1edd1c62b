"""Choosing points, tokenizers, lenses and what learns: facts of the method, and bad input."""

import pytest
import timm
import torch
from torch import nn

from patchloom.errors import UsageError

pytest.importorskip("open_clip")
from patchloom.systems.vit_lens.lens import PerceiverLens, SelfAttentionLens
from patchloom.systems.vit_lens.model import ModalityEncoder, tri_modal_contrastive_loss
from patchloom.systems.vit_lens.points import (
    ball_group,
    farthest_point_sample,
    gathered_points,
    knn_group,
    normalize_point_cloud,
)
from patchloom.systems.vit_lens.tokenizers import (
    DepthTokenizer,
    PointTokenizer,
    SetAbstractionTokenizer,
    SignalTokenizer,
    SpectrogramTokenizer,
)


def small_vit():
    return timm.create_model("vit_micro_patch4_32", num_classes=0)


def test_every_point_chosen_is_the_farthest_from_those_before():
    cloud = torch.randn(3, 60, 3)
    chosen = farthest_point_sample(cloud, 12, start_index=torch.tensor([0, 5, 59]))
    assert chosen[:, 0].tolist() == [0, 5, 59]
    places = gathered_points(cloud, chosen)
    for number in range(1, 12):
        nearest = torch.cdist(cloud, places[:, :number]).amin(2)
        assert torch.equal(nearest.argmax(1), chosen[:, number])


def test_of_points_as_far_the_first_is_chosen_and_doubles_are_legal():
    square = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [-1, 0, 0], [0, 1, 0]]])
    assert farthest_point_sample(square, 2).tolist() == [[0, 1]]
    same = torch.zeros(1, 5, 3)
    assert farthest_point_sample(same, 3).tolist() == [[0, 0, 0]]
    tokenizer = PointTokenizer(3, 2, 8, 8).eval()
    assert torch.isfinite(tokenizer(same).tokens).all()


def test_a_group_of_neighbours_holds_its_centre():
    cloud = torch.rand(2, 50, 3)
    numbers = farthest_point_sample(cloud, 6)
    assert (knn_group(cloud, gathered_points(cloud, numbers), 4) == numbers[..., None]).any(-1).all()


def test_a_ball_that_is_not_full_repeats_its_first_point():
    line = torch.tensor([[[0.0, 0, 0], [0.1, 0, 0], [0.2, 0, 0], [5, 0, 0]]])
    assert ball_group(line, line[:, [1, 3]], 0.15, 4).tolist() == [[[0, 1, 2, 0], [3, 3, 3, 3]]]
    with pytest.raises(UsageError, match="no point within"):
        ball_group(line, line[:, :1] + 2, 0.15, 2)


def test_clouds_lie_in_the_unit_sphere_with_colours_as_they_are():
    cloud = torch.randn(2, 40, 6) * 7 + 3
    moved = normalize_point_cloud(cloud)
    assert torch.allclose(moved[..., :3].norm(dim=-1).amax(1), torch.ones(2))
    assert torch.equal(moved[..., 3:], cloud[..., 3:])


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (torch.randn(1, 5, 3), "6 centres are to be chosen of 5 points"),
        (torch.randn(1, 7, 3), "groups of 8 points are asked for, and a cloud has 7"),
        (torch.full((2, 20, 3), float("nan")), "2 of 2 clouds hold NaN"),
        (torch.randn(1, 20, 6), r"shape \(batch, points, 3\)"),
        (torch.randn(20, 3), r"these are \(20, 3\)"),
        (torch.zeros(1, 20, 3, dtype=torch.int64), "points are floats, and these are int64"),
    ],
)
def test_clouds_that_cannot_be_read_are_refused_with_the_numbers(points, said):
    with pytest.raises(UsageError, match=said):
        PointTokenizer(6, 8, 8, 8)(points)


def test_a_cloud_without_extent_has_no_shape():
    with pytest.raises(UsageError, match="in one place"):
        normalize_point_cloud(torch.ones(1, 10, 3))
    with pytest.raises(UsageError, match="NaN or infinite"):
        normalize_point_cloud(torch.full((1, 10, 3), float("inf")))


def test_clouds_with_colours_are_asked_for_where_they_are_needed():
    with pytest.raises(UsageError, match=r"shape \(batch, points, 6\)"):
        SetAbstractionTokenizer(4, 4)(torch.randn(1, 20, 3))


def test_centres_begin_anywhere_in_training_and_at_point_0_else():
    tokenizer = PointTokenizer(2, 2, 8, 8)
    cloud = torch.randn(1, 30, 3)
    torch.manual_seed(0)
    starts = {int(tokenizer.train().centres(cloud, None)[0, 0]) for _ in range(20)}
    assert len(starts) > 3
    assert int(tokenizer.eval().centres(cloud, None)[0, 0]) == 0


@pytest.mark.parametrize(
    ("tokenizer", "good", "bad"),
    [
        (DepthTokenizer(16, 8, 12), (2, 1, 16, 16), (2, 3, 16, 16)),
        (DepthTokenizer(16, 8, 12), (2, 1, 16, 16), (2, 1, 24, 24)),
        (SpectrogramTokenizer(40, 30, 8, 10, 12), (2, 40, 30), (2, 40, 31)),
        (SpectrogramTokenizer(40, 30, 8, 10, 12), (2, 40, 30), (2, 60, 30)),
        (SignalTokenizer(5, 20, 12), (2, 5, 20), (2, 6, 20)),
    ],
)
def test_other_senses_refuse_other_shapes_and_nan(tokenizer, good, bad):
    tokens, places = tokenizer(torch.randn(good))
    assert tokens.shape[1:] == places.shape[1:] == (tokenizer.num_tokens, 12)
    with pytest.raises(UsageError):
        tokenizer(torch.randn(bad))
    with pytest.raises(UsageError, match="NaN"):
        tokenizer(torch.full(good, float("nan")))
    with pytest.raises(UsageError, match="floats"):
        tokenizer(torch.zeros(good, dtype=torch.int64))


def test_the_published_spectrogram_gives_600_tokens():
    assert SpectrogramTokenizer(width=8).num_tokens == 600


def test_a_mask_hides_tokens_from_the_lens():
    lens = PerceiverLens(6, 16, 4, depth=2, heads=2, head_dim=8, cross_head_dim=8)
    tokens, mask = torch.randn(2, 9, 6), torch.arange(9).expand(2, -1) < 5
    other = tokens.clone()
    other[:, 5:] = 7.0
    assert torch.allclose(lens(tokens, mask), lens(other, mask), atol=1e-6)
    assert torch.allclose(lens(tokens, mask), lens(tokens[:, :5]), atol=1e-6)


def test_positions_of_fourier_are_sine_cosine_and_place():
    from patchloom.systems.vit_lens.lens import fourier_positions

    found = fourier_positions((3,), 2, 10.0)
    last = torch.tensor([1.0, 5.0]) * torch.pi
    expected = torch.cat([last.sin(), last.cos(), torch.ones(1)])
    assert torch.allclose(found[-1], expected, atol=1e-6)
    assert PerceiverLens(6, 16, 4, 1, fourier_bands=2)(torch.randn(1, 3, 6)).shape == (1, 4, 16)


def test_tied_stages_share_all_but_the_first():
    free, tied = (PerceiverLens(6, 16, 4, depth=4, tie_weights=tie) for tie in (False, True))
    assert tied.state_dict().keys() == free.state_dict().keys()
    assert tied.layers[1] is tied.layers[3] is not tied.layers[0]
    count = [sum(p.numel() for p in lens.parameters()) for lens in (free, tied)]
    assert count[1] - 64 == (count[0] - 64) // 2


def test_blocks_as_a_lens_do_not_mix_samples():
    vit = small_vit()
    lens = SelfAttentionLens(128, 2, init_from=vit)
    tokens = torch.randn(3, 5, 128)
    assert torch.allclose(lens(tokens)[1], lens(tokens[1:2])[0], atol=1e-5)
    assert torch.equal(lens.blocks[1].attn.qkv.weight, vit.blocks[1].attn.qkv.weight)
    with pytest.raises(UsageError, match="of 9 blocks cannot begin as the first of 6"):
        SelfAttentionLens(128, 9, init_from=vit)


def encoder(**options):
    lens = PerceiverLens(24, 128, 64, 1, heads=2, head_dim=8, cross_head_dim=8)
    return ModalityEncoder(small_vit(), PointTokenizer(8, 4, 16, 24), lens, nn.Linear(128, 8, bias=False), **options)


def learnt(model):
    return {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad and n.startswith("vit.")}


def test_only_tokenizer_and_lens_learn_unless_more_is_unlocked():
    model = encoder()
    assert learnt(model) == set()
    assert all(p.requires_grad for part in (model.tokenizer, model.lens) for p in part.parameters())
    assert not model.projection.weight.requires_grad
    assert learnt(encoder(unlock_cls=True)) == {"cls_token"}
    assert learnt(encoder(unlock_pos=True)) == {"pos_embed"}  # not the first blocks, as in OpenShape's code
    first = encoder(unlock_first_blocks=2)
    assert [all(p.requires_grad for p in block.parameters()) for block in first.vit.blocks] == [True] * 2 + [False] * 4
    head = encoder(unlock_groups=2)
    assert head.projection.weight.requires_grad
    assert learnt(head) == {"blocks", "norm"}
    assert learnt(encoder(unlock_groups=1, unlock_from="stem")) == {"cls_token", "pos_embed"}
    touch = ModalityEncoder(small_vit(), unlock_groups=5, unlock_from="stem")
    assert learnt(touch) == {"patch_embed", "cls_token", "pos_embed", "blocks"}
    with pytest.raises(UsageError, match="9 blocks or groups are to learn, and there are 6"):
        encoder(unlock_first_blocks=9)


def test_blocks_that_are_skipped_are_gone():
    model = encoder(skip_first_blocks=4)
    assert len(model.vit.blocks) == 2
    with pytest.raises(UsageError, match="6 blocks are to be taken out, and the ViT has 6"):
        encoder(skip_first_blocks=6)


def test_a_sense_must_fit_the_vit():
    with pytest.raises(UsageError, match="width 24, and the ViT takes 128"):
        ModalityEncoder(small_vit(), PointTokenizer(8, 4, 16, 24))
    with pytest.raises(UsageError, match="plain ViT"):
        ModalityEncoder(timm.create_model("resnet18", num_classes=0))


def test_parameters_of_the_published_lenses():
    """Of the table of the paper's appendix; without tokenizers, as 59.4 M and 118.5 M are told."""
    count = {}
    with torch.device("meta"):
        for name, options in (
            ("tied", {"in_dim": 384, "tie_weights": True}),
            ("untied", {"in_dim": 384}),
            ("audio", {"in_dim": 1024, "depth": 2, "self_per_cross": 3}),
            ("eeg", {"in_dim": 1024, "depth": 1}),
        ):
            lens = PerceiverLens(width=1024, **options)
            count[name] = sum(p.numel() for p in lens.parameters()) / 1e6
        wide = PerceiverLens(256, 1664, heads=16, head_dim=104, cross_head_dim=104)
        count["openshape"] = sum(p.numel() for p in wide.parameters()) / 1e6
    assert {name: round(value, 1) for name, value in count.items()} == {
        "tied": 59.4,
        "untied": 118.5,
        "audio": 126.7,
        "eeg": 29.9,
        "openshape": 312.3,
    }


def test_the_loss_is_the_mean_of_both_directions_against_images_and_texts():
    image, text, sense = (nn.functional.normalize(torch.randn(5, 8, dtype=torch.float64), dim=1) for _ in range(3))
    scale = torch.tensor(1.3, dtype=torch.float64)
    expected = 0.0
    for other in (image, text):
        logits = scale.exp() * other @ sense.T
        for rows in (logits, logits.T):
            expected -= rows.log_softmax(1).diag().mean() / 2
    found = tri_modal_contrastive_loss(image, text, sense, scale)
    torch.testing.assert_close(found, expected)
    with pytest.raises(UsageError, match="to images, to texts or to both"):
        tri_modal_contrastive_loss(None, None, sense, scale)
