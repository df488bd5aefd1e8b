"""The noise stream: from a key to words to standard normals, the same in every implementation.

Words. A block's 64 bytes are 8 little-endian 64-bit words. Element i of the flat parameter vector belongs to block i // 8,
and there to pair j = (i % 8) // 2, which owns the words w = word[2 j] (radius) and a = word[2 j + 1] (angle).

    nonce = step + 2^48 * purpose + 2^63 * seeded        step < 2^48, purpose < 2^15, seeded 0 or 1

Not seeded: ChaCha20's block function (RFC 8439, section 2.3) with state words 4-11 = the 256-bit key, words 12-13 = a 64-bit
block number and words 14-15 = the nonce, low halves first. Below block 2^32 this is RFC 8439's own layout; above, the block
number's high half stands in the first word of RFC 8439's nonce, so that its 32-bit counter never wraps.

Seeded, which is not private: Philox4x32-10 (Salmon et al., SC 2011) of the counter 4 block + j + 2^64 nonce gives pair j's two
words, under the key's first 64 bits. Blocks then stay below 2^62.

Normals. Box-Muller (Box and Muller, Ann. Math. Stat. 29, 1958) in fp64, with s = a read as two's complement:

    u = 1 - w 2^-64 in (0, 1]        theta = 2 pi s 2^-64 in [-pi, pi)        r = sqrt(-2 ln u)
    element i = r cos(theta) if i is even, r sin(theta) if i is odd

r reaches 9.42. `normals` says how the logarithm stays accurate at both ends of u. This file computes the stream in numpy,
csrc/random in C++: the same words, and normals that differ in the last bits of fp64 only.
"""

import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK_ELEMENTS = 8
MAX_STEP = 2**48 - 1
MAX_BLOCKS = 2**64
MAX_ELEMENTS = 2**65  # what both generators reach
_BLOCK_BYTES = 64
_COUNTER_RANGE = 2**32
_MAX_RUN = 2**12
_ZEROS = memoryview(bytes(_MAX_RUN * _BLOCK_BYTES))
# In elements: words, normals and temporaries fit a 1 MiB cache, and torch's own threads stay out of pieces this small.
CHUNK = 2**15
# Starting a thread takes about as long as a chunk.
_CHUNKS_PER_THREAD = 4
# The smallest range drawn, in elements, and the alignment of every draw: see `normals`.
_TILE = 8 * BLOCK_ELEMENTS


def nonce(step: int, purpose: int, seeded: bool) -> int:
    """The 64 bits that keep steps, purposes and seeded sources apart under one key; ValueError if a field overflows."""
    if not 0 <= step <= MAX_STEP:
        raise ValueError(f"step must be in [0, 2^48), got {step}; take a new key and start again from step 0")
    if not 0 <= purpose < 2**15:
        raise ValueError(f"purpose must be in [0, 2^15), got {purpose}; use a member of Purpose")
    return step | purpose << 48 | seeded << 63


