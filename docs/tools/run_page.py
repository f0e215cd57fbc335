"""One self-contained HTML page of training runs, to look at and to compare.

    python docs/tools/run_page.py runs/train-dirichlet-0
    python docs/tools/run_page.py runs/a runs/b runs/c --html compare.html

It shows the results, the curves of metrics.jsonl, rollouts of samples.jsonl step by step, and the
settings that differ from the defaults. While a run goes on it shows how far it is. The page needs
no network and no other file. trace.py draws its rollouts with the functions of this file.
"""

import argparse
import html
import inspect
import json
import math
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import motg  # noqa: E402

CURVES = {  # docs/metrics.md, a line each
    "reward": "Mean over chains; should rise.",
    "correct": "Share of training chains that score 1; should rise.",
    "test_accuracy": "Share of right answers to held-out problems.",
    "entropy": "H(p) over thinking steps, in nats; usually falls.",
    "support": "exp H(w): tokens that a step mixes; 1 for single.",
    "mixed": "Share of thinking steps that mixed; 0 for single.",
    "think_tokens": "Length of a thought.",
    "answer_tokens": "Length of an answer.",
    "truncated": "Share of chains cut off; normally near 0.",
    "no_gradient": "Prompts whose chains all got the same reward; grows as a task is solved.",
    "grad_norm": "Norm of the gradient before clipping.",
    "kl": "KL to the frozen reference; 0 at the first step, then normally below 1.",
}


# ------------------------------------------------------------------------------- 1. reading a run
@dataclass
class Run:
    """What a run's folder holds so far."""

    name: str
    settings: dict  # config.json
    defaults: dict  # what the settings would be with nothing but --method and --smoke given
    metrics: list[dict]  # of each update, the step and what CURVES has a name for
    samples: list[dict]  # of each recorded rollout
    result: dict  # result.json; empty while the run goes on
    written: float  # when the metrics were last written

    @property
    def done(self):
        """The training steps that are behind the last update."""
        if not self.metrics:
            return 0
        after = self.metrics[-1]["step"] + self.settings["accumulate"]
        return min(after, self.settings["steps"])


def lines_of(path, parse):
    """parse(object) of each line of a JSON-lines file. Raises UserError for one that is damaged."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line:
            with motg.refusing(f"{path}: line {number} is damaged"):
                found.append(parse(json.loads(line)))
    return found


def object_of(path):
    """The object in a JSON file. Raises UserError if it is damaged."""
    with motg.refusing(f"{path} is damaged"):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def metrics_row(row):
    """The numbers of a line of metrics.jsonl that are drawn."""
    return {"step": int(row["step"])} | {key: float(row[key]) for key in CURVES if key in row}


def trajectory_step(step):
    """A step of a trajectory, with its types checked."""
    return {
        "read": str(step["read"]),
        "kind": str(step["kind"]),
        "thinking": bool(step["thinking"]),
        "entropy": float(step["entropy"]),
        "candidates": [(str(text), float(w), float(p)) for text, w, p in step["candidates"]],
    }


def sample_row(row):
    """A line of samples.jsonl, with its types checked."""
    return {
        "step": int(row["step"]),
        "prompt": str(row.get("prompt", "")),
        "reward": float(row["reward"]),
        "correct": float(row["correct"]),
        "trajectory": [trajectory_step(step) for step in row["trajectory"]],
    }


def read_run(folder, name):
    """The Run in a folder. Raises UserError for what cannot be read."""
    config, metrics = folder / "config.json", folder / "metrics.jsonl"
    samples, result = folder / "samples.jsonl", folder / "result.json"
    motg.require(config.exists(), f"{folder}: no config.json, so no run of `motg.py train`")
    settings = object_of(config)
    with motg.refusing(f"{config} is damaged"):
        for key in ("steps", "accumulate", "chains", "eval_problems"):
            settings[key] = int(settings[key])
        method = settings["method"] if settings["method"] in motg.METHODS else "dirichlet"
        defaults = asdict(motg.make_config(method, smoke=bool(settings["smoke"])))
    accuracies = {}
    if result.exists():
        found = object_of(result)
        with motg.refusing(f"{result} is damaged"):
            accuracies = {key: float(found[key]) for key in ("accuracy_before", "accuracy_after")}
    return Run(
        name,
        settings,
        defaults,
        lines_of(metrics, metrics_row) if metrics.exists() else [],
        lines_of(samples, sample_row) if samples.exists() else [],
        accuracies,
        metrics.stat().st_mtime if metrics.exists() else config.stat().st_mtime,
    )


def read_runs(folders):
    """The runs in some folders, each with its folder's name, or its path where two are alike."""
    folders = [path.parent if path.name == "checkpoint" else path for path in folders]
    folders = list(dict.fromkeys(folders))
    names = [folder.resolve().name for folder in folders]
    runs = []
    for folder, name in zip(folders, names):
        runs.append(read_run(folder, name if names.count(name) == 1 else str(folder)))
    return runs


