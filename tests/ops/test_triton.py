"""The GPU's kernels against the law, bit for bit, through Triton's interpreter; and compiled without a GPU.

The interpreter has to be asked for before Triton is imported: so this file runs itself again in another process. It
holds bfloat16 in integers, loses its subnormals and cuts off what does not fit: such numbers are left to test_cuda.py.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from octavo.core.cast import Cast
from octavo.core.granularity import PerToken
from octavo.ops import native, reference
from octavo.ops.schema import OVERFLOWS, ROUNDINGS
from tests.ops import test_quantize_rows as rows
from tests.ops.test_native import GRIDS, inputs, same

pytest.importorskip("triton", reason="the GPU's kernels are written in Triton, which is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in another process, with Triton's interpreter")
STEP_BY_STEP = rows.check
compiled = pytest.mark.skipif(INTERPRETED, reason="runs where Triton compiles")


@compiled
def test_through_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore"]
    done = subprocess.run([*command, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@interpreted
@pytest.mark.parametrize("name", GRIDS)
def test_cast(name):
    from octavo.ops import fused

    mantissa, emin, low, high, flush, negative_zero = GRIDS[name]
    x = inputs(mantissa, emin, low, high, flush)[::11]
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    noise[::5] = 1 - torch.randint(1, 2**12, noise[::5].shape) * 2.0**-12
    wide = mantissa > 7 or emin - mantissa < -126
    short = x[(x == 0) | (x.abs() >= 2.0**-126) | x.isnan()].to(torch.float16 if wide else torch.bfloat16)
    for rounding in ROUNDINGS:
        for overflow in OVERFLOWS:
            grid = (mantissa, emin, low, high, rounding, overflow, flush, negative_zero)
            same(fused.cast(x, *grid, noise), reference.cast(x, *grid, noise))
            few = noise[: len(short)]
            same(fused.cast(short, *grid, few), reference.cast(short, *grid, few))


def check(x, how, scale=None, zeros=None):
    from octavo.ops import fused

    assume(x.dtype != torch.bfloat16 or not ((x != 0) & (x.abs() < 2.0**-126)).any())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "quantize_rows", fused.quantize_rows)
        patch.setattr(rows, "BEST", 0)
        STEP_BY_STEP(x, how, scale, zeros)


@interpreted
@settings(max_examples=120, deadline=None)
@given(data=st.data(), how=rows.casts(), dtype=st.sampled_from(rows.DTYPES))
def test_rows_with_their_own_scales(data, how, dtype):
    check(rows.tensor(data.draw, dtype), how)


@interpreted
@settings(max_examples=80, deadline=None)
@given(data=st.data(), how=rows.casts(), dtype=st.sampled_from(rows.DTYPES), power=st.integers(-40, 10))
def test_rows_with_given_scales(data, how, dtype, power):
    x = rows.tensor(data.draw, dtype)
    found = rows.quantize_unchecked(torch.randn(x.shape), how)
    check(x, how, found.scale * 2.0**power, found.zero_point)


@interpreted
@pytest.mark.parametrize("fmt", [*rows.FORMATS, *rows.INTEGERS, *rows.OTHERS])
def test_every_number_and_tie(fmt, monkeypatch):
    monkeypatch.setattr(rows, "check", check)
    rows.test_every_number_and_tie(fmt)


@interpreted
def test_rows_longer_than_a_program_holds():
    from octavo.ops import fused

    x = torch.randn(2, fused.LONGEST + 77)
    check(x, Cast("E4M3FN", PerToken()))
    check(x[:, ::2], Cast("UINT8", PerToken(), affine=True))


@interpreted
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (9, 300), (0, 5), (4, 0)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
def test_scale_sums(shape, dtype):
    from octavo.ops import fused

    generator = torch.Generator().manual_seed(0)
    sums = torch.randint(-(2**30), 2**30, shape, generator=generator).to(dtype)
    m, n = shape
    for rows_, columns in ((m, n), (1, n), (m, 1), (1, 1)):
        left, right = torch.rand(rows_, 1, generator=generator), torch.rand(columns, 1, generator=generator) * 1e-9
        for bias in (None, torch.randn(n, generator=generator), torch.randn(n, generator=generator).half()):
            for out in (torch.float32, torch.float16):
                y = fused.scale_sums(sums, left, right, bias, out)
                assert torch.equal(y, reference.scale_sums(sums, left, right, bias, out))


@interpreted
def test_decode():
    from octavo.ops import fused

    table = torch.randn(256)
    codes = torch.randint(0, 256, (7, 301), dtype=torch.uint8)
    for c in (codes, codes.T, codes[:0]):
        assert torch.equal(fused.decode(c, table), reference.decode(c, table))


@compiled
def test_compiled_for_a_hopper(tmp_path, monkeypatch):
    """Nothing flushes subnormals, quotients are rounded right, and no product is fused with a sum."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from octavo.ops import fused

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def assembly(kernel, types, **settings):
        names = kernel.arg_names
        kinds = dict(zip([n for n in names if n not in settings], types.split(), strict=True))
        source = ASTSource(kernel, {n: kinds.get(n, "constexpr") for n in names}, constexprs=settings)
        target = GPUTarget("cuda", 90, 32)
        return triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm

    fmt = {"MANTISSA": 3, "REBIAS": 960, "SHIFT": 0, "LAST": 126, "SIGN": 128, "NAN": 127, "NEGATIVE_ZERO": True}
    how = {"GIVEN": 0, "AFFINE": False, "POWER_OF_TWO": False, "INTEGERS": False, "ONE_SIDED": False}
    size = {"BLOCKS": 1, "WIDTH": 4096}
    types = "*bf16 i32 *fp32 *i32 *u8 *fp32 *i32 i32 i32 i32 i32 fp32 fp32 fp32 fp32 fp32"
    quantize = assembly(fused._quantize_rows, types, **how, **fmt, **size)
    scale = assembly(fused._scale_sums, "*i32 *fp32 *fp32 *bf16 *bf16 i32 i32 i32 i32", BIAS=True, ROWS=8, COLUMNS=256)
    grid = {"MANTISSA": 3, "EMIN": -6, "ROUNDING": "stochastic", "OVERFLOW": "nan"}
    cast = assembly(
        fused._cast, "*bf16 *bf16 *fp32 i64 fp32 fp32", **grid, FLUSH=False, NEGATIVE_ZERO=True, BLOCK=fused.TILE
    )
    for asm in (quantize, scale, cast):
        assert "ftz" not in asm["ptx"]
        assert "fma" not in asm["ptx"]
    assert "div.rn.f32" in quantize["ptx"]
    assert not re.search(r"div\.(full|approx)", quantize["ptx"])
    assert "FFMA" not in scale["sass"]
