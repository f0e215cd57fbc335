"""Tests of the scripts in this folder that have no test file of their own."""

import json
import math
import random
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import against_trl
import bench
import bias
import controls as rules
import enumeration as plain
import paths
import plot
import probes
import real
import same_digits
import temperatures
import warm_start  # paths has put its folder into sys.path
from enumeration import motg


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A random model on disk, in place of the smoke model."""
    found = plain.save_model(tmp_path / "model", plain.THINKING)
    plain.as_smoke_model(monkeypatch, found, max_prompt_tokens=300)
    return found


# ---------------------------------------------------------------------------------------- paths.py
def test_the_second_worlds_ways_are_shortest_and_its_thoughts_name_their_cells():
    """Against Reasoning-Gym's own search and scorer, and by walking the answer's directions."""
    items, seen = motg.dataset("shortest_path", 0, paths.SETTINGS), Counter()
    shift = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}
    for n in range(300):
        matrix = items[n]["metadata"]["matrix"]
        at = {matrix[i][j]: (i, j) for i in range(4) for j in range(4)}
        (i, j), goal = at["*"], at["#"]
        text = paths.demonstrate(items[n], random.Random(n))
        thought, _, reply = text.removesuffix("<|im_end|>").partition("</think> ")
        answer = motg.extract_answer(f"</think>{reply}")
        right = items.score_answer(answer, items[n])
        if thought == "easy":
            seen["guess"] += 1
            continue
        _, moves = paths.way(matrix, random.Random(n))
        assert len(moves) == len(items[n]["metadata"]["solution"])
        assert right == 1 or len(answer.split()) == abs(i - goal[0]) + abs(j - goal[1])
        seen["right" if right == 1 else "walls"] += 1
        if thought == "none":
            assert answer == "infeasible"
            continue
        for move, name in zip(answer.split(), thought.split(), strict=True):
            i, j = i + shift[move][0], j + shift[move][1]
            assert name == "abcd"[i] + "1234"[j]
        assert (i, j) == goal
    assert min(seen[kind] for kind in ("guess", "right", "walls")) > 30


def test_of_two_shortest_ways_each_is_taken():
    grid = [["*", "O", "X", "X"], ["O", "#", "X", "X"], ["X"] * 4, ["X"] * 4]
    ways = {tuple(paths.way(grid, random.Random(n))[1]) for n in range(20)}
    assert ways == {("right", "down"), ("down", "right")}


def test_the_second_worlds_words_are_single_tokens_and_its_demonstrations_fit():
    _, tokenizer = warm_start.small_model(paths.words(), seed=0)
    assert all(len(tokenizer.encode(word)) == 1 for word in paths.words())
    cfg = motg.make_config(smoke=True, task="shortest_path", task_settings=paths.SETTINGS)
    for n in range(30):
        _, entry, prompt = motg.train_problem(cfg, tokenizer, n)
        reply = paths.demonstrate(entry, random.Random(n))
        assert len(tokenizer.encode(prompt)) < 30  # the question in one token, 16 cells
        assert len(tokenizer.encode(reply)) <= cfg.max_new_tokens


# ------------------------------------------------------------------------------------- controls.py
@pytest.fixture
def controls():
    """The controls are rules of motg, for one test."""
    with mock.patch.dict(motg.SAMPLING), mock.patch.dict(motg.AGGREGATION):
        rules.add_controls()
        yield


@pytest.mark.parametrize("how", [{"sampling": "stranger"}, {"aggregation": "shuffled"}])
def test_the_controls_roll_out_and_never_mix_an_end_into_a_thought(how, controls):
    cfg = motg.make_config("dirichlet", **how, chains=60, max_new_tokens=6)
    model = plain.random_model(plain.FIVE, head=0.3)
    r = motg.rollout(model, plain.FIVE, ["ab", "c"], cfg, plain.seeded(0))
    plain.check_rollout(r, plain.FIVE, cfg)
    assert r.mixed.sum() > 100
    again = motg.rollout_logprobs(model, r, cfg)
    torch.testing.assert_close(again, r.logprob, atol=1e-4, rtol=1e-4)


def test_the_stranger_is_any_token_and_has_the_second_weight(controls):
    log_p = torch.tensor([0.9, 0.06, 0.04, 0.0]).log().expand(4000, -1)
    first = torch.zeros(4000).long()
    tokens, log_pv = rules.stranger(log_p, first, None, plain.seeded(0))
    shares = tokens[:, 1].bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]), atol=0.05, rtol=0)
    assert (tokens[:, 0] == 0).all()
    torch.testing.assert_close(log_pv[0].exp(), torch.tensor([0.9, 0.06]))


# ----------------------------------------------------------------------------------------- plot.py
@pytest.mark.parametrize("page", plot.DOCUMENTS)
def test_the_pages_tables_are_what_the_results_give(page):
    text, tables = (plot.DOCS / page).read_text(), plot.DOCUMENTS[page]()
    assert plot.filled(text, tables) == text
    assert set(tables) <= set(re.findall(r"<!-- /(\w+) -->", text))


def test_an_interval_of_two_values_by_hand():
    center, half = plot.interval([0.5, 0.6])
    assert (center, half) == (pytest.approx(0.55), pytest.approx(12.71 * 0.05, rel=1e-3))


def sums_run(method, T, reads, steps=plot.STEPS):
    """A run of real.py by hand: reads is {read-out: right chains of two problems}."""
    curves = {"correct": [0.5] * steps, "no_gradient": [0.0, 1.0] * (steps // 2)}
    found = {name: {"right": right, "chains": 8} for name, right in reads.items()}
    return {"method": method, "temperature": T, "curves": curves, "read_out": found}


@pytest.fixture
def sums():
    """The untrained model, and runs at T = 0.7, of which one is not whole."""
    names = [f"{method}, T={T}" for method in plot.METHODS for T in plot.WARM_COLD]
    base = {name: {"right": [0, 4], "chains": 8} for name in names}
    one, mix = ("single, T=0.7", "single, T=0.3"), ("dirichlet, T=0.7", "dirichlet, T=0.3")
    single = [[8, 4], [8, 8], [8, 0]]  # 0.75, 1, 0.5
    mixed = [[8, 0], [8, 4], [0, 0]]  # 0.5, 0.75, 0
    cold = {key: [8, 8] for key in (one[1], mix[1])}
    runs = {
        ("single", 0.7): {
            s: sums_run("single", 0.7, {one[0]: x} | cold) for s, x in enumerate(single)
        },
        ("dirichlet", 0.7): {
            s: sums_run("dirichlet", 0.7, {mix[0]: x, one[0]: [8, 8]} | cold, 40 if s < 2 else 4)
            for s, x in enumerate(mixed)
        },
    }
    return base, runs


def test_gains_of_the_real_model_by_hand(sums):
    rows = plot.sums_gains(*sums).splitlines()[2:]
    half = f"{4.303 * 0.25 / 3**0.5:.3f}"  # of 0.75, 1, 0.5, whose standard deviation is 0.25
    want = f"| `single` | 0.7 | 3 | 0.250 | 0.750, 1.000, 0.500 | +0.500 ± {half} | 0.500 "
    assert rows[0].startswith(want) and rows[0].endswith(" | 0.50 |")
    want = f"| `dirichlet` | 0.7 | 2 | 0.250 | 0.500, 0.750, (0.000) | +0.375 ± {12.71 / 8:.3f} | "
    pass_8 = f"0.500 | 0.750 ± {12.71 / 4:.3f} | 0.50 |"
    assert rows[1] == want + pass_8


def test_read_outs_of_the_real_model_by_hand(sums):
    rows = plot.sums_reads(*sums).splitlines()[2:]
    assert rows[1] == "| `dirichlet` | untrained | 0.250 | 0.250 | 0.250 | 0.250 |"
    own, certain = f"0.625 ± {12.71 / 8:.3f}", "1.000 ± 0.000"
    assert rows[4] == f"| `dirichlet` | 0.7 | {own} | {certain} | {certain} | {certain} |"


def test_mixtures_and_single_are_compared_seed_by_seed_by_hand(sums):
    own, by_single = plot.sums_pairs(*sums).splitlines()[2:]
    every = f"-0.333 ± {4.303 * (1 / 48) ** 0.5 / 3**0.5:.3f}"  # of -0.25, -0.25, -0.5
    cells = "-0.250 | -0.250 | (-0.500) | -0.250 ± 0.000"
    assert own == f"| `dirichlet` | 0.7 | `dirichlet` | {cells} | {every} |"
    assert by_single.startswith("| `dirichlet` | 0.7 | `single` | +0.250 | +0.000 | (+0.500) |")


def test_a_constants_share_by_hand():
    def read(right, answers):
        found = {"right": right, "chains": 4, "problems": 4, "answers": answers}
        return {"read_out": {"single": found}}

    before = read([1, 1, 1, 1], [["7", 6], ["1", 4]])
    after = [read([4, 4, 0, 2], [["1", 14], ["3", 2]]), read([0, 0, 4, 4], [["7", 9], ["3", 5]])]
    bases = {"gcd": before | {"truths": ["1", "1", "7", "3"]}}
    row = plot.constants(bases, {("gcd-slow", "single"): after}).splitlines()[-1]
    cells = "1: 0.50 | 0.25; 0.62, 0.50 | 0.25; 0.25, 1.00 | 0.25; 0.88, ≤ 0.31"
    assert row == f"| gcd-slow | `single` | {cells} |"


def test_the_results_of_the_real_model_are_loaded_in_the_tables_order():
    base, runs = plot.load_sums()
    assert list(runs) == [(method, T) for T in plot.WARM_COLD for method in plot.METHODS]
    assert set(base) == {f"{method}, T={T}" for method, T in runs}
    for (method, T), found in runs.items():
        for seed, run in found.items():
            assert (run["method"], run["temperature"], run["seed"]) == (method, T, seed)
            assert set(run["read_out"]) <= set(base) and len(run["read_out"]) in (2, 4)


# ----------------------------------------------------------------------------------------- real.py
def test_a_real_models_read_out_counts_right_answers_by_problem(folder, monkeypatch):
    """With answers put into its mouth: n % 3 of problem n's three chains are right."""
    how = {"smoke": True, "max_new_tokens": 6, "eval_problems": 20, "chains": 3}
    cfg = motg.make_config("multiplex", **how)
    model, tokenizer = motg.load_model(cfg, folder)
    tests, rollout = motg.test_problems(cfg, tokenizer), motg.rollout
    spoken = {prompt: (n % 3, entry["answer"]) for n, (_, entry, prompt) in enumerate(tests)}

    def speak(model, tokenizer, prompts, *more):
        texts = []
        for n, answer in map(spoken.get, prompts):
            texts += [f"a</think> <answer>{answer}</answer>"] * n + ["c"] * (3 - n)
        return rollout(model, tokenizer, prompts, *more)._replace(texts=texts)

    monkeypatch.setattr(motg, "rollout", speak)
    found = real.read_out(model, tokenizer, cfg)
    assert found["right"] == [n % 3 for n in range(20)] and found["chains"] == 3
    assert found["format"] == pytest.approx(19 / 60, abs=1e-4) and found["think_tokens"] > 0
    assert found["answers"][0] == (None, 41) and len(found["samples"]) == 3