# ------------------------------------------------------------------------------------- 2. curves
WIDTH, HEIGHT = 380, 190  # of a picture, in its own units, which are about pixels
LEFT, RIGHT, TOP, BOTTOM = 46, 372, 8, 168  # of the frame in it
COLOURS = 6
MOST_POINTS = 400  # of a curve; a longer one is drawn through means of neighbours


def escaped(text):
    """Text for an element or an attribute."""
    return html.escape(str(text), quote=True)


def number(x):
    """A number for a reader."""
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"


def series(run, key):
    """The points (xs, ys) of a curve: an update's numbers at its first step, accuracies at the
    number of steps that were done."""
    shift = run.settings["accumulate"] if key == "test_accuracy" else 0
    points = [(row["step"] + shift, row[key]) for row in run.metrics if key in row]
    if key == "test_accuracy" and run.result:
        points = [(0.0, run.result["accuracy_before"]), *points]
        if points[-1][0] < run.settings["steps"]:
            points.append((float(run.settings["steps"]), run.result["accuracy_after"]))
    size = math.ceil(len(points) / MOST_POINTS) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [[sum(values) / len(part) for values in zip(*part)] for part in parts]


def smoothed(ys):
    """Means over a centred window of about 1/15 of the curve, without what is not finite."""
    half = len(ys) // 30 + (len(ys) > 11)
    found = []
    for i in range(len(ys)):
        near = [y for y in ys[max(0, i - half) : i + half + 1] if math.isfinite(y)]
        found.append(sum(near) / len(near) if near and math.isfinite(ys[i]) else math.nan)
    return found


def ticks(low, high, count):
    """About `count` round numbers from low to high."""
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    size = next(unit * m for m in (1, 2, 5, 10) if unit * m >= raw * 0.999)
    first = math.ceil(low / size - 1e-9)
    return [i * size for i in range(first, math.floor(high / size + 1e-9) + 1)]


def limits(raw, smooth):
    """The ends of the y axis. All of the smoothed curves is inside, and 96% of the raw points: one
    wild value must not flatten the rest."""
    points = sorted(y for ys in raw for y in ys if math.isfinite(y))
    cut = len(points) // 50
    inside = points[cut : len(points) - cut]
    inside += [y for ys in smooth for y in ys if math.isfinite(y)]
    low, high = min(inside), max(inside)
    if 0 <= low < 0.6 * high or low == high >= 0:
        low = 0.0
    margin = 0.06 * (high - low) or 1.0
    return low - margin * (low != 0), high + margin


def path_of(xs, ys, place):
    """The path through some points, with a gap at what is not finite."""
    path, pen = "", "M"
    for x, y in zip(xs, ys):
        if math.isfinite(y):
            path += "{}{:.1f} {:.1f}".format(pen, *place(x, y))
        pen = "L" if math.isfinite(y) else "M"
    return path


def axes(low, high, last_step, place):
    """Grid lines and numbers."""
    drawn = ""
    for y in ticks(low, high, 4):
        _, py = place(0, y)
        drawn += f'<path class="grid" d="M{LEFT} {py:.1f}H{RIGHT}"/>'
        drawn += f'<text x="{LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{number(y)}</text>'
    for x in ticks(0, last_step, 4):
        px, _ = place(x, low)
        anchor = "end" if px > RIGHT - 8 else "middle"
        drawn += f'<text x="{px:.1f}" y="{HEIGHT - 5}" text-anchor="{anchor}">{number(x)}</text>'
    return drawn


def curve(i, xs, raw, smooth, place):
    """Run i's curve: the smoothed one over the raw one; dots where nothing was smoothed."""
    drawn = f'<path class="raw" d="{path_of(xs, raw, place)}"/>' if raw != smooth else ""
    dash = ' stroke-dasharray="6 3"' if i // COLOURS % 2 else ""
    drawn += f'<path d="{path_of(xs, smooth, place)}"{dash}/>'
    if raw is smooth or len(xs) < 12:
        spots = (place(x, y) for x, y in zip(xs, raw) if math.isfinite(y))
        drawn += "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in spots)
    return f'<g class="line" data-run="{i}" style="{colour(i)}">{drawn}</g>'


