"""Installs Detectron2 for the Python that runs this file.

  .venv/bin/python tools/install_detectron2.py

If a working Detectron2 is installed, nothing is done. Otherwise Detectron2 is built from a pinned
commit of its GitHub repository. This takes minutes and needs a C++ compiler.

If GitHub cannot be reached, or the build fails, Detectron2 v0.6 is installed from the package
index. It has only Python files, which are patched for current versions of other packages.
RetinaNet, FCOS and COCO evaluation work with it. Functions that need compiled code (deformable
convolution, rotated boxes) raise an ImportError that says so.

Install torch and torchvision first: Detectron2 is built against them. If the installation is
interrupted, run it again.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from importlib.util import find_spec
from pathlib import Path

GITHUB = "https://github.com/facebookresearch/detectron2"
COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"  # main, June 2026; builds with torch 2.14
# A source archive with the Python files of Detectron2 v0.6. pip refuses it, because one of its
# extras is a URL. So the archive is downloaded by name, and its sha256 is checked.
SDIST = "pb1-detectron2==0.6"
SDIST_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
# The bounds are Detectron2's own, except for pycocotools: versions 2.0.9 and 2.0.10 cannot evaluate
# files without "info". Detectron2's `black`, `future` and `pydot` are not needed here.
REQUIREMENTS = [
    "Pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.2,!=2.0.9,!=2.0.10",
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7,<0.1.10",
    "omegaconf>=2.1,<2.4",
    "hydra-core>=1.1",
    "packaging",
]
THIS = "tools/install_detectron2.py"


class InstallError(Exception):
    """The message says what is wrong and how to fix it."""


def say(message):
    print(f"[detectron2] {message}", flush=True)


# ---- Is there a Detectron2, and does it work? ---------------------------------------------------

PROBE = """
import importlib.metadata, os, sysconfig
import detectron2, detectron2.model_zoo, detectron2.engine, detectron2.evaluation
detectron2.model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
folder = os.path.dirname(os.path.abspath(detectron2.__file__))
if os.path.dirname(folder) in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
    # pip writes the list of files last: without it the copying was interrupted
    try:
        complete = importlib.metadata.files("detectron2") is not None
    except importlib.metadata.PackageNotFoundError:
        complete = True  # copied there by hand
    if not complete:
        raise ImportError("half installed: pip's record of its files is missing")
