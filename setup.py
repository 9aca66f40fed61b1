"""Only what pyproject.toml cannot say: a package whose folder lies outside the package."""

from setuptools import find_packages, setup

setup(
    # kernels/ has no __init__.py (docs/layout.md says why), so find_packages skips it
    packages=[*find_packages(include=["nvembed_fast", "nvembed_fast.*"]), "nvembed_fast.kernels"],
    package_dir={"nvembed_fast.kernels": "kernels"},
    package_data={"nvembed_fast.kernels": ["tuned.toml"]},
)
