"""`serve`: decisions over HTTP that are those of Python, in batches, within limits; nothing malformed is fatal."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from commands import FORKS, call
from commands import _in_a_process as in_a_process
from conftest import picture

pytest.importorskip("fastapi")
import fastapi
import httpx
from fastapi.testclient import TestClient

from guardkit import Band, GuardClassifier, InputError, LinearHead, Thresholds
from guardkit.runs.serve import run
from guardkit.serving import Limits, create_app, refuse_unsafe

SEEDS = range(8)
KEY = "correct horse battery"


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PNGS = [encoded(picture(seed)) for seed in SEEDS]
NO_IMAGE = b"this is no image"


def make_guard(encoder, policy, seed=0):
    """It blocks some of the pictures, reviews some and allows some."""
    torch.manual_seed(seed)
    head = LinearHead.build(encoder, policy)
    torch.nn.init.normal_(head.linear.weight, std=0.1)
    made = GuardClassifier(head, encoder, policy)
    scores = sorted(one.score for one in made.predict([picture(seed) for seed in SEEDS]))
    bands = dict.fromkeys(policy.category_names, Band.at(0.5))
    made.thresholds = Thresholds(Band((scores[2] + scores[3]) / 2, (scores[4] + scores[5]) / 2), bands)
    return made


@pytest.fixture(scope="module")
def guard(scenes_encoder, scenes_policy):
    return make_guard(scenes_encoder, scenes_policy)


@pytest.fixture(scope="module")
def saved(guard, tmp_path_factory):
    return guard.save_pretrained(tmp_path_factory.mktemp("serve") / "guard")


@contextmanager
def client_of(*arguments, **settings):
    with TestClient(create_app(*arguments, **settings), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def client(guard):
    with client_of(guard) as client:
        yield client


def as_json(*images, **more):
    return {"images": [base64.b64encode(one).decode() for one in images], **more}


def files(*images, name="{}.png"):
    return [("files", (name.format(at), one)) for at, one in enumerate(images)]


def decisions(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["decisions"]


class Slow:
    """An encoder that notes its batches, and waits until it may go on."""

    def __init__(self, encoder):
        self._encoder, self.batches, self.go_on = encoder, [], threading.Event()

    def __getattr__(self, name):
        return getattr(self._encoder, name)

    def encode_preprocessed(self, images, **options):
        self.batches.append(len(images))
        assert self.go_on.wait(30)
        return self._encoder.encode_preprocessed(images, **options)


def waits_for(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


# --- decisions --------------------------------------------------------------------------------------------------------


def test_every_way_of_sending_gives_the_decisions_of_python(guard, client, tmp_path):
    expected = [one.to_dict() for one in guard.predict(PNGS)]
    assert {one["action"] for one in expected} == {"allow", "review", "block"}
    path = tmp_path / "0.png"
    path.write_bytes(PNGS[0])
    by_path = guard.predict(path)[0]
    raw = [decisions(client.post("/v1/moderate", content=one, headers={"content-type": "image/png"}))[0] for one in PNGS]
    ways = {
        "form": decisions(client.post("/v1/moderate", files=files(*PNGS))),
        "json": decisions(client.post("/v1/moderate", json=as_json(*PNGS))),
        "raw": raw,
    }
    for way, found in ways.items():
        assert [one.pop("guard") for one in found] == ["guard"] * 8, way
        assert [one.pop("frame") for one in found] == [None] * 8
        names = [one.pop("id") for one in found]
        assert names == ([f"{i}.png" for i in SEEDS] if way == "form" else [str(i) for i in SEEDS] if way == "json" else ["0"] * 8)
        assert found[0]["score"] == pytest.approx(by_path.score, abs=1e-4)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.pop("categories") == pytest.approx(theirs["categories"], abs=1e-4)
            assert mine.pop("score") == pytest.approx(theirs["score"], abs=1e-4)
            assert mine == {key: value for key, value in theirs.items() if key not in ("score", "categories")}


def test_names_are_only_repeated(client):
    hostile = "../../etc/\ud800\x1b[31mpasswd"
    found = decisions(client.post("/v1/moderate", content=json.dumps({"images": [{"id": hostile, "data": base64.b64encode(PNGS[0]).decode()}]}), headers={"content-type": "application/json"}))  # fmt: skip
    assert found[0]["id"] == hostile
    assert decisions(client.post("/v1/moderate?id=mine", content=PNGS[0]))[0]["id"] == "mine"
    assert len(decisions(client.post("/v1/moderate", params={"id": "x" * 5000}, content=PNGS[0]))[0]["id"]) == 300
    assert decisions(client.post("/v1/moderate", files=files(PNGS[0], name="../{}.png")))[0]["id"] == "../0.png"


def test_a_bad_image_is_an_error_and_the_others_are_decided(guard, client):
    found = decisions(client.post("/v1/moderate", files=files(PNGS[0], NO_IMAGE, b"", PNGS[1][:300], PNGS[1])))
    assert [one["action"] == "error" for one in found] == [False, True, True, True, False]
    assert (found[1]["score"], found[1]["label"], found[1]["error"]) == (None, None, "not an image of a known type")
    assert found[4]["score"] == pytest.approx(guard.predict(PNGS[1])[0].score, abs=1e-4)
    alone = decisions(client.post("/v1/moderate", content=NO_IMAGE))
    assert (alone[0]["action"], alone[0]["error"]) == ("error", "not an image of a known type")


def test_the_worst_frame_decides_and_is_named(guard, client):
    frames = [picture(seed) for seed in SEEDS]
    scores = [one.score for one in guard.predict(frames)]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    found = decisions(client.post("/v1/moderate", content=data))[0]
    assert found["frame"] == int(np.argmax(scores))
    assert found["score"] == pytest.approx(max(scores), abs=1e-4)


def test_a_scope_decides_by_some_categories(guard, client):
    names = guard.policy.category_names[:2]
    expected = [one.to_dict()["violated"] for one in guard.predict(PNGS, scope=names)]
    asked = [
        client.post(f"/v1/moderate?scope={','.join(names)}", files=files(*PNGS)),
        client.post("/v1/moderate", params={"scope": names}, json=as_json(*PNGS)),
        client.post("/v1/moderate", files=files(*PNGS), data={"scope": ",".join(names)}),
        client.post("/v1/moderate", json=as_json(*PNGS, scope=names)),
    ]
    for answer in asked:
        assert [one["violated"] for one in decisions(answer)] == expected
    for answer in (
        client.post("/v1/moderate?scope=kittens", content=PNGS[0]),
        client.post("/v1/moderate", json=as_json(PNGS[0], scope=["kittens"])),
    ):
        assert answer.status_code == 422
        assert re.fullmatch(r"scope names the category 'kittens', which this guard does not know; it knows .+", answer.json()["detail"])


def test_several_guards_on_one_encoder_embed_once(guard, scenes_encoder, scenes_policy, saved, tmp_path):
    other = make_guard(scenes_encoder, scenes_policy, seed=1)
    slow = Slow(scenes_encoder)
    slow.go_on.set()
    mine, theirs = (GuardClassifier(one.head, slow, one.policy, threshold=one.thresholds) for one in (guard, other))
    with client_of({"a": mine, "b": theirs}) as client:
        found = decisions(client.post("/v1/moderate", files=files(*PNGS[:3])))
        assert sum(slow.batches) == 3
        assert [(one["id"], one["guard"]) for one in found] == [(f"{i}.png", name) for i in range(3) for name in "ab"]
        for name, one in (("a", guard), ("b", other)):
            scores = [each["score"] for each in found if each["guard"] == name]
            assert scores == pytest.approx([each.score for each in one.predict(PNGS[:3])], abs=1e-4)
        assert [one["guard"] for one in decisions(client.post("/v1/moderate?guard=b", content=PNGS[0]))] == ["b"]
        answer = client.post("/v1/moderate?guard=c", content=PNGS[0])
        assert (answer.status_code, answer.json()) == (422, {"detail": "there is no guard 'c'; there are a, b"})
    folders = {"a": saved, "b": other.save_pretrained(tmp_path / "other")}
    served = create_app(folders).state.service.guards
    assert served["a"].guard.encoder is served["b"].guard.encoder


# --- many at once -----------------------------------------------------------------------------------------------------


def test_requests_at_once_are_encoded_together_and_a_full_queue_refuses(guard, scenes_encoder):
    slow = Slow(scenes_encoder)
    mine = GuardClassifier(guard.head, slow, guard.policy, threshold=guard.thresholds)
    with client_of(mine, limits=Limits(max_queue=8, max_images=8, max_batch=4)) as client, ThreadPoolExecutor(8) as pool:
        service = client.app.state.service
        first = pool.submit(client.post, "/v1/moderate", content=PNGS[0])
        waits_for(lambda: slow.batches)
        rest = [pool.submit(client.post, "/v1/moderate", content=one) for one in PNGS[1:8]]
        waits_for(lambda: service.is_full)
        waits_for(lambda: sum(len(one._waiting) for one in service._batches.values()) == 7)
        answer = client.post("/v1/moderate", content=PNGS[0])
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json() == {"detail": "the queue is full (8 images); try again in a second"}
        assert client.get("/healthz").json() == {"status": "ok"}
        slow.go_on.set()
        found = [decisions(one.result())[0] for one in [first, *rest]]
        assert slow.batches == [1, 4, 3]
        assert [one["score"] for one in found] == pytest.approx([one.score for one in guard.predict(PNGS)], abs=1e-4)
        assert service.gauges == {"guardkit_queue_images": 0, "guardkit_queue_bytes": 0}
        assert decisions(client.post("/v1/moderate", content=PNGS[0]))


def test_an_encoder_that_fails_is_a_fault_of_one_batch(guard, scenes_encoder):
    slow = Slow(scenes_encoder)
    mine = GuardClassifier(guard.head, slow, guard.policy)
    with client_of(mine) as client:
        slow.go_on.wait = lambda _: 1 / 0
        answer = client.post("/v1/moderate", content=PNGS[0])
        assert (answer.status_code, answer.json()) == (500, {"detail": "a fault of the service: ZeroDivisionError; its log says more"})
        slow.go_on.wait = lambda _: True
        assert decisions(client.post("/v1/moderate", content=PNGS[0]))[0]["action"] != "error"


# --- limits and malformed requests ------------------------------------------------------------------------------------


def test_what_is_too_large_is_refused(guard):
    big = encoded(picture(0, (400, 300)))
    long = encoded(picture(0), "GIF", save_all=True, append_images=[picture(seed) for seed in SEEDS[1:]])
    limits = Limits(max_bytes=len(big) + 1, max_request_bytes=len(big) + 20_000, max_pixels=100 * 100, max_frames=3, max_images=3)
    with client_of(guard, limits=limits) as client:
        alone = {
            "pixels": (big, r"the image is too large: 400x300 is more than 10000 pixels"),
            "frames": (long, r"the image is too large: an animation of 8 frames is more than 3"),
            "bytes": (big + b"12", r"the image is too large: \d+ encoded bytes are more than \d+"),
            "body": (big + bytes(30_000), r"a request has at most \d+ bytes"),
        }
        for name, (data, message) in alone.items():
            for answer in (client.post("/v1/moderate", content=data), client.post("/v1/moderate", content=iter([data]))):
                assert answer.status_code == 413, name
                assert re.fullmatch(message, answer.json()["detail"]), name
        found = decisions(client.post("/v1/moderate", files=files(PNGS[0], big)))
        assert [one["action"] == "error" for one in found] == [False, True]
        for answer in (client.post("/v1/moderate", files=files(*PNGS[:4])), client.post("/v1/moderate", json=as_json(*PNGS[:4]))):
            assert (answer.status_code, answer.json()) == (413, {"detail": "a request has at most 3 images"})
        assert client.app.state.service.gauges == {"guardkit_queue_images": 0, "guardkit_queue_bytes": 0}


MALFORMED = [
    ({"content": b"{", "headers": {"content-type": "application/json"}}, 400),
    ({"content": b"[" * 100_000, "headers": {"content-type": "application/json"}}, 400),
    ({"content": b"\xff\xfe", "headers": {"content-type": "application/json"}}, 400),
    ({"json": []}, 422),
    ({"json": {}}, 422),
    ({"json": {"images": []}}, 422),
    ({"json": {"images": "aGk="}}, 422),
    ({"json": {"images": [1]}}, 422),
    ({"json": {"images": ["!"]}}, 422),
    ({"json": {"images": ["aGk=\n"]}}, 422),
    ({"json": {"images": ["ü"]}}, 422),
    ({"json": {"images": [{"url": "http://127.0.0.1/a.png"}]}}, 422),
    ({"json": {"images": ["http://127.0.0.1/a.png"]}}, 422),
    ({"json": {"images": [{"id": 5, "data": "aGk="}]}}, 422),
    ({"json": {"images": ["aGk="], "scope": "all"}}, 422),
    ({"json": {"images": ["aGk="], "scope": []}}, 422),
    ({"json": {"images": ["aGk="], "scope": [{}]}}, 422),
    ({"json": {"images": ["aGk="], "more": 1}}, 422),
    ({"json": {"images": ["aGk="], "scope": ["a"]}, "params": {"scope": "a"}}, 422),
    ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400),
    ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=a"}}, 400),
    ({"content": b"--a\r\n\r\nx\r\n--a--", "headers": {"content-type": "multipart/form-data; boundary=a"}}, 400),
    ({"content": b"--a\r\ncontent-disposition: form-data; name=f; filename=f\r\n\r\nx", "headers": {"content-type": "multipart/form-data; boundary=a"}}, 400),
    ({"files": {"scope": (None, "a")}}, 422),
    ({"files": {"url": (None, "http://127.0.0.1/a.png")}}, 422),
    ({}, 422),
    ({"headers": {"content-type": "image/png"}}, 422),
    ({"content": b"x", "headers": {"content-type": "text/html"}}, 415),
    ({"content": b"x", "headers": {"content-type": "application/x-www-form-urlencoded"}}, 415),
    ({"content": b"x", "headers": [("content-type", "image/png"), ("content-type", "image/png")]}, 415),
    ({"content": b"x", "headers": {"content-encoding": "gzip"}}, 415),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "status"), MALFORMED)
def test_a_malformed_request_is_refused_in_one_line(client, request_, status):
    answer = client.post("/v1/moderate", **request_)
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["detail"]
    assert "\n" not in answer.json()["detail"]
    assert client.app.state.service.gauges == {"guardkit_queue_images": 0, "guardkit_queue_bytes": 0}


def test_one_malformed_request_in_a_hundred_of_a_thousand_disturbs_nobody(guard):
    expected = [one.score for one in guard.predict(PNGS)]
    app = create_app(guard)

    async def ask_all():
        transport, few = httpx.ASGITransport(app), asyncio.Semaphore(32)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client:

            async def ask(n):
                async with few:
                    if n % 100 == 50:
                        return (await client.post("/v1/moderate", **MALFORMED[n // 100][0])).status_code
                    return decisions(await client.post("/v1/moderate", content=PNGS[n % 8]))[0]["score"]

            return await asyncio.gather(*map(ask, range(1000)))

    found = asyncio.run(ask_all())
    assert [400 <= one < 500 for one in found[50::100]] == [True] * 10
    assert [one for n, one in enumerate(found) if n % 100 != 50] == pytest.approx(
        [expected[n % 8] for n in range(1000) if n % 100 != 50], abs=1e-4
    )
    assert app.state.service.is_alive
    app.state.service.close()


def test_bodies_that_are_too_many_or_too_slow_are_refused(guard):
    limits = Limits(read_timeout_s=0.2, max_queue_bytes=100_000, max_request_bytes=100_000)
    with client_of(guard, limits=limits) as client:
        service = client.app.state.service
        service.n_bytes = 99_000
        answer = client.post("/v1/moderate", content=bytes(2000))
        assert (answer.status_code, answer.json()["detail"]) == (
            429,
            "the bodies under way are 100000 bytes already; try again in a second",
        )
        assert service.n_bytes == 99_000

    async def ask_slowly(app):
        async def parts():
            yield PNGS[0][:10]
            await asyncio.sleep(5)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.post("/v1/moderate", content=parts())

    app = create_app(guard, limits=limits)
    answer = asyncio.run(ask_slowly(app))
    assert (answer.status_code, answer.json()["detail"]) == (408, "the body did not come within 0.2 seconds")
    assert app.state.service.n_bytes == 0


def test_settings_that_cannot_be_are_refused(guard):
    for settings, message in (
        ({"max_images": 0}, "max_images must be a whole number of at least 1, got 0"),
        ({"max_images": 300}, "max_images=300 is more than max_queue=256, so that such a request would never be taken"),
        ({"max_wait_ms": -1}, r"max_wait_ms must lie in \[0, 10000\], got -1"),
    ):
        with pytest.raises(InputError, match=message):
            Limits(**settings)
    with pytest.raises(InputError, match="the key must have at least 8 characters"):
        create_app(guard, key="short")
    with pytest.raises(InputError, match="there is no guard to serve"):
        create_app({})
    with pytest.raises(InputError, match="guard a must be a GuardClassifier, or the folder or Hub id of a saved one, got int"):
        create_app({"a": 5})


# --- what else it answers ---------------------------------------------------------------------------------------------


def test_it_says_what_it_decides(guard, saved, client):
    about = client.get("/v1/guard").json()
    assert about["limits"]["max_images"] == 64
    (one,) = about["guards"]
    assert (one["policy"]["name"], one["thresholds"], one["card"]) == (guard.policy.name, guard.thresholds.to_dict(), None)
    assert [each["name"] for each in one["categories"]] == list(guard.policy.category_names)
    with client_of(saved) as stored:
        card = stored.get("/v1/guard").json()["guards"][0]["card"]
    assert card == (saved / "README.md").read_text()


def test_figures_are_those_of_prometheus(guard):
    with client_of({'a"b\\': guard}) as client:
        client.post("/v1/moderate", files=files(PNGS[0], NO_IMAGE))
        client.get("/nothing/here")
        answer = client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = answer.text.splitlines()
    line = re.compile(r'# (HELP|TYPE) \w+ .+|\w+(\{\w+="(?:[^"\\]|\\.)*"(,\w+="(?:[^"\\]|\\.)*")*\})? [\d.e+-]+')
    assert [one for one in lines if not line.fullmatch(one)] == []
    assert r'guardkit_images_total{guard="a\"b\\",action="error"} 1' in lines
    assert 'guardkit_requests_total{path="/v1/moderate",status="200"} 1' in lines
    assert 'guardkit_requests_total{path="other",status="404"} 1' in lines
    assert "guardkit_batch_images_count 1" in lines
    assert "guardkit_queue_images 0" in lines


def test_without_the_key_only_health_is_told(guard):
    with client_of(guard, key=KEY) as client:
        for method, path in (("POST", "/v1/moderate"), ("GET", "/v1/guard"), ("POST", "/v1/reload"), ("GET", "/metrics")):
            for headers in (
                {},
                {"x-api-key": KEY + "x"},
                {"x-api-key": ""},
                {"authorization": f"Basic {KEY}"},
                {"x-api-key": "ü".encode()},
            ):
                answer = client.request(method, path, headers=headers)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), (path, headers)
        assert client.get("/healthz").status_code == 200
        for headers in ({"x-api-key": KEY}, {"authorization": f"Bearer {KEY}"}):
            assert decisions(client.post("/v1/moderate", content=PNGS[0], headers=headers))


def test_no_page_loads_anything_from_elsewhere_and_other_hosts_are_refused(guard):
    with client_of(guard, allowed_hosts=["127.0.0.1", "::1"]) as client:
        local = {"host": "127.0.0.1:8000"}
        for path in ("/docs", "/redoc", "/"):
            answer = client.get(path, headers=local)
            assert (answer.status_code, f"there is nothing at {path}; images go to POST /v1/moderate" in answer.text) == (404, True)
        answer = client.get("/v1/moderate", headers=local)
        assert (answer.status_code, answer.json()) == (405, {"detail": "/v1/moderate does not take GET; it takes POST"})
        assert "://" not in client.get("/openapi.json", headers=local).text
        assert client.get("/healthz", headers=local).headers["cache-control"] == "no-store"
        assert client.get("/healthz", headers={"host": "[::1]:8000"}).status_code == 200
        for headers in ({"host": "evil.example"}, {**local, "origin": "https://evil.example"}, {**local, "origin": "null"}):
            answer = client.post("/v1/moderate", content=PNGS[0], headers=headers)
            assert (answer.status_code, list(answer.json())) == (403, ["detail"]), headers
        assert client.get("/healthz", headers={**local, "origin": "http://127.0.0.1:8000"}).status_code == 200


def test_a_changed_folder_is_taken_up_when_told_to(guard, scenes_encoder, scenes_policy, tmp_path):
    folder = guard.save_pretrained(tmp_path / "guard")
    other = make_guard(scenes_encoder, scenes_policy, seed=1)
    before, after = guard.predict(PNGS[0])[0].score, other.predict(PNGS[0])[0].score
    with client_of(folder, key=KEY) as client:
        headers = {"x-api-key": KEY}

        def score():
            return decisions(client.post("/v1/moderate", content=PNGS[0], headers=headers))[0]["score"]

        encoder = client.app.state.service.guards["guard"].guard.encoder
        other.save_pretrained(folder)
        assert score() == pytest.approx(before, abs=1e-4)
        assert client.post("/v1/reload", headers=headers).json() == {"guards": {"guard": True}}
        assert score() == pytest.approx(after, abs=1e-4)
        assert client.post("/v1/reload", headers=headers).json() == {"guards": {"guard": False}}
        assert client.app.state.service.guards["guard"].guard.encoder is encoder
        (folder / "model.safetensors").write_bytes(b"damaged")
        answer = client.post("/v1/reload", headers=headers)
        assert (answer.status_code, "the guards stay as they are: " in answer.json()["detail"]) == (409, True)
        assert score() == pytest.approx(after, abs=1e-4)
    with client_of(guard) as client:
        assert client.post("/v1/reload").status_code == 403
    with client_of(guard, key=KEY) as client:
        assert client.post("/v1/reload", headers={"x-api-key": KEY}).status_code == 409


# --- in other people's applications -----------------------------------------------------------------------------------


def test_an_upload_is_refused_with_its_categories_and_without_a_score(guard):
    app = fastapi.FastAPI()
    taken = []
    UploadFile = fastapi.UploadFile
    strict = fastapi.Depends(refuse_unsafe(guard))
    lenient = fastapi.Depends(refuse_unsafe(guard, field="picture", refuse=["block"], limits=Limits(max_pixels=10_000)))

    def strictly(request: fastapi.Request, file: UploadFile = strict):
        taken.append((request.state.decision.action, hashlib.sha256(file.file.read()).hexdigest()))

    def leniently(picture: UploadFile = lenient):
        pass

    for path, act in (("/strict", strictly), ("/lenient", leniently)):
        act.__annotations__ = {"request": fastapi.Request} if act is strictly else {}
        app.post(path)(act)
    by_action = {one.action: (one, data) for one, data in zip(guard.predict(PNGS), PNGS, strict=True)}
    with TestClient(app) as client:
        for action, (decision, data) in by_action.items():
            answer = client.post("/strict", files={"file": data})
            assert answer.status_code == (200 if action == "allow" else 422)
            if action != "allow":
                assert answer.json()["detail"] == {"reason": "the image is not allowed here", "categories": list(decision.violated)}
            assert client.post("/lenient", files={"picture": data}).status_code == (422 if action == "block" else 200)
        assert taken == [("allow", hashlib.sha256(by_action["allow"][1]).hexdigest())]
        for path, field in (("/strict", "file"), ("/lenient", "picture")):
            answer = client.post(path, files={field: NO_IMAGE})
            assert (answer.status_code, answer.json()["detail"]["categories"]) == (422, [])
            assert client.post(path).status_code == 422
        assert client.post("/lenient", files={"picture": encoded(picture(0, (400, 300)))}).status_code == 413
    with pytest.raises(InputError, match="refuse must be one of block, review, got 'allow'"):
        refuse_unsafe(guard, refuse=["allow"])


# --- the command ------------------------------------------------------------------------------------------------------


@contextmanager
def process_of(*arguments, folder):
    """A process and its address; what it prints is in folder/said and folder/errors."""
    said = [folder / "said", folder / "errors"]
    asked = ["guardkit.serve", "port=0", *map(str, arguments)]
    process = FORKS.Process(target=in_a_process, args=(asked, None, said, folder, (), dict(os.environ)))
    process.start()
    try:
        waits_for(lambda: (said[0].exists() and said[0].read_text().endswith("\n")) or process.exitcode is not None)
        assert process.exitcode is None, said[1].read_text()
        yield process, re.fullmatch(r"serves at (http://127.0.0.1:\d+/) \(Ctrl-C ends it\)\n", said[0].read_text())[1]
    finally:
        process.kill()
        process.join()


def refused_while_sending(port):
    """The answer to a request that is refused by its headers, and whose body comes only then: it must not be lost."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        body = bytes(3_000_000)
        head = f"POST /v1/moderate HTTP/1.1\r\nhost: localhost:{port}\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode())
        time.sleep(0.5)
        connection.sendall(body)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
    return answer.decode("ascii")


