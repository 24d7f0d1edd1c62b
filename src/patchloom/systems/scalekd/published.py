"""ScaleKD's published checkpoints: projectors, and students and teachers in the names of mmcls.

Fan et al. 2024, arXiv 2411.06786; github.com/deep-optimization/ScaleKD.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from patchloom.errors import UsageError
from patchloom.models.published import fill
from patchloom.models.published_settings import Settings, agree
from patchloom.systems.scalekd.projector import CrossAttentionProjector, default_heads

PROJECTOR = {
    "proj_pos.0": "query_conv",
    "proj_student.0": "student_conv",
    "proj_student.1": "student_norm",
    "pos_attention.q": "q",
    "pos_attention.k": "k",
    "pos_attention.v": "v",
    "pos_attention.proj": "proj",
    "ffn.layers.0.0": "fc1",
    "ffn.layers.1": "fc2",
}
TOLD = ("student_dims", "teacher_dims", "pos_grid", "self_query")
"""What a projector's tensors tell."""
SETTINGS = Settings(
    obeyed=("num_heads", "softmax_scale", "query_grid", "model", "part", "image_size", "num_classes"),
    idle=("name", "type", "use_this", "alpha", "loss_weight", "dis_freq", "temperature", "init_cfg", "patch_size"),
    fixed={"window_shapes": ((1, 1), [1, 1], None)},
    other_names={
        "query_hw": "query_grid",
        "pos_hw": "pos_grid",
        "pos_dims": "student_dims",
        "img_size": "image_size",
    },
)
STAGE = re.compile(r"(?:distill_losses\.)?loss_fmd_s(?P<stage>[34])\.projector_(?P<view>\d)\.(?P<rest>.+)")


