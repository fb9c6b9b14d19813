"""Checkpoints of others hold numbers, never programs: reading one cannot run its code."""

import collections
import pickle
import re
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer

from .errors import CheckpointError
from .files import sha256_of


class _TensorsOnly(Checkpointer):
    """fvcore's reader of .pth, which comes after DetectionCheckpointer in the order of classes."""

    def _load_file(self, f: str) -> dict[str, Any]:
        try:
            return torch.load(f, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # a torn file can raise anything
            asked = re.search(r"GLOBAL (\S+)", str(error))
            raise (_refusal(f, f"it asks for {asked[1]}") if asked else _damaged(f)) from error


class SafeCheckpointer(DetectionCheckpointer, _TensorsOnly):
    """DetectionCheckpointer for files of any origin.

    - .pth: tensors and plain containers (torch's ``weights_only``).
    - .pkl, of Detectron2's and Caffe2's model zoos: numeric arrays and plain containers.
    - A download is checked against the sha256 that its name begins with
      (``name-<8 or more hex digits>.pth``, torch.hub's convention), any file against the one given.
    """

    def __init__(self, model, save_dir: str = "", *, sha256: str = "", **kwargs):
        """
        Args:
            sha256: hex digits, or the first of them, of the file to be loaded; "": not known.
            kwargs: DetectionCheckpointer's.
        """
        super().__init__(model, save_dir, **kwargs)
        self.sha256 = sha256

    def load(self, path: str, *args, **kwargs) -> dict[str, Any]:
        """
        Raises:
            CheckpointError: the file holds more than numbers, or is not the one that was meant.
        """
        named = re.search(r"-([0-9a-f]{8,64})\.\w+(\?.*)?$", path or "")
        self._expected = self.sha256 or (named[1] if named and "://" in path else "")
        self._parsed_url_during_load = None  # main leaves it set where a load has failed
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        if self._expected:
            found = sha256_of(filename)
            if not found.startswith(self._expected.lower()):
                raise CheckpointError(
                    f"{filename}: expected sha256 {self._expected}, found {found}. It is damaged "
                    "or another file: delete it and run again, or give the sum that is right."
                )
        if filename.endswith(".pyth"):  # Detectron2 leaves these to torch's default, unsafe once
            _TensorsOnly._load_file(self, filename)
        if not filename.endswith(".pkl"):
            return super()._load_file(filename)
        with open(filename, "rb") as file:
            try:
                data = dict(_numbers(_Unpickler(file, encoding="latin1").load()))
            except CheckpointError as error:
                raise _refusal(filename, str(error)) from error
            except Exception as error:  # a torn file can raise anything
                raise _damaged(filename) from error
        if "model" in data and "__author__" in data:
            return data
        # Caffe2's detectors hold their arrays in "blobs", its classifiers at the top.
        arrays = {k: v for k, v in data.get("blobs", data).items() if not k.endswith("_momentum")}
        return {"model": arrays, "__author__": "Caffe2", "matching_heuristics": True}


def _refusal(filename: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{filename} is not read: it holds more than numbers, and reading that could run code "
        f"({reason}). If you trust its origin, save its state dict alone, as "
        '{"model": state_dict}, and use that file.'
    )


def _damaged(filename: str) -> CheckpointError:
    return CheckpointError(f"{filename} is damaged or no checkpoint: fetch it or save it again.")


# NumPy's own functions are not safe to call with what a file says: numpy.ndarray makes an array of
# objects from any bytes. So a pickle gets these instead, which only keep what it says.


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
    ("__builtin__", "bytes"): bytes,  # how old protocols write b"", and other bytes next
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): None,  # only ever an argument of _reconstruct
}
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _ADMITTED[f"{_core}.multiarray", "_reconstruct"] = _Array
    _ADMITTED[f"{_core}.multiarray", "scalar"] = _scalar
    _ADMITTED[f"{_core}.numeric", "_frombuffer"] = _frombuffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise CheckpointError(f"it asks for {module}.{name}") from None

    def persistent_load(self, pid):
        raise CheckpointError("it refers to objects outside the file")


def _numbers(x):
    """What was read, with its arrays made: dicts, lists and tuples of arrays, numbers, strings."""
    if isinstance(x, _Array):
        return x.array()
    if isinstance(x, dict):
        return {_numbers(k): _numbers(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(_numbers(v) for v in x)
    if x is None or isinstance(x, (bool, int, float, complex, str, bytes, set, frozenset)):
        return x
    raise CheckpointError(f"it holds a {type(x).__name__}")
