"""Which errors a user can mend, and the one line that says how. All others are bugs and keep their traceback."""

from __future__ import annotations

import difflib
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any

from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from guardkit.artifacts import brought_along
from guardkit.schema import InputError
from guardkit.terminal import one_line

_NO_SPACE = re.compile(
    r"no space left|disk quota exceeded|disk is full|file too large|errno (28|122|27)\b"
    r"|requested and \d+ written|PytorchStreamWriter failed writing",  # what NumPy and torch say of a full disk
    re.IGNORECASE,
)
_READ_ONLY = re.compile(r"read-only file system|readonly database|errno 30\b", re.IGNORECASE)
_OF_HYDRA = re.compile("The --resolve flag can only|Config group override must be")  # of what was typed, though of no kind of its own
_KEPT = "what was finished is kept, and the same command goes on from there"


def user_error(error: BaseException) -> str | None:
    """One line for an error that the user can mend, None for one that is ours.

    The error itself and what it was explicitly raised from are judged; what merely was being handled meanwhile is not.
    """
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, InputError):
            return one_line(cause)
    for cause in chain:
        if (line := _of_the_disk(cause)) is not None:
            return line
    if (line := _of_a_foreign_part(chain)) is not None:
        return line
    if isinstance(error, ValueError) and _OF_HYDRA.match(str(error)):
        return one_line(f"{error}; see --help for all settings")
    if isinstance(error, (HydraException, OmegaConfBaseException)) and all(
        isinstance(cause, (HydraException, OmegaConfBaseException, OSError)) for cause in chain
    ):
        return one_line(_of_hydra(error, chain))
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _of_the_disk(error: BaseException) -> str | None:
    text = str(error)
    where = f": {os.fsdecode(error.filename)}" if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)) else ""
    if not isinstance(error, InputError) and _NO_SPACE.search(text):
        return one_line(f"no space is left on the disk{where}; {_KEPT} once there is space where output_dir and cache_dir lie")
    if not isinstance(error, InputError) and _READ_ONLY.search(text):
        return one_line(
            f"the disk can only be read{where}; {_KEPT}, with output_dir and cache_dir (or GUARDKIT_CACHE) set to a place that can be written"
        )
    if isinstance(error, sqlite3.OperationalError) and re.search("disk I/O error|unable to open|locked", text):
        return one_line(
            f"a store in the cache or in output_dir cannot be used ({text}); {_KEPT}, with cache_dir and output_dir on a disk that works"
        )
    if where and isinstance(error, OSError):
        return one_line(
            f"{error.strerror}{where}; check the path, its permissions and the space left (output_dir, and cache_dir or GUARDKIT_CACHE, set where results go)"
        )
    return None


def _of_a_foreign_part(chain: list[BaseException]) -> str | None:
    """A class of somebody else's that a `_target_` names and that is not there, or cannot be imported."""
    for cause in chain:
        found = re.match(r"Error locating target '(?!guardkit\.)([^']+)'", str(cause))
        if found and isinstance(cause, InstantiationException):
            part = re.search(r"full_key: (\S+)", str(cause))
            reason = next((str(one) for one in reversed(chain) if isinstance(one, ImportError)), "there is no such name")
            return one_line(
                f"{part[1] if part else '_target_'} names {found[1]}, which cannot be imported ({reason}); "
                "install its package in this environment, or correct its _target_"
            )
    return None


def _of_hydra(error: BaseException, chain: list[BaseException]) -> str:
    # Hydra's messages hold their options over several lines
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.strip().startswith(("full_key", "object_type"))]
    if any("hydra/launcher/submitit" in line for line in lines):
        return 'hydra/launcher=submitit_slurm needs the submitit launcher; pip install "guardkit[slurm]"'
    text = "; ".join(lines) or type(error).__name__
    if "missing EQUAL" in text:
        text = f"{text}; settings are given as key=value, and a group is chosen as group=choice"
    return f"{_unknown_choice(str(error)) or _unknown_setting(str(error), chain) or text}; see --help for all settings"


def _unknown_choice(text: str) -> str | None:
    """What is said of a choice that its group does not have; None: the error is another one."""
    found = re.search(r"Could not find '([^']+)/([^'/]+)'\s+Available options in '[^']+':((?:\n\t.+)+)", text)
    if found is None:
        return None
    group, name, options = found[1], found[2], found[3].split()
    return f"{group}={name} is not there; {group} is one of {', '.join(options)}{_nearest(name, options, before=f'{group}=')}"


def _unknown_setting(text: str, chain: list[BaseException]) -> str | None:
    """What is said of a setting that the configuration does not have; None: the error is another one."""
    found = re.search(r"Could not override '([^']+)'", text)
    if found is None:
        return None
    name = found[1].split("@")[0]
    if choices := _choices_with(name):
        group = name.partition(".")[0]
        return f"{name} is no setting of the {group} that is chosen; {', '.join(f'{group}={choice}' for choice in choices)} would have it"
    nodes = [cause.parent_node for cause in chain if isinstance(cause, OmegaConfBaseException)]
    roots = [node._get_root() for node in nodes if node is not None]
    names = [known for root in roots if isinstance(root, DictConfig) for known in _names(root)]
    near = _nearest(name, [known for known in names if not known.startswith("hydra.")])
    return f"there is no setting {name}{near or f'; +{name}=VALUE adds one, for a part that takes it'}"


def _choices_with(name: str) -> list[str]:
    """The choices of a setting's group that list it, as `source.root` is listed by source=folder."""
    group, _, key = name.partition(".")
    files = sorted((brought_along("conf") / group).glob("*.yaml")) if key else []
    configs = {path.stem: OmegaConf.load(path) for path in files}
    return [choice for choice, config in configs.items() if isinstance(config, DictConfig) and key in _names(config)]


def _names(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in node:
        yield f"{prefix}{key!s}"
        value: Any = node._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_missing() and not value._is_interpolation():
            yield from _names(value, f"{prefix}{key!s}.")


def _nearest(name: str, options: Iterable[str], *, before: str = "") -> str:
    known = list(options)
    # whole names first; then a setting whose group was left out or mistaken
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    last = {option.rsplit(".", 1)[-1]: option for option in reversed(known)}
    found = found or [last[one] for one in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=1, cutoff=0.75)]
    return f"; did you mean {before}{found[0]}?" if found else ""
