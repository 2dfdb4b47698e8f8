"""The recipe of the small CLIPs in `checkpoints/`: one trainer, and a world for each that says what it learns from.

    python -m checkpoints.clip_recipe world=scenes out=checkpoints/scenes_clip
    python -m checkpoints.clip_recipe world=photos data=DIR out=checkpoints/photos_clip

Training is CLIP's contrastive one (Radford et al. 2021) with a fixed logit scale and a cosine over wall-clock time, so
that a recipe fits the hours it is given on any machine. The result is a folder with half-precision weights that
`open_clip.create_model_and_transforms("local-dir:...")` loads.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch.nn import functional

from checkpoints.arguments import read_world

_LATE = 0.4  # share of the time after which the logit scale is lowered
_LOG_STEPS = 100


@dataclass(frozen=True)
class Texts:
    """What a batch's images are told apart by.

    Attributes:
        said: different texts.
        own: (n_images,) of each of the batch's first images, the row in `said` that describes it.
        weight: of this loss among the batch's.
        also_true: (n_images, n_texts) bool: texts that hold for an image without being its own; they count neither for
            nor against it. None: there are none.
    """

    said: Sequence[str]
    own: np.ndarray
    weight: float = 1.0
    also_true: np.ndarray | None = None


class World(Protocol):
    """What a CLIP learns from; a dataclass of settings with defaults, each of which an argument can change."""

    out: str
    minutes: float
    learning_rate: float
    weight_decay: float
    logit_scale: float
    late_logit_scale: float
    label_smoothing: float
    averaging: float
    seed: ClassVar[int]
    model: ClassVar[dict[str, Any]]  # the open_clip model configuration, but for the vocabulary
    preprocessing: ClassVar[dict[str, Any]]  # open_clip's, with `mean` and `std`

    def words(self) -> set[str]:
        """Every word that texts can hold, in lower case."""

    def prepare(self) -> None:
        """Draws or reads the images, once."""

    def batch(self, progress: float, rng: np.random.Generator) -> tuple[torch.Tensor, list[Texts]]:
        """(n, 3, height, width) in [0, 1], and its texts; `progress` in [0, 1] is the share of the time that is over."""


def write_tokenizer(folder: Path, words: set[str]) -> int:
    """Writes a word-level tokenizer; returns its vocabulary size.

    The end token has the highest id because open_clip pools the text tower at the largest token.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[BOS]": 2, ",": 3}
    for word in sorted(words):
        vocabulary.setdefault(word, len(vocabulary))
    vocabulary["[EOS]"] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", vocabulary["[BOS]"]), ("[EOS]", vocabulary["[EOS]"])]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]")
    fast.save_pretrained(folder)
    return len(vocabulary)


def train(world: World) -> Path:
    """Runs the recipe and returns the folder it wrote; logs a line every 100 steps."""
    import open_clip

    torch.manual_seed(world.seed)
    rng = np.random.default_rng(world.seed)
    out = Path(world.out)
    out.mkdir(parents=True, exist_ok=True)
    model_config = copy.deepcopy(world.model)
    model_config["text_cfg"]["vocab_size"] = write_tokenizer(out, world.words())
    model_config["text_cfg"]["hf_tokenizer_name"] = out.name
    config = {"model_cfg": model_config, "preprocess_cfg": world.preprocessing}
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    started = time.monotonic()
    world.prepare()
    _log(f"images ready after {time.monotonic() - started:.0f} s")

    model = open_clip.create_model(f"local-dir:{out}", require_pretrained=False).to(memory_format=torch.channels_last)
    model.logit_scale.data.fill_(math.log(world.late_logit_scale))
    model.logit_scale.requires_grad_(False)
    averaged = copy.deepcopy(model).requires_grad_(False)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{out}")
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": world.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=world.learning_rate, betas=(0.9, 0.98))
    mean, std = (torch.tensor(world.preprocessing[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    started, step, seen = time.monotonic(), 0, 0
    running = {"loss": 0.0, "named": 0.0}
    while (progress := (time.monotonic() - started) / (60 * world.minutes)) < 1:
        warm_up = min(1.0, (step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = world.learning_rate * warm_up * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        pixels, texts = world.batch(progress, rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            image = model.encode_image(((pixels - mean) / std).contiguous(memory_format=torch.channels_last))
        image = functional.normalize(image.float(), dim=-1)
        scale = world.logit_scale if progress < _LATE else world.late_logit_scale
        loss = image.new_zeros(())
        for one in texts:
            term, right = _contrast(model, tokenizer, image[: len(one.own)], one, scale, world.label_smoothing)
            loss = loss + one.weight * term
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, seen = step + 1, seen + len(pixels)
        _average(averaged, model, min(world.averaging, step / (step + 10)))
        running["loss"] += loss.item() / _LOG_STEPS
        running["named"] += right / _LOG_STEPS
        if step % _LOG_STEPS == 0:
            rate = seen / (time.monotonic() - started)
            _log(f"step {step} progress {progress:.3f} loss {running['loss']:.3f} named {running['named']:.3f} images/s {rate:.0f}")
            running = dict.fromkeys(running, 0.0)
        if step % 500 == 0:
            _save(averaged, out)
    _save(averaged, out)
    _log(f"{step} steps, {seen} images in {time.monotonic() - started:.0f} s")
    return out


def _contrast(model: Any, tokenizer: Any, image: torch.Tensor, texts: Texts, scale: float, smoothing: float) -> tuple[torch.Tensor, float]:
    """CLIP's symmetric loss, where a text that several images share is right for each of them.

    Returns:
        The loss, and the share of images whose own text is the nearest of those that are not also true.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        text = model.encode_text(tokenizer(list(texts.said)))
    logits = scale * image @ functional.normalize(text.float(), dim=-1).T
    own = torch.from_numpy(texts.own)
    is_own = functional.one_hot(own, len(texts.said)).float()
    if texts.also_true is not None:
        logits = logits.masked_fill(torch.from_numpy(texts.also_true), -1e4)
    allowed = (logits > -1e4).float()
    wanted = (1 - smoothing) * is_own + smoothing * allowed / allowed.sum(dim=1, keepdim=True)
    to_text = -(wanted * logits.log_softmax(dim=1)).sum(dim=1).mean()
    described = is_own.sum(dim=0) > 0
    shares = (is_own / is_own.sum(dim=0).clamp(min=1)).T[described]
    to_image = -(shares * logits.T[described].log_softmax(dim=1)).sum(dim=1).mean()
    return (to_text + to_image) / 2, (logits.argmax(dim=1) == own).float().mean().item()


@torch.no_grad()
def _average(averaged: torch.nn.Module, model: torch.nn.Module, keep: float) -> None:
    """Moves the average of the weights, and of the statistics of normalisation, towards the model's."""
    new = model.state_dict()
    for name, value in averaged.state_dict().items():
        if value.is_floating_point():
            value.lerp_(new[name], 1 - keep)
        else:
            value.copy_(new[name])


def _save(model: torch.nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file

    weights = folder / "open_clip_model.safetensors"
    temporary = weights.with_suffix(".tmp")
    state = {name: value.half().contiguous() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    save_file(state, temporary)
    os.replace(temporary, weights)


def _log(line: str) -> None:
    print(line, flush=True)


def main(arguments: Sequence[str]) -> Path:
    from checkpoints.photos_clip.world import Photos
    from checkpoints.scenes_clip.world import Scenes

    worlds: dict[str, type[Any]] = {"scenes": Scenes, "photos": Photos}
    return train(read_world(worlds, arguments))


if __name__ == "__main__":
    print(main(sys.argv[1:]))
