# ruff: noqa: E501  (messages stand whole)
"""YAML that is too large, too deep, ambiguous or out of range is refused at once with file and line."""

import json
import os
import subprocess
import sys
import time

import pytest
from support.experiments import messages, write

from harness.config.experiment import load, set_value, value_at
from harness.config.schema import Config, keys
from harness.errors import UserError
from harness.study.spec import load as load_study

HEAD = "name: a\ndata: {root: x}\n"
LAUGHS = "x0: &x0 {a: 1}\n" + "".join(
    f"x{n}: &x{n} {{{', '.join(f'k{i}: *x{n - 1}' for i in range(9))}}}\n" for n in range(1, 9)
)
MERGED = "x0: &x0 {a: 1}\n" + "".join(
    f"x{n}: &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * 9)}]}}\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LAUGHS, "e.yaml:5: its aliases expand to more than 10,000 values"),
        (MERGED, "e.yaml:5: its aliases expand to more than 10,000 values"),
        ("name: &a [*a]\n", "e.yaml:1: an alias refers to a value that contains it"),
        (f"{HEAD}train: &t\n  deepspeed: {{a: *t}}\n", "e.yaml:3: an alias refers to a value that contains it"),
        ("name: " + "[" * 100_000, "e.yaml:1: not YAML: nested more than 50 levels deep"),
        ("x:\n" + "\n".join(" " * n + "a:" for n in range(1, 300)), "e.yaml:50: not YAML: nested more than 50"),
        (f"{HEAD}train:\n  batch_size: 16\n  seed: 1\n  batch_size: 32\n", ":6: train.batch_size: written twice"),
        (f"{HEAD}variants:\n  one: {{}}\n  one: {{}}\n", ":5: variants.one: written twice"),
        (f"{HEAD}train: {{deepspeed: {{timers: [{{a: 1, a: 2}}]}}}}\n", ":3: train.deepspeed.timers.a: written twice"),
        ("name: a\ndata:\n\troot: x\n", "e.yaml:3: not YAML: found character '\\t' that cannot start any token"),
        ("name: a\n\ndata: {root: a\0}\n", "e.yaml:3: not YAML: unacceptable character #x0000"),
        (f'{HEAD}model: {{checkpoint: "a\\0b"}}\n', "e.yaml:3: model.checkpoint: got 'a\\x00b', with a control"),
        (f'{HEAD}model: {{prompt: "\\ud800"}}\n', "e.yaml:3: model.prompt: got '\\ud800', with a control"),
        ("name: 2024-01-01\ndata: {root: x}\n", "e.yaml:1: name: got the date 2024-01-01; one or more names"),
        ("name: a\nseed: 2024-99-99\n", "e.yaml:2: not YAML: month must be in 1..12"),
        (f"{HEAD}seed: 0b_\n", "e.yaml:3: not YAML: invalid literal for int()"),
        (f"{HEAD}seed: !!int x\n", "e.yaml:3: not YAML: the tag !!int is not used here"),
        (f"{HEAD}seed: !!python/object:os.system [ls]\n", "e.yaml:3: not YAML: could not determine a constructor"),
        (f"{HEAD}seed: 18446744073709551616\n", ":3: seed: got 18446744073709551616; a whole number from 0 to 4,294,967,295"),
        (f"{HEAD}seed: 0x{'f' * 9000}\n", "e.yaml:3: not YAML: a number of 9,002 digits"),
        (f"{HEAD}seed: '{'9' * 9000}'\n", "e.yaml:3: seed: got '999"),
        (f"{HEAD}seed: 012\n", "e.yaml:3: seed: got 012, which YAML reads in base 8 or 60"),
        (f"{HEAD}seed: 1:30\n", "e.yaml:3: seed: got 1:30, which YAML reads in base 8 or 60"),
        (f"{HEAD}seed: yes\n", "e.yaml:3: seed: got true; a number is allowed"),
        (f"{HEAD}predict: {{num_beams: 100000000000000000000}}\n", "a whole number from 1 to 1,000 is allowed"),
        (f"{HEAD}train: {{learning_rate: .nan}}\n", "train.learning_rate: got nan; a finite number above 0 is"),
        (f"{HEAD}train: {{learning_rate: .inf}}\n", "train.learning_rate: got inf; a finite number above 0 is"),
        (f"{HEAD}train: {{learning_rate: 1e999}}\n", "train.learning_rate: got inf; a finite number above 0 is"),
        (f"{HEAD}train: {{betas: [.nan, 0.9]}}\n", "train.betas.0: got nan; a number from 0 to below 1 is allowed"),
        (f"{HEAD}predict: {{length_penalty: -.inf}}\n", "predict.length_penalty: got -inf; a finite number is"),
        (f"{HEAD}train: {{deepspeed: {{aio: {{block_size: .nan}}}}}}\n", "deepspeed.aio.block_size: holds a date or a number"),
        (f"{HEAD}1: x\n", "e.yaml:3: a key is text; got 1, which YAML takes for something else. Put it in quotes"),
        (f"{HEAD}variants: {{224: {{}}}}\n", "e.yaml:3: variants: a key is text; got 224"),
        (f"{HEAD}? [a]\n: b\n", "e.yaml:3: not YAML: found unhashable key"),
        (f"{HEAD}seed: 7\nseeds: [1, 2]\n", "e.yaml:3: seed: can't be used with seeds"),
        (f"{HEAD}seeds: [1, 2]\nvariants:\n  a: {{seed: 7}}\n", "e.yaml:5: variants.a.seed: has no effect, since seeds"),
        (f"{HEAD}seeds: [1, 2, 1]\n", "e.yaml:3: seeds: two runs are called a/base-s1"),
        (f"{HEAD}seeds: [1, '1']\n", "e.yaml:3: seeds: two runs are called a/base-s1"),
        (f"{HEAD}seeds: {[*range(1001)]}\n", "1 variants and 1,001 seeds; at most 1,000 runs are allowed"),
        (f"{HEAD}" + "".join(f"k{n}: 1\n" for n in range(60)), "e.yaml: and 10 more mistakes"),
        ("# " + "x" * 300_000, "e.yaml: larger than 256 kB"),
        ("k: 1\n" * 20_000, "more than 10,000 values"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_where_it_stands_and_at_once(tmp_path, text, expected):
    began = time.monotonic()
    found = messages(write(tmp_path, text))
    assert any(expected in message for message in found), found[:5]
    assert all(len(message) < 400 for message in found)
    assert time.monotonic() - began < 5  # a shared machine; alone it is within a second


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_other_encodings_are_refused_with_the_line(tmp_path, encoding):
    file = tmp_path / "e.yaml"
    file.write_bytes("name: a\ndata: {root: é}\n".encode(encoding))
    (message,) = messages(file)
    assert message.startswith(f"{file}:")
    assert "UTF" in message or "unacceptable character #x0000" in message


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_bytes(HEAD.encode("utf-8-sig"))
    assert load(file)[0].name == "a"


def test_a_number_without_a_point_is_a_number(tmp_path):
    file = write(tmp_path, f"{HEAD}train: {{learning_rate: 1e-5, weight_decay: 5E-2}}\n")
    assert load(file)[0].train.learning_rate == 1e-5
    assert load(file, ["train.learning_rate=3e-5"])[0].train.learning_rate == 3e-5


def test_aliases_and_merged_keys_are_yaml_like_any_other(tmp_path):
    text = f"{HEAD}variants:\n  one: &one\n    train: {{batch_size: 64}}\n  two:\n    <<: *one\n    seed: 3\n"
    runs = {run.variant: run for run in load(write(tmp_path, text))}
    assert [run.train.batch_size for run in runs.values()] == [64, 64]
    assert runs["two"].seed == 3
    file = write(tmp_path, text.replace("batch_size", "batch_siz"))
    assert {message.partition(": ")[0] for message in messages(file)} == {f"{file}:5"}


@pytest.mark.parametrize("kind", ["folder", "pipe", "absent", "long", "nul"])
def test_a_base_that_is_no_file_is_named_at_its_line(tmp_path, kind):
    os.mkdir(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")
    base = {"long": "x" * 5000, "nul": '"a\\0"'}.get(kind, kind)
    file = write(tmp_path, f"name: a\nbase: {base}\ndata: {{root: x}}\n")
    words = {"folder": "a folder, not a file", "pipe": "not a regular file"}.get(kind, "no such file")
    assert any(message.startswith(f"{file}:2: base: {words}") for message in messages(file))
    if kind in ("folder", "pipe"):
        assert messages(tmp_path / kind)[0].endswith(words)


def test_bases_in_a_circle_and_in_a_long_chain_end(tmp_path):
    write(tmp_path, "base: b.yaml\nname: a\n", "a.yaml")
    write(tmp_path, "base: a.yaml\n", "b.yaml")
    assert "is its own base" in messages(tmp_path / "a.yaml")[0]
    for n in range(1000):
        write(tmp_path, f"base: c{n + 1}.yaml\n", f"c{n}.yaml")
    assert "more than 20 files in one chain" in messages(tmp_path / "c0.yaml")[0]


@pytest.mark.parametrize(
    ("base", "own", "sets", "seeds"),
    [
        ("seeds: [1, 2]", "seed: 7", [], [7]),
        ("seed: 7", "seeds: [1, 2]", [], [1, 2]),
        ("seeds: [1, 2]", "", [], [1, 2]),
        ("seeds: [1, 2]", "", ["seed=7"], [7]),
        ("seeds: [1, 2]", "seeds: [3]", [], [3]),
    ],
)
def test_the_seed_that_was_given_last_counts(tmp_path, base, own, sets, seeds):
    write(tmp_path, f"{HEAD}{base}\n", "base.yaml")
    file = write(tmp_path, f"base: base.yaml\nname: b\n{own}\n")
    assert [run.seed for run in load(file, sets)] == seeds


@pytest.mark.parametrize("path", [path for path in keys()], ids=".".join)  # noqa: C416
def test_no_number_goes_without_a_bound(path):
    """Neither 10^20 nor infinity nor NaN passes any key of numbers; what takes text may have it as text."""
    for value in (10**20, float("inf"), float("nan"), -(10**20), True):
        values = {"name": "a", "data": {"root": "x"}}
        set_value(values, path, value)
        try:
            config = Config.model_validate(values)
        except ValueError:
            continue
        kept = config.model_dump(mode="json")
        json.dumps(kept, allow_nan=False)
        kept = value_at(kept, path)
        free = {"min_learning_rate", "warmup_learning_rate", "learning_rate", "weight_decay", "max_grad_norm"}
        free |= {"length_penalty", "repetition_penalty", "rotate", "temperature"}
        free |= {"caption", "concept", "own"}  # weights of losses and of captions
        free |= {"alpha", "vision", "connector", "language"}  # of adapters, and learning rates of parts
        assert value is True or path[-1] in free, (path, value)
        assert value is not True or kept is True, (path, kept)


@pytest.mark.parametrize(
    ("line", "sets", "where", "key"),
    [
        ("batch_size: 48", ["train.micro_batch_size=32"], "--set train.micro_batch_size", "train.micro_batch_size"),
        ("batch_size: 40", ["train.learning_rate=1e-4"], "e.yaml:4", "train.batch_size"),
        ("micro_batch_size: 48", [], "e.yaml:4", "train.micro_batch_size"),
        ("micro_batch_size: 48", ["train.batch_size=64"], "--set train.batch_size", "train.batch_size"),
        ("precision: fp32", ["train={batch_size: 3}"], "--set train", "train.batch_size"),
        ("offload: true", ["train.zero_stage=0"], "--set train.zero_stage", "train.zero_stage"),
        ("zero_stage: 0", ["train.precision=fp16"], "--set train.precision", "train.precision"),
        ("precision: fp16", ["seed=3"], "e.yaml:4", "train.precision"),
        ("stages: [{epochs: 0, losses: {}}, {epochs: 1, losses: {caption: 1}}]", ["train.stages.1.epochs=0"], "--set train.stages.1.epochs", "train.stages.1.epochs"),
        ("deepspeed: {fp16: {}}", ["seed=3"], "e.yaml:4", "train.deepspeed.fp16"),
        ("batch_size: 16", ["train.deepspeed.optimizer={}"], "--set train.deepspeed.optimizer", "train.deepspeed.optimizer"),
    ],
)  # fmt: skip
def test_a_mistake_across_keys_points_at_the_key_that_was_given(tmp_path, line, sets, where, key):
    file = write(tmp_path, f"{HEAD}train:\n  {line}\n")
    found = [message for message in messages(file, *sets) if "unknown key" not in message]
    assert len(found) == 1
    start = f"{where}: " if where == f"--set {key}" else f"{where}: {key}: "
    assert found[0].removeprefix(f"{tmp_path}/").startswith(start)


def test_a_mistake_across_keys_of_two_sections_points_at_the_one_that_was_given(tmp_path):
    file = write(tmp_path, f"{HEAD}model:\n  checkpoint: tiny\n  image_size: 56\n")
    (message,) = messages(file, "model.tiny.patch_size=15")
    assert message.startswith("--set model.tiny.patch_size: model.image_size 56 is not")
    (message,) = messages(write(tmp_path, HEAD + "model:\n  checkpoint: tiny\n  image_size: 57\n"))
    assert message.startswith(f"{file}:5: model.image_size: ")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("zero_optimisation: {}", "deepspeed.zero_optimisation: unknown key of DeepSpeed's config. Did you mean zero_optimization?"),
        ("zero_optimization: {overlap_com: true}", "Did you mean zero_optimization.overlap_comm?"),
        ("comms_loger: {}", "Did you mean comms_logger?"),
        ("comms_logger: {enable: true}", "Did you mean comms_logger.enabled?"),
        ("timers: {throughput: {enabld: true}}", "Did you mean timers.throughput.enabled?"),
        ("nonsense: 1", "deepspeed.nonsense: unknown key of DeepSpeed's config."),
        ("elasticity: {}", "deepspeed.elasticity: unknown key of DeepSpeed's config."),
        ("comms_logger: true", "deepspeed.comms_logger: got True; a mapping is allowed"),
        ("comet: {api_key: x}", "comet.api_key would be in every record; set COMET_API_KEY in the environment"),
        ("zero_optimization: {reduce_bucket_size: big}", "reduce_bucket_size: got 'big'; a number of 1 or more is allowed"),
        ("zero_optimization: {stage3_max_live_parameters: null}", "parameters: got None; a number of 0 or more is allowed"),
        ("zero_optimization: {stage3_max_live_parameters: -1}", "parameters: got -1; a number of 0 or more is allowed"),
        ("steps_per_print: true", "deepspeed.steps_per_print: got True; a number of 1 or more is allowed"),
        ("scheduler: {}", "scheduler can't be set here; use train.warmup_steps instead"),
    ],
)  # fmt: skip
def test_an_unknown_key_of_deepspeed_is_a_mistake_at_its_line(tmp_path, setting, expected):
    file = write(tmp_path, f"{HEAD}train:\n  deepspeed:\n    {setting}\n")
    (message,) = messages(file)
    assert message.startswith(f"{file}:5: train.deepspeed.")
    assert expected in message


@pytest.mark.ci
def test_the_known_keys_are_those_that_the_installed_deepspeed_reads():
    """A mapping that notes every key that is asked for, in a process of its own: deepspeed changes torch."""
    program = """
import json, os
os.environ["DS_ACCELERATOR"] = "cpu"
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime import config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

class Noting(dict):
    def __init__(self, values, asked=None):
        super().__init__(values)
        self.asked = set() if asked is None else asked
    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)
    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)
    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)
    def keys(self):
        return self
    def __copy__(self):
        return Noting(self, self.asked)

def asked(section=None):
    inner = Noting({})
    outer = Noting({"train_batch_size": 1} | ({section: inner} if section else {}))
    config.DeepSpeedConfig(outer)
    return sorted(inner.asked if section else outer.asked - set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS))

def fields(model):
    return sorted({*model.model_fields, *(field.alias or name for name, field in model.model_fields.items())})

found = {"": asked()}
for name in ("activation_checkpointing", "aio", "checkpoint", "data_types", "flops_profiler", "timers"):
    found[name] = asked(name)
for name, model in {
    "comet": CometConfig, "comms_logger": CommsLoggerConfig, "compile": CompileConfig,
    "csv_monitor": CSVConfig, "tensorboard": TensorBoardConfig, "wandb": WandbConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig, "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
}.items():
    found[name] = fields(model)
print("FOUND", json.dumps(found))
"""
    from harness.config import deepspeed_keys

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    found = json.loads(line.removeprefix("FOUND "))
    assert sorted(deepspeed_keys.top()) == found.pop("")
    assert {name: sorted(known) for name, known in deepspeed_keys.SECTIONS.items()} == found


@pytest.mark.parametrize(
    "what", ["choices: [.nan]", "low: 0, high: 1000000000000000000000", "low: .nan, high: 1"]
)
def test_a_study_is_read_as_carefully(tmp_path, what):
    write(tmp_path, f"{HEAD}model: {{checkpoint: tiny}}\n", "base.yaml")
    text = f"base: base.yaml\nspace:\n  train.weight_decay: {{{what}}}\n  predict.num_beams: {{{what}}}\n"
    file = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_study(file)
    assert all(problem.line in (3, 4) for problem in caught.value.problems)
