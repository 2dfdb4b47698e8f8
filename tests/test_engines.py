"""Engines: the same rows and bytes whoever does the work, and nothing lost or repeated when workers or drivers end."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import uuid
from contextlib import suppress
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from commands import call
from conftest import ROOT, picture
from engine_tasks import Asking, Full, Marked, Part

import guardkit
from guardkit import GuardClassifier, InputError, LinearHead
from guardkit.counterfactual.edits import Edits
from guardkit.counterfactual.score_verifier import ScoreVerifier
from guardkit.data.sources.scenes import ScenesSource
from guardkit.editors.base import EditResult
from guardkit.editors.scenes import ScenesEditor
from guardkit.engines.local import LocalEngine
from guardkit.engines.ray import RayEngine
from guardkit.engines.slurm import SlurmEngine
from guardkit.schema import Judgment

ITEMS = [f"item {number}" for number in range(7)]


class Bound:
    """Cannot be sent anywhere."""

    name, fingerprint, threshold, covers = "bound", "c" * 64, 0.5, None

    def __getstate__(self):
        raise TypeError("it holds a camera")

    def judge(self, images):
        return [Judgment(float(image.mean()) / 255) for image in images]


@pytest.fixture(scope="module")
def started():
    """One Ray for all tests here: it takes seconds to start."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))  # workers find the tasks
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)
        yield
        ray.shutdown()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """A job that was killed leaves no result, and submitit waits for it as long as a file system of many machines may need."""
    from submitit.core.core import Job

    monkeypatch.setattr(Job, "_results_timeout_s", 0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(10):
        picture(seed).save(folder / f"{seed}.png")
    (folder / "9.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "cut.png").write_bytes((folder / "1.png").read_bytes()[:600])
    return folder


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def wait_for(happens):
    until = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize("engine", ["ray", "slurm"])
def test_an_item_whose_worker_ends_is_begun_again(started, tmp_path, engine):
    task = Marked(tmp_path, bad=(ITEMS[2],))
    made = RayEngine(workers=2) if engine == "ray" else SlurmEngine(workers=2, cluster="local", jobs_dir=tmp_path / "jobs")
    found = dict(made.run(task, ITEMS))
    assert found == {place: item.upper() for place, item in enumerate(ITEMS)}
    n_calls = {item: len(list(tmp_path.glob(f"{item}_*"))) for item in ITEMS}
    assert n_calls[ITEMS[2]] == 2
    if engine == "ray":
        assert sum(n_calls.values()) <= len(ITEMS) + 2  # what its worker was sent as well
        assert 0 < made.busy_s <= 2 * made.wall_s
    assert not list(tmp_path.glob("jobs/*"))


@pytest.mark.parametrize("engine", ["ray", "slurm"])
@pytest.mark.parametrize("mistake", [True, False])
def test_what_nobody_can_do_is_one_line(started, tmp_path, engine, mistake):
    task = Marked(tmp_path, bad=(ITEMS[1],), times=9, mistake=mistake)
    made = (
        RayEngine(workers=1, retries=1)
        if engine == "ray"
        else SlurmEngine(workers=1, retries=1, cluster="local", jobs_dir=tmp_path / "jobs")
    )
    message = {
        ("ray", True): "^the input is none; give another$",
        ("slurm", True): "^the input is none; give another$",
        ("ray", False): "ended 2 times at item [01]: .*; what was done stays",  # the answer to item 0 may be lost with it
        ("slurm", False): r"not done in 2 attempts of engine=slurm.*what was done stays",
    }[engine, mistake]
    with pytest.raises(InputError, match=message):
        list(made.run(task, ITEMS[:3]))


def test_what_cannot_be_sent_or_written_is_one_line(started, tmp_path):
    for engine in (RayEngine(workers=1), SlurmEngine(workers=1, cluster="local", jobs_dir=tmp_path)):
        with pytest.raises(InputError, match=rf"a part cannot be sent to workers of engine={engine.name} \(it holds a camera\); choose"):
            list(engine.run(partial(Bound.judge, Bound()), ITEMS[:1]))
    with pytest.raises(InputError, match=r"a worker of engine=ray failed \(.*No space left on device\); what was done stays"):
        list(RayEngine(workers=1).run(Full(), ITEMS[:1]))


def test_the_same_bytes_whoever_embeds_and_decides(started, scenes_encoder, scenes_policy, pictures, tmp_path):
    torch.manual_seed(0)
    guard = GuardClassifier(LinearHead.build(scenes_encoder, scenes_policy), scenes_encoder, scenes_policy)
    for name, engine in (("local", LocalEngine()), ("ray", RayEngine(workers=1, pools={"encoder": {}}))):
        counts = guardkit.embed(input=pictures, encoder=scenes_encoder, output_dir=tmp_path / name, shard_size=4, engine=engine)
        assert counts == {"given": 11, "written": 10, "rejected": 1}
        alone = engine if name == "local" else RayEngine(workers=1)  # all parts in one worker
        guardkit.moderate(guard, [pictures, pictures], output_dir=tmp_path / f"decided_{name}", engine=alone)
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")
    tables = [pq.read_table(tmp_path / f"decided_{name}/decisions.parquet") for name in ("local", "ray")]
    assert tables[0].equals(tables[1])
    assert tables[0]["duplicate_of"].null_count == 11 - 1 + 1  # all of the second folder, and one of the first


class Lazy(LocalEngine):
    """An engine of somebody else's that forgets the last item."""

    name = "lazy"

    def run(self, task, items):
        return super().run(task, items[:-1])


def test_an_engine_that_leaves_work_undone_is_one_line(scenes_encoder, pictures, tmp_path):
    asked = {"input": pictures, "encoder": scenes_encoder, "output_dir": tmp_path / "out", "shard_size": 4}
    with pytest.raises(
        InputError, match="engine=lazy left 1 of 3 shards undone, the first is .*; it must yield every item; what was done stays"
    ):
        guardkit.embed(**asked, engine=Lazy())
    assert guardkit.embed(**asked)["given"] == 11


class Marking:
    """The editor of drawn scenes, which refuses every third seed, marks what it is asked, and ends its process once, before its fourth batch."""

    name = "marking"
    config = {"editor": "marking"}

    def __init__(self, folder, ends=False):
        self.folder, self.ends, self.editor = Path(folder), ends, ScenesEditor()

    def edit(self, requests):
        if self.ends and len(list(self.folder.glob("*"))) >= 6:
            with suppress(FileExistsError):
                (self.folder / "ended").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        for one in requests:
            (self.folder / f"{one.content.key[-12:]}_{one.seed}_{uuid.uuid4().hex[:6]}").touch()
        made = self.editor.edit(requests)
        return [one if request.seed % 3 else EditResult(None, "refused") for request, one in zip(requests, made, strict=True)]


def synthesized(policy, encoder, folder, editor, **options):
    source = ScenesSource(policy, n_train=40, n_test=3, seed=0)
    edits = Edits(editor, verifier=ScoreVerifier.from_texts, batch_size=2, max_tries=2)
    guardkit.synthesize(
        source, policy, editor=edits, encoder=encoder, output_dir=folder, cache_dir=folder / ".cache", limit=9, shard_size=3, **options
    )
    return {name: data for name, data in files_of(folder).items() if not name.startswith(".cache")}


@pytest.fixture(scope="module")
def synthesized_here(scenes_policy, scenes_encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    (folder / "marks").mkdir()
    return synthesized(scenes_policy, scenes_encoder, folder / "d", Marking(folder / "marks")), len(list((folder / "marks").glob("*")))


def test_the_same_pairs_whoever_edits_and_no_edit_is_made_twice(started, synthesized_here, scenes_policy, scenes_encoder, tmp_path):
    """A worker is killed among it; what it had made before lies in the store."""
    whole, n_edits = synthesized_here
    assert n_edits == 18
    manifest = json.loads(whole["manifest.json"])
    assert (manifest["tries"], manifest["rejected"]["refused"]) == (18, 9)
    (tmp_path / "marks").mkdir()
    assert synthesized(scenes_policy, scenes_encoder, tmp_path / "d", Marking(tmp_path / "marks", ends=True), engine=RayEngine()) == whole
    assert (tmp_path / "marks/ended").exists()
    assert len(list((tmp_path / "marks").glob("*"))) == n_edits + 1


def test_the_same_pairs_by_pools_one_of_whose_actors_ends(started, synthesized_here, scenes_policy, scenes_encoder, tmp_path):
    whole, n_edits = synthesized_here
    (tmp_path / "marks").mkdir()
    engine = RayEngine(workers=1, cpus=0.5, pools={"editor": {"cpus": 0.5}, "encoder": {"cpus": 0.5}, "verifier": {"cpus": 0.5}})
    assert synthesized(scenes_policy, scenes_encoder, tmp_path / "d", Marking(tmp_path / "marks", ends=True), engine=engine) == whole
    assert len(list((tmp_path / "marks").glob("*"))) == n_edits + 1


@pytest.mark.parametrize(
    ("mistake", "message"),
    [(True, "^no {weights}; give some$"), (False, "an actor of engine.pools.editor could not begin, or ended 2 times at the same call")],
)
def test_what_a_pool_cannot_do_is_one_line(started, mistake, message):
    engine = RayEngine(workers=1, retries=1, pools={"editor": {}})
    with pytest.raises(InputError, match=message):
        list(engine.run(Asking(Part(mistake)), ITEMS[:2]))


class Brightness:
    """Looks at images itself: dark ones are unsafe."""

    name, fingerprint, threshold, covers = "brightness", "b" * 64, 0.5, None

    def judge(self, images):
        return [Judgment(1 - float(image.mean()) / 255) for image in images]


class Idle:
    """An engine that nobody asks."""

    name, is_here = "idle", False

    def run(self, task, items):
        raise AssertionError("it was asked")


def test_the_same_figures_whoever_embeds_and_a_stopped_evaluation_goes_on(
    started, scenes_policy, scenes_encoder, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("guardkit.evaluation.elsewhere.SHARD_IMAGES", 8)
    torch.manual_seed(0)
    guards = [GuardClassifier(LinearHead.build(scenes_encoder, scenes_policy), scenes_encoder, scenes_policy), Brightness(), Bound()]

    def evaluated(name, **options):
        source = ScenesSource(scenes_policy, n_train=3, n_test=4, seed=0)
        report = guardkit.evaluate(guards, source, scenes_policy, output_dir=tmp_path / name, n_resamples=100, **options)
        tables = {one: pq.read_table(tmp_path / name / f"{one}.parquet") for one in ("effectiveness", "predictions")}
        return tables, report.summary["passes"]

    def stops(*given, **options):
        raise KeyboardInterrupt

    here, passes = evaluated("here")
    n = passes["images"]
    with monkeypatch.context() as patch:
        patch.setattr("guardkit.api.evaluate.measure", stops)
        with pytest.raises(KeyboardInterrupt):
            evaluated("there", engine=RayEngine(workers=1, pools={"encoder": {}}))
    assert "bound cannot be sent to workers (TypeError: it holds a camera)" in caplog.text
    assert len(list((tmp_path / "there/.shards").glob("*.parquet"))) == -(-n // 8) > 1
    there, passes = evaluated("there", engine=Idle())
    assert passes["judges"] == {"brightness": {"judged": 0, "from_store": n}, "bound": {"judged": n, "from_store": 0}}
    assert there["predictions"].equals(here["predictions"])
    assert there["effectiveness"].equals(here["effectiveness"])
    assert not (tmp_path / "there/.shards").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RayEngine(workers=0), "engine.workers must be a whole number of at least 1"),
        (lambda: RayEngine(gpus=-1), "engine.gpus must be a number of at least 0"),
        (lambda: RayEngine(pools={"painter": {}}), "with the roles editor, encoder, instructor, verifier, got painter: {}"),
        (lambda: RayEngine(pools={"editor": {"workers": 0}}), "engine.pools.editor.workers must be a whole number of at least 1"),
        (
            lambda: list(RayEngine(pools={"encoder": {}}).run(Asking(None), [1])),
            "names encoder, which nothing here uses; the parts here are editor",
        ),
        (
            lambda: list(RayEngine(pools={"encoder": {}}).run(str, [1])),
            "names encoder, which nothing here uses; no part here can be in one",
        ),
        (lambda: RayEngine(pools=3), "engine.pools must be {ROLE: .*, or null, got 3"),
        (lambda: RayEngine(pools=["encoder"]), "engine.pools must be {ROLE: .*, or null, got"),
        (lambda: RayEngine(address=3), "engine.address must be HOST:PORT, auto or null, got 3"),
        (lambda: SlurmEngine(more=3), "engine.more must be {PARAMETER: VALUE}, or null, got 3"),
        (lambda: SlurmEngine(memory_gb=0), "engine.memory_gb must be a number above 0"),
        (lambda: SlurmEngine(cluster="k8s"), "engine.cluster must be one of slurm, local"),
        (lambda: list(SlurmEngine().run(str, [1])), "needs Slurm's sbatch, which is not on the PATH"),
    ],
)
def test_a_wrong_setting_is_one_line(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_processors_that_no_machine_has_are_one_line(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: pytest.fail(f"Ray was begun with {settings}"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match="asks for 1e\\+09 processors, on one machine at most 4096"):
        list(RayEngine(workers=1, cpus=1e9).run(str, [1]))


def test_ray_is_asked_for_no_more_workers_than_there_are_shards(monkeypatch):
    import ray

    asked = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: asked.update(settings) or (_ for _ in ()).throw(ConnectionError("none")))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match="cannot reach a cluster"):
        list(RayEngine(workers=10**9).run(str, [1]))
    assert asked["num_cpus"] == max(1, os.cpu_count())


def test_ray_of_its_own_is_begun_beside_others(monkeypatch):
    """A Ray that somebody started on this machine, or that was killed there, is not joined where no address is given."""
    import ray

    asked = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: asked.update(settings) or (_ for _ in ()).throw(ConnectionError("none")))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match="cannot reach a cluster"):
        list(RayEngine().run(str, [1]))
    assert asked["address"] == "local"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "nowhere.invalid:6379", "127.0.0.1:99999"])
