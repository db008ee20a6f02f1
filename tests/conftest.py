"""Settings that every test shares."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network, and none should wait for it

import torch
from transformers.utils import logging

torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
logging.disable_progress_bar()
