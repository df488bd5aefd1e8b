import copy
import itertools
import math
import os
import pickle
import random
import sys
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastclip import ops
from fastclip import random as stream_module
from fastclip.noise import NoiseSource, Purpose
from fastclip.random import Key, nonce, normals

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=["cpp", "torch"], autouse=True)
def backend(request, monkeypatch):
    """Every test with the compiled kernel, where it was built, and with numpy."""
    if request.param == "torch":
        monkeypatch.setattr(ops, "_cpp_missing", "left out by this test")
    elif ops.backends()["cpp"]["state"] == "absent":
        pytest.skip("no compiled kernels on this machine")
    return request.param


@pytest.fixture
def numpy_only(monkeypatch):
    """For failures that can only be made to happen in Python."""
    monkeypatch.setattr(ops, "_cpp_missing", "left out by this test")


def draw(source: NoiseSource, count: int, offset: int = 0, **arguments) -> torch.Tensor:
    return source.add_(torch.zeros(count), 1.0, offset=offset, **arguments)


def stream(seed: int, step: int, count: int) -> torch.Tensor:
    """The first `count` fp64 normals of a seeded source, from the stream's definition."""
    blocks = -(-count // 64) * 8
    words, z = np.empty((blocks, 8), dtype=np.int64), np.empty((blocks, 8))
    Key.from_seed(seed).words(nonce(step, Purpose.GRADIENT, seeded=True), 0, words)
    normals(words, z, np.empty((4, blocks * 4)))
    return torch.from_numpy(z).view(-1)[:count]


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adds_std_times_the_stream_and_rounds_once(dtype, device):
    grad_sum = torch.randn(1000, dtype=dtype, generator=torch.Generator().manual_seed(1)) * 3
    z = stream(5, 2, 1013)[13:]
    source = NoiseSource(seed=5)
    source.advance(), source.advance()
    out = torch.empty(1000, device=device)
    result = source.add_(grad_sum.to(device), 0.7, offset=13, out=out)
    assert result is out
    torch.testing.assert_close(out.cpu(), (grad_sum.double() + 0.7 * z).float(), rtol=0, atol=0)


def test_writes_in_place_by_default():
    grad_sum = torch.ones(20)
    assert NoiseSource(seed=0).add_(grad_sum, 2.0, offset=0) is grad_sum
    torch.testing.assert_close(grad_sum, (1 + 2 * stream(0, 0, 20)).float(), rtol=0, atol=0)


def nearest(value: float, bits: int, lowest: int) -> float:
    """`value` rounded to `bits` significant bits and multiples of 2^`lowest`, ties to even, in exact arithmetic."""
    if value == 0 or not math.isfinite(value):
        return value
    unit = Fraction(2) ** max(math.frexp(value)[1] - bits, lowest)
    return float(round(Fraction(value) / unit) * unit)


@pytest.mark.parametrize(
    "dtype, bits, lowest", [(torch.float32, 24, -149), (torch.bfloat16, 8, -133), (torch.float16, 11, -24)]
)
def test_rounds_once_to_nearest_even(dtype, bits, lowest):
    generator = np.random.default_rng(3)
    ties = [(1 + (2 * k + 1) * 2.0**-bits) * (1 + side * 2.0**-50) for k in range(40) for side in (-1, 0, 1)]
    tiny = [k * 2.0 ** (lowest - 2) * (1 + side * 2.0**-40) for k in range(40) for side in (-1, 0, 1)]
    values = np.concatenate([ties, tiny, generator.normal(size=500) * 2.0 ** generator.integers(-40, 15, 500)])
    values = torch.from_numpy(np.concatenate([values, -values]))
    out = NoiseSource(seed=0).add_(values, 0.0, offset=0, out=torch.empty(len(values), dtype=dtype))
    expected = [nearest(value, bits, lowest) for value in values.tolist()]
    assert out.double().tolist() == expected


def test_non_finite_and_too_large_values_go_through_without_a_warning():
    values = torch.tensor([math.nan, math.inf, -math.inf, 1e300, -1e300, 3.4028235677973366e38], dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = NoiseSource(seed=0).add_(values, 1.0, offset=0, out=torch.empty(6, dtype=dtype))
        assert out[0].isnan() and out[1:].tolist() == [math.inf, -math.inf, math.inf, -math.inf, math.inf]


def test_bits_do_not_depend_on_chunks_threads_or_calls(monkeypatch, restore_threads):
    count, offset = 100_003, 8 * 2**32 - 50_001
    reference = draw(NoiseSource(seed=1), count, offset)
    for chunk, threads in [(64, 1), (448, 3), (2**12, 2), (2**17, 2)]:
        monkeypatch.setattr(stream_module, "CHUNK", chunk)
        torch.set_num_threads(threads)
        assert torch.equal(draw(NoiseSource(seed=1), count, offset), reference)
    cuts = sorted({0, count, 1, 2, 9, *random.Random(0).sample(range(count), 60)})
    pieces = list(itertools.pairwise(cuts))
    random.Random(1).shuffle(pieces)
    source, joined = NoiseSource(seed=1), torch.empty(count)
    for start, stop in pieces:
        joined[start:stop] = draw(source, stop - start, offset + start)
    assert torch.equal(joined, reference)


@pytest.mark.parametrize("device", DEVICES)
def test_elements_count_in_logical_order_for_any_layout(device):
    base = torch.randn(6, 10, 8, device=device)
    expected = NoiseSource(seed=2).add_(base.clone(), 1.0, offset=3)
    whole = torch.zeros(12, 20, 8, device=device)
    for out in (whole[::2, ::2], torch.zeros(8, 10, 6, device=device).permute(2, 1, 0), torch.zeros_like(base)):
        for grad_sum in (base, base.permute(1, 0, 2).contiguous().permute(1, 0, 2)):
            NoiseSource(seed=2).add_(grad_sum, 1.0, offset=3, out=out)
            assert torch.equal(out, expected)
    assert whole[1::2].count_nonzero() == 0 and whole[:, 1::2].count_nonzero() == 0
    transposed = base.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(NoiseSource(seed=2).add_(transposed, 1.0, offset=3), expected)


def test_output_may_share_memory_with_the_sum():
    grad_sum = torch.randn(50_000)
    expected = NoiseSource(seed=2).add_(grad_sum[:-1].clone(), 1.0, offset=0)
    shifted = grad_sum.clone()
    assert torch.equal(NoiseSource(seed=2).add_(shifted[:-1], 1.0, offset=0, out=shifted[1:]), expected)
    same = grad_sum.clone()
    halves = same.view(torch.bfloat16)[: 50_000 - 1]
    NoiseSource(seed=2).add_(same[:-1], 1.0, offset=0, out=halves)
    apart = NoiseSource(seed=2).add_(grad_sum[:-1], 1.0, offset=0, out=torch.empty(49_999, dtype=torch.bfloat16))
    assert torch.equal(halves, apart)


def test_scalars_and_empty_tensors():
    source = NoiseSource(seed=0)
    assert source.add_(torch.zeros(0, 4), 1.0, offset=5).shape == (0, 4)
    assert source.add_(torch.tensor(0.0), 1.0, offset=5).item() == stream(0, 0, 6)[5].float().item()


def test_steps_purposes_and_sources_do_not_share_a_stream():
    first, second = NoiseSource(), NoiseSource()
    draws = [draw(first, 100), draw(second, 100), draw(first, 100, purpose=Purpose.QUANTILE), draw(first, 100, 100)]
    first.advance()
    draws += [draw(first, 100), draw(first, 100, purpose=Purpose.QUANTILE)]
    draws += [draw(NoiseSource(seed=0), 100), draw(NoiseSource(seed=1), 100)]
    for one, other in itertools.combinations(draws, 2):
        assert shared_values(one, other) < 5
    assert torch.equal(draw(NoiseSource(seed=1), 100), draws[-1])


def shared_values(one, other):
    """How many values two draws have in common, at any place; two fp32 normals are equal by chance once in 3e7 pairs."""
    return len(set(one.tolist()) & set(other.tolist()))


def test_the_same_key_gives_a_seeded_source_another_stream(monkeypatch):
    monkeypatch.setattr(os, "urandom", lambda size: bytes(range(size)))
    private, seeded = NoiseSource(), copy.copy(NoiseSource(seed=0))
    assert private._key._secret == seeded._key._secret == bytes(range(32))
    assert private.private and not seeded.private
    assert shared_values(draw(private, 100), draw(seeded, 100)) < 5


def test_refuses_to_draw_twice():
    source = NoiseSource()
    draw(source, 100, 1000)
    before = torch.full((10,), 7.0)
    for offset in (1000, 991, 1050, 1099):
        with pytest.raises(RuntimeError, match=r"already have their GRADIENT noise of step 0; call advance"):
            source.add_(before, 1.0, offset=offset)
    with pytest.raises(RuntimeError, match=r"elements \[900, 1200\)"):
        draw(source, 300, 900)
    assert before.tolist() == [7.0] * 10
    draw(source, 10, 990), draw(source, 10, 1100), draw(source, 10, 1000, purpose=Purpose.QUANTILE)
    source.advance()
    assert source.step == 1
    draw(source, 100, 1000)


def test_remembers_ranges_drawn_in_any_order():
    source, drawn, order = NoiseSource(), set(), random.Random(4)
    for _ in range(400):
        start = order.randrange(300)
        wanted = set(range(start, start + order.randrange(1, 6)))
        if wanted & drawn:
            with pytest.raises(RuntimeError, match="already have"):
                draw(source, len(wanted), start)
        else:
            draw(source, len(wanted), start)
            drawn |= wanted
    ranges = source._used[Purpose.GRADIENT]
    assert {i for start, stop in ranges for i in range(start, stop)} == drawn
    assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(ranges))


def test_many_draws_take_all_or_nothing():
    source = NoiseSource()
    draws = source.spend_all([(5, 3), (0, 5), (8, 0), (20, 2)], 1.0, 1.0)
    assert [d.offset for d in draws] == [5, 0, 8, 20]
    assert source._used[Purpose.GRADIENT] == [(0, 8), (20, 22)]
    for ranges in ([(30, 5), (7, 1)], [(30, 5), (34, 2)], [(40, 5), (-1, 2)], [(8, 13)]):
        with pytest.raises((RuntimeError, ValueError)):
            source.spend_all(ranges, 1.0, 1.0)
    assert source._used[Purpose.GRADIENT] == [(0, 8), (20, 22)]


def test_a_failed_draw_is_spent(monkeypatch, numpy_only):
    def fail(*arguments):
        raise MemoryError

    source = NoiseSource()
    with monkeypatch.context() as broken:
        broken.setattr(stream_module, "normals", fail)
        with pytest.raises(MemoryError):
            draw(source, 10)
    with pytest.raises(RuntimeError, match="already have"):
        draw(source, 10)


def test_a_failure_in_a_thread_is_raised(monkeypatch, restore_threads, numpy_only):
    def fail_late(words, out, scratch):
        if len(words) < 8 * stream_module.CHUNK // 64:
            raise MemoryError
        normals(words, out, scratch)

    torch.set_num_threads(2)
    monkeypatch.setattr(stream_module, "normals", fail_late)
    with pytest.raises(MemoryError):
        draw(NoiseSource(), 20 * stream_module.CHUNK + 1)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda source: pickle.loads(pickle.dumps(source))])
