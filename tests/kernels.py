"""What tests of the compiled kernels share."""

import pytest

from fastclip import ops

needs_kernels = pytest.mark.skipif(
    ops.backends()["cpp"]["state"] == "absent", reason="no compiled kernels on this machine: no compiler at install"
)
