"""The decode step: one more token from cached keys and values must give what a forward over
everything gives."""

import pytest
import torch

from decode import PACK_ROWS, CPUDecoder, ModelDecoder, can_pack, product, rms_norm
from model import ModelConfig, RMSNorm, Transformer

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
DECODERS = {
    "model": ModelDecoder,
    "cpu": lambda model: CPUDecoder(model, pack=False),
    "packed": lambda model: CPUDecoder(model, pack=True),
}
ROWS, STEPS, BLOCK = 5, 12, 8


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


@pytest.mark.parametrize("kind", DECODERS if can_pack(torch.zeros(1)) else ["model", "cpu"])
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