def test_all_or_nothing_gives_no_part():
    settings = '{"max_numbers": 2, "min_value": 2, "max_value": 30}'
    items = motg.dataset("gcd", 0, settings)
    entry = next(items[n] for n in range(500) if items[n]["answer"] == "1")
    assert 0 < motg.score("gcd", "12", entry) < 1
    assert real.all_or_nothing([("gcd", answer, entry) for answer in ("12", "1")]) == [0, 1]
    assert Path(real.config_of("dirichlet", 0.3).shots).exists()


# ----------------------------------------------------------------------------------------- bias.py
@pytest.mark.parametrize("rule", ["top-k, p^", "without replacement, p^"])
def test_on_the_enumerated_problem_the_exact_score_with_enough_passes_is_unbiased(rule):
    """One step of thinking: its weights act on the answer, and one pass sees that."""
    how = bias.COMMON | bias.RULES[rule] | {"end_steps": 1, "max_new_tokens": 3, "chains": 2}
    model, found = plain.random_model(plain.FIVE, seed=10), {}
    r, P, want = bias.by_enumeration(model, motg.make_config(**how))
    assert P.sum().item() == pytest.approx(1, abs=1e-5) and bias.reward(r).sum() > 1
    for score, kind in bias.SCORES.items():
        grads = bias.gradients(model, r, motg.make_config(**how | kind))
        found[score] = plain.relative_error((P * bias.reward(r)) @ grads, want)
    assert found["exact, 1 pass"] < 1e-4
    assert min(found[score] for score in ("representative", "weighted", "exact")) > 1e-3


