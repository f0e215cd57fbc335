"""Evidence: every run that docs/evidence.md reports, in the smoke world, on a CPU.

    python docs/evidence.py --jobs 2                   all runs, one thread each
    python docs/evidence.py --only dirichlet --seeds 2 some of them

A run is a variant of VARIANTS and a seed. It trains, is read out by other methods, and leaves
docs/results/VARIANT.SEED.json: settings, accuracies, probes, and thinned metrics. One that is there
is not repeated; one that was cut off goes on from its checkpoint in runs/evidence. The tables and
figures are drawn from docs/results alone, by docs/plot.py. Variants named "paths ..." are of the
second world, docs/paths.py.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import paths  # noqa: E402

import motg  # noqa: E402

RESULTS, RUNS = HERE / "results", HERE.parent / "runs/evidence"
METHODS = ("single", "dirichlet", "different-tokens", "multiplex", "soft-grpo", "lepo")
PATHS = tuple(f"paths {method}" for method in METHODS[:4])
READOUTS = {name: {"method": name} for name in (*METHODS, "soft-thinking")}
for T in (0.5, 0.1):  # would less noise do the same?
    READOUTS[f"single T={T}"] = {"method": "single", "temperature": T}
WINDOW = 4  # thinking steps; docs/plot.py names the windows
CURVES = "reward correct format entropy weight_entropy support one_hot distinct_tokens think_tokens"
CURVES += " answer_tokens truncated kl grad_norm sampler_gap no_gradient"


def shuffled(log_hat, cfg, generator=None):
    """Dirichlet weights from p^ in a random order: noise of the same size that p does not steer."""
    order = torch.rand(log_hat.shape, generator=generator).argsort(-1)
    return motg.dirichlet(log_hat.gather(-1, order), cfg, generator)


def stranger(log_p, cfg, generator=None):
    """A token drawn from p and one drawn from the whole vocabulary, blindly; their weights have the
    law of those of the two likeliest tokens: as much noise as a mixture makes, and no knowledge."""
    y = motg.draw(log_p, generator)
    other = torch.randint(log_p.shape[-1], y.shape, generator=generator)
    return torch.stack([y, other], dim=-1), log_p.topk(2).values


def first_logprob(log_p, tokens, cfg):
    return log_p.gather(-1, tokens[..., :1])[..., 0]


motg.AGGREGATION["shuffled"] = motg.Rule(shuffled, motg.dirichlet_logdensity)
motg.SAMPLING["stranger"] = motg.Rule(stranger, first_logprob)


def variants():
    """Names of variants, in the order of the questions, and their flags and number of seeds."""
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
    """The context of a variant: motg's own smoke mode, or the second world."""
    return paths.world(RUNS / "paths") if name.startswith("paths") else nullcontext()


def read_out(model, tokenizer, cfg, tests, names, chains=4):
    """{name: accuracy and probes} of one model, by its own settings ("own") and by READOUTS."""
    generator, found, smoke = torch.Generator(), {}, {"smoke": True, "chains": chains}
    for name in names:
        own = {f.name: getattr(cfg, f.name) for f in fields(cfg)}
        settings = own if name == "own" else {"seed": cfg.seed} | READOUTS[name]
        how = motg.make_config(**settings | smoke)
        found[name] = motg.evaluate(model, tokenizer, how, generator, tests, probes=True)
    return found


def right_and_wrong(model, tokenizer, cfg, tests):
    """Hidden-state entropy by layer of thoughts that led to right and to wrong answers."""
    generator = torch.Generator().manual_seed(cfg.seed)
    r = motg.rollout(model, tokenizer, [prompt for *_, prompt in tests], cfg, generator)
    parts = motg.rewards([problem for problem in tests for _ in range(cfg.chains)], r.texts)
    correct, found = torch.tensor([p["correct"] == 1 for p in parts]), {}
    for name, rows in (("right", correct), ("wrong", ~correct)):
        part = r.select(rows.nonzero()[:, 0]) if rows.any() else r
        found[name] = motg.hidden_probes(model, part, cfg, chains=128)
        found[name]["think_tokens"] = part.thinking.sum(1).float().mean().item()
    return found


class Apart(motg.Decoder):
    """A rollout with a temperature for thoughts and another one for answers."""

    temperatures = (0.9, 0.9)

    def step(self):
        T = torch.where(self.thinking, *self.temperatures)  # (B,)
        self.logits.mul_((self.cfg.temperature / T)[:, None])
        super().step()


def apart(model, tokenizer, cfg, tests):
    """{name: accuracy} of one model with a cold thought or a cold answer."""
    found, cold, warm = {}, 0.1, 0.9
    reads = [("single", "thought")] + [(method, "answer") for method in METHODS[:4]]
    with mock.patch.object(motg, "Decoder", Apart):
        for method, part in reads:
            Apart.temperatures = (cold, warm) if part == "thought" else (warm, cold)
            how = motg.make_config(method, smoke=True, seed=cfg.seed, chains=4)
            result = motg.evaluate(model, tokenizer, how, torch.Generator(), tests)
            found[f"{method}, cold {part}"] = result["pass@1"]
    return found


