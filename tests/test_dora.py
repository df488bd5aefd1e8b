"""PEFT's DoRA against the oracle: factors, magnitudes and biases, some units clipped and some not, with B away from 0."""

from collections.abc import Callable

import oracle
import pytest
import test_families
import torch
from families import DECODER, GPT2, ROBERTA, USERS, Case, causal, checkpoint, classifier, randomize
from peft import LoraConfig, get_peft_model
from test_hf_trainer import check_against_oracle
from torch import nn
from torch.nn.functional import cross_entropy

import fastclip


def adapted(model: nn.Module, targets: list[str], **options: object) -> nn.Module:
    """randomize() moves B and the magnitudes away from where PEFT starts them, at 0 and at the norms of the rows of W."""
    settings = {"r": 3, "lora_alpha": 6, "target_modules": targets, "use_dora": True, "lora_dropout": 0.0}
    return randomize(get_peft_model(model, LoraConfig(**(settings | options))))


def gpt2(**options: object) -> Case:
    model, batch, loss = causal("gpt2", GPT2, padded=True)
    return adapted(model, ["c_attn", "c_fc"], fan_in_fan_out=True, **options), batch, loss


def roberta() -> Case:
    """The biases of the adapted layers train too, and the classifier."""
    model, batch, loss = classifier("roberta", ROBERTA, 1)
    return adapted(model, ["query", "value", "dense"], task_type="SEQ_CLS", bias="lora_only"), batch, loss


def llama(**options: object) -> Case:
    model, batch, loss = causal("llama", DECODER, padded=True)
    return adapted(model, ["q_proj", "down_proj"], **options), batch, loss


def base_trains(case: Case) -> Case:
    case[0].requires_grad_(True)
    return case


def beside_lora() -> Case:
    """Two adapters at once, one of them without magnitudes."""
    model, batch, loss = llama()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0))
    model.base_model.set_adapter(["default", "other"])
    for name, p in model.named_parameters():
        p.requires_grad_("lora" in name)
    return randomize(model), batch, loss


