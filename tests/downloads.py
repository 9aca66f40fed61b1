"""Tests of what is downloaded run where it can be."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def or_skip(what: str) -> Iterator[None]:
    """Skip the test where `what` cannot be downloaded. In CI that is an error."""
    try:
        yield
    except (RuntimeError, FileNotFoundError) as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{what} cannot be downloaded: {error}")
