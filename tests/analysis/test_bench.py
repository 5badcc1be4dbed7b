"""Races, shapes, prompts, contenders, the roofline, and what is reported of them."""

import json
import math
import statistics

import pytest
import torch
from torch import nn

import octavo as ov
from octavo.analysis.bench import language, linear, race, roofline
from octavo.analysis.bench.race import Contender, Race, Task, Timing, Work
from octavo.nn.layer import QuantizedLayer
from octavo.ptq.quantize import model_bytes
from octavo.report import html, plots, speed
from tests.nn import models

DOING = {"walk": Work(10, "steps/s")}


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(race, "time", made)
    return made


def walker(clock, name, seconds, log=None, **more):
    """Takes so many seconds a run."""

    def run():
        clock.sleep(seconds)
        if log is not None:
            log.append(name)

    return Contender(name, lambda: {"walk": Task(run, **more)})


def test_ratios_are_of_the_same_repeat():
    base, other = Timing("t", "a", Work(2, "x/s")), Timing("t", "b", Work(2, "x/s"))
    base.seconds, other.seconds = [1.0, 10.0, 2.0], [0.5, 5.0, 4.0]
    assert other.ratios(base) == [2.0, 2.0, 0.5]
    raced = Race("a")
    raced.timings = [base, other]
    assert raced.ratio(other) == 2.0  # of the medians it would be ½
    assert raced.ratio(base) == 1.0
    assert raced.ratio(base, "b") == 0.5
    assert other.rate == 2 / 4.0
    assert base.spread == pytest.approx((6.0 - 1.5) / 2 / 2.0)


def test_an_interrupted_race_compares_what_both_have():
    base, other = Timing("t", "a", Work(1, "")), Timing("t", "b", Work(1, ""))
    base.seconds, other.seconds = [1.0, 3.0, 5.0], [1.0]
    assert other.ratios(base) == [1.0]


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 2.0, 2.0]])
def test_quartiles(values):
    lower, median, upper = race.quartiles(values)
    assert median == statistics.median(values)
    assert min(values) <= lower <= median <= upper <= max(values)


def test_turns(clock):
    """Each repeat runs everyone, in another order, and times what it says."""
    log = []
    names = ["a", "b", "c", "d"]
    raced = Race("a")
    raced.run([walker(clock, name, 0.01 * (i + 1), log) for i, name in enumerate(names)], DOING, 3)
    firsts, rest = log[: 3 * 4], log[3 * 4 :]  # a first turn is a cold run, one for its length, one that counts
    assert firsts == [name for name in names for _ in range(3)]
    assert [set(rest[i : i + 4]) for i in (0, 4)] == [set(names)] * 2
    assert len(rest) == 8
    assert rest[0] != rest[4]
    for i, name in enumerate(names):
        timing = raced.find("walk", name)
        assert timing.seconds == pytest.approx([0.01 * (i + 1)] * 3)
        assert timing.rate == pytest.approx(1000 / (i + 1))
        assert raced.ratio(timing) == pytest.approx(1 / (i + 1))
        assert timing.spread == pytest.approx(0, abs=1e-9)


def test_short_runs_are_repeated(clock):
    log = []
    raced = Race("short")
    raced.run([walker(clock, "short", 1e-4, log), walker(clock, "shortest", 1e-9)], DOING, 2)
    assert len(log) in (103, 105)  # 50 runs a turn, less or more one for rounding; three that do not count
    assert raced.find("walk", "short").seconds == pytest.approx([1e-4] * 2)
    assert raced.find("walk", "shortest").seconds == pytest.approx([1e-9] * 2, rel=1e-3)


def test_what_goes_before_is_not_timed(clock):
    log = []
    raced = Race("a")
    raced.run([walker(clock, "a", 1e-3, log, before=lambda: (clock.sleep(7), log.append("before")))], DOING, 2)
    assert log == ["before", "a"] * 4
    assert raced.find("walk", "a").seconds == pytest.approx([1e-3] * 2)


def test_own_clock(clock):
    raced = Race("a")
    raced.run([Contender("a", lambda: {"walk": Task(lambda: 0.25, own_clock=True)})], DOING, 2)
    assert raced.find("walk", "a").seconds == [0.25, 0.25]


