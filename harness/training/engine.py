"""DeepSpeed: the engine of a stage, for any device, ZeRO stage and number of ranks.

The only room that imports deepspeed.
"""

import argparse
import contextlib
import functools
import logging
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from harness.errors import Problem, UserError
from harness.machine import device as devices
from harness.machine import ranks
from harness.models import parts
from harness.models.base import Captioner
from harness.store import write_json
from harness.training import memory
from harness.training.compiling import compiled_parts
from harness.training.settings import TrainConfig

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def place(model: Captioner, config: TrainConfig, kind: devices.Kind) -> None:
    """Put a model on its device; weights that are never trained get the precision of the computation."""
    model.compute_in(precision(config, kind), config.vision_precision == "fp32")
    if kind == "cpu":  # torch's fused attention is slower there than plain products, mainly backwards
        model.use_plain_attention()
    model.to(devices.torch_device(kind))
    if config.gradient_checkpointing is True:  # it may be auto where nothing is trained
        model.gradient_checkpointing_enable({"use_reentrant": False})


def precision(config: TrainConfig, kind: devices.Kind) -> torch.dtype | None:
    """The configured autocast dtype; `auto` is bf16 if the device has it. None is fp32."""
    if config.precision == "auto":
        return torch.bfloat16 if devices.has_bf16(kind) else None
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[config.precision]


def frozen_dtype(config: TrainConfig, kind: devices.Kind) -> torch.dtype:
    """The dtype of weights that are never trained: the precision of the computation."""
    return precision(config, kind) or torch.float32


def engine(
    model: Captioner, config: TrainConfig, kind: devices.Kind, directory: Path, universal: bool = False
) -> Any:
    """The engine that trains the parameters of `model` that are not frozen; writes its config to `directory`.

    `universal` prepares it to load a checkpoint in DeepSpeed's universal format.
    """
    deepspeed = _import_deepspeed(kind)
    weights = sum(p.nbytes for p in model.parameters())  # before ZeRO-3 shards them
    optimizer = torch.optim.AdamW(
        parts.groups(model, config.weight_decay, config.rate_factors),
        lr=config.learning_rate,
        betas=config.betas,
        fused=kind != "npu",  # torch-npu has a fused AdamW of its own, which no test compares with this one
    )
    settings = _merged(_settings(config), config.deepspeed)
    if ranks.rank() == 0:
        write_json(directory / "ds_config.json", settings)
    if universal:
        settings = _merged(settings, {"checkpoint": {"load_universal": True}})
    for part in compiled_parts(model):  # ZeRO-3 gathers its weights at once, with no hook in compiled code
        deepspeed.utils.set_z3_leaf_module(part, True)
    with _settings_refused(config):
        made = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    if config.precision == "fp16":
        _scale_losses(made.optimizer)
    if not config.zero_stage and ranks.world_size() == 1:  # avoids a useless copy of all gradients
        made.enable_backward_allreduce = False
    made.frees_memory = memory.frees(kind, weights)
    return made


def backward(trainer: Any, loss: torch.Tensor) -> None:
    """Compute the gradients of a micro batch; a large model on a CPU then gives freed memory back."""
    trainer.backward(loss)
    if trainer.frees_memory:
        devices.free_memory()


@contextlib.contextmanager
def _settings_refused(config: TrainConfig) -> Iterator[None]:
    """Let a value of `train.deepspeed` that DeepSpeed refuses be a mistake of the user's."""
    try:
        yield
    except (ValueError, TypeError, AssertionError) as error:
        if not config.deepspeed:
            raise
        what = f"DeepSpeed refuses this: {' '.join(str(error).split())[:400]}"
        raise UserError([Problem(what, key="train.deepspeed")], exit_code=1) from error


def _scale_losses(optimizer: Any) -> None:
    """Give a ZeRO optimiser of fp32 weights DeepSpeed's dynamic loss scale, which is meant for fp16 weights.

    If gradients overflow, all ranks skip the step and halve the scale. Checkpoints save the scaler's state.
    DeepSpeed's own `torch_autocast` is no alternative: it clips gradients before it unscales them.
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
    """Free an engine and its optimiser; the caller must then delete its references and collect garbage.

    `destroy` of DeepSpeed 0.19.8 leaves hooks on the model that keep the engine alive, and at ZeRO stage 3
    two module-level containers that keep the model alive. The next stage would need memory for both.
    ZeRO stage 3 also leaves its own `linear` in torch for the rest of the process.
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


def save(trainer: Any, path: Path, write: Callable[[Callable[[Any, Path], None], Any, Path], None]) -> None:
    """Have DeepSpeed make a checkpoint in a folder; `write(save, state, file)` gets each of its files.

    A user's own checkpoint engine, and storage that other nodes don't see, write in DeepSpeed's way.
    """
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    files = trainer.checkpoint_engine
    if type(files) is TorchCheckpointEngine and not trainer.use_node_local_storage():
        plain = functools.partial(TorchCheckpointEngine.save, files)
        files.save = lambda state_dict, path: write(plain, state_dict, Path(path))
    # `latest` would name it before it is whole
    trainer.save_checkpoint(path.parent, path.name, save_latest=False, exclude_frozen_parameters=True)


