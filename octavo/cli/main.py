"""The command ``octavo``: finds the subcommand, and turns whatever goes wrong into one line and an exit code.

0 is success; 1 a failure that is Octavo's own fault; 2 something that the user can mend; 130 an interruption.
"""

import argparse
import difflib
import importlib
import itertools
import os
import re
import signal
import sys
import textwrap
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

from octavo.cli.console import Screen, tell
from octavo.errors import OctavoError, OctavoWarning

COMMANDS = ("quantize", "compare", "evaluate", "inspect", "formats", "bench", "experiment", "doctor")
DEBUG = "OCTAVO_DEBUG"
TABLE_ROW = re.compile(r"  \S+( \S+)*  +(?=\S)")  # of a help text: a name, a gap, and what it means
ABOUT = """\
Octavo makes models eight bits small: choose a number format, quantize, measure what it
costs, and write a checkpoint that vLLM, transformers or Octavo itself opens."""
START = """\
begin with:
  octavo doctor                                              what this machine is good at
  octavo quantize demo --out small                           a small model, in the best 8 bits
  octavo compare demo --html demo.html                       what each scheme would cost it
  octavo quantize FOLDER --scheme fp8-dynamic --out small    your own
  octavo evaluate small                                      how well it still predicts
  octavo bench demo                                          what it gains in speed here

{schemes}

`octavo COMMAND --help` explains a command."""


class Help(argparse.RawDescriptionHelpFormatter):
    """Descriptions and epilogs as they are written, but within the terminal's width.

    Lines at the margin are a paragraph; an indented "name   text" hangs under its text; examples stay whole.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = []
        for table, lines in itertools.groupby(text.splitlines(), lambda line: line[:1] in (" ", "")):
            if not table:
                parts.append(textwrap.fill(" ".join(lines), width, initial_indent=indent, subsequent_indent=indent))
                continue
            for line in lines:
                name = TABLE_ROW.match(line)
                hang = " " * (name.end() if name else 0)
                parts += textwrap.wrap(line, width, subsequent_indent=hang) if name else [line]
        return "\n".join(parts)


class Parser(argparse.ArgumentParser):
    """Says what is wrong as the rest of Octavo does: in one line, with a way on."""

    def error(self, message: str) -> NoReturn:
        """Print it and leave with 2."""
        tell("error", f"{message}{'' if message.endswith('?') else '.'} See: {self.prog} --help")
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code and never raises."""
    words = list(sys.argv[1:] if argv is None else argv)
    screen = Screen("--json" in words)
    debug = os.environ.get(DEBUG, "") not in ("", "0")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    try:
        with warnings.catch_warnings():
            _show_warnings(debug)
            arguments = _parse(words)
            screen.check()
            arguments.run(arguments, screen)
            sys.stdout.flush()
        return 0
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except KeyboardInterrupt:
        written = f"{screen.written} is written" if screen.written else "nothing was written"
        tell("error", f"interrupted; {screen.kept or written}")
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `octavo formats | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, OctavoError):
            tell("error", error)
            return 2
        words_for_it = str(error) or "no message"
        tell("error", f"{type(error).__name__}: {words_for_it} ({DEBUG}=1 shows where; please report it)")
        return 1


def build() -> Parser:
    """The parser of all commands."""
    parser = Parser("octavo", description=ABOUT, formatter_class=Help)
    parser.add_argument("--version", action="version", version=f"octavo {_version()}", help="print the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name in COMMANDS:
        module: Any = importlib.import_module(f"octavo.cli.{name}")
        short, description, example = module.HELP
        sub = commands.add_parser(
            name,
            help=short,
            description=description,
            epilog=example,
            formatter_class=Help,
            allow_abbrev=False,
        )
        module.add(sub)
        sub.add_argument("--json", action="store_true", help="answer with one JSON document, for programs")
        sub.set_defaults(run=module.run, parser=sub)
    from octavo.cli.schemes import SCHEMES_HELP

    parser.epilog = START.format(schemes=SCHEMES_HELP)
    return parser


def _parse(words: list[str]) -> argparse.Namespace:
    parser = build()
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        parser.error(f"no command is called {words[0]!r}; {hint}")
    if not words:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    arguments, extra = parser.parse_known_args(words)
    if extra:
        options = [option for action in arguments.parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(extra[0].partition("=")[0], options, n=1)
        arguments.parser.error(f"unknown argument {extra[0]!r}{f'; did you mean {near[0]}?' if near else ''}")
    return arguments


def _version() -> str:
    import octavo

    return octavo.__version__


def _show_warnings(debug: bool) -> None:
    """Octavo's warnings are notes, each shown once; those of the libraries below are for people who debug."""
    seen: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = str(message) if issubclass(category, OctavoWarning) else f"{category.__name__}: {message}"
        if text not in seen:
            seen.add(text)
            tell("note", text)

    warnings.showwarning = show
    warnings.simplefilter("always" if debug else "ignore")
    warnings.simplefilter("always", OctavoWarning)