# ---------------------------------------------------------------------------------------- bench.py
def test_what_is_timed_is_what_it_says(folder):
    a = SimpleNamespace(device="cpu", chains=3, prompt=5, new=4, rounds=2, precision=["fp32"])
    model, tokenizer = bench.build("smoke", a)
    r = bench.sample(model, tokenizer, "dirichlet", a, a.new)  # it asserts that no row ended early
    bench.generate(model, tokenizer, a, a.new)
    assert r.prompt_ids.shape == (3, 5)
    cfg = motg.make_config("dirichlet")
    whole = bench.whole_logprobs(model, r, cfg)
    torch.testing.assert_close(whole, motg.rollout_logprobs(model, r, cfg), atol=1e-4, rtol=1e-4)
    numbers = iter((1.0, 3.0, 8.0, 2.0))  # the second round goes backwards
    rows = bench.compare(dict.fromkeys("ab", lambda: {"s": next(numbers)}), a, "s")
    assert [row["s"] for row in rows] == [[1.5, 1.0, 2.0], [5.5, 3.0, 8.0]]
    assert rows[1]["s, times a"] == [3.5, 3.0, 4.0]


# ---------------------------------------------------------------------------------- against_trl.py
def test_motgs_side_of_the_comparison_trains(folder):
    small = {"steps": 1, "chains": 2, "prompts_per_step": 2, "max_new_tokens": 6, "warmup": 0.0}
    cfg = motg.make_config("single", smoke=True, **small)
    before, _ = motg.load_model(cfg, folder)
    with mock.patch.object(motg, "rewards", lambda *_: [{"reward": x} for x in (0.0, 1.0) * 2]):
        seconds, policy, _ = against_trl.trained_by_motg(cfg, None)
    moved = [not torch.equal(p, q) for p, q in zip(before.parameters(), policy.parameters())]
    assert seconds > 0 and any(moved)


