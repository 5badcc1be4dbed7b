"""Loading through transformers, with nothing silent and no noise.

transformers logs what it had to make up (missing tensors are filled with random numbers) and goes on. Here a model is
whole or it is an error: every tensor the model needs came from the file, with its own shape, and no layer's tensor was
left unused. Progress bars and reports are kept off the terminal; any other warning comes back as an OctavoWarning.
"""

import importlib
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from octavo.errors import OctavoError, OctavoWarning
from octavo.io.safe_files import TensorInfo, brief, listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_LAYERS = 1000
_RECOMPUTED = re.compile(r"(^|\.)(position_ids|inv_freq|num_batches_tracked|masked_bias)$")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_REPORT = "LOAD REPORT"


def require(module: str) -> ModuleType:
    """An optional dependency, or how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise OctavoError(f"This needs {module} ({brief(error)}): pip install 'octavo[cli]'") from None


def load(
    what: object, model_class: Any, config: Any, tensors: Iterable[TensorInfo], **arguments: Any
) -> "PreTrainedModel":
    """`model_class.from_pretrained(**arguments)` in eval mode, proved whole."""
    tensors = list(tensors)
    with transformers_on(what):
        _check_size(what, model_class, config, tensors)
        model, info = model_class.from_pretrained(
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are named below
            local_files_only=True,
            trust_remote_code=False,
            **arguments,
        )
    _check_whole(what, model, info)
    loaded: PreTrainedModel = model.eval()
    return loaded


@contextmanager
def transformers_on(what: object) -> Iterator[None]:
    """Keep transformers quiet; its failures name `what`, and its warnings come back once it has succeeded."""
    hub = require("transformers.utils.logging")
    logger = hub.get_logger()
    collector = _Collector(logging.WARNING)
    handlers, propagate, bars = logger.handlers[:], logger.propagate, hub.is_progress_bar_enabled()
    logger.handlers[:], logger.propagate = [collector], False
    hub.disable_progress_bar()
    try:
        with _no_gguf_bar():
            yield
    except OctavoError:
        raise
    except Exception as error:  # transformers raises anything on bad input
        reason = "; ".join(brief(problem) for problem in (error, *collector.reports()))
        raise OctavoError(
            f"{what}: transformers cannot load it ({reason}). Check the file or download it again."
        ) from error
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate
        if bars:
            hub.enable_progress_bar()
    for text in collector.warnings():
        warnings.warn(f"{what}: {text}", OctavoWarning, stacklevel=4)


class _Collector(logging.Handler):
    """Holds log messages instead of printing them."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: dict[str, None] = {}  # in order, each once

    def emit(self, record: logging.LogRecord) -> None:
        self.messages[_ANSI.sub("", record.getMessage())] = None

    def reports(self) -> list[Exception]:
        return [Exception(text) for text in self.messages if _REPORT in text]

    def warnings(self) -> list[str]:
        return [text for text in self.messages if _REPORT not in text]


@contextmanager
def _no_gguf_bar() -> Iterator[None]:
    """Transformers' older GGUF reader draws a bar that no setting turns off."""
    reader: Any = None
    with suppress(ImportError):
        reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bar = getattr(reader, "tqdm", None)
    if bar is None:
        yield
        return
    reader.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        reader.tqdm = bar


def _check_size(what: object, model_class: Any, config: Any, tensors: list[TensorInfo]) -> None:
    """A config that describes far more than the file holds would fill the memory with random numbers first."""
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > max(MAX_LAYERS, len(tensors)):
        raise OctavoError(f"{what}: the configuration asks for {layers} layers, the file has {len(tensors)} tensors.")
    stored = sum(math.prod(info.shape) for info in tensors)
    try:
        with torch.device("meta"):
            model = model_class(config)
    except Exception:  # from_pretrained meets the same trouble, and it is reported there
        return
    needed = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    if needed > 2 * stored + 100_000_000:
        raise OctavoError(
            f"{what}: the configuration describes a model of {needed:,} numbers, the file holds {stored:,}. "
            "They do not belong together: download both again."
        )


def _check_whole(what: object, model: "PreTrainedModel", info: dict[str, Any]) -> None:
    """Raise for tensors that are missing, of another shape, or left over inside the model; warn of unused heads."""
    shapes = [f"{key} (file {list(file)}, model {list(own)})" for key, file, own in sorted(info["mismatched_keys"])]
    missing = sorted(key for key in info["missing_keys"] if not _RECOMPUTED.search(key))
    unused = sorted(key for key in info["unexpected_keys"] if not _RECOMPUTED.search(key))
    heads = [key for key in unused if _is_head(key, model)]
    left_over = [key for key in unused if key not in heads]
    problems = [
        f"{len(names)} tensors {words}: {listed(names)}"
        for names, words in (
            (shapes, "have another shape than the configuration says"),
            (missing, "are missing from the file"),
            (left_over, "in the file have no place in the model"),
        )
        if names
    ]
    if problems:
        raise OctavoError(
            f"{what}: the weights do not fit {type(model).__name__}. {'; '.join(problems)}. Check that config.json "
            "belongs to these weights and that its architectures names the class that was saved."
        )
    if heads:
        warnings.warn(
            f"{what}: {type(model).__name__} has no use for {len(heads)} tensors, left out: {listed(heads)}.",
            OctavoWarning,
            stacklevel=4,
        )


def _is_head(key: str, model: "PreTrainedModel") -> bool:
    """A whole module that this class lacks, like the pooler of BERT; not a layer, nor a part of a module it has."""
    parent = key.rpartition(".")[0]
    in_a_stack = any(part.isdigit() for part in key.split("."))
    return not in_a_stack and parent != "" and all(parent != name for name, _ in model.named_modules())
