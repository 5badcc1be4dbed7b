"""``python -m benchmarks.run [casts matmuls accumulators demo]``: measure, print the tables, write them to docs/."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import torch

import octavo as ov
from benchmarks import accumulators, casts, demo, matmuls, picture
from octavo.analysis import machine

DOCS = Path(__file__).resolve().parent.parent / "docs"
RESULTS = DOCS / "benchmarks.json"
PARTS = {"casts": casts, "matmuls": matmuls, "accumulators": accumulators, "demo": demo}


class _Tee(io.StringIO):
    """Keeps what is printed, and prints it."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text)  # type: ignore[union-attr]
        return super().write(text)


def main(names: list[str]) -> None:
    """Run the named parts, or all, and write docs/: parts that did not run stay as they were measured last."""
    here = machine.examine(rows=(), repeats=0)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    pages = kept.get("pages", {})
    results: dict[str, Any] = {**kept, "processor": here.processor, "torch": here.torch, "octavo": ov.__version__}
    for name in names or PARTS:
        module = PARTS[name]
        torch.manual_seed(0)
        tee = _Tee()
        with contextlib.redirect_stdout(tee):
            results[name] = module.run()
            print()
        pages[name] = f"## {name.capitalize()}\n{(module.__doc__ or '').strip()}\n\n{tee.getvalue()}"
    RESULTS.write_text(json.dumps({**results, "pages": pages}, indent=1, default=str) + "\n")
    head = (
        "# Benchmarks\n"
        "Made by `python -m benchmarks.run` (`make benchmarks`). Machines are noisy: compare ratios within a table.\n\n"
        f"{here.processor}; {here.threads} threads; torch {here.torch}; {here.native.split(',')[0]}.\n"
    )
    (DOCS / "benchmarks.md").write_text("\n".join([head, *(pages[n] for n in PARTS if n in pages)]).rstrip() + "\n")
    if "demo" in results:
        picture.draw(results["demo"], DOCS / "schemes.png")


if __name__ == "__main__":
    main(sys.argv[1:])
