"""Each method at its own best temperature and rate, in two small worlds, on a CPU.

    python docs/experiments/temperatures.py --jobs 2     all runs that are missing
    python docs/experiments/temperatures.py --cross      models of `single` read by each method
    python docs/experiments/temperatures.py --table      what the results say

A run is a method, a temperature, a learning rate and a seed. The seed makes the base (a warm start
of its own), the problems and the sampling. It trains for 80 steps and leaves one JSON file in
docs/experiments/results/temperatures; one that is there is not repeated.

Seeds 0 to 4 train every method at every temperature, and are read on 250 test problems x 8 chains.
They choose each method's temperature, and seeds 0 and 1 its learning rate there. Seeds 5 to 9
compare: each method at what was chosen for it, read before and after on 1,000 problems. Nothing is
chosen for the paper's T = 0.9: there seeds 0 to 4 compare. Seeds 10 to 14 compare scores there.
Seeds 15 to 19 compare half the chains there, and train at T = 0.1 for 400 steps. In the world of
paths.py seeds 0 to 4 compare methods at three temperatures, and read each model that was trained at
T = 0.9 by every method. A run takes about a minute on one thread of an AMD EPYC with bf16, one that
is read on 1,000 problems two, and 400 steps take four.

A seed makes the same base each time on the same kind of processor. The bases of the results of
seeds 0 to 14, and of paths.py, are others: two threads made them, and shared one random generator.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "docs/tools")]
import paths  # noqa: E402
from controls import add_controls  # noqa: E402
from field import motg  # noqa: E402
from warm_start import warm_start  # noqa: E402

RESULTS, RUNS = HERE / "results/temperatures", ROOT / "runs/temperatures"
METHODS = {
    "single": {"method": "single"},
    "dirichlet": {"method": "dirichlet"},
    "different-tokens": {"method": "different-tokens"},
    "multiplex": {"method": "multiplex"},
    "soft-thinking": {"method": "soft-thinking", "logprob": "exact"},
    "soft-thinking weighted": {"method": "soft-thinking", "logprob": "weighted"},
}
# What of a mixture matters? These run at T = 0.9.
CONTROLS = {
    "noise": {"method": "dirichlet", "sampling": "stranger"},  # of that size; it knows nothing of p
    "shuffled": {"method": "dirichlet", "aggregation": "shuffled"},
    "uniform": {"method": "dirichlet", "aggregation": "uniform"},
    "dirichlet c=0.1": {"method": "dirichlet", "concentration": 0.1},
    "dirichlet c=10": {"method": "dirichlet", "concentration": 10.0},
    "different-tokens k=4": {"method": "different-tokens", "k": 4},
    "different-tokens k=8": {"method": "different-tokens", "k": 8},
}
# Which score should a step have? Beside those of METHODS, at T = 0.9.
SCORES = {
    "dirichlet weighted": {"method": "dirichlet", "logprob": "weighted"},
    "dirichlet exact": {"method": "dirichlet", "logprob": "exact"},
    "multiplex representative": {"method": "multiplex", "logprob": "representative"},
    "multiplex weighted": {"method": "multiplex", "logprob": "weighted"},
    "multiplex exact+1": {"method": "multiplex", "logprob": "exact", "weight_passes": 1},
}
for method in ("different-tokens", "soft-thinking"):
    for score, passes in (("representative", 0), ("exact", 0), ("exact", 1)):
        how = {"method": method, "logprob": score, "weight_passes": passes}
        SCORES[f"{method} {score}{'+1' * passes}"] = how
del SCORES["soft-thinking exact"]  # METHODS has it
HOW = METHODS | CONTROLS | SCORES
TEMPERATURES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.1)
RATE = motg.make_config(smoke=True).lr
RATES = (RATE / 2, RATE, RATE * 2)
CHOOSE, COMPARE = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)  # seeds
RATED = CHOOSE[:2]  # seeds that choose the rate
SCORED = (10, 11, 12, 13, 14)  # seeds that compare scores
LATER = (15, 16, 17, 18, 19)  # seeds that halve the chains at T = 0.9, and train long at T = 0.1
PATHS = ("single", "dirichlet", "different-tokens", "multiplex", "soft-thinking")
PATHS_T = (0.9, 0.1, 0.5)
PAPER_T = 0.9  # the paper's temperature; the choosing seeds compare there
COLD_T = 0.1
TASKS = {"sums": {}, "paths": {"task": "shortest_path", "task_settings": paths.SETTINGS}}
STEPS, CHAINS = 80, 8
# What is drawn in a thought? These read a model that `single` has trained at T = 0.9.
DRAWN = {
    "everything is drawn": {"method": "single"},
    "the thought's tokens are the likeliest": {"method": "soft-thinking", "k": 1},
    "the thought's tokens are mixed": {"method": "soft-thinking"},
    "likeliest, and so is the end": {"method": "soft-thinking", "k": 1, "end": "most-likely"},
    "mixed, and the end is the likeliest": {"method": "soft-thinking", "end": "most-likely"},
    "single tokens, a cold thought": {
        "method": "single",
        "temperature": 0.1,
        "answer_temperature": 0.9,
    },
    "single tokens, all cold": {"method": "single", "temperature": 0.1},
}
LONG = [(name, CHOOSE) for name in ("single", "different-tokens", "soft-thinking")]
LONG += [(name, SCORED) for name in ("single", "multiplex")]  # these train for 400 steps too
COLD = ("single", "different-tokens", "multiplex")  # and these at T = 0.1
HALVED = ("single", "dirichlet", "different-tokens", "multiplex")  # these with 4 chains at T = 0.9
WIDE = ("single", "different-tokens", "multiplex")  # at T = 0.9 these are read with 32 chains too
T95 = {2: 12.7, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t, by the number of seeds


class Run(NamedTuple):
    """One run; its file is named by it."""

    name: str
    temperature: float
    seed: int
    rate: float = RATE
    steps: int = STEPS
    chains: int = CHAINS
    world: str = "sums"  # or "paths", the world of paths.py

    @property
    def path(self):
        parts = [self.world] * (self.world != "sums")
        parts += [self.name.replace(" ", "-"), f"T={self.temperature}"]
        parts += [f"lr={self.rate:g}"] * (self.rate != RATE)
        parts += [f"steps={self.steps}"] * (self.steps != STEPS)
        parts += [f"chains={self.chains}"] * (self.chains != CHAINS)
        return RESULTS / f"{'_'.join(parts)}.{self.seed}.json"

    def result(self):
        return json.loads(self.path.read_text()) if self.path.exists() else None


def base_of(seed, world="sums"):
    """The folder of the base of a seed; made once."""
    folder = RUNS / (f"base-{seed}" if world == "sums" else f"{world}-base-{seed}")
    if not (folder / "done").exists():
        more = (paths.words(), paths.demonstrate) if world == "paths" else ()
        cfg = motg.make_config(smoke=True, seed=seed, **TASKS[world])
        for part in warm_start(cfg, *more):
            part.save_pretrained(folder)
        (folder / "done").touch()
    return str(folder)


def commit_of():
    """The last commit that changed motg.py; MOTG_COMMIT says it where there is no git."""
    git = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", "motg.py"]
    return os.environ.get("MOTG_COMMIT") or subprocess.check_output(git, text=True).strip()


def processor():
    """Its name, as Linux gives it."""
    names = re.findall("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    return names[0] if names else platform.machine()


def read_out(model, tokenizer, tests, seed, **how):
    """pass@k, standard error and probes of one way to read a model."""
    cfg = motg.make_config(smoke=True, seed=seed, **how)
    return motg.evaluate(model, tokenizer, cfg, torch.Generator(), tests)


def read_outs(run):
    """(name, which model, settings) of each way in which a run is read."""
    own, cold = {"temperature": run.temperature}, {"temperature": COLD_T}
    warm = {"temperature": PAPER_T}
    if run.seed in COMPARE or run.world == "paths":
        yield "before, own", "before", own
    yield "after, own", "after", own
    if run.temperature == PAPER_T:
        yield "after, cold", "after", cold
    elif run.seed in COMPARE:
        yield "after, warm", "after", warm
    wide = (run.name in WIDE, run.temperature, run.steps) == (True, PAPER_T, STEPS)
    if run.world == "paths" and run.temperature == PAPER_T and run.name in PATHS:
        for name in PATHS:
            yield f"after, by {name}", "after", METHODS[name] | own
    elif run.seed in CHOOSE and wide:
        yield "after, 32 chains", "after", own | {"chains": 32}


def carry_out(run):
    """Train, read out, keep the result."""
    began, base = time.perf_counter(), base_of(run.seed, run.world)
    add_controls()
    how = HOW[run.name] | {"temperature": run.temperature}
    out = RUNS / run.path.stem
    settings = {"smoke": True, "seed": run.seed, "model": base, "out": str(out), "lr": run.rate}
    settings |= {"steps": run.steps, "chains": run.chains, "resume": True}
    settings |= {"eval_problems": 64, "save_every": 10**6}
    cfg = motg.make_config(**settings | TASKS[run.world] | how)
    motg.train(cfg)
    cfg.eval_problems = 1000 if run.seed in COMPARE else 250
    found = {**run._asdict(), "problems": cfg.eval_problems}
    folders = {"before": base, "after": str(out / "checkpoint")}
    models = {when: motg.load_model(cfg, folder) for when, folder in folders.items()}
    for name, when, more in read_outs(run):
        model, tokenizer = models[when]
        tests = motg.test_problems(cfg, tokenizer)
        found[name] = read_out(model, tokenizer, tests, run.seed, **how | more)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    logs = [json.loads(line) for line in lines]
    names = ("correct", "entropy", "support", "think_tokens", "grad_norm", "no_gradient")
    found["curves"] = {key: [float(f"{log[key]:.4g}") for log in logs] for key in names}
    found["about"] = {
        "commit": commit_of(),
        "processor": processor(),
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
    for at_paper in (True, False):
        for run in compared("single", PAPER_T if at_paper else None):
            path = cross_path(run.temperature, run.seed)
            folder = RUNS / run.path.stem / "checkpoint"
            if path.exists() or not run.path.exists() or not folder.exists():
                continue
            problems = run.result()["problems"]
            cfg = motg.make_config(smoke=True, seed=run.seed, eval_problems=problems)
            model, tokenizer = motg.load_model(cfg, str(folder))
            tests, found = motg.test_problems(cfg, tokenizer), {}
            for name, how in METHODS.items():
                T = PAPER_T if at_paper else best(name)[0]
                found[name] = {"temperature": T}
                found[name] |= read_out(model, tokenizer, tests, run.seed, **how, temperature=T)
            for name, how in DRAWN.items() if at_paper else ():
                found[name] = read_out(model, tokenizer, tests, run.seed, **how)
            path.write_text(json.dumps(found) + "\n")
            print(time.strftime("%H:%M:%S"), path.name, flush=True)


def in_a_process(name, *flags):
    """This script with these flags, on one thread; its output goes to runs/temperatures/NAME.log.
    Bases too, for a warm start sets the seed of torch, which threads would share."""
    RUNS.mkdir(parents=True, exist_ok=True)
    with (RUNS / f"{name}.log").open("w") as log:
        command = [sys.executable, str(HERE / "temperatures.py"), *flags]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=False, env=env, stdout=log, stderr=log)
    print(time.strftime("%H:%M:%S"), name, f"status {done.returncode}", flush=True)


def carry_out_all(runs, jobs):
    """The runs that are missing, and before them the bases that they need."""
    runs = [run for run in runs if not run.path.exists()]
    bases = sorted({(run.seed, run.world) for run in runs})
    with ThreadPoolExecutor(jobs) as pool:
        for base in bases:
            pool.submit(in_a_process, "base-{}-{}".format(*base), "--base", json.dumps(base))
    with ThreadPoolExecutor(jobs) as pool:
        for run in runs:
            pool.submit(in_a_process, run.path.stem, "--run", json.dumps(run))


def accuracies(runs, read="after, own", key="pass@1"):
    """The number `key` of the runs that are there."""
    found = [run.result() for run in runs]
    return [row[read][key] for row in found if row and read in row]


def best(name):
    """The temperature and the rate that the choosing seeds prefer; T = 0.1 until they are there."""
    mark = {T: accuracies([Run(name, T, s) for s in CHOOSE]) for T in TEMPERATURES}
    mark = {T: values for T, values in mark.items() if len(values) == len(CHOOSE)}
    if not mark:
        return COLD_T, RATE
    T = max(mark, key=lambda T: mean(mark[T]))
    mark = {rate: accuracies([Run(name, T, s, rate) for s in RATED]) for rate in RATES}
    mark = {rate: values for rate, values in mark.items() if len(values) == len(RATED)}
    return T, max(mark, key=lambda rate: mean(mark[rate]))


def stages():
    """The runs, stage by stage: a stage needs the results of those before it."""
    *most, last = TEMPERATURES
    yield [Run(name, T, seed) for seed in CHOOSE for T in most for name in METHODS]
    yield [Run(name, last, seed) for seed in CHOOSE for name in METHODS]
    for rate in (RATES[0], RATES[2]):
        yield [Run(name, best(name)[0], seed, rate) for seed in RATED for name in METHODS]
    yield [Run(name, *at(name, seed)) for seed in COMPARE for name in METHODS]
    yield [Run(name, PAPER_T, seed, steps=400) for name, seeds in LONG for seed in seeds]
    yield [Run(name, PAPER_T, seed) for seed in CHOOSE for name in CONTROLS]
    yield [Run(name, *at(name, seed), chains=CHAINS // 2) for seed in COMPARE for name in METHODS]
    yield [Run(name, PAPER_T, seed) for seed in SCORED for name in METHODS | SCORES]
    for chains in (CHAINS // 2, CHAINS):
        yield [Run(name, PAPER_T, seed, chains=chains) for seed in LATER for name in HALVED]
    yield [Run(name, COLD_T, s, steps=n) for s in LATER for n in (STEPS, 400) for name in COLD]
    for T in PATHS_T:
        names = (*PATHS, "noise") if T == PAPER_T else PATHS
        yield [Run(name, T, seed, world="paths") for seed in CHOOSE for name in names]


def at(name, seed):
    """T, seed and rate of a comparing run."""
    T, rate = best(name)
    return T, seed, rate


def interval(values, sign=""):
    """'mean ± half of a 95% interval over seeds', or the mean alone of one."""
    if len(values) < 2:
        return f"{values[0]:{sign}.3f}" if values else ""
    half = T95[len(values)] * stdev(values) / len(values) ** 0.5
    return f"{mean(values):{sign}.3f} ± {half:.3f}"


def markdown(header, rows):
    """A table of strings."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def temperature_table():
    """Accuracy of the choosing seeds by method and temperature."""
    rows = []
    for name in METHODS:
        runs = [[Run(name, T, seed) for seed in CHOOSE] for T in TEMPERATURES]
        rows.append([f"`{name}`", *(interval(accuracies(cell)) for cell in runs)])
    return markdown(["", *(f"T = {T}" for T in TEMPERATURES)], rows)


