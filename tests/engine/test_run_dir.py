"""One run in a folder, and a full disk."""

import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

from fgbg_kd.engine import lock_output_dir
from fgbg_kd.engine.checkpointer import RunCheckpointer
from fgbg_kd.utils.errors import OutputDirError

# The package's __init__ files are not run: they would import Detectron2, which takes seconds. The
# child outlives its parent, as a data loading process may.
HOLDER = f"""
import os, sys, time, types
for name in ("fgbg_kd", "fgbg_kd.utils", "fgbg_kd.engine"):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [{str(ROOT)!r} + "/" + name.replace(".", "/")]
from fgbg_kd.engine.run_dir import lock_output_dir
lock_output_dir(sys.argv[1])
if os.fork() == 0:
    time.sleep(20)
    os._exit(0)
print("locked", flush=True)
time.sleep(20)
"""


def test_a_second_run_is_refused_and_a_killed_one_leaves_the_folder_free(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(
            OutputDirError, match=rf"in use by another run \(process {holder.pid} on"
        ):
            lock_output_dir(str(folder))
        holder.kill()
        holder.wait()
        lock_output_dir(str(folder))
        lock_output_dir(str(folder))  # its own
        assert f"process {os.getpid()} on" in (folder / ".lock").read_text()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputDirError, match="file/run cannot be written .*choose another"):
        lock_output_dir(str(tmp_path / "file" / "run"))
    if os.getuid() == 0:
        return  # may write everywhere
    (tmp_path / "read_only").mkdir(mode=0o500)
    with pytest.raises(OutputDirError, match="cannot be written"):
        lock_output_dir(str(tmp_path / "read_only" / "run"))


def test_a_disk_that_is_full_while_saving_leaves_the_checkpoint_before_it(tmp_path):
    """A limit on the size of files stands for the disk: the write fails in the middle."""
    model = nn.Linear(1000, 1000)  # 4 MB
    checkpointer = RunCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")
    whole = {k: v.clone() for k, v in model.state_dict().items()}
    nn.init.zeros_(model.weight)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1]))
    try:
        with pytest.raises(
            OSError, match="model_0000003.pth could not be written .*too large.*--resume"
        ):
            checkpointer.save("model_0000003")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]
    RunCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)
    assert all(torch.equal(v, whole[k]) for k, v in model.state_dict().items())
