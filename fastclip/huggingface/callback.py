"""PrivacyCallback: ledger, epsilon and the end at the budget, for a Trainer subclass of your own.

DPTrainer has all this built in. The callback is for a Trainer that loops over a `fastclip.PoissonLoader` itself and makes its
`fastclip.DPOptimizer` in `create_optimizer`; docs/huggingface.md says what such a Trainer has to turn off.

Guarantees: every release is in the ledger, on the disk, before it happens; training ends after the last step that the budget
allows, and a loop that goes on regardless gets `BudgetExhausted` in the place of a release. The callback refuses arguments
that would change sums. It cannot see what the Trainer itself does with losses and batches: the optimizer's own checks do that.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from fastclip.accounting import Ledger, affordable_steps
from fastclip.huggingface.refusals import check_arguments
from fastclip.optimizer import DPOptimizer
from fastclip.sampling import PoissonLoader, PoissonSampler


class PrivacyCallback(TrainerCallback):
    """Reserves each step of the Trainer's DPOptimizer in `ledger`, logs "epsilon" and ends training at the ledger's budget.

    ledger: open, with the terms of this run: create one for a new run, open the old one to go on. The caller closes it.
    ValueError, when training begins, for arguments that would change sums, an optimizer that is no DPOptimizer with a sampler,
    and a ledger of another sampler's terms.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._allowed: int | None = None
        self._hooked: DPOptimizer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **others: Any) -> None:
        check_arguments(args)
        if args.max_grad_norm:
            raise ValueError(
                f"max_grad_norm={args.max_grad_norm!r} would clip the sum: set it to 0, C is the optimizer's"
            )
        private = optimizer if isinstance(optimizer, DPOptimizer) else getattr(optimizer, "optimizer", None)
        if not isinstance(private, DPOptimizer):
            raise ValueError(f"the Trainer's optimizer is {type(optimizer).__name__}: make a fastclip.DPOptimizer")
        sampler = _sampler_of(private)
        if sampler.examples_per_user != self.ledger.examples_per_user:
            raise ValueError(
                f"the ledger has examples_per_user={self.ledger.examples_per_user!r}, the sampler "
                f"{sampler.examples_per_user!r}: create the ledger with the sampler's"
            )
        if self._hooked is not private:
            self._hooked = private
            private.attach_release_hook(self._reserve)
        if self.ledger.epsilon_budget is not None:
            event = sampler.event(private.noise_multiplier)
            more = affordable_steps(
                self.ledger.epsilon_budget,
                self.ledger.delta,
                event.noise_multiplier,
                event.sample_rate,
                self.ledger.events(),
                examples_per_user=self.ledger.examples_per_user,
                adjacency=self.ledger.adjacency,
                max_batch=event.max_batch,
                num_units=event.num_units,
            )
            self._allowed = self.ledger.steps + more

    def _reserve(self, released: DPOptimizer) -> None:
        sampler = _sampler_of(released)
        event = sampler.event(released.noise_multiplier)
        seeded = sampler.seeded or not released.noise.private
        self.ledger.reserve(
            event.noise_multiplier, event.sample_rate, seeded, max_batch=event.max_batch, num_units=event.num_units
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> Any:
        if self._allowed is not None and self.ledger.steps >= self._allowed:
            control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        epsilon = self.ledger.epsilon()
        for each in (logs, state.log_history[-1] if state.log_history else None):
            if each is not None:
                each["epsilon"] = epsilon


def _sampler_of(optimizer: DPOptimizer) -> PoissonSampler:
    source = optimizer.sampler
    if isinstance(source, PoissonLoader):
        return source.sampler
    if not isinstance(source, PoissonSampler):
        raise ValueError(f"DPOptimizer has sampler={source!r}: give it the PoissonLoader that is looped over")
    return source
