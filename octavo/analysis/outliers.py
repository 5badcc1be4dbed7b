"""Outliers: the few numbers among a layer's inputs that are much larger than the others, and so widen every scale.

Three kinds, found in one pass over example data:

- *Outlier dimensions* (LLM.int8(), 2208.07339): a dimension of the hidden state whose magnitude exceeds a threshold in
  at least a quarter of the layers and for at least 6 % of the tokens. The paper's threshold is 6.
- *Massive activations* (2402.17762): single numbers of a hidden state that are beyond 100 and a thousand times its
  median magnitude, always at the same few tokens and dimensions; they act as biases of the attention.
- *Heavy tails*: the kurtosis (3 for a Gaussian) and the crest factor, largest over root mean square, of a whole input
  and of its tokens. INT8 beats E4M3 as long as what shares a scale has a crest factor below about 12.

Looked at is what enters the layers that have an 8-bit form, and what enters norms, which is the residual stream. Layers
that read the very same tensor (q, k and v) are one ``Input``. Memory is bounded by inputs × dimensions.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from octavo.calibration.batches import Call, Track, eagerly, enter, evaluating, several
from octavo.errors import OctavoError
from octavo.nn import swap
from octavo.nn.conv import QuantizedConv
from octavo.nn.embedding import QuantizedTable
from octavo.nn.layer import QuantizedLayer

THRESHOLD, LAYER_SHARE, TOKEN_SHARE = 6.0, 0.25, 0.06
MASSIVE, RATIO = 100.0, 1000.0  # beyond both: this magnitude, and this many medians
KEPT = 32  # massive activations, and outlier dimensions, that are remembered of an input


@dataclass(frozen=True)
class Input:
    """What entered one or several layers, ``names``; into a ``norm`` or into ``layers`` with a matrix.

    ``tokens`` vectors of ``width`` numbers. ``dimensions``: how many have an outlier; ``affected``: the share of tokens
    that do. ``largest`` and ``median`` are magnitudes, the median the last batch's. ``crest`` and ``kurtosis`` are of
    all numbers, ``token_crest`` is the mean over tokens. ``peaks``: the dimensions that have an outlier, each with its
    largest magnitude, the largest first, at most 32.
    """

    names: tuple[str, ...]
    kind: str
    width: int
    tokens: int
    largest: float
    median: float
    rms: float
    kurtosis: float
    crest: float
    token_crest: float
    dimensions: int
    affected: float
    peaks: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Dimension:
    """A dimension of the hidden state that has outliers.

    ``layers``: in how many blocks, such as the layers of a transformer, it does on its way into a layer; ``tokens``:
    for which share of the tokens, the mean over the inputs where it does; ``largest``: its largest magnitude;
    ``systematic``: whether it meets LLM.int8()'s criterion.
    """

    index: int
    layers: int
    tokens: float
    largest: float
    systematic: bool


@dataclass(frozen=True)
class Massive:
    """A massive activation: where, how large (the largest of ``times``), and how many medians that is.

    ``position``: the token's place in its sequence, None where an input is one row of vectors.
    """

    name: str
    position: int | None
    dimension: int
    value: float
    ratio: float
    times: int


@dataclass(frozen=True)
class Outliers:
    """What was found.

    ``width`` is the hidden state's: the one that most inputs of layers have. ``blocks`` is how many blocks read it:
    what has one number in the model's names (``model.layers.7``), or a layer outside of such.
    """

    threshold: float
    width: int
    blocks: int
    inputs: tuple[Input, ...]
    dimensions: tuple[Dimension, ...]
    massive: tuple[Massive, ...]
    notes: tuple[str, ...] = ()

    @property
    def systematic(self) -> tuple[Dimension, ...]:
        """The dimensions that meet LLM.int8()'s criterion."""
        return tuple(d for d in self.dimensions if d.systematic)

    @property
    def of_layers(self) -> tuple[Input, ...]:
        """The inputs of layers with a matrix, without those of norms."""
        return tuple(x for x in self.inputs if x.kind == "layers")

    @property
    def positions(self) -> dict[int, int]:
        """How many massive activations there are at each position of a token, most first."""
        counted = Counter[int]()
        for one in self.massive:
            if one.position is not None:
                counted[one.position] += one.times
        return dict(counted.most_common())

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``."""
        return asdict(self)


@torch.no_grad()
def find_outliers(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    threshold: float = THRESHOLD,
    layer_share: float = LAYER_SHARE,
    token_share: float = TOKEN_SHARE,
    call: Call | None = None,
    track: Track | None = None,
) -> Outliers:
    """Pass batches (see ``calibration.batches.enter``) through the model in eval mode, float or 8-bit, and look.

    Tokens of padding count as any other. Numbers that are not finite are left out, with a note. Raises ``OctavoError``
    for a threshold that is no positive number, for data without a batch, and if no layer with a matrix sees any.
    """
    if not 0 < threshold < math.inf:
        raise OctavoError(f"the threshold is a positive number, such as {THRESHOLD:g}, not {threshold!r}")
    watch = _Watch(threshold)
    handles = [module.register_forward_pre_hook(watch.hook(name), with_kwargs=True) for name, module in _watched(model)]
    passed = 0
    try:
        with evaluating(model), eagerly(model):
            for batch in track(several(batches), "looking for outliers") if track else several(batches):
                watch.last = None
                enter(model, batch, call)
                passed += 1
    finally:
        for handle in handles:
            handle.remove()
    if not passed:
        raise OctavoError("the data held no batch; a generator can be read only once")
    return _settled(watch, layer_share, token_share)


def _watched(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers that have or could have an 8-bit form, and norms: whatever has a weight a channel and nothing below it."""
    found = []
    for layer in swap.layers(model):
        module = layer.module
        weights = list(module.parameters(recurse=False))
        norm = bool(weights) and all(p.ndim == 1 for p in weights) and not any(module.children())
        matrix = isinstance(module, QuantizedLayer) or swap.eight_bit(module) is not None
        if (matrix or norm) and not isinstance(module, nn.Embedding | nn.EmbeddingBag | QuantizedTable):
            found.append((layer.name, module))
    return found


