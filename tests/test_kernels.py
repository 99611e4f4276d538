"""kernels/: is every number that loss, sampler and decode step take from them right, on every path?

The truth is the textbook formula in float64. Three paths are held against it:
- PyTorch on the CPU;
- the Triton kernels run by Triton's interpreter (marked `interpreted`; in a process of its own,
  because Triton reads the switch when it is imported);
- the Triton kernels on a GPU (marked `gpu`).
Without a GPU the kernels are still compiled for six of them, and must not spill.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import linear_logprob
from kernels.jit import INTERPRETED, triton
from kernels.sampling import (
    WEYL,
    _sample_reference,
    counter,
    fold,
    nucleus,
    scramble,
    splitmix64,
)

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_kernels_in_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED or triton is None, reason="needs Triton's compiler")
on_cpu = pytest.mark.skipif(INTERPRETED, reason="the PyTorch path")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def many_tiles(monkeypatch):
    """The tests' problems would all be kept, or fit into one tile: forbid both."""
    monkeypatch.setattr(linear_logprob, "KEPT", 0)
    monkeypatch.setattr(linear_logprob, "TILE", 0)


def textbook(logits, targets, temperature, dtype):
    """log softmax(z / T)[y] and -sum p log p, by PyTorch: in float64 the truth, in fp32 the
    competition."""
    logp = torch.log_softmax(logits.to(dtype) / temperature, dim=-1)
    entropy = -torch.where(logp > -1e30, logp.exp() * logp, 0.0).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], entropy


