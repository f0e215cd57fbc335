"""Thousands of answers, scored as they are while training: those of hostile_answers.json by tasks
whose scorers run what they read, and by others; every task's right answers, and what is near them.

How a scorer's child is contained is tested in test_motg.py.
"""

import inspect
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import reasoning_gym

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import motg
import test_motg as tests

ANSWERS = json.loads(Path(__file__).with_name("hostile_answers.json").read_text())
EVALUATING = ANSWERS["evaluating tasks"]
OPENS = "open(chr(67),chr(119))"  # makes a file C where it is run
DATASETS = reasoning_gym.factory.DATASETS


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test works in its own folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_no_answer_runs_code_or_hangs(here):
    hostile = [text.replace("OPEN", OPENS) for text in ANSWERS["code"]]
    hostile += ANSWERS["size"] + ANSWERS["odd"]
    hostile += ["".join(text * n for text, n in parts) for parts in ANSWERS["long"]]
    tasks = EVALUATING + ANSWERS["other tasks"]
    assert len(set(hostile)) == 182 and len(set(tasks)) == 22
    with tests.children(tests.ORDINARY):
        _, entry, right = tests.entry_of("chain_sum")
        assert motg.score("chain_sum", right, tests.Misdeed(entry | {"code": OPENS})) == 1.0
        (here / "C").unlink()  # so a child that runs an answer leaves a file here
        for task in tasks:
            _, entry, right = tests.entry_of(task)
            assert motg.score(task, right, entry) == 1.0
            for answer in hostile:
                began = time.perf_counter()
                value = motg.score(task, answer, entry)
                assert isinstance(value, float) and 0 <= value < 1, (task, answer[:80], value)
                assert time.perf_counter() - began < 4, (task, answer[:80])
            assert motg.score(task, right, entry) == 1.0 and not list(here.iterdir()), task
    assert motg.counts["died"] <= 60  # nearly all are refused before


def test_the_alarm_that_ends_an_orphan_works_whatever_the_program_does_with_it():
    """The trainer ignores SIGALRM here; its child must die of it all the same."""
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        motg.scorer.cache_clear()
        _, entry, right = tests.entry_of("chain_sum")
        assert motg.score("chain_sum", right, entry) == 1.0
        child, _ = motg.scorer()
        os.kill(child.pid, signal.SIGALRM)
        child.join(timeout=10)
        assert child.exitcode == -signal.SIGALRM
    finally:
        motg.scorer.cache_clear()
        signal.signal(signal.SIGALRM, before)


def test_the_evaluating_tasks_are_these_and_their_scorers_run_what_they_read(here):
    data, entry, _ = tests.entry_of("countdown")
    data.score_answer(f"cos({OPENS})", entry)
    assert (here / "C").exists()
    evaluates = re.compile(r"\b(eval|exec|parse_expr|sympify|literal_eval|compile)\(")
    sources = {task: inspect.getsource(kind.score_answer) for task, (kind, _) in DATASETS.items()}
    found = {task for task, source in sources.items() if evaluates.search(source)}
    assert found == {*EVALUATING, "number_sorting"}  # this one evaluates its own answer


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("task", sorted(set(DATASETS) - {"composite"}))
def test_every_task_scores_as_it_does_plainly_and_nan_is_never_right(task):
    data, entry, right = tests.entry_of(task)
    assert right is None or motg.score(task, right, entry) == 1.0
    near = [f" {right}", f"{right}0", right[1:]] if right else []
    for answer in ["0", "a", *near]:
        try:
            plain = data.score_answer(answer, entry)
        except (ValueError, TypeError):  # "a" has no prime factors
            plain = 0.0
        got = motg.score(task, answer, entry)
        refused = task in EVALUATING and got == 0 and plain < 0.1
        assert got == plain or refused or plain > 1 > got, (answer, got, plain)
    shaped = {re.sub(r"\d+(\.\d+)?", nan, right or "") for nan in ("NaN", "1e999")} - {right}
    for answer in ("nan", "n an", "-NaN+nani", "[NaN, NaN]", "Infinity", "9" * 400, *shaped):
        assert motg.score(task, answer, entry) <= 0.5 or task == "game_of_life_halting", answer


@pytest.mark.parametrize("task, right, answers", ANSWERS["right"])
def test_rewritings_of_right_answers_score_one(task, right, answers):
    metadata = {"numbers": [6, 98, 54, 34, 66], "target": 164, "variable": "x", "integrand": right}
    entry = {"question": "", "answer": right, "metadata": metadata}
    data, _, _ = tests.entry_of(task)
    for answer in answers:
        assert motg.score(task, answer, entry) == data.score_answer(answer, entry) == 1, answer


@pytest.mark.parametrize("task", ["n_queens", "spiral_matrix", "binary_matrix", "string_insertion"])
def test_lists_score_as_they_do_plainly(task):
    settings = {"min_remove": 8, "max_remove": 8} if task == "n_queens" else {}
    data, entry, right = tests.entry_of(task, **settings)
    rows = [[int(x) if x.isdigit() else x for x in row.split()] for row in right.split("\n")]
    answers = [str(list(right)), str(rows), str(rows[0]), json.dumps(rows), f" {right} "]
    for answer in answers + entry["metadata"].get("valid_answers", []):
        plain, got = data.score_answer(answer, entry), motg.score(task, answer, entry)
        assert got == plain or got == 0 < plain <= 0.1, answer  # may be refused


@pytest.mark.parametrize("word", ["Nancy", "finance", "infinite", "nano", "nan", "inf"])
def test_words_are_not_numbers_and_an_answer_right_in_part_is_rewarded_but_not_correct(word):
    metadata = {"sorted_words": ["a", "b", word]}
    entry = {"question": f"Sort: b, {word}, a", "answer": f"a, b, {word}", "metadata": metadata}
    text = f"t</think><answer>a,{word},b</answer>"
    (found,) = motg.rewards([("word_sorting", entry, "")], [text])
    assert found["score"] == pytest.approx(1 / 3) and found["correct"] == 0.0
    assert found["reward"] == pytest.approx(2 / 3 + 0.5)


def test_what_is_refused_or_raised_scores_nothing_and_is_counted():
    motg.counts.clear()
    found = {"chain_sum": "1" * 5000, "number_sorting": "[nan]", "countdown": "exit()"}
    for task, answer in (found | {"prime_factorization": "two", "gcd": None}).items():
        assert motg.score(task, answer, tests.entry_of(task)[1]) == 0.0
    assert motg.counts == {"refused": 3, "raised": 1}


@pytest.mark.parametrize("end", ["", "</think>", "</answer>", "</think><answer>1</answer> so"])
def test_performance_long_texts_cost_linear_time(end):
    """200 kB each: what grows with the square of that would take minutes."""
    _, entry, _ = tests.entry_of("chain_sum")
    for piece in ("<answer>", "</think>", "<", " ", "</think><answer>", "</answer>", "<think>\n"):
        began = time.perf_counter()
        motg.rewards([("chain_sum", entry, "")], [piece * (200_000 // len(piece)) + end])
        assert time.perf_counter() - began < 2, piece
