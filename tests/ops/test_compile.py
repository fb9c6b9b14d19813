"""Every kernel compiles for sm_80 and sm_90 without a GPU, and spills almost no registers."""

import os
import re
import subprocess
import sys

import pytest

# Runs in a separate process, because this process may use Triton's interpreter.
SCRIPT = '''
import itertools, os, subprocess, sys, tempfile
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fgbg_kd.ops import features_triton, predictions_triton, split_triton, standardise_triton

def ints(names):
    return dict.fromkeys(names.split(), "i32")


STRIDES = ints("s_n s_c s_p t_n t_c t_p")
INTS = ints("channels num_cells first all_cells")


def cases():
    """name, kernel, types of its arguments, constants"""
    for scale in (False, True):
        types = {"boxes": "*fp32", "sizes": "*fp32", "levels": "*i32", "out": "*i32"}
        types |= {"num_cells": "i32", "num_boxes": "i32"}
        constants = {"LEVELS": 5, "SCALE": scale, "BLOCK": split_triton.BLOCK}
        yield f"split scale={scale}", split_triton.box_index_kernel, types, constants
    for dtype in ("fp32", "bf16", "fp64"):
        acc = "fp64" if dtype == "fp64" else "fp32"
        maps = {"student": f"*{dtype}", "teacher": f"*{dtype}"}
        tile = {"CELLS": standardise_triton.CELLS, "CHANNELS": standardise_triton.CHANNELS}
        types = {"features": f"*{dtype}", "marks": "*i8", "out": f"*{acc}"} | INTS
        types |= ints("x_n x_c x_p")
        constants = {"ACC": getattr(tl, acc.replace("fp", "float")), **tile}
        yield f"moments {dtype}", standardise_triton.moments_kernel, types, constants
        tile = {"CELLS": features_triton.CELLS, "CHANNELS": features_triton.CHANNELS}
        constants = {"ACC": getattr(tl, acc.replace("fp", "float")), **tile}
        types = maps | dict.fromkeys("out factors s_stats t_stats means".split(), f"*{acc}")
        types |= {"marks": "*i8", "grad": f"*{dtype}"} | INTS | STRIDES | ints("g_n g_c g_p")
        for name in ("products", "channel_sums", "products_grad"):
            kernel = getattr(features_triton, f"{name}_kernel")
            yield f"{name} {dtype}", kernel, types, constants
    # Classes of a softmax, None: sigmoid; then (KL, qualities) of the comparison. Pairwise.
    passes = [
        ("fp32", None, [(1, 1), (1, 0), (0, 1)]),
        ("bf16", None, [(1, 1), (0, 1)]),
        ("fp32", 80, [(1, 1), (1, 0)]),
        ("bf16", 1, [(1, 1)]),
    ]
    for dtype, classes, variants in passes:
        maps = {"student": f"*{dtype}", "teacher": f"*{dtype}"}
        group, block, cells = predictions_triton._tile(classes or 80, classes is not None)
        tile = {"CLASSES": block, "CELLS": cells, "ACC": tl.float32}
        kind = {"SOFTMAX": classes is not None, "INVERSE_T": 0.5}
        types = maps | {"weight": "*fp32", "grad": f"*{dtype}"} | INTS | STRIDES
        types |= ints("group g_n g_c g_p")
        name = f"kl backward {dtype} softmax of {classes}"
        yield name, predictions_triton.kl_backward_kernel, types, tile | kind
        types = maps | {"box_index": "*i32", "box_classes": "*i64", "out": "*fp32"}
        types |= STRIDES | ints("s_channels t_channels classes group num_cells first")
        types |= ints("all_cells num_boxes")
        for kl, quality in variants:
            constants = tile | kind | {"KL": bool(kl), "QUALITY": bool(quality)}
            name = f"compare {dtype} softmax of {classes}, {constants}"
            yield name, predictions_triton.compare_kernel, types, constants


ptxas = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "ptxas")
archs = map(int, sys.argv[1:])
for arch, (name, kernel, types, constants) in itertools.product(archs, cases()):
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
    print("KERNEL", arch, name, "|", done.stderr.replace("\\\\n", " "))
'''


@pytest.mark.slow
def test_kernels_compile_with_next_to_no_register_spills():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, "80", "90"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = done.stdout.split("KERNEL ")[1:]
    assert len(kernels) == 2 * (2 + 4 * 3 + 4 + 8)
    for kernel in kernels:
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", kernel)
        # Triton 3.8 spills none. With 3.6, ptxas spills some bytes on sm_80 to fit a fourth block.
        assert spills and max(map(int, spills)) <= 32, kernel
