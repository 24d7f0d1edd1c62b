"""Adapter files: small, whole or not there, and only for the encoder they name."""

from __future__ import annotations

import time

import pytest
import timm
import torch
from safetensors.torch import load_file

import patchloom as pl
from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.models.adapters import (
    activate,
    active,
    add_adapters,
    encoder_hash,
    insert,
    insertions,
    remove,
    save_adapter,
)
from patchloom.models.bundle import find_bundle, load, save_bundle
from patchloom.models.merge import merge_to_bundle
from patchloom.models.start import start_encoder
from patchloom.systems.adaptformer.model import AdaptFormer
from patchloom.systems.bitfit.model import BitFit
from patchloom.systems.lora.model import LoRA
from patchloom.systems.vpt.model import VisualPrompts

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def encoder_of(width=32, depth=2, seed=0):
    torch.manual_seed(seed)
    size = {"image_size": 16, "patch_size": 4, "embed_dim": width, "depth": depth, "num_heads": 4}
    return create_encoder("vit_tiny_patch16_224", **size).eval()


def shaken(insertion):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in insertion.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return insertion


@pytest.fixture
def three(tmp_path):
    """A bundle, three adapters of different kinds beside it, and the logits each gave."""
    pytest.importorskip("peft")
    base = save_bundle(encoder_of(), tmp_path / "base")
    logits = {}
    for name, kind in {"narrow": AdaptFormer, "low": LoRA, "prompts": VisualPrompts}.items():
        encoder = load(base)
        base_hash = encoder_hash(encoder)
        insertion = kind(encoder, num_classes=len(name))
        insert(encoder, insertion)
        shaken(insertion)
        logits[name] = encoder(IMAGES).detach()
        assert encoder_hash(encoder) == base_hash
        save_adapter(encoder, tmp_path / name / "model", encoder_path=str(base), class_names=list(name))
    return tmp_path, logits


def test_three_adapters_on_one_bundle_are_switched_and_removed(three):
    path, logits = three
    model = pl.load(str(path / "base"), adapters=[path / name for name in logits])
    before = encoder_hash(model)
    assert active(model) == "narrow"
    for name in ("low", "prompts", "narrow", "low"):
        activate(model, name)
        assert torch.equal(model(IMAGES), logits[name])
    assert insertions(model)["low"].class_names == list("low")
    remove(model)
    assert encoder_hash(model) == before == encoder_hash(load(path / "base"))
    bare = load_file(path / "base" / "model.safetensors")
    assert all(torch.equal(value, bare[name]) for name, value in model.state_dict().items())


def test_a_run_with_an_adapter_opens_by_itself_and_may_move(three):
    path, logits = three
    model = pl.load(str(path / "low"))
    assert torch.equal(model(IMAGES), logits["low"])
    assert model.pretrained_cfg["label_names"] == list("low")
    moved = path.rename(path.parent / "elsewhere")
    assert torch.equal(pl.load(str(moved / "prompts"))(IMAGES), logits["prompts"])
    (moved / "base").rename(moved / "gone")
    with pytest.raises(UsageError, match="no longer at"):
        pl.load(str(moved / "prompts"))
    assert torch.equal(load(moved / "gone", adapters={"x": moved / "prompts"})(IMAGES), logits["prompts"])


def test_the_file_is_small(three):
    path, _ = three
    for name in ("narrow", "low", "prompts"):
        file = path / name / "model" / "adapter.safetensors"
        assert not any(key.startswith(("blocks", "patch_embed")) or "base_layer" in key for key in load_file(file))
        assert file.stat().st_size < 0.6 * (path / "base" / "model.safetensors").stat().st_size


def test_another_encoder_is_refused_by_its_hash(three):
    path, _ = three
    other = encoder_of(seed=7)
    with pytest.raises(UsageError, match=rf"made for the encoder {encoder_hash(load(path / 'base'))}.*other weights"):
        add_adapters(other, [path / "low"])
    with pytest.raises(UsageError, match="encoders of width 32, and this one has 48"):
        add_adapters(encoder_of(width=48), [path / "low"])
    with pytest.raises(UsageError, match="encoders of depth 2, and this one has 3"):
        add_adapters(encoder_of(depth=3), [path / "low"])


