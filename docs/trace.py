"""One self-contained HTML page of rollouts: what a model mixes while it thinks.

    python docs/trace.py --smoke                                the smoke mode's base model
    python docs/trace.py --model runs/a/checkpoint,runs/b/checkpoint --method single,dirichlet

Each thinking step is a column of its candidates, as tall and as dark as their weights; the token
that was read stands above it, H(p) is the line below. Every model and method gets the same
problems, side by side. A checkpoint brings its own run's settings, as in `motg.py eval`.
"""

import argparse
import html
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import motg  # noqa: E402

WIDTH, HEIGHT, LINE = 58, 96, 40  # pixels of a column: its width, its candidates, its entropy
STYLE = """
:root { --ink: #1b1f24; --soft: #5c6570; --paper: #fff; --rule: #d8dde3; --mix: 0, 92, 175;
  --good: #13733a; --bad: #a3361c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa4af; --paper: #14171a;
  --rule: #343a41; --mix: 92, 172, 255; --good: #5fd08c; --bad: #ff8b6b; } }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1180px; margin: 0 auto; padding: 1.2rem; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .3rem; }
pre { white-space: pre-wrap; margin: .2rem 0; font: inherit; }
p, .soft { color: var(--soft); }
section { border-top: 1px solid var(--rule); }
article { margin: .9rem 0 1.3rem; }
.head { display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: baseline; }
.head b { min-width: 9rem; }
.right { color: var(--good); } .wrong { color: var(--bad); }
.scroll { overflow-x: auto; padding-bottom: .4rem; }
.steps { display: flex; width: max-content; }
.step { flex: none; text-align: center; font: 12px/1.2 ui-monospace, monospace; }
.read, .part { overflow: hidden; white-space: pre; }
.read { height: 1.6em; font-weight: 600; }
.column { border: 1px solid var(--rule); border-width: 0 1px 0 0; display: flex;
  flex-direction: column; }
.part { display: flex; flex-direction: column; justify-content: center; min-height: 2px; }
.dark { color: var(--paper); }
svg { display: block; } polyline { fill: none; stroke: var(--soft); stroke-width: 1.5; }
.reply { font: 13px ui-monospace, monospace; overflow-wrap: anywhere; }
"""


def visible(text):
    """A token as HTML: spaces and line breaks can be seen."""
    return html.escape(text.replace(" ", "·").replace("\n", "↵").replace("\t", "→")) or "∅"


def column(tokenizer, y, tokens, weights):
    """One thinking step: the token read, then candidates by weight."""
    parts, total = "", {}
    for v, w in zip(tokens.tolist(), weights.tolist()):  # a token drawn twice is one part
        total[v] = total.get(v, 0.0) + w
    for v, w in sorted(total.items(), key=lambda item: -item[1]):
        if w < 0.005:
            continue
        text = tokenizer.decode([v])
        shown = f"{visible(text)}<br>{w:.2f}" if w * HEIGHT > 26 else ""
        shown = visible(text) if not shown and w * HEIGHT > 12 else shown
        dark = " dark" if w > 0.55 else ""
        style = f"height:{w * HEIGHT:.1f}px;background:rgba(var(--mix),{0.1 + 0.9 * w:.2f})"
        title = html.escape(f"{text!r} {w:.3f}", quote=True)
        parts += f'<div class="part{dark}" style="{style}" title="{title}">{shown}</div>'
    read = f'<div class="read">{visible(tokenizer.decode([y]))}</div>'
    size = f"width:{WIDTH}px;height:{HEIGHT}px"
    return f'<div class="step">{read}<div class="column" style="{size}">{parts}</div></div>'


def entropy_line(entropy):
    """H(p) of each step as a line, 0 at the bottom and the largest one, or 1 nat, at the top."""
    top, width = max(1.0, *entropy), WIDTH * len(entropy)
    points = ((WIDTH * (i + 0.5), 2 + (LINE - 4) * (1 - h / top)) for i, h in enumerate(entropy))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    label = f"H(p) in nats, at most {max(entropy):.2f}"
    frame = f'width="{width}" height="{LINE}" role="img" aria-label="{label}"'
    return f'<svg {frame}><title>{label}</title><polyline points="{line}"/></svg>'


