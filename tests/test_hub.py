"""The Hugging Face Hub: what it does not give is one line, and a try that failed leaves nothing behind."""

from __future__ import annotations

import http.server
import threading

import pytest

from guardkit import GuardClassifier, InputError
from guardkit.hub import hub_file, hub_folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache/hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch):
    """hub(status, error) -> from now on a Hub that answers everything so."""
    servers = []

    def start(status, error=""):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("X-Error-Code", error)
                self.send_header("X-Error-Message", "words of the server\twith a long explanation")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        (404, "RepoNotFound", "the Hub has no such repository, or none that you may see"),
        (401, "", "the Hub has no such repository, or none that you may see"),
        (403, "GatedRepo", "it is gated: ask for access on its page, then log in with `hf auth login` or set HF_TOKEN"),
        (404, "RevisionNotFound", "its repository has no such revision"),
        (418, "", "the Hub answers with status 418"),
    ],
)
def test_what_the_hub_refuses_is_one_line(cache, hub, status, error, reason):
    hub(status, error)
    for fetch, what in ((hub_folder, ["*.json"]), (hub_file, "config.json")):
        with pytest.raises(InputError) as caught:
            fetch("typo/name", what, refusal="no guard", remedy="give a folder")
        assert str(caught.value) == f"no guard ({reason}); give a folder"
        assert not cache.exists()


def test_what_was_in_the_cache_stays(cache, hub):
    hub(404, "RepoNotFound")
    (cache / "hub/models--org--other").mkdir(parents=True)
    (cache / "hub/models--typo--name/blobs").mkdir(parents=True)
    before = sorted(cache.rglob("*"))
    with pytest.raises(InputError, match="the Hub has no such repository"):
        hub_folder("typo/name", ["*.json"], refusal="no guard", remedy="give a folder")
    assert sorted(cache.rglob("*")) == before


def test_a_hub_that_cannot_be_reached_is_one_line(cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(InputError) as caught:
        GuardClassifier.from_pretrained("typo/name")
    assert str(caught.value) == (
        "'typo/name' is no folder here, and no guard of that name can be had from the Hub (the Hub cannot be reached, and no whole copy was "
        "fetched before); without a network give its folder"
    )
    assert not cache.exists()


def test_a_name_that_the_hub_cannot_have_is_one_line(cache):
    with pytest.raises(InputError, match=r"\(that is no id of the Hub, which is ORG/NAME\); without a network give its folder"):
        GuardClassifier.from_pretrained("my guard/of yesterday")
    assert not cache.exists()
