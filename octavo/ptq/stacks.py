"""Layers that engines run as one matrix, and that share a scale wherever a scheme has one for the whole weight.

vLLM stacks the projections to queries, keys and values, and the two that a gated MLP starts with. Of a stack's scales
it keeps the largest, and rounds codes that were made with others a second time. With one scale for all of them from the
start, what an engine runs is what was measured here. Which layers read the same tensor does not tell: engines go by
names, and so does this.
"""

from collections.abc import Iterable

from octavo.calibration.observer import Observer
from octavo.core.granularity import PerTensor
from octavo.core.scaling import Constant
from octavo.core.schemes import Scheme
from octavo.nn.swap import Layer

#: The last parts of names under one parent: Llama's and its heirs', BERT's, Mixtral's.
STACKED = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))
_STACK_OF = {name: names for names in STACKED for name in names}


def stacks(chosen: Iterable[tuple[Layer, Scheme]]) -> list[list[Layer]]:
    """The layers with one scale for the whole weight that are stacked under one scheme; at least two together."""
    found: dict[tuple[str, tuple[str, ...], Scheme, int], list[Layer]] = {}
    for layer, scheme in chosen:
        parent, _, own = layer.name.rpartition(".")
        weight = scheme.weight
        alone = weight.granularity != PerTensor() or isinstance(weight.scale, Constant) or layer.weight.numel() == 0
        if own in _STACK_OF and not alone:
            found.setdefault((parent, _STACK_OF[own], scheme, layer.matrix.shape[1]), []).append(layer)
    return [layers for layers in found.values() if len(layers) > 1]


def siblings(names: Iterable[str]) -> list[list[str]]:
    """The names of layers that are stacked, those of one stack together; at least two."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        if own in _STACK_OF:
            found.setdefault((parent, _STACK_OF[own]), []).append(name)
    return [together for together in found.values() if len(together) > 1]


def watch(stack: list[Layer], observer: Observer) -> Observer:
    """A fresh observer of that kind that has seen all weights of the stack."""
    watcher = observer.fresh(PerTensor())
    for layer in stack:
        watcher.update(layer.matrix)
    return watcher
