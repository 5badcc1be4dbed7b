"""Compiles the kernels on first use, loads them, and calls them: the CPU's fast paths without a build step.

``cast.c``, ``rows.c`` and ``product.c`` make one shared object; ``accumulate.c``, which ``accumulate.py`` calls, makes
another, when first asked for. The C files know nothing of Python or torch, so whatever ``cc`` the machine has builds
one in a second or two, all at the same time. A shared object is kept in
``$OCTAVO_CACHE`` (or ``$XDG_CACHE_HOME/octavo``, ``~/.cache/octavo``) under a name that carries a hash of all it was
made from. It needs ``libgomp.so.1``, which torch has loaded under that very name by the time it is opened: all run on
one pool of threads.

Everything here is optional. Without a compiler, or with ``OCTAVO_NATIVE=0``, or for tensors the kernels do not take,
the functions return ``None`` and the caller does the same with torch.
"""

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from octavo.ops.schema import LONGEST, OVERFLOWS, ROUNDINGS, RowFormat

FOLDER = Path(__file__).parent
LIBRARIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # sources, and the flags of their own
    # each step of scaling rounds
    "native": (("cast.c", "rows.c", "product.c", "linear.c"), ("-std=c11", "-ffp-contract=off")),
    "fake_quantize": (("fake_quantize.c",), ("-std=c11", "-ffp-contract=off")),
    # its products are exact: fusing them with a sum changes no result
    "accumulate": (("accumulate.c",), ("-std=c11", "-ffp-contract=fast")),
    "binding": (("binding.cpp",), ("-std=c++17",)),
}
COMPILERS = {".c": ("CC", "cc", "gcc", "clang"), ".cpp": ("CXX", "c++", "g++", "clang++")}
FLAGS = ("-O3", "-fPIC", "-fno-trapping-math")  # floats only convert: traps are of no interest
INSTRUCTION_SETS = ("scalar", "AVX2", "AVX-512", "AVX-512 BF16")  # by octavo_isa()'s numbers
OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)  # by common.h's numbers
SIGN = 1 << 31
INFINITY = 0x7F800000
NAN = 0x7FC00000

_lock = threading.Lock()


class Even(ctypes.Structure):
    """What ``common.h`` calls Even: a number grid with the usual rounding."""

    _fields_ = (
        *((name, ctypes.c_float) for name in ("low", "high")),
        *((name, ctypes.c_uint32) for name in ("normal", "lift", "zero_sign")),
    )


class _Grid(ctypes.Structure):
    """What ``cast.c`` calls Grid: a number grid and a rounding, boiled down to integers."""

    _fields_ = (
        ("mantissa", ctypes.c_int32),
        ("emin", ctypes.c_int32),
        ("qmin", ctypes.c_int32),
        ("step", ctypes.c_uint32),
        ("nearest", ctypes.c_uint32),
        ("tie", ctypes.c_uint32),
        ("parity", ctypes.c_uint32),
        ("away", ctypes.c_uint32 * 2),
        ("limit", ctypes.c_uint32 * 2),
        ("overflow", ctypes.c_uint32 * 2),
        ("infinite", ctypes.c_uint32 * 2),
        ("bottom", ctypes.c_uint32),
        ("least", ctypes.c_uint32),
        ("zero_sign", ctypes.c_uint32),
        ("quick", ctypes.c_int32),
        ("even", Even),
    )


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


def library(name: str = "native") -> ctypes.CDLL | None:
    """One of ``LIBRARIES``, or None where there are none; the first call compiles. Never raises."""
    return _loaded(name)[0]


def status() -> str:
    """One line for people: the file in use and its instruction set, or why there is none."""
    return _loaded("native")[1]


@functools.cache
def bind() -> str:
    """Make ``binding.cpp`` the CPU's ``linear`` and ``linear_weight_only``, where it can be: one line that says so."""
    kernels = library()
    if kernels is None:
        return "layers run step by step"
    if INSTRUCTION_SETS[_instruction_set()] != "AVX-512 BF16":
        return "layers run step by step: the fused kernels need AVX-512 BF16 and VNNI"
    binding, status = _loaded("binding")
    if binding is None:
        return f"layers run step by step: {status}"
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
    lib = library()
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
    grid = _grid(mantissa, emin, low, high, rounding, overflow, flush, negative_zero)
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
    lib = library()
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
    lib = library()
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
    lib = library()
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
    lib = library()
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
    lib = library()
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