class Projectors(nn.Module):
    """The projectors of a checkpoint: `stage3` and `stage4`, each a list of the two views."""

    def __init__(self, stage3: list[nn.Module], stage4: list[nn.Module]) -> None:
        super().__init__()
        self.stage3, self.stage4 = nn.ModuleList(stage3), nn.ModuleList(stage4)

    def forward(self, third: Tensor, fourth: Tensor, queries: list[Tensor] | None = None) -> dict[str, list[Tensor]]:
        """Return the projected tokens of both stages.

        Args:
            third: (B, C3, H3, W3), the student's earlier map.
            fourth: (B, C4, H4, W4), its last map.
            queries: (B, n, Ct) for each projector of the last stage that has none of its own.
        """
        given: list[Tensor | None] = [None] * len(self.stage4) if queries is None else list(queries)
        return {
            "stage3": [projector(third) for projector in self.stage3],
            "stage4": [projector(fourth, query) for projector, query in zip(self.stage4, given, strict=True)],
        }


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return what a checkpoint holds.

    Args:
        state: One projector; or a whole training checkpoint, of which the projectors are taken; or a released student
            or the teacher part, for which `model` names the timm architecture.
        **config: `num_heads` (a number, or one for each stage), `softmax_scale` (likewise; 5), `query_grid` of the last
            stage ((h, w); the earlier one's is square, and half of it by default), `model`, `part` (`projectors`,
            `student` or `teacher`).

    Raises:
        UsageError: Tensors missing or left over, or a setting that does not fit.
    """
    of_projectors = {name: value for name, value in SETTINGS.renamed(config).items() if name in TOLD}
    config = SETTINGS.settle(config, dict.fromkeys(TOLD))
    state = {name: value for name, value in state.items() if not re.fullmatch(r"linear\.(weight|bias)", name)}
    part = config.get("part")
    if part in ("student", "teacher") or (part is None and config.get("model") is not None):
        return _model(_without(state, part), config)
    if any(name.startswith("proj_student.") for name in state):
        return _projector(state, config, 0, of_projectors)
    stages: dict[int, dict[int, dict[str, Tensor]]] = {3: {}, 4: {}}
    for name, value in state.items():
        if match := STAGE.fullmatch(name):
            stages[int(match["stage"])].setdefault(int(match["view"]), {})[match["rest"]] = value
    if not any(stages.values()):
        raise UsageError("there is no projector in this checkpoint; for a student or teacher give model, a timm name")
    built = {
        stage: [_projector(views[v], config, stage - 3, of_projectors) for v in sorted(views)]
        for stage, views in stages.items()
    }
    return Projectors(built[3], built[4])


def _projector(
    state: Mapping[str, Tensor], config: Mapping[str, Any], stage: int, given: Mapping[str, Any]
) -> nn.Module:
    ours = {}
    for name, value in state.items():
        prefix = next((old for old in PROJECTOR if name.startswith(f"{old}.")), None)
        ours[name if prefix is None else PROJECTOR[prefix] + name.removeprefix(prefix)] = value
    for needed in ("pos_embed", "q.weight"):
        if needed not in ours:
            raise UsageError(f"this is no projector: {needed} is missing")
    _, student_dim, height, width = ours["pos_embed"].shape
    dim = ours["q.weight"].shape[0]
    learned = "query.weight" in ours
    inferred = {"student_dims": student_dim, "teacher_dims": dim, "pos_grid": (height, width), "self_query": learned}
    agree({name: value if name == "pos_grid" else _of_stage(value, stage) for name, value in given.items()}, inferred)
    grid = config.get("query_grid")
    if learned and (grid is None or grid[0] * grid[1] != len(ours["query.weight"])):
        side = round(len(ours["query.weight"]) ** 0.5)
        if side * side != len(ours["query.weight"]):
            raise UsageError(f"{len(ours['query.weight'])} queries are no square; give query_grid")
        grid = (side, side)
    heads = _of_stage(config.get("num_heads"), stage) or default_heads(dim)
    norm = "batch" if "student_norm.running_mean" in ours else "layer"
    module = CrossAttentionProjector(
        student_dim,
        dim,
        (height, width),
        tuple(grid or (7, 7)),
        int(heads),
        learned,
        float(_of_stage(config.get("softmax_scale"), stage) or 5.0),
        norm,  # type: ignore[arg-type]
    )
    return fill(module, ours)


def _of_stage(value: Any, stage: int) -> Any:
    return value[stage] if isinstance(value, (tuple, list)) else value


def _without(state: Mapping[str, Tensor], part: str | None) -> dict[str, Tensor]:
    """Return the tensors of a part of a whole checkpoint, or all where it is that part alone."""
    for prefix in (part, "student", "teacher"):
        if prefix is not None and any(name.startswith(f"{prefix}.") for name in state):
            return {k.removeprefix(f"{prefix}."): v for k, v in state.items() if k.startswith(f"{prefix}.")}
    return dict(state)


def _model(state: dict[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """Return a timm model with the weights of an mmcls one."""
    name = config.get("model")
    if name is None or not timm.is_model(name):
        raise UsageError(f"model is {name!r}; name the timm architecture of the checkpoint")
    state = {k.removeprefix("backbone."): v for k, v in state.items()}
    head = state.get("head.fc.weight")
    classes = int(config.get("num_classes") or (0 if head is None else len(head)))
    extra = {} if config.get("image_size") is None else {"img_size": config["image_size"]}
    if any(key.startswith("layers.") and ".ln1." in key for key in state):
        ours = vit_from_mmcls(state)
        extra |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    elif any(".w_msa." in key for key in state):
        ours = swin_from_mmcls(state)
    else:
        ours = {key.replace("head.fc.", "fc."): value for key, value in state.items()}
    model = timm.create_model(name, num_classes=classes, **extra)
    state_dict = model.state_dict()
    buffers = [
        key for key in state_dict if key.endswith(("relative_position_index", "attn_mask", "num_batches_tracked"))
    ]
    return fill(model, {k: v for k, v in ours.items() if k in state_dict or k not in buffers}, may_lack=buffers)


def vit_from_mmcls(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a plain ViT's tensors in timm's names; the unused class token and its position are dropped."""
    ours = {}
    for name, value in state.items():
        if name == "cls_token":
            continue
        if name == "pos_embed":
            # One entry more than a square number of patches: that of the class token.
            side = int(value.shape[1] ** 0.5)
            ours[name] = value if side * side == value.shape[1] else value[:, 1:]
            continue
        name = name.replace("patch_embed.projection", "patch_embed.proj").replace("head.fc.", "head.")
        name = re.sub(r"^layers\.(\d+)\.", r"blocks.\1.", name)
        name = name.replace(".ln1.", ".norm1.").replace(".ln2.", ".norm2.")
        name = name.replace("ffn.layers.0.0", "mlp.fc1").replace("ffn.layers.1", "mlp.fc2")
        ours[re.sub(r"^(ln1|norm1)\.", "norm.", name)] = value
    return ours


def swin_from_mmcls(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a Swin's tensors in timm's names and timm's order of merged patches."""
    ours = {}
    for name, value in state.items():
        if "relative_position_index" in name or re.match(r"norm[0-2]\.", name) or name.endswith("attn_mask"):
            continue
        merged = re.match(r"stages\.(\d+)\.downsample\.(norm|reduction)\.(weight|bias)", name)
        if merged:
            # mmcls counts channel by channel (c, row, column), timm patch by patch (column, row, c).
            four = value.shape[-1] // 4
            order = torch.arange(4 * four).view(four, 2, 2).permute(2, 1, 0).flatten()
            stage = int(merged[1]) + 1
            ours[f"layers.{stage}.downsample.{merged[2]}.{merged[3]}"] = value[..., order]
            continue
        name = name.replace("patch_embed.projection", "patch_embed.proj").replace("head.fc.", "head.fc.")
        name = re.sub(r"^stages\.", "layers.", name).replace(".w_msa.", ".")
        name = name.replace("ffn.layers.0.0", "mlp.fc1").replace("ffn.layers.1", "mlp.fc2")
        ours[re.sub(r"^norm3\.", "norm.", name)] = value
    return ours
