"""Encoders for frames of 84 pixels, which patches of 8 do not fill."""

from __future__ import annotations

import timm
import torch
from torch import nn

import patchloom as pl
from patchloom.encoders import class_attention, create_encoder, grid_size, image_size, normalize
from patchloom.models.bundle import load, save_bundle
from patchloom.models.start import start_encoder


def test_the_last_rows_and_columns_are_left_out_as_a_plain_convolution_does():
    encoder = create_encoder("vit_tiny_patch8_84", depth=1).eval()
    images = torch.rand(2, 3, 84, 84)
    plain = nn.functional.conv2d(images, encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias, stride=8)
    torch.testing.assert_close(encoder.patch_embed(images), plain.flatten(2).transpose(1, 2))
    assert (image_size(encoder), grid_size(encoder), grid_size(encoder, (84, 84))) == ((84, 84), (10, 10), (10, 10))
    assert class_attention(encoder, images).shape == (2, 3, 100)
    torch.testing.assert_close(normalize(images, encoder), images)


def test_a_bundle_gives_it_back_with_and_without_this_package_s_names(tmp_path):
    encoder = create_encoder("vit_tiny_patch8_84", in_chans=4, depth=2, embed_dim=48, num_heads=4).eval()
    save_bundle(encoder, tmp_path / "frames")
    images = torch.rand(2, 4, 84, 84)
    expected = encoder(images)
    torch.testing.assert_close(load(tmp_path / "frames")(images), expected)
    again = start_encoder(str(tmp_path / "frames"), in_chans=4).eval()
    torch.testing.assert_close(again(images), expected)
    save_bundle(again, tmp_path / "again")
    plain = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()
    assert type(plain).__name__ == "VisionTransformer"
    torch.testing.assert_close(plain(images), expected)
    assert pl.load(tmp_path / "again").patchloom_args["architecture"] == "vit_tiny_patch8_84"
