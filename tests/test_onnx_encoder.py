"""ONNX models against the torch modules that they were exported from; odd and hostile files."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle

import numpy as np
import onnx
import pytest
import torch
from conftest import picture
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tiny_models import STATED, write_onnx

from guardkit.encoders.onnx import OnnxEncoder
from guardkit.schema import InputError

IMAGES = [np.asarray(picture(seed, size)) for seed, size in enumerate([(90, 70), (64, 128), (61, 33), (32, 32)])]


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A network and its file, as torch.onnx writes it, with a dynamic batch."""
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    return write_onnx(path), path


def encoder_of(path, **options):
    stated = STATED | options.pop("stated", {})
    return OnnxEncoder(str(path), preprocess=stated, **({"output": "pooled", "device": "cpu", "batch_size": 3} | options))


def write(path, *, batch="batch", layout="nchw", bias=0.0, kind=TensorProto.FLOAT, rows=None, external=None, extra=(), inputs=1, flat=True):
    """Mean colour of every image plus `bias`, written by hand; (n, 3)."""
    size = ["h", "w"]
    shape = [batch, 3, *size] if layout == "nchw" else [batch, *size, 3]
    axes = [2, 3] if layout == "nchw" else [1, 2]
    given = [helper.make_tensor_value_info(f"pixels{i or ''}", kind, shape) for i in range(inputs)]
    weights = numpy_helper.from_array(np.array([bias] * 3, np.float32), "bias")
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["mean"], keepdims=int(not flat)),
        helper.make_node("Add", ["mean", "bias"], ["pooled"]) if flat else helper.make_node("Identity", ["mean"], ["pooled"]),
        *extra,
    ]
    known = [numpy_helper.from_array(np.array(axes, np.int64), "axes"), weights]
    if rows is not None:  # keeps the first rows only, whatever the batch
        nodes[-1].output[0] = "all"
        nodes.append(helper.make_node("Slice", ["all", "start", "end"], ["pooled"]))
        known += [numpy_helper.from_array(np.array([value], np.int64), name) for name, value in (("start", 0), ("end", rows))]
    out = [helper.make_tensor_value_info("pooled", TensorProto.FLOAT, None)]
    model = helper.make_model(helper.make_graph(nodes, "g", given, out, known), opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    if external is not None:
        (tensor,) = (one for one in model.graph.initializer if one.name == "bias")
        onnx.external_data_helper.set_external_data(tensor, external, offset=0, length=12)
        raw, tensor.raw_data = tensor.raw_data, b""
        if not os.path.isabs(external) and ".." not in external and "missing" not in external:
            (path.parent / external).write_bytes(raw)
    path.write_bytes(model.SerializeToString())
    return path


def test_vectors_are_those_of_the_exported_network(exported):
    net, path = exported
    encoder = encoder_of(path)
    with torch.inference_mode():
        expected = net(torch.stack([encoder.preprocess(image) for image in IMAGES]))[1].numpy()
    assert encoder.dim == 8
    np.testing.assert_allclose(encoder.encode_images(IMAGES, normalize=False), expected, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_images(IMAGES), expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
    assert encoder.encode_images([]).shape == (0, 8)


@pytest.mark.parametrize("batch_size", [1, 7, 16])
def test_a_vector_does_not_depend_on_its_neighbours(exported, batch_size):
    encoder = encoder_of(exported[1], batch_size=batch_size)
    images = [np.asarray(picture(seed)) for seed in range(13)]
    alone = [encoder.encode_images([image], fixed_batch=True)[0] for image in images]
    np.testing.assert_array_equal(encoder.encode_images(images, fixed_batch=True), alone)
    np.testing.assert_array_equal(encoder.encode_images(images[::-1], fixed_batch=True)[::-1], alone)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_images_are_prepared_as_open_clip_prepares_them(exported, resize_mode, interpolation):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    stated = {"resize_mode": resize_mode, "interpolation": interpolation}
    encoder = encoder_of(exported[1], stated=stated)
    transform = image_transform_v2(PreprocessCfg(**(STATED | stated | {"size": (32, 32)})), is_train=False)
    for shape in [(97, 61), (61, 97), (333, 64), (33, 50), (32, 32), (20, 25)]:
        image = np.asarray(picture(3, shape))
        torch.testing.assert_close(encoder.preprocess(image), transform(Image.fromarray(image)), atol=1e-6, rtol=0)


def test_what_is_resized_may_be_larger_than_what_is_seen(exported):
    encoder = encoder_of(exported[1], stated={"resize": 40})
    image = np.asarray(picture(3, (80, 60)))
    larger = Image.fromarray(image).resize((53, 40), Image.Resampling.BICUBIC).crop((10, 4, 42, 36))
    pixels = encoder.preprocess(image) * torch.tensor(STATED["std"]).view(3, 1, 1) + torch.tensor(STATED["mean"]).view(3, 1, 1)
    np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy() * 255, np.asarray(larger), atol=1e-3)


@pytest.mark.parametrize(("batch", "layout"), [(1, "nchw"), (4, "nchw"), ("n", "nhwc"), (1, "nhwc")])
def test_fixed_batches_and_channels_last_will_do(tmp_path, batch, layout):
    encoder = encoder_of(write(tmp_path / "m.onnx", batch=batch, layout=layout), batch_size=5)
    expected = np.stack([encoder.preprocess(image).mean(dim=(1, 2)).numpy() for image in IMAGES])
    np.testing.assert_allclose(encoder.encode_images(IMAGES, normalize=False), expected, atol=1e-6)


def test_a_map_of_one_pixel_and_half_precision_will_do(tmp_path):
    encoder = encoder_of(write(tmp_path / "m.onnx", flat=False, kind=TensorProto.FLOAT16))
    expected = np.stack([encoder.preprocess(image).mean(dim=(1, 2)).numpy() for image in IMAGES])
    np.testing.assert_allclose(encoder.encode_images(IMAGES, normalize=False), expected, atol=2e-3)


def test_everything_that_changes_a_vector_is_in_the_fingerprint(tmp_path, exported):
    path = exported[1]
    here = encoder_of(path).fingerprint
    (tmp_path / "other.onnx").write_bytes(path.read_bytes())
    assert encoder_of(tmp_path / "other.onnx").fingerprint == here
    assert OnnxEncoder(**encoder_of(path).config).fingerprint == here
    prints = {here}
    for stated in ({"size": 32, "resize": 40}, {"mean": [0.5] * 3}, {"interpolation": "bilinear"}, {"resize_mode": "squash"}):
        prints.add(encoder_of(path, stated=stated).fingerprint)
    prints |= {encoder_of(write(tmp_path / "m.onnx", bias=bias)).fingerprint for bias in (0.0, 1.0)}
    assert len(prints) == 7


def test_weights_beside_the_file_belong_to_it(tmp_path):
    path = write(tmp_path / "m.onnx", bias=2.0, external="m.onnx.data")
    first = encoder_of(path)
    expected = np.stack([first.preprocess(image).mean(dim=(1, 2)).numpy() for image in IMAGES]) + 2
    np.testing.assert_allclose(first.encode_images(IMAGES, normalize=False), expected, atol=1e-6)
    (tmp_path / "m.onnx.data").write_bytes(np.array([1, 2, 3], np.float32).tobytes())
    assert encoder_of(path).fingerprint != first.fingerprint


@pytest.mark.parametrize("place", ["../secret", "/etc/hostname", "a/../../secret", "..\\secret"])
def test_weights_elsewhere_are_never_read(tmp_path, place):
    (tmp_path / "secret").write_bytes(b"x" * 12)
    (tmp_path / "inner").mkdir()
    path = write(tmp_path / "inner" / "m.onnx", external="m.data")
    model = onnx.load(path, load_external_data=False)
    # where a reader might not look: in a node of a branch
    tensor = onnx.TensorProto()
    tensor.CopyFrom(model.graph.initializer[1])
    tensor.external_data[0].value = place
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=tensor)], "b", [], [helper.make_tensor_value_info("c", 1, [3])]
    )
    model.graph.node.append(helper.make_node("If", ["yes"], ["unused"], then_branch=branch, else_branch=branch))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="it keeps weights in .*, outside its folder, and is not read"):
        encoder_of(path).dim  # noqa: B018


