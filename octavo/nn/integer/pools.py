"""Pools and means of codes: the largest keeps its encoding, an average is a sum divided by integers."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.errors import OctavoError
from octavo.nn.integer.encoding import Encoding
from octavo.nn.integer.op import IntegerOp, KeepingOp, RescalingOp, centred, counted, pad, rescale

MOST_AVERAGED = 1 << 22  # codes: twice the sum of so many fits int32


class _Average(RescalingOp):
    """Means of codes: their sum, brought to the output's scale, divided by their number, halves away from zero.

    Where the output has its input's encoding this is TensorFlow Lite's AVERAGE_POOL. The division is one of integers,
    so that the number may depend on the size of the input and on the place in it.
    """

    def __init__(self, inputs: Sequence[Encoding], output: Encoding) -> None:
        super().__init__(inputs, output)
        self._set_ratios([inputs[0].scale / output.scale])

    @abstractmethod
    def _sums(self, x: Tensor) -> Tensor:
        """Sums of int32 numbers over what is averaged."""

    @abstractmethod
    def _counts(self, shape: torch.Size) -> list[tuple[int, list[int]]]:
        """By how many an output is divided: for every averaged dimension of it, counted from the last, its factors."""

    def _divisor(self, x: Tensor) -> Tensor:
        divisor = torch.ones((), dtype=torch.int64, device=x.device)
        for dim, factors in self._counts(x.shape):
            place = () if len(factors) == 1 else (-1, *(1,) * (-dim - 1))
            divisor = divisor * torch.tensor(factors, dtype=torch.int64, device=x.device).reshape(place)
        if divisor.numel() and not 0 < int(divisor.min()) <= int(divisor.max()) <= MOST_AVERAGED:
            raise OctavoError(f"a mean is of 1 to {MOST_AVERAGED:,} numbers, not of {int(divisor.max()):,}")
        return divisor

    def _divided(self, total: Tensor, number: Tensor) -> Tensor:
        total = rescale(total, self.multiplier[0], self.shift[0]) + self.output.zero_point * number
        quotient = torch.div(total.abs() + number // 2, number, rounding_mode="floor")
        return self.output.clamp(quotient * total.sign())

    def forward(self, codes: Tensor) -> Tensor:
        """Codes to codes."""
        return self._divided(self._sums(centred(codes, self.inputs[0])), self._divisor(codes))

    def rounded(self, *values: Tensor) -> Tensor:
        """The mean as an integer sum again, and the same steps in float64."""
        number = self._divisor(values[0])
        total = counted(self.real(*values) * number, self.inputs[0].scale)
        return self.output.values(self._divided(total, number))


class Window(NamedTuple):
    """The windows of a pool along one dimension, as torch lays them."""

    size: int
    stride: int
    padding: int = 0
    dilation: int = 1
    ceil_mode: bool = False

    @property
    def span(self) -> int:
        """From its first number to its last."""
        return (self.size - 1) * self.dilation + 1

    def places(self, n: int) -> int:
        """How many there are over ``n`` numbers."""
        room = n + 2 * self.padding - self.span
        count = (-(-room // self.stride) if self.ceil_mode else room // self.stride) + 1
        if self.ceil_mode and (count - 1) * self.stride >= n + self.padding:
            count -= 1  # a window starts within the numbers or the padding before them
        if count < 1:
            raise OctavoError(f"a pool over {self.span} has no place among {n} numbers")
        return count

    def over(self, x: Tensor, dim: int, fill: int) -> Tensor:
        """The windows along a dimension (counted from the last), their numbers in a new last one."""
        n = x.shape[dim]
        end = (self.places(n) - 1) * self.stride + self.span - n - self.padding
        padded = pad(x, [(self.padding, end), *[(0, 0)] * (-dim - 1)], fill)
        return padded.unfold(x.dim() + dim, self.span, self.stride)[..., :: self.dilation]


class _Pool(IntegerOp):
    """``windows``: one for each of the last dimensions."""

    settings: ClassVar[tuple[str, ...]] = ("windows",)

    def __init__(self, inputs: Sequence[Encoding], output: Encoding, windows: Sequence[Sequence[Any]]) -> None:
        super().__init__(inputs, output)
        self.windows = tuple(Window(*window) for window in windows)
        if not 1 <= len(self.windows) <= 3:
            raise OctavoError(f"a pool has 1 to 3 dimensions, not {len(self.windows)}")
        for window in self.windows:
            if min(window.size, window.stride, window.dilation) < 1 or not 0 <= window.padding <= window.size // 2:
                raise OctavoError(f"no pool has windows like {window}")

    def _each(self) -> "zip[tuple[int, Window]]":
        """The dimensions, counted from the last, and their windows."""
        return zip(range(-len(self.windows), 0), self.windows, strict=True)


class MaxPool(_Pool, KeepingOp):
    """The largest code of every window, and so the largest number: the input's encoding stays."""

    def forward(self, codes: Tensor) -> Tensor:
        """Codes to codes; what pads them is the lowest there is."""
        for dim, window in self._each():
            codes = window.over(codes, dim, self.inputs[0].low).amax(-1)
        return codes

    def real(self, *values: Tensor) -> Tensor:
        """The float64 pool."""
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(self.windows) - 1]
        size, stride, padding, dilation, ceil_mode = zip(*self.windows, strict=True)
        pooled: Tensor = pool(values[0], size, stride, padding, dilation, ceil_mode[0])
        return pooled


