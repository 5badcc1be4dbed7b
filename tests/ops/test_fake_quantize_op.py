"""Operators in place and of simulated 8 bits: the kernel against the law, and as torch sees them."""

import pytest
import torch

from octavo import ops
from octavo.core.cast import row_format
from octavo.core.formats import E4M3FN, INT8, UINT8, eight_bit
from octavo.ops import build, native
from octavo.ops.fake_quantize import _law, _native

needs_library = pytest.mark.skipif(build.library("fake_quantize") is None, reason=build.status("fake_quantize"))
GRID = (3, -6, -448.0, 448.0, "nearest-even", "saturate", False, True)


def same(actual, expected):
    bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
    wrong = (actual.view(bits) != expected.view(bits)) & ~(actual.isnan() & expected.isnan())
    assert not wrong.any(), f"{int(wrong.sum())} differ: {actual[wrong][:5]} for {expected[wrong][:5]}"


@needs_library
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("fmt", [*eight_bit(), UINT8], ids=str)
def test_kernel_equals_law(fmt, affine):
    numbers = row_format(fmt, affine)
    if affine and numbers.mantissa != 23:
        pytest.skip("floats have no zero points")
    torch.manual_seed(0)
    for m, k, group in ((3, 100, 7), (5, 64, 64), (2, 9000, 9000), (7, 9, 1), (2, 9000, 3000)):
        x = torch.randn(m, k) * torch.randn(m, 1).exp() * 3
        x[0, 0], x[-1, -1], x[1] = -0.0, 0.0, 0.0
        if m == 5:
            x[2, 3], x[3, 1] = torch.nan, torch.inf
        for rows in (None, 1, m):
            scale = zeros = None
            if rows:
                scale = torch.rand(rows, -(-k // group)) * 0.1
                scale[0, 0] = torch.nan
                zeros = torch.randint(-5, 5, scale.shape, dtype=torch.int32) if affine else None
            for dtype in native.OUTPUTS:
                how = (group, scale, zeros, affine, group == 7, *numbers)
                law = _law(x.to(dtype), *how)
                for isa in range(min(native._instruction_set(), 2) + 1):
                    with pytest.MonkeyPatch.context() as patch:
                        patch.setattr(native, "_instruction_set", lambda isa=isa: isa)
                        same(_native(x.to(dtype), None, *how), law)
                    y = x.to(dtype, copy=True)
                    assert _native(y, y, *how) is y
                    same(y, law)


@needs_library
def test_what_the_kernel_leaves_to_torch():
    x, numbers = torch.randn(4, 6), row_format(E4M3FN, False)

    def refused(x, scale=None, zeros=None, affine=False, fmt=numbers):
        return _native(x, None, 6, scale, zeros, affine, False, *fmt) is None

    assert not refused(x)
    assert refused(x.double()) and refused(x[0]) and refused(x.t()) and refused(x[:0]) and refused(x.to("meta"))
    assert refused(x, torch.ones(4, 1).double()) and refused(x, torch.ones(3, 1)) and refused(x, torch.ones(4, 2))
    assert refused(x, fmt=numbers._replace(flush=True))
    assert refused(x, torch.ones(4, 1), None, True, row_format(INT8, True))


def arguments():
    float8, int8 = row_format(E4M3FN, False), row_format(INT8, True)
    yield torch.randn(5, 7), 4, None, None, False, False, *float8
    yield torch.randn(7, 5).T.bfloat16(), 4, torch.rand(1, 2), torch.ones(1, 2, dtype=torch.int32), True, False, *int8
    yield torch.randn(0, 3).half(), 4, torch.rand(1, 1), None, False, False, *float8
    yield torch.randn(5, 7).double(), 7, None, None, True, True, *int8


@pytest.mark.parametrize("name", ["fake_quantize", "fake_quantize_"])
def test_opcheck(name):
    for how in arguments():
        torch.library.opcheck(getattr(torch.ops.octavo, name).default, how)


def test_opcheck_of_a_cast():
    for x in (torch.randn(5, 7), torch.randn(7, 5).T.half(), torch.randn(()).double()):
        torch.library.opcheck(torch.ops.octavo.cast_.default, (x, *GRID, None))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend):
    torch.compiler.reset()

    def f(x):
        y = x.clone()
        ops.cast_(y, *GRID)
        z = y + 1
        ops.fake_quantize_(z, 4, row_format(E4M3FN, False))
        return y, z, ops.fake_quantize(x, 3, row_format(INT8, False))

    x = torch.randn(5, 7)
    for found, expected in zip(torch.compile(f, fullgraph=True, backend=backend)(x), f(x), strict=True):
        assert torch.equal(found, expected)