print(detectron2.__version__, folder)
"""


def run(command, **kwargs):
    return subprocess.run([str(c) for c in command], **kwargs)


def probe():
    """Whether Detectron2 works.

    Returns:
        ("working", "version folder"), ("absent", ""), or ("broken", last line of the error).
    """
    with tempfile.TemporaryDirectory() as empty:  # ignores a `detectron2` folder in .
        done = run([sys.executable, "-c", PROBE], cwd=empty, capture_output=True, text=True)
    if done.returncode == 0:
        return "working", done.stdout.strip().splitlines()[-1]
    error = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if error == "ModuleNotFoundError: No module named 'detectron2'":
        return "absent", ""
    return "broken", error


def is_editable():
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        text = distribution("detectron2").read_text("direct_url.json") or "{}"
    except PackageNotFoundError:
        return False
    return json.loads(text).get("dir_info", {}).get("editable", False)


def remove_leftovers():
    """Removes the files of an interrupted pip, which cannot uninstall them without a RECORD."""
    import sysconfig

    for site in {Path(sysconfig.get_path(k)) for k in ("purelib", "platlib")}:
        infos = [*site.glob("detectron2-*.dist-info"), *site.glob("detectron2-*.egg-info")]
        half = [i for i in infos if i.suffix == ".dist-info" and not (i / "RECORD").exists()]
        if half or not infos:
            # pip renames folders to `~etectron2*` before it removes them
            for path in [*half, site / "detectron2", *site.glob("~etectron2*")]:
                if path.is_dir() and not path.is_symlink():
                    say(f"removing {path}, left by an interrupted installation")
                    shutil.rmtree(path)


# ---- The patches. An unexpected source text is an error ------------------------------------------


def substitute(text, pattern, replacement, count, where):
    """Replaces a regular expression that must occur exactly `count` times in a text."""
    text, found = re.subn(pattern, lambda match: match.expand(replacement), text)
    if found != count:
        raise InstallError(
            f"{where}: expected {pattern!r} {count} time(s), found it {found} time(s). The "
            f"patches in {THIS} were written for another version: adapt them."
        )
    return text


NUMPY_ALIAS = (r"\bnp\.(int|bool|float|str)\b", r"\1")  # removed in numpy 1.24

# setuptools 82 no longer contains pkg_resources, which v0.6 and main import.
ZOO = "detectron2/model_zoo/model_zoo.py"
ZOO_PATCHES = [
    (ZOO, r"(?m)^import pkg_resources$", "import importlib.resources", 1),
    (
        ZOO,
        r'pkg_resources\.resource_filename\(\s*("detectron2\.model_zoo"), (os\.path\.join.*)\s+\)',
        r"str(importlib.resources.files(\1) / \2)",
        1,
    ),
]
V06_PATCHES = ZOO_PATCHES + [
    ("detectron2/data/build.py", *NUMPY_ALIAS, 2),
    ("detectron2/data/datasets/pascal_voc.py", *NUMPY_ALIAS, 1),
    ("detectron2/evaluation/pascal_voc_evaluation.py", *NUMPY_ALIAS, 2),
    ("detectron2/evaluation/sem_seg_evaluation.py", *NUMPY_ALIAS, 7),
    ("detectron2/structures/masks.py", *NUMPY_ALIAS, 3),
    ("detectron2/utils/video_visualizer.py", *NUMPY_ALIAS, 1),
    ("detectron2/utils/visualizer.py", *NUMPY_ALIAS, 3),
    # removed in Pillow 10
    ("detectron2/data/transforms/transform.py", r"\bImage\.LINEAR\b", "Image.BILINEAR", 1),
    # v0.6 builds a norm with one channel to get its class. GroupNorm now refuses one channel.
    (
        "detectron2/modeling/meta_arch/retinanet.py",
        r"str\(type\(get_norm\(norm, 1\)\)\)",
        "str(type(get_norm(norm, 32)))",
        1,
    ),
    # The fast evaluation needs compiled code. pycocotools is used instead, as in main.
    (
        "detectron2/evaluation/coco_evaluation.py",
        r"(?m)^from detectron2\.evaluation\.fast_eval_api import COCOeval_opt\n",
        "",
        1,
    ),
    (
        "detectron2/evaluation/coco_evaluation.py",
        r"self\._use_fast_impl = use_fast_impl\b",
        "self._use_fast_impl = False",
        1,
    ),
    (
        "detectron2/evaluation/coco_evaluation.py",
        r"\(COCOeval_opt if use_fast_impl else COCOeval\)\(",
        "COCOeval(",
        1,
    ),
]

NO_C = '''\
"""Stands in for Detectron2's compiled code, which this installation does not have."""

_NAMES = """
    box_iou_rotated nms_rotated roi_align_rotated_forward roi_align_rotated_backward
    deform_conv_forward deform_conv_backward_input deform_conv_backward_filter
    modulated_deform_conv_forward modulated_deform_conv_backward
    COCOevalAccumulate COCOevalEvaluateImages InstanceAnnotation ImageEvaluation
""".split()


def get_compiler_version():
    return "none: installed without compiled code"


def get_cuda_version():
    return "none: installed without compiled code"


def has_cuda():
    return False


