"""The head's kernels, in Triton's interpreter or on a GPU, beside plain torch in fp64; margins as in test_triton_rows.py."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from guards import DEVICE, Guard
from kernel_cases import cases_of

from fastclip import ops_head, reference_head
from fastclip.dispatch import plain

pytest.importorskip("triton", reason="triton is not installed")
from fastclip.kernels.configs import HEAD_SPAN
from fastclip.kernels.interpreter import accept_loop_bounds
from fastclip.kernels.linear_cross_entropy import head_gradient, head_losses

accept_loop_bounds()

interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter runs only where no GPU is")
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


def row_by_row(h, weight, bias, labels, g, softcap):
    """(losses, log-sum-exps, gradients in the raw logits) in fp64, by autograd of torch's own loss of one row at a time."""
    losses, lses, gradients = [], [], []
    for row, label, scale in zip(h.double(), labels, g.double(), strict=True):
        raw = (weight.double() @ row + (0 if bias is None else bias.double())).requires_grad_()
        logits = softcap * torch.tanh(raw / softcap) if softcap else raw
        loss = F.cross_entropy(logits[None], label[None])
        gradients += torch.autograd.grad(loss * scale, raw)
        losses.append(loss.detach())
        lses.append(logits.detach().logsumexp(0))
    return torch.stack(losses), torch.stack(lses), torch.stack(gradients)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 64, 65, 130])
def test_every_row_is_its_own(guard, rows, with_bias, softcap):
    """All words in pieces; labels on both sides of each cut."""
    words, d, cuts = 77, 33, (0, 1, 40, 77)
    h, weight, bias = torch.randn(rows, d), torch.randn(words, d), torch.randn(words) if with_bias else None
    labels, g = torch.randint(words, (rows,)), torch.rand(rows)
    edges = torch.tensor([0, 76, 39, 40, 1])[:rows]
    labels[: len(edges)] = edges
    losses, lse, z = row_by_row(h, weight, bias, labels, g, softcap)
    for of_losses, of_gradient in ((head_losses, head_gradient), (ops_head.head_losses, ops_head.head_gradient)):
        found = of_losses(guard(h), guard(weight), bias if bias is None else guard(bias), guard(labels), softcap)
        torch.testing.assert_close(found.cpu().double(), torch.stack([losses, lse]), rtol=2e-6, atol=4e-6)
        parts = []
        for i, j in itertools.pairwise(cuts):
            own = None if bias is None else guard(bias[i:j])
            given = guard(h), guard(weight[i:j]), own, guard(labels), guard(found[1].cpu()), guard(g), i, softcap
            parts.append(of_gradient(*given))
            assert torch.equal(parts[-1], of_gradient(*given))
        torch.testing.assert_close(torch.cat(parts, 1).cpu().double(), z, rtol=2e-5, atol=4e-6)


