import itertools
import math
import pickle
from copy import deepcopy
from decimal import Decimal, localcontext

import numpy as np
import pytest
from scipy import stats

from fastclip.random import Key, nonce, normals, philox4x32

KEY = Key.from_seed(20260101)
PLAIN = nonce(0, 0, seeded=False)
SEEDED = nonce(0, 0, seeded=True)
EXTREME = [0, 1, 2, 3, 2**53 - 1, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 2**53, 2**64 - 2, 2**64 - 1]


def chacha_block(secret: bytes, counter_and_nonce: bytes) -> bytes:
    """RFC 8439, sections 2.1 to 2.3, read straight from the text."""
    initial = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574]
    initial += np.frombuffer(secret + counter_and_nonce, "<u4").tolist()
    x = list(initial)

    def mix(target: int, source: int, other: int, rotation: int) -> None:
        x[target] = (x[target] + x[source]) & 0xFFFFFFFF
        mixed = x[other] ^ x[target]
        x[other] = (mixed << rotation | mixed >> (32 - rotation)) & 0xFFFFFFFF

    columns = [(i, i + 4, i + 8, i + 12) for i in range(4)]
    diagonals = [(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4) for i in range(4)]
    for a, b, c, d in 10 * (columns + diagonals):
        mix(a, b, d, 16)
        mix(c, d, b, 12)
        mix(a, b, d, 8)
        mix(c, d, b, 7)
    return b"".join(((s + t) & 0xFFFFFFFF).to_bytes(4, "little") for s, t in zip(x, initial, strict=True))


def draw_words(count: int, key: Key = KEY, nonce: int = PLAIN, block: int = 0) -> np.ndarray:
    words = np.empty((count, 8), dtype=np.int64)
    key.words(nonce, block, words)
    return words


