"""Processes that are forked from one whose threads have run: OpenMP's threads are not there any more."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
import torch
import octavo as ov
torch.set_num_threads(2)
layer = torch.nn.Sequential(torch.nn.Linear(512, 64))
ov.quantize_(layer, "int8-dynamic")
x = torch.randn(256, 512)

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 3
    def __getitem__(self, index):
        return layer(x), ov.fake_quantize(x, ov.Cast("E4M3FN")), ov.quantize(x, ov.Cast("INT8")).codes

expected = Data()[0]  # with threads
if sys.argv[1] == "workers":
    found = list(torch.utils.data.DataLoader(Data(), batch_size=None, num_workers=1, multiprocessing_context="fork"))
    assert len(found) == 3 and all(torch.equal(*pair) for each in found for pair in zip(each, expected))
elif child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    torch.set_num_threads(1)
    os._exit(not all(torch.equal(*pair) for pair in zip(Data()[0], expected)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
@pytest.mark.parametrize("how", ["workers", "by hand"])
def test_kernels_run_in_forked_processes(how):
    """A worker of a DataLoader has one thread; elsewhere one asks for one, as torch's own products need it too."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", SCRIPT, how]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
