"""The tables of docs/evidence.md and docs/real.md and their figures, from docs/results alone.

    python docs/plot.py           fills in the tables and draws the figures (matplotlib)
    python docs/plot.py --tables  the tables only, which needs no package

Intervals are 95%, of Student's t over seeds. A difference is paired: runs of the same seed had the
same problems.
"""

import json
import math
import re
import sys
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).resolve().parent
METHODS = ("single", "dirichlet", "different-tokens", "multiplex", "soft-grpo", "lepo")
PATHS = tuple(f"paths {method}" for method in METHODS[:4])
CONTROLS = ("paths single T=0.7", "paths noise")
SCORES = ("representative", "weighted", "exact", "exact+1")
PRESET = {"different-tokens weighted": "different-tokens", "dirichlet representative": "dirichlet"}
APART = [f"single, {parts}" for parts in ("both warm", "cold answer", "cold thought", "both cold")]
APART += [f"{read}, {parts}" for read in METHODS[1:4] for parts in ("both warm", "cold answer")]
WINDOWS = ("1 to 4", "5 to 8", "9 to 12", "13 to 16", "17 to 20")  # steps of a thought
STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}
STUDENT |= {8: 2.306, 9: 2.262}  # 97.5%, by degrees of freedom
MAIN = dict(zip(METHODS[:3], (("#777777", "--"), ("#0072b2", "-"), ("#d55e00", "-."))))


def load(folder=HERE / "results"):
    """{variant: {seed: result}}, and the read-outs of the two worlds' base models."""
    runs, bases = {}, []
    for path in sorted(folder.glob("*.[0-9].json")):
        run = json.loads(path.read_text())
        runs.setdefault(run["variant"], {})[run["seed"]] = run
    for name in ("base", "paths"):
        path = folder / f"{name}.json"
        bases.append(json.loads(path.read_text())["read_out"] if path.exists() else {})
    return runs, *bases


def interval(values):
    """Mean and half the width of its 95% interval (None for a single value)."""
    n = len(values)
    return mean(values), STUDENT[n - 1] * stdev(values) / n**0.5 if n > 1 else None


def shown(values, digits=3, sign=""):
    """`mean ± half-width`, or nothing of nothing."""
    if not values:
        return ""
    center, half = interval(values)
    around = "" if half is None else f" ± {half:.{digits}f}"
    return f"{center:{sign}.{digits}f}{around}"


def markdown(header, rows):
    """A table of strings."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def last(run, name, n=10):
    """A curve's mean over the last n updates."""
    return mean(run["curves"][name][-n:])


def sampled(run):
    """Tokens sampled by each update of a run."""
    chains = 16 * run["flags"].get("chains", 8)
    c = run["curves"]
    return [chains * (a + b) for a, b in zip(c["think_tokens"], c["answer_tokens"])]


def comparison(runs, names, reference="single", more=()):
    """Accuracy of variants before and after, and the paired difference to a reference."""
    rows = []
    for name in names:
        if name not in runs:
            continue
        mine, other = runs[name], runs.get(reference, {})
        both = sorted(mine.keys() & other.keys())
        difference = [mine[s]["accuracy_after"] - other[s]["accuracy_after"] for s in both]
        row = [name, len(mine), shown([r["accuracy_before"] for r in mine.values()])]
        row += [shown([r["accuracy_after"] for r in mine.values()])]
        row += [min(f"{r['accuracy_after']:.2f}" for r in mine.values())]
        row += [shown(difference, sign="+") if both and name != reference else ""]
        rows.append(row + [shown([f(r) for r in mine.values()]) for _, f in more])
    header = ["variant", "seeds", "before", "after", "worst seed", f"minus `{reference}`"]
    return markdown(header + [title for title, _ in more], rows)


