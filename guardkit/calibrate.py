"""Sets a guard's thresholds with a promise: python -m guardkit.calibrate guard=DIR source=folder source.root=DIR max_fpr=0.01"""

from __future__ import annotations

from omegaconf import DictConfig

from guardkit._entry import callable_as_function
from guardkit.runs.hydra import main, output_dir
from guardkit.terminal import say


@main("calibrate")
def calibrate(cfg: DictConfig) -> None:
    """Writes the guard with its new thresholds, and prints what they promise."""
    from guardkit.runs.calibrate import run

    report = run(cfg, output_dir())
    say(report.table)
    say(report.folder)


if __name__ == "__main__":
    calibrate()
else:
    callable_as_function(__name__)
