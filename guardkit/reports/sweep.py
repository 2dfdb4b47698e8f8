"""What a sweep says: summary.json, sample_efficiency.png, report.md and report.html."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from guardkit.artifacts import write_json, written
from guardkit.reports import sweep_page as pages
from guardkit.reports import sweep_plots as plots

SUMMARY, PICTURE = "summary.json", "sample_efficiency.png"


def write_report(folder: Path, summary: dict[str, Any]) -> str:
    """Writes everything but the cells and their table.

    Args:
        folder: to write to.
        summary: the content of summary.json, see `guardkit.efficiency.measure`.
    Returns:
        A short table to print.
    """
    write_json(folder / SUMMARY, summary)
    with written(folder / PICTURE) as temporary:
        plots.sample_efficiency(summary, temporary)
    text = pages.markdown(summary, PICTURE)
    with written(folder / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    picture = "data:image/png;base64," + base64.b64encode((folder / PICTURE).read_bytes()).decode()
    with written(folder / "report.html") as temporary:
        temporary.write_text(pages.page(summary, picture), encoding="utf-8")
    return pages.short_table(summary)
