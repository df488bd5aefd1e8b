"""Whole steps of Hugging Face models, and whether the host waits for the device in one; for bench/gpu.py.

Random weights from a config, no dropout, bf16 autocast, fp32 parameters, torch.optim.AdamW as people construct it. "plain" is
the loss that transformers computes from labels; "ours" the losses of fastclip.huggingface; "ghost" Opacus' ghost clipping, with
the heads untied and GPT-2's position embedding frozen, since Opacus refuses the models as they are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_bench import Bench, installed, said, stack
from torch import Tensor, nn

TOKENS = 8192  # a step
MODES = ("plain", "ours", "ghost")
TRIES = 4  # at the largest batch
SYNC = "synchronizing CUDA operation"
Step = Callable[[int], None]


@dataclass(frozen=True)
class Model:
    build: Callable[[bool, bool, int], nn.Module]  # (dry, for Opacus, T)
    lengths: tuple[int, ...]
    causal: bool = True
    lora: bool = False


def _gpt2(width: int, layers: int, heads: int) -> Callable[[bool, bool, int], nn.Module]:
    def build(dry: bool, opacus: bool, length: int) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = (
            {"n_embd": 32, "n_layer": 1, "n_head": 2} if dry else {"n_embd": width, "n_layer": layers, "n_head": heads}
        )
        words = 97 if dry else 50257
        sizes |= {"vocab_size": words, "bos_token_id": words - 1, "eos_token_id": words - 1}
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(use_cache=False, tie_word_embeddings=not opacus, **drop, **sizes))
        model.transformer.wpe.weight.requires_grad_(not opacus)
        return model

    return build


def _roberta(dry: bool, opacus: bool, length: int) -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    toy = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    sizes = {
        "vocab_size": 97 if dry else 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        **(toy if dry else large),
    }
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return RobertaForSequenceClassification(RobertaConfig(num_labels=2, **drop, **sizes))


def _llama(lora: bool) -> Callable[[bool, bool, int], nn.Module]:
    def build(dry: bool, opacus: bool, length: int) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        full = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
        toy = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        sizes = {"vocab_size": 97 if dry else 128256, "num_key_value_heads": 2 if dry else 8, **(toy if dry else full)}
        more = {"max_position_embeddings": 4096, "use_cache": False, "tie_word_embeddings": not opacus}
        model = LlamaForCausalLM(LlamaConfig(bos_token_id=0, eos_token_id=0, **sizes, **more))
        if not lora:
            return model
        from peft import LoraConfig, get_peft_model

        # With peft's own start B is zero, and so is every gradient of A.
        where = ["q_proj", "k_proj", "v_proj", "o_proj"]
        config = LoraConfig(
            task_type="CAUSAL_LM", r=16, target_modules=where, lora_dropout=0.0, init_lora_weights=False
        )
        return get_peft_model(model, config)

    return build


MODELS = {
    "GPT-2 124M": Model(_gpt2(768, 12, 12), (1024, 512, 128)),
    "Llama 1B, LoRA": Model(_llama(True), (1024, 4096, 512, 128), lora=True),
    "Llama 1B": Model(_llama(False), (1024, 4096, 512, 128)),
    "RoBERTa-large": Model(_roberta, (512, 128), causal=False),
    "GPT-2 355M": Model(_gpt2(1024, 24, 16), (1024, 512, 128)),
}


def names(bench: Bench) -> list[str]:
    """Each model's first length before all others: a time limit cuts the end off."""
    most = 1 if bench.dry or bench.quick else max(len(m.lengths) for m in MODELS.values())
    chosen = list(MODELS)[:1] if bench.dry else list(MODELS)[:3] if bench.quick else list(MODELS)
    return [f"{x}, T {MODELS[x].lengths[i]}" for i in range(most) for x in chosen if i < len(MODELS[x].lengths)]


def measure(bench: Bench, name: str) -> dict[str, Any]:
    """{"batch", mode: {"ms", "peak_bytes", "largest_batch"} or {"error"} or {"absent"}}."""
    model, length = _model(name)
    found: dict[str, Any] = {"batch": _batch(bench, length), "length": length, "dtype": "bf16 autocast"}
    for mode in MODES:
        if absent := _absent(model, mode):
            found[mode] = {"absent": absent}
            continue
        try:
            found[mode] = _of_mode(bench, model, mode, length)
        except Exception as error:
            found[mode] = {"error": said(error), "stack": stack(error)[-6:]}
        bench.free()
    return found


def _of_mode(bench: Bench, model: Model, mode: str, length: int) -> dict[str, Any]:
    batch = _batch(bench, length)
    step = stepper(bench, model, mode, length)
    for _ in range(1 if bench.dry else 3):  # optimizer state, the trial of the layout, compiling
        step(batch)
    resting = 0 if bench.dry else torch.cuda.memory_allocated()
    found = bench.time_steps(lambda: step(batch), 5 if bench.quick else 9)
    if mode == "ghost" or bench.quick or length != model.lengths[0]:  # each largest batch takes seconds
        return found
    whole = 0 if bench.dry else torch.cuda.get_device_properties(0).total_memory
    guess = 4 if bench.dry else int(0.95 * (whole - resting) / max(1, (found["peak_bytes"] - resting) / batch))

    def fits(size: int) -> bool:
        if bench.dry:
            return size <= 5
        try:
            step(size)
            step(size)
            bench.wait()
            ran = True
        except torch.OutOfMemoryError:
            ran = False
        bench.free()  # when nothing holds the frames of what ran out
        return ran

    try:
        ran, failed = largest(fits, batch, guess)
    except Exception as error:  # the times stand
        return found | {"largest_batch_error": said(error)}
    return found | {"largest_batch": ran, "smallest_that_failed": failed}


