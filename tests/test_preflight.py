"""What cannot work is said in one line, before the long part where it can be known there; what was done by halves is marked."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import pytest
import torch
from conftest import picture

from guardkit.encoders.base import cut_texts
from guardkit.fitting.module import Diverged
from guardkit.heads import AnchoredHead, LinearHead, PromptHead
from guardkit.policy import Policy
from guardkit.runs.hydra import user_error
from guardkit.schema import InputError, Record

# --- training that diverges -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [["trainer.max_epochs=20"], ["trainer.max_epochs=1"], ["trainer.max_epochs=20", "head=mlp"]])
def test_training_that_diverges_leaves_no_guard(train, tmp_path, settings):
    with pytest.raises(Diverged) as caught:
        train("experiment=unpaired", "optimizer.lr=1e37", *settings, folder=tmp_path)
    line = user_error(caught.value)
    assert line is not None
    assert re.fullmatch(
        r"training diverged: the loss is not finite in epoch [12]; lower optimizer\.lr \(now 1e\+37\)( or loss\.l2 \(now 1\))?", line
    )
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
    from guardkit.runs.sweep import run as run_sweep

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


def test_texts_that_are_compared_side_by_side_may_be_the_same(scenes_encoder, scenes_policy):
    texts = {"unsafe_texts": [f"{LONG} and {LONG} a rifle", "a rifle"], "safe_texts": [f"{LONG} and {LONG} a spoon"]}
    head = PromptHead.build(scenes_encoder, long_policy(scenes_policy, **texts))
    assert any(
        note.startswith("1 of the policy's 2 unsafe texts are the same to the encoder as a safe one, such as ") for note in head.notes
    )
    assert torch.isfinite(head(torch.from_numpy(scenes_encoder.encode_texts(["a rifle", "a spoon"])))).all()


@pytest.mark.parametrize("build", [PromptHead.build, LinearHead.from_texts, AnchoredHead.build])
def test_texts_that_are_the_same_after_the_cut_are_an_error(scenes_encoder, scenes_policy, build):
    policy = long_policy(scenes_policy, unsafe_texts=[f"{LONG} and {LONG} a rifle"], safe_texts=[f"{LONG} and {LONG} a spoon"])
    with pytest.raises(InputError, match=r"unsafe text '.*a rifle' and its safe text '.*a spoon' are the same to the encoder"):
        build(scenes_encoder, policy)


def test_an_encoder_that_does_not_know_the_words_of_a_policy_is_named(scenes_encoder):
    with pytest.raises(
        InputError, match="it knows too few of their words, as the small encoders that come along do, .* or choose another encoder"
    ):
        AnchoredHead.build(scenes_encoder, Policy.load("guardkit:handled_objects"))


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


@pytest.mark.parametrize(("head", "n"), [("auto", 1), ("prompt", 1), ("linear_texts", 1), ("linear", 0)])
def test_texts_that_are_cut_are_a_note(train, scenes_policy, tmp_path, head, n):
    first = scenes_policy.to_dict()["categories"][0]
    data = scenes_policy.to_dict()
    data["categories"][0] = first | {"unsafe_texts": [*first["unsafe_texts"], f"a rifle in {LONG} and {LONG}"]}
    Policy.from_dict(data).save(tmp_path / "long.yaml")
    report = train(f"policy_file={tmp_path / 'long.yaml'}", f"head={head}", "trainer.max_epochs=1", folder=tmp_path / "run")
    notes = [note for note in report.metrics["notes"] if "is cut off: 'a rifle in" in note]
    assert len(notes) == n
    assert all(f"  note: {note}" in report.table for note in notes)


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


# --- what a source cannot give ------------------------------------------------------------------------------------------------


def forbidden(*arguments, **settings):
    raise AssertionError("the long part has begun")


@pytest.fixture
def nothing_long(monkeypatch):
    """Editing and embedding are an error."""
    monkeypatch.setattr("guardkit.counterfactual.pipeline.CounterfactualPipeline.make_all", forbidden)
    monkeypatch.setattr("guardkit.embeddings.EmbeddingStore.embed", forbidden)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Class folders without boxes: 16 pictures each."""
    root = tmp_path_factory.mktemp("classes")
    for label in (0, 1):
        folder = root / ("unsafe" if label else "safe")
        folder.mkdir()
        for i in range(16):
            picture(1000 * label + i).save(folder / f"{i}.png")
    return root


