"""Convolutions whose weight is 8-bit codes, and whose input may be too.

A convolution is a matrix product: the numbers under the kernel at one place of the output, its *patch*, times the
weight matrix (Chellapilla et al., 2006). Patches are gathered from codes, not from floats, with channels last, so that
long runs of bytes are copied. A transposed convolution is an ordinary one over an input with zeros put between its
numbers and a kernel turned round (Dumoulin and Visin, 1603.07285). Padding is the number 0.0: in codes, the zero point.

The weight matrix is [out, K], where K runs over the kernel's positions and, fastest, over the channels of one group;
groups of scales are cut along K. For the input, a *token* is a sample: ``PerToken`` means a scale an image.
``PerGroup`` quantizes every patch on its own, as rows of K.

Where groups are narrow (depthwise convolutions) matrices would be slivers. There torch convolves the unscaled numbers
in FP32, as long as that is as exact as the matrix product: where scales do not vary along K, and no sum of integers can
leave the 2**24 that FP32 counts. Other scales run group by group, which takes its time.

So sums of integers of at most 8 bits are exact until the scales multiply them, in FP32; where scales vary along K, each
stretch is. Sums of 8-bit floats are FP32 sums of exact products, within K · 2**-24 · Σ|xw| of the exact one.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from octavo.core.cast import Cast
from octavo.core.formats import IntegerFormat
from octavo.core.granularity import PerGroup, PerTensor, PerToken, expand_blocks
from octavo.core.matmul import full_precision, multiply
from octavo.core.qtensor import QTensor
from octavo.core.schemes import Scheme, describe
from octavo.errors import OctavoError
from octavo.nn.layer import QuantizedLayer

PIECE = 1 << 21  # numbers of patches gathered at a time: about what a cache holds
COUNTABLE = 1 << 24  # FP32 holds every integer up to here

ORDINARY: dict[int, type[_ConvNd]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[_ConvNd]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONVOLVE_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class QuantizedConv(QuantizedLayer):
    """``Conv1d``, ``Conv2d`` or ``Conv3d`` with its weight as codes and scales, its input cast as the scheme says.

    ``like``: the float layer, whose geometry it takes over, under torch's names.
    """

    computes: ClassVar[tuple[str, ...]] = ("forward", "_conv_forward")

    def __init__(self, weight: QTensor, bias: Tensor | None, scheme: Scheme, like: _ConvNd, **calibrated: Any) -> None:
        super().__init__(weight, bias, scheme, **calibrated)
        self.kernel_size = tuple(like.weight.shape[2:])
        spatial = len(self.kernel_size)
        self.stride, self.dilation = _each(like.stride, spatial), _each(like.dilation, spatial)
        self.padding = like.padding if isinstance(like.padding, str) else _each(like.padding, spatial)
        self.output_padding = _each(like.output_padding, spatial)
        self.groups, self.padding_mode, self.transposed = like.groups, like.padding_mode, like.transposed
        self.out_channels = weight.shape[0]
        self.in_channels = like.weight.shape[0] if like.transposed else like.weight.shape[1] * like.groups
        self.around = tuple(like._reversed_padding_repeated_twice) if like.padding_mode != "zeros" else ()

    @staticmethod
    def matrix(module: nn.Module) -> Tensor:
        """The weight [out, in / groups, …] as [out, K], channels last."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.movedim(1, -1).flatten(1)

    @classmethod
    def replacing(cls, module: nn.Module, weight: QTensor, scheme: Scheme, **calibrated: Any) -> "QuantizedConv":
        """The 8-bit layer in the place of a convolution."""
        assert isinstance(module, _ConvNd)
        return cls(weight, module.bias, scheme, module, **calibrated)

    def blank(self) -> nn.Module:
        """A convolution of torch's."""
        kinds = TRANSPOSED if self.transposed else ORDINARY
        more: dict[str, Any] = {"output_padding": self.output_padding} if self.transposed else {}
        return kinds[len(self.kernel_size)](
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
            **more,
        )

    @classmethod
    def obstacle(cls, module: nn.Module, scheme: Scheme) -> str | None:
        """Why this convolution cannot run under the scheme, or None."""
        if scheme.outliers is not None:
            return "outliers are taken out of the inputs of linear layers, not of convolutions"
        granularity = None if scheme.input is None else scheme.input.granularity
        if not isinstance(granularity, PerTensor | PerToken | PerGroup | None):
            return (
                f"the input of a convolution has one scale, a scale a sample (PerToken) or groups along its patches "
                f"(PerGroup), not {granularity}"
            )
        return super().obstacle(module, scheme)

    @property
    def weight(self) -> Tensor:
        """The weight as a float tensor of torch's shape, made anew each time."""
        return self._in_shape(self.quantized_weight.dequantize())

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [N, in, …] or [in, …] to [N, out, …] or [out, …], in ``x``'s dtype."""
        if self._is_sample(x):
            return self.forward(x[None])[0]
        self.check_place(x)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.around, self.padding_mode), (0,) * len(self.kernel_size)
        if self.scheme.input is None:
            return self._run_float(CONVOLVE, x, self.stride, padding, self.dilation, self.groups)
        if padding == "same":
            spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            borders = [(span // 2, span - span // 2) for span in spans]
        else:
            borders = [(p, p) for p in _each(0 if padding == "valid" else padding, len(self.kernel_size))]
        return self._run_codes(x, self.stride, borders)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        shown = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        usual = {"padding": 0, "output_padding": 0, "dilation": 1}
        for name, value in usual.items():
            if getattr(self, name) != (value,) * len(self.kernel_size):
                shown.append(f"{name}={getattr(self, name)!r}")
        if self.groups != 1:
            shown.append(f"groups={self.groups}")
        if self.bias is None:
            shown.append("bias=False")
        if self.padding_mode != "zeros":
            shown.append(f"padding_mode={self.padding_mode!r}")
        shown.append(describe(self.scheme))
        if self.clamp is not None:
            shown.append(f"clamp={self.clamp}")
        return ", ".join(shown)

    def _is_sample(self, x: Tensor) -> bool:
        """Whether ``x`` is one sample and no batch of them. Raises ``OctavoError`` if it is neither."""
        spatial = len(self.kernel_size)
        if not x.is_floating_point() or x.ndim - spatial not in (1, 2) or x.shape[-spatial - 1] != self.in_channels:
            raise OctavoError(
                f"the layer takes floats [N, {self.in_channels}, …] with {spatial + 2} dimensions, not {x.dtype} "
                f"{list(x.shape)}"
            )
        return x.ndim == spatial + 1

    def _kernels(self, matrix: Tensor) -> Tensor:
        """A matrix [out, K] as the kernels [out, in / groups, …] of an ordinary convolution."""
        kernels: Tensor = matrix.unflatten(1, (*self.kernel_size, self.in_channels // self.groups))
        return kernels.movedim(-1, 1)

    def _in_shape(self, matrix: Tensor) -> Tensor:
        """A matrix [out, K] in the shape of the float layer's weight."""
        return self._kernels(matrix).clone(memory_format=torch.contiguous_format)  # strides of its own, also of size 1

    def _run_float(self, convolve: dict[int, Any], x: Tensor, *geometry: Any) -> Tensor:
        """Weight-only: torch's convolution with a dequantized weight."""
        weight = self._in_shape(self.quantized_weight.dequantize(x.dtype))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: Tensor = convolve[len(self.kernel_size)](x, weight, bias, *geometry)
        return self.activate(y)

    def _run_codes(
        self, x: Tensor, stride: Sequence[int], borders: Sequence[tuple[int, int]], apart: Sequence[int] | None = None
    ) -> Tensor:
        """The ordinary convolution of ``x`` [N, in, …], cast, with ``borders`` of zeros and its numbers ``apart``."""
        how = self.scheme.input
        assert how is not None
        apart = apart or (1,) * len(borders)
        if isinstance(how.granularity, PerGroup):
            return self._multiply(x, _spread(x.detach(), 0, borders, apart), None, stride)
        q = self.quantize_input(x.flatten(1))
        zero = 0 if q.zero_point is None else q.zero_point.to(q.codes.dtype)
        spread = _spread(q.codes.view(x.shape), zero, borders, apart)
        return (
            self._convolve(x, spread, q, stride) if self._sums_are_narrow(how) else self._multiply(x, spread, q, stride)
        )

    def _sums_are_narrow(self, how: Cast) -> bool:
        """Whether torch's convolution of numbers in FP32 is the way: many groups, and sums as exact as a matrix's."""
        if self.groups == 1 or self.scale.shape[1] > 1:
            return False
        casts = (how, self.scheme.weight)
        if any(not isinstance(c.format, IntegerFormat) or c.format.bits > 8 for c in casts):
            return True
        return self.codes.shape[1] * _largest(casts[0]) * _largest(casts[1]) <= COUNTABLE

    def _convolve(self, x: Tensor, spread: Tensor, q: QTensor, stride: Sequence[int]) -> Tensor:
        """A convolution by torch of the unscaled numbers, then scales."""
        _windows(spread, self.kernel_size, stride, self.dilation)  # for its errors
        spatial, weight = len(self.kernel_size), self.quantized_weight
        codes = spread.flatten(1)
        block = (q.block[0], codes.shape[1])
        # on a GPU in float64: there torch may take an algorithm that transforms (Winograd, FFT), or round to TF32
        work = torch.float64 if x.is_cuda else torch.float32
        numbers = QTensor(codes, q.scale, q.zero_point, q.format, block).numbers(work).view(spread.shape).movedim(-1, 1)
        kernels = self._kernels(weight.numbers(work))
        with full_precision(x.device.type):
            y = CONVOLVE[spatial](numbers, kernels, None, tuple(stride), 0, self.dilation, self.groups)
        if work == torch.float64:
            y = (y.round() if all(isinstance(t.format, IntegerFormat) for t in (q, weight)) else y).float()
        per_channel = expand_blocks(weight.scale, (self.out_channels, 1), weight.block)
        y = y.mul_(q.scale.view(-1, 1, *(1,) * spatial)).mul_(per_channel.view(1, -1, *(1,) * spatial))
        if self.bias is not None:
            y += self.bias.view(-1, *(1,) * spatial)
        return self.activate(y).to(x.dtype).contiguous(memory_format=_memory_format(x))

    def _multiply(self, x: Tensor, spread: Tensor, q: QTensor | None, stride: Sequence[int]) -> Tensor:
        """Patches times the weight matrix, group by group: of codes with the scales of ``q``, or of floats."""
        spatial = len(self.kernel_size)
        windows = _windows(spread, self.kernel_size, stride, self.dilation)
        places = windows.shape[: 1 + spatial]
        y = torch.empty(
            (places[0], self.out_channels, *places[1:]),
            dtype=x.dtype,
            device=x.device,
            memory_format=_memory_format(x),
        )
        target, k = y.movedim(1, -1), self.codes.shape[1]
        inputs = windows.tensor_split(self.groups, -1)
        outputs, weights = target.tensor_split(self.groups, -1), _split_rows(self.quantized_weight, self.groups)
        biases = [None] * self.groups if self.bias is None else self.bias.tensor_split(self.groups)
        for samples, lines in _pieces(windows):
            for source, weight, bias, out in zip(inputs, weights, biases, outputs, strict=True):
                piece, out = source[samples, lines], out[samples, lines]
                rows = piece.reshape(out[..., 0].numel(), k)
                product = multiply(self.quantize_input(rows) if q is None else _rows(q, rows, samples), weight)
                if bias is not None:
                    product += bias
                out.copy_(self.activate(product).view(out.shape))
        return y


class QuantizedConvTranspose(QuantizedConv):
    """``ConvTranspose1d``, ``ConvTranspose2d`` or ``ConvTranspose3d`` with its weight as codes and scales.

    ``PerGroup`` inputs are patches too: what one number of the output is the sum of, zeros in between included.
    """

    computes: ClassVar[tuple[str, ...]] = ("forward", "_output_padding")

    @staticmethod
    def matrix(module: nn.Module) -> Tensor:
        """The weight [in, out / groups, …] as the matrix [out, K] of the ordinary convolution."""
        assert isinstance(module, _ConvNd)
        kernels = _exchange(module.weight, module.groups)
        return kernels.flip(list(range(2, kernels.ndim))).movedim(1, -1).flatten(1)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """``x`` [N, in, …] or [in, …] to [N, out, …] or [out, …], in ``x``'s dtype; ``output_size`` as for torch."""
        if self._is_sample(x):
            return self.forward(x[None], output_size)[0]
        self.check_place(x)
        padding = cast(tuple[int, ...], self.padding)
        extra = self._extra(x, padding, output_size)
        if self.scheme.input is None:
            return self._run_float(CONVOLVE_TRANSPOSED, x, self.stride, padding, extra, self.groups, self.dilation)
        spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        borders = [(span - p, span - p + e) for span, p, e in zip(spans, padding, extra, strict=True)]
        return self._run_codes(x, (1,) * len(spans), borders, self.stride)

    def _extra(self, x: Tensor, padding: Sequence[int], output_size: Sequence[int] | None) -> tuple[int, ...]:
        """How much longer the output is than the shortest possible, along each dimension."""
        if output_size is None:
            return self.output_padding
        spatial = len(self.kernel_size)
        wanted = [int(n) for n in output_size][-spatial:]
        least = [
            (n - 1) * s - 2 * p + d * (k - 1) + 1
            for n, s, p, d, k in zip(x.shape[2:], self.stride, padding, self.dilation, self.kernel_size, strict=True)
        ]
        most = [n + s - 1 for n, s in zip(least, self.stride, strict=True)]
        if len(output_size) not in (spatial, spatial + 2) or not all(map(_between, least, wanted, most)):
            raise OctavoError(f"output_size is from {least} to {most} for {list(x.shape)}, not {list(output_size)}")
        return tuple(n - low for n, low in zip(wanted, least, strict=True))

    def _in_shape(self, matrix: Tensor) -> Tensor:
        kernels = self._kernels(matrix)
        return _exchange(kernels.flip(list(range(2, kernels.ndim))), self.groups).contiguous()


def _each(value: Any, spatial: int) -> tuple[int, ...]:
    """One number for all dimensions, or one for each."""
    numbers = (int(value),) if isinstance(value, int) else tuple(int(n) for n in value)
    return numbers * spatial if len(numbers) == 1 else numbers


def _between(low: int, n: int, high: int) -> bool:
    return low <= n <= high


def _exchange(kernels: Tensor, groups: int) -> Tensor:
    """Kernels [in, out / groups, …] as [out, in / groups, …], and the reverse."""
    parts: Tensor = kernels.unflatten(0, (groups, -1))
    return parts.transpose(1, 2).flatten(0, 1)


def _largest(how: Cast) -> int:
    """The largest magnitude of ``codes − zero_point``."""
    assert isinstance(how.format, IntegerFormat)
    low, high = how.format.low, how.format.high
    return high - low if how.affine else max(-low, high)


def _memory_format(x: Tensor) -> torch.memory_format:
    """The layout of the output: the input's."""
    for ndim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.ndim == ndim and x.is_contiguous(memory_format=layout) and not x.is_contiguous():
            return layout
    return torch.contiguous_format


def _spread(x: Tensor, zero: Tensor | int, borders: Sequence[tuple[int, int]], apart: Sequence[int]) -> Tensor:
    """``x`` [N, C, …] as [N, …, C], its numbers ``apart``; between and around them ``zero``, a number or one a sample.

    A negative border cuts off.
    """
    room, inside, kept = [], [], []
    for n, step, (low, high) in zip(x.shape[2:], apart, borders, strict=True):
        start, length = max(low, 0), max((n - 1) * step + 1, 0)
        room.append(start + length + max(high, 0))
        inside.append(slice(start, start + length, step))
        kept.append(slice(max(-low, 0), room[-1] - max(-high, 0)))
    y = x.new_empty(x.shape[0], *room, x.shape[1])
    y.copy_(zero.view(-1, *(1,) * (y.ndim - 1))) if isinstance(zero, Tensor) else y.fill_(zero)
    y[(slice(None), *inside)] = x.movedim(1, -1)
    return y[(slice(None), *kept)]


def _windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """``x`` [N, …, C] as what the kernel sees at every place, [N, …places, …kernel, C]: a view."""
    spatial = len(kernel)
    for dim, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), 1):
        if x.shape[dim] <= d * (k - 1):
            size = list(x.shape[1 : 1 + spatial])
            raise OctavoError(f"the kernel {list(kernel)} (dilation {list(dilation)}) is larger than the input {size}")
        x = x.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
    return x.movedim(1 + spatial, -1)


def _pieces(windows: Tensor) -> Iterator[tuple[slice, slice]]:
    """Samples and lines whose patches are gathered together; all of them in a graph, which may serve any batch."""
    if torch.compiler.is_compiling():
        yield slice(None), slice(None)
        return
    samples, lines = windows.shape[:2]
    a_line = windows[:1, :1].numel()
    per_piece = max(1, PIECE // max(1, a_line * lines))
    rows = max(1, min(lines, PIECE // max(1, a_line)))
    for first in range(0, samples, per_piece):
        for line in range(0, lines, rows):
            yield slice(first, first + per_piece), slice(line, line + rows)


def _rows(q: QTensor, codes: Tensor, samples: slice) -> QTensor:
    """Codes of patches [M, K] of some samples, with the scales of those; ``q`` has a row a sample, or one scale."""

    def spread(values: Tensor) -> Tensor:
        if values.shape[0] == 1:
            return values
        own = values[samples]
        return own.repeat_interleave(codes.shape[0] // own.shape[0], 0)

    zeros = None if q.zero_point is None else spread(q.zero_point)
    scale = spread(q.scale)
    return QTensor(
        codes, scale, zeros, q.format, (1 if scale.shape[0] > 1 else codes.shape[0], codes.shape[1]), q.dtype
    )


def _split_rows(q: QTensor, parts: int) -> list[QTensor]:
    """A matrix cut into equal stretches of rows."""
    if parts == 1:
        return [q]

    def cut(values: Tensor) -> Sequence[Tensor]:
        wide = expand_blocks(values, (q.shape[0], values.shape[1]), (q.block[0], 1))
        return wide.tensor_split(parts) if wide.shape[0] > 1 else [wide] * parts

    zeros = [None] * parts if q.zero_point is None else cut(q.zero_point)
    block = (1 if q.scale.shape[0] > 1 else q.shape[0] // parts, q.block[1])
    return [
        QTensor(codes, scale, zero, q.format, block, q.dtype)
        for codes, scale, zero in zip(q.codes.tensor_split(parts), cut(q.scale), zeros, strict=True)
    ]
