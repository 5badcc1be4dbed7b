"""SmoothQuant: large channels of a layer's input are divided before, and its weights are multiplied after.

One large channel makes the scale of a token coarse for all others. ``s_j = max|X_j|**α / max|W_j|**(1 − α)``, at least
1e-5, moves what is large from the input to the weight, which has room (Xiao et al., 2211.10438): the norm before the
layer takes ``weight / s`` and ``bias / s``, every linear layer that reads it ``W × s``. α says how much is moved. The
same goes for linear layers in place of the norm, such as the ``up_proj`` before ``down_proj``: ``ptq.pairs`` finds
both.

In real numbers the function stays the same. New weights are computed in float32 and rounded to their dtype. Of 16-bit
models that would show, so there each s is the nearest power of two: nothing is rounded then, and as much is won.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from octavo.calibration.batches import Call, Track, several
from octavo.calibration.minmax import MinMax
from octavo.calibration.observer import Observer
from octavo.calibration.run import Calibration
from octavo.calibration.sample import Sample
from octavo.core import schemes
from octavo.core.cast import quantize_unchecked
from octavo.core.granularity import PerChannel
from octavo.core.schemes import Scheme
from octavo.errors import OctavoError
from octavo.nn import swap
from octavo.nn.linear import QuantizedLinear
from octavo.nn.swap import Layer
from octavo.ptq.pairs import Pair, find
from octavo.ptq.rules import Rule, Rules, deciding
from octavo.ptq.trial import Move, power_of_two, unfit

Alpha = float | Literal["search"]
LEAST = 1e-5
GRID = tuple(step / 20 for step in range(4, 20))  # what a search tries, beside leaving the pair alone


@dataclass(frozen=True)
class SmoothedPair:
    """One pair by its modules' names, the α used, and the readers' largest input before and after.

    ``alpha`` is None where a search found the pair best as it was.
    """

    source: str
    readers: tuple[str, ...]
    alpha: float | None
    before: float
    after: float

    def __str__(self) -> str:
        how = "left as it is" if self.alpha is None else f"α {self.alpha:g}"
        return f"{self.source} → {', '.join(self.readers)}: {how}, largest input {self.before:.4g} → {self.after:.4g}"


@dataclass(frozen=True)
class Smoothing:
    """What ``smooth_`` did: every pair, and by name why other layers could not be smoothed."""

    pairs: list[SmoothedPair]
    left: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``."""
        return asdict(self)

    def notes(self) -> list[str]:
        """The same in two lines."""
        several = len(self.pairs) > 1
        pairs = f"{len(self.pairs)} pairs are" if several else "1 pair is"
        done = [f"{pairs} smoothed ({self.pairs[0]}{', …' if several else ''})"]
        if not self.left:
            return done
        name, why = next(iter(self.left.items()))
        return [
            *done,
            f"{len(self.left)} layers could not be smoothed ({name}: {why}{', …' if len(self.left) > 1 else ''})",
        ]

    def __str__(self) -> str:
        return "\n".join([*map(str, self.pairs), *(f"{name} stays: {why}" for name, why in self.left.items())])


def smooth_(
    model: nn.Module,
    data: Iterable[Any],
    alpha: Alpha | None = 0.5,
    *,
    rules: Rules = "int8-dynamic",
    call: Call | None = None,
    track: Track | None = None,
) -> Smoothing:
    """Move the outliers of layers' inputs into weights, in place; the model computes the same function.

    ``data``: batches as for calibration, passed once. ``rules``, which the model will be quantized by, say which layers
    count; ``alpha``, from 0 to 1, is for those whose rule has no ``smooth`` of its own (None: only those that have).
    "search" takes for each pair the α with the smallest squared error of the layers' results under their schemes, on
    up to 256 tokens. A channel that was always 0 keeps its scale.

    Raises ``OctavoError``, before anything is changed, if there is nothing to smooth, no data, NaN, or if layers that
    read one result are to have different α. Ctrl-C leaves the model as it was, or with all pairs smoothed.
    """
    work, left = _plan(model, requested(model, rules, alpha), data, rules, call, track)
    _wholly(_apply(work))
    return Smoothing([one.record for one in work], left)