def test_failures_are_rows(clock):
    late = iter([None, None, None, "now"])

    def fails_late():
        if next(late, None):
            raise RuntimeError("too\n much")

    def fails():
        raise ov.OctavoError("no such thing")

    def unprepared():
        raise ImportError("x" * 1000)

    raced = Race("fine")
    entered = [
        walker(clock, "fine", 0.006),
        Contender("fails", lambda: {"walk": Task(fails)}),
        Contender("late", lambda: {"walk": Task(lambda: (clock.sleep(0.006), fails_late()))}),
        Contender("unprepared", unprepared),
        Contender("other", lambda: {"run": Task(fails)}),
    ]
    raced.run(entered, DOING, 3)
    reasons = {t.contender: t.reason for t in raced.timings}
    assert reasons["fine"] == ""
    assert reasons["fails"] == "no such thing"
    assert reasons["late"] == "RuntimeError: too much"
    assert reasons["unprepared"].startswith("ImportError: xxx")
    assert len(reasons["unprepared"]) == race.REASON
    assert reasons["other"] == "does not do this"
    assert len(raced.find("walk", "fine").seconds) == 3
    assert all(raced.ratio(t) is None and t.rate is None for t in raced.timings if t.reason)
    rows = {row["contender"]: row for row in json.loads(json.dumps(raced.to_json()))}
    assert rows["late"]["reason"] == reasons["late"]
    assert rows["fine"]["reason"] is None
    assert rows["fine"]["ratio"] == 1
    with pytest.raises(ov.OctavoError, match="0 repeats"):
        raced.run(entered, DOING, 0)
    with pytest.raises(ov.OctavoError, match="two contenders are called 'fine'"):
        raced.run([entered[0], entered[0]], DOING, 1)


def test_an_interruption_keeps_what_was_measured(clock):
    runs = iter(range(4))

    def stop():
        clock.sleep(0.006)
        if next(runs, None) is None:
            raise KeyboardInterrupt

    raced = Race("a")
    with pytest.raises(KeyboardInterrupt):
        raced.run([walker(clock, "a", 0.006), Contender("b", lambda: {"walk": Task(stop)})], DOING, 3)
    assert [len(t.seconds) for t in raced.timings] == [3, 2]
    assert len(raced.find("walk", "b").ratios(raced.find("walk", "a"))) == 2
    assert speed.tables(raced, None)[0].rows[1][:1] == ("b",)


@pytest.mark.parametrize("text", ["512x576", "ax2x3", "0x2x3", "1x2x3x4", "", "-1x2x3", "1.5x2x3"])
def test_bad_shapes(text):
    with pytest.raises(ov.OctavoError, match="a shape is rows x inner x columns"):
        linear.shape(text)


def test_shapes():
    one = linear.shape("3X17×100")
    assert (one.rows, one.inner, one.columns) == (3, 17, 100)
    assert str(one) == "3x17x100"
    assert one.flops == 2 * 3 * 17 * 100
    groups = linear.by_weight([one, linear.shape("5x17x100"), linear.shape("5x100x17"), one])
    assert {k: [str(s) for s in v] for k, v in groups.items()} == {
        (100, 17): ["3x17x100", "5x17x100"],
        (17, 100): ["5x100x17"],
    }


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("int8-dynamic", "INT8"),
        ("int8-static", "INT8"),
        ("int8-group64", "INT8"),
        ("int8-weight-only", "BF16"),
        ("fp8-dynamic", "BF16"),
        ("e3m4-int8-group64", "BF16"),
        ("w8a16", "FP32"),
    ],
)
def test_units(name, unit):
    assert linear.unit(ov.schemes.get(name)) == unit


def test_every_scheme_runs_as_a_layer(monkeypatch):
    monkeypatch.setattr(roofline, "cache_size", lambda: 1 << 14)
    shapes = [linear.Shape(rows, 33, 20) for rows in (1, 5)]
    entered = linear.contenders(shapes, list(ov.schemes.NAMES))
    assert [c.name for c in entered] == ["FP32", "BF16", "torch._int_mm", *ov.schemes.NAMES]
    raced = Race(linear.BASELINE)
    raced.run(entered, linear.work(shapes), 1)
    assert {t.contender: t.reason for t in raced.timings if t.reason} == {}
    found = raced.find("5x33x20", "int8-dynamic")
    assert found.flops == 2 * 5 * 33 * 20
    assert found.nbytes == pytest.approx(33 * 20 + 2 * 20 + 2 * 5 * (33 + 20), rel=0.1)  # codes, scales, x and y
    assert raced.find("5x33x20", "FP32").nbytes == 4 * 33 * 20 + 2 * 5 * (33 + 20)


