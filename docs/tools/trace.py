"""One self-contained HTML page of rollouts: what a model mixes while it thinks.

    python docs/tools/trace.py --smoke                          the smoke mode's base model
    python docs/tools/trace.py --model runs/a/checkpoint,runs/b/checkpoint --method single,dirichlet

Every model and method gets the same problems, one below the other, drawn as run_page.py draws
them. A checkpoint brings its own run's settings, as in `motg.py eval`.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from run_page import LEGEND, document, escaped, motg, rollout_article, torch  # noqa: E402


def read_out(cfg, lm, tokenizer, tests):
    """A rollout of each of some problems, `cfg.chains` of each: (trajectory, rewards) pairs."""
    generator = torch.Generator(lm.device).manual_seed(cfg.seed)
    r, parts = motg.attempt(lm, tokenizer, tests, cfg, generator)
    return [(motg.readable(r, row, tokenizer), part) for row, part in enumerate(parts)]


def traces(models, methods, given, problems, chains):
    """The articles of each problem: {(question, right answer): [html]}."""
    found = {}
    for model in models:
        flags = given | ({"model": model} if model else {})
        each = [{"method": name} for name in methods.split(",")] if methods else [{}]
        configs = [motg.config_of("eval", flags | method) for method in each]
        lm, tokenizer = motg.load_model(configs[0])
        tests = motg.test_problems(configs[0], tokenizer)[:problems]
        for cfg in configs:
            cfg.chains = chains
            title = f"{cfg.method}, k = {cfg.k}"
            if len(models) > 1:
                folder = Path(model)
                title += f" · {folder.parent.name if folder.name == 'checkpoint' else folder.name}"
            for row, (steps, part) in enumerate(read_out(cfg, lm, tokenizer, tests)):
                entry = tests[row // chains][1]
                numbers = f"reward {part['reward']:.2f}, score {part['score']:.2f}"
                article = rollout_article(steps, title, part["correct"], numbers)
                key = entry["question"].strip(), str(entry["answer"])
                found.setdefault(key, []).append(article)
    return found


def page(models, methods, given, problems, chains):
    """The whole page."""
    body = ""
    found = traces(models, methods, given, problems, chains)
    for n, ((question, answer), articles) in enumerate(found.items(), 1):
        asked = f'<pre class="prompt" tabindex="0">{escaped(question)}</pre>'
        asked += f"<p>Right: {escaped(answer)}</p>"
        body += f"<section><h2>Problem {n}</h2>{asked}{''.join(articles)}</section>"
    return document("What is mixed", f"{LEGEND}<main>{body}</main>")


def main(argv=None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser("trace.py", description=__doc__.splitlines()[0])
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
    a = parser.parse_args(argv)
    names = ("task", "task_settings", "shots", "device", "smoke")
    given = {name: getattr(a, name) for name in names if getattr(a, name) is not None}
    try:
        text = page(a.model.split(","), a.method, given, a.problems, a.chains)
        a.html.write_text(text, encoding="utf-8")
    except (motg.UserError, OSError) as e:
        print("trace:", " ".join(str(e).split()), file=sys.stderr)
        return 2
    print(f"{a.html}: {len(text) // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
