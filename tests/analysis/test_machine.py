"""What the machine is said to be."""

import json
import math
from dataclasses import asdict

import torch

from octavo.analysis import machine


def test_examine():
    found = machine.examine(rows=(1, 3), size=64, repeats=2)
    assert found.torch == torch.__version__
    assert found.threads == torch.get_num_threads()
    assert found.processor
    assert found.native
    assert found.device == "none" or torch.cuda.is_available()
    assert len({unit.name for unit in found.units}) == len(found.units) >= 3
    names = [rate.what for rate in found.rates]
    assert names[:5] == names[5:]
    assert {"FP32", "BF16", "INT8 → INT32", "FP8 → FP32, ours"} <= set(names)
    assert [rate.rows for rate in found.rates] == [1] * 5 + [3] * 5
    for rate in found.rates:
        assert rate.size == 64
        assert math.isfinite(rate.gops)
        assert rate.gops > 0
        assert rate.ratio > 0
        if rate.what == "FP32":
            assert rate.ratio == 1
    json.dumps(asdict(found))


def test_units_are_what_the_processor_says(monkeypatch):
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"avx512_vnni", "amx_int8", "bf16"})
    monkeypatch.setattr(machine, "measure", lambda *_: [])
    present = {unit.name for unit in machine.examine().units if unit.present}
    assert {"AVX512-VNNI", "AMX-INT8"} <= present
    assert not any("BF16" in name for name in present)
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"asimd", "bf16", "i8mm"})
    present = {unit.name for unit in machine.examine().units if unit.present and "CUDA" not in unit.name}
    assert present == {"Arm BF16", "Arm I8MM"}


def test_a_machine_without_proc(monkeypatch):
    def fail(*_, **__):
        raise OSError

    monkeypatch.setattr("builtins.open", fail)
    assert machine.cpu_flags() == set()
    assert "cores" in machine._processor()