def test_copies_outgrow_the_cache(monkeypatch):
    weight = torch.zeros(64, 64)
    monkeypatch.setattr(roofline, "cache_size", lambda: 10 * 64 * 64)
    assert linear.copies(weight) * weight.numel() > 2 * 10 * 64 * 64
    monkeypatch.setattr(roofline, "cache_size", lambda: 1 << 40)
    assert linear.copies(weight) == linear.MOST_COPIES
    assert linear.copies(torch.zeros(0, 3)) == linear.MOST_COPIES


def test_layers_take_turns():
    seen = []
    layers = [lambda x, i=i: lambda: seen.append((i, len(x))) for i in range(3)]
    one = linear.Shape(4, 2, 2)
    task = linear.tasks({one: torch.zeros(4, 2)}, layers, 8)["4x2x2"]
    for _ in range(4):
        task.run()
    assert seen == [(0, 4), (1, 4), (2, 4), (0, 4)]
    assert (task.flops, task.nbytes) == (32, 8 + 2 * 4 * 4)


def test_prompts():
    model = models.llama()
    usual = language.prompt(model)
    assert (usual.length, usual.context, usual.new) == (64, 32, 32)  # the model takes 64
    assert int(usual.ids.max()) < models.VOCABULARY
    assert torch.equal(usual.ids, language.prompt(model).ids)
    short = language.prompt(model, 5, 3)
    assert (short.length, short.context, short.new) == (5, 5, 3)
    assert [int(t) for t in short.fed] == short.ids[0, :3].tolist()
    assert all(token.shape == (1, 1) for token in short.fed)
    one = language.prompt(model, 1, 63)
    assert (one.length, one.context, len(one.fed)) == (1, 1, 63)
    with pytest.raises(ov.OctavoError, match="65 tokens is longer than the 64"):
        language.prompt(model, 65)
    with pytest.raises(ov.OctavoError, match="cannot decode 64"):
        language.prompt(model, None, 64)


@pytest.mark.parametrize("family", ["llama", "tied_llama", "qwen2", "opt", "gpt2", "mixtral"])
def test_language_models(family):
    torch.manual_seed(0)
    model = models.FAMILIES[family]()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert language.is_causal(model)
    prompt = language.prompt(model, 16, 4)
    entered = language.contenders(model, ["int8-dynamic", "int8-weight-only", "int8-static"], prompt, head=True)
    raced = Race(linear.BASELINE)
    raced.run(entered, language.work(prompt), 1)
    assert {t.contender: t.reason for t in raced.timings if t.reason} == {}
    assert raced.tasks == ["prefill", "decode"]
    assert raced.find("prefill", "FP32").work == Work(16, "tokens/s")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())  # the model stays as it is
    sizes = {t.contender: t.nbytes for t in raced.of("decode")}
    if family == "mixtral":
        assert set(sizes.values()) == {None}
    else:
        assert sizes["FP32"] > sizes["BF16"] > sizes["int8-dynamic"] > 0


def test_decoding_continues_the_prompt():
    """The steps that are timed give the logits of the whole text read at once; and again in the next turn."""
    torch.manual_seed(0)
    model = models.llama()
    prompt = language.Prompt(torch.randint(3, 100, (1, 12)), 8, 4)
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits))
    task = language.engine(model, prompt)["decode"]
    with torch.no_grad():
        whole = model(input_ids=prompt.ids).logits
        for _ in range(2):
            task.before()
            seen.clear()
            task.run()
            assert [tuple(x.shape[:2]) for x in seen] == [(1, 1)] * 4
            torch.testing.assert_close(torch.cat(seen, 1), whole[:, 8:])


def test_prefill_gives_the_last_logits_only():
    model = models.llama()
    prompt = language.prompt(model, 10, 2)
    with torch.no_grad():
        assert language.engine(model, prompt)["prefill"].run().logits.shape == (1, 1, models.VOCABULARY)


def test_what_a_token_reads():
    """A tied table is multiplied with, another one only looked up."""
    tied, untied = (models.llama(tie_word_embeddings=t) for t in (True, False))
    table = tied.get_input_embeddings().weight.nbytes
    whole = [model_bytes(model) for model in (tied, untied)]
    assert language._read_by_a_token(tied, 3) == 3 * whole[0]
    assert language._read_by_a_token(untied, 3) == 3 * (whole[1] - table)


