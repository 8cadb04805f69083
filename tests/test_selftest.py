"""The selftest: it finds nothing on the CPU, and names what is computed otherwise."""

import pytest
import torch
import torch.nn.functional as F

from harness import doctor
from harness.models import blip2
from harness.models.blip2 import model as blip2_model
from harness.models.blip2 import small
from harness.models.cache import Speaker
from harness.training import selftest

PARTS = {"boolean mask", "additive mask", "masked rows", "ViT", "queries", "text path", "language model"}
PARTS |= {"decoding", "gradients", "training step", "cross-entropy", "AdamW"}


class Family:
    """BLIP-2 whose first sample is changed by `change`: the second one is the reference."""

    def __init__(self, change):
        self.changes = [lambda sample: None, change]

    def sample(self):
        made = blip2.sample()
        self.changes.pop()(made)
        return made


def wrong(change, precision: str) -> set[str]:
    return {one.name for one in selftest.findings(Family(change), precision, "cpu") if not one.ok}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_part_agrees_on_the_cpu(precision):
    found = list(selftest.findings(blip2, precision, "cpu"))
    assert {one.name for one in found} == PARTS
    assert all(one.ok for one in found), found
    products = [one for one in found if one.name in ("ViT", "queries", "language model", "boolean mask")]
    assert all(one.difference > one.allowed / 1000 for one in products), "a bound that nothing can exceed"


def rounded(sample) -> None:
    """As if products were computed in bf16."""
    for weight in sample.model.language_model.parameters():
        weight.data = weight.data.bfloat16().float()


def test_a_lower_precision_than_was_asked_for_is_found():
    assert "language model" in wrong(rounded, "fp32")
    assert wrong(rounded, "bf16") == set()


def test_a_wrong_layer_is_named_and_others_are_not():
    def shift(sample) -> None:
        sample.model.qformer.encoder.layer[0].attention.attention.key.weight.data.neg_()

    found = wrong(shift, "fp32")
    assert {"queries", "text path", "gradients"} <= found
    assert not {"ViT", "language model", "cross-entropy", "AdamW", "additive mask"} & found


def test_a_part_that_raises_does_not_hide_the_others():
    def broken(sample) -> None:
        sample.model.language_model.lm_head.weight = None

    found = {one.name: one for one in selftest.findings(Family(broken), "fp32", "cpu")}
    assert found.keys() == PARTS
    assert not found["language model"].ok
    assert found["language model"].error
    assert found["text path"].ok


def test_an_optimiser_that_does_otherwise_is_found(monkeypatch):
    class Other(torch.optim.AdamW):
        """With other betas where it is that of the engine, which says whether it is fused."""

        def __init__(self, groups, **options):
            super().__init__(groups, **options | ({"betas": (0.5, 0.9)} if "fused" in options else {}))

    monkeypatch.setattr(torch.optim, "AdamW", Other)
    found = wrong(lambda sample: None, "fp32")
    assert "AdamW" in found
    assert not {"ViT", "gradients", "decoding"} & found


def test_decoding_that_loses_its_place_is_found(monkeypatch):
    def confused(sample) -> None:
        true = Speaker.step
        monkeypatch.setattr(Speaker, "step", lambda decoding, tokens: true(decoding, tokens).roll(1, 0))

    assert wrong(confused, "bf16") == {"decoding"}


def test_a_fault_is_a_line_of_the_doctor_and_needs_mending(monkeypatch):
    fault = selftest.Finding("text path", 0.5, 1e-5)
    monkeypatch.setattr(selftest, "findings", lambda *_: iter([fault]))
    (check,) = [one for one in doctor.examine([], "cpu", selftest=True) if "selftest" in one.name][:1]
    assert (check.name, check.ok) == ("selftest fp32 text path", False)
    assert check.found == "cpu: differs from fp32 on the CPU by 5.0e-01; the precision explains 1.0e-05"
    assert check.fix
    assert not any("selftest" in one.name for one in doctor.examine([], "cpu"))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_mask_that_is_added_equals_a_boolean_one_to_the_bit(monkeypatch, dtype):
    """Outputs and gradients, so that trainings made with a boolean mask are those made now."""

    def passed(boolean: bool) -> list[torch.Tensor]:
        sample = small.make()
        sample.model.compute_in(dtype, False)
        attention = F.scaled_dot_product_attention
        if boolean:

            def with_boolean(*parts, attn_mask, **options):
                seen = None if attn_mask is None else attn_mask == 0
                return attention(*parts, attn_mask=seen, **options)

            monkeypatch.setattr(blip2_model.F, "scaled_dot_product_attention", with_boolean)
        loss = sample.model(sample.pixels, concept=sample.texts["concept"]).concept
        loss.backward()
        monkeypatch.undo()
        named = [p.grad for p in sample.model.parameters() if p.grad is not None]
        return [loss.detach(), *named]

    one, other = passed(False), passed(True)
    assert len(one) == len(other) > 50
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
