"""Generators of masks: superpixels, models with random weights, our own segmenters; and what is made of their masks."""

from __future__ import annotations

import pytest
import torch

from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle
from patchloom.segment.build import build_parts
from patchloom.segment.saved import Segmenter, save_segmenter
from patchloom.systems.vit_p.inference import mask_points
from patchloom.systems.vit_p.model import PointViT
from patchloom.systems.vit_p.proposals import (
    ComponentProposals,
    MaskProposals,
    MaskRCNNProposals,
    SamProposals,
    SuperpixelProposals,
    TransformersProposals,
    in_order,
    open_proposals,
)
from patchloom.systems.vit_p.segmenter import PointSegmenter, oracle_logits

NAMES = ["soil", "crop", "weed"]


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", patch_size=8, image_size=32, embed_dim=24, depth=1, num_heads=2)
    model = PointViT(encoder, 3, start="patch").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def image(*sides):
    return torch.rand(3, *sides, generator=torch.Generator().manual_seed(1))


class Given:
    """Hands out the masks it was given."""

    def __init__(self, proposals, class_names=None):
        self.proposals, self.class_names = proposals, class_names

    def __call__(self, picture):
        return self.proposals


@pytest.mark.parametrize("name", ["superpixels:12", "felzenszwalb:40"])
@pytest.mark.parametrize("channels", [1, 3])
def test_superpixels_cover_the_image(name, channels):
    found = open_proposals(name)(image(30, 44)[:channels])
    assert found.partition.shape == (30, 44)
    assert sorted(found.partition.unique().tolist()) == list(range(len(found)))
    assert len(found) > 1
    torch.testing.assert_close(found.mask_logits().sigmoid().sum(0), torch.ones(30, 44))


def test_points_of_a_partition_are_those_of_its_masks():
    found = SuperpixelProposals(10)(image(30, 44))
    masks = found.mask_logits() > 0
    for mode in ("distance", "centroid"):
        torch.testing.assert_close(found.points(mode), mask_points(masks, mode))
    torch.testing.assert_close(found.points("argmax"), mask_points(masks))
    torch.testing.assert_close(found.points(), found.points("distance"))


def test_a_partition_and_its_masks_are_segmented_alike(classifier):
    found = SuperpixelProposals(10)(image(30, 44))
    masks = MaskProposals(found.size, found.mask_logits() > 0)
    said = [PointSegmenter(classifier, Given(one), (32, 32), NAMES).segment(image(30, 44)) for one in (found, masks)]
    assert torch.equal(*said)


def test_chunks_change_answers_slightly_and_random_fillers_are_reproducible(classifier):
    model = PointSegmenter(classifier, SuperpixelProposals(10), (32, 32), NAMES, chunk=4)
    picture, points = image(30, 44), torch.rand(10, 2) * 2 - 1
    found = [
        model.point_logits(picture, points, pad="random", generator=torch.Generator().manual_seed(2)) for _ in range(2)
    ]
    assert torch.equal(*found)
    plain = model.point_logits(picture, points)
    assert torch.equal(plain[:8], found[0][:8])
    assert not torch.equal(plain[8:], found[0][8:])


@pytest.mark.parametrize("empty", [MaskProposals((20, 30)), MaskProposals((20, 30), torch.zeros(0, 20, 30))])
def test_no_masks_are_pixels_of_no_class(classifier, empty):
    model = PointSegmenter(classifier, Given(empty), (32, 32), NAMES, things=["crop"])
    assert set(model.segment(image(20, 30)).unique().tolist()) == {255}
    panoptic = model.predict(image(20, 30), "panoptic")
    assert (panoptic.ids.shape, panoptic.segments) == ((20, 30), [])
    assert len(model.predict(image(20, 30), "instance").masks) == 0
    assert not model.semantic(image(20, 30)).any()
    assert torch.isfinite(model(torch.randn(1, 3, 20, 30))).all()


def test_parts_of_a_label_map_are_masks_with_its_classes(classifier):
    labels = torch.tensor([[0, 0, 1, 255], [0, 0, 1, 1]])
    logits = torch.randn(3, 2, 4)
    found = ComponentProposals(lambda picture: (labels, logits), NAMES)(image(2, 4))
    assert found.partition.tolist() == [[0, 0, 1, -1], [0, 0, 1, 1]]
    torch.testing.assert_close(
        found.class_logits.softmax(-1)[0, :3], logits.softmax(0)[:, :, :2].flatten(1).mean(1), atol=1e-5, rtol=1e-5
    )
    said = PointSegmenter(classifier, Given(found, NAMES), (32, 32), NAMES).segment(image(2, 4))
    assert said[0, 3] == 255


def test_alpha_none_is_the_generator_and_alpha_one_the_points(classifier):
    found = SuperpixelProposals(6)(image(30, 44))
    named = torch.full((len(found), 4), -5.0)
    named[:, 2] = 5.0
    proposals = MaskProposals(found.size, partition=found.partition, class_logits=named)
    segment = {
        alpha: PointSegmenter(classifier, Given(proposals, NAMES), (32, 32), NAMES, alpha=alpha).segment(image(30, 44))
        for alpha in (0.0, 1.0)
    }
    assert set(segment[0.0].unique().tolist()) == {2}
    alone = PointSegmenter(classifier, Given(found), (32, 32), NAMES).segment(image(30, 44))
    assert torch.equal(segment[1.0], alone)


