"""Kernels in Triton's interpreter; `make test` runs this folder in a process of its own."""

import os

import pytest


def pytest_collection_modifyitems(items):
    # what is decorated while the variable is not set can never be interpreted
    if os.environ.get("TRITON_INTERPRET") != "1":
        why = "needs TRITON_INTERPRET=1 from the start of the process: make test"
        for item in items:
            item.add_marker(pytest.mark.skip(reason=why))
