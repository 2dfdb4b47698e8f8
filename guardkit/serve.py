"""A guard as a web service: python -m guardkit.serve guard=DIR"""

from __future__ import annotations

from omegaconf import DictConfig

from guardkit.runs.hydra import main


@main("serve")
def serve(cfg: DictConfig) -> None:
    """Answers requests until Ctrl-C or SIGTERM, and writes nothing."""
    from guardkit.runs.serve import run

    run(cfg, announce=lambda address: print(f"serves at {address} (Ctrl-C ends it)", flush=True))


if __name__ == "__main__":
    serve()