def to_universal(source: Path, target: Path) -> None:
    """Convert a checkpoint with one part per rank to a format that any number of ranks can load."""
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
    """Let torch load only weights and DeepSpeed's own classes; DeepSpeed would run any code in a checkpoint.

    Raises `UserError` if a checkpoint holds anything else.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def member(kind: Any, name: str) -> Any:
        """What `getattr` may do in a checkpoint: Python 3.11.0 to 3.11.3 pickle a member of an enum by it."""
        if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
            raise pickle.UnpicklingError(f"Unsupported global: getattr of {kind}, {name!r}")
        return ZeroStageEnum[name]

    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        classes = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
        with torch.serialization.safe_globals([*classes, (member, "builtins.getattr")]):
            yield
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|getattr of) .*?(?= was not an allowed|$)", str(error), re.MULTILINE)
        why = named[0] if named else str(error).splitlines()[0]
        what = f"a checkpoint of this training holds more than weights: {why}"
        hint = "Delete the folder train-... of this run in runs/steps; the training then starts again."
        raise UserError([Problem(what, hint=hint)], exit_code=1) from None
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def resume(trainer: Any, path: Path, universal: bool) -> None:
    """Load a checkpoint into an engine that was made for it.

    A fused optimiser counts steps on the device, and goes on fused after a checkpoint of one that was not.
    After a universal checkpoint at ZeRO stage 3, DeepSpeed 0.19.8 gives all groups the first group's weight
    decay, and one shared step counter to all parts of the optimiser, so it would count too fast.
    """
    optimizer = trainer.optimizer
    kept = [(group["weight_decay"], group["fused"]) for group in optimizer.param_groups]
    with weights_only():
        trainer.load_checkpoint(path.parent, tag=path.name, load_module_strict=False)
    for group, (decay, fused) in zip(optimizer.param_groups, kept, strict=True):
        group["weight_decay"], group["fused"] = decay, fused
    for parameter, state in optimizer.state.items():
        if "step" in state:
            place = parameter.device if kept[0][1] else "cpu"
            state["step"] = state["step"].to(place, torch.float32, copy=True)


def casts_kept(config: TrainConfig, kind: devices.Kind) -> contextlib.AbstractContextManager[Any]:
    """A context in which autocast casts each weight once; it must end before the weights change.

    Autocast keeps casts until its outermost context ends. This one is not enabled, because backward passes
    must not be. ZeRO-3 frees weights after each use, so their casts are not kept.
    """
    return contextlib.nullcontext() if config.zero_stage == 3 else torch.autocast(kind, enabled=False)


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
    """Number of micro-batches of one optimiser step on each rank."""
    return config.batch_size // (config.micro_batch_size * ranks.world_size())


def _merged(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def whole(model: Captioner) -> contextlib.AbstractContextManager[None]:
    """A context in which every rank has whole the trainable weights that ZeRO-3 has sharded."""
    import deepspeed

    own = [p for name, p in model.named_parameters() if model.is_saved(name)]
    return deepspeed.zero.GatheredParameters(own)


@contextlib.contextmanager
def gathered(trainer: Any) -> Iterator[None]:
    """A block in which each rank can compute alone, with all weights whole; all ranks must enter it.

    The hooks of ZeRO-3 are off in it: they free the weights of each layer after its use.
    """
    sharded = getattr(trainer.optimizer, "parameter_offload", None)
    if sharded is None:
        yield
        return
    import deepspeed

    handles = [*sharded.forward_hooks, *sharded.backward_hooks]
    off = [
        (hooks, handle.id, hooks.pop(handle.id)) for handle in handles if (hooks := handle.hooks_dict_ref())
    ]
    try:
        with deepspeed.zero.GatheredParameters(sharded.module.parameters()):
            yield
    finally:
        for hooks, name, hook in off:
            hooks[name] = hook


def held(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this rank holds of a parameter: at ZeRO-3 its part, flat and perhaps padded; else all of it."""
    return getattr(parameter, "ds_tensor", parameter).detach()


def assembled(part: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """The whole of something of which each rank has a part as `held` gives it; all ranks call this."""
    if not hasattr(parameter, "ds_tensor"):
        return part
    return torch.cat(ranks.parts(part))[: parameter.ds_numel].view(parameter.ds_shape)


def _import_deepspeed(kind: devices.Kind) -> Any:
    """Import deepspeed and join the process group, or make one of a single process without a launcher."""
    os.environ.setdefault("DS_ACCELERATOR", kind)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # about names DeepSpeed uses
    if kind == "cpu":  # else it compiles a shared-memory kernel for 40 s, which gloo does not need
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ranks.start(kind)
    os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.distributed.is_initialized():  # one process: needs no port, which might be in use
        backend = deepspeed.get_accelerator().communication_backend_name()
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    return deepspeed
