"""What an observer is: it watches a stream of tensors and says which range of numbers an 8-bit format should span.

``update`` takes one tensor after another and keeps little: a minimum, an average, a histogram. ``merge`` joins what
two observers have seen, as if one of them had seen both streams. ``range`` then gives the two ends for a ``Cast``, and
``settle`` the Cast itself, for the observers that choose a format too. How many ranges there are is the matter of a
granularity: it cuts every tensor into blocks, and each block is a *row* of its own.

An observer's settings are its dataclass fields, and ``settings`` and ``from_settings`` are their way to JSON and back;
``state_dict`` and ``load_state_dict`` hold what it has seen, as plain tensors.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.core import records
from octavo.core.cast import Cast
from octavo.core.granularity import Granularity, PerTensor, reduce_blocks, scale_shape
from octavo.core.scaling import Constant, scale_of_range
from octavo.errors import OctavoError

Own = TypeVar("Own", bound="Observer")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MOST_RANGES = 1 << 40  # in a file that claims more, something is wrong


@dataclass(eq=False)
class Observer(ABC):
    """Watches a stream of tensors.

    ``granularity`` says how many ranges there are. The tensors of a stream may differ in all that does not change
    their number: with ``PerTensor`` in everything, with ``PerChannel`` in all but the channels. At ragged edges a block
    has fewer numbers and is a range like the others. ``count``: numbers seen so far.
    """

    granularity: Granularity = field(default=PerTensor(), kw_only=True)
    count: int = field(default=0, init=False, repr=False)
    _shape: tuple[int, ...] = field(default=(), init=False, repr=False)

    #: The parts of ``state_dict`` that this kind of observer needs.
    parts: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        if not isinstance(self.granularity, Granularity):
            raise OctavoError(f"a granularity is ov.PerTensor(), ov.PerChannel(0), …, not {self.granularity!r}")

    def update(self, x: Tensor) -> None:
        """Take in a tensor of any float dtype; an empty one is nothing.

        Raises ``OctavoError`` for NaN, for infinities and what float32 cannot hold, and for a tensor with another
        number of ranges than those before.
        """
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            what = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise OctavoError(f"an observer takes float32, float64, bfloat16 or float16 tensors, not {what}")
        if x.is_meta:
            raise OctavoError("the tensor is on the meta device and holds no numbers; load the weights first")
        if x.numel() == 0:
            return
        x = x.detach()
        block = self.granularity.block(tuple(x.shape))
        shape = self._common_shape(scale_shape(tuple(x.shape), block))
        # a copy: where a block is one number, its minimum is the tensor itself
        low, high = (edge.flatten().to(torch.float32, copy=True) for edge in reduce_blocks(x, block))
        if not bool((low.isfinite() & high.isfinite()).all()):
            bad = int((~x.float().isfinite()).sum())
            raise OctavoError(
                f"{bad} of {x.numel()} numbers of a tensor {list(x.shape)} are NaN, infinite, or beyond float32; find "
                "where they come from first"
            )
        self._see(low, high, lambda: rows(x, block))
        self._shape = shape
        self.count += x.numel()

    def merge(self, later: "Observer") -> None:
        """Become as if this observer had seen ``later``'s stream after its own; ``later`` stays as it is.

        Raises ``OctavoError`` where the two differ in class, settings or number of ranges.
        """
        if type(later) is not type(self) or later.settings() != self.settings():
            raise OctavoError(f"{self} and {later} cannot merge: only observers with the same settings can")
        if later.count == 0:
            return
        shape = self._common_shape(later._shape)
        if self.count == 0:
            self._restore(later._state(), math.prod(shape))
        else:
            self._join(later)
        self._shape = shape
        self.count += later.count

    def adopt(self: Own, other: "Observer") -> Own:
        """Take over what another kind of observer has seen, in place of what this one has; returns itself.

        One pass over the data so serves several rules: all that work on a histogram can adopt from one another, and
        ``MinMax`` can from each of them. Raises ``OctavoError`` if ``other`` has not kept what this one needs.
        """
        if other.granularity != self.granularity:
            raise OctavoError(f"{self} cannot adopt the ranges of {other}: their granularities differ")
        state = other.state_dict()
        if other.count and not set(self.parts) <= set(state):
            raise OctavoError(f"{self} cannot adopt what {other} has seen: it kept only {', '.join(other.parts)}")
        self.load_state_dict(state)
        return self

    def fresh(self: Own, granularity: Granularity | None = None) -> Own:
        """An observer with the same settings, except for ``granularity`` if given, that has seen nothing."""
        return replace(self, granularity=self.granularity if granularity is None else granularity)

    def range(self, how: Cast) -> tuple[Tensor, Tensor]:
        """The ends, low ≤ high, between which ``how`` should work: float32 of the scale's shape.

        Of PerTensor and PerChannel ranges the shape has as many dimensions as the tensor seen that had most.
        For a symmetric Cast only the larger magnitude matters. Raises ``OctavoError`` if nothing was seen.
        """
        self._check_seen(how)
        low, high = self._range(how)
        return low.float().reshape(self._shape), high.float().reshape(self._shape)

    def check(self, how: Cast) -> None:  # noqa: B027 - most suit any Cast
        """Raise ``OctavoError``, before anything is seen, if there is nothing here for ``how`` to settle for."""

    def settle(self, how: Cast) -> Cast:
        """The Cast to use: ``how``, or one of another format if this observer looks for the best."""
        return how

    def scale(self, how: Cast, storage: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
        """The scale and zero point of ``range(how)``, rounded to ``storage``; see ``core.scaling.scale_of_range``."""
        low, high = self.range(how)
        if isinstance(how.scale, Constant):
            scale = torch.full_like(low, how.scale.value)
            return scale, torch.zeros_like(scale, dtype=torch.int32) if how.affine else None
        return scale_of_range(low, high, how.format, how.affine, how.scale.power_of_two, storage)

    def settings(self) -> dict[str, Any]:
        """The class and its settings as what ``json.dumps`` takes."""
        content = {f.name: records.to_json(getattr(self, f.name)) for f in fields(self) if f.init}
        return {"type": type(self).__name__, **content}

    def state_dict(self) -> dict[str, Tensor]:
        """All that was seen, as plain tensors."""
        if self.count == 0:
            return {"count": torch.tensor(0)}
        return {
            "count": torch.tensor(self.count),
            "shape": torch.tensor(self._shape, dtype=torch.int64),
            **self._state(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Have seen what ``state_dict`` was made of, and nothing else. Raises ``OctavoError`` if it does not fit."""
        count = int(part(state, "count", torch.int64))
        if count == 0:
            fresh = self.fresh()
            for f in fields(self):
                setattr(self, f.name, getattr(fresh, f.name))
            return
        shape = tuple(part(state, "shape", torch.int64, None).tolist())
        if count < 0 or min(shape, default=1) < 1 or math.prod(shape) > min(count, MOST_RANGES):
            raise OctavoError(f"the state of {self} cannot be: {count} numbers in ranges {list(shape)}")
        self._restore(state, math.prod(shape))
        self.count, self._shape = count, shape

    def _check_seen(self, how: Cast) -> None:
        """Raise ``OctavoError`` unless there are ranges for ``how``."""
        if self.count == 0:
            raise OctavoError(f"{self} has seen no numbers, so it knows no range; update it with data first")
        if how.granularity != self.granularity:
            raise OctavoError(f"{self} has no ranges for {how.granularity}; observe with .fresh({how.granularity})")

    def _common_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the ranges, whether or not dimensions of size 1 come and go between tensors."""
        if self.count == 0 or shape == self._shape:
            return shape
        if [n for n in shape if n > 1] != [n for n in self._shape if n > 1]:
            raise OctavoError(
                f"{self} has ranges {list(self._shape)}, but this tensor {list(shape)}: {self.granularity} makes as "
                "many as the tensor's shape says, so it must stay; for data that varies take PerTensor()"
            )
        return max(shape, self._shape, key=lambda s: (len(s), s))

    @abstractmethod
    def _see(self, low: Tensor, high: Tensor, numbers: Callable[[], Tensor]) -> None:
        """Take in a tensor: each row's ends, float32 [rows], and on demand the numbers; see ``rows``."""

    @abstractmethod
    def _join(self, later: "Observer") -> None:
        """Merge an observer of the same class that has seen something too, without changing it."""

    @abstractmethod
    def _range(self, how: Cast) -> tuple[Tensor, Tensor]:
        """Both ends of every row, [rows]."""

    @abstractmethod
    def _state(self) -> dict[str, Tensor]:
        """The ``parts`` by name. Tensors in there are never written to again."""

    @abstractmethod
    def _restore(self, state: Mapping[str, Tensor], count: int) -> None:
        """Take over the ``parts`` of a state with ``count`` rows, or raise ``OctavoError`` and change nothing."""


