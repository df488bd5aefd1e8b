"""Losses with one value per example, for models with the interface of Hugging Face transformers.

A loss that transformers computes from `labels` is a mean over all tokens of the batch: every example's weight then
depends on its neighbours' lengths, and no clipping makes that private. The functions here never divide by anything
that another example decides. Each takes `(model, batch)`, so that it can be given to `fastclip.check_units` as it is,
and returns `[B]`.

They do not modify the batch, hold no state, and run on any device and dtype; the cross-entropy is computed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastclip.head import check_labels, output_losses, output_rows

Reduction = Literal["mean", "sum"]
LossFn = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def causal_lm_losses(
    model: nn.Module, batch: Mapping[str, Tensor], *, ignore_index: int = -100, reduction: Reduction = "mean"
) -> Tensor:
    """Next-token cross-entropy of each example, fp32 `[B]`, in nats.

    `batch` goes to the model without its `labels`. `labels` (int `[B, T]`, position t holds the token *at* t, as in
    transformers) default to `input_ids` where `attention_mask` is not 0. Positions that are `ignore_index` count for
    nothing. `reduction="mean"` divides by the example's own number of predicted tokens, `"sum"` does not; an example
    with nothing to predict has loss 0 and gradient 0. ValueError on labels of another shape than the logits.
    """
    labels = batch.get("labels")
    if labels is None:
        labels = _labels_from_inputs(batch, ignore_index)
    # The labels move instead of the logits: a slice of [B, T, V] would be copied.
    following = torch.full_like(labels, ignore_index)
    following[:, :-1] = labels[:, 1:]
    return _token_losses(model, batch, following, ignore_index, reduction)


def masked_lm_losses(
    model: nn.Module, batch: Mapping[str, Tensor], *, ignore_index: int = -100, reduction: Reduction = "mean"
) -> Tensor:
    """Cross-entropy of each example's masked tokens, fp32 `[B]`, in nats.

    `batch["labels"]` (int `[B, T]`) holds the original token at masked positions and `ignore_index` elsewhere. Draw
    every example's mask from its own length alone: a fixed number of masks per batch would tie examples together.
    Reduction and errors as in `causal_lm_losses`; ValueError without labels.
    """
    return _token_losses(model, batch, _required_labels(batch), ignore_index, reduction)


def classification_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Loss of each example of a sequence classifier, fp32 `[B]`.

    `batch["labels"]`: int `[B]` gives cross-entropy over the logits `[B, K]`; float `[B]` with one logit gives the
    squared error; float `[B, K]` gives the mean over the K binary cross-entropies. ValueError on any other
    combination.
    """
    labels = _required_labels(batch)
    logits = _logits(model, batch).float()
    if labels.is_floating_point():
        if labels.shape == logits.shape and logits.ndim == 2 and logits.shape[1] > 1:
            return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(1)
        if labels.numel() == len(logits) == logits.numel():
            return (logits.flatten() - labels.flatten().float()).square()
    elif labels.ndim == 1 and logits.ndim == 2 and len(labels) == len(logits):
        return F.cross_entropy(logits, labels, reduction="none")
    raise ValueError(
        f"labels {labels.dtype} {list(labels.shape)} do not fit logits {list(logits.shape)}: "
        "give int [B] for classes, float [B] for one output, or float [B, K] for K yes-or-no outputs"
    )


def seq2seq_losses(
    model: nn.Module, batch: Mapping[str, Tensor], *, ignore_index: int = -100, reduction: Reduction = "mean"
) -> Tensor:
    """Cross-entropy of each example's target tokens under an encoder-decoder model, fp32 `[B]`, in nats.

    `batch["labels"]` (int `[B, T]`) holds the target, `ignore_index` where it is padded. The decoder reads
    `decoder_input_ids`; where the batch has none, the model's own `prepare_decoder_input_ids_from_labels` shifts the
    labels, as in transformers. Reduction and errors as in `causal_lm_losses`; ValueError without labels, and where the
    decoder's input can be had from neither.
    """
    labels = _required_labels(batch)
    if "decoder_input_ids" not in batch and "decoder_inputs_embeds" not in batch:
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            raise ValueError(
                f"batch has no decoder_input_ids and {type(model).__name__} cannot make them from labels: add them, for "
                "instance by DataCollatorForSeq2Seq(tokenizer, model=model)"
            )
        batch = {**batch, "decoder_input_ids": shift(labels=labels)}
    return _token_losses(model, batch, labels, ignore_index, reduction)


