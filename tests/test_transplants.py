"""Transplants, and the choice and batches of the arms that they and other safe images belong to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import picture

from guardkit.counterfactual.instructor import TemplateInstructor
from guardkit.counterfactual.pipeline import CounterfactualPipeline
from guardkit.counterfactual.verifier import NoVerifier
from guardkit.data.arms import Orders, arm_named, choose
from guardkit.data.datamodule import GuardDataModule
from guardkit.data.look_alikes import by_texts
from guardkit.data.sources.base import Loaded
from guardkit.data.sources.scenes import ScenesSource
from guardkit.data.training_images import training_images
from guardkit.data.transplants import TransplantContent, transplant
from guardkit.data.unlabelled import Unlabelled
from guardkit.editors.base import Photograph
from guardkit.editors.none import NoEditor
from guardkit.editors.paste import PasteEditor
from guardkit.embeddings import EmbeddingStore
from guardkit.images import ArrayContent, FileContent
from guardkit.schema import InputError, Record

BOX = (0.3, 0.3, 0.7, 0.7)


def image(seed, colour=None):
    pixels = np.asarray(picture(seed, (80, 60))).copy()
    if colour is not None:
        pixels[18:42, 24:56] = colour
    return ArrayContent(pixels)


def photographs(n, is_look_alike=False):
    return [Photograph(image(100 + i, (20, 20, 20 + i)), BOX, is_look_alike=is_look_alike) for i in range(n)]


UNSAFE = image(0, (250, 10, 10))


@pytest.mark.parametrize("seed", range(4))
def test_the_halves_share_a_scene_and_a_place(seed):
    """Beside the place both are the host; within it one shows the unsafe object, the other a safe one."""
    bank = photographs(9)
    unsafe, safe = (transplant(UNSAFE, BOX, bank, seed, is_unsafe=is_unsafe) for is_unsafe in (True, False))
    assert unsafe.host is safe.host
    host, one, other = unsafe.host.load(), unsafe.load(), safe.load()
    differs = (one != other).any(axis=2)
    assert 0.02 < differs.mean() < 0.8
    edited = (one != host).any(axis=2) | (other != host).any(axis=2)
    assert not (differs & ~edited).any()
    middle = np.argwhere(differs).mean(axis=0).astype(int)
    assert one[tuple(middle)].argmax() == 0
    assert one[tuple(middle)].max() > 180 > other[tuple(middle)].max()


def test_seeds_take_other_hosts_and_hosts_are_ordinary():
    bank = [*photographs(12), *photographs(8, is_look_alike=True)]
    hosts = [transplant(UNSAFE, BOX, bank, seed, is_unsafe=True).host for seed in range(6)]
    assert len({id(host) for host in hosts}) == 6
    ordinary = {id(one.content) for one in bank if not one.is_look_alike}
    assert {id(host) for host in hosts} <= ordinary
    again = transplant(UNSAFE, BOX, bank, 3, is_unsafe=True)
    assert (again.load() == transplant(UNSAFE, BOX, bank, 3, is_unsafe=True).load()).all()
    keys = {transplant(UNSAFE, BOX, bank, seed, is_unsafe=half).key for seed in range(6) for half in (True, False)}
    assert len(keys) == 12


class MeanColour:
    """Embeds an image by its mean colours, and remembers what it saw."""

    dim, fingerprint, name = 3, "0" * 64, "mean"

    def __init__(self):
        self.encoder, self.seen = self, []

    def embed(self, contents):
        self.seen += contents
        return np.array([one.load().mean(axis=(0, 1)) / 255 for one in contents], np.float32)

    def embed_readable(self, records):
        return records, self.embed([record.content for record in records]), []


class Listed:
    """36 unsafe images and 72 safe ones, a third of which look like something."""

    name, asked = "listed", {"source": "listed"}

    def __init__(self, unsafe_box=BOX, safe_box=BOX):
        self.boxes = safe_box, unsafe_box

    def load(self):
        records = []
        for i in range(108):
            label = int(i % 3 == 0)
            category = "hate" if label or i % 9 == 1 else None
            content = image(i, (250, 10, 10) if label else (10, 10, 200))
            records.append(Record(f"{i}", label, category, "listed", f"{i}", content, self.boxes[label]))
        return Loaded(records, None, [], len(records))


def data_of(policy, source=None, editor=None, **settings):
    store = MeanColour()
    pipeline = CounterfactualPipeline(policy, TemplateInstructor(), editor or NoEditor(), NoVerifier(), cache_dir=None)
    return GuardDataModule(source or Listed(), policy, store, pipeline, batch_size=4, **settings)


def test_transplants_are_paired_labelled_and_seen_by_the_encoder_alone(scenes_policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arm = arm_named("pairs_transplanted")
    data = data_of(scenes_policy, n_unsafe=10, negatives=arm.negatives, positives=arm.positives, variants_per_image=2, all_views=True)
    n = len(data.choice.train["unsafe"])
    assert {kind: len(records) for kind, records in data.choice.train.items()} == dict.fromkeys(arm.kinds, n)
    batches = list(data.batches(1))
    labels = np.concatenate([batch["labels"] for batch in batches])
    assert (labels == 1).sum() == 2 * n + 2 * n
    assert (labels == 0).sum() == 2 * n + 2 * n
    for batch in batches:
        first, second = batch["unsafe_rows"].numpy(), batch["counterfactual_rows"].numpy()
        assert len(first) == 2 * len(batch["labels"]) // 8
        assert (batch["labels"].numpy()[first] == 1).all()
        assert (batch["labels"].numpy()[second] == 0).all()
        vectors = batch["embeddings"].numpy()
        assert (vectors[first, 0] > vectors[second, 0]).all()  # the unsafe object is red, in the same scene
        hate = scenes_policy.category_names.index("hate")
        assert (batch["targets"].numpy()[first, hate] == 1).all()
    assert list(tmp_path.iterdir()) == []
    assert (data.n_transplants, data.n_counterfactuals) == (2 * 10, 0)
    assert len(data.used_images()) == 10 + 10  # unsafe and natural, each once


@pytest.mark.parametrize(("arm", "editor"), [("pairs_transplanted", NoEditor()), ("pairs_aug", PasteEditor()), ("unpaired", PasteEditor())])
def test_a_guard_knows_the_photographs_that_its_edits_are_made_of(scenes_policy, arm, editor):
    """Parts of them show in what it was trained on, so that it is not tested on them either."""
    arm = arm_named(arm)
    data = data_of(
        scenes_policy, None, editor, n_unsafe=10, negatives=arm.negatives, positives=arm.positives, variants_per_image=2, all_views=True
    )
    list(data.batches(1))
    made_of = {id(content) for one in data.store.seen if isinstance(one, TransplantContent) for content in (one.host, one.donor)}
    if "counterfactual" in arm.negatives:
        made_of |= {id(record.content) for record in data.load() if record.label == 0 and record.category}  # it pastes look-alikes
    assert bool(made_of) == (arm.name != "unpaired")
    parts = [record for record in data.load() if id(record.content) in made_of]
    noted = training_images(data, Unlabelled(data))
    assert [known.by for known in noted.find(parts)] == ["content"] * len(parts)
    others = [record for record in data.test if record.label == 0]
    assert noted.find(others) == [None] * len(others)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Listed(unsafe_box=None), "none of the 8 unsafe images of source=listed has a box, and transplants cut an object out by its box"),
        (Listed(safe_box=None), "source=listed has 0 safe training images with a box, and transplants need at least 2 to put objects into"),
    ],
    ids=["unsafe", "safe"],
)
def test_transplants_without_boxes_are_one_line(scenes_policy, source, message):
    arm = arm_named("pairs_transplanted")
    with pytest.raises(InputError, match=message):
        _ = data_of(scenes_policy, source, n_unsafe=8, negatives=arm.negatives, positives=arm.positives).choice


# --- how many safe images, and which ----------------------------------------------------------------------------------------


def test_safe_images_for_each_unsafe_one(scenes_policy):
    orders = Orders.of(data_of(scenes_policy).load(), 0)
    kinds = ("unsafe", "natural")
    one, four, everything = (choose(orders, 8, kinds, ratio) for ratio in (1, 4, "all"))
    assert [choice.n_safe for choice in (one, four, everything)] == [8, 32, len(orders.safe)]
    assert one.of("unsafe") == four.of("unsafe")
    for part in ("train", "validation"):
        names = [{record.id for record in getattr(choice, part)["natural"]} for choice in (one, four, everything)]
        assert names[0] < names[1] < names[2]


@pytest.mark.parametrize("ratio", [1, 4, "all"])
def test_an_epoch_shows_every_safe_image_once(scenes_policy, ratio):
    data = data_of(scenes_policy, n_unsafe=12, negatives=("natural",), safe_per_unsafe=ratio)
    n = len(data.choice.train["natural"])
    batches = list(data.batches(1))
    assert len(batches) == 3
    shown = np.concatenate([batch["embeddings"][batch["labels"] == 0].numpy() for batch in batches])
    assert len(np.unique(shown, axis=0)) == len(shown) == n
    assert all((batch["labels"] == 0).any() for batch in batches)


def test_too_few_safe_images_are_said(scenes_policy, caplog):
    data = data_of(scenes_policy, n_unsafe=20, negatives=("natural",), safe_per_unsafe=4)
    _ = data.choice
    assert "asked for 80 safe images, source=listed has" in data.notes[0]


def test_look_alikes_are_the_marked_images_and_none_is_there_twice(scenes_policy):
    data = data_of(scenes_policy, n_unsafe=5, negatives=("natural", "look_alike"))
    natural, alike = data.choice.of("natural"), data.choice.of("look_alike")
    assert all(record.label == 0 and record.category for record in alike)
    assert not {record.id for record in natural} & {record.id for record in alike}
    assert data.choice.n_safe == 10
    assert len(data.used_images()) == 15


def test_look_alikes_are_found_by_the_policy_s_texts(scenes_policy, scenes_encoder):
    """The source knows which of its safe scenes show a look-alike; the texts are not told."""
    source = ScenesSource(scenes_policy, n_train=120, n_test=9, look_alike_rate=0.3)
    store = EmbeddingStore(scenes_encoder, None)
    pipeline = CounterfactualPipeline(scenes_policy, TemplateInstructor(), NoEditor(), NoVerifier(), cache_dir=None)

    def look_alikes(**settings):
        kinds = ("natural", "look_alike")
        data = GuardDataModule(source, scenes_policy, store, pipeline, n_unsafe=10, negatives=kinds, **settings)
        return data.choice.of("look_alike"), data

    found, data = look_alikes(look_alikes="texts")
    assert len({record.id for record in found}) == 10
    assert sum(record.category is not None for record in found) >= 9
    assert len({record.category for record in found}) >= 5  # categories take turns
    assert not {record.id for record in found} & {record.id for record in data.choice.of("natural")}
    # one seed of a sweep finds them in the same order
    assert data.orders(0, ("look_alike",)).look_alikes == data.orders(1, ("look_alike",)).look_alikes
    marked, _ = look_alikes()
    assert all(record.category for record in marked)


def test_a_policy_whose_texts_name_no_look_alike_finds_none(scenes_policy, scenes_encoder):
    bare = replace(scenes_policy, categories=tuple(replace(one, safe_texts=scenes_policy.safe_texts) for one in scenes_policy.categories))
    with pytest.raises(InputError, match="policy 'scenes' has none; write safe_texts into its categories, or mark look-alikes"):
        by_texts([], bare, EmbeddingStore(scenes_encoder, None))
    with pytest.raises(InputError, match="data.look_alikes=texts needs an encoder that reads texts, and mean does not"):
        by_texts([], scenes_policy, MeanColour())


def test_look_alikes_come_first_where_safe_images_are_few(scenes_policy):
    """72 safe images, a third of them look-alikes: as natural ones they would all be taken."""
    data = data_of(scenes_policy, n_unsafe=8, negatives=("natural", "look_alike"), safe_per_unsafe=8)
    natural, alike = data.choice.of("natural"), data.choice.of("look_alike")
    assert len(alike) == 8
    assert not {record.group for record in natural} & {record.group for record in alike}
    assert any(f"has {len(natural)} that are no look-alikes for training: using all of them" in note for note in data.notes)
    everything = data_of(scenes_policy, n_unsafe=8, negatives=("natural", "look_alike"), safe_per_unsafe="all")
    assert len(everything.choice.of("look_alike")) == 8
    assert not any("look-alikes for training" in note for note in everything.notes)


def test_safe_images_that_cannot_be_read_are_no_look_alikes_and_said(scenes_policy, scenes_encoder, tmp_path, caplog):
    good = ScenesSource(scenes_policy, n_train=20, n_test=9, look_alike_rate=1.0).load().train
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file in files:
        file.write_bytes(b"no image")
    broken = [Record(f"broken {i}", 0, None, "mine", f"b{i}", FileContent(file)) for i, file in enumerate(files)]
    found = by_texts([*[one for one in good if one.label == 0], *broken], scenes_policy, EmbeddingStore(scenes_encoder, None))
    assert found
    assert not any(one.id.startswith("broken") for one in found)
    assert "data.look_alikes=texts leaves out 3 safe image(s) that cannot be read, the first is broken 0" in caplog.text