def from_settings(data: Any) -> Observer:
    """The observer, fresh, whose ``settings`` these are. Raises ``OctavoError`` for anything else."""
    if not isinstance(data, dict):
        raise OctavoError(f"the settings of an observer are a JSON object, not {str(data)[:100]}")
    kinds = {kind.__name__: kind for kind in _kinds(Observer)}
    kind = kinds.get(str(data.get("type")))
    if kind is None:
        raise OctavoError(f"no observer is called {data.get('type')!r}; there are {', '.join(kinds)}")
    content = {str(name): records.from_json(value) for name, value in data.items() if name != "type"}
    try:
        observer: Observer = kind(**content)
        return observer
    except TypeError as error:
        raise OctavoError(f"{kind.__name__} cannot be made of {str(content)[:300]}: {error}") from error


def _kinds(kind: type[Any]) -> Iterator[type[Any]]:
    if not inspect.isabstract(kind):
        yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)


def rows(x: Tensor, block: tuple[int, ...]) -> Tensor:
    """The numbers of every block as a row, [blocks, numbers of a block], NaN where a ragged block has none."""
    counts = scale_shape(tuple(x.shape), block)
    if math.prod(counts) == 1:
        return x.reshape(1, -1)
    missing = [count * size - n for count, size, n in zip(counts, block, x.shape, strict=True)]
    if any(missing):
        x = F.pad(x, [end for n in reversed(missing) for end in (0, n)], value=math.nan)
    dims = range(0, 2 * len(block), 2)
    x = x.reshape([n for pair in zip(counts, block, strict=True) for n in pair])
    return x.permute(*dims, *(dim + 1 for dim in dims)).reshape(math.prod(counts), -1)


def part(state: Mapping[str, Tensor], name: str, dtype: torch.dtype, *shape: int | None) -> Tensor:
    """One tensor of a state. Raises ``OctavoError`` unless it has that dtype and shape (None: any) and is finite."""
    x = state.get(name)
    if x is None:
        raise OctavoError(f"the state has no {name!r}; it has {', '.join(state) or 'nothing'}")
    fits = len(x.shape) == len(shape) and all(want in (None, n) for n, want in zip(x.shape, shape, strict=True))
    if x.dtype != dtype or not fits or not bool(x.isfinite().all()):
        wanted = ["any" if n is None else n for n in shape]
        raise OctavoError(f"{name!r} in the state is not a finite {dtype} of shape {wanted}: {x.dtype} {list(x.shape)}")
    return x.detach()


def ends(state: Mapping[str, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The parts "low" and "high" of a state, float32 [count]."""
    low, high = part(state, "low", torch.float32, count), part(state, "high", torch.float32, count)
    if bool((low > high).any()):
        raise OctavoError("the state has a range whose lower end is above the upper")
    return low, high