def test_copies_take_their_own_key(seed, duplicate):
    source = NoiseSource(seed)
    source.advance()
    twins = [source, duplicate(source), duplicate(source)]
    twins.append(duplicate(twins[1]))
    assert [twin.step for twin in twins] == [1] * 4
    assert [twin.private for twin in twins] == [seed is None] * 4
    for one, other in itertools.combinations([draw(twin, 100) for twin in twins], 2):
        assert shared_values(one, other) < 5


@pytest.mark.parametrize("seed", [None, 3])
def test_renew_takes_a_new_key(seed):
    def run(*resumed_at: int) -> list[torch.Tensor]:
        source = NoiseSource(seed)
        draws = [draw(source, 50)]
        for step in resumed_at:
            source.renew(step)
            assert source.step == step
            draws.append(draw(source, 50))
        return draws

    once = run(0, 0, 4, 4)
    for one, other in itertools.combinations([*once, run(4)[1]], 2):
        assert shared_values(one, other) < 5
    again = torch.cat(run(0, 0, 4, 4))
    assert torch.equal(again, torch.cat(once)) == (seed is not None)
    source = NoiseSource(seed)
    source.advance()
    source.renew()
    assert source.step == 1


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("action", [lambda source: None, NoiseSource.renew, NoiseSource.advance])
def test_forked_children_take_their_own_key(seed, action):
    source = NoiseSource(seed)
    draw(source, 10)
    children = [forked_draw(source, action) for _ in range(2)]
    action(source)
    draws = [draw(source, 50, 100), *map(torch.tensor, children)]
    for one, other in itertools.combinations(draws, 2):
        assert len(one) == 50 and shared_values(one, other) < 5


