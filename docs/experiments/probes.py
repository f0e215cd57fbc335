"""Probes of trained models: what a mixture does to the next step, where rewards vary, and the
entropy of hidden states.

    python docs/experiments/probes.py                   models of temperatures.py, where it has run
    python docs/experiments/probes.py --model FOLDER    one model, such as SmolLM2's
    python docs/experiments/probes.py --table           what the results say

Does a model treat a mixture as its largest token? At each thinking step that fed a mixture, the
next p is computed three times behind the same steps: for the mixture, for its largest token alone,
and for its second. Their Jensen-Shannon divergences are in nats, 0 to log 2.

Where do rewards vary? Of each problem there are 8 thoughts, and of each thought 8 answers.
`thoughts` is the variance of a thought's mean over answers, `answers` that of the answers to one
thought, both unbiased, mean over problems.

Hidden-state entropy is that of the last layer over windows of four thinking steps, so that thoughts
of every length compare. Results go to docs/experiments/results/probes; a model
whose result is there is not read again.
"""

import argparse
import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import least_sum_runs as runs  # noqa: E402
import temperatures  # noqa: E402
from temperatures import motg  # noqa: E402

RESULTS = HERE / "results/probes"
BINS = (0.1, 0.2, 0.3, 0.4, 0.51)  # of the second weight; below them a step is nearly one token
WINDOW = 4  # thinking steps
MIXES = ("dirichlet", "different-tokens", "soft-thinking")  # whose k is 2


def jensen_shannon(log_p, log_q):
    """JS divergence (...) of two distributions (..., V), in nats."""
    middle = torch.logaddexp(log_p, log_q) - math.log(2)
    kl = [(x.exp() * (x - middle)).nansum(-1) for x in (log_p, log_q)]
    return (kl[0] + kl[1]) / 2