def __getattr__(name):
    if name in _NAMES:
        raise ImportError(
            f"detectron2._C.{name} does not exist: this Detectron2 0.6 was installed without its "
            "C++/CUDA code (deformable convolution, rotated boxes, fast COCO evaluation). "
            "To build it from GitHub, run: "
            "python tools/install_detectron2.py --source github --force"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
'''

# Replaces Detectron2's setup.py. It has no compiled extension, because the archive lacks its
# sources. It has no extra that pip refuses. It includes the model zoo's configs.
SETUP_PY = f'''\
from setuptools import find_packages, setup

projects = {{
    "detectron2.projects.point_rend": "projects/PointRend/point_rend",
    "detectron2.projects.deeplab": "projects/DeepLab/deeplab",
    "detectron2.projects.panoptic_deeplab": "projects/Panoptic-DeepLab/panoptic_deeplab",
}}
setup(
    name="detectron2",
    version="0.6",
    description="Detectron2 v0.6 without compiled code, patched for current packages",
    url="{GITHUB}",
    license="Apache-2.0",
    packages=find_packages(include=["detectron2", "detectron2.*"]) + list(projects),
    package_dir=projects,
    package_data={{"detectron2.model_zoo": ["configs/**/*.yaml", "configs/**/*.py"]}},
    install_requires={REQUIREMENTS!r},
)
'''


def apply_patches(root, patches):
    for name, pattern, replacement, count in patches:
        path = root / name
        if not path.is_file():
            raise InstallError(f"{name} is missing in the source under {root}: download it again.")
        text = path.read_text(encoding="utf-8")
        path.write_text(substitute(text, pattern, replacement, count, name), encoding="utf-8")


def patch_v06(root):
    apply_patches(root, V06_PATCHES)
    (root / "detectron2/_C.py").write_text(NO_C, encoding="utf-8")
    (root / "setup.py").write_text(SETUP_PY, encoding="utf-8")


def verify_sha256(path, expected):
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise InstallError(
            f"{path.name} has sha256 {found}, expected {expected}: the download is incomplete, or "
            "it is another file. Remove it and run this again."
        )


# ---- The sources --------------------------------------------------------------------------------


def pip_install(*arguments, what):
    env = {**os.environ, "PIP_ROOT_USER_ACTION": "ignore", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    env.setdefault("MAX_JOBS", str(build_jobs()))
    if run([sys.executable, "-m", "pip", "install", "-q", *arguments], env=env).returncode:
        raise InstallError(f"pip could not install {what}: see its error above.")


def build_jobs():
    """Number of compiler processes: one per core, but at least 2 GB of memory for each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**31
    except (ValueError, OSError, AttributeError):
        memory = cores
    return max(1, min(cores, memory))


def github_answers():
    command = ["git", "ls-remote", "--exit-code", GITHUB, "HEAD"]
    env = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = run(command, env=env, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        return False, "git is not installed"
    except subprocess.TimeoutExpired:
        return False, "no answer within 20 seconds"
    return done.returncode == 0, (done.stderr.strip().splitlines() or ["no answer"])[-1]


def install_from_github(work):
    src = work / "detectron2"
    say(f"fetching commit {COMMIT[:8]} of {GITHUB}")
    for command in (
        ["git", "init", "-q", src],
        ["git", "-C", src, "fetch", "-q", "--depth", "1", GITHUB, COMMIT],
        ["git", "-C", src, "checkout", "-q", "FETCH_HEAD"],
    ):
        if run(command).returncode:
            raise InstallError(f"`{' '.join(map(str, command))}` failed: see its error above.")
    apply_patches(src, ZOO_PATCHES)
    say(f"building with {os.environ.get('MAX_JOBS', build_jobs())} process(es): takes some minutes")
    pip_install("--no-build-isolation", src, what="Detectron2 from source (is there a compiler?)")


def install_from_index(work):
    say(f"fetching the source archive {SDIST} from the package index")
    # unearth is installed to a temporary folder, not to the environment
    tool = work / "unearth"
    pip_install("--target", tool, "unearth>=0.15", what="unearth, which fetches the archive")
    env = {**os.environ, "PYTHONPATH": str(tool)}
    command = [sys.executable, "-m", "unearth", "--no-binary", "--download", work, SDIST]
    done = run(command, env=env, capture_output=True, text=True)
    archives = list(work.glob("*.tar.gz"))
    if done.returncode or len(archives) != 1:
        raise InstallError(
            f"{SDIST} could not be downloaded from the index: {done.stderr.strip()[-500:]}\n"
            "Check that pip reaches its index (`pip download --no-deps six`), then run this again."
        )
    verify_sha256(archives[0], SDIST_SHA256)
    say("its sha256 is right; patching it for current numpy, Pillow and setuptools")
    with tarfile.open(archives[0]) as archive:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(work, **safe)
    src = work / archives[0].name.removesuffix(".tar.gz")
    patch_v06(src)
    say("installing its dependencies")
    pip_install(*REQUIREMENTS, what="Detectron2's dependencies")
    say("installing Detectron2")
    pip_install(
        "--no-build-isolation", "--no-deps", "--force-reinstall", src, what="Detectron2 v0.6"
    )


def check_environment():
    missing = [name for name in ("torch", "torchvision") if not find_spec(name)]
    if missing:
        raise InstallError(
            f"{sys.executable} has no {' and no '.join(missing)}. Install them first: "
            f"{sys.executable} -m pip install torch torchvision"
        )
    missing = [name for name in ("setuptools", "wheel", "ninja") if not find_spec(name)]
    if missing:
        say(f"installing the build tools {', '.join(missing)}")
        pip_install(*missing, what="the build tools")


def install(source):
    check_environment()
    if source == "auto":
        reachable, why = github_answers()
        if not reachable:
            say(f"GitHub cannot be reached ({why}): taking v0.6 from the package index")
            source = "index"
    remove_leftovers()
    with tempfile.TemporaryDirectory(prefix="detectron2-") as work:
        if source == "index":
            return install_from_index(Path(work))
        try:
            install_from_github(Path(work))
        except InstallError as error:
            if source == "github":
                raise
            say(f"{error} Taking v0.6 from the package index instead")
            remove_leftovers()
            install_from_index(Path(work))


def ensure(source="auto", force=False, check=False):
    state, detail = probe()
    if state == "working" and not force:
        return say(f"{detail}: works, left alone")
    if check:
        raise InstallError(
            "Detectron2 is not installed."
            if state == "absent"
            else f"Detectron2 does not work: {detail}"
        )
    if state == "broken" and "No module named 'pkg_resources'" in detail and not force:
        # Detectron2 itself works. An older setuptools has the module that it imports.
        say("Detectron2 needs pkg_resources, which setuptools >= 82 lacks: installing an older one")
        pip_install("setuptools<82", what="setuptools < 82")
        state, detail = probe()
        if state == "working":
            return say(f"{detail}: works now")
    if state == "broken":
        if is_editable():
            raise InstallError(
                f"an editable Detectron2 is installed and does not work: {detail}\nBuild it again "
                "in its source folder, or run `pip uninstall detectron2` and then this again."
            )
        say(f"the installed Detectron2 does not work ({detail}): replacing it")
    install(source)
    state, detail = probe()
    if state != "working":
        raise InstallError(
            f"installed, but it does not work: {detail or 'it is not found'}\n"
            f"Run `{sys.executable} -c 'import detectron2.engine'` to see the whole error."
        )
    say(f"{detail}: works")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source",
        choices=["auto", "github", "index"],
        default="auto",
        help="auto (default): GitHub, or the package index if that fails",
    )
    parser.add_argument("--force", action="store_true", help="also replace a Detectron2 that works")
    parser.add_argument("--check", action="store_true", help="only report whether Detectron2 works")
    args = parser.parse_args(argv)
    # so that `kill` also removes temporary folders
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("[detectron2] interrupted: run it again"))
    try:
        ensure(args.source, args.force, args.check)
    except InstallError as error:
        print(f"[detectron2] error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("[detectron2] interrupted: run it again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
