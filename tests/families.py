"""Model families at toy size, each with a batch and a per-example loss: what the engine must get right.

Every loss is one value an example, [B], formed from that example's own logits; a model's built-in loss averages over
the tokens of the whole batch and would tie the units together. Dropout is 0 and models are in train mode. B = 5 and
T = 7 differ, except in the cases tagged "square", so that no dimension can be taken for another by its size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from oracle import Batch, LossFn
from torch import nn
from torch.nn.functional import cross_entropy

B, T, VOCAB = 5, 7, 83
USERS = [7, 3, 7, 9, 3]
LENGTHS = [7, 4, 6, 3, 5]
IGNORED = -100

Case = tuple[nn.Module, Batch, LossFn]


@dataclass(frozen=True)
class Family:
    """`build()` gives the same model, batch and loss function at every call.

    The loss is one value an example whatever the tags; they say what it is made of. "tokens": mean cross-entropy over
    the example's labelled tokens, those at padding or with the label -100 left out. "label": cross-entropy of one label
    an example. "output": a weighted sum over the example's outputs. "float": the batch holds a floating tensor.
    "square": B equals T. "shared": a parameter is used more than once. "loop": has a module without a layer rule whose
    parameters no copy can stand for, which is run example by example with a warning. `users` names each example's user.
    """

    name: str
    build: Callable[[], Case]
    tags: frozenset[str]
    users: tuple[int, ...] = tuple(USERS)


FAMILIES: dict[str, Family] = {}


def family(name: str, *tags: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Register a build function."""

    def register(build: Callable[[], Case]) -> Callable[[], Case]:
        assert name not in FAMILIES, name
        FAMILIES[name] = Family(name, build, frozenset(tags))
        return build

    return register


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that attention, gains and biases all matter to the loss (0.02 leaves them idle)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=generator)
            if p.dim() > 1:
                p.copy_(0.25 * draw)
            else:
                p.copy_(0.2 * draw + (0.0 if "bias" in name else 1.0))
    return model.train()


