"""Each method at its own best temperature and rate: the runs of the smoke world, on a CPU.

    python docs/experiments/temperatures.py --jobs 2     all runs that are missing
    python docs/experiments/temperatures.py --cross      models of `single` read by each method
    python docs/experiments/temperatures.py --table      what the results say

A run is a method, a temperature, a learning rate and a seed. The seed makes the base (a warm start
of its own), the problems and the sampling. It trains for 80 steps and leaves one JSON file in
docs/experiments/results/temperatures; one that is there is not repeated.

Seeds 0 and 1 choose, on 250 test problems x 8 chains: seed 0 each method at six temperatures, seed
1 at the best three of these, then both at the best one with half and twice the rate. Seeds 2 to 6
compare: each method at what was chosen and at T = 0.9, read before and after on 1,000 problems, and
also by single tokens at T = 0.9 and 0.1. A choosing run takes about two minutes on one thread of an
AMD EPYC without bf16, a comparing one about three.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
import motg  # noqa: E402

RESULTS, RUNS = HERE / "results/temperatures", ROOT / "runs/temperatures"
METHODS = {
    "single": {"method": "single"},
    "dirichlet": {"method": "dirichlet"},
    "different-tokens": {"method": "different-tokens"},
    "multiplex": {"method": "multiplex"},
    "soft-thinking": {"method": "soft-thinking", "logprob": "exact"},
}
TEMPERATURES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.1)
RATE = motg.SMOKE["lr"]
RATES = (RATE / 2, RATE, RATE * 2)
CHOOSE, COMPARE = (0, 1), (2, 3, 4, 5, 6)  # seeds
STEPS = 80
LONG = ("single", "different-tokens", "soft-thinking")  # these train for 400 steps too
T95 = {2: 12.7, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t, by the number of seeds


class Run(NamedTuple):
    """One run; its file is named by it."""

    name: str
    temperature: float
    seed: int
    rate: float = RATE
    steps: int = STEPS

    @property
    def path(self):
        parts = [self.name.replace(" ", "-"), f"T={self.temperature}"]
        parts += [f"lr={self.rate:g}"] * (self.rate != RATE)
        parts += [f"steps={self.steps}"] * (self.steps != STEPS)
        return RESULTS / f"{'_'.join(parts)}.{self.seed}.json"

    def result(self):
        return json.loads(self.path.read_text()) if self.path.exists() else None


def base_of(seed):
    """The folder of the base of a seed; made once."""
    folder = RUNS / f"base-{seed}"
    if not (folder / "done").exists():
        for part in motg.warm_start(motg.make_config(smoke=True, seed=seed)):
            part.save_pretrained(folder)
        (folder / "done").touch()
    return str(folder)


def read_out(model, tokenizer, tests, seed, **how):
    """pass@k, standard error and probes of one way to read a model."""
    cfg = motg.make_config(smoke=True, seed=seed, **how)
    return motg.evaluate(model, tokenizer, cfg, torch.Generator(), tests)


def carry_out(run):
    """Train, read out, keep the result."""
    began, base = time.perf_counter(), base_of(run.seed)
    how = METHODS[run.name] | {"temperature": run.temperature}
    out = RUNS / run.path.stem
    settings = {"smoke": True, "seed": run.seed, "model": base, "out": str(out), "lr": run.rate}
    settings |= {"steps": run.steps, "eval_problems": 64, "save_every": 10**6, "resume": True}
    cfg = motg.make_config(**settings | how)
    motg.train(cfg)
    reads, compares = {"own": how}, run.seed in COMPARE
    if compares:
        for T in (0.9, 0.1):
            reads[f"single T={T}"] = {"method": "single", "temperature": T}
    cfg.eval_problems = 1000 if compares else 250
    found = {**run._asdict(), "problems": cfg.eval_problems}
    for when, folder in (("before", base), ("after", str(out / "checkpoint"))):
        model, tokenizer = motg.load_model(cfg, folder)
        tests = motg.test_problems(cfg, tokenizer)
        for read, settings in reads.items():
            if when == "after" or read == "own" and compares:
                found[f"{when}, {read}"] = read_out(model, tokenizer, tests, run.seed, **settings)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    logs = [json.loads(line) for line in lines]
    names = ("correct", "entropy", "support", "think_tokens", "grad_norm", "no_gradient")
    found["curves"] = {key: [float(f"{log[key]:.4g}") for log in logs] for key in names}
    git = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", "motg.py"]
    found["about"] = {
        "commit": subprocess.check_output(git, text=True).strip(),
        "processor": platform.processor() or platform.machine(),
        "torch": version("torch"),
        "seconds": round(time.perf_counter() - began),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    run.path.with_suffix(".new").write_text(json.dumps(found) + "\n")
    run.path.with_suffix(".new").rename(run.path)


def cross_path(temperature, seed):
    """Where the read-outs of a model that `single` has trained are kept."""
    return RESULTS / f"single_T={temperature}_read_by_all.{seed}.json"


def cross():
    """Reads the models of `single`, at T = 0.9 and at its best, by every method at T = 0.9 or at
    that method's best: how much of a gain is one of training, and how much of reading?"""
    for temperature in dict.fromkeys((0.9, best("single")[0])):
        for seed in COMPARE:
            path, run = cross_path(temperature, seed), Run("single", temperature, seed)
            folder = RUNS / run.path.stem / "checkpoint"
            if path.exists() or not run.path.exists() or not folder.exists():
                continue
            cfg = motg.make_config(smoke=True, seed=seed, eval_problems=1000)
            model, tokenizer = motg.load_model(cfg, str(folder))
            tests, found = motg.test_problems(cfg, tokenizer), {}
            for name, how in METHODS.items():
                T = 0.9 if temperature == 0.9 else best(name)[0]
                found[name] = {"temperature": T}
                found[name] |= read_out(model, tokenizer, tests, seed, **how, temperature=T)
            path.write_text(json.dumps(found) + "\n")
            print(time.strftime("%H:%M:%S"), path.name, flush=True)