@torch.no_grad()
def windows(model, tokenizer, cfg, tests):
    """Hidden-state entropy of the last layer along the thought, in windows of so many steps that
    all thoughts compare, whatever their length: {read-out: {outcome: [(thoughts, mean)]}}."""
    found = {}
    for name, how in (("own", cfg), ("single", motg.make_config(smoke=True, seed=cfg.seed))):
        generator = torch.Generator().manual_seed(cfg.seed)
        r = motg.rollout(model, tokenizer, [prompt for *_, prompt in tests], how, generator)
        parts = motg.rewards([problem for problem in tests for _ in range(how.chains)], r.texts)
        correct = torch.tensor([p["correct"] == 1 for p in parts])
        states = motg.completion_hidden(model, r, how, r.log_weights)[-1]  # (B, T, d)
        found[name] = {"right": [], "wrong": []}
        for end in range(WINDOW, r.mask.shape[1] + 1, WINDOW):
            entropy = motg.hidden_state_entropy(states[:, end - WINDOW : end])
            inside = r.thinking[:, end - 1]
            for outcome, rows in (("right", inside & correct), ("wrong", inside & ~correct)):
                values = entropy[rows]
                mean = values.mean().item() if len(values) else None
                found[name][outcome].append((len(values), mean))
    return found


LATER = {"windows": windows, "apart": apart}  # old results lack them


def rounded(x, digits=4):
    """Numbers, and those in lists and dictionaries, with so many significant digits."""
    if isinstance(x, dict):
        return {name: rounded(value, digits) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(value, digits) for value in x]
    return float(f"{x:.{digits}g}") if isinstance(x, float) else x


def path_of(name, seed):
    """Where the result of a run is kept."""
    return RESULTS / f"{name.replace(' ', '-')}.{seed}.json"


def result_of(name, seed):
    """The result as far as it is there, and the names of the read-outs that are missing."""
    path = path_of(name, seed)
    kept = json.loads(path.read_text()) if path.exists() else {}
    wanted = ("own", *READOUTS) if name in (*METHODS, *PATHS) else ("own", "single")
    return kept, [read for read in wanted if read not in kept.get("read_out", {})]


def finished(name, seed):
    """Nothing is missing, but for what an old result lacks and only its lost checkpoint had."""
    kept, missing = result_of(name, seed)
    trained = (RUNS / path_of(name, seed).stem / "result.json").exists()
    return not missing and (LATER.keys() <= kept.keys() or not trained)


def one_run(name, seed):
    """Train, read out, and keep the result."""
    flags, began = VARIANTS[name][0], time.perf_counter()
    out = RUNS / path_of(name, seed).stem
    cfg = motg.make_config(smoke=True, seed=seed, out=str(out), **flags)
    resumed = (out / "config.json").exists()
    if not (out / "result.json").exists():
        motg.train(motg.make_config(**vars(cfg) | {"resume": resumed}))
    seconds = round(time.perf_counter() - began, 1)
    kept, missing = result_of(name, seed)
    model, tokenizer = motg.load_model(cfg, str(out / "checkpoint"))
    tests = motg.test_problems(cfg, tokenizer)
    if not kept:
        kept = {"variant": name, "seed": seed, "flags": flags, "read_out": {}, "about": about()}
        kept["seconds"] = None if resumed else seconds
        result = json.loads((out / "result.json").read_text())
        kept |= {key: result[key] for key in ("accuracy_before", "accuracy_after")}
        logs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        kept["curves"] = {key: [log[key] for log in logs] for key in CURVES.split()}
        kept["right_and_wrong"] = right_and_wrong(model, tokenizer, cfg, tests[:64])
    for key, look in LATER.items():
        if key not in kept:
            kept[key] = look(model, tokenizer, cfg, tests)
    kept["read_out"] |= read_out(model, tokenizer, cfg, tests, missing)
    save(path_of(name, seed), kept)


def base(name):
    """The model that all runs of a world start from, read out by every method."""
    cfg = motg.make_config(smoke=True)
    model, tokenizer = motg.load_model(cfg, cfg.model or motg.smoke_model(cfg))
    found = read_out(model, tokenizer, cfg, motg.test_problems(cfg, tokenizer), READOUTS, 8)
    save(RESULTS / f"{name}.json", {"read_out": found, "about": about()})


def about():
    """The last commit that changed motg.py, and versions."""
    git = ["git", "-C", str(HERE.parent), "log", "-1", "--format=%h", "--", "motg.py"]
    found = {"commit": subprocess.check_output(git, text=True).strip()}
    return found | {name: version(name) for name in ("torch", "transformers", "reasoning-gym")}


def save(path, kept):
    """Beside, and renamed: a result is there as a whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(rounded(kept), separators=(",", ":")) + "\n")
    new.rename(path)


def started(job):
    """One job in a process of its own, on one thread."""
    name, seed = job
    if finished(name, seed):
        return
    RUNS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "evidence.py"), "--run", name, "--seed", str(seed)]
    with open(RUNS / f"{path_of(name, seed).stem}.log", "w") as log:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=False, env=env, stdout=log, stderr=log)
    print(time.strftime("%H:%M:%S"), name, seed, f"status {done.returncode}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--only", default="", help="variants, with commas")
    parser.add_argument("--seeds", type=int, default=8, help="at most so many of each")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--run", help="one variant, in this process")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    if a.run:
        torch.set_num_threads(1)
        with world_of(a.run):
            return one_run(a.run, a.seed)
    paths.make_base(RUNS / "paths")
    for name in ("base", "paths"):
        if not (RESULTS / f"{name}.json").exists():
            with world_of(name):
                base(name)
    only = a.only.split(",") if a.only else VARIANTS
    jobs = [(v, a.first + n) for n in range(a.seeds) for v in only if n < VARIANTS[v][1]]
    with ThreadPoolExecutor(a.jobs) as pool:
        list(pool.map(started, jobs))


if __name__ == "__main__":
    main()