def support(runs):
    """Of the weights, in the first, the middle and the last ten updates."""
    rows = []
    for name in METHODS[1:]:
        for probe, title in (("support", "exp H(w)"), ("one_hot", "share above 0.99")):
            found = [run["curves"] for run in runs.get(name, {}).values()]
            curves = [c[probe] for c in found if probe in c]  # not in five runs of multiplex
            parts = [[mean(c[a : a + 10]) for c in curves] for a in (0, 35, 70)]
            if curves:
                rows.append([name, title, len(curves), *map(shown, parts)])
    return markdown(["method", "of the weights", "seeds", "first", "middle", "last"], rows)


def square(runs, base, methods=METHODS):
    """Trained with (rows) and read out with (columns)."""
    columns = list(base)
    rows = [["before training", *(f"{base[name]['pass@1']:.2f}" for name in columns)]]
    for name in methods:
        found = [run["read_out"] for run in runs.get(name, {}).values()]
        if found:
            values = [[r[column]["pass@1"] for r in found if column in r] for column in columns]
            rows.append([name, *(shown(v, 2) for v in values)])
    return markdown(["trained with", *columns], rows)


def why(runs, base):
    """Entropies of trained models, own read-out, beside the same model read with single tokens."""
    rows = []
    for name in METHODS:
        found = list(runs.get(name, {}).values())
        if not found:
            continue
        row = [name]
        for read in ("own", "single"):
            at = [r["read_out"][read] for r in found]
            row += [shown([x["hidden_entropy"][-1] for x in at]), shown([x["entropy"] for x in at])]
            row.append(shown([x["distinct_tokens"] for x in at], 1))
        for kind in ("right", "wrong"):
            at = [r["right_and_wrong"][kind] for r in found]
            row.append(shown([x["hidden_entropy"][-1] for x in at if x["hidden_entropy"]]))
        rows.append(row)
    header = ["trained with", "hidden", "H(p)", "distinct tokens"]
    header += ["hidden, single", "H(p), single", "distinct, single", "right", "wrong"]
    return markdown(header, rows)


def window(read, outcomes, i):
    """The mean over thoughts of some outcomes in the i-th window; None for too few thoughts."""
    parts = [read[outcome][i] for outcome in outcomes if i < len(read[outcome])]
    n = sum(thoughts for thoughts, _ in parts)
    return sum(k * x for k, x in parts if k) / n if n >= 20 else None


def windows(runs):
    """Hidden-state entropy along the thought, of the model's own read-out and of single tokens."""
    rows, both = [], ("right", "wrong")
    kinds = [("own", both), ("own", both[:1]), ("own", both[1:]), ("single", both)]
    for name in (*METHODS, *PATHS):
        found = [run["windows"] for run in runs.get(name, {}).values() if "windows" in run]
        for (read, outcomes), title in zip(kinds, ("own", "own, right", "own, wrong", "single")):
            cells = []
            for i in range(len(WINDOWS)):
                values = [window(run[read], outcomes, i) for run in found]
                cells.append(shown([x for x in values if x is not None]))
            if found and not name.endswith(read):  # "single" has one read-out, its own
                rows.append([name, title, len(found), *cells])
    return markdown(["trained with", "read with", "seeds", *WINDOWS], rows)


def apart(runs):
    """Accuracy of single tokens and of mixtures where only a thought or only an answer is cold."""
    rows = []
    for name in (*METHODS, *PATHS):
        found = [run for run in runs.get(name, {}).values() if "apart" in run]
        reads = {f"{read}, both warm": read for read in METHODS[:4]}
        reads["single, both cold"] = "single T=0.1"
        accuracies = [
            r["apart"] | {n: r["read_out"][x]["pass@1"] for n, x in reads.items()} for r in found
        ]
        if found:
            rows.append([name, len(found), *(shown([a[n] for a in accuracies], 2) for n in APART)])
    return markdown(["trained with", "seeds", *APART], rows)


def bias(folder=HERE / "results"):
    """Of gradient estimates on the enumerable problem."""
    path = folder / "bias.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return markdown(list(rows[0]), [list(row.values()) for row in rows]) if rows else ""


