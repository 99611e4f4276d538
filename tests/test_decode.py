"""The decode step: one more token from cached keys and values must give what a forward over
everything gives.

GPUDecoder runs here on a CPU in float64, with `varlen_reference` for its attention and with the PyTorch
versions of its kernels; then on fake tensors, which have shapes, dtypes, strides and a device, but no
numbers; and in a process of its own with Triton's interpreter.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import varlen_reference
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import decode
import sample
from decode import (
    PACK_ROWS,
    CPUDecoder,
    GPUDecoder,
    ModelDecoder,
    can_pack,
    can_use_varlen,
    make_decoder,
    product,
    rms_norm,
)
from kernels import decoding
from kernels.jit import INTERPRETED, triton
from model import ModelConfig, RMSNorm, Transformer, inverse_frequencies
from sample import Sampler, SamplingParams

SHAPE = {
    "vocab_size": 50,
    "dim": 32,
    "layers": 3,
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 48,
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "llama": ModelConfig(**SHAPE),
    "llama, tied, all biases, scaled": ModelConfig(
        **SHAPE,
        tied=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        rope_scaling=tuple(sorted(LLAMA3.items())),
    ),
    "qwen2": ModelConfig(**SHAPE, family="qwen2", qkv_bias=True, norm_eps=1e-2),
    "qwen3": ModelConfig(**SHAPE | {"head_dim": 16, "kv_heads": 6}, family="qwen3", qk_norm=True),
    "glm": ModelConfig(**SHAPE, family="glm", qkv_bias=True, rope_dim=4),
    "glm4": ModelConfig(**SHAPE | {"kv_heads": 1}, family="glm4", rope_dim=2, post_norms=True),
}


class Poisoned(GPUDecoder):
    """Memory that was never written holds anything: here NaN, which shows wherever it is read."""

    def allocate(self, rows, capacity):
        keys, values = super().allocate(rows, capacity)
        return keys.fill_(torch.nan), values.fill_(torch.nan)


DECODERS = {
    "model": ModelDecoder,
    "gpu": Poisoned,
    "cpu": lambda model: CPUDecoder(model, pack=False),
    "packed": lambda model: CPUDecoder(model, pack=True),
}
ROWS, STEPS, BLOCK = 5, 12, 8
VARLEN_ATTN = varlen.varlen_attn


@pytest.fixture(autouse=True)
def plain_attention(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", varlen_reference.varlen_attn)


def random_model(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """Every weight random, norms and biases too: one that is left out must show."""
    model = Transformer(config, dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return model


@torch.inference_mode()
def decode_all(
    decoder, config: ModelConfig, tokens: torch.Tensor, delays: torch.Tensor
) -> torch.Tensor:
    """[ROWS, STEPS, V]: logits after each token; the cache is larger than what is bound, and grows
    half-way."""
    cache = [decoder.allocate(ROWS + 2, BLOCK + 3) for _ in range(config.layers)]
    out = torch.zeros(ROWS, STEPS, config.vocab_size, dtype=torch.float64)
    row = torch.arange(ROWS)
    for step in range(STEPS + int(delays.max())):
        # No row is longer than its step: BLOCK positions hold the first BLOCK steps.
        if step in (0, BLOCK):
            decoder.bind([])
            length = BLOCK if step == 0 else 3 * BLOCK
            larger = [decoder.allocate(ROWS + 1, length + 1) for _ in cache]
            for new, old in zip(larger, cache):
                for tensor, former in zip(new, old):
                    tensor[:ROWS, :, :BLOCK] = former[:ROWS, :, :BLOCK]
            cache = larger
            part = (slice(ROWS), slice(None), slice(length))
            decoder.bind([(keys[part], values[part]) for keys, values in cache])
        # A row that has yet to start, or has ended, does a step again.
        positions = (step - delays).clamp(0, STEPS - 1)
        out[row, positions] = decoder(tokens[row, positions], positions).double()
    return out


@pytest.mark.parametrize("kind", DECODERS if can_pack(torch.zeros(1)) else ["model", "cpu", "gpu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_equals_a_forward(family, kind):
    """A bias, norm or residual left out, heads grouped wrongly, a key written elsewhere, a mask one
    off: any family."""
    dtype = torch.float32 if kind == "packed" else torch.float64
    model = random_model(FAMILIES[family], dtype)
    tokens = torch.randint(0, 50, (ROWS, STEPS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.double().logits(model(tokens))
        model.to(dtype)
    found = decode_all(DECODERS[kind](model), model.config, tokens, torch.tensor([0, 3, 1, 0, 6]))
    tolerance = 2e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert expected.std() > 0.1


@torch.inference_mode()
def test_the_norm_in_four_operations():
    """eps forgotten or scaled wrongly: it matters for small inputs; a row of zeros must stay
    zeros."""
    norm = RMSNorm(24, 1e-3, dtype=torch.float64)
    norm.weight.normal_()
    for scale in (1e-6, 1e-2, 1.0, 1e6):
        x = scale * torch.randn(5, 2, 24, dtype=torch.float64)
        torch.testing.assert_close(rms_norm(norm)(x), norm(x), rtol=1e-12, atol=0)
    assert not rms_norm(norm)(torch.zeros(3, 24, dtype=torch.float64)).any()
    assert rms_norm(None) is None


@pytest.mark.skipif(not can_pack(torch.zeros(1)), reason="this torch has no MKL")
@pytest.mark.parametrize("shape", [(96, 400), (576, 3072), (131, 97), (5, 17)])
@torch.inference_mode()
def test_a_packed_matrix_serves_any_number_of_rows(shape):
    """A layout that holds only for as many rows as it was made for: wrong logits for all other
    batches."""
    inner, outer = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outer, inner, generator=generator)
    bias = torch.randn(outer, generator=generator)
    with_bias, without = product(weight, bias, True), product(weight, None, True)
    around = [PACK_ROWS - 1, PACK_ROWS, PACK_ROWS + 1]
    for rows in [*range(1, 20), 31, 32, 33, 47, 48, 64, 65, 100, *around, 300, 1030]:
        x = torch.randn(rows, inner, generator=generator)
        expected = x.double() @ weight.double().T
        tolerance = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(without(x).double(), expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(with_bias(x).double(), expected + bias, rtol=0, atol=tolerance)


@torch.inference_mode()
def test_what_a_decoder_makes_is_of_the_weights_as_they_were():
    """The docstring's warning: a decoder that is kept over an update gives the old weights'
    logits."""
    model = random_model(FAMILIES["llama"], torch.float32)
    x = torch.randn(3, 32)
    old = CPUDecoder(model, pack=True)
    before = old.head(x)
    model.head.weight.mul_(2)
    torch.testing.assert_close(CPUDecoder(model, pack=True).head(x), 2 * before)
    if can_pack(x):
        assert torch.equal(old.head(x), before)


def test_only_what_mkl_can_lay_out_is_packed():
    """A crash for bf16, float64 or weights on a GPU."""
    weight = torch.zeros(4, 4)
    for other in (weight.bfloat16(), weight.double(), weight.to("meta")):
        assert not can_pack(other)
    identity = torch.eye(4, dtype=torch.float64)
    assert torch.equal(product(identity, None, pack=True)(identity), identity)


# --- GPUDecoder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sampler_draws_the_same_on_a_gpu(family, monkeypatch):
    """Keys of the sequence that had the row before, a row that moved without its keys, a step one
    position off where a block of the cache begins."""
    for module in (decode, sample):
        monkeypatch.setattr(module, "cache_block", lambda device: 4)
    model = random_model(FAMILIES[family], torch.float64)
    prompts = [list(range(length, 2 * length)) for length in range(1, 11)]
    drawn = []
    for decoder in (ModelDecoder, Poisoned):
        monkeypatch.setattr(sample, "make_decoder", lambda model, pack, d=decoder: d(model))
        sampler = Sampler(model, max_batch=3, eos_ids=[7, 8, 9])
        results = sampler.generate(prompts, 3, SamplingParams(21, 1.5, seed=2))
        drawn.append([completion for row in results for completion in row])
    for one, other in zip(*drawn):
        assert one.tokens == other.tokens
        assert one.finish_reason == other.finish_reason
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)
    assert {completion.finish_reason for completion in drawn[0]} == {"stop", "length"}


def test_a_step_may_have_fewer_rows_than_are_bound():
    """Starts of rows counted from the rows of the step, or from the length that is bound.

    test_the_step_in_the_interpreter runs it once more.
    """
    some = {"kv_heads": 2, "rope_dim": 6, "qkv_bias": True}
    config = dataclasses.replace(FAMILIES["qwen3"], **some)
    model = random_model(config, torch.float32 if INTERPRETED else torch.float64)
    decoder = Poisoned(model)
    cache = [decoder.allocate(4, 9) for _ in model.blocks]
    decoder.bind([(keys[:3, :, :5], values[:3, :, :5]) for keys, values in cache])
    tokens = torch.tensor([[3, 1, 4], [1, 5, 9]])
    with torch.inference_mode():
        for step in range(3):
            logits = decoder(tokens[:, step], torch.full((2,), step))
        expected = model.double().logits(model(tokens))[:, -1]
    tolerance = 2e-4 if INTERPRETED else 1e-11
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=tolerance)


def test_a_graph_reads_nothing_that_bind_makes():
    """A tensor made for one number of rows and freed when another is bound: the first one's graph
    would go on to read that memory. What a step reads must be weights, cache and its arguments."""
    decoder = GPUDecoder(random_model(FAMILIES["llama"], torch.float64))
    cache = [decoder.allocate(4, 8) for _ in decoder.model.blocks]
    lasting = {tensor.untyped_storage().data_ptr() for pair in cache for tensor in pair}
    decoder.bind(cache)
    for keys, values in decoder.cache:
        assert {keys.untyped_storage().data_ptr(), values.untyped_storage().data_ptr()} <= lasting
    held = [value for value in vars(decoder).values() if isinstance(value, torch.Tensor)]
    assert held == []


# A torch without CUDA cannot index even fake tensors on "cuda".
FAKE = "cuda" if torch.backends.cuda.is_built() else "meta"
SIZES = {
    "Qwen2.5-0.5B": ModelConfig(
        151_936, 896, 24, 14, 2, 64, 4_864, family="qwen2", tied=True, qkv_bias=True
    ),
    "Qwen2.5-7B": ModelConfig(
        152_064, 3_584, 28, 28, 4, 128, 18_944, family="qwen2", qkv_bias=True
    ),
}


class OnTheDevice(TorchDispatchMode):
    """Refuses what makes the host wait for the device, or the device for the host.

    Fake tensors refuse by themselves what depends on data: item, nonzero, unique, indexing by bools.
    """

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.name()
        self.names.append(name)
        assert "isin" not in name, "it sorts where there are many, and that waits"
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                assert leaf.device.type == FAKE, f"{name} has a tensor on the CPU"
                assert "index" not in name or leaf.dtype != torch.bool, f"{name} counts its bools"
            else:
                assert leaf != torch.device("cpu"), f"{name} copies to the CPU"
        return result


def refusing(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, enable_gqa, seqused_k):
    """varlen_attn with the checks that its CUDA operator makes, which its fake one leaves out."""
    total, heads, head_dim = query.shape
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    assert head_dim % 8 == 0 and head_dim <= 256
    assert key.shape == value.shape == (len(key), key.shape[1], head_dim)
    assert heads % key.shape[1] == 0 and enable_gqa
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    for integers, length in ((cu_seq_q, total + 1), (cu_seq_k, total + 1), (seqused_k, total)):
        assert integers.dtype == torch.int32 and integers.is_contiguous()
        assert integers.shape == (length,)
    assert (max_q, total * max_k) == (1, len(key))
    return VARLEN_ATTN(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
        enable_gqa=enable_gqa, seqused_k=seqused_k,
    )  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_a_step_on_the_device_waits_for_nothing(size, monkeypatch):
    """A shape, dtype or stride that an operator refuses; a copy to or from the host in the step,
    which no CUDA graph can hold."""
    monkeypatch.setattr(varlen, "varlen_attn", refusing)
    monkeypatch.setattr(decoding, "use_triton", lambda tensor: False)
    rows, capacity, config = 64, 2048, SIZES[size]
    inverse_frequencies.cache_clear()  # it must keep no fake tensors, nor be asked for real ones
    with FakeTensorMode(), torch.inference_mode():
        decoder = GPUDecoder(Transformer(config, torch.bfloat16, device=FAKE))
        cache = [decoder.allocate(rows, capacity) for _ in range(config.layers)]
        decoder.bind(cache)
        tokens = torch.zeros(rows, dtype=torch.int64, device=FAKE)
        decoder(tokens, tokens)  # the rotary frequencies are made by the first step, on the host
        with OnTheDevice() as watched:
            logits = decoder(tokens, tokens)
    inverse_frequencies.cache_clear()
    assert cache[0][0].shape == (rows, config.kv_heads, capacity, config.head_dim)
    assert (logits.shape, logits.dtype) == ((rows, config.vocab_size), torch.bfloat16)
    attended = [name for name in watched.names if "varlen_attn" in name]
    assert len(attended) == config.layers


class Launches(TorchDispatchMode):
    """Counts the operations that start a kernel: all but views and bare allocations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        aliases = [value.alias_info for value in function._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliases)
        bare = any(word in function.name() for word in ("empty", "view"))
        self.count += isinstance(result, torch.Tensor) and not (view or bare)
        return result

    def one(self, function):
        """`function`, counted as a single kernel."""

        def counted(*args, **kwargs):
            before = self.count
            result = function(*args, **kwargs)
            self.count = before + 1
            return result

        return counted