def chart(key, runs, last_step):
    """The figure of one metric, and the curves' points for the script; ("", None) without any."""
    lines = []
    for run in runs:
        points = series(run, key)
        xs, raw = [x for x, _ in points], [y for _, y in points]
        lines.append((xs, raw, raw if key == "test_accuracy" else smoothed(raw)))
    if not any(math.isfinite(y) for _, raw, _ in lines for y in raw):
        return "", None
    low, high = limits([raw for _, raw, _ in lines], [smooth for *_, smooth in lines])

    def place(x, y):
        across, up = x / last_step, (y - low) / (high - low)
        return LEFT + (RIGHT - LEFT) * across, BOTTOM - (BOTTOM - TOP) * up

    drawn, said, values = "", [], ""
    for i, (run, (xs, raw, smooth)) in enumerate(zip(runs, lines)):
        drawn += curve(i, xs, raw, smooth, place)
        ends = [number(y) for y in smooth if math.isfinite(y)]
        said += [f"{run.name} from {ends[0]} to {ends[-1]}"] if ends else []
        values += f'<li data-run="{i}" style="{colour(i)}"><i></i>{escaped(run.name)} '
        values += f"<output>{ends[-1] if ends else '–'}</output></li>"
    frame = f'x="{LEFT - 4}" y="0" width="{WIDTH - LEFT + 4}" height="{BOTTOM + 4}"'
    frame += (
        f' viewBox="{LEFT - 4} 0 {WIDTH - LEFT + 4} {BOTTOM + 4}"'  # it cuts off what is outside
    )
    label = escaped(f"{key}: {'; '.join(said)}")
    figure = (
        f'<figure class="chart"><figcaption><h3>{key}</h3><p>{CURVES[key]}</p></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f'{axes(low, high, last_step, place)}<svg {frame}>{drawn}<path class="at"/></svg></svg>'
        f'<ul class="values">{values}</ul></figure>'
    )
    pixels = [
        [round(place(0, y)[1], 1) if math.isfinite(y) else None for y in ys] for *_, ys in lines
    ]
    shown = [[number(y) if math.isfinite(y) else "–" for y in ys] for *_, ys in lines]
    return figure, [list(line) for line in zip([xs for xs, *_ in lines], pixels, shown)]


def curves_section(runs):
    """All charts, the legend that hides and shows runs, and the slider that reads them off."""
    last_step = max(1, *(run.settings["steps"] for run in runs))
    found = [chart(key, runs, last_step) for key in CURVES]
    figures = "".join(figure for figure, _ in found)
    if not figures:
        return "<section><h2>Curves</h2><p>No update is done yet.</p></section>"
    data = {"last": last_step, "left": LEFT, "right": RIGHT, "bottom": BOTTOM}
    data["charts"] = [points for figure, points in found if figure]
    legend = ""
    for i, run in enumerate(runs):
        legend += f'<label style="{colour(i)}"><input type="checkbox" checked data-run="{i}">'
        legend += f"<i></i>{escaped(run.name)}</label>"
    legend = f"<fieldset><legend>Runs</legend>{legend}</fieldset>" if len(runs) > 1 else ""
    shown = max(run.done for run in runs)
    return (
        "<section><h2>Curves</h2><p>Over training steps. The strong line is a moving average; the "
        "faint one is what was logged, and may leave the frame. Move the slider, or point at a "
        f'chart, to read all of them off at one step.</p><div class="bar">{legend}'
        f'<label class="slider needs-js">Step <output>{shown}</output> <input type="range" '
        'autocomplete="off" min="0" '
        f'max="{last_step}" value="{shown}" aria-label="step at which curves are read off"></label>'
        f'</div><div class="charts">{figures}</div>'
        f'<script type="application/json" id="points">{script_json(data)}</script></section>'
    )