def test_a_rows_bits_do_not_depend_on_the_others(guard):
    h, weight, labels, g = torch.randn(70, 9), torch.randn(77, 9), torch.randint(77, (70,)), torch.rand(70)
    whole = head_losses(guard(h), guard(weight), None, guard(labels), 0.0)
    z = head_gradient(guard(h), guard(weight), None, guard(labels), whole[1], guard(g), 0, 0.0)
    for some in (1, 65):
        few = [guard(x[:some]) for x in (h, labels)]
        assert torch.equal(head_losses(few[0], guard(weight), None, few[1], 0.0), whole[:, :some])
        own = head_gradient(few[0], guard(weight), None, few[1], whole[1, :some].clone(), guard(g[:some]), 0, 0.0)
        assert torch.equal(own, z[:some])


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # numpy's, in the interpreter
def test_words_that_a_bias_forbids(guard):
    """-inf in a whole block, a whole span, everywhere; and what torch makes of +inf."""
    words = HEAD_SPAN + 70
    h, weight, labels = torch.randn(5, 3), torch.randn(words, 3), torch.tensor([HEAD_SPAN, 3, words - 1, 0, 7])
    for forbidden in (slice(0, 64), slice(0, HEAD_SPAN), slice(HEAD_SPAN, None), slice(None)):
        bias = torch.zeros(words)
        bias[forbidden] = -torch.inf
        losses, lse = head_losses(guard(h), guard(weight), guard(bias), guard(labels), 0.0).cpu()
        wanted = reference_head.head_losses(h, weight, bias, labels, 0.0)
        torch.testing.assert_close(torch.stack([losses, lse]), wanted, rtol=2e-6, atol=4e-6, equal_nan=True)
        z = head_gradient(guard(h), guard(weight), guard(bias), guard(labels), guard(lse), guard(torch.ones(5)), 0, 0.0)
        exact = reference_head.head_gradient(h, weight, bias, labels, wanted[1], torch.ones(5), 0, 0.0)
        torch.testing.assert_close(z.cpu(), exact, rtol=2e-5, atol=4e-6, equal_nan=True)
    bias = torch.zeros(words)
    bias[2], bias[5] = torch.inf, torch.inf
    losses, lse = head_losses(guard(h), guard(weight), guard(bias), guard(labels), 0.0)
    assert bool((lse == torch.inf).all()) and bool((losses == torch.inf).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_plain_torch_rounds_no_logits_under_autocast(dtype):
    """Forwards run under it and backwards do not: gradients would be beside another log-sum-exp."""
    h, weight, labels = torch.randn(20, 64).to(dtype), torch.randn(30, 64).to(dtype), torch.randint(30, (20,))
    exact = reference_head.head_losses(h.double(), weight.double(), None, labels, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = reference_head.head_losses(h, weight, None, labels, 0.0)
        z = reference_head.head_gradient(h, weight, None, labels, exact[1], torch.ones(20), 0, 0.0)
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=4e-6)
    assert torch.equal(z, reference_head.head_gradient(h, weight, None, labels, exact[1], torch.ones(20), 0, 0.0))


def test_a_loss_that_is_small_beside_its_logits(guard):
    h, weight, labels = torch.ones(1, 1), torch.tensor([[300.0], [290.0]]), torch.tensor([0])
    loss = head_losses(guard(h), guard(weight), None, guard(labels), 0.0)[0].item()
    assert loss == pytest.approx(math.log1p(math.exp(-10)), abs=2e-7)


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
    # softmax - 1 of the label is the others' sum.
    torch.testing.assert_close(z[2, 0], -(z[2, 1] + z[2, 2]), rtol=1e-2, atol=1e-9)
    assert not z[:2].any()


def test_the_gradient_of_a_label_that_is_almost_certain(guard):
    """softmax - 1 where softmax is 1 in fp32."""
    zero, lse = torch.zeros(1, 1), torch.tensor([3.3e-8])
    z = head_gradient(
        guard(zero), guard(zero), None, guard(torch.tensor([0])), guard(lse), guard(torch.ones(1)), 0, 0.0
    )
    assert z.item() == pytest.approx(math.expm1(-lse.item()), rel=1e-6)


def test_a_label_outside_the_words_gets_no_finite_loss(guard):
    h, weight, labels = torch.randn(3, 5), torch.randn(9, 5), torch.tensor([-1, 9, 4])
    for losses in (head_losses, reference_head.head_losses):
        device = DEVICE if losses is head_losses else "cpu"
        found = losses(h.to(device), weight.to(device), None, labels.to(device), 0.0)[0]
        assert found.isfinite().tolist() == [False, False, True]


@interpreted
def test_addresses_beyond_2_to_the_31(tmp_path):
    memory = torch.from_file(str(tmp_path / "hole"), shared=True, size=2**32, dtype=torch.float32)  # 16 GiB, sparse
    far = memory.as_strided((3, 2), (2**30 + 1, 1))  # the last row is beyond 2^31 elements
    rows, labels, ones = torch.randn(3, 2), torch.tensor([2, 0, 1]), torch.ones(3)
    far.copy_(rows)
    losses, lse = head_losses(far, far, None, labels, 0.0)
    assert torch.equal(losses, head_losses(rows, rows, None, labels, 0.0)[0])
    near = head_gradient(rows, rows, None, labels, lse, ones, 0, 0.0)
    assert torch.equal(head_gradient(far, far, None, labels, lse, ones, 0, 0.0), near)


@interpreted
def test_bf16_is_refused_in_the_interpreter():
    x, labels, ones = torch.ones(2, 3).bfloat16(), torch.zeros(2).long(), torch.ones(2)
    for call in (
        lambda: head_losses(x, x, None, labels, 0.0),
        lambda: head_gradient(x, x, None, labels, ones, ones, 0, 0.0),
    ):
        with pytest.raises(ValueError, match="bf16 cannot run"):
            call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(9, 4)}, "h must be"),
        ({"bias": torch.ones(8)}, "bias must be"),
        ({"labels": torch.zeros(4).long()}, "labels"),
        ({"labels": torch.zeros(3)}, "labels integers"),
        ({"h": torch.ones(3, 5).double()}, "one dtype"),
    ],
)
def test_launchers_read_beyond_no_end(changes, message):
    good = {"h": torch.ones(3, 5), "weight": torch.ones(9, 5), "bias": None, "labels": torch.zeros(3).long()} | changes
    with pytest.raises(ValueError, match=message):
        head_losses(*good.values(), 0.0)
    with pytest.raises(ValueError, match=message):
        head_gradient(*good.values(), torch.ones(3), torch.ones(3), 0, 0.0)
    with pytest.raises(ValueError, match="lse and g"):
        head_gradient(
            torch.ones(3, 5), torch.ones(9, 5), None, torch.zeros(3).long(), torch.ones(3), torch.ones(2), 0, 0.0
        )


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
