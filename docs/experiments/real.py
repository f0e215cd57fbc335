"""A real model: SmolLM2-135M-Instruct trained by three methods on four Reasoning-Gym tasks.

    python docs/experiments/real.py --jobs 2             all runs on a CPU, one thread each
    python docs/experiments/real.py --only gcd --seeds 1 --model FOLDER    some of them

A run is a task, a method and a seed. It trains, is read out by every method on the same held-out
problems, and leaves docs/experiments/results/real/TASK-METHOD.SEED.json; TASK.json has the
untrained model's read-outs. What is there is not repeated (today's files are the first edition's,
of commit e556bde: --results names another folder); a run that was cut off goes on from its
checkpoint in runs/real. A run takes 8 to 13 minutes. docs/real.md's tables and its figure are drawn
from these files by plot.py.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]
from evidence import about, curves_of, save  # noqa: E402

import motg  # noqa: E402

RUNS = ROOT / "runs/real"
METHODS = ("single", "dirichlet", "different-tokens")
GCD = {"task_settings": '{"max_numbers": 2, "min_value": 2, "max_value": 30}', "max_new_tokens": 56}
LETTERS = {"task_settings": '{"min_words": 3, "max_words": 5}'}
SUMS = {"task_settings": '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}'}
SLOW = {"lr": 1e-5, "prompts_per_step": 8}
TASKS = {
    "gcd": GCD,
    "syllogism": {},
    "letter_counting": LETTERS,
    "chain_sum": SUMS,  # no answer is right for many problems
    "chain_sum-slow": SUMS | SLOW,
    "letter_counting-slow": LETTERS | SLOW,
    "gcd-slow": GCD | SLOW,
    "gcd-partial": GCD,  # Reasoning-Gym's own score: see `all_or_nothing`
}
OWN_SCORE = ("syllogism", "gcd-partial")
COMMON = {"max_prompt_tokens": 512, "max_new_tokens": 48, "temperature": 0.7}  # 0.9 babbles
COMMON |= {"chains": 8, "prompts_per_step": 4, "accumulate": 1, "steps": 16, "save_every": 4}
COMMON |= {"lr": 3e-5, "kl_beta": 0.0, "loss_average": "token", "micro_tokens": 768}
PROBLEMS, CHAINS = 64, 4  # held out, and chains for each


def config_of(task, method, seed=0, **more):
    """The settings of a run, or of a read-out of it."""
    name = task.partition("-")[0]
    settings = COMMON | TASKS[task] | more | {"shots": str(HERE / f"shots/{name}.json")}
    settings["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    return motg.make_config(**settings | {"task": name, "method": method, "seed": seed})


def name_of(task, method, seed):
    return f"{task}-{method}.{seed}"


own_score = motg.score


def all_or_nothing(task, answer, entry):
    """Reasoning-Gym gives an answer that contains the right one a part of the score: "12" earns 0.5
    where 1 is right, and where 2 is. Trained with that, a model learns to answer "24" or "232"."""
    return float(own_score(task, answer, entry) == 1)


def read_out(model, tokenizer, cfg):
    """One model by one method on the held-out problems: right answers of each, and probes."""
    tests, generator = motg.test_problems(cfg, tokenizer), torch.Generator(model.device)
    generator.manual_seed(cfg.seed)
    right, means, answers, samples = [], Counter(), Counter(), []
    for part in [tests[i : i + 16] for i in range(0, len(tests), 16)]:
        r, parts = motg.attempt(model, tokenizer, part, cfg, generator)
        right += torch.tensor([p["correct"] for p in parts]).view(-1, cfg.chains).sum(1).tolist()
        probes = motg.step_probes(r) | {"format": sum(p["format"] for p in parts) / len(parts)}
        means.update({key: x * len(part) / len(tests) for key, x in probes.items()})
        answers.update(motg.extract_answer(text) for text in r.texts)
        for row in range(0, len(r.mask), 4 * cfg.chains):
            entry = part[row // cfg.chains][1]
            shown = {"q": entry["question"], "answer": entry["answer"], "text": r.texts[row]}
            samples.append(shown | {"correct": parts[row]["correct"]})
    found = {"problems": len(tests), "chains": cfg.chains, "right": [int(n) for n in right]}
    answers = [[answer, n] for answer, n in answers.most_common(8)]
    return found | dict(means) | {"answers": answers, "samples": samples}


def result_of(path):
    """The result as far as it is there, and the methods whose read-outs are missing."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    return kept, [method for method in METHODS if method not in kept.get("read_out", {})]


