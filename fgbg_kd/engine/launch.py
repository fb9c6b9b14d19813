"""Starts a job in one or several processes, with Detectron2's launcher or under torchrun."""

import logging
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2 import engine
from detectron2.utils import comm

from ..utils.errors import ConfigError
from .loader import allow_many_open_files

logger = logging.getLogger(__name__)


def launch(main: Callable, args) -> None:
    """Runs ``main(args)`` in every process of the job.

    If the environment variable LOCAL_RANK is set, torchrun or a similar program has already
    started the job's processes. Otherwise Detectron2's launcher starts the processes.

    Args:
        main: a function of ``args``.
        args: the parsed arguments of Detectron2's ``default_argument_parser``.

    Raises:
        ConfigError: ``--num-gpus`` is larger than the number of GPUs in the machine.

    Example::

        launch(main, default_argument_parser().parse_args())
    """
    allow_many_open_files()
    if "LOCAL_RANK" in os.environ:
        _join()
        main(args)
        dist.destroy_process_group()
        return
    check_gpus(args.num_gpus)
    engine.launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def check_gpus(number: int) -> None:
    """
    Raises:
        ConfigError: ``--num-gpus`` is larger than the number of GPUs in the machine.
    """
    available = torch.cuda.device_count()
    if number > max(available, 1):
        cpu = "" if available else ", or start several processes on CPUs with torchrun"
        raise ConfigError(
            f"--num-gpus is {number}, but PyTorch finds {available} CUDA devices here: give "
            f"--num-gpus {max(available, 1)}{cpu}."
        )


def _join() -> None:
    if (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    ):
        # Restarted processes read addresses of dead ones from the store (pytorch issue 135712).
        logger.warning(
            "Processes that torchrun restarts may hang: set the environment variable "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 when you start torchrun."
        )
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=engine.DEFAULT_TIMEOUT)
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(local_size)
    else:  # Detectron2 v0.6 has no such function; its launcher sets this variable
        comm._LOCAL_PROCESS_GROUP, _ = dist.new_subgroups(local_size)