@contextmanager
def smoothed(
    model: nn.Module,
    rules: Rules,
    data: Iterable[Any],
    track: Track | None = None,
    *,
    restorable: bool = False,
) -> Iterator[Smoothing | None]:
    """The model smoothed as its rules say, or None if they do not say so; ``data`` as for ``smooth_``.

    If what is done meanwhile fails, a ``restorable`` model gets its old weights back, which are kept for so long.
    """
    wanted = requested(model, rules)
    if not wanted:
        yield None
        return
    work, left = _plan(model, wanted, data, rules, None, track)
    changed = [parameter for one in work for parameter in one.parameters()] if restorable else []
    before = [(parameter, parameter.detach().clone()) for parameter in dict.fromkeys(changed)]
    try:
        _wholly(_apply(work))
        yield Smoothing([one.record for one in work], left)
    except BaseException:
        _wholly(lambda: _restore(before))
        raise


def _wholly(step: Callable[[], None]) -> None:
    """Call it until it has come to its end, and only then hear Ctrl-C: half a pair is another function.

    Called again it does what is left to do.
    """
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            step()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _apply(work: Iterable["_Work"]) -> Callable[[], None]:
    """A step that changes the weights of all pairs, in their order: the readers of one may be the source of another."""
    made: dict[_Work, list[tuple[Tensor, Tensor]]] = {}

    @torch.no_grad()
    def step() -> None:
        for one in work:
            if one not in made:
                made[one] = [(parameter, change(parameter)) for _, parameter, change in one.changes()]
            for parameter, values in made[one]:
                parameter.copy_(values)
            made[one] = []

    return step


@torch.no_grad()
def _restore(before: Iterable[tuple[Tensor, Tensor]]) -> None:
    for parameter, values in before:
        parameter.copy_(values)


def _plan(
    model: nn.Module,
    wanted: Mapping[str, tuple[Alpha, Scheme]],
    data: Iterable[Any],
    rules: Rules,
    call: Call | None,
    track: Track | None,
) -> "tuple[list[_Work], dict[str, str]]":
    """What there is to do, with all scales chosen and tried, and why other layers stay."""
    batches = iter(several(data))
    try:
        example = next(batches)
    except StopIteration:
        raise OctavoError("the calibration data held no batch; a generator can be read only once") from None
    found, left = find(model, example, call)
    layers = {x.name: x for x in swap.layers(model)}
    chosen = _choose(found, wanted, deciding(model, list(layers.values()), rules))
    taken = {name for pair, _ in chosen for name in pair.readers}
    left = {
        name: left.get(name, "it is no linear layer, and only those are smoothed") for name in wanted.keys() - taken
    }
    work: list[_Work] = []
    if chosen:
        seen = _watch(model, chosen, chain([example], batches), call, track)
        work = [_Work(model, pair, how, wanted, layers, seen) for pair, how in chosen]
        for one in track(work, "smoothing") if track else work:
            one.choose_scale()
        work = _fit(model, work, example, call, left)
    if not work:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:3])
        raise OctavoError(f"nothing to smooth: {reasons or 'no layer becomes 8-bit'}")
    return work, {name: left[name] for name in wanted if name in left}


@dataclass(frozen=True)
class Foreseen:
    """What smoothing would do: the pairs, why other linear layers are in none, and the scales.

    ``scales``: for each α and each layer by name, what the channels of its input are divided by.
    """

    pairs: tuple[Pair, ...]
    left: dict[str, str]
    scales: dict[float, dict[str, Tensor]]


def foresee(model: nn.Module, data: Iterable[Any], alphas: Iterable[float], call: Call | None = None) -> Foreseen:
    """What ``smooth_`` would do with each α if all linear layers became 8-bit, from one look at model and data.

    Raises ``OctavoError`` for no data, and for NaN in a layer's input.
    """
    batches = list(several(data))
    if not batches:
        raise OctavoError("the calibration data held no batch; a generator can be read only once")
    found, left = find(model, batches[0], call)
    layers = {x.name: x for x in swap.layers(model)}
    every = dict.fromkeys((name for pair in found for name in pair.readers), (0.5, schemes.INT8_DYNAMIC))
    seen = _watch(model, [(pair, 0.5) for pair in found], batches, call, None) if found else Calibration({})
    scales: dict[float, dict[str, Tensor]] = {}
    for alpha in dict.fromkeys(alphas):
        work = [_Work(model, pair, alpha, every, layers, seen) for pair in found]
        for one in work:
            one.choose_scale()
        if not scales:  # what can be done with one scale can be with another
            work = _fit(model, work, batches[0], call, left)
            found = [one.pair for one in work]
        scales[alpha] = {name: one.scale for one in work for name in one.pair.readers}
    return Foreseen(tuple(found), left, scales)


