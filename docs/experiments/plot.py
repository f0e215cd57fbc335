"""Tables and figures of docs/evidence.md, docs/evidence_tables.md and docs/real.md.

    python docs/experiments/plot.py           fills in the tables and draws the figures (matplotlib)
    python docs/experiments/plot.py --tables  the tables only

Everything comes from docs/experiments/results. Intervals are 95%, of Student's t over seeds. A
difference is paired: runs of the same seed had the same base and the same problems.
"""

import json
import re
import sys
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import probes  # noqa: E402
import temperatures  # noqa: E402

DOCS, RESULTS = HERE.parent, HERE / "results"
METHODS = ("single", "dirichlet", "different-tokens")
STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}
STUDENT |= {8: 2.306, 9: 2.262}  # 97.5%, by degrees of freedom
STYLES = dict(zip(METHODS, (("#777777", "--"), ("#0072b2", "-"), ("#d55e00", "-."))))


# ------------------------------------------------------------------------------------------- tables
def load(folder):
    """{variant: {seed: result}} of evidence.py."""
    runs = {}
    for path in sorted(folder.glob("*.[0-9].json")):
        run = json.loads(path.read_text())
        runs.setdefault(run["variant"], {})[run["seed"]] = run
    return runs


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


def comparison(runs, names, reference="single"):
    """Accuracy of variants before and after, and the paired difference to a reference."""
    rows = []
    for name in filter(runs.__contains__, names):
        mine, other = runs[name], runs.get(reference, {})
        both = sorted(mine.keys() & other.keys())
        difference = [mine[s]["accuracy_after"] - other[s]["accuracy_after"] for s in both]
        row = [name, len(mine), shown([r["accuracy_before"] for r in mine.values()])]
        row += [shown([r["accuracy_after"] for r in mine.values()])]
        row += [min(f"{r['accuracy_after']:.2f}" for r in mine.values())]
        rows.append([*row, shown(difference, sign="+") if name != reference else ""])
    header = ["variant", "seeds", "before", "after", "worst seed", f"minus `{reference}`"]
    return markdown(header, rows)


def square(runs, base, names, columns):
    """Accuracy by what a model was trained with (rows) and read out with (columns)."""
    models = {"before training": [base]} if base else {}
    for name in filter(runs.__contains__, names):
        models[name] = [run["read_out"] for run in runs[name].values()]
    rows = []
    for name, found in models.items():
        values = [[read[c]["pass@1"] for read in found if c in read] for c in columns]
        rows.append([name, *(shown(v, 2) for v in values)])
    return markdown(["trained with", *columns], rows)


def bias(path=RESULTS / "bias.json"):
    """Of gradient estimates on the enumerable problem."""
    rows = json.loads(path.read_text())["rows"]
    return markdown(list(rows[0]), [list(row.values()) for row in rows])


def against_trl(path=RESULTS / "trl.json"):
    """TRL's trainer beside motg's, seed by seed."""
    rows, lines = json.loads(path.read_text())["rows"], []
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


# ------------------------------------------------------------------------------ the real model
def load_real(folder=RESULTS / "real"):
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
            cells = [with_error(shares(read[m])) if m in read else "" for m in METHODS]
            rows.append([task, name, *cells])
    return markdown(["task", "trained with", *METHODS], rows)


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


# --------------------------------------------------------------------------------- the evidence
def ends(path=RESULTS / "ends.json"):
    """Both ways to end a thought, by method and score."""
    rows = []
    for name, found in json.loads(path.read_text())["runs"].items():
        method, score, passes = name.rsplit("-", 2)
        cells = [shown(found[code]["after"]) for code in ("old", "new")]
        worst = [f"{min(found[code]['after']):.2f}" for code in ("old", "new")]
        more = ", one pass" if passes == "1" else ""
        rows.append([f"`{method}`, {score}{more}", cells[0], worst[0], cells[1], worst[1]])
    header = ["", "mixed first", "worst seed", "the end drawn apart", "worst seed"]
    return markdown(header, sorted(rows))


