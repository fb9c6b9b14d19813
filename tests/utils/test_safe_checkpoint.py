"""Checkpoints from any source: their numbers are read, and code in them never runs."""

import collections
import os
import pickle
import re
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler

import numpy as np
import pytest
import torch
from conftest import tiny_cfg
from torch import nn
from torch.torch_version import TorchVersion

from fgbg_kd import build_teacher
from fgbg_kd.engine import load_config
from fgbg_kd.utils import safe_checkpoint
from fgbg_kd.utils.errors import CheckpointError, TeacherError
from fgbg_kd.utils.files import sha256_of
from fgbg_kd.utils.safe_checkpoint import SafeCheckpointer, load_tensors


class Payload:
    """Creates a folder when an unsafe reader unpickles it."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "the_payload_ran"
    yield path
    assert not path.exists()


def model():
    return nn.Sequential(collections.OrderedDict(conv=nn.Conv2d(2, 3, 1), bn=nn.BatchNorm2d(3)))


def arrays(of):
    return {k: v.numpy() for k, v in of.state_dict().items()}


def write_pickle(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol))
    return str(path)


@pytest.mark.parametrize("version", ["2.5.1", "1.13.0+cpu"])
def test_a_torch_whose_reader_can_be_bypassed_reads_no_file(version, tmp_path, monkeypatch):
    torch.save({"model": model().state_dict()}, tmp_path / "weights.pth")
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    message = f"PyTorch {re.escape(version)} cannot read .pth files safely.*2.10"
    with pytest.raises(CheckpointError, match=message):
        SafeCheckpointer(model()).load(str(tmp_path / "weights.pth"))
    with pytest.raises(CheckpointError, match=message):
        load_tensors(str(tmp_path / "weights.pth"), "MODEL.TIMM.WEIGHTS")


@pytest.mark.parametrize("version, warnings", [("2.9.1", 1), ("2.10.0", 0), ("2.14.1+cpu", 0)])
def test_a_torch_whose_memory_a_file_can_corrupt_is_warned_of_once(
    version, warnings, tmp_path, monkeypatch, caplog
):
    torch.save({"model": model().state_dict()}, tmp_path / "weights.pth")
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr("detectron2.utils.logger._LOG_COUNTER", collections.Counter())
    for _ in range(2):
        SafeCheckpointer(model()).load(str(tmp_path / "weights.pth"))
    said = [x for x in caplog.messages if "install PyTorch 2.10 or newer" in x]
    assert len(said) == warnings


def test_the_payload_runs_where_a_reader_obeys(tmp_path):
    """Otherwise the tests below would prove nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("name", ["weights.pth", "weights.pyth", "weights", "old_format.pth"])
def test_a_torch_file_cannot_run_code(tmp_path, marker, name):
    content = {"model": model().state_dict(), "model_state": {}, "note": Payload(marker)}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=name != "old_format.pth")
    with pytest.raises(CheckpointError, match=r"more than numbers .*mkdir.*torch.save"):
        SafeCheckpointer(model()).load(str(tmp_path / name))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_cannot_run_code(tmp_path, marker, protocol):
    content = {"model": arrays(model()), "__author__": "somebody", "note": Payload(marker)}
    path = write_pickle(tmp_path / "zoo.pkl", content, protocol)
    with pytest.raises(CheckpointError, match=r"more than numbers.*mkdir"):
        SafeCheckpointer(model()).load(path)


class _ObjectsFromBytes:
    def __reduce__(self):  # numpy uses the bytes as pointers
        return np.ndarray, ((1,), np.dtype("O"), b"\1" * 8)


@pytest.mark.parametrize(
    "value", [_ObjectsFromBytes(), np.array([object], dtype=object), np.zeros(1, [("a", "f4")])]
)
def test_a_pickle_brings_no_array_but_of_numbers(tmp_path, value):
    path = write_pickle(tmp_path / "zoo.pkl", {"model": {"x": value}, "__author__": "somebody"})
    with pytest.raises(CheckpointError):
        SafeCheckpointer(model()).load(path)


def test_a_yaml_config_cannot_run_code(tmp_path, marker):
    (tmp_path / "base.yaml").write_text(
        f"OUTPUT_DIR: out\nDATASETS:\n  TRAIN: !!python/object/apply:os.mkdir ['{marker}']\n"
    )
    (tmp_path / "leaf.yaml").write_text("_BASE_: base.yaml\n")
    for name in ("base.yaml", "leaf.yaml"):
        with pytest.raises(ValueError, match=r"base.yaml, line 3.*zoo's own files"):
            load_config(str(tmp_path / name))
    with pytest.raises(ValueError, match="base.yaml, line 3"):  # nor as a teacher
        build_teacher(str(tmp_path / "leaf.yaml"), "any.pth")


