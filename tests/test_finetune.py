"""LoRA guards: adapters inside a tiny SmolVLM, trained on images of two colours; what they are written as, and what is refused."""

from __future__ import annotations

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import picture
from tiny_models import VLMS, write_smolvlm

from guardkit import GuardClassifier, InputError, LinearHead, Policy, finetune
from guardkit.data.sources.base import Loaded
from guardkit.encoders.vlm import VLMEncoder
from guardkit.images import ArrayContent
from guardkit.schema import Record

PROMPT = "{policy} is this image safe or unsafe ?"
FILES = ("model.safetensors", "adapter_model.safetensors", "adapter_config.json")
CHECK = 1  # step that tries an optimizer's settings before every training
STOP_AT: list[int] = []  # the step in which the next training is interrupted


def category(name):
    return {
        "name": name, "definition": f"is it {name}", "covered": [], "not_covered": [], "edit": "Paint it over.", "unsafe_texts": [name],
        "safe_texts": ["no"],
    }  # fmt: skip


def policy(*names):
    return Policy.from_dict({"name": "colours", "description": "of colours", "categories": [category(name) for name in names]})


class Colours:
    """Reddish images are unsafe, bluish ones are safe."""

    name = "colours"

    def __init__(self, n=24):
        self.n = n
        self.asked = {"source": self.name, "n": n}

    def load(self):
        records = [self._record(i) for i in range(2 * self.n)]
        return Loaded(records, None, [], len(records), is_drawn=True)

    def _record(self, i):
        tint = np.array([[120, 0, 0], [0, 0, 120]][i % 2], np.uint8)
        image = np.asarray(picture(i)) // 2 + tint
        return Record(f"image {i}", 1 - i % 2, "red" if i % 2 == 0 else None, "colours", f"image {i}", ArrayContent(image))


class Interrupted(torch.optim.AdamW):
    """Ends the training in the middle, as Ctrl-C does, when `STOP_AT` says so."""

    n_steps = 0

    def step(self, closure=None):
        loss = super().step(closure)
        type(self).n_steps += 1
        if STOP_AT and type(self).n_steps == STOP_AT[0]:
            raise KeyboardInterrupt
        return loss