@functools.lru_cache(maxsize=256)
def _grid(
    mantissa: int, emin: int, low: float, high: float, rounding: str, overflow: str, flush: bool, negative_zero: bool
) -> _Grid | None:
    """The kernel's description of a grid; None beyond its range: quanta under 2⁻¹⁴⁹, limits that float32 lacks."""
    qmin = emin if flush else emin - mantissa
    known = rounding in ROUNDINGS and overflow in OVERFLOWS
    if not (known and 0 <= mantissa <= 23 and emin - mantissa >= -149 and qmin <= 127 and low <= high and high > 0):
        return None
    least, most, step = _bits(low), _bits(high), _bits(2.0**qmin)
    if least is None or most is None or step is None:
        return None
    ends = (most, least | SIGN if low < 0 else least)
    beyond = {"saturate": ends, "inf": (INFINITY, INFINITY | SIGN), "nan": (NAN, NAN)}[overflow]
    even = even_grid(mantissa, emin, low, high, flush, negative_zero)
    usual = rounding == "nearest-even" and overflow == "saturate"
    stops = (rounding in ("toward-zero", "down"), rounding in ("toward-zero", "up"))  # IEEE 754: not past the limit
    ones = 2**32 - 1
    return _Grid(
        mantissa=mantissa,
        emin=emin + 127,
        qmin=qmin + 127,
        step=2 * step,
        nearest=ones * rounding.startswith("nearest"),
        tie=ones * (rounding == "nearest-even"),
        parity=int(mantissa > 0),
        away=(ones * (rounding == "up"), ones * (rounding == "down")),
        limit=(2 * most + 1, 0 if low > 0 else 2 * least + 1),
        overflow=tuple(end if stop else other for end, stop, other in zip(ends, stops, beyond, strict=True)),
        infinite=beyond,
        bottom=2 * least if low > 0 else 0,
        least=least,
        zero_sign=SIGN * negative_zero,
        quick=usual and even is not None,
        even=even or Even(),
    )


def even_grid(mantissa: int, emin: int, low: float, high: float, flush: bool, negative_zero: bool) -> Even | None:
    """The grid for ``round_even``, or None where that does not serve.

    It wants the quantum of every number to be that of its exponent or of ``emin``, ties that are even where the
    mantissa is, half a quantum that is a normal number, limits on the grid, and float32 to hold 2**23 quanta of any.
    """
    most = max(-low, high)
    if flush or not (0 < mantissa <= 23 and emin <= 127 and emin - mantissa > -126 and low <= 0 < high):
        return None
    if not all(_on_grid(edge, mantissa, emin) for edge in (low, high)) or (low == 0 and negative_zero):
        return None
    top = max(math.frexp(most)[1] - 1, emin)
    if top + 23 - mantissa > 127 or (mantissa == 23 and most >= 2.0**emin):
        return None
    return Even(
        low=low, high=high, normal=(emin + 127) << 23, lift=(23 - mantissa) << 23, zero_sign=SIGN * negative_zero
    )


def _on_grid(value: float, mantissa: int, emin: int) -> bool:
    if value == 0 or not math.isfinite(value):
        return value == 0
    exponent = max(math.frexp(value)[1] - 1, emin)
    return math.ldexp(value, mantissa - exponent).is_integer()


def _bits(value: float) -> int | None:
    """The float32 pattern of |value|, None if there is none; in integers, so that no flush-to-zero mode matters."""
    if not abs(value) < 2.0**128:
        return None
    units = math.ldexp(abs(value), 149)  # of the smallest subnormal
    if not units.is_integer():
        return None
    shift = max(int(units).bit_length() - 24, 0)
    significand = int(units) >> shift
    return (shift << 23) + significand if significand << shift == units else None


def _instruction_set() -> int:
    """What the kernels run on, as an index into ``INSTRUCTION_SETS``."""
    lib = library()
    return 0 if lib is None else int(lib.octavo_isa())


def _loaded(name: str = "native") -> tuple[ctypes.CDLL | None, str]:
    with _lock:  # functools.cache alone would let two threads compile
        return _load(name)


@functools.cache
def _load(name: str) -> tuple[ctypes.CDLL | None, str]:
    """The library and its status line, or None and the reason. Tried in the cache folder, then in a temporary one."""
    if os.environ.get("OCTAVO_NATIVE") == "0":
        return None, "no native kernels: OCTAVO_NATIVE=0"
    suffix = Path(LIBRARIES[name][0][0]).suffix
    compiler = _compiler(suffix)
    if compiler is None:
        return None, f"no native kernels: no C{'++' * (suffix != '.c')} compiler found ({', '.join(COMPILERS[suffix])})"
    reason = ""
    for prepare in (_cache_folder, _temporary_folder):
        try:
            with prepare() as folder:
                path = _compiled(name, compiler, folder)
                lib = _declared(name, ctypes.CDLL(str(path)))
        except subprocess.SubprocessError as error:
            return None, f"no native kernels: {_complaint(error)}"
        except (OSError, AttributeError, ValueError) as error:  # the folder is not ours, or the file in it is damaged
            reason = reason or str(error)
        else:
            where = f"compiled for this process only ({reason})" if reason else str(path)
            best = f"{INSTRUCTION_SETS[lib.octavo_isa()]}, " if name == "native" else ""
            return lib, f"native kernels: {best}{where}"
    return None, f"no native kernels: {reason}"


