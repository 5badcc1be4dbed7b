"""Operations that only move or copy codes: every number keeps its meaning."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from octavo.errors import OctavoError
from octavo.nn.integer.encoding import Encoding
from octavo.nn.integer.op import KeepingOp, pad


class Pad(KeepingOp):
    """More numbers around the last dimensions, all of one ``code``; ``sides``: (before, after) of each."""

    settings = ("sides", "code")

    def __init__(
        self, inputs: Sequence[Encoding], output: Encoding, sides: Sequence[tuple[int, int]], code: int
    ) -> None:
        super().__init__(inputs, output)
        self.sides, self.code = tuple(sides), code
        if not output.low <= code <= output.high:
            raise OctavoError(f"{code} is no code between {output.low} and {output.high}")

    def forward(self, codes: Tensor) -> Tensor:
        """Codes to codes."""
        return pad(codes, self.sides, self.code)

    def real(self, *values: Tensor) -> Tensor:
        """The value of that code around the values."""
        return pad(values[0], self.sides, self.output.scale * (self.code - self.output.zero_point))


class Reshape(KeepingOp):
    """The same numbers in the same order under another shape.

    ``shape``: its sizes, at most one of them −1; ``kept``: pairs (place in it, dimension of the input with that size).
    """

    settings = ("shape", "kept")

    def __init__(
        self,
        inputs: Sequence[Encoding],
        output: Encoding,
        shape: Sequence[int],
        kept: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__(inputs, output)
        self.shape, self.kept = tuple(shape), tuple(kept)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes to codes."""
        shape = [*self.shape]
        for place, dim in self.kept:
            shape[place] = codes.shape[dim]
        return codes.reshape(shape)

    def real(self, *values: Tensor) -> Tensor:
        """The same on values."""
        return self.forward(values[0])


#: The operators of torch that only move numbers to other places, or copy them: ``Move`` may run these and no others.
MOVES = (
    *("permute", "transpose", "t", "movedim", "swapaxes", "squeeze", "unsqueeze", "slice", "select", "narrow"),
    *("flip", "roll", "rot90", "repeat", "expand", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "pad"),
    *("native_channel_shuffle", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
)


class Move(KeepingOp):
    """One of torch's operators that move or copy numbers, on codes. ``arguments``: what follows the tensor."""

    settings = ("operator", "arguments")

    def __init__(
        self, inputs: Sequence[Encoding], output: Encoding, operator: str, arguments: Sequence[Any] = ()
    ) -> None:
        super().__init__(inputs, output)
        name, _, overload = operator.partition(".")
        if name not in MOVES:
            raise OctavoError(f"{name!r} does not only move numbers; these do: {', '.join(MOVES)}")
        packet = getattr(torch.ops.aten, name)
        if overload not in packet.overloads():
            raise OctavoError(f"torch {torch.__version__} has no operator aten.{operator}")
        self.operator, self.arguments = operator, tuple(arguments)
        self.call = getattr(packet, overload)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes to codes, as bytes: torch has kernels of all of these for uint8."""
        moved: Tensor = self.call(codes.view(torch.uint8), *self.arguments)
        return moved.view(codes.dtype)

    def real(self, *values: Tensor) -> Tensor:
        """The same on values."""
        moved: Tensor = self.call(values[0], *self.arguments)
        return moved
