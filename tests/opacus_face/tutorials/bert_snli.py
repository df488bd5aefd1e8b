"""Entailment between two sentences: BERT's last layer, its pooler and a classifier, trained for a given epsilon."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

VOCAB, LONGEST, LABELS, DELTA, MAX_GRAD_NORM = 50, 18, 3, 1e-3, 5.0
PAD, CLS, SEP = 0, 1, 2
Batch = dict[str, torch.Tensor]


def pairs(count: int, seed: int) -> list[Batch]:
    """Premise and hypothesis: one that repeats the premise, one of other words, and one of which half is the premise's."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        label = i % LABELS
        premise, other = (torch.randint(3, VOCAB, (7,), generator=rng)[: 3 + (i + j) % 5] for j in range(2))
        hypothesis = [premise, torch.cat([premise[:2], other[2:]]), other][label]
        one, two = [CLS, *premise.tolist(), SEP], [*hypothesis.tolist(), SEP]
        rest = [0] * (LONGEST - len(one) - len(two))
        example = {
            "input_ids": one + two + rest,
            "token_type_ids": [0] * len(one) + [1] * len(two) + rest,
            "attention_mask": [1] * (len(one) + len(two)) + rest,
            "labels": label,
        }
        found.append({name: torch.tensor(value) for name, value in example.items()})
    return found


def make_model(opacus: Any, seed: int, trainable: str = "last", dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=LONGEST,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=LABELS,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    model = BertForSequenceClassification(config)
    if trainable == "last":
        model.requires_grad_(False)
        for part in (model.bert.encoder.layer[-1], model.bert.pooler, model.classifier):
            part.requires_grad_(True)
    return model.train()


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)


def make_loader(seed: int) -> DataLoader[Any]:
    rng = torch.Generator().manual_seed(seed)
    return DataLoader(pairs(48, seed), batch_size=12, generator=rng)


def run(
    opacus: Any,
    *,
    noise_multiplier: float | None,
    seed: int,
    epochs: int = 2,
    target_epsilon: float = 6.0,
    max_physical_batch_size: int = 7,
    accountant: str = "rdp",
    **architecture: Any,
) -> dict[str, Any]:
    """`noise_multiplier` None: what the target asks for."""
    memory = import_module(f"{opacus.__name__}.utils.batch_memory_manager")
    model: Any = make_model(opacus, seed, **architecture)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    initial = {name: p.detach().clone() for name, p in parameters.items()}
    engine = opacus.PrivacyEngine(accountant=accountant)
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=make_optimizer(model),
        data_loader=make_loader(seed),
        target_epsilon=target_epsilon,
        target_delta=DELTA,
        epochs=epochs,
        max_grad_norm=MAX_GRAD_NORM,
    )
    sigma = optimizer.noise_multiplier
    if noise_multiplier is not None:
        optimizer.noise_multiplier = noise_multiplier

    losses = []
    for _ in range(epochs):
        with memory.BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=max_physical_batch_size, optimizer=optimizer
        ) as batches:
            for batch in batches:
                optimizer.zero_grad()
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    return {
        "losses": losses,
        "sigma": sigma,
        "epsilon": engine.get_epsilon(DELTA) if optimizer.noise_multiplier else float("inf"),
        "initial": initial,
        "parameters": {name: p.detach().clone() for name, p in parameters.items()},
    }
