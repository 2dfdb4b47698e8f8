"""`app guard=DIR`: from its configuration to the page to answering."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from guardkit.artifacts import hash_file
from guardkit.classifier import GuardClassifier
from guardkit.folders import claim, refuse_others
from guardkit.moderation.gate import Refused
from guardkit.runs.hydra import plain
from guardkit.schema import InputError

_NEEDED = ("fastapi", "uvicorn", "python_multipart")


def run(cfg: DictConfig, folder: Path, *, announce: Callable[[str], None]) -> dict[str, int] | None:
    """Shows the page until the process is ended.

    Args:
        cfg: composed from conf/app.yaml, with a guard.
        folder: of what people say of a queue; nothing is written without one.
        announce: called with the page's address.
    Returns:
        The counts of corrections.parquet; None where nobody said anything.
    Raises:
        InputError: a setting is wrong, or something cannot be loaded.
    """
    if any(find_spec(name) is None for name in _NEEDED):
        raise InputError('the page needs FastAPI; install it with: pip install "guardkit[app]"')
    from guardkit.serving.costs import costs_of
    from guardkit.serving.page import create_page
    from guardkit.serving.queue import CORRECTIONS, ModerationQueue
    from guardkit.serving.server import serve

    if (cfg.queue is None) != (cfg.input is None):
        raise InputError(
            "queue=DIR, a folder that moderate wrote, and input=..., what it decided over, belong together; give both or neither"
        )
    reviewer = plain(cfg.reviewer)
    if reviewer is not None and not isinstance(reviewer, (str, int)):
        raise InputError(f"reviewer must be a name, got {reviewer!r}")
    guard = GuardClassifier.from_pretrained(cfg.guard, trust=plain(cfg.trust))
    costs = costs_of(guard, cfg.guard, plain(cfg.calibration))
    made: dict[str, Any] = {"costs": costs, "reviewer": None if reviewer is None else str(reviewer)}
    if cfg.queue is None:
        serve(partial(create_page, guard, **made), host=str(cfg.host), port=plain(cfg.port), allowed_hosts=None, announce=announce)
        return None
    refuse_others(folder, "app", replaces=False)
    table = Path(str(cfg.queue)).expanduser() / "decisions.parquet"
    if not table.is_file():
        raise InputError(f"queue={cfg.queue} holds no decisions.parquet; give the folder that moderate wrote")
    with claim(folder, "app", {"queue": hash_file(table)}):
        queue = ModerationQueue(cfg.queue, plain(cfg.input), guard.policy, folder)
        serve(
            partial(create_page, guard, queue=queue, **made),
            host=str(cfg.host), port=plain(cfg.port), allowed_hosts=None, announce=announce,
        )  # fmt: skip
        try:
            return queue.corrections() if queue.has_verdicts else None
        except Refused as error:
            raise InputError(f"{CORRECTIONS}: {error}") from error
