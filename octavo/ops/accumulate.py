"""Calls ``accumulate.c``: matrix products with emulated accumulators, which ``native.py`` compiles on first use.

Like there, everything is optional: a function returns ``None`` for what the kernels do not take, and the law in
``reference.py`` serves. Results equal the law bit for bit and do not depend on threads.
"""

import ctypes
import math

import torch
from torch import Tensor

from octavo.ops import build, native
from octavo.ops.schema import ROUNDINGS, SumGrid

PANEL = 32  # rows of the second operand that the kernels take at a time
NARROW, GENERAL, ALIGNED, CLAMPED = 0, 3, 6, 7  # tiles, by the numbers that accumulate.c gives them
NEVER = 2.0  # a fraction of a step that none reaches


class _Grid(ctypes.Structure):
    """What ``accumulate.c`` calls Grid."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("mantissa", "emin", "flush", "rounding")),
        ("high", ctypes.c_double),
        ("over", ctypes.c_double * 2),
        ("threshold", ctypes.c_double * 2),
    )


class _Sum(ctypes.Structure):
    """What ``accumulate.c`` calls Sum."""

    _fields_ = (
        ("k", ctypes.c_int64),
        ("chunk", ctypes.c_int64),
        ("inner", _Grid),
        ("outer", _Grid),
        ("seed", ctypes.c_uint64),
        ("turned", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("promote", ctypes.c_int64),
        ("low", ctypes.c_double),
        ("high", ctypes.c_double),
    )


def rounded(
    a: Tensor, b: Tensor, inner: SumGrid, outer: SumGrid, chunk: int, rounding: str, seed: int
) -> Tensor | None:
    """``schema.accumulate_mm``, or None if the kernels do not take this call."""
    if rounding not in ROUNDINGS or not all(
        1 <= g.mantissa <= 23 and g.emin - g.mantissa >= -149 for g in (inner, outer)
    ):
        return None
    kind = GENERAL + {"nearest-even": 0, "stochastic": 2}.get(rounding, 1)
    a, b, survey = a.contiguous(), b.contiguous(), ctypes.c_int32 * 4
    if kind == GENERAL and (lib := build.library("accumulate")) is not None and _served(a, b):
        found = survey(), survey()
        for x, facts in zip((a, b), found, strict=True):
            lib.octavo_survey(x.data_ptr(), x.numel(), ctypes.byref(facts))
        kind = _narrow(list(found[0]), list(found[1]), inner, min(chunk or a.shape[1], a.shape[1]))
    grids = (_grid(inner, rounding), _grid(outer, rounding))
    return _run(a, b, kind, _Sum(chunk=chunk, inner=grids[0], outer=grids[1], seed=seed))


def aligned(a: Tensor, b: Tensor, align: int, bits: int, promote: int) -> Tensor | None:
    """``schema.accumulate_mm_aligned`` of finite operands, or None if the kernels do not take this call."""
    if not (align >= 1 and 1 <= bits <= 48 and (align + 1) << bits <= 1 << 53):
        return None
    return _run(a, b, ALIGNED, _Sum(chunk=align, bits=bits, promote=promote or max(a.shape[1], 1)))


def clamped(a: Tensor, b: Tensor, bits: int) -> Tensor | None:
    """``schema.accumulate_mm_integer`` that saturates, or None if the kernels do not take this call."""
    half = 2.0 ** (bits - 1)
    return _run(a, b, CLAMPED, _Sum(low=-half, high=half - 1))


def _narrow(a: list[int], b: list[int], grid: SumGrid, length: int) -> int:
    """The fastest tile that is exact for operands of these bits and exponents; ``accumulate.c`` says why it is."""
    precision, product = grid.mantissa + 1, a[0] + b[0]
    least, most = a[1] + b[1] - product + 2, a[2] + b[2] + 2  # every product is a multiple of 2**least, under 2**most
    if a[3] or b[3] or product > precision or precision > 11 or least < -149 or grid.emin < -126:
        return GENERAL
    bound = math.ldexp(2.0 * length, min(most, 300))  # rounding at most doubles what each product adds
    room = 2.0 ** (127 - 2 - (23 - grid.mantissa))  # so that the number that rounds stays finite
    if bound <= min(grid.high, room):
        return NARROW
    if grid.high + 2.0**most <= room:
        return NARROW + (2 if grid.infinite else 1)
    return GENERAL


def _grid(grid: SumGrid, rounding: str) -> _Grid:
    high = grid.high
    over = [math.inf, -math.inf] if grid.infinite else [high, -high]
    if rounding in ("toward-zero", "down"):
        over[0] = high
    if rounding in ("toward-zero", "up"):
        over[1] = -high
    any_fraction = 2.0**-500
    threshold = {
        "nearest-away": (0.5, 0.5),
        "up": (any_fraction, NEVER),
        "down": (NEVER, any_fraction),
    }.get(rounding, (NEVER, NEVER))
    pair = ctypes.c_double * 2
    return _Grid(grid.mantissa, grid.emin, grid.flush, 0, high, pair(*over), pair(*threshold))


def _run(a: Tensor, b: Tensor, kind: int, how: _Sum) -> Tensor | None:
    lib = build.library("accumulate")
    if lib is None or not _served(a, b):
        return None
    (m, k), n = a.shape, b.shape[0]
    turned = n < PANEL and m > n  # lanes run along the longer side
    if turned:
        a, b, m, n = b, a, n, m
    how.k, how.turned = k, turned
    padded = torch.nn.functional.pad(b, (0, 0, 0, -n % PANEL)) if n % PANEL else b
    panels = padded.reshape(-1, PANEL, k).mT.contiguous() if n * k else padded
    a = a.contiguous()
    c = torch.empty((m, n), dtype=torch.int32 if kind == CLAMPED else torch.float32)
    lib.octavo_accumulate(
        *(t.data_ptr() for t in (a, panels, c)),
        *(m, n, ctypes.byref(how), kind, min(native._instruction_set(), 2), torch.get_num_threads()),
    )
    return c.mT.contiguous() if turned else c


def _served(a: Tensor, b: Tensor) -> bool:
    return (
        all(t.dtype == torch.float32 and t.dim() == 2 and native._plain(t) for t in (a, b)) and a.shape[1] == b.shape[1]
    )
