"""Trains one guard: python -m guardkit.train experiment=pairs_aug"""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from guardkit.runs.hydra import main, output_dir
from guardkit.terminal import say


@main("train")
def train(cfg: DictConfig) -> None:
    """Builds what the configuration names, trains, measures, and prints where the result is."""
    # heavy libraries are imported here, so that --help answers at once
    from guardkit.runs.train import run

    settings = OmegaConf.to_container(cfg, resolve=True)
    report = run(cfg, settings, output_dir())
    say(report.table)
    say(report.folder)


if __name__ == "__main__":
    train()
