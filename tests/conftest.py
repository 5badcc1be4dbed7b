"""What all tests share: fixed seeds, no network, one thread a worker, no deadlines on a busy machine, and Ctrl-C."""

import os
import signal
import threading

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from hypothesis import HealthCheck, settings

if threading.current_thread() is threading.main_thread():
    # what a shell starts in the background ignores Ctrl-C, and so would all that the tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "octavo",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("octavo")

if "PYTEST_XDIST_WORKER" in os.environ:  # several workers with several threads each only wait for one another
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1234)
