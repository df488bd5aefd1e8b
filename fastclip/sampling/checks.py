"""What is refused of numbers, in the same words everywhere."""

from numbers import Integral, Real


def check_count(name: str, value: int) -> None:
    """Raise ValueError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}={value!r} is not a whole number of at least 1; give an int")


def check_within(name: str, value: float, most: float) -> None:
    """Raise ValueError unless `value` is above 0 and at most `most`."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= most:
        remedy = "; a number of examples is expected_batch_size" if name == "sample_rate" else ""
        raise ValueError(f"{name}={value!r} is not above 0 and at most {most}{remedy}")