def test_the_zoos_own_expressions_are_read_and_a_changed_copy_is_not(tmp_path, marker):
    from detectron2 import model_zoo

    text = open(model_zoo.get_config_file("Base-RetinaNet.yaml")).read()
    assert "!!python" in text
    # The line ends of a checkout on Windows.
    (tmp_path / "Base-RetinaNet.yaml").write_bytes(text.replace("\n", "\r\n").encode())
    leaf = tmp_path / "leaf.yaml"
    leaf.write_text("_BASE_: Base-RetinaNet.yaml\nMODEL: {DEVICE: cpu}\n")
    assert load_config(str(leaf)).MODEL.ANCHOR_GENERATOR.SIZES[0][0] == 32
    changed = text.replace("[[x, x", f"__import__('os').mkdir('{marker}') or [[x, x")
    assert changed != text
    (tmp_path / "Base-RetinaNet.yaml").write_text(changed)
    with pytest.raises(ValueError, match="Base-RetinaNet.yaml, line 8"):
        load_config(str(leaf))


class _Pickle:
    """A pickle that is written opcode by opcode: a global, a state for it, and BUILD."""

    def __init__(self, module, name, state):
        body = pickle.dumps(state, 2)[2:-1]
        self.data = b"\x80\x02" + f"c{module}\n{name}\n".encode() + body + b"b."


