"""Published settings: one rule for all loaders.

A configuration may be given whole, as its authors wrote it. What tensors tell is checked against them; what they do
not tell is obeyed; what matters in training only, or to the machine it ran on, is passed over; what contradicts the
tensors, or nobody has heard of, is refused.

>>> known = Settings(obeyed=("num_heads",), idle=("drop_rate",), other_names={"num_attention_heads": "num_heads"})
>>> known.settle({"num_attention_heads": 6, "depth": 12, "drop_rate": 0.1, "lr": 1e-3}, inferred={"depth": 12})
{'num_heads': 6}
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from patchloom.errors import UsageError, unknown_name

OF_SCRIPTS = """
aa accum_iter amp_opt_level auto_resume batch_size bce_loss betas blr clip_grad clip_mode color_jitter config
cooldown_epochs crop_pct cutmix cutmix_minmax data_path data_set data_url dataset debug decay_epochs decay_rate device
disable_eval_during_finetuning dist_backend dist_eval dist_on_itp dist_url distributed drop_block_rate
enable_deepspeed enable_wandb epoch epochs eval eval_data_path final_test finetune fused_lr gpu
imagenet_default_mean_and_std init_method layer_decay linprob local_rank log_dir lr lr_noise lr_noise_pct lr_noise_std
lr_scale min_crop_scale min_lr mixup mixup_mode mixup_prob mixup_switch_prob model_ema model_ema_decay
model_ema_force_cpu momentum nb_gpus no_auto_resume no_pin_mem num_workers only_load_model opt opt_betas opt_eps optim
optimizer output_dir patience_epochs pin_mem random_erase rank recount remode repeated_aug reprob resplit resume
save_ckpt save_ckpt_freq save_freq scale_lr sched second_input_size second_interpolation seed short_side_size
smoothing start_epoch steps_per_print test_num_crop test_num_segment train_interpolation update_freq use_cls use_fp16
warmup_epochs warmup_lr warmup_steps weight_decay weight_decay_end workers world_size
"""
TRAINING = frozenset(OF_SCRIPTS.split())
"""Settings of training scripts that say nothing of the model they train."""
OF_CONFIGS = """
_attn_implementation _name_or_path architectures attention_probs_dropout_prob attn_implementation auto_map
chunk_size_feed_forward dtype finetuning_task hidden_dropout_prob id2label initializer_range is_decoder
is_encoder_decoder label2id model_type num_labels output_attentions output_hidden_states problem_type return_dict
tie_word_embeddings torch_dtype torchscript transformers_version use_return_dict
"""
OF_TRANSFORMERS = frozenset(OF_CONFIGS.split())
"""Entries of the `config.json` files of transformers that describe no tensor."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a loader knows of its system's settings; names are ours where no other are meant."""

    obeyed: Iterable[str] = ()
    """What tensors do not tell and a loaded model depends on"""
    idle: Iterable[str] = ()
    """What changes training, initial values or an interface, not what a trained model computes; passed over, along with
    `TRAINING` and `OF_TRANSFORMERS`"""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """What all published models have: the values that may be given"""
    other_names: Mapping[str, str] = field(default_factory=dict)
    """Our names by those of published code"""
    sections: Mapping[str, Mapping[str, str] | None] = field(default_factory=dict)
    """Groups of a nested configuration, each with our names by those inside it; None: passed over whole"""
    read: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    """How a value is read, such as an epsilon from a norm layer; None for "says nothing" """

    def settle(self, config: Mapping[str, Any], inferred: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings to obey, under our names.

        Args:
            config: Settings under ours or published names, nested or not.
            inferred: What the tensors tell; None: they do not, whatever is given.

        Raises:
            UsageError: An unknown setting, one that contradicts the tensors, or one name's value another's.
        """
        given = self.renamed(config)
        about = (*self.obeyed, *inferred, *self.fixed)
        passed = {*self.idle, *TRAINING, *OF_TRANSFORMERS}
        for name, value in given.items():
            if name not in about and name not in passed:
                raise unknown_name("setting", name, about)
            if name in self.fixed and value is not None and value not in self.fixed[name]:
                allowed = " or ".join(map(str, self.fixed[name]))
                raise UsageError(f"{name}={value} is not computed here: in published models it is {allowed}")
        agree(given, inferred)
        return {name: value for name, value in given.items() if name in set(self.obeyed) and value is not None}

    def renamed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings under our names, taken out of their groups.

        Raises:
            UsageError: Two names of one setting differ.
        """
        renamed: dict[str, Any] = {}
        first: dict[str, str] = {}
        for published, name, value in self._flat(config):
            if (reader := self.read.get(name)) is not None and value is not None:
                value = reader(value)
            if value is None and name in renamed:
                continue
            before = renamed.get(name)
            if before is not None and comparable(before, value) != comparable(value, before):
                raise UsageError(
                    f"{first[name]}={renamed[name]} and {published}={value} are one setting here and differ; give one"
                )
            renamed[name], first[name] = value, published
        return renamed

    def _flat(self, config: Mapping[str, Any]) -> Iterable[tuple[str, str, Any]]:
        """Yield each setting's published name, its name here, and its value."""
        for key, value in config.items():
            names = self.sections.get(key, {})
            if names is None:
                continue
            if key not in self.sections or not isinstance(value, Mapping):
                yield key, self.other_names.get(key, key), value
                continue
            for inner, content in value.items():
                yield f"{key}.{inner}", names.get(inner, self.other_names.get(inner, inner)), content


class Hidden(NamedTuple):
    """Width of an MLP's middle, which a ratio gives after it was cut off to a whole number."""

    width: int
    hidden: int
    gated: bool = False
    """Two thirds of that, made up to a multiple of 8, as gated MLPs have it"""

    @property
    def ratio(self) -> float:
        """A ratio that gives the width of a plain MLP."""
        exact = self.hidden / self.width
        return exact if int(self.width * exact) == self.hidden else (self.hidden + 0.5) / self.width

    def admits(self, ratio: Any) -> bool:
        """Return whether a ratio gives this width."""
        plain = int(self.width * float(ratio))
        return self.hidden == ((int(plain * 2 / 3) + 7) // 8 * 8 if self.gated else plain)

    def __str__(self) -> str:
        return f"{self.hidden / self.width:g}{' (gated)' * self.gated}"


class OneOf(tuple[Any, ...]):
    """Words that tensors fit alike."""

    def admits(self, value: Any) -> bool:
        """Return whether a value is among them."""
        return value in self

    def __str__(self) -> str:
        return " or ".join(map(str, self))


def agree(config: Mapping[str, Any], inferred: Mapping[str, Any]) -> None:
    """Refuse settings that contradict what the tensors tell; None is told of what they say nothing of.

    Raises:
        UsageError: Names the setting and both values.
    """
    for name, value in inferred.items():
        if name not in config or value is None:
            continue
        asked = config[name]
        if isinstance(value, (Hidden, OneOf)):
            fits = asked is None or value.admits(asked)
        else:
            fits = comparable(asked, value) == comparable(value)
        if not fits:
            raise UsageError(f"{name}={asked}, but the checkpoint's tensors say {value}; leave it out")


def comparable(value: Any, inferred: Any = None) -> Any:
    """Return a list for any sequence or None, and one number for equal sides where the tensors tell one."""
    if not isinstance(value, (list, tuple)):
        return [] if value is None else value
    return value[0] if isinstance(inferred, int) and value and len(set(value)) == 1 else list(value)


def epsilon_of(norm_layer: Any) -> float | None:
    """Return the epsilon that a published norm layer has, given as such, as a number or as a partial constructor.

    >>> epsilon_of(1e-6), epsilon_of(partial(nn.LayerNorm, eps=1e-5)), epsilon_of("LayerNorm")
    (1e-06, 1e-05, None)
    """
    if isinstance(norm_layer, (int, float)):
        return float(norm_layer)
    if isinstance(norm_layer, partial) and "eps" in norm_layer.keywords:
        return float(norm_layer.keywords["eps"])
    return 1e-5 if norm_layer is nn.LayerNorm else None


def name_of(layer: Any) -> str:
    """Return a layer's name in small letters, given as a word or as a class.

    >>> name_of(nn.GELU), name_of("quick_gelu")
    ('gelu', 'quick_gelu')
    """
    return str(getattr(layer, "__name__", layer)).lower()


def set_epsilon(model: nn.Module, epsilon: float | None) -> None:
    """Give a model's layer norms another epsilon than their architecture's, and say what that means for a bundle."""
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    if epsilon is None or all(norm.eps == epsilon for norm in norms):
        return
    for norm in norms:
        norm.eps = epsilon
    warnings.warn(
        f"norms have the epsilon {epsilon:g}, for which timm's architecture has no argument: the model computes with "
        f"it, but a bundle of it would lose it",
        stacklevel=6,
    )
