"""Training by hand as Lightning's users know it: fit, test, callbacks, checkpoints; and no thread is left behind."""

from __future__ import annotations

import shutil
import threading
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from guardkit.editors.scenes import ScenesEditor
from guardkit.fitting.module import BestHead, GuardModule, scalars
from guardkit.fitting.objective import Objective
from guardkit.heads import LinearHead, MLPHead
from guardkit.schema import InputError

ADAM = partial(torch.optim.AdamW, lr=0.01)
DIM, K = 256, 9


def scenes(compose, cache, **settings):
    """A data module of a few drawn scenes."""
    from guardkit.runs.objects import build

    overrides = [f"data.{name}={value}" for name, value in ({"n_unsafe": 12, "batch_size": 4} | settings).items()]
    return build(compose("train", "experiment=pairs_aug", "source.n_train=40", "source.n_test=9", f"cache_dir={cache}", *overrides)).data


@pytest.fixture(scope="module")
def embedded(compose, tmp_path_factory):
    """A cache with what an encoder makes of the scenes and of their edits; what the tests look at are edits and batches."""
    cache = tmp_path_factory.mktemp("embedded")
    data = scenes(compose, cache, n_unsafe=24)
    data.setup("fit")
    try:
        list(data.batches(1))
        data.test_set()
    finally:
        data.close()
    return cache / "embeddings"


@pytest.fixture
def new_data(compose, embedded, tmp_path):
    """new_data(batch_size=..., ...) -> a data module of a few drawn scenes, all with one store on disk that knows no edit yet."""
    shutil.copytree(embedded, tmp_path / "cache/embeddings")
    return partial(scenes, compose, tmp_path / "cache")


def new_module(head=None, **loss):
    torch.manual_seed(0)
    return GuardModule(head or MLPHead(DIM, K, hidden=16), ADAM, Objective(**loss))


def new_trainer(folder, *, max_epochs=6, callbacks=(), **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1}
    return L.Trainer(max_epochs=max_epochs, default_root_dir=folder, callbacks=[BestHead(), *callbacks], logger=False, **quiet, **settings)


def weights(module):
    return {name: value.clone() for name, value in module.head.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0)


def background():
    return [thread for thread in threading.enumerate() if thread.name.startswith("guardkit-data")]


def checkpoints(folder, **settings):
    return L.pytorch.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, **settings)


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def test_fit_by_hand_twice_with_the_same_objects_and_with_new_ones(new_data, tmp_path):
    data, module = new_data(), new_module()
    new_trainer(tmp_path, enable_checkpointing=False).fit(module, datamodule=data)
    first = weights(module)
    assert not background()
    requested = data.edits.requested
    new_trainer(tmp_path, enable_checkpointing=False).fit(module, datamodule=data)  # goes on from where it was
    assert not background()
    assert data.edits.requested == requested == 12
    assert any((value != first[name]).any() for name, value in weights(module).items())
    fresh = new_module()
    new_trainer(tmp_path, enable_checkpointing=False).fit(fresh, datamodule=data)
    assert_same(weights(fresh), first)
    fresh = new_module()
    new_trainer(tmp_path, enable_checkpointing=False).fit(fresh, datamodule=new_data())
    assert_same(weights(fresh), first)
    assert not background()


def test_a_failure_in_the_middle_leaves_no_thread_and_can_be_repeated(new_data, tmp_path):
    class Interrupt(L.Callback):
        def on_train_batch_end(self, *_):
            raise ValueError("stop")

    data, module = new_data(), new_module()
    with pytest.raises(ValueError, match="stop"):
        new_trainer(tmp_path, callbacks=[Interrupt()], enable_checkpointing=False).fit(module, datamodule=data)
    assert not background()
    again = new_module()
    new_trainer(tmp_path, enable_checkpointing=False).fit(again, datamodule=data)
    undisturbed = new_module()
    new_trainer(tmp_path, enable_checkpointing=False).fit(undisturbed, datamodule=new_data())
    assert_same(weights(again), weights(undisturbed))


def test_the_trainers_epoch_decides_which_batches_there_are(new_data, tmp_path):
    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((trainer.current_epoch, batch["embeddings"].clone()))

    data = new_data()
    for _ in range(2):  # the second trainer begins with epoch 0 again
        seen.clear()
        trainer = new_trainer(tmp_path, max_epochs=3, callbacks=[Watch()], enable_checkpointing=False, num_sanity_val_steps=2)
        trainer.fit(new_module(), datamodule=data)
        expected = [(epoch, batch["embeddings"]) for epoch in range(3) for batch in data.batches(1 + epoch)]
        assert [epoch for epoch, _ in seen] == [epoch for epoch, _ in expected]
        assert all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in zip(seen, expected, strict=True))