def lead_table():
    """The same, minus `single` at the same temperature, seed by seed."""
    rows = []
    for name in list(METHODS)[1:]:
        cells = [
            differences([Run(name, T, s) for s in CHOOSE], [Run("single", T, s) for s in CHOOSE])
            for T in TEMPERATURES
        ]
        rows.append([f"`{name}`", *(interval(cell, "+") for cell in cells)])
    return markdown(["minus `single`", *(f"T = {T}" for T in TEMPERATURES)], rows)


def group_table():
    """Accuracy minus that of `single` at T = 0.9, by group of bases."""
    groups = {"0 to 4": CHOOSE, "10 to 14": SCORED, "15 to 19": LATER}
    rows = []
    for name in list(METHODS)[1:]:
        cells = []
        for seeds in groups.values():
            runs = [Run(name, PAPER_T, seed) for seed in seeds]
            cells.append(
                interval(differences(runs, [r._replace(name="single") for r in runs]), "+")
            )
        rows.append([f"`{name}`", *cells])
    return markdown(["minus `single`, T = 0.9", *(f"seeds {name}" for name in groups)], rows)


def rate_table():
    """Half and twice the learning rate at each method's best temperature."""
    rows = []
    for name in METHODS:
        T, chosen = best(name)
        cells = [accuracies([Run(name, T, seed, rate) for seed in RATED]) for rate in RATES]
        shown = [", ".join(f"{x:.3f}" for x in cell) for cell in cells]
        rows.append([f"`{name}`", T, *shown, f"{chosen:g}"])
    return markdown(["", "T", *(f"{rate:g}" for rate in RATES), "chosen"], rows)