@pytest.mark.parametrize(
    "module, name",
    [
        ("numpy.core.multiarray", "scalar"),
        ("numpy.core.numeric", "_frombuffer"),
        ("_codecs", "encode"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy", "dtype"),
        ("collections", "OrderedDict"),
    ],
)
def test_a_pickle_cannot_change_the_readers_own_functions(tmp_path, module, name):
    helper = safe_checkpoint._ADMITTED[module, name]
    before = getattr(helper, "__defaults__", None), dict(vars(helper))
    path = tmp_path / "zoo.pkl"
    path.write_bytes(_Pickle(module, name, (None, {"__defaults__": ("rot13",), "x": 1})).data)
    with pytest.raises(CheckpointError, match="it sets attributes of an object"):
        SafeCheckpointer(model()).load(str(path))
    assert before == (getattr(helper, "__defaults__", None), dict(vars(helper)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
@pytest.mark.parametrize("name", ["a.pth", "a.pkl"])
def test_weights_that_are_not_floating_point_are_refused(tmp_path, name, dtype):
    """torch would round them without a warning."""
    weights = model().state_dict()
    weights["conv.weight"] = weights["conv.weight"].to(dtype)
    if name == "a.pkl":
        write_pickle(
            tmp_path / name,
            {"model": {k: v.numpy() for k, v in weights.items()}, "__author__": "somebody"},
        )
    else:
        torch.save({"model": weights}, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name} holds .* conv.weight \({str(dtype)[6:]}\)"):
        SafeCheckpointer(model()).load(str(tmp_path / name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_other_floating_point_weights_are_read(tmp_path, dtype):
    torch.save({"model": model().to(dtype).state_dict()}, tmp_path / "a.pth")
    SafeCheckpointer(model()).load(str(tmp_path / "a.pth"))


def test_a_state_dict_alone_is_read_with_errors_that_name_the_key(tmp_path, marker):
    path = tmp_path / "timm.pth"
    source = model().state_dict()
    for content in (source, {"model": source}, {"state_dict": source}):
        torch.save(content, path)
        assert load_tensors(str(path), "MODEL.TIMM.WEIGHTS").keys() == source.keys()
    source["conv.bias"][0] = float("nan")
    for content, message in (
        (source, "1 tensors of .*timm.pth contain NaN or infinity, such as conv.bias"),
        ([1], "timm.pth is not a state dict"),
        ({"a": 1}, "timm.pth is not a state dict"),
        ({"a": Payload(marker)}, "timm.pth was not read: it holds more than numbers .*mkdir"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=f"MODEL.TIMM.WEIGHTS: .*{message}"):
            load_tensors(str(path), "MODEL.TIMM.WEIGHTS")
    path.write_text("<html>not found</html>")
    with pytest.raises(CheckpointError, match="MODEL.TIMM.WEIGHTS: .*timm.pth is damaged or not a"):
        load_tensors(str(path), "MODEL.TIMM.WEIGHTS")
    with pytest.raises(CheckpointError, match="MODEL.TIMM.WEIGHTS: .*No such file"):
        load_tensors(str(tmp_path / "nowhere.pth"), "MODEL.TIMM.WEIGHTS")


# --- what is harmless is read ---


def test_a_pickle_without_an_author_is_read(tmp_path):
    source, target = model(), model()
    state = collections.OrderedDict(arrays(source))
    state._metadata = {"version": 1}  # like PyTorch's state dicts
    SafeCheckpointer(target).load(write_pickle(tmp_path / "own.pkl", {"model": state}))
    assert all(torch.equal(target.state_dict()[k], v) for k, v in source.state_dict().items())


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_zoo_pickle_is_read_as_it_was_written(tmp_path, protocol):
    source = model()
    content = {
        "model": arrays(source),
        "__author__": "somebody",
        "iteration": np.int64(5),
        "more": [np.asfortranarray(np.arange(6.0).reshape(2, 3)), (True, None), np.zeros((0, 2))],
    }
    path = write_pickle(tmp_path / "zoo.pkl", content, protocol)
    target = model()
    rest = SafeCheckpointer(target).load(path)
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)
        assert target.state_dict()[key].dtype == value.dtype
    assert rest["iteration"] == 5
    matrix, plain, empty = rest["more"]
    assert np.array_equal(matrix, np.arange(6.0).reshape(2, 3)) and empty.shape == (0, 2)
    assert plain == (True, None)


def test_another_byte_order_is_read(tmp_path):
    source = model()
    swapped = {k: v.astype(v.dtype.newbyteorder(">")) for k, v in arrays(source).items()}
    path = write_pickle(tmp_path / "zoo.pkl", {"model": swapped, "__author__": "somebody"})
    target = model()
    SafeCheckpointer(target).load(path)
    assert all(torch.equal(target.state_dict()[k], v) for k, v in source.state_dict().items())


@pytest.mark.parametrize("blobs", [True, False])
def test_caffe2_pickles_of_python_2_are_read(tmp_path, blobs):
    """Bytes as keys, momentum beside the weights, and names matched by heuristics."""
    weight = np.random.default_rng(0).normal(size=(64, 3, 7, 7)).astype("f4")
    content = {"conv1_w": weight, "conv1_w_momentum": weight * 0}
    content = {"blobs": content, "cfg": "a: 1"} if blobs else content
    raw = pickle.dumps(content, 1)
    # As Python 2 wrote it: strings of bytes, NumPy under its old name.
    raw = raw.replace(b"numpy._core", b"numpy.core")
    for text in (b"conv1_w_momentum", b"conv1_w", b"blobs"):
        raw = raw.replace(
            b"X" + len(text).to_bytes(4, "little") + text, b"U" + bytes([len(text)]) + text
        )
    (tmp_path / "R-50.pkl").write_bytes(raw)
    target = nn.ModuleDict({"stem": nn.ModuleDict({"conv1": nn.Conv2d(3, 64, 7, bias=False)})})
    SafeCheckpointer(target).load(str(tmp_path / "R-50.pkl"))
    assert torch.equal(target["stem"]["conv1"].weight, torch.from_numpy(weight))


@pytest.mark.parametrize("size", [0, 1, 100, -1])
@pytest.mark.parametrize("name", ["a.pth", "a.pkl"])
def test_a_torn_file_is_named(tmp_path, name, size):
    path = tmp_path / name
    if name == "a.pkl":
        write_pickle(path, {"model": arrays(model()), "__author__": "somebody"})
    else:
        torch.save({"model": model().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        SafeCheckpointer(model()).load(str(path))


# --- hashes ---


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder and its address on a server of this machine."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_download_is_checked_against_the_hash_in_its_name(served):
    folder, url = served
    torch.save({"model": model().state_dict()}, folder / "a.pth")
    digest = sha256_of(folder / "a.pth")
    (folder / "a.pth").rename(folder / f"net-{digest[:8]}.pth")
    SafeCheckpointer(model()).load(f"{url}/net-{digest[:8]}.pth")

    (folder / f"net-{digest[:8]}.pth").rename(folder / "net-0123abcd.pth")
    with pytest.raises(CheckpointError, match=f"expected sha256 0123abcd, found {digest}.*delete"):
        SafeCheckpointer(model()).load(f"{url}/net-0123abcd.pth")
    (folder / "net-0123abcd.pth").rename(folder / "net-20250131.pth")  # a date
    SafeCheckpointer(model()).load(f"{url}/net-20250131.pth")


def test_a_local_files_name_is_its_owners_own(tmp_path):
    torch.save({"model": model().state_dict()}, tmp_path / "run-20260101.pth")
    SafeCheckpointer(model()).load(str(tmp_path / "run-20260101.pth"))


def test_a_teacher_is_checked_against_the_hash_that_is_given(teacher_files):
    digest = sha256_of(teacher_files[1])
    build_teacher(*teacher_files, digest.upper()[:16])
    with pytest.raises(TeacherError, match="expected sha256 abc"):
        build_teacher(*teacher_files, "abc" + digest)


def test_the_config_hands_the_hash_over(distil_cfg):
    from detectron2.modeling import build_model

    distil_cfg.MODEL.KD.TEACHER.SHA256 = "0" * 64
    with pytest.raises(TeacherError, match="expected sha256 0000"):
        build_model(distil_cfg)


# --- where it is used ---


def test_training_reads_weights_and_resumes_through_it(coco, tmp_path, marker):
    from conftest import make_trainer

    from fgbg_kd.engine import FgBgTrainer

    torch.save({"model": {}, "note": Payload(marker)}, tmp_path / "w.pth")
    cfg = tiny_cfg(coco)
    cfg.MODEL.WEIGHTS = str(tmp_path / "w.pth")
    trainer = make_trainer(FgBgTrainer, cfg, tmp_path / "run", 1)
    with pytest.raises(CheckpointError, match="more than numbers"):
        trainer.resume_or_load(resume=False)
    (tmp_path / "w.pth").rename(tmp_path / "run" / "model_0000000.pth")
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000000.pth")
    with pytest.raises(CheckpointError, match="more than numbers"):
        trainer.resume_or_load(resume=True)
