"""Packaging of JMT-dist; exact versions are pinned in constraints-cuda13.txt and constraints-cuda12.txt."""

import os

from setuptools import find_packages, setup

# CUDA=12 (older drivers): DALI's wheel for it, and torch 2.10, the last whose default wheels are built for CUDA 12
OLD = os.environ.get("CUDA") == "12"
CUDA = (
    ["torch>=2.10", "torchvision>=0.25", "nvidia-dali-cuda120>=2.0"]
    if OLD
    else ["torch>=2.11", "torchvision>=0.26", "nvidia-dali-cuda130>=2.0"]
)
SERVER = ["psycopg2-binary>=2.9", "Flask-WTF<2"]  # launch/serve_tracking.py: PostgreSQL, and mlflow's `auth` extra

setup(
    name="jmt-dist",
    version="0.1.0",
    description="Distributed training stack for audio-visual valence/arousal estimation with a Joint Multimodal Transformer",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["jmt_dist", "jmt_dist.*"]),
    package_data={"jmt_dist": ["py.typed"]},
    install_requires=[
        *CUDA,
        "deepspeed==0.19.8",
        "webdataset>=1.0",
        "submitit>=1.5.3",
        "numpy>=2.0",
        "scipy>=1.13",
        "scikit-learn>=1.5",
        "mlflow==3.17.2",  # 3.18.0 asks for an mlflow-skinny that was never published
        "psutil>=6",
        "nvidia-ml-py>=12",
        "pydantic>=2.9",
        "omegaconf>=2.3",
        "pyyaml>=6",
        "av>=13",
        "soundfile>=0.12",
        "Pillow>=11",
        "safetensors>=0.4",
        "pyarrow>=17",
        "onnx>=1.17",
        "rich>=13",
        "matplotlib>=3.9",
        "plotly>=6",  # brings plotly.js, which the report holds
        "ninja>=1.11",
        "setuptools",
    ],
    extras_require={
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "hypothesis>=6",
            "librosa>=0.10",
            "onnxruntime>=1.20",
            "onnxscript>=0.5",
            "playwright>=1.49",  # drives the distribution's Chromium, and downloads none
            "ruff>=0.8",
            "mypy>=1.13",
            "types-PyYAML",
            *SERVER,
        ],
        "server": SERVER,
        # what benchmarks/bench_loader.py compares with; mosaicml-streaming asks for numpy < 2.2: an environment of its own
        "bench": ["litdata==0.2.76", "mosaicml-streaming==0.13.0", "simplejpeg==1.9.0", "librosa>=0.10"],
    },
)