class Key:
    """A 256-bit key that gives out its keystream and nothing else.

    Guarantees: the bytes are in no repr (tracebacks that print local variables show `Key(hidden)`), and a key can be
    neither copied nor pickled (TypeError), because two holders of a key would draw the same noise.
    Edge case: Python cannot erase memory, so the bytes stay in the process until it ends.
    """

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != 32:
            raise ValueError(f"secret must be 32 bytes, got {len(secret)}; use os.urandom(32)")
        self._secret = secret

    def __repr__(self) -> str:
        return "Key(hidden)"

    def __reduce__(self) -> str:
        raise TypeError("a noise key cannot be copied or pickled; make a new one")

    @classmethod
    def from_seed(cls, seed: int) -> "Key":
        """The key of a seed: reproducible, and as guessable as the seed is."""
        return cls(hashlib.sha256(b"fastclip noise, seeded, not private: %d" % seed).digest())

    def derive(self, context: int) -> "Key":
        """Another key, which does not tell this one: SHA-256 of this key and `context`."""
        return Key(hashlib.sha256(b"fastclip noise, next key: " + self._secret + b"%d" % context).digest())

    def tensor(self) -> Tensor:
        """uint8 ``[32]``, for a kernel: pass it on where it is made, so that no frame's variables hold it."""
        return torch.frombuffer(bytearray(self._secret), dtype=torch.uint8)

    def words(self, nonce: int, block: int, out: NDArray[np.int64]) -> None:
        """Fills `out`, int64 `[count, 8]` and contiguous, with the words of blocks `block` to `block + count - 1`.

        A word's 64 bits are stored as two's complement. ValueError if a block number does not fit 64 bits.
        """
        count = len(out)
        if block < 0 or block + count > MAX_BLOCKS:
            raise ValueError(f"block must be in [0, 2^64 - {count}], got {block}; lower the offset")
        if nonce >> 63:
            _philox_words(self._secret, nonce, block, out)
            return
        # Not needed where compiled code makes the words, and not there on every machine with a GPU.
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        # Some cipher libraries refuse to let their 32-bit counter wrap, others carry: no call goes across that.
        done = 0
        while done < count:
            run = min(count - done, _COUNTER_RANGE - (block + done) % _COUNTER_RANGE, _MAX_RUN)
            start = (block + done | nonce << 64).to_bytes(16, "little")
            cipher = Cipher(algorithms.ChaCha20(self._secret, start), mode=None).encryptor()
            cipher.update_into(_ZEROS[: run * _BLOCK_BYTES], out[done : done + run].view(np.uint8).reshape(-1).data)
            done += run
        if sys.byteorder == "big":
            out.byteswap(inplace=True)


