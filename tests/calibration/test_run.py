"""Calibration runs: what enters a model, what is kept, and what comes back from a file."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from octavo import Calibration, CalibrationInterrupted, OctavoError
from octavo.calibration.minmax import MinMax
from octavo.calibration.moving_average import MovingAverage
from octavo.calibration.percentile import Percentile


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def watch(observer=None):
    return Calibration({name: (observer or MinMax()).fresh() for name in ("0", "2")})


def same(a, b):
    states = [{n: o.state_dict() for n, o in c.observers.items()} for c in (a, b)]
    return a.batches == b.batches and all(
        states[0][n].keys() == states[1][n].keys() and all(torch.equal(v, states[1][n][k]) for k, v in s.items())
        for n, s in states[0].items()
    )


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, a, b, scale=1.0):
        return self.inner(a + b) * scale


@pytest.mark.parametrize(
    "batch",
    [
        (torch.ones(2, 4), torch.ones(2, 4)),
        [torch.ones(2, 4), torch.ones(2, 4), "label"],
        {"a": torch.ones(2, 4), "b": torch.ones(2, 4)},
    ],
    ids=["tuple", "list with labels", "dict"],
)
def test_what_a_batch_may_be(batch):
    calibration = Calibration({"inner": MinMax()}).run(Two(), [batch])
    assert calibration.observers["inner"].count == 8
    assert calibration.batches == 1


def test_batches_that_do_not_fit():
    one = torch.ones(2, 4)
    for batch, words in [
        ((one,), "1 parts, Two.forward needs 2"),
        ({"a": one, "label": one}, "label, which Two.forward does not take"),
        ("text", "not str"),
        (one, "TypeError"),
    ]:
        with pytest.raises(CalibrationInterrupted, match=words):
            Calibration({"inner": MinMax()}).run(Two(), [batch])
    calibration = Calibration({"inner": MinMax()})
    calibration.run(Two(), ["text"], call=lambda model, batch: model(one, one))
    assert calibration.observers["inner"].count == 8


def test_changing_shapes_and_one_batch():
    calibration = watch().run(net(), [torch.randn(2, 6), torch.randn(1, 3, 6), torch.randn(6)])
    assert calibration.observers["0"].count == 12 + 18 + 6


def test_a_loader_that_raises_keeps_whole_batches():
    batches = [torch.randn(2, 6) for _ in range(4)]

    def loader():
        yield from batches[:3]
        raise OSError("disk gone")

    with pytest.raises(CalibrationInterrupted, match="batch 3 with OSError: disk gone") as caught:
        watch().run(net(), loader())
    kept = caught.value.calibration
    assert same(kept, watch().run(net(), batches[:3]))
    assert same(kept.run(net(), batches[3:]), watch().run(net(), batches))


def test_half_a_batch_leaves_no_trace():
    class Breaks(nn.Sequential):
        def forward(self, x):
            y = self[0](x)
            if x.numel() > 12:
                raise RuntimeError("out of memory")
            return self[2](y)

    model = Breaks(*net())
    with pytest.raises(CalibrationInterrupted) as caught:
        watch(Percentile(99.0)).run(model, [torch.randn(2, 6), torch.randn(5, 6)])
    assert caught.value.calibration.observers["0"].count == 12
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_ctrl_c_keeps_whole_batches_and_takes_the_hooks_away():
    model, calibration = net().train(), watch()

    def loader():
        yield torch.randn(2, 6)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibration.run(model, loader())
    assert calibration.batches == 1
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_layers_that_share_their_input_share_a_look():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.o = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.q(x) + self.k(x)
            x.mul_(2)
            return self.o(x) + y

    looks = []

    class Counting(MinMax):
        def update(self, x):
            looks.append(tuple(x.shape))
            super().update(x)

    calibration = Calibration({name: Counting() for name in "qko"})
    calibration.run(Shared(), [torch.ones(3, 4)])
    assert len(looks) == 2  # the input changed in place before o
    assert float(calibration.observers["o"]._high) == 2 * float(calibration.observers["k"]._high)


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        batches = [torch.randn(2, 6) for _ in range(3)]
        inside = watch().run(net(), batches)
    assert same(inside, watch().run(net(), [x.clone() for x in batches]))
    assert same(inside, watch().run(net(), batches))


def test_unknown_layers_and_different_calibrations():
    with pytest.raises(OctavoError, match="Sequential has no layer 7"):
        Calibration({"7": MinMax()}).run(net(), [torch.ones(1, 6)])
    with pytest.raises(OctavoError, match="2 is in one only"):
        watch().merge(Calibration({"0": MinMax()}))
    with pytest.raises(OctavoError, match=r"0: .*settings"):
        watch().merge(watch(Percentile(99.0)))
    assert Calibration({"0": MinMax(), "2": MinMax()}).unreached == ["0", "2"]


@settings(max_examples=15, deadline=None)
@given(cut=st.integers(0, 6), observer=st.sampled_from([MinMax(), Percentile(99.0)]))
def test_merging_equals_one_pass(cut, observer):
    generator = torch.Generator().manual_seed(cut)
    batches = [torch.randn(3, 6, generator=generator) * 10**i for i in range(6)]
    whole = watch(observer).run(net(), batches)
    parts = [watch(observer) for _ in range(2)]
    for calibration, share in zip(parts, (batches[:cut], batches[cut:]), strict=True):
        if share:
            calibration.run(net(), share)
    parts[0].merge(parts[1])
    assert same(parts[0], whole)


@pytest.mark.parametrize("observer", [MinMax(), MovingAverage(0.8), Percentile(99.5)], ids=str)
def test_files(tmp_path, observer):
    batches = [torch.randn(4, 6) for _ in range(5)]
    seen = watch(observer).run(net(), batches[:3])
    seen.save(tmp_path / "seen.safetensors")
    again = Calibration.load(tmp_path / "seen.safetensors")
    assert same(again, seen)
    assert same(again.run(net(), batches[3:]), seen.run(net(), batches[3:]))
    assert [p.name for p in tmp_path.iterdir()] == ["seen.safetensors"]


def test_bad_files(tmp_path):
    file = tmp_path / "seen.safetensors"
    with pytest.raises(OctavoError, match="no such file"):
        Calibration.load(file)
    file.write_bytes(b"nonsense")
    with pytest.raises(OctavoError, match="not a calibration"):
        Calibration.load(file)
    save_file({"weight": torch.ones(2)}, file)
    with pytest.raises(OctavoError, match="something else"):
        Calibration.load(file)
    calibration = watch().run(net(), [torch.ones(1, 6)])
    told = {name: observer.settings() for name, observer in calibration.observers.items()}
    state = {f"{n}|{k}": v for n, o in calibration.observers.items() for k, v in o.state_dict().items()}
    for broken in ({}, {k: v for k, v in state.items() if "low" not in k}, {**state, "0|low": torch.ones(3)}):
        save_file(broken, file, {"octavo": "calibration", "batches": "1", "observers": json.dumps(told)})
        with pytest.raises(OctavoError, match="not a calibration"):
            Calibration.load(file)
    save_file(state, file, {"octavo": "calibration", "batches": "one", "observers": json.dumps(told)})
    with pytest.raises(OctavoError, match="not a calibration"):
        Calibration.load(file)
