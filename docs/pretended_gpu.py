"""motg.py on a pretended GPU: what a machine without one can still show about CUDA.

A pretended tensor says `is_cuda` and keeps its values in a CPU tensor. As CUDA would, an operation
raises where its operands are on two devices, and while a graph is captured also where a value is
read, where something is copied from or to the host, or where a shape depends on values. A captured
graph runs nothing until it is replayed; then it repeats its operations on the tensors that it knew.
So a rollout has to be the same by graph, by single steps and on the CPU.

It changes settings of the whole process, so run it alone: `python -m pytest docs/pretended_gpu.py`.
"""

import contextlib
import copy
import functools
import json
import sys
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import motg
import test_motg as tests

plain = tests.plain

_setup_privateuseone_for_python_backend("gpu")
GPU = torch.device("gpu", 0)
torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16]
torch.__future__.set_overwrite_module_params_on_conversion(True)  # model.to makes new parameters
torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(data, device) makes a copy, as on CUDA

# These may cross from one device to the other, and those read values. (CUDA would copy an index of
# the host as well; here that is a mistake, for it waits.)
COPIES = ("_to_copy", "copy_")
READS = ("nonzero", "masked_select", "unique_consecutive", "multinomial", "_local_scalar_dense")


# ----------------------------------------------------------------------------- the pretended device
class OnGPU(torch.Tensor):
    """A tensor of the pretended GPU; `values` is a CPU tensor."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=GPU,
        )
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, *call):
        return Device.now.__torch_dispatch__(*call)

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, how):
        return format(self.cpu(), how)

    def __reduce_ex__(self, protocol):
        """A file holds what `torch.load(..., map_location="cpu")` reads."""
        return self.detach().cpu().__reduce_ex__(protocol)


def to_values(x):
    """What the CPU computes with in place of x."""
    if isinstance(x, OnGPU):
        return x.values
    return torch.device("cpu") if isinstance(x, torch.device) else x


class Device(TorchDispatchMode):
    """Runs each operation on the values, and raises where CUDA would."""

    now = None  # the mode that is switched on
    graph = None  # the Graph that is being captured

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = any(isinstance(x, OnGPU) for x in tensors)
        on_cpu = any(not isinstance(x, OnGPU) and x.dim() for x in tensors)  # numbers may travel
        to_gpu = on_gpu
        if kwargs.get("device") is not None:
            to_gpu = torch.device(kwargs["device"]) == GPU
        if on_gpu and on_cpu and name not in COPIES:
            raise RuntimeError(f"{func}: operands on two devices")
        capturing = self.graph is not None and (on_gpu or to_gpu)
        if capturing:
            self.refuse(func, name, args, crosses=on_cpu or not to_gpu)
        args, kwargs = tree_map(to_values, (args, kwargs))
        return self.run(func, args, kwargs, to_gpu, capturing)

    def refuse(self, func, name, args, crosses):
        """Raises for what a graph cannot hold."""
        indices = args[1] if name in ("index", "index_put_") else ()
        by_value = any(i is not None and i.dtype == torch.bool for i in indices)
        if by_value or name in READS or (crosses and name in COPIES):
            raise RuntimeError(f"{func}: not while a graph is captured")

    def run(self, func, args, kwargs, to_gpu, capturing):
        """The result on the CPU, wrapped if it is the GPU's. While a graph is captured nothing is
        written: the operation is recorded, and a new tensor's values mean nothing yet."""
        writes = func._schema.is_mutable
        with _disable_current_modes():
            out = args[0] if capturing and writes else func(*args, **kwargs)
        if capturing and (writes or not func.is_view):
            self.graph.operations.append((func, args, kwargs, None if writes else out))
        return tree_map(lambda x: OnGPU(x) if to_gpu and torch.is_tensor(x) else x, out)


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    replays = 0  # of all graphs

    def __init__(self):
        self.operations = []  # (function, arguments, named arguments, result)

    def register_generator_state(self, generator):
        self.generator = generator

    def replay(self):
        Graph.replays += 1
        with _disable_current_modes():
            for func, args, kwargs, result in self.operations:
                made = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(made)):
                    if old is not None:
                        old.copy_(new)


