"""Replaces torch-npu if the environment has a built make-believe NPU; see npu.cpp."""

import torch

from torch_npu import npu

torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)


def _hccl(store, rank, size, timeout):
    gloo = torch.distributed.ProcessGroupGloo(store, rank, size, timeout)
    return npu.extension.hccl(gloo)


torch.distributed.Backend.register_backend("hccl", _hccl, devices=["npu"])


def npu_fusion_attention(*_, **__):
    """transformers imports it, and calls it for its flash attention alone."""
    raise NotImplementedError("the make-believe NPU has no kernels of its own")


def _autoload():
    """Torch's entry point for devices: importing this package has done it all."""
