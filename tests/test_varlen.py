"""Training attention without a mask (`model.varlen_attention`) against the mask that it replaces.

The operator runs on CUDA alone. Here a plain reference stands in for it, in float64; and fake tensors,
which have a shape and a dtype, but no numbers, go through a step as on a GPU. (Their device is `meta` and
they say that they are on CUDA: of tensors on CUDA, even fake ones, a PyTorch built for CPUs can neither
take a part nor make a gradient.)
"""

import random
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.attention.varlen
import varlen_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels.logprob
import model
import parallel
from model import ModelConfig, Transformer, can_use_varlen, random_init
from packing import Example, Packed, pack, share_stems
from parallel import World

ALONE = World(0, 1, torch.device("cpu"))
GPU = World(0, 1, torch.device("cuda", 0))
SHAPE = ModelConfig(
    vocab_size=50, dim=24, layers=2, heads=6, kv_heads=2, head_dim=8, mlp_dim=40, qkv_bias=True
)
QWEN_05B = ModelConfig(151936, 896, 24, 14, 2, 64, 4864, tied=True, qkv_bias=True)
QWEN_7B = ModelConfig(152064, 3584, 28, 28, 4, 128, 18944, qkv_bias=True)


@pytest.fixture
def reference(monkeypatch):
    """The plain reference in the operator's place."""
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_reference.varlen_attn)


def random_packing(rng: random.Random, longest: int = 12) -> Packed:
    """Responses to some prompts, in rows of any length: with shared stems and without, several to a
    row and alone, some at positions of their own, some trained on in two places."""
    batch = []
    for _ in range(rng.randint(1, 4)):
        prompt = [rng.randrange(50) for _ in range(rng.randint(1, longest))]
        own = rng.random() < 0.2
        for length in (rng.randint(1, longest) for _ in range(rng.randint(1, 5))):
            tokens = prompt + [rng.randrange(50) for _ in range(length)]
            spans = [(len(prompt), len(tokens))]
            if length > 3:
                spans = [(len(prompt), len(prompt) + 1), (len(tokens) - 1, len(tokens))]
            positions = [3 * t for t in range(len(tokens))] if own else None
            batch.append(Example(tokens, spans, positions))
    dim = rng.choice([None, 0, 8, 300])
    most = rng.randint(1, 100)
    units, row_length = share_stems(batch, dim, most)
    return pack(batch, rng.choice([0, row_length]), rng.choice([None, units]))


def values_and_gradients(network: Transformer, packed: Packed) -> list[torch.Tensor]:
    """The log-probs of all trained tokens, and what a loss of them does to every parameter."""
    network.zero_grad()
    hidden, targets = parallel.trained_places(network, packed)
    table = network.logits(hidden).log_softmax(-1)
    logprob = table.gather(1, targets[:, None])[:, 0]
    (logprob * torch.linspace(-1, 1, len(logprob), dtype=logprob.dtype)).sum().backward()
    return [logprob.detach(), *(parameter.grad.clone() for parameter in network.parameters())]


@pytest.mark.parametrize(("recompute", "packings"), [(False, 200), (True, 50)])
def test_equals_the_mask(reference, recompute, packings):
    """Bug: a run that misses some of its stem's keys, sees its neighbour's, or is aligned to its first
    key and not to its last; a gradient that does not come back to a stem from all of its responses;
    padding that spoils what is computed beside it."""
    network = random_init(SHAPE, seed=0, dtype=torch.float64)
    network.checkpoint_blocks = recompute
    rng = random.Random(0)
    kinds = set()
    for _ in range(packings):
        packed = random_packing(rng)
        kinds.add((packed.documents is None, packed.parents is None, len(packed.tokens) > 1))
        network.varlen = False
        wanted = values_and_gradients(network, packed)
        network.varlen = True
        for mine, theirs in zip(values_and_gradients(network, packed), wanted):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert len(kinds) == 6  # of 8: where stems are shared, there is more than one run


