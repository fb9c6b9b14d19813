"""Starting a job in one process or many: by Detectron2's own launcher, or as torchrun's worker."""

import logging
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2 import engine
from detectron2.utils import comm

logger = logging.getLogger(__name__)


def launch(main: Callable, args) -> None:
    """Runs ``main(args)`` in every process of the job.

    Under torchrun (or any starter that sets its variables) this process is one of them; otherwise
    Detectron2 starts them.

    Args:
        args: of Detectron2's ``default_argument_parser``.
    """
    if "LOCAL_RANK" in os.environ:
        _join()
        main(args)
        dist.destroy_process_group()
        return
    engine.launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def _join() -> None:
    if (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    ):
        # Restarted workers find the dead ones' addresses in the store: pytorch issue 135712.
        logger.warning(
            "Processes that torchrun restarts may wait for ever: start torchrun with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment."
        )
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=engine.DEFAULT_TIMEOUT)
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(local_size)
    else:  # v0.6, whose own launcher sets it so
        comm._LOCAL_PROCESS_GROUP, _ = dist.new_subgroups(local_size)
