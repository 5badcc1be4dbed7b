"""The matrix of support: whole, sourced, and at home on this machine."""

import copy
import json
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from octavo.analysis import machine, support
from octavo.errors import OctavoError

TABLES = (support.load().hardware, support.load().software)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.title)
def test_every_cell_has_a_word_and_a_source(table):
    sources = support.load().sources
    assert len({row.name for row in table.rows}) == len(table.rows) >= 10
    for row in table.rows:
        assert list(row.cells) == list(table.columns)
        for cell in row.cells.values():
            assert cell.status in get_args(support.Status)
            assert cell.sources
            assert set(cell.sources) <= set(sources)


def test_every_source_is_used_and_leads_somewhere():
    cells = [cell for table in TABLES for row in table.rows for cell in row.cells.values()]
    sources = support.load().sources
    assert {name for cell in cells for name in cell.sources} == set(sources)
    assert len({source.url for source in sources.values()}) == len(sources)
    for source in sources.values():
        assert source.url.startswith("https://") or (support.FILE.parents[2] / source.url).exists()
        assert source.title


def test_the_matrix_says_what_it_should():
    assert set(support.load().meanings) == set(get_args(support.Status))
    rows = {row.name: {key: cell.status for key, cell in row.cells.items()} for row in TABLES[0].rows}
    assert all(row["other"] == "emulated" for row in rows.values())
    assert rows["A100 (Ampere)"]["int8"] == "native"
    assert rows["A100 (Ampere)"]["e4m3fn"] == "emulated"
    assert rows["H100 (Hopper)"]["e4m3fn"] == "native"
    assert rows["AMD MI300 (CDNA 3)"]["e4m3fn"] == "convert"


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"avx2"}, ["x86 AVX2"]),
        ({"avx2", "avx_vnni", "avx512_vnni"}, ["x86 AVX512-VNNI"]),
        ({"avx2", "avx512_vnni", "avx512_bf16"}, ["x86 AVX512-BF16"]),
        ({"asimd", "asimddp", "i8mm", "bf16"}, ["Arm I8MM and BF16"]),
        ({"avx2", "sm_90"}, ["H100 (Hopper)", "x86 AVX2"]),
        ({"gfx942"}, ["AMD MI300 (CDNA 3)"]),
        ({"sse2"}, []),
    ],
)
def test_rows_of_a_machine(flags, names):
    assert sorted(row.name for row in support.here(flags)) == names


@pytest.mark.parametrize(("hip", "name"), [(None, "sm_90"), ("6.4", "gfx942")])
def test_the_gpu_is_among_what_is_present(monkeypatch, hip, name):
    monkeypatch.setattr(machine, "cpu_flags", lambda: {"avx2"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName="gfx942:sramecc+"))
    monkeypatch.setattr(torch.version, "hip", hip)
    assert support.present() == {"avx2", name}


def test_this_machine_is_measured(monkeypatch):
    asked = []

    def measure(rows, size, repeats, device, wanted):
        asked.append(device)
        return [machine.Rate(what, rows, size, 1.0, 1.0) for what in wanted if what != "FP16"]

    monkeypatch.setattr(machine, "measure", measure)
    monkeypatch.setattr(support, "present", lambda: {"avx2", "sm_80"})
    found = {place.device: place for place in support.measure(1)}
    assert sorted(asked) == ["cpu", "cuda"]
    assert found["cuda"].row == "A100 (Ampere)"
    assert set(found["cpu"].rates) == set(support.MEASURED) - {"fp16"}
    assert set(support.MEASURED) < set(TABLES[0].columns)


def test_every_measured_product_runs_on_a_cpu():
    found = machine.measure(32, 64, 1, wanted=tuple(support.MEASURED.values()))
    assert {rate.what for rate in found} == set(support.MEASURED.values())


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
)
def test_torch_multiplies_fp8_on_a_cpu(dtype):
    """What the row of PyTorch says of CPUs."""
    a, b = torch.randn(16, 64).to(dtype), torch.randn(32, 64).to(dtype)
    one = torch.ones(())
    got = torch._scaled_mm(a, b.T, one, one, out_dtype=torch.float32)
    torch.testing.assert_close(got, a.float() @ b.float().T)
    assert hasattr(torch.ops.aten, "_weight_int8pack_mm")


@pytest.mark.parametrize(
    "change",
    [
        lambda cell: cell.update(status="perhaps"),
        lambda cell: cell.update(sources=["hearsay"]),
        lambda cell: cell.update(sources=[]),
    ],
)
def test_a_cell_without_grounds_is_refused(change):
    document = json.loads(support.FILE.read_text(encoding="utf8"))
    support.parse(copy.deepcopy(document))
    change(document["hardware"]["rows"][0]["cells"]["int8"])
    with pytest.raises(OctavoError, match=r"V100 \(Volta\), int8"):
        support.parse(document)
    document["hardware"]["rows"][0]["cells"].popitem()
    with pytest.raises(OctavoError, match="other columns"):
        support.parse(document)