def test_the_head_is_quantized_only_if_asked():
    for head in (False, True):
        model = language.eight_bit(models.llama(), ov.schemes.INT8_DYNAMIC, [], head)
        assert isinstance(model.lm_head, QuantizedLayer) == head
    with pytest.raises(ov.OctavoError, match="no output head"):
        language.eight_bit(models.Plain(), ov.schemes.INT8_DYNAMIC, [], True)


def test_other_models_run_on_a_batch():
    model = models.Plain()
    assert not language.is_causal(model)
    assert not language.is_causal(models.t5())
    assert not language.is_causal(models.bert())
    batches = [torch.randn(3, 20), (torch.randn(3, 20), torch.zeros(3)), {"x": torch.randn(3, 20)}]
    for batch in batches:
        raced = Race(linear.BASELINE)
        raced.run(language.contenders(model, ["int8-dynamic", "int8-static"], batch), language.work(batch), 1)
        assert [t.reason for t in raced.timings] == [""] * 4
        assert raced.tasks == ["forward"]


def test_no_room(monkeypatch):
    monkeypatch.setattr(language, "_free_memory", lambda: 10.0)
    raced = Race(linear.BASELINE)
    batch = torch.randn(3, 20)
    raced.run(language.contenders(models.Plain(), [], batch), language.work(batch), 1)
    assert all(t.reason.startswith("no memory: a copy of the model takes") for t in raced.timings)
    monkeypatch.undo()
    assert language._free_memory() is None or language._free_memory() > 1e6
    monkeypatch.setattr(language, "MEMORY", "/nowhere/at/all")
    assert language._free_memory() is None


@pytest.fixture
def compiled(monkeypatch):
    """A compiler that only looks, so that it takes no minutes; and the graphs that it was given."""
    original, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, **told: original(model, backend=backend, **told))
    return graphs


def test_compiled_decoding_is_decoding(compiled, monkeypatch):
    """The static cache gives the logits of the whole text; and what was compiled serves the next turn."""
    model = models.llama()
    prompt = language.Prompt(torch.randint(3, 100, (1, 12)), 8, 4)
    with torch.no_grad():
        whole = model(input_ids=prompt.ids).logits
    look, seen = torch.compile, []

    def watched(model, **told):
        run = look(model, **told)
        return lambda **given: seen.append(run(**given)) or seen[-1]

    monkeypatch.setattr(torch, "compile", watched)
    task = language.engine(model, prompt, compiled=True)
    with torch.no_grad():
        torch.testing.assert_close(task["prefill"].run().logits, whole[:, -1:])
        after = []
        for _ in range(2):
            task["decode"].before()
            seen.clear()
            task["decode"].run()
            torch.testing.assert_close(torch.cat([x.logits for x in seen], 1), whole[:, 8:])
            after.append(len(compiled))
    assert after[0] == after[1] >= 2


def test_compiled_batches(compiled):
    """A model of torch's own layers too, of which ``nn.Module.compile`` compiles nothing."""
    nets = [nn.Sequential(nn.Linear(20, 3), nn.ReLU()), models.Plain()]
    batch = (torch.randn(3, 20), torch.zeros(3))
    for i, net in enumerate(nets):
        task = language.engine(net, batch, compiled=True)["forward"]
        with torch.no_grad():
            torch.testing.assert_close(task.run(), net(batch[0]))
        assert len(compiled) == i + 1


def test_torch_does_not_give_up_compiling(compiled):
    """Ten models of one class: torch by itself stops at the eighth."""
    nets = [nn.Sequential(nn.Linear(20, 3 + i), nn.ReLU()) for i in range(10)]
    with race.compiling(), torch.no_grad():
        for i, net in enumerate(nets):
            assert torch.compile(net, dynamic=False)(torch.zeros(2, 20)).shape == (2, 3 + i)
    assert len(compiled) == len(nets)


def test_roofline():
    roof = roofline.Roofline(1e10, {"INT8": 1e12})
    assert roof.seconds("INT8", 1e12, 1e9) == 1.0  # the arithmetic takes longer
    assert roof.seconds("INT8", 1e9, 1e10) == 1.0  # the memory does
    assert roof.seconds("FP32", 1e9, None) is None
    assert roof.seconds("FP32", 1e9, 5e9) == 0.5
    timing = Timing("t", "c", Work(1, ""), "INT8", 1e12, 1e9, [2.0, 4.0, 3.0])
    assert roof.share(timing) == pytest.approx(1 / 3)
    assert roof.share(Timing("t", "c", Work(1, ""), "INT8", 1e12, 1e9)) is None
    assert roof.share(Timing("t", "c", Work(1, ""), seconds=[1.0])) is None
    json.dumps(roof.to_json())
    assert str(roof) == "memory 10.0 GB/s; INT8 1,000 GFLOP/s"


