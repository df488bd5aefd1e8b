"""DPTrainer: every step is one release of one draw, against the oracle; what it draws, logs and leaves behind."""

import dataclasses
import math

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from families import DECODER, GPT2, from_config, lora, next_token_loss, randomize, tokens
from oracle import assert_gradients, clipped_sum, collect, norm, norms, pick_clipping_norm, unit_gradients
from torch._dynamo.utils import counters
from transformers import TrainerCallback, TrainingArguments

from fastclip.accounting import get_epsilon
from fastclip.huggingface import DPTrainer, PrivacyArguments, causal_lm_losses

N, T = 14, 7
USERS = [0, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4, 5, 6]  # user 4 owns 5


def gpt2(**settings):
    return from_config("CausalLM", "gpt2", **(GPT2 | settings))


def texts(count=N):
    ids = tokens(count, T)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def sigma(value=0.0, **more):
    return PrivacyArguments(target_delta=1e-3, noise_multiplier=value, **more)


def make(tmp_path, privacy, *, model=None, data=None, loss_fn=None, kind=DPTrainer, others=(), **settings):
    """A trainer, and what it saw: indices drawn and p.grad at each optimizer step."""
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "optim": "sgd",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "remove_unused_columns": True,
    } | settings
    seen = Seen()
    trainer = kind(
        gpt2() if model is None else model,
        TrainingArguments(str(tmp_path / "run"), **settings),
        train_dataset=texts() if data is None else data,
        privacy_args=privacy,
        loss_fn=loss_fn,
        callbacks=[seen],
        **dict(others),
    )
    default = trainer.loss_fn

    def losses(model, batch):
        if trainer.loader is not None and torch.is_grad_enabled():
            seen.indices[-1] += [i for i in trainer.loader.current_indices if i not in seen.indices[-1]]
            seen.batches[-1].append(len(batch["input_ids"]))
        return default(model, batch)

    trainer.loss_fn = losses
    return trainer, seen


class Seen(TrainerCallback):
    def __init__(self):
        self.indices, self.batches, self.grads = [], [], []

    def on_step_begin(self, args, state, control, **others):
        self.indices.append([])
        self.batches.append([])

    def on_optimizer_step(self, args, state, control, model=None, **others):
        self.grads.append(collect(model))


def released(indices, units, max_grad_norm, batch_size):
    total = clipped_sum([units[i] for i in indices], max_grad_norm)
    return {name: g / batch_size for name, g in total.items()}


def whole(data):
    return {name: torch.stack([torch.as_tensor(e[name]) for e in data]) for name in ("input_ids", "labels")}


def check_against_oracle(tmp_path, model, tolerance=1e-5, **settings):
    units = unit_gradients(model, next_token_loss, whole(texts()))
    C = pick_clipping_norm(norms(units))
    trainer, seen = make(tmp_path, sigma(clipping_norm=C, privacy_seed=3), model=model, **settings)
    trainer.train()
    assert len(seen.grads) == 1 and len(seen.indices[0]) > 2 and max(seen.batches[0]) <= 2
    assert_gradients(seen.grads[0], released(seen.indices[0], units, C, 6), tolerance)
    return trainer


def test_a_step_is_the_clipped_mean_over_the_draw(tmp_path):
    check_against_oracle(tmp_path, gpt2())


def test_gradient_checkpointing_changes_nothing(tmp_path):
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    trainer = check_against_oracle(tmp_path, gpt2(), **{name: True, f"{name}_kwargs": {"use_reentrant": False}})
    assert getattr(trainer.model, f"is_{name}")


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # torch's own while it compiles
@pytest.mark.parametrize("lora_too", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_compiled_model_changes_nothing(tmp_path, lora_too):
    counters.clear()
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers how the process' first Trainer compiled
    model = lora("llama", DECODER, ["q_proj", "v_proj"])[0] if lora_too else gpt2()
    check_against_oracle(tmp_path, model, torch_compile=True, torch_compile_backend="aot_eager")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]


def test_lora_trains_the_adapter_alone(tmp_path):
    model = lora("llama", DECODER, ["q_proj", "v_proj"])[0]
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = check_against_oracle(tmp_path, model)
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)


def test_bf16_runs_in_autocast_and_sums_in_fp32(tmp_path):
    model, kinds = gpt2(), set()
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda m, a, out: kinds.add(out.dtype))
    check_against_oracle(tmp_path, model, tolerance=0.1, bf16=True)
    assert torch.bfloat16 in kinds and all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("table", [False, True])