def against_trl(folder=HERE / "results"):
    """TRL's trainer beside motg's, seed by seed."""
    path = folder / "trl.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    lines = []
    for seed in sorted({row["seed"] for row in rows}):
        found = {row["trainer"]: row for row in rows if row["seed"] == seed}
        both = {name: found[name] for name in ("motg", "TRL")}
        shares = [f"{both[t]['accuracy']:.3f} ± {1.96 * both[t]['stderr']:.3f}" for t in both]
        seconds = [f"{row['seconds']:.0f}" for row in both.values()]
        ratio = both["TRL"]["seconds"] / both["motg"]["seconds"]
        lines.append([seed, *shares, *seconds, f"{ratio:.2f}"])
    names = ("motg", "TRL")
    header = [f"{name}, {what}" for what in ("accuracy", "seconds") for name in names]
    return markdown(["seed", *header, "TRL / motg"], lines)


def tables():
    """{name of a marker in docs/evidence.md: its table}."""
    runs, base, paths_base = load()
    steps = ("H(p) at the end", lambda r: last(r, "entropy"))
    tokens = ("1,000 tokens sampled", lambda r: sum(sampled(r)) / 1000)
    length = ("thought's length", lambda r: last(r, "think_tokens"))
    mixed = [steps, ("exp H(w) at the end", lambda r: last(r, "support"))]
    of = {name: [v for v in runs if v.startswith(f"{name} ")] for name in METHODS}
    kinds = [
        f"{name} {kind}"
        for name in ("different-tokens", "dirichlet", "soft-thinking")
        for kind in SCORES
    ]
    named = [PRESET.get(kind, kind) for kind in kinds]
    halves = [f"{name}{more}" for name in METHODS[:3] for more in ("", " G=4")]
    controls = ["single", *of["single"], "dirichlet", "uniform", "noise", "shuffled"]
    controls = [name for name in controls if "G=4" not in name]
    ks = ["single", "dirichlet k=1", "dirichlet", "dirichlet k=4", "dirichlet k=8"]
    ks += [f"dirichlet c={c}" for c in ("0.1", "10", "100")]
    ends = [f"{name}{more}" for name in METHODS[1:3] for more in ("", " most-likely")]
    return {
        "methods": comparison(runs, METHODS, more=[steps, length]),
        "chains": comparison(runs, halves, more=[tokens]),
        "controls": comparison(runs, controls, more=[steps]),
        "k": comparison(runs, ks, more=[steps]),
        "scores": comparison(runs, named, more=[steps, length]),
        "support": support(runs),
        "square": square(runs, base),
        "why": why(runs, base),
        "windows": windows(runs),
        "apart": apart(runs),
        "ends": comparison(runs, ends),
        "paths": comparison(runs, [*PATHS, *CONTROLS], "paths single", mixed),
        "paths_square": square(runs, paths_base, PATHS),
        "bias": bias(),
        "trl": against_trl(),
    }


# ------------------------------------------------------------------------------ the real model
def load_real(folder=HERE / "results/real"):
    """Tasks' base read-outs, and runs: {(task, method, seed): result}."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    runs = {(x["task"], x["method"], x["seed"]): x for x in found if "method" in x}
    bases = {x["task"]: x for x in found if "method" not in x}
    of = {task: task.partition("-")[0] for task, *_ in runs}  # with the same problems
    bases = {task: bases[name] for task, name in of.items() if name in bases}
    return bases, dict(sorted(runs.items()))


def shares(read, keep=None):
    """Of each problem (or those of `keep`), the share of its chains that were right."""
    found = [n / read["chains"] for n in read["right"]]
    return found if keep is None else [x for x, kept in zip(found, keep, strict=True) if kept]


def with_error(values, sign=""):
    """Mean ± standard error over problems."""
    return f"{mean(values):{sign}.3f} ± {stdev(values) / len(values) ** 0.5:.3f}"


def said(read, answer):
    """The share of chains that gave an answer; of the most frequent ones alone it is known."""
    counts, chains = dict(read["answers"]), read["problems"] * read["chains"]
    if answer in counts:
        return f"{counts[answer] / chains:.2f}"
    return f"≤ {min(counts.values()) / chains:.2f}"


def own_read_outs(bases, runs):
    """[(task, method, seed, before, after)]: each run's own read-out, untrained and trained."""
    found = []
    for (task, method, seed), run in runs.items():
        both = [x.get("read_out", {}).get(method) for x in (bases.get(task, {}), run)]
        if all(both):
            found.append((task, method, seed, *both))
    return found


