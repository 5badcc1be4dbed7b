"""A float model as a graph of torch's own operators, by ``torch.export``: modules, functions and methods look the same.

The model runs once with stand-ins for tensors. Sizes of the input stay symbols where the model allows it, what works in
place becomes a function, and what does nothing in eval mode (dropout, copies) is taken out. Every node still knows the
module and the line of Python it comes from.
"""

import inspect
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from octavo.calibration.batches import Call, enter, evaluating
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_COPIES = ("clone", "detach", "alias", "contiguous", "lift_fresh_copy")
_CASTS = ("to", "_to_copy", "type_as")  # between floats: arithmetic has its own precision


@dataclass(frozen=True)
class Exported:
    """A model's graph. Its placeholders are parameters and buffers, whose tensors are in ``state``, and ``inputs``.

    ``inputs``: by name of the argument. ``result``: what the model returns, in lists, tuples and dicts, with the place
    of each tensor in the graph's output instead of the tensor.
    """

    module: fx.GraphModule
    state: dict[fx.Node, Tensor]
    inputs: dict[str, fx.Node]
    result: Any

    @property
    def outputs(self) -> list[Any]:
        """What the graph returns: nodes, or constants."""
        return list(self.module.graph.output_node().args[0])  # type: ignore[arg-type]

    def arguments(self, tensors: Mapping[str, Tensor]) -> list[Tensor | None]:
        """What the graph takes, in its order, for these inputs."""
        given = self.state | {node: tensors[name] for name, node in self.inputs.items()}
        return [given.get(node) for node in self.module.graph.find_nodes(op="placeholder")]


def export(
    model: nn.Module, tensors: Mapping[str, Tensor], others: Mapping[str, Any], only_batch: bool = False
) -> Exported:
    """Follow the model in eval mode on example arguments: tensors, whose sizes may vary, and others, which may not.

    ``only_batch``: of the sizes only the first may vary. Where the model allows one size only, it is that one.
    Raises ``OctavoError`` for a model that torch.export cannot follow: one whose path depends on its data.
    """
    if all(x.dim() and x.shape[0] == 1 for x in tensors.values()):  # export takes a size of one for a constant
        tensors = {name: x.repeat(2, *(1,) * (x.dim() - 1)) for name, x in tensors.items()}
    try:
        program = _export(model, tensors, others, only_batch)
    except Exception as error:  # it runs the model's own code with stand-ins for tensors: anything may come of it
        text = " ".join(str(error).split())
        raise OctavoError(
            f"torch.export cannot follow {type(model).__name__} ({type(error).__name__}: {text[:300]}); integer-only "
            "inference needs a model whose path does not depend on its data"
        ) from error
    return _cleaned(program, tensors)


def arguments(model: nn.Module, batch: Any, call: Call | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arguments with which a batch enters the model, by name: tensors, and others. The model does not run."""
    if isinstance(model, torch.jit.ScriptModule):
        raise OctavoError("the model is scripted, which torch.export cannot follow; pass the module it was made from")

    class Entered(Exception):
        pass

    caught: list[dict[str, Any]] = []

    def catch(module: nn.Module, args: Any, kwargs: Any) -> None:
        try:
            given = inspect.signature(module.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise OctavoError(f"the batch does not fit {type(model).__name__}.forward: {error}") from error
        found: dict[str, Any] = {}
        for name, value in given.arguments.items():
            kind = given.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                found |= value
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                raise OctavoError(f"{type(model).__name__}.forward takes *{name}, whose parts have no names; wrap it")
            else:
                found[name] = value
        caught.append(found)
        raise Entered

    handle = model.register_forward_pre_hook(catch, prepend=True, with_kwargs=True)
    try:
        enter(model, batch, call)
    except Entered:
        pass
    finally:
        handle.remove()
    if not caught:
        raise OctavoError("the model was not called with the batch; let call=… call it")
    tensors = {name: value for name, value in caught[0].items() if isinstance(value, Tensor)}
    others = {name: value for name, value in caught[0].items() if name not in tensors}
    for name, value in others.items():
        if not isinstance(value, bool | int | float | str | None):
            raise OctavoError(
                f"the argument {name} is a {type(value).__name__}; a model on integers takes tensors only"
            )
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise OctavoError(f"the argument {name} is {x.dtype}; a model on integers takes float tensors")
    if not tensors:
        raise OctavoError("the model was called without a tensor")
    return tensors, others


def where(node: fx.Node) -> str:
    """What a node is, for people: its module, its operator, its line of Python."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", "")
    path = path if isinstance(path, str) and not path.startswith("_empty") else ""
    kind = (kind if isinstance(kind, str) else getattr(kind, "__name__", "")).rpartition(".")[2]
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [(file, line) for file, line in lines if not file.startswith(os.path.dirname(torch.__file__))]
    told = f"{path} ({operator_name(node)})" if path else operator_name(node)
    if own:
        file, line = own[-1]
        told += f" at {os.path.basename(file)}:{line}"
    return told if not kind or path else f"{told} in {kind}"


