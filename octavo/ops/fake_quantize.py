"""Simulated 8 bits: numbers that are rounded as codes would be and stay floats, in one pass; and operators in place.

What ``octavo.fake_quantize`` measures and trains with. ``fake_quantize.c`` is the CPU's kernel, ``_law`` the law that
it equals bit for bit. An operator in place says so in its signature, ``Tensor(a!)``, and gives nothing back.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from octavo.ops import build, native
from octavo.ops.grid import Even, even_grid
from octavo.ops.schema import LIBRARY, RowFormat

CAST = (
    "int mantissa, int emin, float low, float high, str rounding, str overflow, bool flush, bool negative_zero, "
    "Tensor? noise"
)
FAKE = (
    "int group, Tensor? scale, Tensor? zeros, bool affine, bool power_of_two, int mantissa, int emin, float low, "
    "float high, bool flush, bool negative_zero, int bits, int nan"
)
LIBRARY.define(f"cast_(Tensor(a!) x, {CAST}) -> ()")
LIBRARY.define(f"fake_quantize(Tensor x, {FAKE}) -> Tensor")
LIBRARY.define(f"fake_quantize_(Tensor(a!) x, {FAKE}) -> ()")


@torch.library.register_fake("octavo::fake_quantize")
def _(x: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("octavo::cast_")
@torch.library.register_fake("octavo::fake_quantize_")
def _(x: Tensor, *arguments: Any) -> None:
    return None


class _Fake(ctypes.Structure):
    """What ``fake_quantize.c`` calls Fake."""

    _fields_ = (
        ("rows", native._Rows),
        ("y", ctypes.c_void_p),
        ("even", Even),
        ("affine", ctypes.c_int32),
        ("largest", ctypes.c_float),
    )


def cast_(
    x: Tensor,
    mantissa: int,
    emin: int,
    low: float,
    high: float,
    rounding: str,
    overflow: str,
    flush: bool,
    negative_zero: bool,
    noise: Tensor | None = None,
) -> None:
    """``cast`` in place."""
    torch.ops.octavo.cast_(x, mantissa, emin, low, high, rounding, overflow, flush, negative_zero, noise)


def fake_quantize(
    x: Tensor,
    group: int,
    fmt: RowFormat,
    scale: Tensor | None = None,
    zeros: Tensor | None = None,
    affine: bool = False,
    power_of_two: bool = False,
) -> Tensor:
    """``x`` [M, K] rounded to 8 bits and back: ``quantize_rows`` and what its codes stand for, in ``x``'s dtype.

    Scales are the blocks' own, as in ``quantize_rows``, or given: float32 [M or 1, ⌈K/group⌉], with int32 ``zeros`` of
    that shape if ``affine``. Given scales are taken at their word: NaN where a block is not finite is theirs to say.
    Products are float32, stop at the dtype's largest number, and are rounded to it.
    """
    result: Tensor = torch.ops.octavo.fake_quantize(x, group, scale, zeros, affine, power_of_two, *fmt)
    return result


def fake_quantize_(
    x: Tensor,
    group: int,
    fmt: RowFormat,
    scale: Tensor | None = None,
    zeros: Tensor | None = None,
    affine: bool = False,
    power_of_two: bool = False,
) -> None:
    """``fake_quantize`` in place."""
    torch.ops.octavo.fake_quantize_(x, group, scale, zeros, affine, power_of_two, *fmt)


def _law(
    x: Tensor,
    group: int,
    scale: Tensor | None,
    zeros: Tensor | None,
    affine: bool,
    power_of_two: bool,
    *fmt: Any,
) -> Tensor:
    numbers, k, op = RowFormat(*fmt), x.shape[1], torch.ops.octavo
    if scale is None:
        _, scale, zeros = op.quantize_rows(x, group, None, None, affine, power_of_two, *fmt)
    assert scale is not None
    scale = scale.repeat_interleave(group, 1)[:, :k]
    low, high = numbers.low, numbers.high
    grid = (23, 23, -8.0e6, 8.0e6) if affine else (numbers.mantissa, numbers.emin, low, high)
    y: Tensor = op.cast(
        x.float() / scale, *grid, "nearest-even", "saturate", numbers.flush, numbers.negative_zero, None
    )
    if affine and zeros is not None:
        zeros = zeros.repeat_interleave(group, 1)[:, :k]
        y = (y + zeros).clamp(low, high) - zeros
    most = min(torch.finfo(t).max for t in (x.dtype, torch.float32))
    return (y * scale).clamp(-most, most).to(x.dtype)


def _native(
    x: Tensor,
    y: Tensor | None,
    group: int,
    scale: Tensor | None,
    zeros: Tensor | None,
    affine: bool,
    power_of_two: bool,
    *fmt: Any,
) -> Tensor | None:
    """``_law`` in one pass, into ``y`` or a new tensor, or None if the kernel does not take this call."""
    lib, numbers = build.library("fake_quantize"), RowFormat(*fmt)
    grid = (23, 23, -8.0e6, 8.0e6) if affine else (numbers.mantissa, numbers.emin, numbers.low, numbers.high)
    even = even_grid(*grid, numbers.flush, numbers.negative_zero)
    if lib is None or even is None or x.dtype not in native.OUTPUTS or x.dim() != 2 or not x.numel():
        return None
    if not all(native._plain(t) for t in (x, scale, zeros) if t is not None) or not x.is_contiguous():
        return None
    (m, k), count = x.shape, -(-x.shape[1] // group)
    if scale is not None and (scale.dtype != torch.float32 or tuple(scale.shape) not in ((m, count), (1, count))):
        return None
    if scale is not None and affine and (zeros is None or zeros.shape != scale.shape or zeros.dtype != torch.int32):
        return None
    scale, zeros = (None if t is None else t.contiguous() for t in (scale, zeros))
    any_point = torch.empty(1, dtype=torch.int32)  # its being there says that zero points are wanted
    y = torch.empty_like(x) if y is None else y
    rows = native._Rows(
        x=x.data_ptr(),
        scale=None if scale is None else scale.data_ptr(),
        zeros=(any_point if zeros is None else zeros).data_ptr() if affine else None,
        m=m,
        k=k,
        ldx=k,
        group=group,
        scale_row=count if scale is not None and scale.shape[0] > 1 else 0,
        given=scale is not None,
        power_of_two=power_of_two,
        dtype=native.OUTPUTS.index(x.dtype),
        most=numbers.high - numbers.low if affine else numbers.high,
        low=numbers.low,
        high=numbers.high,
        one_sided=numbers.low >= 0,
    )
    largest = min(torch.finfo(t).max for t in (x.dtype, torch.float32))
    fake = _Fake(rows=rows, y=y.data_ptr(), even=even, affine=affine, largest=largest)
    failed = lib.octavo_fake_quantize(ctypes.byref(fake), min(native._instruction_set(), 2), torch.get_num_threads())
    return None if failed else y


def _cast_in_place(x: Tensor, *arguments: Any) -> None:
    x.copy_(torch.ops.octavo.cast(x, *arguments))


def _cast_in_place_cpu(x: Tensor, *arguments: Any) -> None:
    turned = x
    if arguments[-1] is None:  # no noise that goes with the elements: in the order of the memory
        strides = x.stride()
        turned = x.permute(sorted(range(x.dim()), key=lambda dim: -strides[dim]))
    if native.cast(turned, *arguments, in_place=True) is None:
        _cast_in_place(x, *arguments)


def _fake_cpu(x: Tensor, *arguments: Any) -> Tensor:
    fast = _native(x.contiguous(), None, *arguments)
    return _law(x, *arguments) if fast is None else fast


def _fake_in_place(x: Tensor, *arguments: Any) -> None:
    x.copy_(_law(x, *arguments))


def _fake_in_place_cpu(x: Tensor, *arguments: Any) -> None:
    if _native(x, x, *arguments) is None:
        _fake_in_place(x, *arguments)


def _in_place(change: Callable[..., None]) -> Callable[..., None]:
    """``change`` as autograd has to see it: whoever saved the tensor for its backward pass finds it changed."""

    def run(x: Tensor, *arguments: Any) -> None:
        change(x, *arguments)
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)

    return run


for _name, _any, _cpu in (
    ("cast_", _in_place(_cast_in_place), _in_place(_cast_in_place_cpu)),
    ("fake_quantize", _law, _fake_cpu),
    ("fake_quantize_", _in_place(_fake_in_place), _in_place(_fake_in_place_cpu)),
):
    LIBRARY.impl(_name, _any, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _cpu, "CPU")