def requested(model: nn.Module, rules: Rules, alpha: Alpha | None = None) -> dict[str, tuple[Alpha, Scheme]]:
    """By name the layers that the rules, or ``alpha`` for those whose rule says nothing, want smoothed."""
    Rule("int8-dynamic", smooth=alpha)  # raises if it is none
    wanted: dict[str, tuple[Alpha, Scheme]] = {}
    for layer, rule in deciding(model, swap.layers(model), rules).items():
        how = alpha if rule.smooth is None else rule.smooth
        if how is not None:
            assert isinstance(rule.scheme, Scheme)
            wanted[layer.name] = (how, rule.scheme)
    return wanted


class _Work:
    """One pair on its way: the statistics of its input, the scale, and the change itself."""

    def __init__(
        self,
        model: nn.Module,
        pair: Pair,
        alpha: Alpha,
        wanted: Mapping[str, tuple[Alpha, Scheme]],
        layers: Mapping[str, Layer],
        seen: Calibration,
    ) -> None:
        self.pair, self.alpha = pair, alpha
        self.source = model.get_submodule(pair.source)
        self.readers = [layers[name] for name in pair.readers]
        self.schemes = [wanted[name][1] if name in wanted else None for name in pair.readers]
        self.watched = [seen.observers[name] for name in pair.readers]
        edges = [torch.maximum(-x._low, x._high) for x in self.watched if isinstance(x, MinMax) and x.count]
        self.largest = torch.stack([edge.cpu() for edge in edges]).amax(0)
        quantized = [x for x, scheme in zip(self.readers, self.schemes, strict=True) if scheme is not None]
        self.columns = torch.stack([_largest(x.matrix, 0) for x in quantized]).amax(0)
        self.scale = torch.ones_like(self.largest)
        self.found: float | None = None

    def choose_scale(self) -> None:
        """The scale for the α that is given, or for the best."""
        if self.alpha != "search":
            self.found, self.scale = self.alpha, self._scale(self.alpha)
            return
        best = self._error(self.scale)
        for alpha in GRID:
            scale = self._scale(alpha)
            if (error := self._error(scale)) < best:
                best, self.found, self.scale = error, alpha, scale

    def _scale(self, alpha: float) -> Tensor:
        found = scales(self.largest, self.columns, alpha)
        return power_of_two(found) if self.source.get_parameter("weight").element_size() < 4 else found

    @torch.no_grad()
    def _error(self, scale: Tensor) -> float:
        """What 8 bits change about the readers' results on the sample, squared."""
        total = 0.0
        for layer, scheme, seen in zip(self.readers, self.schemes, self.watched, strict=True):
            if scheme is None or not seen.count:
                continue
            assert isinstance(seen, Sample)
            matrix = layer.matrix.detach().float()
            x, factor = seen.kept.T.to(matrix.device), scale.to(matrix.device)
            weight = quantize_unchecked(matrix * factor, scheme.weight, torch.float32)
            fixed: dict[str, Any] = {}
            if scheme.static and scheme.input is not None:
                ends = MinMax()
                ends.update(torch.stack((seen._low / scale, seen._high / scale)))
                fixed["input_scale"], fixed["input_zero_point"] = ends.scale(scheme.input)
            error = QuantizedLinear(weight, None, scheme, **fixed)(x / factor) - x @ matrix.T
            total += float(error.double().square().sum())
        return total

    @torch.no_grad()
    def obstacle(self) -> str | None:
        """Why the scale cannot be applied, or None; each parameter is written to as it is."""
        if not bool(self.scale.isfinite().all()):
            return f"{self.pair.source}: the weights that read it hold NaN or Inf"
        for name, parameter, change in self.changes():
            if not bool(change(parameter).isfinite().all()):
                return f"{name} would not hold finite numbers of {str(parameter.dtype).removeprefix('torch.')}"
            try:
                parameter.copy_(parameter.clone())
            except RuntimeError as error:  # made in inference mode, say, or one number expanded
                return f"{name} cannot be written to: {str(error).partition('.')[0]}"
        return None

    def parameters(self) -> list[Tensor]:
        """All that ``changes`` speaks of."""
        own = [self.source._parameters.get(name) for name in ("weight", "bias")]
        return [x for x in (*own, *(layer.weight for layer in self.readers)) if x is not None]

    def changes(self) -> Iterator[tuple[str, Tensor, Callable[[Tensor], Tensor]]]:
        """Everything that the scale changes: its name, the parameter or a view of it, and what it becomes."""

        def times(factor: Tensor, plus: float = 0.0) -> Callable[[Tensor], Tensor]:
            def change(x: Tensor) -> Tensor:
                wide = torch.promote_types(x.dtype, torch.float32)
                return ((x.detach().to(wide) + plus) * factor.to(x.device, wide) - plus).to(x.dtype)

            return change

        inverse = 1 / self.scale.double()
        own = self.source._parameters
        if self.pair.kind == "norm":
            assert own["weight"] is not None
            yield f"{self.pair.source}.weight", own["weight"], times(inverse, self.pair.plus)
        else:
            yield f"{self.pair.source}.weight", QuantizedLinear.matrix(self.source), times(inverse[:, None])
        if (bias := own.get("bias")) is not None:
            yield f"{self.pair.source}.bias", bias, times(inverse)
        for layer in self.readers:
            yield f"{layer.name}.weight", layer.matrix, times(self.scale)

    @property
    def record(self) -> SmoothedPair:
        """What was done."""
        after = float((self.largest / self.scale).amax())
        return SmoothedPair(self.pair.source, self.pair.readers, self.found, float(self.largest.amax()), after)