def test_training_begins_before_the_last_edit(new_data, tmp_path):
    """The thread works ahead in the order in which the first epoch takes the images."""
    begun = threading.Event()
    edited = []

    class Watch(L.Callback):
        def on_train_batch_start(self, *_):
            edited.append(data.edits.requested)
            begun.set()

    class Waiting(ScenesEditor):
        """After the edits of a first batch it waits until one has arrived."""

        def edit(self, requests):
            if data.edits.requested:
                assert begun.wait(30)
            return super().edit(requests)

    data = new_data(n_unsafe=24, batch_size=6)
    data.pipeline.editor = Waiting()
    trainer = new_trainer(tmp_path, max_epochs=1, callbacks=[Watch()], enable_checkpointing=False, num_sanity_val_steps=0)
    trainer.fit(new_module(), datamodule=data)
    assert edited[0] == 6
    assert data.edits.requested == 24


def test_the_best_head_is_the_one_that_is_left(new_data, tmp_path):
    data, module = new_data(), new_module()
    trainer = new_trainer(tmp_path, max_epochs=40, callbacks=[checkpoints(tmp_path)], check_val_every_n_epoch=2)
    trainer.fit(module, datamodule=data)
    (best,) = (one for one in trainer.callbacks if isinstance(one, BestHead))
    losses = {point["epoch"]: point["validation_loss"] for point in best.curve}
    assert best.loss == min(losses.values()) == losses[best.epoch]
    assert list(losses) == list(range(1, 40, 2))
    with torch.inference_mode():
        assert float(module.eval().loss(data.validation_batch())) == best.loss
    state = torch.load(tmp_path / f"epoch={best.epoch}.ckpt", weights_only=True)["state_dict"]
    assert_same(weights(module), {name.removeprefix("head."): value for name, value in state.items()})


def test_the_trainers_test_gives_the_figures_of_the_report(new_data, tmp_path, compose):
    from guardkit.runs.train import run

    report = run(
        compose(
            "train",
            "experiment=pairs_aug",
            "head=linear",
            "source.n_train=40",
            "source.n_test=9",
            "data.n_unsafe=12",
            "trainer.max_epochs=20",
        ),
        {},
        tmp_path / "run",
    )
    head = LinearHead(DIM, K)
    head.load_state_dict(load_file(report.folder / "guard/model.safetensors"))
    module = new_module(head)
    (figures,) = new_trainer(tmp_path, enable_checkpointing=False).test(module, datamodule=new_data(), verbose=False)
    assert module.test_figures == {name: report.metrics[name] for name in ("test", "pairs", "always_unsafe")}
    assert figures == scalars(module.test_figures)
    assert figures["test/auroc"] == report.metrics["test"]["auroc"]
    assert not background()


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("stop_after", [3, 8])
def test_a_resumed_run_is_the_undisturbed_one(new_data, tmp_path, every, stop_after):
    """Dropout, the order of batches, the best head and the patience of early stopping go on where they were."""

    def stop():
        return L.pytorch.callbacks.EarlyStopping("validation_loss", patience=3)

    def fitted(folder, *, max_epochs=40, ckpt_path=None):
        module = new_module()
        callbacks = [stop(), checkpoints(tmp_path / folder)]
        trainer = new_trainer(tmp_path, max_epochs=max_epochs, callbacks=callbacks, check_val_every_n_epoch=every)
        torch.manual_seed(99)  # the generator is elsewhere when a run is resumed
        if ckpt_path is None:
            torch.manual_seed(1)
        trainer.fit(module, datamodule=new_data(), ckpt_path=ckpt_path)
        (best,) = (one for one in trainer.callbacks if isinstance(one, BestHead))
        return weights(module), best.curve, best.epoch

    whole = fitted("whole")
    made = sorted((tmp_path / "whole").iterdir(), key=lambda path: int(path.stem.split("=")[1]))
    resumed = fitted("resumed", ckpt_path=[path for path in made if int(path.stem.split("=")[1]) <= stop_after][-1])
    assert resumed[1:] == whole[1:]
    assert_same(resumed[0], whole[0])
    after_the_end = fitted("end", ckpt_path=made[-1])
    assert after_the_end[1:] == whole[1:]
    assert_same(after_the_end[0], whole[0])


