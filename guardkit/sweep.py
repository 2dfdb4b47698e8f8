"""The sample-efficiency experiment: python -m guardkit.sweep"""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from guardkit._entry import callable_as_function
from guardkit.runs.hydra import main, output_dir
from guardkit.terminal import say


@main("sweep")
def sweep(cfg: DictConfig) -> None:
    """Fits every arm at every label budget, and prints how many labels each needs."""
    # heavy libraries are imported here, so that --help answers at once
    from guardkit.runs.sweep import run

    report = run(cfg, OmegaConf.to_container(cfg, resolve=True), output_dir())
    say(report.table)
    say(report.folder)


if __name__ == "__main__":
    sweep()
else:
    callable_as_function(__name__)
