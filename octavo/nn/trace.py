"""Which module's result goes where, and to nothing else.

The model runs once on an example. A dispatch mode sees every operator that torch executes, and hooks tell in which
module it does: operators inside a module without children belong to that module, those in a container's own
``forward`` are functions of their own. So everything that reads a tensor counts: a residual add, a view, a functional
ReLU, a weight read past the layer that owns it, a result that is returned or kept. What does nothing (Identity, dropout
in eval mode) leaves no trace and stands between nobody.

``trace_symbolically`` asks ``torch.fx`` for the same without an example, for models that it can follow.

A trace is true for its example: a model whose path depends on its data may go elsewhere with other data.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from octavo.calibration.batches import Call, enter, evaluating
from octavo.errors import OctavoError


@dataclass(eq=False)
class Step:
    """One step of a pass through the model, and its neighbours in the flow of data.

    ``kind`` and ``name``: a ``module`` that ran (its dotted name), a ``function`` (the operator's), a ``state`` (that
    of a parameter or buffer), or the ``output``, which reads whatever outlives the pass. ``shape``: of what the step
    made last, if that is known.
    """

    kind: Literal["module", "function", "state", "output"]
    name: str
    reads: "list[Step]" = field(default_factory=list, repr=False)
    readers: "list[Step]" = field(default_factory=list, repr=False)
    shape: torch.Size | None = None

    @property
    def inputs(self) -> "list[Step]":
        """What it reads beside parameters and buffers; empty at the start of the model."""
        return [step for step in self.reads if step.kind != "state"]

    def read(self, other: "Step") -> None:
        """Note that this step reads a result of the other."""
        if other is not self and other not in self.reads:
            self.reads.append(other)
            other.readers.append(self)

    def __str__(self) -> str:
        return self.kind if self.kind == "output" else f"{self.kind} {self.name!r}"


@dataclass(frozen=True)
class Trace:
    """All steps of one pass in their order; parameters and buffers apart, under all their names."""

    steps: list[Step]
    state: dict[str, Step]

    def runs(self, module: str) -> list[Step]:
        """The times the module of that name ran; a module with several names goes by the first."""
        return [step for step in self.steps if step.kind == "module" and step.name == module]


def trace(model: nn.Module, example: Any, call: Call | None = None) -> Trace:
    """Run ``model`` once in eval mode on ``example``, a batch as for calibration, and note the flow of data.

    Modes, hooks, buffers and random states are as before afterwards; no result is kept. Raises ``OctavoError`` for a
    model with lazy parameters, which have no shape yet.
    """
    _refuse_lazy(model)
    recorder = _Recorder(_state(model))
    with evaluating(model), undisturbed(model), recorder.watching(model), torch.no_grad(), recorder:
        result = enter(model, example, call)
    if recorder.alive - _reached(result):
        gc.collect()  # what only a cycle keeps is nobody's result
    recorder.finish()
    del result  # until here: what was alive is returned or kept
    return Trace(recorder.steps, recorder.state)


def trace_symbolically(model: nn.Module) -> Trace:
    """The same from ``torch.fx``, without running the model. Shapes stay unknown, and Identity is a module like others.

    Raises ``OctavoError`` for a model that fx cannot follow, such as one whose path depends on its data.
    """
    _refuse_lazy(model)
    with evaluating(model):
        try:
            graph = _Tracer().trace(model)
        except Exception as error:  # fx runs the model's own code with stand-ins for tensors: anything may come of it
            raise OctavoError(
                f"torch.fx cannot follow {type(model).__name__} ({type(error).__name__}: {error}); give an example"
            ) from error
    state = {name: step for step, names, _ in _state(model) for name in names}
    steps: list[Step] = []
    made: dict[fx.Node, Step] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "get_attr":
            made[node] = state.setdefault(node.target, Step("state", node.target))
            continue
        if node.op == "call_module":
            step = Step("module", node.target)
            for name, _ in model.get_submodule(node.target).named_parameters():
                step.read(state[f"{node.target}.{name}"])
        elif node.op == "output":
            step = Step("output", "output")
        else:
            step = Step("function", node.target if isinstance(node.target, str) else node.target.__name__)
        for other in node.all_input_nodes:
            if other in made:
                step.read(made[other])
        steps.append(step)
        made[node] = step
    return Trace(steps, state)


class _Recorder(TorchDispatchMode):
    """Knows for every tensor alive which step made it, without keeping it alive."""

    supports_higher_order_operators = True

    def __init__(self, state: Iterable[tuple[Step, list[str], Tensor]]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.state: dict[str, Step] = {}
        self.inside: list[Step] = []  # the modules without children that are running now
        self.made = WeakTensorKeyDictionary()
        for step, names, tensor in state:
            self.state.update(dict.fromkeys(names, step))
            self.made[tensor] = step

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [self.made[x] for x in _tensors((args, kwargs)) if x in self.made]
        result = func(*args, **kwargs)
        if self.inside:
            step = self.inside[-1]
        elif read:
            step = self.begin("function", func.__name__.partition(".")[0])
        else:
            return result  # made of inputs and constants only
        for other in read:
            step.read(other)
        for number, x in enumerate(_tensors(result)):
            self.made[x] = step
            if number == 0:
                step.shape = x.shape
        return result

    def begin(self, kind: Literal["module", "function", "output"], name: str) -> Step:
        self.steps.append(Step(kind, name))
        return self.steps[-1]

    @property
    def alive(self) -> set[int]:
        """By ``id`` the results that somebody still holds."""
        return {id(x) for x, step in self.made.items() if step.kind != "state"}

    def finish(self) -> None:
        """What is still alive is the model's result, or something it keeps."""
        output = self.begin("output", "output")
        for step in list(self.made.values()):
            if step.kind != "state":
                output.read(step)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Hooks that say in which module an operator runs; hooks of others run outside of it."""

        def on_entry(name: str) -> Callable[..., None]:
            def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
                self.inside.append(self.begin("module", name))

            return begin

        def on_exit(name: str) -> Callable[..., None]:
            def leave(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
                if not self.inside or self.inside[-1].name != name:
                    return  # a hook before ours has raised
                step, arguments = self.inside.pop(), [*_tensors((args, kwargs))]
                if any(result is x for x in arguments):
                    return
                for x in arguments:  # a module may hand them to a foreign kernel, past torch's operators
                    if x in self.made:
                        step.read(self.made[x])
                for x in _tensors(result):
                    if x not in self.made:
                        self.made[x] = step

            return leave

        handles = []
        try:
            for name, module in model.named_modules():
                if is_atom(module) and "parametrizations" not in name.split("."):
                    handles.append(module.register_forward_pre_hook(on_entry(name), with_kwargs=True))
                    handles.append(
                        module.register_forward_hook(on_exit(name), prepend=True, with_kwargs=True, always_call=True)
                    )
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_atom(m)


def sharing(model: nn.Module, flow: Trace, run: Step) -> str | None:
    """Who else uses the parameters of the module that ran in this step, in words, or None."""
    layer = model.get_submodule(run.name)
    own = [parameter for parameter in layer._parameters.values() if parameter is not None]
    for name, module in model.named_modules():
        if module is not layer and any(p is q for p in own for q in module._parameters.values()):
            return f"{run.name} shares its weights with {name or 'the model itself'}"
    for attribute, parameter in layer._parameters.items():
        readers = [] if parameter is None else flow.state[f"{run.name}.{attribute}"].readers
        others = [str(reader) for reader in readers if reader is not run]
        if others:
            return f"the {attribute} of {run.name} is also read by the {' and '.join(others)}"
    return None


def is_atom(module: nn.Module) -> bool:
    """Whether operators inside the module count as the module: it has no children but what computes its weights.

    Scripted modules take no hooks; theirs count as functions.
    """
    childless = all(name == "parametrizations" for name, _ in module.named_children())
    return childless and not isinstance(module, torch.jit.ScriptModule)


def _state(model: nn.Module) -> list[tuple[Step, list[str], Tensor]]:
    """Every parameter and buffer once, with all its names."""
    found: dict[Tensor, tuple[Step, list[str], Tensor]] = {}
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            found.setdefault(tensor, (Step("state", name), [], tensor))[1].append(name)
    return list(found.values())


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results, which come in lists at most."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _reached(result: Any) -> set[int]:
    """By ``id`` all that a result holds, in whatever objects."""
    found: dict[int, Any] = {}
    queue = [result]
    while queue:
        x = queue.pop()
        if found.setdefault(id(x), x) is x and not isinstance(x, Tensor | nn.Module | type | ModuleType | FunctionType):
            queue += [y for y in gc.get_referents(x) if id(y) not in found]
    return set(found)


def _refuse_lazy(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise OctavoError(f"{name} has no shape yet (a lazy module); run the model once on real data first")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Afterwards all buffers hold what they held, under their names, and random numbers go on as if nothing had run."""
    before = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    copies = {buffer: buffer.detach().clone() for _, _, buffer in before if buffer is not None}
    gpus = {tensor.get_device() for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    with torch.random.fork_rng(sorted(gpus)):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer in before:
                    module._buffers[name] = buffer
                    if buffer is not None and not buffer.is_meta and not torch.equal(buffer, copies[buffer]):
                        buffer.copy_(copies[buffer])
