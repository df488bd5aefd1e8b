"""Tests of fastclip.opacus. Not called `opacus`: tests/ is on the path, and would shadow the library of that name."""
