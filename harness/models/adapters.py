"""Low-rank adapters (LoRA) in a captioner, by peft (the sole import of it)."""

import re
import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from harness.errors import Problem, UserError
from harness.models import parts
from harness.models.base import Captioner

if TYPE_CHECKING:
    from harness.models.settings import LoraConfig

ATTENTION_AND_MLP = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv", "query", "key", "value"),
    *("c_attn", "c_proj", "c_fc", "fc1", "fc2", "gate_proj", "up_proj", "down_proj"),
    *("query_key_value", "dense_h_to_4h", "dense_4h_to_h", "qkv_proj", "gate_up_proj", "fc_in", "fc_out"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "Wqkv"),
    *("dense1", "dense2", "weights_in", "weights_out"),
    *("projection_query", "projection_key", "projection_value", "dense", "proj", "linear_fc1", "linear_fc2"),
)
"""Names of the linear layers of attention and MLPs in transformers' models: the default targets."""
_KEY = "model.lora.targets"


def add(model: Captioner, config: "LoraConfig") -> None:
    """Put adapters into the layers of `config.parts` that `config.targets` name, and nowhere else.

    At first they change nothing. Their weights are the same in every call (`parts.new`) and fp32. Raises
    `UserError` if no layer has one of these names.
    """
    import peft

    targets = _targets(model, config)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
    )
    with parts.new(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # peft finds it out for GPT-2's layers
        peft.inject_adapter_in_model(settings, model)
    for name, weight in model.named_parameters():
        if parts.is_adapter(name):
            weight.data = weight.data.to(torch.float32)


def _targets(model: Captioner, config: "LoraConfig") -> list[str]:
    """The full names of the layers to adapt; what nothing reads, such as a pooler, is left out."""
    names = config.targets or ATTENTION_AND_MLP
    unread = getattr(model, "unread", ())
    linear = {
        name: module
        for name, module in model.named_modules()
        if _is_linear(module) and model.part_of(f"{name}.weight") in config.parts
        if f"{name}.weight" not in unread
    }
    found = [name for name in linear if name.rpartition(".")[2] in names]
    lacking = [part for part in config.parts if not any(model.part_of(f"{n}.weight") == part for n in found)]
    if lacking:
        there = sorted({re.sub(r".*\.", "", name) for name in linear})
        what = f"no layer of {' and '.join(lacking)} is named {', '.join(names)}"
        hint = f"These parts have layers named {', '.join(there) or 'nothing that LoRA can adapt'}."
        raise UserError([Problem(what, key=_KEY, hint=hint)])
    return found


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def merge(model: nn.Module) -> None:
    """Add the adapters to the weights of their layers, and remove them."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module.get_base_layer())