def test_train_resumes_from_the_checkpoint_of_a_shorter_run(compose, tmp_path):
    from guardkit.runs.train import run

    def start(folder, *overrides):
        cfg = compose("train", "source.n_train=40", "source.n_test=9", "data.n_unsafe=12", "head=mlp", "data.batch_size=4", *overrides)
        return run(cfg, {}, tmp_path / folder)

    whole = start("whole", "trainer.max_epochs=20")
    start("short", "trainer.max_epochs=10")
    best = tmp_path / "short/checkpoints/best.ckpt"
    assert [path.name for path in best.parent.iterdir()] == ["best.ckpt"]
    # it is the head of the guard beside it
    weights = torch.load(best, weights_only=True)["state_dict"]
    assert_same(
        {name.removeprefix("head."): value for name, value in weights.items()}, load_file(tmp_path / "short/guard/model.safetensors")
    )
    resumed = start("resumed", "trainer.max_epochs=20", f"ckpt_path={best}")
    assert_same(*(load_file(one.folder / "guard/model.safetensors") for one in (whole, resumed)))
    assert resumed.metrics["test"] == whole.metrics["test"]
    assert resumed.metrics["best_epoch"] == whole.metrics["best_epoch"]
    with pytest.raises(InputError, match=r"the checkpoint was made with other settings: data.batch_size was 4, now 5; give those again"):
        start("other", "trainer.max_epochs=20", "data.batch_size=5", f"ckpt_path={best}")
    with pytest.raises(InputError, match=r"made with other settings: head.hidden was 256, now 8; loss.pair_margin was 1.0, now 2.0"):
        start("other", "loss.pair_margin=2.0", "head.hidden=8", f"ckpt_path={best}")
    with pytest.raises(InputError, match="lies in output_dir, where this run replaces what is there"):
        start("short", f"ckpt_path={best}")
    (tmp_path / "broken.ckpt").write_bytes(best.read_bytes()[:3000])
    for name in ("broken.ckpt", "none.ckpt"):
        with pytest.raises(InputError, match=rf"ckpt_path=.*{name} cannot be resumed from .* give a file that train wrote") as caught:
            start("other", f"ckpt_path={tmp_path / name}")
        assert "\n" not in str(caught.value)


def test_a_checkpoint_from_before_a_setting_has_what_was_done_then(compose, tmp_path):
    from guardkit.runs.train import run

    def start(folder, *overrides):
        cfg = compose(
            "train", "source.n_train=40", "source.n_test=9", "data.n_unsafe=12", "head=anchored", "trainer.max_epochs=10", *overrides
        )
        return run(cfg, {}, tmp_path / folder)

    whole = start("first")
    best = tmp_path / "first/checkpoints/best.ckpt"
    checkpoint = torch.load(best, weights_only=True)
    for name in ("strength", "scale"):
        del checkpoint["guardkit"]["trained_for"]["head"][name]
    del checkpoint["GuardDataModule"]["data"]["look_alikes"]
    torch.save(checkpoint, best)
    resumed = start("resumed", f"ckpt_path={best}")
    assert_same(*(load_file(one.folder / "guard/model.safetensors") for one in (whole, resumed)))
    with pytest.raises(InputError, match=r"made with other settings: head.scale was 10.0, now 20.0; give those again"):
        start("other", "head.scale=20.0", f"ckpt_path={best}")
    # of what has no default nobody can know what it was
    del checkpoint["guardkit"]["trained_for"]["head"]["n_prompts"]
    torch.save(checkpoint, best)
    with pytest.raises(
        InputError, match=r"head.n_prompts was not noted \(another version of guardkit\), now \d+; give those again, or start anew"
    ):
        start("other", f"ckpt_path={best}")


def test_callbacks_are_chosen_by_configuration(compose, tmp_path):
    from guardkit.runs.train import run

    cfg = compose(
        "train", "source.n_train=40", "source.n_test=9", "data.n_unsafe=12", "trainer.max_epochs=20", "~callbacks.best",
        "+callbacks.average._target_=lightning.pytorch.callbacks.ModelCheckpoint", "+callbacks.average.filename='at_{epoch}'",
        "+callbacks.average.monitor=validation_loss",
    )  # fmt: skip
    report = run(cfg, {}, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [f"at_epoch={report.metrics['best_epoch']}.ckpt"]


def test_a_module_is_loaded_from_a_checkpoint(new_data, tmp_path):
    data, module = new_data(), new_module()
    trainer = new_trainer(tmp_path, max_epochs=2, callbacks=[checkpoints(tmp_path)])
    trainer.fit(module, datamodule=data)
    head, before = MLPHead(DIM, K, hidden=16), torch.get_rng_state()
    loaded = GuardModule.load_from_checkpoint(tmp_path / "epoch=1.ckpt", head=head, optimizer=ADAM)
    assert torch.equal(torch.get_rng_state(), before)
    vectors = torch.from_numpy(data.test_set().embeddings)
    state = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert_same(weights(loaded), {name.removeprefix("head."): value for name, value in state.items()})
    assert np.isfinite(loaded.head.eval()(vectors).detach().numpy()).all()
    with pytest.raises(InputError, match="head.hidden was 16, now 8"):
        GuardModule.load_from_checkpoint(tmp_path / "epoch=1.ckpt", head=MLPHead(DIM, K, hidden=8), optimizer=ADAM)


def test_a_guard_is_made_of_a_module_that_was_trained_by_hand(new_data, tmp_path):
    from guardkit import GuardClassifier

    data, module = new_data(), new_module()
    new_trainer(tmp_path, enable_checkpointing=False).fit(module, datamodule=data)
    guard = module.to_guard(data, "balanced")
    guard.save_pretrained(tmp_path / "guard")
    assert GuardClassifier.from_pretrained(tmp_path / "guard").threshold == guard.threshold == module.threshold
    assert guard.operating_points
