"""`serve`: from its configuration to the application to answering."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import partial

from omegaconf import DictConfig

from guardkit.moderation.listening import warn_of_others
from guardkit.runs.hydra import plain
from guardkit.schema import InputError
from guardkit.serving.limits import Limits
from guardkit.serving.server import read_key, serve

KEY_VARIABLE = "GUARDKIT_SERVE_KEY"


def run(cfg: DictConfig, *, announce: Callable[[str], None]) -> None:
    """Serves until the process is ended.

    Args:
        cfg: composed from conf/serve.yaml.
        announce: called with the service's address.
    Raises:
        InputError: a setting is wrong, or a guard cannot be loaded.
    """
    import guardkit.serving as serving

    guard, guards = plain(cfg.guard), plain(cfg.guards)
    if (guard is None) == (guards is None):
        raise InputError("give guard=DIR, or guards={name: DIR, other: DIR} for several, and one of the two")
    if guards is not None and not isinstance(guards, Mapping):
        raise InputError(f"guards must be a map of names and folders, as in guards={{a: DIR, b: DIR}}, got {guards!r}")
    limits = Limits(**{one.name: plain(cfg[one.name]) for one in dataclasses.fields(Limits)})
    key = os.environ.get(KEY_VARIABLE) if cfg.key_file is None else read_key(plain(cfg.key_file))
    host = str(cfg.host)
    if key is None:
        instead = f"set key_file or {KEY_VARIABLE}, or put a server with a key of its own in front"
        warn_of_others(host, may="ask this service", instead=instead)
    make = partial(serving.create_app, guard if guards is None else guards, key=key, limits=limits, trust=plain(cfg.trust))
    serve(make, host=host, port=plain(cfg.port), allowed_hosts=plain(cfg.allowed_hosts), announce=announce)
