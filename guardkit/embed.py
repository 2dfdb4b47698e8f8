"""Embeds the images of a source once: python -m guardkit.embed source=folder source.root=DIR"""

from __future__ import annotations

from omegaconf import DictConfig

from guardkit._entry import callable_as_function
from guardkit.runs.hydra import main, results_place
from guardkit.terminal import say


@main("embed", brings_results=False)
def embed(cfg: DictConfig) -> None:
    """Writes an embedding folder and prints its counts."""
    from guardkit.runs.embed import run

    counts = run(cfg, results_place(cfg))
    say("\n".join(f"  {name:<9} {count}" for name, count in counts.items()))
    say(results_place(cfg))


if __name__ == "__main__":
    embed()
else:
    callable_as_function(__name__)
