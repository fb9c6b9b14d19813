"""Reads checkpoints from any source. Only numbers are read, so a file cannot run code."""

import collections
import logging
import pickle
import re
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.logger import log_first_n
from fvcore.common.checkpoint import Checkpointer

from .errors import CheckpointError
from .files import sha256_of


def load_tensors(path: str, key: str) -> dict[str, torch.Tensor]:
    """A plain state dict from a .pth file, with errors that name the config key.

    Args:
        path: path of the file. It holds names and tensors, either directly or under "model" or
            "state_dict".
        key: config key that errors name, such as "MODEL.TIMM.WEIGHTS".

    Raises:
        CheckpointError: the file cannot be read, holds anything but tensors, or a tensor is not
            finite.
    """
    try:
        saved = read_pth(path)
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"{key}: {error}") from error
    for name in ("model", "state_dict"):
        if isinstance(saved, dict) and isinstance(saved.get(name), dict):
            saved = saved[name]
    if not isinstance(saved, dict) or not all(isinstance(v, torch.Tensor) for v in saved.values()):
        raise CheckpointError(
            f"{key}: {path} is not a state dict (names and tensors): save it with "
            "torch.save(model.state_dict(), path)."
        )
    bad = [name for name, v in saved.items() if not v.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{key}: {len(bad)} tensors of {path} contain NaN or infinity, such as {bad[0]}: use "
            "another checkpoint."
        )
    return saved


def _check_torch() -> None:
    """Whether torch's ``weights_only`` keeps its promise in this version."""
    # Version 2.6 closed CVE-2025-32434: a file could run code. Before 2.10 a file could corrupt
    # memory, by later reports.
    if torch.__version__ < (2, 6):
        raise CheckpointError(
            f"PyTorch {torch.__version__} cannot read .pth files safely: a file can run code. "
            "Install PyTorch 2.10 or newer (at least 2.6)."
        )
    if torch.__version__ < (2, 10):
        log_first_n(
            logging.WARNING,
            f"A damaged or hostile .pth file can corrupt the memory of PyTorch {torch.__version__}."
            " Read only files that you trust, or install PyTorch 2.10 or newer.",
            name=__name__,
        )


def read_pth(path: str) -> Any:
    """Reads a .pth file of tensors and plain containers.

    Raises:
        OSError: it cannot be read.
        CheckpointError: it is damaged, or holds more than numbers.
    """
    _check_torch()
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise anything
        asked = re.search(r"GLOBAL (\S+)", str(error))
        raise (_refusal(path, f"it asks for {asked[1]}") if asked else _damaged(path)) from error


class _TensorsOnly(Checkpointer):
    """fvcore's reader of .pth files, which DetectionCheckpointer calls as its base class."""

    def _load_file(self, f: str) -> dict[str, Any]:
        return read_pth(f)

    def _load_model(self, checkpoint: dict[str, Any]):
        # DetectionCheckpointer has already converted the names.
        if hasattr(self.model, "converted"):  # a detector that reads files of another layout
            self._convert_ndarray_to_tensor(checkpoint["model"])
            checkpoint["model"] = self.model.converted(checkpoint["model"])
        _check_kinds(self.model, checkpoint["model"], self._file)
        return super()._load_model(checkpoint)


def _check_kinds(model: torch.nn.Module, saved: dict, file: str) -> None:
    """Refuses integers and complex numbers for floating-point weights: torch would cast them."""
    wanted = model.state_dict()
    wrong = []
    for name, value in saved.items():
        if not isinstance(value, (torch.Tensor, np.ndarray)):
            continue  # refused later
        value = torch.as_tensor(value)
        tensor = wanted.get(name.removeprefix("module."))
        if tensor is not None and tensor.is_floating_point() and not value.is_floating_point():
            wrong.append(f"{name} ({str(value.dtype).removeprefix('torch.')})")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"{file} holds numbers that are not floating point for {len(wrong)} weights: "
            f"{', '.join(wrong[:5])}{more}. Save the model's weights as float32."
        )