@torch.no_grad()
def divergences(model, r, cfg):
    """Means over steps by their second weight, a dict for each of BINS: the JS divergences of the
    next p, and how often its likeliest token is the one that the largest token alone, or the second
    alone, would make likeliest."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    fed = motg.mixture_embedding(table, r.tokens, r.log_weights)  # (B, T, d)
    log_w, order = r.log_weights.sort(-1, descending=True)
    tokens = r.tokens.gather(-1, order)  # (B, T, k) the largest weight first
    P, T = r.prompt_ids.shape[1], r.mask.shape[1]
    visible = torch.nn.functional.pad(r.prompt_mask, (0, T), value=True)  # (B, P + T)
    cache = transformers.DynamicCache(config=model.config)
    motg.forward(model, r.prompt_ids, r.prompt_mask, cache)
    rows = []  # a row of numbers for each mixed step
    for t in range(T):
        after = []
        for inputs in (table[tokens[:, t, 1]], table[tokens[:, t, 0]], fed[:, t]):
            if after:
                cache.crop(-1)  # without what was tried before
            states = motg.forward(model, inputs[:, None], visible[:, : P + t + 1], cache)
            logits = head(states[:, -1])
            after.append(motg.token_distribution(logits, cfg.temperature))  # (B, V)
        second, largest, mixture = after
        top = mixture.argmax(-1)
        columns = (
            log_w[:, t, 1].exp(),
            jensen_shannon(mixture, largest),
            jensen_shannon(mixture, second),
            jensen_shannon(largest, second),
            top == largest.argmax(-1),
            top == second.argmax(-1),
        )
        rows += torch.stack([x.float() for x in columns], -1)[r.mixed[:, t]].tolist()
    names = ("second weight", "mixture, largest", "mixture, second", "largest, second")
    names += ("as largest", "as second")
    found = []
    for low, high in pairwise(BINS):
        inside = [row for row in rows if low <= row[0] < high]
        means = {name: mean(x) for name, x in zip(names, zip(*inside))}
        found.append({"from": low, "to": high, "steps": len(inside), **means})
    return found


@torch.no_grad()
def reward_variance(model, tokenizer, r, problems, cfg, answers=8):
    """The variance of `correct` between thoughts and between the answers to one thought. `problems`
    has one entry a row of the Rollout r."""
    table = model.get_input_embeddings().weight
    fed = motg.mixture_embedding(table, r.tokens, r.log_weights)  # (B, T, d)
    length = r.thinking.sum(1)  # (B,) with the step that ends the thought
    closed = ((r.matched >= motg.ANSWER) & r.mask).any(1)  # (B,) an answer has begun
    prompts = table[r.prompt_ids]  # (B, P, d)
    P, longest = prompts.shape[1], int(length.max())
    embeds = table.new_zeros(len(fed), P + longest, table.shape[1])
    mask = torch.zeros(embeds.shape[:2], dtype=torch.long)
    for row, n in enumerate(length.tolist()):  # padded on the left
        embeds[row, longest - n :] = torch.cat([prompts[row], fed[row, :n]])
        mask[row, longest - n :] = torch.cat([r.prompt_mask[row].long(), torch.ones(n).long()])
    T = cfg.answer_temperature or cfg.temperature
    how = {"do_sample": True, "temperature": T, "top_k": 0, "top_p": 1.0, "max_new_tokens": 16}
    new = model.generate(
        inputs_embeds=embeds, attention_mask=mask, num_return_sequences=answers, **how
    )
    texts, repeated = [], []
    for row, n in enumerate(length.tolist()):
        thought = tokenizer.decode(r.representative[row, :n])
        for reply in new[row * answers : (row + 1) * answers]:
            texts.append(thought + tokenizer.decode(reply, skip_special_tokens=True))
            repeated.append(problems[row])
    correct = torch.tensor([part["correct"] for part in motg.rewards(repeated, texts)])
    correct = correct.view(-1, cfg.chains, answers) * closed.view(-1, cfg.chains, 1)  # (n, G, M)
    within = correct.var(-1).mean(-1)  # (n,)
    between = correct.mean(-1).var(-1) - within / answers
    return {
        "accuracy": correct.mean().item(),
        "thoughts": between.mean().item(),
        "answers": within.mean().item(),
    }


@torch.no_grad()
def windows(model, r, correct):
    """Hidden-state entropy of the last layer in windows of WINDOW thinking steps, of thoughts that
    led to right and to wrong answers (`correct` (B,) bool): {outcome: [(thoughts, mean)]}."""
    states = motg.completion_hidden(model, r, r.log_weights)  # (B, T, d)
    found = {"right": [], "wrong": []}
    for end in range(WINDOW, r.mask.shape[1] + 1, WINDOW):
        entropy = motg.hidden_state_entropy(states[:, end - WINDOW : end])  # (B,)
        inside = r.thinking[:, end - 1]  # (B,)
        for outcome, rows in (("right", inside & correct), ("wrong", inside & ~correct)):
            values = entropy[rows]
            found[outcome].append((len(values), values.mean().item() if len(values) else None))
    return found


def probe(model, tokenizer, cfg):
    """The probes of one model as one method reads it."""
    tests = motg.test_problems(cfg, tokenizer)
    generator = torch.Generator().manual_seed(cfg.seed)
    r, parts = motg.attempt(model, tokenizer, tests, cfg, generator)
    problems = [test for test in tests for _ in range(cfg.chains)]
    found = reward_variance(model, tokenizer, r, problems, cfg)
    found["windows"] = windows(model, r, torch.tensor([part["correct"] == 1 for part in parts]))
    return found | {"steps": divergences(model, r, cfg) if cfg.k > 1 else []}


def keep(name, found):
    """A result, written whole."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.with_suffix(".new").write_text(json.dumps(found) + "\n")
    path.with_suffix(".new").rename(path)


def smoke_models(world, seeds, temperature=0.9):
    """Bases of temperatures.py by four methods, and what each of these has made of them."""
    for seed in seeds:
        for name in ("single", *MIXES):
            how = temperatures.METHODS[name] | {"temperature": temperature}
            how |= temperatures.TASKS[world] | {"eval_problems": 64}
            cfg = motg.make_config(smoke=True, seed=seed, **how)
            run = temperatures.Run(name, temperature, seed, world=world)
            folders = {"base": temperatures.base_of(seed, world)}
            folders["trained"] = str(temperatures.RUNS / run.path.stem / "checkpoint")
            for when, folder in folders.items():
                result = f"{world} {when}-{name}.{seed}"
                if Path(folder).exists() and not (RESULTS / f"{result}.json").exists():
                    keep(result, probe(*motg.load_model(cfg, folder), cfg))
                    print(result, flush=True)


def least_sum_models():
    """Bases of least_sum_runs.py that were taught to think in mixtures: the first probe alone."""
    base = runs.WORLD | {"supervision": "soft"}
    for seed in range(5):
        result = f"least sum-soft-thinking.{seed}"
        name = "-".join(f"{key}={value}" for key, value in sorted(base.items()))
        folder = runs.RUNS / "bases" / f"{name}.{seed}"
        if folder.exists() and not (RESULTS / f"{result}.json").exists():
            how = {"k": 2, "seed": seed, "chains": 1, "eval_problems": 256}
            cfg = runs.world.config(folder, "soft-thinking", **runs.task_of(base), **how)
            model, tokenizer = motg.load_model(cfg, folder)
            r, parts = motg.attempt(
                model, tokenizer, motg.test_problems(cfg, tokenizer), cfg, torch.Generator()
            )
            found = {"accuracy": mean(part["correct"] for part in parts)}
            keep(result, found | {"steps": divergences(model, r, cfg)})


