"""The head's kernels, in Triton's interpreter or on a GPU, beside plain torch in fp64; margins as in test_triton_rows.py."""

import pytest
import torch
import torch.nn.functional as F
from guards import DEVICE, Guard
from kernel_cases import cases_of

from fastclip import ops_head, reference_head
from fastclip.dispatch import plain

pytest.importorskip("triton", reason="triton is not installed")
from fastclip.kernels.interpreter import accept_loop_bounds
from fastclip.kernels.linear_cross_entropy import head_gradient, head_losses

accept_loop_bounds()

LAUNCHERS = {"head_losses": head_losses, "head_gradient": head_gradient}


@pytest.fixture
def guard():
    made = Guard()
    yield made
    made.check()


def place(guard, x):
    if not isinstance(x, torch.Tensor) or (not x.is_contiguous() and DEVICE == "cpu"):
        return x
    return (
        guard(x)
        if x.is_contiguous()
        else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)
    )


@pytest.mark.parametrize("case", cases_of(*LAUNCHERS), ids=str)
def test_case(guard, case):
    for dtype in (
        (torch.float32, torch.float16, torch.float64) if case.name in ("ragged", "strided") else (torch.float32,)
    ):
        args = case.make(dtype, torch.device("cpu"))
        given = [place(guard, x) for x in args]
        found, again = (LAUNCHERS[case.op](*given) for _ in range(2))
        assert torch.equal(found, again)
        exact, same = case.exact(args), plain(case.op)(*args)
        assert found.shape == exact.shape and found.dtype == same.dtype
        if exact.numel():
            error, torchs = ((x.cpu().double() - exact).abs().max() for x in (found, same))
            assert error <= 2 * torchs + 1e-6 * exact.abs().max()


def test_losses_and_gradients_are_torchs(guard):
    """All words in pieces, beside autograd in fp64."""
    torch.manual_seed(0)
    h, weight, bias = torch.randn(11, 19), torch.randn(67, 19), torch.randn(67)
    labels, g = torch.randint(67, (11,)), torch.rand(11)
    raw = F.linear(h.double(), weight.double(), bias.double()).requires_grad_()
    exact = F.cross_entropy(30 * torch.tanh(raw / 30), labels, reduction="none")
    (exact * g.double()).sum().backward()
    for module in (ops_head, None):
        losses, gradient = (module.head_losses, module.head_gradient) if module else (head_losses, head_gradient)
        losses, lse = losses(guard(h), guard(weight), guard(bias), guard(labels), 30.0)
        torch.testing.assert_close(losses.cpu().double(), exact.detach(), rtol=2e-6, atol=2e-6)
        parts = [
            gradient(guard(h), guard(weight[i:j]), guard(bias[i:j]), guard(labels), lse, guard(g), i, 30.0)
            for i, j in ((0, 1), (1, 40), (40, 67))
        ]
        torch.testing.assert_close(torch.cat(parts, 1).cpu().double(), raw.grad, rtol=1e-5, atol=2e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_rows_that_count_for_nothing_are_zero(guard):
    h = torch.randn(4, 5)
    h[1], h[2, 3] = torch.inf, torch.nan
    weight, labels, g = torch.randn(9, 5), torch.tensor([0, 3, 8, 1]), torch.tensor([1.0, 0, 0, 2])
    for gradient in (head_gradient, reference_head.head_gradient):
        device = DEVICE if gradient is head_gradient else "cpu"
        rows = [x.to(device) for x in (h, weight)]
        z = gradient(*rows, None, labels.to(device), torch.zeros(4, device=device), g.to(device), 0, 0.0)
        assert not z[1:3].any() and bool(z[[0, 3]].isfinite().all())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_one_rows_inf_stays_in_its_row(guard):
    h, weight, labels = torch.randn(70, 5), torch.randn(9, 5), torch.randint(9, (70,))
    clean = head_losses(guard(h), guard(weight), None, guard(labels), 0.0)
    h[3] = torch.inf
    found = head_losses(guard(h), guard(weight), None, guard(labels), 0.0)
    others = [i for i in range(70) if i != 3]
    assert torch.equal(found[:, others], clean[:, others]) and not bool(found[0, 3].isfinite())


def test_large_logits_and_a_softmax_of_one(guard):
    h, weight = torch.tensor([[3e4], [-3e4], [12.0]]), torch.tensor([[1.0], [0.5], [-1.0]])
    labels = torch.tensor([0, 2, 0])
    losses, lse = head_losses(guard(h), guard(weight), None, guard(labels), 0.0)
    assert losses[:2].tolist() == [0, 0]
    z = head_gradient(guard(h), guard(weight), None, guard(labels), lse, guard(torch.ones(3)), 0, 0.0)
    # softmax - 1 of the label is the others' sum, also where softmax rounds to 1.
    torch.testing.assert_close(z[2, 0], -(z[2, 1] + z[2, 2]), rtol=1e-2, atol=1e-9)
    assert not z[:2].any()


def test_a_label_outside_the_words_gets_no_finite_loss(guard):
    h, weight, labels = torch.randn(3, 5), torch.randn(9, 5), torch.tensor([-1, 9, 4])
    for losses in (head_losses, reference_head.head_losses):
        device = DEVICE if losses is head_losses else "cpu"
        found = losses(h.to(device), weight.to(device), None, labels.to(device), 0.0)[0]
        assert found.isfinite().tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(9, 4)}, "h must be"),
        ({"weight": torch.ones(0, 5)}, "V > 0"),
        ({"bias": torch.ones(8)}, "bias must be"),
        ({"labels": torch.ones(4, dtype=torch.int64)}, "labels must be"),
        ({"labels": torch.ones(3)}, "labels must be"),
        ({"h": torch.ones(3, 5).double()}, "one floating dtype"),
        ({"softcap": -1.0}, "softcap"),
        ({"softcap": float("nan")}, "softcap"),
    ],
)
def test_bad_input(changes, message):
    good = {
        "h": torch.ones(3, 5),
        "weight": torch.ones(9, 5),
        "bias": None,
        "labels": torch.zeros(3).long(),
        "softcap": 0.0,
    }
    with pytest.raises(ValueError, match=message):
        ops_head.head_losses(**(good | changes))
    rows = {"lse": torch.zeros(3), "g": torch.zeros(3)}
    with pytest.raises(ValueError, match=message):
        ops_head.head_gradient(**(good | rows | changes))
    with pytest.raises(ValueError, match="lse and g"):
        ops_head.head_gradient(**(good | rows | {"g": torch.zeros(2)}))
    with pytest.raises(ValueError, match="start"):
        ops_head.head_gradient(**(good | rows | {"start": -1}))


def test_opcheck():
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for case in cases_of(*LAUNCHERS):
        if case.name in ("ragged", "strided"):
            args = case.make(torch.float32, torch.device("cpu"))
            torch.library.opcheck(getattr(torch.ops.fastclip, case.op), args, test_utils=checks)