def diversity_table():
    """pass@k at T = 0.9, read as trained and at T = 0.1; with 32 chains where that was read."""
    rows = []
    for name in METHODS:
        runs, cells = compared(name, PAPER_T), []
        for read in ("after, own", "after, cold"):
            cells += [interval(accuracies(runs, read, f"pass@{k}")) for k in (1, 8)]
        cells.append(interval(accuracies(runs, "after, 32 chains", "pass@32")))
        rows.append([f"`{name}`", *cells])
    header = ["right", "pass@8", "right, read at T = 0.1", "pass@8, read at T = 0.1", "pass@32"]
    return markdown(["trained at T = 0.9", *header], rows)


def long_table():
    """80 and 400 steps at T = 0.9, read as trained and at T = 0.1."""
    rows = []
    for name, seeds in LONG:
        runs = {
            steps: [Run(name, PAPER_T, s, steps=steps) for s in seeds] for steps in (STEPS, 400)
        }
        both = [pair for pair in zip(*runs.values()) if all(run.path.exists() for run in pair)]
        cells = [
            interval(accuracies([pair[n] for pair in both], read))
            for read in ("after, own", "after, cold")
            for n in (0, 1)
        ]
        single = [run._replace(name="single") for run in runs[400]]
        ahead = interval(differences(runs[400], single), "+") if name != "single" else ""
        found = [run.seed for run, _ in both]
        rows.append([f"`{name}`", f"{found[0]} to {found[-1]}" if found else "", *cells, ahead])
    header = [f"{read}, {n} steps" for read in ("as trained", "at T = 0.1") for n in (STEPS, 400)]
    return markdown(["", "seeds", *header, "400 steps, minus `single`"], rows)


