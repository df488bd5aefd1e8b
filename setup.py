"""Package layout and the compiled kernels. Metadata stands in pyproject.toml."""

import os
from glob import glob

from setuptools import Extension, setup

os.environ.setdefault("MAX_JOBS", "2")


def compiled() -> dict:
    """fastclip._C where torch and a compiler are at hand; the package works without it, in plain torch and numpy."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
    except ImportError:
        return {}

    class OptionalBuild(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # compilers and build tools raise what they like
                self.extensions.clear()
                print(f"fastclip: compiled kernels left out, the package runs without them: {error}")

    flags = [
        "-O3",
        # The same bits on every instruction set, and sqrt as one instruction.
        "-ffp-contract=off",
        "-fno-math-errno",
        "-Wno-psabi",
        "-Wno-maybe-uninitialized",  # gcc about its own AVX-512 headers
    ]
    tensors = CppExtension(
        "fastclip._C",
        sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
        py_limited_api=True,
        extra_compile_args=[*flags, "-DTORCH_TARGET_VERSION=0x020b000000000000"],
    )
    # pybind11's headers come with torch; of torch itself nothing is used.
    host = Extension(
        "fastclip._host", sorted(glob("csrc/host/*.cpp")), include_dirs=include_paths(), extra_compile_args=flags
    )
    return {"ext_modules": [tensors, host], "cmdclass": {"build_ext": OptionalBuild}}


# kernels/ is imported as fastclip.kernels: a top-level package of that name would shadow Hugging Face's own.
setup(
    packages=[
        "fastclip",
        "fastclip.accounting",
        "fastclip.finetune",
        "fastclip.layers",
        "fastclip.kernels",
    ],
    package_dir={"fastclip": "fastclip", "fastclip.kernels": "kernels"},
    package_data={"fastclip": ["py.typed"]},
    **compiled(),
)
