"""Policies: the shipped ones, their digest and round trip, and every error that a hand-written file can give."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from omegaconf import OmegaConf

from guardkit.policy import Category, Policy
from guardkit.scenes.features import KINDS
from guardkit.scenes.stage import OBJECTS
from guardkit.schema import InputError

FOLDER = Path(__file__).resolve().parents[1] / "conf" / "policy"
SHIPPED = {
    "scenes": "hate violence sexual nudity criminal_planning weapons_substances self_harm animal_cruelty disasters",
    "scenes_loose": "hate violence sexual nudity criminal_planning weapons_substances self_harm animal_cruelty disasters",
    "scenes_family": "hate violence sexual nudity weapons_substances",
    "scenes_arts": "hate self_harm animal_cruelty",
    "scenes_news": "sexual nudity self_harm",
    "llavaguard": "hate violence sexual_content nudity criminal_planning weapons_substance_abuse self_harm animal_cruelty disasters_emergencies",
    "unsafebench": "hate harassment violence self_harm sexual shocking illegal_activity deception political health spam",
    "handled_objects": "weapons substances disasters",
    "photos": "alcohol_and_medicine weapons venomous_animals uniforms_and_police open_fire",
    "template": "motor_vehicles",
}
REAL = [name for name in SHIPPED if not name.startswith("scenes") and name != "template"]


def example() -> dict[str, Any]:
    """A policy with two categories, as plain data."""
    category = {
        "definition": "Things that fire.",
        "covered": ["a rifle"],
        "not_covered": ["a drill"],
        "edit": "Replace the rifle with a drill.",
        "unsafe_texts": ["a photo of a rifle", "a photo of a pistol"],
        "safe_texts": ["a photo of a drill"],
    }
    named = {"classes": ["rifle"], "look_alikes": ["drill"]}
    return {
        "name": "example",
        "description": "For tests.",
        "source": "Nowhere.",
        "safe_texts": ["a photo of a cup"],
        "categories": [{"name": "weapons", **copy.deepcopy(category), **named}, {"name": "tools", **copy.deepcopy(category)}],
    }


def text_places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The path of every text in plain data."""
    if isinstance(value, str):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [place for key, item in items for place in text_places(item, (*path, key))]