OPTIMIZER = partial(Interrupted, lr=2e-2, weight_decay=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smolvlm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        write_smolvlm(folder)
    return folder


def tuned(model, folder=None, **settings):
    encoder = VLMEncoder(str(model), prompt=PROMPT, device="cpu")
    usual = {"n_unsafe": 16, "batch_size": 6, "trainer": {"max_epochs": 12}, "optimizer": OPTIMIZER, "output_dir": folder}
    return finetune(Colours(), policy("red"), encoder=encoder, **usual | settings)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return tuned(model, tmp_path_factory.mktemp("run"))


def test_it_learns(run):
    curve = run.metrics
    assert curve["test"]["auroc"] > 0.95
    loss = run.folder / "checkpoints" / "last.ckpt"
    (best,) = (state for name, state in torch.load(loss, weights_only=True)["callbacks"].items() if "BestHead" in name)
    losses = [one["validation_loss"] for one in best["curve"]]
    assert losses[0] > 0.9
    assert min(losses) < 0.45
    assert run.metrics["cross_validated"]["reason"].startswith("a LoRA guard is trained once")


def test_the_guard_is_a_folder_like_any_other(run, model, tmp_path):
    folder = run.folder / "guard"
    assert {*FILES, "config.json", "policy.yaml", "README.md"} <= {path.name for path in folder.iterdir()}
    config = json.loads((folder / "config.json").read_text())
    assert config["encoder"]["kind"] == "vlm"
    assert config["encoder"]["config"]["adapter"] == "."
    images = [np.asarray(picture(seed)) for seed in range(100, 104)]
    scores = [one.score for one in run.guard.predict(images)]
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    base = shutil.copytree(model, tmp_path / "models" / "base")
    loaded = GuardClassifier.from_pretrained(moved, encoder=base)
    assert [one.score for one in loaded.predict(images)] == scores
    again = GuardClassifier.from_pretrained(loaded.save_pretrained(tmp_path / "again"))
    assert [one.score for one in again.predict(images)] == scores
    assert again.encoder.adapter == str(tmp_path / "again")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT 0.21 with transformers 5.23
def test_the_decision_is_the_logit_of_one_word_minus_that_of_the_other(run, model):
    """The adapters, put by PEFT itself into a copy of the model, and nothing of ours but the prompt."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    images = [np.asarray(picture(seed)) for seed in range(100, 104)]
    base = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    whole = PeftModel.from_pretrained(base, run.folder / "guard").eval()
    encoder = run.guard.encoder
    inputs = encoder._inputs(base, torch.stack([encoder.preprocess(image) for image in images]))
    safe, unsafe = encoder.tokens_of(["safe", "unsafe"])
    with torch.inference_mode():
        logits = whole(**inputs).logits[:, -1]
    expected = logits[:, unsafe] - logits[:, safe] + run.guard.head.linear.bias[0]
    found = run.guard.head_logits(encoder.encode_images(images))[:, 0]
    np.testing.assert_allclose(found, expected.detach(), rtol=2e-3, atol=2e-3)


def test_two_runs_give_the_same_bytes_and_an_interrupted_one_too(run, model, tmp_path):
    Interrupted.n_steps = 0
    STOP_AT[:] = [5]  # in the third epoch
    try:
        with pytest.raises(KeyboardInterrupt):
            tuned(model, tmp_path)
    finally:
        STOP_AT.clear()
    assert not (tmp_path / "guard" / "config.json").exists()
    before = Interrupted.n_steps
    tuned(model, tmp_path)
    assert Interrupted.n_steps - before == (12 - 1) * 3 + CHECK  # it went on after the first epoch
    for name in FILES:
        assert (tmp_path / "guard" / name).read_bytes() == (run.folder / "guard" / name).read_bytes(), name
    # a finished one changes nothing
    before = Interrupted.n_steps
    tuned(model, tmp_path)
    assert Interrupted.n_steps - before == CHECK
    for name in FILES:
        assert (tmp_path / "guard" / name).read_bytes() == (run.folder / "guard" / name).read_bytes(), name


def test_a_checkpoint_that_lost_some_weights_is_one_line(run, model, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    whole = torch.load(path, weights_only=True)
    torch.save(whole | {"state_dict": dict(list(whole["state_dict"].items())[1:])}, path)
    with pytest.raises(
        InputError, match=r"the checkpoint is damaged: head\.\S+ has shape None, expected .*begin anew in another output_dir"
    ):
        tuned(model, tmp_path / "run")


@pytest.mark.parametrize("lost", [{"loops": {}}, {"state_dict": {}}, {"loops": None}])
def test_a_checkpoint_with_parts_lost_is_none(run, tmp_path, lost):
    from guardkit.fitting.module import check_checkpoint

    whole = run.folder / "checkpoints" / "last.ckpt"
    check_checkpoint(whole)
    torch.save(torch.load(whole, weights_only=True) | lost, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="x.ckpt cannot be resumed from"):
        check_checkpoint(tmp_path / "x.ckpt")


def test_other_settings_are_refused_in_its_folder(run, model):
    with pytest.raises(InputError, match="holds results of guardkit finetune that were made with another lora; choose another output_dir"):
        tuned(model, run.folder, rank=4)


def test_memory_is_that_of_a_few_images_and_the_result_the_same(run, model):
    from guardkit.fitting.tuning import NumberedImages, TunedHead

    losses = []
    for at_once in (1, 5):
        encoder = VLMEncoder(str(model), prompt="is it red ?", device="cpu")
        images = NumberedImages(encoder)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            head = TunedHead(encoder, images, 1, images_at_once=at_once)
        numbers = torch.from_numpy(images.embed([record.content for record in Colours(3).load().train]))
        head(numbers).square().sum().backward()
        losses.append([weight.grad.norm() for weight in head.adapters])
    np.testing.assert_allclose(*losses, rtol=1e-3, atol=1e-6)
    assert max(losses[0]) > 0


@pytest.mark.parametrize(
    ("name", "connector"),
    [("smolvlm", "connector.modality_projection"), ("qwen_vl", "visual.merger"), ("internvl", "multi_modal_projector")],
)
def test_language_and_connector_are_adapted_and_the_image_encoder_is_not(tmp_path, name, connector):
    from guardkit.encoders.adapters import adapted_modules

    VLMS[name](tmp_path)
    names = adapted_modules(VLMEncoder(str(tmp_path), prompt="is it red ?", device="cpu").model)
    others = [one for one in names if connector not in one]
    assert len(others) == 2 * 7  # of each layer of the language model
    assert all("layers." in one and "vision" not in one and "visual" not in one for one in others)
    assert len(others) < len(names)


def test_half_precision_trains_in_single_precision(model):
    from guardkit.fitting.tuning import NumberedImages, TunedHead

    encoder = VLMEncoder(str(model), prompt="is it red ?", dtype="bfloat16", device="cpu")
    images = NumberedImages(encoder)
    head = TunedHead(encoder, images, 1)
    logits = head(torch.from_numpy(images.embed([record.content for record in Colours(2).load().train])))
    logits.sum().backward()
    assert logits.dtype == torch.float32
    assert {weight.dtype for weight in head.adapters} == {torch.float32}
    assert encoder.model.dtype == torch.bfloat16


def test_it_reads_another_policy(run):
    other = run.guard.for_policy(policy("blue", "yes"))
    images = [np.asarray(picture(seed)) for seed in range(100, 104)]
    decisions = other.predict(images)
    assert other.encoder.rules == other.policy.rules()
    assert [one.score for one in decisions] != [one.score for one in run.guard.predict(images)]
    assert all(value == one.score for one in decisions for value in one.categories.values())
    assert run.guard.for_policy(run.guard.policy) is run.guard


def test_a_guard_that_reads_no_policy_says_so(scenes_encoder, scenes_policy):
    guard = GuardClassifier(LinearHead.build(scenes_encoder, scenes_policy), scenes_encoder, scenes_policy)
    assert not guard.reads_policy
    with pytest.raises(InputError, match="does not read policies: .*; train one for policy colours"):
        guard.for_policy(policy("red"))


def another_base(folder, base):
    config = json.loads((base / "config.json").read_text())
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file(weights | {name: weights[name] + 0.01}, base / "model.safetensors", metadata={"format": "pt"})
    assert config


def damaged(folder, base):
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def missing(folder, base):
    (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (another_base, "was trained on a model whose weights have the hash .*, and this one has .*; give the model that it was trained on"),
        (damaged, "adapter_model.safetensors is missing or damaged .its SHA-256 does not match.; copy the folder anew"),
        (missing, "adapter_config.json is missing or damaged .its SHA-256 does not match.; copy the folder anew"),
    ],
)
def test_what_is_spoiled_is_one_line(run, model, tmp_path, spoil, message):
    folder = shutil.copytree(run.folder / "guard", tmp_path / "guard")
    base = shutil.copytree(model, tmp_path / "base")
    spoil(folder, base)
    with pytest.raises(InputError, match=message) as caught:
        GuardClassifier.from_pretrained(folder, encoder=f"local-dir:{base}")
    assert "\n" not in str(caught.value)


def lying(name, value):
    def spoil(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return spoil


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("target_modules", "(a+)+$", "is none that guardkit wrote"),
        ("target_modules", ["model.nowhere"], "the model has no linear layer model.nowhere"),
        ("r", 10**9, "is none that guardkit wrote"),
        ("r", 2, "has shape"),
        ("peft_type", "PREFIX_TUNING", "is none that guardkit wrote"),
    ],
)
def test_an_adapter_that_lies_is_refused(run, model, tmp_path, name, value, message):
    """Whoever writes an adapter can write its hash too: what it says is checked as well."""
    folder = shutil.copytree(run.folder / "guard", tmp_path / "guard")
    lying(name, value)(folder)
    with pytest.raises(InputError, match=message):
        _ = VLMEncoder(str(model), prompt="is it red ?", adapter=str(folder), device="cpu").fingerprint


def test_an_adapter_of_other_numbers_is_refused(run, model, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(run.folder / "guard", tmp_path / "guard")
    path = folder / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    save_file({name: value.to(torch.complex64) for name, value in load_file(path).items()}, path, metadata=about)
    with pytest.raises(InputError, match="larger than an adapter|holds other numbers than floating-point ones"):
        _ = VLMEncoder(str(model), prompt="is it red ?", adapter=str(folder), device="cpu").fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"words": ["allowed", "forbidden"]}, "does not write allowed and forbidden as one token each"),
        ({"words": ["safe"]}, r"lora.words must be two words, .* as in \[safe,unsafe\], got \['safe'\]"),
        ({"words": "safe"}, "lora.words must be two words"),
        ({"words": [1, None]}, "lora.words must be two words"),
        ({"trainer": {"accumulate_grad_batches": 0}}, "trainer.accumulate_grad_batches must be a whole number of at least 1, got 0"),
        ({"rank": 0}, "lora.rank"),
        ({"images_at_once": 0}, "images_at_once"),
        ({"threshold": "best"}, "threshold must be"),
    ],
)
def test_wrong_settings_are_told_before_training(model, settings, message):
    with pytest.raises(InputError, match=message):
        tuned(model, **settings)


def test_rules_of_ones_own_stay(model):
    encoder = VLMEncoder(str(model), prompt=PROMPT, rules="red is", device="cpu")
    report = finetune(Colours(), policy("red"), encoder=encoder, n_unsafe=4, trainer={"max_epochs": 0})
    assert report.guard.encoder.rules == "red is"


def test_it_needs_a_whole_vision_language_model(model, scenes_encoder):
    with pytest.raises(InputError, match="is none; choose encoder=vlm"):
        finetune(Colours(), policy("red"), encoder=scenes_encoder)
    with pytest.raises(InputError, match="leave encoder.layer=null"):
        finetune(Colours(), policy("red"), encoder=VLMEncoder(str(model), prompt=PROMPT, layer=1))


def test_embeddings_are_no_images(model, tmp_path):
    from guardkit import EmbeddingsSource

    with pytest.raises(InputError, match="a LoRA guard is trained on images, and source=embeddings holds their embeddings alone"):
        finetune(EmbeddingsSource.__new__(EmbeddingsSource), policy("red"), encoder=VLMEncoder(str(model), prompt=PROMPT))


def test_the_command_does_the_same(model, tmp_path, compose):
    from guardkit.runs.finetune import run as command

    cfg = compose(
        "finetune", f"encoder.weights={model}", "encoder.prompt='is it red ?'", "source.n_train=12", "source.n_test=9", "data.n_unsafe=4",
        "trainer.max_epochs=1", "experiment=pairs_aug", "cache_dir=null",
    )  # fmt: skip
    report = command(cfg, {}, tmp_path)
    assert (report.metrics["n_unsafe"], report.metrics["n_counterfactuals"]) == (4, 4)
    assert report.metrics["fingerprints"]["encoder"] == report.guard.encoder.fingerprint
    assert (tmp_path / "metrics.json").is_file()


def test_it_is_measured_under_several_policies_by_what_it_reads(run, tmp_path):
    from guardkit import evaluate

    two = [policy("red"), Policy.from_dict(policy("blue").to_dict() | {"name": "other"})]
    report = evaluate(run.guard, {one.name: Colours() for one in two}, policies=two, split="all", output_dir=tmp_path, n_resamples=100)
    (about,) = report.summary["classifiers"].values()
    assert about["kind"] == "reads"
    f1 = [about["by_policy"][one.name]["figures"]["f1"]["value"] for one in two]
    assert f1[0] > 0.9  # as it was trained
    assert report.summary["benchmark"]["n_seen_left_out"] == 32