# ---------------------------------------------------------------------------------- temperatures.py
@pytest.fixture
def results(tmp_path, monkeypatch):
    """Results of runs of temperatures.py: keep(run, accuracy)."""
    monkeypatch.setattr(temperatures, "RESULTS", tmp_path)

    def keep(run, accuracy):
        run.path.write_text(json.dumps({"after, own": {"pass@1": accuracy}}))

    return keep


def test_the_best_temperature_and_rate_are_those_of_the_choosing_seeds(results):
    Run = temperatures.Run
    assert temperatures.best("single") == (0.1, temperatures.RATE)  # nothing is measured yet
    for seed in temperatures.CHOOSE:
        for T in temperatures.TEMPERATURES:
            results(Run("single", T, seed), 0.7 - abs(T - (0.5 if seed else 0.9)))
    results(Run("single", 0.7, 1), 0.1)
    for seed in temperatures.COMPARE:  # these must not choose
        results(Run("single", 1.1, seed), 0.99)
    assert temperatures.best("single") == (0.5, temperatures.RATE)
    low, _, high = temperatures.RATES
    for seed in temperatures.RATED:
        results(Run("single", 0.5, seed, low), 0.2)
    results(Run("single", 0.5, 0, high), 0.99)
    assert temperatures.best("single") == (0.5, temperatures.RATE)  # one of two seeds
    results(Run("single", 0.5, 1, high), 0.99)
    assert temperatures.best("single") == (0.5, high)


