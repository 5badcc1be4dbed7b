"""What holds of every observer: streams, merging, granularities, state, settings, bad input."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

import octavo as ov
from octavo import OctavoError, PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from octavo.calibration import MSE, Entropy, LineSearch, MinMax, MovingAverage, Percentile, from_settings
from octavo.calibration.observer import rows
from octavo.core.granularity import scale_shape

from .streams import CASTS, HISTOGRAMS, KINDS, OBSERVERS, name, numbers, same_state, seen, streams

every_observer = pytest.mark.parametrize("kind", OBSERVERS, ids=name)


@every_observer
@given(stream=streams(), cut=st.integers(0, 6))
def test_merging_equals_one_pass(kind, stream, cut):
    _, parts = stream
    once, first, second = seen(kind, parts), seen(kind, parts[:cut]), seen(kind, parts[cut:])
    first.merge(second)
    assert first.count == once.count
    if isinstance(kind, MovingAverage):
        for a, b in zip(first.range(CASTS[0]), once.range(CASTS[0]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    else:
        assert same_state(first, once)
        for how in CASTS:
            assert all(map(torch.equal, first.range(how), once.range(how)))


@pytest.mark.parametrize("kind", [MinMax(), *HISTOGRAMS], ids=name)
def test_the_order_does_not_matter(kind):
    parts = [numbers(k, 9_000, i) for i, k in enumerate(("normal", "tiny", "outliers", "relu"))]
    forwards, backwards = seen(kind, parts), seen(kind, parts[::-1])
    joined = seen(kind, [])
    for i in (2, 0, 3, 1):
        joined.merge(seen(kind, [parts[i]]))
    for how in CASTS:
        assert all(map(torch.equal, forwards.range(how), backwards.range(how)))
        assert all(map(torch.equal, forwards.range(how), joined.range(how)))
    assert same_state(forwards, backwards)
    assert same_state(forwards, joined)


@every_observer
def test_merging_leaves_the_other_as_it_is(kind):
    """Also where tensors are shared, and when either sees more."""
    a, b = seen(kind, [torch.randn(5)]), seen(kind, [torch.randn(20_000) * 9, torch.randn(7)])
    before = {k: v.clone() for k, v in b.state_dict().items()}
    empty = kind.fresh()
    empty.merge(b)
    a.merge(b)
    for one in (a, empty):
        one.update(torch.randn(20_000) * 100)
        one.update(torch.randn(3))
    assert all(torch.equal(before[k], v) for k, v in b.state_dict().items())
    count = b.count
    b.merge(kind.fresh())
    assert b.count == count and all(torch.equal(before[k], v) for k, v in b.state_dict().items())


@every_observer
def test_what_happens_to_a_tensor_afterwards_does_not_matter(kind):
    for granularity in (PerTensor(), PerGroup(1)):
        x = torch.randn(4, 3)
        observer = kind.fresh(granularity)
        observer.update(x)
        before = {k: v.clone() for k, v in observer.state_dict().items()}
        x.mul_(100)
        assert all(torch.equal(before[k], v) for k, v in observer.state_dict().items())


def test_observers_that_do_not_go_together():
    a = seen(Percentile(99), [torch.randn(5)])
    for b in (Percentile(99.9), Entropy(), MinMax(), Percentile(99, granularity=PerChannel(0))):
        b.update(torch.randn(5))
        with pytest.raises(OctavoError, match="same settings"):
            a.merge(b)
    a, b = (seen(MinMax(granularity=PerChannel(0)), [torch.randn(n, 2)]) for n in (3, 4))
    with pytest.raises(OctavoError, match=r"ranges \[3, 1\]"):
        a.merge(b)
    assert a.count == 6


@every_observer
@pytest.mark.parametrize("data", KINDS)
def test_a_range_is_finite_ordered_and_makes_scales(kind, data):
    for count in (1, 50, 20_000):
        x = numbers(data, count)
        observer = seen(kind, [x])
        for how in CASTS:
            low, high = observer.range(how)
            assert low.dtype == high.dtype == torch.float32
            assert low.isfinite().all() and high.isfinite().all() and (low <= high).all()
            if x.any():
                assert (low < 0).any() or (high > 0).any()
            scale, zero_point = observer.scale(how)
            assert scale.isfinite().all() and (scale > 0).all() and (zero_point is None) is not how.affine
            back = ov.quantize_scaled(x, how, scale, zero_point).dequantize()
            assert back.isfinite().all()


@every_observer
@pytest.mark.parametrize("power_of_two", [False, True])
def test_scales_of_powers_of_two(kind, power_of_two):
    observer = seen(kind, [torch.randn(3_000)])
    for how in CASTS:
        scale, _ = observer.scale(ov.Cast(how.format, scale=ov.Static(power_of_two), affine=how.affine))
        assert (math.frexp(scale.item())[0] == 0.5) is power_of_two
        scale, _ = observer.scale(ov.Cast(how.format, scale=ov.Constant(0.25), affine=how.affine))
        assert scale.item() == 0.25


@pytest.mark.parametrize(
    ("granularity", "shapes"),
    [
        (PerTensor(), [(3, 4), (), (2, 3, 4, 5), (7,), (0, 3), (1, 1)]),
        (PerChannel(1), [(2, 5), (3, 5, 4), (1, 5, 2, 2), (0, 5)]),
        (PerChannel(-1), [(2, 5), (5,), (2, 3, 5), (2, 3, 0)]),
        (PerChannel(0), [(5,), (5, 3), (5, 1, 1, 1)]),
        (PerToken(), [(4, 6), (4, 9)]),
        (PerToken(), [(2, 3, 8)]),
        (PerGroup(4), [(3, 10), (3, 11), (3, 12)]),
        (PerBlock(2, 3), [(5, 7)]),
        (PerBlock(2, 3), [(2, 5, 7), (2, 6, 9)]),
    ],
    ids=str,
)
def test_every_row_has_its_own_numbers(granularity, shapes):
    """Against an observer for each block; ragged blocks have fewer numbers and no others."""
    tensors = [torch.randn(shape) for shape in shapes]
    largest = max((x for x in tensors if x.numel()), key=lambda x: x.dim())
    shape = scale_shape(tuple(largest.shape), granularity.block(tuple(largest.shape)))
    for kind in (MinMax(), MovingAverage(), Percentile(80), MSE()):
        observer = seen(kind.fresh(granularity), tensors)
        assert observer.count == sum(x.numel() for x in tensors)
        for how in CASTS:
            low, high = observer.range(ov.Cast(how.format, granularity, affine=how.affine))
            assert low.shape == high.shape == shape
            for row in range(low.numel()):
                parts = [
                    x.new_tensor([v for v in cut[row].tolist() if not math.isnan(v)])
                    for x in tensors
                    if x.numel()
                    for cut in [rows(x, granularity.block(tuple(x.shape)))]
                ]
                alone = seen(kind, parts).range(how)
                assert (low.flatten()[row], high.flatten()[row]) == alone


def test_rows():
    x = torch.arange(15.0).reshape(3, 5)
    assert rows(x, (3, 5)).tolist() == [list(range(15))]
    assert rows(x, (1, 5)).tolist() == x.tolist()
    assert rows(x, (3, 1)).tolist() == x.T.tolist()
    cut = rows(x, (2, 2))
    assert cut.shape == (6, 4)
    assert cut[0].tolist() == [0, 1, 5, 6]
    assert cut[2].nan_to_num(-1).tolist() == [4, -1, 9, -1]
    assert cut[5].nan_to_num(-1).tolist() == [14, -1, -1, -1]


@every_observer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [300, 20_000])
def test_dtypes_and_strides(kind, dtype, count):
    x = torch.randn(count // 10, 10).to(dtype)
    for data in (x, x.T, x.T[::2], x.expand(2, *x.shape), x.clone().requires_grad_()):
        observer, other = seen(kind, [data]), seen(kind, [data.float().contiguous()])
        for how in CASTS:
            assert all(map(torch.equal, observer.range(how), other.range(how)))
            assert not observer.range(how)[0].requires_grad


@every_observer
def test_tensors_of_inference_mode(kind):
    observer = kind.fresh()
    for n in (5, 30_000, 5):
        with torch.inference_mode():
            observer.update(torch.randn(n))
    observer.update(torch.randn(3))
    other = seen(kind, [torch.randn(30_000)])
    other.merge(observer)
    assert other.range(CASTS[0])[1] > 0


@every_observer
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_numbers(kind, bad):
    observer = seen(kind, [torch.randn(9)])
    state = observer.state_dict()
    for granularity in (PerTensor(), PerGroup(4)):
        x = torch.ones(3, 10)
        x[1, 3] = bad
        with pytest.raises(OctavoError, match="1 of 30 numbers"):
            kind.fresh(granularity).update(x)
    with pytest.raises(OctavoError, match="NaN"):
        observer.update(x)
    with pytest.raises(OctavoError, match="beyond float32"):
        observer.update(torch.tensor([1e39], dtype=torch.float64))
    assert observer.count == 9 and all(torch.equal(state[k], v) for k, v in observer.state_dict().items())


@every_observer
def test_bad_tensors(kind):
    observer = kind.fresh()
    for x in (torch.ones(3, dtype=torch.int64), torch.ones(3).bool(), [1.0], None, torch.ones(3).to(torch.float8_e5m2)):
        with pytest.raises(OctavoError, match="float32, float64"):
            observer.update(x)
    with pytest.raises(OctavoError, match="meta"):
        observer.update(torch.empty(3, device="meta"))
    observer.update(torch.empty(3, 0))
    assert observer.count == 0
    for ask in (observer.range, observer.scale):
        with pytest.raises(OctavoError, match="seen no numbers"):
            ask(CASTS[0])
    observer.update(torch.randn(3))
    with pytest.raises(OctavoError, match="no ranges for PerChannel"):
        observer.range(ov.Cast("int8", PerChannel(0)))
    channels = kind.fresh(PerChannel(1))
    with pytest.raises(OctavoError, match="axis=1"):
        channels.update(torch.randn(3))
    channels.update(torch.randn(3, 4))
    with pytest.raises(OctavoError, match="must stay"):
        channels.update(torch.randn(3, 5))
    assert channels.count == 12


@every_observer
@given(stream=streams(20_000), granularity=st.sampled_from([PerTensor(), PerGroup(6_000), PerGroup(19_000)]))
def test_a_state_comes_back(kind, stream, granularity):
    x, _ = stream
    observer = seen(kind.fresh(granularity), [x, x[:0]])
    told = load_tensors(save_tensors(observer.state_dict()))
    again = from_settings(json.loads(json.dumps(observer.settings())))
    again.load_state_dict(told)
    assert type(again) is type(kind) and again.settings() == observer.settings() and again.count == observer.count
    assert same_state(again, observer)
    how = ov.Cast("e3m4", granularity)
    assert all(map(torch.equal, again.range(how), observer.range(how)))
    for one in (again, observer):
        one.update(x.clamp(-1e37, 1e37) * 3)
    assert same_state(again, observer)
    again.load_state_dict(load_tensors(save_tensors(kind.fresh().state_dict())))
    assert again.count == 0


def test_settings():
    for observer in (
        MinMax(),
        MinMax(granularity=PerGroup(32)),
        MovingAverage(0.5, granularity=PerChannel(-1)),
        Percentile(99.999),
        Percentile(percent=100, granularity=PerBlock(4, 5)),
        Entropy(),
        MSE(),
        LineSearch(),
        LineSearch("fixed"),
    ):
        told = json.loads(json.dumps(observer.settings()))
        assert from_settings(told).settings() == observer.settings()
        assert repr(from_settings(told)) == repr(observer)
    assert repr(Percentile(99.9)) == "Percentile(granularity=PerTensor(), percent=99.9)"


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ([], "JSON object"),
        ("MinMax", "JSON object"),
        ({}, "no observer"),
        ({"type": "Observer"}, "no observer"),
        ({"type": "HistogramObserver"}, "no observer"),
        ({"type": "os"}, "there are .*MinMax"),
        ({"type": "MinMax", "granularity": "PerTensor"}, "granularity"),
        ({"type": "MinMax", "granularity": {"type": "INT8"}}, "unknown record"),
        ({"type": "MinMax", "count": 3}, "cannot be made"),
        ({"type": "MinMax", "percent": 3}, "cannot be made"),
        ({"type": "Percentile", "percent": 0}, "percentile"),
        ({"type": "Percentile", "percent": 100.1}, "percentile"),
        ({"type": "Percentile", "percent": math.nan}, "percentile"),
        ({"type": "Percentile", "percent": "99"}, "cannot be made"),
        ({"type": "Percentile", "percent": None}, "cannot be made"),
        ({"type": "MovingAverage", "momentum": 1}, "momentum"),
        ({"type": "MovingAverage", "momentum": -0.1}, "momentum"),
        ({"type": "LineSearch", "mode": "best"}, "modes"),
        ({"type": "LineSearch", "mode": []}, "modes"),
    ],
    ids=str,
)
def test_bad_settings(bad, why):
    with pytest.raises(OctavoError, match=why):
        from_settings(bad)


@every_observer
@pytest.mark.parametrize("count", [50, 20_000])
def test_bad_states(kind, count):
    observer = seen(kind, [torch.randn(count)])
    state = observer.state_dict()
    damaged = [{k: v for k, v in state.items() if k != lost} for lost in state]
    for k, v in state.items():
        damaged.append({**state, k: v.to(torch.float16)})
        damaged.append({**state, k: torch.stack([v, v])})
        if v.is_floating_point() and v.numel():
            damaged.append({**state, k: torch.full_like(v, math.nan)})
            damaged.append({**state, k: torch.full_like(v, math.inf)})
        elif v.numel():
            damaged.append({**state, k: v - v.max() - 1})
    for shape in ([-1], [3], [count + 1], [2**62, 2**62], [0]):
        damaged.append({**state, "shape": torch.tensor(shape)})
    if "low" in state:
        damaged.append({**state, "low": state["high"] + 1})
    if "held" in state:
        damaged.append({**state, "counts": state["counts"][:, :100], "held": state["held"][:, :0]})
        damaged.append({**state, "held": torch.zeros(1, 20_000)})
    for bad in damaged:
        fresh = kind.fresh()
        with pytest.raises(OctavoError, match="state"):
            fresh.load_state_dict(bad)
        assert fresh.count == 0


def test_one_pass_serves_several_rules():
    data = [torch.randn(20_000), torch.randn(300) * 5]
    gathered = seen(Percentile(99.9), data)
    for kind in OBSERVERS:
        if isinstance(kind, MovingAverage):
            with pytest.raises(OctavoError, match="kept only low, high, counts, held"):
                kind.fresh().adopt(gathered)
            continue
        adopted = kind.fresh().adopt(gathered)
        alone = seen(kind, data)
        for how in CASTS:
            assert all(map(torch.equal, adopted.range(how), alone.range(how)))
        adopted.update(torch.randn(20_000) * 100)
    assert same_state(gathered, seen(Percentile(99.9), data))
    with pytest.raises(OctavoError, match="kept only low, high"):
        Entropy().adopt(seen(MinMax(), data))
    with pytest.raises(OctavoError, match="granularities differ"):
        Entropy(granularity=PerGroup(2)).adopt(gathered)
    assert gathered.adopt(Entropy()).count == 0


def test_an_observer_of_ones_own():
    """What is written outside works alike: the settings find every subclass."""

    @dataclass(eq=False)
    class Half(MinMax):
        def _range(self, how):
            return self._low / 2, self._high / 2

    observer = seen(Half(), [torch.tensor([-4.0, 2.0])])
    assert [end.item() for end in observer.range(CASTS[0])] == [-2.0, 1.0]
    assert isinstance(from_settings(observer.settings()), Half)


@every_observer
def test_settle_keeps_the_format(kind):
    observer = seen(kind, [torch.randn(100)])
    assert all(observer.settle(how) == how for how in CASTS)
