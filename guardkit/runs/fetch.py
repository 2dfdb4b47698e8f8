"""`fetch`: from its configuration to an encoder to one call."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from guardkit.api.fetch import fetch_encoder
from guardkit.encoders.lookup import ENCODER_KINDS
from guardkit.runs.hydra import make


def run(cfg: DictConfig, folder: Path) -> dict[str, str]:
    """Fetches an encoder into a folder.

    Args:
        cfg: composed from conf/fetch.yaml.
        folder: written to.
    Returns:
        What there is to say of it, the settings that use it last.
    """
    fetched = make(cfg.encoder)
    encoder = fetch_encoder(fetched, folder)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    given = {"encoder": ENCODER_KINDS.name(type(encoder))} | {
        f"encoder.{name}": value for name, value in encoder.config.items() if value is not None
    }
    return {
        "width": str(encoder.dim),
        "size": f"{size / 1e6:.0f} MB",
        "checked": f"it gives the vectors of {fetched.name}",
        "use it as": " ".join(f"{name}={value}" for name, value in given.items()),
    }