def trajectory(tokenizer, r, row, part, title):
    """One rollout: what it earned, its thought in columns, its answer."""
    steps = r.thinking[row].nonzero()[:, 0].tolist()
    y, tokens, weights = r.representative[row], r.tokens[row], r.log_weights[row].exp()
    columns = "".join(column(tokenizer, y[t], tokens[t], weights[t]) for t in steps)
    entropy = [r.entropy[row, t].item() for t in steps]
    line = entropy_line(entropy)
    verdict = "right" if part["correct"] else "wrong"
    reply = visible(r.texts[row].rpartition(motg.TAG)[2].strip())
    numbers = f"reward {part['reward']:.2f}, score {part['score']:.2f}, {len(steps)} steps"
    numbers += f", H(p) up to {max(entropy):.2f} nats"
    return (
        f'<article><div class="head"><b>{html.escape(title)}</b><span class="{verdict}">{verdict}'
        f'</span><span class="soft">{numbers}</span></div><div class="scroll" tabindex="0">'
        f'<div class="steps">{columns}</div>{line}</div><div class="reply">{reply}</div></article>'
    )


def page(models, methods, given, problems, chains):
    """The whole page."""
    blocks = {}
    for model in models:
        flags = given | ({"model": model} if model else {})
        configs = motg.configs_of("eval", flags | {"method": methods} if methods else flags)
        lm, tokenizer = motg.load_model(
            configs[0], configs[0].model or motg.smoke_model(configs[0])
        )
        tests = motg.test_problems(configs[0], tokenizer)[:problems]
        for cfg in configs:
            cfg.chains = chains
            generator = torch.Generator(lm.device).manual_seed(cfg.seed)
            r = motg.rollout(lm, tokenizer, [prompt for *_, prompt in tests], cfg, generator)
            r = motg.Rollout(*(x.cpu() for x in r[:-1]), texts=r.texts)
            parts = motg.rewards([problem for problem in tests for _ in range(chains)], r.texts)
            name = f"{cfg.method}, k = {cfg.k}"
            name += f" · {Path(model).parent.name or model}" if len(models) > 1 else ""
            for row, part in enumerate(parts):
                entry = tests[row // chains][1]
                key = entry["question"].strip(), str(entry["answer"])
                blocks.setdefault(key, []).append(trajectory(tokenizer, r, row, part, name))
    body = ""
    for number, ((question, answer), found) in enumerate(blocks.items(), 1):
        asked = f"<pre>{html.escape(question)}</pre><p>Right: {html.escape(answer)}</p>"
        body += f"<section><h2>Problem {number}</h2>{asked}{''.join(found)}</section>"
    legend = (
        "Each column is a thinking step: its candidates, as tall and dark as their weights; above, "
        "the token a reader sees; below, the entropy of p. A full column is an ordinary token."
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>motg: what is mixed</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style><h1>What is mixed</h1><p>{legend}</p>{body}</html>\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="folders or hub names, with commas")
    parser.add_argument("--method", default="", help="methods, with commas")
    parser.add_argument("--problems", type=int, default=3)
    parser.add_argument("--chains", type=int, default=1, help="rollouts a problem and method")
    parser.add_argument("--html", type=Path, default=Path("trace.html"))
    parser.add_argument("--task")
    parser.add_argument("--task-settings")
    parser.add_argument("--shots")
    parser.add_argument("--device")
    parser.add_argument("--smoke", action="store_true", default=None)
    a = parser.parse_args()
    names = ("task", "task_settings", "shots", "device", "smoke")
    given = {name: getattr(a, name) for name in names if getattr(a, name) is not None}
    try:
        text = page(a.model.split(","), a.method, given, a.problems, a.chains)
    except (motg.UserError, OSError) as e:
        print(f"trace: {str(e).splitlines()[0]}", file=sys.stderr)
        return 2
    a.html.write_text(text)
    print(f"{a.html}: {len(text) // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
