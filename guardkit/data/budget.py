"""What a source can give an arm, known before anything is edited or embedded: enough images, and images that can be edited.

Arms are compared at equal budgets. Where a source cannot serve one in full, that is said in a note, which a training report
repeats; where it cannot serve it at all, that is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from guardkit.counterfactual.pipeline import CounterfactualPipeline
from guardkit.data.arms import Choice, Orders, choose, n_natural
from guardkit.data.columns import together, with_images
from guardkit.editors.base import Kind
from guardkit.schema import InputError, Record

_LEAST = 2  # images of a kind: one trains, one validates


def chosen_in_budget(
    orders: Orders, n_unsafe: int | Literal["all"], kinds: Sequence[str], safe_per_unsafe: int | str, where: str, why: str = ""
) -> tuple[Choice, list[str]]:
    """The images of an arm, and what is missing from its budget, in sentences.

    The labelled unsafe images are those of every other arm with this budget and seed; where images are short, an arm has
    fewer negatives rather than other unsafe images.

    Args:
        orders: of the training pool.
        n_unsafe: the label budget, or "all".
        kinds: of the arm's images.
        safe_per_unsafe: natural safe images for each unsafe one, or "all".
        where: names the source.
        why: what was rejected, to end an error with.
    Raises:
        InputError: too few images of a kind that the arm needs.
    """
    unsafe, safe = orders.unsafe, orders.safe
    if len(unsafe) < _LEAST:
        raise InputError(
            f"{where} leaves {len(unsafe)} unsafe image(s) for training; at least {_LEAST} are needed: label more, or lower data.test_share{why}"
        )
    if "natural" in kinds and len(safe) < _LEAST:
        raise InputError(
            f"{where} leaves {len(safe)} safe image(s) for training; this arm needs at least {_LEAST}: add some, or use experiment=pairs_aug{why}"
        )
    n_all, notes = len(unsafe) - orders.n_corrected(1), []
    n = n_all if n_unsafe == "all" else min(n_unsafe, n_all)
    if n_unsafe != "all" and n < n_unsafe:
        notes.append(f"asked for {n_unsafe} unsafe images (data.n_unsafe), {where} has {n} for training: using all of them")
    n_safe = n_natural(n, safe_per_unsafe, orders)
    choice = choose(orders, n, kinds, safe_per_unsafe)
    n_chosen = len(choice.of("natural"))
    if "natural" in kinds and n_chosen < n_safe and safe_per_unsafe != "all":
        beside = " that are no look-alikes" if n_chosen < len(safe) else ""
        notes.append(f"asked for {n_safe} safe images, {where} has {n_chosen}{beside} for training: using all of them")
    n_alike = len(choice.of("look_alike"))
    if "look_alike" in kinds and n_alike < n:
        short = f"asked for {n} look-alikes, {where} has {n_alike} other safe images that are marked (by a category) or found as such"
        if n_alike < _LEAST:
            raise InputError(
                f"{short}; mark some or let the policy's texts find them (data.look_alikes=texts), add safe images, or use experiment=unpaired"
            )
        notes.append(f"{short}: using all of them")
    n_others = len(choice.of("shuffled"))
    if "shuffled" in kinds and n_others < n:
        short = (
            f"of the {len(unsafe)} unsafe images that {where} has for training, {n_others} are left beside the {n} labelled ones, and "
            f"experiment=shuffled_pairs takes the counterfactuals of {n} others"
        )
        mend = f"set data.n_unsafe={max(_LEAST, len(unsafe) // 2)} for every arm that is compared, or add unsafe images"
        if n_others < _LEAST:
            raise InputError(f"{short}; {mend}")
        notes.append(f"{short}: using {n_others}, so that it is not comparable with arms that have {n} negatives ({mend})")
    return choice, notes


def shortage(orders: Orders, n_unsafe: int, kinds: Sequence[str], safe_per_unsafe: int | str, where: str) -> str | None:
    """What the source has too little of to serve an arm in full, in the same words for every seed, or None."""
    n = len(orders.unsafe)
    if n < n_unsafe:
        return f"more unsafe images are needed than the {n} that {where} has for training"
    if "shuffled" in kinds and n < 2 * n_unsafe:
        return f"as many other unsafe images are needed beside the labelled ones, and {where} has {n} for training"
    if "natural" in kinds and len(orders.safe) < max(_LEAST, n_natural(n_unsafe, safe_per_unsafe, orders)):
        return f"more safe images are needed than the {len(orders.safe)} that {where} has for training"
    if "look_alike" in kinds:  # the others have what they ask for, and every cell of a sweep comes by here
        choice = choose(orders, n_unsafe, kinds, safe_per_unsafe)
        if "natural" in kinds and safe_per_unsafe != "all" and len(choice.of("natural")) < n_natural(n_unsafe, safe_per_unsafe, orders):
            return f"more safe images are needed beside the look-alikes than {where} has for training"
        if len(choice.of("look_alike")) < n_unsafe:
            return (
                f"more look-alikes are needed than the {len(orders.look_alikes)} that {where} has for training, marked as such (by a category) or "
                "found (data.look_alikes=texts)"
            )
    return None


def edited(choice: Choice, transform: str) -> list[tuple[str, Kind, Sequence[Record]]]:
    """What an arm asks an editor for: whose images they are, the kind of edit, the images."""
    wanted: list[tuple[str, Kind, Sequence[Record]]] = []
    if transform == "null_edit":
        safe = together(choice.of("natural"), choice.of("look_alike"))
        wanted += [("unsafe images", "null", choice.of("unsafe")), ("safe images", "null", safe)]
    wanted.append(("unsafe images", "counterfactual", choice.of("counterfactual")))
    wanted.append(("unsafe images", "null", choice.of("null_edit")))
    wanted.append(("other unsafe images", "counterfactual", choice.of("shuffled")))
    return [one for one in wanted if one[2]]


def check_edits(pipeline: CounterfactualPipeline, wanted: Sequence[tuple[str, Kind, Sequence[Record]]], where: str) -> list[str]:
    """What the editor will refuse whatever the images show, in sentences.

    Args:
        pipeline: has the editor.
        wanted: see `edited`.
        where: names the source.
    Raises:
        InputError: it refuses all images of a kind.
    """
    notes = []
    for what, kind, records in wanted:
        refused = pipeline.refusals(records, kind)
        reasons = "; ".join(f"{count} x {reason}" for reason, count in sorted(refused.items()))
        n = sum(refused.values())
        if n == len(records):
            raise InputError(
                f"none of the {n} {what} of {where} can be edited ({reasons}); choose another editor=, or in training experiment=unpaired, which edits none"
            )
        if n:
            notes.append(f"{n} of the {len(records)} {what} of {where} cannot be edited ({reasons})")
    return notes


def check_transplants(pipeline: CounterfactualPipeline, choice: Choice, where: str) -> list[str]:
    """What stands in the way of transplants that an arm asks for, in sentences.

    Args:
        pipeline: has the safe photographs that objects are put into.
        choice: the images of the arm.
        where: names the source.
    Raises:
        InputError: none can be made.
    """
    records = choice.of("transplant") or choice.of("transplant_safe")
    if not records:
        return []
    boxed = [record for record in with_images(records) if record.region is not None]
    if not boxed:
        raise InputError(
            f"none of the {len(records)} unsafe images of {where} has a box, and transplants cut an object out by its box; give some"
        )
    if len(pipeline.photographs) < 2:
        raise InputError(
            f"{where} has {len(pipeline.photographs)} safe training images with a box, and transplants need at least 2 to put objects into; "
            "give safe images a box around an object, or use experiment=unpaired"
        )
    if len(boxed) < len(records):
        return [f"{len(records) - len(boxed)} of the {len(records)} unsafe images of {where} have no box and are not transplanted"]
    return []
