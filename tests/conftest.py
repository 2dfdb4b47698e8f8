"""Shared fixtures: composed configurations, a cache of the session's own, drawn photographs, a tiny encoder."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker a core; read when NumPy and PyTorch are imported

import numpy as np
import pytest
from PIL import Image

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # a shell starts `pytest &` with SIGINT ignored and every process below inherits that; the tests that interrupt one need it
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


# the longest come first, so that one worker does not begin with one of them when the other has nothing left to do
LONGEST = [
    "test_cli.py", "test_engines.py", "test_sweep.py", "test_api.py", "test_training.py", "test_preflight.py", "test_lightning.py", "test_evaluate.py",
    "test_robustness.py", "test_readme.py", "test_held_out.py", "test_app.py", "test_calibrate.py", "test_encoder_loop.py", "test_export.py",
    "test_compare.py", "test_extension.py", "test_cloud.py", "test_folders.py", "test_extend.py", "test_serve.py", "test_shards.py",
]  # fmt: skip


def pytest_collection_modifyitems(items):
    """Sorts the files; within each, tests stay as they are."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keeps the tests' embeddings and edits out of the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("GUARDKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("HF_HUB_OFFLINE", "1")
    yield
    patch.undo()


@pytest.fixture(scope="module", autouse=True)
def memory_given_back():
    """What the models of one file occupied is given back to the system, which the C library would not do by itself (glibc)."""
    yield
    gc.collect()
    gc.freeze()  # what is left are imported modules and what all files share: half a second to walk, after each file
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


@pytest.fixture(scope="session")
def compose():
    """compose("train", "experiment=unpaired", ...) -> DictConfig, as the entry point would see it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    from guardkit.runs.hydra import CONF_DIR, default_cache_dir

    OmegaConf.register_new_resolver("default_cache_dir", default_cache_dir, replace=True)

    def run(name: str, *overrides: str):
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return hydra_compose(name, list(overrides))

    return run


@pytest.fixture(scope="session")
def train(compose, tmp_path_factory):
    """train("experiment=...", ...) -> Report of a small real run."""
    from guardkit.runs.train import run

    def start(*overrides: str, folder: Path | None = None):
        cfg = compose("train", "source.n_train=120", "source.n_test=27", "data.n_unsafe=24", "trainer.max_epochs=60", *overrides)
        return run(cfg, {}, folder or tmp_path_factory.mktemp("run"))

    return start


@pytest.fixture(scope="session")
def scenes_policy():
    from guardkit import Policy

    return Policy.load(ROOT / "conf/policy/scenes.yaml")


@pytest.fixture(scope="session")
def scenes_encoder():
    from guardkit.encoders.open_clip import OpenClipEncoder

    return OpenClipEncoder(None, "guardkit:scenes_clip", batch_size=16)


@pytest.fixture(scope="session")
def s3_server():
    """The address of an S3 server in this process; see `bucket`."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch, tmp_path):
    """The URL of an empty bucket of its own on a real S3 server, `s3://test-...`, which the environment leads to."""
    import boto3

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-tests-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-tests-secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    name = f"test-{next(_bucket_numbers)}"
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket=name)
    client.close()
    return f"s3://{name}"


_bucket_numbers = itertools.count(1)


def strict_json(path: Path):
    """What a JSON file holds, for a reader that knows neither NaN nor Infinity."""
    import json

    def refuse(constant):
        raise ValueError(f"{path} holds {constant}, which is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def picture(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A smooth random picture that a perceptual hash can tell from others; size is (width, height)."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def shared():
    """A folder of somebody else, for a user who may read it; a function gives up all rights until the test ends."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)

    def become_a_guest():
        for path in [*folder.rglob("*"), folder]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        if os.geteuid() == 0:
            os.seteuid(65534)

    uid = os.geteuid()
    yield folder, become_a_guest
    os.seteuid(uid)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def open_files() -> set[str]:
    """Paths of what this process has open (Linux)."""
    return {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}


def embed_records(records, encoder, folder, *, shard_size=10_000, cache_dir=None):
    """An embedding folder of records, as `embed` writes it of a source."""
    from guardkit.shards.embedding import shards_of_records, write_embedding_folder

    return write_embedding_folder(shards_of_records(list(records), shard_size), encoder, folder, cache_dir=cache_dir)
