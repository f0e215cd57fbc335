"""Does motg.py still give the digits of an older commit?

    python docs/experiments/same_digits.py 71bc679 9120237 00e35f4

The results of docs/evidence.md are of these commits. Each line of SETTINGS is trained in the
smoke mode, from docs/smoke_model, by the motg.py of this working tree and by those of the commits.
Every number that both log at every step is compared, and so are the trained weights, byte by byte.
What was found is kept in results/same_digits.json; the exit status is 1 if anything differs. It
takes 40 steps a run, and about half a minute on one thread.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOUND = HERE / "results/same_digits.json"
BASE = ROOT / "docs/smoke_model"
SETTINGS = (
    "--method single",
    "--method dirichlet",
    "--method different-tokens",
    "--method multiplex",
    "--method soft-thinking --logprob exact",
    "--method soft-thinking --logprob weighted",
    "--method dirichlet --logprob exact",
    "--method different-tokens --logprob exact --weight-passes 1",
    "--method different-tokens --temperature 0.1",
)


def trained(tree, flags, out, steps):
    """Runs a training by the motg.py in the folder `tree`; returns its log and its weights."""
    command = [sys.executable, "docs/tools/field.py", "train", "--smoke", *flags.split()]
    command += ["--model", str(BASE), "--out", str(out), "--seed", "7", "--steps", str(steps)]
    command += ["--eval-problems", "32"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tree, env=env, check=True, capture_output=True)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], (out / "checkpoint/model.safetensors").read_bytes()


def compared(ours, theirs):
    """How many numbers both logs have, the first that differs, whether the weights are equal."""
    count, first = 0, None
    for step, (a, b) in enumerate(zip(ours[0], theirs[0], strict=True)):
        for name in sorted(a.keys() & b.keys()):
            count += 1
            if a[name] != b[name] and first is None:
                first = f"step {step}, {name}: {a[name]!r}, {b[name]!r}"
    return {"numbers": count, "first difference": first, "same weights": ours[1] == theirs[1]}


def git(*command):
    return subprocess.check_output(["git", "-C", str(ROOT), *command], text=True).strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commits", nargs="+", help="older commits of motg.py")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--steps", type=int, default=40)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(a.jobs) as pool:
        trees = {"": ROOT} | {commit: Path(folder, commit) for commit in a.commits}
        for commit in a.commits:
            git("worktree", "add", "--detach", str(trees[commit]), commit)
        try:
            jobs = {}
            for n, flags in enumerate(SETTINGS):
                for commit, tree in trees.items():
                    out = Path(folder, f"{n}-{commit}")
                    jobs[flags, commit] = pool.submit(trained, tree, flags, out, a.steps)
            runs = {job: future.result() for job, future in jobs.items()}
        finally:
            for commit in a.commits:
                git("worktree", "remove", "--force", str(trees[commit]))
    rows = {
        commit: {flags: compared(runs[flags, ""], runs[flags, commit]) for flags in SETTINGS}
        for commit in a.commits
    }
    kept = {"commit": git("log", "-1", "--format=%h", "--", "motg.py"), "steps": a.steps}
    kept["changed since"] = bool(git("status", "--porcelain", "motg.py"))
    FOUND.write_text(json.dumps(kept | {"compared with": rows}, indent=1) + "\n")
    differs = 0
    for commit, found in rows.items():
        for flags, row in found.items():
            same = row["first difference"] is None and row["same weights"]
            differs += not same
            print(commit, flags, f"{row['numbers']} numbers:", "same" if same else row)
    return int(differs > 0)


if __name__ == "__main__":
    sys.exit(main())
