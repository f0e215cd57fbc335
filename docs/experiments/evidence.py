"""Runs of many variants in the smoke world and in that of paths.py, on a CPU.

    python docs/experiments/evidence.py --jobs 2                   all runs, one thread each
    python docs/experiments/evidence.py --only dirichlet --seeds 2 some of them
    python docs/experiments/evidence.py --table                    what the results say

A run is a variant of VARIANTS and a seed. It trains, is read out by other methods, and leaves
docs/experiments/results/evidence/VARIANT.SEED.json: settings, accuracies, probes, and curves. One
that is there is not repeated; one that was cut off goes on from its checkpoint in runs/evidence.
A run takes one to three minutes on one thread of an idle machine, all of them two to four hours
with two jobs. Those of an older motg.py are in docs/evidence.md at commit e556bde.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "docs/tools")]
import paths  # noqa: E402
import plot  # noqa: E402
from field import motg  # noqa: E402

RESULTS, RUNS = HERE / "results/evidence", ROOT / "runs/evidence"
METHODS = ("single", "dirichlet", "different-tokens", "multiplex", "soft-grpo", "lepo")
PATHS = tuple(f"paths {method}" for method in METHODS[:4])
READOUTS = {name: {"method": name} for name in (*METHODS, "soft-thinking")}
for T in (0.5, 0.1):  # would less noise do the same?
    READOUTS[f"single T={T}"] = {"method": "single", "temperature": T}
WARM, COLD = 0.9, 0.1
APART = {  # a cold thought or a cold answer alone
    "single, cold thought": {"method": "single", "temperature": COLD, "answer_temperature": WARM}
}
for name in METHODS[:4]:
    APART[f"{name}, cold answer"] = {"method": name, "answer_temperature": COLD}
WINDOW = 4  # thinking steps
CURVES = "reward correct format entropy weight_entropy support one_hot distinct_tokens think_tokens"
CURVES += " answer_tokens truncated kl grad_norm sampler_gap no_gradient mixed"


# ------------------------------------------------------------------------------------ the controls
def shuffled(log_hat, cfg, generator=None):
    """Dirichlet weights from p^ in a random order: noise of the same size that p does not steer."""
    order = torch.rand(log_hat.shape, generator=generator).argsort(-1)
    return motg.dirichlet(log_hat.gather(-1, order), cfg, generator)


def stranger(log_p, first, cfg, generator=None):
    """A token drawn from p and one drawn blindly from all that do not end the thought; their
    weights have the law of those of the two likeliest: as much noise as a mixture makes, and no
    knowledge."""
    level = torch.zeros_like(log_p).masked_fill(log_p == -motg.INF, -motg.INF)
    other = motg.draw(level.log_softmax(-1), generator)  # (B,)
    return torch.stack([first, other], dim=-1), log_p.topk(2).values


def first_logprob(log_p, tokens, cfg):
    """Of the token that was drawn from p."""
    return log_p.gather(-1, tokens[..., :1])[..., 0]


def add_controls():
    """Makes them rules of motg."""
    motg.AGGREGATION["shuffled"] = motg.Weights(shuffled, motg.dirichlet_logdensity)
    motg.SAMPLING["stranger"] = motg.Candidates(stranger, first_logprob)


# ------------------------------------------------------------------------------------ the variants
def variants():
    """{name: (settings, number of seeds)}; the numbers behind are docs/evidence.md's questions."""
    found = {method: ({"method": method}, 8) for method in METHODS}  # 1, 6, 7, 8
    for method, kinds in (
        ("different-tokens", ("representative", "exact", "exact+1")),  # 5
        ("dirichlet", ("weighted", "exact")),
        ("soft-thinking", ("representative", "weighted", "exact", "exact+1")),
    ):
        for kind in kinds:
            score, _, passes = kind.partition("+")
            flags = {"method": method, "logprob": score, "weight_passes": int(passes or 0)}
            found[f"{method} {kind}"] = flags, 5
    for method in METHODS[:3]:  # 2
        found[f"{method} G=4"] = {"method": method, "chains": 4}, 8
    for temperature in (0.7, 1.1, 1.3):  # 3
        found[f"single T={temperature}"] = {"method": "single", "temperature": temperature}, 5
    found["uniform"] = {"method": "dirichlet", "aggregation": "uniform"}, 5
    found["noise"] = {"method": "dirichlet", "sampling": "stranger"}, 5
    found["shuffled"] = {"method": "dirichlet", "aggregation": "shuffled"}, 3
    for method in METHODS[1:3]:  # 9
        found[f"{method} most-likely"] = {"method": method, "end": "most-likely"}, 5
    for k in (1, 4, 8):  # 4
        found[f"dirichlet k={k}"] = {"method": "dirichlet", "k": k}, 3
    for c in (0.1, 10.0, 100.0):
        found[f"dirichlet c={c:g}"] = {"method": "dirichlet", "concentration": c}, 3
    for name in PATHS:  # 11
        found[name] = {"method": name.removeprefix("paths ")}, 5
    found["paths single T=0.7"] = {"method": "single", "temperature": 0.7}, 5
    found["paths noise"] = {"method": "dirichlet", "sampling": "stranger"}, 3
    return found