def real_gains(bases, runs):
    """Right answers before and after training, problem by problem."""
    rows = []
    for task, method, seed, *both in own_read_outs(bases, runs):
        truths = bases[task]["truths"]
        usual = max(sorted(set(truths)), key=truths.count)  # the same one at every call
        rare = [truth != usual for truth in truths]
        gains = [b - a for a, b in zip(*map(shares, both), strict=True)]
        row = [task, method, seed, "bf16" if runs[task, method, seed]["bf16"] else "fp32"]
        row += [*(with_error(shares(x)) for x in both), with_error(gains, "+")]
        row.append(", ".join(f"{x['format']:.2f}" for x in both))
        row.append(f"{truths.count(usual) / len(truths):.2f}")
        row.append(", ".join(f"{mean(shares(x, rare)):.2f}" for x in both))
        rows.append([*row, ", ".join(said(x, usual) for x in both)])
    header = "task|method|seed|trained in|right before|right after|difference|well formed"
    header += "|the commonest answer is right|right where it is not|it is said"
    return markdown(header.split("|"), rows)


def real_square(bases, runs):
    """Trained with (rows) and read out with (columns)."""
    rows = []
    for task in dict.fromkeys(task for task, *_ in runs if task in bases):
        trained = {"before training": bases[task]["read_out"]}
        for (of, method, seed), run in runs.items():
            if of == task:
                trained[f"{method}, seed {seed}"] = run["read_out"]
        for name, read in trained.items():
            cells = [with_error(shares(read[m])) if m in read else "" for m in METHODS[:3]]
            rows.append([task, name, *cells])
    return markdown(["task", "trained with", *METHODS[:3]], rows)


def real_mixing(bases, runs):
    """What the own read-out mixes, before and after."""
    rows, probes = [], ("entropy", "support", "one_hot", "distinct_tokens", "think_tokens")
    for task, method, seed, *both in own_read_outs(bases, runs):
        cells = [", ".join(f"{x[probe]:.3g}" for x in both) for probe in probes]
        rows.append([task, method, seed, *cells])
    header = ["task", "method", "seed", "H(p), nats", "exp H(w)", "weight above 0.99"]
    return markdown([*header, "distinct tokens", "thought's length"], rows)


def real_tables():
    """{name of a marker in docs/real.md: its table}."""
    bases, runs = load_real()
    makers = {"gains": real_gains, "square": real_square, "mixing": real_mixing}
    return {name: make(bases, runs) for name, make in makers.items()}


DOCUMENTS = {"evidence.md": tables, "real.md": real_tables}


def filled(text, tables):
    """A document's text with each table between its markers."""
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, rf"\g<1>{table}\n\g<2>", text, flags=re.DOTALL)
    return text


# ---------------------------------------------------------------------------------- figures
def smooth(curve, n=5):
    """Means over windows of 2n + 1 updates, shorter at the ends."""
    return [mean(curve[max(0, i - n) : i + n + 1]) for i in range(len(curve))]


def band(ax, xs, curves, label, color, line):
    """Mean and 95% interval over seeds, at each update."""
    points = [interval(values) for values in zip(*curves, strict=True)]
    y, half = [p[0] for p in points], [p[1] or 0 for p in points]
    ax.plot(xs, y, color=color, linestyle=line, linewidth=2, label=label)
    low, high = ([a + sign * b for a, b in zip(y, half)] for sign in (-1, 1))
    ax.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)