def test_users_are_drawn_whole_and_clipped_as_one(tmp_path, table):
    data = [example | {"who": f"u{user}"} for example, user in zip(texts(), USERS, strict=True)]
    data = (
        Dataset.from_list([{k: v.tolist() if k != "who" else v for k, v in e.items()} for e in data]) if table else data
    )
    model = gpt2()
    rows = texts()
    units = unit_gradients(model, next_token_loss, whole(rows), USERS, "mean")
    # With nobody clipped the mean of a user's gradients shows, which clipping would hide.
    C = 10 * float(norms(units).max()) if table else pick_clipping_norm(norms(units))
    privacy = sigma(clipping_norm=C, user_column="who", privacy_seed=6)
    trainer, seen = make(tmp_path, privacy, model=model, data=data, gradient_accumulation_steps=2, max_steps=1)
    trainer.train()
    drawn = sorted({USERS[i] for i in seen.indices[0]})
    assert sorted(seen.indices[0]) == [i for i, user in enumerate(USERS) if user in drawn], "users come whole"
    assert 4 in drawn and max(seen.batches[0]) <= 2, "the largest user comes in parts"
    assert_gradients(seen.grads[0], released(drawn, units, C, 4))
    guarantee = trainer.guarantee()
    assert (guarantee.unit, guarantee.sample_rate, guarantee.examples_per_user) == ("user", 4 / 7, None)


def test_capped_examples_are_charged_together(tmp_path):
    data = [example | {"who": user} for example, user in zip(texts(), USERS, strict=True)]
    trainer, _ = make(tmp_path, sigma(2.0, user_column="who", examples_per_user=2), data=data, max_steps=3)
    trainer.train()
    kept = sum(min(2, USERS.count(user)) for user in set(USERS))
    q = 6 / kept
    assert trainer.guarantee().epsilon == get_epsilon(2.0, q, 3, 1e-3, examples_per_user=2, adjacency="zero-out")


def test_every_draw_is_one_step_also_an_empty_one(tmp_path):
    trainer, seen = make(
        tmp_path,
        sigma(1.0, privacy_seed=11),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=12,
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    moved = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **others):
            moved.append(any(not torch.equal(p, before[name]) for name, p in model.named_parameters()))
            before.update({name: p.detach().clone() for name, p in model.named_parameters()})

    trainer.add_callback(Watch())
    trainer.train()
    sizes = [len(indices) for indices in seen.indices]
    assert 0 in sizes and max(sizes) > 1, sizes
    assert trainer.ledger.steps == trainer.state.global_step == len(seen.grads) == 12
    assert moved == [True] * 12, "noise is released for an empty draw as well"


@pytest.mark.parametrize("workers", [0, 1])  # who fetch ahead, over the end of an epoch too
def test_epochs_give_the_number_of_steps(tmp_path, workers):
    trainer, _ = make(tmp_path, sigma(1.0), max_steps=-1, num_train_epochs=1.5, dataloader_num_workers=workers)
    trainer.train()
    assert trainer.ledger.steps == math.ceil(1.5 * N / 6) == trainer.state.global_step
    assert trainer.guarantee().sample_rate == 6 / N


def test_the_noise_is_calibrated_for_the_budget_and_the_whole_run(tmp_path):
    privacy = PrivacyArguments(target_delta=1e-3, target_epsilon=4.0)
    trainer, _ = make(tmp_path, privacy, max_steps=5)
    trainer.train()
    assert 3.99 < trainer.guarantee().epsilon <= 4.0
    epsilons = [logs["epsilon"] for logs in trainer.state.log_history]
    assert epsilons == sorted(epsilons) and epsilons[-1] == trainer.guarantee().epsilon


def test_logs_mark_the_loss_and_have_no_norm(tmp_path):
    trainer, _ = make(
        tmp_path, sigma(1.0), max_steps=2, eval_strategy="steps", eval_steps=1, others={"eval_dataset": texts(3)}
    )
    metrics = trainer.train().metrics
    names = set().union(*trainer.state.log_history, metrics)
    assert {"private_loss", "private_train_loss", "epsilon", "eval_loss"} <= names
    assert not {"loss", "train_loss", "grad_norm"} & names
    assert trainer.state.total_flos == 0


def test_the_evaluation_loss_does_not_depend_on_batches(tmp_path):
    data = texts(5)
    losses = []
    for size in (1, 2, 5):
        trainer, _ = make(
            tmp_path,
            sigma(1.0),
            per_device_eval_batch_size=size,
            others={"eval_dataset": data, "compute_metrics": shape},
        )
        metrics = trainer.evaluate()
        losses.append(metrics["eval_loss"])
        assert metrics["eval_rows"] == 5
    assert max(losses) - min(losses) < 1e-5


def shape(prediction):
    return {"rows": len(prediction.predictions)}


# Randomness


def test_trainer_seed_reaches_neither_draws_nor_noise_nor_dropout(tmp_path):
    states = []
    for name in ("a", "b"):
        trainer, seen = make(tmp_path / name, sigma(1.0), max_steps=6, seed=42, data_seed=42)
        trainer.train()
        states.append((seen.indices, trainer.model.transformer.wte.weight.clone(), torch.initial_seed()))
    assert states[0][0] != states[1][0] and not torch.equal(states[0][1], states[1][1])
    assert 42 not in (states[0][2], states[1][2]) and states[0][2] != states[1][2]
    assert not trainer.guarantee().voided


