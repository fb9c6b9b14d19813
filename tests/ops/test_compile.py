"""Every kernel compiles for sm_80 and sm_90 without a GPU, and spills no registers."""

import os
import re
import subprocess
import sys

import pytest

# In a process of its own: this one may have Triton's interpreter on.
SCRIPT = '''
import os, subprocess, sys, tempfile
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fgbg_kd.ops import cosine_triton, kl_triton, split_triton

STRIDES = dict.fromkeys("s_n s_c s_h s_w t_n t_c t_h t_w".split(), "i32")
INTS = dict.fromkeys("channels width num_cells".split(), "i32")


def cases():
    """name, kernel, types of its arguments, constants"""
    for scale in (False, True):
        types = {"boxes": "*fp32", "sizes": "*fp32", "levels": "*i32", "out": "*i32"}
        types |= {"num_cells": "i32", "num_boxes": "i32"}
        constants = {"LEVELS": 5, "SCALE": scale, "BLOCK": split_triton.BLOCK}
        yield f"split scale={scale}", split_triton.box_index_kernel, types, constants
    for dtype in ("fp32", "fp16", "bf16"):
        maps = {"student": f"*{dtype}", "teacher": f"*{dtype}"}
        tile = {"CELLS": cosine_triton.CELLS, "CHANNELS": cosine_triton.CHANNELS}
        types = maps | {"weight": "*fp32", "out": "*fp32"} | INTS | STRIDES
        constants = {"ACC": tl.float32, **tile}
        yield f"cosine forward {dtype}", cosine_triton.cosine_forward_kernel, types, constants
        types = maps | {"factors": "*fp32", "grad": f"*{dtype}"} | INTS | STRIDES
        types |= dict.fromkeys("g_n g_c g_h g_w".split(), "i32")
        yield f"cosine backward {dtype}", cosine_triton.cosine_backward_kernel, types, constants
        for softmax in (False, True):
            for backward in (False, True):
                out = dtype if backward else "fp32"
                types = maps | {"weight": "*fp32", "out": f"*{out}"} | INTS
                types |= {"classes": "i32"} | STRIDES
                types |= dict.fromkeys("o_n o_c o_h o_w".split(), "i32")
                for classes in (1, 128) if softmax else (kl_triton.GROUP,):
                    cells = max(1, min(64, kl_triton.TILE // classes))
                    constants = {"SOFTMAX": softmax, "BACKWARD": backward, "ACC": tl.float32}
                    constants |= {"INVERSE_T": 0.5}
                    constants |= {"CLASSES": classes, "CELLS": cells}
                    name = f"kl {dtype} softmax={softmax} backward={backward} classes={classes}"
                    yield name, kl_triton.kl_kernel, types, constants


ptxas = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "ptxas")
arch = int(sys.argv[1])
for name, kernel, types, constants in cases():
    order = kernel.arg_names
    signature = {a: "constexpr" if a in constants else types[a] for a in order}
    positions = {(order.index(a),): v for a, v in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=positions)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
    assert compiled.asm["cubin"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(compiled.asm["ptx"])
        ptx.flush()
        suffix = "a" if arch == 90 else ""
        command = [ptxas, "-v", f"-arch=sm_{arch}{suffix}", ptx.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print("KERNEL", name, "|", done.stderr.replace("\\\\n", " "))
'''


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_without_register_spills(arch):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(arch)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = done.stdout.split("KERNEL ")[1:]
    assert len(kernels) == 2 + 3 * (2 + 6)
    for kernel in kernels:
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", kernel)
        assert spills and set(spills) == {"0"}, kernel
