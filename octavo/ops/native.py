"""Calls the kernels of ``cast.c``, ``rows.c`` and ``product.c``, which ``build.py`` compiles and loads.

Everything here is optional. Where there are no kernels, or for tensors they do not take, the functions return ``None``
and the caller does the same with torch.
"""

import ctypes
import functools
import math

import torch
from torch import Tensor

from octavo.ops import build
from octavo.ops.build import INSTRUCTION_SETS
from octavo.ops.grid import described
from octavo.ops.schema import LONGEST, RowFormat

OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)  # by common.h's numbers


class _Product(ctypes.Structure):
    """What ``product.c`` calls Product."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "a_table", "b_table")),
        *((name, ctypes.c_int64) for name in ("lda", "ldb")),
        *((name, ctypes.c_void_p) for name in ("left", "right", "zeros")),
        *((name, ctypes.c_int64) for name in ("left_row", "left_span", "right_row", "right_span", "right_rows")),
        *((name, ctypes.c_void_p) for name in ("bias", "c")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "stretch")),
        *((name, ctypes.c_int32) for name in ("kind", "out", "flip")),
    )


class _Rows(ctypes.Structure):
    """What ``rows.c`` calls Rows."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scale", "zeros")),
        *((name, ctypes.c_int64) for name in ("m", "k", "ldx", "group", "scale_row")),
        *((name, ctypes.c_int32) for name in ("dtype", "given", "power_of_two", "kind")),
        *((name, ctypes.c_float) for name in ("most", "low", "high")),
        ("one_sided", ctypes.c_int32),
        *((name, ctypes.c_int32) for name in ("mantissa", "rebias", "shift", "last", "sign", "nan", "nan_sign")),
        ("zero_sign", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("least", "steps")),
    )


@functools.cache
def bind() -> str:
    """Make ``binding.cpp`` the CPU's ``linear`` and ``linear_weight_only``, where it can be: one line that says so."""
    kernels = build.library()
    if kernels is None:
        return "layers run step by step"
    if INSTRUCTION_SETS[_instruction_set()] != "AVX-512 BF16":
        return "layers run step by step: the fused kernels need AVX-512 BF16 and VNNI"
    binding = build.library("binding")
    if binding is None:
        return f"layers run step by step: {build.status('binding')}"
    binding.octavo_bind(ctypes.cast(kernels.octavo_linear, ctypes.c_void_p), _instruction_set())
    return "layers run in one call"


def cast(
    x: Tensor,
    mantissa: int,
    emin: int,
    low: float,
    high: float,
    rounding: str,
    overflow: str,
    flush: bool,
    negative_zero: bool,
    noise: Tensor | None,
    *,
    in_place: bool = False,
) -> Tensor | None:
    """Round to a number grid (``schema.cast`` says how), or None if the kernel does not take this call."""
    lib = build.library()
    if lib is None or x.dtype not in OUTPUTS or not (_plain(x) and x.is_contiguous()):
        return None
    stochastic = rounding == "stochastic"
    if stochastic and not (
        noise is not None
        and noise.dtype == torch.float32
        and noise.shape == x.shape
        and _plain(noise)
        and noise.is_contiguous()
    ):
        return None
    grid = described(mantissa, emin, low, high, rounding, overflow, flush, negative_zero)
    if grid is None:
        return None
    y = x if in_place else torch.empty_like(x)
    lib.octavo_cast(
        x.data_ptr(),
        noise.data_ptr() if stochastic and noise is not None else None,
        y.data_ptr(),
        x.numel(),
        OUTPUTS.index(x.dtype),
        ctypes.byref(grid),
        _instruction_set(),
        torch.get_num_threads(),
    )
    return y


def encode(
    x: Tensor, mantissa: int, emin: int, first: int, bits: int, signed: bool, inf: int, nan: int
) -> Tensor | None:
    """Codes of float32 on a grid (``schema.encode`` says how), or None if the kernel does not take this call."""
    lib = build.library()
    served = x.dtype == torch.float32 and bits <= 8 and -126 < emin <= 127 and emin - mantissa > -126
    if lib is None or not served or not (_plain(x) and x.is_contiguous()):
        return None
    sign = 1 << (bits - 1)
    codes = torch.empty(x.shape, dtype=torch.uint8)
    lib.octavo_encode8(
        x.data_ptr(),
        codes.data_ptr(),
        x.numel(),
        mantissa,
        (127 + emin - first) << mantissa,
        2.0**emin if first else 0.0,
        2.0 ** (mantissa - emin),
        sign if signed else 0,
        max(inf, 0),
        max(nan, 0),
        nan != sign,  # where NaN stands in the place of −0 it has no sign of its own
        torch.get_num_threads(),
    )
    return codes