def forked_draw(source: NoiseSource, action) -> list[float]:
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Newer Pythons warn of any fork with threads about; the child only draws and leaves.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            action(source)
            os.write(writer, draw(source, 50, 100).numpy().tobytes())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    return np.frombuffer(data, np.float32).tolist()


def test_the_key_stays_hidden(monkeypatch, numpy_only):
    secret = b"the key that nobody may ever see"
    monkeypatch.setattr(os, "urandom", lambda size: secret[:size])
    source = NoiseSource()
    draw(source, 10)
    assert repr(source) == "NoiseSource(private=True, step=0)" == str(source)
    assert secret not in pickle.dumps(source) and not hasattr(source, "state_dict")
    shown = [repr(vars(source))]
    try:
        draw(source, 10)
    except RuntimeError as error:
        shown.append(str(error))
    with monkeypatch.context() as broken:
        broken.setattr(stream_module, "normals", lambda *arguments: 1 / 0)
        try:
            draw(source, 10, 10)
        except ZeroDivisionError:
            frame = sys.exc_info()[2]
            while frame is not None:
                shown.append(repr(frame.tb_frame.f_locals.get("key")) + repr(frame.tb_frame.f_locals.get("self")))
                frame = frame.tb_next
    assert any("Key(hidden)" in text for text in shown)
    assert not any("nobody" in text for text in shown)
    assert repr(NoiseSource(seed=987654321)) == "NoiseSource(private=False, step=0)"


