"""Package layout and the compiled kernels. Metadata stands in pyproject.toml."""

import os
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

os.environ.setdefault("MAX_JOBS", "2")


def compiled() -> dict:
    """fastclip._C where torch and a compiler are at hand; the package works without it, in plain torch and numpy."""
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, include_paths
    except ImportError:
        return {}

    class OptionalBuild(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # compilers and build tools raise what they like
                for extension in self.extensions:  # kernels of older sources would go on being used
                    Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
                self.extensions.clear()
                print(f"fastclip: compiled kernels left out, the package runs without them: {error}")

    flags = [
        # Whoever sets CFLAGS, as the sanitizer's build does, decides on optimisation too.
        *([] if "CFLAGS" in os.environ else ["-O3"]),
        # The same bits on every instruction set, and sqrt as one instruction.
        "-ffp-contract=off",
        "-fno-math-errno",
        "-Wno-psabi",
        "-Wno-ignored-attributes",
        "-Wno-maybe-uninitialized",  # gcc about its own AVX-512 headers
    ]
    target = "-DTORCH_TARGET_VERSION=0x020b000000000000"
    sources = glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")
    # torch's own CUDA decides, not a visible GPU: builders often have none.
    if torch.version.cuda is not None and CUDA_HOME is not None:
        # Nothing is specific to sm_90a; PTX serves what comes later.
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        tensors = CUDAExtension(
            "fastclip._C",
            sorted(sources + glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu")),
            py_limited_api=True,
            extra_compile_args={
                "cxx": [*flags, target],
                # The same bits as on CPU: nothing contracted.
                "nvcc": ["-O3", "-std=c++20", "-fmad=false", "-Xcompiler", "-ffp-contract=off,-Wno-psabi", target],
            },
        )
    else:
        tensors = CppExtension("fastclip._C", sorted(sources), py_limited_api=True, extra_compile_args=[*flags, target])
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
        "fastclip.huggingface",
        "fastclip.layers",
        "fastclip.opacus",
        "fastclip.opacus.grad_sample",
        "fastclip.opacus.layers",
        "fastclip.opacus.optimizers",
        "fastclip.opacus.utils",
        "fastclip.opacus.utils.adaptive_clipping",
        "fastclip.opacus.validators",
        "fastclip.recipes",
        "fastclip.sampling",
        "fastclip.kernels",
    ],
    package_dir={"fastclip": "fastclip", "fastclip.kernels": "kernels"},
    package_data={"fastclip": ["py.typed"]},
    **compiled(),
)
