"""The workloads of bench/opacus.py: models, batches and optimizers. Nothing here knows which library trains them.

Random weights and data, no dropout (the libraries would draw different masks), nothing is downloaded. `quick` sizes only
show that everything runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SEED = 0


@dataclass
class Job:
    """One model with its batch; `forward(model, inputs)` gives logits [B, classes] or [B, T, classes]."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: Tensor  # [B, ...]
    labels: Tensor  # [B] or [B, T]
    forward: Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Workload:
    """`build(quick, adapted, lstm)`: `lstm` is the class to use for recurrent layers.

    `adapted` says what is changed for Opacus where it refuses the model as it is; empty where nothing is. In `alone`
    workloads one process exists at a time, since several would not fit the memory; `rounds` of processes then do `steps`
    each. Otherwise all processes stay, and take turns of `steps` steps.
    """

    name: str
    what: str
    build: Callable[[bool, bool, Callable[..., nn.Module]], Job]
    rounds: int
    steps: int
    alone: bool = False
    adapted: str = ""
    # The non-private model has other parameters, so its gradients are no reference.
    plain_differs: str = ""


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def _call(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs)


def _cnn(quick: bool, adapted: bool, lstm: Callable[..., nn.Module]) -> Job:
    batch, wide = (16, 8) if quick else (256, 32)
    model = nn.Sequential(
        nn.Conv2d(1, wide // 2, 3, padding=1),
        nn.GroupNorm(4, wide // 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(wide // 2, wide, 3, padding=1),
        nn.GroupNorm(4, wide),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(wide * 7 * 7, 10),
    )
    return Job(model, _sgd(model), torch.randn(batch, 1, 28, 28), torch.randint(0, 10, (batch,)), _call)


def _mlp(quick: bool, adapted: bool, lstm: Callable[..., nn.Module]) -> Job:
    batch, width, hidden = (16, 64, 128) if quick else (512, 1024, 1024)
    model = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 10))
    return Job(model, _sgd(model), torch.randn(batch, width), torch.randint(0, 10, (batch,)), _call)


class _TextClassifier(nn.Module):
    def __init__(self, vocabulary: int, width: int, lstm: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = lstm(width, width, batch_first=True)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(tokens))  # [B, T, width]
        return self.head(states.mean(1))


def _lstm(quick: bool, adapted: bool, lstm: Callable[..., nn.Module]) -> Job:
    batch, length, width, vocabulary = (4, 8, 16, 100) if quick else (64, 64, 128, 10_000)
    model = _TextClassifier(vocabulary, width, lstm)
    tokens = torch.randint(0, vocabulary, (batch, length))
    return Job(model, _sgd(model), tokens, torch.randint(0, 2, (batch,)), _call)


def _roberta_model(quick: bool) -> tuple[nn.Module, Tensor, Tensor]:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    batch, length = (2, 16) if quick else (8, 64)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = RobertaConfig(
        vocab_size=500 if quick else 50265,
        max_position_embeddings=514,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
        **(sizes if quick else {}),
    )
    # From 3: below are the special tokens, and padding would make the units of different length.
    tokens = torch.randint(3, config.vocab_size, (batch, length))
    return RobertaForSequenceClassification(config).train(), tokens, torch.randint(0, 2, (batch,))


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens).logits


def _roberta(quick: bool, adapted: bool, lstm: Callable[..., nn.Module]) -> Job:
    model, tokens, labels = _roberta_model(quick)
    return Job(model, _adamw(model), tokens, labels, _logits)


def _lora(quick: bool, adapted: bool, lstm: Callable[..., nn.Module]) -> Job:
    from peft import LoraConfig, TaskType, get_peft_model

    base, tokens, labels = _roberta_model(quick)
    # With init_lora_weights B starts at zero, and every gradient of A would be zero in the comparison.
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=8, target_modules=["query", "value"], lora_dropout=0.0, init_lora_weights=False
    )
    model = get_peft_model(base, config).train()
    return Job(model, _adamw(model), tokens, labels, _logits)


def _gpt2(quick: bool, adapted: bool, lstm: Callable[..., nn.Module]) -> Job:
    from transformers import GPT2Config, GPT2LMHeadModel

    batch, length = (2, 16) if quick else (2, 128)
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4} if quick else {}
    config = GPT2Config(
        vocab_size=500 if quick else 50257,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        use_cache=False,
        tie_word_embeddings=not adapted,
        bos_token_id=0,
        eos_token_id=0,
        **sizes,
    )
    model = GPT2LMHeadModel(config).train()
    tokens = torch.randint(0, config.vocab_size, (batch, length))

    def forward(run: nn.Module, tokens: Tensor) -> Tensor:
        more = {}
        if adapted:
            # Copies, not expanded: Opacus' ghost mode takes a view of them.
            more["position_ids"] = torch.arange(length, device=tokens.device).repeat(len(tokens), 1)
        return run(input_ids=tokens, **more).logits[:, :-1]

    return Job(model, _adamw(model), tokens, tokens[:, 1:], forward)


def build(workload: Workload, quick: bool, adapted: bool, lstm: Callable[..., nn.Module], device: str) -> Job:
    """The same weights and batch each time for the same arguments."""
    torch.manual_seed(SEED)
    job = workload.build(quick, adapted, lstm)
    # In place: the optimizer holds the parameters.
    job.model.to(device)
    job.inputs, job.labels = job.inputs.to(device), job.labels.to(device)
    return job


WORKLOADS = {
    w.name: w
    for w in (
        Workload("cnn", "2 x (conv, group norm, pool), linear; batch 256 of 1 x 28 x 28; SGD", _cnn, 7, 3),
        Workload("mlp", "linear 1024-1024-10; batch 512; SGD", _mlp, 5, 1),
        Workload(
            "lstm",
            "embedding 10000 x 128, DPLSTM 128, linear; batch 64 x 64 tokens; SGD",
            _lstm,
            7,
            1,
            plain_differs="torch.nn.LSTM in place of DPLSTM",
        ),
        Workload("lora", "RoBERTa-base with LoRA r=8 on query and value; batch 8 x 64 tokens; AdamW", _lora, 4, 1),
        Workload(
            "roberta", "RoBERTa-base classifier, all parameters; batch 8 x 64 tokens; AdamW", _roberta, 2, 2, True
        ),
        Workload(
            "gpt2",
            "GPT-2 124M, all parameters; batch 2 x 128 tokens; AdamW",
            _gpt2,
            2,
            2,
            True,
            adapted="the head untied and position ids [B, T] passed in place of [1, T]",
        ),
    )
}
