"""Models, data and measures that live in Python code of the user's: ``package.module:name``.

This is how a network that no checkpoint format describes comes to the command line: a function that makes it, another
that yields batches, a third that judges it. Modules are found as ``python -m`` finds them: in the current folder, then
on ``sys.path``. Importing one runs it, so a name of this form is only ever taken from the user, never out of a file.
What such code prints goes to stderr, because stdout is for results.
"""

import difflib
import importlib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from typing import Any

from torch import Tensor, nn

from octavo.errors import OctavoError

_FORM = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*(?:\.[^\W\d]\w*)*)")


def is_entry_point(text: str) -> bool:
    """Whether this reads ``module:name``, and nothing on this disk is called so."""
    return _FORM.fullmatch(text) is not None and not os.path.exists(text)


def find(text: str) -> Any:
    """What is called so. Raises ``OctavoError`` that says whether the module or the name in it is missing."""
    form = _FORM.fullmatch(text)
    if form is None:
        raise OctavoError(f"{text!r} is not of the form package.module:function")
    module_name, path = form.groups()
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    with redirect_stdout(sys.stderr):
        found = _module(module_name, text)
    for name in path.split("."):
        if not hasattr(found, name):
            near = difflib.get_close_matches(name, dir(found), n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise OctavoError(f"{text}: {module_name} has no {path}.{hint}")
        found = getattr(found, name)
    return found


def model(text: str) -> tuple[nn.Module, Any]:
    """The model that ``text`` names, in eval mode, and the batches that came with it, or None.

    It names a function without arguments that returns an ``nn.Module`` or ``(nn.Module, batches)``; or a module.
    """
    found = find(text)
    if not isinstance(found, nn.Module):
        found = _call(text, found)
    made, batches = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(made, nn.Module):
        raise OctavoError(f"{text} returned {_kind(found)}, not an nn.Module or (nn.Module, batches)")
    return made.eval(), None if batches is None else _batches(text, batches)


def data(text: str) -> Iterable[Any]:
    """The batches that ``text`` names: an iterable, or a function without arguments that returns one."""
    found = find(text)
    return _batches(text, found if not callable(found) else _call(text, found))


def measure(text: str) -> Callable[[nn.Module], float]:
    """The function that ``text`` names, which takes a model and returns one number; it is checked at each call."""
    found = find(text)
    if not callable(found):
        raise OctavoError(f"{text} is {_kind(found)}, not a function that takes the model and returns a number")

    def judge(model: nn.Module) -> float:
        score = _call(text, found, model)
        if isinstance(score, Tensor) and score.numel() == 1:
            score = score.item()
        if isinstance(score, bool) or not hasattr(score, "__float__") or isinstance(score, Tensor):
            raise OctavoError(f"{text} returned {_kind(score)}, not one number")
        if math.isnan(float(score)):
            raise OctavoError(f"{text} returned NaN: the model's results, or the data, hold no numbers")
        return float(score)

    return judge


def _module(name: str, text: str) -> Any:
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        whole = ".".join(parts[:depth])
        try:
            if importlib.util.find_spec(whole) is None:
                raise OctavoError(f"{text}: there is no module {whole}.{_near(parts, depth)}")
        except (ImportError, AttributeError, ValueError) as error:  # a parent that is no package, or fails
            raise OctavoError(f"{text}: {whole} cannot be imported: {error}") from error
        except OctavoError:
            raise
        except Exception as error:
            raise _failed(f"{text}: importing {whole}", error) from error
    try:
        return importlib.import_module(name)
    except OctavoError:
        raise
    except Exception as error:
        raise _failed(f"{text}: importing {name}", error) from error


def _near(parts: list[str], depth: int) -> str:
    """A module of nearly that name, if it lies in the current folder or in the package that was found."""
    if depth == 1:
        places = [os.getcwd()]
    else:
        places = list(getattr(sys.modules.get(".".join(parts[: depth - 1])), "__path__", []))
    files = [entry for place in places if os.path.isdir(place) for entry in os.listdir(place)]
    names = {file.removesuffix(".py") for file in files if file.endswith(".py") or "." not in file}
    near = difflib.get_close_matches(parts[depth - 1], names, n=1)
    if near:
        return f" Did you mean {'.'.join([*parts[: depth - 1], near[0]])}?"
    return f" Modules are looked for in {os.getcwd()} and on PYTHONPATH." if depth == 1 else ""


def _call(text: str, found: Any, *arguments: Any) -> Any:
    if not callable(found):
        raise OctavoError(f"{text} is {_kind(found)}, not a function")
    try:
        with redirect_stdout(sys.stderr):
            return found(*arguments)
    except OctavoError:
        raise
    except Exception as error:
        raise _failed(text, error) from error


def _batches(text: str, batches: Any) -> Iterable[Any]:
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise OctavoError(f"{text} gave {_kind(batches)} for data, not an iterable of batches, as a list or DataLoader")
    return batches


def _failed(what: str, error: Exception) -> OctavoError:
    return OctavoError(
        f"{what} failed with {type(error).__name__}: {error or 'no message'} (OCTAVO_DEBUG=1 shows where)"
    )


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(_kind(item) for item in value)})"
    return "None" if value is None else f"a {type(value).__name__}"
