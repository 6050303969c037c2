"""The parser of all commands: what it refuses, a short and a full help, shell completion."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jitjax import command

HELP_COLUMNS = 100
"""Widest line of a help; narrower terminals get narrower ones."""
SHELLS = ("bash", "zsh")


class Parser(argparse.ArgumentParser):
    """A parser that refuses what `argparse` drops or guesses, with errors of one line.

    A second use of an option with one value is an error, and names cannot be abbreviated. Options
    with several values take `action="extend"`.

    `--help` shows the first line of each option's `help`, and leaves out options whose first line
    is empty. With `full_epilog` there is `--help-all`, which shows everything.

    Args:
        epilog: what ends `--help`.
        full_epilog: what ends `--help-all`; None if the command does not have that.
        error_prefix: begins errors; the name of the command by default.
        completion: option -> the values that it may have, for `--print-completion`; None if the
            command does not have that.
        arguments: arguments of `argparse.ArgumentParser`.
    """

    def __init__(
        self,
        *,
        epilog: str,
        full_epilog: str | None = None,
        error_prefix: str | None = None,
        completion: Mapping[str, Iterable[str]] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(
            formatter_class=_ShortHelp,
            allow_abbrev=False,
            add_help=False,
            epilog=epilog,
            **arguments,
        )
        self.error_prefix = f"{self.prog}: error: " if error_prefix is None else error_prefix
        self.full_epilog, self.completion = full_epilog, completion
        self.register("action", None, _StoreOnce)
        self.register("action", "store", _StoreOnce)
        self._last = self.add_argument_group("help")
        add = self._last.add_argument
        add("-h", "--help", action="help", help="show this, and exit")
        hidden = ""
        if full_epilog is not None:
            add("--help-all", action=_PrintFullHelp, nargs=0, help="show all options, and exit")
            hidden = "\n"
        add("--version", action=_Version, nargs=0, help=f"{hidden}show the versions, and exit")
        add("--debug", action=_Debug, nargs=0, help=f"{hidden}print the traceback of an error, too")
        if completion is not None:
            add(
                "--print-completion",
                action=_PrintCompletion,
                choices=SHELLS,
                help='\nprint a script that completes options, and exit; for bash: eval "$(jitjax '
                '--print-completion bash)". It needs shtab: pip install "jitjax[completion]"',
            )

    def format_help(self) -> str:
        self._action_groups.sort(key=lambda group: group is self._last)
        return super().format_help()

    def error(self, message: str) -> Any:
        command.note(f"{self.error_prefix}{message}; see {self.prog} --help")
        sys.exit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        command.write_line(message.removesuffix("\n"), file or sys.stdout)


class _FullHelp(argparse.RawDescriptionHelpFormatter):
    """A help with all options and the whole of their texts."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns - 2, HELP_COLUMNS)
        super().__init__(prog, max_help_position=26, width=width)

    def _split_lines(self, text: str, width: int) -> list[str]:
        first, _, others = text.partition("\n")
        return super()._split_lines(". ".join(part for part in (first, others) if part), width)


class _ShortHelp(_FullHelp):
    """A help with the first line of each option; options without one are left out."""

    def add_argument(self, action: argparse.Action) -> None:
        if not (action.help or "").startswith("\n"):
            super().add_argument(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return super()._split_lines(text.partition("\n")[0], width)


class _PrintFullHelp(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        parser.formatter_class, parser.epilog = _FullHelp, parser.full_epilog
        parser.print_help()
        sys.exit(0)


class _StoreOnce(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if option_string is not None:
            used = namespace.__dict__.setdefault("used_options", set())
            if self.dest in used:
                raise argparse.ArgumentError(self, "given twice; expected once")
            used.add(self.dest)
        setattr(namespace, self.dest, values)


class _Debug(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        command.show_tracebacks()


class _Version(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        from importlib.metadata import version

        python = ".".join(map(str, sys.version_info[:3]))
        command.write_line(
            f"jitjax {version('jitjax')} (jax {version('jax')}, Python {python})", sys.stdout
        )
        sys.exit(0)


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        try:
            import shtab
        except ImportError:
            parser.error('--print-completion needs shtab: pip install "jitjax[completion]"')
        for action in parser._actions:
            if action.type is Path:
                action.complete = shtab.FILE
            elif action.dest in parser.completion:
                action.choices = list(parser.completion[action.dest])
        command.write_line(shtab.complete(parser, values), sys.stdout)
        sys.exit(0)
