"""Replaces torch-npu if the environment has a built make-believe NPU; see npu.cpp."""

import os

import torch

from torch_npu import npu

torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)


def _hccl(store, rank, size, timeout):
    gloo = torch.distributed.ProcessGroupGloo(store, rank, size, timeout)
    return npu.extension.hccl(gloo)


torch.distributed.Backend.register_backend("hccl", _hccl, devices=["npu"])


def _reading_masks_inverted(attention):
    """Attention that attends where a boolean mask is False, as users reported it of torch-npu."""

    def attend(query, key, value, attn_mask=None, *args, **options):
        boolean = attn_mask is not None and attn_mask.dtype == torch.bool and query.device.type == "npu"
        return attention(query, key, value, ~attn_mask if boolean else attn_mask, *args, **options)

    return attend


if os.environ.get("MAKE_BELIEVE_NPU_MASKS") == "inverted":
    functional = torch.nn.functional
    functional.scaled_dot_product_attention = _reading_masks_inverted(functional.scaled_dot_product_attention)


def npu_fusion_attention(*_, **__):
    """transformers imports it, and calls it for its flash attention alone."""
    raise NotImplementedError("the make-believe NPU has no kernels of its own")


def _autoload():
    """Torch's entry point for devices: importing this package has done it all."""