def philox4x32(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10 of counters ``[4, n]``, low words first: ``[4, n]``; every number below 2^32."""
    c0, c1, c2, c3 = counter
    low = np.uint64(2**32 - 1)
    for i in range(10):
        k0, k1 = (np.uint64((k + i * bump) % 2**32) for k, bump in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = p1 >> np.uint64(32) ^ c1 ^ k0, p1 & low, p0 >> np.uint64(32) ^ c3 ^ k1, p0 & low
    return np.stack([c0, c1, c2, c3])


def _philox_words(secret: bytes, nonce: int, block: int, out: NDArray[np.int64]) -> None:
    """Fills `out` ``[count, 8]`` with a seeded stream's words of blocks `block` and on."""
    if block + len(out) > MAX_ELEMENTS // BLOCK_ELEMENTS:
        raise ValueError(f"block must be in [0, 2^62 - {len(out)}], got {block}; lower the offset")
    pairs = np.uint64(4 * block) + np.arange(4 * len(out), dtype=np.uint64)
    low, half = np.uint64(2**32 - 1), np.uint64(32)
    high_words = [np.full_like(pairs, nonce % 2**32), np.full_like(pairs, nonce >> 32)]
    key = int.from_bytes(secret[:4], "little"), int.from_bytes(secret[4:8], "little")
    w = philox4x32(np.stack([pairs & low, pairs >> half, *high_words]), key)
    words = out.view(np.uint64).reshape(-1, 2)
    words[:, 0] = w[0] | w[1] << half
    words[:, 1] = w[2] | w[3] << half


def normals(words: NDArray[np.int64], out: NDArray[np.float64], scratch: NDArray[np.float64]) -> None:
    """Turns words into standard normals, int64 `[blocks, 8]` to float64 of the same shape, element by element as above.

    `scratch` is float64 `[4, blocks * 4]`. Rows are contiguous and nothing shares memory.

    -ln u = log1p((1 - u) / u), whose argument is formed without cancellation: u and 1 - u are each taken from the word
    itself, so that both are good to a relative 2^-53, and log1p keeps that. So r is good to a relative 2^-50 from
    2^-31.5 (w = 1) to 9.42 (w = 2^64 - 1), and exactly 0 at w = 0. The direction comes from the half angle,
    cos = 2 / (1 + t^2) - 1 and sin = 2 t / (1 + t^2) with t = tan(theta / 2), good to an absolute 2^-50.

    Every element depends on its own two words only. For bits that do not depend on its place in the array either, call
    it with a multiple of 8 blocks: then vectorised loops of up to 32 lanes have no remainder.
    """
    pairs, z = words.reshape(-1, 2), out.reshape(-1, 2)
    a, b, c, d = scratch
    # Read as a signed number, a word below 2^63 is 2^64 (1 - u), and any other is -2^64 u.
    signed = np.multiply(pairs[:, 0], 2.0**-64, out=a)
    upper = np.floor(signed, out=b)
    complement = np.subtract(signed, upper, out=c)
    upper += 1.0
    u = np.subtract(upper, signed, out=d)
    complement /= u
    r = np.log1p(complement, out=a)
    r *= 2.0
    np.sqrt(r, out=r)

    half = np.multiply(pairs[:, 1], np.pi * 2.0**-64, out=b)
    t = np.tan(half, out=c)
    square = np.multiply(t, t, out=b)
    square += 1.0
    cos = np.divide(2.0, square, out=d)
    t *= cos
    cos -= 1.0
    np.multiply(r, cos, out=z[:, 0])
    np.multiply(r, t, out=z[:, 1])


def add_noise(grad_sum: Tensor, out: Tensor, std: float, scale: float, key: Key, nonce: int, offset: int) -> None:
    """``out = round((grad_sum + std * z) * scale)`` for elements ``offset`` and on of the stream `nonce` under `key`.

    grad_sum: ``[n]`` fp32 or fp64; out: ``[n]`` fp32, bf16 or fp16, contiguous, on CPU; they may be one tensor. All of it
    in fp64, rounded once.
    """
    values, start, stop = grad_sum.numpy(), offset, offset + grad_sum.numel()

    def fill(firsts: list[int]) -> None:
        words = np.empty((CHUNK // BLOCK_ELEMENTS, BLOCK_ELEMENTS), dtype=np.int64)
        z = np.empty(words.shape)
        scratch = np.empty((4, CHUNK // 2))
        for first in firsts:
            last = min(first + CHUNK - first % CHUNK, stop)
            aligned = first - first % _TILE
            blocks = -(-(last - aligned) // _TILE) * _TILE // BLOCK_ELEMENTS
            key.words(nonce, aligned // BLOCK_ELEMENTS, words[:blocks])
            normals(words[:blocks], z[:blocks], scratch[:, : blocks * BLOCK_ELEMENTS // 2])
            noise = z.reshape(-1)[first - aligned : last - aligned]
            noise *= std
            noise += values[first - start : last - start]
            noise *= scale
            _round_into(noise, out[first - start : last - start])

    firsts = [start, *range(start - start % CHUNK + CHUNK, stop, CHUNK)]
    threads = min(torch.get_num_threads(), len(firsts) // _CHUNKS_PER_THREAD)
    if threads <= 1:
        fill(firsts)
    else:
        with ThreadPoolExecutor(threads) as pool:
            # The list waits for all threads and raises what one of them raised.
            list(pool.map(fill, [firsts[i::threads] for i in range(threads)]))


def _round_into(values: NDArray[np.float64], out: Tensor) -> None:
    """Rounds fp64 `[n]` to nearest, ties to even, in `out`'s dtype.

    torch converts fp64 to 16 bits by way of fp32, which rounds twice. Where the first rounding is to odd (towards zero,
    then the last bit set if anything was lost), the second one is right (Boldo and Melquiond, IEEE Trans. Comp. 2008).
    """
    exact = torch.from_numpy(values)
    if out.dtype == torch.float32:
        out.copy_(exact)
        return
    single = exact.float().numpy()
    nearest = single.astype(np.float64)
    bits = single.view(np.int32)
    bits -= np.abs(nearest) > np.abs(values)
    bits |= nearest != values
    out.copy_(torch.from_numpy(single))