class Small(nn.Module):
    """Rows [B, d] or [B T, d], or images."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(6, 9, 3) if kind == "images" else nn.Linear(6, 9)
        self.last = nn.Linear(9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "images":
            return self.last(self.first(x).tanh().mean((2, 3)))
        if self.kind == "flattened":
            return self.last(self.first(x.flatten(0, 1)).tanh()).view(*x.shape[:2], -1).sum(1)
        return self.last(self.first(x).tanh())


def small(kind: str) -> Case:
    def loss(model: nn.Module, batch: oracle.Batch) -> torch.Tensor:
        return cross_entropy(model(batch["x"]), batch["labels"], reduction="none")

    shape = {"vectors": (5, 6), "flattened": (5, 4, 6), "images": (5, 6, 7, 4)}[kind]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    # 6 features: the unit matrix has as many rows as a batch may have examples.
    return adapted(Small(kind), ["first", "last"]), {"x": x, "labels": torch.tensor([0, 2, 1, 1, 0])}, loss


# With a dropout that never drops PEFT takes another way: it computes the base layer's product again, from what was dropped.
NEVER = 1e-12
CASES: dict[str, Callable[[], Case]] = {
    "gpt2": gpt2,
    "gpt2_base_trains": lambda: base_trains(gpt2()),
    "gpt2_dropout": lambda: gpt2(lora_dropout=NEVER),
    "gpt2_dropout_base_trains": lambda: base_trains(gpt2(lora_dropout=NEVER)),
    "roberta": roberta,
    "llama": llama,
    "llama_dropout": lambda: llama(lora_dropout=NEVER),
    "llama_dropout_base_trains": lambda: base_trains(llama(lora_dropout=NEVER)),
    "beside_lora": beside_lora,
    **{kind: (lambda kind=kind: small(kind)) for kind in ("vectors", "flattened", "images")},
}


@pytest.fixture(params=CASES, name="case")
def _case(request: pytest.FixtureRequest) -> Callable[[], Case]:
    return CASES[request.param]


@pytest.mark.parametrize("users", [None, USERS], ids=["example", "user"])
@pytest.mark.parametrize("rule", ["flat", "per_layer"])
def test_norms_and_clipped_gradients(case: Callable[[], Case], rule: str, users: list[int] | None) -> None:
    model, batch, loss_fn = case()
    units = oracle.unit_gradients(model, loss_fn, batch, users)
    sizes = oracle.norms(units)
    clipping_norm = oracle.pick_clipping_norm(sizes)
    groups = oracle.module_groups(model)
    assert bool((sizes > clipping_norm).any()) and bool((sizes < clipping_norm).any())
    expected = oracle.clipped_sum(units, clipping_norm, rule, groups)
    parts = ("lora_A", "lora_B", "lora_magnitude_vector")
    assert all(oracle.norm(expected, [name]) > 0 for name in expected if any(part in name for part in parts))

    clipper = fastclip.attach(model, max_grad_norm=clipping_norm, clipping=rule)
    test_families.backward(clipper, model, loss_fn, batch, users=users)
    oracle.assert_norms(clipper.unit_norms, sizes)
    oracle.assert_gradients(oracle.collect(model), expected)


def test_the_loss_is_the_same(case: Callable[[], Case]) -> None:
    model, batch, loss_fn = case()
    plain = loss_fn(model, batch)
    fastclip.attach(model, max_grad_norm=1.0)
    torch.testing.assert_close(loss_fn(model, batch), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", [[2], [2, 0]], ids=["one", "two"])
def test_batches_of_other_sizes(case: Callable[[], Case], first: list[int]) -> None:
    model, batch, loss_fn = case()
    units = oracle.unit_gradients(model, loss_fn, batch)
    clipping_norm = oracle.pick_clipping_norm(oracle.norms(units))
    clipper = fastclip.attach(model, max_grad_norm=clipping_norm)
    for examples in (first, [4, 3, 2, 1, 0]):
        model.zero_grad()
        test_families.backward(clipper, model, loss_fn, oracle.take(batch, examples))
        expected = oracle.clipped_sum([units[u] for u in examples], clipping_norm)
        oracle.assert_gradients(oracle.collect(model), expected)


@pytest.mark.parametrize("frozen", ["lora_magnitude_vector", "lora_A", "lora_B"])
def test_parts_may_be_frozen(frozen: str) -> None:
    model, batch, loss_fn = gpt2()
    for name, p in model.named_parameters():
        if frozen in name:
            p.requires_grad_(False)
    units = oracle.unit_gradients(model, loss_fn, batch)
    clipping_norm = oracle.pick_clipping_norm(oracle.norms(units))
    clipper = fastclip.attach(model, max_grad_norm=clipping_norm)
    test_families.backward(clipper, model, loss_fn, batch)
    oracle.assert_norms(clipper.unit_norms, oracle.norms(units))
    oracle.assert_gradients(oracle.collect(model), oracle.clipped_sum(units, clipping_norm))


@pytest.mark.parametrize("name", ["gpt2", "roberta", "llama_dropout_base_trains"])
def test_bf16_errors_are_at_most_twice_those_of_torch(name: str) -> None:
    case = test_families.Family(name, CASES[name], frozenset())
    test_families.test_bf16_errors_are_at_most_twice_those_of_torch(case)


def test_detached_the_model_is_plain_again() -> None:
    model, batch, loss_fn = gpt2()
    plain = oracle.plain_gradients(model, loss_fn, batch)
    clipper = fastclip.attach(model, max_grad_norm=1e-3)
    test_families.backward(clipper, model, loss_fn, batch)
    clipper.detach()
    model.zero_grad()
    loss_fn(model, batch).sum().backward()
    oracle.assert_gradients(oracle.collect(model), plain)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_step_of_dptrainer(tmp_path, checkpointed: bool) -> None:
    model = gpt2()[0]
    if checkpointed:
        checkpoint(model, reentrant=False)
    trainer = check_against_oracle(tmp_path, model)
    assert any("lora_magnitude_vector" in name for name, p in trainer.model.named_parameters() if p.requires_grad)


def test_of_embeddings_it_is_refused() -> None:
    model, batch, loss_fn = causal("llama", DECODER, padded=True)
    model = adapted(model, ["embed_tokens"])
    clipper = fastclip.attach(model, max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match=r"lora_embedding_[AB]\.default is used in a way"):
        test_families.backward(clipper, model, loss_fn, batch)
    assert all(p.grad is None for p in model.parameters())


def test_where_somebody_changed_its_forward_it_is_refused() -> None:
    """What the rule would compute is not what the layer does then."""
    model, batch, loss_fn = gpt2()
    layer = next(m for name, m in model.named_modules() if name.endswith("lora_magnitude_vector.default"))
    forward = layer.forward
    layer.forward = lambda *args, **options: 2 * forward(*args, **options)
    clipper = fastclip.attach(model, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"lora_A\.default is called on inputs of different layouts"):
        test_families.backward(clipper, model, loss_fn, batch)
    assert all(p.grad is None for p in model.parameters())