VARIANTS = variants()


def world_of(name):
    """The settings of a variant's world: motg's own smoke mode, or the second world."""
    if not name.startswith("paths"):
        return {"smoke": True}
    model = str(paths.make_base(RUNS / "paths"))
    task = {"task": "shortest_path", "task_settings": paths.SETTINGS}
    return {"smoke": True, "model": model} | task


# ----------------------------------------------------------------------------------- the read-outs
def read_out(model, tokenizer, cfg, reads, chains=4, probes=True):
    """{name: accuracy and probes} of one model, for {name: settings}."""
    generator, found = torch.Generator(), {}
    for name, settings in reads.items():
        world = {"smoke": True, "task": cfg.task, "task_settings": cfg.task_settings}
        world |= {"seed": cfg.seed, "eval_problems": cfg.eval_problems, "chains": chains}
        how = motg.make_config(**settings | world)
        tests = motg.test_problems(how, tokenizer)
        found[name] = motg.evaluate(model, tokenizer, how, generator, tests, probes)
    return found


def attempted(model, tokenizer, cfg, tests):
    """A Rollout of these problems, and which of its rows are right (B,)."""
    generator = torch.Generator().manual_seed(cfg.seed)
    r, parts = motg.attempt(model, tokenizer, tests, cfg, generator)
    return r, torch.tensor([part["correct"] == 1 for part in parts])


def right_and_wrong(model, tokenizer, cfg, tests):
    """Last layer's hidden-state entropy of thoughts that led to right and to wrong answers."""
    found = {}
    r, correct = attempted(model, tokenizer, cfg, tests)
    for name, rows in (("right", correct), ("wrong", ~correct)):
        part = r.select(rows.nonzero()[:, 0]) if rows.any() else r
        found[name] = {"hidden_entropy": motg.hidden_probe(model, part, chains=128)}
        found[name]["think_tokens"] = part.thinking.sum(1).float().mean().item()
    return found


@torch.no_grad()
def windows(model, tokenizer, cfg, tests):
    """Hidden-state entropy of the last layer along the thought, in windows of so many steps that
    all thoughts compare, whatever their length: {outcome: [(thoughts, mean)]}."""
    r, correct = attempted(model, tokenizer, cfg, tests)
    states = motg.completion_hidden(model, r, r.log_weights)  # (B, T, d)
    found = {"right": [], "wrong": []}
    for end in range(WINDOW, r.mask.shape[1] + 1, WINDOW):
        entropy = motg.hidden_state_entropy(states[:, end - WINDOW : end])  # (B,)
        inside = r.thinking[:, end - 1]  # (B,)
        for outcome, rows in (("right", inside & correct), ("wrong", inside & ~correct)):
            values = entropy[rows]
            mean = values.mean().item() if len(values) else None
            found[outcome].append((len(values), mean))
    return found


# ---------------------------------------------------------------------------------------- the runs
def rounded(x, digits=4):
    """Numbers, and those in lists and dictionaries, with so many significant digits."""
    if isinstance(x, dict):
        return {name: rounded(value, digits) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(value, digits) for value in x]
    return float(f"{x:.{digits}g}") if isinstance(x, float) else x