def script_json(data):
    """JSON that is safe inside a script element."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


# ----------------------------------------------------------------------------------- 3. rollouts
SIZES = {0.3: "tall", 0.15: "low", 0.012: "thin", -math.inf: "tiny"}  # weights, and how drawn
SHOWN = 6  # candidates of a step; the others are summed up


def visible(text):
    """A token as HTML: spaces and line breaks can be seen."""
    shown = text.replace(" ", "·").replace("\n", "↵").replace("\t", "→")
    return escaped(shown) or "∅"


def merged(candidates):
    """The largest candidates (text, w, p) by weight, a token drawn twice as one, then the rest."""
    total = {}
    for text, w, p in candidates:
        total[text, p] = total.get((text, p), 0.0) + w
    found = sorted(((text, w, p) for (text, p), w in total.items()), key=lambda c: -c[1])
    rest = found[SHOWN:]
    if rest:
        mass = sum(w for _, w, _ in rest), sum(p for *_, p in rest)
        found = [*found[:SHOWN], (f"{len(rest)}\u00a0others", *mass)]
    return found


def step_item(step, top):
    """One step as a column: the token read, the candidates by weight, H(p) as a bar."""
    parts = ""
    for text, w, p in merged(step["candidates"]):
        size = next(name for least, name in SIZES.items() if w >= least)
        parts += f'<i class="{size}" style="--w:{w:.3f}" data-w="{w:.2f}" data-p="{p:.3f}">'
        parts += f"{visible(text)}</i>"
    height = max(0.0, min(1.0, step["entropy"] / top)) if math.isfinite(step["entropy"]) else 0.0
    answer = "" if step["thinking"] else " answer"
    return (
        f'<li role="option" aria-selected="false" class="{escaped(step["kind"])}{answer}" '
        f'data-h="{step["entropy"]:.2f}"><b>{visible(step["read"])}</b><span class="stack">{parts}'
        f'</span><u style="--h:{height:.3f}"></u></li>'
    )


def rollout_article(steps, title, correct, numbers):
    """One rollout, for this page and for trace.py's. `steps` is a trajectory of samples.jsonl;
    `title` says whose it is, `numbers` what it earned."""
    steps = [step for step in steps if step["kind"] != "pad"]
    finite = [step["entropy"] for step in steps if math.isfinite(step["entropy"])]
    top = max([1.0, *finite])
    items = "".join(step_item(step, top) for step in steps)
    thought = sum(step["thinking"] for step in steps)
    mixed = sum(step["kind"] == "mixed" for step in steps)
    numbers = f"{numbers} · {thought} thinking steps, {mixed} mixed"
    numbers += f" · H(p) up to {max(finite, default=0.0):.2f} nats"
    verdict = (
        '<span class="right">✓ right</span>' if correct else '<span class="wrong">✗ wrong</span>'
    )
    label = escaped(f"{title}: steps of this rollout")
    return (
        f'<article class="rollout"><div class="head"><h4>{escaped(title)}</h4>{verdict}'
        f'<span class="soft">{escaped(numbers)}</span></div><div class="pair"><ol role="listbox" '
        f'aria-label="{label}" aria-orientation="horizontal" tabindex="0">{items}</ol>'
        '<div class="panel needs-js"></div></div></article>'
    )


LEGEND = """<p>A column is a step: above it the token that is read, in it the candidates, as tall as
their weights, below it the entropy H(p). The answer comes after the double line.
<span class="needs-js">Point at a step to see each candidate's weight w beside its probability p;
or focus a rollout and step with <kbd>←</kbd> <kbd>→</kbd> <kbd>Home</kbd> <kbd>End</kbd>, and with
<kbd>↑</kbd> <kbd>↓</kbd> to the rollout above or below.</span></p>
<p class="keys"><span><i class="key mixed"></i>a mixture was fed</span>
<span><i class="key"></i>an ordinary token</span>
<span><i class="key forced"></i>a token that a rule put in</span></p>"""


def advantage_notes(rewards, chains):
    """What GRPO made of the rewards of a group, where the whole group is there."""
    if len(rewards) != chains or chains < 2:
        return ["" for _ in rewards]
    found = motg.group_advantages(torch.tensor([rewards]))[0].tolist()
    return [f", advantage {a:+.2f}" for a in found]


def group_of(run, i, place, step, chains, above):
    """The chains of one run that were recorded at one step, and the buttons that choose a chain.
    `above` is the prompt that the run above it has shown."""
    rows = [row for row in run.samples if row["step"] == step]
    notes = advantage_notes([row["reward"] for row in rows], run.settings["chains"])
    buttons, articles = "", ""
    for n, (row, note) in enumerate(zip(rows[:chains], notes)):
        mark = '<span class="right">✓</span>' if row["correct"] else '<span class="wrong">✗</span>'
        checked = "" if n else " checked"
        said = f"chain {n + 1}, {'right' if row['correct'] else 'wrong'}"
        buttons += f'<label><input type="radio" name="chain-{i}-{place}" value="{n}"{checked} '
        buttons += f'aria-label="{said}"><span>{n + 1} {mark}</span></label>'
        title, numbers = f"{run.name}, chain {n + 1}", f"reward {row['reward']:.2f}{note}"
        articles += rollout_article(row["trajectory"], title, row["correct"], numbers)
    prompt = rows[0]["prompt"].strip()
    asked = f'<pre class="prompt" tabindex="0">{escaped(prompt)}</pre>' if prompt else ""
    if prompt and prompt == above:
        asked = '<p class="soft">The prompt is the one above.</p>'
    return (
        f'<div class="group" data-place="{place}" style="{colour(i)}"><h3><i></i>'
        f'{escaped(run.name)} <span class="soft">at step {step}</span></h3>{asked}'
        f'<fieldset class="choice needs-js"><legend>Chain</legend>{buttons}</fieldset>'
        f"{articles}</div>"
    )


def recorded_steps(run):
    """The first, the middle and the last step at which rollouts were recorded."""
    steps = sorted({row["step"] for row in run.samples})
    if not steps:
        return []
    middle = min(steps, key=lambda step: abs(step - (steps[0] + steps[-1]) / 2))
    return sorted({steps[0], middle, steps[-1]})


def rollouts_section(runs, chains):
    """Rollouts of all runs at the first, the middle and the last recorded step."""
    places, prompts, groups = {}, {}, ""
    for i, run in enumerate(runs):
        steps = recorded_steps(run)
        names = {0: "first", len(steps) - 1: "last"} if len(steps) > 1 else {0: "first"}
        for n, step in enumerate(steps):
            place = names.get(n, "middle")
            places.setdefault(place, set()).add(step)
            groups += group_of(run, i, place, step, chains, prompts.get(place))
            prompts[place] = next(r["prompt"].strip() for r in run.samples if r["step"] == step)
    if not groups:
        return "<section><h2>Rollouts</h2><p>No rollout is recorded yet.</p></section>"
    buttons, last = "", "last" if "last" in places else "first"
    for place in ("first", "middle", "last"):
        if place in places:
            steps = ", ".join(map(str, sorted(places[place])))
            checked = " checked" if place == last else ""
            buttons += f'<label><input type="radio" name="place" value="{place}"{checked}>'
            buttons += f"<span>{place} ({steps})</span></label>"
    return (
        f'<section id="rollouts"><h2>Rollouts</h2>{LEGEND}<fieldset class="choice needs-js">'
        f"<legend>Recorded at step</legend>{buttons}</fieldset>{groups}</section>"
    )


# ------------------------------------------------------------------------ 4. results and settings
def colour(i):
    """The colour of run i, for a style attribute."""
    return f"--c:var(--c{i % COLOURS})"


def counted(n, noun):
    """'1 step', '80 steps'."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def result_card(run, i):
    """How a run went, or how far it is."""
    s = run.settings
    tests = f"{counted(s['eval_problems'], 'test problem')} × {counted(s['chains'], 'chain')}"
    if run.result:
        before, after = run.result["accuracy_before"], run.result["accuracy_after"]
        big = f"{before:.3f} → {after:.3f}"
        small = f"accuracy before and after {counted(s['steps'], 'step')}, on {tests}"
    else:
        big = f"step {run.done:,} of {s['steps']:,}"
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.written))
        small = f"no result yet: it goes on, or it was stopped · last written {when}"
        small += f'<progress max="{s["steps"]}" value="{run.done}" '
        small += f'aria-label="{big}"></progress>'
    about = f"{s['method']} · {s.get('task', '?')}" + " · smoke mode" * bool(s["smoke"])
    return (
        f'<article class="card" style="{colour(i)}"><h3><i></i>{escaped(run.name)}</h3><p>'
        f"{escaped(about)}</p><strong>{big}</strong><p>{small}</p></article>"
    )


