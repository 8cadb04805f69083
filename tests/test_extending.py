"""The examples in docs/extending.md are complete: applied to a copy of the package, they give a run."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from harness.models import FAMILIES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^(?P<where>[^\n]+):\n\n```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
CREATE = re.compile(r"Create `([^`]+)`")
CHANGE = re.compile(r"In `([^`]+)`, (after|before|replace)( the last)? `([^`]+)`")
SMALL = """
name: extended
data:
  root: data/phantom
  layout: imageclef2023
  phantom: {train: 6, valid: 3, test: 2}
model: {checkpoint: language, image_size: 64}
train:
  batch_size: 3
  micro_batch_size: 3
  precision: fp32
predict: {num_beams: 2, max_new_tokens: 24, batch_size: 3}
"""
RUN = """if True:
    import sys
    from unittest import mock

    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    from harness import cli

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained("language")
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1}
    torch.manual_seed(0)
    OPTForCausalLM(OPTConfig(vocab_size=259, num_attention_heads=2, **sizes)).save_pretrained("language")
    sys.argv = ["harness", "run", "extended.yaml"]
    with mock.patch("harness.tracking.start") as follower:
        follower().finish.return_value = None
        cli.main()
"""
"""Makes a language model of random weights that reads bytes, and runs the experiment without MLflow."""


def blocks() -> Iterator[tuple[str, str, str]]:
    """Line above, kind and text of each block that a sentence introduces."""
    for found in BLOCK.finditer(PAGE):
        yield found["where"], found["kind"], found["code"]


def apply(tree: Path, where: str, code: str) -> None:
    """Do what the line above a block of Python says; fails where the code has moved on."""
    if found := CREATE.fullmatch(where):
        file = tree / found[1]
        assert not file.exists(), where
        file.parent.mkdir(exist_ok=True)
        file.write_text(code, encoding="utf-8")
        return
    found = CHANGE.fullmatch(where)
    assert found, f"what is to be done with this block? {where}"
    file = tree / found[1]
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    places = [at for at, line in enumerate(lines) if line == f"{found[4]}\n"]
    assert len(places) == 1 or (places and found[3]), where
    at = places[-1]
    start, stop = {"before": (at, at), "after": (at + 1, at + 1), "replace": (at, at + 1)}[found[2]]
    lines[start:stop] = [code]
    file.write_text("".join(lines), encoding="utf-8")


def merged(one: dict, other: dict) -> dict:
    both = {key: merged(one[key], other[key]) for key in one if isinstance(other.get(key), dict)}
    return {**one, **other, **both}


def python(tree: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the package with all that the page adds."""
    tree = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "harness", tree / "harness", ignore=shutil.ignore_patterns("__pycache__"))
    for where, kind, code in blocks():
        if kind == "python":
            apply(tree, where, code)
    return tree


