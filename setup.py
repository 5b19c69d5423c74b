"""Package build. Pure Python: no compiler is needed."""

import pathlib
import re

from setuptools import find_packages, setup

VERSION = re.search(r'__version__ = "(.+?)"', pathlib.Path("megatron_tcod/__init__.py").read_text()).group(1)

setup(
    version=VERSION,
    packages=find_packages(include=["megatron_tcod", "megatron_tcod.*"]),
    package_data={"megatron_tcod.report": ["assets/*"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "megatron-core==0.16.1",
        "transformers>=5.12",
        "tokenizers",
        "safetensors",
        "jinja2",
        "msgspec",
        "numpy",
        "psutil",
        "pydantic>=2.10",
        "rich",
        "tyro>=1.0",
    ],
    extras_require={
        "alfworld": ["alfworld==0.4.2", "textworld==1.7.0", "fast_downward_textworld"],
        "tensorboard": ["tensorboard"],
        "dev": ["pytest", "pytest-timeout", "hypothesis", "ruff", "scipy"],
    },
)
