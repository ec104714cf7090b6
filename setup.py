"""Packaging: ``pip install -e '.[dev,eval,fast,duplicates]' -c constraints.txt`` installs what the tests run with."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (HERE / "megatron_bliss/__init__.py").read_text(), re.MULTILINE).group(1)
README = HERE / "README.md"

setup(
    name="megatron_bliss",
    version=VERSION,
    description="Choose the data a language model is pre-trained on by bilevel optimisation (BLISS), on megatron-core",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["megatron_bliss", "megatron_bliss.*"]),
    package_data={"megatron_bliss.report": ["*.css"], "megatron_bliss.evaluation": ["task_definitions/*.yaml"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "megatron-core>=0.16.1,<0.17",
        "psutil",  # megatron-core's dist_checkpointing needs it and does not declare it: without it a save hangs
        "numpy",
        "tokenizers",
        "sentencepiece",
        "jsonargparse[signatures]",
        "pyyaml",
        "pyarrow",
        "orjson",
        "isal",
        "zstandard",
        "safetensors",
        "tensorboard",
        "matplotlib",
        "tqdm",
    ],
    extras_require={
        "eval": ["lm-eval[hf]==0.4.13"],
        "fast": ["gigatoken==0.10.0"],  # young: preprocessing checks it against tokenizers, and does without it
        "duplicates": ["datasketch>=2,<3"],  # selection.near_duplicates
        "gpu": ["transformer-engine[pytorch]"],
        "dev": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff"],
    },
)