def scales(largest: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's factor for every channel, float32: ``largest`` of the inputs, ``columns`` of the weights [in].

    1 for a channel that is always 0 on one side: nothing is known of it.
    """
    x, w = largest.double().clamp_min(LEAST), columns.double().clamp_min(LEAST)
    found = (x**alpha / w ** (1 - alpha)).clamp_min(LEAST)
    return found.where((largest != 0) & (columns != 0), 1.0).float()


def _largest(matrix: Tensor, dim: int) -> Tensor:
    low, high = matrix.detach().aminmax(dim=dim)
    return torch.maximum(-low, high).float().cpu()


def _choose(
    found: Iterable[Pair], wanted: Mapping[str, tuple[Alpha, Scheme]], decided: Iterable[Layer]
) -> list[tuple[Pair, Alpha]]:
    """The pairs with a reader that is to be smoothed, and their α; readers that stay in float follow the others."""
    eight_bit = {layer.name for layer in decided}
    chosen = []
    for pair in found:
        asked = {name: wanted[name][0] if name in wanted else None for name in pair.readers if name in eight_bit}
        kinds = dict.fromkeys(asked.values())
        if len(kinds) > 1:
            told = ", ".join(f"{name}: {'none' if how is None else how}" for name, how in asked.items())
            raise OctavoError(
                f"all that reads the result of {pair.source} is smoothed together, but the rules say {told}; give "
                "these layers the same smooth"
            )
        if asked and (how := next(iter(kinds))) is not None:
            chosen.append((pair, how))
    return chosen


def _watch(
    model: nn.Module,
    chosen: Iterable[tuple[Pair, Alpha]],
    batches: Iterable[Any],
    call: Call | None,
    track: Track | None,
) -> Calibration:
    """What every reader's input channels hold."""
    channels = PerChannel(-1)
    observers: dict[str, Observer] = {}
    for pair, how in chosen:
        for name in pair.readers:
            observers[name] = Sample(granularity=channels) if how == "search" else MinMax(granularity=channels)
    return Calibration(observers).run(model, batches, call=call, track=track)


def _fit(model: nn.Module, work: Iterable[_Work], example: Any, call: Call | None, left: dict[str, str]) -> list[_Work]:
    """The pairs whose scale can be applied, and really reaches all readers and nothing else; why not goes to left."""
    obstacles = {one: one.obstacle() for one in work}
    moves = {
        one: Move(one.source, {layer.name: layer.module for layer in one.readers}, one.scale)
        for one, why in obstacles.items()
        if why is None
    }
    wrong = unfit(model, moves.values(), example, call)
    for one, why in obstacles.items():
        if one in moves and moves[one] in wrong:
            why = f"scaling the result of {one.pair.source} does more than scale its input"
        if why is not None:
            obstacles[one] = why
            left.update(
                dict.fromkeys((x.name for x, scheme in zip(one.readers, one.schemes, strict=True) if scheme), why)
            )
    return [one for one, why in obstacles.items() if why is None]