def started(run):
    """One run in a process of its own, on one thread."""
    if run.path.exists():
        return
    RUNS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "temperatures.py"), "--run", json.dumps(run)]
    with (RUNS / f"{run.path.stem}.log").open("w") as log:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=False, env=env, stdout=log, stderr=log)
    print(time.strftime("%H:%M:%S"), *run, f"status {done.returncode}", flush=True)


def accuracies(runs, read="after, own", key="pass@1"):
    """The number `key` of the runs that are there."""
    found = [run.result() for run in runs]
    return [row[read][key] for row in found if row and read in row]


def best(name):
    """The temperature and the rate that the choosing seeds prefer; T = 0.3 until they are there."""
    mark = {T: accuracies([Run(name, T, s) for s in CHOOSE]) for T in TEMPERATURES}
    mark = {T: values for T, values in mark.items() if len(values) == len(CHOOSE)}
    if not mark:
        return 0.3, RATE
    T = max(mark, key=lambda T: mean(mark[T]))
    mark = {rate: accuracies([Run(name, T, s, rate) for s in CHOOSE]) for rate in RATES}
    return T, max(mark, key=lambda rate: mean(mark[rate] or [0]))


def three_best(name):
    """The temperatures that the first seed likes best."""
    first = {T: accuracies([Run(name, T, CHOOSE[0])]) for T in TEMPERATURES}
    return sorted(first, key=lambda T: -mean(first[T] or [0]))[:3]


def stages():
    """The runs, stage by stage: a stage needs the results of those before it."""
    first, *others = CHOOSE
    yield [Run(name, T, first) for T in TEMPERATURES for name in METHODS]
    yield [Run(name, T, seed) for seed in others for name in METHODS for T in three_best(name)]
    yield [Run(name, best(name)[0], seed) for seed in COMPARE for name in METHODS]
    yield [Run(name, 0.9, seed) for seed in COMPARE for name in METHODS]
    yield [Run(n, best(n)[0], s, rate) for s in CHOOSE for rate in RATES for n in METHODS]
    yield [Run(name, best(name)[0], s, best(name)[1]) for s in COMPARE for name in METHODS]
    yield [Run(name, best(name)[0], seed, steps=400) for seed in COMPARE for name in LONG]


def interval(values):
    """'mean ± 95% interval (number of seeds)'."""
    if len(values) < 2:
        return f"{values[0]:.3f} (1)" if values else ""
    half = T95.get(len(values), 2.78) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):.3f} ± {half:.3f} ({len(values)})"


def table():
    """Prints the Markdown tables: the choice, then the comparison."""
    print("The choosing seeds, read as trained:\n")
    print("| | " + " | ".join(f"T = {T}" for T in TEMPERATURES) + " | chosen |")
    print("|---" * (len(TEMPERATURES) + 2) + "|")
    for name in METHODS:
        cells = [accuracies([Run(name, T, s) for s in CHOOSE]) for T in TEMPERATURES]
        texts = [", ".join(f"{value:.3f}" for value in values) for values in cells]
        T, rate = best(name)
        print(f"| `{name}` | " + " | ".join(texts) + f" | T = {T}, {rate:g} |")
    reads = ("before, own", "after, own", "after, single T=0.9", "after, single T=0.1")
    for title, temperature in (("at its best", None), ("at T = 0.9", 0.9)):
        print(f"\nThe comparing seeds, each method {title}:\n")
        print("| | " + " | ".join((*reads, "pass@8")) + " |")
        print("|---" * 6 + "|")
        for name in METHODS:
            T, rate = (temperature, RATE) if temperature else best(name)
            runs = [Run(name, T, seed, rate) for seed in COMPARE]
            cells = [interval(accuracies(runs, read)) for read in reads]
            cells.append(interval(accuracies(runs, key="pass@8")))
            print(f"| `{name}`, T = {T}, {rate:g} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--cross", action="store_true", help="read single's models by all")
    parser.add_argument("--table", action="store_true", help="print the results")
    parser.add_argument("--run", help="one run, as JSON, in this process")
    a = parser.parse_args()
    if a.table:
        table()
    elif a.cross:
        torch.set_num_threads(1)
        cross()
    elif a.run:
        torch.set_num_threads(1)
        carry_out(Run(*json.loads(a.run)))
    else:
        with ThreadPoolExecutor(a.jobs) as pool:
            list(pool.map(base_of, (*CHOOSE, *COMPARE)))
            for runs in stages():
                list(pool.map(started, dict.fromkeys(runs)))


if __name__ == "__main__":
    main()
