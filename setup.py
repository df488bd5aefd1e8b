"""Package layout. Metadata stands in pyproject.toml."""

from setuptools import setup

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
)