def in_numpy(words: np.ndarray) -> np.ndarray:
    z = np.empty(words.shape)
    normals(words, z, np.empty((4, words.size // 2)))
    return z.reshape(-1)


def in_vectors(words: np.ndarray) -> np.ndarray:
    return host().normals(words).reshape(-1)


def block_by_block(words: np.ndarray) -> np.ndarray:
    """As a GPU's threads do it."""
    return host().normals(words, vectors=False).reshape(-1)


def host():
    return pytest.importorskip("fastclip._host", reason="no compiler at install")


@pytest.fixture(params=[in_numpy, in_vectors, block_by_block], autouse=True)
def to_normals(request, monkeypatch):
    """The transform under test: numpy's, and the compiled ones where they were built."""
    if request.param is not in_numpy:
        host()
    monkeypatch.setitem(globals(), "to_normals", request.param)


def draw(count: int, key: Key = KEY, nonce: int = PLAIN) -> np.ndarray:
    """`count` normals, in pieces of a few MB."""
    pieces = [to_normals(draw_words(8192, key, nonce, block)) for block in range(0, -(-count // 8), 8192)]
    return np.concatenate(pieces)[:count]


def pair_words(pairs: list[tuple[int, int]]) -> np.ndarray:
    """Unsigned (radius, angle) words, padded to whole blocks."""
    padded = pairs + [(0, 0)] * (-len(pairs) % 4)
    return np.array(padded, dtype=np.uint64).view(np.int64).reshape(-1, 8)


def exact_radius(word: int) -> float:
    with localcontext() as context:
        context.prec = 60
        return float((-2 * (1 - Decimal(word) / 2**64).ln()).sqrt())


def test_rfc_8439_block_function():
    # RFC 8439, section 2.3.2: key 00..1f, counter 1, nonce 000000090000004a00000000.
    secret, state = bytes(range(32)), bytes.fromhex("01000000000000090000004a00000000")
    expected = bytes.fromhex(
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )
    assert chacha_block(secret, state) == expected
    block, tail = (int.from_bytes(part, "little") for part in (state[:8], state[8:]))
    assert draw_words(1, Key(secret), tail, block).astype("<i8").tobytes() == expected


@pytest.mark.parametrize("block", [0, 2**32 - 3, 2**33 - 1, 2**64 - 6, 4093])
def test_words_are_chacha20_with_a_64_bit_block_number(block):
    secret, tail = bytes(range(100, 132)), nonce(5, 1, seeded=False)
    expected = b"".join(chacha_block(secret, (block + i | tail << 64).to_bytes(16, "little")) for i in range(6))
    assert draw_words(6, Key(secret), tail, block).astype("<i8").tobytes() == expected


@pytest.mark.parametrize("mode", [PLAIN, SEEDED])
def test_a_long_run_is_its_pieces(mode):
    whole = draw_words(10_000, nonce=mode, block=2**32 - 5000)
    pieces = [draw_words(2500, nonce=mode, block=2**32 - 5000 + start) for start in range(0, 10_000, 2500)]
    np.testing.assert_array_equal(whole, np.concatenate(pieces))


# The authors' own known answers for Philox4x32-10 (Random123, kat_vectors): counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, output", KNOWN)
def test_philox_gives_its_authors_answers(counter, key, output):
    assert tuple(philox4x32(np.array(counter, dtype=np.uint64)[:, None], key)[:, 0]) == output
    assert host().philox4x32(list(counter), *key) == output


def test_a_seeded_block_is_four_philox_outputs():
    tail, block = nonce(3, 1, seeded=True), 2**32 + 2**31 + 77
    words = draw_words(1, Key(bytes(range(32))), tail, block).view(np.uint64).reshape(4, 2)
    key = 0x03020100, 0x07060504
    for j, pair in enumerate(words.tolist()):
        counter = (4 * block + j) | tail << 64
        parts = np.array([counter >> shift & 2**32 - 1 for shift in (0, 32, 64, 96)], dtype=np.uint64)
        w = [int(x) for x in philox4x32(parts[:, None], key)[:, 0]]
        assert pair == [w[0] | w[1] << 32, w[2] | w[3] << 32]


@pytest.mark.parametrize("mode", [PLAIN, SEEDED, nonce(2**48 - 1, 2**15 - 1, seeded=True)])
@pytest.mark.parametrize("block", [0, 2**30 - 3, 2**32 - 3, 2**62 - 8])
def test_compiled_words_are_the_same(mode, block):
    np.testing.assert_array_equal(host().words(KEY._secret, mode, block, 8), draw_words(8, KEY, mode, block))


def test_every_transform_in_c_has_the_same_bits():
    words = draw_words(1000)
    np.testing.assert_array_equal(host().normals(words), host().normals(words, vectors=False))


def test_nonce_fields_are_where_the_stream_says():
    assert nonce(0x123456789ABC, 0x7ABC, seeded=True) == 0x123456789ABC | 0x7ABC << 48 | 1 << 63


def test_the_stream_of_a_seed_stays_what_it_is():
    first = draw_words(1, Key.from_seed(7), nonce(0, 0, seeded=True)).view(np.uint64).reshape(-1)
    assert [f"{word:016x}" for word in first[:3]] == ["174c6294f0659470", "60d90654424b73cf", "909ab48f0530d5d4"]
    assert not np.array_equal(draw_words(1, Key.from_seed(-7)), draw_words(1, Key.from_seed(7)))


def test_normals_are_box_muller_of_their_two_words():
    words = draw_words(64)
    z = to_normals(words).reshape(-1, 2)
    for (w, a), (even, odd) in zip(words.reshape(-1, 2).tolist(), z.tolist(), strict=True):
        r, theta = exact_radius(w % 2**64), 2 * math.pi * (a / 2**64)
        assert even == pytest.approx(r * math.cos(theta), abs=1e-15 * (1 + r))
        assert odd == pytest.approx(r * math.sin(theta), abs=1e-15 * (1 + r))


def test_extreme_words():
    pairs = list(itertools.product(EXTREME, EXTREME))
    z = to_normals(pair_words(pairs)).reshape(-1, 2)
    for (w, a), (even, odd) in zip(pairs, z.tolist(), strict=False):
        r, theta = exact_radius(w), 2 * math.pi * ((a - 2**64 if a >= 2**63 else a) / 2**64)
        assert math.hypot(even, odd) == pytest.approx(r, rel=2**-50, abs=0)
        assert even == pytest.approx(r * math.cos(theta), abs=2**-50 * r)
        assert odd == pytest.approx(r * math.sin(theta), abs=2**-50 * r)


def test_the_radius_goes_from_0_to_beyond_9():
    none, least, most = (np.hypot(*to_normals(pair_words([(w, 5**20)]))[:2]) for w in (0, 1, 2**64 - 1))
    assert none == 0
    assert least == pytest.approx(math.sqrt(2.0**-63), rel=2**-50)
    assert most == pytest.approx(math.sqrt(128 * math.log(2)), rel=2**-50)


def test_the_radius_is_monotone_across_the_middle_of_u():
    middle = [(2**63 + step * 2**11, 0) for step in range(-500, 500)]
    r = to_normals(pair_words(middle)).reshape(-1, 2)[:, 0]
    assert (np.diff(r) >= 0).all() and r[0] < math.sqrt(2 * math.log(2)) < r[-1]


def test_bits_do_not_depend_on_the_place_in_the_array():
    words = draw_words(1024)
    z = to_normals(words).reshape(-1, 8)
    for start, blocks in itertools.product(range(0, 200, 7), (8, 16, 24, 64, 200)):
        np.testing.assert_array_equal(
            to_normals(words[start : start + blocks].copy()), z[start : start + blocks].ravel()
        )


def check_distribution(z: np.ndarray) -> None:
    """Marginals, radius and angle; thresholds of 1e-5 on a fixed key, so that a run either always passes or never."""
    assert stats.kstest(z, "norm").pvalue > 1e-5
    cells = np.bincount((stats.norm.cdf(z) * 1000).astype(int).clip(0, 999), minlength=1000)
    assert stats.chisquare(cells).pvalue > 1e-5
    even, odd = z[0::2], z[1::2]
    radius = np.exp(-(even**2 + odd**2) / 2)
    angle = np.arctan2(odd, even) / (2 * np.pi) % 1.0
    assert stats.kstest(radius, "uniform").pvalue > 1e-5
    joint = (radius * 32).astype(int).clip(0, 31) * 32 + (angle * 32).astype(int).clip(0, 31)
    assert stats.chisquare(np.bincount(joint, minlength=1024)).pvalue > 1e-5
    for bound in (2.0, 3.0, 4.0):
        assert stats.binomtest(int((np.abs(z) > bound).sum()), z.size, 2 * stats.norm.sf(bound)).pvalue > 1e-5


@pytest.mark.parametrize("mode", [PLAIN, SEEDED])
def test_distribution(mode):
    check_distribution(draw(1_000_000, nonce=mode))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [PLAIN, SEEDED])
def test_distribution_of_ten_million(mode):
    check_distribution(draw(10_000_000, nonce=mode))


@pytest.mark.parametrize("mode", [PLAIN, SEEDED])
def test_no_correlation_over_offsets(mode):
    z = draw(1_000_000, nonce=mode)
    for lag in [*range(1, 17), 64, 512, 2**14]:
        for moment in (z, z**2 - 1):
            correlation = np.corrcoef(moment[:-lag], moment[lag:])[0, 1]
            assert abs(correlation) < 5 / math.sqrt(z.size)


def test_no_correlation_between_steps_purposes_keys_and_modes():
    modes = itertools.product((0, 1, 2, 2**32, 2**48 - 1), (True, False))
    streams = [draw(200_000, KEY, nonce(step, 0, seeded=seeded)) for step, seeded in modes]
    streams += [draw(200_000, KEY, nonce(0, 1, seeded=seeded)) for seeded in (True, False)]
    streams += [draw(200_000, Key.from_seed(seed)) for seed in (0, 1, 2**64)] + [draw(200_000, KEY.derive(0))]
    for moment in (lambda z: z, lambda z: z**2):
        off_diagonal = np.corrcoef([moment(z) for z in streams]) - np.eye(len(streams))
        assert np.abs(off_diagonal).max() < 5 / math.sqrt(200_000)


def test_a_key_shows_and_shares_nothing():
    key = Key(b"0123456789abcdef" * 2)
    assert repr(key) == str(key) == "Key(hidden)"
    for copy in (pickle.dumps, deepcopy):
        with pytest.raises(TypeError, match="cannot be copied"):
            copy(key)


def test_derived_keys_differ():
    keys = [KEY, KEY.derive(0), KEY.derive(1), KEY.derive(0).derive(0), Key.from_seed(0), Key.from_seed(1)]
    firsts = {draw_words(1, key).tobytes() for key in keys}
    assert len(firsts) == len(keys)
    np.testing.assert_array_equal(draw_words(1, KEY.derive(3)), draw_words(1, KEY.derive(3)))


def test_bad_input():
    with pytest.raises(ValueError, match="secret must be 32 bytes, got 16"):
        Key(bytes(16))
    with pytest.raises(ValueError, match="step"):
        nonce(2**48, 0, seeded=False)
    with pytest.raises(ValueError, match="purpose"):
        nonce(0, 2**15, seeded=False)
    for mode, block in [(PLAIN, -1), (PLAIN, 2**64 - 1), (SEEDED, -1), (SEEDED, 2**62 - 1)]:
        with pytest.raises(ValueError, match="block must be in"):
            draw_words(2, nonce=mode, block=block)


def test_bad_input_to_the_compiled_ones():
    with pytest.raises(ValueError, match="key must be 32 bytes, got 3"):
        host().words(b"abc", 0, 0, 1)
    with pytest.raises(ValueError, match=r"words must be int64 of shape \[n, 8\]"):
        host().normals(np.zeros((4, 4), dtype=np.int64))
    assert host().cpu_capability() in ("avx512", "avx2", "default")
