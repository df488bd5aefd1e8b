"""A write-ahead record of the privacy that was spent, so that a crash can lose work but never lose count.

The file holds one JSON object a line: a header with the terms of the guarantee, then one line for every step.
`reserve` writes a step's line and forces it to the disk before it returns, that is before the step's result can be
seen by anyone; it refuses the step that would break the budget, and then writes nothing.

Guarantees and edge cases:

- Whatever was released is in the file. After a crash, a step that was reserved and never released still counts as
  spent; when training goes on from a checkpoint, repeated steps are new steps.
- A crash in mid-write leaves an unreadable last line. Its `reserve` never returned, so that nothing was released for
  it; it is still counted, with the previous step's values, because a disk that lied about a finished write looks the
  same. Opening replaces it by a whole line, marked "torn". With no step before it there are no values to assume:
  opening refuses.
- Any other unreadable, missing or repeated line is damage from outside, and opening refuses.
- One process at a time: the file is locked while it is open, and a forked child may not reserve.
- A file of format 1, written before there were cut draws, opens and goes on; a cut draw is refused in it.
- No key and no seed is ever written; that a step was seeded is.
- Putting an older copy of the file back goes unnoticed. So does a filesystem that ignores fsync or locks.
"""

import fcntl
import json
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from fastclip.accounting.accountants import (
    StepEvent,
    check_count,
    check_delta,
    check_supported,
    evaluate,
    find,
    warn_of_delta,
)
from fastclip.accounting.calibration import affordable_steps, check_epsilon
from fastclip.accounting.guarantee import SAMPLERS, Guarantee, check_terms, guarantee_of
from fastclip.accounting.pld import prepared

# Format 1 knew neither replace-one adjacency nor cut draws, and its readers would count them too low.
_FORMAT = 2
_FORMATS = (1, 2)
_HEADER_KEYS = {
    "fastclip_ledger",
    "unit",
    "adjacency",
    "sampler",
    "num_units",
    "delta",
    "epsilon_budget",
    "examples_per_user",
}
_STEP_KEYS = {"step", "noise_multiplier", "sample_rate"}


class BudgetExhausted(RuntimeError):
    """The step would take epsilon above the budget; it was not recorded and must not be taken."""