@pytest.mark.parametrize("by_environment", [True, False])
def test_a_cluster_that_does_not_answer_is_one_line_at_once(monkeypatch, address, by_environment):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: pytest.fail("Ray was asked, which waits for minutes"))
    monkeypatch.setenv("RAY_ADDRESS", address if by_environment else "127.0.0.1:2")
    with pytest.raises(InputError, match=rf"engine=ray cannot reach a cluster at {re.escape(address)} \(.*\); start one"):
        list(RayEngine(address="auto" if by_environment else address).run(str, [1]))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the processes end after the engine
def test_jobs_of_this_machine_that_are_told_to_end_write_nothing_to_the_terminal(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    task = Marked(tmp_path, bad=(ITEMS[0],), mistake=True, slow=ITEMS[1])
    with pytest.raises(InputError, match="the input is none"):
        list(SlurmEngine(workers=2, cluster="local", jobs_dir=tmp_path / "jobs").run(task, ITEMS[:2]))
    (errors,) = tmp_path.glob("jobs/*/controllers.log")
    wait_for(lambda: "KeyboardInterrupt" in errors.read_text())
    assert "Traceback" not in capfd.readouterr().err


def test_parameters_of_submitit_can_be_given_as_documented(pictures, tmp_path):
    found = call(
        "guardkit.embed", f"input={pictures}", f"output_dir={tmp_path / 'out'}", "engine=slurm", "engine.more={slurm_account: vision}"
    )
    assert "needs Slurm's sbatch" in found.stderr