@dataclass
class _Seen:
    """What has been seen of one input so far; sums are in float64."""

    kind: str
    over: Tensor  # int64 [width]: for how many tokens each dimension was an outlier
    peaks: Tensor  # float32 [width]
    names: dict[str, None] = field(default_factory=dict)
    tokens: int = 0
    affected: int = 0
    odd: int = 0  # numbers that were not finite
    median: float = 0.0
    crests: float = 0.0
    moments: tuple[float, float, float, float, float] = (0.0,) * 5  # count, mean, Σd², Σd³, Σd⁴ about the mean
    massive: dict[tuple[int | None, int], tuple[float, float, int]] = field(default_factory=dict)

    def add(self, x: Tensor, positions: int | None, threshold: float) -> None:
        """Another batch of vectors [tokens, width]; ``positions``: the length of a sequence."""
        whole = x.isfinite()
        if not bool(whole.all()):
            self.odd += int((~whole).sum())
            x = x.where(whole, 0.0)
        size = x.abs()
        over = size > threshold
        self.over += over.sum(0).cpu()
        self.affected += int(over.any(1).sum())
        self.peaks = torch.maximum(self.peaks, size.amax(0).cpu())
        self.tokens += len(x)
        self.median = float(size.flatten().median())
        # a row of zeros has no crest factor; it counts as one that is flat
        means = x.double().square().mean(1).sqrt()
        self.crests += float((size.amax(1) / means).where(means > 0, 1.0).sum())
        self.moments = _together(self.moments, _moments(x))
        self._note_massive(x, size, positions)

    def _note_massive(self, x: Tensor, size: Tensor, positions: int | None) -> None:
        least = max(MASSIVE, RATIO * self.median)
        some = size.flatten().topk(min(KEPT, size.numel()))
        for value, place in zip(some.values.tolist(), some.indices.tolist(), strict=True):
            if value <= least:
                break
            token, dimension = divmod(place, x.shape[1])
            key = (None if positions is None else token % positions, dimension)
            known = self.massive.get(key, (0.0, 0.0, 0))
            ratio = value / self.median if self.median else math.inf
            signed = float(x[token, dimension])
            larger = (signed, ratio) if value > abs(known[0]) else known[:2]
            self.massive[key] = (*larger, known[2] + 1)
        if len(self.massive) > KEPT:
            kept = sorted(self.massive.items(), key=lambda item: -abs(item[1][0]))[:KEPT]
            self.massive = dict(kept)

    def settled(self) -> Input:
        count, mean, squares, _, fourths = self.moments
        power = squares / count + mean**2
        largest = float(self.peaks.max())
        top = self.peaks.where(self.over > 0, 0.0).topk(min(KEPT, len(self.over)))
        return Input(
            names=tuple(self.names),
            kind=self.kind,
            width=len(self.over),
            tokens=self.tokens,
            largest=largest,
            median=self.median,
            rms=math.sqrt(power),
            kurtosis=count * fourths / squares**2 if squares else math.nan,
            crest=largest / math.sqrt(power) if power else math.nan,
            token_crest=self.crests / self.tokens,
            dimensions=int((self.over > 0).sum()),
            affected=self.affected / self.tokens,
            peaks=tuple((i, v) for i, v in zip(top.indices.tolist(), top.values.tolist(), strict=True) if v > 0),
        )