def settings_section(runs):
    """The settings that differ from the defaults, or between the runs."""
    notes = dict(re.findall(r"(\w+): \w+ = .*?  # (.*)", inspect.getsource(motg.Config)))
    rows = ""
    for key in runs[0].settings:
        if key in ("out", "resume", "smoke"):
            continue
        values = [run.settings.get(key, "–") for run in runs]
        usual = [run.defaults.get(key, "–") for run in runs]
        alike = all(value == values[0] for value in values)
        if values == usual and alike and key != "method":
            continue
        shown = "–" if key == "method" else ", ".join(dict.fromkeys(map(str, usual)))
        cells = ""
        for value, default in zip(values[:1] if alike else values, usual):
            changed = "" if value == default else ' class="changed"'
            span = f' colspan="{len(runs)}"' if alike else ""
            cells += f"<td{changed}{span}>{escaped(value) or '–'}</td>"
        note = escaped(notes.get(key, ""))
        rows += f'<tr><th scope="row">{escaped(key)}<small>{note}</small></th>{cells}'
        rows += f'<td class="soft">{escaped(shown)}</td></tr>'
    heads = "".join(f'<th scope="col">{escaped(run.name)}</th>' for run in runs)
    smoke = any(run.settings["smoke"] for run in runs)
    base = "with <code>--smoke</code> and the method alone" if smoke else "with the method alone"
    return (
        "<section><h2>Settings</h2><p>Those that differ from the defaults (bold), or between the "
        f"runs. A default is the value {base}.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="settings"><table><thead><tr>'
        f'<th scope="col">setting</th>{heads}<th scope="col">default</th></tr></thead><tbody>{rows}'
        "</tbody></table></div></section>"
    )


