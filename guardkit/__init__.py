"""guardkit: lightweight image guards on frozen CLIP and SigLIP embeddings, trained with counterfactual pairs.

What is listed here is public; everything else is internal and may change without notice.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guardkit.api.calibrate import CalibrationReport, calibrate
    from guardkit.api.compare import ComparisonReport, compare
    from guardkit.api.embed import embed
    from guardkit.api.evaluate import EvaluationReport, evaluate
    from guardkit.api.export import ExportReport, export_guard
    from guardkit.api.fetch import fetch_encoder
    from guardkit.api.finetune import finetune
    from guardkit.api.moderate import ModerationReport, moderate
    from guardkit.api.sweep import SweepReport, sweep
    from guardkit.api.synthesize import synthesize
    from guardkit.api.train import train_guard
    from guardkit.api.trained import TrainingReport
    from guardkit.classifier import GuardClassifier
    from guardkit.counterfactual.edits import Edits
    from guardkit.counterfactual.instructor import Instructor, TemplateInstructor
    from guardkit.counterfactual.pipeline import CounterfactualPipeline
    from guardkit.counterfactual.verifier import Verifier
    from guardkit.data.arms import ARMS, Arm
    from guardkit.data.datamodule import GuardDataModule
    from guardkit.data.sources.base import Loaded, Source
    from guardkit.data.sources.corrected import CorrectedSource
    from guardkit.data.sources.embeddings import EmbeddingsSource
    from guardkit.data.sources.folder import FolderSource
    from guardkit.data.sources.hub import HubSource
    from guardkit.data.sources.pairs import PairsSource
    from guardkit.data.sources.parquet import ParquetSource
    from guardkit.data.sources.policy_items import PolicyItemsSource
    from guardkit.data.sources.scenes import ScenesSource
    from guardkit.editors.base import Editor, EditRequest, EditResult
    from guardkit.editors.inpaint import InpaintEditor
    from guardkit.editors.scenes import ScenesEditor
    from guardkit.encoders.base import Differentiable, Encoder, EncodesTexts
    from guardkit.encoders.onnx import OnnxEncoder
    from guardkit.encoders.open_clip import OpenClipEncoder
    from guardkit.encoders.transformers import TransformersEncoder
    from guardkit.encoders.vlm import VLMEncoder
    from guardkit.explaining.explanation import Explanation
    from guardkit.fitting.module import BestHead, GuardModule
    from guardkit.fitting.objective import Objective
    from guardkit.fitting.retraining import Retrained
    from guardkit.fitting.terms import Gaps, Term
    from guardkit.heads import AnchoredHead, Head, JoinedHead, LinearHead, MLPHead, PromptHead
    from guardkit.integrations.coop import coop_signals
    from guardkit.integrations.curator import curator_stage
    from guardkit.integrations.dataset_columns import dataset_columns
    from guardkit.integrations.guarded_pipeline import guarded
    from guardkit.integrations.image_classification import image_classifier
    from guardkit.integrations.reactions import UnsafeImageError
    from guardkit.integrations.safety_checker import safety_checker
    from guardkit.integrations.threatexchange import threatexchange_classifier
    from guardkit.moderation.collecting import collect_corrections
    from guardkit.policy import Category, Policy
    from guardkit.schema import Decision, EmbeddingGuard, Guard, ImageError, ImageGuard, InputError, Judgment, Record, Rejected
    from guardkit.thresholds import Band, Thresholds

__version__ = "0.1.0"

# public name: the module it lives in. Each is imported on first use, so that `import guardkit` stays quick and loads no torch
_HOMES = {
    # decisions
    "GuardClassifier": "guardkit.classifier",
    "Decision": "guardkit.schema",
    "Explanation": "guardkit.explaining.explanation",
    "Thresholds": "guardkit.thresholds",
    "Band": "guardkit.thresholds",
    "Policy": "guardkit.policy",
    "Category": "guardkit.policy",
    # in other code
    "safety_checker": "guardkit.integrations.safety_checker",
    "guarded": "guardkit.integrations.guarded_pipeline",
    "UnsafeImageError": "guardkit.integrations.reactions",
    "image_classifier": "guardkit.integrations.image_classification",
    "dataset_columns": "guardkit.integrations.dataset_columns",
    "threatexchange_classifier": "guardkit.integrations.threatexchange",
    "coop_signals": "guardkit.integrations.coop",
    "curator_stage": "guardkit.integrations.curator",
    # the work of the commands
    "train_guard": "guardkit.api.train",
    "finetune": "guardkit.api.finetune",
    "TrainingReport": "guardkit.api.trained",
    "embed": "guardkit.api.embed",
    "fetch_encoder": "guardkit.api.fetch",
    "synthesize": "guardkit.api.synthesize",
    "evaluate": "guardkit.api.evaluate",
    "EvaluationReport": "guardkit.api.evaluate",
    "Retrained": "guardkit.fitting.retraining",
    "calibrate": "guardkit.api.calibrate",
    "CalibrationReport": "guardkit.api.calibrate",
    "compare": "guardkit.api.compare",
    "ComparisonReport": "guardkit.api.compare",
    "moderate": "guardkit.api.moderate",
    "collect_corrections": "guardkit.moderation.collecting",
    "export_guard": "guardkit.api.export",
    "ExportReport": "guardkit.api.export",
    "ModerationReport": "guardkit.api.moderate",
    "sweep": "guardkit.api.sweep",
    "SweepReport": "guardkit.api.sweep",
    "Arm": "guardkit.data.arms",
    "ARMS": "guardkit.data.arms",
    # Lightning
    "GuardModule": "guardkit.fitting.module",
    "BestHead": "guardkit.fitting.module",
    "Objective": "guardkit.fitting.objective",
    "Term": "guardkit.fitting.terms",
    "Gaps": "guardkit.fitting.terms",
    "GuardDataModule": "guardkit.data.datamodule",
    # images and embeddings
    "Encoder": "guardkit.encoders.base",
    "EncodesTexts": "guardkit.encoders.base",
    "Differentiable": "guardkit.encoders.base",
    "OpenClipEncoder": "guardkit.encoders.open_clip",
    "TransformersEncoder": "guardkit.encoders.transformers",
    "VLMEncoder": "guardkit.encoders.vlm",
    "OnnxEncoder": "guardkit.encoders.onnx",
    "Source": "guardkit.data.sources.base",
    "Loaded": "guardkit.data.sources.base",
    "Record": "guardkit.schema",
    "Rejected": "guardkit.schema",
    "FolderSource": "guardkit.data.sources.folder",
    "CorrectedSource": "guardkit.data.sources.corrected",
    "ParquetSource": "guardkit.data.sources.parquet",
    "EmbeddingsSource": "guardkit.data.sources.embeddings",
    "HubSource": "guardkit.data.sources.hub",
    "PairsSource": "guardkit.data.sources.pairs",
    "PolicyItemsSource": "guardkit.data.sources.policy_items",
    "ScenesSource": "guardkit.data.sources.scenes",
    # counterfactuals
    "CounterfactualPipeline": "guardkit.counterfactual.pipeline",
    "Edits": "guardkit.counterfactual.edits",
    "Editor": "guardkit.editors.base",
    "EditRequest": "guardkit.editors.base",
    "EditResult": "guardkit.editors.base",
    "InpaintEditor": "guardkit.editors.inpaint",
    "ScenesEditor": "guardkit.editors.scenes",
    "Instructor": "guardkit.counterfactual.instructor",
    "TemplateInstructor": "guardkit.counterfactual.instructor",
    "Verifier": "guardkit.counterfactual.verifier",
    # heads
    "Head": "guardkit.heads",
    "AnchoredHead": "guardkit.heads",
    "JoinedHead": "guardkit.heads",
    "LinearHead": "guardkit.heads",
    "MLPHead": "guardkit.heads",
    "PromptHead": "guardkit.heads",
    # other people's classifiers
    "Guard": "guardkit.schema",
    "EmbeddingGuard": "guardkit.schema",
    "ImageGuard": "guardkit.schema",
    "Judgment": "guardkit.schema",
    # errors
    "InputError": "guardkit.schema",
    "ImageError": "guardkit.schema",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'guardkit' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
