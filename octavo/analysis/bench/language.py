"""A whole model by every scheme: a language model reads a prompt (prefill) and continues it (decode).

Both give the logits of the last token only. Decoding starts anew in every repeat from the same short prompt, whose
reading is not timed, and is fed given tokens: choosing them is no part of it. The compiled decoder has a static cache,
because a growing one would be compiled anew; the compiled prefill keeps none. All that is compiled is so in the same
way, whose library it may be.
"""

import copy
import inspect
import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.analysis.bench.linear import BASELINE, COMPILED, unit
from octavo.analysis.bench.race import Contender, Task, Work
from octavo.calibration.batches import enter
from octavo.core import schemes
from octavo.core.schemes import Scheme
from octavo.errors import OctavoError
from octavo.nn.embedding import QuantizedTable
from octavo.ptq.quantize import model_bytes, quantize_
from octavo.ptq.rules import Rule

PREFILL, DECODE, FORWARD = "prefill", "decode", "forward"
PROMPT, CONTEXT, NEW = 512, 64, 32  # tokens: read at once; before decoding; decoded
MEMORY = "/proc/meminfo"


@dataclass(frozen=True)
class Prompt:
    """Tokens [1, length]: all are read in prefill; ``new`` are decoded after the first ``context``."""

    ids: Tensor
    context: int
    new: int

    @property
    def length(self) -> int:
        """Tokens of a prefill."""
        return self.ids.shape[1]

    @property
    def fed(self) -> list[Tensor]:
        """What decoding is fed, a token [1, 1] a step; from the start again where the tokens end."""
        places = [(self.context + i) % self.length for i in range(self.new)]
        return [self.ids[:, place : place + 1] for place in places]


def prompt(model: Any, length: int | None = None, new: int | None = None, seed: int = 0) -> Prompt:
    """Random tokens of the model's vocabulary, as many as are asked for, or as are usual and the model can take."""
    settings = model.config.get_text_config()
    most = getattr(settings, "max_position_embeddings", None)
    most = most if isinstance(most, int) and most > 1 else max(PROMPT, length or 0, CONTEXT + (new or NEW))
    if (length or 1) > most:
        raise OctavoError(f"a prompt of {length} tokens is longer than the {most} that the model can take")
    if (new or 1) >= most:
        raise OctavoError(f"the model can take {most} tokens, a prompt among them, and cannot decode {new}")
    length = length or min(PROMPT, most)
    new = new or min(NEW, most - 1)
    context = max(1, min(CONTEXT, length, most - new))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, settings.vocab_size, (1, length), generator=generator)
    return Prompt(ids, context, new)


def is_causal(model: Any) -> bool:
    """Whether this is a transformers model that continues a text."""
    config = getattr(model, "config", None)
    return bool(
        config is not None
        and not getattr(config, "is_encoder_decoder", False)
        and callable(getattr(model, "can_generate", None))
        and model.can_generate()
    )


def work(task: "Prompt | Any") -> dict[str, Work]:
    """What is done, by task."""
    if isinstance(task, Prompt):
        return {PREFILL: Work(task.length, "tokens/s"), DECODE: Work(task.new, "tokens/s")}
    return {FORWARD: Work(1, "batches/s")}


@dataclass(frozen=True)
class Stored:
    """A model in a file, for several processes: it is mapped, so what they read of it lies in memory once."""

    file: Path

    @classmethod
    def of(cls, model: nn.Module, folder: Path) -> "Stored":
        """The model, written into the folder. Raises ``OctavoError`` where it cannot be written."""
        needed, free = model_bytes(model), shutil.disk_usage(folder).free
        if needed > free:
            raise OctavoError(f"{folder} has no room: the model takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free")
        file = folder / "model.pt"
        try:
            torch.save(model, file)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise OctavoError(
                f"{type(model).__name__} cannot be given to other processes, which compiled models and other libraries "
                f"have: {error}. Measure it without them, or make it of classes that can be imported"
            ) from None
        return cls(file)

    def load(self) -> Any:
        """The model: of equal numbers in every process."""
        return torch.load(self.file, mmap=True, weights_only=False)


def contenders(
    model: nn.Module, names: Sequence[str], task: "Prompt | Any", head: bool = False, device: str = "cpu"
) -> list[Contender]:
    """FP32, BF16 and every scheme of one model, which stays as it is.

    ``task`` is a ``Prompt``, or one batch for a model that is no language model. ``head`` quantizes the output head
    too.
    """
    ways = [(name, unit, partial(_ready, model, scheme, task, head, device)) for name, unit, scheme in _ways(names)]
    return [Contender(name, prepare, unit) for name, unit, prepare in ways]


def compiled(
    stored: Stored, names: Sequence[str], task: "Prompt | Any", head: bool = False, device: str = "cpu"
) -> list[Contender]:
    """The same under ``torch.compile``, each in a process of its own, with a copy of the model in its dtype."""
    return [
        Contender(
            f"{name}{COMPILED}",
            partial(_ready, stored, scheme, task, head, device, compiled=True),
            unit,
            f"{name}{COMPILED}{', head too' if head else ''}",
        )
        for name, unit, scheme in _ways(names)
    ]


