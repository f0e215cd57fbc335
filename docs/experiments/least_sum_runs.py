"""The runs in the world of least_sum.py: bases read out by every method, then GRPO from them.

    python docs/experiments/least_sum_runs.py                     all runs that are missing
    python docs/experiments/least_sum_runs.py --only "base soft"  some of them
    python docs/experiments/least_sum_runs.py --table             what the results say
    python docs/experiments/least_sum_runs.py --trace             one thought, and its picture

A run is a variant of VARIANTS and a seed; the base's warm start has the same seed. It leaves
docs/experiments/results/least_sum/VARIANT.SEED.json, and one that is there is not repeated. Bases
and GRPO's folders are kept in runs/least_sum; GRPO goes on from its checkpoint where it was cut
off. On one thread of an idle machine a base takes 100 seconds and its read-outs about as much,
GRPO with its read-outs half a minute.

Small answers are common, and parity tells 0 from 1: who answers the parity of the numbers' sum
needs no thought. Of five digits that guess is right for four problems in five, and GRPO finds it.
So the numbers here go up to 19, where it is right for one in three, and a read-out says how many
answers are the guess, and how many are right where it is wrong: those problems are called hard.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import least_sum as world  # noqa: E402
from least_sum import motg  # noqa: E402

RESULTS = HERE / "results/least_sum"
FIGURES = HERE.parent / "figures"
RUNS = world.ROOT / "runs/least_sum"
PROBLEMS, CHAINS = 256, 8  # of a read-out
CURVES = ("reward", "correct", "format", "entropy", "support", "think_tokens", "kl", "grad_norm")

# ------------------------------------------------------------------------------------- the variants
SINGLE = {
    f"single T={T:g}": {"method": "single", "temperature": T} for T in (1.0, 0.7, 0.5, 0.3, 0.1)
}
GREEDY = {"soft-thinking k=1": {"method": "soft-thinking", "k": 1}}  # the likeliest token, no draw
# CoT2's own way to mix: the plain mean of k independent draws.
COT2 = {"method": "multiplex", "aggregation": "uniform", "logprob": "weighted"}


def mixtures(k):
    """Read-outs that mix k candidates; dirichlet's concentration is k."""
    return {
        f"soft-thinking k={k}": {"method": "soft-thinking", "k": k},
        f"dirichlet k={k}": {"method": "dirichlet", "k": k, "concentration": float(k)},
        f"different-tokens k={k}": {"method": "different-tokens", "k": k},
        f"multiplex k={k}": {"method": "multiplex", "k": k},
        f"cot2 k={k}": COT2 | {"k": k},
    }


K = {k: mixtures(k) for k in (2, 4, 8, 16, 32)}
EACH = {name: SINGLE[name] for name in ("single T=1", "single T=0.3", "single T=0.1")}
EACH |= {name: K[16][name] for name in ("soft-thinking k=16", "dirichlet k=16")}
EACH |= {name: K[8][name] for name in ("different-tokens k=8", "multiplex k=8", "cot2 k=8")}
# Is the answer noisy, and not the thought? And is a thought needed at all?
COLD = {
    f"{name}, cold answer": EACH[name] | {"answer_temperature": 0.1}
    for name in ("single T=1", "soft-thinking k=16", "different-tokens k=8")
}
CUT = {
    f"{name}, cut": EACH[name] | {"end": "steps", "end_steps": 1}
    for name in ("single T=1", "soft-thinking k=16")
}
FEW = {name: EACH[name] for name in ("single T=1", "single T=0.1", "soft-thinking k=16")}
FEW |= {name: EACH[name] for name in ("different-tokens k=8", "multiplex k=8")}
FEW |= {"single T=1, cut": CUT["single T=1, cut"]}
SOME = SINGLE | GREEDY | EACH | CUT
SOME |= {f"soft-thinking k={k}": K[k][f"soft-thinking k={k}"] for k in (2, 4, 8, 32)}
WIDER = {"m=6": {"soft-thinking k=64": {"method": "soft-thinking", "k": 64}}}  # for its 64 sums
ALL = SINGLE | GREEDY | K[2] | K[4] | K[8] | K[16] | K[32] | COLD | CUT