def _moments(x: Tensor) -> tuple[float, float, float, float, float]:
    """Count, mean, and the sums of the second, third and fourth powers of the distances from it."""
    exact = x.double().flatten()
    mean = exact.mean()
    d = exact - mean
    squares = d.square()
    return (len(d), float(mean), float(squares.sum()), float((squares * d).sum()), float(squares.square().sum()))


def _together(
    a: tuple[float, float, float, float, float], b: tuple[float, float, float, float, float]
) -> tuple[float, float, float, float, float]:
    """The moments of two sets from those of each (Pébay, Sandia report 2008-6212)."""
    if not a[0]:
        return b
    (n, mean, a2, a3, a4), (m, other, b2, b3, b4) = a, b
    total, d = n + m, other - mean
    return (
        total,
        mean + d * m / total,
        a2 + b2 + d**2 * n * m / total,
        a3 + b3 + d**3 * n * m * (n - m) / total**2 + 3 * d * (n * b2 - m * a2) / total,
        a4
        + b4
        + d**4 * n * m * (n**2 - n * m + m**2) / total**3
        + 6 * d**2 * (n**2 * b2 + m**2 * a2) / total**2
        + 4 * d * (n * b3 - m * a3) / total,
    )


class _Watch:
    """The hooks of one pass."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.seen: dict[str, _Seen] = {}
        self.last: tuple[Tensor, int | None, str] | None = None

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if x is None or not x.is_floating_point() or not x.numel():
                return
            version = None if x.is_inference() else x._version
            if self.last is not None and version is not None and self.last[0] is x and self.last[1] == version:
                owner = self.seen[self.last[2]]
                if owner.kind == _kind(module):
                    owner.names.setdefault(name)
                    return
            vectors, positions = _vectors(module, x.detach())
            width = vectors.shape[1]
            known = self.seen.get(name)
            if known is None or len(known.over) != width:
                empty = torch.zeros(width, dtype=torch.int64), torch.zeros(width)
                known = self.seen[name] = _Seen(_kind(module), *empty, names={name: None})
            known.add(vectors.float(), positions, self.threshold)
            self.last = (x, version, name)

        return look


def _kind(module: nn.Module) -> str:
    return "layers" if isinstance(module, QuantizedLayer) or swap.eight_bit(module) is not None else "norm"


def _vectors(module: nn.Module, x: Tensor) -> tuple[Tensor, int | None]:
    """A layer's input as vectors [tokens, features], and how many make a sequence; of pictures, a vector a pixel."""
    if isinstance(module, _ConvNd | QuantizedConv | _NormBase | nn.GroupNorm) and x.ndim > 2:
        return x.movedim(1, -1).flatten(0, -2), None
    if x.ndim < 2:
        return x.reshape(1, -1), None
    return x.reshape(-1, x.shape[-1]), x.shape[-2] if x.ndim > 2 else None


def _settled(watch: _Watch, layer_share: float, token_share: float) -> Outliers:
    seen = list(watch.seen.values())
    layers = [one for one in seen if one.kind == "layers"]
    if not layers:
        raise OctavoError("no layer with a matrix saw data; there is nothing to look for outliers in")
    width = Counter(len(one.over) for one in layers).most_common(1)[0][0]
    hidden = [one for one in layers if len(one.over) == width]
    over = torch.stack([one.over for one in hidden])  # [inputs, width]
    shares = over / torch.tensor([one.tokens for one in hidden])[:, None]
    peaks = torch.stack([one.peaks for one in hidden]).amax(0)
    homes = [_block(next(iter(one.names))) for one in hidden]
    blocks = len(set(homes))
    found = []
    for index in (over > 0).any(0).nonzero().flatten().tolist():
        affected = (over[:, index] > 0).nonzero().flatten().tolist()
        count = len({homes[place] for place in affected})
        share = float(shares[affected, index].mean())
        systematic = count >= layer_share * blocks and share >= token_share
        found.append(Dimension(index, count, share, float(peaks[index]), systematic))
    found.sort(key=lambda d: (not d.systematic, -d.layers, -d.tokens, d.index))
    massive = [
        Massive(next(iter(one.names)), position, dimension, value, ratio, times)
        for one in seen
        for (position, dimension), (value, ratio, times) in one.massive.items()
    ]
    massive.sort(key=lambda m: -abs(m.value))
    odd = [(next(iter(one.names)), one.odd) for one in seen if one.odd]
    notes = [f"{number} numbers that enter {name} are NaN or infinite and were left out" for name, number in odd]
    inputs = tuple(one.settled() for one in seen)
    return Outliers(watch.threshold, width, blocks, inputs, tuple(found), tuple(massive), tuple(notes))


def _block(name: str) -> str:
    """The part of a model that a layer belongs to: its name up to the first number, or all of it."""
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: first + 1])
