"""Studies of decoding on the quickstart's model: gain, cost, two workers or one, killed workers.

    OMP_NUM_THREADS=1 python benchmarks/study.py [--folder FOLDER] [--kills 10]

Works in FOLDER, by default a temporary one. If the quickstart has run there, its training is not repeated.
"""

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
TRIALS = 20
BASE = ["--base", "experiments/quickstart.yaml", "--variant", "opt_224"]


def command(file: str, *more: str) -> list[str]:
    """The study command of this Python on the quickstart's model."""
    return [sys.executable, "-m", "harness", "study", file, *BASE, "--format", "json", *more]


def study(
    folder: Path, name: str, *more: str, sampler: str = "random", trials: int = TRIALS
) -> tuple[list[dict], float]:
    """Run a study of the shipped space under a name; returns its rows and the seconds of the command."""
    file = folder / "experiments" / f"{name}.yaml"
    text = yaml.safe_load((EXPERIMENTS / "study_decoding.yaml").read_text())
    file.write_text(yaml.safe_dump(text | {"sampler": {"name": sampler, "seed": 1}, "retries": 20}))
    begun = time.perf_counter()
    done = subprocess.run(
        command(f"experiments/{name}.yaml", "--trials", str(trials), *more),
        cwd=folder,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return json.loads(done.stdout), time.perf_counter() - begun


def forget(folder: Path) -> None:
    """Remove captions and scores, so that the next study makes them again."""
    for step in (folder / "runs" / "steps").iterdir():
        if step.name.startswith(("predict-", "postprocess-", "score-")):
            shutil.rmtree(step) if step.is_dir() else step.unlink()
    cache = folder / "runs" / "cache"
    shutil.rmtree(cache / "scored", ignore_errors=True)
    for file in [*cache.glob("scores.sqlite*"), *cache.glob("embeddings-*")]:
        file.unlink()


def by_slot(rows: list[dict]) -> list[tuple[dict, dict]]:
    """Parameters and scores of the finished trials, in the order of their first tries.

    Scores have 6 digits, since the last bits depend on which texts were embedded before.
    """
    done = [row for row in rows if row["state"] == "COMPLETE"]
    done.sort(key=lambda row: row["number"] if row["retry_of"] is None else row["retry_of"])
    return [(row["params"], {k: round(v, 6) for k, v in row["values"].items()}) for row in done]


def finished(folder: Path, name: str) -> dict[int, dict]:
    """The scores of a study's finished trials, by number."""
    files = (folder / "runs" / "quickstart" / name).glob("trial-*/run.json")
    trials = [json.loads(file.read_text())["trial"] for file in files]
    return {trial["number"]: trial["values"] for trial in trials if trial["state"] == "COMPLETE"}


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The live workers of a study command."""
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.Error):  # a zombie has no command line
                found += [child] if "study" in child.cmdline() else []
    return found


def killed(folder: Path, name: str, kills: int) -> tuple[list[dict], int]:
    """Run a study of two workers and kill workers at random, `kills` times in total.

    Trials are added until all kills are done. Returns the final rows, and how many finished trials were lost.
    """
    draw, seen, lost, done, trials = random.Random(0), {}, 0, 0, TRIALS
    (folder / "experiments" / f"{name}.yaml").write_text((folder / "experiments" / "one.yaml").read_text())
    while done < kills:
        arguments = command(f"experiments/{name}.yaml", "--trials", str(trials), "--workers", "2")
        running = subprocess.Popen(arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        while running.poll() is None and done < kills:
            time.sleep(draw.uniform(4, 14))
            if workers := workers_of(running):
                draw.choice(workers).kill()
                done += 1
            now = finished(folder, name)
            lost += sum(now.get(number) != values for number, values in seen.items())
            seen = now
        running.communicate()
        trials += 10 if done < kills else 0
    rows, _ = study(folder, name, "--workers", "2", trials=trials)
    return rows, lost


def main(folder: Path, kills: int) -> None:
    """Run everything and print the results."""
    (folder / "experiments").mkdir(exist_ok=True, parents=True)
    for file in EXPERIMENTS.glob("*.yaml"):
        shutil.copy(file, folder / "experiments")
    subprocess.run(command("experiments/study_decoding.yaml", "--trials", "1"), cwd=folder, check=True)
    trained = sorted((folder / "runs" / "steps").glob("train-*/DONE"))
    forget(folder)

    rows, seconds = study(folder, "gain", sampler="tpe")
    scores = [row["values"]["bertscore"] for row in rows]
    print(f"{TRIALS} trials of decoding: BERTScore {scores[0]:.4f} (base) -> {max(scores):.4f}")
    print(f"  {seconds:.0f} s in all, {sum(row['seconds'] for row in rows) / len(rows):.1f} s a trial")

    forget(folder)
    one, alone = study(folder, "one")
    forget(folder)
    two, together = study(folder, "two", "--workers", "2")
    same = by_slot(one) == by_slot(two)
    print(f"one worker   {60 * TRIALS / alone:.1f} trials a minute")
    print(f"two workers  {60 * TRIALS / together:.1f} trials a minute, the same results: {same}")

    forget(folder)
    rows, done, lost = killed(folder, "killed", kills)
    same, failed = by_slot(rows) == by_slot(one), sum(row["state"] == "FAIL" for row in rows)
    print(
        f"{done} workers killed: {lost} finished trials lost, {failed} tried again, the same results: {same}"
    )
    again = len(sorted((folder / "runs" / "steps").glob("train-*/DONE"))) - len(trained)
    print(f"training steps run by all of these: {again}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(given.folder or Path(temporary), given.kills)