class AveragePool(_Pool, _Average):
    """The mean of every window.

    ``count_padding``: zeros that pad the input count as numbers. ``divisor`` takes the place of the count.
    """

    settings = ("windows", "count_padding", "divisor")

    def __init__(
        self,
        inputs: Sequence[Encoding],
        output: Encoding,
        windows: Sequence[Sequence[Any]],
        count_padding: bool = True,
        divisor: int | None = None,
    ) -> None:
        super().__init__(inputs, output, windows)
        self.count_padding, self.divisor = count_padding, divisor
        if any(window.dilation > 1 for window in self.windows) or (divisor is not None and divisor < 1):
            raise OctavoError("an average pool has no dilation, and divides by a positive number")

    def _sums(self, x: Tensor) -> Tensor:
        for dim, window in self._each():
            x = window.over(x, dim, 0).sum(-1, dtype=torch.int32)
        return x

    def _counts(self, shape: torch.Size) -> list[tuple[int, list[int]]]:
        if self.divisor is not None:
            return [(-1, [self.divisor])]
        counts = []
        for dim, window in self._each():
            n, around = shape[dim], window.padding if self.count_padding else 0
            starts = [place * window.stride - window.padding for place in range(window.places(n))]
            # what ceil_mode adds at the end never counts
            ends = [min(start + window.size, n + window.padding, n + around) for start in starts]
            counts.append((dim, [end - max(start, -around) for start, end in zip(starts, ends, strict=True)]))
        return counts

    def real(self, *values: Tensor) -> Tensor:
        """The float64 pool."""
        size, stride, padding, _, ceil_mode = zip(*self.windows, strict=True)
        settings = (size, stride, padding, ceil_mode[0], self.count_padding)
        if len(self.windows) == 1:
            return F.avg_pool1d(values[0], *settings)
        pool = F.avg_pool2d if len(self.windows) == 2 else F.avg_pool3d
        return pool(values[0], *settings, self.divisor)


class _AdaptivePool(IntegerOp):
    """``size``: into how many nearly equal parts each of the last dimensions is cut; None keeps it as it is."""

    settings = ("size",)

    def __init__(self, inputs: Sequence[Encoding], output: Encoding, size: Sequence[int | None]) -> None:
        super().__init__(inputs, output)
        self.size = tuple(size)
        if not 1 <= len(self.size) <= 3 or any(n is not None and n < 1 for n in self.size):
            raise OctavoError(f"an adaptive pool has 1 to 3 dimensions of at least one part, not {self.size}")

    def _parts(self, dim: int, n: int) -> list[tuple[int, int]]:
        """The bounds of the parts of a dimension (counted from the last) of ``n`` numbers."""
        count = self.size[dim]
        count = n if count is None else count
        return [(place * n // count, -(-(place + 1) * n // count)) for place in range(count)]

    @property
    def _dims(self) -> range:
        return range(-len(self.size), 0)


class AdaptiveAveragePool(_AdaptivePool, _Average):
    """The mean of every part."""

    def _sums(self, x: Tensor) -> Tensor:
        for dim in self._dims:
            each = (x.narrow(dim, a, b - a) for a, b in self._parts(dim, x.shape[dim]))
            x = torch.stack([part.sum(dim, dtype=torch.int32) for part in each], dim)
        return x

    def _counts(self, shape: torch.Size) -> list[tuple[int, list[int]]]:
        return [(dim, [b - a for a, b in self._parts(dim, shape[dim])]) for dim in self._dims]

    def real(self, *values: Tensor) -> Tensor:
        """The float64 pool."""
        pools: list[Callable[..., Tensor]] = [F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d]
        return pools[len(self.size) - 1](values[0], self.size)


class AdaptiveMaxPool(_AdaptivePool, KeepingOp):
    """The largest of every part. The encoding stays."""

    def forward(self, codes: Tensor) -> Tensor:
        """Codes to codes."""
        for dim in self._dims:
            each = (codes.narrow(dim, a, b - a) for a, b in self._parts(dim, codes.shape[dim]))
            codes = torch.stack([part.amax(dim) for part in each], dim)
        return codes

    def real(self, *values: Tensor) -> Tensor:
        """The float64 pool."""
        pools: list[Callable[..., Tensor]] = [F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d]
        return pools[len(self.size) - 1](values[0], self.size)


class Mean(_Average):
    """The mean over whole dimensions, counted from the last."""

    settings = ("dims", "keepdim")

    def __init__(
        self, inputs: Sequence[Encoding], output: Encoding, dims: Sequence[int], keepdim: bool = False
    ) -> None:
        super().__init__(inputs, output)
        self.dims, self.keepdim = tuple(dims), keepdim
        if not self.dims or max(self.dims) >= 0:
            raise OctavoError(f"a mean is over dimensions counted from the last, not over {self.dims}")

    def _sums(self, x: Tensor) -> Tensor:
        return x.sum(self.dims, keepdim=self.keepdim, dtype=torch.int32)

    def _counts(self, shape: torch.Size) -> list[tuple[int, list[int]]]:
        return [(-1, [math.prod(shape[dim] for dim in self.dims)])]

    def real(self, *values: Tensor) -> Tensor:
        """The float64 mean."""
        return values[0].mean(self.dims, self.keepdim)


class Maximum(KeepingOp):
    """The largest over whole dimensions. The encoding stays."""

    settings = ("dims", "keepdim")

    def __init__(
        self, inputs: Sequence[Encoding], output: Encoding, dims: Sequence[int], keepdim: bool = False
    ) -> None:
        super().__init__(inputs, output)
        self.dims, self.keepdim = tuple(dims), keepdim

    def forward(self, codes: Tensor) -> Tensor:
        """Codes to codes."""
        return codes.amax(self.dims, self.keepdim)

    def real(self, *values: Tensor) -> Tensor:
        """The largest value."""
        return values[0].amax(self.dims, self.keepdim)