def finish(figure, axes, name):
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8)
    figure.savefig(HERE / f"{name}.png", dpi=130)


STYLES = MAIN | {"multiplex": ("#009e73", ":"), "soft-grpo": ("#cc79a7", (0, (5, 1)))}
STYLES |= {"lepo": ("#000000", (0, (1, 1)))}
STEP, RIGHT = "GRPO step", "right answers, unseen problems"
SUPPORT = "effective support exp H(w), tokens"


def curves(runs, name, probe):
    """A probe over training, smoothed, of each run that has it."""
    found = [run["curves"] for run in runs.get(name, {}).values()]
    return [smooth(c[probe]) for c in found if probe in c]


def training(ax, runs, names, probe, ylabel, styles=STYLES):
    """The curves of some variants, {variant: label} or names, with their bands."""
    names = names if isinstance(names, dict) else {name: name for name in names}
    for name, label in names.items():
        found = curves(runs, name, probe)
        if found:
            label = f"{label} ({len(found)} seeds)"
            band(ax, range(1, len(found[0]) + 1), found, label, *styles[names[name]])
    ax.set(xlabel=STEP, ylabel=ylabel)


def learning(plt, runs, base):
    """Right answers over training, three methods and the others beside `single`."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for ax, names in zip(axes, (METHODS[:3], (METHODS[0], *METHODS[3:])), strict=True):
        training(ax, runs, names, "correct", RIGHT)
    finish(figure, axes, "learning")


def second_world(plt, runs, base):
    """What is learned there, and what is mixed."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    names = {name: name.removeprefix("paths ") for name in PATHS}
    training(axes[0], runs, names, "correct", RIGHT)
    training(axes[1], runs, names, "support", SUPPORT)
    finish(figure, axes, "paths")


def half_the_chains(plt, runs, base):
    """Accuracy against tokens sampled, G and G / 2."""
    figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for name in METHODS[:3]:
        for more, width in (("", 2.2), (" G=4", 1.0)):
            mine = list(runs.get(name + more, {}).values())
            if not mine:
                continue
            spent = [mean(each) / 1000 for each in zip(*map(sampled, mine), strict=True)]
            total = [sum(spent[: i + 1]) for i in range(len(spent))]
            y = [mean(each) for each in zip(*curves(runs, name + more, "correct"), strict=True)]
            label = f"{name}, G = {4 if more else 8}"
            color, line = STYLES[name]
            ax.plot(total, y, color=color, linestyle=line, linewidth=width, label=label)
    ax.set(xlabel="thousand tokens sampled", ylabel=RIGHT)
    finish(figure, [ax], "chains")


def matched_entropy(plt, runs, base):
    """Final accuracy against the entropy of p in the text that was read."""
    figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    heated = ["single T=0.7", "single", "single T=1.1", "single T=1.3"]
    others = [*METHODS[1:], "noise", "shuffled", "uniform"]
    aside = {"single": (-62, -13), "dirichlet": (5, -13), "lepo": (-27, 6), "multiplex": (8, -8)}
    places = {}
    for name in filter(runs.__contains__, heated + others):
        mine = runs[name].values()
        x, y = [last(r, "entropy") for r in mine], [r["accuracy_after"] for r in mine]
        places[name] = [interval(values) for values in (x, y)]
    for name, ((x, dx), (y, dy)) in places.items():
        mark, color = ("o", "#777777") if name in heated else ("s", "#0072b2")
        fill = color if name in heated else "white"
        bars = {"xerr": dx, "yerr": dy, "elinewidth": 0.8, "ecolor": color}
        ax.errorbar(x, y, fmt=mark, color=color, markerfacecolor=fill, **bars)
        text = "single T=0.9" if name == "single" else name
        ax.annotate(text, (x, y), aside.get(name, (6, 5)), textcoords="offset points", fontsize=8)
    ax.plot(*([places[n][i][0] for n in heated if n in places] for i in (0, 1)), "--", color="#777")
    ax.set(xlabel="H(p) of the text that was read, last steps, nats", ylabel="accuracy after")
    finish(figure, [ax], "controls")


