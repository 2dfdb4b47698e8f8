"""A local web page: for people who judge pairs, python -m guardkit.app pairs=DIR; for a guard, python -m guardkit.app guard=DIR"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from guardkit.runs.hydra import main, output_dir, settings_of
from guardkit.terminal import say


@main("app")
def app(cfg: DictConfig) -> None:
    """Shows the page until Ctrl-C, then prints what was said."""
    from guardkit.moderation.listening import warn_of_others
    from guardkit.schema import InputError

    if (cfg.pairs is None) == (cfg.guard is None):
        raise InputError(
            "give pairs=DIR, to judge the pairs of a dataset, or guard=DIR, to try a guard and review its queue, and one of the two"
        )
    warn_of_others(
        str(cfg.host),
        may="see the images and judge under any name, for the page has no password",
        instead="leave host out and come through a tunnel (ssh -L PORT:127.0.0.1:PORT MACHINE) to keep others out",
    )
    if cfg.pairs is None:
        _show_guard(cfg)
    else:
        _review_pairs(cfg)


def _show_guard(cfg: DictConfig) -> None:
    from guardkit.runs.app import run

    counts = run(cfg, output_dir(), announce=lambda address: print(f"guard {cfg.guard} at {address} (Ctrl-C ends it)", flush=True))
    if counts is not None:
        say("  corrections: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
        say(output_dir())


def _review_pairs(cfg: DictConfig) -> None:
    from guardkit.artifacts import write_json
    from guardkit.counterfactual.review import REVIEWS
    from guardkit.folders import claim, refuse_others
    from guardkit.moderation.review_page import review_pairs

    folder = Path(str(cfg.pairs)).expanduser()
    refuse_others(output_dir(), "app", replaces=True)
    summary = review_pairs(
        folder,
        show=cfg.show,
        reviewer=cfg.reviewer,
        host=str(cfg.host),
        port=cfg.port,
        announce=lambda address: print(f"review {folder} at {address} (Ctrl-C ends it)", flush=True),
    )
    with claim(output_dir(), "app", settings_of(cfg), replaces=["agreement.json"]):
        write_json(output_dir() / "agreement.json", summary)
    say(_table(summary))
    say(f"  verdicts are kept in {folder / REVIEWS}")
    say(output_dir())


def _table(summary: dict[str, Any]) -> str:
    lines = [f"  reviewed  {summary['reviewed']} of {summary['pairs']} pairs: {_counts(summary['combined'])}"]
    lines += [f"  {name}  {_counts(counts)}" for name, counts in summary["reviewers"].items()]
    for one in summary["agreement"]:
        kappa = "undefined" if one["kappa"] is None else f"{one['kappa']:.2f}"
        lines.append(f"  {' and '.join(one['reviewers'])}  n={one['n']}  agreement {one['share']:.2f}  kappa {kappa}")
    return "\n".join(lines)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


if __name__ == "__main__":
    app()