def groups():
    """{model and method: its results, one a seed}."""
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        found.setdefault(path.name.split(".")[0], []).append(json.loads(path.read_text()))
    return found


def variance_table():
    """Where rewards vary, mean over seeds; models and methods as rows."""
    rows = []
    for group, found in groups().items():
        if "thoughts" not in found[0]:
            continue
        means = [mean(row[name] for row in found) for name in ("accuracy", "thoughts", "answers")]
        cells = [f"{x:.3f}" for x in means]
        share = means[2] / (means[1] + means[2])
        rows.append([group.replace("-", ", ", 1), len(found), *cells, f"{100 * share:.0f}%"])
    header = ["model, method", "seeds", "right", "between thoughts", "between answers"]
    return temperatures.markdown([*header, "share of the answers"], rows)


def step_cells(found):
    """The number of steps of some results, and their means by the second weight, as text: the three
    divergences, and how often the likeliest token is that of a token alone."""
    names = ("mixture, largest", "mixture, second", "largest, second", "as largest", "as second")
    for low, high in ((BINS[0], BINS[3]), (BINS[3], 0.5)):
        parts = [part for row in found for part in row["steps"] if low <= part["from"] < high]
        steps = sum(part["steps"] for part in parts)
        if steps >= 5:
            means = [sum(part["steps"] * part.get(x, 0) for part in parts) / steps for x in names]
            shares = [f"{100 * x:.0f}%" for x in means[3:]]
            yield f"{low} to {high}", steps, *(f"{x:.3f}" for x in means[:3]), *shares


STEP_HEADER = ["second weight", "steps", "JS to the largest", "JS to the second", "JS of the two"]
STEP_HEADER += ["likeliest as for the largest", "as for the second"]


def step_table():
    """What a mixture does to the next step, by its second weight."""
    rows = []
    for group, found in groups().items():
        rows += [[group.replace("-", ", ", 1), *cells] for cells in step_cells(found)]
    return temperatures.markdown(["model, method", *STEP_HEADER], rows)


def short_step_table():
    """The same of all methods together, where the second weight is well below the first."""
    models, rows = {}, []
    for group, found in groups().items():
        models.setdefault(group.partition("-")[0], []).extend(found)
    for model, found in models.items():
        for cells in list(step_cells(found))[:1]:
            rows.append([model, *cells[1:]])
    return temperatures.markdown(["model", *STEP_HEADER[1:]], rows)


def window_table():
    """Hidden-state entropy in windows of WINDOW steps, of all thoughts that are so long: the mean
    over seeds, models and methods as rows."""
    rows = []
    for group, found in groups().items():
        if "windows" not in found[0]:
            continue
        cells = []
        for outcome in ("right", "wrong"):
            for n in range(3):
                inside = [row["windows"][outcome][n] for row in found]
                inside = [value for thoughts, value in inside if thoughts >= 20]
                cells.append(f"{mean(inside):.3f}" if len(inside) == len(found) else "")
        rows.append([group.replace("-", ", ", 1), len(found), *cells])
    names = [
        f"{outcome}, steps {WINDOW * n + 1} to {WINDOW * n + WINDOW}"
        for outcome in ("right", "wrong")
        for n in range(3)
    ]
    return temperatures.markdown(["model, method", "seeds", *names], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the results")
    parser.add_argument("--model", help="a folder; the first probe alone, by the three mixtures")
    parser.add_argument("--name", default="real", help="of that model's results")
    parser.add_argument("--settings", default="{}", help="motg's settings for it, as JSON")
    a = parser.parse_args()
    if a.table:
        print(variance_table(), step_table(), sep="\n\n")
    elif a.model:
        for name in MIXES:
            how = temperatures.METHODS[name] | json.loads(a.settings)
            cfg = motg.make_config(device="cpu", model=a.model, **how)
            model, tokenizer = motg.load_model(cfg, a.model)
            tests = motg.test_problems(cfg, tokenizer)
            generator = torch.Generator().manual_seed(cfg.seed)
            r, parts = motg.attempt(model, tokenizer, tests, cfg, generator)
            found = {"accuracy": mean(part["correct"] for part in parts)}
            keep(f"{a.name}-{name}.0", found | {"steps": divergences(model, r, cfg)})
    else:
        torch.set_num_threads(1)
        smoke_models("sums", temperatures.SCORED)
        smoke_models("paths", temperatures.CHOOSE)
        least_sum_models()


if __name__ == "__main__":
    main()
