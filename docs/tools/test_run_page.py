"""Tests of run_page.py and trace.py: what a page holds, and what is refused."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "experiments")]
import enumeration as plain  # noqa: E402
import run_page  # noqa: E402
import warm_start  # noqa: E402
from run_page import motg  # noqa: E402

torch.set_num_threads(1)
ELSEWHERE = r"https?:|\bsrc=|srcset|@import|url\(|<link|<iframe|fetch\(|XMLHttpRequest"
VOID = ("meta", "input")
HOSTILE = "</script><img src=x onerror=alert(1)>&\"'"


class Parsed(HTMLParser):
    """A page as a browser reads it. Raises AssertionError where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag, **attributes):
        """The attributes of the elements of this kind that have these."""
        wanted = {key.strip("_").replace("_", "-"): value for key, value in attributes.items()}
        return [a for t, a in self.tags if t == tag and wanted.items() <= a.items()]


def thinking_step(read, candidates, kind="mixed", thinking=True):
    step = {"read": read, "kind": kind, "thinking": thinking, "entropy": 0.31}
    return step | {"candidates": candidates}


def trajectory(token=" 3"):
    """A thought of two mixtures and the tag, then an answer of two tokens."""
    mixed = thinking_step(token, [[token, 0.62, 0.55], [" 4", 0.38, 0.30]])
    plain = [[token, 1.0, 0.9]]
    return [
        mixed,
        mixed,
        thinking_step("</think>", [["</think>", 1.0, 0.8]], "token"),
        thinking_step(token, plain, "token", thinking=False),
        thinking_step("<eos>", plain, "forced", thinking=False),
    ]


