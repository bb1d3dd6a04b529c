import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
INIT = (ROOT / "lit_llama" / "__init__.py").read_text("utf-8")
VERSION = re.search(r'__version__ = "(.+)"', INIT)[1]
HUB = ["huggingface_hub>=1.20"]
GGUF = ["gguf>=0.17", "protobuf>=4.21.1"]
EVAL = ["lm-eval>=0.4.10"]
PARQUET = ["pyarrow>=18"]
TENSORBOARD, WANDB, MLFLOW = ["tensorboard>=2.16.2"], ["wandb>=0.25"], ["mlflow-skinny>=3.5"]

setup(
    name="lit-llama",
    version=VERSION,
    description="A readable LLaMA and the methods to finetune it on the GPU you have",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    python_requires=">=3.10",
    packages=["lit_llama", "lit_llama.fast", "lit_llama.storage", "lit_llama.runtime"],
    install_requires=[
        "torch>=2.11",
        "lightning>=2.5,!=2.6.2,!=2.6.3",
        "jsonargparse[signatures]>=4.51",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tokenizers>=0.22.1",
        "jinja2>=3.1.6",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pyyaml>=6.0.1",
        "torchmetrics>=1.4",
        "tqdm>=4.66",
    ],
    extras_require={
        "hub": HUB,
        "gguf": GGUF,
        "quickstart": GGUF,
        "eval": EVAL,
        "parquet": PARQUET,
        "tensorboard": TENSORBOARD,
        "wandb": WANDB,
        "mlflow": MLFLOW,
        "benchmarks": [*GGUF, "peft>=0.19", "transformers>=5.12"],
        "test": [
            *HUB,
            *GGUF,
            *EVAL,
            *PARQUET,
            *TENSORBOARD,
            *WANDB,
            *MLFLOW,
            "bitsandbytes>=0.48",
            "build>=1.2.1",
            "peft>=0.19",
            "pytest>=8",
            "pytest-cov>=6",
            "pytest-random-order>=1.1.1",
            "pytest-xdist>=3.6.1",
            "rouge-score>=0.1.2",
            "ruff>=0.9",
            "sacrebleu>=2.4",
            "setuptools>=77.0.3",
            "transformers>=5.12",
        ],
    },
)
