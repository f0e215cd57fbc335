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
STEPS, WARM_COLD = 40, (0.7, 0.3)  # of a whole run of real.py


def load_sums(folder=RESULTS / "sums"):
    """The untrained model's read-outs, and {(method, T): {seed: run}}, T = 0.7 first."""
    base, runs = json.loads((folder / "base.json").read_text())["read_out"], {}
    for path in folder.glob("*_T=*.json"):
        run = json.loads(path.read_text())
        runs.setdefault((run["method"], run["temperature"]), {})[run["seed"]] = run
    order = sorted(runs, key=lambda name: (-name[1], METHODS.index(name[0])))
    return base, {name: dict(sorted(runs[name].items())) for name in order}


def whole(run):
    """Whether a run's file has every step. Only such runs count in means."""
    return len(run["curves"]["correct"]) == STEPS


def bracketed(number, *runs):
    """A number of runs, in brackets if they do not count."""
    return number if all(map(whole, runs)) else f"({number})"


def right(read):
    """The share of right chains."""
    return mean(read["right"]) / read["chains"]


def solved(read):
    """pass@8: the share of problems that at least one of the 8 chains solved."""
    return mean(n > 0 for n in read["right"])


def sums_gains(base, runs):
    """Each method by its own read-out at the T of its training."""
    rows = []
    for (method, T), found in runs.items():
        own, mine = f"{method}, T={T}", [run for run in found.values() if whole(run)]
        reads, before = [run["read_out"][own] for run in mine], right(base[own])
        after = [bracketed(f"{right(x['read_out'][own]):.3f}", x) for x in found.values()]
        row = [f"`{method}`", T, len(mine), f"{before:.3f}", ", ".join(after)]
        row.append(shown([right(read) - before for read in reads], sign="+"))
        row += [f"{solved(base[own]):.3f}", shown([solved(read) for read in reads])]
        rows.append([*row, f"{mean(mean(run['curves']['no_gradient']) for run in mine):.2f}"])
    header = ["method", "T", "seeds", "right before", "right after, by seed", "difference"]
    return markdown([*header, "pass@8 before", "pass@8 after", "`no_gradient`"], rows)


def sums_reads(base, runs):
    """Untrained and trained models (rows), read warm and cold (columns)."""
    models = {(f"`{method}`", "untrained"): [base] for method in METHODS}
    for (method, T), found in runs.items():
        models[f"`{method}`", T] = [run["read_out"] for run in found.values() if whole(run)]
    rows = []
    for (name, T), reads in models.items():
        keys = [f"{by}, T={t}" for by in (name.strip("`"), "single") for t in WARM_COLD]
        rows.append([name, T, *(shown([right(read[key]) for read in reads]) for key in keys)])
    columns = [f"{by}, T = {t}" for by in ("own method", "`single`") for t in WARM_COLD]
    return markdown(["method", "trained at T", *columns], rows)


def sums_pairs(base, runs):
    """Mixtures minus `single`, trained and read at the same T, seed by seed."""
    seeds, rows = sorted({seed for found in runs.values() for seed in found}), []
    for (method, T), mine in runs.items():
        other = runs["single", T]
        for by in () if method == "single" else (method, "single"):
            cells, counted, all_files = dict.fromkeys(seeds, ""), [], []
            for seed in sorted(mine.keys() & other.keys()):
                x = right(mine[seed]["read_out"][f"{by}, T={T}"])
                x -= right(other[seed]["read_out"][f"single, T={T}"])
                cells[seed] = bracketed(f"{x:+.3f}", mine[seed], other[seed])
                all_files.append(x)
                counted += [x] if whole(mine[seed]) and whole(other[seed]) else []
            more = shown(all_files, sign="+") if len(counted) < len(all_files) else ""
            row = [f"`{method}`", T, f"`{by}`", *cells.values()]
            rows.append([*row, shown(counted, sign="+"), more])
    header = ["method", "T", "read by", *(f"seed {seed}" for seed in seeds), "mean"]
    return markdown([*header, "mean with the bracketed run"], rows)