def _compiler(suffix: str) -> list[str] | None:
    """The compiler's command line so far: ``$CC``, which may carry options, or the first of the usual names."""
    variable, *usual = COMPILERS[suffix]
    for candidate in (os.environ.get(variable, ""), *usual):
        words = candidate.split()
        if words and shutil.which(words[0]):
            return words
    return None


@contextlib.contextmanager
def _cache_folder() -> Iterator[Path]:
    """A folder only we write to: what lies in it will run in this process."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(os.environ.get("OCTAVO_CACHE") or Path(home, "octavo"))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.stat()
    if state.st_uid not in (os.getuid(), 0) or state.st_mode & 0o022:
        raise PermissionError(f"{folder} is writable by others")
    yield folder


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="octavo-") as folder:  # a file that is loaded need not stay
        yield Path(folder)


def _compiled(name: str, compiler: list[str], folder: Path) -> Path:
    """A library's shared object in ``folder``, made unless it is there. Written aside and renamed: others may race."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    sources, own = LIBRARIES[name]
    # clang's OpenMP is another library than torch's; gcc's is the same
    command = [*compiler, *FLAGS, *own, "-fopenmp-simd" if b"clang" in version else "-fopenmp"]
    linked: list[str] = []
    if name == "binding":
        home = Path(torch.__file__).parent
        command.append(f"-I{home / 'include'}")
        linked = [f"-L{home / 'lib'}", "-ltorch_cpu"]
    recipe = repr((command, version, platform.machine(), torch.__version__)).encode()
    for part in (*sources, *sorted(path.name for path in FOLDER.glob("*.h"))):
        recipe += (FOLDER / part).read_bytes()
    path = folder / f"{name}-{hashlib.sha256(recipe).hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder, suffix=".tmp") as aside, ThreadPoolExecutor() as pool:

            def run(*arguments: str | Path) -> None:
                line, calm = [*command, *map(str, arguments)], {**os.environ, "LC_ALL": "C"}
                subprocess.run(line, capture_output=True, check=True, timeout=300, env=calm)

            objects = [Path(aside, f"{source}.o") for source in sources]
            made = [pool.submit(run, "-c", FOLDER / s, "-o", o) for s, o in zip(sources, objects, strict=True)]
            for task in made:
                task.result()
            run("-shared", *objects, *linked, "-o", Path(aside, path.name))
            os.replace(Path(aside, path.name), path)
    return path


def _declared(name: str, lib: ctypes.CDLL) -> ctypes.CDLL:
    """``lib`` with the signatures of its source."""
    pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    if name == "binding":
        lib.octavo_bind.argtypes = (pointer, number)
        lib.octavo_bind.restype = None
        return lib
    if name == "accumulate":
        lib.octavo_survey.argtypes = (pointer, count, pointer)
        lib.octavo_survey.restype = None
        lib.octavo_accumulate.argtypes = (*(pointer,) * 3, count, count, pointer, number, number, number)
        lib.octavo_accumulate.restype = None
        return lib
    if name == "fake_quantize":
        lib.octavo_fake_quantize.argtypes = (pointer, number, number)
        lib.octavo_fake_quantize.restype = number
        return lib
    lib.octavo_isa.argtypes = ()
    lib.octavo_isa.restype = number
    lib.octavo_cast.argtypes = (pointer, pointer, pointer, count, number, ctypes.POINTER(_Grid), number, number)
    lib.octavo_cast.restype = None
    real = ctypes.c_float
    lib.octavo_encode8.argtypes = (pointer, pointer, count, *[number] * 2, real, real, *[number] * 5)
    lib.octavo_encode8.restype = None
    lib.octavo_decode16.argtypes = (pointer, pointer, pointer, count, number)
    lib.octavo_decode16.restype = None
    lib.octavo_quantize_rows.argtypes = (ctypes.POINTER(_Rows), number, number)
    lib.octavo_quantize_rows.restype = number
    lib.octavo_scale_sums.argtypes = (pointer, number, *[pointer] * 4, number, count, count, number, number)
    lib.octavo_scale_sums.restype = None
    lib.octavo_product.argtypes = (ctypes.POINTER(_Product), pointer, number, number)
    lib.octavo_product.restype = number
    return lib


def _complaint(error: subprocess.SubprocessError) -> str:
    """A compiler's first error line, as far as there is one."""
    lines = (getattr(error, "stderr", None) or b"").decode(errors="replace").splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else str(error))
