"""Streams of tensors to observe, and all observers at once."""

import torch
from hypothesis import strategies as st

import octavo as ov
from octavo.calibration import MSE, Entropy, LineSearch, MinMax, MovingAverage, Percentile

OBSERVERS = [
    MinMax(),
    MovingAverage(0.8),
    Percentile(99.0),
    Percentile(100),
    Entropy(),
    MSE(),
    LineSearch("flexible-bias"),
]
HISTOGRAMS = [o for o in OBSERVERS if not isinstance(o, MinMax | MovingAverage)]
CASTS = [ov.Cast("int8"), ov.Cast("e4m3fn"), ov.Cast("uint8", affine=True)]


def name(observer):
    return f"{type(observer).__name__}{getattr(observer, 'percent', '')}"


def numbers(kind, count, seed=0):
    """So many numbers of a kind, float32."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=g)
    return {
        "normal": lambda: x,
        "heavy": lambda: x**5,
        "positive": lambda: x.abs() + 1,
        "relu": lambda: x.relu(),
        "negative": lambda: -x.abs(),
        "integers": lambda: (x * 9).round(),
        "constant": lambda: torch.full_like(x, 2.5),
        "zeros": lambda: torch.zeros_like(x),
        "mostly zeros": lambda: x * (torch.rand(count, generator=g) > 0.999),
        "two values": lambda: x.sign() * 3,
        "huge": lambda: (x * 1e38).clamp(-3.4e38, 3.4e38),
        "tiny": lambda: x * 1e-40,
        "all magnitudes": lambda: x.sign() * torch.exp2(torch.rand(count, generator=g) * 260 - 135),
        "outliers": lambda: torch.where(torch.rand(count, generator=g) > 0.9995, x * 1000, x),
    }[kind]()


KINDS = [
    *("normal", "heavy", "positive", "relu", "negative", "integers", "constant", "zeros", "mostly zeros"),
    *("two values", "huge", "tiny", "all magnitudes", "outliers"),
]


@st.composite
def streams(draw, most=40_000):
    """A tensor of some thousand numbers, cut at random into pieces, some of them empty."""
    count = draw(st.sampled_from([1, 2, 100, 3_000, 16_384, 16_385, most]))
    x = numbers(draw(st.sampled_from(KINDS)), count, draw(st.integers(0, 99)))
    cuts = sorted(draw(st.lists(st.integers(0, count), max_size=5)))
    return x, x.tensor_split(cuts)


def seen(observer, tensors):
    """A fresh observer of the same settings that has seen these."""
    observer = observer.fresh()
    for x in tensors:
        observer.update(x)
    return observer


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        x.dtype == b[k].dtype and x.shape == b[k].shape and torch.equal(x.nan_to_num(7.0), b[k].nan_to_num(7.0))
        for k, x in a.items()
    )
