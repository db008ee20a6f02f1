"""Settings of all tests, and the fixtures that several files share."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network, and none should wait for it
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the core to other tests

import torch
from transformers.utils import logging

from tests.helpers.checkpoints import reads
from tests.helpers.records import record

torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
logging.disable_progress_bar()

__all__ = ["reads", "record"]
