"""Layers by the block they belong to: ``model.layers.3.mlp.up_proj`` is ``mlp.up_proj`` of ``model.layers.3``."""

from collections.abc import Collection, Iterable

REST = ""


def split(name: str) -> tuple[str, str]:
    """The block, up to the first number in the name, and the layer within it; a name without one has the block REST."""
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: index + 1]), ".".join(parts[index + 1 :])
    return REST, name


def blocks(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of every block's layers, in the order in which blocks come first; the rest last."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(split(name)[0], []).append(name)
    rest = found.pop(REST, None)
    return found if rest is None else {**found, REST: rest}


def titles(found: Collection[str]) -> dict[str, str]:
    """What to call each block: its name without what all of them begin with, ``layers.3``."""
    parts = [block.split(".")[:-1] for block in found if block]
    shared = 0
    while parts and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return {block: ".".join(block.split(".")[shared:]) or "other layers" for block in found}
