"""The attack through a public encoder: layers, early stop, ensembles, one noise for all; PGD as torchattacks has it."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn import functional as F

from patchloom.encoders import create_encoder, depth, normalize
from patchloom.errors import UsageError
from patchloom.systems.dta.attacks import PGD, FeatureAttack, FeatureL2, FeatureNorm, RandomNoise, universal_noise
from patchloom.systems.dta.features import BlockFeatures, PixelClassifier
from patchloom.systems.dta.losses import average_token_cosine, flat_cosine
from patchloom.systems.dta.model import DownstreamTransferAttack
from patchloom.systems.dta.success import attack_success

EPS, STEP = 8 / 255, 2 / 255


def small(name: str = "vit_tiny_patch16_224", classes: int = 0, seed: int = 0, **changes):
    shape = {"embed_dim": 32, "depth": 3, "num_heads": 4, "patch_size": 8}
    encoder = create_encoder(name, image_size=32, **{**shape, **changes})
    if classes:
        encoder.reset_classifier(classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return encoder.double()


def pictures(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def noise(images: torch.Tensor, seed: int = 1) -> torch.Tensor:
    drawn = torch.rand(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (2 * drawn - 1) * EPS


def plain_features(encoder, images, block):
    """Return the residual stream after a block by a hook on a whole forward pass."""
    seen = []
    hook = encoder.blocks[block].register_forward_hook(lambda module, inputs, output: seen.append(output))
    encoder.eval()(normalize(images, encoder))
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "ccvit_tiny_patch8_64"])
def test_an_attack_is_descent_on_the_mean_cosine_of_tokens(name):
    encoder, images = small(name), pictures()
    expected = (images + noise(images)).clamp(0, 1)
    clean = plain_features(encoder, images, 1).detach()
    for _ in range(3):
        x = expected.clone().requires_grad_()
        average_token_cosine(plain_features(encoder, x, 1), clean).sum().backward()
        expected = (expected - STEP * x.grad.sign()).clamp(images - EPS, images + EPS).clamp(0, 1)
    attack = FeatureAttack(encoder, "tokens", [1], EPS, STEP, 3)
    assert torch.allclose(attack(images, noise(images)), expected, atol=1e-12)


def test_several_layers_count_on_average():
    encoder, images = small(), pictures()
    x = (images + noise(images)).clamp(0, 1)
    loss = FeatureAttack(encoder, layers=[0, -1]).loss(images)(x)
    each = [average_token_cosine(plain_features(encoder, x, b), plain_features(encoder, images, b)) for b in (0, 2)]
    assert torch.allclose(loss, (each[0] + each[1]) / 2, atol=1e-12)


def test_final_features_are_those_after_the_last_norm():
    encoder, images = small().eval(), pictures()
    (found,) = BlockFeatures(encoder)(images, ["final"])
    assert torch.allclose(found, encoder.forward_features(normalize(images, encoder)), atol=1e-12)


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_no_block_after_the_last_that_counts_is_run(layer):
    encoder, images = small(), pictures()
    calls = [0] * depth(encoder)
    for number, block in enumerate(encoder.blocks):
        block.register_forward_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
    FeatureAttack(encoder, layers=[layer], steps=4)(images)
    last = layer % depth(encoder)
    assert calls == [5 if number <= last else 0 for number in range(depth(encoder))]


def test_images_do_not_influence_one_another():
    encoder, images = small(), pictures(4)
    attack, start = FeatureAttack(encoder, layers=[1], eps=EPS, steps=3), noise(images)
    assert torch.allclose(attack(images, start)[2:3], attack(images[2:3], start[2:3]), atol=1e-9)


def test_the_encoder_is_left_as_it_was():
    encoder = small().train()
    encoder.blocks[0].eval()
    encoder.pos_embed.requires_grad_(False)
    FeatureAttack(encoder, steps=1)(pictures())
    assert encoder.training
    assert not encoder.blocks[0].training
    assert encoder.blocks[1].training
    assert encoder.cls_token.requires_grad
    assert not encoder.pos_embed.requires_grad
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_drop_path_and_dropout_do_not_act():
    torch.manual_seed(0)
    encoder, images = small(drop_path_rate=0.5, proj_drop_rate=0.5).train(), pictures()
    attack = FeatureAttack(encoder, steps=2)
    assert torch.equal(attack(images, noise(images)), attack(images, noise(images)))


def test_autocast_around_an_attack_does_not_reach_it():
    encoder, images = small().float(), pictures().float()
    attack, start = FeatureAttack(encoder, steps=2), noise(images).float()
    expected = attack(images, start)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attack(images, start), expected)


def test_a_deterministic_attack_keeps_from_kernels_whose_gradients_differ_from_run_to_run():
    encoder, images, seen = small(), pictures(1), []
    encoder.blocks[0].register_forward_hook(lambda *_: seen.append(torch.backends.cuda.flash_sdp_enabled()))
    usual = torch.backends.cuda.flash_sdp_enabled()
    plain = FeatureAttack(encoder, "tokens", [1], EPS, STEP, 1)(images, noise(images))
    assert set(seen) == {usual}
    seen.clear()
    same = FeatureAttack(encoder, "tokens", [1], EPS, STEP, 1, deterministic=True)(images, noise(images))
    assert set(seen) == {False}
    assert torch.backends.cuda.flash_sdp_enabled() == usual
    torch.testing.assert_close(same, plain)


def test_the_search_attacks_each_layer_from_one_start_and_takes_what_hurts_the_last_most():
    encoder, images = small(), pictures(4)
    attack = DownstreamTransferAttack(encoder, EPS, STEP, search_steps=3, steps=2)
    scores = attack.search(images, noise(images))
    for layer in range(3):
        x = FeatureAttack(encoder, "tokens", [layer], EPS, STEP, 3)(images, noise(images))
        expected = average_token_cosine(plain_features(encoder, x, 2), plain_features(encoder, images, 2))
        assert torch.allclose(scores.scores[:, layer], expected, atol=1e-9)
    assert scores.best == (int(scores.mean.argmin()),)
    assert attack.layers == [scores.best]
    later = attack(images, noise(images))
    assert torch.equal(later, FeatureAttack(encoder, "tokens", scores.best, EPS, STEP, 2)(images, noise(images)))


def test_scores_of_the_layer_itself_and_over_all_blocks():
    encoder, images = small(), pictures(2)
    made = {
        word: DownstreamTransferAttack(encoder, EPS, STEP, search_steps=2, score=word).search(images, noise(images))
        for word in ("own", "mean")
    }
    x = FeatureAttack(encoder, "tokens", [1], EPS, STEP, 2)(images, noise(images))
    each = [average_token_cosine(plain_features(encoder, x, b), plain_features(encoder, images, b)) for b in range(3)]
    assert torch.allclose(made["own"].scores[:, 1], each[1], atol=1e-9)
    assert torch.allclose(made["mean"].scores[:, 1], sum(each) / 3, atol=1e-9)


def test_each_image_may_have_a_layer_of_its_own_and_goes_on_from_the_search():
    encoder, images = small(), pictures(5)
    attack = DownstreamTransferAttack(encoder, EPS, STEP, 3, 2, per="sample", score="own")
    found = attack(images, noise(images))
    choices = attack.scores[0].best_of_each
    assert len(set(choices)) > 1
    for number, (layer,) in enumerate(choices):
        one = slice(number, number + 1)
        expected = FeatureAttack(encoder, "tokens", [layer], EPS, STEP, 5)(images[one], noise(images)[one])
        assert torch.allclose(found[one], expected, atol=1e-9)


def test_the_first_call_searches_and_later_ones_keep_its_layers():
    encoder, images = small(), pictures()
    attack = DownstreamTransferAttack(encoder, EPS, STEP, 2, 1, candidates=[0, 2], top_k=2)
    attack(images)
    chosen, scores = attack.layers, attack.scores
    attack(pictures(seed=5))
    assert attack.layers is chosen
    assert attack.scores is scores
    assert sorted(chosen[0]) == [0, 2]


def test_an_ensemble_takes_the_mean_of_its_encoders():
    first, second, images = small(), small("ccvit_tiny_patch8_64", seed=3), pictures()
    network = timm.create_model("cifar_resnet8", num_classes=0).double().eval()
    x = (images + noise(images)).clamp(0, 1)
    attack = FeatureAttack([first, second, network], layers=[[0], [-1], ["final"]])
    with attack.still():
        found = attack.loss(images)(x)
    maps = [network.forward_features(normalize(y, network)) for y in (x, images)]
    expected = (
        average_token_cosine(plain_features(first, x, 0), plain_features(first, images, 0))
        + average_token_cosine(plain_features(second, x, 2), plain_features(second, images, 2))
        + flat_cosine(*maps)
    ) / 3
    assert torch.allclose(found, expected, atol=1e-9)
    searched = DownstreamTransferAttack([first, network], EPS, STEP, 1, 1)
    searched(images)
    assert searched.layers[1] == ("final",)
    assert len(searched.scores) == 2


def test_more_starts_are_never_worse():
    encoder, images = small(), pictures(6)
    once = FeatureAttack(encoder, eps=EPS, steps=2, generator=torch.Generator().manual_seed(0))
    often = FeatureAttack(encoder, eps=EPS, steps=2, restarts=4, generator=torch.Generator().manual_seed(0))
    with once.still(), torch.no_grad():
        loss = once.loss(images)
        first, best = loss(once(images)), loss(often(images))
    assert (best <= first).all()
    assert (best < first).any()


def test_one_noise_for_all_images_lowers_the_cosine_of_others_too():
    encoder, others = small(), pictures(8, seed=9)
    attack = FeatureAttack(encoder, layers=[-1], eps=EPS, step_size=STEP, generator=torch.Generator().manual_seed(0))
    made = universal_noise(attack, [pictures(4, seed) for seed in range(3)], passes=4)
    assert made.shape == (1, 3, 32, 32)
    assert made.abs().max() <= EPS
    with attack.still(), torch.no_grad():
        loss = attack.loss(others)
        drawn = noise(others[:1])
        assert loss((others + made).clamp(0, 1)).mean() < loss((others + drawn).clamp(0, 1)).mean()


def test_baselines_are_the_attack_with_other_aims():
    encoder, images = small(), pictures()
    start = noise(images)
    l2 = FeatureL2(encoder, eps=EPS, step_size=STEP, steps=2)
    norm = FeatureNorm(encoder, eps=EPS, step_size=STEP, steps=2)
    assert torch.equal(l2(images, start), FeatureAttack(encoder, "l2", [2], EPS, STEP, 2)(images, start))
    assert torch.equal(norm(images, start), FeatureAttack(encoder, "norm", [0], EPS, STEP, 2)(images, start))
    with l2.still(), torch.no_grad():
        noisy = (images + start).clamp(0, 1)
        for attack in (l2, norm):
            assert (attack.loss(images)(attack(images, start)) < attack.loss(images)(noisy)).all()
    assert torch.equal(RandomNoise(EPS)(images, start), (images + start).clamp(0, 1))


def test_tanh_goes_on_from_where_the_search_was():
    encoder, images = small(), pictures(2)
    attack = FeatureAttack(encoder, optimizer="adam_tanh", eps=EPS, steps=2)
    reached = attack(images)
    again = (images + EPS * attack.again_from(reached, images).tanh()).clamp(0, 1)
    assert torch.allclose(again, reached, atol=1e-9)


def test_a_classifier_is_resized_and_normalised_for_inside():
    model, images = small(classes=4).eval(), pictures()
    assert torch.equal(PixelClassifier(model)(images), model(normalize(images, model)))
    larger = F.interpolate(images, size=(48, 40))
    fitted = F.interpolate(larger, size=(32, 32), mode="bilinear", align_corners=False, antialias=True)
    assert torch.allclose(PixelClassifier(model)(larger), model(normalize(fitted, model)))


def test_pgd_leads_away_from_the_labels_or_from_what_was_said():
    model, images = PixelClassifier(small(classes=4)), pictures(6)
    said = model(images).argmax(1)
    attack = PGD(model, EPS, STEP, 5)
    assert torch.equal(attack(images, init=noise(images)), attack(images, said, noise(images)))
    before = F.cross_entropy(model(images), said, reduction="none")
    assert (F.cross_entropy(model(attack(images, said)), said, reduction="none") > before).all()


@pytest.mark.parametrize(
    ("name", "settings"), [("PGD", {}), ("MIFGSM", {"momentum": 1.0}), ("TIFGSM", {"smoothing": True})]
)
def test_steps_equal_those_of_torchattacks(name, settings):
    torchattacks = pytest.importorskip("torchattacks")
    model, images = PixelClassifier(small(classes=4).float()).eval(), pictures(4).float()
    labels = torch.tensor([0, 1, 2, 3])
    theirs = {"eps": EPS, "alpha": STEP, "steps": 5}
    more = {"PGD": {"random_start": True}, "MIFGSM": {"decay": 1.0}, "TIFGSM": {"diversity_prob": 0.0}}
    attack = getattr(torchattacks, name)(model, **theirs, **more[name])
    init = torch.zeros_like(images)
    if name == "PGD":
        torch.manual_seed(4)
        init = torch.empty_like(images).uniform_(-EPS, EPS)
        torch.manual_seed(4)
    ours = PGD(model, EPS, STEP, 5, **settings)
    assert torch.allclose(ours(images, labels, init), attack(images, labels), atol=1e-6)


def test_what_counts_as_success():
    labels = torch.tensor([0, 0, 1, 1, 2])
    clean = F.one_hot(torch.tensor([0, 0, 1, 2, 2]), 3).float()
    attacked = F.one_hot(torch.tensor([1, 0, 0, 1, 0]), 3).float()
    found = attack_success(clean, attacked, labels)
    assert found == pytest.approx({"asr": 75.0, "error": 60.0, "flip": 80.0, "robust": 40.0, "clean": 80.0})
    nothing_right = attack_success(clean, attacked, torch.tensor([2, 2, 2, 0, 1]))
    assert nothing_right["asr"] != nothing_right["asr"]
    with pytest.raises(UsageError, match="do not belong"):
        attack_success(clean, attacked[:2], labels)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda e: FeatureAttack(e)(torch.randn(1, 3, 32, 32)), "before they are normalised"),
        (lambda e: FeatureAttack(e, eps=0), "eps is 0"),
        (lambda e: FeatureAttack(e, steps=0), "steps is 0"),
        (lambda e: DownstreamTransferAttack(e, search_steps=0), "steps is 0"),
        (lambda e: FeatureAttack(e, layers=[3]), "there is no block 3; the encoder has blocks 0 to 2"),
        (lambda e: DownstreamTransferAttack(e, candidates=[-4]), "there is no block -4"),
        (lambda e: DownstreamTransferAttack(e, candidates="some"), "candidates is 'some'"),
        (lambda e: DownstreamTransferAttack(e, top_k=4), "top_k is 4"),
        (lambda e: DownstreamTransferAttack(e, score="first"), "unknown score 'first'"),
        (lambda e: DownstreamTransferAttack(e).chosen(), "call search first"),
        (lambda e: FeatureAttack(e, "cosine"), "unknown objective 'cosine'"),
        (lambda e: FeatureAttack(e, layers=[]), "layers is empty"),
        (lambda e: FeatureAttack([e, e], layers=[[0]]), "1 lists of layers do not belong to 2 encoders"),
        (lambda e: FeatureAttack(e, restarts=0), "restarts is 0"),
        (lambda e: FeatureAttack(e, optimizer="adam_tanh", momentum=1.0), "belong to optimizer=sign"),
        (lambda e: FeatureAttack(e)(torch.rand(1, 1, 32, 32)), "1 channels and the model takes 3"),
        (lambda e: FeatureAttack([]), "at least one encoder"),
        (lambda e: FeatureAttack(torch.nn.Linear(2, 2)), "normalised by"),
        (lambda e: universal_noise(FeatureAttack(e), []), "needs images"),
        (lambda e: RandomNoise(0), "eps is 0"),
        (lambda e: PGD(e, restarts=0), "restarts is 0"),
    ],
)
def test_bad_requests_are_told_in_one_sentence(call, said):
    with pytest.raises(UsageError, match=said):
        call(small().float())
