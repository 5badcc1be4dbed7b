"""Contenders in processes of their own, so that no runtime is slowed by the threads of another.

Libraries bring thread pools, and after its turn a pool waits for work by spinning: Intel's OpenMP, inside CTranslate2,
for 200 ms. In one process all of them stay and cost whoever comes next up to a third of its speed. So a contender that
names a ``home`` is prepared in a child process of that name, which lives as long as the race; its seconds are measured
in there. One child works at a time. The others are stopped (SIGSTOP): whatever they do while they wait, they cannot.

The protocol is a question and an answer over a pipe: ``("prepare", contender, function)`` is answered with what is
known of the tasks, ``("turn", contender, task)`` with seconds a run; either with the reason why not. The function must
be picklable: names, sizes and files rather than models. Every child holds a copy of the model, in its own numbers; of
large models measure few contenders at a time.
"""

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from octavo.analysis.bench.race import Contender, Timed, compiling, reason
from octavo.errors import OctavoError

PATIENCE = 1200.0  # seconds for an answer: compilation takes minutes
SLOW = 10.0  # seconds after which the user is told what is waited for
GRACE = 3.0  # seconds to end in
LAST_WORDS = 160  # letters
PR_SET_PDEATHSIG = 1

Say = Callable[[str], None]
Prepare = Callable[[], Mapping[str, Timed]]


class Children:
    """The processes of a race, by name. A context: on the way out, however it ends, all of them are ended.

    ``threads`` is what torch gets in each. ``patience`` is how many seconds one may take for an answer before it is
    given up. ``say`` hears what takes long.
    """

    def __init__(self, threads: int, patience: float = PATIENCE, say: Say = lambda words: None) -> None:
        self.threads, self.patience, self.say = threads, patience, say
        self._running: dict[str, _Child] = {}
        self._logs = tempfile.TemporaryDirectory(prefix="octavo-bench-")

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._running.values():
            child.let_go()
        for child in self._running.values():
            child.end(grace=GRACE)
        self._running.clear()
        self._logs.cleanup()

    def apart(self, contenders: Sequence[Contender]) -> list[Contender]:
        """The same contenders; those with a home are prepared and timed there."""
        return [replace(one, prepare=partial(self._prepare, one)) if one.home else one for one in contenders]

    def _prepare(self, contender: Contender) -> dict[str, Timed]:
        child = self._child(contender.home)
        known = child.ask("prepare", contender.name, contender.prepare)
        tasks = {task: _Away(child, contender.name, task, *sizes) for task, sizes in known.items()}
        for task in tasks.values():
            task.warm_up()
        return dict(tasks)

    def _child(self, home: str) -> "_Child":
        if home not in self._running or self._running[home].ended:
            log = Path(self._logs.name) / f"{len(os.listdir(self._logs.name))}.log"
            self._running[home] = _Child(home, log, self.threads, self.patience, self.say)
        return self._running[home]


@dataclass
class _Away:
    """A task that a child has."""

    child: "_Child"
    contender: str
    task: str
    flops: float | None
    nbytes: float | None
    failed: str = field(default="", init=False)

    def turn(self) -> float:
        if self.failed:
            raise OctavoError(self.failed)
        return float(self.child.ask("turn", self.contender, self.task))

    def warm_up(self) -> None:
        """Turns before the race, in which models are compiled; a failure is kept for it."""
        try:
            self.turn()
        except OctavoError as error:
            self.failed = str(error)


class _Child:
    """One process, seen from outside."""

    def __init__(self, home: str, log: Path, threads: int, patience: float, say: Say) -> None:
        self.log, self.patience, self.say = log, patience, say
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, log, threads), name=home, daemon=True)
        with _uninterrupted():
            self.process.start()
        theirs.close()
        self.ended = ""

    def ask(self, what: str, contender: str, told: Any) -> Any:
        """The answer. Raises ``OctavoError`` with the reason where there is none; a child that hangs is ended."""
        if self.ended:
            raise OctavoError(self.ended)
        question = pickle.dumps((what, contender, told))
        doing = f"{contender}, {told}" if what == "turn" else f"{contender}, preparing"
        self._signal("SIGCONT")
        try:
            self.pipe.send_bytes(question)
            good, answer = self._answer(doing)
        except (EOFError, OSError):
            self.process.join()
            self.end(f"its process ended by itself, {_how(self.process.exitcode)}{self._last_words()}")
            raise OctavoError(self.ended) from None
        self._signal("SIGSTOP")
        if not good:
            raise OctavoError(answer)
        return answer

    def let_go(self) -> None:
        """It is not needed any more: once it has noticed, it tidies up and ends."""
        self.pipe.close()
        self._signal("SIGCONT")

    def end(self, why: str = "its process was ended", grace: float = 0) -> None:
        """Kill it, if it lives after so many seconds."""
        self.ended = self.ended or why
        self.process.join(grace)
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def _answer(self, doing: str) -> Any:
        started = time.perf_counter()
        slow = not self.pipe.poll(min(SLOW, self.patience))
        if slow:
            self.say(f"{doing}: takes long; waiting for {self.patience:.0f} s at most")
            if not self.pipe.poll(max(0.0, self.patience - SLOW)):
                self.end(f"no answer within {self.patience:.0f} s{self._last_words()}")
                raise OctavoError(self.ended)
        answer = self.pipe.recv()
        if slow:
            self.say(f"{doing}: took {time.perf_counter() - started:.0f} s")
        return answer

    def _signal(self, name: str) -> None:
        number = getattr(signal, name, None)  # Windows has neither
        if number is not None and self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, number)

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n") if self.log.exists() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f": {last[-LAST_WORDS:]}" if last else ""


def serve(pipe: Connection, log: Path, threads: int) -> None:
    """The child: answer until nobody asks any more."""
    _end_with_parent()
    with log.open("wb") as words:  # libraries write to the terminal from C
        os.dup2(words.fileno(), 1)
        os.dup2(words.fileno(), 2)
    torch.set_num_threads(threads)
    ready: dict[str, Mapping[str, Timed]] = {}
    while True:
        try:
            question = pipe.recv_bytes()
        except EOFError:
            return
        try:
            answer = True, _do(ready, *pickle.loads(question))
        except Exception as error:
            answer = False, reason(error)
        pipe.send(answer)


def _do(ready: dict[str, Mapping[str, Timed]], what: str, contender: str, told: Any) -> Any:
    if what == "turn":
        with compiling() if "torch._dynamo" in sys.modules else nullcontext():  # two seconds to import
            return ready[contender][told].turn()
    ready.pop(contender, None)  # that of another race
    with torch.no_grad():
        ready[contender] = told()
    return {name: (task.flops, task.nbytes) for name, task in ready[contender].items()}


def _end_with_parent() -> None:
    """A child that is stopped would not see that its parent was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A process that is started meanwhile never sees Ctrl-C; this one does, afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _how(code: int | None) -> str:
    """An exit code in words."""
    if code is None or code >= 0:
        return f"with code {code}"
    return f"by {signal.Signals(-code).name}"
