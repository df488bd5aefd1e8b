"""Every name that scripts take from Opacus is there, is taken by the same arguments, and stands in the table as it is."""

from __future__ import annotations

import inspect

import pytest

from opacus_face.names import all_names, resolve, table, table_on_the_page

pytest.importorskip("opacus", reason="opacus is not installed: pip install fastclip-dp[opacus]")


@pytest.mark.parametrize(("module", "name"), all_names())
def test_name_takes_what_opacus_takes(module: str, name: str) -> None:
    theirs, ours = resolve("opacus", module, name), resolve("fastclip.opacus", module, name)
    if isinstance(theirs, classmethod | staticmethod):
        theirs, ours = theirs.__func__, ours.__func__
    # An exception takes what exceptions take.
    if not callable(theirs) or (isinstance(theirs, type) and issubclass(theirs, Exception)):
        return
    wanted = inspect.signature(theirs).parameters
    given = inspect.signature(ours).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in given.values())
    for key, parameter in wanted.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        assert key in given or (takes_any and parameter.kind is parameter.KEYWORD_ONLY), key
        if key in given and parameter.default is not parameter.empty:
            default = given[key].default
            made_anew = (
                key == "criterion" and default is None
            )  # where Opacus shares one object between calls, and changes it
            same = default == parameter.default or type(default) is type(parameter.default)
            assert same or made_anew, f"{key}={default}"


def test_the_page_says_whose_each_name_is() -> None:
    assert table_on_the_page() == table(), "run python tests/opacus_face/names.py"
