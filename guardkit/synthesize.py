"""Makes a pair dataset: python -m guardkit.synthesize source=folder source.root=DIR policy=NAME editor=inpaint"""

from __future__ import annotations

from collections.abc import Mapping

from omegaconf import DictConfig

from guardkit._entry import callable_as_function
from guardkit.runs.hydra import main, output_dir
from guardkit.schema import InputError
from guardkit.terminal import say


@main("synthesize")
def synthesize(cfg: DictConfig) -> None:
    """Writes a pair dataset and prints its counts."""
    from guardkit.runs.synthesize import run

    manifest = run(cfg, output_dir())
    names = ("given", "unreadable", "edited", "tries", "accepted", "yield_per_try", "yield_per_image")
    say("\n".join(f"  {name:<16} {_short(manifest[name])}" for name in names))
    say("\n".join(f"  {count:>6} x {reason}" for reason, count in manifest["rejected"].items()))
    say(output_dir())
    if not manifest["accepted"]:
        raise InputError(_nothing_accepted(manifest["tries"], manifest["rejected"]))


def _nothing_accepted(tries: int, rejected: Mapping[str, int]) -> str:
    """What a dataset without a pair says: who rejected what, and what to do."""
    if not tries:
        return "no image could be read, so that there is no pair; rejected.parquet says why"
    reasons = "; ".join(f"{count} x {reason}" for reason, count in sorted(rejected.items(), key=lambda one: -one[1])[:3])
    advice = {
        "verifier=": "ask less of the verifier (verifier.max_score, min_drop, min_preservation, min_arrival) or choose another verifier=",
        "instructor=": "choose another instructor= or correct its settings",
        "": "choose another editor= or correct its settings",
    }
    # a reason counts for the first that it begins with; the empty word is the editor
    found = {next(who for who in advice if reason.startswith(who)) for reason in rejected}
    todo = "; ".join(text for who, text in advice.items() if who in found)
    return f"accepted none of {tries} edits ({reasons}): the dataset is complete and of no use; look at gallery.html, then {todo}"


def _short(value: float | int | None) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    synthesize()
else:
    callable_as_function(__name__)