def test_a_real_process_answers_reads_anew_at_a_signal_and_ends_within_seconds(guard, saved, tmp_path):
    folder = guard.save_pretrained(tmp_path / "guard")
    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    with process_of(f"guards={{one: '{folder}'}}", f"key_file={key}", folder=tmp_path) as (process, address):
        with httpx.Client(base_url=address, headers={"x-api-key": KEY}, trust_env=False, timeout=60) as client:
            waits_for(lambda: client.get("/healthz").status_code == 200)
            found = decisions(client.post("/v1/moderate", files=files(*PNGS)))
            assert [one["score"] for one in found] == pytest.approx([one.score for one in guard.predict(PNGS)], abs=1e-4)
            assert client.get("/healthz", headers={"host": "evil.example"}).status_code == 403
            assert client.post("/v1/moderate", content=PNGS[0], headers={"x-api-key": "wrong"}).status_code == 401
            assert refused_while_sending(int(address.split(":")[-1].strip("/"))).startswith("HTTP/1.1 401 ")
            changed = GuardClassifier(guard.head, guard.encoder, guard.policy, threshold=0.0)
            changed.save_pretrained(folder)
            os.kill(process.pid, signal.SIGHUP)
            waits_for(lambda: decisions(client.post("/v1/moderate", content=PNGS[0]))[0]["threshold_review"] == 0)
        started = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        process.join(timeout=30)
        assert process.exitcode == 0
        assert time.monotonic() - started < 20
        errors = (tmp_path / "errors").read_text()
        assert "read the guards again: one changed" in errors
        assert "Traceback" not in errors
        assert KEY not in errors
    assert not (tmp_path / "outputs").exists()


def test_what_cannot_be_served_is_said_in_one_line(compose, saved, tmp_path):
    done = call("guardkit.serve", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "error: give guard=DIR, or guards={name: DIR, other: DIR} for several, and one of the two\n",
    )
    for arguments, message in (
        ([f"guard={tmp_path}/none"], r"guard folder .* does not exist; "),
        ([f"guard={saved}", "max_queue=0"], r"max_queue must be a whole number of at least 1, got 0"),
        ([f"guard={saved}", "port=99999"], r"port must be a whole number from 0 to 65535, got 99999"),
        (
            [f"guard={saved}", "allowed_hosts=all"],
            r"allowed_hosts must be a list of names, as in allowed_hosts=\[images.example.org\], got 'all'",
        ),
        ([f"guard={saved}", f"key_file={tmp_path}/none"], r"key_file=.* cannot be read \(No such file or directory\); "),
    ):
        with pytest.raises(InputError, match=message):
            run(compose("serve", *arguments), announce=print)