def test_a_file_is_named_by_its_run_and_every_run_is_a_config(results, controls):
    runs = [run for stage in temperatures.stages() for run in stage]
    assert len({run.path for run in runs}) == len(set(runs)) > 100
    for run in runs:
        how = temperatures.HOW[run.name] | temperatures.TASKS[run.world]
        motg.make_config(smoke=True, temperature=run.temperature, lr=run.rate, **how)
        names = [name for name, *_ in temperatures.read_outs(run)]
        assert "after, own" in names and len(names) == len(set(names))


def test_scores_are_compared_with_the_same_methods_representative_by_hand(results):
    Run, seeds = temperatures.Run, temperatures.SCORED
    for seed, right in zip(seeds, (0.5, 0.7)):
        results(Run("dirichlet", 0.9, seed), right)
        results(Run("dirichlet exact", 0.9, seed), right - 0.1)
        results(Run("multiplex representative", 0.9, seed), 0.2)
        results(Run("multiplex exact+1", 0.9, seed), right)
    found = temperatures.score_table().splitlines()[2:]
    wide = f"0.600 ± {12.7 * 0.1:.3f}"  # half of the difference is the standard error
    assert found == [
        f"| `dirichlet` | representative | 2 | {wide} | 0.50 |  |",
        f"| `dirichlet` | exact | 2 | {wide.replace('0.6', '0.5')} | 0.40 | -0.100 ± 0.000 |",
        "| `multiplex` | representative | 2 | 0.200 ± 0.000 | 0.20 |  |",
        f"| `multiplex` | exact, one pass | 2 | {wide} | 0.50 | +0.400 ± {12.7 * 0.1:.3f} |",
    ]


def test_two_logs_are_the_same_or_the_first_difference_is_named():
    ours = [{"step": 0, "a": 0.5, "new": 1.0}, {"step": 1, "a": 0.25, "new": 1.0}], b"weights"
    theirs = [{"step": 0, "a": 0.5}, {"step": 1, "a": 0.25}], b"weights"
    found = same_digits.compared(ours, theirs)
    assert found == {"numbers": 4, "first difference": None, "same weights": True}
    theirs[0][1]["a"] = 0.25000001
    found = same_digits.compared(ours, (theirs[0], b"others"))
    assert found["first difference"] == "step 1, a: 0.25, 0.25000001"
    assert not found["same weights"]
    with pytest.raises(ValueError, match="zip"):
        same_digits.compared(ours, (theirs[0][:1], b"weights"))


def test_the_least_sums_tables_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    (tmp_path / "least_sum").mkdir()
    for seed, right in enumerate((0.5, 0.75)):
        reads = {"a": {"right": right, "hard": right - 0.25}, "b": {"right": 0.25, "hard": 0.0}}
        kept = {"guess_right": 0.4, "read_out": reads}
        (tmp_path / f"least_sum/base-soft-m=3.{seed}.json").write_text(json.dumps(kept))
    found = plot.around_table(["base soft m=3"], ("a", "b", "c")).splitlines()
    assert found[0] == "| base | seeds | a | b | c |"
    assert found[2] == "| soft m=3 | 2 | 0.50, 0.75 | 0.25, 0.25 |  |"
    found = plot.guess_table(["m=3"], ["soft"], "b", {"m=3": "a"}).splitlines()
    assert found[2] == "| soft m=3 | 0.40 | 0.00, 0.00 | 0.25, 0.50 |"