def changed(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """The example with the value at `path` replaced, or removed when it is `...`."""
    data: Any = example()
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return data


# --- the shipped policies ---------------------------------------------------------------------------------------


def test_every_shipped_policy_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_policy_has_the_promised_categories(name):
    policy = Policy.load(FOLDER / f"{name}.yaml")
    assert policy.name == name
    assert policy.category_names == tuple(SHIPPED[name].split())
    assert all(policy[category.name] is category for category in policy.categories)
    assert policy.source


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_policy_round_trips(name, tmp_path):
    policy = Policy.load(FOLDER / f"{name}.yaml")
    policy.save(tmp_path / "copy.yaml")
    again = Policy.load(tmp_path / "copy.yaml")
    assert again == policy
    assert again.digest == policy.digest
    assert Policy.from_dict(policy.to_dict()) == policy
    assert [path.name for path in tmp_path.iterdir()] == ["copy.yaml"]


@pytest.mark.parametrize("name", SHIPPED)
def test_hydra_reads_the_same_policy(name):
    path = FOLDER / f"{name}.yaml"
    assert "${" not in path.read_text(encoding="utf-8")
    composed = OmegaConf.to_container(OmegaConf.load(path))
    assert Policy.from_dict(composed, where="policy").digest == Policy.load(path).digest


@pytest.mark.parametrize("name", SHIPPED)
def test_no_text_of_a_shipped_policy_is_on_both_sides_or_twice(name):
    policy = Policy.load(FOLDER / f"{name}.yaml")
    unsafe = [text for category in policy.categories for text in category.unsafe_texts]
    safe = [*policy.safe_texts, *(text for category in policy.categories for text in category.safe_texts)]
    assert not set(unsafe) & set(safe)
    for category in policy.categories:
        assert len(set(category.unsafe_texts)) == len(category.unsafe_texts)
        assert len(set(category.safe_texts)) == len(category.safe_texts)


@pytest.mark.parametrize("name", REAL)
def test_policy_for_photographs_has_enough_texts_and_examples(name):
    policy = Policy.load(FOLDER / f"{name}.yaml")
    assert policy.safe_texts
    for category in policy.categories:
        assert 4 <= len(category.unsafe_texts) <= 8
        assert 4 <= len(category.safe_texts) <= 8
        assert category.covered
        assert category.not_covered
        # CLIP reads at most 77 tokens; captions stay far below
        assert all(len(text.split()) <= 16 for text in category.unsafe_texts + category.safe_texts)


def without_colour(phrase: str) -> str:
    """A feature's phrase as the policy writes it: no colour, and an article unless it is a plural or a mass noun."""
    text = " ".join(phrase.replace("{c}", "").split())
    return text if text.split()[0] in ("flames", "tulips", "smoke", "flood") else f"a {text}"


def test_scenes_policy_is_in_step_with_the_drawn_features():
    policy = Policy.load(FOLDER / "scenes.yaml")
    assert policy.category_names == tuple(KINDS)
    for name, kind in KINDS.items():
        assert policy[name].unsafe_texts == tuple(without_colour(phrase) for phrase in kind.unsafe)
        assert policy[name].safe_texts == tuple(without_colour(phrase) for phrase in kind.safe)
    assert policy.safe_texts == tuple(f"an {noun}" if noun[0] in "aeiou" else f"a {noun}" for noun in OBJECTS)


def test_the_loose_policy_names_no_object_of_the_scenes():
    exact, loose = (
        {
            word
            for text in [*policy.safe_texts, *(text for one in policy.categories for text in one.unsafe_texts + one.safe_texts)]
            for word in text.split()
        }
        for policy in (Policy.load(FOLDER / f"{name}.yaml") for name in ("scenes", "scenes_loose"))
    )
    assert exact & loose <= {"a", "an", "of", "in", "with", "open", "shut", "bare"}


# --- digest and round trip -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", text_places(example()), ids=str)
def test_digest_changes_with_any_text(path):
    assert Policy.from_dict(changed(path, "something_else")).digest != Policy.from_dict(example()).digest


def test_digest_changes_with_the_order_of_categories():
    data = example()
    data["categories"].reverse()
    assert Policy.from_dict(data).digest != Policy.from_dict(example()).digest


def test_digest_ignores_key_order_comments_and_layout(tmp_path):
    data = {key: example()[key] for key in reversed(example())}
    data["categories"] = [dict(reversed(category.items())) for category in data["categories"]]
    (tmp_path / "flow.yaml").write_text("# a comment\n" + yaml.safe_dump(data, sort_keys=False, default_flow_style=True, width=40))
    text = yaml.safe_dump(data, sort_keys=False).replace("description: For tests.", "description: |\n  For tests.")
    (tmp_path / "block.yaml").write_text(text)
    digests = {Policy.load(tmp_path / name).digest for name in ("flow.yaml", "block.yaml")}
    assert digests == {Policy.from_dict(example()).digest}


def test_source_and_safe_texts_may_be_left_out():
    data = example()
    del data["source"], data["safe_texts"]
    policy = Policy.from_dict(data)
    assert (policy.source, policy.safe_texts) == ("", ())


def test_texts_that_look_like_yaml_round_trip(tmp_path):
    data = changed(("categories", 0, "unsafe_texts"), ["yes", "12", "- a: b # c", "‘naïve’ 図", "${x}", "line\nbreak"])
    policy = Policy.from_dict(data)
    policy.save(tmp_path / "odd.yaml")
    assert Policy.load(str(tmp_path / "odd.yaml")) == policy


def test_a_policy_is_frozen_and_hashable():
    policy = Policy.from_dict(example())
    assert isinstance(policy.categories[0], Category)
    with pytest.raises(AttributeError):
        policy.name = "other"  # type: ignore[misc]
    assert hash(policy) == hash(Policy.from_dict(example()))


# --- errors ------------------------------------------------------------------------------------------------------------

WRONG = {
    "missing name": (("name",), ..., "name is missing; add it"),
    "missing categories": (("categories",), ..., "categories is missing; add it"),
    "missing field of a category": (("categories", 1, "unsafe_texts"), ..., "categories[1].unsafe_texts is missing; add it"),
    "unknown field, a close one": (("safe_text",), [], "safe_text is not a field; did you mean safe_texts?"),
    "unknown field of a category": (
        ("categories", 1, "exampels"),
        [],
        "categories[1].exampels is not a field; the fields are name, definition",
    ),
    "misspelt field of a category": (
        ("categories", 0, "defnition"),
        "x",
        "categories[0].defnition is not a field; did you mean definition?",
    ),
    "field that is a number": ((7,), "x", "7 is not a field; the fields are name"),
    "categories not a list": (("categories",), {"a": 1}, "categories must be a list of at least one category, got dict {'a': 1}"),
    "no categories": (("categories",), [], "categories must be a list of at least one category, got list []"),
    "category not a mapping": (("categories", 1), "weapons", "categories[1] must be a mapping with the fields name, definition"),
    "text is a number": (("description",), 3, "description must be a text, got int 3; write one, in quotes"),
    "text is null": (("source",), None, "source must be a text, got NoneType None"),
    "text is a list": (("categories", 0, "edit"), ["x"], "categories[0].edit must be a text, got list ['x']"),
    "empty text": (("categories", 1, "definition"), "  ", "categories[1].definition must not be empty; write a text"),
    "texts not a list": (
        ("categories", 1, "unsafe_texts"),
        "a gun",
        "categories[1].unsafe_texts must be a list of texts, got str 'a gun'; write one",
    ),
    "no texts": (("categories", 1, "safe_texts"), [], "categories[1].safe_texts must not be empty; write at least 1 text"),
    "empty text in a list": (("categories", 0, "unsafe_texts", 1), "", "categories[0].unsafe_texts[1] must not be empty"),
    "wrong type in a list": (("categories", 0, "covered", 0), True, "categories[0].covered[0] must be a text, got bool True"),
    "wrong type in the general texts": (("safe_texts", 0), 1.5, "safe_texts[0] must be a text, got float 1.5"),
    "harmless is a word": (("harmless",), "yes, sure", "harmless must be true or false, got str 'yes, sure'"),
    "class that is unsafe and a look-alike": (
        ("categories", 1, "look_alikes"),
        ["drill", "rifle"],
        "categories[1].look_alikes[1] repeats 'rifle' of categories[0].classes[0]; keep one of the two",
    ),
    "category twice": (
        ("categories", 1, "name"),
        "weapons",
        "categories[1].name repeats 'weapons' of categories[0]; merge the two, or rename one",
    ),
    "name with a space": (
        ("categories", 0, "name"),
        "fire arms",
        "categories[0].name must be lower-case letters, digits and underscores, a letter first",
    ),
    "name with a capital": (("categories", 0, "name"), "Weapons", "got str 'Weapons'; rename it"),
    "policy name not an identifier": (("name",), "my policy", "name must be lower-case letters"),
} | {
    f"reserved name {name}": (("categories", 1, "name"), name, f"categories[1].name must not be {name!r}, a name that guardkit itself")
    for name in ("safe", "unsafe", "decision")
}


def message_of(action: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(InputError) as caught:
        action(*arguments, **named)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize(("path", "value", "expected"), WRONG.values(), ids=WRONG)
def test_wrong_content_names_file_field_and_fix(path, value, expected, tmp_path):
    data = changed(path, value)
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(data))
    from_file, from_dict = message_of(Policy.load, file), message_of(Policy.from_dict, data, where="policy")
    assert from_file.startswith(f"{file}: ")
    assert from_dict.startswith("policy: ")
    assert expected in from_file
    assert expected in from_dict


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "weapons", "7"])
def test_a_file_that_is_no_mapping(text, tmp_path):
    (tmp_path / "wrong.yaml").write_text(text)
    expected = "wrong.yaml: the policy must be a mapping with the fields name, description, categories, safe_texts, source, harmless, got "
    assert expected in message_of(Policy.load, tmp_path / "wrong.yaml")


