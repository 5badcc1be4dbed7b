"""Many runs of a model side by side, halted at each layer until all of them are there.

What changes a layer by what it sees, and wants the layers behind it to see the change, would need a pass over all data
for every layer. Here all batches walk through the model together: each in a thread of its own, of which one works at a
time. At a layer each waits for the others, the layer is shown all their inputs at once, and they go on. So one pass is
enough, any model will do, and no more is held than every batch's numbers at one layer.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn

from octavo.errors import OctavoError

#: Sees what a layer is called with, by run, before any of these calls: (layer's name, {run: (args, kwargs)}).
Visit = Callable[[str, dict[int, tuple[tuple[Any, ...], dict[str, Any]]]], None]
#: What a layer gives in a run: (layer's name, run, what the layer itself would do, args, kwargs) → its result.
Answer = Callable[[str, int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def walk(runs: Sequence[Callable[[], Any]], layers: Mapping[str, nn.Module], visit: Visit, answer: Answer) -> None:
    """Let ``runs``, which call one model each, meet at every one of ``layers``, which are in the model's order.

    ``visit`` is called for a layer once, when every run waits at it or at one behind it; ``answer`` then for each call.
    A run that comes to a layer later has no part in its visit. Whatever a run, ``visit`` or ``answer`` raises ends all
    runs and is raised here, but for ``Halt``, which ends that run alone. Afterwards the layers are as before.
    """
    order = {name: place for place, name in enumerate(layers)}
    reports: SimpleQueue[_Run] = SimpleQueue()
    threads = [_Run(number, call, reports, answer) for number, call in enumerate(runs)]
    seen: set[str] = set()
    with _halting(layers):
        try:
            for thread in threads:
                thread.start()
                reports.get().check()
            while waiting := [thread for thread in threads if thread.place is not None]:
                name = min((thread.place for thread in waiting if thread.place is not None), key=order.__getitem__)
                here = [thread for thread in waiting if thread.place == name]
                if name not in seen:
                    seen.add(name)
                    visit(name, {thread.number: thread.given for thread in here})
                for thread in here:
                    thread.proceed.put(True)
                    reports.get().check()
        finally:
            for thread in threads:
                thread.proceed.put(False)
            for thread in threads:
                if thread.ident is not None:
                    thread.join()


class Halt(BaseException):
    """Ends a run from within; no ``except Exception`` of the model's holds it up. ``answer`` may end its run by it."""


class _Run(threading.Thread):
    """One run of the model, which works only between ``proceed`` and its next report."""

    def __init__(self, number: int, call: Callable[[], Any], reports: "SimpleQueue[_Run]", answer: Answer) -> None:
        super().__init__(name=f"octavo run {number}", daemon=True)
        self.number, self.call, self.reports, self.answer = number, call, reports, answer
        self.workers = torch.get_num_threads()
        self.proceed: SimpleQueue[bool] = SimpleQueue()
        self.place: str | None = None  # the layer it waits at, and what it calls it with
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.error: BaseException | None = None

    def run(self) -> None:
        """The thread's work."""
        try:
            torch.set_num_threads(self.workers)  # every thread has a number of its own, and sums depend on it
            with torch.no_grad():  # and a mode
                self.call()
        except BaseException as error:  # raised again where somebody hears it
            self.error = error
        self.place = None
        self.reports.put(self)

    def reach(self, name: str, usual: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Wait at a layer, then do what ``answer`` says."""
        self.place, self.given = name, (args, kwargs)
        self.reports.put(self)
        if not self.proceed.get():
            raise Halt
        self.given = ((), {})
        return self.answer(name, self.number, usual, args, kwargs)

    def check(self) -> None:
        """Raise what ended the run, if anything did."""
        if self.error is not None and not isinstance(self.error, Halt):
            raise self.error


@contextmanager
def _halting(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """The layers with a ``forward`` that halts the run that calls it."""

    def halt(name: str, usual: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            run = threading.current_thread()
            if not isinstance(run, _Run):
                raise OctavoError(f"layer {name} is called from a thread of the model's own; run it in one thread")
            return run.reach(name, usual, args, kwargs)

        return forward

    # a hook that does nothing keeps torch's fused paths, which call no forward, from being taken
    hooks = [module.register_forward_pre_hook(lambda module, args: None) for module in layers.values()]
    before = {module: module.__dict__["forward"] for module in layers.values() if "forward" in module.__dict__}
    try:
        for name, module in layers.items():
            module.forward = halt(name, module.forward)
        yield
    finally:
        for module in layers.values():
            module.__dict__.pop("forward", None)
        for module, own in before.items():
            module.__dict__["forward"] = own
        for hook in hooks:
            hook.remove()
