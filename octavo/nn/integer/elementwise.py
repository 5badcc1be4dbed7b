"""Sums, products and functions of codes, number by number, and tensors put one after another."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from octavo.errors import OctavoError
from octavo.nn.integer.encoding import Encoding
from octavo.nn.integer.op import ExactOp, RescalingOp, centred, counted, rescale

SHIFTED = 1 << 20  # operands are shifted left by 20 bits before they are rescaled, so that this loses nothing


class _Elementwise(RescalingOp):
    """Integers from integers: the same steps serve codes and float64."""

    @abstractmethod
    def _combine(self, *numbers: Tensor) -> Tensor:
        """``code − zero_point`` of the inputs to that of the output, which need not fit its range."""

    def forward(self, *codes: Tensor) -> Tensor:
        """Codes to codes."""
        return self._codes(self._combine(*map(centred, codes, self.inputs)))

    def rounded(self, *values: Tensor) -> Tensor:
        """The same steps on whole numbers in float64."""
        numbers = (counted(x, encoding.scale) for x, encoding in zip(values, self.inputs, strict=True))
        return self.output.values(self._codes(self._combine(*numbers)))


class Add(_Elementwise):
    """``a + b`` or, with sign −1, ``a − b``, of any two encodings, broadcast as torch does.

    Both are brought to a common unit, 2**−20 of twice the larger scale, as by TensorFlow Lite's ADD.
    """

    arity = 2
    settings = ("sign",)

    def __init__(self, inputs: Sequence[Encoding], output: Encoding, sign: int = 1) -> None:
        super().__init__(inputs, output)
        self.sign = sign
        if sign not in (1, -1):
            raise OctavoError(f"a sum has the sign 1 or −1, not {sign}")
        common = 2 * max(encoding.scale for encoding in inputs)
        self._set_ratios([inputs[0].scale / common, inputs[1].scale / common, common / (output.scale * SHIFTED)])

    def _combine(self, *numbers: Tensor) -> Tensor:
        a, b = (rescale(x * SHIFTED, self.multiplier[i], self.shift[i]) for i, x in enumerate(numbers))
        return rescale(a + self.sign * b, self.multiplier[2], self.shift[2])

    def real(self, *values: Tensor) -> Tensor:
        """The sum."""
        return values[0] + self.sign * values[1]


class Multiply(_Elementwise):
    """``a · b`` of any two encodings, broadcast as torch does; TensorFlow Lite's MUL."""

    arity = 2

    def __init__(self, inputs: Sequence[Encoding], output: Encoding) -> None:
        super().__init__(inputs, output)
        self._set_ratios([inputs[0].scale * inputs[1].scale / output.scale])

    def _combine(self, *numbers: Tensor) -> Tensor:
        return rescale(numbers[0] * numbers[1], self.multiplier[0], self.shift[0])

    def real(self, *values: Tensor) -> Tensor:
        """The product."""
        return values[0] * values[1]


class Concatenate(_Elementwise):
    """Any number of tensors one after another along ``dim``, each brought to the output's encoding."""

    arity = -1
    settings = ("dim",)

    def __init__(self, inputs: Sequence[Encoding], output: Encoding, dim: int = 1) -> None:
        super().__init__(inputs, output)
        self.dim = dim
        self._set_ratios([encoding.scale / (output.scale * SHIFTED) for encoding in inputs])

    def _combine(self, *numbers: Tensor) -> Tensor:
        each = enumerate(numbers)
        return torch.cat([rescale(x * SHIFTED, self.multiplier[i], self.shift[i]) for i, x in each], self.dim)

    def real(self, *values: Tensor) -> Tensor:
        """The tensors, one after another."""
        return torch.cat(values, self.dim)


class Clamp(ExactOp):
    """ReLU, ReLU6 and the like where no sum stands before them: codes stay within the output's ``low`` and ``high``."""

    def forward(self, codes: Tensor) -> Tensor:
        """Codes to codes."""
        return self.output.clamp(codes)

    def real(self, *values: Tensor) -> Tensor:
        """The values clamped to those of the lowest and the highest code."""
        low, high = (self.output.scale * (end - self.output.zero_point) for end in (self.output.low, self.output.high))
        return values[0].clamp(low, high)


class Lookup(ExactOp):
    """Any function of one number, as a table: every input code has its output code, computed ahead in float64.

    ``table``: output codes [codes], or [channels, codes] for a function that differs along dimension ``dim``, which
    is counted from the last.
    """

    settings = ("dim",)
    tensors = ("table",)
    table: Tensor

    def __init__(self, inputs: Sequence[Encoding], output: Encoding, table: Tensor, dim: int | None = None) -> None:
        super().__init__(inputs, output)
        self.dim = dim
        many = self.inputs[0].high - self.inputs[0].low + 1
        if table.dtype != output.dtype or table.shape[-1:] != (many,) or table.dim() != (1 if dim is None else 2):
            raise OctavoError(f"a table has {many} codes of {output.dtype}, not {list(table.shape)} of {table.dtype}")
        if dim is not None and dim >= 0:
            raise OctavoError(f"a table's dimension is counted from the last, not {dim}")
        if table.numel() and not output.low <= int(table.min()) <= int(table.max()) <= output.high:
            raise OctavoError(f"a table holds codes between {output.low} and {output.high} only")
        self.register_buffer("table", table)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes to codes."""
        place = codes.int() - self.inputs[0].low
        if self.dim is not None:
            channels, many = self.table.shape
            if codes.shape[self.dim] != channels:
                raise OctavoError(f"it has {channels} channels, not {codes.shape[self.dim]}")
            first = torch.arange(0, channels * many, many, dtype=torch.int32, device=codes.device)
            place = place + first.reshape(-1, *(1,) * (-self.dim - 1))
        return self.table.reshape(-1)[place.reshape(-1)].reshape(codes.shape)

    def real(self, *values: Tensor) -> Tensor:
        """The table too: between codes there is nothing to look up."""
        codes = counted(values[0], self.inputs[0].scale) + self.inputs[0].zero_point
        return self.output.values(self(self.inputs[0].clamp(codes)))


class Constant(ExactOp):
    """A tensor that is always the same, in codes."""

    arity = 0
    tensors = ("codes",)
    codes: Tensor

    def __init__(self, inputs: Sequence[Encoding], output: Encoding, codes: Tensor) -> None:
        super().__init__(inputs, output)
        if codes.dtype != output.dtype:
            raise OctavoError(f"a constant in these codes is of {output.dtype}, not {codes.dtype}")
        if codes.numel() and not output.low <= int(codes.min()) <= int(codes.max()) <= output.high:
            raise OctavoError(f"a constant holds codes between {output.low} and {output.high} only")
        self.register_buffer("codes", codes)

    def forward(self) -> Tensor:
        """The codes."""
        return self.codes

    def real(self, *values: Tensor) -> Tensor:
        """Their values."""
        return self.output.values(self.codes)