def outputs_and_gradients(function, inputs, upstream):
    """[logprob, entropy, gradients of the inputs...] for the loss upstream[0] @ logprob +
    upstream[1] @ entropy."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    logprob, entropy = function(*inputs)
    (upstream[0].to(logprob.dtype) @ logprob + upstream[1].to(entropy.dtype) @ entropy).backward()
    return [
        tensor.detach().double()
        for tensor in (logprob, entropy, *(tensor.grad for tensor in inputs))
    ]


def assert_no_worse(ours, plain, truth, rounding, tiles=1):
    """Cut-cross-entropy's question: no output is further from the truth than plain PyTorch's in the
    same dtype.

    tiles: how many products one after the other make up the gradient of the hidden states, where
    PyTorch makes it in one. Each addition rounds in fp32, this way or that.
    """
    for place, (one, other, true) in enumerate(zip(ours, plain, truth)):
        assert one.isfinite().all()
        scale = true.abs().max().item() + 1e-30
        error, its_error = ((value - true).abs().max().item() / scale for value in (one, other))
        additions = tiles if place == GRAD_HIDDEN else 1
        bound = 2 * its_error + 4 * rounding + (math.sqrt(additions) - 1) * 2.0**-23
        assert error <= bound, f"relative error {error:.1e}, plain PyTorch has {its_error:.1e}"


GRAD_HIDDEN = 2  # its place among outputs_and_gradients
SHAPES = [(257, 7), (1, 7), (3, 115), (257, 1000), (1, 49152), (3, 49152), (3, 151936)]
UPSTREAMS = {"logprob": (1.0, 0.0), "entropy": (0.0, 1.0), "both": (1.0, 0.3)}
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def check_logprob(
    rows, vocabulary, dtype, temperature, upstream, magnitude=3.0, device="cpu", inplace=False
):
    torch.manual_seed(rows + vocabulary)
    logits = (torch.randn(rows, vocabulary, device=device) * magnitude).to(dtype)
    targets = torch.randint(vocabulary, (rows,), device=device)
    upstream = [torch.randn(rows, device=device) * factor for factor in UPSTREAMS[upstream]]

    def ours(z):
        return kernels.logprob_entropy(z * 1 if inplace else z, targets, temperature, inplace)

    truth = outputs_and_gradients(
        lambda z: textbook(z, targets, temperature, torch.float64), [logits.double()], upstream
    )
    plain = outputs_and_gradients(
        lambda z: textbook(z, targets, temperature, torch.float32), [logits], upstream
    )
    assert_no_worse(outputs_and_gradients(ours, [logits], upstream), plain, truth, 2.0**-20)


def check_linear(rows, vocabulary, dtype, temperature, upstream, width=48, device="cpu"):
    torch.manual_seed(rows + vocabulary)
    hidden = torch.randn(rows, width, device=device).to(dtype)
    weight = (torch.randn(vocabulary, width, device=device) * 0.5).to(dtype)
    targets = torch.randint(vocabulary, (rows,), device=device)
    upstream = [torch.randn(rows, device=device) * factor for factor in UPSTREAMS[upstream]]

    def by_textbook(dtype):
        return lambda h, w: textbook(h.to(dtype) @ w.to(dtype).T, targets, temperature, dtype)

    def plain(h, w):  # what a model does: the logits come out in the dtype of the hidden states
        return textbook(h @ w.T, targets, temperature, torch.float32)

    ours = outputs_and_gradients(
        lambda h, w: kernels.linear_logprob_entropy(h, w, targets, temperature),
        [hidden, weight],
        upstream,
    )
    truth = outputs_and_gradients(
        by_textbook(torch.float64), [hidden.double(), weight.double()], upstream
    )
    theirs = outputs_and_gradients(plain, [hidden, weight], upstream)
    tiles = len(linear_logprob.tiles(hidden, weight))
    assert_no_worse(ours, theirs, truth, ROUNDING[dtype], tiles)


# --- log-prob and entropy -------------------------------------------------------------------------


@on_cpu
@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("rows, vocabulary", SHAPES)
def test_logprob_entropy_is_no_worse_than_plain_pytorch(rows, vocabulary, dtype, upstream):
    """Guards against a wrong term in either gradient, a lost tail block, or precision lost on the
    way."""
    check_logprob(rows, vocabulary, dtype, {7: 0.6, 1000: 1.2}.get(vocabulary, 1.0), upstream)


@on_cpu
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.2])
def test_extreme_logits_keep_their_digits(temperature):
    """Guards against log-sum-exp stored as one fp32 number: at logits of 10^4 it forgets log s."""
    check_logprob(257, 1000, torch.float32, temperature, "both", magnitude=1e4)
    flat = torch.full((2, 1000), 1e4, requires_grad=True)
    logprob, entropy = kernels.logprob_entropy(flat, torch.tensor([3, 999]), temperature)
    torch.testing.assert_close(logprob, torch.full((2,), -math.log(1000)))
    torch.testing.assert_close(entropy, torch.full((2,), math.log(1000)))


@on_cpu
def test_inplace_gradient_is_the_same_and_takes_the_logits_memory():
    """Guards against overwriting logits that are still to be read, and against a silent copy."""
    check_logprob(257, 1000, torch.float32, 1.2, "both", inplace=True)
    logits = torch.randn(5, 11, requires_grad=True) * 1
    logprob, _ = kernels.logprob_entropy(logits, torch.arange(5), inplace=True)
    (grad,) = torch.autograd.grad(logprob.sum(), logits)
    assert grad.data_ptr() == logits.data_ptr()


@on_cpu
@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    "rows, vocabulary", [(257, 7), (3, 115), (257, 1000), (3, 49152), (1, 151936)]
)
def test_linear_logprob_entropy_is_no_worse_than_plain_pytorch(rows, vocabulary, dtype, upstream):
    """Guards against tiles merged wrongly (a target or a maximum in a later tile), and
    half-precision accumulation."""
    check_linear(rows, vocabulary, dtype, {7: 0.6, 1000: 1.2}.get(vocabulary, 1.0), upstream)


@on_cpu
def test_narrow_tiles_cost_digits_of_the_sum_over_them(monkeypatch):
    """Why assert_no_worse counts tiles: one fp32 addition for each, to a sum whose terms all but
    cancel in the entropy's gradient. With 594 tiles an H100 was off by 4.4e-6, plain PyTorch by
    1.2e-6. Here products are exact, so what is lost is lost by the additions; with a
    GPU's own tiles for 8,192 rows, 4,096 columns wide, it is less than half."""

    def exact(a, b):
        return (a.double() @ b.double()).float()

    def add_exact(total, a, b):
        total += exact(a, b)

    monkeypatch.setattr(linear_logprob, "product", exact)
    monkeypatch.setattr(linear_logprob, "add_product", add_exact)
    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 48), torch.randn(151936, 48) * 0.5
    targets = torch.randint(151936, (8,))
    upstream = [torch.zeros(8), torch.randn(8)]
    truth = outputs_and_gradients(
        lambda h, w: textbook(h @ w.T, targets, 1.0, torch.float64),
        [hidden.double(), weight.double()],
        upstream,
    )[GRAD_HIDDEN]
    lost = {}
    for columns in (256, 4096):
        monkeypatch.setattr(linear_logprob, "CPU_TILE", columns * len(hidden))
        ours = outputs_and_gradients(
            lambda h, w: kernels.linear_logprob_entropy(h, w, targets), [hidden, weight], upstream
        )[GRAD_HIDDEN]
        lost[columns] = ((ours - truth).square().mean() / truth.square().mean()).sqrt().item()
    assert 2 * lost[4096] < lost[256] < math.sqrt(594) * 2.0**-22, lost


