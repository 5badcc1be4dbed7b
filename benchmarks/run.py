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
PARTS = {"casts": casts, "matmuls": matmuls, "accumulators": accumulators, "demo": demo}


class _Tee(io.StringIO):
    """Keeps what is printed, and prints it."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text)  # type: ignore[union-attr]
        return super().write(text)


def main(names: list[str]) -> None:
    """Run the named parts, or all; only a run of all rewrites docs/."""
    here = machine.examine(rows=(), repeats=0)
    results: dict[str, Any] = {"processor": here.processor, "torch": here.torch, "octavo": ov.__version__}
    pages = [
        "# Benchmarks",
        "Made by `python -m benchmarks.run` (`make benchmarks`). Machines are noisy: compare ratios within a table.\n",
        f"{here.processor}; {here.threads} threads; torch {here.torch}; {here.native.split(',')[0]}.\n",
    ]
    for name in names or PARTS:
        module = PARTS[name]
        torch.manual_seed(0)
        tee = _Tee()
        with contextlib.redirect_stdout(tee):
            results[name] = module.run()
            print()
        pages += [f"## {name.capitalize()}", (module.__doc__ or "").strip() + "\n", tee.getvalue()]
    if not names:
        (DOCS / "benchmarks.json").write_text(json.dumps(results, indent=1, default=str) + "\n")
        (DOCS / "benchmarks.md").write_text("\n".join(pages).rstrip() + "\n")
        picture.draw(results["demo"], DOCS / "schemes.png")


if __name__ == "__main__":
    main(sys.argv[1:])