def test_true_classes_of_masks_are_an_upper_bound():
    truth = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 255]])
    partition = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 2]])
    logits = oracle_logits(MaskProposals((2, 4), partition=partition), truth, 2)
    assert logits.argmax(1).tolist() == [0, 1, 2]
    masks = MaskProposals((2, 4), torch.stack([partition == number for number in range(3)]))
    assert torch.equal(oracle_logits(masks, truth, 2), logits)


def test_classes_of_a_generator_are_matched_by_name():
    logits = torch.tensor([[1.0, 2.0, 3.0, 9.0]])
    assert in_order(logits, ["a", "b", "c"], ["c", "a"], "x").tolist() == [[3.0, 1.0, 9.0]]
    with pytest.raises(UsageError, match=r"x knows no class 'd' .*set alpha to 1"):
        in_order(logits, ["a", "b", "c"], ["d"], "x")


def test_another_segmenter_draws_masks(tmp_path):
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", patch_size=8, image_size=32, embed_dim=24, depth=1, num_heads=2)
    save_bundle(encoder, tmp_path / "model")
    model = Segmenter(build_parts(encoder, 3, "linear"), "linear", 16, 32, None, None, [(0, 0, 0)] * 3, NAMES)
    save_segmenter(model, tmp_path / "model")
    generator = open_proposals(str(tmp_path))
    found = generator(image(40, 50))
    assert generator.class_names == NAMES
    assert found.class_logits.shape == (len(found), 4)
    # The most frequent class of a part is, by and large, that of its pixels.
    said = model.eval().segment(image(40, 50))
    first = [int(said[found.partition == number][0]) for number in range(len(found))]
    assert (found.class_logits[:, :3].argmax(1) == torch.tensor(first)).float().mean() > 0.8


@pytest.mark.slow
def test_mask_rcnn_gives_the_score_of_one_class_and_nothing_else():
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4, box_score_thresh=0.0, min_size=64)
    found = MaskRCNNProposals(model, ["__background__", *NAMES])(image(64, 64))
    assert found.masks.shape[1:] == (64, 64)
    assert found.class_logits.shape == (len(found), 4)
    shares = found.class_logits.softmax(-1)
    assert bool(((shares > 1e-3).sum(1) <= 2).all())


@pytest.mark.slow
@pytest.mark.extra("proposals")
def test_mask_classifiers_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    backbone = transformers.SwinConfig(embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4)
    backbone.out_features = ["stage1", "stage2", "stage3", "stage4"]
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, num_labels=3, num_queries=5, hidden_dim=32, feature_size=32, mask_feature_size=32,
        num_attention_heads=2, encoder_layers=1, decoder_layers=2, encoder_feedforward_dim=16, dim_feedforward=16,
        id2label=dict(enumerate(NAMES)), label2id={name: number for number, name in enumerate(NAMES)},
    )  # fmt: skip
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path)
    transformers.Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    generator = TransformersProposals(str(tmp_path))
    found = generator(image(40, 60))
    assert generator.class_names == NAMES
    assert (found.masks.shape, found.class_logits.shape) == ((5, 40, 60), (5, 4))


@pytest.mark.slow
@pytest.mark.extra("proposals")
def test_masks_of_sam(tmp_path):
    transformers = pytest.importorskip("transformers")
    vision = transformers.SamVisionConfig(
        hidden_size=16, output_channels=8, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16,
        mlp_dim=16, global_attn_indexes=[0], window_size=2, num_pos_feats=4,
    )  # fmt: skip
    prompts = transformers.SamPromptEncoderConfig(hidden_size=8, image_size=64, patch_size=16, mask_input_channels=4)
    masks = transformers.SamMaskDecoderConfig(
        hidden_size=8, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=8
    )
    config = transformers.SamConfig(
        vision_config=vision.to_dict(), prompt_encoder_config=prompts.to_dict(), mask_decoder_config=masks.to_dict()
    )
    transformers.SamModel(config).save_pretrained(tmp_path)
    size = {"longest_edge": 64}
    processor = transformers.SamImageProcessor(size=size, pad_size={"height": 64, "width": 64})
    processor.save_pretrained(tmp_path)
    found = SamProposals(str(tmp_path))(image(40, 60))
    assert found.size == (40, 60)
    assert found.class_logits is None
    assert found.masks.dtype == torch.bool


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("superpixels:many", "give a number from 1"),
        ("mask2former", "proposals is 'mask2former'; it is one of superpixels, felzenszwalb, maskrcnn"),
        ("transformers:/nowhere/at/all", "could not be opened"),
    ],
)
def test_generators_that_are_none_are_refused(name, message):
    with pytest.raises(UsageError, match=message):
        open_proposals(name)


def test_tasks_that_tell_objects_apart_need_things(classifier):
    model = PointSegmenter(classifier, SuperpixelProposals(6), (32, 32), NAMES)
    with pytest.raises(UsageError, match="panoptic segmentation tells objects apart, and no class is said to be one"):
        model.predict(image(30, 44), "panoptic")
    with pytest.raises(UsageError, match="unknown task 'boxes'"):
        model.predict(image(30, 44), "boxes")
