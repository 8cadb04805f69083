"""The keys that DeepSpeed 0.19.8 reads from its config; it silently ignores all others.

This is a copy, since importing deepspeed takes seconds. A test compares it with the installed version.
"""

import difflib
import math
from collections.abc import Iterator, Mapping
from datetime import date
from typing import Any

DECIDED = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "batch_size",
    "gradient_clipping": "max_grad_norm",
    "fp16": "precision",
    "bf16": "precision",
    "bfloat16": "precision",
    "torch_autocast": "precision",
    "optimizer": "learning_rate",
    "scheduler": "warmup_steps",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer": "offload",
}
"""Keys of DeepSpeed's config that a key of `train` decides."""
VALUES = [
    "communication_data_type",
    "dataloader_drop_last",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "gradient_allreduce_op",
    "gradient_predivide_factor",
    "log_level",
    "managed_gradient_accumulation",
    "memory_breakdown",
    "prescale_gradients",
    "seq_parallel_communication_data_type",
    "steps_per_print",
    "use_data_before_expert_parallelism",
    "vocabulary_size",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
]
"""Top-level keys that are not sections."""
OPEN = [
    "autotuning",
    "data_efficiency",
    "datastates_ckpt",
    "expert_parallel",
    "hybrid_engine",
    "pipeline",
    "tensor_parallel",
    "weight_quantization",
]
"""Sections whose keys are not checked: they matter little for fine-tuning one model."""
NUMBERS = {
    "steps_per_print": 1,
    "zero_optimization.reduce_bucket_size": 1,
    "zero_optimization.stage3_max_live_parameters": 0,
}
"""Keys that the forecast of memory reads, or that DeepSpeed does not check before the first step.

The values are the smallest numbers that DeepSpeed takes.
"""
SECTIONS: Mapping[str, list[str]] = {
    "activation_checkpointing": [
        "contiguous_memory_optimization",
        "cpu_checkpointing",
        "number_checkpoints",
        "partition_activations",
        "profile",
        "synchronize_checkpoint_boundary",
    ],
    "aio": [
        "block_size",
        "intra_op_parallelism",
        "overlap_events",
        "queue_depth",
        "single_submit",
        "use_gds",
    ],
    "checkpoint": [
        "checkpoint_serialization",
        "load_universal",
        "parallel_write",
        "tag_validation",
        "use_node_local_storage",
        "writer",
    ],
    "comet": [
        "api_key",
        "enabled",
        "experiment_key",
        "experiment_name",
        "mode",
        "online",
        "project",
        "samples_log_interval",
        "workspace",
    ],
    "comms_logger": ["debug", "enabled", "prof_all", "prof_ops", "verbose"],
    "compile": [
        "autoep_non_moe",
        "debug_log",
        "deepcompile",
        "double_buffer",
        "free_activation",
        "free_activation_threshold",
        "keep_all_input_tensors",
        "keep_int_input_tensors",
        "offload_activation",
        "offload_activation_pin_memory",
        "offload_opt_states",
        "offload_parameters",
        "passes",
        "symmetric_memory",
        "sync_after_allgather",
        "sync_after_reduce",
        "sync_before_allgather",
        "sync_before_reduce",
    ],
    "csv_monitor": ["enabled", "job_name", "output_path"],
    "data_types": ["buffer_dtype", "grad_accum_dtype", "keep_in_fp32_modules", "param_dtype"],
    "flops_profiler": [
        "detailed",
        "enabled",
        "module_depth",
        "output_file",
        "profile_step",
        "recompute_fwd_factor",
        "top_modules",
    ],
    "tensorboard": ["enabled", "job_name", "output_path"],
    "timers": ["throughput"],
    "timers.throughput": ["enabled", "synchronized"],
    "wandb": ["enabled", "group", "project", "team"],
    "zero_optimization": [
        "allgather_bucket_size",
        "allgather_partitions",
        "allgather_sequential",
        "compute_grad_norm",
        "contiguous_gradients",
        "cpu_offload",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "elastic_checkpoint",
        "enable_sanity_checks",
        "gather_16bit_weights_on_model_save",
        "ignore_unused_parameters",
        "leaf_module",
        "legacy_stage1",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "max_live_parameters",
        "max_reuse_distance",
        "memory_efficient_linear",
        "model_persistence_threshold",
        "module_granularity_threshold",
        "offload_optimizer",
        "offload_param",
        "overlap_comm",
        "override_module_apply",
        "param_persistence_threshold",
        "parameter_alignment",
        "pipeline_loading_checkpoint",
        "prefetch_bucket_size",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "save_muon_momentum_buffer_in_memory",
        "stage",
        "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "stage3_use_all_reduce_for_fetch_params",
        "sub_group_size",
        "use_all_reduce_for_fetch_params",
        "use_multi_rank_bucket_allreduce",
        "zenflow",
        "zero_hpz_partition_size",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
    ],
    "zero_optimization.offload_param": [
        "buffer_count",
        "buffer_size",
        "device",
        "max_in_cpu",
        "nvme_path",
        "pin_memory",
    ],
}
"""The keys of each section."""


def mistakes(settings: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with `train.deepspeed`, by key: unknown, decided by `train`, or an odd value."""
    return dict(_mistakes(settings, ""))


def _mistakes(section: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
    known = SECTIONS[path] if path else top()
    for name, value in section.items():
        key = f"{path}.{name}" if path else str(name)
        if key == "comet.api_key":
            yield key, f"deepspeed: {key} would be in every record; set COMET_API_KEY in the environment"
        elif key in DECIDED:
            yield key, f"deepspeed: {key} can't be set here; use train.{DECIDED[key]} instead"
        elif name not in known:
            near = difflib.get_close_matches(str(name)[:80], known, 1, 0.7)
            meant = f" Did you mean {path + '.' if path else ''}{near[0]}?" if near else ""
            yield key, f"deepspeed.{key[:80]}: unknown key of DeepSpeed's config.{meant}"
        elif key in SECTIONS and not isinstance(value, Mapping):
            yield key, f"deepspeed.{key}: got {repr(value)[:80]}; a mapping is allowed"
        elif key in SECTIONS:
            yield from _mistakes(value, key)
        elif key in NUMBERS and not (type(value) in (int, float) and NUMBERS[key] <= value < math.inf):
            least = f"a number of {NUMBERS[key]} or more is allowed"
            yield key, f"deepspeed.{key}: got {repr(value)[:80]}; {least}"
        elif not _is_json(value):
            yield key, f"deepspeed.{key}: holds a date or a number that is not finite"


def top() -> list[str]:
    """All top-level keys."""
    return [key for key in (*VALUES, *OPEN, *SECTIONS, *DECIDED) if "." not in key]


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return not isinstance(value, date) and not (isinstance(value, float) and not math.isfinite(value))