LEARNERS = {
    "single": SINGLE["single T=1"],
    "single T=0.3": SINGLE["single T=0.3"],
    "multiplex": K[8]["multiplex k=8"],
    "different-tokens": K[8]["different-tokens k=8"],
    "cot2": K[8]["cot2 k=8"],
    "soft-thinking": K[16]["soft-thinking k=16"],
    "soft-thinking exact": K[16]["soft-thinking k=16"] | {"logprob": "exact"},
    "dirichlet": K[16]["dirichlet k=16"],
}
GRPO = {"steps": 60, "prompts_per_step": 16, "chains": 8, "lr": 1e-4, "save_every": 60}
GRPO |= {"eval_problems": 32}  # what motg says before and after; the read-outs here have more
# Up to 19, the guess is right for one problem in three. Of digits, it is right for too many, and
# there are too few problems: 495 of four digits, in whatever order.
WORLD = {"count": 4, "max_value": 19}


def central():
    """Name -> (the base's settings, GRPO's or None, read-outs, number of seeds), in order."""
    found = {}
    for supervision in ("soft", "random", "best", "soft+random", "soft+best"):
        base = WORLD | {"supervision": supervision}
        found[f"base {supervision}"] = base, None, ALL if supervision == "soft" else SOME, 5
    for name, how in LEARNERS.items():
        found[f"grpo {name}"] = WORLD | {"supervision": "soft"}, how, FEW | {"own": how}, 5
    return found


def around():
    """The same, of what else a base could have been: more steps, other lengths and widths."""
    sizes = {"m=3": {"count": 3, "max_value": 19}}
    sizes["m=5"] = {"count": 5, "max_value": 29, "steps": 4000}
    sizes["m=6"] = {"count": 6, "max_value": 39, "steps": 4000}
    sizes["steps=3000"] = WORLD | {"steps": 3000}
    widths = {"width=64": WORLD | {"width": 64}, "width=256": WORLD | {"width": 256}}
    found = {}
    for supervision in ("soft", "random", "best"):
        for name, base in (sizes | widths if supervision != "best" else sizes).items():
            base = base | {"supervision": supervision}
            found[f"base {supervision} {name}"] = base, None, SOME | WIDER.get(name, {}), 3
    for name in ("single", "single T=0.3"):
        how = LEARNERS[name]
        base = WORLD | {"supervision": "random"}
        found[f"grpo {name} from random"] = base, how, FEW | {"own": how}, 5
    return found


VARIANTS = central() | around()


# -------------------------------------------------------------------------------------- a read-out
def guess(entry):
    """What an answer would be if it were 0 or 1: the parity of every sum of these numbers."""
    return sum(entry["metadata"]["numbers"]) % 2


def is_hard(entry):
    return int(entry["answer"]) > 1


def token_weights(r, tokenizer):
    """For each thought, {token's text: weight} at each of its steps; a token drawn twice is one."""
    text = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    rows = []
    for tokens, log_weights, thinking in zip(r.tokens, r.log_weights, r.mask & r.thinking):
        steps = []
        for ids, weights in zip(tokens[thinking].tolist(), log_weights[thinking].exp().tolist()):
            step = {}
            for token, weight in zip(ids, weights):
                if weight > 0:
                    step[text[token]] = step.get(text[token], 0.0) + weight
            steps.append(step)
        rows.append(steps)
    return rows


def legal_steps(r, row, numbers, tokenizer):
    """For each step of a thought whether the token read follows from the one before it: whether a
    reader sees a walk, each number added to the sum so far or taken from it."""
    words = tokenizer.convert_ids_to_tokens(r.representative[row, : len(numbers)].tolist())
    before, found = 0, []
    for number, word in zip(numbers, words):
        total = world.sum_of(word)
        found.append(None not in (before, total) and abs(total - before) == number)
        before = total
    return found


def support(step):
    """Effective number of tokens: the exponential of the weights' entropy."""
    return math.exp(-sum(w * math.log(w) for w in step.values()))


