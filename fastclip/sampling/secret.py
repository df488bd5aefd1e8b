"""Where a sampler's words come from: one key, who holds it, and who else gets it.

Guarantees and edge cases:

- The key comes from the operating system. It is in no pickle, deepcopy or checkpoint and in no repr, and a forked child
  replaces it: each copy draws afresh. So a resumed run cannot repeat its draws, and must not.
- The processes of one distributed run share a key: the first one's, broadcast once, when the sampler is made. A copy of
  such a sampler, or a forked child's, has none: the other processes would not draw what it draws.
- A seed makes words repeat, also in copies and forked children. Whoever knows it knows the batches, so no epsilon holds
  for such a run.
- A key is used for nothing but one sampler's draws: noise and dropout have keys of their own.
"""

import hashlib
import os
import weakref
from enum import IntEnum
from numbers import Integral
from typing import Any

import torch.distributed as dist

from fastclip.sampling.words import Words


class Purpose(IntEnum):
    """What words are for. Words of different purposes never coincide."""

    UNITS = 0
    EXAMPLES = 1
    CAP = 2


class Secret:
    """A key that gives out words and nothing else.

    seed: an int makes the words repeatable and the run not private. process_group: of torch.distributed; all of its
    processes get the first one's key, and every one of them has to make its Secret at this point.
    Raises ValueError for a seed that is no int.
    """

    def __init__(self, seed: int | None = None, process_group: Any = None) -> None:
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral)):
            raise ValueError(f"seed={seed!r} is not an int; leave it out for a private run")
        self._seed = None if seed is None else int(seed)
        self._shared = process_group is not None
        self._key: bytes | None = self._made()
        if process_group is not None:
            holder = [self._key]
            dist.broadcast_object_list(holder, src=dist.get_global_rank(process_group, 0), group=process_group)
            self._key = holder[0]
        _LIVE.add(self)

    @property
    def seeded(self) -> bool:
        return self._seed is not None

    def words(self, purpose: Purpose, draw: int = 0) -> Words:
        """The words of one draw and purpose; the same ones whenever asked. RuntimeError where the key stayed behind."""
        if self._key is None:
            raise RuntimeError(
                "a copy of a distributed run's sampler, or a forked child's, has no key that the other processes know: make "
                "a new sampler with process_group= in every process"
            )
        return Words(self._key, draw + (purpose << 56))

    def renew(self) -> None:
        """Forget the key, as every copy does: take a new one, or none if it has to be the other processes' too."""
        self._key = None if self._shared and self._seed is None else self._made()

    def _made(self) -> bytes:
        if self._seed is None:
            return os.urandom(32)
        return hashlib.sha256(b"fastclip: Poisson draws, not private\0%d" % self._seed).digest()

    def __repr__(self) -> str:
        return "Secret(hidden)"

    def __getstate__(self) -> dict[str, Any]:
        return {"_seed": self._seed, "_shared": self._shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.renew()
        _LIVE.add(self)


_LIVE: "weakref.WeakSet[Secret]" = weakref.WeakSet()


def _renew_all() -> None:
    for secret in list(_LIVE):
        secret.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
