"""Early stopping: when a stage ends, what the next one starts from, and interruptions."""

import json

import pytest
import torch
from support import ranks
from support.experiments import EXPERIMENT, messages, write
from support.models import stages
from support.training import Interrupted, config, run

from harness.training import patience, schedule
from harness.training.resume import State

SCORES = {1: [1.0, 3.0, 2.0, 3.0, 9.0, 9.0], 2: [5.0, 4.0, 3.0, 9.0]}
"""Primary scores after each epoch of the two stages; those of 9 are of epochs that patience leaves out."""
SETTINGS = config(stages=stages(6, 4), patience=2)


class Scripted:
    """Scores by step, as a model of these weights would have; an interruption does not change them."""

    def __init__(self, stop=None):
        self.step, self.stop = 0, stop

    def log(self, row):
        self.step = row["step"]
        if self.stop and self.stop(row):
            self.stop = None
            raise Interrupted

    def evaluate(self):
        epoch = self.step // 3  # of all stages: the first one ends after 4
        return {"valid_primary": SCORES[1][epoch - 1] if epoch <= 4 else SCORES[2][epoch - 5]}


def comparable(rows):
    return [{k: v for k, v in row.items() if k not in ("time", "images_per_second")} for row in rows]


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """The best weights and the rows of a training whose stages end after 4 and 3 epochs."""
    script = Scripted()
    folder = tmp_path_factory.mktemp("patience")
    how = {"log": script.log, "evaluate": script.evaluate, "dropout": 0.1}
    loaded, rows = run(tiny_folder, folder, SETTINGS, **how)
    return loaded.model.state_dict(), comparable(rows)


@pytest.mark.ci
def test_each_stage_ends_after_its_own_validations_without_a_better_score(whole):
    _, rows = whole
    validations = [row for row in rows if "valid_loss" in row]
    epochs = [(row["stage"], row["epoch"], row["waited"]) for row in validations]
    assert epochs == [(1, 1, 0), (1, 2, 0), (1, 3, 1), (1, 4, 2), (2, 1, 0), (2, 2, 1), (2, 3, 2)]
    ended = patience.ended(SETTINGS, rows)
    assert patience.described(ended) == [
        "stage 1 ended after epoch 4 of 6: 2 validations without a better score (train.patience)",
        "stage 2 ended after epoch 3 of 4: 2 validations without a better score (train.patience)",
    ]
    assert patience.saved(ended) == 3
    assert schedule.total_steps(SETTINGS, 20, 3) == rows[-1]["step"] == 21


@pytest.mark.ci
def test_up_to_its_end_a_stage_is_the_same_as_without_patience(tiny_folder, whole, tmp_path):
    """The learning rate too; the first stage of a training that ends there is the other's first epochs."""
    script = Scripted(lambda row: row["step"] == 13)
    settings = config(stages=stages(6, 0))
    with pytest.raises(Interrupted):
        run(tiny_folder, tmp_path / "other", settings, log=script.log, dropout=0.1)
    kept = (tmp_path / "other" / "losses.jsonl").read_text().splitlines()
    steps = [row for row in comparable(map(json.loads, kept)) if "loss" in row][:12]
    assert steps == [row for row in whole[1] if "loss" in row][:12]
    rates = [row["learning_rate"] for row in steps[-3:]]
    assert min(rates) > 0.1 * SETTINGS.learning_rate  # the cosine of 6 epochs has not ended


@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(lambda row: row["step"] == 12 and "valid_loss" in row, marks=pytest.mark.ci),
        pytest.param(lambda row: row["step"] == 13, marks=pytest.mark.ci),
        pytest.param(lambda row: row["step"] == 21 and "valid_loss" in row, marks=pytest.mark.slow),
    ],
    ids=["in the validation that ends a stage", "in the next stage", "at the end"],
)
def test_an_interruption_changes_neither_the_end_of_a_stage_nor_a_bit(tiny_folder, whole, tmp_path, stop):
    script = Scripted(stop)
    how = {"log": script.log, "evaluate": script.evaluate, "dropout": 0.1}
    with pytest.raises(Interrupted):
        run(tiny_folder, tmp_path / "parts", SETTINGS, **how)
    resumed, rows = run(tiny_folder, tmp_path / "parts", SETTINGS, **how)
    assert comparable(rows) == whole[1]
    for name, weight in whole[0].items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


@pytest.mark.slow
def test_all_ranks_end_a_stage_together(tiny_folder, tmp_path):
    settings = ranks.TRAIN | {"evaluate_every": 1, "patience": 2}
    ranks.train(tiny_folder, tmp_path / "early", train=settings, scores=[3, 2, 1, 1, 1, 1])
    found = [(row["stage"], row["epoch"]) for row in ranks.rows(tmp_path / "early") if "valid_loss" in row]
    assert found == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]


@pytest.mark.parametrize("scores", [[1, 2, 3], [3, 2, 1, 0], [1, 1, 1, 2, 2, 3, 1, 1], [2, 1, 2, 3, 3, 3, 3]])
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_counting_agrees_with_a_search_of_the_whole_sequence(scores, limit):
    def waited(seen):
        return len(seen) - 1 - seen.index(max(seen))

    state = State()
    patience.begin(state)
    for end in range(1, len(scores) + 1):
        patience.count(state, scores[end - 1])
        assert state.waited == waited(scores[:end])
        assert patience.is_over(config(patience=limit), state.waited) == (waited(scores[:end]) >= limit)
        assert not patience.is_over(config(), state.waited)


def test_patience_without_validations_is_refused(tmp_path):
    file = write(tmp_path, EXPERIMENT)
    (problem,) = messages(file, "train.patience=2", "train.evaluate_every=0")
    assert "patience counts validations with scores, but evaluate_every is 0; use 1 or more" in problem
