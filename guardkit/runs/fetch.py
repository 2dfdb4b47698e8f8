"""`fetch`: from its configuration to an encoder to one call."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path

from omegaconf import DictConfig

from guardkit.api.fetch import fetch_encoder
from guardkit.encoders.base import told
from guardkit.encoders.lookup import ENCODER_KINDS
from guardkit.policy import Policy
from guardkit.runs.hydra import compose_group, make

_ANY_POLICY = "guardkit:template"  # told to an encoder that reads one, to see that the copy gives the same vectors


def run(cfg: DictConfig, folder: Path) -> dict[str, str]:
    """Fetches an encoder into a folder.

    Args:
        cfg: composed from conf/fetch.yaml.
        folder: written to.
    Returns:
        What there is to say of it, the settings that use it last.
    """
    asked = make(cfg.encoder)
    fetched = told(asked, Policy.load(_ANY_POLICY))
    encoder = fetch_encoder(fetched, folder)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    kind = ENCODER_KINDS.name(type(encoder))
    usual = {name: one.default for name, one in inspect.signature(type(encoder)).parameters.items()}
    if kind in ENCODER_KINDS.ours:
        usual |= {"backend": compose_group("encoder", kind, [], root={}).backend}
    own = {name: getattr(asked, name, None) if name == "rules" else value for name, value in encoder.config.items()}
    given = {"encoder": kind} | {f"encoder.{name}": value for name, value in own.items() if value is not None and value != usual.get(name)}
    return {
        "width": str(encoder.dim),
        "size": f"{size / 1e6:.0f} MB",
        "checked": f"it gives the vectors of {fetched.name}",
        "use it as": " ".join(shlex.quote(f"{name}={value}") for name, value in given.items()),
    }
