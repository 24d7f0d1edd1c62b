"""LoRA and its kin: low-rank updates of linear layers, by peft, inside timm's encoders.

"LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685. peft makes and computes the updates
(LoRA, DoRA, rank-stabilised LoRA); what is done here is to get them into timm's fused and bypassed projections and out
again, and to merge them.

>>> import timm, torch
>>> from patchloom.encoders.insertion import insert, merge
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
>>> insert(encoder, LoRA(encoder, rank=4, targets=("q", "v"), num_classes=5))
>>> logits = encoder(images := torch.randn(2, 3, 224, 224))
>>> merge(encoder)
>>> torch.allclose(encoder(images), logits, atol=1e-5)
True
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from patchloom.base.ranges import PositiveInt, checked
from patchloom.encoders import Encoder
from patchloom.encoders.heads import Pool
from patchloom.encoders.insertion import Insertion, Replacement
from patchloom.encoders.readout import Readout
from patchloom.errors import MissingExtraError, UsageError, unknown_name

TARGETS = ("q", "k", "v", "qkv", "proj", "fc1", "fc2")
# Where a target is found, for each way timm spells it: an unfused projection, EVA's SwiGLU.
SPELLINGS = {
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "fc1": ("fc1", "fc1_g", "fc1_x"),
}


class FusedPart(nn.Linear):
    """One of the three projections in a fused one, as a linear layer of its own that shares its weights."""

    def __init__(self, whole: nn.Linear, part: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = whole.in_features, whole.out_features // 3
        self.part = part
        self._whole = (whole,)  # in a tuple: the container below is where it belongs

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The (D, D) rows of this part."""
        return self._whole[0].weight.unflatten(0, (3, self.out_features))[self.part]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The (D,) entries of this part."""
        bias = self._whole[0].bias
        return None if bias is None else bias.unflatten(0, (3, self.out_features))[self.part]


class SplitProjection(nn.Module):
    """A fused query, key and value projection as three, so that an update can be for some of them.

    Args:
        whole: The fused layer; it stays the owner of all weights.
    """

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        self.whole = whole
        self.q, self.k, self.v = (FusedPart(whole, part) for part in range(3))

    @property
    def weight(self) -> Tensor:
        """The fused weight."""
        return self.whole.weight

    @property
    def bias(self) -> Tensor | None:
        """The fused bias."""
        return self.whole.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return what the fused layer returns: (…, 3 D)."""
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