def photographs(root, *settings):
    return ["source=folder", f"source.root={root}", "policy=handled_objects", "data.n_unsafe=8", "trainer.max_epochs=5", *settings]


def shortages(report):
    """Notes on what there was too little of; others are on what may help, and on a guard that after five epochs is of no use."""
    return [note for note in report.metrics["notes"] if "this guard is no better" not in note and " are used; data." not in note]


def test_every_arm_has_the_same_unsafe_images_and_fewer_negatives_are_marked(train):
    few = ["source.n_train=30", "trainer.max_epochs=5"]
    shuffled, unpaired = train("experiment=shuffled_pairs", *few), train("experiment=unpaired", *few)
    assert shuffled.metrics["n_unsafe"] == unpaired.metrics["n_unsafe"] == 24
    assert shuffled.metrics["n_counterfactuals"] == 6
    (note,) = shortages(shuffled)
    assert "of the 30 unsafe images that source=scenes has for training, 6 are left beside the 24 labelled ones" in note
    assert "not comparable with arms that have 24 negatives (set data.n_unsafe=15 for every arm that is compared" in note
    assert f"note: {note}" in shuffled.table
    assert shortages(unpaired) == []


@pytest.mark.usefixtures("nothing_long")
def test_no_others_for_shuffled_pairs_is_an_error(train):
    with pytest.raises(InputError, match=r"0 are left beside the 24 labelled ones.*; set data.n_unsafe=12 for every arm"):
        train("experiment=shuffled_pairs", "source.n_train=24")


def test_whitening_on_few_images_is_marked(train):
    report = train("experiment=unpaired", "head=linear_whitened", "trainer.max_epochs=5")
    (note,) = shortages(report)
    assert "learns how 256-d embeddings vary from 240 training images, where 2048 are asked for" in note
    assert f"note: {note}" in report.table
    assert shortages(train("experiment=unpaired", "head=linear_whitened", "head.n_images=240", "trainer.max_epochs=5")) == []


def test_a_sweep_that_finds_all_cells_marks_what_they_were_short_of(compose, tmp_path):
    from guardkit.runs.sweep import run as run_sweep

    cfg = sweep_of(compose, "head=linear_whitened")
    first, second = (run_sweep(cfg, {}, tmp_path) for _ in range(2))
    (note,) = first.summary["notes"]
    assert "training images, where 2048 are asked for" in note
    assert second.summary["notes"] == [note]
    assert second.table == first.table


@pytest.mark.usefixtures("nothing_long")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["experiment=pairs_aug", "editor=inpaint"], "no region: editor=inpaint needs a box around the feature; .* editor=diffusers"),
        (["experiment=pairs_plus", "editor=scenes"], "not a drawn scene: editor=scenes edits source=scenes only"),
        (["experiment=null_edits", "editor=inpaint"], "no region: editor=inpaint needs a box"),
        (["experiment=pairs_aug", "editor=none"], "editor=none edits nothing"),
        (["experiment=pairs_aug", "editor=diffusers", "editor.pipeline=flux_fill"], "no region: pipeline=flux_fill needs a box"),
        (["experiment=pairs_aug", "editor=imperfect"], "not a drawn scene"),
    ],
)
def test_an_arm_whose_every_edit_will_be_refused_says_so_first(compose, classes, tmp_path, monkeypatch, settings, reason):
    from guardkit.runs.train import run

    # weights that nobody has here are found
    monkeypatch.setattr("guardkit.editors.diffusers.DiffusersEditor.config", {}, raising=False)
    with pytest.raises(InputError) as caught:
        run(compose("train", *photographs(classes), *settings), {}, tmp_path)
    line = user_error(caught.value)
    assert re.search(rf"none of the 8 unsafe images of source=folder can be edited \(8 x {reason}", line), line
    assert "experiment=unpaired" in line