class Ledger:
    """The record of one training run, also over restarts; made by `Ledger.create` or `Ledger.open`, closed by `close`.

    unit, adjacency, sampler, num_units, delta, epsilon_budget, examples_per_user: as given to `create`. steps: how many
    steps are spent. `with` closes it; so does losing the last reference.
    """

    def __init__(self, file: int, header: dict[str, Any]) -> None:
        self._file = file
        self._process = os.getpid()
        self._reserving = threading.Lock()
        self._closer = weakref.finalize(self, os.close, file)
        self._end = 0
        self._runs: list[StepEvent] = []
        self._seeded = False
        self._allowed: tuple[StepEvent | None, int] = (None, 0)
        self._format: int = header["fastclip_ledger"]
        self._known: tuple[int, float, float] | None = None
        self.steps = 0
        self.unit: str = header["unit"]
        self.adjacency: str = header["adjacency"]
        self.sampler: str = header["sampler"]
        self.num_units: int = header["num_units"]
        self.delta: float = header["delta"]
        self.epsilon_budget: float | None = header["epsilon_budget"]
        self.examples_per_user: int | None = header["examples_per_user"]

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        unit: str,
        adjacency: str,
        sampler: str,
        num_units: int,
        delta: float,
        epsilon_budget: float | None = None,
        examples_per_user: int | None = None,
    ) -> "Ledger":
        """Begin a ledger in a new file.

        unit: what is protected, such as "example" or "user". adjacency: "add/remove", "zero-out" or "replace-one".
        sampler: "poisson", or "truncated poisson" for draws that are cut. num_units: the public number of units.
        delta: in (0, 1). epsilon_budget: the epsilon that `reserve` never exceeds.
        examples_per_user: K, where examples are sampled and the unit is a user with at most K of them.

        Warns (AccountingWarning) of a delta that is not below 1 / num_units.

        Raises ValueError for bad input and FileExistsError when there is a file already.
        """
        check_terms(unit, adjacency)
        if sampler not in SAMPLERS:
            raise ValueError(
                f"sampler={sampler!r} is not accounted for; draw batches by {' or '.join(map(repr, SAMPLERS))}"
            )
        check_count("num_units", num_units, least=1)
        check_delta("delta", delta)
        if epsilon_budget is not None:
            check_epsilon("epsilon_budget", epsilon_budget)
        if examples_per_user is not None:
            check_count("examples_per_user", examples_per_user, least=1)
        check_supported(find("pld"), [], examples_per_user, adjacency)
        prepared([], int(examples_per_user or 1), adjacency)
        warn_of_delta(delta, num_units, unit)
        header = {
            "fastclip_ledger": _FORMAT,
            "unit": unit,
            "adjacency": adjacency,
            "sampler": sampler,
            "num_units": int(num_units),
            "delta": float(delta),
            "epsilon_budget": None if epsilon_budget is None else float(epsilon_budget),
            "examples_per_user": None if examples_per_user is None else int(examples_per_user),
        }
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            raise FileExistsError(
                f"path={os.fspath(path)!r} exists; go on with Ledger.open, or choose another name"
            ) from None
        ledger = cls(file, header)
        _lock(file, path)
        ledger._write(header)
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return ledger

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Ledger":
        """Go on with an existing ledger, repairing a last line torn by a crash.

        Raises FileNotFoundError, RuntimeError when another process (or another Ledger in this one) has it open, and
        ValueError when the file is no ledger or is damaged.
        """
        file = os.open(path, os.O_RDWR)
        try:
            _lock(file, path)
            with os.fdopen(os.dup(file), "rb") as reader:
                lines = reader.read().splitlines(keepends=True)
            header = _parsed(lines[0], _HEADER_KEYS) if lines and lines[0].endswith(b"\n") else None
            if header is None:
                raise ValueError(
                    f"path={os.fspath(path)!r} does not begin with a ledger's header. If a crash cut its creation "
                    "short, no step was reserved in it: delete it and begin anew with Ledger.create"
                )
            if header["fastclip_ledger"] not in _FORMATS:
                raise ValueError(
                    f"path={os.fspath(path)!r} has format {header['fastclip_ledger']!r} where {_FORMAT} is known; "
                    "open it with the version that wrote it"
                )
        except BaseException:
            os.close(file)
            raise
        ledger = cls(file, header)
        try:
            ledger._read(path, lines)
        except BaseException:
            ledger.close()
            raise
        return ledger

    def reserve(
        self,
        noise_multiplier: float,
        sample_rate: float,
        seeded: bool = False,
        *,
        max_batch: int | None = None,
        num_units: int | None = None,
    ) -> int:
        """Record one step as spent, on the disk, and return its number, from 1 on. Call it before releasing anything.

        seeded: noise or draws of this step come from a known seed, which voids the guarantee for good.
        max_batch, num_units: of a draw that is cut, as in `StepEvent`; the ledger's own num_units when only max_batch
            is given and the unit is what is sampled.

        Raises ValueError for bad input, BudgetExhausted when the step would take epsilon above the budget (then
        nothing is written), RuntimeError in a forked child or on a closed ledger, and OSError when the disk refuses;
        after that, open the file anew.
        """
        if max_batch is not None and num_units is None and self.examples_per_user is None:
            num_units = self.num_units
        if num_units is not None and self.examples_per_user is None and num_units != self.num_units:
            raise ValueError(f"num_units={num_units!r} is not this ledger's {self.num_units}; leave it out")
        event = StepEvent(noise_multiplier, sample_rate, 1, max_batch, num_units)
        self._check_accountable(event)
        if not self._closer.alive:
            raise RuntimeError("this ledger is closed; go on with Ledger.open")
        if os.getpid() != self._process:
            raise RuntimeError(
                "this ledger was opened before a fork; only the process that opened it may reserve steps"
            )
        with self._reserving:
            self._check_budget(event)
            self._write(_step_line(self.steps + 1, event, seeded))
            self._count(event, seeded)
            return self.steps

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a ledger cannot be copied or pickled, two of them would count the same step; use Ledger.open")

    def events(self) -> list[StepEvent]:
        """The steps that are spent, in order, equal neighbours counted together."""
        return list(self._runs)

    def epsilon(self, delta: float | None = None) -> float:
        """Epsilon of all steps that are spent, at `delta` or else the ledger's own."""
        at = self.delta if delta is None else delta
        if self._known is None or self._known[:2] != (self.steps, at):
            self._known = (self.steps, at, evaluate(self._runs, at, *self._terms()))
        return self._known[2]

    def guarantee(
        self, *, seeded: bool = False, from_size: Sequence[str] = (), caveats: Sequence[str] = ()
    ) -> Guarantee:
        """The guarantee of all spent steps; arguments as for `guarantee_of`. A seeded step in the file voids it."""
        return guarantee_of(
            self._runs,
            self.delta,
            unit=self.unit,
            adjacency=self.adjacency,
            sampler=self.sampler,
            examples_per_user=self.examples_per_user,
            num_units=self.num_units,
            from_size=from_size,
            seeded=seeded or self._seeded,
            caveats=caveats,
        )

    def close(self) -> None:
        """Unlock the file. Closing twice is no error."""
        self._closer()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _terms(self) -> tuple[str, int | None, str]:
        return "pld", self.examples_per_user, self.adjacency

    def _check_accountable(self, event: StepEvent) -> None:
        """A step whose cost can never be told must not enter the file."""
        if event.max_batch is None:
            return
        if self._format == 1:
            raise ValueError(
                f"max_batch={event.max_batch!r} cannot be written to a ledger of format 1; begin another one with "
                "Ledger.create"
            )
        check_supported(find("pld"), [event], self.examples_per_user, self.adjacency)
        prepared([event], self.examples_per_user or 1, self.adjacency)

    def _check_budget(self, event: StepEvent) -> None:
        if self.epsilon_budget is None:
            return
        kind, until = self._allowed
        if kind == event and self.steps < until:
            return
        more = self._affordable(event)
        if more == 0:
            raise BudgetExhausted(
                f"step {self.steps + 1} with noise_multiplier={event.noise_multiplier!r} and "
                f"sample_rate={event.sample_rate!r} would take epsilon above epsilon_budget={self.epsilon_budget!r} at "
                f"delta={self.delta!r}; {self.steps} steps are spent: stop here, or use more noise"
            )
        self._allowed = (event, self.steps + more)

    def _affordable(self, event: StepEvent) -> int:
        assert self.epsilon_budget is not None
        if self._runs and self._runs[-1] != replace(event, count=self._runs[-1].count):
            # A schedule may change at every step; the search for all further steps pays only once two are equal.
            return int(evaluate([*self._runs, event], self.delta, *self._terms()) <= self.epsilon_budget)
        return affordable_steps(
            self.epsilon_budget,
            self.delta,
            event.noise_multiplier,
            event.sample_rate,
            self._runs,
            *self._terms(),
            max_batch=event.max_batch,
            num_units=event.num_units,
        )

    def _count(self, event: StepEvent, seeded: bool) -> None:
        if self._runs and self._runs[-1] == replace(event, count=self._runs[-1].count):
            self._runs[-1] = replace(event, count=self._runs[-1].count + 1)
        else:
            self._runs.append(event)
        self._seeded = self._seeded or seeded
        self.steps += 1

    def _write(self, content: dict[str, Any]) -> None:
        line = json.dumps(content, allow_nan=False).encode() + b"\n"
        try:
            written = os.pwrite(self._file, line, self._end)
            if written != len(line):
                raise OSError(
                    f"only {written} of {len(line)} bytes of a ledger line could be written; make room on the disk"
                )
            os.ftruncate(self._file, self._end + len(line))
            os.fsync(self._file)
        except OSError:
            # What the file holds now is not known: only reading it again can tell.
            self.close()
            raise
        self._end += len(line)

    def _read(self, path: str | os.PathLike[str], lines: list[bytes]) -> None:
        self._end = len(lines[0])
        for place, line in enumerate(lines[1:], start=2):
            content = _parsed(line, _STEP_KEYS)
            if content is None and place == len(lines):
                self._mend(path)
                return
            if content is None or content["step"] != self.steps + 1:
                raise ValueError(
                    f"path={os.fspath(path)!r} is damaged at line {place}: step {self.steps + 1} should stand there. "
                    "Restore the file; without it there is no telling what was spent"
                )
            cut = content.get("max_batch"), content.get("num_units")
            event = StepEvent(content["noise_multiplier"], content["sample_rate"], 1, *cut)
            seeded = content.get("seeded", False)
            if line.endswith(b"\n"):
                self._end += len(line)
            else:
                self._write(content)
            self._count(event, seeded)

    def _mend(self, path: str | os.PathLike[str]) -> None:
        if not self._runs:
            raise ValueError(
                f"path={os.fspath(path)!r} breaks off in its first step, which was therefore never released; delete it "
                "and begin anew with Ledger.create"
            )
        event = replace(self._runs[-1], count=1)
        self._write(_step_line(self.steps + 1, event, self._seeded) | {"torn": True})
        self._count(event, self._seeded)


def _step_line(step: int, event: StepEvent, seeded: bool) -> dict[str, Any]:
    line: dict[str, Any] = {"step": step, "noise_multiplier": event.noise_multiplier, "sample_rate": event.sample_rate}
    if event.max_batch is not None:
        line |= {"max_batch": event.max_batch, "num_units": event.num_units}
    return line | {"seeded": True} if seeded else line


def _parsed(line: bytes, keys: set[str]) -> dict[str, Any] | None:
    """The line's object when it is whole, else None."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) and keys <= content.keys() else None


def _lock(file: int, path: str | os.PathLike[str]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(
            f"path={os.fspath(path)!r} is open elsewhere; one process at a time may write a ledger"
        ) from None