def test_a_syntax_error_gives_its_line(tmp_path):
    (tmp_path / "wrong.yaml").write_text("name: x\ndescription: y\ncategories: [a, b\nsource: z\n")
    assert "wrong.yaml line 4: not valid YAML (" in message_of(Policy.load, tmp_path / "wrong.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "name: \x07",
        "name: 2024-13-45",
        "name: !!int x",
        "name: !!bool x",
        "name: !!python/object/apply:os.getcwd []",
        "name: " + "[" * 5000,
    ],
    ids=["control character", "impossible date", "not a number", "not a truth value", "python object", "deep nesting"],
)
def test_a_hostile_file_is_an_input_error(text, tmp_path):
    (tmp_path / "wrong.yaml").write_text(text)
    message = message_of(Policy.load, tmp_path / "wrong.yaml")
    assert "wrong.yaml" in message
    assert "not valid YAML (" in message


def test_aliases_that_unfold_to_millions_of_texts_are_refused_shortly(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    (tmp_path / "wrong.yaml").write_text("categories:\n  " + "\n  ".join(lines) + "\nname: x\ndescription: y\n")
    assert "not valid YAML (aliases that never end, or are too many)" in message_of(Policy.load, tmp_path / "wrong.yaml")


def test_a_missing_file(tmp_path):
    assert "none.yaml: there is no such policy file; give the path" in message_of(Policy.load, tmp_path / "none.yaml")


@pytest.mark.parametrize("kind", ["folder", "not UTF-8"])
def test_an_unreadable_file(kind, tmp_path):
    path = tmp_path / "wrong.yaml"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"name: \xff\xfe")
    assert f"{path}: the policy cannot be read (" in message_of(Policy.load, path)