def decode(codes: Tensor, table: Tensor) -> Tensor | None:
    """``table[codes]`` of uint8 codes in a table of 256 bfloat16, or None if the kernel does not take this call."""
    lib = build.library()
    served = table.dtype == torch.bfloat16 and table.shape == (256,) and codes.dtype == torch.uint8
    if lib is None or not served or not all(_plain(t) and t.is_contiguous() for t in (codes, table)):
        return None
    y = torch.empty(codes.shape, dtype=torch.bfloat16)
    lib.octavo_decode16(codes.data_ptr(), table.data_ptr(), y.data_ptr(), codes.numel(), torch.get_num_threads())
    return y


def quantize_rows(
    x: Tensor,
    group: int,
    fmt: RowFormat,
    scale: Tensor | None,
    zeros: Tensor | None,
    affine: bool,
    power_of_two: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """``schema.quantize_rows``, or None if the kernel does not take this call."""
    lib = build.library()
    mantissa, emin, low, high, flush, negative_zero, bits, nan = fmt
    integers = mantissa == 23
    served = bits <= 8 and (integers or (low < 0 and -126 < emin <= 127 and emin - mantissa > -126))
    if lib is None or not served or x.dtype not in OUTPUTS or x.dim() != 2 or x.numel() == 0:
        return None
    if not all(_plain(t) for t in (x, scale, zeros) if t is not None) or (affine and not integers):
        return None
    m, k = x.shape
    shape = (m, -(-k // group))
    if scale is None:
        found = torch.empty(shape)
        points = torch.empty(shape, dtype=torch.int32) if affine else None
    elif scale.shape in (shape, (1, 1)) and (zeros is not None and zeros.shape == scale.shape) == affine:
        found = scale.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        points = None if zeros is None else zeros.to(torch.int32, copy=True, memory_format=torch.contiguous_format)
    else:
        return None
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = torch.empty((m, k), dtype=torch.int8 if integers and low < 0 else torch.uint8)
    sign = 1 << (bits - 1)
    rows = _Rows(
        x=x.data_ptr(),
        codes=codes.data_ptr(),
        scale=found.data_ptr(),
        zeros=_address(points),
        m=m,
        k=k,
        ldx=x.stride(0),
        group=group,
        scale_row=0 if scale is not None and found.shape == (1, 1) else shape[1],
        dtype=OUTPUTS.index(x.dtype),
        given=scale is not None,
        power_of_two=power_of_two,
        kind=integers,
        most=high - low if affine else high,
        low=low,
        high=high,
        one_sided=low >= 0,
    )
    if not integers:
        rows.mantissa, rows.rebias = mantissa, (126 + emin) << mantissa
        rows.shift, rows.steps = (mantissa, 2.0**-emin) if flush else (0, 2.0 ** (mantissa - emin))
        rows.least, rows.last, rows.sign = 2.0**emin, _last_code(mantissa, emin, high), sign
        rows.nan, rows.nan_sign, rows.zero_sign = max(nan, 0), nan != sign, negative_zero
    if lib.octavo_quantize_rows(ctypes.byref(rows), min(_instruction_set(), 2), torch.get_num_threads()):
        return None
    return codes, found, torch.empty(0, 0, dtype=torch.int32) if points is None else points


def _last_code(mantissa: int, emin: int, high: float) -> int:
    """The code of a float format's largest number."""
    exponent = max(math.frexp(high)[1] - 1, emin)
    return int(math.ldexp(high, mantissa - exponent)) + ((exponent - emin) << mantissa)


def float_mm(a: Tensor, b: Tensor) -> Tensor | None:
    """``a @ b.T`` of bfloat16 [M, K] and [N, K] in float32, or None if the kernel does not take this call.

    Products are exact and sums float32, within K · 2⁻²⁴ · |a| @ |b|.T of the exact result; like the instruction it is
    made of (VDPBF16PS) it takes subnormals for zero. Rows may lie any distance apart; the result does not depend on
    the number of threads.
    """
    if a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16:
        return None
    return scaled_mm(a, b, None, None, max(a.shape[-1], 1), None, None, None, None, torch.float32)


def scaled_mm(
    a: Tensor,
    b: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    stretch: int,
    a_table: Tensor | None,
    b_table: Tensor | None,
    zeros: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """``schema.scaled_mm``, or None if the kernel does not take this call. Sums of floats as in ``float_mm``."""
    lib = build.library()
    if lib is None or INSTRUCTION_SETS[_instruction_set()] != "AVX-512 BF16" or dtype not in OUTPUTS:
        return None
    tensors = (a, b, a_table, b_table, left, right, zeros, bias)
    if not all(_plain(t) for t in tensors if t is not None) or not a.dim() == b.dim() == 2 or a.shape[1] != b.shape[1]:
        return None
    (m, k), n = a.shape, b.shape[0]
    c = torch.empty((m, n), dtype=dtype)
    if 0 in (m, n, k):
        return c.zero_() if bias is None else None
    integers = a.dtype in (torch.int8, torch.uint8) and b.dtype == torch.int8 and a_table is None and b_table is None
    if not integers and not all(_coded(x, table) for x, table in ((a, a_table), (b, b_table))):
        return None
    stretch = min(stretch, k)
    if stretch < 1 or (integers and stretch > LONGEST) or (zeros is not None and not integers):
        return None
    if k > 1 and not a.stride(1) == b.stride(1) == 1:
        return None
    left, right, bias = (None if t is None else t.float().contiguous() for t in (left, right, bias))
    if zeros is not None:
        if left is None or zeros.shape != left.shape or zeros.dtype != torch.int32:
            return None
        zeros = zeros.contiguous()
    stretches = -(-k // stretch)
    product = _Product(
        a=a.data_ptr(),
        b=b.data_ptr(),
        a_table=_address(a_table),
        b_table=_address(b_table),
        lda=a.stride(0),
        ldb=b.stride(0),
        left=_address(left),
        right=_address(right),
        zeros=_address(zeros),
        bias=_address(bias),
        c=c.data_ptr(),
        m=m,
        n=n,
        k=k,
        stretch=stretch,
        right_rows=1,
        kind=integers,
        out=OUTPUTS.index(dtype),
        flip=0x80 if a.dtype == torch.int8 else 0,
    )
    for side, scale, count in (("left", left, m), ("right", right, n)):
        rows, columns = (1, 1) if scale is None else scale.shape
        if rows not in (1, count) or columns not in (1, stretches):
            return None
        setattr(product, f"{side}_row", columns if rows > 1 else 0)
        setattr(product, f"{side}_span", 1 if columns > 1 else stretches)
    return None if lib.octavo_product(ctypes.byref(product), None, 0, torch.get_num_threads()) else c


def scale_sums(sums: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``schema.scale_sums``, or None if the kernel does not take this call."""
    lib = build.library()
    served = sums.dtype in (torch.int32, torch.float32) and sums.dim() == 2 and dtype in OUTPUTS
    if lib is None or not served or not all(_plain(t) for t in (sums, left, right, bias) if t is not None):
        return None
    m, n = sums.shape
    if left.shape not in ((m, 1), (1, 1)) or right.shape not in ((n, 1), (1, 1)):
        return None
    if bias is not None and bias.shape != (n,):
        return None
    left, right = (t.float().expand(count, 1).contiguous() for t, count in ((left, m), (right, n)))
    sums, bias = sums.contiguous(), None if bias is None else bias.float().contiguous()
    y = torch.empty((m, n), dtype=dtype)
    lib.octavo_scale_sums(
        *(sums.data_ptr(), sums.dtype == torch.int32, left.data_ptr(), right.data_ptr(), _address(bias)),
        *(y.data_ptr(), OUTPUTS.index(dtype), m, n, min(_instruction_set(), 2), torch.get_num_threads()),
    )
    return y


def _coded(x: Tensor, table: Tensor | None) -> bool:
    """Whether ``x`` is bfloat16, or bytes with a table of 256 of them."""
    if table is None:
        return x.dtype == torch.bfloat16
    whole = table.dtype == torch.bfloat16 and table.shape == (256,) and table.is_contiguous()
    return x.dtype == torch.uint8 and whole


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _plain(x: Tensor) -> bool:
    """Whether the bytes at ``x``'s address are its numbers: not so for subclasses, other devices and lazy negations."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.layout == torch.strided
        and not x.is_neg()
    )


def _instruction_set() -> int:
    """What the kernels run on, as an index into ``INSTRUCTION_SETS``."""
    lib = build.library()
    return 0 if lib is None else int(lib.octavo_isa())
