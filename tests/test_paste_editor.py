"""Pasting: what is asked for, from safe training photographs, in the place of the unsafe object and nowhere else."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from conftest import picture

from guardkit.counterfactual.instructor import TemplateInstructor
from guardkit.counterfactual.pipeline import CounterfactualPipeline
from guardkit.counterfactual.verifier import NoVerifier
from guardkit.data.datamodule import GuardDataModule
from guardkit.data.sources.base import Loaded
from guardkit.editors.base import EditRequest, Photograph, supply
from guardkit.editors.blending import box, cloned
from guardkit.editors.imperfect import ImperfectEditor
from guardkit.editors.paste import PasteEditor
from guardkit.images import ArrayContent, FileContent
from guardkit.schema import InputError, Record

PLACE = (0.3, 0.3, 0.6, 0.7)
RED, BLUE, GREEN = (200, 40, 40), (40, 40, 200), (40, 200, 40)


def ground(seed=0, size=(120, 90)):
    return np.asarray(picture(seed, size)) // 4 + 90


def with_object(colour, seed=0):
    """A striped square of a colour, a little another one for each seed, on quiet ground."""
    image = ground(seed)
    image[30:60, 40:70] = np.add(colour, seed % 50)
    image[30:60:6, 40:70] = (230, 230, 230)
    return Photograph(ArrayContent(image), (40 / 120, 30 / 90, 70 / 120, 60 / 90))


def bank(*entries):
    """(colour, caption, is_look_alike) -> photographs."""
    shown = [(with_object(colour, seed), caption, is_look_alike) for seed, (colour, caption, is_look_alike) in enumerate(entries)]
    return [Photograph(one.content, one.region, caption, is_look_alike) for one, caption, is_look_alike in shown]


MANY = bank(
    *[(colour, caption, True) for colour, caption in ((RED, "pop bottle"), (BLUE, "beaker"), (GREEN, "Water jug")) for _ in range(15)]
)


def editor(photographs=MANY, **settings):
    made = PasteEditor(**settings)
    made.supply(photographs)
    return made


def ask(content=None, region=PLACE, seed=0, target="", **more):
    return EditRequest(content or ArrayContent(ground(99)), "replace it", region, seed, target=target, **more)


def changed(before, after):
    return np.abs(before.astype(int) - after).max(axis=2)


def test_only_the_place_changes_and_each_seed_pastes_another_object():
    image = ground(99)
    first, again, *others = (editor().edit([ask(seed=seed)])[0].image for seed in (0, *range(8)))
    rows, columns = box(PLACE, image.shape, grow=0.02)
    outside = np.ones(image.shape[:2], bool)
    outside[rows, columns] = False
    assert (first == again).all()
    assert changed(image, first)[outside].max() == 0
    assert changed(image, first)[~outside].mean() > 10
    assert len({one.tobytes() for one in (first, *others)}) == 8


@pytest.mark.parametrize(("wanted", "channel"), [("a photo of a pop bottle", 0), ("A photo of a WATER JUG on a table", 1), ("a beaker", 2)])
def test_what_is_asked_for_is_pasted(wanted, channel):
    for seed in range(4):
        edited = editor().edit([ask(seed=seed, target=wanted)])[0].image
        rows, columns = box(PLACE, edited.shape)
        middle = edited[rows, columns][10:-10, 10:-10].reshape(-1, 3).mean(axis=0)
        assert middle.argmax() == channel


def test_look_alikes_are_pasted_where_some_are_known():
    photographs = bank((RED, "", False), (RED, "", False), (BLUE, "", True))
    edited = editor(photographs).edit([ask()])[0].image
    assert edited[40, 54].argmax() == 2
    edited = editor(photographs[:2]).edit([ask()])[0].image
    assert edited[40, 54].argmax() == 0


def test_a_null_edit_keeps_what_is_there_but_mirrored():
    photograph = with_object(RED)
    image = photograph.content.load().copy()
    image[30:60, 40:50] = BLUE  # left of red
    edited = editor().edit([ask(ArrayContent(image), photograph.region, kind="null")])[0].image
    assert edited[45, 43].argmax() == 0
    assert edited[45, 66].argmax() == 2
    without_a_box = editor().edit([ask(region=None, kind="null", label=0)])[0].image
    assert 0 < (changed(ground(99), without_a_box) > 0).mean() < 0.5


@pytest.mark.parametrize("region", [(0.0, 0.0, 0.5, 0.6), (0.4, 0.5, 1.0, 1.0), (0.0, 0.2, 1.0, 0.9), (0, 0, 1, 1)], ids=str)
def test_a_place_at_the_border_is_pasted_into_too(region):
    edited = editor(max_area=1.0).edit([ask(region=region, target="pop bottle")])[0].image
    rows, columns = box(region, edited.shape)
    assert edited[rows, columns].reshape(-1, 3).mean(axis=0).argmax() == 0


@pytest.mark.parametrize("region", [(0.2, 0.3, 0.7, 0.8), (0.0, 0.1, 0.5, 1.0)], ids=str)
def test_what_is_cloned_into_its_own_place_stays_as_it_was(region):
    image = ground(5)
    place = box(region, image.shape)
    assert changed(image, cloned(image, image[place].copy(), place)).max() <= 3


def test_a_large_place_is_blended_in_smaller_pixels():
    image = ground(7, (600, 400))
    edited = editor(max_side=64).edit([ask(ArrayContent(image))])[0].image
    rows, columns = box(PLACE, image.shape, grow=0.1)
    outside = np.ones(image.shape[:2], bool)
    outside[rows, columns] = False
    assert edited.shape == image.shape
    assert changed(image, edited)[outside].max() == 0
    assert changed(image, edited)[~outside].mean() > 10


def test_nothing_colourful_is_pasted_into_a_grey_photograph():
    grey = cv2.cvtColor(cv2.cvtColor(ground(3), cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    edited = editor().edit([ask(ArrayContent(grey), target="pop bottle")])[0].image
    assert np.ptp(edited.astype(int), axis=2).max() <= 3


@pytest.mark.parametrize(
    ("photographs", "request_", "reason"),
    [
        (MANY, {"region": None}, "no region: editor=paste needs a box around the feature"),
        ([], {}, "no photograph to paste from: editor=paste needs safe training images with a box"),
        (MANY, {"region": (0.5, 0.5, 0.51, 0.9)}, "pixels is too small to paste into"),
        (MANY, {"region": (0.0, 0.0, 1.0, 0.95)}, "region covers more than 85% of the image"),
        (MANY, {"content": FileContent("/no/such.png")}, "unreadable image: file does not exist"),
        (MANY, {"kind": "round_trip"}, "no round trip"),
    ],
    ids=["no box", "no bank", "small", "large", "unreadable", "round trip"],
)  # fmt: skip
def test_what_cannot_be_edited_says_why(photographs, request_, reason):
    (result,) = editor(photographs, dilate=0.0).edit([ask(**request_)])
    assert result.image is None
    assert reason in result.reason


def test_unreadable_photographs_are_passed_over():
    gone = Photograph(FileContent("/no/such.png"), PLACE, "beaker")
    assert editor([gone, *bank((RED, "beaker", False))]).edit([ask()])[0].image is not None
    (result,) = editor([gone]).edit([ask()])
    assert result.reason == "unreadable image: no photograph to paste from can be read, the last: file does not exist"


def test_a_bank_smaller_than_asked_for_is_an_error():
    with pytest.raises(InputError, match="bank_size=100 photographs to paste from are asked for, and training has 45 safe look-alikes"):
        editor(bank_size=100)
    assert editor(bank_size=10).config["bank"] not in (None, editor(bank_size=45).config["bank"])


def test_what_edits_depend_on_is_in_the_config():
    alone = PasteEditor()
    assert alone.config["bank"] is None
    assert editor().config == editor().config
    assert editor().config["bank"] != editor(MANY[1:]).config["bank"]
    wrapped = ImperfectEditor(PasteEditor(), 1.0)
    supply(wrapped, MANY)
    assert wrapped.config["of"] == editor().config


class Listed:
    """A source without test images of its own."""

    name, asked = "listed", {"source": "listed"}

    def load(self):
        records = []
        for i in range(60):
            shown = with_object(RED, 100 + i)
            category = "hate" if i % 2 or i % 4 == 0 else None
            records.append(Record(f"{i}.png", i % 2, category, "listed", f"{i}.png", shown.content, shown.region, f"no {i}"))
        return Loaded(records, None, [], len(records))


class Receiving:
    """An editor that remembers what it is given to paste from."""

    name, config = "receiving", {}

    def supply(self, photographs):
        self.given = photographs


def test_no_test_image_is_ever_pasted_from(scenes_policy):
    receiving = Receiving()
    pipeline = CounterfactualPipeline(scenes_policy, TemplateInstructor(), receiving, NoVerifier(), cache_dir=None)
    data = GuardDataModule(Listed(), scenes_policy, None, pipeline, n_unsafe=4)
    pool = data.load()
    assert {one.caption for one in receiving.given} == {record.caption for record in pool if record.label == 0}
    assert not {one.caption for one in receiving.given} & {record.caption for record in data.test}
    assert 0 < sum(one.is_look_alike for one in receiving.given) < len(receiving.given)