class SafeCheckpointer(DetectionCheckpointer, _TensorsOnly):
    """DetectionCheckpointer for files of any origin.

    - .pth files: only tensors and plain containers are read (torch's ``weights_only``).
    - .pkl files, as in Detectron2's and Caffe2's model zoos: only numeric arrays and plain
      containers are read.
    - Files of Darknet (name.weights, name.conv.74): the detector itself reads them.
    - If ``sha256`` is given, the file is checked against it. A download is also checked if its name
      contains the first digits (``name-<8 or more hex digits>.pth``, the convention of torch.hub).
    """

    def __init__(self, model, save_dir: str = "", *, sha256: str = "", **kwargs):
        """
        Args:
            sha256: sha256 of the file to load, in hex digits; the first digits are enough. "" = not
                checked.
            kwargs: arguments of DetectionCheckpointer.
        """
        super().__init__(model, save_dir, **kwargs)
        self.sha256 = sha256

    def load(self, path: str, *args, **kwargs) -> dict[str, Any]:
        """
        Raises:
            CheckpointError: the file is damaged, holds more than numbers, has another sha256, or
                its numbers are not floating point where the model's are.
        """
        self._file = path
        # Eight digits that can be a date, such as 20250131, are not taken for a hash.
        named = re.search(r"-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,64})\.\w+(\?.*)?$", path or "")
        self._expected = self.sha256 or (named[1] if named and "://" in path else "")
        self._parsed_url_during_load = None  # Detectron2 leaves it set after a load that failed
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        if self._expected:
            found = sha256_of(filename)
            if not found.startswith(self._expected.lower()):
                raise CheckpointError(
                    f"{filename}: expected sha256 {self._expected}, found {found}. The file is "
                    "damaged or not the expected file: delete it and run again, or correct the "
                    "sha256."
                )
        if re.search(r"\.weights$|\.conv\.\d+$", filename):
            if not hasattr(self.model, "read_darknet"):
                raise CheckpointError(
                    f"{filename} is a file of Darknet, but the detector is a "
                    f"{type(self.model).__name__}. Only MODEL.META_ARCHITECTURE YOLO reads it."
                )
            return {"model": self.model.read_darknet(filename)}
        if filename.endswith(".pyth"):  # Detectron2 reads these with torch.load's default options
            _TensorsOnly._load_file(self, filename)
        if not filename.endswith(".pkl"):
            return super()._load_file(filename)
        with open(filename, "rb") as file:
            try:
                data = dict(_numbers(_Unpickler(file, encoding="latin1").load()))
            except CheckpointError as error:
                raise _refusal(filename, str(error)) from error
            except Exception as error:  # a damaged file can raise anything
                raise _damaged(filename) from error
        if isinstance(data.get("model"), dict):
            return data
        # Caffe2's detectors hold their arrays in "blobs", its classifiers at the top level.
        arrays = {k: v for k, v in data.get("blobs", data).items() if not k.endswith("_momentum")}
        return {"model": arrays, "__author__": "Caffe2", "matching_heuristics": True}


def _refusal(filename: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{filename} was not read: it holds more than numbers ({reason}), and reading that could "
        "run code. If you trust the file, load it in Python, save only its weights with "
        'torch.save({"model": model.state_dict()}, "weights.pth"), and give that file.'
    )


def _damaged(filename: str) -> CheckpointError:
    return CheckpointError(
        f"{filename} is damaged or not a checkpoint: download it or save it again."
    )


# NumPy's own functions are not safe with arguments from a file: numpy.ndarray can make an array of
# objects from any bytes. The unpickler calls these stand-ins, which only store the arguments.


class _DType:
    def __init__(self, name, *_):
        self.name, self.order = name, "="

    def __setstate__(self, state):
        self.order = state[1]

    def dtype(self) -> np.dtype:
        if re.fullmatch(r"[biufc]\d+", str(self.name)) is None:
            raise CheckpointError(f"an array of dtype {self.name!r}")
        return np.dtype(self.name).newbyteorder(self.order)


class _Array:
    def __init__(self, *_):
        self.state = None

    def __setstate__(self, state):
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, dtype, fortran, raw = self.state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        array = np.frombuffer(raw, dtype.dtype()).reshape(shape, order="F" if fortran else "C")
        return array.astype(array.dtype.newbyteorder("="))  # a copy: writable, in native order


def _scalar(dtype, raw):
    out = _Array()
    out.__setstate__((1, (), dtype, False, raw))
    return out


def _frombuffer(raw, dtype, shape, order):
    out = _Array()
    out.__setstate__((1, shape, dtype, order == "F", raw))
    return out


def _encode(text, encoding="latin1"):
    return text.encode("latin1")


_ADMITTED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("__builtin__", "bytes"): bytes,  # old protocols write an empty bytes object with it
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): None,  # only ever an argument of _reconstruct
}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and NumPy 2
    _ADMITTED[f"{_core}.multiarray", "_reconstruct"] = _Array
    _ADMITTED[f"{_core}.multiarray", "scalar"] = _scalar
    _ADMITTED[f"{_core}.numeric", "_frombuffer"] = _frombuffer


class _Unpickler(pickle._Unpickler):  # the Python class: in the C class, BUILD cannot be overridden
    dispatch = dict(pickle._Unpickler.dispatch)

    def load_build(self):
        """Sets the state of a _DType or an _Array only.

        pickle would set any attribute of any object, including this file's functions and classes.
        """
        if isinstance(self.stack[-2], (_DType, _Array)):
            return super().load_build()
        if not isinstance(self.stack[-2], collections.OrderedDict):
            raise CheckpointError("it sets attributes of an object")
        self.stack.pop()  # attributes of a state dict, such as _metadata, are not needed

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module, name):
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise CheckpointError(f"it asks for {module}.{name}") from None

    def persistent_load(self, pid):
        raise CheckpointError("it refers to objects outside the file")


def _numbers(x):
    """Replaces stand-ins by arrays. Accepts only plain containers, numbers and strings."""
    if isinstance(x, _Array):
        return x.array()
    if isinstance(x, dict):
        return {_numbers(k): _numbers(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(_numbers(v) for v in x)
    if x is None or isinstance(x, (bool, int, float, complex, str, bytes, set, frozenset)):
        return x
    raise CheckpointError(f"it holds a {type(x).__name__}")