@pytest.mark.usefixtures("nothing_long")
def test_synthesize_whose_every_edit_will_be_refused_says_so_first(compose, classes, tmp_path):
    from guardkit.runs.synthesize import run as synthesize_source

    with pytest.raises(InputError, match=r"none of the 16 images of source=folder can be edited \(16 x no region: editor=inpaint"):
        synthesize_source(
            compose("synthesize", "source=folder", f"source.root={classes}", "policy=handled_objects", "editor=inpaint"), tmp_path
        )


def test_some_refused_edits_are_a_note(scenes_policy):
    from types import SimpleNamespace

    from guardkit.counterfactual.instructor import TemplateInstructor
    from guardkit.counterfactual.pipeline import CounterfactualPipeline
    from guardkit.counterfactual.verifier import NoVerifier
    from guardkit.data.budget import check_edits
    from guardkit.editors.inpaint import InpaintEditor

    content = SimpleNamespace(key="k", load=forbidden)
    boxed, bare = (Record(name, 1, "weapons", "s", name, content, region=box) for name, box in (("a", (0.1, 0.1, 0.4, 0.4)), ("b", None)))
    twin = replace(bare, id="c", counterfactuals=(content,))  # brings a counterfactual of its own
    pipeline = CounterfactualPipeline(scenes_policy, TemplateInstructor(), InpaintEditor(), NoVerifier(), cache_dir=None)
    (note,) = check_edits(pipeline, [("unsafe images", "counterfactual", [boxed, bare, twin])], "source=s")
    assert note.startswith("1 of the 3 unsafe images of source=s cannot be edited (1 x no region")
    assert check_edits(pipeline, [("safe images", "null", [replace(bare, label=0)])], "source=s") == []


def test_a_dataset_without_a_pair_is_no_success(compose, tmp_path, monkeypatch, capsys):
    import guardkit.synthesize as command

    monkeypatch.setattr(command, "output_dir", lambda: tmp_path)
    cfg = compose("synthesize", "source.n_train=9", "source.n_test=2", "limit=6", "verifier=encoder", "verifier.min_cosine=1.0")
    with pytest.raises(InputError) as caught:
        command.synthesize.__wrapped__(cfg)
    line = user_error(caught.value)
    assert line.startswith("accepted none of 6 edits (6 x verifier=encoder: the edit is another picture")
    assert "ask less of the verifier (verifier.max_score" in line
    assert "editor=" not in line
    assert (tmp_path / "manifest.json").exists()
    assert str(tmp_path) in capsys.readouterr().out


