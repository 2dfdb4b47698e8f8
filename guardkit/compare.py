"""An old and a new guard on the same images: python -m guardkit.compare old=DIR new=DIR source=folder source.root=DIR"""

from __future__ import annotations

from omegaconf import DictConfig

from guardkit._entry import callable_as_function
from guardkit.runs.hydra import main, output_dir
from guardkit.terminal import say


@main("compare")
def compare(cfg: DictConfig) -> None:
    """Writes what the new guard wins and loses, and prints it."""
    from guardkit.runs.compare import run

    report = run(cfg, output_dir())
    say(report.table)
    say(report.folder)


if __name__ == "__main__":
    compare()
else:
    callable_as_function(__name__)
