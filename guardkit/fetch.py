"""Fetches an encoder once, into a folder that needs no network: python -m guardkit.fetch encoder=siglip2_b16 output_dir=DIR"""

from __future__ import annotations

from omegaconf import DictConfig

from guardkit.runs.hydra import main, output_dir
from guardkit.terminal import say


@main("fetch")
def fetch(cfg: DictConfig) -> None:
    """Writes a model's folder, checks it, and prints the settings that use it."""
    from guardkit.runs.fetch import run

    facts = run(cfg, output_dir())
    say("\n".join(f"  {name:<9} {fact}" for name, fact in facts.items()))
    say(output_dir())


if __name__ == "__main__":
    fetch()