def operator_name(node: fx.Node) -> str:
    """``conv2d`` for ``aten.conv2d.default``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.removeprefix("aten::")
    return str(getattr(target, "__name__", target))


def sizes(node: fx.Node) -> list[int | str]:
    """The shape of what a node makes; sizes that may vary are words, equal ones for equal sizes."""
    return [int(str(n)) if str(n).isdigit() else str(n) for n in node.meta["val"].shape]


def bound(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by the names that its operator's schema gives them, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    expected = node.target._schema.arguments
    given = {a.name: a.default_value for a in expected if a.has_default_value()}
    given |= dict(zip((a.name for a in expected), node.args, strict=False))
    given |= node.kwargs
    return {a.name: given[a.name] for a in expected}


def _export(
    model: nn.Module, tensors: Mapping[str, Tensor], others: Mapping[str, Any], only_batch: bool
) -> "ExportedProgram":
    from torch.export import Dim, ExportedProgram, export  # late: it takes a second

    free = {
        name: {dim: Dim.AUTO for dim, n in enumerate(x.shape) if n > 1 and (dim == 0 or not only_batch)}
        for name, x in tensors.items()
    }
    named = {**tensors, **others}
    parameters = inspect.signature(model.forward).parameters.values()
    args = [named.pop(p.name) for p in parameters if p.kind is p.POSITIONAL_ONLY and p.name in named]
    with evaluating(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from torch to itself
        program = export(model, tuple(args), named, dynamic_shapes={**free, **dict.fromkeys(others)}, strict=False)
        functional: ExportedProgram = program.run_decompositions({})
    return functional


def _cleaned(program: "ExportedProgram", names: Iterable[str]) -> Exported:
    graph = program.graph_module.graph
    nodes = {node.name: node for node in graph.find_nodes(op="placeholder")}
    tensors = {**program.state_dict, **program.constants}
    state = {nodes[s.arg.name]: tensors[s.target] for s in program.graph_signature.input_specs if s.target is not None}
    changed = [s.target for s in program.graph_signature.output_specs if s.target is not None]
    if changed:
        raise OctavoError(f"the model changes its {changed[0]} while it runs; integer-only inference keeps no state")
    for node in list(graph.nodes):
        if node.op == "call_function" and _does_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif operator_name(node) in ("view", "_unsafe_view"):  # without the copies, strides may be others
            node.target = torch.ops.aten.reshape.default
    graph.eliminate_dead_code()
    spec = program.call_spec.out_spec
    assert spec is not None
    result = _plain(pytree.tree_unflatten(range(spec.num_leaves), spec))
    return Exported(program.graph_module, state, {name: nodes[name] for name in names}, result)


def _does_nothing(node: fx.Node) -> bool:
    name = operator_name(node)
    if name in _CASTS:
        source = node.args[0]
        kinds = [x.meta["val"].dtype for x in (source, node) if isinstance(x, fx.Node)]
        return all(kind.is_floating_point for kind in kinds)
    if name == "slice":  # of everything
        before, after = (sizes(x) for x in (node.args[0], node) if isinstance(x, fx.Node))
        return before == after and node.args[4:] in ((), (1,))
    if name in ("dropout", "feature_dropout"):
        return not bound(node)["train"]
    return name in _COPIES


def _plain(tree: Any) -> Any:
    """What a model returns as lists, tuples and dicts."""
    if isinstance(tree, Mapping):  # transformers' outputs too
        return {str(key): _plain(part) for key, part in tree.items()}
    if isinstance(tree, list | tuple):
        return (list if isinstance(tree, list) else tuple)(map(_plain, tree))
    if isinstance(tree, int):
        return tree
    raise OctavoError(f"the model returns a {type(tree).__name__}; it can return tensors, lists, tuples and dicts")
