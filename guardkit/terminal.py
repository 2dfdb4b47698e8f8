"""What is shown to people on a terminal: no control codes of strangers, and no character that the terminal cannot show."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

_names: dict[str, str] = {}


def call_it(path: Path, name: str) -> None:
    """From now on a path is shown under another name: that of a copy of somebody's, as the place that they know."""
    _names[str(path)] = name


def printable(text: str) -> str:
    """The text with control characters escaped, as in \\x1b; line ends stay.

    File names and settings of strangers are shown in messages, and a terminal obeys what is hidden in them.
    """
    for path, name in list(_names.items()):
        text = text.replace(path, name)
    return "".join(character if character.isprintable() or character == "\n" else _escaped(character) for character in text)


def one_line(text: object) -> str:
    """The text on one line, control characters escaped."""
    return printable(" ".join(str(text).split()))


def say(*texts: object) -> None:
    """Prints results for people. Where nobody reads them any more, as after `| head`, the command goes on without."""
    try:
        print(printable(" ".join(map(str, texts))), flush=True)
    except BrokenPipeError:
        print_nowhere()


def print_nowhere() -> None:
    """From now on what is printed is dropped: whoever read standard output is gone, and the interpreter would complain at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def complain(text: str) -> None:
    """Prints one line to standard error."""
    print(one_line(text), file=sys.stderr, flush=True)


def forgiving_streams() -> None:
    """From now on a character that the terminal's encoding lacks is shown escaped, where it would end the program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class LineFormatter(logging.Formatter):
    """One line an event, control characters escaped; the lines of a traceback stay."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return printable(super().format(record))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
