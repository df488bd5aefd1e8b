"""What Triton makes of every kernel for sm_80 and sm_90: registers, stack, shared memory, tensor-core instructions, wide
loads.

No GPU is needed. ``python bench/triton_resources.py`` rewrites tests/triton_resources.json, which
tests/test_triton_build.py compares; ``--out PATH`` writes elsewhere, ``--only WORD`` takes the forms whose name holds it.
"""

import argparse
import hashlib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TABLE = Path(__file__).parents[1] / "tests" / "triton_resources.json"
CAPABILITIES = (80, 90)


def signatures():
    """Of all modules; SystemExit where a kernel has none."""
    import fastclip.kernels
    from triton.runtime.jit import JITFunction

    for name in [f"fastclip.kernels.{module.name}" for module in pkgutil.iter_modules(fastclip.kernels.__path__)]:
        module = importlib.import_module(name)
        offered = getattr(module, "signatures", list)()
        yield from offered
        listed = {signature.kernel for signature in offered}
        for x in vars(module).values():
            if (
                isinstance(x, JITFunction)
                and x.fn.__name__.endswith("_kernel")
                and x.fn.__module__ == name
                and x not in listed
            ):
                raise SystemExit(f"{name} lists no form of {x.fn.__name__} in signatures()")


def compiled(signature, capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [p.name for p in signature.kernel.params]
    types = {name: signature.arguments.get(name, "constexpr") for name in names}
    pointers = {name for name, kind in types.items() if kind[0] == "*"}
    aligned = pointers if signature.aligned is None else signature.aligned
    source = ASTSource(
        fn=signature.kernel,
        signature=types,
        constexprs={name: signature.constants.get(name) for name, kind in types.items() if kind == "constexpr"},
        attrs={(k,): [["tt.divisibility", 16]] for k, name in enumerate(names) if name in aligned},
    )
    options = {x: getattr(signature, x) for x in ("num_warps", "num_stages", "enable_fp_fusion")}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(cubins):
    """{path: "REG:.. STACK:.. LOCAL:.."}, as cuobjdump of Triton's wheel reports it."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = {}
    for path in cubins:
        report = subprocess.run(
            [tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
        found[path] = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return found


def digest():
    """Of the kernels' sources: a table of others is out of date."""
    import fastclip.kernels

    found = hashlib.sha256()
    for path in sorted(Path(fastclip.kernels.__path__[0]).glob("*.py")):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def resources(kernel, folder):
    path = Path(folder) / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    used, ptx, ir = usage([path])[path], kernel.asm["ptx"], kernel.asm["ttgir"]
    wide = re.findall(r"ld\.global\S*\.v4\.\S*32|ld\.global\S*\.v2\.\S*64|cp\.async\.cg\S* .*, 0x10", ptx)
    products = [x for x in ("wgmma", "mma.sync") if x in ptx]
    # tl.dot from zero, added to what was there: the error bounds rest on it.
    apart = len(re.findall(r"maxNumImpreciseAcc = \d+", ir))
    return {
        "registers": used["REG"],
        "stack": used["STACK"] + used["LOCAL"],
        "shared": kernel.metadata.shared,
        "products": products[0] if products else None,
        "added apart": apart,
        "wide loads": len(wide),
        "flushes": ptx.count(".ftz"),  # of subnormal numbers to 0
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--only", default="")
    chosen = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", "0") not in ("", "0"):
        raise SystemExit("TRITON_INTERPRET is set: interpreted kernels do not compile; unset it")
    import triton

    table = {"triton": triton.__version__, "kernels": digest(), **{f"sm_{c}": {} for c in CAPABILITIES}}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        for signature in signatures():
            if chosen.only in signature.name:
                for capability in CAPABILITIES:
                    table[f"sm_{capability}"][signature.name] = resources(compiled(signature, capability), folder)
    text = re.sub(
        r"\{\s+(\"registers\"[^}]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", json.dumps(table, indent=1)
    )
    chosen.out.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
