"""Tests of tour.ipynb and tour_solutions.ipynb: they run, and a page view shows their outputs."""

import base64
import json
import re
import sys
from pathlib import Path
from unittest import mock

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "tools"), str(DOCS / "experiments")]
import enumeration as plain  # noqa: E402
import warm_start  # noqa: E402

import motg  # noqa: E402

TOUR, SOLUTIONS = DOCS / "tour.ipynb", DOCS / "tour_solutions.ipynb"
BOTH = pytest.mark.parametrize("path", (TOUR, SOLUTIONS), ids=lambda path: path.stem)
SHORTER = {"STEPS = 80": "STEPS = 2", "PROBLEMS = 128": "PROBLEMS = 4"}


def cells_of(path, kind):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def text_of(path):
    return "\n".join("".join(cell["source"]) for cell in cells_of(path, "markdown"))


@pytest.fixture
def random_model(tmp_path, monkeypatch):
    """A random model in place of the smoke model, short chains, and no window."""
    for part in warm_start.small_model(warm_start.WORDS, seed=0):
        part.save_pretrained(tmp_path)
    plain.as_smoke_model(monkeypatch, tmp_path, max_new_tokens=12)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    monkeypatch.chdir(DOCS)  # where a notebook is started
    plt.switch_backend("Agg")


def run(path):
    """Runs the code cells in one namespace, which it returns; with less training."""
    names, shortened = {}, set()
    rules = mock.patch.dict(motg.SAMPLING), mock.patch.dict(motg.AGGREGATION)
    with rules[0], rules[1], matplotlib.rc_context():
        for number, cell in enumerate(cells_of(path, "code"), 1):
            code = "".join(cell["source"])
            for line, shorter in SHORTER.items():
                if re.search(rf"^{line}$", code, re.MULTILINE):
                    code = code.replace(line, shorter)
                    shortened.add(line)
            exec(compile(code, f"{path.name}, code cell {number}", "exec"), names)  # noqa: S102
            assert not plt.get_fignums()  # a cell that draws shows
    return names, shortened


def test_the_tour_runs_and_prints_what_its_text_says(random_model, capsys):
    names, shortened = run(TOUR)
    printed = capsys.readouterr().out
    assert shortened == set(SHORTER) and len(names["logs"]) == 2
    for line in (r"representative +-0\.92", r"weighted +-1\.11", r"exact +-1\.43"):
        assert re.search(line, printed)
    assert "by hand, the same: True" in printed and "1.0000  is the sum" in printed
    assert "their probabilities sum to 1.0000" in printed
    assert abs(names["guess"].sum() - 1) < 1e-4  # the last of the three scores is `exact`
    assert float(re.search(r"largest difference: (\S+)", printed)[1]) < 1e-4
    expected, gain = re.findall(r"gain +(-?[\d.]+)", printed)
    assert 0.8 < float(gain) / float(expected) < 1.25


def test_the_solutions_run_and_are_right(random_model, capsys):
    names, shortened = run(SOLUTIONS)
    printed = capsys.readouterr().out
    assert shortened == {"PROBLEMS = 128"}
    assert re.search(r"probability .* w1/w2 1\.6667", printed)
    assert re.search(r"cool .* w1/w2 2\.7778", printed)
    assert float(re.search(r"difference of the scores (\S+)", printed)[1]) < 1e-4
    assert torch.allclose(names["of_weighted"], names["of_log_mass"], atol=1e-6)
    assert not torch.allclose(names["weighted"], names["log_mass"], atol=0.1)
    assert names["advantages"].eq(0).all() and names["log"]["grad_norm"] == 0
    assert names["moves"] == pytest.approx([1e-5] * len(names["moves"]), rel=0.05)


@BOTH
def test_a_notebook_is_valid_and_has_its_outputs(path):
    """By the rules of nbformat 4.5, as far as they matter here."""
    notebook = json.loads(path.read_text())
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", i) for i in ids)
    common = {"id", "cell_type", "metadata", "source"}
    for cell in notebook["cells"]:
        code = cell["cell_type"] == "code"
        assert code or cell["cell_type"] == "markdown"
        assert set(cell) == common | ({"execution_count", "outputs"} if code else set())
        assert cell["source"] and all(isinstance(line, str) for line in cell["source"])
        assert all(line.endswith("\n") for line in cell["source"][:-1])
    counts = [cell["execution_count"] for cell in cells_of(path, "code")]
    assert counts == list(range(1, len(counts) + 1))  # run once, from top to bottom
    for cell in cells_of(path, "code"):
        source, kinds = "".join(cell["source"]), []
        for output in cell["outputs"]:
            kinds.append(output["output_type"])
            if kinds[-1] == "stream":
                assert set(output) == {"output_type", "name", "text"}
                assert output["name"] == "stdout" and "".join(output["text"]).strip()
            else:
                assert set(output) == {"output_type", "data", "metadata"}
                png = base64.b64decode(output["data"]["image/png"])
                assert png.startswith(b"\x89PNG")
        assert set(kinds) <= {"stream", "display_data"}
        assert ("display_data" in kinds) == ("plt.show()" in source)
        assert ("stream" in kinds) or not re.search(r"^print\(", source, re.MULTILINE)
    assert path.stat().st_size < 700_000


@BOTH
def test_what_a_notebook_links_to_is_there(path):
    links = re.findall(r"\]\((?!http|#)([^)#\s]+)", text_of(path))
    assert links
    for link in links + re.findall(r"python (?:docs/)(\S+\.py)", text_of(path)):
        assert (DOCS / link).exists(), link


def test_each_exercise_has_a_solution():
    asked = re.findall(r"^> \*\*Exercise (\d)\.", text_of(TOUR), re.MULTILINE)
    solved = re.findall(r"^## (\d)\.", text_of(SOLUTIONS), re.MULTILINE)
    assert asked == solved == list("123456")
