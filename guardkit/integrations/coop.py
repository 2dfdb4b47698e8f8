"""A guard as signals of ROOST's Coop: scores that rules compare with a threshold, recommended thresholds, and a model card.

The contract is that of Coop's `types/integration.ts` (`IntegrationManifest`, `PluginSignalDescriptor`, `ModelCard` and its required
sections), as its example plugin fills it. Coop's plugins are JavaScript: everything here but `run` is plain JSON, for a plugin
that asks a service of yours for the score.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guardkit import __version__
from guardkit.artifacts import write_json
from guardkit.classifier import GuardClassifier
from guardkit.schema import ImageError, InputError
from guardkit.thresholds import Band

_OUTPUT = {"scalarType": "NUMBER"}


def coop_signals(guard: GuardClassifier) -> CoopSignals:
    """A guard as an integration of Coop: one signal for "unsafe" and one for each category, on images."""
    return CoopSignals(guard)


class CoopSignals:
    """What a plugin for Coop says, and what it asks.

    Attributes:
        manifest: of the integration, plain JSON, with the model card.
        signals: one descriptor each, plain JSON; the functions that Coop expects beside it are a few lines of the plugin.
    """

    def __init__(self, guard: GuardClassifier) -> None:
        self._guard = guard
        integration = f"GUARDKIT_{guard.policy.name.upper()}"
        self._labels = {f"{integration}_{name.upper()}": name for name in ("unsafe", *guard.policy.category_names)}
        version = f"{__version__}+{guard.fingerprint[:12]}"
        self.manifest: dict[str, Any] = {
            "id": integration,
            "name": f"guardkit: {guard.policy.name}",
            "version": version,
            "description": guard.policy.description,
            "requiresConfig": False,
            "signalTypeIds": list(self._labels),
            "modelCard": _model_card(guard, version),
        }
        bands = {"unsafe": guard.thresholds.decision, **guard.thresholds.categories}
        self.signals = [self._signal(kind, name, bands[name]) for kind, name in self._labels.items()]

    def run(self, signal: str, image: Any) -> dict[str, Any]:
        """What a signal gives for an image.

        Args:
            signal: its type, of `manifest["signalTypeIds"]`.
            image: whatever `GuardClassifier.predict` takes as one; nothing is fetched.
        Returns:
            {"outputType", "score"}, a probability in [0, 1].
        Raises:
            InputError: there is no such signal.
            ImageError: the image cannot be decided. There is no score that a rule could take for safe.
        """
        if signal not in self._labels:
            raise InputError(f"there is no signal {signal!r}; there are {', '.join(self._labels)}")
        (decision,) = self._guard.predict([image])
        if decision.action == "error":
            raise ImageError(decision.error or "not decided")
        name = self._labels[signal]
        return {"outputType": _OUTPUT, "score": decision.score if name == "unsafe" else decision.categories[name]}

    def save(self, path: str | Path) -> None:
        """Writes {"manifest", "signals"} as a JSON file for the plugin."""
        write_json(Path(path), {"manifest": self.manifest, "signals": self.signals})

    def _signal(self, kind: str, name: str, band: Band) -> dict[str, Any]:
        what = "violates the policy" if name == "unsafe" else f"violates its category {name}"
        return {
            "id": {"type": kind},
            "displayName": f"{self._guard.policy.name}: {name}",
            "description": f"Probability in [0, 1] that an image {what}.",
            "docsUrl": None,
            "recommendedThresholds": {"highPrecisionThreshold": band.block, "highRecallThreshold": band.review},
            "supportedLanguages": "ALL",
            "pricingStructure": {"type": "FREE"},
            "eligibleInputs": ["IMAGE"],
            "outputType": _OUTPUT,
            "needsMatchingValues": False,
            "eligibleSubcategories": [],
            "needsActionPenalties": False,
            "integration": self.manifest["id"],
            "allowedInAutomatedRules": True,
        }


def _model_card(guard: GuardClassifier, version: str) -> dict[str, Any]:
    policy, decision = guard.policy, guard.thresholds.decision
    promises = guard.calibration.about.get("promises", []) if guard.calibration else []
    sections = {
        "trainingData": ("Training data", {**_flat(guard.training), "Encoder": guard.encoder.name, "Head": guard.head.kind}),
        "policyAndTaxonomy": (
            "Policy and taxonomy",
            {"Policy": policy.description or policy.name, **{one.name: one.definition for one in policy.categories}},
        ),
        "annotationMethodology": (
            "Annotation methodology",
            {"Labels": f"given by those who trained the guard, under the policy with the digest {policy.digest}"},
        ),
        "performanceBenchmarks": (
            "Performance and benchmarks",
            {**_flat(guard.metrics.get("test") or {}), "Promises": "; ".join(promises) or "none: it was not calibrated"},
        ),
        "biasAndLimitations": (
            "Bias and limitations",
            {
                "Images": "Figures hold for images like those it was measured on. A score is no proof; a person decides what the policy leaves open."
            },
        ),
        "implementationGuidance": (
            "Implementation guidance",
            {
                "Review from": f"{decision.review:g}",
                "Block from": f"{decision.block:g}",
                "Errors": "An image that cannot be read has no score: send it to review.",
            },
        ),
        "relevantLinks": ("Relevant links", {"Software": f"guardkit {__version__}"}),
    }
    return {
        "modelName": f"{guard.name} guard for {policy.name}",
        "version": version,
        "sections": [
            {"id": key, "title": title, "fields": [{"label": label, "value": str(value)} for label, value in fields.items()]}
            for key, (title, fields) in sections.items()
        ],
    }


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values among facts, by name."""
    return {name: value for name, value in facts.items() if isinstance(value, (str, int, float)) and not isinstance(value, bool)}
