"""A guard's model card, in the form of the Hugging Face Hub: what it decides, under which terms, what it promises, what was measured, and
what it must not be used for. Knows the content of config.json and the policy, and no file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from guardkit.encoders.lookup import ENCODER_KINDS
from guardkit.encoders.places import HUB
from guardkit.heads import HEAD_KINDS
from guardkit.licences import UNKNOWN, all_licences
from guardkit.policy import Policy

# of the licences that the Hub knows by name, those that are usual here; any other is "other" with a name
_OF_THE_HUB = frozenset(
    [
        "mit",
        "apache-2.0",
        "bsd-2-clause",
        "bsd-3-clause",
        "mpl-2.0",
        "lgpl-3.0",
        "gpl-3.0",
        "agpl-3.0",
        "cc0-1.0",
        "cc-by-4.0",
        "cc-by-sa-4.0",
        "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nd-4.0",
        "odc-by",
        "pddl",
        "cdla-permissive-2.0",
        "openrail",
        "creativeml-openrail-m",
        "unknown",
    ]
)
_NOT_KNOWN = "not known to guardkit: ask where it came from"


def _promised(config: Mapping[str, Any]) -> str:
    """Of its thresholds, where they were calibrated; and what its older figures mean then."""
    if config["calibration"] is None:
        return "They were not calibrated, and promise nothing: `python -m guardkit.calibrate guard=THIS_FOLDER source=... max_fpr=0.01`.\n"
    about = config["calibration"]["about"]
    if not about:
        return "Some categories were calibrated; the decision was not since the guard was extended, and promises nothing.\n"
    promises = "".join(
        f"- {' '.join(str(promise).split())}\n" for name in ("promises", "promises_by_category") for promise in about.get(name, [])
    )
    fitted = (
        "probabilities" if config["calibration"]["decision"]["kind"] != "none" else "the head's own, not fitted to images, and restated"
    )
    return (
        f"Scores are {fitted} where {about.get('prevalence')} of the images are unsafe. Promised, each by itself, for images like the {about.get('n_safe')} safe and "
        f"{about.get('n_unsafe')} unsafe ones that the thresholds were chosen on:\n\n{promises}\nThe figures below were measured before, on the scores and at the threshold of then.\n"
    )


def model_card(config: Mapping[str, Any], policy: Policy, called: str) -> str:
    """The card of a guard.

    Args:
        config: the content of config.json.
        policy: that it enforces.
        called: where it is loaded from, a folder or an id of the Hub.
    """
    test, pairs = config["metrics"].get("test") or {}, config["metrics"].get("pairs") or {}

    def figure(value: Any) -> str:
        return "not measured" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    def shown(value: float | None, digits: int = 3) -> str:
        return "none" if value is None else f"{value:.{digits}f}"

    rows = [(name, test.get(name)) for name in ("auroc", "average_precision", "f1", "recall", "fpr", "n")]
    rows.insert(2, ("threshold of the next three", test.get("threshold")))  # it may have been set anew since
    rows += [(name, pairs.get(name)) for name in ("pair_accuracy", "ranking_accuracy")] + [("test pairs", pairs.get("n"))]
    table = "\n".join(f"| {name} | {figure(value)} |" for name, value in rows)
    packages = dict.fromkeys(kinds.package(config[kinds.part]["kind"]) for kinds in (HEAD_KINDS, ENCODER_KINDS))
    foreign = [package for package in packages if package is not None]
    trusted = f", trust={json.dumps(foreign)}" if foreign else ""
    points = "\n".join(
        f"| {name} | {shown(point['threshold'], 4)} | {shown(point['recall'])} | {shown(point['fpr'])} (95 % upper bound "
        f"{shown(point['fpr_ci_high'])}, {point['n_safe']} safe images) | {point.get('reason', '')} |"
        for name, point in config["operating_points"].items()
    )
    decision = config["thresholds"]["decision"]
    named = {"unsafe (the decision)": decision, **config["thresholds"]["categories"]}
    bands = "\n".join(f"| {name} | {band['review']:.4g} | {band['block']:.4g} |" for name, band in named.items())
    promised = _promised(config)
    notes = "".join(f"{' '.join(note.split())}\n\n" for note in config["metrics"].get("notes") or ())
    categories = "\n".join(f"- **{category.name}**: {category.definition}" for category in policy.categories)
    licences = all_licences(config.get("licences", {}), config["encoder"]["config"])
    return f"""---
{_front_matter(config, licences)}---

