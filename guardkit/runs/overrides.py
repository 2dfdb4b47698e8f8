"""What a user types after a command: paths that Hydra's grammar would refuse, and names for the jobs of a multirun."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from guardkit.artifacts import fingerprint
from guardkit.schema import InputError

_SETTING = re.compile(r"(\+{0,2}[A-Za-z_][\w./@:$-]*)=(.*)", re.DOTALL)
_MAX_SLUG = 60
_CORRECTIONS = "source.corrections"
# settings that hold paths, by the last part of their names: a folder called 2024_11_26 is no number
_PATHS = frozenset(
    {
        "cache_dir",
        "ckpt_path",
        "corrections",
        "dataset",
        "files",
        "folder",
        "guard",
        "input",
        "new",
        "old",
        "output_dir",
        "pairs",
        "policy_file",
        "root",
        "test",
        "weights",
    }
)


def mended(arguments: Sequence[str], conf: Path | None = None) -> list[str]:
    """Command line arguments with quotes around values that Hydra would refuse, or take for something else than the path they are.

    A value that Hydra reads keeps its meaning: numbers, lists, sweeps and quoted text. Quoted are plain text outside its
    grammar (a name with `=`, brackets, an umlaut, an apostrophe), the name of an existing file that it would read as
    a list, a function, a sweep or with blanks cut off, and a path that looks like a number.

    Args:
        arguments: after the command.
        conf: the folder of the configuration groups, to say what a group offers; None: groups are not looked at.
    Raises:
        InputError: a list or quoted text that is not complete, a sweep over output_dir, a group set to something else than a choice.
    """
    many = any(one in ("-m", "--multirun") for one in arguments)
    parser = OverridesParser.create()
    return [_mended(parser, one, conf, is_multirun=many) for one in arguments]


def _mended(parser: OverridesParser, argument: str, conf: Path | None, *, is_multirun: bool) -> str:
    match = _SETTING.fullmatch(argument)
    if match is None:
        return argument  # a flag, a deletion, or something that Hydra will name
    key, text = match.groups()
    if key == _CORRECTIONS:
        # every source takes it, other people's too, so that no source's file lists it
        return _mended(parser, f"+{argument}", conf, is_multirun=is_multirun)
    is_path = _is_there(text)
    try:
        override = parser.parse_override(argument)
        value = override.value()
    except HydraException as error:
        if is_path or not text.startswith(("[", "{", "'", '"')):
            parts = text.split(",") if is_multirun and not is_path else [text]
            return f"{key}={','.join(_quoted_if_needed(parser, key, part) for part in parts)}"
        reason = str(error).splitlines()[0]
        shown = shlex.quote(f"{key}={quoted(text)}")
        raise InputError(f"{argument} cannot be read ({reason}); close what is open, or if it is text quote it: {shown}") from error
    is_literal = isinstance(value, (bool, int, float)) or value is None
    if is_literal and conf is not None and (conf / key.lstrip("+")).is_dir():
        choices = ", ".join(sorted(path.stem for path in (conf / key.lstrip("+")).glob("*.yaml")))
        raise InputError(
            f"{argument} must name one of {choices}, or a file of your own in a folder {key.lstrip('+')}/ below --config-dir=DIR"
        )
    if key.rpartition(".")[2].lstrip("+") in _PATHS:
        parts = text.split(",") if is_multirun else [text]
        if any(_is_number(parser, key, part) for part in parts):
            return f"{key}={','.join(quoted(part) if _is_number(parser, key, part) else part for part in parts)}"
    if is_path and value != text and (not is_literal or "(" in text):
        return f"{key}={quoted(text)}"
    if override.is_sweep_override() and override.key_or_group == "output_dir":
        raise InputError(f"{argument} would sweep over output_dir; give one folder, every job gets a folder of its own inside it")
    return argument


def _is_number(parser: OverridesParser, key: str, text: str) -> bool:
    try:
        return isinstance(parser.parse_override(f"{key}={text}").value(), (bool, int, float))
    except HydraException:
        return False


def _quoted_if_needed(parser: OverridesParser, key: str, text: str) -> str:
    try:
        parser.parse_override(f"{key}={text}").value()
    except HydraException:
        return quoted(text)
    return text


def quoted(text: str) -> str:
    """The text in quotes for Hydra's command line. A backslash is escaped only where a quote follows it."""
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", text)
    escaped = re.sub(r"(\\+)$", lambda match: match[1] * 2, escaped)
    return f"'{escaped}'"


def _is_there(text: str) -> bool:
    try:
        return text != "" and Path(os.path.expanduser(text)).exists()
    except (OSError, ValueError):
        return False  # too long for a path, or with a null byte


def job_name(overrides: Sequence[str]) -> str:
    """The folder of a multirun's job: short, safe on any file system, the same for the same settings, and no other's.

    As in seed_0-experiment_pairs_aug-1f09ab3c: settings in plain characters as far as they are short, and a hash of all of
    them. They stand in full in .hydra/overrides.yaml.
    """
    kept = sorted(one for one in overrides if one.split("=", 1)[0] != "output_dir")
    pieces = {one: _plain(one) for one in kept}
    slug: list[str] = []
    left = _MAX_SLUG
    for one in sorted(kept, key=lambda one: (len(pieces[one]), one)):
        left -= len(pieces[one]) + 1
        if left < 0:
            break
        slug.append(pieces[one])
    return "-".join([*slug, fingerprint(kept)[:8]])


def _plain(override: str) -> str:
    key, _, value = override.partition("=")
    name = f"{key.rsplit('.', 1)[-1]}_{value}"
    return re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("._") or "_"
