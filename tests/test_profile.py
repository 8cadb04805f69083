"""`train.profile`: a trace and a table of some steps, which change nothing else."""

import gzip
import json
from collections import Counter

import pytest
import torch
from support.commands import harness
from support.experiments import EXPERIMENT
from support.reports import captions, data_of, record, write_run
from support.training import config, run

from harness import report
from harness.machine import device
from harness.training.profile import TABLE, TRACE

device.probe("cpu")


def operators(directory) -> Counter:
    """How often each operator is in the trace."""
    with gzip.open(directory / TRACE, "rt", encoding="utf-8") as file:
        return Counter(event.get("name") for event in json.load(file)["traceEvents"])


@pytest.mark.slow
def test_a_trace_has_the_steps_after_the_third_and_changes_no_result(tiny_folder, tmp_path):
    """Three steps an epoch: the profile of steps 4 to 6 ends with its epoch, before the validation."""
    plain, rows = run(tiny_folder, tmp_path / "plain", config(evaluate_every=0))
    found = {}
    for count in (1, 2, 5):
        place = tmp_path / str(count)
        profiled, again = run(tiny_folder, place, config(evaluate_every=0, profile=count))
        found[count] = operators(place)
        assert [row.get("loss") for row in again] == [row.get("loss") for row in rows]
        for name, weight in plain.model.state_dict().items():
            assert torch.equal(weight, profiled.model.state_dict()[name]), name
        assert "aten::addmm" in (place / TABLE).read_text()
        assert sorted(path.name for path in place.glob("profile*")) == [TRACE, TABLE]
    assert found[1]["aten::addmm"] > 0
    assert found[2]["aten::addmm"] == 2 * found[1]["aten::addmm"]
    assert found[5]["aten::addmm"] == 3 * found[1]["aten::addmm"]
    assert not list((tmp_path / "plain").glob("profile*"))


@pytest.mark.ci
def test_a_training_that_goes_on_after_these_steps_writes_none(tiny_folder, tmp_path):
    def stop(row):
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_folder, tmp_path, config(checkpoint_every_steps=4, profile=5), log=stop)
    assert not torch.autograd._profiler_enabled()
    run(tiny_folder, tmp_path, config(profile=5))
    assert not list(tmp_path.glob("profile*"))


def test_the_page_links_it(tmp_path):
    found = {name: f"steps/train-1/{name}" for name in (TABLE, TRACE)}
    page = report.write(write_run(tmp_path, record(artifacts=found), captions(2)))
    assert data_of(page)["profile"] == {name: f"../../{place}" for name, place in found.items()}
    assert data_of(report.write(write_run(tmp_path, record(), captions(2))))["profile"] == {}


@pytest.mark.slow
def test_a_run_names_it_in_its_record(tmp_path):
    (tmp_path / "small.yaml").write_text(EXPERIMENT.replace("variants:\n  opt: {}\n  opt_dedup", "#"))
    harness(tmp_path, "run", "small.yaml", "--set", "train.profile=2")
    (file,) = (tmp_path / "runs" / "small").glob("*/run.json")
    found = json.loads(file.read_text())["artifacts"]
    assert operators(tmp_path / "runs" / found[TRACE].removesuffix(TRACE))["aten::addmm"] > 0
    for link in data_of(file.parent / "report.html")["profile"].values():
        assert (file.parent / link).is_file()
