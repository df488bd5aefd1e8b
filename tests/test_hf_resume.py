"""Runs that go on, and what is in the ledger: epsilon never falls, draws are fresh, terms stay; a Trainer of one's own."""

import json

import pytest
import torch
from families import DECODER, from_config
from test_hf_trainer import N, gpt2, make, sigma, texts
from transformers import Trainer, TrainerCallback, TrainingArguments

import fastclip
from fastclip.accounting import Ledger, get_epsilon
from fastclip.huggingface import PrivacyArguments, PrivacyCallback, causal_lm_losses


def interrupted(tmp_path, privacy, steps=6, at=3, **settings):
    """A run that fails in step at + 1; its checkpoint is of step `at`."""

    class Crash(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **others):
            if state.global_step == at:
                raise KeyboardInterrupt

    settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": at, "optim": "adamw_torch"} | settings
    trainer, _ = make(tmp_path, privacy, **settings)
    trainer.add_callback(Crash())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer, settings


def test_resume_restores_weights_and_optimizer_and_goes_on_spending(tmp_path):
    first, settings = interrupted(tmp_path, sigma(1.0))
    assert first.ledger.steps == 4, "the step that was lost is spent"
    folder = tmp_path / "run" / "checkpoint-3"
    assert not list(folder.glob("rng_state*")) and not list(folder.glob("scaler*"))
    spent = first.ledger.epsilon()
    second, seen = make(tmp_path, sigma(1.0), **settings)
    found = {}

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **others):
            found["weights"] = {name: p.detach().clone() for name, p in model.named_parameters()}
            found["steps"] = {int(s["step"]) for s in optimizer.state_dict()["state"].values()}
            found["schedule"], found["at"] = lr_scheduler.last_epoch, state.global_step
            assert second.loader.steps == 3, "as many draws as there are steps left"

    second.add_callback(Look())
    second.train(resume_from_checkpoint=True)
    from safetensors.torch import load_file

    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(found["weights"][name], value) for name, value in saved.items())
    assert (found["steps"], found["schedule"], found["at"]) == ({3}, 3, 3)
    assert second.state.global_step == 6 and second.ledger.steps == 7 and len(seen.grads) == 3
    assert second.guarantee().epsilon > spent
    assert second.state.log_history[-1]["epsilon"] == get_epsilon(1.0, 6 / N, 7, 1e-3)


def test_a_run_that_stopped_within_an_epoch_skips_no_draw(tmp_path):
    _, settings = interrupted(tmp_path, sigma(1.0), steps=4, at=2)  # of three draws an epoch
    second, seen = make(tmp_path, sigma(1.0), **settings)
    assert second.train(resume_from_checkpoint=True).global_step == 4
    assert len(seen.grads) == 2 and second.ledger.steps == 5


def test_the_budget_ends_a_resumed_run_early_and_cleanly(tmp_path):
    privacy = PrivacyArguments(target_delta=1e-3, target_epsilon=3.0)
    _, settings = interrupted(tmp_path, privacy)
    second, seen = make(tmp_path, privacy, **settings)
    result = second.train(resume_from_checkpoint=True)
    assert result.global_step == 5 and second.ledger.steps == 6 and len(seen.grads) == 2
    assert 2.9 < second.guarantee().epsilon <= 3.0
    third, seen = make(tmp_path, privacy, **settings)
    assert third.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3")).global_step == 3
    assert not seen.grads and third.ledger.steps == 6


@pytest.mark.parametrize(
    "change",
    [
        {"privacy": sigma(1.5)},
        {"privacy": sigma(1.0, clipping_norm=2.0)},
        {"privacy": sigma(1.0, clipping="automatic")},
        {"gradient_accumulation_steps": 2},
        {"data": texts(N + 1)},
    ],
    ids=["sigma", "C", "clipping", "q", "data"],
)
def test_a_checkpoint_of_other_terms_is_refused_and_nothing_is_spent(tmp_path, change):
    _, settings = interrupted(tmp_path, sigma(1.0))
    before = (tmp_path / "run" / "ledger.jsonl").read_bytes()
    change = dict(change)
    other, _ = make(tmp_path, change.pop("privacy", sigma(1.0)), **settings | change)
    with pytest.raises(ValueError, match="was written with"):
        other.train(resume_from_checkpoint=True)
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == before


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    _, settings = interrupted(tmp_path, sigma(1.0))
    run = tmp_path / "run"
    again, _ = make(tmp_path, sigma(1.0), **settings)
    with pytest.raises(ValueError, match="holds the ledger of an earlier run"):
        again.train()
    elsewhere, _ = make(tmp_path / "other", sigma(1.0), **settings)
    with pytest.raises(ValueError, match="no checkpoint in output_dir"):
        elsewhere.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    terms = (run / "checkpoint-3" / "privacy.json").read_text()
    (run / "checkpoint-3" / "privacy.json").unlink()
    with pytest.raises(ValueError, match="cut short"):
        again.train(resume_from_checkpoint=True)
    (run / "checkpoint-3" / "privacy.json").write_text(terms)
    lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    (run / "ledger.jsonl").write_text("".join(lines[:3]))  # two steps
    with pytest.raises(ValueError, match="fewer than the checkpoint's 3"):
        again.train(resume_from_checkpoint=True)
    (run / "ledger.jsonl").unlink()
    with pytest.raises(ValueError, match="what was spent is not known"):
        again.train(resume_from_checkpoint=True)
    (run / "ledger.jsonl").write_text("".join(lines))
    other, _ = make(tmp_path, sigma(1.0), model=from_config("CausalLM", "llama", **DECODER), **settings)
    with pytest.raises(ValueError, match="of another model"):
        other.train(resume_from_checkpoint=True)


