from setuptools import find_packages, setup

EXPORT = ["onnx", "onnxruntime"]

setup(
    name="fgbg_kd",
    version="0.1.0",
    description="Knowledge distillation for one-stage detectors in Detectron2: "
    "imitate the teacher's foreground, calibrate its background",
    author="the fgbg_kd authors",
    license="MIT",
    package_data={"fgbg_kd.experiments": ["report.html"]},
    python_requires=">=3.10",
    packages=find_packages(include=["fgbg_kd", "fgbg_kd.*"]),
    install_requires=[
        # Detectron2 is not listed: no package index has it under its name, and it must be built
        # against the torch that is already there. tools/install_detectron2.py installs it.
        # torch, torchvision: no bounds, so that installing this never replaces the build you use.
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
        "tensorboard",
        "timm>=1.0.9",
    ],
    extras_require={
        # Apart from the rest: each OpenCV wheel owns the same `cv2` folder, so installing this one
        # over another breaks both. Take it only where `import cv2` fails (the Makefile looks).
        "opencv": ["opencv-python-headless"],
        # For tools/compare.py --errors, beside tidecv==1.0.1. That one is to be installed with
        # --no-deps: it asks for opencv-python, which would go over the OpenCV that is there.
        "analysis": ["appdirs", "pandas", "seaborn"],
        # What tools/export.py writes and runs ONNX with.
        "export": EXPORT,
        "dev": ["hypothesis", "pytest", "pytest-xdist", "ruff", *EXPORT],
    },
)
