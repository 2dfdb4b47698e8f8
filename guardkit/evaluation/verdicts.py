"""What the figures of a training mean where a reader would otherwise rely on a guard in vain, in sentences. Measures nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from guardkit.data.arms import Arm

# Of the lower end of the interval. A trace that a probe found at 0.58 cost the guards on drawn scenes nothing (docs/counterfactuals.md); traces
# at 0.79 and 0.90 taught guards on photographs the paint. Said is what is surely above the first: with few images the interval
# is wide, and only a strong trace reaches that far.
_TRACE = 0.6
_N_REASONS = 3  # that are spelled out


def untested(n_unsafe: int, n_safe: int) -> str:
    """What test images lack that figures need, in words: "no unsafe image (12 safe ones)"; "" where both labels are there."""
    if n_unsafe and n_safe:
        return ""
    if not n_unsafe and not n_safe:
        return "no image"
    return f"no unsafe image ({n_safe} safe)" if n_safe else f"no safe image ({n_unsafe} unsafe)"


def lacks_a_label(metrics: Mapping[str, Any], *, brings_test_images: bool) -> list[str]:
    """Whether the test set lacks a label, so that nothing shows how good a guard is, and what to do.

    Args:
        metrics: "test" and "cross_validated" as metrics.json has them.
        brings_test_images: whether the source says which images are for testing.
    Returns:
        One sentence, or none.
    """
    test = metrics["test"]
    n_unsafe = round((test["prevalence"] or 0.0) * test["n"])
    lack = untested(n_unsafe, test["n"] - n_unsafe)
    if not lack:
        return []
    label = "unsafe" if test["n"] and not n_unsafe else "safe" if test["n"] else "safe and unsafe"
    more = (
        f"give the source's test set {label} images"
        if brings_test_images
        else f"label more {label} images (of each category at least two that do not look alike), or raise data.test_share"
    )
    others = "; until then look at the cross-validated figures" if metrics["cross_validated"].get("auroc") is not None else ""
    return [
        f"nothing shows how good this guard is: its test set has {lack}, and without both labels there is no AUROC; {more}, or test it on other "
        f"images: python -m guardkit.evaluate guard=GUARD source=folder source.root=OTHER split=all{others}"
    ]


def no_better(metrics: Mapping[str, Any], *, is_trained: bool = True) -> list[str]:
    """Whether a guard is no better than chance, or than flagging everything, and what to try.

    No better than chance: the 95 % interval of AUROC reaches 0.5. No better than flagging everything: F1 is not above what that
    gives on the same images.

    Args:
        metrics: "test", "always_unsafe" and "n_safe" as metrics.json has them.
        is_trained: whether it learned from its labelled images; else they chose its threshold alone.
    Returns:
        One sentence, or none; none too where a label is missing, and flagging everything is never wrong, or always.
    """
    test, always = metrics["test"], metrics["always_unsafe"]["f1"]
    if test["auroc"] is None:
        return []
    found, mend = [], []
    low, high = test["ci"].get("auroc", [test["auroc"]] * 2)
    if low is not None and low <= 0.5:
        found.append(f"than chance (95 % interval of AUROC {low:.3f}–{high:.3f}, chance is 0.5)")
        mend = [
            "more labelled images",
            "another encoder (docs/encoders.md)",
            "more natural safe images (data.safe_per_unsafe)" if metrics["n_safe"] else "natural safe images (experiment=pairs_plus)",
        ]
        if not is_trained:
            mend = [
                "other texts (unsafe_texts and safe_texts of the policy)",
                "another encoder (docs/encoders.md)",
                "training (experiment=unpaired)",
            ]
    if test["f1"] is not None and always is not None and test["f1"] <= always:
        found.append(f"than flagging everything (F1 {test['f1']:.3f} against {always:.3f})")
        # where scores do tell the images apart, it is the threshold that is wrong
        mend = mend or ["another threshold (threshold=balanced)"]
    if not found:
        return []
    return [
        f"as far as its {test['n']} test images tell, this guard is no better {' and no better '.join(found)}; try {', '.join(mend)}, and look at "
        "mistakes.html"
    ]


def unused(metrics: Mapping[str, Any], n_unsafe: int, n_safe: int) -> list[str]:
    """Whether labelled images are left over that would help.

    Args:
        metrics: "n_unsafe" and "n_safe" as metrics.json has them.
        n_unsafe, n_safe: images to train on that the source has.
    Returns:
        A sentence for each label; none where all are used, of safe ones also where an arm uses none.
    """
    labelled, used, wanted = metrics["n_unsafe"], metrics["n_safe"], 4 * metrics["n_unsafe"]
    notes = []
    if labelled < n_unsafe:
        notes.append(f"of {n_unsafe} labelled unsafe images for training {labelled} are used; data.n_unsafe={n_unsafe} takes all")
    if used and min(wanted, n_safe) <= used < n_safe:
        notes.append(f"of {n_safe} labelled safe images for training {used} are used; data.safe_per_unsafe=all takes all")
    elif used and used < n_safe:
        notes.append(
            f"of {n_safe} labelled safe images for training {used} are used; data.safe_per_unsafe=4 takes up to {min(wanted, n_safe)}, which on photographs "
            "was worth as much as twice the labels of unsafe ones (docs/photographs.md)"
        )
    return notes


def unusable(inputs: Mapping[str, Any]) -> list[str]:
    """What the source had to leave out, and why.

    Args:
        inputs: "given" and "rejected" as metrics.json has them.
    Returns:
        One sentence, or none.
    """
    rejected = inputs["rejected"]
    if not rejected:
        return []
    reasons = Counter(inputs.get("reasons") or (one["reason"] for one in rejected))
    named = "names each" if len(rejected) == reasons.total() else f"names the first {len(rejected)}"
    first = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(_N_REASONS))
    more = f"; {len(reasons) - _N_REASONS} other reasons" if len(reasons) > _N_REASONS else ""
    return [f"of {inputs['given']} inputs {reasons.total()} could not be used ({first}{more}); metrics.json {named}"]


def texts(metrics: Mapping[str, Any]) -> list[str]:
    """Whether the policy's texts, in which the guard is anchored, are of no use to it, or of more use without labels.

    Args:
        metrics: "test" and "texts_alone" as metrics.json has them.
    Returns:
        One sentence, or none.
    """
    alone, test = metrics["texts_alone"], metrics["test"]
    if alone is None or alone["auroc"] is None:
        return []
    low, high = alone["ci"].get("auroc", [alone["auroc"]] * 2)
    said = f"AUROC {alone['auroc']:.3f}, 95 % interval {low:.3f}–{high:.3f}"
    if low <= 0.5:
        return [
            f"the policy's texts alone are no better than chance on these test images ({said}), and the guard is pulled towards them: this encoder "
            "may not know their words; reword them (unsafe_texts and safe_texts of the policy), choose another encoder, or head=linear"
        ]
    if test["auroc"] is not None and test["ci"].get("auroc", [0.0, test["auroc"]])[1] < low:
        return [
            f"the policy's texts alone do better on these test images ({said}) than with the labels (AUROC {test['auroc']:.3f}); look for wrong "
            "labels in mistakes.html, try loss.l2=10, more labels, or experiment=zero_shot"
        ]
    return []


def editor_trace(metrics: Mapping[str, Any], arm: Arm, editor: str) -> list[str]:
    """Whether the guard may have learned the editor instead of the feature, and what to do.

    Args:
        metrics: "controls", and what is left of the trace where it was erased, as metrics.json has them.
        arm: that was trained: nothing is said where images of both labels, or of none, passed through the editor, nor where the
            head had its trace erased.
        editor: its name.
    Returns:
        One sentence, or none.
    """
    probe = metrics["controls"]["null_edit"]
    if (
        not arm.edits_one_label_only
        or "edited_vs_original_auroc_after_leace" in metrics
        or probe["auroc"] is None
        or probe["ci"]["auroc"][0] <= _TRACE
    ):
        return []
    low, high = probe["ci"]["auroc"]
    others = " or ".join(f"experiment={name}" for name in ("pairs_plus", "pairs_balanced") if name != arm.name)
    return [
        f"the guard may have learned the editor: a probe tells images that passed through editor={editor} with an irrelevant edit from untouched ones "
        f"(AUROC {probe['auroc']:.3f}, 95 % interval {low:.3f}–{high:.3f}, 0.5 is no trace), and only safe training images passed through it; "
        f"try {others}, head=anchored head.leace_images=256 (or head=linear), or another editor"
    ]
