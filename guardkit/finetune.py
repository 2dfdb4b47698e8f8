"""Fine-tunes a vision-language model to a guard: python -m guardkit.finetune encoder.weights=local-dir:FOLDER"""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from guardkit._entry import callable_as_function
from guardkit.runs.hydra import main, output_dir
from guardkit.terminal import say


@main("finetune")
def finetune(cfg: DictConfig) -> None:
    """Builds what the configuration names, trains, measures, and prints where the result is."""
    # heavy libraries are imported here, so that --help answers at once
    from guardkit.runs.finetune import run

    settings = OmegaConf.to_container(cfg, resolve=True)
    report = run(cfg, settings, output_dir())
    say(report.table)
    say(report.folder)


if __name__ == "__main__":
    finetune()
else:
    callable_as_function(__name__)
