"""Install the fairseq_vqem plugin: ``pip install .``"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"', (HERE / "fairseq_vqem/__init__.py").read_text("utf-8"), re.MULTILINE
).group(1)

setup(
    name="fairseq_vqem",
    version=VERSION,
    description="Non-autoregressive translation with discrete latent variables for fairseq",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11,<3.13",  # for 3.13 there is no wheel of ve-fairseq
    packages=find_packages(include=["fairseq_vqem", "fairseq_vqem.*"]),
    package_data={"fairseq_vqem.corpora": ["data/*"]},
    install_requires=[
        "torch>=2.6",  # what checkpoints may contain is named as this version wants it
        "numpy>=2",
        "ve-fairseq==0.12.3",
        "sacrebleu>=2.4",
        "sentencepiece>=0.2",
        "subword-nmt>=0.3.8",
        "pyyaml>=6",
        "tqdm>=4.60",
        "matplotlib>=3.8",
    ],
    extras_require={
        "dev": [
            *("pytest>=8", "pytest-xdist>=3", "hypothesis>=6", "scikit-learn>=1.4"),
            *("ruff", "mypy", "types-PyYAML"),
        ],
        "export": ["onnx>=1.23", "onnxruntime>=1.31"],
        "images": ["scikit-image>=0.22", "pillow>=10"],
        "bench": ["vector-quantize-pytorch>=1.20", "ctranslate2>=4"],
    },
    entry_points={"console_scripts": ["fairseq-vqem = fairseq_vqem.cli:main"]},
)