def tokens(*shape: int, seed: int = 1, low: int = 3) -> torch.Tensor:
    """Token ids, some of them repeated; those below `low` are special (padding) in some models."""
    return torch.randint(low, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def mask() -> torch.Tensor:
    """[B, T] attention mask of a right-padded batch."""
    return (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)


def _logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


def next_token_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return token_losses(_logits(model, batch)[:, :-1], batch["labels"][:, 1:])


def same_token_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return token_losses(_logits(model, batch), batch["labels"])


def label_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return cross_entropy(_logits(model, batch), batch["labels"], reduction="none")


def from_config(task: str, kind: str, **settings: object) -> nn.Module:
    """A transformers model of this kind, random weights, dropout off under whatever name the family gives it."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, **settings)
    for name in list(config.to_dict()):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"AutoModelFor{task}").from_config(config)
    return randomize(model)


GPT2 = {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16, "use_cache": False}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2}
ENCODER = WIDTHS | {"num_attention_heads": 4, "max_position_embeddings": 16}
DECODER = ENCODER | {"num_key_value_heads": 4, "use_cache": False}
CAUSAL: dict[str, tuple[str, dict[str, object]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2_untied": ("gpt2", GPT2 | {"tie_word_embeddings": False}),
    "llama": ("llama", DECODER),
    "llama_tied": ("llama", DECODER | {"tie_word_embeddings": True}),
    "llama_grouped_query": ("llama", DECODER | {"num_key_value_heads": 2, "attention_bias": True}),
    "qwen2": ("qwen2", DECODER | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": ("mistral", DECODER | {"num_key_value_heads": 2, "sliding_window": 4}),
    "gemma2": ("gemma2", DECODER | {"num_key_value_heads": 2, "head_dim": 6, "sliding_window": 4}),
    "gpt_neox": ("gpt_neox", ENCODER | {"use_cache": False}),
    "opt": (
        "opt",
        DECODER | {"ffn_dim": 37, "word_embed_proj_dim": 24, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2},
    ),
}
SHARED = {"gpt2", "llama_tied", "qwen2", "gemma2", "opt"}


def causal(kind: str, settings: dict[str, object], padded: bool = False, length: int = T) -> Case:
    model = from_config("CausalLM", kind, **settings)
    ids = tokens(B, length)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if padded:
        batch["attention_mask"] = mask()
        batch["labels"][mask() == 0] = IGNORED
    return model, batch, next_token_loss


for _name, (_kind, _settings) in CAUSAL.items():
    family(_name, "tokens", *(["shared"] if _name in SHARED else []))(
        lambda kind=_kind, settings=_settings: causal(kind, settings)
    )
family("gpt2_padded", "tokens", "shared")(lambda: causal("gpt2", GPT2, padded=True))
family("llama_padded", "tokens")(lambda: causal("llama", DECODER, padded=True))
family("gpt2_square", "tokens", "shared", "square")(lambda: causal("gpt2", GPT2, length=B))


@family("llama_given_positions", "tokens")
def llama_given_positions() -> Case:
    """The batch's first tensor is [1, T], broadcast over the batch."""
    model, batch, loss = causal("llama", DECODER)
    return model, {"position_ids": torch.arange(T)[None] + 2} | batch, loss


@family("gpt2_inputs_embeds", "tokens", "float")
def gpt2_inputs_embeds() -> Case:
    """Vectors instead of ids: the tied table works as the head alone."""
    model, batch, loss = causal("gpt2", GPT2)
    vectors = torch.randn(B, T, 24, generator=torch.Generator().manual_seed(3))
    return model, {"inputs_embeds": vectors, "labels": batch["labels"]}, loss


@family("gpt2_half_frozen", "tokens", "shared")
def gpt2_half_frozen() -> Case:
    """A whole block frozen below trainable embeddings, and layers of which only the weight or only the bias trains."""
    model, batch, loss = causal("gpt2", GPT2)
    for name, p in model.named_parameters():
        p.requires_grad_(not (".h.0." in name or (".h.1.mlp" in name and "bias" in name) or "ln_f.weight" in name))
    return model, batch, loss


@family("gpt2_head_frozen", "tokens")
def gpt2_head_frozen() -> Case:
    """The tied table frozen: nothing below the first block trains, and the head passes gradients through."""
    model, batch, loss = causal("gpt2", GPT2)
    for name, p in model.named_parameters():
        p.requires_grad_("wte" not in name and "wpe" not in name)
    return model, batch, loss


def checkpoint(model: nn.Module, reentrant: bool) -> None:
    new = hasattr(model, "activation_checkpointing_enable")
    if (
        not new
    ):  # transformers 4 has the older name alone, and leaves it to its user that there are gradients at the input
        model.enable_input_require_grads()
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": reentrant}})


def _checkpointed(kind: str, settings: dict[str, object], reentrant: bool) -> Case:
    model, batch, loss = causal(kind, settings, padded=True)
    checkpoint(model, reentrant)
    return model, batch, loss


family("gpt2_checkpoint_reentrant", "tokens", "shared")(lambda: _checkpointed("gpt2", GPT2, True))
family("gpt2_checkpoint", "tokens", "shared")(lambda: _checkpointed("gpt2", GPT2, False))
family("llama_checkpoint_reentrant", "tokens")(lambda: _checkpointed("llama", DECODER, True))
family("llama_checkpoint", "tokens")(lambda: _checkpointed("llama", DECODER, False))


def classifier(kind: str, settings: dict[str, object], padding: int) -> Case:
    model = from_config("SequenceClassification", kind, num_labels=3, **settings)
    ids = tokens(B, T).masked_fill(mask() == 0, padding)
    return model, {"input_ids": ids, "attention_mask": mask(), "labels": torch.tensor([0, 2, 1, 1, 0])}, label_loss


def masked(kind: str, settings: dict[str, object], padding: int) -> Case:
    model = from_config("MaskedLM", kind, **settings)
    labels = tokens(B, T, seed=2)
    labels[(torch.arange(B * T).view(B, T) % 3 == 1) | (mask() == 0)] = IGNORED
    ids = tokens(B, T).masked_fill(mask() == 0, padding)
    return model, {"input_ids": ids, "attention_mask": mask(), "labels": labels}, same_token_loss


BERT = ENCODER | {"type_vocab_size": 2, "pad_token_id": 0}
ROBERTA = ENCODER | {"type_vocab_size": 1, "pad_token_id": 1}
DISTILBERT = {"vocab_size": VOCAB, "dim": 24, "hidden_dim": 37, "n_layers": 2, "n_heads": 4}
DISTILBERT |= {"max_position_embeddings": 16, "pad_token_id": 0}
MODERNBERT = ENCODER | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
MODERNBERT |= {"local_attention": 4, "global_attn_every_n_layers": 2}
ALBERT = ENCODER | {"embedding_size": 10, "num_hidden_layers": 3, "type_vocab_size": 2, "pad_token_id": 0}

family("roberta_classifier", "label")(lambda: classifier("roberta", ROBERTA, 1))
family("roberta_mlm", "tokens", "shared")(lambda: masked("roberta", ROBERTA, 1))
family("bert_mlm", "tokens", "shared")(lambda: masked("bert", BERT, 0))
family("bert_classifier", "label")(lambda: classifier("bert", BERT, 0))
family("distilbert_classifier", "label")(lambda: classifier("distilbert", DISTILBERT, 0))
family("distilbert_mlm", "tokens", "shared")(lambda: masked("distilbert", DISTILBERT, 0))
family("modernbert_mlm", "tokens", "shared")(lambda: masked("modernbert", MODERNBERT, 0))
family("albert_mlm", "tokens", "shared")(lambda: masked("albert", ALBERT, 0))
family("albert_classifier", "label", "shared")(lambda: classifier("albert", ALBERT, 0))


@family("t5", "tokens", "shared")
def t5() -> Case:
    """One table for encoder, decoder and head; a relative position bias that has no unit dimension."""
    settings = {"vocab_size": VOCAB, "d_model": 24, "d_kv": 6, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    settings |= {"relative_attention_num_buckets": 8, "pad_token_id": 0, "decoder_start_token_id": 0}
    model = from_config("Seq2SeqLM", "t5", use_cache=False, **settings)
    labels = tokens(B, 4, seed=2)
    decoder = torch.cat([torch.zeros(B, 1, dtype=torch.long), labels[:, :-1]], 1)
    labels[1, 2:] = IGNORED
    ids = tokens(B, T).masked_fill(mask() == 0, 0)
    batch = {"input_ids": ids, "attention_mask": mask(), "decoder_input_ids": decoder, "labels": labels}
    return model, batch, same_token_loss


@family("vit", "label", "float")
def vit() -> Case:
    """Patches through a convolution, a cls token and added positions as bare parameters."""
    settings = {name: value for name, value in ENCODER.items() if name not in ("vocab_size", "max_position_embeddings")}
    model = from_config("ImageClassification", "vit", image_size=12, patch_size=4, num_labels=3, **settings)
    pixels = torch.randn(B, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return model, {"pixel_values": pixels, "labels": torch.tensor([0, 2, 1, 1, 0])}, label_loss


def lora(kind: str, settings: dict[str, object], targets: list[str], base_trains: bool = False) -> Case:
    from peft import LoraConfig, get_peft_model

    model, batch, loss = causal(kind, settings, padded=True)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, fan_in_fan_out=kind == "gpt2", lora_dropout=0.0)
    model = get_peft_model(model, config)
    if base_trains:
        model.requires_grad_(True)
    return randomize(model), batch, loss


family("lora_gpt2", "tokens", "lora")(lambda: lora("gpt2", GPT2, ["c_attn", "c_fc"]))
family("lora_gpt2_base_trains", "tokens", "lora", "shared")(lambda: lora("gpt2", GPT2, ["c_attn"], base_trains=True))
family("lora_llama", "tokens", "lora")(lambda: lora("llama", DECODER, ["q_proj", "v_proj", "down_proj"]))


@family("lora_llama_checkpoint_reentrant", "tokens", "lora")
def lora_llama_checkpoint_reentrant() -> Case:
    model, batch, loss = lora("llama", DECODER, ["q_proj", "v_proj"])
    checkpoint(model, reentrant=True)
    return model, batch, loss
