"""The recipe of the small vision-language model of drawn scenes: `checkpoints/scenes_vlm`.

    python -m checkpoints.vlm_recipe out=checkpoints/scenes_vlm

A SmolVLM of two million weights, in three steps, each for a share of the time. Its image encoder learns to give what `scenes_clip` gives. Then the
whole learns to name what a scene shows, and to answer whether a scene is safe by rules that change with every question and name some
objects as forbidden. No question ever states the rules of a policy that guards are trained for.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.nn import functional

from checkpoints.arguments import read_recipe
from checkpoints.scenes_clip.world import IMAGE_PX, SEED, captions, draw_pool, twins
from guardkit.scenes.features import KINDS
from guardkit.scenes.world import CATEGORIES, RENDERINGS

SPECIAL = [
    "[PAD]",
    "[UNK]",
    "<|im_start|>",
    "<end_of_utterance>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<video>",
    "<row_1_col_1>",
]
NAMING = "What is shown?"
QUESTION = (
    "An image is unsafe if it shows any of the following:\n{policy}\nBy these rules, is this image safe or unsafe? Answer with one word."
)
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
_LOG_STEPS = 50


@dataclass
class Recipe:
    """Settings; the defaults made the shipped model.

    Attributes:
        minutes: of optimisation, after drawing.
        distilled: share of it in which the image encoder alone is trained.
        n_scenes: drawn once per rendering; each adds itself and its twin.
    """

    out: str = "checkpoints/scenes_vlm"
    minutes: float = 60.0
    distilled: float = 0.5
    n_scenes: int = 20_000
    batch_scenes: int = 32
    learning_rate: float = 1e-3
    workers: int = 2
    width: int = 128
    vision_layers: int = 4
    text_layers: int = 3
    patch: int = 8


def vocabulary() -> list[str]:
    """Words of all captions and of the policies that come with guardkit, lower case, after the special tokens."""
    import re

    said = [NAMING, QUESTION, "user assistant safe unsafe covered not yes no"]
    for index in range(3000):
        for rendering in RENDERINGS:
            said += [text for scene in twins(index, rendering) for text in captions(scene, with_colours=True)]
    for path in sorted(Path("conf/policy").glob("scenes*.yaml")):
        said.append(yaml.safe_dump(yaml.safe_load(path.read_text())))
    words = sorted({word for text in said for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    return [*SPECIAL, *words]


def processor_of(words: Sequence[str], recipe: Recipe) -> Any:
    """SmolVLM's, with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokens.normalizer = normalizers.Lowercase()
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]", bos_token="<|im_start|>", eos_token="<end_of_utterance>",
        additional_special_tokens=SPECIAL[4:], padding_side="left", model_max_length=1024,
    )  # fmt: skip
    side = {"longest_edge": IMAGE_PX}
    video: Any = {"size": side, "max_image_size": side, "video_sampling": {"fps": 1, "max_frames": 4, "video_size": side}}
    return SmolVLMProcessor(
        SmolVLMImageProcessor(size={"longest_edge": 4 * IMAGE_PX}, max_image_size=side),
        tokenizer,
        SmolVLMVideoProcessor(**video),
        image_seq_len=(IMAGE_PX // recipe.patch) ** 2 // 4,
        chat_template=TEMPLATE,
    )


def model_of(words: Sequence[str], recipe: Recipe) -> Any:
    """A SmolVLM with random weights."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    shared = {"hidden_size": recipe.width, "intermediate_size": 3 * recipe.width, "num_attention_heads": 4}
    text = shared | {
        "model_type": "llama", "num_hidden_layers": recipe.text_layers, "num_key_value_heads": 4, "vocab_size": len(words), "pad_token_id": 0,
        "bos_token_id": 2, "eos_token_id": 3, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    vision = shared | {"num_hidden_layers": recipe.vision_layers, "image_size": IMAGE_PX, "patch_size": recipe.patch}
    config: Any = SmolVLMConfig(
        text_config=text,
        vision_config=vision,
        scale_factor=2,
        image_token_id=words.index("<image>"),
        tie_word_embeddings=False,
    )
    return SmolVLMForConditionalGeneration(config)


@dataclass(frozen=True)
class Shown:
    """Drawn scenes.

    Attributes:
        images: (n, 2, 64, 64, 3) uint8, scenes beside their twins.
        names: (n, 2) what each shows: its place among `objects`.
        objects: bare names.
    """

    images: np.ndarray
    names: np.ndarray
    objects: list[str]


def drawn(recipe: Recipe) -> Shown:
    """The images of both renderings, and what they show."""
    images = draw_pool(recipe.n_scenes, recipe.workers)
    said = [
        [captions(scene, with_colours=False)[1] for scene in twins(i, rendering)]
        for rendering in RENDERINGS
        for i in range(recipe.n_scenes)
    ]
    objects = sorted({name for pair in said for name in pair})
    return Shown(images, np.array([[objects.index(name) for name in pair] for pair in said]), objects)


def pixels_of(images: np.ndarray) -> torch.Tensor:
    """(n, 64, 64, 3) uint8 -> (n, 3, 64, 64) as the processor standardises them."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def rules(rng: np.random.Generator, certain: Sequence[str], wanted: str | None) -> tuple[str, set[str]]:
    """Rules that name some objects as forbidden, in the form in which policies are stated, and those objects.

    Args:
        certain: objects that belong to a category of the world.
        wanted: one that is forbidden, or None.
    """
    n = int(rng.integers(1, 4))
    forbidden: list[list[str]] = [[str(one) for one in rng.choice(certain, int(rng.integers(1, 4)), replace=False)] for _ in range(n)]
    if wanted is not None and not any(wanted in group for group in forbidden):
        forbidden[int(rng.integers(n))].append(wanted)
    flat = {name for group in forbidden for name in group}
    lines = []
    for group in forbidden:
        allowed = [str(one) for one in rng.choice(certain, int(rng.integers(0, 3)), replace=False) if one not in flat]
        line = f"- {rng.choice(CATEGORIES)}: {rng.choice(['rules', 'things', 'objects'])}. Covered: {'; '.join(group)}."
        lines.append(line + (f" Not covered: {'; '.join(allowed)}." if allowed else ""))
    return "\n".join(lines), flat


def schedule(started: float, seconds: float, learning_rate: float, optimizer: torch.optim.Optimizer) -> bool:
    """Sets a learning rate, a cosine over the time with a warm-up; whether there is time left."""
    done = (time.perf_counter() - started) / seconds
    rate = learning_rate * min(1.0, done / 0.03 + 0.02) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    for group in optimizer.param_groups:
        group["lr"] = rate
    return done < 1


def distil(model: Any, shown: Shown, recipe: Recipe, rng: np.random.Generator) -> None:
    """The image encoder learns to give the embeddings of `scenes_clip`, through a head that is thrown away."""
    import open_clip

    teacher, _, _ = open_clip.create_model_and_transforms("local-dir:checkpoints/scenes_clip")
    teacher.eval().requires_grad_(False)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (teacher.visual.image_mean, teacher.visual.image_std))
    flat = shown.images.reshape(-1, *shown.images.shape[2:])
    with torch.inference_mode():
        targets = torch.cat(
            [
                functional.normalize(teacher.encode_image((torch.from_numpy(some).permute(0, 3, 1, 2).float() / 255 - mean) / std), dim=-1)
                for some in np.array_split(flat, max(1, len(flat) // 256))
            ]
        ).clone()
    # what all images have in common is easy and says nothing
    centre = targets.mean(0)
    targets = functional.normalize(targets - centre, dim=-1)
    vision, side = model.model.vision_model, IMAGE_PX // recipe.patch
    head = torch.nn.Sequential(
        torch.nn.Linear(recipe.width, recipe.width),
        torch.nn.GELU(),
        torch.nn.Flatten(),
        torch.nn.Linear(recipe.width * side * side // 4, targets.shape[1]),
    )
    pool = torch.nn.AvgPool2d(2)
    weights = [*vision.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.05)
    started, step, total = time.perf_counter(), 0, 0.0
    order = rng.permutation(len(flat))
    n = 4 * recipe.batch_scenes
    while schedule(started, recipe.minutes * 60 * recipe.distilled, recipe.learning_rate, optimizer):
        rows = order[np.arange(step * n, (step + 1) * n) % len(order)]
        states = vision(pixels_of(flat[rows])).last_hidden_state
        square = pool(states.transpose(1, 2).reshape(len(rows), -1, side, side)).flatten(2).transpose(1, 2)
        given = functional.normalize(head(square), dim=-1)
        # the cosine, and each image's own among the batch's
        loss = (1 - (given * targets[rows]).sum(-1)).mean() + functional.cross_entropy(
            given @ targets[rows].T * 10, torch.arange(len(rows))
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        step, total = step + 1, total + float(loss.detach())
        if step % _LOG_STEPS == 0:
            print(f"distil step {step} {time.perf_counter() - started:.0f} s loss {total / _LOG_STEPS:.3f}", flush=True)
            total = 0.0


def speak(model: Any, processor: Any, shown: Shown, recipe: Recipe, rng: np.random.Generator) -> None:
    """The whole learns to name what is shown, and to answer by rules."""
    tokenizer = processor.tokenizer
    certain = [name for name in shown.objects if any(_is_of(name, kind) for kind in KINDS.values())]
    image_part = "<fake_token_around_image><global-img>" + "<image>" * processor.image_seq_len + "<fake_token_around_image>"
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    started, step, totals = time.perf_counter(), 0, np.zeros(3)
    seconds = recipe.minutes * 60 * (1 - recipe.distilled)
    order = rng.permutation(len(shown.images))
    while schedule(started, seconds, recipe.learning_rate, optimizer):
        rows = order[np.arange(step * recipe.batch_scenes, (step + 1) * recipe.batch_scenes) % len(order)]
        is_naming = step % 3 == 0
        texts, answers = [], []
        for row in rows:
            pair = [shown.objects[name] for name in shown.names[row]]
            if is_naming:
                texts += [NAMING, NAMING]
                answers += pair
            else:
                text, flat = rules(rng, certain, str(rng.choice(pair)) if rng.random() < 0.8 else None)
                texts += [QUESTION.replace("{policy}", text)] * 2
                answers += ["unsafe" if name in flat else "safe" for name in pair]
        said = [f"<|im_start|>user:{image_part}{text}<end_of_utterance>assistant:" for text in texts]
        ids = [tokenizer.encode(one, add_special_tokens=False) for one in said]
        ends = [[*tokenizer.encode(one, add_special_tokens=False), *([3] if is_naming else [])] for one in answers]
        length = max(len(one) + len(end) for one, end in zip(ids, ends, strict=True))
        tokens, labels = (np.full((len(ids), length), value) for value in (0, -100))
        for i, (one, end) in enumerate(zip(ids, ends, strict=True)):
            tokens[i, length - len(one) - len(end) :] = [*one, *end]
            labels[i, length - len(end) :] = end
        pixels = pixels_of(shown.images[rows].reshape(-1, *shown.images.shape[2:]))
        output = model.model(
            input_ids=torch.from_numpy(tokens),
            attention_mask=torch.from_numpy((tokens > 0).astype(int)),
            pixel_values=pixels[:, None],
            use_cache=False,
        ).last_hidden_state
        at = torch.from_numpy(labels[:, 1:] >= 0)
        logits = model.lm_head(output[:, :-1][at])
        wanted = torch.from_numpy(labels[:, 1:])[at]
        loss = functional.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        totals[2] += 1
        totals[0 if is_naming else 1] += float((logits.argmax(-1) == wanted).float().mean()) * (3 if is_naming else 1.5)
        if step % (3 * _LOG_STEPS // 3) == 0:
            print(
                f"speak step {step} {time.perf_counter() - started:.0f} s words named {totals[0] / totals[2]:.3f} verdicts {totals[1] / totals[2]:.3f}",
                flush=True,
            )
            totals[:] = 0


def _is_of(name: str, kind: Any) -> bool:
    return any(
        name.removeprefix("a ").removeprefix("an ") == phrase.replace("{c} ", "").replace("{c}", "").strip()
        for phrase in (*kind.unsafe, *kind.safe)
    )


def main() -> None:
    """Draws, trains, and writes the folder."""
    recipe = read_recipe(Recipe, sys.argv[1:])
    torch.manual_seed(0)
    rng = np.random.default_rng([SEED, 1])
    words = vocabulary()
    processor, model = processor_of(words, recipe), model_of(words, recipe)
    print(f"{sum(value.numel() for value in model.parameters()):,} weights, {len(words)} words", flush=True)
    shown = drawn(recipe)
    print(f"{len(shown.images) * 2:,} images, {len(shown.objects)} objects", flush=True)
    distil(model, shown, recipe, rng)
    speak(model, processor, shown, recipe, rng)
    out = Path(recipe.out)
    out.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(out)
    processor.save_pretrained(out)


if __name__ == "__main__":
    main()
