"""Triton kernels of fastclip, imported as ``fastclip.kernels``.

This package is free of side effects: it imports nothing and registers nothing, because a process started from the
repository root can also import this folder under the bare name ``kernels``.
"""