SINGLE = [
    (decode, "add_norm"),
    (decode, "rotary_write"),
    (decode, "silu_mul"),
    (varlen, "varlen_attn"),
    (torch.nn.functional, "scaled_dot_product_attention"),
    (torch.nn.functional, "rms_norm"),
]


def launches(config: ModelConfig, kind, monkeypatch) -> int:
    """Operations of a step that start a kernel; attention counts as one."""
    model = random_model(config, torch.bfloat16)
    watched = Launches()
    # Not inference_mode: there a cast is one with what casts nothing, which is a view.
    with monkeypatch.context() as patch, torch.no_grad():
        for module, name in SINGLE:
            patch.setattr(module, name, watched.one(getattr(module, name)))
        decoder = kind(model)
        decoder.bind([decoder.allocate(ROWS, BLOCK) for _ in model.blocks])
        tokens = torch.zeros(ROWS, dtype=torch.int64)
        decoder(tokens, tokens)
        watched.count = 0
        with watched:
            decoder(tokens, tokens)
    return watched.count


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_layer_is_nine_kernels(family, monkeypatch):
    """A cast, a copy or a sum between the products that is a kernel of its own: in bf16, where each
    costs as much as another, they made the model's own step slow."""
    config = FAMILIES[family]
    longer = dataclasses.replace(config, layers=config.layers + 1)
    layer = {}
    for kind in (GPUDecoder, ModelDecoder):
        layer[kind] = launches(longer, kind, monkeypatch) - launches(config, kind, monkeypatch)
    assert layer[GPUDecoder] == 9
    assert layer[ModelDecoder] >= 20  # or this test counts too little