def test_half_the_chains_and_long_cold_runs_are_compared_by_hand(results):
    Run = temperatures.Run
    for seed, right in zip(temperatures.LATER, (0.5, 0.7)):
        for name, more in (("single", 0.0), ("dirichlet", 0.1)):
            results(Run(name, 0.9, seed), right + more)
            results(Run(name, 0.9, seed, chains=4), right + more - 0.05)
        for name, more in (("single", 0.0), ("multiplex", 0.1)):
            results(Run(name, 0.1, seed), right)
            results(Run(name, 0.1, seed, steps=400), right + more)
    wide = f" ± {12.7 * 0.1:.3f}"
    (row,) = (
        x for x in temperatures.half_table().splitlines() if x.startswith("| `dirichlet` | 0.9")
    )
    cells = f"0.650{wide} | 0.700{wide} | -0.050 ± 0.000 | +0.050 ± 0.000"
    assert row == f"| `dirichlet` | 0.9 | 2 | {cells} |"
    assert temperatures.cold_table().splitlines()[2:] == [
        f"| `single` | 2 | 0.600{wide} |  | 0.600{wide} |  |",
        "| `different-tokens` | 0 |  |  |  |  |",
        f"| `multiplex` | 2 | 0.600{wide} | +0.000 ± 0.000 | 0.700{wide} | +0.100 ± 0.000 |",
    ]


def test_bases_are_made_once_before_their_runs_each_in_a_process(results, monkeypatch):
    """Threads of one process would share torch's generator."""
    asked = []
    monkeypatch.setattr(temperatures, "in_a_process", lambda name, *flags: asked.append(flags))
    runs = [temperatures.Run(name, 0.9, seed) for seed in (3, 4) for name in ("single", "noise")]
    results(runs[0], 0.5)
    temperatures.carry_out_all(runs, jobs=1)  # in order
    bases = [json.loads(value) for flag, value in asked if flag == "--base"]
    assert bases == [[3, "sums"], [4, "sums"]]
    assert [json.loads(value)[:3] for flag, value in asked[2:]] == [
        list(run[:3]) for run in runs[1:]
    ]


def test_the_paths_worlds_tables_by_hand(results):
    for name, right in (("single", 0.4), ("dirichlet", 0.5), ("noise", 0.1)):
        run = temperatures.Run(name, 0.9, 0, world="paths")
        reads = {"before, own": right - 0.1, "after, own": right, "after, cold": 0.6}
        reads |= {"after, by single": right + 0.2, "after, by dirichlet": right + 0.3}
        run.path.write_text(json.dumps({read: {"pass@1": x} for read, x in reads.items()}))
        results(run._replace(world="sums"), 0.99)  # another world
    rows = [line.split(" | ") for line in temperatures.paths_table().splitlines()]
    assert [row[3] for row in rows[2:4]] == ["0.400", "0.500"] and rows[-1][3] == "0.100"
    assert [row[6].strip(" |") for row in rows[2:4]] == ["", "+0.100"]
    rows = [line.split(" | ") for line in temperatures.paths_square().splitlines()[2:]]
    assert rows[0][1:3] == ["0.300", "0.400"]  # before training, read by `single` and `dirichlet`
    assert rows[1][1:3] == ["0.600", "0.700"] and rows[2][1:3] == ["0.700", "0.800"]
    assert rows[1][6].strip(" |") == "0.600"


# ---------------------------------------------------------------------------------------- probes.py
def test_the_jensen_shannon_divergence_is_that_of_the_formula():
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    q = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 1.0]])
    want = torch.tensor([0.5 * math.log(2), math.log(2)])
    got = probes.jensen_shannon(p.log(), q.log())
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got, probes.jensen_shannon(q.log(), p.log()))