def overlap(step, shares):
    """The part of two distributions that is common to both, 0 to 1: weights and true shares."""
    return sum(min(step.get(world.sum_word(total), 0.0), share) for total, share in shares.items())


def read_out(model, tokenizer, cfg, tests):
    """Accuracy, over all problems, easy and hard ones; what the answers and the thoughts are."""
    generator = torch.Generator().manual_seed(cfg.seed)
    right, guessed, lengths = [], [], []  # a list of chains for each problem, then numbers
    m = len(tests[0][1]["metadata"]["numbers"])
    supports = [[] for _ in range(m)]  # of each step
    overlaps = [[] for _ in range(m)]
    legal = [[] for _ in range(m)]
    for part in [tests[i : i + 32] for i in range(0, len(tests), 32)]:
        r = motg.rollout(model, tokenizer, [prompt for *_, prompt in part], cfg, generator)
        chains = [problem for problem in part for _ in range(cfg.chains)]
        scored = motg.rewards(chains, r.texts)
        right += torch.tensor([x["correct"] for x in scored]).view(-1, cfg.chains).tolist()
        for (_, entry, _), text in zip(chains, r.texts):
            guessed.append(motg.extract_answer(text) == str(guess(entry)))
        lengths += (r.mask & r.thinking).sum(1).tolist()
        for (_, entry, _), steps in zip(chains, token_weights(r, tokenizer)):
            reached = world.reachable(entry["metadata"]["numbers"])
            for t, (step, shares) in enumerate(zip(steps, reached)):
                supports[t].append(support(step))
                overlaps[t].append(overlap(step, shares))
        for row, (_, entry, _) in enumerate(chains):
            for t, ok in enumerate(legal_steps(r, row, entry["metadata"]["numbers"], tokenizer)):
                legal[t].append(ok)
    hard = [is_hard(entry) for _, entry, _ in tests]
    share = [sum(chains) / len(chains) for chains in right]  # of each problem
    return {
        "right": statistics.mean(share),
        "easy": statistics.mean(x for x, h in zip(share, hard) if not h),
        "hard": statistics.mean(x for x, h in zip(share, hard) if h),
        "pass@8": statistics.mean(any(chains) for chains in right),
        "guessed": statistics.mean(guessed),
        "think_tokens": statistics.mean(lengths),
        "support": [statistics.mean(x) if x else None for x in supports],
        "overlap": [statistics.mean(x) if x else None for x in overlaps],
        "legal": [statistics.mean(x) if x else None for x in legal],
    }


def task_of(base):
    """Those of a base's settings that belong to the task."""
    return {name: base[name] for name in ("count", "max_value") if name in base}


def read_outs(folder, base, reads, seed):
    """{name of a read-out: its numbers} of the model in `folder`."""
    task = task_of(base)
    cfg = world.config(folder, **task, eval_problems=PROBLEMS)
    model, tokenizer = motg.load_model(cfg, folder)
    tests = motg.test_problems(cfg, tokenizer)
    found = {}
    for name, how in reads.items():
        cfg = world.config(folder, **task, **how | {"seed": seed, "chains": CHAINS})
        found[name] = read_out(model, tokenizer, cfg, tests)
    return found, tests


# ------------------------------------------------------------------------------------------- a run
def path_of(name, seed):
    """Where the result of a run is kept."""
    return RESULTS / f"{name.replace(' ', '-')}.{seed}.json"


def base_of(base, seed):
    """The folder of a base, made if it is missing."""
    name = "-".join(f"{key}={value}" for key, value in sorted(base.items()))
    return world.make_base(RUNS / "bases" / f"{name}.{seed}", **base, seed=seed)


def learn(folder, base, flags, seed, out):
    """GRPO from the base in `folder`; the settings used, and the curves of what was logged."""
    task = task_of(base)
    cfg = world.config(folder, **task, **GRPO | flags, seed=seed, out=str(out), resume=True)
    if not (out / "result.json").exists():
        motg.train(cfg)
    logs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return GRPO | flags, {key: [log[key] for log in logs] for key in CURVES}