@pytest.fixture(scope="module")
def record(tree) -> dict:
    """The record of one small run by an experiment with every key that the page shows."""
    experiment: dict = {}
    for where, kind, text in blocks():
        if kind == "yaml":
            assert where == "In an experiment"
            experiment = merged(experiment, yaml.safe_load(text))
    experiment = merged(experiment, yaml.safe_load(SMALL))
    (tree / "extended.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    python(tree, "-c", RUN)
    return json.loads((tree / "runs/extended/base-s42/run.json").read_text(encoding="utf-8"))


def test_every_block_is_introduced():
    fences = re.findall(r"^```(?:python|yaml)$", PAGE, re.MULTILINE)
    assert len(fences) == len(list(blocks())) > 5


@pytest.mark.ci
def test_the_code_is_formatted_as_ours(tree):
    shutil.copy(ROOT / "pyproject.toml", tree)
    python(tree, "-m", "ruff", "check", "harness")
    python(tree, "-m", "ruff", "format", "--check", "harness")


@pytest.mark.ci
def test_a_reader_finds_the_new_keys_in_the_reference(tree):
    page = python(tree, "-m", "harness", "reference")
    assert "| `postprocess.drop_unfinished` | true or false | `false` | Remove a last sentence" in page
    assert "| `fill.fewest_words` | a whole number from 0 to 1,000 | `0` | Captions with" in page
    first, *others = FAMILIES
    names = [f"`{name}`" for name in (first, "patches", *others)]  # the page adds it after the first
    assert f"| `model.family` | {', '.join(names[:-1])} or {names[-1]} |" in page
    assert "or `2027` |" in page
    assert "`numbers`" in page
    assert "| `train.stages[].losses.together` | a finite number of 0 or more | `0.0` | Next token of" in page


@pytest.mark.ci
def test_the_post_processing_removes_an_unfinished_sentence(tree):
    code = """if True:
        from harness.decoding.postprocess import PostprocessConfig, postprocess
        dropping = PostprocessConfig(drop_unfinished=True)
        for given in ("a mass. it measures 3", "no end", "all. done."):
            print(postprocess(given, dropping))
    """
    assert python(tree, "-c", code).splitlines() == ["A mass.", "No end.", "All. done."]


@pytest.mark.ci
def test_the_step_replaces_captions_that_are_too_short(tree, record):
    from harness.records.files import PREDICTIONS, read_captions

    before, filled, after = (
        read_captions(tree / "runs" / record["steps"][f"{kind}-valid"] / PREDICTIONS)
        for kind in ("predict", "fill", "postprocess")
    )
    assert all(len(caption.split()) < 4 for caption in before.values())
    assert len(set(filled.values())) == 1
    assert all(len(caption.split()) >= 4 for caption in after.values())
    assert before.keys() == filled.keys() == after.keys()


@pytest.mark.ci
def test_other_images_are_not_captioned_without_the_step(tree, record):
    code = """if True:
        from pathlib import Path
        from harness import captioning, errors
        try:
            captioning.of(Path("runs/extended/base-s42"))
        except errors.UserError as error:
            print(error)
    """
    assert "its step fill makes captions of the run's own images only" in python(tree, "-c", code)


@pytest.mark.ci
def test_the_metric_is_computed_for_each_image(tree, record):
    score = record["scores"]["valid"]["after"]["numbers"]
    assert 0 <= score["value"] <= 1
    assert score["signature"] == "numbers|clef2027|pre:raw"
    assert not score["official"]
    assert score["n"] == 3


@pytest.mark.ci
def test_the_loss_is_trained_and_logged(tree, record):
    rows = (tree / "runs" / record["steps"]["train"] / "losses.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, rows) if "loss" in row]
    assert [row["stage"] for row in steps] == [1, 1, 2, 2]
    for row in steps:
        names = {1: {"caption_loss", "concept_loss"}, 2: {"together_loss"}}[row["stage"]]
        assert {name for name in row if name.endswith("_loss")} == names
        assert row["loss"] == pytest.approx(sum(row[name] for name in names))
        assert all(row[name] > 0 for name in names)


@pytest.mark.ci
def test_the_predictor_gives_the_shares_of_the_training_images(tree, record):
    from harness.concepts.probabilities import read_probabilities

    found = read_probabilities(tree / "runs" / record["artifacts"]["concepts/valid_probabilities.npz"])
    (labels,) = (tree / "data/phantom").glob("*concept_detection_train_labels.csv")
    own = [set(line.split("\t")[1].split(";")) for line in labels.read_text().splitlines()[1:]]
    shares = [sum(cui in cuis for cuis in own) / len(own) for cui in found.labels]
    assert found.values.tolist() == [pytest.approx(shares)] * 3
    assert record["concepts"]["predictor"] == "prior"


@pytest.mark.ci
def test_the_family_is_trained_and_captions(tree, record):
    from safetensors.numpy import load_file

    weights = load_file(tree / "runs" / record["steps"]["train"] / "best.safetensors")
    assert set(weights) == {"encoder.weight", "encoder.bias"}


@pytest.mark.ci
def test_the_edition_decides_score_and_file(tree, record):
    assert record["edition"] == 2027
    assert record["scores"]["valid"]["after"]["rouge1"]["value"] is not None
    assert (tree / "submissions/extended/base-s42/caption-test/submission.zip").is_file()