def test_a_hub_id_names_a_file(tmp_path, monkeypatch, exported):
    snapshot = tmp_path / "hub/models--someone--net/snapshots/abc"
    (snapshot / "onnx").mkdir(parents=True)
    (snapshot / "onnx/net.onnx").write_bytes(exported[1].read_bytes())
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert encoder_of("hf-hub:someone/net/onnx/net.onnx").fingerprint == encoder_of(exported[1]).fingerprint
    with pytest.raises(InputError, match="must name a file of the repository, hf-hub:ORG/NAME/PATH.onnx"):
        encoder_of("hf-hub:someone/net.onnx")
    with pytest.raises(InputError, match="could not be fetched from the Hub"):
        encoder_of("hf-hub:nobody/net/net.onnx").dim  # noqa: B018


def test_a_missing_package_is_one_line(monkeypatch, exported):
    monkeypatch.setattr("guardkit.encoders.onnx.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'encoder=onnx needs ONNX and ONNX Runtime; install them with: pip install "guardkit\[onnx\]"'):
        encoder_of(exported[1])


@pytest.mark.parametrize(
    ("weights", "stated", "message"),
    [
        ("/nowhere/m.onnx", {}, "/nowhere/m.onnx does not exist; give an .onnx file or hf-hub:ORG/NAME/PATH.onnx"),
        ("/nowhere/m.pt", {}, "encoder.weights must be an .onnx file or hf-hub:ORG/NAME/PATH.onnx, got '/nowhere/m.pt'"),
        (None, {"mean": 0.5}, "preprocess.mean must be 3 numbers"),
        (None, {"resize": 16}, "preprocess.resize must be at least preprocess.size, .* got 16"),
        (None, {"resize": 40, "resize_mode": "longest"}, "with resize_mode shortest or squash, got 40 and longest"),
        (None, {"resize": "big"}, "preprocess.resize must be pixels, or height and width in pixels, got 'big'"),
        (None, {"crop": 3}, "unknown: crop"),
    ],
)
def test_wrong_settings_are_named_at_once(exported, weights, stated, message):
    with pytest.raises(InputError, match=message):
        encoder_of(weights or exported[1], stated=stated)


@pytest.mark.parametrize(
    ("written", "options", "message"),
    [
        ({}, {"output": "logits"}, "encoder.output must be one of pooled, got 'logits'"),
        ({"bias": float("nan")}, {}, "its weights give vectors that are not finite"),
        ({"rows": 1}, {}, "it was exported for a batch of 1, and says otherwise"),
        ({"rows": 0}, {}, "for one image it gives values of shape"),
        ({"inputs": 2}, {}, "it has 2 inputs .pixels, pixels1., expected one, the images"),
        ({"kind": TensorProto.UINT8}, {}, "takes tensor.uint8., expected floating-point pixels"),
        ({"external": "missing.data"}, {}, "keeps weights in 'missing.data', which is not beside it"),
    ],
)
def test_models_that_cannot_serve_are_named(tmp_path, written, options, message):
    with pytest.raises(InputError, match=message) as caught:
        encoder_of(write(tmp_path / "m.onnx", **written), **options).dim  # noqa: B018
    assert "\n" not in str(caught.value)


def test_the_exported_network_refuses_what_does_not_fit(exported, tmp_path):
    path = exported[1]
    with pytest.raises(InputError, match=r"encoder.output is needed: net.onnx has the outputs patches .*, pooled .*; name the one"):
        encoder_of(path, output=None).dim  # noqa: B018
    with pytest.raises(InputError, match=r"for one image it gives values of shape \(1, 16, 8\) instead of one vector"):
        encoder_of(path, output="patches").dim  # noqa: B018
    with pytest.raises(InputError, match="its input takes images of 32 x 32 pixels, preprocess.size says 48 x 48"):
        encoder_of(path, stated={"size": 48}).dim  # noqa: B018
    for damaged in (b"", b"no onnx", path.read_bytes()[: path.stat().st_size // 2]):
        (tmp_path / "m.onnx").write_bytes(damaged)
        with pytest.raises(InputError, match="could not be loaded .*it must be an image model in ONNX") as caught:
            encoder_of(tmp_path / "m.onnx").dim  # noqa: B018
        assert "\n" not in str(caught.value)


def test_copies_and_forked_children_encode_alike(exported):
    """A session's threads do not survive a fork: a child that asked for them would wait for ever."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        encoder = encoder_of(exported[1])
        expected = encoder.encode_images(IMAGES)
        for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
            np.testing.assert_allclose(twin.encode_images(IMAGES), expected, atol=1e-6)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            found = pool.apply_async(encoder.encode_images, (IMAGES,)).get(timeout=60)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    finally:
        torch.set_num_threads(before)


def test_a_pickled_encoder_notices_another_file(tmp_path):
    encoder = encoder_of(write(tmp_path / "m.onnx", bias=1.0))
    encoder.fingerprint  # noqa: B018
    stored = pickle.dumps(encoder)
    write(tmp_path / "m.onnx", bias=2.0)
    with pytest.raises(InputError, match="the weights of encoder m.onnx changed after it was pickled"):
        pickle.loads(stored).encode_images(IMAGES)
