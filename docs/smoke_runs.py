"""The smoke mode's results: three methods, three seeds each, and a picture of them.

    python docs/smoke_runs.py --jobs 2                    docs/smoke.json and docs/smoke.png
    python docs/smoke_runs.py --time 3 --against ../old   seconds, in turns with another checkout

A run that has its result is not repeated; one that was cut off goes on from its checkpoint.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
COLORS = {"single": "#777777", "dirichlet": "#0072b2", "different-tokens": "#d55e00"}


def smoke(checkout, out, *flags):
    """Seconds of a run of that checkout's motg.py, on one thread."""
    command = [sys.executable, "motg.py", "train", "--smoke", "--out", str(out), *map(str, flags)]
    began = time.perf_counter()
    subprocess.run(command, cwd=checkout, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    return round(time.perf_counter() - began, 1)


def one_run(method, seed):
    """Its result, with the held-out accuracy over the steps."""
    out = HERE.parent / f"runs/smoke-{method}-{seed}"
    watch = out / "seconds.txt"  # of runs that were not cut off
    if not (out / "result.json").exists():
        again = (out / "config.json").exists()
        flags = ["--method", method, "--seed", seed, "--eval-every", 10, *["--resume"] * again]
        seconds = smoke(HERE.parent, out, *flags)
        if not again:
            watch.write_text(str(seconds))
    result = json.loads((out / "result.json").read_text())
    logs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curve = [[log["step"] + 1, log["test_accuracy"]] for log in logs if "test_accuracy" in log]
    result["curve"] = [[0, result["accuracy_before"]], *curve]
    return result | {"seconds": float(watch.read_text()) if watch.exists() else None}


def draw(runs):
    """Each seed thin, their mean thick."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    _, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for method, color in COLORS.items():
        curves = [list(zip(*run["curve"], strict=True)) for run in runs if run["method"] == method]
        for steps, heights in curves:
            ax.plot(steps, heights, color=color, linewidth=0.8, alpha=0.5)
        mean = [sum(each) / len(each) for each in zip(*(y for _, y in curves), strict=True)]
        ax.plot(steps, mean, color=color, linewidth=2.4, label=method)
    ax.set(xlabel="GRPO step", ylabel="held-out accuracy", xlim=(0, steps[-1]), ylim=(0, 1))
    ax.set_title(f"motg.py train --smoke: {len(curves)} seeds (thin) and their mean", fontsize=11)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="lower right")
    plt.savefig(HERE / "smoke.png", dpi=130)


def pairs(n, checkouts, folder):
    """Seconds of whole runs of this checkout and of another, in turns; pair i has seed i."""
    rows = []
    for i in range(n):
        row = {"seed": i}
        for name in list(checkouts)[:: -1 if i % 2 else 1]:
            row[name] = smoke(checkouts[name], f"{folder}/{name}-{i}", "--seed", i)
        rows.append(row | {"ratio": row["this"] / row["other"]})
        print(rows[-1], flush=True)
    return {"ratio": median(row["ratio"] for row in rows), "pairs": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--time", type=int, metavar="N", help="instead, N pairs of timed runs")
    parser.add_argument("--against", type=Path, help="the other checkout, for --time")
    a = parser.parse_args()
    checkouts = {"this": HERE.parent} | ({"other": a.against.resolve()} if a.time else {})
    about = {"date": f"{datetime.date.today()}", "jobs": a.jobs, "cores": os.cpu_count()}
    about |= {name: version(name) for name in ("torch", "transformers", "reasoning-gym")}
    for name, checkout in checkouts.items():
        git = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
        about[name] = subprocess.check_output(git, text=True).strip()
    path = HERE / "smoke.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, checkout in checkouts.items():  # makes the model to start from, if there is none
            smoke(checkout, f"{folder}/{name}", "--steps", 1, "--eval-problems", 8)
        if a.time:
            kept["time"] = about | pairs(a.time, checkouts, folder)
            print(f"this / other: {kept['time']['ratio']:.3f}")
        else:
            with ThreadPoolExecutor(a.jobs) as pool:
                runs = list(pool.map(one_run, *zip(*product(COLORS, range(a.seeds)), strict=True)))
            kept["runs"] = about | {"runs": runs}
            draw(runs)
            for run in runs:
                print({name: x for name, x in run.items() if name != "curve"})
    path.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
