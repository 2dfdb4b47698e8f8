"""A local web page on which people judge the pairs of a dataset: python -m guardkit.app pairs=DIR"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from guardkit.runs.hydra import main, output_dir, settings_of
from guardkit.terminal import say


@main("app")
def app(cfg: DictConfig) -> None:
    """Shows the page until Ctrl-C, then prints what was said and how far people agree."""
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