def score_curves(plt, runs, base):
    """Right answers over training by what scores a step."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained", sharey=True)
    looks = [("#777777", "--"), ("#d55e00", "-."), ("#0072b2", "-"), ("#000000", ":")]
    styles = dict(zip(SCORES, looks, strict=True))
    for ax, method in zip(axes, ("different-tokens", "dirichlet", "soft-thinking"), strict=True):
        kinds = {f"{method} {kind}": kind for kind in SCORES}
        training(ax, runs, {PRESET.get(k, k): v for k, v in kinds.items()}, "correct", "", styles)
        ax.set(title=method)
    axes[0].set(ylabel=RIGHT, ylim=(0, 0.8))
    finish(figure, axes, "scores")


def bias_and_variance(plt, runs, base):
    """Of gradient estimates on the enumerable problem."""
    rows = json.loads((HERE / "results/bias.json").read_text())["rows"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    lines, marks = ("-", "--", "-.", ":", (0, (5, 1))), ("o", "s", "x", "^")
    ticks = (2, 5, 10, 20, 50, 100)
    rules = list(dict.fromkeys(row["candidates, weights"] for row in rows))
    kinds = list(dict.fromkeys(row["score"] for row in rows))
    for ax, p in zip(axes, ("flat", "sharp"), strict=True):
        for rule, line in zip(rules, lines, strict=True):
            mine = [r for r in rows if (r["candidates, weights"], r["p"]) == (rule, p)]
            x = [float(r["variance / truth^2"]) for r in mine]
            y = [float(r["relative error of E"]) for r in mine]
            [drawn] = ax.plot(x, y, linestyle=line, linewidth=1, label=rule)
            for i, row in enumerate(mine):
                ax.plot(x[i], y[i], marks[kinds.index(row["score"])], color=drawn.get_color())
        for kind, mark in zip(kinds, marks, strict=True):
            ax.plot([], [], mark, color="black", label=kind)
        ax.set(title=f"{p} p", xlabel="variance of one estimate / |true gradient|^2", xscale="log")
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
    axes[0].set(ylabel="relative error of the expected gradient")
    finish(figure, axes, "bias")


def survival(plt, runs, base):
    """Effective support and sharpness over training."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    training(axes[0], runs, METHODS[1:], "support", SUPPORT)
    training(axes[1], runs, METHODS[1:], "one_hot", "share of steps with a weight above 0.99")
    for ax, limits in zip(axes, ((1, 1.25), (0.65, 1)), strict=True):  # room for the names
        ax.set(ylim=limits)
    finish(figure, axes, "support")