def infilling_losses(
    model: nn.Module, batch: Mapping[str, Tensor], *, mask_token_id: int, label_words: Sequence[int]
) -> Tensor:
    """Cross-entropy of each example's label word at its mask, fp32 `[B]`, in nats.

    The template put one mask token into each row of `batch["input_ids"]` (int `[B, T]`), and `label_words` (the
    verbaliser: K token ids, all different) names the word that stands for each class. The masked language model's logits
    at the mask are restricted to those K words; `batch["labels"]`, int `[B]` in [0, K), says which is right. Give the
    ids once with `functools.partial(infilling_losses, mask_token_id=..., label_words=...)`.

    ValueError on rows without exactly one mask, fewer than two words, equal words, or labels of another form.
    """
    labels = _required_labels(batch)
    words = [int(word) for word in label_words]
    if len(set(words)) < max(2, len(words)):
        raise ValueError(f"label_words={words} must be two or more different token ids, one for each class")
    if "input_ids" not in batch:
        raise ValueError(f"batch has no input_ids (it has {sorted(batch)}): the mask is looked for there")
    at_mask = batch["input_ids"] == mask_token_id  # [B, T]
    if labels.is_floating_point() or labels.shape != at_mask.shape[:1]:
        raise ValueError(f"labels {labels.dtype} {list(labels.shape)} do not fit: give int [B], the class of each row")
    if not bool((at_mask.sum(1) == 1).all()):
        raise ValueError(
            f"a row has not exactly one mask token (mask_token_id={mask_token_id}): fill the template in so that each text "
            "keeps one, and truncate the text and not the template"
        )
    logits = output_rows(model, _output_layer(model), _inputs(batch), at_mask.int().argmax(1), _logits_of)  # [B, V]
    return F.cross_entropy(logits[:, words].float(), labels, reduction="none")


def default_losses(model: nn.Module) -> LossFn:
    """The losses for this model by its class: causal or masked language model, sequence classifier, encoder-decoder.

    A PEFT model counts as the model inside. ValueError for any other class, which may return nothing but a mean over the
    batch: no per-example loss can be had from that.
    """
    from transformers.models.auto import modeling_auto as known

    inner = _without_adapters(model)
    is_encoder_decoder = bool(getattr(getattr(inner, "config", None), "is_encoder_decoder", False))
    tables: list[tuple[Mapping[str, Any], LossFn, bool | None]] = [
        (known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, classification_losses, None),
        # Some encoder-decoders stand in the tables of language models too, where their labels would be read wrongly.
        (known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, seq2seq_losses, True),
        (known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, causal_lm_losses, False),
        (known.MODEL_FOR_MASKED_LM_MAPPING_NAMES, masked_lm_losses, False),
    ]
    for table, losses, wanted in tables:
        if _is_among(inner, table) and wanted in (None, is_encoder_decoder):
            return losses
    raise ValueError(
        f"no loss per example is known for {type(inner).__name__}, and a mean over the batch cannot be made private: pass "
        "loss_fn=, a function (model, batch) -> losses [B] such as those in fastclip.huggingface"
    )


def is_classifier(model: nn.Module) -> bool:
    """Whether the model, or the one inside a PEFT model, is one of transformers' sequence classifiers."""
    from transformers.models.auto import modeling_auto as known

    return _is_among(_without_adapters(model), known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)


def _without_adapters(model: Any) -> Any:
    while hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model


def _is_among(model: Any, table: Mapping[str, Any]) -> bool:
    """Whether the model's class, or one that it derives from, stands in one of transformers' tables."""
    names = {name for entry in table.values() for name in ([entry] if isinstance(entry, str) else entry)}
    return any(kind.__name__ in names for kind in type(model).__mro__)


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return _logits_of(model(**_inputs(batch)))


def _logits_of(output: Any) -> Tensor:
    logits = output.logits if hasattr(output, "logits") else output
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the model returned {type(output).__name__} without logits: "
            "give a model with a language-model or classification head"
        )
    return logits


def _required_labels(batch: Mapping[str, Tensor]) -> Tensor:
    if "labels" not in batch:
        raise ValueError(f"batch has no labels (it has {sorted(batch)}): add them under the name 'labels'")
    return batch["labels"]


def _labels_from_inputs(batch: Mapping[str, Tensor], ignore_index: int) -> Tensor:
    if "input_ids" not in batch:
        raise ValueError(f"batch has neither labels nor input_ids (it has {sorted(batch)}): give one of them")
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    return ids if mask is None else ids.masked_fill(mask == 0, ignore_index)


def _output_layer(model: nn.Module) -> nn.Module | None:
    """The model's head over its vocabulary, where transformers knows of one."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def _token_losses(
    model: nn.Module, batch: Mapping[str, Tensor], targets: Tensor, ignore_index: int, reduction: Reduction
) -> Tensor:
    """[B]. The logits of an attached model are kept once at most: see fastclip.linear_cross_entropy."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}: give 'mean' (over the example's own tokens) or 'sum'")

    def of_logits(output: Any) -> Tensor:
        logits = _logits_of(output)
        check_labels(logits, targets)
        flat = logits.flatten(0, 1).float()
        return F.cross_entropy(flat, targets.flatten(), ignore_index=ignore_index, reduction="none").view(targets.shape)

    sums = output_losses(model, _output_layer(model), _inputs(batch), targets, ignore_index, of_logits).sum(1)
    if reduction == "sum":
        return sums
    return sums / (targets != ignore_index).sum(1).clamp(min=1)
