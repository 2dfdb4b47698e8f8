"""A guard on the Hub, played by a server on this machine: what goes up, what comes back, who may; and what its card says."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections import defaultdict

import numpy as np
import pytest
import torch
from conftest import picture

from guardkit import Band, GuardClassifier, InputError, LinearHead, OpenClipEncoder, Thresholds
from guardkit.artifacts import shipped
from guardkit.schema import Record
from guardkit.score_maps import Calibration, ScoreMap
from guardkit.seen import SeenImages

TOKEN = "hf_of_the_owner"
PROMISE = "at most 0.05 of safe images are blocked (with 90% confidence, from 120 images)"


class Hub:
    """Repositories with branches of commits, as far as huggingface_hub asks for them; only the owner's token may see or write."""

    def __init__(self):
        self.branches = defaultdict(dict)  # repository -> branch -> commit
        self.files = {}  # (repository, commit) -> name -> bytes
        self.private, self.messages, self.asked, self.refuses = {}, [], [], None

    def answer(self, verb, path, body, authorization):
        """Status, JSON or bytes, and further headers."""
        self.asked.append((verb, path.partition("?")[0], authorization))
        if self.refuses is not None:
            return self.refuses, {"error": "words of the server\nover two lines"}, {}
        if path == "/api/validate-yaml":  # it belongs to nobody
            return 200, {"errors": [], "warnings": []}, {}
        if authorization != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}, {}
        if path == "/api/repos/create":
            said = json.loads(body)
            name = f"{said['organization']}/{said['name']}"
            self.private.setdefault(name, said.get("private", said.get("visibility") == "private"))  # older clients and newer ones
            if name in self.branches:
                return 409, {"url": f"{self.address}/{name}", "error": "You already created this model repo"}, {}
            self._commit(name, "main", {})
            return 200, {"url": f"{self.address}/{name}", "id": name}, {}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit|revision|tree)/([^/?]+).*", path):
            return self._model(*found.groups(), body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)(\?.*)?", path):
            name, commit, file, _ = found.groups()
            data = self.files.get((name, self.branches[name].get(commit, commit)), {}).get(file)
            if data is None:
                return 404, {}, {"X-Error-Code": "EntryNotFound"}
            return 200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.branches[name].get(commit, commit)}
        return 500, {"error": f"{verb} {path}"}, {}

    def _commit(self, name, branch, files):
        before = self.files.get((name, self.branches[name].get(branch)), {})
        commit = hashlib.sha1(repr((name, branch, sorted(files), len(self.messages))).encode()).hexdigest()
        self.branches[name][branch] = commit
        self.files[name, commit] = {**before, **files}
        return commit

    def _model(self, name, what, at, body):
        if what == "branch":
            self.branches[name].setdefault(at, self.branches[name]["main"])
            return 201, {}, {}
        commit = self.branches[name].get(at, at)
        if (name, commit) not in self.files:
            return 404, {}, {"X-Error-Code": "RevisionNotFound"}
        if what == "preupload":
            return (
                200,
                {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]]},
                {},
            )
        if what == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            self.messages += [line["value"]["summary"] for line in lines if line["key"] == "header"]
            files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
            commit = self._commit(name, at, files)
            return 200, {"commitUrl": f"{self.address}/{name}/commit/{commit}", "commitOid": commit, "success": True}, {}
        if what == "tree":
            listed = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in self.files[name, commit].items()
            ]
            return 200, listed, {}
        return 200, {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in self.files[name, commit]]}, {}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, said, more = made.answer(self.command, self.path, body, self.headers.get("Authorization"))
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | more).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    made.address = f"http://127.0.0.1:{server.server_address[1]}"
    for name, value in {
        "ENDPOINT": made.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": made.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", made.address, raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield made
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def guard(scenes_encoder, scenes_policy):
    torch.manual_seed(0)
    head = LinearHead.build(scenes_encoder, scenes_policy)
    torch.nn.init.normal_(head.linear.weight, std=0.1)
    bands = dict.fromkeys(scenes_policy.category_names, Band.at(0.5))
    about = {"promises": [PROMISE], "promises_by_category": [], "prevalence": 0.01, "n_safe": 120, "n_unsafe": 40}
    return GuardClassifier(
        head,
        scenes_encoder,
        scenes_policy,
        threshold=Thresholds(Band(0.3, 0.7), bands),
        calibration=Calibration(ScoreMap.line("platt", 1.5, -0.5), {}, about),
        licences={"head": "apache-2.0", "data": "cc-by-nc-4.0"},
    )


def test_a_guard_comes_back_from_the_hub_as_it_went(hub, guard, scenes_encoder, capfd):
    address = guard.push_to_hub("someone/guard", private=True, token=TOKEN, commit_message="First one")
    commit = address.removeprefix(f"{hub.address}/someone/guard/commit/")
    assert hub.branches["someone/guard"]["main"] == commit
    assert (hub.private, hub.messages) == ({"someone/guard": True}, ["First one"])
    files = hub.files["someone/guard", commit]
    assert set(files) == {"config.json", "model.safetensors", "policy.yaml", "README.md"}
    assert 'from_pretrained("someone/guard")' in files["README.md"].decode()
    back = GuardClassifier.from_pretrained("someone/guard", token=TOKEN)
    assert (back.fingerprint, back.thresholds, back.licences) == (guard.fingerprint, guard.thresholds, guard.licences)
    image = picture(0)
    assert back.predict(image)[0].to_dict() == guard.predict(image)[0].to_dict()
    assert {authorization for _, path, authorization in hub.asked if "someone" in path} == {f"Bearer {TOKEN}"}
    assert capfd.readouterr() == ("", "")

    # another branch and an earlier commit
    other = GuardClassifier(guard.head, scenes_encoder, guard.policy, threshold=0.9)
    other.push_to_hub("someone/guard", token=TOKEN, revision="strict")
    assert hub.branches["someone/guard"]["main"] == commit
    assert GuardClassifier.from_pretrained("someone/guard", token=TOKEN, revision="strict").threshold == 0.9
    other.push_to_hub("someone/guard", token=TOKEN)
    assert GuardClassifier.from_pretrained("someone/guard", token=TOKEN).threshold == 0.9
    assert GuardClassifier.from_pretrained("someone/guard", token=TOKEN, revision=commit).threshold == 0.3


def test_hashes_of_training_images_go_with_it_and_nothing_else_of_its_folder(hub, guard, tmp_path):
    vector = np.eye(1, guard.encoder.dim, dtype=np.float32)[0]
    seen = SeenImages.of([("train", Record("IMG_1.jpg", 1, None, "photos", "IMG_1.jpg", None, embedding=vector), vector)])
    folder = GuardClassifier(guard.head, guard.encoder, guard.policy, training_images=seen).save_pretrained(tmp_path / "guard")
    (folder / "notes.txt").write_text("not for others")
    (folder / ".env").write_text("a secret")
    GuardClassifier.from_pretrained(folder).push_to_hub("someone/trained", token=TOKEN)
    (files,) = [files for (name, _), files in hub.files.items() if name == "someone/trained" and files]
    assert set(files) == {"config.json", "model.safetensors", "policy.yaml", "README.md", "training_images.parquet"}
    assert len(GuardClassifier.from_pretrained("someone/trained", token=TOKEN).training_images) == 1


@pytest.mark.parametrize(
    ("status", "token", "reason"),
    [
        (None, "hf_of_nobody", "it does not know you: log in with `hf auth login`, set HF_TOKEN or give token="),
        (None, None, "it does not know you: log in with `hf auth login`, set HF_TOKEN or give token="),
        (403, TOKEN, "you may not write there, or your token may only read"),
        (404, TOKEN, "it has no such repository or branch"),
        (418, TOKEN, "the Hub answers with status 418"),
    ],
)
def test_a_hub_that_refuses_is_one_line(hub, guard, status, token, reason):
    hub.refuses = status
    with pytest.raises(InputError) as caught:
        guard.push_to_hub("someone/guard", token=token)
    assert str(caught.value) == f"someone/guard could not be written to the Hub ({reason}); save it into a folder, or try again"
    assert not any(hub.files.values())


def test_a_hub_that_cannot_be_reached_or_is_switched_off_is_one_line(hub, guard, monkeypatch):
    for constant, value, reason in (
        ("ENDPOINT", "http://127.0.0.1:9", r"\(the Hub cannot be reached\)"),
        ("HF_HUB_OFFLINE", True, r"\(the Hub is switched off by HF_HUB_OFFLINE\)"),
    ):
        monkeypatch.setattr(f"huggingface_hub.constants.{constant}", value)
        with pytest.raises(InputError, match=reason):
            guard.push_to_hub("someone/guard", token=TOKEN)


@pytest.mark.parametrize("name", ["guard", "", "a/b/c", "./guard", "my org/guard"])
def test_a_name_that_the_hub_cannot_have_is_one_line(hub, guard, name):
    with pytest.raises(InputError, match=r"ORG/NAME") as caught:
        guard.push_to_hub(name, token=TOKEN)
    assert "\n" not in str(caught.value)
    assert not hub.asked


def test_what_is_not_there_or_not_for_you_is_one_line(hub, guard, tmp_path):
    guard.push_to_hub("someone/guard", token=TOKEN)
    for settings, reason in (
        ({}, "no such repository, or none that you may see"),
        ({"token": TOKEN, "revision": "v9"}, "its repository has no such revision"),
    ):
        with pytest.raises(InputError, match=reason):
            GuardClassifier.from_pretrained("someone/guard", **settings)
    with pytest.raises(InputError, match="is a folder here and has no revision 'v9'; that is for guards on the Hub"):
        GuardClassifier.from_pretrained(guard.save_pretrained(tmp_path / "guard"), revision="v9")


# --- the card ---------------------------------------------------------------------------------------------------------


def card_of(guard, tmp_path):
    from huggingface_hub import ModelCard

    path = guard.save_pretrained(tmp_path / "card") / "README.md"
    return ModelCard.load(path).data.to_dict(), path.read_text()


def test_the_card_says_terms_promises_and_what_the_guard_is_not_for(guard, tmp_path):
    data, text = card_of(guard, tmp_path)
    assert data == {
        "library_name": "guardkit",
        "pipeline_tag": "image-classification",
        "tags": ["guardkit", "image-safety", "content-moderation"],
        "license": "apache-2.0",
    }
    for line in (
        "| unsafe (the decision) | 0.3 | 0.7 |",
        f"- {PROMISE}",
        "Scores are probabilities where 0.01 of the images are unsafe.",
        "| code (guardkit) | mit |",
        "| head (`model.safetensors`) | apache-2.0 |",
        "| encoder (guardkit:scenes_clip), which is not part of this | mit |",
        "| data it was trained on | cc-by-nc-4.0 |",
        "- Moderation of any kind: its policy is of harmless stand-ins, for experiments.",
        "- In a product or service: the licence of its data does not allow it.",
        "calibrated for: calibrate it anew.",
    ):
        assert line in text, line


def test_what_nobody_knows_is_said_and_the_encoders_home_is_named(hub, guard, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    model = {path.name: path.read_bytes() for path in shipped("guardkit:scenes_clip").iterdir() if path.is_file()}
    hub._commit("someone/clip", "main", model)
    made = GuardClassifier(guard.head, OpenClipEncoder(None, "hf-hub:someone/clip"), guard.policy)
    data, text = card_of(made, tmp_path)
    assert (data["license"], data["base_model"]) == ("unknown", "someone/clip")
    assert text.count("| not known to guardkit: ask where it came from |") == 3
    assert "nobody has calibrated them" in text
    made = GuardClassifier(guard.head, guard.encoder, guard.policy, licences={"head": "My Own Terms 1.0"})
    data, _ = card_of(made, tmp_path)
    assert (data["license"], data["license_name"]) == ("other", "my-own-terms-1.0")


@pytest.mark.parametrize(
    ("licences", "message"),
    [
        ({"code": "mit"}, "licences must be of head, encoder, data, got 'code'"),
        ({"head": None}, 'the licence of head must be a name such as "mit" or "cc-by-4.0", got None'),
        ({"data": "mit\n---\nlicense: other"}, "the licence of data must be a name"),
        ("mit", "licences must be a map such as"),
    ],
)
def test_a_wrong_licence_is_one_line(guard, licences, message):
    with pytest.raises(InputError, match=message):
        GuardClassifier(guard.head, guard.encoder, guard.policy, licences=licences)


def test_stated_licences_stay_with_a_saved_guard(guard, scenes_policy, tmp_path):
    back = GuardClassifier.from_pretrained(guard.save_pretrained(tmp_path / "guard"))
    assert back.licences == guard.licences
    assert back.all_licences == {"code": "mit", "encoder": "mit"} | guard.licences
    (tmp_path / "guard/config.json").write_text((tmp_path / "guard/config.json").read_text().replace("apache-2.0", "mit"))
    with pytest.raises(InputError, match="was changed after it was written"):
        GuardClassifier.from_pretrained(tmp_path / "guard")