def hidden_by_layer(plt, runs, base):
    """Hidden-state entropy, before and after training, and by outcome."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", sharey=True)
    for name in filter(runs.__contains__, METHODS[:3]):
        color, line = STYLES[name]
        mine = list(runs[name].values())
        kinds = [[run["right_and_wrong"][kind] for run in mine] for kind in ("right", "wrong")]
        panels = [[base[name]], [run["read_out"]["own"] for run in mine]]
        for ax, found in zip(axes, panels):
            layers = [x["hidden_entropy"] for x in found]
            band(ax, range(len(layers[0])), layers, name, color, line)
        for found, mark, kind in zip(kinds, ("o", "x"), ("right", "wrong")):
            layers = zip(*(x["hidden_entropy"] for x in found if x["hidden_entropy"]))
            y = [mean(each) for each in layers]
            label = f"{name}, {kind}"
            axes[2].plot(range(len(y)), y, mark, color=color, linestyle=line, label=label)
    for ax, title in zip(axes, ("before training", "after", "after, by outcome")):
        ax.set(xlabel="layer (0: embeddings)", title=title, xticks=range(4))
    axes[0].set(ylabel="hidden-state entropy of a thought")
    finish(figure, axes, "hidden")


def hidden_along_the_thought(plt, runs, base):
    """Hidden-state entropy in windows, of all thoughts and by outcome."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    kinds = ((("right", "wrong"), None), (("right",), "right"), (("wrong",), "wrong"))
    for name in filter(runs.__contains__, METHODS[:4]):
        color, line = STYLES[name]
        found = [run["windows"]["own"] for run in runs[name].values() if "windows" in run]
        for outcomes, kind in kinds if found else ():
            values = [[window(read, outcomes, i) for read in found] for i in range(len(WINDOWS))]
            y = [math.nan if None in each else mean(each) for each in values]
            label = f"{name}, {kind}" if kind else f"{name} ({len(found)} seeds)"
            marks = {"marker": {"right": "o", "wrong": "x"}.get(kind), "label": label}
            axes[int(kind is not None)].plot(range(len(y)), y, color=color, linestyle=line, **marks)
    for ax, title in zip(axes, ("all thoughts", "by outcome")):
        ax.set(xlabel="thinking steps", title=title)
        ax.set_xticks(range(len(WINDOWS)), WINDOWS)
    axes[0].set(ylabel="hidden-state entropy, last layer")
    finish(figure, axes, "windows")


def read_outs(plt, runs, base):
    """The square: trained with, and read out with."""
    names = [name for name in METHODS if name in runs]
    columns = list(base)
    read = [
        [[r["read_out"][c]["pass@1"] for r in runs[n].values()] for c in columns] for n in names
    ]
    values = [[mean(each) for each in row] for row in read]
    values.insert(0, [base[c]["pass@1"] for c in columns])
    figure, ax = plt.subplots(figsize=(7.5, 4), layout="constrained")
    ax.imshow(values, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            color = "white" if value > 0.5 else "black"
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=color)
    ax.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=8)
    ax.set_yticks(range(len(values)), ["before training", *names], fontsize=8)
    ax.set(xlabel="read out with", ylabel="trained with")
    figure.savefig(HERE / "square.png", dpi=130)


FIGURES = (learning, half_the_chains, matched_entropy, score_curves, bias_and_variance, survival)
FIGURES += (hidden_by_layer, hidden_along_the_thought, read_outs, second_world)


def real_figure(plt):
    runs = load_real()[1]
    tasks = list(dict.fromkeys(task for task, *_ in runs))
    titles = {"correct": "right while training", "format": "well formed"}
    titles |= {"no_gradient": "prompts without a gradient", "support": "exp H(w), tokens"}
    size = {"figsize": (3.2 * len(titles), 2.6 * len(tasks)), "layout": "constrained"}
    figure, axes = plt.subplots(len(tasks), len(titles), squeeze=False, sharex=True, **size)
    for row, task in zip(axes, tasks, strict=True):
        for ax, (probe, title) in zip(row, titles.items(), strict=True):
            for method in METHODS[:3]:
                color, line = MAIN[method]
                mine = [x for (t, m, _), x in runs.items() if (t, m) == (task, method)]
                for i, run in enumerate(mine):
                    y = smooth(run["curves"][probe], 1)
                    label = method if i == 0 and probe == "correct" else None
                    ax.plot(range(1, len(y) + 1), y, color=color, linestyle=line, label=label)
            ax.set(title=f"{task}: {title}", xlabel="GRPO step" if task == tasks[-1] else "")
            ax.title.set_fontsize(9)
    finish(figure, axes.flatten(), "real")


def main():
    for name, make in DOCUMENTS.items():
        path = HERE / name
        path.write_text(filled(path.read_text(), make()))
    if "--tables" not in sys.argv[1:]:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot

        runs, base, _ = load()
        for draw in FIGURES:
            draw(pyplot, runs, base)
        real_figure(pyplot)


if __name__ == "__main__":
    main()
