"""A ledger is one: no copies, and threads wait for each other."""

import copy
import pickle
import threading

import pytest

from fastclip.accounting import Ledger


def test_a_ledger_is_one(tmp_path):
    terms = {"unit": "example", "adjacency": "zero-out", "sampler": "poisson", "num_units": 1000, "delta": 1e-5}
    with Ledger.create(tmp_path / "ledger", **terms) as ledger:
        for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied"):
                duplicate(ledger)
        with pytest.raises(ValueError, match="num_units=10 is not this ledger's 1000"):
            ledger.reserve(1.0, 0.01, max_batch=10, num_units=10)
        threads = [threading.Thread(target=lambda: [ledger.reserve(1.0, 0.01) for _ in range(20)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ledger.steps == 80
    with Ledger.open(tmp_path / "ledger") as again:
        assert again.steps == 80
