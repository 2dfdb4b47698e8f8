"""Writes a guard as ONNX for other runtimes: python -m guardkit.export guard=DIR output_dir=DIR"""

from __future__ import annotations

from omegaconf import DictConfig

from guardkit.runs.hydra import main, output_dir
from guardkit.terminal import say


@main("export")
def export(cfg: DictConfig) -> None:
    """Writes head.onnx and guard.onnx, checked against torch, and prints how far they differ."""
    from guardkit.runs.export import run

    report = run(cfg, output_dir())
    say(report.table)
    say(report.folder)


if __name__ == "__main__":
    export()
