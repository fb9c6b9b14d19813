from setuptools import find_packages, setup

EXPORT = ["onnx", "onnxruntime"]

setup(
    name="fgbg_kd",
    version="0.2.0",
    description="Knowledge distillation for one-stage detectors in Detectron2: "
    "a large teacher guides a small student, foreground and background apart",
    author="the fgbg_kd authors",
    license="MIT",
    package_data={
        # Type checkers read the annotations of a package only where it has this file (PEP 561).
        "fgbg_kd": ["py.typed"],
        "fgbg_kd.experiments": ["report.html"],
    },
    python_requires=">=3.10",
    packages=find_packages(include=["fgbg_kd", "fgbg_kd.*"]),
    install_requires=[
        # Detectron2 is not listed: no package index has it under its name, and it must be built
        # against the torch that is already there. tools/install_detectron2.py installs it.
        # torch and torchvision have no bounds, so that this package never replaces your build.
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
        "tensorboard>=2.21",  # older ones import pkg_resources, which setuptools 82 removed
        "timm>=1.0.9",
    ],
    extras_require={
        # An extra of its own: every OpenCV wheel owns the same `cv2` folder, so installing this one
        # over another breaks both. Install it only where `import cv2` fails. The Makefile checks.
        "opencv": ["opencv-python-headless"],
        # For the kinds of errors in tools/compare.py, beside tidecv==1.0.1. Install that one with
        # --no-deps: it requires opencv-python, which would overwrite the OpenCV that is there.
        "analysis": ["appdirs", "pandas", "seaborn"],
        # For ONNX files: tools/export.py and tools/predict.py.
        "export": EXPORT,
        # For `make docs`.
        "docs": ["furo", "myst-parser", "sphinx>=8.2"],  # 8.2 is the first with sphinx.ext.apidoc
        "dev": ["hypothesis", "mypy", "pytest", "pytest-xdist", "ruff", *EXPORT],
    },
)