WINDOW = 0.1


def parity_of_results(add_noise, last_bit: int) -> np.ndarray:
    """The last bits of results just below 1 for a clean sum near -0.1, a multiple of 2^-24 with the given last bit.

    A result in [0.9, 1) comes from noise of at least 1. If the noise is an fp32 number it is then a multiple of 2^-23,
    the sum is exact, and its last bit is that of the clean sum.
    """
    clean = -(round(WINDOW * 2**23) * 2 + last_bit) * 2.0**-24
    result = add_noise(torch.full((2**19,), clean)).double().numpy()
    chosen = result[(result >= 1 - WINDOW) & (result < 1)]
    return np.round(chosen * 2**24).astype(np.int64) % 2


def add_fp32_normal(clean: torch.Tensor) -> torch.Tensor:
    return clean + torch.normal(0.0, 1.0, clean.shape, generator=torch.Generator().manual_seed(0))


def add_normal_rounded_first(clean: torch.Tensor) -> torch.Tensor:
    return clean + draw(NoiseSource(seed=11), clean.numel())


def add_ours(clean: torch.Tensor) -> torch.Tensor:
    return NoiseSource(seed=11).add_(clean, 1.0, offset=0)


@pytest.mark.parametrize("add_noise", [add_fp32_normal, add_normal_rounded_first])
def test_the_parity_attack_reads_the_last_bit_through_fp32_noise(add_noise):
    for last_bit in (0, 1):
        parity = parity_of_results(add_noise, last_bit)
        assert len(parity) > 10_000 and (parity == last_bit).all()


def test_the_parity_attack_fails_here():
    for last_bit in (0, 1):
        parity = parity_of_results(add_ours, last_bit)
        assert len(parity) > 10_000 and abs(parity.mean() - 0.5) < 4 * 0.5 / math.sqrt(len(parity))


def radius_grid_distance(first: np.ndarray, second: np.ndarray, guess: float) -> float:
    """How far exp(-r^2 / 2), the radius' uniform, lies from multiples of 2^-24 if the clean sum is `guess`.

    The mean over pairs with a large radius, where fp32 rounding moves it by less than the grid's spacing: 0.25 if the
    guess or the grid is wrong.
    """
    uniform = np.exp(-((first - guess) ** 2 + (second - guess) ** 2) / 2)
    steps = uniform[uniform < 2.0**-7] * 2**24
    assert len(steps) > 2000
    return float(np.abs(steps - np.round(steps)).mean())


