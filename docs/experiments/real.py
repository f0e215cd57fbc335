"""A real model on sums of two numbers: SmolLM2-135M-Instruct, warm and cold, by three methods.

    python docs/experiments/real.py --model FOLDER --jobs 3     all runs that are missing

A run is a method, a temperature and a seed. It trains for 40 steps of 8 prompts x 8 chains, and is
read by its own method and by `single`, each at both temperatures, on 64 held-out problems x 8
chains. It leaves results/sums/METHOD_T=T.SEED.json here, and base.json has the untrained
model's read-outs. What is there is not repeated; a run that was cut off goes on from its checkpoint
in runs/sums. The device is CUDA where there is one. docs/real.md's tables are filled in from these
files by plot.py. (The first edition's four tasks, results/real, were run by docs/real.py at commit
e556bde.)
"""

import argparse
import json
import multiprocessing
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from temperatures import commit_of, motg, processor  # noqa: E402

RESULTS, RUNS = HERE / "results/sums", HERE.parents[1] / "runs/sums"
METHODS = ("single", "dirichlet", "different-tokens")
TEMPERATURES = (0.7, 0.3)
SETTINGS = {
    "task": "chain_sum",
    "task_settings": '{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}',
    "shots": str(HERE / "shots/chain_sum.json"),
    "max_prompt_tokens": 512,
    "max_new_tokens": 48,
    "prompts_per_step": 8,
    "chains": 8,
    "accumulate": 1,
    "steps": 40,
    "save_every": 10**6,
    "lr": 1e-5,
    "kl_beta": 0.0,
    "loss_average": "token",
    "micro_tokens": 2048,
}
PROBLEMS = 64  # held out, with 8 chains each
CURVES = ("correct", "format", "no_gradient", "entropy", "support", "think_tokens", "grad_norm")


def config_of(method, temperature, seed=0, **more):
    """The settings of a run, or of a read-out of it."""
    more["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    own = {"method": method, "temperature": temperature, "seed": seed}
    return motg.make_config(**SETTINGS | own | more)


own_scores = motg.scores


def all_or_nothing(items):
    """Reasoning-Gym gives an answer that contains the right one a part of the score: "12" earns 0.5
    where 1 is right, and where 2 is. Trained with that, a model learns to answer "24" or "232"."""
    return [float(score == 1) for score in own_scores(items)]


def read_out(model, tokenizer, cfg):
    """One model by one method on the held-out problems: right answers of each, and probes."""
    tests, generator = motg.test_problems(cfg, tokenizer), torch.Generator(model.device)
    generator.manual_seed(cfg.seed)
    right, means, answers, samples = [], Counter(), Counter(), []
    for part in [tests[i : i + 32] for i in range(0, len(tests), 32)]:
        r, parts = motg.attempt(model, tokenizer, part, cfg, generator)
        correct = [p["correct"] for p in parts]
        right += torch.tensor(correct).view(-1, cfg.chains).sum(1).int().tolist()
        probes = motg.step_probes(r) | {"format": sum(p["format"] for p in parts) / len(parts)}
        means.update({key: x * len(part) / len(tests) for key, x in probes.items()})
        answers.update(motg.extract_answer(text) for text in r.texts)
        samples += [r.texts[row] for row in range(0, len(r.texts), 8 * cfg.chains)]
    return {
        "problems": len(tests),
        "chains": cfg.chains,
        "right": right,
        **{key: float(f"{x:.4g}") for key, x in means.items()},
        "answers": answers.most_common(5),
        "samples": samples,
    }


def all_read_outs(folder, methods, seed):
    """{"method, T": read-out} of the model in a folder."""
    found = {}
    for method in methods:
        for T in TEMPERATURES:
            cfg = config_of(method, T, seed, eval_problems=PROBLEMS)
            if not found:
                model, tokenizer = motg.load_model(cfg, folder)
                model.to(motg.compute_dtype(model, cfg))
            found[f"{method}, T={T}"] = read_out(model, tokenizer, cfg)
    return found


def path_of(method, temperature, seed):
    return RESULTS / (f"{method}_T={temperature}.{seed}.json" if method else "base.json")


def one_run(job):
    """Trains and reads out, or reads the base out; job is (model, method, temperature, seed)."""
    model, method, temperature, seed = job
    path, began = path_of(method, temperature, seed), time.perf_counter()
    if path.exists():
        return
    motg.scores = all_or_nothing
    torch.set_num_threads(1)
    found = {"method": method, "temperature": temperature, "seed": seed}
    if method:
        out = RUNS / path.stem
        more = {"out": str(out), "resume": True, "model": model, "eval_problems": 1}
        motg.train(config_of(method, temperature, seed, **more))
        logs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found["curves"] = {key: [float(f"{log[key]:.4g}") for log in logs] for key in CURVES}
        methods = dict.fromkeys((method, "single"))
        found["read_out"] = all_read_outs(str(out / "checkpoint"), methods, seed)
        shutil.rmtree(out)  # 2.2 GB that a finished run does not need
    else:
        found["read_out"] = all_read_outs(model, METHODS, seed)
    cuda = torch.cuda.is_available()
    found["about"] = {
        "commit": commit_of(),
        "machine": torch.cuda.get_device_name() if cuda else processor(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "seconds": round(time.perf_counter() - began),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(found) + "\n")
    path.with_suffix(".new").rename(path)
    print(time.strftime("%H:%M:%S"), path.name, found["about"]["seconds"], "s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--seeds", type=int, default=5, help="so many of each")
    a = parser.parse_args()
    jobs = [(a.model, None, None, 0)]
    for seed in range(a.seeds):
        jobs += [(a.model, method, T, seed) for T in TEMPERATURES for method in METHODS]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(a.jobs, mp_context=context) as pool:
        list(pool.map(one_run, jobs))


if __name__ == "__main__":
    main()