def test_runs_by_hand():
    """Bug: keys counted from their row's start and not from the first row's; padding that belongs to
    the run before it, or to none; runs left on the host when the rows move to a GPU."""
    batch = [
        Example([1, 2, 3, 4, 5], [(3, 5)]),
        Example([9, 9], [(1, 2)]),
        Example([1, 2, 3, 7, 8, 6], [(3, 6)]),
    ]
    units, _ = share_stems(batch, 99)
    packed = pack(batch, units=units)
    assert packed.tokens.tolist() == [[1, 2, 3, 7, 8, 6, 3, 4, 5], [9, 9, 0, 0, 0, 0, 0, 0, 0]]
    runs = packed.runs
    assert runs.query_starts.tolist() == [0, 2, 6, 9, 11, 18]
    assert runs.key_starts.tolist() == [0, 2, 8, 13, 15, 22]
    stem = [0, 1]
    assert runs.keys.tolist() == [*stem, *stem, 2, 3, 4, 5, *stem, 6, 7, 8, *range(9, 18)]
    assert (runs.most_queries, runs.most_keys) == (7, 7)
    moved = packed.to(torch.device("meta"))
    assert moved.tokens.is_meta and moved.runs.keys.is_meta and moved.runs.key_starts.is_meta
    alone = pack(batch).runs
    assert alone.keys is None and torch.equal(alone.query_starts, alone.key_starts)


