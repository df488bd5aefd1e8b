"""The models of bench/step.py: random weights, no dropout, a batch of tokens, and the loss as people write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL_CLASSIFIER = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 500,
}


@dataclass(frozen=True)
class Step:
    """model: in training mode. batch: what it is given. loss: the mean loss from its output, as people write it.

    private_losses: ``(model, batch) -> [B]`` of fastclip.huggingface. rows: shape of the logits that the loss is taken from.
    """

    model: nn.Module
    batch: dict[str, Tensor]
    loss: Callable[[Any], Tensor]
    private_losses: str
    tokens: int


def _causal(model: nn.Module, tokens: Tensor) -> Step:
    def loss(output: Any) -> Tensor:
        logits = output.logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return Step(model.train(), {"input_ids": tokens}, loss, "causal_lm_losses", tokens.numel())


def _gpt2(batch: int, length: int, untied: bool, small: bool) -> Step:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 500} if small else {}
    config = GPT2Config(
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        use_cache=False,
        tie_word_embeddings=not untied,
        bos_token_id=0,
        eos_token_id=0,
        **sizes,
    )
    model = GPT2LMHeadModel(config)
    if untied:
        model.transformer.wpe.weight.requires_grad_(False)
    return _causal(model, torch.randint(0, config.vocab_size, (batch, length)))


def _lora(batch: int, length: int, untied: bool, small: bool) -> Step:
    from peft import LoraConfig, get_peft_model

    step = _gpt2(batch, length, untied=False, small=small)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["c_attn"], fan_in_fan_out=True)
    return _causal(get_peft_model(step.model, config), step.batch["input_ids"])


def _llama(batch: int, length: int, untied: bool, small: bool) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    wide |= {"intermediate_size": 1536, "vocab_size": 49152}
    narrow = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    narrow |= {"intermediate_size": 128, "vocab_size": 500}
    config = LlamaConfig(tie_word_embeddings=not untied, use_cache=False, **(narrow if small else wide))
    return _causal(LlamaForCausalLM(config), torch.randint(0, config.vocab_size, (batch, length)))


def _roberta(batch: int, length: int, untied: bool, small: bool) -> Step:
    return _classifier(batch, length, SMALL_CLASSIFIER if small else {})


def _roberta_large(batch: int, length: int, untied: bool, small: bool) -> Step:
    large = {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
    return _classifier(batch, length, SMALL_CLASSIFIER if small else large)


def _classifier(batch: int, length: int, sizes: dict[str, Any]) -> Step:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        **{"vocab_size": 50265, **sizes},
        max_position_embeddings=1026,
        type_vocab_size=1,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    tokens, labels = torch.randint(5, config.vocab_size, (batch, length)), torch.randint(0, 2, (batch,))
    return Step(
        RobertaForSequenceClassification(config).train(),
        {"input_ids": tokens, "labels": labels},
        lambda output: F.cross_entropy(output.logits.float(), labels),
        "classification_losses",
        tokens.numel(),
    )


MODELS: dict[str, tuple[str, Callable[[int, int, bool, bool], Step]]] = {
    "gpt2": ("GPT-2 124M, all parameters, head tied", _gpt2),
    "roberta": ("RoBERTa-base classifier, all parameters", _roberta),
    "roberta_large": ("RoBERTa-large classifier, all parameters", _roberta_large),
    "llama": ("Llama of SmolLM2-135M's shape, all parameters, head tied", _llama),
    "lora": ("GPT-2 124M, LoRA r=8 on c_attn", _lora),
}


def check(name: str) -> None:
    """Raises RuntimeError unless a small model's clipped sum is what one example at a time gives, half of them clipped."""
    import copy

    import fastclip
    from fastclip import huggingface

    torch.manual_seed(0)
    job = MODELS[name][1](4, 24, False, True)
    losses_of = getattr(huggingface, job.private_losses)
    twin, units = copy.deepcopy(job.model).double(), []
    for i in range(4):
        twin.zero_grad()
        losses_of(twin, {k: v[i : i + 1] for k, v in job.batch.items()}).sum().backward()
        units.append([p.grad.clone() for p in twin.parameters() if p.grad is not None])
    norms = torch.stack([torch.stack([g.norm() for g in unit]).norm() for unit in units])
    limit = float(norms.median()) * 1.0001
    fastclip.attach(job.model, max_grad_norm=limit)
    losses_of(job.model, job.batch).sum().backward()
    found = [p.grad for p in job.model.parameters() if p.grad is not None]
    wanted = [
        sum(g * min(1.0, limit / float(n)) for g, n in zip(gs, norms, strict=True)) for gs in zip(*units, strict=True)
    ]
    error = torch.stack([(f - w).norm() for f, w in zip(found, wanted, strict=True)]).norm()
    if not float(error) <= 1e-5 * float(torch.stack([w.norm() for w in wanted]).norm()):
        raise RuntimeError(f"{name}: the clipped sum is off by {float(error):.2g}: nothing is timed")
