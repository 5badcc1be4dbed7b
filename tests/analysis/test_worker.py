"""Contenders in processes of their own: they race like others, and whatever becomes of them is a row."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import octavo as ov
from octavo.analysis.bench import language
from octavo.analysis.bench.race import Contender, Race, Task, Work
from octavo.analysis.bench.worker import Children
from tests.nn import models

DOING = {"walk": Work(10, "steps/s")}
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def told_pid():
    return {"walk": Task(lambda: float(os.getpid()), own_clock=True, flops=3.0)}


def threads():
    return {"walk": Task(lambda: float(torch.get_num_threads()), own_clock=True)}


def refuses():
    raise ov.OctavoError("no such thing")


def breaks_late():
    runs = iter([1.0] * 4)
    return {"walk": Task(lambda: next(runs), own_clock=True)}


def dies():
    os.write(2, b"something\nout of ideas\n\n")
    os.kill(os.getpid(), signal.SIGSEGV)


def sleeps(seconds):
    return {"walk": Task(lambda: time.sleep(seconds[0]) or 1.0, own_clock=True, before=lambda: seconds.reverse())}


def state(pid):
    """One letter, as ``ps`` has it; empty of a process that is no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def becomes(pid, *letters):
    """Whether the process gets into one of the states within some seconds."""
    return any(state(pid) in letters or time.sleep(0.05) for _ in range(400))


@pytest.fixture(scope="module")
def children():
    with Children(1) as made:
        yield made


@LINUX
def test_a_race_of_several_processes(children):
    """Who has the same home shares a process; the one that answered last is stopped, and goes on when it is asked."""
    entered = [
        Contender("here", told_pid, "INT8"),
        Contender("there", told_pid, "BF16", "other"),
        Contender("there too", told_pid, home="other"),
        Contender("threads", threads, home="other"),
    ]
    raced = Race("here")
    raced.run(children.apart(entered), DOING, 3)
    seconds = [raced.find("walk", one.name).seconds for one in entered]
    assert [t.reason for t in raced.timings] == [""] * 4
    assert seconds[0] == [os.getpid()] * 3
    assert seconds[1] == seconds[2] != seconds[0]
    assert seconds[3] == [1.0] * 3
    assert [t.flops for t in raced.timings] == [3.0, 3.0, 3.0, None]
    assert [t.unit for t in raced.timings] == ["INT8", "BF16", "", ""]
    assert becomes(int(seconds[1][0]), "T")


def test_failures_are_rows(children):
    entered = [
        Contender("refuses", refuses, home="other"),
        Contender("late", breaks_late, home="other"),
        Contender("not sent", lambda: {}, home="other"),
        Contender("other task", dict, home="other"),
        Contender("fine", told_pid, home="other"),
    ]
    raced = Race("fine")
    raced.run(children.apart(entered), DOING, 3)
    reasons = {t.contender: t.reason for t in raced.timings}
    assert reasons["refuses"] == "no such thing"
    assert reasons["late"].endswith("StopIteration")
    assert "pickle" in reasons["not sent"]
    assert reasons["other task"] == "does not do this"
    assert reasons["fine"] == ""


@LINUX
def test_a_process_that_dies_or_hangs(children):
    said = []
    children.say = said.append
    entered = children.apart(
        [
            Contender("dies", dies, home="mortal"),
            Contender("hangs", partial(sleeps, [60.0, 0.0]), home="mortal"),
            Contender("with it", told_pid, home="mortal"),
        ]
    )
    with pytest.raises(ov.OctavoError, match=r"its process ended by itself, by SIGSEGV: out of ideas"):
        entered[0].prepare()
    hangs = children._child("mortal")  # a new one
    hangs.ask("prepare", "hangs", partial(sleeps, [0.0, 60.0]))
    other = entered[2].prepare()["walk"]
    pid = int(other.turn())
    hangs.patience = 0.2
    with pytest.raises(ov.OctavoError, match=r"no answer within 0 s"):
        hangs.ask("turn", "hangs", "walk")
    assert not state(pid)
    assert said == ["hangs, walk: takes long; waiting for 0 s at most"]
    raced = Race("with it")
    raced.run([Contender("with it", lambda: {"walk": other})], DOING, 1)
    assert raced.timings[0].reason.startswith("no answer within 0 s")


@LINUX
def test_an_interruption_ends_all():
    """Ctrl-C in the second turn: what was measured stays, the process does not."""
    raced, children = Race("there"), Children(1)

    def stop():
        if raced.timings[0].seconds:
            raise KeyboardInterrupt
        return 1.0

    entered = [
        Contender("there", told_pid, home="other"),
        Contender("stop", lambda: {"walk": Task(stop, own_clock=True)}),
    ]

    def run():
        with children:
            raced.run(children.apart(entered), DOING, 3)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(raced.timings[0].seconds) == 1
    assert not state(int(raced.timings[0].seconds[0]))


PARENT = """
import os, signal, time
from octavo.analysis.bench.race import Contender
from octavo.analysis.bench.worker import Children
from tests.analysis.test_worker import told_pid
if __name__ == "__main__":
    children = Children(1)
    task = children.apart([Contender("a", told_pid, home="b")])[0].prepare()["walk"]
    print(int(task.turn()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@LINUX
def test_a_parent_that_is_killed_leaves_nobody(tmp_path):
    """Though the child is stopped, and cannot see that its pipe was closed."""
    (tmp_path / "parent.py").write_text(PARENT)
    root = Path(__file__).resolve().parents[2]
    said = subprocess.run(
        [sys.executable, tmp_path / "parent.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "TMPDIR": str(tmp_path)},
    )
    assert said.returncode == -signal.SIGKILL
    assert becomes(int(said.stdout), "", "Z")


def test_a_stored_model_in_its_own_process(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # for the child: minutes, and not what is tested
    torch.manual_seed(0)
    model = models.FAMILIES["tied_llama"]()
    stored, prompt = language.Stored.of(model, tmp_path), language.prompt(model, 16, 4)
    assert torch.equal(models.logits(stored.load()), models.logits(model))
    entered = [c for c in language.compiled(stored, ["int8-dynamic"], prompt, head=True) if c.unit == "INT8"]
    raced = Race("")
    with Children(1) as made:
        raced.run(made.apart(entered), language.work(prompt), 2)
    assert [(t.contender, t.task, t.reason, len(t.seconds)) for t in raced.timings] == [
        ("int8-dynamic, compiled", task, "", 2) for task in ("prefill", "decode")
    ]
    assert raced.find("decode", entered[0].name).nbytes > 0


def test_models_that_cannot_be_stored(tmp_path, monkeypatch):
    class Local(models.Plain):
        pass

    with pytest.raises(ov.OctavoError, match="Local cannot be given to other processes"):
        language.Stored.of(Local(), tmp_path)
    monkeypatch.setattr(language, "model_bytes", lambda model: 1 << 60)
    with pytest.raises(ov.OctavoError, match="has no room"):
        language.Stored.of(models.Plain(), tmp_path)