def load_real(folder=RESULTS / "real"):
    """The first edition's tasks: base read-outs, and {(task, method): [result of each seed]}."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    bases, runs = {x["task"]: x for x in found if "method" not in x}, {}
    for x in found:
        if "method" in x:
            runs.setdefault((x["task"], x["method"]), []).append(x)
    order = sorted(runs, key=lambda name: (name[0], METHODS.index(name[1])))
    return bases, {name: runs[name] for name in order}


def said(read, answer):
    """The share of chains that gave an answer; of the most frequent ones alone it is known."""
    counts, chains = dict(read["answers"]), read["problems"] * read["chains"]
    if answer in counts:
        return f"{counts[answer] / chains:.2f}"
    return f"≤ {min(counts.values()) / chains:.2f}"


def constants(bases, runs):
    """How much a constant answer earns, what else is right, and how often the constant is said."""
    rows = []
    for (task, method), found in runs.items():
        base = bases[task.partition("-")[0]]  # the same problems
        truths, reads = base["truths"], [x["read_out"][method] for x in (base, *found)]
        usual = max(sorted(set(truths)), key=truths.count)  # the same one at every call
        rest = [i for i, truth in enumerate(truths) if truth != usual]
        cells = [[], [], []]
        for read in reads:
            cells[0].append(f"{right(read):.2f}")
            cells[1].append(f"{mean(read['right'][i] for i in rest) / read['chains']:.2f}")
            cells[2].append(said(read, usual))
        row = [task, f"`{method}`", f"{usual}: {truths.count(usual) / len(truths):.2f}"]
        rows.append([*row, *(f"{before}; {', '.join(after)}" for before, *after in cells)])
    header = ["task", "method", "the commonest answer is right", "right before; after"]
    return markdown([*header, "right where it is not", "it is said"], rows)


def real_tables():
    """{name of a marker in docs/real.md: its table}."""
    makers = {"gains": sums_gains, "reads": sums_reads, "pairs": sums_pairs}
    tables = {name: make(*load_sums()) for name, make in makers.items()}
    return tables | {"constants": constants(*load_real())}


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


def least_sum(variant, read, key="right"):
    """Accuracies in the world of least_sum.py, a number a seed, of a variant by a read-out."""
    paths = sorted((RESULTS / "least_sum").glob(f"{variant.replace(' ', '-')}.[0-9].json"))
    reads = [json.loads(path.read_text())["read_out"] for path in paths]
    return [found[read][key] for found in reads if read in found]


def guess_table(sizes, supervision, cold, wide):
    """Where the parity of the numbers is not the answer: bases by cold tokens and by the mixture
    that holds all sums, `wide` by size."""
    rows = []
    for size in sizes:
        for how in supervision:
            name = f"base {how} {size}".strip()
            path = RESULTS / "least_sum" / f"{name.replace(' ', '-')}.0.json"
            guess = json.loads(path.read_text())["guess_right"]
            cells = [seeds(least_sum(name, read, "hard")) for read in (cold, wide[size])]
            rows.append([name.removeprefix("base "), f"{guess:.2f}", *cells])
    return markdown(["base", "parity is right", cold, "`soft-thinking`, k = 16, 32, 64"], rows)


def seeds(values):
    """As `shown`, but two are listed."""
    return f"{values[0]:.2f}, {values[1]:.2f}" if len(values) == 2 else shown(values, 2)


def least_sum_table(variants, reads):
    """Bases and trained models (rows) by what reads them (columns)."""
    rows = [[name, *(shown(least_sum(name, read), 2) for read in reads)] for name in variants]
    return markdown(["", *reads], rows)


def around_table(variants, reads):
    """The same where there are three seeds at most: two are shown as they are."""
    rows = []
    for name in variants:
        found = [least_sum(name, read) for read in reads]
        rows.append([name.removeprefix("base "), len(found[0]), *map(seeds, found)])
    return markdown(["base", "seeds", *reads], rows)


def by_k(variant, rules, ks):
    """A base by the rule that reads it (rows) and its number of candidates (columns)."""
    rows = [
        [f"`{rule}`", *(shown(least_sum(variant, f"{rule} k={k}"), 2) for k in ks)]
        for rule in rules
    ]
    return markdown(["", *(f"k = {k}" for k in ks)], rows)


BASES = ("base soft", "base soft+random", "base random", "base soft+best", "base best")
HOW = ("soft", "random", "best")  # what a base of AROUND was taught
AROUND = [f"base {how} {n}" for n in ("steps=3000", "m=3", "m=5", "m=6") for how in HOW]
AROUND += ["base soft width=64", "base random width=64", "base soft width=256"]
AROUND += ["grpo single from random", "grpo single T=0.3 from random"]
WIDE = {"m=3": "soft-thinking k=16", "": "soft-thinking k=16"}  # by size: 2^m candidates or more
WIDE |= {"m=5": "soft-thinking k=32", "m=6": "soft-thinking k=64"}
LEARNERS = ("single", "single T=0.3", "multiplex", "different-tokens", "dirichlet")
LEARNERS += ("soft-thinking", "soft-thinking exact")
READS = ("single T=1", "single T=0.1", "different-tokens k=8", "multiplex k=8")
READS += ("soft-thinking k=16",)
TEMPERATURES = (
    "lead",
    "groups",
    "best",
    "cross",
    "drawn",
    "diversity",
    "long",
    "scores",
    "controls",
)
TEMPERATURES += ("paths", "paths_square")


def evidence_tables():
    """{name of a marker in docs/evidence.md: its table}."""
    return {
        **{name: temperatures.TABLES[name]() for name in TEMPERATURES},
        "least": least_sum_table(BASES, READS),
        "learned": least_sum_table([f"grpo {name}" for name in LEARNERS], (*READS, "own")),
        "alone_short": probes.short_step_table(),
    }


def all_tables():
    """The same for docs/evidence_tables.md."""
    rules = ("soft-thinking", "different-tokens", "dirichlet", "multiplex", "cot2")
    return {
        "temperatures": temperatures.temperature_table(),
        "rates": temperatures.rate_table(),
        "half": temperatures.half_table(),
        "cold": temperatures.cold_table(),
        "ends": ends(),
        "bias": bias(),
        "by_k": by_k("base soft", rules, (2, 4, 8, 16, 32)),
        "around": around_table(AROUND, (*READS, "soft-thinking k=32", "soft-thinking k=64")),
        "guess": guess_table(WIDE, HOW, "single T=0.1", WIDE),
        "alone": probes.step_table(),
        "variance": probes.variance_table(),
        "windows": probes.window_table(),
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
    """Right answers while the real model is trained: means over seeds, and from least to most."""
    runs = load_sums()[1]
    size = {"figsize": (9, 3.6), "layout": "constrained"}
    figure, axes = plt.subplots(1, 2, sharey=True, **size)
    for ax, T in zip(axes, WARM_COLD, strict=True):
        for method in METHODS:
            color, line = STYLES[method]
            mine = [run for run in runs[method, T].values() if whole(run)]
            seeds = list(zip(*(smooth(run["curves"]["correct"], 2) for run in mine), strict=True))
            x = range(1, STEPS + 1)
            ax.plot(x, list(map(mean, seeds)), color=color, linestyle=line, label=method)
            lows, highs = list(map(min, seeds)), list(map(max, seeds))
            ax.fill_between(x, lows, highs, color=color, alpha=0.15, linewidth=0)
        ax.set(title=f"trained at T = {T}", xlabel="GRPO step")
    axes[0].set(ylabel="right while training")
    finish(figure, axes, "real")


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
