"""Measures guards and published classifiers side by side: python -m guardkit.evaluate guard=DIR source=scenes"""

from __future__ import annotations

from omegaconf import DictConfig

from guardkit._entry import callable_as_function
from guardkit.runs.hydra import main, output_dir
from guardkit.terminal import say


@main("evaluate")
def evaluate(cfg: DictConfig) -> None:
    """Scores the source's test images, measures, and prints where the report is."""
    # heavy libraries are imported here, so that --help answers at once
    from guardkit.runs.evaluate import run

    report = run(cfg, output_dir())
    say(report.table)
    say(report.folder)


if __name__ == "__main__":
    evaluate()
else:
    callable_as_function(__name__)
