"""Decides over a folder, shards or Parquet files of images: python -m guardkit.moderate guard=DIR input=DIR"""

from __future__ import annotations

import sys

from omegaconf import DictConfig

from guardkit._entry import callable_as_function
from guardkit.runs.hydra import main, results_place
from guardkit.terminal import say

FOUND = 3


@main("moderate", brings_results=False)
def moderate(cfg: DictConfig) -> None:
    """Writes a row for each input, and prints how many were decided how. Status 3: there was what `fail_on` names."""
    from guardkit.runs.moderate import run

    report, is_found = run(cfg, results_place(cfg))
    say(report.table)
    say(report.folder)
    if is_found:
        sys.exit(FOUND)


if __name__ == "__main__":
    moderate()
else:
    callable_as_function(__name__)