def test_the_pair_radius_attack_finds_the_sum_under_fp32_noise():
    # torch fills blocks of 16 with pairs (j, j + 8).
    blocks = add_fp32_normal(torch.full((2**20,), 0.3)).double().numpy().reshape(-1, 2, 8)
    assert radius_grid_distance(blocks[:, 0], blocks[:, 1], float(np.float32(0.3))) < 0.05
    for wrong in (0.0, 0.29, 0.31):
        assert radius_grid_distance(blocks[:, 0], blocks[:, 1], wrong) > 0.2


def test_the_pair_radius_attack_fails_here():
    pairs = add_ours(torch.full((2**20,), 0.3)).double().numpy().reshape(-1, 2)
    for guess in (float(np.float32(0.3)), 0.0, 0.29, 0.31):
        assert radius_grid_distance(pairs[:, 0], pairs[:, 1], guess) == pytest.approx(0.25, abs=0.02)


def test_results_are_normal_around_the_sum():
    result = NoiseSource(seed=8).add_(torch.full((1_000_000,), 5.0), 3.0, offset=10**12).double()
    assert result.mean().item() == pytest.approx(5.0, abs=5 * 3 / 1000)
    assert result.std().item() == pytest.approx(3.0, rel=5 / math.sqrt(2e6))


GRAD = torch.zeros(4)


@pytest.mark.parametrize(
    "grad_sum, arguments, message",
    [
        (GRAD.bfloat16(), {}, "grad_sum must be dense fp32 or fp64, got torch.bfloat16"),
        (GRAD.to_sparse(), {}, "grad_sum must be dense"),
        (GRAD.double(), {}, "out must be fp32, bf16 or fp16, got torch.float64; pass out="),
        (GRAD, {"out": torch.empty(4, dtype=torch.int32)}, "out must be fp32"),
        (GRAD, {"out": torch.empty(2, 2)}, r"out must be dense and of grad_sum's shape \(4,\), got \(2, 2\)"),
        (GRAD, {"out": torch.empty(1).expand(4)}, "out must not be expanded"),
        (GRAD, {"std": -1.0}, "std must be finite and at least 0, got -1.0"),
        (GRAD, {"std": math.nan}, "std must be finite"),
        (GRAD, {"std": math.inf}, "std must be finite"),
        (GRAD, {"offset": -1}, "offset must be an integer"),
        (GRAD, {"offset": 1.0}, "offset must be an integer"),
        (GRAD, {"offset": 2**65 - 3}, "offset must be an integer"),
        (GRAD, {"purpose": 99}, "99 is not a valid Purpose"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(grad_sum, arguments, message):
    source = NoiseSource()
    with pytest.raises(ValueError, match=message):
        source.add_(grad_sum, **{"std": 1.0, "offset": 0, **arguments})
    assert GRAD.tolist() == [0.0] * 4
    draw(source, 4)


def test_bad_seeds_and_steps_are_refused():
    for seed in (1.5, "1", [1]):
        with pytest.raises(ValueError, match="seed must be an integer or None"):
            NoiseSource(seed)
    with pytest.raises(ValueError, match="step must not be negative, got -1"):
        NoiseSource().renew(-1)
    assert torch.equal(draw(NoiseSource(np.int64(3)), 8), draw(NoiseSource(3), 8))


@pytest.mark.parametrize(
    "numbers", [{"std": math.inf}, {"std": -1.0}, {"scale": math.nan}, {"offset": -1}, {"offset": 2**65}]
)
def test_what_is_spent_for_another_pass_is_checked_as_well(numbers):
    source = NoiseSource()
    with pytest.raises(ValueError):
        source.spend(**({"offset": 0, "count": 8, "std": 1.0, "scale": 1.0} | numbers))
    source.spend(0, 8, 1.0, 1.0)  # nothing was taken
    with pytest.raises(RuntimeError, match="overlap"):
        source.add_(torch.zeros(4), 1.0, offset=4)