def test_no_roof_is_lower_than_what_was_reached():
    low = roofline.Roofline(1e9, {"INT8": 1e9, "BF16": 5e9})
    reached = [
        Timing("t", "a", Work(1, ""), "INT8", 1e12, 1e3, [2.0, 1.0, 1.0]),
        Timing("t", "b", Work(1, ""), "BF16", 1e9, 4e9, [1.0]),
        Timing("t", "c", Work(1, ""), "", 1e15, None, [1.0]),  # nobody knows on what
        Timing("t", "d", Work(1, ""), "INT8", 1e15, 1e15, [], "failed"),
    ]
    raised = low.raised(reached)
    assert raised == roofline.Roofline(4e9, {"INT8": 1e12, "BF16": 5e9})
    assert all(raised.share(t) is None or raised.share(t) <= 1 for t in reached)


def test_this_machine_has_a_roofline():
    roof = roofline.measure(repeats=1, nbytes=1 << 22, sizes=(64,))
    assert set(roof.peaks) == {"FP32", "BF16", "INT8"}
    assert all(math.isfinite(x) and x > 0 for x in (roof.bandwidth, *roof.peaks.values()))
    assert roofline.cache_size() >= 1 << 14


def test_cache_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "CACHE", tmp_path)
    assert roofline.cache_size() == roofline.LIKELY_CACHE
    for index, text in enumerate(("32K", "2M\n", "1024", "?")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(text)
    assert roofline.cache_size() == 2 << 20


def raced():
    made = Race("BF16")
    for task in ("1x64x32", "8x64x32", "4x8x16"):
        for name, seconds in (("BF16", [2e-3, 4e-3]), ("int8-dynamic", [1e-3, 1e-3]), ("broken", [])):
            reason = "" if seconds else "RuntimeError: cannot"
            nbytes = None if name == "broken" else 4096.0
            made.timings.append(Timing(task, name, Work(2.0, "GFLOP/s"), "INT8", 4096.0, nbytes, seconds, reason))
    return made


def test_tables():
    whole = speed.tables(raced(), roofline.Roofline(4096e3, {"INT8": 1e12}))
    assert [table.title for table in whole] == ["1x64x32", "8x64x32", "4x8x16"]
    assert whole[0].columns == ("", "GFLOP/s", "± %", "to BF16", "% of roof", "note")
    assert whole[0].rows[1] == ("int8-dynamic", 2000.0, 0, 3.0, 100, "")
    assert whole[0].rows[2] == ("broken", "", "", "", "", "RuntimeError: cannot")
    fine = raced()
    fine.timings = [t for t in fine.timings if not t.reason]
    assert speed.tables(fine, None)[0].columns == ("", "GFLOP/s", "± %", "to BF16")


def test_plots():
    roof = roofline.Roofline(1e9, {"INT8": 1e12, "FP32": 1e10})
    drawn = speed.plots(raced(), roof)
    assert [plot.kind for plot in drawn] == ["bars", "bars", "line", "line"]  # a weight a picture
    bars, lines = drawn[0], drawn[2]
    assert [(s.label, s.x, s.y) for s in bars.series] == [
        (task, ("BF16", "int8-dynamic"), (1.0, 3.0)) for task in ("1x64x32", "8x64x32")
    ]
    assert [s.label for s in lines.series] == ["roof, INT8", "roof, FP32", "BF16", "int8-dynamic"]
    first = lines.series[1]
    assert all(y == pytest.approx(min(10, x)) for x, y in zip(first.x, first.y, strict=True))
    assert all(plots.png(plot).startswith(b"\x89PNG") for plot in drawn)
    page = html.sheet("speed", "here", drawn, speed.tables(raced(), roof)).decode()
    assert "RuntimeError: cannot" in page
    assert speed.plots(Race("BF16"), roof) == ()
    nothing = raced()
    nothing.timings = [t for t in nothing.timings if t.reason]
    assert speed.plots(nothing, roof) == ()


def test_a_module_without_numbers():
    batch = torch.zeros(2)
    tasks = language.engine(nn.Identity(), batch)
    assert torch.equal(tasks["forward"].run(), batch)