def test_an_unknown_category_lists_the_known_ones():
    policy = Policy.from_dict(example())
    policy.check_category("tools", "metadata.csv row 3")
    message = message_of(policy.check_category, "toys", "metadata.csv row 3")
    assert message.startswith("metadata.csv row 3: category 'toys' is not in policy 'example', which has weapons, tools; use one of these")
    assert message_of(lambda: policy["toys"]).startswith("policy['toys']: category 'toys' is not in policy 'example'")


def test_policies_load_without_torch_or_hydra():
    code = "import sys, guardkit.policy; print(sorted({'torch', 'hydra', 'omegaconf'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parents[1], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_policy_without_classes_keeps_the_digest_that_saved_guards_have():
    plain = Policy.from_dict(changed(("categories", 0, "classes"), ...)).to_dict()
    assert set(plain) == {"name", "description", "categories", "safe_texts", "source"}
    assert "classes" not in plain["categories"][1]
    assert plain["categories"][0].keys() - plain["categories"][1].keys() == {"look_alikes"}


def test_photographs_name_their_classes_and_each_safe_text_a_look_alike():
    policy = Policy.load("guardkit:photos")
    assert policy.harmless
    assert not Policy.load("guardkit:handled_objects").harmless
    for category in policy.categories:
        for texts, names in ((category.unsafe_texts, category.classes), (category.safe_texts, category.look_alikes)):
            assert names
            assert all(any(name in text for text in texts) for name in names)
        assert all(any(name in text for name in category.look_alikes) for text in category.safe_texts)


def test_a_policy_needs_no_more_than_names_definitions_and_a_text():
    category = {"name": "motor_vehicles", "definition": "Cars.", "unsafe_texts": ["a photo of a car"]}
    policy = Policy.from_dict({"name": "mine", "categories": [category]})
    assert policy["motor_vehicles"].edit == "Remove whatever shows motor vehicles."
    assert policy["motor_vehicles"].safe_texts == ("a photo without motor vehicles",)
    assert Policy.from_dict(policy.to_dict()) == policy
    ordinary = Policy.from_dict({"name": "mine", "safe_texts": ["a photo of a cup"], "categories": [category]})
    assert ordinary["motor_vehicles"].safe_texts == ("a photo of a cup",)


def test_all_problems_of_a_policy_are_told_at_once():
    data = example()
    del data["name"], data["categories"][0]["definition"]
    data["categories"][1]["unsafe_texts"] = []
    data["versoin"] = 1
    with pytest.raises(InputError) as caught:
        Policy.from_dict(data, where="my.yaml")
    told = str(caught.value)
    assert told.startswith("my.yaml: 4 problems: ")
    for part in (
        "versoin is not a field",
        "name is missing",
        "categories[0].definition is missing",
        "categories[1].unsafe_texts must not be",
    ):
        assert part in told


def test_policies_that_come_along_load_by_name():
    assert Policy.load("guardkit:scenes").digest == Policy.load(ROOT / "conf/policy/scenes.yaml").digest
    with pytest.raises(InputError, match="guardkit ships no policy 'scene'; it ships .*llavaguard.*scenes"):
        Policy.load("guardkit:scene")
