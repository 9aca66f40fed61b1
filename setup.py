import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "nvembed_fast/__init__.py").read_text(), re.M)[1]

setup(
    name="nvembed-fast",
    version=VERSION,
    description="NV-Embed, fast: a drop-in encoder for the published checkpoints on packed Triton kernels",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords="embedding retrieval nv-embed mistral triton",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    # kernels/ has no __init__.py (CONTRIBUTING.md says why), so find_packages skips it
    packages=[*find_packages(include=["nvembed_fast", "nvembed_fast.*"]), "nvembed_fast.kernels"],
    package_dir={"nvembed_fast.kernels": "kernels"},
    package_data={"nvembed_fast.kernels": ["tuned.toml"]},
    python_requires=">=3.11",
    install_requires=[
        "einops",
        "huggingface_hub",
        "numpy",
        "safetensors",
        "tokenizers",
        "torch>=2.11",
        "tqdm",
        "transformers>=5.13",
        "triton>=3.6; platform_system == 'Linux'",
    ],
    extras_require={
        "demo": ["gguf"],
        "train": ["datasets", "peft"],
        "bench": ["liger-kernel", "matplotlib", "pytest", "pytest-benchmark"],
        # accelerate: transformers' own loading of GGUF files. kernels: what the folder must not collide with
        "test": [
            "accelerate",
            "gguf",
            "kernels",
            "matplotlib",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "sentencepiece",
            "setuptools>=77",
        ],
        "dev": ["ruff"],
    },
    entry_points={"console_scripts": ["nvembed-fast=nvembed_fast.cli:main"]},
)