def one_run(name, seed):
    """A base or GRPO from it, read out; what is kept is written last."""
    base, flags, reads, _ = VARIANTS[name]
    began = time.perf_counter()
    kept = {"variant": name, "seed": seed, "base": base, "grpo": None}
    folder = base_of(base, seed)
    kept["warm_start"] = json.loads((folder / "base.json").read_text())
    if flags:
        out = RUNS / path_of(name, seed).stem
        kept["grpo"], kept["curves"] = learn(folder, base, flags, seed, out)
        folder = out / "checkpoint"
    trained = time.perf_counter()
    kept["read_out"], tests = read_outs(folder, base, reads, seed)
    kept["problems"] = len(tests)
    kept["guess_right"] = statistics.mean(not is_hard(entry) for _, entry, _ in tests)
    read = time.perf_counter()
    kept["seconds"] = {"training": trained - began, "reading": read - trained}
    save(path_of(name, seed), kept | about())


def processor():
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def about():
    """The commit that motg.py comes from ("+" if it was changed since), versions, the machine."""
    git = ["git", "-C", str(world.ROOT)]
    last = subprocess.check_output([*git, "log", "-1", "--format=%h", "--", "motg.py"], text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "motg.py"], check=False)
    blob = subprocess.check_output([*git, "hash-object", "motg.py"], text=True)
    found = {"commit": last.strip() + "+" * bool(changed.returncode), "motg.py": blob.strip()[:12]}
    found |= {name: version(name) for name in ("torch", "transformers", "reasoning-gym")}
    return found | {"machine": processor()}


