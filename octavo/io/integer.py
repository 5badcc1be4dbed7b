"""A model on integers as a folder: its operations and encodings as JSON, its codes and biases as safetensors.

``octavo.json`` holds all that is no tensor, ``octavo.safetensors`` the rest: plain integers, and the scales of weights.
Multipliers and shifts are not in there: they follow from the scales, by ``core.requantize.fixed_point``.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from octavo.errors import OctavoError
from octavo.io import safe_files
from octavo.io.folder import atomic_folder, did_you_mean
from octavo.nn.integer.encoding import Encoding
from octavo.nn.integer.model import OPS, Input, IntegerModel
from octavo.nn.integer.op import IntegerOp

MANIFEST = "octavo.json"
LAYOUT = "integer"
VERSION = 1


def save_integer(model: IntegerModel, folder: str | os.PathLike[str], force: bool = False) -> None:
    """Write the model as a folder, whole or not at all.

    Raises ``OctavoError`` if ``folder`` is not empty and ``force`` is not given, or cannot be written.
    """
    from safetensors.torch import save_file

    operations = [operation for operation in model.operations if isinstance(operation, IntegerOp)]
    manifest = {
        "version": VERSION,
        "layout": LAYOUT,
        "inputs": [{"name": x.name, "encoding": x.encoding.to_json(), "shape": x.shape} for x in model.inputs],
        "operations": [
            {"name": name, "takes": takes, **operation.to_json()}
            for name, takes, operation in zip(model.names, model.wiring, operations, strict=True)
        ],
        "result": _to_json(model.result),
    }
    with atomic_folder(folder, force) as unfinished:
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1))
        tensors = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
        save_file(tensors, unfinished / safe_files.OWN)


def load_integer(folder: str | os.PathLike[str]) -> IntegerModel:
    """Open a folder that ``save_integer`` wrote; every code that it computes is the same.

    Raises ``OctavoError`` for anything else, and for files that are damaged or do not fit together.
    """
    path = Path(folder)
    if not path.is_dir():
        raise OctavoError(f"{path}: no such folder.{did_you_mean(path)}")
    manifest = safe_files.read_json(path / MANIFEST)
    if manifest.get("layout") != LAYOUT:
        raise OctavoError(f"{path} is no model on integers, as octavo.integer_only makes them; try octavo.load")
    tensors = dict(safe_files.read(path))
    try:
        if manifest["version"] != VERSION:
            raise OctavoError(f"it is of version {manifest['version']}, this is Octavo for version {VERSION}")
        model = _model(manifest, tensors)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError, ArithmeticError) as error:
        raise OctavoError(f"{path} is damaged: {type(error).__name__} {safe_files.brief(error)}") from error
    except OctavoError as error:
        raise OctavoError(f"{path} is damaged: {safe_files.brief(error)}") from error
    return model.eval()


def _model(manifest: Mapping[str, Any], tensors: dict[str, Tensor]) -> IntegerModel:
    inputs = [
        Input(
            str(x["name"]),
            Encoding.from_json(x["encoding"]),
            tuple(n if type(n) is int else str(n) for n in x["shape"]),
        )
        for x in manifest["inputs"]
    ]
    told = manifest["operations"]
    operations = []
    for number, content in enumerate(told):
        kind = OPS.get(str(content["op"]))
        if kind is None:
            raise OctavoError(f"no operation is called {safe_files.show(content['op'])}; there are {', '.join(OPS)}")
        settings = {name: content[name] for name in kind.settings}
        parts = {name: tensors.pop(f"operations.{number}.{name}") for name in kind.tensors}
        takes = [Encoding.from_json(encoding) for encoding in content["inputs"]]
        operations.append(kind(takes, Encoding.from_json(content["output"]), **settings, **parts))
    if tensors:
        raise OctavoError(f"no operation has the tensor {safe_files.listed([*tensors])}")
    names, wiring = [str(content["name"]) for content in told], [content["takes"] for content in told]
    return IntegerModel(inputs, operations, wiring, names, _from_json(manifest["result"]))


def _to_json(result: Any) -> Any:
    """JSON knows no tuples."""
    if isinstance(result, tuple):
        return {"tuple": [_to_json(part) for part in result]}
    if isinstance(result, dict):
        return {"dict": {key: _to_json(part) for key, part in result.items()}}
    return [_to_json(part) for part in result] if isinstance(result, list) else result


def _from_json(data: Any) -> Any:
    if isinstance(data, dict) and [*data] == ["tuple"]:
        return tuple(_from_json(part) for part in data["tuple"])
    if isinstance(data, dict):
        return {str(key): _from_json(part) for key, part in data["dict"].items()}
    return [_from_json(part) for part in data] if isinstance(data, list) else data
