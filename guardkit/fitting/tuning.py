"""Training the adapters of a vision-language model: what stands in the places of an embedding store and of a head meanwhile.

Choice of images, counterfactuals on the fly, batches, objective, callbacks and checkpoints are those of heads. Where a head is given
embeddings, `TunedHead` is given numbers, and looks at the images behind them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from guardkit.checks import check_whole
from guardkit.encoders.adapters import adapted_modules, inject, write_adapter
from guardkit.encoders.base import enough
from guardkit.encoders.vlm import VLMEncoder
from guardkit.heads import Head, LinearHead
from guardkit.images import load
from guardkit.schema import Content, ImageError, InputError, unreadable

WORDS = ("safe", "unsafe")


@dataclass(frozen=True)
class _Numbers:
    """What a data module asks of an encoder, of one whose "embeddings" are numbers of images."""

    name: str
    fingerprint: str
    dim: int = 1


class NumberedImages:
    """Stands where a data module wants an `EmbeddingStore`, and gives each image a number instead of an embedding.

    Images are read when a batch needs them, and not kept.

    Args:
        encoder: brings them to the model's size.
    """

    def __init__(self, encoder: VLMEncoder) -> None:
        self._encoder = encoder
        self._contents: list[Content] = []
        self._number_of: dict[str, int] = {}
        self._lock = threading.Lock()
        self.encoder = _Numbers(encoder.name, encoder.fingerprint)

    def embed(self, contents: Sequence[Content]) -> np.ndarray:
        """(n, 1) float32 numbers, counted from 1: exact for 16 million images."""
        numbers = np.zeros((len(contents), 1), np.float32)
        with self._lock:
            for row, content in enumerate(contents):
                if content.key not in self._number_of:
                    self._contents.append(content)
                    self._number_of[content.key] = len(self._contents)
                numbers[row] = self._number_of[content.key]
        return numbers

    def stopping(self) -> AbstractContextManager[None]:
        """As of an `EmbeddingStore`; giving numbers takes no time that could be cut short."""
        return nullcontext()

    def images(self, numbers: Tensor) -> Tensor:
        """(n,) numbers -> (n, 3, height, width) as the encoder preprocesses them.

        Raises:
            ImageError: one cannot be read, and is named.
        """
        found = []
        for number in numbers.tolist():
            content = self._contents[int(number) - 1]
            try:
                found.append(self._encoder.preprocess(load(content, enough(self._encoder))))
            except ImageError as error:
                raise unreadable(content, error) from error
        return torch.stack(found)


class TunedHead(Head):
    """Adapters inside a vision-language model, and the readout of its answer: from numbers of images to logits.

    The decision's logit is that of one word minus that of the other, as the model would answer them after the prompt, and a number that is
    learned. The categories' logits are a linear probe on the same state. Within a batch the model looks at a few images at a time, and what
    it computed for them is computed anew on the way back, so that a batch of any size takes the memory of those few.

    Args:
        encoder: not used elsewhere: adapters are put into its model.
        images: behind the numbers.
        n_categories: k.
        words: of a safe and of an unsafe answer.
        rank, alpha: see `guardkit.encoders.adapters.inject`.
        images_at_once: that the model looks at.
    Raises:
        InputError: words of several tokens, or a model that cannot be read so; see `VLMEncoder.readout`.
    """

    def __init__(
        self,
        encoder: VLMEncoder,
        images: NumberedImages,
        n_categories: int,
        *,
        words: Sequence[str] = WORDS,
        rank: int = 8,
        alpha: int = 16,
        images_at_once: int = 4,
    ) -> None:
        super().__init__()
        check_whole("lora.images_at_once", images_at_once, 1)
        self.config = {"base": encoder.fingerprint, "words": list(words), "n_categories": n_categories, "rank": rank, "alpha": alpha}
        self._at_once = images_at_once
        self._seen = encoder, images  # in a tuple: the model's own weights are neither trained nor kept in checkpoints
        self._base = encoder.base_hash
        safe, unsafe = encoder.readout(words)
        self.words: Tensor
        self.register_buffer("words", torch.from_numpy(unsafe - safe))
        self.bias = nn.Parameter(torch.zeros(1 + n_categories))
        self.categories = nn.Parameter(torch.zeros(n_categories, encoder.dim))
        self._adapted = adapted_modules(encoder.model)
        self.adapters = nn.ParameterList(inject(encoder.model, self._adapted, rank=rank, alpha=alpha).values())

    def forward(self, embeddings: Tensor) -> Tensor:
        """(n, 1) numbers of images -> (n, 1 + k) logits."""
        encoder, images = self._seen
        states = []
        for some in embeddings[:, 0].split(self._at_once):
            batch = images.images(some)
            states.append(checkpoint(encoder.states, batch, use_reentrant=False) if torch.is_grad_enabled() else encoder.states(batch))
        directions = functional.normalize(torch.cat(states), dim=-1).to(self.words) * self.words.shape[0] ** 0.5
        return directions @ torch.cat([self.words[None], self.categories]).T + self.bias

    def head(self) -> LinearHead:
        """What it does after the model, as a head on the tuned model's embeddings."""
        head = LinearHead(self.words.shape[0], len(self.categories))
        with torch.no_grad():
            head.linear.weight.copy_(torch.cat([self.words[None], self.categories]))
            head.linear.bias.copy_(self.bias)
        return head

    def write(self, folder: Path) -> None:
        """Writes the adapters, see `guardkit.encoders.adapters.write_adapter`."""
        encoder, _ = self._seen
        write_adapter(
            encoder.model,
            self._adapted,
            folder,
            rank=self.config["rank"],
            alpha=self.config["alpha"],
            base=self._base,
            base_name=encoder.weights,
        )


def check_base(encoder: object) -> VLMEncoder:
    """The encoder, as one whose model can get adapters.

    Raises:
        InputError: it is no vision-language model, has adapters already, or ends at an earlier layer.
    """
    if not isinstance(encoder, VLMEncoder):
        name = getattr(encoder, "name", type(encoder).__name__)
        raise InputError(
            f"a LoRA guard is made of a vision-language model, and encoder {name} is none; choose encoder=vlm encoder.weights=..."
        )
    if encoder.adapter is not None or encoder.layer is not None:
        raise InputError("a LoRA guard starts from a whole model without adapters; leave encoder.layer=null and encoder.adapter=null")
    return encoder