def least_sum_table(variants, reads, key="right"):
    """Accuracy in the world of least_sum.py, a number a seed: read-outs (rows) of bases and trained
    models."""
    models = {}
    for name in variants:
        paths = sorted((RESULTS / "least_sum").glob(f"{name.replace(' ', '-')}.[0-9].json"))
        models[name] = [json.loads(path.read_text())["read_out"] for path in paths]
    rows = []
    for read in reads:
        found = [[x[read][key] for x in models[name] if read in x] for name in variants]
        rows.append([read, *(", ".join(f"{x:.2f}" for x in values) for values in found)])
    return markdown(["read with", *variants], rows)


BASES = ("base soft", "base random", "base soft steps=3000", "base random steps=3000")
LEARNERS = ("single", "multiplex", "different-tokens", "soft-thinking")
READS = ("single T=1", "single T=0.1", "different-tokens k=8", "multiplex k=8")
READS += ("soft-thinking k=16",)
TEMPERATURES = ("lead", "best", "cross", "drawn", "diversity", "long", "half")


def evidence_tables():
    """{name of a marker in docs/evidence.md: its table}."""
    return {
        **{name: temperatures.TABLES[name]() for name in TEMPERATURES},
        "least": least_sum_table(BASES, READS),
        "learned": least_sum_table([f"grpo {name}" for name in LEARNERS], (*READS, "own")),
        "alone": probes.step_table(),
        "variance": probes.variance_table(),
    }


def all_tables():
    """The same for docs/evidence_tables.md."""
    ks = (2, 4, 8, 16, 32)
    rules = ("soft-thinking", "different-tokens", "dirichlet", "multiplex", "cot2")
    reads = [f"{rule} k={k}" for rule in rules for k in ks]
    return {
        "temperatures": temperatures.temperature_table(),
        "rates": temperatures.rate_table(),
        "ends": ends(),
        "bias": bias(),
        "by_k": least_sum_table(("base soft",), reads),
        "trl": against_trl(),
    }


DOCUMENTS = {"evidence.md": evidence_tables, "evidence_tables.md": all_tables}
DOCUMENTS["real.md"] = real_tables


def filled(text, tables):
    """A document's text with each table between its markers."""
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, rf"\g<1>{table}\n\g<2>", text, flags=re.DOTALL)
    return text


# ------------------------------------------------------------------------------------------ figures
def smooth(curve, n=1):
    """Means over windows of 2n + 1 updates, shorter at the ends."""
    return [mean(curve[max(0, i - n) : i + n + 1]) for i in range(len(curve))]


def finish(figure, axes, name):
    """The last touches to a figure, and its file."""
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8)
    figure.savefig(DOCS / f"figures/{name}.png", dpi=130)


def bias_and_variance(plt):
    """Of gradient estimates on the enumerable problem."""
    rows = json.loads((RESULTS / "bias.json").read_text())["rows"]
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


def real_figure(plt):
    """Curves while training, a row a task."""
    runs = load_real()[1]
    tasks = list(dict.fromkeys(task for task, *_ in runs))
    titles = {"correct": "right while training", "format": "well formed"}
    titles |= {"no_gradient": "prompts without a gradient", "support": "exp H(w), tokens"}
    size = {"figsize": (3.2 * len(titles), 2.6 * len(tasks)), "layout": "constrained"}
    figure, axes = plt.subplots(len(tasks), len(titles), squeeze=False, sharex=True, **size)
    for row, task in zip(axes, tasks, strict=True):
        for ax, (probe, title) in zip(row, titles.items(), strict=True):
            for method in METHODS:
                color, line = STYLES[method]
                mine = [x for (t, m, _), x in runs.items() if (t, m) == (task, method)]
                for i, run in enumerate(mine):
                    y = smooth(run["curves"][probe])
                    label = method if i == 0 and probe == "correct" else None
                    ax.plot(range(1, len(y) + 1), y, color=color, linestyle=line, label=label)
            ax.set(title=f"{task}: {title}", xlabel="GRPO step" if task == tasks[-1] else "")
            ax.title.set_fontsize(9)
    finish(figure, axes.flatten(), "real")


def main():
    for name, make in DOCUMENTS.items():
        page = DOCS / name
        page.write_text(filled(page.read_text(), make()))
    if "--tables" not in sys.argv[1:]:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot

        bias_and_variance(pyplot)
        real_figure(pyplot)
        temperatures.draw()


if __name__ == "__main__":
    main()
