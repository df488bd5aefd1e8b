"""Adapters on a frozen transformer: LoRA from peft and a classifier, with hooks or ghost clipping."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2ForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

VOCAB, LONGEST, LABELS, PAD, DELTA, MAX_GRAD_NORM = 40, 9, 2, 1, 1e-3, 1.2
Batch = dict[str, torch.Tensor]


def sentences(count: int, seed: int) -> list[Batch]:
    """Words of the label's half of the vocabulary come more often; padded on the right."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        label, length = i % LABELS, int(torch.randint(3, LONGEST + 1, (), generator=rng))
        weights = torch.ones(VOCAB - 2)
        weights[label::LABELS] = 3.0
        ids = torch.full((LONGEST,), PAD)
        ids[:length] = 2 + torch.multinomial(weights, length, replacement=True, generator=rng)
        mask = (torch.arange(LONGEST) < length).long()
        found.append({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(label)})
    return found


def base_model(base: str) -> tuple[nn.Module, list[str]]:
    """A model with random weights, and the layers that get adapters."""
    if base == "roberta":
        roberta = RobertaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=LONGEST + 2,
            pad_token_id=PAD,
            num_labels=LABELS,
            initializer_range=0.3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return RobertaForSequenceClassification(roberta), ["query", "value"]
    gpt2 = GPT2Config(
        vocab_size=VOCAB,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=LONGEST,
        pad_token_id=PAD,
        bos_token_id=0,
        eos_token_id=0,
        num_labels=LABELS,
        initializer_range=0.3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2ForSequenceClassification(gpt2), ["c_attn"]


def make_model(opacus: Any, seed: int, base: str = "roberta", dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    model, targets = base_model(base)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=3,
        lora_alpha=6,
        lora_dropout=dropout,
        target_modules=targets,
        fan_in_fan_out=base == "gpt2",
    )
    return get_peft_model(model, config).train()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)


def make_loader(seed: int) -> DataLoader[Any]:
    rng = torch.Generator().manual_seed(seed)
    return DataLoader(sentences(40, seed), batch_size=8, generator=rng)


def run(
    opacus: Any,
    *,
    noise_multiplier: float,
    seed: int,
    epochs: int = 1,
    grad_sample_mode: str = "hooks",
    accountant: str = "rdp",
    **architecture: Any,
) -> dict[str, Any]:
    model: Any = make_model(opacus, seed, **architecture)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    initial = {name: p.detach().clone() for name, p in parameters.items()}
    engine = opacus.PrivacyEngine(accountant=accountant)
    made = engine.make_private(
        module=model,
        optimizer=make_optimizer(model),
        criterion=nn.CrossEntropyLoss(),
        data_loader=make_loader(seed),
        noise_multiplier=noise_multiplier,
        max_grad_norm=MAX_GRAD_NORM,
        grad_sample_mode=grad_sample_mode,
    )
    model, optimizer, loader = made[0], made[1], made[-1]
    criterion = made[2] if grad_sample_mode == "ghost" else nn.CrossEntropyLoss()

    losses = []
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = criterion(logits, batch["labels"])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return {
        "losses": losses,
        "epsilon": engine.get_epsilon(DELTA) if noise_multiplier else math.inf,
        "initial": initial,
        "parameters": {name: p.detach().clone() for name, p in parameters.items()},
    }
