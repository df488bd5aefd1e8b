"""What Trainer offers and a private run cannot have, and data that no run can have. All of it before the first step.

Privacy: everything here would change what is clipped, how much of it one unit can be, how often it is released, or who sees
it. It is refused by name and never switched off silently where the user asked for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastclip.huggingface.draws import column_of
from fastclip.huggingface.losses import classification_losses, default_losses, is_classifier
from fastclip.module import clipper_of
from fastclip.optimizer import DPOptimizer

_LOOKED_AT = 32  # examples whose padded form is compared

# (argument, values that are fine, why not, and what instead)
_ARGUMENTS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("fp16", (False,), "a loss scaler changes what is clipped; use bf16=True or float32"),
    ("label_smoothing_factor", (0, None), "Trainer's is a mean over the tokens of the batch; smooth in loss_fn"),
    ("max_grad_norm", (1.0, 0, None), "it clips a sum; set PrivacyArguments.clipping_norm, and leave this one out"),
    ("auto_find_batch_size", (False,), "it repeats steps with another sampling rate; choose a smaller batch yourself"),
    ("deepspeed", (None, "", {}), "it owns the gradients; train on one device"),
    ("fsdp", (None, "", False, []), "it shards the gradients; train on one device"),
    ("parallelism_config", (None,), "one device for now; leave it out"),
    ("group_by_length", (False,), "batches are Poisson draws; leave it out"),
    ("train_sampling_strategy", ("random",), "batches are Poisson draws; leave it out"),
    ("dataloader_drop_last", (False,), "a draw is whole; leave it out"),
    ("dataloader_in_order", (True,), "each draw has to be released in its turn; leave it out"),
    ("include_num_input_tokens_seen", ("no", False), "it tells how large the draws were; leave it out"),
    ("push_to_hub", (False,), "it pushes logs and trainer state; push the trained model by model.push_to_hub"),
)
_OPTIMIZERS = ("lomo", "layerwise", "schedule_free")


def check_arguments(args: Any) -> None:
    """Raise ValueError for a TrainingArguments that a private run cannot have. Unknown to this transformers: skipped."""
    for name, fine, why in _ARGUMENTS:
        value = getattr(args, name, fine[0])
        if not any(value == each for each in fine):
            raise ValueError(f"{name}={value!r} in TrainingArguments: {why}")
    optim = str(getattr(args.optim, "value", args.optim))
    if any(part in optim for part in _OPTIMIZERS):
        raise ValueError(
            f"optim={optim!r} in TrainingArguments steps inside backward or swaps parameters; use 'adamw_torch' or 'sgd'"
        )
    if args.world_size > 1 or args.n_gpu > 1:
        raise ValueError(
            f"{args.world_size} processes with {args.n_gpu} devices each: DPTrainer runs on one for now; set "
            "CUDA_VISIBLE_DEVICES to one, and launch one process"
        )


def check_trainer(trainer: Any) -> None:
    """Raise ValueError for what Trainer made of its arguments and of accelerate's environment."""
    if trainer.compute_loss_func is not None:
        raise ValueError("compute_loss_func gets the whole batch's outputs and returns a mean: give loss_fn= instead")
    if isinstance(trainer.optimizer, DPOptimizer):
        raise ValueError("optimizers holds a DPOptimizer: give the torch optimizer, DPTrainer wraps it")
    if trainer.args.gradient_accumulation_steps != 1:
        raise ValueError("accelerator_config sets num_steps: use gradient_accumulation_steps of TrainingArguments")
    accelerator = trainer.accelerator
    if accelerator.mixed_precision not in ("no", "bf16") or getattr(accelerator, "scaler", None) is not None:
        raise ValueError(f"accelerate is set to {accelerator.mixed_precision!r}: use bf16 or none, no loss scaler")
    kind = str(accelerator.distributed_type.value)
    if kind != "NO" or accelerator.num_processes > 1:
        raise ValueError(f"accelerate is set to {kind} with {accelerator.num_processes} processes: one for now")


def check_model(model: nn.Module | None) -> None:
    """Raise ValueError for a model that somebody clips already."""
    if model is not None and any(clipper_of(module) is not None for module in model.modules()):
        raise ValueError("the model is attached already: detach() that clipper first, DPTrainer attaches for itself")


