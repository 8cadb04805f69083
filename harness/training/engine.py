"""DeepSpeed: the engine of a stage, for any device, ZeRO stage and number of ranks.

The only room that imports deepspeed.
"""

import argparse
import contextlib
import logging
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from harness.errors import Problem, UserError
from harness.machine import device as devices
from harness.machine import ranks
from harness.models.base import Captioner
from harness.store import write_json
from harness.training.settings import TrainConfig

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def place(model: Captioner, config: TrainConfig, kind: devices.Kind) -> None:
    """Put a model on its device, weights that are never trained in the precision that it computes in."""
    model.compute_in(precision(config, kind), config.vision_precision == "fp32")
    if kind == "cpu":  # torch's fused attention is slower there than plain products, backwards above all
        model.use_plain_attention()
    model.to(devices.torch_device(kind))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def precision(config: TrainConfig, kind: devices.Kind) -> torch.dtype | None:
    """The autocast dtype: as asked for; `auto` is bf16 where the device has it. None is fp32."""
    if config.precision == "auto":
        return torch.bfloat16 if devices.has_bf16(kind) else None
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[config.precision]


def frozen_dtype(config: TrainConfig, kind: devices.Kind) -> torch.dtype:
    """What weights that are never trained are kept in: the precision that they compute in."""
    return precision(config, kind) or torch.float32


def engine(
    model: Captioner, config: TrainConfig, kind: devices.Kind, directory: Path, universal: bool = False
) -> Any:
    """The engine that trains what `model` has not frozen; its config is left in `directory`.

    `universal` is for loading a checkpoint in DeepSpeed's universal format.
    """
    deepspeed = _import_deepspeed(kind)
    optimizer = torch.optim.AdamW(
        model.parameter_groups(config.weight_decay),
        lr=config.learning_rate,
        betas=config.betas,
        fused=kind == "cpu",
    )
    settings = _merged(_settings(config), config.deepspeed)
    if ranks.rank() == 0:
        write_json(directory / "ds_config.json", settings)
    if universal:
        settings = _merged(settings, {"checkpoint": {"load_universal": True}})
    made = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    if config.precision == "fp16":
        _scale_losses(made.optimizer)
    if not config.zero_stage and ranks.world_size() == 1:  # it would copy all gradients, for nobody
        made.enable_backward_allreduce = False
    return made


def _scale_losses(optimizer: Any) -> None:
    """Give a ZeRO optimiser of fp32 weights the dynamic loss scale that DeepSpeed has for fp16 ones.

    A step whose gradients overflow is left out on all ranks and halves the scale; its state is part of
    checkpoints. (DeepSpeed's `torch_autocast` clips gradients before it unscales them.)
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    optimizer.loss_scaler = DynamicLossScaler(
        init_scale=2**16,
        scale_window=1000,
        min_scale=1,
        delayed_shift=1,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=False,
    )
    optimizer.dynamic_loss_scale = optimizer.check_grad_overflow = True


def release(trainer: Any) -> None:
    """Let go of an engine, with its optimiser, once the caller has dropped its names for it and collected.

    `destroy` of DeepSpeed 0.19.8 leaves hooks on the model that keep the engine, and at stage 3 two lists of
    its own module that keep the model: the next stage would stand on the device beside what this one left.
    Stage 3 also leaves its own `linear` in torch, for all that this process computes from then on.
    """
    from deepspeed.runtime.zero import parameter_offload, partition_parameters, partitioned_param_coordinator

    trainer.module_forward_pre_hook.remove()
    trainer.module_forward_post_hook.remove()
    trainer.destroy()
    parameter_offload.FWD_MODULE_STACK.clear()
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    kept_by = coordinator._PartitionedParameterCoordinator__params_to_release
    for cell in kept_by.__closure__:  # the function within DeepSpeed's profiling
        cell.cell_contents.cache_clear()
    patches = partition_parameters.InsertPostInitMethodToModuleSubClasses
    torch.nn.functional.linear = getattr(patches, "linear_bk", torch.nn.functional.linear)


def to_universal(source: Path, target: Path) -> None:
    """Rewrite a checkpoint that each rank wrote its part of so that any number of ranks can load it."""
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(target, ignore_errors=True)
    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        weights_only(),
    ):
        ds_to_universal.main(options)


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Torch takes no class from a checkpoint but DeepSpeed's, which itself would run whatever is in there.

    Raises `UserError` where a checkpoint holds anything else.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(
            [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
        ):
            yield
    except pickle.UnpicklingError as error:
        what = f"a checkpoint of this training holds more than weights: {str(error).splitlines()[0]}"
        hint = "Delete the folder train-... of this run in runs/steps, and the training begins anew."
        raise UserError([Problem(what, hint=hint)], exit_code=1) from None
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def resume(trainer: Any, path: Path, universal: bool) -> None:
    """Load a checkpoint into an engine that was made for it.

    After a universal one at stage 3, DeepSpeed 0.19.8 gives all groups the first one's weight decay, and all
    parts of the optimiser one and the same counter of steps, which each of them then counts up.
    """
    optimizer = trainer.optimizer
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    with weights_only():
        trainer.load_checkpoint(path.parent, tag=path.name, load_module_strict=False)
    if universal:
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        for state in optimizer.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()


def _settings(config: TrainConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation(config),
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device before each forward pass
    }


def accumulation(config: TrainConfig) -> int:
    """Micro-batches of one optimiser step on each rank."""
    return config.batch_size // (config.micro_batch_size * ranks.world_size())


def _merged(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def whole(model: Captioner) -> contextlib.AbstractContextManager[None]:
    """All weights that fine-tuning may change on every rank, where ZeRO-3 has taken them apart."""
    import deepspeed

    own = [p for name, p in model.named_parameters() if model.is_saved(name)]
    return deepspeed.zero.GatheredParameters(own)


def _import_deepspeed(kind: devices.Kind) -> Any:
    """Import deepspeed and join the process group, alone if no launcher started us."""
    os.environ.setdefault("DS_ACCELERATOR", kind)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # of names that DeepSpeed uses
    if kind == "cpu":  # or it compiles a shared-memory kernel for 40 s; gloo does without
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ranks.start(kind)
    os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.distributed.is_initialized():  # alone: through no port, which other processes might take
        backend = deepspeed.get_accelerator().communication_backend_name()
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    return deepspeed
