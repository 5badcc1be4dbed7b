"""The nouns as JSON and back: formats, granularities, scales, casts, schemes, accumulators.

Every record is an object with its class under ``"type"``; only the classes listed here can come back, so a file cannot
name anything else. A catalogue format is written as its name.
"""

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from octavo.core import formats
from octavo.core.accumulate import Chunked, Float32, Integer, Sequential, TensorCore
from octavo.core.cast import Cast
from octavo.core.formats import FloatFormat, IntegerFormat
from octavo.core.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from octavo.core.scaling import Constant, Current, Static
from octavo.core.schemes import Scheme
from octavo.errors import OctavoError

DEEPEST = 50
RECORDS: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        *(FloatFormat, IntegerFormat, PerTensor, PerChannel, PerToken, PerGroup, PerBlock),
        *(Current, Static, Constant, Cast, Scheme),
        *(Float32, Sequential, Chunked, TensorCore, Integer),
    )
}


def to_json(record: Any) -> Any:
    """A record, or a list, dict or plain value of them, as what ``json.dumps`` takes."""
    if isinstance(record, FloatFormat | IntegerFormat) and record in formats.CATALOGUE:
        return {"type": "Format", "name": record.name}
    if type(record) in RECORDS.values():
        content = {f.name: to_json(getattr(record, f.name)) for f in fields(record)}
        return {"type": type(record).__name__, **content}
    if isinstance(record, list | tuple):
        return [to_json(item) for item in record]
    if isinstance(record, dict):
        return {str(key): to_json(value) for key, value in record.items()}
    if record is None or isinstance(record, bool | int | float | str):
        return record
    raise OctavoError(f"a {type(record).__name__} has no JSON form here")


def from_json(data: Any) -> Any:
    """What ``to_json`` was given. Raises ``OctavoError`` on an unknown type or a field that does not fit."""
    return _from_json(data, 0)


def _from_json(data: Any, depth: int) -> Any:
    if depth > DEEPEST:
        raise OctavoError(f"records within records more than {DEEPEST} deep are not Octavo's")
    if isinstance(data, list):
        return [_from_json(item, depth + 1) for item in data]
    if not isinstance(data, dict):
        return data
    content = {key: _from_json(value, depth + 1) for key, value in data.items() if key != "type"}
    if "type" not in data:
        return content
    if data["type"] == "Format":
        return formats.get(str(data.get("name")))
    cls = RECORDS.get(str(data["type"]))
    if cls is None:
        raise OctavoError(f"unknown record type {data['type']!r}; known are Format, {', '.join(RECORDS)}")
    try:
        record = cls(**content)
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise OctavoError(f"{data['type']} cannot be made of {str(content)[:300]}: {error}") from error
    for name, kind in get_type_hints(cls).items():
        if not _fits(getattr(record, name), kind):
            raise OctavoError(f"{data['type']} cannot have the {name} {str(getattr(record, name))[:100]!r}")
    return record


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type: a class, one of several, or one of a few words."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_args(kind):
        return any(_fits(value, one) for one in get_args(kind))
    if kind in (int, float):
        return type(value) is int or (kind is float and type(value) is float)
    return isinstance(value, kind)