def largest(fits: Callable[[int], bool], known: int, guess: int) -> tuple[int, int | None]:
    """(the largest batch that ran, the smallest that did not), from one that is known to and a guess, in TRIES runs."""
    ran, failed = known, None
    size = max(guess, known + 1)
    for _ in range(TRIES):
        if fits(size):
            ran = size
        else:
            failed = size
        if failed is None:
            size = math.ceil(1.1 * ran)
        elif failed - ran <= max(1, ran // 16):
            break
        else:
            size = (ran + failed) // 2 if ran > known else max(known + 1, int(0.93 * failed))
    return ran, failed


def sync_names(bench: Bench) -> list[str]:
    chosen = ["GPT-2 124M"] if bench.dry or bench.quick else ["GPT-2 124M", "Llama 1B, LoRA", "RoBERTa-large"]
    return [f"{x}, T {MODELS[x].lengths[0]}, {mode}" for x in chosen for mode in ("ours", "plain")]


def sync_measure(bench: Bench, name: str) -> dict[str, Any]:
    """{"syncs": of a step, "first": where the first stands or None}."""
    rest, mode = name.rsplit(", ", 1)
    model, length = _model(rest)
    if absent := _absent(model, mode):
        return {"absent": absent}
    batch = _batch(bench, length)
    step = stepper(bench, model, mode, length)
    for _ in range(1 if bench.dry else 3):
        step(batch)
    bench.wait()
    return find_syncs(bench, lambda: step(batch))


def find_syncs(bench: Bench, step: Callable[[], None]) -> dict[str, Any]:
    """A finding in place of a crash: the step that is stopped at its first sync comes last."""
    with warnings.catch_warnings(record=True) as heard, bench.sync_mode("warn"):
        warnings.simplefilter("always")
        step()
    syncs = sum(SYNC in str(x.message) for x in heard)
    first = None
    try:
        with bench.sync_mode("error"):
            step()
    except Exception as error:
        if SYNC not in str(error):
            raise
        first = stack(error)
    return {"syncs": syncs, "first": first}


def stepper(bench: Bench, model: Model, mode: str, length: int) -> Step:
    """step(batch size) of a new model."""
    torch.manual_seed(0)
    with bench.device:
        net = model.build(bench.dry, mode == "ghost", length).train()
    optimizer: Any = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    words, first = net.config.vocab_size, _batch(bench, length)
    loss_of: Callable[[dict[str, Tensor]], Tensor] = lambda batch: net(**batch).loss  # noqa: E731
    if mode == "ours":
        loss_of, optimizer = _private(net, optimizer, model.causal, first)
    elif mode == "ghost":
        loss_of, optimizer = _ghost(net, optimizer, model.causal, first)

    def step(size: int) -> None:
        # Ids from 3 on: below are special tokens.
        tokens = torch.randint(3, words, (size, bench.size(length)), device=bench.device)
        labels = tokens if model.causal else torch.arange(size, device=bench.device) % 2
        try:
            with torch.autocast(bench.device.type, torch.bfloat16):
                loss = loss_of({"input_ids": tokens, "labels": labels})
            loss.backward()
            optimizer.step()
        finally:
            optimizer.zero_grad()  # after running out of memory too

    return step


def _private(net: nn.Module, optimizer: Any, causal: bool, batch: int) -> tuple[Callable[..., Tensor], Any]:
    import fastclip
    from fastclip.huggingface import causal_lm_losses, classification_losses

    losses = causal_lm_losses if causal else classification_losses
    private = fastclip.DPOptimizer(
        optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=batch, module=net
    )
    return (lambda inputs: losses(net, inputs).mean()), private


def _ghost(net: nn.Module, optimizer: Any, causal: bool, batch: int) -> tuple[Callable[..., Tensor], Any]:
    import opacus

    made = opacus.PrivacyEngine().make_private(
        module=net,
        optimizer=optimizer,
        data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(batch)), batch_size=batch),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode="ghost",
        criterion=nn.CrossEntropyLoss(reduction="mean"),
    )
    run, private, criterion = made[0], made[1], made[2]

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        logits, labels = run(input_ids=batch["input_ids"]).logits, batch["labels"]
        if not causal:
            return criterion(logits, labels)
        logits = logits[:, :-1]
        return criterion(logits.flatten(0, 1), labels[:, 1:].flatten(), shape=logits.shape)

    return loss_of, private


def _absent(model: Model, mode: str) -> str:
    if model.lora and not installed("peft"):
        return "peft is not installed"
    return "opacus is not installed" if mode == "ghost" and not installed("opacus") else ""


def _batch(bench: Bench, length: int) -> int:
    return 3 if bench.dry else max(1, TOKENS // length)


def _model(name: str) -> tuple[Model, int]:
    model, length = name.rsplit(", T ", 1)
    return MODELS[model], int(length)
