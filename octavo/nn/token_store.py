"""Codes and scales of tensors [batch, heads, tokens, dim] that arrive a few tokens at a time.

Tokens that are stored never change: so a scale may not span several tokens, unless it is known beforehand (static or
constant). What is read back equals ``quantize(x).dequantize()`` of everything that was appended.

Dynamic scales are kept in the tensor's own dtype, rounded to it before quantizing: in a bfloat16 model two bytes beside
the ``dim`` bytes of a token.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from octavo.core.cast import Cast, quantize_scaled, quantize_unchecked
from octavo.core.formats import FloatFormat, Format, IntegerFormat
from octavo.core.granularity import PerTensor, expand_blocks, scale_shape
from octavo.core.qtensor import QTensor
from octavo.core.scaling import Constant, Current, Static
from octavo.errors import OctavoError

STEP = (
    64  # tokens of room that are made at once when tokens come one by one: copying costs little, and so does the room
)


class Growing:
    """A tensor [batch, heads, tokens, n] that grows at its end and may lose tokens at both ends."""

    def __init__(self, like: Tensor) -> None:
        self.room = like.new_empty(*like.shape[:2], 0, like.shape[3])
        self.start = self.stop = 0

    @property
    def live(self) -> Tensor:
        """The tokens that are there: a view."""
        return self.room[:, :, self.start : self.stop]

    def append(self, x: Tensor) -> None:
        """Add tokens at the end; amortised, nothing that is there already is copied."""
        count = x.shape[2]
        if self.stop + count > self.room.shape[2]:
            live = self.live
            size = live.shape[2] + count + (STEP if count < STEP else 0)
            self.room = x.new_empty(*x.shape[:2], size, x.shape[3])
            self.start, self.stop = 0, live.shape[2]
            self.room[:, :, : self.stop] = live
        self.room[:, :, self.stop : self.stop + count] = x
        self.stop += count

    def drop_last(self, count: int) -> None:
        """Forget the newest tokens."""
        self.stop = max(self.start, self.stop - count)

    def keep_last(self, count: int) -> None:
        """Forget all but the newest tokens."""
        self.start = max(self.start, self.stop - count)
        if self.start > STEP + self.stop - self.start:  # more room for what is forgotten than for what is not
            self.room = self.live.clone()
            self.start, self.stop = 0, self.room.shape[2]

    def select(self, rows: Tensor) -> None:
        """Take these sequences of the batch, by index or by mask, as they are."""
        live = self.live
        self.room = live[rows.to(live.device)]
        self.start, self.stop = 0, live.shape[2]

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        self.room = self.room.to(device, non_blocking=True)


class TokenStore:
    """The tokens of one tensor as a Cast makes them, or as they are if it is ``None``.

    ``name`` is what errors call it. ``scale`` and ``zero_point`` belong to ``Static`` Casts: one for all tokens.
    """

    def __init__(
        self, name: str, how: Cast | None, scale: Tensor | None = None, zero_point: Tensor | None = None
    ) -> None:
        if how is not None:
            check(name, how)
            if isinstance(how.scale, Static) != (scale is not None):
                raise OctavoError(
                    f"{name}: {'a static Cast needs' if scale is None else 'only a static Cast has'} a scale"
                )
            if isinstance(how.scale, Constant):  # one number, however it is spread
                how = replace(how, granularity=PerTensor())
        self.name, self.how = name, how
        self.scale, self.zero_point = scale, zero_point
        self.clear()

    def clear(self) -> None:
        """Forget all tokens, and what their shape was."""
        self.parts: dict[str, Growing] = {}
        self.dtype: torch.dtype | None = None
        self.fast = False

    def __len__(self) -> int:
        return next((part.stop - part.start for part in self.parts.values()), 0)

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return next((part.room.shape[0] for part in self.parts.values()), 0)

    @property
    def nbytes(self) -> int:
        """Bytes held: codes and scales, with the room made for tokens to come."""
        own = [
            *(part.room for part in self.parts.values()),
            *(t for t in (self.scale, self.zero_point) if t is not None),
        ]
        return sum(t.nbytes for t in own)

    def append(self, x: Tensor) -> None:
        """Quantize new tokens [batch, heads, tokens, dim] and keep them.

        Raises ``OctavoError`` for another shape or dtype than before, and for NaN or Inf.
        """
        self._check_tokens(x)
        if x.shape[2] == 0:
            return
        parts = {"codes": x} if self.how is None else self._quantize(x, self.how)
        for part, tensor in parts.items():
            if part not in self.parts:
                self.parts[part] = Growing(tensor)
            self.parts[part].append(tensor)
        self.dtype = x.dtype

    def read(self, last: int | None = None) -> Tensor:
        """The tokens as numbers [batch, heads, tokens, dim] in the dtype they came in; only the ``last`` if given."""
        assert self.dtype is not None
        first = 0 if last is None else max(0, len(self) - last)
        parts = {name: part.live[:, :, first:] for name, part in self.parts.items()}
        codes = parts["codes"]
        if self.how is None:
            return codes
        block = self.how.granularity.block(tuple(codes.shape))
        scale = parts.get("scale", self.scale)
        assert scale is not None
        zero_point = parts["zero_point"].int() if "zero_point" in parts else self.zero_point
        q = QTensor(codes, scale.float(), zero_point, self.how.format, block, self.dtype)
        if not self.fast:
            return q.dequantize(self.dtype)
        return q.numbers(self.dtype).mul_(expand_blocks(scale.to(self.dtype), tuple(codes.shape), block))

    def drop_last(self, count: int) -> None:
        """Forget the newest tokens."""
        for part in self.parts.values():
            part.drop_last(count)

    def keep_last(self, count: int) -> None:
        """Forget all but the newest tokens."""
        for part in self.parts.values():
            part.keep_last(count)

    def select(self, rows: Tensor) -> None:
        """Take these sequences of the batch, by index or by mask: beam search, and batches that shrink."""
        for part in self.parts.values():
            part.select(rows)

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        for part in self.parts.values():
            part.to(device)

    def _quantize(self, x: Tensor, how: Cast) -> dict[str, Tensor]:
        if self.scale is None:
            q = quantize_unchecked(x, how, x.dtype)
        else:
            zero_point = None if self.zero_point is None else self.zero_point.to(x.device)
            try:
                q = quantize_scaled(x, how, self.scale.to(x.device), zero_point)
            except OctavoError as error:
                raise OctavoError(f"{self.name}: {error}") from error
        largest = float(q.scale.max()) if q.scale.numel() else 0.0  # NaN where x is not finite
        if not math.isfinite(largest):
            bad = int((~x.isfinite()).sum())
            raise OctavoError(
                f"{self.name}: {bad} of {x.numel()} new numbers are NaN or Inf; find where they come from"
            )
        if self.dtype is None:
            self.fast = _exact_in(how.format, x.dtype) and bool((q.scale.to(x.dtype).float() == q.scale).all())
        # a scale that was rounded up may carry the largest code past the dtype's end
        self.fast &= largest * (_span(how.format) if how.affine else how.format.max) <= torch.finfo(x.dtype).max
        if self.scale is not None or isinstance(how.scale, Constant):
            self.scale, self.zero_point = q.scale, q.zero_point
            return {"codes": q.codes}
        kept = {"codes": q.codes, "scale": q.scale.to(torch.float32 if x.dtype == torch.float64 else x.dtype)}
        if q.zero_point is not None:
            kept["zero_point"] = q.zero_point.to(how.format.code_dtype)
        return kept

    def _check_tokens(self, x: Tensor) -> None:
        if x.ndim != 4 or not x.is_floating_point():
            raise OctavoError(f"{self.name} are floats [batch, heads, tokens, dim], not {x.dtype} {list(x.shape)}")
        if not self.parts:
            return
        room = self.parts["codes"].room
        before, now = (*room.shape[:2], room.shape[3]), (*x.shape[:2], x.shape[3])
        if before != now or x.dtype != self.dtype:
            raise OctavoError(
                f"{self.name} were [batch, heads, dim] {list(before)} in {self.dtype} so far, and are {list(now)} in "
                f"{x.dtype} now; use one cache for one batch, or reset() it"
            )


def check(name: str, how: Cast) -> None:
    """Raise ``OctavoError`` for a Cast that cannot hold tokens as they come."""
    if how.format.bits > 8:
        raise OctavoError(f"{name}: a cache in 8 bits takes formats of at most 8 bits, not {how.format.name}")
    if not how.format.signed and not how.affine:
        raise OctavoError(f"{name}: {how.format.name} drops negative numbers; give its Cast affine=True, or use INT8")
    probe = (2, 3, 5, 7)  # batch, heads, tokens, dim
    try:
        block = how.granularity.block(probe)
    except OctavoError as error:
        raise OctavoError(f"{name} are tensors [batch, heads, tokens, dim]: {error}") from error
    if isinstance(how.scale, Current) and not (block[0] == 1 and block[2] == 1):
        raise OctavoError(
            f"{name}: {how.granularity} shares a scale between tokens, those to come among them; take PerToken() or "
            "PerGroup(size), or a static scale: scale=Static() and calibrate_kv_cache_"
        )
    counts = scale_shape(probe, block)
    if isinstance(how.scale, Static) and not (counts[0] == 1 and counts[2] == 1):
        raise OctavoError(
            f"{name}: a static scale serves all tokens: PerTensor(), PerChannel(1) for one a head, or PerChannel(3), "
            f"not {how.granularity}"
        )


def _span(fmt: Format) -> float:
    return fmt.max - fmt.min


def _exact_in(fmt: Format, dtype: torch.dtype) -> bool:
    """Whether ``dtype`` holds every number of the format, less any zero point."""
    if isinstance(fmt, FloatFormat):
        values: Any = fmt.values()
    else:
        assert isinstance(fmt, IntegerFormat)
        values = torch.arange(fmt.low - fmt.high, fmt.high - fmt.low + 1, dtype=torch.float64)
    return dtype != torch.float64 and bool((values.to(dtype).double() == values).all())
