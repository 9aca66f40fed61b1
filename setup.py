"""Only what pyproject.toml cannot say: a package whose folder lies outside the package."""

import sys

from setuptools import find_packages, setup

# An editable install puts a path into the environment, because the link nvembed_fast/kernels is there. For a
# mapped folder setuptools would write a finder. It comes too late for a script beside a clone that is called
# nvembed_fast, because Python takes the clone for the package.
EDITABLE = "editable_wheel" in sys.argv

setup(
    # kernels/ has no __init__.py (docs/layout.md says why), so find_packages skips it
    packages=[*find_packages(include=["nvembed_fast", "nvembed_fast.*"]), "nvembed_fast.kernels"],
    package_dir={"": "."} if EDITABLE else {"nvembed_fast.kernels": "kernels"},
    package_data={
        "nvembed_fast": ["demo/*"],
        "nvembed_fast.kernels": ["tuned.toml"],
        "nvembed_fast.evaluation": ["docstring_questions.toml"],
        "nvembed_fast.integrations": ["mteb_prompts.toml"],
    },
)
