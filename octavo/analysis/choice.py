"""What ``choose`` decides: a mix of schemes as rules, what it costs and saves, and how it was found.

Rules are the result; everything else is the evidence. A person may read the JSON, change a rule and give the list back
to ``quantize_``.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from octavo.analysis.comparison import opened, plain, record
from octavo.errors import OctavoError
from octavo.ptq.rules import Rule, rules_from_json, rules_to_json

Objective = Literal["time", "bytes"]


@dataclass(frozen=True)
class Decision:
    """What one layer became, by its candidate's name, and why.

    ``cost``: what ``compare`` found it to cost alone. ``bytes``, ``seconds``: of the layer then.
    """

    layer: str
    candidate: str
    reason: str
    cost: float
    bytes: int
    seconds: float | None


@dataclass(frozen=True)
class Step:
    """One mix that the search tried.

    ``what``: in words what was done. ``predicted``: the cost that the sum over layers foretells. ``loss``: the increase
    of the loss, measured on the search's data; ``error``: its standard error. ``within``: whether it keeps the budget.
    """

    what: str
    predicted: float
    loss: float
    divergence: float | None
    error: float
    bytes: int
    seconds: float | None
    within: bool


@dataclass(frozen=True)
class Choice:
    """A mix within the budget, or, where ``met`` is False, the one that comes nearest.

    ``verdict``: a sentence for people. ``engine``, ``objective``: for what it was chosen. ``budget``: the largest
    increase of the loss allowed. ``loss``: the float model's, ``increase`` the mix's above it, measured on the search's
    data, ``error`` that increase's standard error; ``predicted``: what the sum of the layers' costs foretold.
    ``bytes``, ``seconds``: of the quantizable layers before and after. ``pace``: seconds of the whole model for the
    search's largest batch, measured in turns before and after, where it runs here. ``costliest``: the layers that cost
    most.
    """

    rules: tuple[Rule, ...]
    verdict: str
    engine: str
    objective: Objective
    budget: float
    met: bool
    loss: float
    increase: float
    error: float
    predicted: float
    divergence: float | None
    bytes_before: int
    bytes_after: int
    seconds_before: float | None
    seconds_after: float | None
    steps: tuple[Step, ...]
    decisions: tuple[Decision, ...]
    costliest: tuple[str, ...] = ()
    pace_before: float | None = None
    pace_after: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def unchanged(self) -> bool:
        """Whether every layer stays as it is."""
        return all(rule.scheme is None for rule in self.rules)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``."""
        content = plain(asdict(self) | {"rules": []})
        return {"octavo": "choice", **content, "rules": rules_to_json(self.rules)}

    @staticmethod
    def from_json(document: Any) -> "Choice":
        """What ``to_json`` was given. Raises ``OctavoError`` for anything else."""
        content = opened(document, "choice")
        try:
            parts: dict[str, Any] = {
                "rules": tuple(rules_from_json(content["rules"])),
                "steps": tuple(record(Step, step) for step in content["steps"]),
                "decisions": tuple(record(Decision, decision) for decision in content["decisions"]),
            }
            return record(Choice, content | parts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OctavoError(f"the choice is damaged: {type(error).__name__}: {error}") from error
