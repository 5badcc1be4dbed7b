"""The nouns as JSON and back: formats, granularities, scales, casts, schemes.

Every record is an object with its class under ``"type"``; only the classes listed here can come back, so a file cannot
name anything else. A catalogue format is written as its name.
"""

from dataclasses import fields
from typing import Any

from octavo.core import formats
from octavo.core.cast import Cast
from octavo.core.formats import FloatFormat, IntegerFormat
from octavo.core.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from octavo.core.scaling import Constant, Current
from octavo.core.schemes import Scheme
from octavo.errors import OctavoError

RECORDS: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        *(FloatFormat, IntegerFormat, PerTensor, PerChannel, PerToken, PerGroup, PerBlock),
        *(Current, Constant, Cast, Scheme),
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
    if isinstance(data, list):
        return [from_json(item) for item in data]
    if not isinstance(data, dict):
        return data
    content = {key: from_json(value) for key, value in data.items() if key != "type"}
    if "type" not in data:
        return content
    if data["type"] == "Format":
        return formats.get(str(data.get("name")))
    cls = RECORDS.get(str(data["type"]))
    if cls is None:
        raise OctavoError(f"unknown record type {data['type']!r}; known are Format, {', '.join(RECORDS)}")
    try:
        return cls(**content)
    except (TypeError, AttributeError, ValueError) as error:
        raise OctavoError(f"{data['type']} cannot be made of {content}: {error}") from error
