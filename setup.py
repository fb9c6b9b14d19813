from setuptools import find_packages, setup

EXPORT = ["onnx", "onnxruntime"]
OPENVINO = ["nncf>=3.0", "openvino>=2025.0"]
# Older ones require opencv-python, which would overwrite the installed OpenCV.
FORMATS = ["supervision>=0.31"]

setup(
    name="fgbg_kd",
    version="0.2.0",
    description="Knowledge distillation for one-stage detectors in Detectron2: "
    "a large teacher guides a small student, foreground and background apart",
    author="the fgbg_kd authors",
    license="MIT",
    package_data={
        # Type checkers read the annotations of a package only if it has this file (PEP 561).
        "fgbg_kd": ["py.typed"],
        "fgbg_kd.detectors": ["networks/*"],
        "fgbg_kd.experiments": ["report.html"],
        "fgbg_kd.experiments.datasets": ["splits/*.txt"],
    },
    python_requires=">=3.10",
    packages=find_packages(include=["fgbg_kd", "fgbg_kd.*"]),
    install_requires=[
        # Detectron2 is not listed: no package index has it under its own name, and it must be built
        # with the installed torch. tools/install_detectron2.py installs it.
        # torch and torchvision have no bounds, so that pip never replaces the installed build.
        # Before 2.6, torch cannot read .pth files safely: utils/safe_checkpoint.py then refuses to
        # read them, and it warns before 2.10. Tested: torch 2.14.1.
        "torch",
        "torchvision",
        "fvcore",
        "jinja2",
        "matplotlib",
        "numpy",
        "Pillow",
        "pycocotools",
        "setuptools",
        "tabulate",
        "tqdm",
        "tensorboard>=2.21",  # older ones import pkg_resources, which setuptools 82 removed
        "timm>=1.0.9",
    ],
    extras_require={
        # OpenCV is an extra, because all OpenCV wheels install the same folder `cv2`: two installed
        # wheels break each other. Install it only if `import cv2` fails. The Makefile checks this.
        "opencv": ["opencv-python-headless"],
        # For the kinds of errors in tools/compare.py. They also need tidecv==1.0.1. Install tidecv
        # with --no-deps: it requires opencv-python, which would overwrite the installed OpenCV.
        "analysis": ["appdirs", "pandas", "seaborn"],
        # For YOLOX. It also needs pixeltable-yolox==0.4.3. Install it with --no-deps: it requires
        # opencv-python, which would overwrite the installed OpenCV.
        "yolox": ["loguru", "psutil"],
        # For ONNX files: tools/export.py and tools/predict.py.
        "export": EXPORT,
        # For OpenVINO files: the same two tools and tools/distill.py.
        "openvino": OPENVINO,
        # For PASCAL VOC and YOLO data in tools/distill.py.
        "formats": FORMATS,
        # For the config key WRITERS.
        "wandb": ["wandb"],
        "mlflow": ["mlflow-skinny"],
        # For `make docs`.
        "docs": ["furo", "myst-parser", "sphinx>=8.2"],  # sphinx.ext.apidoc needs 8.2
        "dev": ["hypothesis", "mypy", "pytest", "pytest-xdist", "ruff", *EXPORT, *FORMATS],
    },
)