def save(path, kept):
    """Beside, and renamed: a result is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(rounded(kept), separators=(",", ":")) + "\n")
    new.rename(path)


def about():
    """The last commit that changed motg.py, and versions."""
    git = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", "motg.py"]
    found = {"commit": subprocess.check_output(git, text=True).strip()}
    return found | {name: version(name) for name in ("torch", "transformers", "reasoning-gym")}


def path_of(name, seed):
    """Where the result of a run is kept."""
    return RESULTS / f"{name.replace(' ', '-')}.{seed}.json"


def curves_of(out):
    """{name: its values, update by update} of a run's folder."""
    logs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {key: [log[key] for log in logs] for key in CURVES.split()}


def one_run(name, seed, **more):
    """Train, read out, and keep the result."""
    add_controls()
    flags, began = VARIANTS[name][0], time.perf_counter()
    out = RUNS / path_of(name, seed).stem
    settings = world_of(name) | {"seed": seed, "out": str(out), "resume": True} | flags | more
    cfg, resumed = motg.make_config(**settings), (out / "config.json").exists()
    if not (out / "result.json").exists():
        motg.train(cfg)
    kept = {"variant": name, "seed": seed, "flags": flags, "about": about()}
    kept["seconds"] = None if resumed else time.perf_counter() - began
    result = json.loads((out / "result.json").read_text())
    kept |= {key: result[key] for key in ("accuracy_before", "accuracy_after")}
    kept["curves"] = curves_of(out)
    model, tokenizer = motg.load_model(cfg, str(out / "checkpoint"))
    tests = motg.test_problems(cfg, tokenizer)
    own = asdict(cfg)
    reads = READOUTS if name in (*METHODS, *PATHS) else {"single": READOUTS["single"]}
    kept["read_out"] = read_out(model, tokenizer, cfg, {"own": own} | reads)
    cold = read_out(model, tokenizer, cfg, APART, probes=False)
    kept["apart"] = {read: found["pass@1"] for read, found in cold.items()}
    kept["right_and_wrong"] = right_and_wrong(model, tokenizer, cfg, tests[:64])
    kept["windows"] = windows(model, tokenizer, cfg, tests)
    save(path_of(name, seed), kept)


def base(name):
    """The model that all runs of a world start from, read out by every method."""
    cfg = motg.make_config(**world_of(name))
    model, tokenizer = motg.load_model(cfg, cfg.model or motg.smoke_model(cfg))
    found = read_out(model, tokenizer, cfg, READOUTS, chains=8)
    save(RESULTS / f"{name}.json", {"read_out": found, "about": about()})


def started(job):
    """One job in a process of its own, on one thread."""
    name, seed = job
    if path_of(name, seed).exists():
        return
    RUNS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "evidence.py"), "--run", name, "--seed", str(seed)]
    with open(RUNS / f"{path_of(name, seed).stem}.log", "w") as log:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=False, env=env, stdout=log, stderr=log)
    print(time.strftime("%H:%M:%S"), name, seed, f"status {done.returncode}", flush=True)


def table():
    """Accuracies of all variants, and the two squares of read-outs, in Markdown."""
    runs = plot.load(RESULTS)
    worlds = {"single": [], "paths single": []}
    for name in VARIANTS:
        worlds["paths single" if name.startswith("paths") else "single"].append(name)
    parts = [plot.comparison(runs, names, reference) for reference, names in worlds.items()]
    for name, methods in (("base", METHODS), ("paths", PATHS)):
        path = RESULTS / f"{name}.json"
        before = json.loads(path.read_text())["read_out"] if path.exists() else {}
        parts.append(plot.square(runs, before, methods, list(READOUTS)))
    return "\n\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--only", default="", help="variants, with commas")
    parser.add_argument("--seeds", type=int, default=8, help="at most so many of each")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--table", action="store_true", help="print the results")
    parser.add_argument("--run", help="one variant, in this process")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    if a.table:
        print(table())
        return
    if a.run:
        torch.set_num_threads(1)
        one_run(a.run, a.seed)
        return
    paths.make_base(RUNS / "paths")
    for name in ("base", "paths"):
        if not (RESULTS / f"{name}.json").exists():
            base(name)
    only = a.only.split(",") if a.only else VARIANTS
    jobs = [(v, a.first + n) for n in range(a.seeds) for v in only if n < VARIANTS[v][1]]
    with ThreadPoolExecutor(a.jobs) as pool:
        list(pool.map(started, jobs))


if __name__ == "__main__":
    main()
