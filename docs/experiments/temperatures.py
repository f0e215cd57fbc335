"""Each method at its own best temperature: the runs of the smoke world, on a CPU.

    python docs/experiments/temperatures.py --jobs 2     all runs that are missing
    python docs/experiments/temperatures.py --table      what the results say

A run is a method, a temperature and a seed. The seed makes the base (a warm start of its own), the
problems and the sampling. It trains for 80 steps, is read out on 1,000 test problems x 8 chains as
it was trained and by single tokens at T = 0.9 and 0.1, and leaves one JSON file in
docs/experiments/results/temperatures. One that is there is not repeated. A run takes about 80
seconds on one thread of an idle machine, all 180 of them two hours with two jobs.
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
    "soft-thinking exact": {"method": "soft-thinking", "logprob": "exact"},
    "soft-thinking weighted": {"method": "soft-thinking", "logprob": "weighted"},
}
TEMPERATURES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.1)
SEEDS = 5
T95 = {2: 12.7, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t, by the number of seeds


def path_of(name, temperature, seed):
    """Where the result of a run is kept."""
    return RESULTS / f"{name.replace(' ', '-')}-T={temperature}.{seed}.json"


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


def one_run(name, temperature, seed):
    """Train, read out, keep the result."""
    began, base = time.perf_counter(), base_of(seed)
    how = METHODS[name] | {"temperature": temperature}
    out = RUNS / path_of(name, temperature, seed).stem
    settings = {"smoke": True, "seed": seed, "model": base, "out": str(out), "eval_problems": 64}
    cfg = motg.make_config(**settings | how, save_every=10**6, resume=True)
    motg.train(cfg)
    cfg.eval_problems = 1000
    found = {"name": name, "temperature": temperature, "seed": seed}
    reads = {"own": how} | {
        f"single T={T}": {"method": "single", "temperature": T} for T in (0.9, 0.1)
    }
    for when, folder in (("before", base), ("after", str(out / "checkpoint"))):
        model, tokenizer = motg.load_model(cfg, folder)
        tests = motg.test_problems(cfg, tokenizer)
        for read, settings in reads.items():
            if when == "after" or read == "own":
                found[f"{when}, {read}"] = read_out(model, tokenizer, tests, seed, **settings)
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
    path = path_of(name, temperature, seed)
    path.with_suffix(".new").write_text(json.dumps(found) + "\n")
    path.with_suffix(".new").rename(path)


def started(job):
    """One run in a process of its own, on one thread."""
    name, temperature, seed = job
    if path_of(*job).exists():
        return
    RUNS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "temperatures.py"), "--run", name]
    command += ["--temperature", str(temperature), "--seed", str(seed)]
    with (RUNS / f"{path_of(*job).stem}.log").open("w") as log:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=False, env=env, stdout=log, stderr=log)
    print(time.strftime("%H:%M:%S"), *job, f"status {done.returncode}", flush=True)


def table(read="after, own"):
    """Rows of a Markdown table: accuracy by method and temperature, with 95% intervals."""
    rows = ["| | " + " | ".join(f"T = {T}" for T in TEMPERATURES) + " |"]
    rows.append("|---" * (len(TEMPERATURES) + 1) + "|")
    for name in METHODS:
        cells = []
        for temperature in TEMPERATURES:
            paths = [path_of(name, temperature, seed) for seed in range(SEEDS)]
            found = [json.loads(path.read_text()) for path in paths if path.exists()]
            values = [row[read]["pass@1"] for row in found]
            cell = f"{mean(values):.3f}" if values else ""
            if len(values) > 1:
                cell += f" ± {T95[len(values)] * stdev(values) / len(values) ** 0.5:.3f}"
            cells.append(cell + f" ({len(values)})")
        rows.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--table", action="store_true", help="print the results")
    parser.add_argument("--run", help="one method, in this process")
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    if a.table:
        for read in ("before, own", "after, own", "after, single T=0.9", "after, single T=0.1"):
            print(f"\n{read} (number of seeds)\n\n{table(read)}")
        return
    if a.run:
        torch.set_num_threads(1)
        one_run(a.run, a.temperature, a.seed)
        return
    jobs = [(name, T, seed) for seed in range(SEEDS) for T in TEMPERATURES for name in METHODS]
    for seed in range(SEEDS):
        base_of(seed)
    with ThreadPoolExecutor(a.jobs) as pool:
        list(pool.map(started, jobs))


if __name__ == "__main__":
    main()
