"""Every operator as torch sees it: opcheck, FakeTensor, torch.compile."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import octavo as ov
from octavo import ops
from octavo.core import formats
from octavo.ops import ROUNDINGS, schema

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GRID = (3, -6, -448.0, 448.0)


def casts():
    for dtype in FLOATS:
        for x in (torch.randn(5, 7).to(dtype), torch.randn(7, 5).T.to(dtype), torch.randn(()).to(dtype)):
            for rounding in ("nearest-even", "stochastic"):
                noise = torch.rand(x.shape) if rounding == "stochastic" else None
                yield x, *GRID, rounding, "saturate", False, True, noise


ARGUMENTS = {
    "cast": list(casts()),
    "encode": [(formats.E4M3FN.values().to(d), 3, -6, 1, 8, True, -1, 127) for d in FLOATS]
    + [(torch.ones(3), 10, -14, 1, 16, True, 0x7C00, 0x7E00)],
    "decode": [
        (torch.randint(256, (4, 6), dtype=torch.uint8), formats.E2M5.table.to(d)) for d in (*FLOATS, torch.float32)
    ],
    "int_mm": [
        (torch.randint(-9, 9, (m, k), dtype=torch.int8), torch.randint(-9, 9, (5, k), dtype=torch.int8))
        for m, k in ((3, 16), (1, 1), (0, 4), (3, 0))
    ],
    "scaled_mm": [
        (*pair, torch.rand(5, 2), torch.rand(4, 1), 8, *rest, dtype)
        for pair, tables in (
            ((torch.randn(5, 16).bfloat16(), torch.randn(4, 16).bfloat16()), (None, None)),
            (
                (torch.randint(9, (5, 16), dtype=torch.int8), torch.randint(9, (4, 16), dtype=torch.int8)),
                (None, None),
            ),
            (
                (torch.randint(9, (5, 16), dtype=torch.uint8), torch.randint(9, (4, 16), dtype=torch.uint8)),
                (torch.randn(256).bfloat16(),) * 2,
            ),
        )
        for rest in ((*tables, None, None), (*tables, None, torch.randn(4)))
        for dtype in (torch.float32, torch.bfloat16)
    ],
    "scale_sums": [
        (torch.randint(9, (3, 4), dtype=torch.int32), torch.rand(3, 1), torch.rand(rows, 1), bias, dtype)
        for rows in (1, 4)
        for bias in (None, torch.randn(4))
        for dtype in FLOATS
    ],
    "float_mm": [
        (torch.randn(m, k).to(d), torch.randn(5, k).to(d))
        for d in (torch.float32, torch.bfloat16)
        for m, k in ((3, 16), (1, 1), (0, 4), (3, 0))
    ],
}


def test_the_operators_are_registered():
    for name in ARGUMENTS:
        assert hasattr(torch.ops.octavo, name)
        assert callable(getattr(schema, name))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name):
    for arguments in ARGUMENTS[name]:
        torch.library.opcheck(getattr(torch.ops.octavo, name).default, arguments)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_fake_tensors(name):
    for arguments in ARGUMENTS[name]:
        real = getattr(ops, name)(*arguments)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            fake = getattr(ops, name)(*fakes)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_compile(name, backend):
    torch.compiler.reset()
    compiled = torch.compile(getattr(ops, name), fullgraph=True, backend=backend)
    for arguments in ARGUMENTS[name][::3]:
        assert torch.equal(compiled(*arguments), getattr(ops, name)(*arguments))


@pytest.mark.parametrize("name", ["E4M3FN", "INT8"])
def test_a_function_of_them_compiles(name):
    torch.compiler.reset()

    def f(x):
        return ov.cast(x, name).sum(1)

    x = torch.randn(6, 9)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


def test_words():
    assert ops.ROUNDINGS == ROUNDINGS
    assert len(set(ROUNDINGS)) == 6
    assert schema.code_dtype(8) == torch.uint8
    assert schema.code_dtype(9) == torch.int32
