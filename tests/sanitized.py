"""Run by `make sanitize`: the kernels that the other tests use are the ones built with AddressSanitizer."""

import ctypes

import pytest

from fastclip import _C, _host


@pytest.mark.parametrize("module", [_C, _host])
def test_the_kernels_are_sanitized(module):
    assert "sanitized" in module.__file__
    assert hasattr(ctypes.CDLL(module.__file__), "__asan_init")