def test_a_privacy_seed_repeats_the_run_and_voids_the_epsilon(tmp_path):
    weights = []
    for name in ("a", "b"):
        trainer, _ = make(tmp_path / name, sigma(1.0, privacy_seed=7), max_steps=3)
        trainer.train()
        weights.append(trainer.model.transformer.wte.weight.clone())
        assert trainer.guarantee().voided and trainer.ledger.guarantee().voided
    assert torch.equal(*weights)


def test_a_cut_draw_is_charged_as_such(tmp_path):
    trainer, seen = make(tmp_path, sigma(1.0, max_batch=3), max_steps=4)
    trainer.train()
    assert max(len(indices) for indices in seen.indices) <= 3
    wanted = get_epsilon(1.0, 6 / N, 4, 1e-3, adjacency="zero-out", max_batch=3, num_units=N)
    assert trainer.guarantee().epsilon == wanted and trainer.guarantee().sampler == "truncated poisson"


def test_no_gradient_is_larger_than_what_the_units_may_bring(tmp_path):
    trainer, seen = make(tmp_path, sigma(clipping_norm=0.01), model=randomize(gpt2(), 3), max_steps=3, bf16=True)
    trainer.train()
    for indices, grads in zip(seen.indices, seen.grads, strict=True):
        assert norm(grads) <= 0.01 * len(indices) / 6 * (1 + 1e-5)


# After it


def test_the_model_is_its_own_again(tmp_path):
    trainer, _ = make(tmp_path, sigma(1.0))
    keys = list(trainer.model.state_dict())
    trainer.train()
    assert trainer.dp_optimizer is None and "forward" not in trainer.model.__dict__
    assert list(trainer.model.state_dict()) == keys
    causal_lm_losses(trainer.model, whole(texts(2))).sum().backward()
    assert all(p.grad is not None for p in trainer.model.parameters())


def test_the_card_states_the_guarantee_and_no_training_result(tmp_path):
    data = [example | {"who": user} for example, user in zip(texts(), USERS, strict=True)]
    privacy = PrivacyArguments(target_delta=1e-3, target_epsilon=5.0, user_column="who", clipping_norm=0.5)
    trainer, _ = make(
        tmp_path, privacy, data=data, gradient_accumulation_steps=1, max_steps=3, others={"eval_dataset": texts(3)}
    )
    trainer.train()
    result = trainer.evaluate()
    trainer.create_model_card(license="apache-2.0", tags="email")
    card = (tmp_path / "run" / "README.md").read_text()
    guarantee = trainer.guarantee()
    for part in (
        "one user",
        "0.001",
        "zero-out",
        "pld",
        f"{guarantee.noise_multiplier}",
        "| steps | 3 |",
        "0.5 (flat)",
    ):
        assert part in card, part
    assert f"q = {2 / 7}" in card and f"| eval_loss | {result['eval_loss']:.6g} |" in card and str(guarantee) in card
    assert "train_loss" not in card and "private_loss" not in card and "runtime" not in card
    assert 'license: "apache-2.0"' in card and '"email"' in card

    seeded, _ = make(tmp_path / "seeded", sigma(1.0, privacy_seed=1))
    seeded.train()
    seeded.create_model_card()
    assert "| epsilon | void" in (tmp_path / "seeded" / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    ("more", "public"),
    [
        ({}, "the number of examples"),
        ({"user_column": "who"}, "the number of users"),
        (
            {"user_column": "who", "examples_per_user": 2},
            "the number of users and that of the examples that are drawn from",
        ),
    ],
    ids=["examples", "users", "capped"],
)
@pytest.mark.parametrize(
    "counted", [{"max_steps": 1}, {"max_steps": -1, "num_train_epochs": 0.5}], ids=["steps", "epochs"]
)
def test_the_card_says_which_numbers_are_taken_as_public(tmp_path, more, public, counted):
    """The rate is computed from them, also where the number of steps is given."""
    data = [example | {"who": user} for example, user in zip(texts(), USERS, strict=True)]
    if not more:
        data = texts()
    trainer, _ = make(tmp_path, sigma(1.0, **more), data=data, **counted)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    computed = "sample_rate" if counted["max_steps"] > 0 else "sample_rate, steps"
    assert f"| taken as public | {public} |" in card and "| adjacency | zero-out |" in card
    assert f"Computed from {public}" in card and f": {computed}. " in card and "therefore treated as public" in card
    assert f"while the number of {trainer.privacy_args.unit}s is public" in card


def test_the_best_checkpoint_by_held_out_data_comes_back(tmp_path):
    settings = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    settings |= {"load_best_model_at_end": True, "learning_rate": 1.0, "dataloader_num_workers": 1}
    trainer, _ = make(tmp_path, sigma(20.0), others={"eval_dataset": texts(5)}, **settings)
    trainer.train()
    losses = [logs["eval_loss"] for logs in trainer.state.log_history if "eval_loss" in logs]
    assert len(losses) == 3 and trainer.state.best_metric == min(losses) == trainer.evaluate()["eval_loss"]
