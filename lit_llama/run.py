"""What every finetuning run begins with: its flags, checked, and the model on the devices."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from lightning.fabric.wrappers import _FabricModule
from torch.distributed.device_mesh import DeviceMesh

from lit_llama.checkpoint import empty_model, load_weights
from lit_llama.cli import used_flags
from lit_llama.config import LLaMAConfig
from lit_llama.data import open_prepared, pack, share
from lit_llama.distributed import PRECISIONS, make_fabric, shard
from lit_llama.errors import UserError
from lit_llama.loggers import check_logger
from lit_llama.model import LLaMA
from lit_llama.quantize import FOR_TRAINING, quantization
from lit_llama.run_folder import check_flags, check_unused, data_sha256, locked
from lit_llama.tokenizer import Tokenizer


class Run:
    """What every finetuning run has: devices, data and a folder. Checked (UserError) before a model is loaded.

    Args:
        out_dir: where the result, metrics.csv and checkpoints go.
        checkpoint_dir: the model folder.
        data_dir: the prepared set, from scripts/prepare_*.py.
        devices: how many devices to train on, on each machine.
        num_nodes: how many machines.
        precision: bf16-mixed (frozen weights bf16, trained ones fp32), 32-true, or bf16-true (full: bf16 ones train).
        seed: of everything random: the method's start, the samples' order, dropout.
        resume: go on from the newest checkpoint in out_dir.
        quantize: nf4 (4 bits: QLoRA, least memory) or fp8 (fastest on recent GPUs) for frozen weights; one device.
        logger: tensorboard, wandb or mlflow: where metrics go beside metrics.csv.
    """

    def __init__(
        self,
        out_dir: Path,
        checkpoint_dir: Path = Path("checkpoints/meta-llama/Llama-2-7b-hf"),
        data_dir: Path = Path("data/alpaca"),
        devices: int = 1,
        num_nodes: int = 1,
        precision: str = "bf16-mixed",
        seed: int = 1337,
        resume: bool = False,
        quantize: str | None = None,
        logger: str | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            raise UserError(f"--precision {precision}: unknown. Known: {', '.join(PRECISIONS)}")
        if quantize is not None:
            quantization(quantize, FOR_TRAINING)
            if devices * num_nodes > 1:
                raise UserError(f"--quantize {quantize}: works on one device. Leave out --devices and --num_nodes")
        config = LLaMAConfig.from_checkpoint(checkpoint_dir)
        self.train_set, self.val_set, meta = open_prepared(data_dir, Tokenizer(checkpoint_dir), config)
        self.template, self.data_sha256 = meta["template"], data_sha256(meta)
        if out_dir.is_dir():
            with locked(out_dir, shared=True):  # a first look; `fit` takes the lock
                pass
        if resume and not (out_dir / "config.yaml").is_file():
            raise UserError(f"{out_dir}: no run there to resume. Start one without --resume")
        if resume:
            check_flags(out_dir, used_flags())
        # all processes look before any of them can write: that takes until they have met in make_fabric
        if not resume:
            check_unused(out_dir)
        if logger is not None:
            check_logger(logger)

        def parallelize(model: LLaMA, mesh: DeviceMesh) -> LLaMA:
            shard(model, mesh)
            load_weights(model, checkpoint_dir, self.fabric.device)
            return model

        self.fabric = make_fabric(devices, num_nodes, precision, parallelize)
        if len({self.fabric.broadcast(self.data_sha256, src=rank) for rank in range(self.fabric.world_size)}) > 1:
            raise UserError(f"{data_dir}: was prepared anew while this run began. Start it again")
        self.checkpoint_dir, self.out_dir, self.seed, self.resume = checkpoint_dir, out_dir, seed, resume
        self.quantize, self.weight_dtype, self.logger = quantize, PRECISIONS[precision], logger
        torch.manual_seed(seed)

    def pack(self, sample_ids: Iterable[int], lengths: list[int], micro_batch_tokens: int) -> list[list[int]]:
        """This process's micro-batches of those samples; all processes get equally many, some of them empty ones."""
        return share(pack(sample_ids, lengths, micro_batch_tokens), self.fabric.global_rank, self.fabric.world_size)

    def build(self, apply: Callable[[LLaMA], None]) -> _FabricModule:
        """The model with a method applied to it, its weights read into place: whole, or this process's shard of them.

        `apply` changes the model, which is frozen and has no memory yet, and makes what it adds on the CPU.
        """
        model = empty_model(self.checkpoint_dir, self.weight_dtype)
        apply(model)
        if self.fabric.world_size == 1:  # else in `parallelize`
            load_weights(model, self.checkpoint_dir, self.fabric.device, self.quantize)
        return self.fabric.setup_module(model, move_to_device=self.fabric.world_size == 1)
