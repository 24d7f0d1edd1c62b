"""Traits: blurring against scores set to zero in timm's own attention, ranking against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from explain.models import classifier, pictures, prompt_cam
from patchloom.encoders.insertion import activate
from patchloom.errors import UsageError
from patchloom.explain.prompt_cam import blur_heads, class_attention_maps, rank_heads, traits_between


def with_scores_at_zero(model, images: Tensor, heads: list[int], target: Tensor) -> Tensor:
    """Logits with the pre-softmax scores of the target's query set to 0 in some heads of the last block."""
    encoder, added = model.encoder, model.added
    x = added.before_last(images).x
    z = torch.cat([added.prompts[-1].expand(len(x), -1, -1), x], 1)
    block = encoder.blocks[-1]
    activate(encoder, None)
    qkv = F.linear(block.norm1(z), block.attn.qkv.weight, block.attn.qkv.bias)
    q, k, v = qkv.unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) / 8**0.5
    for image, index in enumerate(target.tolist()):
        for head in heads:
            scores[image, head, index] = 0
    z = z + block.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    z = z + block.mlp(block.norm2(z))
    activate(encoder, "prompt_cam")
    return added.head(encoder.norm(z)[:, : added.num_classes])


def test_maps_are_those_of_the_class_asked_for():
    model, images = prompt_cam(), pictures(3)
    logits, maps = model.forward_with_attention(images)
    predicted = logits.argmax(1)
    torch.testing.assert_close(class_attention_maps(model, images), maps[torch.arange(3), :, predicted])
    torch.testing.assert_close(class_attention_maps(model, images, 2), maps[:, :, 2])
    chosen = torch.tensor([0, 4, 1])
    picked = class_attention_maps(model.encoder, images, chosen)  # the encoder with its adapter serves as well
    torch.testing.assert_close(picked, maps[torch.arange(3), :, chosen])
    assert float(picked.sum((-2, -1)).max()) < 1
    torch.testing.assert_close(
        class_attention_maps(model, images, chosen, "sum").sum((-2, -1)), torch.ones(3, 4, dtype=torch.float64)
    )
    assert float(class_attention_maps(model, images, chosen, "max").amax((-2, -1)).min()) == pytest.approx(1)


def test_blurring_is_scores_at_zero_for_one_class_in_some_heads():
    model, images, target = prompt_cam(), pictures(2), torch.tensor([1, 4])
    with torch.no_grad():
        torch.testing.assert_close(
            blur_heads(model, images, torch.tensor([0, 3]), target), with_scores_at_zero(model, images, [0, 3], target)
        )
        torch.testing.assert_close(blur_heads(model, images, torch.zeros(4, dtype=torch.bool), target), model(images))


def test_ranking_takes_each_time_the_head_the_class_needs_least():
    model, images, target = prompt_cam(), pictures(2), torch.tensor([1, 4])
    ranking = rank_heads(model, images, target)
    for image in range(2):
        one, index = images[image : image + 1], target[image : image + 1]
        gone, probabilities = [], []
        while len(gone) < 4:
            scores = {}
            for head in set(range(4)) - set(gone):
                with torch.no_grad():
                    scores[head] = float(with_scores_at_zero(model, one, [*gone, head], index).softmax(-1)[0, index])
            best = max(scores, key=lambda head: scores[head])
            gone.append(best)
            probabilities.append(scores[best])
        assert ranking.order[image].tolist() == gone[::-1]
        torch.testing.assert_close(ranking.probabilities[image], torch.tensor(probabilities, dtype=torch.float64))
    assert ranking.kept == ranking.order.tolist()
    assert rank_heads(model, images, target, keep=2).kept == ranking.order[:, :2].tolist()


def test_equal_heads_go_by_number():
    model = prompt_cam()
    with torch.no_grad():
        model.encoder.blocks[-1].attn.proj.weight.zero_()  # no head has a say
    assert rank_heads(model, pictures(1), 0).order.tolist() == [[3, 2, 1, 0]]


def test_the_fewest_heads_that_keep_the_answer():
    model, images = prompt_cam(), pictures(6)
    predicted = model(images).argmax(1)
    ranking = rank_heads(model, images, until="misclassified")
    for image, kept in enumerate(ranking.kept):
        one, index = images[image : image + 1], predicted[image : image + 1]
        gone = [head for head in range(4) if head not in kept]
        with torch.no_grad():
            assert with_scores_at_zero(model, one, gone, index).argmax(1) == index
            if kept:
                least = kept[-1]
                assert with_scores_at_zero(model, one, [*gone, least], index).argmax(1) != index
    wrong = (predicted + 1) % 5
    assert all(len(kept) == 4 for kept in rank_heads(model, images, wrong, until="misclassified").kept)


def test_candidates_in_parts_give_the_same_ranking(monkeypatch):
    import importlib

    model, images = prompt_cam(depth="shallow"), pictures(5)
    whole = rank_heads(model, images, 3)
    monkeypatch.setattr(importlib.import_module("patchloom.explain.prompt_cam"), "ROWS_AT_A_TIME", 5)
    parts = rank_heads(model, images, 3)
    assert torch.equal(whole.order, parts.order)
    torch.testing.assert_close(whole.probabilities, parts.probabilities)


def test_what_tells_two_classes_apart_is_what_the_lead_loses_without_it():
    model, images = prompt_cam(), pictures(2)
    contrast = traits_between(model, images, 1, 3)
    with torch.no_grad():
        logits = model(images)
        torch.testing.assert_close(contrast.lead, logits[:, 1] - logits[:, 3])
        for head in range(4):
            # Blurring one prompt's row changes that prompt's logit alone.
            a = with_scores_at_zero(model, images, [head], torch.tensor([1, 1]))[:, 1]
            b = with_scores_at_zero(model, images, [head], torch.tensor([3, 3]))[:, 3]
            torch.testing.assert_close(contrast.drops[:, head], contrast.lead - (a - b))
    assert contrast.order.tolist() == contrast.drops.mean(0).argsort(descending=True).tolist()
    torch.testing.assert_close(contrast.maps_a, class_attention_maps(model, images, 1))
    torch.testing.assert_close(contrast.maps_b, class_attention_maps(model, images, 3))


def test_bad_requests_are_refused():
    model, images = prompt_cam(), pictures()
    for keep in (0, 5):
        with pytest.raises(UsageError, match=f"keep is {keep}; the last block has 4 heads"):
            rank_heads(model, images, keep=keep)
    with pytest.raises(UsageError, match="give one of them"):
        rank_heads(model, images, keep=2, until="misclassified")
    with pytest.raises(UsageError, match="unknown until"):
        rank_heads(model, images, until="forever")
    with pytest.raises(UsageError, match="no class 7; the model has classes 0 to 4"):
        class_attention_maps(model, images, 7)
    with pytest.raises(UsageError, match="give one class for each image"):
        class_attention_maps(model, images, torch.tensor([1]))
    with pytest.raises(UsageError, match="unknown normalize"):
        class_attention_maps(model, images, 1, "softmax")
    with pytest.raises(UsageError, match="heads 0 to 3"):
        blur_heads(model, images, torch.tensor([4]), torch.tensor([0, 0]))
    with pytest.raises(UsageError, match="marks 3 heads"):
        blur_heads(model, images, torch.zeros(3, dtype=torch.bool), torch.tensor([0, 0]))
    with pytest.raises(UsageError, match="two different classes"):
        traits_between(model, images, 2, 2)
    with pytest.raises(UsageError, match="no class prompts"):
        rank_heads(classifier(), images)