def test_a_release_that_is_not_in_the_ledger_is_refused(tmp_path):
    class Twice(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **others):
            optimizer.step()
            optimizer.zero_grad()

    trainer, _ = make(tmp_path, sigma(1.0), max_steps=2)
    trainer.add_callback(Twice())
    with pytest.raises(RuntimeError, match=r"released already|not in the ledger"):
        trainer.train()
    assert trainer.ledger.steps == 1


def test_a_release_with_less_noise_than_reserved_is_refused(tmp_path):
    class Quieter(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **others):
            optimizer.optimizer.noise_multiplier = 0.5

    trainer, seen = make(tmp_path, sigma(1.0))
    trainer.add_callback(Quieter())
    with pytest.raises(RuntimeError, match="not in the ledger"):
        trainer.train()
    assert not seen.grads


def test_a_finished_run_takes_no_further_step(tmp_path):
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 5}
    make(tmp_path, sigma(1.0), **settings)[0].train()
    again, seen = make(tmp_path, sigma(1.0), **settings)
    assert again.train(resume_from_checkpoint=True).global_step == 5
    assert not seen.grads and again.ledger.steps == 5


# A Trainer of one's own


class OwnTrainer(Trainer):
    """What docs/huggingface.md asks of a Trainer that keeps its loop: one item a draw, the sum left alone."""

    loader = None

    def get_train_dataloader(self):
        return self.loader

    def create_optimizer(self, *args, **kwargs):
        base = super().create_optimizer(*args, **kwargs)
        self.optimizer = fastclip.DPOptimizer(
            base, noise_multiplier=2.0, max_grad_norm=1.0, module=self.model, sampler=self.loader
        )
        return self.optimizer

    def get_batch_samples(self, epoch_iterator, *_):
        return [next(epoch_iterator)], None

    def training_step(self, model, inputs, *_):
        if len(inputs["input_ids"]):
            losses = causal_lm_losses(model, inputs)
            losses.mean().backward()
            return losses.detach().mean()
        return torch.zeros(())

    def _get_grad_norm(self, model, grad_norm=None):
        return None

    def floating_point_ops(self, inputs):
        return 0


def own(tmp_path, ledger, steps=8, **settings):
    settings = {"max_grad_norm": 0.0, "max_steps": steps} | settings
    args = TrainingArguments(
        str(tmp_path / "own"),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        **settings,
    )
    trainer = OwnTrainer(gpt2(), args, train_dataset=texts(), callbacks=[PrivacyCallback(ledger)])
    sampler = fastclip.PoissonSampler(N, expected_batch_size=4, steps=steps)
    trainer.loader = fastclip.PoissonLoader(texts(), sampler)
    return trainer


def new_ledger(tmp_path, budget):
    return Ledger.create(
        tmp_path / "ledger.jsonl",
        unit="example",
        adjacency="zero-out",
        sampler="poisson",
        num_units=N,
        delta=1e-3,
        epsilon_budget=budget,
    )


def test_the_callback_reserves_logs_and_ends_at_the_budget(tmp_path):
    budget = get_epsilon(2.0, 4 / N, 5, 1e-3) * 1.0001
    with new_ledger(tmp_path, budget) as ledger:
        trainer = own(tmp_path, ledger)
        trainer.train()
        assert trainer.state.global_step == ledger.steps == 5
        assert trainer.state.log_history[-2]["epsilon"] == ledger.epsilon() <= budget
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines[1:]] == [1, 2, 3, 4, 5]


def test_the_callback_refuses_what_would_change_sums(tmp_path):
    with new_ledger(tmp_path, None) as ledger:
        with pytest.raises(ValueError, match="would clip the sum"):
            own(tmp_path, ledger, max_grad_norm=1.0).train()
        args = TrainingArguments(
            str(tmp_path / "plain"), report_to="none", use_cpu=True, max_grad_norm=0.0, disable_tqdm=True
        )
        plain = Trainer(gpt2(), args, train_dataset=texts(), callbacks=[PrivacyCallback(ledger)])
        with pytest.raises(ValueError, match=r"make a fastclip\.DPOptimizer"):
            plain.train()
        assert ledger.steps == 0