# ---------------------------------------------------------------------------------- 5. the page
def document(title, body):
    """A whole page around a body."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escaped(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style><script>{EARLY}</script></head><body><h1>{escaped(title)}</h1>{body}"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def page(runs, chains=8):
    """The page of some runs, with so many chains of a recorded step."""
    title = f"A run: {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs, side by side"
    cards = "".join(result_card(run, i) for i, run in enumerate(runs))
    body = f'<section class="cards">{cards}</section>{curves_section(runs)}'
    return document(
        title, f"<main>{body}{rollouts_section(runs, chains)}{settings_section(runs)}</main>"
    )


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #fff;
  --raised: #f5f7f9; --rule: #d5dae0; --mix: 0, 92, 175; --plain: 110, 118, 129;
  --focus: #0a5fd0; --good: #13733a; --bad: #a3361c;
  --c0: #0067a8; --c1: #c2500a; --c2: #00805c; --c3: #b23a80; --c4: #806600; --c5: #6a4fc4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9ba5af; --paper: #13161a;
  --raised: #1b1f25; --rule: #343a42; --mix: 92, 172, 255; --plain: 145, 152, 161;
  --focus: #6cb2ff; --good: #5fd08c; --bad: #ff9274;
  --c0: #56b4f0; --c1: #ff9a4d; --c2: #41cf9d; --c3: #f08cc4; --c4: #dcc845; --c5: #b7a5ff; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; margin: 0 auto;
  max-width: 1220px; padding: 1.2rem 1.1rem 3rem; color: var(--ink); background: var(--paper);
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0 0 1rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .3rem; }
h3 { font-size: 1rem; margin: 0; } h4 { font-size: .95rem; margin: 0; }
p { margin: .2rem 0 .8rem; max-width: 46rem; } p, .soft, small { color: var(--soft); }
.soft { font-weight: 400; } small { display: block; font-weight: 400; }
.right { color: var(--good); } .wrong { color: var(--bad); }
.js:not(.ready) .rollout ~ .rollout, .js:not(.ready) [data-place]:not([data-place=last]),
html:not(.js) .needs-js, [hidden] { display: none !important; }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 2px; }
h3 > i, label > i, .values i { display: inline-block; width: .75em; height: .75em;
  border-radius: 50%; background: var(--c); margin-right: .4em; }
.cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); }
.card { background: var(--raised); border-top: 3px solid var(--c); border-radius: 6px;
  padding: .7rem .9rem; }
.card p { margin: 0; } .card strong { display: block; font-size: 1.55rem; line-height: 1.5; }
progress { display: block; width: 100%; margin-top: .5rem; accent-color: var(--c); }
fieldset { border: 0; padding: 0; margin: 0; display: flex; flex-wrap: wrap; gap: .3rem .9rem; }
legend { float: left; margin-right: .7rem; color: var(--soft); padding: 0; }
.bar { position: sticky; top: 0; z-index: 2; background: var(--paper); padding: .5rem 0;
  border-bottom: 1px solid var(--rule); display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; }
.bar label { display: flex; align-items: center; white-space: nowrap; }
.bar input[type=checkbox] { accent-color: var(--c); margin: 0 .4rem 0 0; }
.slider { flex: 1 1 16rem; } .slider output { min-width: 2.4em; text-align: right; }
.slider input { flex: 1; min-width: 6rem; margin-left: .6rem; accent-color: var(--focus); }
.charts { display: grid; gap: 1.6rem 1.8rem; margin-top: 1.1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
.chart { margin: 0; display: flex; flex-direction: column; }
.chart figcaption { flex: 1; } .chart p { margin: 0 0 .3rem; font-size: .86rem; line-height: 1.35; }
.chart h3, th[scope=row] { font: 600 .92rem ui-monospace, SFMono-Regular, Menlo, monospace; }
svg { display: block; width: 100%; height: auto; } .chart > svg { touch-action: pan-y; }
svg text { font-size: 11px; fill: var(--soft); }
svg path { fill: none; } .grid { stroke: var(--rule); } .at { stroke: var(--soft); }
.line { color: var(--c); } .line path { stroke: var(--c); stroke-width: 2;
  stroke-linejoin: round; stroke-linecap: round; }
.line .raw { stroke-width: 1; opacity: .32; } .line circle { fill: var(--c); }
.dim { opacity: .18; } .off { display: none !important; }
.values { list-style: none; margin: .2rem 0 0; padding: 0; font-size: .84rem;
  display: flex; flex-wrap: wrap; gap: 0 1rem; color: var(--soft); }
.values output { color: var(--ink); font-weight: 600; margin-left: .2em; }
.choice { margin: .5rem 0; gap: .3rem; } .choice label { display: inline-flex; }
.choice input { position: absolute; opacity: 0; width: 1px; }
.choice span { border: 1px solid var(--rule); border-radius: 5px; padding: .1rem .55rem; }
.choice label > span { cursor: pointer; }
.choice span span { border: 0; padding: 0; }
.choice :checked + span { background: var(--raised); border-color: var(--ink); font-weight: 600; }
.choice :focus-visible + span { outline: 2px solid var(--focus); outline-offset: 2px; }
.group { border-top: 1px solid var(--rule); padding-top: .8rem; margin-top: 1.1rem; }
section > h2 + .problem { margin-top: .6rem; }
.prompt { white-space: pre-wrap; margin: .4rem 0; max-height: 8rem; overflow-y: auto;
  font: .86rem/1.45 ui-monospace, SFMono-Regular, Menlo, monospace; background: var(--raised);
  border-radius: 6px; padding: .5rem .7rem; }
.rollout { margin: .7rem 0 1.2rem; } ol:focus-visible { outline-offset: -2px; }
.head { display: flex; flex-wrap: wrap; gap: 0 .8rem; align-items: baseline; font-size: .92rem; }
.pair { display: grid; gap: .6rem 1.2rem; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 860px) { .pair { grid-template-columns: minmax(0, 1fr) 17rem; } }
ol { display: flex; list-style: none; margin: .3rem 0 0; padding: 2px 0 .4rem; overflow-x: auto;
  align-self: start; font: 11.5px/1.25 ui-monospace, SFMono-Regular, Menlo, monospace; }
ol > li { flex: none; width: 54px; text-align: center; padding: 0 1px; border-radius: 4px;
  cursor: pointer; }
li > b { display: block; height: 1.7em; line-height: 1.7em; overflow: hidden; white-space: pre;
  text-overflow: ellipsis; }
.stack { display: flex; flex-direction: column; height: 96px; border-radius: 3px;
  overflow: hidden; background: rgba(var(--plain), .12); }
.stack i { font-style: normal; height: calc(var(--w) * 100%); min-height: 1px; overflow: hidden;
  white-space: pre; display: flex; flex-direction: column; justify-content: center;
  background: rgba(var(--plain), .12); border-top: 1px solid var(--paper); flex: 0 1 auto; }
.stack i:first-child { border-top: 0; }
.stack i::after { content: attr(data-w); color: var(--soft); font-size: 11px; }
.stack .low::after, .stack .thin::after { content: none; } .stack .thin { font-size: 0; }
.stack .tiny { display: none; }
.mixed .stack i { background: rgba(var(--mix), calc(.1 + .42 * var(--w))); }
.mixed .stack i::after { color: var(--ink); }
.token .stack i, .forced .stack i { font-size: 0; }
.token .stack i::after, .forced .stack i::after { content: none; }
.forced .stack i, .key.forced { background: repeating-linear-gradient(135deg,
  rgba(var(--plain), .4) 0 3px, transparent 3px 7px); }
u { display: flex; align-items: end; height: 26px; margin-top: 3px; }
u::after { content: ""; flex: 1; margin: 0 30%; height: max(1px, calc(var(--h) * 100%));
  background: var(--soft); }
ol > li:not(.answer) + .answer { border-left: 3px double var(--soft); border-radius: 0 4px 4px 0;
  margin-left: 5px; padding-left: 6px; width: 62px; }
ol > [aria-selected=true] { background: var(--raised); box-shadow: 0 0 0 2px var(--ink) inset; }
.key { display: inline-block; width: 1.6em; height: .85em; border-radius: 3px;
  background: rgba(var(--plain), .3); vertical-align: -.05em; margin-right: .45em; }
.keys { display: flex; flex-wrap: wrap; gap: .1rem 1.4rem; }
.key.mixed { background: rgba(var(--mix), .5); }
.panel { background: var(--raised); border-radius: 6px; padding: .55rem .8rem; min-height: 9.6rem;
  align-self: start; font-size: .88rem; }
.panel h5 { margin: 0; font-size: .92rem; } .panel p { margin: 0 0 .35rem; }
.panel code { font-weight: 700; white-space: normal; }
.panel table { font-size: .84rem; } .panel td, .panel th { padding: .08rem .3rem .08rem 0;
  border: 0; }
.panel td:first-child { font-family: ui-monospace, SFMono-Regular, Menlo, monospace;
  max-width: 6.5rem; }
.panel td + td { width: 38%; white-space: nowrap; }
.share { display: inline-block; width: calc(var(--v) * 2.6rem + 1px); height: .62em;
  background: rgba(var(--mix), .7); margin-right: .35em; border-radius: 2px; }
.p .share { background: rgba(var(--plain), .75); }
table { border-collapse: collapse; width: 100%; } .scroll { overflow-x: auto; }
table { overflow-wrap: break-word; } code { white-space: nowrap; }
th, td { text-align: left; vertical-align: top; padding: .4rem .9rem .4rem 0;
  border-bottom: 1px solid var(--rule); font-weight: 400; }
thead th { color: var(--soft); white-space: nowrap; }
.scroll td { min-width: 5.5rem; max-width: 18rem; }
.scroll th[scope=row] { min-width: 10.5rem; }
.changed { font-weight: 700; } th small { font: .82rem/1.35 system-ui, sans-serif; }
kbd { font: .8rem ui-monospace, monospace; border: 1px solid var(--rule); border-radius: 4px;
  padding: 0 .3em; }
i, .share, u::after, .key { forced-color-adjust: none; }
@media (prefers-reduced-motion: no-preference) { ol { scroll-behavior: smooth; }
  .line { transition: opacity .15s; } }
@media (max-width: 600px) { body { padding: 1rem .9rem 2rem; }
  .card strong { font-size: 1.35rem; } }
"""

