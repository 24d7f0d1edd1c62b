"""What masked pre-training leaves beside the encoder: written, read, missing, of another encoder."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import patchloom as pl
from patchloom.encoders import create_encoder, depth, embed, run_blocks
from patchloom.encoders.mask_token import MaskTokenEncoder
from patchloom.encoders.masked_autoencoder import MaskedAutoencoder, initialize_as_mae
from patchloom.errors import UsageError
from patchloom.models.bundle import save_bundle
from patchloom.models.parts import PARTS, load_masked_model, save_parts
from patchloom.systems.published import import_reference

SMALL = {
    "data": "digits",
    "batch_size": 8,
    "max_steps": 1,
    "num_workers": 0,
    "probe_every": 0,
    "report": False,
    "precision": "32-true",
    "accelerator": "cpu",
}
MAE = {"encoder": "test_vit", "image_size": 64, "decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 4}
CCVIT = {"encoder": "test_vit", "image_size": 64, "k": 16, "codebook_iters": 1}


def autoencoder(fill: float | None = None) -> MaskedAutoencoder:
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    initialize_as_mae(encoder)
    model = MaskedAutoencoder(encoder, decoder_dim=24, decoder_depth=3, decoder_heads=2, mask_ratio=0.5)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2) if fill is None else parameter.data.fill_(fill)
    return model.eval()


def saved(model: MaskedAutoencoder, folder) -> None:
    save_bundle(model.encoder, folder)
    save_parts(model, folder)


def test_what_is_written_gives_the_same_predictions_when_read(tmp_path):
    model = autoencoder()
    saved(model, tmp_path / "model")
    again = load_masked_model(tmp_path / "model")
    assert isinstance(again, MaskedAutoencoder)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    for ours, theirs in zip(again(images, noise=noise), model(images, noise=noise), strict=True):
        assert torch.equal(ours, theirs)
    assert again.mask_ratio == 0.5
    assert not any(name.startswith("encoder") for name in load_file(tmp_path / "model" / PARTS))


def test_a_run_of_mae_keeps_its_decoder_and_older_runs_have_it_in_the_checkpoint(tmp_path):
    run = pl.pretrain("mae", **SMALL, **MAE, out=str(tmp_path / "run"))
    new = load_masked_model(run.path)
    assert isinstance(new, MaskedAutoencoder)
    assert (new.hidden_dim, new.hidden_blocks) == (32, 2)
    (run.model / PARTS).unlink()
    old = load_masked_model(run.path)
    torch.testing.assert_close(dict(old.state_dict()), dict(new.state_dict()), rtol=0, atol=0)
    moved = tmp_path / "elsewhere"  # the bundle alone: nothing to take the decoder from
    shutil.copytree(run.model, moved)
    with pytest.raises(UsageError, match="decoder_embed, decoder_blocks and mask_token are missing"):
        load_masked_model(moved)


def test_a_run_of_ccvit_keeps_its_mask_token(tmp_path):
    run = pl.pretrain("ccvit", **SMALL, **CCVIT, out=str(tmp_path / "run"))
    model = load_masked_model(run.path)
    assert isinstance(model, MaskTokenEncoder)
    assert bool(model.mask_token.any())
    (run.model / PARTS).unlink()
    assert torch.equal(load_masked_model(run.path).mask_token, model.mask_token)
    images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    hidden, mask = model.hidden(images, 0.75, noise, num_blocks=2)
    shown = noise.argsort(1)[:, :4]
    assert not mask.gather(1, shown).any()
    assert mask.sum() == 24
    embedded = embed(model.encoder, images, masked=mask.bool(), mask_token=model.mask_token)
    torch.testing.assert_close(hidden, run_blocks(model.encoder, embedded, stop=2)[0])
    assert model.hidden_blocks == depth(model.encoder)
    changed = images.clone()
    patch = int(noise[0].argsort()[-1])  # hidden: its pixels play no part
    changed[0, :, patch // 4 * 16 : patch // 4 * 16 + 16, patch % 4 * 16 : patch % 4 * 16 + 16] = 9.0
    torch.testing.assert_close(model.hidden(changed, 0.75, noise, num_blocks=2)[0], hidden)


def test_an_imported_checkpoint_brings_its_decoder(tmp_path):
    model = autoencoder()
    published = {n.removeprefix("encoder."): v for n, v in model.state_dict().items()}
    torch.save({"model": published}, tmp_path / "mae.pth")
    settings = {"num_heads": 2, "decoder_num_heads": 2}
    import_reference("mae", str(tmp_path / "mae.pth"), out=str(tmp_path / "teacher"), settings=settings)
    again = load_masked_model(tmp_path / "teacher")
    images, noise = torch.randn(1, 3, 32, 32), torch.rand(1, 16)
    torch.testing.assert_close(again.hidden(images, 0.5, noise)[0], model.hidden(images, 0.5, noise)[0])


def test_what_is_missing_or_does_not_belong_is_said(tmp_path):
    with pytest.raises(UsageError, match=r"vit_base_patch16_224\.mae as timm ships it has no decoder"):
        load_masked_model("vit_base_patch16_224.mae")
    torch.save({}, tmp_path / "mae.pth")
    with pytest.raises(UsageError, match=r"mae\.pth is a file and not a run or bundle.*patchloom import mae"):
        load_masked_model(tmp_path / "mae.pth")
    with pytest.raises(UsageError, match="there is no bundle at"):
        load_masked_model(tmp_path / "nowhere")
    saved(autoencoder(), tmp_path / "one")
    file = tmp_path / "one" / PARTS
    kept = file.read_bytes()
    save_bundle(autoencoder(0.5).encoder, tmp_path / "other")
    shutil.copy(file, tmp_path / "other" / PARTS)
    with pytest.raises(UsageError, match="was trained with another encoder"):
        load_masked_model(tmp_path / "other")
    for part, message in (("mask_token", "it lacks mask_token"), ("decoder_blocks.1.mlp.fc1.bias", "does not fit")):
        file.write_bytes(kept)
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            about = opened.metadata()
        state = {name: value for name, value in load_file(file).items() if name != part}
        save_file(state, file, metadata=about)
        with pytest.raises(UsageError, match=message):
            load_masked_model(tmp_path / "one")
    file.write_bytes(kept[:100])
    with pytest.raises(UsageError, match="is damaged"):
        load_masked_model(tmp_path / "one")
