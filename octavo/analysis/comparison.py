"""What ``compare`` finds out: for every layer and every candidate what it would cost and save, as plain records.

A candidate is one way to run a layer. The first of every comparison is the layer as it is. A cell is one layer under
one candidate, all other layers as they are; an outcome is the whole model under one candidate.

Two figures say what a candidate costs. ``loss`` is by how much the model's loss grows, in its own units (nats a token
for language models, where 0.003 are 0.3 % of perplexity). ``divergence`` is how far the results move: for language
models the Kullback-Leibler divergence of the next token's distribution, in nats. A loss may shrink by chance, and does
where rounding hardly matters; a divergence never does, so it orders the candidates with far less data.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from octavo.core import records
from octavo.core.schemes import Scheme, describe
from octavo.errors import OctavoError
from octavo.ptq.rules import Rounding

AS_IT_IS = "as it is"
T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    """One way to run a layer: ``scheme`` (None: as it is), SmoothQuant's α for its input, how its weight is rounded."""

    scheme: Scheme | None
    smooth: float | None = None
    rounding: Rounding = "nearest"

    @property
    def name(self) -> str:
        """In words, different for different candidates: ``int8-dynamic, smooth 0.5, gptq``."""
        if self.scheme is None:
            return AS_IT_IS
        smooth = [] if self.smooth is None else [f"smooth {self.smooth:g}"]
        return ", ".join([describe(self.scheme), *smooth, *([] if self.rounding == "nearest" else [self.rounding])])


@dataclass(frozen=True)
class ComparedLayer:
    """A layer that can be quantized, under all its names.

    ``shape``: its weight as a matrix [out, in]. ``parameters``, ``bytes``: of the weight alone, and all there is.
    ``calls``: how often it ran over all of the data; 0 means no data reached it. ``rows``: the tokens (or patches) of
    its largest call. ``seconds``: of that call here, in float.
    """

    name: str
    names: tuple[str, ...]
    kind: str
    shape: tuple[int, int]
    parameters: int
    bytes: int
    calls: int
    rows: int
    seconds: float | None = None


@dataclass(frozen=True)
class Cell:
    """One layer under one candidate (its name), while all others are as they are.

    ``weight_sqnr``, ``output_sqnr``: dB, infinite where nothing changed. ``bytes``, ``seconds``: of this layer then, a
    call of the size that ``ComparedLayer.rows`` says, and the fastest of some runs, which could be repeated to the
    share ``spread``. ``excluded``: in words why the layer cannot or must not run so; then figures that are not known
    are None.
    """

    layer: str
    candidate: str
    weight_sqnr: float | None = None
    output_sqnr: float | None = None
    loss: float | None = None
    divergence: float | None = None
    bytes: int | None = None
    seconds: float | None = None
    excluded: str | None = None
    spread: float | None = None

    @property
    def cost(self) -> float:
        """What the search adds up: the divergence, or the loss where the model is judged by a loss alone."""
        if self.excluded is not None:
            return math.inf
        known = self.loss if self.divergence is None else self.divergence
        return math.inf if known is None else known


@dataclass(frozen=True)
class Outcome:
    """The whole model under one candidate: its loss and perplexity (not their increase), bytes, and seconds.

    ``error``: the standard error of the loss's increase. ``seconds``: of one pass over the data's largest batch, the
    fastest of a few here. ``left``: layers that the candidate excludes, which stayed as they are.
    """

    candidate: str
    loss: float | None = None
    perplexity: float | None = None
    divergence: float | None = None
    error: float | None = None
    bytes: int | None = None
    seconds: float | None = None
    left: tuple[str, ...] = ()
    excluded: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Every layer × candidate, and the whole model under each.

    ``model``, ``data``, ``machine``: in words. ``loss``, ``perplexity``: of the model as it is (None: not judged so).
    ``divergence``: in words what the divergences are. ``seconds``: what the comparison took, by its parts.
    """

    model: str
    data: str
    machine: str
    loss: float | None
    perplexity: float | None
    divergence: str | None
    bytes: int
    layers: tuple[ComparedLayer, ...]
    candidates: tuple[Candidate, ...]
    cells: tuple[Cell, ...]
    outcomes: tuple[Outcome, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def cell(self, layer: str, candidate: "Candidate | str") -> Cell:
        """One layer under one candidate. Raises ``OctavoError`` if they were not compared."""
        wanted = candidate if isinstance(candidate, str) else candidate.name
        for found in self.cells:
            if found.layer == layer and found.candidate == wanted:
                return found
        raise OctavoError(f"{layer} was not compared under {wanted}")

    def candidate(self, name: str) -> Candidate:
        """The candidate of that name."""
        for found in self.candidates:
            if found.name == name:
                return found
        raise OctavoError(f"no candidate is called {name!r}; there are {', '.join(c.name for c in self.candidates)}")

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``; an infinite number is the string "inf"."""
        content = plain(asdict(self) | {"candidates": []})
        candidates = [candidate_to_json(candidate) for candidate in self.candidates]
        return {"octavo": "comparison", **content, "candidates": candidates}

    @staticmethod
    def from_json(document: Any) -> "Comparison":
        """What ``to_json`` was given. Raises ``OctavoError`` for anything else."""
        content = opened(document, "comparison")
        try:
            parts: dict[str, Any] = {
                "layers": tuple(record(ComparedLayer, layer) for layer in content["layers"]),
                "candidates": tuple(candidate_from_json(candidate) for candidate in content["candidates"]),
                "cells": tuple(record(Cell, cell) for cell in content["cells"]),
                "outcomes": tuple(record(Outcome, outcome) for outcome in content["outcomes"]),
            }
            return record(Comparison, content | parts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OctavoError(f"the comparison is damaged: {type(error).__name__}: {error}") from error


def candidate_to_json(candidate: Candidate) -> dict[str, Any]:
    """A candidate as plain data; ``name`` is there for readers."""
    scheme = records.to_json(candidate.scheme)
    return {"name": candidate.name, "scheme": scheme, "smooth": candidate.smooth, "rounding": candidate.rounding}


def candidate_from_json(content: Mapping[str, Any]) -> Candidate:
    """What ``candidate_to_json`` was given."""
    return Candidate(records.from_json(content["scheme"]), content["smooth"], content["rounding"])


def opened(document: Any, kind: str) -> dict[str, Any]:
    """The content of a document of ours. Raises ``OctavoError`` if it is of another kind."""
    if not isinstance(document, Mapping) or document.get("octavo") != kind:
        raise OctavoError(f"this is not a {kind} that Octavo wrote")
    return {str(key): value for key, value in document.items() if key != "octavo"}


def record(cls: type[T], content: Mapping[str, Any]) -> T:
    """A flat record of its plain data: lists as tuples, "inf" as infinity."""
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    if odd := content.keys() - known:
        raise OctavoError(f"a {cls.__name__} has no {', '.join(sorted(odd))}")
    return cls(**{key: _number(value) for key, value in content.items()})


def plain(value: Any) -> Any:
    """Data that JSON can hold: tuples as lists, numbers that are not finite as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_number(item) for item in value)
    return float(value) if value in ("inf", "-inf", "nan") else value