# Image guard for the policy `{policy.name}`

A head of kind `{config["head"]["kind"]}` on frozen embeddings of {config["encoder"]["name"]} ({config["encoder"]["dim"]}-d). Label 1 is unsafe; flagged means score >= {decision["review"]:.4g}.

```python
from guardkit import GuardClassifier

decisions = GuardClassifier.from_pretrained("{called}"{trusted}).predict(["image.jpg"])
```

## What it was trained to flag

{categories}

Policy digest `{config["policy"]["digest"][:16]}`, encoder fingerprint `{config["encoder"]["fingerprint"][:16]}`, guardkit {config["guardkit_version"]}.
Training: {json.dumps(config["training"])}.

## Thresholds

Below `review` an image is allowed, from `review` on a person should look at it, from `block` on it is blocked. Where both are the same nothing is reviewed.

| score of | review | block |
|---|---|---|
{bands}

{promised}
## Measured on its test set

| metric | value |
|---|---|
{table}

{notes}## Operating points, chosen on validation images

| name | threshold | recall | false-positive rate | cannot be promised, because |
|---|---|---|---|---|
{points}

## What it must not be used for

{_must_not(config, policy, licences)}
## Licences

| of | licence |
|---|---|
| code (guardkit) | {licences["code"]} |
| head (`model.safetensors`) | {_said(licences["head"])} |
| encoder ({config["encoder"]["name"]}), which is not part of this | {_said(licences["encoder"])} |
| data it was trained on | {_said(licences["data"])} |

`training_images.parquet`, where it is here, has hashes of the images that the guard has seen, so that it is tested on others. It holds no
image, no name and no place.

## Limits

The figures hold for images like those of the test set. A guard this small sees only what its encoder sees; measure it on your own images before you rely on it, and let people review what it decides.
It was not made to withstand people who try to get past it.
"""


def _front_matter(config: Mapping[str, Any], licences: Mapping[str, str]) -> str:
    """What the Hub reads, in YAML."""
    name = licences["head"].lower()
    lines = ["library_name: guardkit", "pipeline_tag: image-classification", "tags: [guardkit, image-safety, content-moderation]"]
    if name in _OF_THE_HUB:
        lines.append(f"license: {name}")
    else:
        lines += ["license: other", f"license_name: {re.sub('[^a-z0-9.]+', '-', name).strip('-')}"]
    weights = str(config["encoder"]["config"].get("weights"))
    if weights.startswith(HUB):
        lines.append(f"base_model: {json.dumps('/'.join(weights.removeprefix(HUB).split('/')[:2]))}")
    return "".join(f"{line}\n" for line in lines)


def _said(licence: str) -> str:
    return _NOT_KNOWN if licence == UNKNOWN else licence


def _must_not(config: Mapping[str, Any], policy: Policy, licences: Mapping[str, str]) -> str:
    """The uses that are out of bounds for any guard, and those that this one's facts rule out, as a list."""
    said = [
        f"Anything but {', '.join(policy.category_names)}, as defined above. It says nothing of other things, and an image that it lets pass is "
        "not safe for that.",
        "To decide alone about people: who is banned, reported or refused. What it blocks must be open to an appeal that a person decides.",
        "To find out who somebody is, what they believe or where they come from, or to watch people.",
        "Instead of what the law asks for, such as the reporting of images of abuse and the lists of hashes for it.",
        "To make or to look for the images that it flags, or as a reward for a model that does.",
    ]
    if policy.harmless:
        said.insert(0, "Moderation of any kind: its policy is of harmless stand-ins, for experiments.")
    if config["calibration"] is None:
        said.append("At its thresholds, where false alarms or misses cost something: nobody has calibrated them.")
    else:
        said.append("At another share of unsafe images, or on other kinds of images, than it was calibrated for: calibrate it anew.")
    closed = [part for part, name in licences.items() if re.search(r"(^|[^a-z])nc([^a-z]|$)|non-?commercial|research", name.lower())]
    if closed:
        said.append(f"In a product or service: the licence of its {' and '.join(closed)} does not allow it.")
    if config["encoder"]["config"].get("weights") == "openai":
        said.append("The encoder's model card (OpenAI's CLIP) calls any deployed use of it out of scope; its licence does not forbid it.")
    return "".join(f"- {line}\n" for line in said)