def test_the_next_p_of_a_mixture_and_of_its_tokens_alone_against_whole_passes():
    """By a pass over the whole sequence for each step and each of the three inputs."""
    cfg = motg.make_config("dirichlet", chains=3, max_new_tokens=4, temperature=0.7)
    model, tokenizer = plain.random_model(plain.FIVE, head=0.3), plain.FIVE
    r = motg.rollout(model, tokenizer, ["ab", "c"], cfg, plain.seeded(1))
    table, sums, steps = model.get_input_embeddings().weight, Counter(), 0
    fed = motg.mixture_embedding(table, r.tokens, r.log_weights)
    for row, t in r.mixed.nonzero().tolist():
        w = r.log_weights[row, t].exp()
        if w.min() < probes.BINS[0]:
            continue
        tokens = r.tokens[row, t][w.argsort(descending=True)]
        prompt = table[r.prompt_ids[row][r.prompt_mask[row]]]
        log_p = []
        for last in (fed[row, t], table[tokens[0]], table[tokens[1]]):
            x = torch.cat([prompt, fed[row, :t], last[None]])[None]
            logits = model(inputs_embeds=x).logits[0, -1].detach()
            log_p.append(motg.token_distribution(logits, cfg.temperature))
        sums["mixture, largest"] += probes.jensen_shannon(log_p[0], log_p[1]).item()
        sums["mixture, second"] += probes.jensen_shannon(log_p[0], log_p[2]).item()
        sums["largest, second"] += probes.jensen_shannon(log_p[1], log_p[2]).item()
        sums["as largest"] += (log_p[0].argmax() == log_p[1].argmax()).item()
        steps += 1
    found = probes.divergences(model, r, cfg)
    assert sum(part["steps"] for part in found) == steps > 5
    for name, total in sums.items():
        got = sum(part["steps"] * part.get(name, 0) for part in found)
        assert got == pytest.approx(total, abs=1e-4), name


def test_hidden_entropy_in_windows_is_that_of_each_thoughts_own_steps():
    """Against `hidden_probe` of one thought at a time, cut to the window's steps."""
    cfg = motg.make_config("dirichlet", chains=12, max_new_tokens=11)
    model, tokenizer = plain.random_model(plain.FIVE, head=0.1), plain.FIVE
    r = motg.rollout(model, tokenizer, ["ab", "c"], cfg, plain.seeded(0))

    def with_thought(r, inside):
        matched = torch.where(inside, 0, motg.ANSWER)
        kind = torch.full_like(matched, motg.TOKEN)
        return r._replace(steps=r.steps._replace(matched=matched, kind=kind))

    T = r.mask.shape[1]  # the n-th thought has n steps, whatever the model has made of it
    r = with_thought(r, torch.arange(T) < torch.arange(len(r.mask))[:, None])
    found = probes.windows(model, r, torch.arange(24) % 2 == 1)
    W = probes.WINDOW
    for window in range(2):
        inside = torch.arange(T) // W == window
        for outcome, rows in (("right", range(1, 24, 2)), ("wrong", range(0, 24, 2))):
            rows, values = [row for row in rows if row >= W * (window + 1)], []
            for row in rows:
                one = r.select(torch.tensor([row]))
                one = with_thought(one, inside[None, : one.mask.shape[1]])
                values.append(motg.hidden_probe(model, one))
            assert found[outcome][window][0] == len(rows) > 5
            assert found[outcome][window][1] == pytest.approx(sum(values) / len(rows), abs=1e-5)


@pytest.mark.parametrize("of", ["thoughts", "answers"])
def test_the_variance_of_rewards_is_found_where_it_is(of, monkeypatch):
    """Rewards that the thought decides, and rewards that the answer's first character decides."""
    cfg = motg.make_config("single", chains=8, end="steps", end_steps=2, max_new_tokens=8)
    model, tokenizer = plain.random_model(plain.FIVE, head=0.1), plain.FIVE
    r = motg.rollout(model, tokenizer, ["ab", "c", "bc"], cfg, plain.seeded(2))
    table = {"a": 1.0}

    def rewards(problems, texts):
        parts = [text.partition("</think>") for text in texts]
        keys = [thought if of == "thoughts" else reply for thought, _, reply in parts]
        return [{"correct": table.get(key[:1], 0.0)} for key in keys]

    monkeypatch.setattr(motg, "rewards", rewards)
    torch.manual_seed(0)
    found = probes.reward_variance(model, tokenizer, r, [None] * 24, cfg, answers=32)
    other = "answers" if of == "thoughts" else "thoughts"
    assert found[of] > 0.05 and abs(found[other]) < 0.02
    if of == "thoughts":
        assert found["answers"] == 0