@contextlib.contextmanager
def capture(graph):
    """In place of torch.cuda.graph: nothing happens, and the generator stays where it was."""
    state = graph.generator.get_state()
    Device.now.graph = graph
    try:
        yield
    finally:
        Device.now.graph = None
        graph.generator.set_state(state)


@contextlib.contextmanager
def failing_capture(graph):
    """As where a model reads a value at each step; it leaves the generator in another state."""
    graph.generator.manual_seed(0)
    raise RuntimeError("operation not permitted when stream is capturing\nand more")
    yield


class Generator(torch.Generator):
    """A generator of the pretended GPU: the CPU's."""

    def __new__(cls, device=GPU):
        return super().__new__(cls, "cpu")

    def graphsafe_set_state(self, other):
        self.set_state(other.get_state())


@pytest.fixture
def gpu(monkeypatch):
    """A function that runs another with the pretended GPU at hand."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())

    def on_gpu(function, *args):
        with Device() as Device.now:
            return function(GPU, *args)

    return on_gpu


# -------------------------------------------------------------------------------------- the program
RULES = [*product(motg.SAMPLING, tests.WEIGHTS)]
COMPILED = [(*rules, end) for rules, end in zip(RULES[::5], cycle(tests.ENDS))]


def config(sampling, aggregation, end, **more):
    return motg.make_config(
        sampling=sampling,
        aggregation=aggregation,
        end=end,
        end_steps=2,
        end_patience=2,
        end_entropy=2.0,
        mix_steps=4,
        mix_entropy=0.1,
        answer_temperature=0.8,
        logprob="exact",
        k=3,
        chains=3,
        max_new_tokens=7,
        micro_tokens=60,
        **more,
    )


@functools.cache
def model_on(device):
    return plain.random_model(plain.SMALL, head=0.3).to(device)


def rolled_out(device, cfg):
    """What was drawn, as lists, and the numbers of a rollout."""
    generator = Generator().manual_seed(1)
    r = motg.rollout(model_on(device), plain.SMALL, tests.PROMPTS, cfg, generator)
    numbers = torch.stack([r.logprob.cpu(), r.entropy.cpu(), r.log_weights.cpu().exp().sum(-1)])
    return [r.tokens.tolist(), r.representative.tolist(), r.kind.tolist(), r.texts], numbers


@pytest.mark.parametrize("end", tests.ENDS)
@pytest.mark.parametrize("sampling, aggregation", RULES)
def test_a_rollout_by_graph_is_that_of_the_cpu(sampling, aggregation, end, gpu, capsys):
    cfg, before = config(sampling, aggregation, end), Graph.replays
    drawn, numbers = gpu(rolled_out, cfg)
    assert capsys.readouterr().err == "" and Graph.replays - before == cfg.max_new_tokens - 1
    on_cpu = rolled_out("cpu", cfg)
    assert drawn == on_cpu[0] and torch.allclose(numbers, on_cpu[1], atol=1e-4)


@pytest.mark.parametrize("sampling, aggregation", RULES)
def test_where_a_capture_fails_that_is_said_once_and_single_steps_go_on(
    sampling, aggregation, gpu, monkeypatch, capsys
):
    cfg, before = config(sampling, aggregation, "drawn"), Graph.replays
    monkeypatch.setattr(torch.cuda, "graph", failing_capture)
    drawn, numbers = gpu(rolled_out, cfg)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "operation not permitted when stream is capturing" in said
    on_cpu = rolled_out("cpu", cfg)
    assert drawn == on_cpu[0] and torch.allclose(numbers, on_cpu[1], atol=1e-4)
    assert Graph.replays == before


def updated(device, cfg):
    """The log of an update with a reference, the probes and a trajectory."""
    policy, generator = copy.deepcopy(model_on(device)), Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
    r = motg.rollout(policy, plain.SMALL, tests.PROMPTS, cfg, generator)
    advantages = torch.arange(12.0).sin().to(device)
    log = motg.update(policy, model_on(device), optimizer, r, advantages, cfg, 1e-3)
    moved = plain.flat([x.cpu() for x in policy.parameters()])
    return log | motg.step_probes(r), motg.readable(r, 1, plain.SMALL), moved


@pytest.mark.parametrize("sampling, aggregation", RULES)
def test_an_update_and_its_probes_are_those_of_the_cpu(sampling, aggregation, gpu):
    cfg = config(sampling, aggregation, "drawn", weight_passes=1)
    log, trajectory, moved = gpu(updated, cfg)
    want = updated("cpu", cfg)
    assert log == pytest.approx(want[0], abs=1e-3, rel=1e-3)
    assert [step["read"] for step in trajectory] == [step["read"] for step in want[1]]
    assert torch.allclose(moved, want[2], atol=1e-3)


SAVE = transformers.PreTrainedModel.save_pretrained


def save_from_cpu(model, folder):
    """safetensors asks where a tensor lies in memory, which nobody can pretend."""
    SAVE(copy.deepcopy(model).cpu(), folder)


def trained(device, out, *parts):
    """The numbers that a run in so many parts logs, and those of its evaluation."""
    for part in parts:
        command = f"{tests.RUN} model --out {out} --method multiplex --lr 1e-4 {part}"
        assert motg.main(command.split()) == 0
    for method in ("single", "multiplex"):
        assert motg.main(f"eval --model {out} --method {method} --out {out}".split()) == 0
    logs = []
    for path in (Path(out, "metrics.jsonl"), Path(out, "eval.jsonl")):
        for log in map(json.loads, path.read_text().splitlines()):
            logs.append({name: x for name, x in log.items() if isinstance(x, int | float)})
    return logs


def test_a_run_and_its_evaluation_are_those_of_the_cpu_and_it_resumes(gpu, tmp_path, monkeypatch):
    """The reward is the share of vowels: without one, all that an optimiser follows is rounding."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", save_from_cpu)
    monkeypatch.setattr(motg, "rewards", tests.vowels)
    plain.save_model("model")
    on_cpu = trained("cpu", "cpu", "")
    monkeypatch.setattr(motg, "device_of", lambda cfg: GPU)
    monkeypatch.setattr(torch, "Generator", Generator)
    straight = gpu(trained, "straight", "")
    for got, want in zip(straight, on_cpu, strict=True):
        assert got == pytest.approx(want, abs=2e-3, rel=2e-3)
    assert gpu(trained, "resumed", "--steps 2", "--resume") == straight
    assert Graph.replays > 0