EARLY = 'document.documentElement.classList.add("js")'  # before anything is laid out
SCRIPT = r"""
"use strict";
const all = (query, root = document) => [...root.querySelectorAll(query)];
const make = (tag, text, ...inside) => {
  const made = document.createElement(tag);
  made.textContent = text;
  made.append(...inside);
  return made;
};

// Rollouts: the selected step's candidates are shown in the panel beside them.
const KINDS = { mixed: "a mixture", token: "an ordinary token", forced: "put in by a rule" };
const read = (step) => step.querySelector("b").textContent;
const kind = (step) => KINDS[step.classList[0]] || step.classList[0];
const share = (value, name) => {
  const bar = make("span", ""), cell = make("td", "", bar, value);
  bar.className = "share";
  bar.style.setProperty("--v", value);
  cell.className = name;
  return cell;
};
let shown = 0;
function show(step) {
  const list = step.parentElement, panel = list.nextElementSibling, steps = [...list.children];
  for (const other of steps) other.setAttribute("aria-selected", other === step);
  const place = `Step ${steps.indexOf(step) + 1} of ${steps.length}`;
  const about = `H(p) = ${step.dataset.h} nats, ${kind(step)}`;
  const parts = all(".stack i", step).map((c) =>
    [c.textContent, c.style.getPropertyValue("--w"), c.dataset.p]);
  const held = parts.map(([token, w, p]) => `${token} weight ${w}, p ${p}`);
  step.id = step.id || `step-${(shown += 1)}`;
  step.setAttribute("aria-label", [place, `reads ${read(step)}`, about, ...held].join("; "));
  list.setAttribute("aria-activedescendant", step.id);
  const head = make("tr", "", make("th", "token"), make("th", "weight w"), make("th", "p"));
  const rows = parts.map(([token, w, p]) =>
    make("tr", "", make("td", token), share(w, "w"), share(p, "p")));
  panel.replaceChildren(
    make("h5", `${place}: reads `, make("code", read(step))),
    make("p", about),
    make("table", "", make("thead", "", head), make("tbody", "", ...rows)));
}
const visible = () => all(".rollout ol").filter((list) => list.offsetParent);
function press(event) {
  const list = event.currentTarget, steps = [...list.children];
  const at = steps.findIndex((step) => step.getAttribute("aria-selected") === "true");
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 }[event.key];
  const turn = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  const other = turn ? visible()[visible().indexOf(list) + turn] : list;
  if ((to === undefined && !turn) || !other || event.altKey || event.ctrlKey || event.metaKey)
    return;
  event.preventDefault();
  other.focus();
  const step = other.children[Math.max(0, Math.min(turn ? at : to, other.children.length - 1))];
  show(step);
  step.scrollIntoView({ block: "nearest", inline: "nearest" });
}
for (const list of all(".rollout ol")) {
  const first = list.querySelector(".mixed") || list.firstElementChild;
  if (first) show(first);
  list.addEventListener("keydown", press);
  const point = (event) => {
    const step = event.target.closest("[role=option]");
    if (step) show(step);
  };
  list.addEventListener("pointermove", point);
  list.addEventListener("click", point);
}

// Which recorded step, and which chain, is on the page.
for (const group of all(".group")) {
  const choose = () => {
    const chosen = group.querySelector("input:checked").value;
    all(".rollout", group).forEach((article, n) => { article.hidden = String(n) !== chosen; });
  };
  group.addEventListener("change", choose);
  choose();
}
const places = all("input[name=place]");
const turnTo = () => {
  const chosen = places.find((input) => input.checked);
  for (const group of chosen ? all(".group") : [])
    group.hidden = group.dataset.place !== chosen.value;
};
for (const input of places) input.addEventListener("change", turnTo);
turnTo();
document.documentElement.classList.add("ready");

// Curves: one slider reads all of them off, a checkbox hides a run.
const points = document.getElementById("points");
if (points) {
  const data = JSON.parse(points.textContent), charts = all(".chart");
  const slider = document.querySelector(".slider input");
  const readOff = () => {
    const step = Number(slider.value);
    const x = data.left + ((data.right - data.left) * step) / data.last;
    document.querySelector(".slider output").textContent = step;
    charts.forEach((chart, c) => {
      all(".values li", chart).forEach((line, run) => {
        const [xs, ys, texts] = data.charts[c][run];
        const at = xs.filter((other) => other <= step).length - 1;
        const gap = Math.max(...xs.slice(1).map((other, i) => other - xs[i]), 1);
        const known = at >= 0 && step - xs[at] <= gap;
        line.querySelector("output").textContent = known ? texts[at] : "–";
      });
      chart.querySelector(".at").setAttribute("d", `M${x} 0V${data.bottom}`);
    });
  };
  slider.addEventListener("input", readOff);
  for (const chart of charts) {
    const picture = chart.querySelector("svg");
    picture.addEventListener("pointermove", (event) => {
      const box = picture.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * picture.viewBox.baseVal.width;
      slider.value = Math.round(((x - data.left) / (data.right - data.left)) * data.last);
      readOff();
    });
  }
  for (const label of all(".bar fieldset label")) {
    const input = label.querySelector("input"), run = input.dataset.run;
    input.addEventListener("change", () => {
      for (const part of all(`.charts [data-run="${run}"]`))
        part.classList.toggle("off", !input.checked);
      dim(false);
    });
    const dim = (on) => {
      for (const line of all(".line")) line.classList.toggle("dim", on && line.dataset.run !== run);
    };
    label.addEventListener("pointerenter", () => dim(input.checked));
    label.addEventListener("pointerleave", () => dim(false));
  }
}
"""


def main(argv=None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser("run_page.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--html", type=Path, default=Path("run.html"), help="the page [run.html]")
    parser.add_argument("--chains", type=int, default=8, help="at most, of a recorded step [8]")
    a = parser.parse_args(argv)
    try:
        motg.require(a.chains > 0, f"chains = {a.chains}; allowed: 1 or more")
        runs = read_runs(a.runs)
        text = page(runs, a.chains)
        a.html.write_text(text, encoding="utf-8")
    except (motg.UserError, OSError, UnicodeDecodeError) as e:
        print("run_page:", " ".join(str(e).split()), file=sys.stderr)
        return 2
    for run in runs:
        if not run.result:
            print(f"{run.name}: step {run.done} of {run.settings['steps']}, no result yet")
    print(f"{a.html}: {len(text) // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