def test_the_same_adapter_twice_is_refused(three):
    path, _ = three
    with pytest.raises(UsageError, match="two adapters are called 'low'"):
        load(path / "base", adapters=[path / "low", path / "low" / "model"])
    model = load(path / "base", adapters=[path / "low"])
    with pytest.raises(UsageError, match="'low' on this encoder already"):
        add_adapters(model, [path / "low"])


def test_what_is_no_adapter_is_named(three):
    path, _ = three
    with pytest.raises(UsageError, match="no adapter at"):
        load(path / "base", adapters=[path / "base"])
    with pytest.raises(UsageError, match="is no adapter of Patchloom"):
        load(path / "base", adapters=[path / "base" / "model.safetensors"])
    broken = path / "broken.safetensors"
    broken.write_bytes(b"not tensors")
    with pytest.raises(UsageError, match="is damaged"):
        load(path / "base", adapters=[broken])
    with pytest.raises(UsageError, match="give the encoder it extends, or merge"):
        start_encoder(str(path / "low"))
    with pytest.raises(UsageError, match="holds an adapter and no bundle"):
        find_bundle(path / "low")


def test_files_are_not_replaced_unasked(three):
    path, _ = three
    model = load(path / "base", adapters=[path / "low"])
    with pytest.raises(UsageError, match="exists; choose another"):
        save_adapter(model, path / "low" / "model")
    save_adapter(model, path / "low" / "model", overwrite=True)
    with pytest.raises(UsageError, match="unknown adapter"):
        save_adapter(model, path / "new", name="lo")


def test_an_adapter_for_larger_images_brings_its_size(tmp_path):
    base = save_bundle(encoder_of(), tmp_path / "base")
    from patchloom.encoders import image_size, set_image_size

    encoder = load(base)
    own = encoder_hash(encoder)
    set_image_size(encoder, 24)
    insert(encoder, shaken(BitFit(encoder, num_classes=3)))
    images = torch.randn(1, 3, 24, 24)
    logits = encoder(images)
    save_adapter(encoder, tmp_path / "large.safetensors", base=own, encoder_path=str(base))
    again = load(base, adapters=[tmp_path / "large.safetensors"])
    assert image_size(again) == (24, 24)
    assert torch.equal(again(images), logits)
    insert(small := load(base), shaken(BitFit(small, num_classes=3)))
    save_adapter(small, tmp_path / "small.safetensors", encoder_path=str(base))
    with pytest.raises(UsageError, match="load it on an encoder of its own"):
        add_adapters(again, [tmp_path / "small.safetensors"])


def test_a_merged_adapter_is_a_bundle_that_timm_opens(three):
    path, logits = three
    merge_to_bundle(str(path / "low"), str(path / "merged"))
    model = timm.create_model(f"local-dir:{path / 'merged'}", pretrained=True).eval()
    torch.testing.assert_close(model(IMAGES), logits["low"], atol=1e-5, rtol=1e-5)
    with pytest.raises(UsageError, match="AdaptFormer cannot be merged"):
        merge_to_bundle(str(path / "narrow"), str(path / "other"))
    with pytest.raises(UsageError, match="exists; choose another out"):
        merge_to_bundle(str(path / "low"), str(path / "merged"))


def test_switching_takes_milliseconds():
    with torch.device("meta"):
        encoder = create_encoder("vit_base_patch16_224")
        for name in ("a", "b"):
            insert(encoder, AdaptFormer(encoder, num_classes=10), name, activate_it=False)
        insert(encoder, VisualPrompts(encoder, 10, num_classes=10), "c", activate_it=False)
    fastest = {}
    for name in ("a", "b", "c", None) * 3:
        start = time.perf_counter()
        activate(encoder, name)
        fastest[name] = min(fastest.get(name, 1.0), time.perf_counter() - start)
    assert max(fastest.values()) < 0.05
