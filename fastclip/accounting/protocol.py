"""Opacus' accountant protocol, over every accountant that is registered here.

An object of this class stands wherever a training loop expects an Opacus accountant: it is told of each step and asked
for epsilon. It keeps its history in memory; the record that survives a crash is `fastclip.accounting.Ledger`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from fastclip.accounting.accountants import StepEvent, check_adjacency, check_count, epsilon_of, find

_DEFAULTS = {"examples_per_user": None, "adjacency": "add/remove"}


class PrivacyAccountant:
    """Counts steps and computes what they cost; made by `create_accountant`.

    history: [(noise multiplier, sample rate, steps)], in order, equal neighbours counted together.
    examples_per_user, adjacency: as in `epsilon_of`.
    """

    def __init__(
        self, accountant: str = "pld", *, examples_per_user: int | None = None, adjacency: str = "add/remove"
    ) -> None:
        """Raises ValueError for a name that is not registered and for other bad input."""
        check_adjacency(adjacency)
        if examples_per_user is not None:
            check_count("examples_per_user", examples_per_user, least=1)
        self._name = find(accountant).name
        self.examples_per_user = examples_per_user
        self.adjacency = adjacency
        self.history: list[tuple[float, float, int]] = []

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Count one step. Raises ValueError for bad input."""
        event = StepEvent(noise_multiplier, sample_rate)
        kind, count = (event.noise_multiplier, event.sample_rate), 1
        if self.history and self.history[-1][:2] == kind:
            count += self.history.pop()[2]
        self.history.append((*kind, count))

    def get_epsilon(self, delta: float) -> float:
        """Epsilon of all counted steps at `delta`; 0.0 for none. Warns and raises as `epsilon_of` does."""
        steps = [StepEvent(*entry) for entry in self.history]
        return epsilon_of(steps, delta, self._name, self.examples_per_user, self.adjacency)

    def _terms(self) -> dict[str, Any]:
        return {"examples_per_user": self.examples_per_user, "adjacency": self.adjacency}

    def __len__(self) -> int:
        """How many steps were counted."""
        return sum(count for _, _, count in self.history)

    def mechanism(self) -> str:
        """The accountant's name, which a state carries with it."""
        return self._name

    def get_optimizer_hook_fn(self, sample_rate: float) -> Callable[[Any], None]:
        """A function of an optimizer that counts its step, for `optimizer.attach_step_hook`.

        It reads `optimizer.noise_multiplier`, and raises RuntimeError where `optimizer.accumulated_iterations` says that
        several draws were added up: a unit in two of them counts double, which no rate expresses.
        """

        def count(optimizer: Any) -> None:
            draws = getattr(optimizer, "accumulated_iterations", 1)
            if draws != 1:
                raise RuntimeError(f"{draws} draws were added up for one step: release each draw by a step of its own")
            self.step(noise_multiplier=optimizer.noise_multiplier, sample_rate=sample_rate)

        return count

    def state_dict(self, destination: dict[str, Any] | None = None) -> dict[str, Any]:
        """{"history": ..., "mechanism": ..., and the terms}, added to `destination` if there is one."""
        state = {} if destination is None else destination
        state.update(history=list(self.history), mechanism=self._name, **self._terms())
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s result. Raises ValueError, and changes nothing, for what is no state of this
        mechanism.
        """
        missing = {"history", "mechanism"} - set(state_dict or ())
        if missing:
            raise ValueError(
                f"state_dict lacks {', '.join(map(repr, sorted(missing)))}; give what state_dict() of an accountant "
                "returned"
            )
        if state_dict["mechanism"] != self._name:
            raise ValueError(
                f"state_dict is of mechanism={state_dict['mechanism']!r} and this is {self._name!r}; make an accountant "
                "of the same mechanism, or call step for every step of its history"
            )
        for name, value in self._terms().items():
            # A state of Opacus' says neither, and means the defaults.
            theirs = state_dict.get(name, _DEFAULTS[name])
            if theirs != value:
                raise ValueError(
                    f"state_dict is for {name}={theirs!r} and this accountant for {value!r}; make it with the same"
                )
        if any(len(entry) != 3 for entry in state_dict["history"]):
            raise ValueError("history must hold (noise_multiplier, sample_rate, count) and nothing more")
        events = [StepEvent(*entry) for entry in state_dict["history"]]
        self.history = [(event.noise_multiplier, event.sample_rate, event.count) for event in events]


def create_accountant(
    mechanism: str = "pld", *, examples_per_user: int | None = None, adjacency: str = "add/remove"
) -> PrivacyAccountant:
    """An accountant by its name, as Opacus' function of that name. Raises ValueError for bad input."""
    return PrivacyAccountant(mechanism, examples_per_user=examples_per_user, adjacency=adjacency)
