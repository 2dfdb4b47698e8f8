"""What the service counts, in the text format that Prometheus reads."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Kind(NamedTuple):
    type: str
    help: str
    buckets: tuple[float, ...] = ()


_KINDS = {
    "guardkit_requests_total": _Kind("counter", "Requests by path and status."),
    "guardkit_images_total": _Kind("counter", "Decisions by guard and action."),
    "guardkit_reloads_total": _Kind("counter", "Guards taken up anew, by result."),
    "guardkit_queue_images": _Kind("gauge", "Images that wait or are worked on."),
    "guardkit_queue_bytes": _Kind("gauge", "Bytes of the bodies that are held."),
    "guardkit_request_seconds": _Kind(
        "histogram", "Seconds from a request to its answer.", (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
    ),
    "guardkit_batch_images": _Kind("histogram", "Images encoded at once.", (1, 2, 4, 8, 16, 32, 64, 128, 256)),
}
_Labels = tuple[tuple[str, str], ...]


class Figures:
    """Counters and histograms; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, _Labels], float] = {}
        self._histograms: dict[str, list[float]] = {}

    def add(self, name: str, **labels: str) -> None:
        """One more of a counter."""
        key = (name, tuple(labels.items()))
        with self._lock:
            self._counts[key] = self._counts.get(key, 0) + 1

    def observe(self, name: str, value: float) -> None:
        """One value of a histogram."""
        buckets = _KINDS[name].buckets
        with self._lock:
            counts = self._histograms.setdefault(name, [0.0] * (len(buckets) + 2))  # the buckets, all, and their sum
            for i, bound in enumerate(buckets):
                counts[i] += value <= bound
            counts[-2] += 1
            counts[-1] += value

    def text(self, gauges: Mapping[str, float]) -> str:
        """All of it, with the present values of the gauges."""
        with self._lock:
            counts = dict(self._counts) | {(name, ()): value for name, value in gauges.items()}
            histograms = {name: list(values) for name, values in self._histograms.items()}
        lines: list[str] = []
        for name, kind in _KINDS.items():
            lines += [f"# HELP {name} {kind.help}", f"# TYPE {name} {kind.type}"]
            lines += [f"{name}{_shown(labels)} {value:.15g}" for (one, labels), value in sorted(counts.items()) if one == name]
            if name in histograms:
                *below, n, total = histograms[name]
                lines += [f'{name}_bucket{{le="{bound:g}"}} {value:.15g}' for bound, value in zip(kind.buckets, below, strict=True)]
                lines += [f'{name}_bucket{{le="+Inf"}} {n:.15g}', f"{name}_sum {total:.9g}", f"{name}_count {n:.15g}"]
        return "\n".join(lines) + "\n"


def _shown(labels: _Labels) -> str:
    if not labels:
        return ""
    marks = {"\\": r"\\", '"': r"\"", "\n": r"\n"}
    return "{" + ",".join(f'{key}="{"".join(marks.get(one, one) for one in value)}"' for key, value in labels) + "}"