def rounded(x):
    """Numbers, and those in lists and dictionaries, with four significant digits."""
    if isinstance(x, dict):
        return {name: rounded(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def save(path, kept):
    """Beside, and renamed: a result is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(rounded(kept), separators=(",", ":")) + "\n")
    new.rename(path)


# ------------------------------------------------------------------------- the picture of a thought
def trace(seed=0, base=None, k=16):
    """One thought, read out by soft-thinking: the first test problem whose sums all differ.

    Kept as results/least_sum/trace.json: the numbers, for each step the weights of the mixture and
    the true shares, and the reply; and the same for a thought of single tokens.
    """
    base = base or WORLD | {"supervision": "soft", "steps": 3000}
    folder = base_of(base, seed)
    cfg = world.config(folder, **task_of(base), eval_problems=PROBLEMS)
    model, tokenizer = motg.load_model(cfg, folder)
    for problem in motg.test_problems(cfg, tokenizer):
        reached = world.reachable(problem[1]["metadata"]["numbers"])
        if len(reached[-1]) == 2 ** len(reached):
            break
    kept = {"base": base, "seed": seed, "numbers": problem[1]["metadata"]["numbers"]}
    kept["answer"] = problem[1]["answer"]
    kept["reachable"] = [{str(total): share for total, share in step.items()} for step in reached]
    for method, how in (("soft-thinking", {"k": k}), ("single", {})):
        cfg = world.config(folder, method, **task_of(base), **how, seed=seed, chains=1)
        generator = torch.Generator().manual_seed(seed)
        r = motg.rollout(model, tokenizer, [problem[-1]], cfg, generator)
        kept[method] = {"steps": token_weights(r, tokenizer)[0], "text": r.texts[0]}
    save(RESULTS / "trace.json", kept | about())


def draw(path=FIGURES / "least_sum.png"):
    """The trace as a picture: a column a step, a disc a sum, its area the weight in the mixture."""
    from matplotlib import pyplot as plt  # only who draws needs it

    kept = json.loads((RESULTS / "trace.json").read_text())
    numbers = kept["numbers"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True)
    titles = {"soft-thinking": "a mixture holds every sum", "single": "single tokens hold one"}
    for axis, (method, title) in zip(axes, titles.items()):
        before = {0: 1.0}
        for t, number in enumerate(numbers):
            for total in before:  # the tree of all choices of signs
                for after in (total - number, total + number):
                    axis.plot([t, t + 1], [total, after], color="0.85", linewidth=0.8, zorder=1)
            before = {int(total): share for total, share in kept["reachable"][t].items()}
            held = kept[method]["steps"][t] if t < len(kept[method]["steps"]) else {}
            for word, weight in held.items():
                total = world.sum_of(word)
                if total is not None and weight > 0.002:
                    color = "tab:blue" if total in before else "tab:red"
                    axis.scatter(t + 1, total, 900 * weight, color=color, alpha=0.75, zorder=2)
            for total, share in before.items():  # where they should be, and how large
                axis.scatter(
                    t + 1, total, 900 * share, facecolor="none", edgecolor="black", linewidth=0.6
                )
        reply = kept[method]["text"].partition(motg.TAG)[2].strip()
        axis.set_title(f"{title}\n{reply}", fontsize=10)
        names = ["0"] + [f"± {number}" for number in numbers]
        axis.set_xticks(range(len(names)), names)
        axis.set_xlabel("a thinking step gives a number its sign")
        axis.axhline(int(kept["answer"]), color="tab:green", linewidth=0.8, linestyle=":")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("partial sum; disc: weight in the mixture, ring: true share")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ---------------------------------------------------------------------------------------- the table
def table():
    """Mean over seeds, and its spread, of every read-out of every variant that has results."""
    for name, (*_, seeds) in VARIANTS.items():
        paths = [path_of(name, seed) for seed in range(seeds)]
        kept = [json.loads(path.read_text()) for path in paths if path.exists()]
        if not kept:
            continue
        first = kept[0]
        print(f"\n{name}: {len(kept)} seeds, {first['commit']}, {first['machine']};", end=" ")
        print(f"the guess is right for {first['guess_right']:.2f} of {first['problems']} problems")
        columns = "".join(f"{column:>8}" for column in ("hard", "pass@8", "guessed", "legal"))
        print(f"{'read with':34}{'right':>13}{columns}  support by step")
        for read in first["read_out"]:
            found = [one["read_out"][read] for one in kept if read in one["read_out"]]
            print(f"{read:34}{row_of(found)}")


def row_of(found):
    """The numbers of a read-out, a dict a seed, as text."""
    right = [x["right"] for x in found]
    spread = statistics.stdev(right) if len(right) > 1 else math.nan
    means = [statistics.mean(x[key] for x in found) for key in ("hard", "pass@8", "guessed")]
    means.append(statistics.mean(y or 0 for x in found for y in x.get("legal", [math.nan])))
    steps = zip(*(x["support"] for x in found))
    steps = " ".join(f"{statistics.mean(x or 0 for x in step):.1f}" for step in steps)
    return (
        f"{statistics.mean(right):6.3f} ±{spread:.3f}{''.join(f'{x:8.3f}' for x in means)}  {steps}"
    )


# --------------------------------------------------------------------------------- all of the runs
def started(job):
    """One job in a process of its own, on one thread."""
    name, seed = job
    if path_of(name, seed).exists():
        return
    RUNS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--run", name, "--seed", str(seed)]
    began = time.perf_counter()
    with open(RUNS / f"{path_of(name, seed).stem}.log", "w") as log:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=False, env=env, stdout=log, stderr=log)
    seconds = time.perf_counter() - began
    says = f"{seconds:.0f} s" if done.returncode == 0 else f"failed: see {log.name}"
    print(time.strftime("%H:%M:%S"), name, seed, says, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--only", default="", help="variants, with commas")
    parser.add_argument("--seeds", type=int, default=5, help="at most so many of each")
    parser.add_argument("--trace", action="store_true", help="the thought of the picture, drawn")
    parser.add_argument("--table", action="store_true", help="print what the results say")
    parser.add_argument("--run", help="one variant, in this process")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.run:
        return one_run(a.run, a.seed)
    if a.table:
        return table()
    if a.trace:
        trace()
        return draw()
    jobs = []
    for group in (central(), around()):  # one seed of a whole group, then the next seed
        for seed in range(a.seeds):
            jobs += [(name, seed) for name, (*_, seeds) in group.items() if seed < seeds]
    only = a.only.split(",") if a.only else VARIANTS
    with ThreadPoolExecutor(a.jobs) as pool:
        list(pool.map(started, [job for job in jobs if job[0] in only]))


if __name__ == "__main__":
    main()
