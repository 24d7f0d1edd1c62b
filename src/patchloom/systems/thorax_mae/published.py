"""Published checkpoints of the thorax recipe: ViT (as MAE's), and CNNs in torchvision's and the U-Net's layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from patchloom.errors import UsageError
from patchloom.models.published import fill
from patchloom.models.published_settings import Settings
from patchloom.systems.mae import published as mae

# Models of momentum-contrast files hold the network twice, and a queue.
QUERY_ENCODER, OTHERS = "encoder_q.", ("encoder_k.", "queue")
# A recipe's settings of ViTs are given along with those of CNNs, where they mean nothing.
OF_CNNS = Settings(
    idle=(
        *("model", "drop_rate", "drop_path", "mask_ratio", "norm_pix_loss", "input_size", "in_chans", "global_pool"),
        *("vit_dropout_rate", "pretrained", "layer_decay", "train_list", "val_list", "test_list", "dataset"),
    ),
    other_names={"nb_classes": "num_classes", "drop_path_rate": "drop_path", "img_size": "input_size"},
)
DENSENET_121, RESNET_50 = "features.denseblock4.denselayer16.conv2.weight", "layer4.2.conv3.weight"


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return our module with a published state dict in it.

    Args:
        state: Tensors under the published names: a ViT's, a DenseNet-121's or a ResNet-50's. Of a U-Net
            (`model.encoder.…`) and of a momentum-contrast file (`encoder_q.…`) the encoder is taken.
        **config: As for `mae`; here `norm_pix_loss` defaults to False and `mask_ratio` to 0.9. CNNs: `num_classes` or
            `nb_classes`, which has to agree with the classifier, and the published name `model`.

    Returns:
        `MaskedAutoencoder`, a timm `VisionTransformer`, or torchvision's CNN; without classifier where there is none.

    Raises:
        UsageError: Unknown setting, or tensors missing or left over.
    """
    if "patch_embed.proj.weight" in state:
        return mae.load_with({"norm_pix_loss": False, "mask_ratio": 0.9}, state, **config)
    return _cnn(_encoder_of(state), config)


def _encoder_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the CNN in a file that holds more."""
    if any(name.startswith(QUERY_ENCODER) for name in state):
        encoder_state = {
            name.removeprefix(QUERY_ENCODER): v for name, v in state.items() if not name.startswith(OTHERS)
        }
        return {name: value for name, value in encoder_state.items() if not name.startswith(("fc.", "classifier."))}
    for prefix in ("model.encoder.", "encoder."):
        if any(name.startswith(prefix) for name in state):
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return dict(state)


def _cnn(state: dict[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    from torchvision import models

    # Files from before 2017 have dots where modules may have none now.
    state = {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])", r"\1\2", name): v for name, v in state.items()}
    model: Any
    if DENSENET_121 in state:
        model, head = models.densenet121(weights=None), "classifier"
    elif RESNET_50 in state:
        model, head = models.resnet50(weights=None), "fc"
    else:
        begun = ", ".join(list(state)[:4])
        raise UsageError(f"the checkpoint is neither a ViT nor a DenseNet-121 nor a ResNet-50 (its tensors: {begun})")
    weight = state.get(f"{head}.weight")
    OF_CNNS.settle(config, {"num_classes": None if weight is None else len(weight)})
    width = getattr(model, head).in_features
    setattr(model, head, nn.Identity() if weight is None else nn.Linear(width, len(weight)))
    counters = [name for name in model.state_dict() if name.endswith("num_batches_tracked")]
    return fill(model, state, may_lack=counters).eval()