def half_table():
    """Half the chains, at each method's best temperature and at T = 0.9."""
    rows = []
    for names, runs_of in ((METHODS, compared), (HALVED, later)):
        single = runs_of("single")
        for name in names:
            whole = runs_of(name)
            half = [run._replace(chains=CHAINS // 2) for run in whole]
            cells = [interval(accuracies(runs)) for runs in (half, whole)]
            cells += [interval(differences(half, runs), "+") for runs in (whole, single)]
            rows.append([f"`{name}`", whole[0].temperature, len(accuracies(half)), *cells])
    header = ["4 chains", "8 chains", "4 minus 8 chains", "minus `single` with 8"]
    return markdown(["", "T", "seeds", *header], rows)


def later(name):
    """The runs of a method at T = 0.9 from the bases made last."""
    return [Run(name, PAPER_T, seed) for seed in LATER]


def cold_table():
    """80 and 400 steps at T = 0.1."""
    rows = []
    for name in COLD:
        cells = []
        for steps in (STEPS, 400):
            runs = [Run(name, COLD_T, seed, steps=steps) for seed in LATER]
            single = [run._replace(name="single") for run in runs]
            minus = interval(differences(runs, single), "+") if name != "single" else ""
            cells += [interval(accuracies(runs)), minus]
        rows.append([f"`{name}`", len(accuracies(runs)), *cells])
    header = [f"{n} steps{more}" for n in (STEPS, 400) for more in ("", ", minus `single`")]
    return markdown(["", "seeds", *header], rows)


def compared(name, temperature=None):
    """The comparing runs of a method, at its best or at the paper's temperature."""
    if temperature is None:
        return [Run(name, *at(name, seed)) for seed in COMPARE]
    return [Run(name, temperature, seed) for seed in CHOOSE]


def differences(runs, others, read="after, own"):
    """Accuracy of runs minus that of others, seed by seed, where both are there."""
    both = [(a.result(), b.result()) for a, b in zip(runs, others)]
    return [x[read]["pass@1"] - y[read]["pass@1"] for x, y in both if x and y]


def comparison_table():
    """Of the comparing seeds: before, after, minus `single`, pass@8; and the same read at 0.9."""
    rows, single = [], compared("single")
    for name in METHODS:
        runs = compared(name)
        T, rate = runs[0].temperature, runs[0].rate
        cells = [interval(accuracies(runs, read)) for read in ("before, own", "after, own")]
        cells.append("" if name == "single" else interval(differences(runs, single), "+"))
        cells.append(interval(accuracies(runs, key="pass@8")))
        for key in ("pass@1", "pass@8"):
            cells.append(interval(accuracies(runs, "after, warm", key)))
        rows.append([f"`{name}`", T, f"{rate:g}", len(accuracies(runs)), *cells])
    header = ["", "T", "rate", "seeds", "before", "after", "minus `single`", "pass@8"]
    return markdown([*header, "read at T = 0.9", "pass@8 there"], rows)


def cross_table():
    """A model that `single` has trained, read by each method, beside the method's own model."""
    rows = []
    for temperature in (PAPER_T, None):
        trained = compared("single", temperature)
        for n, name in enumerate(METHODS):
            pairs = []  # accuracy of single's model and of the method's own, a pair a seed
            for single, own in zip(trained, compared(name, temperature)):
                path = cross_path(single.temperature, single.seed)
                if n and path.exists() and own.path.exists():
                    other = json.loads(path.read_text())[name]["pass@1"]
                    pairs.append((other, own.result()["after, own"]["pass@1"]))
            if pairs:
                cells = [interval(list(values)) for values in zip(*pairs)]
                cells.append(interval([y - x for x, y in pairs], "+"))
                rows.append([f"`{name}`, T = {own.temperature}", len(pairs), *cells])
    header = ["both read by", "seeds", "trained by `single`", "trained by that method"]
    return markdown([*header, "difference"], rows)


def drawn_table():
    """What is drawn in a thought, of models that `single` has trained at T = 0.9."""
    paths = [cross_path(PAPER_T, seed) for seed in CHOOSE]
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    rows = []
    for name in DRAWN:
        reads = [row[name] for row in found if name in row]
        if reads:
            minus = [
                read["pass@1"] - row["everything is drawn"]["pass@1"]
                for read, row in zip(reads, found)
            ]
            cells = [interval([read[key] for read in reads]) for key in ("pass@1", "pass@8")]
            rows.append([name, len(reads), cells[0], interval(minus, "+"), cells[1]])
    return markdown(["", "seeds", "right", "minus the first row", "pass@8"], rows)


def control_table():
    """The controls at T = 0.9, before and after, and minus `single`."""
    rows, single = [], compared("single", PAPER_T)
    for name in ("dirichlet", "different-tokens", *CONTROLS):
        runs = compared(name, PAPER_T)
        cells = [interval(accuracies(runs)), interval(differences(runs, single), "+")]
        rows.append([name, len(accuracies(runs)), *cells])
    return markdown(["", "seeds", "right", "minus `single`"], rows)


def score_table():
    """Every score of every method at T = 0.9, and minus the method's `representative`, by seed."""
    rows = []
    for name in METHODS | SCORES:
        method = HOW[name]["method"]
        score = motg.make_config(smoke=True, **HOW[name]).logprob
        passes = ", one pass" if HOW[name].get("weight_passes") else ""
        runs = [Run(name, PAPER_T, seed) for seed in SCORED]
        usual = f"{method} representative"
        own = [run._replace(name=usual if usual in SCORES else method) for run in runs]
        right = accuracies(runs)
        if right:
            minus = interval(differences(runs, own), "+") if runs != own else ""
            cells = [interval(right), f"{min(right):.2f}", minus]
            rows.append([f"`{method}`", score + passes, len(right), *cells])
    order = list(dict.fromkeys(f"`{how['method']}`" for how in METHODS.values()))
    kinds = ("representative", "weighted", "exact", "exact, one pass")
    rows.sort(key=lambda row: (order.index(row[0]), kinds.index(row[1])))
    return markdown(["", "score", "seeds", "right", "worst seed", "minus `representative`"], rows)


def paths_table():
    """The world of paths.py: methods by temperature, and minus `single` at the same one."""
    rows = []
    for name in (*PATHS, "noise"):
        cells = {T: [Run(name, T, seed, world="paths") for seed in CHOOSE] for T in sorted(PATHS_T)}
        shown = [interval(accuracies(runs)) for runs in cells.values()]
        for runs in cells.values():
            single = [run._replace(name="single") for run in runs]
            shown.append(interval(differences(runs, single), "+") if name != "single" else "")
        rows.append([f"`{name}`", *shown])
    names = [f"T = {T}" for T in sorted(PATHS_T)]
    return markdown(["", *names, *(f"minus `single`, {name}" for name in names)], rows)


def paths_square():
    """The world of paths.py at T = 0.9: models by what trained them (rows) and what reads them."""
    rows = [["before training"], *([f"`{name}`"] for name in PATHS)]
    for by in PATHS:
        runs = [Run(by, PAPER_T, seed, world="paths") for seed in CHOOSE]
        rows[0].append(interval(accuracies(runs, "before, own")))
        for row, trained in zip(rows[1:], PATHS):
            own = [run._replace(name=trained) for run in runs]
            row.append(interval(accuracies(own, f"after, by {by}")))
    for row, trained in zip(rows[1:], PATHS):
        own = [Run(trained, PAPER_T, seed, world="paths") for seed in CHOOSE]
        row.append(interval(accuracies(own, "after, cold")))
    rows[0].append("")
    rows.append(["own model minus `single`'s", ""])
    for name in PATHS[1:]:
        own = [Run(name, PAPER_T, seed, world="paths") for seed in CHOOSE]
        single = [run._replace(name="single") for run in own]
        rows[-1].append(interval(differences(own, single, f"after, by {name}"), "+"))
    rows[-1].append("")
    header = ["trained by", *(f"read by `{name}`" for name in PATHS), "own method at T = 0.1"]
    return markdown(header, rows)


TABLES = {
    "scores": score_table,
    "paths": paths_table,
    "paths_square": paths_square,
    "controls": control_table,
    "temperatures": temperature_table,
    "lead": lead_table,
    "groups": group_table,
    "rates": rate_table,
    "best": comparison_table,
    "cross": cross_table,
    "drawn": drawn_table,
    "diversity": diversity_table,
    "long": long_table,
    "cold": cold_table,
    "half": half_table,
}


def table():
    """Prints all of them."""
    for name, made in TABLES.items():
        print(f"\n{name}: {made.__doc__}\n\n{made()}")


def draw(path=HERE.parent / "figures/temperatures.png"):
    """The choosing seeds' accuracy against T, and what the mixtures are ahead of `single`."""
    from matplotlib import pyplot as plt  # only who draws needs it

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for n, name in enumerate(METHODS):
        runs = [[Run(name, T, seed) for seed in CHOOSE] for T in TEMPERATURES]
        style = {"color": f"C{n}", "linestyle": "--" if "weighted" in name else "-"}
        means = [mean(accuracies(cell)) for cell in runs]
        axes[0].plot(TEMPERATURES, means, marker=".", label=name, **style)
        if n:
            for T, cell in zip(TEMPERATURES, runs):
                ahead = differences(cell, [run._replace(name="single") for run in cell])
                half = T95[len(ahead)] * stdev(ahead) / len(ahead) ** 0.5
                x = T + 0.02 * (n - 3)
                axes[1].errorbar(x, mean(ahead), half, color=f"C{n}", marker="o", capsize=2)
    axes[0].set(xlabel="T, while training and reading", ylabel="accuracy after 80 steps")
    axes[0].legend(frameon=False)
    axes[1].axhline(0, color="C0", linewidth=1)
    axes[1].set(xlabel="T", ylabel="minus `single`, seed by seed: mean, 95% interval")
    for axis in axes:
        axis.set_xticks(TEMPERATURES)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--stages", type=int, help="the first so many stages of the runs only")
    parser.add_argument("--cross", action="store_true", help="read single's models by all")
    parser.add_argument("--table", action="store_true", help="print the results")
    parser.add_argument("--run", help="one run, as JSON, in this process")
    parser.add_argument("--base", help="one base, its seed and its world as JSON, in this process")
    a = parser.parse_args()
    if a.table:
        table()
    elif a.cross:
        torch.set_num_threads(1)
        cross()
    elif a.run:
        torch.set_num_threads(1)
        carry_out(Run(*json.loads(a.run)))
    elif a.base:
        torch.set_num_threads(1)
        base_of(*json.loads(a.base))
    else:
        for stage in islice(stages(), a.stages):
            carry_out_all(dict.fromkeys(stage), a.jobs)


if __name__ == "__main__":
    main()