@pytest.mark.skipif(INTERPRETED or triton is None, reason="needs Triton")
def test_the_step_in_the_interpreter():
    """Kernels that are right alone, and called with a wrong argument or another layout."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "-k", "fewer_rows"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert "1 passed" in result.stdout


def test_each_place_has_its_decoder(monkeypatch):
    """GPUDecoder where flash attention would refuse: an old card, fp32, an odd head; or nowhere."""
    config = FAMILIES["llama"]
    model = random_model(config, torch.float32)
    assert isinstance(make_decoder(model, pack=False), CPUDecoder)
    assert isinstance(make_decoder(model.bfloat16(), pack=False), ModelDecoder)

    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert can_use_varlen(config, torch.bfloat16, cuda)
    assert not can_use_varlen(config, torch.float32, cuda)
    for head_dim in (100, 264):
        other = dataclasses.replace(config, head_dim=head_dim)
        assert not can_use_varlen(other, torch.bfloat16, cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not can_use_varlen(config, torch.bfloat16, cuda)

    monkeypatch.setattr(decode, "can_use_varlen", lambda *place: True)
    assert isinstance(make_decoder(model, pack=False), GPUDecoder)


# --- on a GPU itself ------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_step_is_as_near_to_the_truth_as_the_models_own(family, monkeypatch):
    """Flash attention that reads other keys than its reference does, or NaN from unwritten memory."""
    monkeypatch.setattr(varlen, "varlen_attn", VARLEN_ATTN)
    model = random_model(FAMILIES[family], torch.bfloat16)
    tokens = torch.randint(0, 50, (ROWS, STEPS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        truth = model.double().logits(model(tokens)).cuda()
    model = model.to("cuda", torch.bfloat16)
    tokens = tokens.cuda()
    error = {}
    with torch.device("cuda"):
        for kind in (ModelDecoder, Poisoned):
            found = decode_all(kind(model), model.config, tokens, torch.tensor([0, 3, 1, 0, 6]))
            error[kind] = ((found - truth).norm() / truth.norm()).item()
    assert error[Poisoned] < 2 * error[ModelDecoder] + 0.01, error


@on_gpu
@pytest.mark.gpu
@torch.inference_mode()
def test_gpu_one_graph_serves_all_lengths(monkeypatch):
    """A length that was captured as a number: the graph would go on with that of its first step."""
    monkeypatch.setattr(varlen, "varlen_attn", VARLEN_ATTN)
    model = random_model(FAMILIES["qwen2"], torch.bfloat16).cuda()
    drawn = torch.randint(0, 50, (ROWS, STEPS), device="cuda")
    decoders = [Poisoned(model) for _ in range(2)]
    for decoder in decoders:
        decoder.bind([decoder.allocate(ROWS, 256) for _ in model.blocks])
    eager, captured = decoders
    tokens, positions = drawn[:, 0].clone(), torch.zeros(ROWS, dtype=torch.int64, device="cuda")
    captured(tokens, positions)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = captured(tokens, positions)
    for step in range(STEPS):
        tokens.copy_(drawn[:, step])
        positions.fill_(step)
        graph.replay()
        torch.testing.assert_close(logits, eager(tokens, positions))
