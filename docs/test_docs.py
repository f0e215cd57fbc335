"""Tests of README.md, of the pages in this folder, and of the text of motg.py."""

import ast
import io
import json
import os
import re
import sys
import tokenize
from pathlib import Path
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import motg
import test_motg as tests

plain, SMALL = tests.plain, tests.SMALL
DOCS = Path(__file__).resolve().parent
README = DOCS.with_name("README.md")
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
SOURCE = Path(motg.__file__).read_text()
SETTINGS = motg.Config.__dataclass_fields__


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test works in its own folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --------------------------------------------------------------------------------- README and pages
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_pages_links_and_the_scripts_of_its_commands_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!http|#)([^)#\s]+)", text):
        assert (page.parent / link).exists(), link
    for script in re.findall(r"python3? (?!-)(\S+\.py)", text):
        assert (DOCS.parent / script).exists(), script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_pages_commands_of_motg_are_accepted(page):
    blocks = "".join(re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL))
    commands = re.findall(r"python3? motg\.py ([^\n#|&>;]*)", blocks.replace("\\\n", " "))
    for command in commands:
        name, *flags = re.split(r" --", command.strip())
        assert name in ("train", "eval"), command
        given = {}
        for flag in flags:
            setting, _, value = flag.partition(" ")
            field = SETTINGS[setting.replace("-", "_")]
            kind = field.type if field.type in (int, float, bool) else str
            given[field.name] = kind(value.strip(" '") or True)
        for method in given.pop("method", "dirichlet").split(","):
            motg.make_config(method, **given)
    assert commands or page != README


def test_decimals_in_the_prose_of_the_evidence_stand_in_its_tables():
    """As they are or in hundredths, rounded. Paragraphs that quote others are left out."""
    pages = [(DOCS / name).read_text() for name in ("evidence.md", "evidence_tables.md")]
    rows = [line for page in pages for line in page.splitlines() if line.startswith("| ")]
    known = {float(x) for row in rows for x in re.findall(r"(?<![\w.])\d+\.\d+", row)}
    for paragraph in pages[0].split("\n\n"):
        quotes = "arXiv" in paragraph or "e556bde" in paragraph
        if quotes or paragraph.lstrip().startswith(("|", "!", "<!--", "#")):
            continue
        for text in re.findall(r"(?<![\w.])\d+\.\d+", paragraph):
            half = 0.501 * 10.0 ** -len(text.partition(".")[2])
            near = (abs(scale * x - float(text)) <= half for x in known for scale in (1, 100))
            assert any(near), (text, paragraph)


def test_the_readme_is_short_and_names_no_flag_that_is_none():
    text = README.read_text()
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z0-9_-]+)", text)}
    assert flags <= set(SETTINGS) | {"help"} and len(text.split()) <= 1500


def test_the_readmes_python_runs_and_its_new_rule_has_the_density_that_it_says(monkeypatch):
    """Block after block in one namespace, with a random model in place of the smoke model."""
    folder = plain.save_model("model", plain.THINKING)
    plain.as_smoke_model(monkeypatch, folder, max_prompt_tokens=300)
    names = {}
    with mock.patch.dict(motg.AGGREGATION), mock.patch.dict(motg.SAMPLING):
        for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
            exec(block, names)  # noqa: S102
        (rule,) = set(motg.AGGREGATION) - set(tests.WEIGHTS)
        x = torch.linspace(-14, 14, 281)  # a grid of log(w_1 / w_3) and log(w_2 / w_3)
        w = torch.cartesian_prod(x, x, torch.zeros(1)).softmax(-1).clamp(min=1e-30)
        how = {"aggregation": rule, "logprob": "exact", "k": 3, "temperature": 0.7}
        density = tests.scored([tests.TOP] * len(w), w, **how).double().exp()
        mass = density * w.double().prod(1) * 0.1**2  # dw_1 dw_2 = w_1 w_2 w_3 dx_1 dx_2
        assert mass.sum().item() == pytest.approx(1, abs=1e-4)
        _, drawn = tests.mixtures(200_000, rule)
        for power in (1, 2):  # Hoeffding: odds of a miss above 0.0075 are 3e-10 each
            gap = (mass[:, None] * w**power).sum(0) - (drawn**power).mean(0)
            assert gap.abs().max() < 0.0075
        cfg, model = motg.make_config(**how, max_new_tokens=8), plain.random_model(SMALL)
        r = motg.rollout(model, SMALL, tests.PROMPTS, cfg, plain.seeded(0))
        plain.check_rollout(r, SMALL, cfg)
        assert torch.allclose(motg.rollout_logprobs(model, r, cfg), r.logprob, atol=1e-3)


