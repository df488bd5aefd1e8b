"""DPTrainer: transformers' Trainer, whose every step is one private release.

How it fits. A Trainer takes batches of one size and steps after `gradient_accumulation_steps` of them. A Poisson draw has any
number of examples, also none, and so any number of physical batches, while the accountant counted one release a draw. No
count that is fixed beforehand can say where a draw ends. So what Trainer takes for a batch is a whole draw
(`get_train_dataloader`), its accumulation is 1, and `training_step` loops over the draw's physical batches. Trainer's own
loop then makes exactly one `optimizer.step()` for every draw, also for an empty one, and its counting, schedules, evaluation,
logging and saving stay as they are.

Guarantees:

- A step is in the ledger, on the disk, before anything of its draw goes through the model, and nothing is released that is
  not: the optimizer asks. Where the budget allows no further step, training ends as after the last one.
- Nothing about the training data decides when training ends. Trainer's `seed` reaches neither noise nor draws nor dropout:
  when training begins, all generators are seeded by the operating system.
- Trainer's clipping, gradient norms, token counts and loss scaling are off, because they change the sum, or look at it. The
  training loss is logged as `private_loss`: it is a look at private data that no epsilon covers.
- Checkpoints have no generator's state. What goes on from one draws afresh, under new keys, and only under the same terms.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from fastclip.accounting import BudgetExhausted, Guarantee, Ledger
from fastclip.huggingface import record, refusals
from fastclip.huggingface.arguments import PrivacyArguments
from fastclip.huggingface.card import model_card
from fastclip.huggingface.draws import Draw, DrawLoader, Owners, parts_of, without_column
from fastclip.huggingface.losses import LossFn
from fastclip.huggingface.quiet import QuietTrainer
from fastclip.isolation import check_units
from fastclip.optimizer import DPOptimizer
from fastclip.sampling import PoissonLoader, PoissonSampler

_TRIED = 4  # examples on which the loss is tried before the first step


class DPTrainer(QuietTrainer):
    """`transformers.Trainer` with its arguments, and two more.

    privacy_args: the guarantee. loss_fn: (model, batch) -> one loss per example [B], which may divide by nothing that
    another example decides; by default the one for the model's class (`default_losses`).

    Units expected a step, the logical batch: per_device_train_batch_size * gradient_accumulation_steps. At most
    per_device_train_batch_size examples go through the model together. Steps: max_steps, or num_train_epochs * units /
    logical batch, rounded up. A user's gradient is the mean over the user's examples.

    Attributes: ledger, of the run that began last; loader and dp_optimizer, of the run under way. `guarantee()` is what holds.
    ValueError, before anything is trained, for what privacy forbids and for data that cannot be trained on.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *rest: Any,
        privacy_args: PrivacyArguments,
        loss_fn: LossFn | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(privacy_args, PrivacyArguments):
            raise ValueError(
                f"privacy_args={privacy_args!r}: give PrivacyArguments(target_delta=..., target_epsilon=...)"
            )
        if type(self).compute_loss is not DPTrainer.compute_loss:
            raise ValueError(
                f"{type(self).__name__} overrides compute_loss, a mean over the batch: give loss_fn= instead"
            )
        args = TrainingArguments("tmp_trainer") if args is None else copy.copy(args)
        refusals.check_arguments(args)
        refusals.check_model(model)
        self.logical_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self._epochs = None if args.max_steps > 0 else args.num_train_epochs
        # One item of the loader is one draw, which nobody may skip, cut or clip after the sum.
        args.gradient_accumulation_steps, args.ignore_data_skip, args.max_grad_norm = 1, True, 0.0
        super().__init__(model, args, *rest, **options)
        self.privacy_args = privacy_args
        self.loss_fn = refusals.chosen_loss(self._network, loss_fn)
        self.ledger: Ledger | None = None
        self.dp_optimizer: DPOptimizer | None = None
        self.loader: PoissonLoader | None = None
        self._terms: record.Terms | None = None
        self._draws: DrawLoader | None = None
        self._reserved = False
        self._given_optimizer = self.optimizer
        refusals.check_trainer(self)

    # One run

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        **options: Any,
    ) -> Any:
        """Train privately, from the start or on from a checkpoint of this output_dir; see `transformers.Trainer.train`.

        ValueError for bad data, an output_dir with another run's ledger, and a checkpoint of other terms: nothing is spent.
        """
        if trial is not None:
            self.hyperparameter_search()
        checkpoint: str | None = resume_from_checkpoint or None  # type: ignore[assignment]
        if resume_from_checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise ValueError(f"output_dir={self.args.output_dir!r} has no checkpoint: start anew with another one")
        self._begin(None if checkpoint is None else Path(checkpoint))
        try:
            return super().train(checkpoint, ignore_keys_for_eval=ignore_keys_for_eval, **options)
        finally:
            self._end()

    def _begin(self, checkpoint: Path | None) -> None:
        refusals.check_model(self.model)
        refusals.check_datasets(self.train_dataset, self.eval_dataset)
        refusals.check_padding(self.data_collator)
        refusals.check_labels(self.train_dataset, self._network, self.loss_fn, self.label_names)
        folder = self._folder
        done = 0 if checkpoint is None else record.check_checkpoint(checkpoint, folder)
        owners = Owners(self.train_dataset, self.privacy_args)
        if self._epochs is not None:
            self.args.max_steps = max(1, math.ceil(self._epochs * owners.num_drawn_from / self.logical_batch_size))
        steps = int(self.args.max_steps)
        sampler = owners.sampler(max(1, steps - done), self.logical_batch_size)
        terms = record.terms_of(self.privacy_args, owners, sampler, steps)
        if checkpoint is not None:
            record.check_terms(checkpoint, terms)
        draws = self._make_loader(sampler)
        self._try_loss(draws)
        if checkpoint is None:
            self.ledger = record.begin_ledger(folder, terms)
        else:
            self.ledger = record.resume_ledger(folder, terms, done)
        # A second run wraps the optimizer that was given, or has Trainer make another one.
        self.optimizer, self._reserved = self._given_optimizer, False
        self._terms, self._draws, self.loader = terms, draws, draws.loader

    def _make_loader(self, sampler: PoissonSampler) -> DrawLoader:
        dataset, collate = without_column(self.train_dataset, self.data_collator, self.privacy_args.user_column)
        if hasattr(dataset, "column_names"):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        if refusals.is_narrow(self._network, self.args.bf16):
            collate = refusals.OneForm(dataset, collate)
        options: dict[str, Any] = {"pin_memory": self.args.dataloader_pin_memory and self.args.device.type == "cuda"}
        if self.args.dataloader_num_workers:
            options["prefetch_factor"] = self.args.dataloader_prefetch_factor
        loader = PoissonLoader(
            dataset,
            sampler,
            collate,
            self.args.dataloader_num_workers,
            max_examples=self.args.per_device_train_batch_size,
            allow_oversized=True,
            **options,
        )
        self._collate = collate
        return DrawLoader(loader, dataset, max(1, math.ceil(sampler.num_units / self.logical_batch_size)))

    def _try_loss(self, draws: DrawLoader) -> None:
        """Loss and model on a few examples, alone and together. ValueError where one reaches another."""
        dataset = draws.dataset
        batch = dict(self._prepare_inputs(self._collate([dataset[i] for i in range(min(_TRIED, len(dataset)))])))
        model = self._network.train()
        check_units(model, refusals.in_precision_of(model, self.loss_fn), batch)

    def _end(self) -> None:
        if self.dp_optimizer is not None:
            self.dp_optimizer.clipper.detach()
        if self.ledger is not None:
            self.ledger.close()
        self.dp_optimizer = self.loader = self._draws = None

    # What Trainer's loop calls

    def get_train_dataloader(self) -> Any:
        """One item a draw; see the module's docstring. RuntimeError outside train(), which alone hands out draws."""
        if self._draws is None:
            raise RuntimeError(
                "draws are handed out by train() alone: make a fastclip.PoissonLoader for a loop of your own"
            )
        self._reseed()
        return self._draws

    def _reseed(self) -> None:
        # Trainer has seeded everything by a number that stands in its arguments.
        if self.privacy_args.privacy_seed is not None:
            set_seed(self.privacy_args.privacy_seed)
            return
        torch.seed()
        random.seed()
        np.random.seed()

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """Trainer's optimizer, in train() wrapped to release clipped sums with noise."""
        base = super().create_optimizer(*args, **options)
        if self._terms is None or self.loader is None:
            return base
        self.dp_optimizer = DPOptimizer(
            base,
            noise_multiplier=self._terms.noise_multiplier,
            max_grad_norm=self._terms.clipping_norm,
            clipping=self._terms.clipping,
            loss_reduction="mean",
            module=self._network,
            sampler=self.loader,
            seed=self.privacy_args.privacy_seed,
        )
        self.dp_optimizer.attach_release_hook(self._use_reservation)
        self.optimizer = self.dp_optimizer
        return self.optimizer

    def _use_reservation(self, released: DPOptimizer) -> None:
        assert self._terms is not None
        if not self._reserved or released.noise_multiplier != self._terms.noise_multiplier:
            raise RuntimeError("this release is not in the ledger: one step() for each draw, with the noise of the run")
        self._reserved = False

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *_: Any) -> tuple[list[Draw], None]:
        """The next draw, with its step reserved; none where the steps or the budget are used up. No count of its tokens."""
        assert self.ledger is not None and self.loader is not None and self._terms is not None
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        event = self.loader.sampler.event(self._terms.noise_multiplier)
        try:
            self.ledger.reserve(
                event.noise_multiplier,
                event.sample_rate,
                self.loader.seeded,
                max_batch=event.max_batch,
                num_units=event.num_units,
            )
        except BudgetExhausted:
            self.control.should_training_stop = True
            return [], None
        self._reserved = True
        return [next(epoch_iterator)], None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one draw, in physical batches; the mean of its losses, 0 for an empty one."""
        if not isinstance(inputs, Draw) or self.dp_optimizer is None:
            raise RuntimeError("training_step takes a draw of get_train_dataloader(), inside train()")
        model.train()
        self.dp_optimizer.zero_grad()
        clipper = self.dp_optimizer.clipper
        total, count = torch.zeros((), device=self.args.device), 0
        for batch, ids, oversized in inputs:
            if not len(ids):
                continue
            batch = dict(self._prepare_inputs(batch))
            if oversized:
                with clipper.accumulate_unit(int(ids[0]), reduction="mean", num_examples=len(ids)):
                    for part, size in parts_of(batch, len(ids), self.args.per_device_train_batch_size):
                        losses = self._losses(model, part, size)
                        losses.sum().backward()
                        total += losses.detach().sum()
            else:
                with clipper.units(ids=ids, reduction="mean"):
                    losses = self._losses(model, batch, len(ids))
                    losses.mean().backward()
                total += losses.detach().sum()
            count += len(ids)
        return total / max(count, 1)

    def _losses(self, model: nn.Module, batch: dict[str, Any], size: int) -> Tensor:
        with self.compute_loss_context_manager():
            losses = self.loss_fn(model, batch)
        if not isinstance(losses, Tensor) or losses.shape != (size,):
            shape = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"loss_fn returned {shape} for {size} examples: return one loss per example, [{size}]")
        return losses

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """For evaluation: the mean of the losses of these examples, whatever batch they stand in, and the model's outputs."""
        seen: list[Any] = []
        hook = (
            model.register_forward_hook(lambda module, given, output: seen.append(output)) if return_outputs else None
        )
        with nullcontext() if hook is None else hook:
            loss = self.loss_fn(model, dict(inputs)).mean()
        if not return_outputs:
            return loss
        outputs = seen[-1] if seen else {}
        return loss, outputs if isinstance(outputs, dict) else {"logits": getattr(outputs, "logits", outputs)}

    # What Trainer says and writes

    def guarantee(self) -> Guarantee:
        """What holds for all steps that are spent, with all that it rests on. RuntimeError before the first run."""
        if self.ledger is None:
            raise RuntimeError("nothing was trained yet: call train() first")
        from_size = ["sample_rate"] if self._epochs is None else ["sample_rate", "steps"]
        return self.ledger.guarantee(seeded=self.privacy_args.privacy_seed is not None, from_size=from_size)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Trainer's, with epsilon after all steps that are spent."""
        if self.ledger is not None:
            logs["epsilon"] = self.ledger.epsilon()
        super().log(logs, *args, **options)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """README.md in output_dir: the guarantee and held-out results. Options as Trainer's: license, language, tags, dataset,
        model_name, finetuned_from; nothing that was computed from training data is in it."""
        if self.is_world_process_zero():
            text = model_card(self.guarantee(), self.privacy_args, self._network, self.state.log_history, options)
            (self._folder / "README.md").write_text(text, encoding="utf-8")

    def save_model(self, *args: Any, **options: Any) -> None:
        # A prefix is computed to be saved; outside a forward of the model the clipper takes no calls with gradients.
        with torch.no_grad():
            super().save_model(*args, **options)

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any) -> None:
        assert self._terms is not None
        super()._save_checkpoint(model, trial, *args)
        record.write_terms(self._folder / f"checkpoint-{self.state.global_step}", self._terms)

    def get_total_train_batch_size(self, *args: Any) -> int:
        return self.logical_batch_size

    @property
    def _network(self) -> nn.Module:
        assert self.model is not None
        return self.model

    @property
    def _folder(self) -> Path:
        assert self.args.output_dir is not None
        return Path(self.args.output_dir)
