"""Settings of all tests, and the fixtures that several files share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network, and none should wait for it
# Many tests compare bits, which would depend on where in memory a mapped file begins on some processors.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the core to other tests

import pytest
import torch
from transformers.utils import logging

from tests.helpers.checkpoints import reads
from tests.helpers.programs import Programs, serving
from tests.helpers.records import record

torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
logging.disable_progress_bar()

__all__ = ["reads", "record"]


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections: the libraries are some hundred thousand objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def without_fsync() -> Iterator[None]:
    """No test cuts the power, and some disks take long to write."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    """Python and commands that start at once."""
    with serving(tmp_path_factory.mktemp("hf-home")) as found:
        yield found