@given(
    lengths=st.lists(st.one_of(st.integers(2, 60), st.just(400)), max_size=40),
    prompts=st.integers(1, 10),
    budget=st.integers(1, 900),
    size=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_micro_batches_without_a_mask_have_no_padding(lengths, prompts, budget, size):
    """Bug: rows cut as a mask wants them, where attention has none: padding then goes through every
    matrix product, and stems are repeated for nothing."""
    batch = []
    for i, length in enumerate(lengths):
        prompt = [1 + i % prompts] * min(20, length - 1)
        response = range(100, 100 + length - len(prompt))
        batch.append(Example([*prompt, *response], [(len(prompt), length)]))
    micros = []
    for rank in range(size):
        world = World(rank, size, ALONE.device)
        micros += parallel.micro_batches(batch, budget, None, world)
    for places, packed in micros:
        height, width = packed.tokens.shape
        assert height == 1 and width <= max([budget, *lengths])
        assert len(places) == 0 or packed.tokens.all()  # padding is zeros
    assert sum(len(places) for places, _ in micros) == sum(example.targets for example in batch)


def test_equals_the_mask_under_fsdp(reference, monkeypatch):
    """Bug: FSDP, in the precision of the products and with recomputation, hands a block other inputs
    than the plain model gets, or the recomputation another attention."""
    monkeypatch.setattr(parallel, "can_use_varlen", lambda *_: True)
    made = {}
    for wanted in (True, False):
        network = random_init(SHAPE, seed=0, dtype=torch.float64)
        # offload: a process alone has no need of FSDP otherwise
        scorer = parallel.shard(
            network, ALONE, torch.float32, checkpoint_activations=True, offload=True
        )
        assert network.varlen and network.checkpoint_blocks
        network.varlen = wanted
        packed = random_packing(random.Random(3))
        assert packed.parents is not None
        logprob, entropy = parallel.log_probs(scorer, packed)
        (logprob.sum() + entropy.square().sum()).backward()
        gradients = [parameter.grad.full_tensor() for parameter in scorer.parameters()]
        made[wanted] = [logprob.detach(), entropy.detach(), *gradients]
    dist.destroy_process_group()
    for mine, theirs in zip(made[True], made[False]):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


class NeverWait(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: reading a number, a shape that depends on numbers, a
    copy from or to the host's memory."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = str(function)
        for word in ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero"):
            assert word not in name, f"{name} waits"
        leaves = tree_leaves((args, kwargs, result))
        devices = {x.device.type for x in leaves if isinstance(x, torch.Tensor) and x.ndim}
        assert len(devices) <= 1, f"{name} copies between {devices}"
        return result


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shape", [QWEN_05B, QWEN_7B], ids=["0.5B", "7B"])
def test_a_step_on_a_gpu_that_is_not_there(monkeypatch, shape, recompute):
    """Bug: an operator that refuses a dtype, a shape or a layout which only a GPU gets; the mask, where
    no mask is needed; a forward or backward pass that stops to read a number from the device."""
    calls = []
    operator = torch.nn.attention.varlen.varlen_attn

    def checked(*args, **options):
        varlen_reference.check_form(*args, **options)
        assert args[0].dtype == torch.bfloat16
        calls.append(options)
        return operator(*args, **options)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", checked)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels.logprob, "use_triton", lambda tensor: False)  # it needs real memory
    monkeypatch.setattr(FakeTensor, "is_cuda", True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    monkeypatch.setattr(torch, "autocast", lambda kind, enabled: nullcontext())
    shape = replace(shape, layers=2, vocab_size=4096)
    prompt = list(range(300))
    batch = [Example([*prompt, *range(n)], [(300, 300 + n)]) for n in range(200, 1000, 100)]
    ((_, packed),) = parallel.micro_batches(batch, 8192, None, ALONE)
    assert len(packed.tokens) == 1 and packed.parents is not None
    try:
        with FakeTensorMode():
            network = Transformer(shape, torch.bfloat16, "meta")
            network.checkpoint_blocks = recompute
            network.varlen = can_use_varlen(shape, torch.bfloat16, GPU.device)
            scorer = parallel.Scorer(network)
            model.inverse_frequencies(
                shape, network.embed.weight.device
            )  # copied to the device once in a process
            inputs = fake_copy(packed)
            with NeverWait():
                logprob, entropy = scorer(inputs, 1.0)
                (logprob.sum() + entropy.sum()).backward()
            assert logprob.shape == (len(packed.targets),) and logprob.dtype == torch.float32
            for parameter in network.parameters():
                assert parameter.grad.shape == parameter.shape
    finally:
        model.inverse_frequencies.cache_clear()  # it holds a fake one
    assert len(calls) == shape.layers * (1 + recompute)


def fake_copy(packed: Packed) -> Packed:
    """The packed rows on the GPU that is not there."""
    runs = packed.runs
    made = {}
    for name, tensor in (vars(packed) | vars(runs)).items():
        if isinstance(tensor, torch.Tensor):
            made[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    of_runs = {name: made.pop(name) for name in ("query_starts", "key_starts", "keys")}
    return replace(packed, **made, runs=replace(runs, **of_runs))


def test_where_it_can_be_used(monkeypatch):
    """Bug: the operator asked of a card, a dtype or a size of heads that it has no kernel for."""
    bf16 = torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert can_use_varlen(QWEN_7B, bf16, GPU.device)
    assert not can_use_varlen(QWEN_7B, torch.float32, GPU.device)
    assert not can_use_varlen(QWEN_7B, bf16, ALONE.device)
    assert not can_use_varlen(replace(QWEN_7B, head_dim=36), bf16, GPU.device)
    assert not can_use_varlen(replace(QWEN_7B, head_dim=264), bf16, GPU.device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not can_use_varlen(QWEN_7B, bf16, GPU.device)
    scorer = parallel.shard(random_init(SHAPE, 0), ALONE)
    assert not scorer.model.varlen and parallel.row_dim(scorer.model) == SHAPE.dim
    scorer.model.varlen = True
    assert parallel.row_dim(scorer.model) is None


def test_cudnn_attention_is_off():
    """Bug: PyTorch prefers cuDNN's attention on an H100, which plans for half a second at every new
    shape."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_operator_equals_the_reference():
    """Bug: PyTorch's operator computes something other than the reference that stands in for it here:
    causal from the first key, other heads grouped, a gradient lost."""
    rng = random.Random(1)
    for _ in range(20):
        packed = random_packing(rng, longest=300).to(GPU.device)
        places = packed.tokens.numel()
        upstream = torch.randn(1, 6, places, 64, device="cuda", dtype=torch.bfloat16)
        made = []
        for dtype, operator in (
            (torch.bfloat16, torch.nn.attention.varlen.varlen_attn),
            (torch.float64, varlen_reference.varlen_attn),
        ):
            torch.manual_seed(0)
            inputs = [torch.randn(1, h, places, 64, device="cuda").bfloat16() for h in (6, 2, 2)]
            inputs = [x.to(dtype).requires_grad_() for x in inputs]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.nn.attention.varlen, "varlen_attn", operator)
                out = model.varlen_attention(packed.runs, 0, *inputs)
            made.append([out, *torch.autograd.grad(out, inputs, upstream.to(dtype))])
        for mine, theirs in zip(*made):
            assert (mine.double() - theirs).norm() <= 0.01 * theirs.norm()
