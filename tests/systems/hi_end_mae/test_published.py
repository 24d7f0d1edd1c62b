"""Published checkpoints of Hi-End-MAE against its formulas in float64, and UNETR's against MONAI's own modules."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import patchloom as pl
from patchloom.encoders import feature_map
from patchloom.errors import UsageError
from patchloom.segment.saved import load_segmenter
from patchloom.segment.unetr import UNETR, as_unetr_encoder
from patchloom.systems.hi_end_mae.model import hi_end_mae
from patchloom.systems.hi_end_mae.published import convert_hi_end_mae_checkpoint
from patchloom.systems.published import import_reference

SIZE, PATCH, CHANS = (6, 8, 10), (3, 4, 5), 2
WIDTH, DEPTH, HEADS, DECODER, DECODER_HEADS = 24, 11, 4, 12, 2
GRID = (2, 2, 2)
N, ELEMENTS = 8, math.prod(PATCH) * CHANS


def randomised(shapes, seed=0):
    """Return every tensor drawn; norms near 1, so that values stay of one size."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3
        + (".norm" in name and "weight" in name)
        for name, shape in shapes.items()
    }


def block(prefix, width, names=("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")):
    qkv, proj, fc1, fc2 = names
    layers = {qkv: (3 * width, width), proj: (width, width), fc1: (4 * width, width), fc2: (width, 4 * width)}
    shapes = {f"{prefix}{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{prefix}{name}.bias": shape[:1] for name, shape in layers.items()}
    return shapes | {f"{prefix}{norm}.{part}": (width,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}


def pretraining_shapes():
    shapes = {
        "encoder_pos_embed": (1, N, WIDTH),
        "decoder_pos_embed": (1, N, DECODER),
        "mask_token": (1, 1, DECODER),
        "encoder.cls_token": (1, 1, WIDTH),
        "encoder.patch_embed.proj.weight": (WIDTH, CHANS, *PATCH),
        "encoder.patch_embed.proj.bias": (WIDTH,),
        "decoder.head.weight": (ELEMENTS, DECODER),
        "decoder.head.bias": (ELEMENTS,),
    }
    for number in range(DEPTH):
        shapes |= block(f"encoder.blocks.{number}.", WIDTH)
    for number in range(2):
        shapes |= block(f"decoder.blocks.{number}.", DECODER)
    for number in range(3):
        prefix = f"decoder.cross_attention_blocks.{number}."
        shapes |= block(prefix, DECODER, ("self_attn.qkv", "self_attn.proj", "mlp.fc1", "mlp.fc2"))
        shapes |= {f"{prefix}norm0.{part}": (DECODER,) for part in ("weight", "bias")}
        for name, rows in (("q", 1), ("kv", 2), ("proj", 1)):
            shapes[f"{prefix}cross_attn.{name}.weight"] = (rows * DECODER, DECODER)
            shapes[f"{prefix}cross_attn.{name}.bias"] = (rows * DECODER,)
    for number in range(4):
        shapes |= {
            f"encoder_to_decoder.{number}.weight": (DECODER, WIDTH),
            f"encoder_to_decoder.{number}.bias": (DECODER,),
        }
    for part in ("encoder", "decoder"):
        width = WIDTH if part == "encoder" else DECODER
        shapes |= {f"{part}.norm.weight": (width,), f"{part}.norm.bias": (width,)}
    return shapes


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state, name, x, eps=1e-6):
    variance, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    return (x - mean) / (variance + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def attended(queries, keys, values, heads):
    split = [x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (queries, keys, values)]
    weights = (split[0] @ split[1].transpose(2, 3) / math.sqrt(split[0].shape[-1])).softmax(-1)
    return (weights @ split[2]).transpose(1, 2).flatten(2)


def self_attention(state, name, x, heads, proj="proj"):
    return linear(state, f"{name}.{proj}", attended(*linear(state, f"{name}.qkv", x).chunk(3, -1), heads))


def mlp(state, prefix, x, first="fc1", second="fc2"):
    inner = linear(state, f"{prefix}mlp.{first}", x)
    return linear(state, f"{prefix}mlp.{second}", inner * (1 + torch.erf(inner / math.sqrt(2))) / 2)


def plain_block(state, prefix, x, heads):
    x = x + self_attention(state, f"{prefix}attn", norm(state, f"{prefix}norm1", x), heads)
    return x + mlp(state, prefix, norm(state, f"{prefix}norm2", x))


def patches_of(volumes, patch=PATCH):
    """Return patches in the order (h, w, d), each with its channel last."""
    rows, grid = [], [side // cut for side, cut in zip(volumes.shape[2:], patch, strict=True)]
    for h in range(grid[0]):
        for w in range(grid[1]):
            for d in range(grid[2]):
                cut = [slice(n * p, (n + 1) * p) for n, p in zip((h, w, d), patch, strict=True)]
                rows.append(volumes[(slice(None), slice(None), *cut)].permute(0, 2, 3, 4, 1).flatten(1))
    return torch.stack(rows, 1)


def formula(state, volumes, order, visible):
    """Return loss and predictions, as the paper and its code have them, in float64."""
    patches = patches_of(volumes)
    kernel = state["encoder.patch_embed.proj.weight"].permute(0, 2, 3, 4, 1).flatten(1)
    embedded = patches @ kernel.T + state["encoder.patch_embed.proj.bias"] + state["encoder_pos_embed"]
    batch = torch.arange(len(volumes))[:, None]
    x = torch.cat([state["encoder.cls_token"].expand(len(volumes), -1, -1), embedded[batch, order[:, :visible]]], 1)
    hidden = []
    for number in range(DEPTH):
        x = plain_block(state, f"encoder.blocks.{number}.", x, HEADS)
        hidden.append(x)
    memories = [linear(state, f"encoder_to_decoder.{i}", hidden[layer]) for i, layer in enumerate((3, 6, 9))]
    x = linear(state, "encoder_to_decoder.3", norm(state, "encoder.norm", x))
    masked = state["mask_token"].expand(len(volumes), N - visible, -1)
    x = torch.cat([x, masked], 1)
    x = torch.cat([x[:, :1], x[:, 1:] + state["decoder_pos_embed"][0][order]], 1)
    for number in range(2):
        x = plain_block(state, f"decoder.blocks.{number}.", x, DECODER_HEADS)
    for number, memory in enumerate(memories[::-1]):
        prefix = f"decoder.cross_attention_blocks.{number}."
        x = x + self_attention(state, f"{prefix}self_attn", norm(state, f"{prefix}norm0", x), DECODER_HEADS)
        queries = linear(state, f"{prefix}cross_attn.q", norm(state, f"{prefix}norm1", x))
        keys, values = linear(state, f"{prefix}cross_attn.kv", memory).chunk(2, -1)
        x = x + linear(state, f"{prefix}cross_attn.proj", attended(queries, keys, values, DECODER_HEADS))
        x = x + mlp(state, prefix, norm(state, f"{prefix}norm2", x))
    pred = linear(state, "decoder.head", norm(state, "decoder.norm", x))[:, 1:]
    targets = patches[batch, order[:, visible:]]
    variance, mean = torch.var_mean(targets, -1, keepdim=True, correction=0)
    return (pred[:, visible:] - (targets - mean) / (variance + 1e-6).sqrt()).square().mean(), pred


def settings():
    return {"num_heads": HEADS, "decoder_num_heads": DECODER_HEADS, "img_size": SIZE}


def in_float32(state, prefix=""):
    return {f"{prefix}{name}": value.float() for name, value in state.items()}


@pytest.mark.parametrize("mask_ratio", [0.75, 0.5])
def test_pretraining_checkpoints_compute_as_published(mask_ratio):
    state = randomised(pretraining_shapes())
    model = pl.load_reference(
        "hi_end_mae", {"state_dict": in_float32(state, "module."), "epoch": 3}, mask_ratio=mask_ratio, **settings()
    )
    volumes = torch.rand(2, CHANS, *SIZE, dtype=torch.float64)
    order = torch.stack([torch.randperm(N) for _ in range(2)])
    loss, pred = formula(state, volumes, order, int(N * (1 - mask_ratio)))
    with torch.no_grad():
        output = model(volumes.float(), order)
    assert output.n_visible == int(N * (1 - mask_ratio))
    torch.testing.assert_close(output.pred.double(), pred, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss.double(), loss, atol=1e-5, rtol=1e-5)


def test_what_shapes_do_not_tell_is_asked_for_and_the_rest_has_to_agree():
    state = in_float32(randomised(pretraining_shapes()))
    with pytest.raises(UsageError, match="do not tell how many heads a width of 24 has; give num_heads"):
        pl.load_reference("hi_end_mae", state, img_size=SIZE)
    with pytest.raises(UsageError, match="embed_dim=48, but the checkpoint's tensors say 24"):
        pl.load_reference("hi_end_mae", state, embed_dim=48, **settings())
    longer = {**state, "encoder_pos_embed": torch.zeros(1, 10, WIDTH)}
    with pytest.raises(UsageError, match=r"10 positions are of no cube; give image_size=\(H, W, D\)"):
        pl.load_reference("hi_end_mae", longer, num_heads=HEADS, decoder_num_heads=DECODER_HEADS)
    del state["decoder.cross_attention_blocks.1.cross_attn.kv.bias"]
    with pytest.raises(UsageError, match=r"missing: decoder\.cross_attention_blocks\.1\.cross_attn\.kv\.bias"):
        pl.load_reference("hi_end_mae", state, **settings())


def vit_shapes(patch, chans, width, depth=12, tokens=N):
    place = "vit.patch_embedding."
    shapes = {
        f"{place}patch_embeddings.1.weight": (width, math.prod(patch) * chans),
        f"{place}patch_embeddings.1.bias": (width,),
        f"{place}position_embeddings": (1, tokens, width),
        "vit.norm.weight": (width,),
        "vit.norm.bias": (width,),
    }
    for number in range(depth):
        names = ("attn.qkv", "attn.out_proj", "mlp.linear1", "mlp.linear2")
        shapes |= block(f"vit.blocks.{number}.", width, names)
    return shapes


def vit_formula(state, volumes, patch, heads):
    """Return the maps of blocks 3, 6 and 9 and of the end of the segmentation network's encoder."""
    place = "vit.patch_embedding."
    x = linear(state, f"{place}patch_embeddings.1", patches_of(volumes, patch)) + state[f"{place}position_embeddings"]
    found = []
    for number in range(12):
        prefix = f"vit.blocks.{number}."
        x = x + self_attention(state, f"{prefix}attn", norm(state, f"{prefix}norm1", x, 1e-5), heads, "out_proj")
        x = x + mlp(state, prefix, norm(state, f"{prefix}norm2", x, 1e-5), "linear1", "linear2")
        found += [x] if number in (3, 6, 9) else []
    grid = [side // cut for side, cut in zip(volumes.shape[2:], patch, strict=True)]
    return [z.transpose(1, 2).unflatten(2, grid) for z in (*found, norm(state, "vit.norm", x, 1e-5))]


def decoder_of_monai(chans, classes, features, width, stock=False):
    """Return the decoder of the published network of MONAI's modules, under the published names."""
    from monai.networks.blocks.dynunet_block import UnetOutBlock, UnetResBlock
    from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock

    common = {"spatial_dims": 3, "kernel_size": 3, "norm_name": "instance", "res_block": True}
    net = torch.nn.Module()
    net.encoder1 = UnetrBasicBlock(in_channels=chans, out_channels=features, stride=1, **common)
    for number, steps in ((2, 2), (3, 1), (4, 0)):
        made = UnetrPrUpBlock(
            in_channels=width,
            out_channels=features * 2 ** (number - 1),
            num_layer=steps,
            stride=1,
            upsample_kernel_size=2,
            conv_block=True,
            **common,
        )
        setattr(net, f"encoder{number}", made)
    for number, (inner, out) in {
        5: (width, 8),
        4: (8 * features, 4),
        3: (4 * features, 2),
        2: (2 * features, 1),
    }.items():
        made = UnetrUpBlock(in_channels=inner, out_channels=out * features, upsample_kernel_size=2, **common)
        if number == 2 and not stock:
            made = torch.nn.Module()
            made.conv3d = torch.nn.Conv3d(inner, features, 3, padding=1)
            made.conv_block = UnetResBlock(3, 2 * features, features, 3, 1, "instance")
        setattr(net, f"decoder{number}", made)
    net.out = UnetOutBlock(3, features, classes)

    def forward(x, maps):
        y = net.decoder5(maps[3], net.encoder4(maps[2]))
        y = net.decoder3(net.decoder4(y, net.encoder3(maps[1])), net.encoder2(maps[0]))
        if stock:
            return net.out(net.decoder2(y, net.encoder1(x)))
        lifted = net.decoder2.conv3d(F.interpolate(y, size=x.shape[2:], mode="trilinear"))
        return net.out(net.decoder2.conv_block(torch.cat([lifted, net.encoder1(x)], 1)))

    return net, forward


@pytest.mark.extra("medical")
@pytest.mark.parametrize(
    ("patch", "size", "chans", "stock"),
    [((12, 12, 12), (24, 24, 24), 1, False), ((4, 6, 6), (8, 12, 18), 2, False), ((16, 16, 16), (16, 16, 32), 1, True)],
)
def test_segmentation_checkpoints_compute_as_monai(patch, size, chans, stock):
    pytest.importorskip("monai")
    torch.manual_seed(0)
    net, forward = decoder_of_monai(chans, 3, 2, 24, stock)
    net.double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    tokens = math.prod(side // cut for side, cut in zip(size, patch, strict=True))
    state = randomised(vit_shapes(patch, chans, 24, tokens=tokens)) | dict(net.state_dict())
    unused = {"vit.blocks.0.norm_cross_attn.weight": torch.ones(24)}  # later versions of MONAI write it
    model = pl.load_reference(
        "hi_end_mae",
        {"epoch": 1, "best_acc": 0.5, "state_dict": in_float32(state) | unused},
        num_heads=4,
        img_size=size,
        patch_size=patch,
    )
    volumes = torch.rand(1, chans, *size, dtype=torch.float64)
    with torch.no_grad():
        expected, found = forward(volumes, vit_formula(state, volumes, patch, 4)), model(volumes.float())
    assert found.shape == (1, 3, *size)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.extra("medical")
def test_pretrained_tensors_become_those_of_the_segmentation_network():
    pytest.importorskip("monai")
    torch.manual_seed(0)
    model = hi_end_mae(SIZE, PATCH, CHANS, WIDTH, 12, HEADS, DECODER, DECODER_HEADS)
    for block in model.encoder.blocks:
        torch.nn.init.normal_(block.attn.qkv.bias)
    published = {"encoder_pos_embed" if k == "encoder.pos_embed" else k: v for k, v in model.state_dict().items()}
    made = convert_hi_end_mae_checkpoint({"state_dict": {f"module.{k}": v for k, v in published.items()}})
    assert all(name.startswith("vit.") for name in made)
    assert {name: tuple(value.shape) for name, value in made.items()} == vit_shapes(PATCH, CHANS, WIDTH)
    ours = UNETR(as_unetr_encoder(model.encoder), 2, 2).backbone
    volumes = torch.rand(1, CHANS, *SIZE)
    with torch.no_grad():
        expected = vit_formula({k: v.double() for k, v in made.items()}, volumes.double(), PATCH, HEADS)
        _, *maps = ours(volumes)
    for formula_map, found in zip(expected, maps, strict=True):
        torch.testing.assert_close(found.double(), formula_map, atol=1e-5, rtol=1e-5)
    assert ours.encoder.pos_embed.requires_grad
    with pytest.raises(UsageError, match="unknown target 'unet'"):
        convert_hi_end_mae_checkpoint(published, "unet")


def as_it_lies_here(volumes):
    """Return volumes (right, front, up) as (up, back, right)."""
    return volumes.permute(0, 1, 4, 3, 2).flip(3)


@pytest.mark.extra("medical")
def test_imported_networks_say_of_scans_as_they_lie_here_what_the_published_ones_say(tmp_path):
    pytest.importorskip("monai")
    torch.manual_seed(0)
    state = in_float32(randomised(pretraining_shapes()))
    torch.save({"state_dict": state}, tmp_path / "pretraining.pth")
    published = pl.load_reference("hi_end_mae", state, **settings())
    bundle = import_reference("hi_end_mae", str(tmp_path / "pretraining.pth"), str(tmp_path / "encoder"), settings())
    encoder, volumes = pl.load(bundle), torch.rand(1, CHANS, *SIZE)
    with torch.no_grad():
        theirs = feature_map(published.encoder, volumes)
        ours = feature_map(encoder, as_it_lies_here(volumes))
    torch.testing.assert_close(ours, as_it_lies_here(theirs), atol=1e-5, rtol=1e-5)

    net, _ = decoder_of_monai(CHANS, 3, 2, 24)
    state = in_float32(randomised(vit_shapes(PATCH, CHANS, 24))) | dict(net.state_dict())
    torch.save({"state_dict": state}, tmp_path / "unetr.pth")
    told = {"num_heads": 4, "img_size": SIZE, "patch_size": PATCH}
    published = pl.load_reference("hi_end_mae", state, **told)
    segmenter = load_segmenter(import_reference("hi_end_mae", str(tmp_path / "unetr.pth"), str(tmp_path / "net"), told))
    with torch.no_grad():
        theirs, ours = published(volumes), segmenter(as_it_lies_here(volumes))
    torch.testing.assert_close(ours, as_it_lies_here(theirs), atol=1e-4, rtol=1e-4)
    assert segmenter.window == SIZE[::-1]
    assert segmenter.spacing == (1.5, 1.5, 1.5)
