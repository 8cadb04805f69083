"""What autograd stores in one training pass, counted by torch itself on tensors without data."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, Blip2Config, masking_utils
from transformers.models.opt import modeling_opt

from harness.models.blip2.model import Captioner

try:
    from transformers.initialization import no_init_weights
except ImportError:  # transformers 4
    from transformers.modeling_utils import no_init_weights


class _Like(TorchFunctionMode):
    """Makes a CPU save what an accelerator saves, by the published list of CUDA's autocast: norms and softmax
    in fp32, dropout masks of a byte, fused attention whatever its dropout. `accelerator` false: a CPU."""

    def __init__(self, accelerator: bool) -> None:
        self.accelerator = accelerator
        super().__init__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.rand and args == ([],):
            return 1.0  # OPT's layer drop, which wants a number
        if self.accelerator and function in (F.layer_norm, F.softmax) and args[0].dtype == torch.bfloat16:
            args = (args[0].float(), *args[1:])
        if self.accelerator and function is F.dropout and kwargs["p" if "p" in kwargs else "training"]:
            rate = kwargs["p"] if "p" in kwargs else args[1]
            return torch.native_dropout(args[0], rate, True)[0] if rate else args[0]
        if self.accelerator and function is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
        return function(*args, **kwargs)


@contextlib.contextmanager
def without_contents(accelerator: bool) -> Iterator[None]:
    """Tensors made here have shapes and no memory."""
    masks = getattr(modeling_opt, "AttentionMaskConverter", masking_utils)  # the second in transformers 5
    before = masks._ignore_causal_mask_sdpa
    masks._ignore_causal_mask_sdpa = lambda *_, **__: False
    try:
        with FakeTensorMode(), _Like(accelerator), torch.device("cpu"), no_init_weights():
            yield
    finally:
        masks._ignore_causal_mask_sdpa = before


def captioner(config: Blip2Config, language_model: bool, half: bool, accelerator: bool) -> Captioner:
    """A model as `engine.place` leaves it; without weights inside `without_contents`."""
    model = Captioner(config, language_model=language_model)
    model.tie_weights()
    model.autocast_dtype = torch.bfloat16 if half else None
    if language_model and half:
        model.language_model = AutoModelForCausalLM.from_config(config.text_config, dtype=torch.bfloat16)
    for part in (model.vision_model, model.language_model):
        if part is not None and not accelerator:
            part.set_attn_implementation("eager")
    return model


def kept(
    model: Captioner, batch: int, tokens: int, concepts: bool, train_vision: bool = True
) -> tuple[int, int]:
    """Bytes saved by one training forward pass: of activations, and of weights cast to half precision."""
    model.trained_parts = {"connector", *(["vision"] if train_vision else [])}
    model.freeze(["caption", "concept"] if concepts else ["caption"])
    model.train()
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    shapes = {tuple(parameter.shape) for parameter in model.parameters() if parameter.ndim > 1}
    shapes |= {shape[::-1] for shape in shapes}
    saved: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own:
            saved.setdefault(key, tensor)  # held, so that no other tensor takes its place
        return tensor

    side = model.config.vision_config.image_size
    ids = torch.zeros(batch, tokens, dtype=torch.long)
    texts = {"ids": ids, "mask": torch.ones_like(ids), "labels": torch.zeros_like(ids)}
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        losses = model(torch.zeros(batch, 3, side, side), texts, texts if concepts else None, 0.1)
    assert losses.caption is not None
    casts = [t for t in saved.values() if t.dtype == torch.bfloat16 and tuple(t.shape) in shapes]
    everything = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    weights = sum(tensor.untyped_storage().nbytes() for tensor in casts)
    return everything - weights, weights