def _ways(names: Sequence[str]) -> list[tuple[str, str, Scheme | torch.dtype]]:
    """Of every contender its name, the arithmetic that bounds it, and what the model becomes."""
    found: list[tuple[str, str, Scheme | torch.dtype]] = [("FP32", "FP32", torch.float32)]
    found.append((BASELINE, "BF16", torch.bfloat16))
    return found + [(schemes.describe(s), unit(s), s) for s in map(schemes.get, names)]


def _ready(
    source: "nn.Module | Stored",
    way: Scheme | torch.dtype,
    task: "Prompt | Any",
    head: bool,
    device: str,
    compiled: bool = False,
) -> dict[str, Task]:
    model = source.load() if isinstance(source, Stored) else source
    if isinstance(way, Scheme):
        data = [{"input_ids": task.ids} if isinstance(task, Prompt) else _as(task, torch.bfloat16)]
        return engine(eight_bit(_copy(model, torch.bfloat16, device), way, data, head), task, compiled)
    return engine(_copy(model, way, device), task, compiled)


def eight_bit(model: Any, scheme: Scheme, calibration: list[Any], head: bool) -> Any:
    """The model under the scheme, in place."""
    rules = [Rule(scheme)]
    if head:
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        names = [name for name, module in model.named_modules() if module is output]
        if not names:
            raise OctavoError(f"{type(model).__name__} has no output head to quantize")
        rules.insert(0, Rule(scheme, names[0]))
    quantize_(model, rules, calibration if scheme.static else None)
    return model


def engine(model: Any, task: "Prompt | Any", compiled: bool = False) -> dict[str, Task]:
    """What is timed of a torch model."""
    run = _compile(model) if compiled else model
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    if isinstance(task, Prompt):
        task = Prompt(task.ids.to(device), task.context, task.new)
        return {PREFILL: _prefill(model, run, task, compiled), DECODE: _decode(model, run, task, compiled)}
    args, named = _arguments(model, _as(task, _dtype(model)))
    return {FORWARD: Task(lambda: run(*args, **named))}


def _compile(model: Any) -> Any:
    """The model as one would compile it to serve it: nobody changes its modules meanwhile, so that no call looks at
    each of them again; and attention is matmuls, which on a CPU take half the time of torch's own attention.
    """
    if hasattr(model, "set_attn_implementation") and all(p.device.type == "cpu" for p in model.parameters()):
        model.set_attn_implementation("eager")
    unchanged: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    return torch.compile(model, dynamic=False, options=unchanged)


def _prefill(model: Any, run: Any, task: Prompt, compiled: bool) -> Task:
    last = _last_only(model)
    return Task(lambda: run(input_ids=task.ids, use_cache=not compiled, **last))


def _decode(model: Any, run: Any, task: Prompt, static: bool) -> Task:
    last, fed, context = _last_only(model), task.fed, task.ids[:, : task.context]
    kept: dict[str, Any] = {"cache": None}

    def before() -> None:
        told = {"past_key_values": _static_cache(model, task, kept["cache"])} if static else {}
        kept["cache"] = model(input_ids=context, use_cache=True, **told, **last).past_key_values

    def decode() -> None:
        for token in fed:
            run(input_ids=token, past_key_values=kept["cache"], use_cache=True, **last)

    return Task(decode, before, nbytes=_read_by_a_token(model, task.new))


def _arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """With what the model is called for a batch, found out by calling it once."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    watch = model.register_forward_pre_hook(lambda _, args, named: found.append((args, named)), with_kwargs=True)
    try:
        enter(model, batch)
    finally:
        watch.remove()
    return found[0]


def _static_cache(model: Any, task: Prompt, last: Any) -> Any:
    """An empty static cache: that of the turn before, if there is one, so that nothing is compiled anew."""
    if last is not None:
        last.reset()
        return last
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=task.context + task.new)


def _last_only(model: Any) -> dict[str, int]:
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _read_by_a_token(model: Any, tokens: int) -> float | None:
    """The bytes of all that every token multiplies with; None for experts, of which a token meets a few only."""
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding | QuantizedTable)]
    head = model.get_output_embeddings()
    looked_up = {
        id(t): t.nbytes for table in tables for t in (*table.parameters(recurse=False), *table.buffers(recurse=False))
    }
    multiplied = {id(t) for t in (*head.parameters(), *head.buffers())} if head is not None else set()
    unread = sum(size for key, size in looked_up.items() if key not in multiplied)
    return float(tokens) * (model_bytes(model) - unread)


def _copy(model: nn.Module, dtype: torch.dtype, device: str) -> Any:
    """A copy in another dtype. Raises ``OctavoError`` where there is no room for it."""
    needed, free = model_bytes(model), _free_memory()
    if free is not None and needed > free and device == "cpu":
        raise OctavoError(f"no memory: a copy of the model takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    return copy.deepcopy(model).to(device, dtype).eval()


def _free_memory() -> float | None:
    try:
        with open(MEMORY, encoding="ascii") as file:
            words = [line.split() for line in file if line.startswith("MemAvailable:")]
    except OSError:
        return None
    return 1024.0 * int(words[0][1]) if words else None


def _dtype(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def _as(batch: Any, dtype: torch.dtype | None) -> Any:
    """The batch with its floats in the model's dtype."""
    if isinstance(batch, Tensor):
        return batch.to(dtype) if dtype is not None and batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: _as(value, dtype) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_as(value, dtype) for value in batch)
    return batch