# --- settings and parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["threshold=best"], r"threshold must be a number in \[0, 1\] or an operating point \(balanced, fpr_0.01, fpr_0.05\), got 'best'"),
        (["threshold=null"], "threshold must be a number"),
        (["threshold=1.5"], r"threshold must lie in \[0, 1\]"),
        (["optimizer.lr=-1"], "optimizer cannot work with these settings .Invalid learning rate: -1"),
        (["optimizer.lr=1e39"], "optimizer cannot work with these settings .*overflow"),
        (["+optimizer.speed=3"], "optimizer cannot be built: torch.optim.AdamW got an unexpected keyword argument 'speed'"),
        (["trainer.max_epochs=many"], "trainer.max_epochs must be a whole number of at least -1, got 'many'"),
        (["trainer.check_val_every_n_epoch=0"], "trainer.check_val_every_n_epoch must be a whole number of at least 1, got 0"),
        (["early_stopping_patience=soon"], "early_stopping_patience must be a whole number of at least 0, got 'soon'"),
        (["+trainer.speed=3"], "trainer cannot work with these settings .*speed"),
        (["logger=wandb", "logger.offline=false"], "needs a login: run `wandb login`"),
        (["loss.prevalence=nan"], r"loss.prevalence must lie in \(0, 1\), got nan"),
        (["loss.pair_weight=x"], "loss.pair_weight must be a number of at least 0, got 'x'"),
        (["loss.pair_margin=nan"], "loss.pair_margin must be a number of at least 0, got nan"),
        (["head=linear_whitened", "head.shrinkage=nan"], "head.shrinkage must be a number above 0, got nan"),
        (["head=linear_texts", "head.scale=x"], "head.scale must be a number above 0, got 'x'"),
        (["head=prompt", "head.scale=inf"], "head.scale must be a number above 0, got inf"),
        (["head=mlp", "head.dropout=nan"], r"head.dropout must lie in \[0, 1\), got nan"),
        (["editor=inpaint", "editor.radius=x"], "editor.radius must be a number of at least 1, got 'x'"),
        (["verifier=encoder", "verifier.min_drop=nan"], r"verifier.min_drop must lie in \[0, 1\), got nan"),
        (["trainer.num_sanity_val_steps=x"], "trainer.num_sanity_val_steps must be a whole number of at least -1, got 'x'"),
        (["trainer.log_every_n_steps=x"], "trainer.log_every_n_steps must be a whole number of at least 0, got 'x'"),
        (["trainer.deterministic=x"], "trainer.deterministic must be one of true, false, warn, got 'x'"),
        (["data.all_views=maybe"], "data.all_views must be true or false, got 'maybe'"),
        (["encoder.preprocess=nan"], r"encoder.preprocess must be \{size, mean, .*\}, each with its value, got nan"),
        (["head=mlp", "head.hidden=0"], "head.hidden must be a whole number from 1 to 1048576, got 0"),
        (["encoder=open_clip", "encoder.weights=local-dir:/nowhere"], "is not a folder; python -m guardkit.fetch"),
        (["verifier=guard", "verifier.guard.folder=/nowhere"], "/nowhere"),
        (
            ["verifier=guard", "verifier.guard=/nowhere"],
            "verifier.guard must be a guard, got '/nowhere'; name its folder as verifier.guard.folder",
        ),
        (["head=mlp", "head.hidden=10000000000"], "head.hidden must be a whole number from 1 to 1048576"),
        (["seed=99999999999999999999"], "seed must be a whole number from 0 to 9223372036854775807"),
        (["trainer.devices=2"], "trainer.devices=2 would start 2 processes, and a guard is trained in one; set trainer.devices=1"),
        (["head._target_=torch.nn.Linear"], "head (must be a subclass of guardkit.heads.Head|cannot be built: torch.nn.Linear)"),
        (["source._target_=collections.OrderedDict"], "source must be an object with a method load"),
        (["encoder._target_=guardkit.policy.Policy"], "encoder cannot be built: guardkit.policy.Policy got an unexpected keyword argument"),
        (["+source.colour=red"], "source cannot be built: .*ScenesSource got an unexpected keyword argument 'colour'"),
        (["cache_dir=''"], "cache_dir must be a path, got ''; was a variable of the shell empty?"),
        (["policy_file=''"], "policy_file must be a path, got ''"),
        (["source=folder", "source.root=''"], "source.root must be a path, got ''"),
        (["source=pairs", "source.root=null"], "source.root must be a path, got None"),
        (
            ["source=folder", "source.root=.", "source.labels=x"],
            "source.labels must be a map, as in source.labels={good: safe, bad: unsafe}",
        ),
        (["source=hub", "source.dataset=x", "source.categories=[a]"], "source.categories must be a map"),
        (["source=parquet", "source.files=x", "source.max_pixels=many"], "source.max_pixels must be a whole number of at least 1"),
    ],
)
@pytest.mark.parametrize("command", ["train", "sweep"])
def test_settings_that_cannot_work_are_said_before_any_image_is_read(compose, tmp_path, monkeypatch, command, settings, message):
    from guardkit.runs.sweep import run as run_sweep
    from guardkit.runs.train import run

    monkeypatch.setattr("guardkit.data.sources.scenes.ScenesSource.load", forbidden)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - Hydra wraps what constructors raise
        {"train": run, "sweep": run_sweep}[command](compose(command, *settings), {}, tmp_path)
    line = user_error(caught.value)
    assert line is not None, caught.value
    assert re.search(message, line), line


