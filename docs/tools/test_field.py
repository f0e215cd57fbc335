"""Tests of field.py: rules that are added from outside have their laws and their scores."""

# ruff: noqa: E402, I001
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in (".", "docs/experiments", "docs/tools")]
import enumeration as plain
import field  # noqa: F401  (it adds its rows to motg's tables)
import motg

Z = torch.tensor([3.0, 2.0, 1.0, -1.0, -9.0])  # p of the last one is 4e-6


def test_the_command_line_has_the_files_methods_and_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plain.save_model("model")
    flags = "--smoke --model model --out out --chains 2 --max-new-tokens 6 --max-prompt-tokens 300"
    flags += " --steps 1 --eval-problems 2 --method lepo --k 4 --gumbel-tau 0.3"
    assert motg.main(f"train {flags}".split()) == 0
    cfg = motg.config_of("eval", {"model": "out"})
    assert (cfg.method, cfg.k, cfg.gumbel_tau, cfg.mix_steps) == ("lepo", 4, 0.3, 32)
    assert motg.config_of("eval", {"model": "out", "method": "dirichlet"}).mix_steps == 0
    assert motg.main(["train", "--smoke", "--top-p", "2"]) == 2
    assert "top_p = 2.0; allowed: 1e-06 to 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        motg.main(["--help"])
    assert "tau of the softmax [1.0]" in " ".join(capsys.readouterr().out.split())


def test_cot2_averages_draws_and_scores_the_mean_of_their_log_p():
    cfg = motg.make_config("cot2", temperature=1.0)
    generator = torch.Generator().manual_seed(0)
    m = motg.sample_mixture(Z.expand(20_000, -1), cfg, generator)
    p = Z.softmax(-1)
    share = (m.tokens[..., None] == torch.arange(5)).double().mean((0, 1))
    assert (share - p).abs().max() < 0.012  # Hoeffding, 60,000 draws: odds of a miss 3e-7
    assert torch.allclose(m.log_weights.exp(), torch.full((20_000, 3), 1 / 3))
    score = motg.mixture_logprob(Z.expand(20_000, -1), *m, cfg)
    mixed = (m.tokens != m.tokens[:, :1]).any(1)
    want = p.log()[m.tokens].mean(1)
    assert torch.allclose(score[mixed], want[mixed], atol=1e-5)


def test_cot2_dirichlet_weighs_all_likely_tokens_and_has_their_density():
    cfg = motg.make_config("cot2-dirichlet", temperature=1.0, k=5, concentration=3.0)
    m = motg.sample_mixture(Z.expand(5, -1), cfg, torch.Generator().manual_seed(0))
    assert torch.equal(m.log_weights > -torch.inf, torch.tensor([[True] * 4 + [False]] * 5))
    hat = Z.softmax(-1)[:4] / Z.softmax(-1)[:4].sum()
    law = torch.distributions.Dirichlet(3.0 * hat)
    w = m.log_weights[:, :4].exp()
    score = motg.mixture_logprob(Z.expand(5, -1), *m, cfg)
    assert torch.allclose(score, law.log_prob(w / w.sum(1, keepdim=True)), atol=1e-3)


@pytest.mark.parametrize("method", ["cot2", "cot2-dirichlet"])
def test_they_are_rolled_out_and_scored_again(method):
    model = plain.random_model(plain.FIVE, head=0.3)
    cfg = motg.make_config(method, k=3, chains=50, max_new_tokens=6)
    r = motg.rollout(model, plain.FIVE, ["ab"], cfg, torch.Generator().manual_seed(0))
    again = motg.rollout_logprobs(model, r, cfg)
    assert r.mixed.sum() > 50 and torch.allclose(again, r.logprob, atol=1e-3)
