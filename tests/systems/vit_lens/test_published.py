"""ViT-Lens's published layout: every sense, compared with formulas written out in float64 on tensors drawn by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

import patchloom as pl
from patchloom.errors import UsageError

pytest.importorskip("open_clip")
WIDTH, OUT, BLOCKS, HEADS, LATENTS = 32, 12, 2, 4, 9


class Drawn(dict):
    """Tensors drawn under the names of a checkpoint, none at zero or one."""

    def __init__(self, seed=0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, name, *shape, around=0.0, scale=0.15):
        self[name] = around + scale * torch.randn(*shape, generator=self.generator)

    def norm(self, name, width, running=False):
        self.draw(f"{name}.weight", width, around=1.0)
        self.draw(f"{name}.bias", width)
        if running:
            self.draw(f"{name}.running_mean", width)
            self[f"{name}.running_var"] = 0.5 + torch.rand(width, generator=self.generator)
            self[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def linear(self, name, out, width, *kernel, bias=True):
        self.draw(f"{name}.weight", out, width, *kernel)
        if bias:
            self.draw(f"{name}.bias", out)

    def clip_tower(self, prefix, tokens, patch=None):
        self.draw(f"{prefix}class_embedding", WIDTH)
        self.draw(f"{prefix}positional_embedding", tokens + 1, WIDTH)
        self.norm(f"{prefix}ln_pre", WIDTH)
        self.norm(f"{prefix}ln_post", WIDTH)
        self.draw(f"{prefix}proj", WIDTH, OUT)
        if patch:
            self.draw(f"{prefix}conv1.weight", WIDTH, 3, patch, patch)
        for number in range(BLOCKS):
            block = f"{prefix}transformer.resblocks.{number}."
            self.norm(f"{block}ln_1", WIDTH)
            self.norm(f"{block}ln_2", WIDTH)
            self.draw(f"{block}attn.in_proj_weight", 3 * WIDTH, WIDTH)
            self.draw(f"{block}attn.in_proj_bias", 3 * WIDTH)
            self.linear(f"{block}attn.out_proj", WIDTH, WIDTH)
            self.linear(f"{block}mlp.c_fc", 2 * WIDTH, WIDTH)
            self.linear(f"{block}mlp.c_proj", WIDTH, 2 * WIDTH)
        return self

    def perceiver(self, prefix, width_in, depth=2, inner=1, cross=6, heads=16, tied=False):
        self.draw(f"{prefix}latents", LATENTS, WIDTH)

        def attention(name, source, total):
            self.norm(f"{name}.norm", WIDTH)
            self.linear(f"{name}.fn.to_q", total, WIDTH, bias=False)
            self.linear(f"{name}.fn.to_kv", 2 * total, source, bias=False)
            self.linear(f"{name}.fn.to_out", WIDTH, total)

        def feed(name):
            self.norm(f"{name}.norm", WIDTH)
            self.linear(f"{name}.fn.net.0", 8 * WIDTH, WIDTH)
            self.linear(f"{name}.fn.net.2", WIDTH, 4 * WIDTH)

        for stage in range(depth):
            here = f"{prefix}layers.{stage}."
            if tied and stage > 1:
                second = f"{prefix}layers.1."
                self |= {here + n.removeprefix(second): v for n, v in list(self.items()) if n.startswith(second)}
                continue
            attention(f"{here}0", width_in, cross)
            self.norm(f"{here}0.norm_context", width_in)
            feed(f"{here}1")
            for number in range(inner):
                attention(f"{here}2.{number}.0", WIDTH, heads)
                feed(f"{here}2.{number}.1")
        return self

    def point_bert(self, prefix, encoder=24, width=20):
        for name, first, middle, last in (("first", 3, 128, 256), ("second", 512, 512, encoder)):
            self.linear(f"{prefix}encoder.{name}_conv.0", middle, first, 1)
            self.norm(f"{prefix}encoder.{name}_conv.1", middle, running=True)
            self.linear(f"{prefix}encoder.{name}_conv.3", last, middle, 1)
        self.linear(f"{prefix}reduce_dim", width, encoder)
        self.linear(f"{prefix}pos_embed.0", 128, 3)
        self.linear(f"{prefix}pos_embed.2", width, 128)
        return self

    def balls(self, prefix, encoder=24, width=20):
        for number, (first, last) in enumerate(((9, 64), (64, 64), (64, encoder))):
            self.linear(f"{prefix}sa.mlp_convs.{number}", last, first, 1, 1)
            self.norm(f"{prefix}sa.mlp_bns.{number}", last, running=True)
        self.linear(f"{prefix}lift.0", width, encoder + 3, 1)
        self.norm(f"{prefix}lift.2", width)
        return self


def affine(s, name, x):
    bias = s.get(f"{name}.bias")
    out = x @ s[f"{name}.weight"].flatten(1).T
    return out if bias is None else out + bias


def layer_norm(s, name, x, eps=1e-5):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (var + eps).sqrt() * s[f"{name}.weight"] + s[f"{name}.bias"]


def batch_norm(s, name, x):
    x = (x - s[f"{name}.running_mean"]) / (s[f"{name}.running_var"] + 1e-5).sqrt()
    return x * s[f"{name}.weight"] + s[f"{name}.bias"]


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attend(q, k, v, heads):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def lens(s, tokens, cross_heads, heads):
    x = s["latents"].expand(len(tokens), -1, -1)

    def read(name, x, context, count):
        k, v = affine(s, f"{name}.fn.to_kv", context).chunk(2, -1)
        return affine(
            s, f"{name}.fn.to_out", attend(affine(s, f"{name}.fn.to_q", layer_norm(s, f"{name}.norm", x)), k, v, count)
        )

    def feed(name, x):
        value, gate = affine(s, f"{name}.fn.net.0", layer_norm(s, f"{name}.norm", x)).chunk(2, -1)
        return affine(s, f"{name}.fn.net.2", value * gelu(gate))

    stage = 0
    while f"layers.{stage}.0.norm.weight" in s:
        here = f"layers.{stage}."
        x = x + read(f"{here}0", x, layer_norm(s, f"{here}0.norm_context", tokens), cross_heads)
        x = x + feed(f"{here}1", x)
        number = 0
        while f"{here}2.{number}.0.norm.weight" in s:
            x = x + read(f"{here}2.{number}.0", x, layer_norm(s, f"{here}2.{number}.0.norm", x), heads)
            x = x + feed(f"{here}2.{number}.1", x)
            number += 1
        stage += 1
    return x


def blocks(s, tokens):
    x = torch.cat([s["class_embedding"].expand(len(tokens), 1, -1), tokens], 1) + s["positional_embedding"]
    x = layer_norm(s, "ln_pre", x)
    for number in range(BLOCKS):
        b = f"transformer.resblocks.{number}."
        qkv = layer_norm(s, f"{b}ln_1", x) @ s[f"{b}attn.in_proj_weight"].T + s[f"{b}attn.in_proj_bias"]
        x = x + affine(s, f"{b}attn.out_proj", attend(*qkv.chunk(3, -1), HEADS))
        x = x + affine(s, f"{b}mlp.c_proj", gelu(affine(s, f"{b}mlp.c_fc", layer_norm(s, f"{b}ln_2", x))))
    return layer_norm(s, "ln_post", x[:, 0]) @ s["proj"]


def under(state, prefix):
    return {n.removeprefix(prefix): v.double() for n, v in state.items() if n.startswith(prefix)}


def farthest(cloud, count, first=0):
    """Points far from one another, one by one."""
    chosen, distance = [first], [1e10] * len(cloud)
    while len(chosen) < count:
        for number, point in enumerate(cloud):
            distance[number] = min(
                distance[number], sum((a - b) ** 2 for a, b in zip(point, cloud[chosen[-1]], strict=True))
            )
        chosen.append(max(range(len(cloud)), key=lambda n: distance[n]))
    return chosen


def point_bert(s, points, groups, size):
    tokens, places = [], []
    for cloud in points:
        centres = cloud[farthest(cloud.tolist(), groups)]
        rows = []
        for centre in centres:
            near = ((cloud - centre) ** 2).sum(1).argsort()[:size]
            x = cloud[near] - centre
            x = affine(s, "encoder.first_conv.0", x)
            x = affine(s, "encoder.first_conv.3", batch_norm(s, "encoder.first_conv.1", x).relu())
            x = torch.cat([x.amax(0, keepdim=True).expand_as(x), x], 1)
            x = affine(s, "encoder.second_conv.0", x)
            rows.append(affine(s, "encoder.second_conv.3", batch_norm(s, "encoder.second_conv.1", x).relu()).amax(0))
        tokens.append(affine(s, "reduce_dim", torch.stack(rows)))
        places.append(affine(s, "pos_embed.2", gelu(affine(s, "pos_embed.0", centres))))
    return torch.stack(tokens), torch.stack(places)


def balls(s, points, groups, size, radius):
    out = []
    for cloud in points:
        places = cloud[:, :3]
        rows = []
        for number in farthest(places.tolist(), groups):
            inside = [n for n in range(len(cloud)) if ((places[n] - places[number]) ** 2).sum() <= radius**2][:size]
            near = inside + [inside[0]] * (size - len(inside))
            x = torch.cat([places[near] - places[number], cloud[near]], 1)
            for layer in range(3):
                x = batch_norm(s, f"sa.mlp_bns.{layer}", affine(s, f"sa.mlp_convs.{layer}", x)).relu()
            rows.append(torch.cat([places[number], x.amax(0)]))
        out.append(layer_norm(s, "lift.2", affine(s, "lift.0", torch.stack(rows))))
    return torch.stack(out)


def same(found, expected):
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


GIVEN = {"num_heads": HEADS, "lens_heads": 4}


def test_points_in_groups_of_nearest_neighbours():
    state = Drawn().clip_tower("visual.", LATENTS).perceiver("visual.perceiver.", 20, depth=3, tied=True)
    state.point_bert("visual.visual_adapter.")
    model = pl.load_reference("vit_lens", {"state_dict": state}, num_groups=6, group_size=5, **GIVEN)
    points = torch.randn(2, 40, 3, generator=state.generator)
    s = under(state, "visual.")
    tokens, places = point_bert(under(s, "visual_adapter."), points.double(), 6, 5)
    with torch.no_grad():
        same(model(points), blocks(s, lens(under(s, "perceiver."), tokens + places, 1, 4)))
        assert not torch.allclose(model(points), model(points, start_index=3))
    assert model.lens.layers[1] is model.lens.layers[2]


def test_points_with_colours_in_balls_as_openshape_has_them():
    state = (
        Drawn(1).clip_tower("backbone.", LATENTS).perceiver("backbone.perceiver.", 20).balls("backbone.visual_adapter.")
    )
    given = {"pc_num_group": 7, "pc_group_size": 8, "pc_radius": 0.7, "perceiver_latent_heads": 4, "num_heads": HEADS}
    model = pl.load_reference("vit_lens", {f"module.{n}": v for n, v in state.items()}, **given)
    points = torch.randn(2, 50, 6, generator=state.generator)
    s = under(state, "backbone.")
    tokens = balls(under(s, "visual_adapter."), points.double(), 7, 8, 0.7)
    with torch.no_grad():
        same(model(points), blocks(s, lens(under(s, "perceiver."), tokens, 1, 4)))
        same(model(points[..., :3], features=points), blocks(s, lens(under(s, "perceiver."), tokens, 1, 4)))


def test_depth_without_a_lens():
    state = Drawn(2).clip_tower("visual.", 9)
    state.draw("visual.visual_adapter.conv1.weight", WIDTH, 1, 8, 8)
    state.draw("visual.visual_adapter.pos_emb", 9, WIDTH)
    model = pl.load_reference("vit_lens", state, modality="depth", unlock_trans_first_n_layers=1, **GIVEN)
    maps = torch.randn(2, 1, 24, 24, generator=state.generator)
    s = under(state, "visual.")
    patches = maps.double().unfold(2, 8, 8).unfold(3, 8, 8).reshape(2, 9, 64)
    tokens = patches @ s["visual_adapter.conv1.weight"].flatten(1).T + s["visual_adapter.pos_emb"]
    with torch.no_grad():
        same(model(maps), blocks(s, tokens))
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad and "blocks" in n} == {"0"}


def test_audio_reads_low_tones_first():
    state = Drawn(3).clip_tower("visual.", LATENTS).perceiver("visual.perceiver.", WIDTH, depth=2, inner=3)
    state.draw("visual.visual_adapter.conv1.weight", WIDTH, 1, 8, 8)
    state.draw("visual.visual_adapter.pos_emb", 3 * 5, WIDTH)
    model = pl.load_reference("vit_lens", state, audio_mel_bins=30, audio_target_length=50, **GIVEN)
    sound = torch.randn(2, 50, 30, generator=state.generator)
    s = under(state, "visual.")
    kernel = s["visual_adapter.conv1.weight"][:, 0]
    rows = [
        torch.einsum("wft,btf->bw", kernel, sound.double()[:, 10 * t : 10 * t + 8, 10 * f : 10 * f + 8])
        for f in range(3)
        for t in range(5)
    ]
    tokens = torch.stack(rows, 1) + s["visual_adapter.pos_emb"]
    with torch.no_grad():
        same(model(sound), blocks(s, lens(under(s, "perceiver."), tokens, 1, 4)))


def eeg(seed=4):
    state = Drawn(seed).clip_tower("visual.", LATENTS).perceiver("visual.perceiver.", WIDTH, depth=1)
    state.linear("visual.visual_adapter.proj", WIDTH, 6, 1)
    state.draw("visual.visual_adapter.pos_emb", 20, WIDTH)
    return state


def test_eeg():
    state = eeg()
    model = pl.load_reference("vit_lens", state, **GIVEN)
    signals = torch.randn(2, 6, 20, generator=state.generator)
    s = under(state, "visual.")
    tokens = affine(s, "visual_adapter.proj", signals.double().transpose(1, 2)) + s["visual_adapter.pos_emb"]
    with torch.no_grad():
        same(model(signals), blocks(s, lens(under(s, "perceiver."), tokens, 1, 4)))


def patches(s, images, side):
    cut = images.double().unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5)
    return cut.reshape(len(images), -1, 3 * side * side) @ s["conv1.weight"].flatten(1).T


def test_touch_by_the_own_stem_and_the_model_of_all_senses():
    state = Drawn(5).clip_tower("vitlens.tactile.", 9, patch=8).clip_tower("vitlens.image.", 9, patch=8)
    images = torch.randn(2, 3, 24, 24, generator=state.generator)
    touch = pl.load_reference("vit_lens", state, num_heads=HEADS)
    sight = pl.load_reference("vit_lens", state, modality="image", num_heads=HEADS)
    with torch.no_grad():
        for model, name in ((touch, "tactile"), (sight, "image")):
            s = under(state, f"vitlens.{name}.")
            same(model(images), blocks(s, patches(s, images, 8)))
    with pytest.raises(UsageError, match="holds image, tactile; say by modality"):
        pl.load_reference("vit_lens", state, modality="audio", num_heads=HEADS)


def test_a_training_checkpoint_has_all_towers():
    state = eeg().clip_tower("image.", 4, patch=8)
    state.draw("token_embedding.weight", 30, 16)
    state.draw("positional_embedding", 7, 16)
    state.norm("ln_final", 16)
    state.draw("text_projection", 16, OUT)
    block = "transformer.resblocks.0."
    state.norm(f"{block}ln_1", 16)
    state.norm(f"{block}ln_2", 16)
    state.draw(f"{block}attn.in_proj_weight", 48, 16)
    state.draw(f"{block}attn.in_proj_bias", 48)
    state.linear(f"{block}attn.out_proj", 16, 16)
    state.linear(f"{block}mlp.c_fc", 64, 16)
    state.linear(f"{block}mlp.c_proj", 16, 64)
    state["logit_scale"] = torch.tensor(3.0)
    model = pl.load_reference("vit_lens", state, text_heads=2, **GIVEN)
    images = torch.randn(2, 3, 16, 16, generator=state.generator)
    s = under(state, "image.")
    with torch.no_grad():
        same(model.encode_image(images), blocks(s, patches(s, images, 8)))
        assert model.encode_text(torch.tensor([[1, 5, 29, 0, 0, 0, 0]])).shape == (1, OUT)
        alone = pl.load_reference("vit_lens", eeg(), **GIVEN)
        signals = torch.randn(2, 6, 20)
        assert torch.equal(model(signals), alone(signals))
    assert float(model.logit_scale.detach()) == 3.0


def test_an_eva_vit_has_no_bias_of_keys_and_hands_its_tokens_to_a_language_model():
    state = Drawn(6).perceiver("perceiver.", 20).point_bert("visual_adapter.")
    state.draw("eva_vit.cls_token", 1, 1, WIDTH)
    state.draw("eva_vit.pos_embed", 1, LATENTS + 1, WIDTH)
    state.norm("eva_vit.norm", WIDTH)
    state.draw("eva_vit_proj", WIDTH, OUT)
    for number in range(BLOCKS):
        block = f"eva_vit.blocks.{number}."
        state.norm(f"{block}norm1", WIDTH)
        state.norm(f"{block}norm2", WIDTH)
        state.draw(f"{block}attn.q_bias", WIDTH)
        state.draw(f"{block}attn.v_bias", WIDTH)
        state.linear(f"{block}attn.qkv", 3 * WIDTH, WIDTH, bias=False)
        state.linear(f"{block}attn.proj", WIDTH, WIDTH)
        state.linear(f"{block}mlp.fc1", 70, WIDTH)
        state.linear(f"{block}mlp.fc2", WIDTH, 70)
    model = pl.load_reference("vit_lens", state, num_groups=6, group_size=5, **GIVEN)
    points = torch.randn(2, 40, 3, generator=state.generator)
    s = {name: value.double() for name, value in state.items()}
    tokens, places = point_bert(under(s, "visual_adapter."), points.double(), 6, 5)
    x = lens(under(s, "perceiver."), tokens + places, 1, 4)
    x = torch.cat([s["eva_vit.cls_token"].expand(2, -1, -1), x], 1) + s["eva_vit.pos_embed"]
    for number in range(BLOCKS):
        b = f"eva_vit.blocks.{number}."
        q, k, v = affine(s, f"{b}attn.qkv", layer_norm(s, f"{b}norm1", x, 1e-6)).chunk(3, -1)
        x = x + affine(s, f"{b}attn.proj", attend(q + s[f"{b}attn.q_bias"], k, v + s[f"{b}attn.v_bias"], HEADS))
        x = x + affine(s, f"{b}mlp.fc2", gelu(affine(s, f"{b}mlp.fc1", layer_norm(s, f"{b}norm2", x, 1e-6))))
    with torch.no_grad():
        same(model(points, return_tokens=True), x)
        same(model(points), layer_norm(s, "eva_vit.norm", x[:, 0], 1e-6) @ s["eva_vit_proj"])
    assert model.projection.weight.requires_grad


def test_parts_alone():
    state = Drawn(7).perceiver("", 20, inner=2)
    tokens = torch.randn(2, 11, 20, generator=state.generator)
    with torch.no_grad():
        found = pl.load_reference("vit_lens", state, perceiver_latent_heads=4, cross_heads=2)(tokens)
        same(found, lens(under(state, ""), tokens.double(), 2, 4))
        state = Drawn(8).point_bert("visual_adapter.")
        points = torch.randn(1, 30, 3, generator=state.generator)
        found = pl.load_reference("vit_lens", state, num_group=4, group_size=3)(points)
        for each, expected in zip(
            found, point_bert(under(state, "visual_adapter."), points.double(), 4, 3), strict=True
        ):
            same(each, expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("visual.perceiver.layers.0.1.norm.bias"), "missing: visual.perceiver.layers.0.1.norm.bias"),
        (lambda s: s.update({"visual.odd": torch.ones(2)}), "unexpected: visual.odd"),
        (lambda s: s.pop("visual.transformer.resblocks.1.ln_1.weight"), "missing: visual.transformer.resblocks.1.ln_1"),
        (lambda s: s.update({"visual.ln_post.bias": torch.ones(2)}), r"another shape: visual.ln_post.bias \(2,\)"),
        (lambda s: s.pop("visual.class_embedding"), "missing: class_embedding"),
        (lambda s: [s.pop(n) for n in list(s) if "perceiver" in n], "positional_embedding|perceiver"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, said):
    state = eeg()
    change(state)
    with pytest.raises(UsageError, match=said):
        pl.load_reference("vit_lens", dict(state), **GIVEN)


def test_points_without_their_lens_are_refused():
    state = Drawn().clip_tower("visual.", LATENTS).point_bert("visual.visual_adapter.")
    with pytest.raises(UsageError, match=r"missing: perceiver\.latents"):
        pl.load_reference("vit_lens", state, **GIVEN)


def test_heads_that_nothing_tells_are_asked_for():
    with pytest.raises(UsageError, match="give lens_heads"):
        pl.load_reference("vit_lens", eeg())
    with pytest.raises(UsageError, match="lens_tokens=7, but the checkpoint's tensors say 9"):
        pl.load_reference("vit_lens", eeg(), perceiver_num_latents=7, **GIVEN)


def test_the_table_of_positions_goes_by_squares_then_by_nearest_rows():
    from patchloom.systems.vit_lens.model import resize_positions

    table = torch.randn(17, 8)
    square = F.interpolate(
        table[1:].T.reshape(1, 8, 4, 4), size=(3, 3), mode="bicubic", antialias=True, align_corners=False
    )
    rows = square.flatten(2)[0].T
    assert torch.equal(resize_positions(table, 9), torch.cat([table[:1], rows]))
    nearest = rows[[int(n * 9 / 11) for n in range(11)]]
    assert torch.equal(resize_positions(table, 11), torch.cat([table[:1], nearest]))
    assert resize_positions(table, 16) is table
    with pytest.raises(UsageError, match="no square"):
        resize_positions(table[:-1], 4)