@on_cpu
def test_gradients_by_finite_differences(monkeypatch):
    """The gradients against the functions themselves, in float64, over tiles of every kind (first,
    middle, ragged)."""
    monkeypatch.setattr(linear_logprob, "CPU_TILE_ROWS", 3)
    torch.manual_seed(0)
    targets = torch.tensor([0, 269, 256, 255, -1])
    logits = torch.randn(5, 270, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: kernels.logprob_entropy(z, targets, 0.7), (logits,))
    hidden = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(270, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda h, w: kernels.linear_logprob_entropy(h, w, targets, 1.3), (hidden, weight)
    )


@on_cpu
@given(
    rows=st.integers(1, 40),
    vocabulary=st.integers(2, 700),
    tile_rows=st.integers(1, 50),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_no_tiling_changes_the_answer(rows, vocabulary, tile_rows, seed):
    """Guards against seams: an off-by-one at a tile's edge shows for some shape."""
    torch.manual_seed(seed)
    hidden, weight = (
        torch.randn(rows, 5, dtype=torch.float64),
        torch.randn(vocabulary, 5, dtype=torch.float64),
    )
    targets = torch.randint(vocabulary, (rows,))
    upstream = torch.randn(2, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_logprob, "CPU_TILE_ROWS", tile_rows)
        ours = outputs_and_gradients(
            lambda h, w: kernels.linear_logprob_entropy(h, w, targets), [hidden, weight], upstream
        )
    truth = outputs_and_gradients(
        lambda h, w: textbook(h @ w.T, targets, 1.0, torch.float64), [hidden, weight], upstream
    )
    for one, other in zip(ours, truth):
        torch.testing.assert_close(one, other)


def check_impossible_tokens(device="cpu"):
    logits = torch.randn(3, 50, device=device)
    logits[:, ::3] = -math.inf
    logits[2, 1:] = -math.inf
    logits[2, 0] = 1.5
    logits.requires_grad_()
    targets = torch.tensor([1, 2, 0], device=device)
    logprob, entropy = kernels.logprob_entropy(logits, targets, 0.9)
    (logprob.sum() + entropy.sum()).backward()
    truth = textbook(logits, targets, 0.9, torch.float64)
    torch.testing.assert_close(logprob, truth[0].float())
    torch.testing.assert_close(entropy, truth[1].float())
    assert logits.grad.isfinite().all() and (logits.grad[0, ::3] == 0).all()
    assert entropy[2] == 0 and logprob[2] == 0


def check_ignored_rows(device="cpu"):
    hidden = torch.randn(6, 8, device=device, requires_grad=True)
    weight = torch.randn(400, 8, device=device, requires_grad=True)
    targets = torch.tensor([3, -100, 399, -1, 0, 256], device=device)
    kept = targets >= 0
    logprob, entropy = kernels.linear_logprob_entropy(hidden, weight, targets, 1.2)
    assert (logprob[~kept] == 0).all() and (entropy[~kept] == 0).all()
    grads = torch.autograd.grad((logprob + entropy).sum(), [hidden, weight])
    alone = kernels.linear_logprob_entropy(hidden[kept], weight, targets[kept], 1.2)
    expected = torch.autograd.grad(sum(alone).sum(), [hidden, weight])
    for one, other in zip(grads, expected):
        torch.testing.assert_close(one, other)


@on_cpu
def test_impossible_tokens_give_no_nan():
    """Guards against 0 * log 0: -inf logits, as constrained decoding makes them, must leave H and
    gradients finite."""
    check_impossible_tokens()


@on_cpu
def test_no_rows_have_a_gradient_of_zero():
    """Bug: a micro-batch without a trained token ends in a gradient that was never made."""
    hidden, weight = torch.zeros(0, 8, requires_grad=True), torch.ones(5, 8, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    logprob, entropy = linear_logprob._LinearLogprobEntropy.apply(
        hidden, weight, none, 1.0, torch.float32
    )
    (logprob.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == (0, 8) and torch.equal(weight.grad, torch.zeros(5, 8))


@on_cpu
def test_ignored_rows_count_for_nothing():
    """Guards against padding that leaks into the weight's gradient."""
    check_ignored_rows()


@on_cpu
@pytest.mark.parametrize("kept", [0, 1 << 23])
def test_targets_beyond_the_vocabulary_are_refused(kept, monkeypatch):
    """Guards against another tokenizer's ids: a target that no tile holds had a log-prob all the
    same, of nothing."""
    monkeypatch.setattr(linear_logprob, "KEPT", kept)
    hidden, weight, targets = torch.randn(3, 8), torch.randn(300, 8), torch.tensor([299, -1, 300])
    with pytest.raises(IndexError, match="target 300 is outside the vocabulary of 300"):
        kernels.linear_logprob_entropy(hidden, weight, targets)
    with pytest.raises(IndexError, match="target 300"):
        kernels.logprob_entropy(hidden @ weight.T, targets)


@on_cpu
def test_frozen_halves_and_autocast():
    """Guards against demanding a gradient nobody asked for, and against autocast rounding the
    outputs to bf16."""
    hidden, weight, targets = torch.randn(9, 8), torch.randn(30, 8), torch.randint(30, (9,))
    for frozen in (0, 1):
        inputs = [
            tensor.clone().requires_grad_(index != frozen)
            for index, tensor in enumerate((hidden, weight))
        ]
        sum(kernels.linear_logprob_entropy(*inputs, targets)).sum().backward()
        assert inputs[frozen].grad is None and inputs[1 - frozen].grad.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = kernels.linear_logprob_entropy(hidden.bfloat16(), weight, targets)
    expected = textbook(hidden.bfloat16().float() @ weight.T, targets, 1.0, torch.float64)
    for one, other in zip(under_autocast, expected):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-5)
    assert [
        out.shape for out in kernels.linear_logprob_entropy(hidden[:0], weight, targets[:0])
    ] == [(0,), (0,)]


@on_cpu
@pytest.mark.parametrize("kept", [0, 1 << 23])
def test_the_rl_loss_is_the_same_fused_and_plain(kept, monkeypatch):
    """Guards against a fused path that trains another objective.

    (TRL drops the entropy bonus with its fused loss.)

    Once in tiles, once kept as a whole.
    """
    monkeypatch.setattr(linear_logprob, "KEPT", kept)
    torch.manual_seed(1)
    hidden, weight, targets = (
        torch.randn(300, 32),
        torch.randn(2000, 32) * 0.3,
        torch.randint(2000, (300,)),
    )
    old, advantage = torch.randn(300) * 0.1 - 8, torch.randn(300)

    def loss_and_gradients(function):
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        logprob, entropy = function(*inputs)
        ratio = (logprob - old).exp()
        clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        loss = -(clipped + 0.01 * entropy).mean()
        loss.backward()
        return loss.detach(), *(tensor.grad for tensor in inputs)

    fused = loss_and_gradients(lambda h, w: kernels.linear_logprob_entropy(h, w, targets, 1.2))
    plain = loss_and_gradients(lambda h, w: textbook(h @ w.T, targets, 1.2, torch.float32))
    for one, other in zip(fused, plain):
        assert ((one - other).norm() / other.norm()).item() < 1e-6


class LargestAllocation(TorchDispatchMode):
    """Records the storage sizes that operations return."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.sizes.append(tensor.untyped_storage().nbytes())
        return result


@on_cpu
def test_the_logits_never_exist():
    """Guards against [N, V] sneaking back: a whole step at Qwen's vocabulary allocates 1/8 of the
    logits at most."""
    rows, vocabulary, width = 512, 151936, 4
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    with LargestAllocation() as largest:
        sum(
            kernels.linear_logprob_entropy(hidden, weight, torch.randint(vocabulary, (rows,)))
        ).sum().backward()
    assert max(largest.sizes) <= rows * vocabulary * 4 / 8


# --- softmax --------------------------------------------------------------------------------------


def check_softmax(rows, vocabulary, dtype, device="cpu"):
    logits = (torch.randn(rows, vocabulary, device=device) * 5).to(dtype).requires_grad_()
    upstream = torch.randn(rows, vocabulary, device=device, dtype=dtype)
    for ours, theirs in (
        (kernels.softmax, torch.softmax),
        (kernels.log_softmax, torch.log_softmax),
    ):
        out, truth = ours(logits, 0.7), theirs(logits.double() / 0.7, -1)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), truth, rtol=2 * ROUNDING[dtype], atol=1e-6)
        grad, expected = (
            torch.autograd.grad(value, logits, upstream.to(value.dtype))[0]
            for value in (out, truth)
        )
        torch.testing.assert_close(
            grad, expected, rtol=8 * ROUNDING[dtype], atol=100 * ROUNDING[dtype]
        )


@on_cpu
def test_softmax():
    """Guards the warm-up: right with a temperature, in the input's dtype."""
    for dtype in ROUNDING:
        check_softmax(3, 1000, dtype)


# --- sampling -------------------------------------------------------------------------------------


def draws(logits, count, temperature=1.0, top_p=1.0, min_p=0.0):
    """`count` independent draws from one row of logits[V]: seeds 0, 1, ... at position 5."""
    seeds, positions = torch.arange(count), torch.full((count,), 5)
    return kernels.sample_token(
        logits.expand(count, -1), temperature, top_p, min_p, seeds, positions
    )


def excess(counts, probabilities):
    """Chi-square in standard deviations: beyond 5, the counts do not come from these
    probabilities."""
    expected = probabilities.double() * counts.sum()
    freedom = len(counts) - 1
    return ((((counts - expected) ** 2) / expected).sum().item() - freedom) / math.sqrt(2 * freedom)


def kept_by_the_textbook(p, top_p, min_p):
    """Top-p and min-p token by token: walk down the sorted list, stop when the mass has reached
    top_p."""
    order = sorted(range(len(p)), key=lambda token: (-p[token], token))
    kept, mass = [], 0.0
    for token in order:
        if mass >= top_p and kept:
            break
        kept.append(token)
        mass += p[token]
    return sorted(token for token in kept if p[token] >= min_p * max(p))


@on_cpu
@pytest.mark.parametrize(
    "temperature, top_p, min_p", [(1, 1, 0), (1.2, 1, 0.05), (0.6, 0.8, 0), (1.5, 0.9, 0.1)]
)
def test_draws_follow_the_distribution_and_report_it(temperature, top_p, min_p):
    """Guards against cuts in the wrong order, and log-probs of another distribution than the one
    drawn from."""
    torch.manual_seed(0)
    logits = torch.randn(40) * 2
    p = torch.softmax(logits.double() / temperature, 0)
    kept = kept_by_the_textbook(p.tolist(), top_p, min_p)
    p = p[kept] / p[kept].sum()
    token, logprob = draws(logits, 60_000, temperature, top_p, min_p)
    counts = torch.bincount(token, minlength=40)
    assert counts.sum() == counts[kept].sum(), "a token outside the kept set was drawn"
    assert abs(excess(counts[kept], p)) < 5
    expected = torch.zeros(40, dtype=torch.float64).index_put((torch.tensor(kept),), p.log())
    torch.testing.assert_close(logprob.double(), expected[token], rtol=1e-5, atol=1e-6)


@on_cpu
@given(
    levels=st.lists(st.integers(0, 6), min_size=1, max_size=30),
    top_p=st.sampled_from([0.0, 0.11, 0.3, 0.52, 0.77, 0.93, 0.999]),
)
@settings(max_examples=200, deadline=None)
def test_nucleus_is_the_smallest_set_even_among_equals(levels, top_p):
    """Guards against top-p that keeps every token tied with the last one (bf16 logits tie often),
    or none at all."""
    p = torch.tensor(levels, dtype=torch.float64).mul(0.7).exp()
    p = p / p.sum()
    cumulative = p.sort(descending=True).values.cumsum(0)
    if ((cumulative - top_p).abs() < 1e-6).any():
        return  # on the very border rounding may decide either way
    assert nucleus(p[None], top_p)[0].nonzero()[:, 0].tolist() == kept_by_the_textbook(
        p.tolist(), top_p, 0.0
    )


@on_cpu
def test_a_draw_depends_on_row_seed_and_position_alone():
    """Guards against noise tied to the batch: refilling a slot would change every other sequence's
    tokens."""
    torch.manual_seed(0)
    logits, seeds, positions = (
        torch.randn(90, 1500),
        torch.randint(-(2**63), 2**63 - 1, (90,)),
        torch.arange(90),
    )
    token, logprob = kernels.sample_token(logits, 1.0, 0.95, 0.01, seeds, positions)
    some = torch.randperm(90)[:17]
    again = kernels.sample_token(logits[some], 1.0, 0.95, 0.01, seeds[some], positions[some])
    assert (again[0] == token[some]).all() and (again[1] == logprob[some]).all()
    assert (kernels.sample_token(logits, 1.0, 0.95, 0.01, seeds, positions + 1)[0] != token).any()


def race(logits, temperature, w):
    """The draw as the top of sampling.py writes it, for one row and one w in (0, 1) a token."""
    p = (logits / temperature).softmax(0)
    arrival = -torch.log(1 - w) / p
    token = arrival.argmin()
    return token, p[token].log()


@on_cpu
def test_the_draw_is_the_race_in_plain_words():
    """Guards against a docstring that explains another draw than the one that is made.

    First its example of three tokens, then rows of sample_token with their own noise.
    """
    token, _ = race(torch.tensor([0.5, 0.3, 0.2]).log(), 1.0, torch.tensor([0.63, 0.20, 0.70]))
    assert token == 1

    torch.manual_seed(0)
    logits = torch.randn(50, 700, dtype=torch.float64)
    seeds, positions = torch.arange(50), torch.full((50,), 5)
    tokens, logprobs = kernels.sample_token(logits, 1.2, 1.0, 0.0, seeds, positions)
    index = torch.arange(700, dtype=torch.int32) * WEYL
    for row in range(50):
        key = splitmix64(counter(seeds[row], positions[row]))
        noise = scramble(fold(index ^ key.to(torch.int32)), (key >> 32).to(torch.int32))
        token, logprob = race(logits[row], 1.2, noise.double() * -(2.0**-31))
        assert token == tokens[row]
        torch.testing.assert_close(logprob.float(), logprobs[row])


@on_cpu
def test_one_hash_serves_tensors_and_integers():
    """Guards against sequence seeds that Python's integers, which do not overflow, hash
    otherwise."""
    for number in (0, 1, -1, 2**63 - 1, -(2**63), 0x9E3779B97F4A7C15 - 2**64):
        expected = splitmix64(torch.tensor(number)).item()
        assert (splitmix64(number) - expected) % 2**64 == 0
        assert (splitmix64(number + 2**64) - expected) % 2**64 == 0
    # The generator's published first output for the seed 0.
    assert splitmix64(0x9E3779B97F4A7C15) % 2**64 == 0xE220A8397B1DCDAF


@on_cpu
def test_greedy_and_impossible_and_out_of_range():
    """Guards against T = 0 dividing by zero, drawing -inf tokens, and nonsense settings taken
    silently."""
    logits = torch.randn(4, 30)
    nothing = torch.zeros(4, dtype=torch.int64)
    token, logprob = kernels.sample_token(logits, 0.0, 0.5, 0.5, nothing, nothing)
    assert (token == logits.argmax(1)).all()
    torch.testing.assert_close(logprob, logits.log_softmax(1).amax(1))
    only = torch.full((30,), -math.inf)
    only[[3, 11]] = 0.0
    assert set(draws(only, 200)[0].tolist()) == {3, 11}
    for temperature, top_p, min_p in ((-1, 1, 0), (1, 1.1, 0), (1, 1, -0.1), (math.nan, 1, 0)):
        with pytest.raises(ValueError, match="must be"):
            kernels.sample_token(logits, temperature, top_p, min_p, nothing, nothing)


@on_cpu
@pytest.mark.parametrize("neighbours", ["seeds", "positions", "high bits of the seed"])
def test_the_noise_is_uniform_and_neighbours_are_strangers(neighbours):
    """Guards against a weak hash: counters differ in a bit or two, the noise must not show it."""
    count, zero = torch.arange(300), torch.zeros(300, dtype=torch.int64)
    seeds = {"seeds": count, "positions": zero + 42, "high bits of the seed": count << 40}[
        neighbours
    ]
    positions = count if neighbours == "positions" else zero
    key = splitmix64(counter(seeds, positions))
    index = torch.arange(20_000, dtype=torch.int32) * WEYL
    w = scramble(
        fold(index ^ key.to(torch.int32)[:, None]), (key >> 32).to(torch.int32)[:, None]
    ) * -(2.0**-31)
    even = torch.ones(1024) / 1024
    assert abs(excess(torch.histc(w, 1024, 0, 1), even)) < 5, "not uniform"
    grid = (w * 32).long()
    for one, other in (
        (grid[1:], grid[:-1]),
        (grid[:, 1:], grid[:, :-1]),
        (grid[:, 64:], grid[:, :-64]),
    ):
        assert (
            abs(excess(torch.bincount((one * 32 + other).flatten(), minlength=1024), even)) < 5
        ), "correlated"
    # The smallest of V uniforms, times V, is exponential; a draw looks at nothing but such
    # extremes.
    smallest = 1 - torch.exp(-w.amin(1).double() * 20_000)
    steps = (torch.arange(300) + 0.5) / 300
    assert (smallest.sort().values - steps).abs().max() * math.sqrt(300) < 1.9, (
        "wrong in the tail"
    )  # 0.1 % point


# --- the small work of a decode step --------------------------------------------------------------


def normalised(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def assert_rounded(found, truth, dtype):
    """`found`, in `dtype`, is `truth` but for one rounding, and fp32's before it."""
    assert found.dtype == dtype
    rounding = ROUNDING.get(dtype, 1e-13)
    if INTERPRETED and dtype == torch.bfloat16:
        rounding *= 2  # the interpreter cuts digits off
    scale = truth.abs().max().item()
    torch.testing.assert_close(
        found.double(), truth, rtol=rounding, atol=4 * min(rounding, 2.0**-23) * scale
    )


def check_add_norm(rows, columns, dtype, device="cpu"):
    torch.manual_seed(columns)
    for scale in (1e-3, 1.0, 100.0):  # at the first, eps is what decides
        for added_dtype in {dtype, torch.float32}:
            stream = torch.randn(rows, columns, device=device) * scale
            stream = stream.double() if dtype == torch.float64 else stream
            added = (torch.randn(rows, columns, device=device) * scale).to(added_dtype)
            weight = torch.randn(columns, device=device).to(dtype)
            total = stream.double() + added.double()
            found = kernels.add_norm(stream, added, weight, 1e-4)
            assert_rounded(stream, total, stream.dtype)
            assert_rounded(found, normalised(total, weight, 1e-4), dtype)


def check_rotary_write(rows, heads, kv_heads, head_dim, rope_dim, dtype, norm, device="cpu"):
    torch.manual_seed(head_dim + rope_dim)
    shape = (3 * rows + 2, kv_heads, head_dim)
    keys, values = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    places = torch.randperm(len(keys), device=device)[:rows]
    angles = torch.randn(rows, rope_dim // 2, device=device).double() * 9
    rotation = torch.stack([angles.cos(), angles.sin()], -1)
    rotation = rotation if dtype == torch.float64 else rotation.float()
    norms = [torch.randn(head_dim, device=device).to(dtype) for _ in range(2)] if norm else None
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, device=device).to(dtype)

    split = qkv.double().view(rows, -1, head_dim).split([heads, kv_heads, kv_heads], 1)
    expected = []
    for i, part in enumerate(split[:2]):
        part = normalised(part, norms[i], 1e-4) if norm else part.clone()
        pairs = torch.view_as_complex(part[..., :rope_dim].reshape(rows, -1, rope_dim // 2, 2))
        turned = pairs * torch.view_as_complex(rotation.double())[:, None]
        part[..., :rope_dim] = torch.view_as_real(turned).flatten(-2)
        expected.append(part)
    new_keys, new_values = keys.double(), values.double()
    new_keys[places] = expected[1]
    new_values[places] = split[2]

    q = kernels.rotary_write(qkv, rotation, places, keys, values, norms, 1e-4)
    assert_rounded(q, expected[0], dtype)
    assert_rounded(keys, new_keys, dtype)
    assert (values.double() == new_values).all()


def check_silu_mul(rows, columns, dtype, device="cpu"):
    torch.manual_seed(columns)
    for scale in (1.0, 60.0):  # exp(-z) overflows at the second, and silu(z) is 0
        gate_up = (torch.randn(rows, 2 * columns, device=device) * scale).to(dtype)
        gate, up = gate_up.double().chunk(2, 1)
        assert_rounded(kernels.silu_mul(gate_up), gate / (1 + (-gate).exp()) * up, dtype)


def check_decoding(dtype, device="cpu"):
    for rows, columns in ((1, 1), (1, 8), (3, 7), (2, 896), (5, 1500)):
        check_add_norm(rows, columns, dtype, device)
        check_silu_mul(rows, columns, dtype, device)
    for norm in (False, True):
        check_rotary_write(1, 1, 1, 8, 8, dtype, norm, device)
        check_rotary_write(3, 6, 2, 24, 24, dtype, norm, device)  # not a power of 2
        check_rotary_write(5, 4, 4, 16, 6, dtype, norm, device)  # no groups, part of a head
        check_rotary_write(2, 14, 2, 64, 64, dtype, norm, device)


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_small_work_of_a_decode_step(dtype):
    """Guards against a sum that is not kept, a rotation of the wrong pairs or the wrong way, a key
    written elsewhere, a norm over too many numbers, and a rounding in between."""
    check_decoding(dtype)


# --- the Triton kernels ---------------------------------------------------------------------------


@interpreted
def test_interpreted_logprob():
    """The kernels of logprob.py, run as numpy: one tile and many, every dtype, both gradients."""
    for dtype in ROUNDING:
        check_logprob(3, 115, dtype, 0.6, "both")
    for vocabulary, upstream in (
        (7, "both"),
        (1000, "logprob"),
        (20_000, "both"),
        (20_000, "entropy"),
    ):
        check_logprob(3, vocabulary, torch.float32, 1.2, upstream)
    check_logprob(2, 9000, torch.float32, 1.0, "both", magnitude=1e4)
    check_logprob(3, 115, torch.float32, 1.0, "both", inplace=True)
    check_impossible_tokens()


@interpreted
def test_interpreted_linear_logprob(monkeypatch):
    """Tiles of rows and of the vocabulary carry their state through the kernel."""
    check_linear(5, 1000, torch.float32, 1.2, "both")
    monkeypatch.setattr(linear_logprob, "CPU_TILE_ROWS", 2)
    monkeypatch.setattr(linear_logprob, "CPU_TILE", 512)
    check_linear(5, 700, torch.bfloat16, 0.6, "both")
    check_ignored_rows()


@interpreted
def test_interpreted_softmax():
    check_softmax(2, 9001, torch.float32)
    check_softmax(2, 115, torch.bfloat16)


@interpreted
def test_interpreted_decoding():
    """The kernels of decoding.py, at widths that are no power of 2 and for rows of several blocks."""
    for dtype in (torch.float32, torch.bfloat16):
        check_decoding(dtype)


def check_same_draws(rows, vocabulary, device="cpu"):
    torch.manual_seed(vocabulary)
    logits = torch.randn(rows, vocabulary, device=device) * 3
    logits[:, 1::5] = -math.inf
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), device=device)
    positions = torch.randint(0, 5000, (rows,), device=device)
    for settings_ in ((1.0, 1.0, 0.0), (1.3, 1.0, 0.05), (0.7, 0.6, 0.01), (0.0, 1.0, 0.0)):
        token, logprob = kernels.sample_token(logits, *settings_, seeds, positions)
        if settings_[0] > 0:
            expected = _sample_reference(logits.cpu(), *settings_, seeds.cpu(), positions.cpu())
            assert (token.cpu() == expected[0]).float().mean() > 0.999
            same = token.cpu() == expected[0]
            torch.testing.assert_close(logprob.cpu()[same], expected[1][same], rtol=1e-5, atol=1e-5)


@interpreted
def test_interpreted_sampling_draws_the_same_tokens():
    """PyTorch and Triton share the hash, not the race: the winner and its log-prob must still be
    the same."""
    check_same_draws(6, 115)
    check_same_draws(4, 5000)


@compiled
def test_kernels_in_the_interpreter():
    """Runs the tests above with the switch on. Guards against kernels that only ever meet a GPU
    nobody has at hand."""
    pytest_here = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [*pytest_here, "-k", "interpreted"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert "5 passed" in result.stdout


@compiled
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_kernels_compile_without_spills(capability):
    """Guards against tile sizes that do not fit the registers of one GPU or another: the
    bench names the six."""
    from benchmarks.kernels_bench import compile_kernels

    for name, resources in compile_kernels(
        capability, ["bf16"] if capability != 90 else ["bf16", "fp32"]
    ):
        assert resources["spilled bytes"] == 0, f"{name} spills: {resources}"
        assert resources["registers"] <= 128, f"{name}: {resources}"


@on_cpu
def test_everything_works_without_triton():
    """Guards against an import that fails on macOS, where there is no Triton."""
    code = (
        "import sys; sys.modules['triton'] = None; import torch, kernels;"
        "z = torch.randn(2, 9, requires_grad=True); y = torch.tensor([0, 8]);"
        "sum(kernels.logprob_entropy(z, y)).sum().backward(); kernels.softmax(z);"
        "kernels.sample_token(z, 1., 1., 0., y, y); kernels.silu_mul(torch.ones(2, 4))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ROUNDING)
def test_gpu_is_no_worse_than_plain_pytorch(dtype):
    """The interpreter knows no races, no fast exponentials and no tensor cores; a GPU does."""
    for rows, vocabulary in (*SHAPES, (257, 49152)):
        for temperature in (0.6, 1.0, 1.2):
            check_logprob(rows, vocabulary, dtype, temperature, "both", device="cuda")
        for upstream in UPSTREAMS:
            check_linear(rows, vocabulary, dtype, 1.2, upstream, device="cuda")
        check_softmax(rows, vocabulary, dtype, device="cuda")
    check_logprob(257, 1000, torch.float32, 1.0, "both", magnitude=1e4, device="cuda")
    check_impossible_tokens("cuda")
    check_ignored_rows("cuda")


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_decoding(dtype):
    """A program's neighbours, which the interpreter runs one after the other, write at once."""
    check_decoding(dtype, "cuda")
    check_add_norm(64, 5120, dtype, "cuda")
    check_rotary_write(256, 28, 4, 128, 128, dtype, False, "cuda")
    check_silu_mul(256, 18944, dtype, "cuda")


@on_gpu
@pytest.mark.gpu
def test_gpu_draws_what_the_cpu_draws_and_fits_a_cuda_graph():
    """Guards against another draw on another device, and a hidden wait for the host."""
    check_same_draws(2000, 1000, "cuda")
    check_same_draws(64, 151936, "cuda")
    logits = torch.randn(64, 5000, device="cuda")
    seeds, positions = (
        torch.arange(64, device="cuda"),
        torch.zeros(64, dtype=torch.int64, device="cuda"),
    )
    expected = kernels.sample_token(logits, 1.1, 0.9, 0.05, seeds, positions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.sample_token(logits, 1.1, 0.9, 0.05, seeds, positions)
    graph.replay()
    assert (captured[0] == expected[0]).all() and (captured[1] == expected[1]).all()
