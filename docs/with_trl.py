"""motg on TRL's GRPOTrainer: several GPUs, several machines.

    pip install -r requirements.txt "trl==1.16.*"
    accelerate launch --multi_gpu --num_processes 8 docs/with_trl.py --method dirichlet --steps 500
    python docs/tools/field.py eval --model runs/trl-dirichlet-0 --method single

motg samples and scores mixtures; the rest is TRL's, whose first learning rate is 0 and whose weight
decay leaves norms and biases out. Flags are motg.py's, and any of `trl.GRPOConfig`. An update has
prompts_per_step x accumulate x chains rows in all; `--micro-tokens` bounds what is scored at once.
"""

import argparse
import copy
import json
import math
import sys
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import datasets
import torch
import trl
from accelerate import PartialState
from transformers.integrations import is_deepspeed_zero3_enabled

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
from field import motg  # with the rules of other papers


def scores(model, cfg, r, rows, micro_batch=None):
    """Log-probs (b, T) of rows (b,) of a Rollout; in order, so that a prompt is read once."""
    order = rows.argsort()  # (b,)
    found = motg.rollout_logprobs(model, r.select(rows[order]), cfg, micro_batch)  # (b, up to T)
    return torch.nn.functional.pad(found, (0, r.kind.shape[1] - found.shape[1]))[order.argsort()]


class MixtureTrainer(trl.GRPOTrainer):
    """Overrides of TRL 1.16: `_generate_and_score_completions` numbers a batch's rows before TRL
    splits it, `_compute_loss` reads a part's, `_get_per_token_logps_and_entropies` scores them."""

    def __init__(self, cfg, policy, tokenizer, problems, args):
        self.cfg, self.problems = cfg, problems
        self.sampler = copy.deepcopy(policy).requires_grad_(False)
        self.sampler.to(motg.compute_dtype(policy, cfg))
        rows = [{"prompt": prompt, "number": n} for n, (*_, prompt) in enumerate(problems)]
        how = {"processing_class": tokenizer, "rollout_func": self.sample}
        super().__init__(policy, self.reward, args, datasets.Dataset.from_list(rows), **how)
        no = args.gradient_checkpointing or self._entropy_bonus_enabled or self.is_fsdp_enabled
        motg.require(not no, "not here: gradient checkpointing, an entropy bonus, FSDP")
        for wrapped in filter(None, (self.model, self.ref_model)):
            model = self.accelerator.unwrap_model(wrapped)
            motg.check_model(model)
            model.forward = partial(scores, model, cfg)  # DDP calls it, so that its hooks run

    def sample(self, prompts, trainer):
        """Rolls out a list of prompts, in which each comes once a chain."""
        chains = math.gcd(*(len(list(same)) for _, same in groupby(prompts)))  # on this process
        cfg = replace(self.cfg, chains=chains)
        self.sampler.load_state_dict(self.model.state_dict())
        r = self.rollout = motg.rollout(self.sampler, self._tokenizer, prompts[::chains], cfg)
        self.rows = torch.arange(len(r.kind), device=r.kind.device)
        ragged = {
            "prompt_ids": (r.prompt_ids, r.prompt_mask),
            "completion_ids": (r.representative, r.mask),
            "logprobs": (r.logprob, r.mask),
            "env_mask": (r.sampled.long(), r.mask),  # what nobody drew has no loss
        }
        return {x: [v[m].tolist() for v, m in zip(*pair)] for x, pair in ragged.items()}

    def reward(self, number, log_metric, **_):
        """The rewards of the rollout's rows, of which these are the problems' numbers."""
        parts = motg.rewards([self.problems[n] for n in number], self.rollout.texts)
        means = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        for name, value in (means | motg.step_probes(self.rollout)).items():
            log_metric(f"motg/{name}", value)
        return [part["reward"] for part in parts]

    def _generate_and_score_completions(self, inputs):
        return super()._generate_and_score_completions(inputs) | {"row": self.rows}

    def _compute_loss(self, model, inputs):
        self.rows = inputs["row"]
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, model, *_, batch_size=None, **__):
        return model(self.rollout, self.rows, batch_size), self.rollout.entropy[self.rows], None


def trl_config(cfg, flags):
    """TRL's settings: motg's, but for what the flags say."""
    cpu = cfg.device == "cpu" or not torch.cuda.is_available()
    rows = cfg.prompts_per_step * cfg.accumulate * cfg.chains
    share, rest = divmod(rows, PartialState(cpu=cpu).num_processes)
    motg.require(not rest, f"{rows} rows an update; allowed: a multiple of the processes")
    most = max(1, cfg.micro_tokens // cfg.max_new_tokens)
    micro = max(size for size in range(1, most + 1) if share % size == 0)
    parser = trl.TrlParser(trl.GRPOConfig)
    parser.set_defaults(
        output_dir=cfg.out,
        use_cpu=cpu,
        bf16=False,  # motg's scores have an autocast of their own
        gradient_checkpointing=False,  # it would take away the cache that holds the prompts
        seed=cfg.seed,
        max_steps=math.ceil(cfg.steps / cfg.accumulate),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=share // micro,
        num_generations=cfg.chains,
        shuffle_dataset=False,
        learning_rate=cfg.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=round(cfg.warmup * cfg.steps / cfg.accumulate),
        adam_beta2=0.99,
        weight_decay=0.1,
        max_grad_norm=cfg.grad_clip,
        beta=cfg.kl_beta,
        epsilon=cfg.clip,
        use_bias_correction_kl=False,
        loss_type="dapo" if cfg.loss_average == "token" else "grpo",
        save_steps=math.ceil(cfg.save_every / cfg.accumulate),
    )
    return trl.GRPOConfig(**vars(parser.parse_args(flags)))


def make_trainer(argv):
    """The trainer, with its models and problems. Flags that motg does not have are TRL's."""
    motg.require(trl.__version__.startswith("1.16."), f"trl {trl.__version__}; tested: 1.16")
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for f in fields(motg.Config):
        number = f.type if f.type in (int, float) else str
        kind = {"action": "store_true"} if f.type is bool else {"type": number}
        parser.add_argument(*{f"--{f.name}": 0, f"--{f.name.replace('_', '-')}": 0}, **kind)
    ours, theirs = parser.parse_known_args(argv)
    cfg = motg.make_config(**vars(ours))
    cfg.out = cfg.out or f"runs/trl-{cfg.method}-{cfg.seed}"
    args = trl_config(cfg, theirs)
    motg.require(not is_deepspeed_zero3_enabled(), "ZeRO 3 splits what motg reads; allowed: 1 or 2")
    with PartialState().local_main_process_first():  # the others find what it has made
        policy, tokenizer = motg.load_model(cfg, cfg.model or motg.smoke_model(cfg))
    numbers = range(args.max_steps * cfg.accumulate * cfg.prompts_per_step)
    problems = [motg.train_problem(cfg, tokenizer, n) for n in numbers]
    return MixtureTrainer(cfg, policy, tokenizer, problems, args)


if __name__ == "__main__":
    trainer = make_trainer(sys.argv[1:])
    trainer.train(resume_from_checkpoint=trainer.cfg.resume)
    trainer.save_model(f"{trainer.cfg.out}/checkpoint")
    if trainer.is_world_process_zero():
        motg.write(trainer.cfg, "config.json", json.dumps(asdict(trainer.cfg), indent=1))
