"""The trained model of a finished run as a checkpoint folder, with its adapters merged into the weights."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from harness import records, store
from harness.config.sections import PredictConfig
from harness.errors import Problem, UserError
from harness.models import checkpoints, family
from harness.models.base import Usage
from harness.training import card, finished

if TYPE_CHECKING:
    from harness.models.loading import Loaded

_LARGE = "".join(
    f"{names} filter=lfs diff=lfs merge=lfs -text\n" for names in ("*.safetensors", "tokenizer.json")
)
"""Which files a hub keeps apart."""


def export(run: Path, folder: Path, hub_ready: bool = False) -> dict[str, Path]:
    """Write the model of a run's folder to a new `folder`, whole or not at all -> what keys of `model:` name.

    Weights are fp32. Beside them lie a model card, the settings of decoding, and a script that captions by
    transformers alone if it has a class for the model. `hub_ready` adds what a hub reads.

    Raises `UserError` if the run has no trained weights, if its checkpoints are not on this machine, or if
    `folder` exists and is not empty.
    """
    import torch

    from harness.models import adapters

    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else deepspeed, which peft imports, warns of none
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        hint = "Name a new folder, or empty this one."
        raise UserError([Problem(f"exists and is not an empty folder: {folder}", key="FOLDER", hint=hint)])
    needed = ("variant", "seed", "steps", "data", "scores")
    found = finished.of(run, records.read(run, needed))
    if found.weights is None:
        what = f"the run trains nothing: its model is {found.model.checkpoint} as it is"
        raise UserError([Problem(what, run)])
    loaded = found.load(torch.float32)
    adapters.merge(loaded.model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        written = family(found.model).export(loaded, temporary)
        if standin := found.standin:
            for place in written.values():
                checkpoints.mark_standin(temporary / place, standin)
        usage = family(found.model).usage(found.model, loaded)
        save_use(usage, PredictConfig.model_validate(found.record["config"]["predict"]), loaded, temporary)
        store.write(temporary / "README.md", card.card(found, usage, written, hub_ready))
        if hub_ready:
            store.write(temporary / ".gitattributes", _LARGE)
        os.chmod(temporary, 0o755)  # mkdtemp lets nobody else read it, nor does safetensors
        for file in temporary.rglob("*.safetensors"):
            os.chmod(file, 0o644)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return {key: folder / place for key, place in written.items()}


def save_use(usage: Usage, predict: PredictConfig, loaded: "Loaded", folder: Path) -> None:
    """Write the script of a usage, and the settings of beams as transformers' `generation_config.json`."""
    if usage.script is None:
        return
    from transformers import GenerationConfig

    store.write(folder / card.SCRIPT, usage.script)
    codec = loaded.caption
    same = {"num_beams", "max_new_tokens", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size"}
    settings = predict.model_dump(include=same | ({"length_penalty"} if predict.num_beams > 1 else set()))
    ids = {"bos_token_id": codec.prompt[0], "eos_token_id": codec.end, "pad_token_id": codec.pad}
    GenerationConfig(do_sample=False, **settings, **ids, **usage.decoding).save_pretrained(folder)
