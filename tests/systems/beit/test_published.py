"""Published layouts of BEiT, BEiT v2 and VQ-KD against formulas of their own in float64, all parameters drawn."""

from __future__ import annotations

import pytest
import torch

import patchloom as pl
from beit_formulas import beit_layout, beit_logits, vq_kd, vq_kd_layout
from patchloom.errors import UsageError


def drawn(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("system", "condenser", "early"), [("beit", 0, 1), ("beitv2", 2, 2), ("beitv2", 1, 3)])
def test_both_branches_equal_the_formula(system, condenser, early):
    state = beit_layout(condenser=condenser)
    model = pl.load_reference(system, {"model": state}, early_layers=early)
    images, masked = 2 * drawn(2, 3, 16, 16) - 1, drawn(2, 16) < 0.4
    output = model(images, masked)
    expected = beit_logits(state, images, masked, early)
    found = [logits for logits in (output.token_logits, output.condenser_logits) if logits is not None]
    assert len(found) == len(expected) == 1 + (condenser > 0)
    for logits, formula in zip(found, expected, strict=True):
        torch.testing.assert_close(logits.double(), formula, atol=1e-5, rtol=1e-5)
    assert output.pixels is None


def test_the_tokenizer_equals_the_formula():
    state = vq_kd_layout()
    images = drawn(4, 3, 12, 12)
    # Codes where some patches are, so that patches differ in their nearest.
    state["quantize.embedding.weight"] = vq_kd(state, images)[1].flatten(0, 1)[::2][:13].float()
    ids, _, features, loss = vq_kd(state, images)
    tokenizer = pl.load_reference("vq_kd", {"model": state}, num_heads=2)
    assert torch.equal(tokenizer.encode(images).flatten(1), ids)
    assert len(ids.unique()) > 8
    made = tokenizer(images)
    assert torch.equal(made.ids, ids)
    torch.testing.assert_close(made.features.double(), features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.loss.double(), loss, atol=1e-5, rtol=1e-5)
    table = state["quantize.embedding.weight"].double()
    torch.testing.assert_close(made.z_q.double(), table[ids], atol=1e-5, rtol=1e-5)


def test_a_tokenizer_is_known_by_its_tensors_and_what_trained_it_is_left_out():
    state = vq_kd_layout()
    extra = {"teacher_model.proj": torch.zeros(3), "scaling_layer.shift": torch.zeros(3), "loss.x": torch.zeros(1)}
    tokenizer = pl.load_reference(
        "beitv2",
        {"state_dict": state | extra},
        encoder_config={"img_size": 12, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 0},
        decoder_config={"img_size": 3, "patch_size": 1, "in_chans": 6, "embed_dim": 16, "depth": 1, "num_heads": 2},
        n_embed=13,
        embed_dim=6,
        decoder_out_dim=9,
        teacher_model_type="clip",
        decay=0.99,
    )
    images = drawn(2, 3, 12, 12)
    torch.testing.assert_close(tokenizer(images).features.double(), vq_kd(state, images)[2], atol=1e-5, rtol=1e-5)
    assert (tokenizer.num_codes, tokenizer.patch_size, tokenizer.decodes) == (13, 4, False)
    with pytest.raises(UsageError, match="no images of tokens"):
        tokenizer.decode(tokenizer.encode(images))


def test_it_opens_again_from_where_it_was_saved(tmp_path):
    tokenizer = pl.load_reference("vqkd", vq_kd_layout(), num_heads=2)
    again = pl.load_tokenizer(tokenizer.save(tmp_path / "model"))
    images = drawn(3, 3, 12, 12)
    assert torch.equal(again.encode(images), tokenizer.encode(images))
    assert again.fingerprint() == tokenizer.fingerprint()


def test_import_makes_a_tokenizer_of_a_file(tmp_path):
    torch.save({"model": vq_kd_layout()}, tmp_path / "vqkd.pth")
    out = pl.import_reference("vq_kd", str(tmp_path / "vqkd.pth"), str(tmp_path / "out"), {"num_heads": 2})
    assert pl.load_tokenizer(out).facts["checkpoint"] == "vqkd.pth"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("quantize.embedding.initted"), "missing: quantize.embedding.initted"),
        (lambda s: s.pop("quantize.embedding.weight"), "missing: quantize.embedding.weight"),
        (lambda s: s.pop("decoder.pos_embed"), "missing: decoder.pos_embed"),
        (lambda s: s.pop("encoder.fc_norm.bias"), "missing: encoder.fc_norm.bias"),
        (lambda s: s.pop("encode_task_layer.2.bias"), "missing: encode_task_layer.2.bias"),
        (lambda s: s.update(surprise=torch.zeros(1)), "unexpected: surprise"),
        (lambda s: s.update({"decoder.surprise": torch.zeros(1)}), "unexpected: decoder.surprise"),
        (
            lambda s: s.update({"encode_task_layer.2.bias": torch.zeros(3)}),
            r"encode_task_layer.2.bias \(3,\) instead of \(6,\)",
        ),
    ],
)
def test_tensors_of_a_tokenizer_that_do_not_fit_are_named(change, message):
    state = vq_kd_layout()
    change(state)
    with pytest.raises(UsageError, match=message):
        pl.load_reference("vq_kd", state, num_heads=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("lm_head.bias"), "missing: lm_head.bias"),
        (lambda s: s.pop("cls_pt_layers.0.attn.q_bias"), "missing: cls_pt_layers.0.attn.q_bias"),
        (lambda s: s.update(surprise=torch.zeros(1)), "unexpected: surprise"),
        (lambda s: s.update({"cls_pt_norm.bias": torch.zeros(24)}), r'cls_pt_norm\.bias.*load_reference\("ccvit"'),
    ],
)
def test_tensors_of_pre_training_that_do_not_fit_are_named(change, message):
    state = beit_layout(condenser=2)
    change(state)
    with pytest.raises(UsageError, match=message):
        pl.load_reference("beitv2", state)


def test_settings_that_contradict_the_tensors_are_refused():
    with pytest.raises(UsageError, match="num_codes=14, but the checkpoint's tensors say 13"):
        pl.load_reference("vq_kd", vq_kd_layout(), num_heads=2, n_embed=14)
    with pytest.raises(UsageError, match="vocab_size=12, but the checkpoint's tensors say 11"):
        pl.load_reference("beit", beit_layout(), vocab_size=12)
