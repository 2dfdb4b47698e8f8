"""report.html of a run over many images: how many were decided how, and the queue for people, most valuable first."""

from __future__ import annotations

import base64
import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from guardkit.classifier import GuardClassifier
from guardkit.metrics.intervals import clopper_pearson
from guardkit.moderation.ordering import value
from guardkit.pages import render

N_SHOWN = 120


def summarised(
    rows: Iterable[Mapping[str, Any]], guard: GuardClassifier, scope: tuple[str, ...] | None, counts: Mapping[str, int]
) -> dict[str, Any]:
    """What page and table say, from one pass over the rows."""
    actions, named, banks, errors = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    duplicates = near = stored = 0
    queue: list[tuple[tuple[float, ...], int, Mapping[str, Any]]] = []
    for number, row in enumerate(rows):
        actions[row["action"]] += 1
        named.update(row["violated"] or ())
        banks.update([row["bank"]] if row["bank"] else ())
        errors.update([row["error"]] if row["error"] else ())
        duplicates += row["duplicate_of"] is not None
        near += row["near_duplicate_of"] is not None
        stored += row["score"] is not None and row["sha256"] is None
        if row["action"] != "allow" and row["duplicate_of"] is None:
            heapq.heappush(queue, (value(row), -number, row))
            if len(queue) > N_SHOWN:
                heapq.heappop(queue)
    given = counts["given"]
    return {
        "given": given,
        "decided": counts["decided"],
        "rejected": counts["rejected"],
        "actions": [_rate(action, actions[action], given) for action in ("allow", "review", "block", "error")],
        "categories": [_rate(name, named[name], given) for name in guard.policy.category_names if scope is None or name in scope],
        "banks": dict(banks.most_common()),
        "errors": dict(errors.most_common(8)),
        "duplicates": duplicates,
        "near_duplicates": near,
        "stored": stored,
        "queue": [row for _, _, row in sorted(queue, key=lambda one: (one[0], one[1]), reverse=True)],
    }


def _rate(name: str, n: int, given: int) -> dict[str, Any]:
    low, high = clopper_pearson(n, given) if given else (0.0, 1.0)
    return {"name": name, "n": n, "share": n / given if given else 0.0, "low": low, "high": high}


def report_page(facts: Mapping[str, Any], guard: GuardClassifier, scope: tuple[str, ...] | None) -> str:
    """The page, as one text."""
    shown = [
        {
            "id": row["id"],
            "action": row["action"],
            "score": row["score"],
            "why": row["error"] or (f"known by {row['bank']}" if row["bank"] else ""),
            "violated": ", ".join(row["violated"] or ()),
            "frame": row["frame"],
            "near": row["near_duplicate_of"],
            "takes_verdict": row["action"] in ("review", "block")
            and row["sha256"] is not None,  # one is of bytes: of stored vectors nobody knows them
            "data": None if row["_thumbnail"] is None else "data:image/jpeg;base64," + base64.b64encode(row["_thumbnail"]).decode(),
        }
        for row in facts["queue"]
    ]
    n_flagged = sum(one["n"] for one in facts["actions"] if one["name"] != "allow")
    return render(
        "moderation.html",
        facts=facts,
        policy=guard.policy.name,
        guard=guard.name,
        scope=", ".join(scope) if scope else "",
        bands={"decision": guard.thresholds.decision, **guard.thresholds.categories},
        promises=[] if guard.calibration is None else guard.calibration.promises,
        shown=shown,
        categories=guard.policy.category_names,
        n_flagged=n_flagged,
    )


def short_table(facts: Mapping[str, Any]) -> str:
    """The main numbers, to print."""
    lines = [f"  given     {facts['given']}: {facts['decided']} decided, {facts['rejected']} rejected"]
    for one in facts["actions"]:
        lines.append(f"  {one['name']:<9} {one['n']}  ({100 * one['share']:.2f} %, {100 * one['low']:.2f} to {100 * one['high']:.2f})")
    said = [f"{one['name']} {one['n']}" for one in facts["categories"] if one["n"]]
    lines += [f"  violated  {', '.join(said)}"] if said else []
    lines += [f"  known     {', '.join(f'{name} {n}' for name, n in facts['banks'].items())}"] if facts["banks"] else []
    if facts["duplicates"] or facts["near_duplicates"]:
        lines.append(f"  repeated  {facts['duplicates']} with the bytes of an earlier one, {facts['near_duplicates']} that look like one")
    if facts["stored"]:
        lines.append(f"  stored    {facts['stored']} decided by stored embeddings: no pictures, and repeated ones are not found")
    lines += [f"  rejected  {n} x {reason}" for reason, n in facts["errors"].items()]
    return "\n".join(lines)
