"""A guard as a stage of a NeMo Curator pipeline: `ProcessingStage[ImageBatch, ImageBatch]`.

The interface is that of nemo_curator 1.4.0 (`stages/base.py`, `tasks/image.py`, and the stage `ImageNSFWFilterStage` beside which this one
stands). That one scores one model's embeddings and keeps no score of what it drops; this one scores pixels, and notes every decision.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from guardkit.checks import check_choice
from guardkit.classifier import GuardClassifier
from guardkit.schema import InputError
from guardkit.thresholds import check_scope

_ACTIONS = ("allow", "review", "block", "error")


def curator_stage(guard: GuardClassifier, *, drop: Collection[str] = (), scope: Sequence[str] | None = None) -> Any:
    """A stage that decides over the images of a batch.

    Each image gets `nsfw_score`, the guard's score (NaN where it could not be decided, which no threshold passes), and
    `metadata["guardkit"]`, the whole decision as plain JSON.

    Args:
        guard: decides. It travels to the workers, so its encoder must be found there too.
        drop: actions whose images are left out of the batch, such as ("block", "error"); none: every image goes on.
        scope: categories that count; None: all.
    Raises:
        InputError: NeMo Curator is missing, or an unknown action or category.
    """
    try:
        from nemo_curator.stages.base import ProcessingStage
        from nemo_curator.tasks import ImageBatch
    except ImportError as error:
        raise InputError("a stage of NeMo Curator needs it; install it with: pip install nemo-curator") from error
    check_scope(scope, guard.policy.category_names)
    for action in drop:
        check_choice("drop", action, _ACTIONS)

    class GuardStage(ProcessingStage[ImageBatch, ImageBatch]):
        name = "guardkit"

        def inputs(self) -> tuple[list[str], list[str]]:
            return ["data"], []

        def outputs(self) -> tuple[list[str], list[str]]:
            return ["data"], []

        def process(self, task: Any) -> Any:
            """The batch, with decisions. Pixels are looked at where they are read already, else the file."""
            images = [one.image_path if one.image_data is None else one.image_data for one in task.data]
            kept = []
            for one, decision in zip(task.data, guard.predict(images, scope=scope), strict=True):
                one.nsfw_score = decision.score
                one.metadata["guardkit"] = decision.to_dict()
                if decision.action not in drop:
                    kept.append(one)
            return replace(task, data=kept)

    return GuardStage()
