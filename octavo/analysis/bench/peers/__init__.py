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

from octavo.analysis.bench.language import Prompt, Stored
from octavo.analysis.bench.linear import COMPILED, Bind, Shape, copies, numbers, tasks
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
    count = copies(numbers(shapes[:1], seed=seed)[0])
    made = []
    for peer in map(get, names):
        ways = list(peer.layers(threads)) if peer.layers else []
        prepare = partial(_layers, peer.name, list(shapes), count, threads, seed)
        made += _contenders(peer, ways, prepare, compiled, "runs whole models only")
    return made


def language(
    names: Sequence[str], stored: Stored, prompt: Prompt, threads: int, compiled: bool = False
) -> list[Contender]:
    """The peers' ways to run a language model; files that some of them need lie beside the model's."""
    made = []
    for peer in map(get, names):
        ways = list(peer.models()) if peer.models else []
        prepare = partial(_model, peer.name, stored, prompt, threads)
        made += _contenders(peer, ways, prepare, compiled, "is measured on linear layers only")
    return made


def _contenders(
    peer: Peer, ways: Sequence[str], prepare: Callable[[str], Mapping[str, Task]], compiled: bool, without: str
) -> list[Contender]:
    """A contender a way, each in the peer's process, or in its own if it is compiled."""
    if not peer.installed:
        return [Contender(peer.name, partial(_unable, f"is not installed: {peer.install}"))]
    if not ways:
        return [Contender(peer.name, partial(_unable, without))]
    chosen = [way for way in ways if compiled or not way.endswith(COMPILED)]
    homes = [way if way.endswith(COMPILED) else peer.name for way in chosen]
    return [Contender(way, partial(prepare, way), home=home) for way, home in zip(chosen, homes, strict=True)]


def _layers(name: str, shapes: Sequence[Shape], count: int, threads: int, seed: int, way: str) -> dict[str, Task]:
    weight, inputs = numbers(shapes, seed=seed)
    ways = get(name).layers
    assert ways is not None
    make = ways(threads)[way]
    return tasks(inputs, [make(weight) for _ in range(count)], None)


def _model(name: str, stored: Stored, prompt: Prompt, threads: int, way: str) -> Mapping[str, Task]:
    peer = get(name)
    assert peer.models is not None
    return peer.models()[way](Setting(stored.load(), prompt, threads, stored.file.parent / peer.module))


def _unable(why: str) -> Any:
    raise OctavoError(why)