# -------------------------------------------------------------------------------- other witnesses
@pytest.mark.parametrize("sampling, aggregation, end", COMPILED)
def test_a_step_compiles_as_one_graph(sampling, aggregation, end, monkeypatch):
    """For torch.compile too, a step is one graph: it reads no value."""
    torch.compiler.reset()
    whole = torch.compile(motg.Decoder.step, backend="eager", fullgraph=True)

    def step(decoder):
        decoder.generator = None  # the compiler does not know generators
        whole(decoder)

    monkeypatch.setattr(motg.Decoder, "step", step)
    rolled_out("cpu", config(sampling, aggregation, end))


WRONG = {  # a step's mistake, and whether it is one where no graph is captured, too
    "a number is read": (lambda x: x.sum().item(), False),
    "a branch on a value": (lambda x: bool(x.any()), False),
    "a boolean index": (lambda x: x[x > 1], False),
    "a shape made of values": (lambda x: x.nonzero(), False),
    "a copy to the host": (lambda x: x.cpu(), False),
    "a copy from the host": (lambda x: x.copy_(torch.ones(3)), False),
    "a tensor of the host": (lambda x: x + torch.ones(3, device="cpu"), True),
    "an index of the host": (lambda x: x[torch.tensor([0], device="cpu")], True),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_the_pretended_gpu_raises_where_cuda_would(mistake, gpu):
    wrong, always = WRONG[mistake]

    def single(device):
        return wrong(torch.arange(3.0, device=device))

    def in_a_graph(device):
        x, graph = torch.arange(3.0, device=device), Graph()
        graph.register_generator_state(Generator())
        with capture(graph):
            wrong(x)

    with pytest.raises(RuntimeError, match="graph is captured|operands on two devices"):
        gpu(in_a_graph)
    if always:
        with pytest.raises(RuntimeError, match="operands on two devices"):
            gpu(single)
    else:
        gpu(single)
