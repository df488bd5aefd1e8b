"""Which parameters are trained: all, low-rank updates, a prefix, the biases, or the last layers.

Each takes a model as transformers made it. LoRA's layers are put into the model itself, so that it keeps its class and
the names of its parameters; `merge` folds them in again. A classifier's own head is always trained: it is new.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

TUNINGS = ("full", "lora", "prefix", "bitfit", "last")
RANK = 8
PREFIX_TOKENS = 10
LAST_BLOCKS = 2

# The projections of attention, by the names that BERT, RoBERTa, GPT-2 and Llama give them.
_ATTENTION = ("query", "value", "c_attn", "q_proj", "v_proj")
_HEADS = re.compile(r"(^|\.)(classifier|score)\.")
_BLOCK = re.compile(r"(^|\.)(?:layer|h|layers)\.(\d+)\.")
_AFTER_BLOCKS = re.compile(r"(^|\.)(ln_f|norm|final_layer_norm)\.")


def tune(model: Any, tuning: str) -> Any:
    """The model with what `tuning` names trainable and the rest frozen; for "prefix" a PEFT model around it.

    ValueError for an unknown name, and where the model has nothing that it could train.
    """
    if tuning not in TUNINGS:
        raise ValueError(f"tuning {tuning!r} does not exist: choose one of {', '.join(TUNINGS)}")
    if tuning == "full":
        return model
    if tuning == "prefix":
        return _with_prefix(model)
    if tuning == "lora":
        _put_lora(model)
    last = _last_blocks(model)
    for name, parameter in model.named_parameters():
        chosen = {
            "lora": ".lora_" in name,
            "bitfit": name.endswith("bias"),
            "last": _block(name) in last or bool(_AFTER_BLOCKS.search(name) and _block(name) is None),
        }[tuning]
        parameter.requires_grad_(chosen or bool(_HEADS.search(name)))
    if not any(p.requires_grad and not _HEADS.search(name) for name, p in model.named_parameters()):
        raise ValueError(f"tuning {tuning!r} finds nothing to train in {type(model).__name__}: choose another")
    return model


def merge(model: Any) -> Any:
    """The model with LoRA's updates in the weights themselves and its layers gone; any other model as it is."""
    layers = [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]
    for name, module in layers:
        module.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.base_layer)
    return model


def _put_lora(model: nn.Module) -> None:
    peft = _peft("lora")
    targets = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in _ATTENTION]
    if not targets:
        raise ValueError(
            f"tuning 'lora' finds none of {', '.join(_ATTENTION)} in {type(model).__name__}: choose another tuning"
        )
    transposed = any(name.endswith("c_attn") for name in targets)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=targets, fan_in_fan_out=transposed
    )
    peft.inject_adapter_in_model(config, model)


def _with_prefix(model: Any) -> Any:
    peft = _peft("prefix")
    if not model.__class__.__name__.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(
            f"tuning 'prefix' is for causal language models, and this is {type(model).__name__}: choose another tuning"
        )
    config = peft.PrefixTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=PREFIX_TOKENS)
    return peft.get_peft_model(model, config)


def _peft(tuning: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"tuning {tuning!r} needs the package peft: pip install peft") from error
    return peft


def _block(name: str) -> int | None:
    found = _BLOCK.search(name)
    return int(found[2]) if found else None


def _last_blocks(model: nn.Module) -> set[int]:
    blocks = {block for name, _ in model.named_parameters() if (block := _block(name)) is not None}
    return set(sorted(blocks)[-LAST_BLOCKS:])
