"""What cannot work is said in one line, before the long part where it can be known there; what was done by halves is marked."""

from __future__ import annotations

import logging
import re

import pytest

from guardkit._hydra import user_error
from guardkit.encoders.base import cut_texts
from guardkit.heads import LinearHead, PromptHead
from guardkit.module import Diverged
from guardkit.policy import Policy
from guardkit.schema import InputError

# --- training that diverges -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [["trainer.max_epochs=20"], ["trainer.max_epochs=1"], ["trainer.max_epochs=20", "head=mlp"]])
def test_training_that_diverges_leaves_no_guard(train, tmp_path, settings):
    with pytest.raises(Diverged) as caught:
        train("experiment=unpaired", "optimizer.lr=1e37", *settings, folder=tmp_path)
    line = user_error(caught.value)
    assert line is not None
    assert re.fullmatch(r"training diverged: the loss is not finite in epoch [12]; lower optimizer\.lr \(now 1e\+37\)", line)
    assert not (tmp_path / "guard").exists()
    assert not (tmp_path / "metrics.json").exists()


def sweep_of(compose, *settings):
    overrides = [
        "source.n_train=60",
        "source.n_test=18",
        "sweep.arms=[unpaired]",
        "sweep.sizes=[8]",
        "sweep.seeds=2",
        "sweep.n_resamples=100",
    ]
    return compose("sweep", *overrides, "sweep.strengths=[0.01,1.0]", "trainer.max_epochs=30", *settings)


@pytest.mark.parametrize("engine", ["batched", "lightning"])
def test_cells_that_diverge_are_left_out_with_the_reason(compose, tmp_path, engine):
    from guardkit.sweeping import run_sweep

    cfg = sweep_of(compose, f"sweep.engine={engine}", "sweep.heads=[linear,mlp]", "optimizer.lr=1e30")
    summary = run_sweep(cfg, {}, tmp_path).summary
    (row,) = summary["left_out"]
    assert row["arm"] == "unpaired/mlp"
    assert row["seeds"] == [0, 1]
    assert "training diverged: the loss is not finite in epoch" in row["reason"]
    assert "lower optimizer.lr (now 1e+30)" in row["reason"]
    assert summary["curves"]["unpaired/linear"]["8"]["mean"] is not None
    assert summary["curves"]["unpaired/mlp"]["8"]["mean"] is None


# --- texts that are longer than the encoder reads -----------------------------------------------------------------------------

LONG = "a patient and careful description of an ordinary room with a table and a lamp and a window and a door and a chair and a shelf"


def long_policy(scenes_policy, **texts):
    data = scenes_policy.to_dict()
    data["categories"] = [{**data["categories"][0], **texts}]
    return Policy.from_dict(data)


@pytest.mark.parametrize("build", [PromptHead.build, LinearHead.from_texts])
def test_texts_that_are_the_same_after_the_cut_are_an_error(scenes_encoder, scenes_policy, build):
    policy = long_policy(scenes_policy, unsafe_texts=[f"{LONG} and {LONG} a rifle"], safe_texts=[f"{LONG} and {LONG} a spoon"])
    with pytest.raises(InputError, match=r"unsafe text '.*a rifle' and its safe text '.*a spoon' are the same to the encoder"):
        build(scenes_encoder, policy)


def test_texts_that_are_cut_are_named_once(scenes_policy, caplog):
    from guardkit.encoders.open_clip import OpenClipEncoder

    encoder = OpenClipEncoder(None, "guardkit:scenes_clip")
    policy = long_policy(scenes_policy, unsafe_texts=[f"a rifle in {LONG} and {LONG}"], safe_texts=["a spoon"])
    with caplog.at_level(logging.WARNING):
        PromptHead.build(encoder, policy)
        PromptHead.build(encoder, policy)
        encoder.encode_texts(["a rifle"])
    (message,) = [one.getMessage() for one in caplog.records]
    length = encoder._tokenizer.context_length
    assert f"reads the first {length} tokens of a text (its context length); of 1 text(s) what is beyond is cut off: 'a rifle in" in message


@pytest.mark.parametrize(
    ("special", "mode", "side"),
    [("[PAD]", None, "right"), ("[EOS]", None, "right"), ("[PAD]", "clips", "right"), ("[PAD]", None, "left")],
    ids=["padding", "the end pads", "mark at the end", "padding on the left"],
)
def test_a_cut_is_seen_with_any_tokenizer(tmp_path, special, mode, side):
    import transformers
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[BOS]", "[EOS]", "[CLS]", "[UNK]", *"abcdefgh"]
    own = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.post_processor = processors.TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)])
    named = {"bos_token": "[BOS]", "eos_token": "[EOS]", "cls_token": "[CLS]", "unk_token": "[UNK]", "pad_token": special}
    transformers.PreTrainedTokenizerFast(tokenizer_object=own, padding_side=side, **named).save_pretrained(tmp_path)
    room = 6 - 2 - (mode == "clips")
    fits, longer, far_longer = (" ".join("abcdefgh"[:n]) for n in (room, room + 1, 8))
    for tokenizer, least in ((HFTokenizer(str(tmp_path), 6, tokenizer_mode=mode), fits), (SimpleTokenizer(context_length=6), "a b c d")):
        assert cut_texts(["a", least, far_longer, ""], tokenizer, 6) == [far_longer]
        assert cut_texts([], tokenizer, 6) == []
    assert cut_texts([longer], HFTokenizer(str(tmp_path), 6, tokenizer_mode=mode), 6) == [longer]
