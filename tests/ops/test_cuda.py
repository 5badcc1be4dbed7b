"""The GPU against the law on the CPU: every operator, layers in a CUDA graph; without a GPU, how torch is called."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import octavo as ov
from octavo.core import formats
from octavo.core.matmul import multiply
from octavo.ops import OVERFLOWS, ROUNDINGS, RowFormat, cuda, reference
from tests.ops.test_native import GRIDS, inputs, same

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")

E4M3FN = RowFormat(3, -6, -448.0, 448.0, False, True, 8, 127)
ROWS = {
    "E4M3FN": E4M3FN,
    "E5M2": RowFormat(2, -14, -57344.0, 57344.0, False, True, 8, 126),
    "E2M5": RowFormat(5, -1, -3.9375, 3.9375, False, True, 8, -1),
    "INT8": RowFormat(23, 23, -127.0, 127.0, False, False, 8, -1),
    "UINT8": RowFormat(23, 23, 0.0, 255.0, False, False, 8, -1),
}


def codes(rows, columns, dtype, seed=0):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).view(torch.uint8)


def table(dtype):
    return torch.arange(256, dtype=torch.uint8).view(dtype).bfloat16()


def bound(a, b, left, right):
    """What FP8 units may add wrongly, and one rounding to bfloat16."""
    exact = (a.double() * left) @ (b.double() * right).T
    room = (a.double().abs() * left) @ (b.double().abs() * right).T
    return exact, cuda.FLOAT8_ERROR * room + 2.0**-8 * exact.abs()


# ---- everywhere


@pytest.mark.parametrize("m", [1, 32, 33])
@pytest.mark.parametrize(("k", "n"), [(256, 48), (128, 16), (384, 144)])
def test_what_torch_asks_of_fp8_products(m, k, n, monkeypatch):
    """Its own checks of shapes, strides and dtypes on a GPU, by tensors that are none."""
    packed = torch.Tensor.contiguous  # which asks for a GPU's library even here
    copy = {"memory_format": torch.contiguous_format}
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: packed(t) if t.is_contiguous() else t.clone(**copy))

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="cuda")

    blocks = k // 128
    ways = [("tensor", (1, 1), (1, 1)), ("sums", (1, 1), (1, 1))]
    ways += [("row", rows, columns) for rows in ((m, 1), (1, 1)) for columns in ((n, 1), (1, 1))]
    ways += [("block", rows, columns) for rows in ((m, blocks), (m, 1)) for columns in ((n, blocks), (1, blocks))]
    with FakeTensorMode():
        for kinds in ((0, 0), (0, 1), (1, 0)):
            a, b = (empty(r, k, dtype=cuda.FLOAT8[kind]) for r, kind in zip((m, n), kinds, strict=True))
            for way, left, right in ways:
                dtype = torch.float32 if way == "sums" else torch.bfloat16
                for bias in (None, empty(n, dtype=torch.bfloat16)):
                    if bias is None or way != "sums":
                        y = cuda.float8_mm(way, a, b, empty(*left), empty(*right), bias, dtype)
                        assert (y.shape, y.dtype, y.device.type) == ((m, n), dtype, "cuda")


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (3, 17, 5), (17, 8, 8), (40, 100, 24), (0, 8, 8), (4, 0, 3)])
def test_int_mm_pads(m, k, n):
    a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    assert torch.equal(cuda.int_mm(a, b), (a.long() @ b.long().T).int())


@pytest.mark.parametrize("shapes", [((1, 1), (1, 1)), ((9, 1), (32, 1)), ((1, 1), (32, 1)), ((9, 2), (32, 1))])
@pytest.mark.parametrize("dtypes", [cuda.FLOAT8, cuda.FLOAT8[::-1], cuda.FLOAT8[:1] * 2, cuda.FLOAT8[1:] * 2])
def test_scales_reach_their_places(shapes, dtypes):
    """torch multiplies FP8 on a CPU as well, with the same layouts."""
    a, b = codes(9, 64, dtypes[0]), codes(32, 64, dtypes[1], 1)
    left, right = (torch.rand(shape) + 0.5 for shape in shapes)
    y = cuda.scaled_mm(a, b, left, right, 32, *map(table, dtypes), None, torch.randn(32).bfloat16() * 0, torch.bfloat16)
    wide = [t.repeat_interleave(64 // t.shape[1], 1) for t in (left, right)]
    exact, room = bound(a.view(dtypes[0]), b.view(dtypes[1]), *wide)
    assert ((y.double() - exact).abs() <= room).all()


def test_tables_are_recognized():
    assert cuda._float8_of(table(torch.float8_e4m3fn)) == torch.float8_e4m3fn
    assert cuda._float8_of(table(torch.float8_e5m2)) == torch.float8_e5m2
    assert cuda._float8_of(formats.E4M3FN.table_in(torch.bfloat16, torch.device("cpu"))) == torch.float8_e4m3fn
    for other in (formats.E4M3, formats.E4M3FNUZ, formats.E3M4):
        assert cuda._float8_of(other.table_in(torch.bfloat16, torch.device("cpu"))) is None


# ---- on a GPU


@gpu
@pytest.mark.parametrize("name", GRIDS)
def test_cast(name):
    mantissa, emin, low, high, flush, negative_zero = GRIDS[name]
    x = inputs(mantissa, emin, low, high, flush)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    for rounding in ROUNDINGS:
        for overflow in OVERFLOWS:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                grid = (mantissa, emin, low, high, rounding, overflow, flush, negative_zero)
                y = torch.ops.octavo.cast(x.to(dtype).cuda(), *grid, noise.cuda())
                same(y.cpu(), reference.cast(x.to(dtype), *grid, noise))


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROWS)
def test_quantize_rows(name, dtype):
    fmt, affine = ROWS[name], name == "UINT8"
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1), (5, 17), (64, 4096), (3, 40_000)):
        for size in (1.0, 1e-39, 1e30):
            x = (torch.randn(shape, generator=generator) * size).to(dtype)
            x[-1, -1] = torch.nan if size == 1 else x[-1, -1]
            for group in {1, 7, 128, shape[1]}:
                for given in ((1, 1), (shape[0], -(-shape[1] // group)), None):
                    scale = None if given is None else torch.rand(given, generator=generator) * size
                    zeros = torch.full(given, 3, dtype=torch.int32) if affine and given else None
                    expected = reference.quantize_rows(x, group, scale, zeros, affine, False, *fmt)
                    on_gpu = [None if t is None else t.cuda() for t in (scale, zeros)]
                    found = torch.ops.octavo.quantize_rows(x.cuda(), group, *on_gpu, affine, False, *fmt)
                    for y, e in zip(found, expected, strict=True):
                        assert torch.equal(y.cpu().nan_to_num(-1), e.nan_to_num(-1))


@gpu
def test_integers_equal_the_law():
    generator = torch.Generator().manual_seed(0)
    for m, k, n in ((1, 1, 1), (3, 17, 5), (40, 100, 24), (64, 4096, 256)):
        a, b = (torch.randint(-128, 128, (rows, k), dtype=torch.int8, generator=generator) for rows in (m, n))
        assert torch.equal(torch.ops.octavo.int_mm(a.cuda(), b.cuda()).cpu(), (a.long() @ b.long().T).int())
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            left, right, bias = torch.rand(m, 1), torch.rand(n, 1) / k, torch.randn(n)
            arguments = (a, b, left, right, k, None, None, None, bias)
            moved = [t.cuda() if isinstance(t, torch.Tensor) else t for t in arguments]
            found = torch.ops.octavo.scaled_mm(*moved, dtype).cpu()
            assert torch.equal(found, reference.scaled_mm(*arguments, dtype))


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shapes", [((64, 1), (48, 1)), ((1, 1), (1, 1)), ((1, 1), (48, 1)), ((64, 2), (48, 2))])
def test_fp8_is_within_its_bound(shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    for kinds in (cuda.FLOAT8, cuda.FLOAT8[::-1], cuda.FLOAT8[:1] * 2, cuda.FLOAT8[1:] * 2):
        a, b = codes(64, 256, kinds[0]), codes(48, 256, kinds[1], 1)
        left, right = (torch.rand(shape, generator=generator) + 0.5 for shape in shapes)
        tables = [table(kind).cuda() for kind in kinds]
        moved = [t.cuda() for t in (a, b, left, right)]
        y = torch.ops.octavo.scaled_mm(*moved, 128 if shapes[0][1] > 1 else 256, *tables, None, None, dtype).cpu()
        wide = [t.repeat_interleave(256 // t.shape[1], 1) for t in (left, right)]
        exact, room = bound(a.view(kinds[0]), b.view(kinds[1]), *wide)
        assert ((y.double() - exact).abs() <= room).all()


@gpu
@pytest.mark.parametrize("name", ["INT8", "E4M3FN", "E5M2", "E3M4"])
def test_decode_and_float_mm(name):
    x = torch.randn(33, 70)
    q, moved = (ov.quantize(t, ov.Cast(name, ov.PerToken())) for t in (x, x.cuda()))
    assert torch.equal(moved.codes.cpu(), q.codes)
    assert torch.equal(moved.dequantize().cpu(), q.dequantize())
    x = q.numbers(torch.bfloat16)
    y = torch.ops.octavo.float_mm(x.cuda(), x.cuda()).cpu()
    room = 70 * 2.0**-24 * (x.double().abs() @ x.double().abs().T)
    assert ((y.double() - x.double() @ x.double().T).abs() <= room).all()
    assert multiply(moved, moved).is_cuda


@gpu
@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8-dynamic", "int8-weight-only", "fp8-block", "int8-group64"])
def test_a_cuda_graph(scheme):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 128))
    model = model.to("cuda", torch.bfloat16)
    ov.quantize_(model, scheme)
    x = torch.randn(32, 256, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            expected = model(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = model(x)
    graph.replay()
    assert torch.equal(y, expected)
    x.mul_(2)
    graph.replay()
    assert torch.equal(y, model(x))