def logged(name):
    lines = Path("out/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)[name] for line in lines]


@pytest.mark.skipif(not os.environ.get("MOTG_SLOW"), reason="set MOTG_SLOW=1")
def test_the_smoke_run_learns_which_habit_is_right():
    """Half a minute."""
    flags = "--smoke --out out --steps 24 --lr 6e-5 --eval-problems 100 --save-every 100"
    assert motg.main(["train", *flags.split()]) == 0
    result = json.loads(Path("out/result.json").read_text())
    # of 8 chains for 100 problems: standard errors of 0.03
    assert result["accuracy_after"] > result["accuracy_before"] + 0.15, result


@pytest.mark.skipif(not os.environ.get("MOTG_REAL"), reason="MOTG_REAL names no model's folder")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_pretrained_model_samples_scores_trains_and_is_read_out(precision):
    real = os.environ["MOTG_REAL"]
    how = {"task": "gcd", "device": "cpu", "precision": precision, "chains": 4}
    cfg = motg.make_config("different-tokens", **how, max_new_tokens=12)
    model, tokenizer = motg.load_model(cfg, real)
    prompts = [motg.train_problem(cfg, tokenizer, n)[2] for n in range(2)]
    r = motg.rollout(model, tokenizer, prompts, cfg, plain.seeded(0))
    gap = (motg.rollout_logprobs(model, r, cfg) - r.logprob).abs().max()
    assert gap < (1e-3 if precision == "fp32" else 0.5)
    flags = f"--model {real} --device cpu --precision {precision} --task gcd --chains 4 --out out"
    flags += " --max-new-tokens 16 --eval-problems 2 --accumulate 1 --prompts-per-step 2 --steps"
    for steps in ("1", "2 --resume"):
        assert motg.main(f"train {flags} {steps}".split()) == 0
    assert [gap < 0.5 for gap in logged("sampler_gap")] == [True, True]
    for method in ("single", "dirichlet", "soft-thinking"):
        assert motg.main(["eval", "--model", "out", "--method", method]) == 0


# ------------------------------------------------------------------------------ the text of motg.py
def prose_of(tree):
    """The lines of docstrings."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(
            node
        ):
            found |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def test_help_says_of_each_setting_what_its_own_comment_says(capsys):
    """A record elsewhere in the file may have a field of the same name."""
    with pytest.raises(SystemExit):
        motg.main(["--help"])
    said = re.sub(r"\s+", "", capsys.readouterr().out)
    body = SOURCE.partition("class Config:")[2].partition("\n\n\n")[0]
    for name in re.findall(r"\n    (\w+): ", body):
        comment = re.search(rf"\n    {name}: .* = .*?  # (.*)", body)[1]
        assert re.sub(r"\s+", "", f"{comment} [{getattr(motg.Config, name)}]") in said, name


def test_motg_is_within_its_limits():
    """Of code: what is neither a docstring nor a comment."""
    lines, prose = SOURCE.splitlines(), prose_of(ast.parse(SOURCE))
    kinds = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
    found = tokenize.generate_tokens(io.StringIO(SOURCE).readline)
    found = [token.start[0] for token in found if token.type in kinds]
    tokens = [n for n in found if n not in prose]
    code = [n for n, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"]
    code = [n for n in code if n not in prose]
    assert len(tokens) <= 10_400
    assert len(code) <= 850 and len(lines) <= 1200, (len(code), len(lines))
    assert max(map(len, lines)) <= 100
    heads = {}
    for n, line in enumerate(lines, 1):
        if head := re.match(r"# -+ (\d+)\. ", line):
            heads[int(head[1])] = n
    for section in range(2, 8):
        inside = range(heads[section], heads[section + 1])
        density = sum(n in inside for n in tokens) / sum(n in inside for n in code)
        assert density <= 12.5, f"section {section} has {density:.1f} tokens a line"


def test_motg_is_one_open_file_of_short_functions_on_five_packages():
    starts, packages = [], set()
    for node in ast.walk(ast.parse(SOURCE)):
        kind, value = type(node), type(getattr(node, "value", None))
        assert (kind, value) not in ((ast.Expr, ast.Tuple), (ast.Assign, ast.Lambda)), node.lineno
        if isinstance(node, ast.stmt):
            starts.append(node.lineno)
        if kind in (ast.FunctionDef, ast.ClassDef):  # a method may go without a docstring
            assert ast.get_docstring(node) or node.col_offset > 0, f"{node.name} has no docstring"
        if kind is ast.FunctionDef:
            assert node.end_lineno - node.lineno < 50, f"{node.name} is long"
        if kind is ast.ImportFrom:
            packages.add(node.module.split(".")[0])
        if kind is ast.Import:
            packages |= {each.name.split(".")[0] for each in node.names}
    assert len(set(starts)) == len(starts)  # one statement a line
    allowed = {"torch", "transformers", "tokenizers", "reasoning_gym", "tqdm", "motg"}
    assert packages - sys.stdlib_module_names <= allowed
