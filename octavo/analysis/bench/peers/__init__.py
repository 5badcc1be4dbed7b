"""Other libraries on the same layers and models, each where it can be imported: one file a library.

A peer runs what its users run: its own 8-bit kernels, on the same numbers, prompt and threads as ours. What it cannot
do is said in the table.
"""

import difflib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from octavo.analysis.bench.language import Prompt
from octavo.analysis.bench.linear import Bind, Shape, copies, numbers, tasks
from octavo.analysis.bench.race import Contender, Task
from octavo.errors import OctavoError

#: How a library makes a linear layer of a weight [N, K] in BF16 ready, by name of the way.
Layers = Mapping[str, Callable[[Tensor], Bind]]


@dataclass(frozen=True)
class Setting:
    """What a peer gets to run a language model: the model, the prompt, threads, and a folder for files of its own."""

    model: nn.Module
    prompt: Prompt
    threads: int
    folder: Path


#: How a library makes a language model ready, by name of the way.
Models = Mapping[str, Callable[[Setting], Mapping[str, Task]]]


@dataclass(frozen=True)
class Peer:
    """A library: the module it is imported as, what installs it, and in which ways it runs layers and models.

    ``layers`` takes the number of threads. A way whose name ends in ``COMPILED`` goes through ``torch.compile`` first.
    """

    name: str
    module: str
    install: str
    layers: Callable[[int], Layers] | None = None
    models: Callable[[], Models] | None = None

    @property
    def installed(self) -> bool:
        """Whether it can be found; whether it can be imported shows when it is."""
        return importlib.util.find_spec(self.module) is not None

    @property
    def version(self) -> str | None:
        """As its package says, or None."""
        try:
            return importlib.metadata.version(self.install.split()[2])
        except importlib.metadata.PackageNotFoundError:
            return None


#: The peers, and the file of this folder that each is in.
FILES = {
    "torchao": "torchao",
    "bitsandbytes": "bitsandbytes",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "ctranslate2": "ctranslate2",
    "llama.cpp": "llama_cpp",
}
COMPILED = ", compiled"


def get(name: str) -> Peer:
    """The peer of that name. Raises ``OctavoError``."""
    key = name.lower().strip()
    if key not in FILES:
        near = difflib.get_close_matches(key, FILES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise OctavoError(f"no peer is called {name!r}; {hint}There are: {', '.join(FILES)}")
    found: Peer = import_module(f"{__name__}.{FILES[key]}").PEER
    return found


def linear(
    names: Sequence[str], shapes: Sequence[Shape], threads: int, compiled: bool = False, seed: int = 0
) -> list[Contender]:
    """The peers' ways to run a linear layer, for shapes that share a weight."""
    weight, inputs = numbers(shapes, seed=seed)
    count = copies(weight)

    def prepare(make: Callable[[Tensor], Bind]) -> dict[str, Task]:
        return tasks(inputs, [make(weight) for _ in range(count)], None)

    made = []
    for peer in map(get, names):
        ways = peer.layers(threads) if peer.layers else {peer.name: partial(_unable, "runs whole models only")}
        made += _contenders(peer, ways, prepare, compiled)
    return made


def language(
    names: Sequence[str], model: nn.Module, prompt: Prompt, threads: int, folder: Path, compiled: bool = False
) -> list[Contender]:
    """The peers' ways to run a language model; ``folder`` takes the files that some of them need."""
    made = []
    for peer in map(get, names):
        ways = peer.models() if peer.models else {peer.name: partial(_unable, "is measured on linear layers only")}
        setting = Setting(model, prompt, threads, folder / peer.module)
        made += _contenders(peer, ways, partial(_made, setting), compiled)
    return made


def _contenders(
    peer: Peer,
    ways: Mapping[str, Callable[[Any], Any]],
    prepare: Callable[[Callable[[Any], Any]], Mapping[str, Task]],
    compiled: bool,
) -> list[Contender]:
    if not peer.installed:
        return [Contender(peer.name, partial(_unable, f"is not installed: {peer.install}", None))]
    chosen = {name: make for name, make in ways.items() if compiled or not name.endswith(COMPILED)}
    return [Contender(name, partial(prepare, make)) for name, make in chosen.items()]


def _made(setting: Setting, make: Callable[[Setting], Mapping[str, Task]]) -> Mapping[str, Task]:
    return make(setting)


def _unable(why: str, _: Any) -> Any:
    raise OctavoError(why)