def check_datasets(train: Any, evaluation: Any) -> None:
    """Raise ValueError unless the training set has a length, examples, and is not what the model is judged by."""
    if train is None:
        raise ValueError("train_dataset is None: give the examples to train on")
    if not hasattr(train, "__len__") or not hasattr(train, "__getitem__"):
        raise ValueError(
            f"train_dataset is a {type(train).__name__} without length or index: Poisson draws need both; give a map-style "
            "data set, for instance datasets.Dataset"
        )
    if not len(train):
        raise ValueError("train_dataset is empty: give at least one example")
    for each in evaluation.values() if isinstance(evaluation, Mapping) else (evaluation,):
        if each is train:
            raise ValueError(
                "eval_dataset is the train_dataset: its metrics look at private data, and deciding by them is not covered by "
                "epsilon; give held-out data"
            )


def check_padding(collate: Any) -> None:
    """Raise ValueError where the collator pads with a tokenizer that has nothing to pad with."""
    tokenizer = getattr(collate, "tokenizer", None)
    if tokenizer is not None and getattr(tokenizer, "pad_token_id", 0) is None:
        raise ValueError(
            f"data_collator's tokenizer ({type(tokenizer).__name__}) has no pad token, so examples of different length cannot "
            "share a batch: set tokenizer.pad_token = tokenizer.eos_token, and model.config.pad_token_id with it"
        )


def check_labels(dataset: Any, model: nn.Module, loss_fn: Any, label_names: Sequence[str]) -> None:
    """Raise ValueError for a class that the model does not have, naming the row."""
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    if classes is None or not (loss_fn is classification_losses or is_classifier(model)):
        return
    for start, values in column_of(dataset, [*label_names, "label", "labels", "label_ids"]):
        for place, value in enumerate(values, start):
            if isinstance(value, Tensor) and not value.dim():
                value = value.item()
            if value is None:
                raise ValueError(f"train_dataset[{place}] has no label: drop it, or label it")
            if isinstance(value, int) and not 0 <= value < classes:
                raise ValueError(
                    f"train_dataset[{place}] has label {value}, and the model's config.num_labels={classes} classes are 0 to "
                    f"{classes - 1}: map the labels, or load the model with that many"
                )


class OneForm:
    """A collate function for runs with narrow floats: it takes only examples that are padded to one form, each by itself.

    In bfloat16 the padding to a longer neighbour changes a unit's gradient by about 0.3 %: what a unit contributes would
    depend on who else was drawn. The form is that of the first example. ValueError, from here if the first examples differ
    and from the call for any later one.
    """

    def __init__(self, dataset: Any, collate: Callable[[Sequence[Any]], Any]) -> None:
        self._collate = collate
        self._form = form_of(collate([dataset[0]]))
        for place in range(min(len(dataset), _LOOKED_AT)):
            self._check(dataset[place])

    def __call__(self, examples: Sequence[Any]) -> Any:
        for example in examples:
            self._check(example)
        return self._collate(examples)

    def _check(self, example: Any) -> None:
        form = form_of(self._collate([example]))
        if form != self._form:
            raise ValueError(
                f"an example is padded to {form}, the first one to {self._form}: in bfloat16 the padding changes a unit's "
                "gradient, so it must not depend on the batch; pad all to one length "
                '(DataCollatorWithPadding(tokenizer, padding="max_length", max_length=128)) or train in float32'
            )


def form_of(batch: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a batch without their first dimension."""
    return {name: tuple(value.shape[1:]) for name, value in batch.items() if isinstance(value, Tensor)}


def is_narrow(model: nn.Module, bf16: bool) -> bool:
    """Whether gradients are computed in fewer bits than float32's."""
    return bf16 or any(p.is_floating_point() and p.itemsize < 4 for p in model.parameters())


def chosen_loss(model: nn.Module, loss_fn: Any) -> Any:
    """loss_fn, or the model's own by its class. ValueError if it is no function or none is known."""
    if loss_fn is None:
        return default_losses(model)
    if not callable(loss_fn):
        raise ValueError(f"loss_fn={loss_fn!r} is no function: give (model, batch) -> losses [B]")
    return loss_fn


def in_precision_of(model: nn.Module, loss_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The losses in the narrowest dtype of the parameters, which tells check_units how exactly to compare."""
    narrow = min((p.dtype for p in model.parameters() if p.is_floating_point()), key=lambda d: d.itemsize)

    def losses(model: nn.Module, batch: Any) -> Tensor:
        out = loss_fn(model, batch)
        return out.to(narrow) if isinstance(out, torch.Tensor) and narrow.itemsize < 4 else out

    return losses