def fill(path, kept, missing, task, folder):
    """Add the missing read-outs, each kept as soon as it is there; to the base, what is right."""
    how = {"eval_problems": PROBLEMS, "chains": CHAINS}
    model, tokenizer = motg.load_model(config_of(task, "single"), folder)
    kept.setdefault("read_out", {})
    for method in missing:
        cfg = config_of(task, method, **how)
        kept["read_out"][method] = read_out(model, tokenizer, cfg)
        if "method" not in kept:
            kept["truths"] = [entry["answer"] for _, entry, _ in motg.test_problems(cfg, tokenizer)]
        save(path, kept)


def base(task, folder, results):
    """The untrained model, read out by every method."""
    path = results / f"{task}.json"
    kept, missing = result_of(path)
    fill(path, kept | {"task": task, "about": about()}, missing, task, folder)


def one_run(task, method, seed, folder, results):
    """Train, keep the curves, read out."""
    motg.score = own_score if task in OWN_SCORE else all_or_nothing
    name = name_of(task, method, seed)
    out, path, began = RUNS / name, results / f"{name}.json", time.perf_counter()
    kept, missing = result_of(path)
    if not kept:
        resumed = (out / "config.json").exists()
        if not (out / "result.json").exists():  # train's own evaluations are cut to one problem
            more = {"out": str(out), "resume": True, "model": folder, "eval_problems": 1}
            motg.train(config_of(task, method, seed, **more))
        kept = {"task": task, "method": method, "seed": seed, "about": about()}
        kept["bf16"] = torch.cpu._is_avx512_bf16_supported() or torch.cuda.is_available()
        kept["seconds"] = None if resumed else round(time.perf_counter() - began)
        kept["curves"] = curves_of(out)
    missing.sort(key=lambda read: read != method)  # its own first
    fill(path, kept, missing, task, str(out / "checkpoint"))
    (out / "trainer.pt").unlink(missing_ok=True)  # 1.6 GB that a finished run does not need


def started(job, model, results):
    """One job in a process of its own, on one thread: (task,) or (task, method, seed)."""
    name = name_of(*job) if job[1:] else job[0]
    if not result_of(results / f"{name}.json")[1]:
        return
    RUNS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "real.py"), "--model", model, "--results", str(results)]
    command += ["--run", *map(str, job)]
    with open(RUNS / f"{name}.log", "a") as log:
        env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        done = subprocess.run(command, check=False, env=env, stdout=log, stderr=log)
    print(time.strftime("%H:%M:%S"), name, f"status {done.returncode}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--only", default=",".join(TASKS), help="tasks, with commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="methods, with commas")
    parser.add_argument("--seeds", type=int, default=2, help="so many of each")
    parser.add_argument("--results", type=Path, default=HERE / "results/real")
    parser.add_argument("--run", nargs="*", help="one job, in this process: TASK [METHOD SEED]")
    a = parser.parse_args()
    if a.run:
        task, *rest = a.run
        if rest:
            one_run(task, rest[0], int(rest[1]), a.model, a.results)
        else:
            base(task, a.model, a.results)
        return
    tasks, methods = a.only.split(","), a.methods.split(",")
    jobs = [(t, m, s) for s in range(a.seeds) for t in tasks for m in methods]
    bases = [(t,) for t in tasks if "-" not in t]  # the others have the same problems
    with ThreadPoolExecutor(a.jobs) as pool:
        list(pool.map(lambda job: started(job, a.model, a.results), [*jobs, *bases]))


if __name__ == "__main__":
    main()