def write_run(folder, method="dirichlet", done=8, token=" 3", steps=8, **settings):
    """A run's folder as `motg.py train --smoke` writes it, after `done` of its steps."""
    folder.mkdir(parents=True)
    cfg = motg.make_config(method, smoke=True, steps=steps, chains=2, out=str(folder), **settings)
    (folder / "config.json").write_text(json.dumps(asdict(cfg)))
    metrics, samples = "", ""
    for step in range(done):
        row = {key: 0.1 * (step + 1) for key in run_page.CURVES if key != "test_accuracy"}
        metrics += json.dumps({"step": step, "loss": 0.0} | row) + "\n"
        for chain in range(2 * (step in (0, 3, 7))):
            row = {"step": step, "prompt": f"{token} + 1 = ?", "reward": 2.0 * chain, "score": 0.0}
            row |= {"correct": float(chain), "trajectory": trajectory(token)}
            samples += json.dumps(row) + "\n"
    (folder / "metrics.jsonl").write_text(metrics)
    (folder / "samples.jsonl").write_text(samples)
    if done == steps:
        result = asdict(cfg) | {"accuracy_before": 0.25, "accuracy_after": 0.5}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def made(*folders):
    """The page of some runs, as text and parsed."""
    path = folders[0].parent / "page.html"
    assert run_page.main([*map(str, folders), "--html", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    return text, Parsed(text)


def test_a_page_needs_nothing_else_and_shows_all_of_a_run(tmp_path):
    text, page = made(write_run(tmp_path / "a"))
    assert not re.search(ELSEWHERE, text)
    assert "0.250 → 0.500" in text and "256 test problems × 2 chains" in text
    assert text.count('<figure class="chart">') == len(run_page.CURVES)
    for name, meaning in run_page.CURVES.items():
        assert f"<h3>{name}</h3><p>{meaning}</p>" in text
    places = [a["data-place"] for a in page.all("div", class_="group")]
    assert places == ["first", "middle", "last"]  # recorded at 0, 3, 7
    assert len(page.all("article", class_="rollout")) == 3 * 2
    assert len(page.all("li", role="option")) == 3 * 2 * 5
    assert text.count("reward 2.00, advantage +0.71") == 3  # (2 - 1) / sqrt(2)
    kinds = [a["class"] for a in page.all("li", role="option")][:5]
    assert kinds == ["mixed", "mixed", "token", "token answer", "forced answer"]
    assert len(page.all("pre", class_="prompt")) == 3


def test_a_step_has_its_weights_probabilities_and_entropy(tmp_path):
    _, page = made(write_run(tmp_path / "a"))
    assert {a["data-p"] for a in page.all("i", data_w="0.62")} == {"0.550"}
    assert {a["data-h"] for a in page.all("li", role="option")} == {"0.31"}


def test_the_same_token_is_one_part_and_many_candidates_are_summed_up():
    twice = run_page.merged([["a", 1 / 3, 0.5], ["b", 1 / 3, 0.2], ["a", 1 / 3, 0.5]])
    assert [(text, round(w, 3), p) for text, w, p in twice] == [
        ("a", 0.667, 0.5),
        ("b", 0.333, 0.2),
    ]
    many = run_page.merged([[str(i), 0.05, 0.01 * i] for i in range(20)])
    assert len(many) == run_page.SHOWN + 1 and many[-1][0] == "14\u00a0others"
    assert sum(w for _, w, _ in many) == pytest.approx(1)


def test_several_runs_are_overlaid(tmp_path):
    a, b = write_run(tmp_path / "a", "single"), write_run(tmp_path / "b", "dirichlet", done=5)
    text, page = made(a, b)
    for i in "01":
        assert len(page.all("g", class_="line", data_run=i)) == len(run_page.CURVES)
    assert "2 runs, side by side" in text and not re.search(ELSEWHERE, text)
    assert len(page.all("input", type="checkbox")) == 2
    accuracy = text[text.index("<h3>test_accuracy") : text.index("<h3>entropy")]
    assert "b <output>–</output>" in accuracy  # it has none yet
    assert text.count("The prompt is the one above.") == 2  # b has recorded steps 0 and 3


def test_runs_of_one_name_are_told_apart(tmp_path):
    a, b = write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run")
    found = run_page.read_runs([a, b, a, b / "checkpoint"])
    assert [run.name for run in found] == [str(a), str(b)]


@pytest.mark.parametrize("done", [0, 3])
def test_a_run_that_goes_on_says_how_far_it_is(tmp_path, capsys, done):
    text, page = made(write_run(tmp_path / "a", done=done))
    assert f"step {done} of 8" in text and "no result yet" in text
    assert [a["value"] for a in page.all("progress")] == [str(done)]
    assert f"a: step {done} of 8" in capsys.readouterr().out
    assert (
        ("No update is done yet" in text) == ("No rollout is recorded yet" in text) == (done == 0)
    )


def test_a_run_that_has_only_begun(tmp_path):
    folder = write_run(tmp_path / "a", done=0)
    (folder / "metrics.jsonl").unlink()
    (folder / "samples.jsonl").unlink()
    assert "step 0 of 8" in made(folder)[0]


def test_only_settings_that_differ_are_shown(tmp_path):
    one = write_run(tmp_path / "a", concentration=2.5)
    _, page = made(one)
    names = [text for text in page.texts if text in asdict(motg.Config())]
    rows = [name for name in names if name not in run_page.CURVES]
    assert rows == ["method", "concentration", "chains", "steps"]
    text, _ = made(one, write_run(tmp_path / "b", "single"))
    for name in ("sampling", "aggregation", "k"):  # they differ between the methods
        assert f'<th scope="row">{name}<small>' in text
    assert '<th scope="row">temperature<' not in text


def test_a_token_cannot_break_out_of_the_page(tmp_path):
    text, page = made(write_run(tmp_path / "<b>&", token=HOSTILE))
    assert not page.all("img")
    assert len(page.all("script")) == 3 and text.count("</script>") == 3
    shown = HOSTILE.replace(" ", "·")
    assert sum(part == shown for part in page.texts) == 3 * 2 * 7  # read or mixed
    assert "A run: <b>&" in page.texts


BROKEN = {
    "config.json": ("{", "[1]", "{}", '{"steps": 1}'),
    "metrics.jsonl": ("{", "[]\n", '{"step": 0, "reward": "high"}', '{"step": Infinity}', "{}"),
    "samples.jsonl": (
        "{",
        '{"step": 0}',
        '{"step": 0, "reward": 1, "correct": 1, "trajectory": 7}',
    ),
    "result.json": ("{", "[]", '{"accuracy_before": 1}', '{"accuracy_before": null}'),
}


@pytest.mark.parametrize("name, content", [(n, c) for n in BROKEN for c in BROKEN[n]])
def test_a_broken_file_is_refused_in_one_line(tmp_path, capsys, name, content):
    folder, page = write_run(tmp_path / "a"), tmp_path / "page.html"
    (folder / name).write_text(content)
    assert run_page.main([str(folder), "--html", str(page)]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and name in said.err and not said.out
    assert not page.exists()


def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys):
    folder = write_run(tmp_path / "a")
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes" / "config.json").write_bytes(b"\xff\xfe{")
    nowhere = ["--html", str(tmp_path / "none" / "page.html")]
    for argv in ([str(tmp_path / "b")], [str(tmp_path / "bytes")], [str(folder), *nowhere]):
        assert run_page.main(argv) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as e:
        run_page.main([])
    assert e.value.code == 2


def test_wild_missing_and_many_values_are_drawn(tmp_path):
    folder = write_run(tmp_path / "a", done=0, steps=3000)
    rows = [{"step": i, "grad_norm": 1 + i % 7, "kl": 0.0} for i in range(2900)]
    rows[1000]["grad_norm"], rows[2000]["grad_norm"] = 1e9, float("nan")
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text, page = made(folder)
    assert "nan" not in "".join(a["d"] for a in page.all("path") if "d" in a)
    assert len(text) < 200_000
    (run,) = run_page.read_runs([folder])
    assert len(run_page.series(run, "grad_norm")) <= run_page.MOST_POINTS


def test_a_moving_average():
    assert run_page.smoothed([1.0, 5.0]) == [1, 5]  # a short curve stays as it is
    ys = [float(i % 2) for i in range(12)]
    assert run_page.smoothed(ys)[:3] == [1 / 2, 1 / 3, 2 / 3]  # a window of three
    ys[1] = float("nan")
    assert str(run_page.smoothed(ys)[:3]) == "[0.0, nan, 0.5]"


@pytest.mark.parametrize("low, high", [(0, 1), (0, 3e-5), (-2.5, 7), (0.97, 1.01), (0, 123456)])
def test_axes_have_a_few_round_numbers(low, high):
    found = run_page.ticks(low, high, 4)
    assert 2 <= len(found) <= 6
    assert low - 1e-9 * high <= found[0] and found[-1] <= high * (1 + 1e-9)


@pytest.mark.skipif(not shutil.which("node"), reason="no node")
def test_the_script_is_javascript(tmp_path):
    (tmp_path / "script.js").write_text(run_page.SCRIPT)
    subprocess.run(["node", "--check", tmp_path / "script.js"], check=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a small random model."""
    folder = tmp_path_factory.mktemp("small")
    for part in warm_start.small_model(warm_start.WORDS, 0):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    few = "--steps 2 --chains 2 --prompts-per-step 2 --eval-problems 2 --eval-every 1"
    argv = f"train --smoke {few} --max-new-tokens 8 --model {small} --out {folder}"
    assert motg.main(argv.split()) == 0
    return folder


def test_a_run_of_motg_has_what_a_page_shows(run):
    text, page = made(run)
    assert text.count('<figure class="chart">') == len(run_page.CURVES)
    assert [a["data-place"] for a in page.all("div", class_="group")] == ["first", "last"]
    assert page.all("li", role="option", class_="mixed") and "advantage" in text


def traced(path, *argv):
    """The page of trace.py, as text and parsed."""
    trace = runpy.run_path(str(HERE / "trace.py"))["main"]
    assert trace([*argv, "--html", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    return text, Parsed(text)


def test_a_trace_is_one_page_that_needs_nothing_else(small, tmp_path, monkeypatch):
    plain.as_smoke_model(monkeypatch, small)
    argv = ("--smoke", "--method", "single,multiplex", "--problems", "2", "--chains", "2")
    text, page = traced(tmp_path / "trace.html", *argv)
    assert not re.search(ELSEWHERE, text)
    assert len(page.all("article", class_="rollout")) == 8 and len(page.all("section")) == 2
    assert len(page.all("script")) == 2
    assert page.all("li", role="option", class_="mixed")  # by multiplex


def test_a_trace_of_a_run_compares_its_methods(run, tmp_path):
    argv = ("--model", str(run / "checkpoint"), "--method", "single,dirichlet", "--problems", "1")
    text, page = traced(tmp_path / "trace.html", *argv)
    assert re.findall("<h4>(.*?)</h4>", text) == ["single, k = 1", "dirichlet, k = 2"]
    assert len(page.all("ol", role="listbox", tabindex="0")) == 2


def test_a_trace_of_nothing_is_refused_in_one_line(tmp_path, capsys):
    trace = runpy.run_path(str(HERE / "trace.py"))["main"]
    assert trace(["--smoke", "--model", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