class LoRA(Readout, Insertion):
    """Low-rank updates of an encoder's linear layers.

    Args:
        encoder: What it is made for.
        rank: Rank r of each update, at least 1.
        alpha: The update is scaled by alpha / r (by alpha / √r when `rank_stabilized`).
        targets: Which layers: `q`, `k`, `v` (each for itself, as in the paper), `qkv` (the fused layer as one, as peft
            sees it), `proj`, `fc1`, `fc2`.
        dropout: Dropout on the update's input in training.
        dora: Also learn the norm of each row (DoRA, arXiv 2402.09353).
        rank_stabilized: See `alpha` (arXiv 2312.03732).
        num_classes: Outputs of the classifier; None: none.
        pool: What the classifier reads, see `heads.pool_replacements`.
        train_pool_norm: Train the norm behind mean pooling, where there is one.

    Raises:
        UsageError: Unknown or contradictory targets, or none that the encoder has.
        MissingExtraError: peft is not installed.
    """

    kind = "lora"
    mergeable = True

    def __init__(
        self,
        encoder: Encoder,
        rank: int = 8,
        alpha: float = 8.0,
        targets: Sequence[str] = ("q", "v"),
        dropout: float = 0.0,
        dora: bool = False,
        rank_stabilized: bool = False,
        num_classes: int | None = None,
        pool: Pool = "auto",
        train_pool_norm: bool = True,
    ) -> None:
        super().__init__()
        _check_targets(targets, rank)
        self.arguments = {
            "rank": rank,
            "alpha": alpha,
            "targets": list(targets),
            "dropout": dropout,
            "dora": dora,
            "rank_stabilized": rank_stabilized,
            "num_classes": num_classes,
            "pool": pool,
            "train_pool_norm": train_pool_norm,
        }
        holders = _holders(encoder, targets)
        self._sites: list[tuple[str, str]] = []
        self.layers = nn.ModuleList()
        for owner, name, parts in holders:
            original = getattr(encoder.get_submodule(owner), name)
            self._sites.append((owner, name))
            self.layers.append(_wrapped(original, parts, self.arguments))
        self.make_readout(encoder, num_classes, pool, train_pool_norm)

    def replacements(self, encoder: Encoder) -> Iterable[Replacement]:
        """Return the layers with their updates in the places of the plain ones."""
        for (owner, name), layer in zip(self._sites, self.layers, strict=True):
            module = encoder.get_submodule(owner)
            yield module, name, layer
            # BEiT and EVA read the fused weight without calling its layer, unless the bias is to be added apart.
            if name == "qkv" and getattr(module, "q_bias", None) is not None:
                yield module, "qkv_bias_separate", True
        yield from super().replacements(encoder)

    def stored_state(self) -> dict[str, Tensor]:
        """Return the updates and the head, without the encoder's own layers inside."""
        state = self.state_dict()
        return {name: value for name, value in state.items() if "lora_" in name or not name.startswith("layers.")}

    @torch.no_grad()
    def merge_into(self, encoder: Encoder) -> None:
        """Add the updates to the encoder's weights."""
        self.check_merges()
        for layer in self.layers:
            modules: list[Any] = list(layer.modules())
            for module in modules:
                if hasattr(module, "get_delta_weight"):
                    # peft may put a new tensor in the weight's place, where it has to be written into the old one.
                    base_layer = module.base_layer
                    stand_in = nn.Linear(base_layer.in_features, base_layer.out_features, bias=False).to(
                        base_layer.weight
                    )
                    stand_in.weight.copy_(base_layer.weight)
                    module.base_layer = stand_in
                    module.merge()
                    base_layer.weight.copy_(stand_in.weight)
                    module.base_layer = base_layer


@checked
def _check_targets(targets: Sequence[str], rank: PositiveInt) -> None:
    if not targets:
        raise UsageError("targets is empty, so nothing would be trained but the head; use adapt linear for that")
    for target in targets:
        if target not in TARGETS:
            raise unknown_name("target", target, TARGETS)
    if "qkv" in targets and {"q", "k", "v"} & set(targets):
        raise UsageError("qkv updates the fused layer as one and q, k, v its parts; give one or the others")


def _holders(encoder: Encoder, targets: Sequence[str]) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return (module that holds it, its name, parts of it) for every layer to update."""
    holders: list[tuple[str, str, tuple[str, ...]]] = []
    parts = tuple(target for target in ("q", "k", "v") if target in targets)
    meant = {spelling for target in targets for spelling in SPELLINGS.get(target, (target,))}
    for path, module in encoder.named_modules():
        if not path.startswith("blocks."):
            continue
        for name, child in module.named_children():
            if not isinstance(child, nn.Linear):
                continue
            if name == "qkv":
                if "qkv" in targets or parts:
                    holders.append((path, name, () if "qkv" in targets else parts))
            elif name in meant:
                holders.append((path, name, ()))
    if not holders:
        raise UsageError(f"the encoder's blocks have none of the layers {', '.join(targets)}; nothing would be trained")
    return holders


def _wrapped(original: nn.Linear, parts: tuple[str, ...], arguments: dict[str, Any]) -> nn.Module:
    """Return a layer with a low-rank update, or a split one with updates of some parts."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtraError("peft", "lora", "LoRA") from error
    box = nn.Module()
    box.add_module("layer", SplitProjection(original) if parts else original)
    config = LoraConfig(
        r=arguments["rank"],
        lora_alpha=arguments["alpha"],
        lora_dropout=arguments["dropout"],
        use_dora=arguments["dora"],
        use_rslora=arguments["rank_stabilized"],
        target_modules=[f"layer.{part}" for part in parts] or ["layer"],
    )
    trained = {id(parameter): parameter.requires_grad for parameter in original.parameters()}
    inject_adapter_in_model(config, box)
    for parameter in original.parameters():  # which of the encoder's own train is not for peft to say
        parameter.requires_grad_(trained[id(parameter)])
    return box.get_submodule("layer")