@pytest.mark.parametrize("name", ["''", "5", "null", "[a]"])
def test_a_name_that_no_guard_could_be_loaded_with_is_refused(compose, tmp_path, name):
    from guardkit.runs.train import run

    with pytest.raises(InputError, match="experiment_name must be a text"):
        run(compose("train", f"experiment_name={name}"), {}, tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sweep.sizes=8", r"sweep.sizes must be a list, as in sweep.sizes=\[8\], got 8"),
        ("sweep.arms=null", "sweep.arms must be a list"),
        ("sweep.target_scores=0.9", "sweep.target_scores must be a list"),
        ("sweep.seeds=1.5", "sweep.seeds must be a number of seeds from 1 to 10000, or a list"),
        ("sweep.strengths=[x]", "sweep.strengths must be different numbers above 0"),
        ("sweep.strengths=[nan]", "sweep.strengths must be different numbers above 0"),
    ],
)
def test_a_sweep_says_which_settings_are_lists(compose, tmp_path, setting, message):
    from guardkit.runs.sweep import run as run_sweep

    with pytest.raises(InputError, match=message):
        run_sweep(compose("sweep", setting), {}, tmp_path)


@pytest.mark.parametrize(
    "settings", [["head=prompt"], ["head=linear_texts"], ["head=anchored"], ["verifier=encoder"], ["experiment=zero_shot"]]
)
def test_an_encoder_without_texts_is_said_before_any_image_is_read(compose, tmp_path, monkeypatch, settings):
    from guardkit.runs.train import run

    def no_texts(self, texts):
        raise InputError(f"this encoder encodes no texts ({len(texts)} given)")

    monkeypatch.setattr("guardkit.encoders.open_clip.OpenClipEncoder.encode_texts", no_texts)
    monkeypatch.setattr("guardkit.data.sources.scenes.ScenesSource.load", forbidden)
    with pytest.raises(Exception, match="encodes no texts"):
        run(compose("train", *settings), {}, tmp_path)


def test_a_head_that_was_tried_changes_no_figure(scenes_encoder, scenes_policy):
    import torch

    from guardkit.fitting.parts import check_parts
    from guardkit.heads import MLPHead

    _ = scenes_encoder.dim  # loaded, whichever test is the first
    torch.manual_seed(3)
    check_parts(scenes_encoder, None, scenes_policy, [MLPHead.build])
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))


# --- sweeps -----------------------------------------------------------------------------------------------------------------------


def test_a_sweep_on_few_images_says_it_in_sentences(compose, tmp_path, caplog):
    from guardkit.runs.sweep import run as run_sweep

    arms = "sweep.arms=[unpaired,pairs_aug,shuffled_pairs]"
    cfg = compose(
        "sweep",
        "head=linear_whitened",
        "source.n_train=16",
        "source.n_test=18",
        arms,
        "sweep.seeds=10",
        "sweep.n_resamples=100",
        "sweep.strengths=[1.0]",
    )
    report = run_sweep(cfg, {}, tmp_path)
    sentences = [
        "sizes 32 to 1024 are left out for every arm: more unsafe images are needed than the 16 that source=scenes has for training",
        "size 16 is left out for shuffled_pairs: as many other unsafe images are needed beside the labelled ones, and source=scenes has 16",
    ]
    for said in sentences:
        assert caplog.text.count(said) == 1
        assert report.table.count(said) == 1
    assert "190 cells were left out" in report.table
    assert "note: the head learns how 256-d embeddings vary from 32 training images" in report.table


def test_a_sweep_of_which_nothing_is_left_is_an_error(compose, tmp_path):
    from guardkit.runs.sweep import run as run_sweep

    with pytest.raises(InputError, match="no cell of the sweep can be fitted: more unsafe images are needed than the 60"):
        run_sweep(sweep_of(compose, "sweep.sizes=[64]"), {}, tmp_path / "a")
    with pytest.raises(InputError, match=r"not one cell could be fitted: size 8 is left out for every arm.*training diverged"):
        run_sweep(sweep_of(compose, "head=mlp", "optimizer.lr=1e30"), {}, tmp_path / "b")
    assert (tmp_path / "b" / "report.md").exists()
