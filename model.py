"""A decoder-only transformer (Llama, Qwen2, Qwen3, GLM-4): tokens in, hidden states out.

    model = load_pretrained("path/to/Qwen2.5-0.5B")    # config.json + *.safetensors
    hidden = model(tokens)                             # [B, T] -> [B, T, D]
    logits = model.logits(hidden)                      # [B, T, V]; training uses kernels/ instead
    save_pretrained(model, "path/to/result")           # loads in transformers, vLLM, ...

Every token carries a vector x of D numbers, the residual stream. A block adds to it twice:

    x = x + attention(norm(x))             what the tokens before this one have to say
    x = x + mlp(norm(x))                   mlp(y) = W_down (silu(W_gate y) * (W_up y))
    norm(x) = x / sqrt(mean(x^2) + eps) * weight
    attention: per head, softmax(q k^T / sqrt(head_dim)) v, over this token and those before it

One `Transformer` serves every family. What differs between families is a field of `ModelConfig`:
biases, norms on the queries and keys, extra norms after each half of a block, and how much of a
head is rotated.

Two layouts differ from Hugging Face's, for speed. pretrained.py converts them when it reads or
writes a folder:
- query, key and value are one matrix `qkv`, gate and up are one matrix `gate_up`: two matrix
  products instead of five;
- the two numbers that a rotation turns together lie side by side, (x0, x1), (x2, x3), ..., so that
  a rotation is one complex product. (Hugging Face pairs number i with i + head_dim / 2.)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pretrained
from devices import BFLOAT16_SINCE
from kernels.jit import wide
from packing import Runs, positions_and_mask
from pretrained import model_folder

# On an H100 PyTorch would prefer cuDNN's attention, which plans for 0.4 to 0.6 seconds at every new
# shape (transformers#48163); nearly every micro-batch and every prefill has a shape of its own.
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer. `family` decides what its tensors are called on disk."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    family: str = "llama"
    context: int = 2048  # positions the model was made for; beyond them it runs, untrained
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_dim: int | None = None  # rotated dimensions of a head; None: all of them
    # (key, value) of rope_type and of its pretrained.ROPE_KEYS; (): unscaled. Pairs can be hashed.
    rope_scaling: tuple[tuple[str, float | str], ...] = ()
    tied: bool = False  # the head is the embedding's transpose
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each head's query and key (Qwen3)
    post_norms: bool = False  # RMSNorm on what each half of a block adds to the stream (glm4)
    bos_id: int | None = None
    pad_id: int | None = None
    eos_ids: tuple[int, ...] = ()


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 or better whatever the dtype of the weights."""

    def __init__(self, dim: int, eps: float, **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, **factory))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(wide(x.dtype))
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


class Block(nn.Module):
    """Attention, then a gated MLP. Each reads a normalised copy of the stream and adds to it.

    (decode.CPUBlock and decode.GPUDecoder compute the same for one token of each row, for less.)
    """

    def __init__(self, config: ModelConfig, layer: int, **factory):
        super().__init__()
        self.config = config
        self.layer = layer
        norm = partial(RMSNorm, eps=config.norm_eps, **factory)
        linear = partial(nn.Linear, **factory)
        dim = config.dim
        q_rows = config.heads * config.head_dim
        kv_rows = config.kv_heads * config.head_dim

        self.attention_norm = norm(dim)
        self.qkv = linear(dim, q_rows + 2 * kv_rows, bias=config.qkv_bias)
        self.q_norm = norm(config.head_dim) if config.qk_norm else None
        self.k_norm = norm(config.head_dim) if config.qk_norm else None
        self.out = linear(q_rows, dim, bias=config.out_bias)
        self.post_attention_norm = norm(dim) if config.post_norms else nn.Identity()

        self.mlp_norm = norm(dim)
        self.gate_up = linear(dim, 2 * config.mlp_dim, bias=config.mlp_bias)
        self.down = linear(config.mlp_dim, dim, bias=config.mlp_bias)
        self.post_mlp_norm = norm(dim) if config.post_norms else nn.Identity()

    def forward(self, x: Tensor, rotation: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """x [B, T, D] -> [B, T, D]; rotation and attend: see `Transformer.forward`."""
        q, k, v = self.heads(x, rotation)
        mixed = attend(self.layer, q, k, v)  # [B, H, T, Dh]
        mixed = mixed.transpose(1, 2).flatten(-2)  # [B, T, H * Dh]
        x = x + self.post_attention_norm(self.out(mixed))

        gate, up = self.gate_up(self.mlp_norm(x).to(self.gate_up.weight.dtype)).chunk(2, dim=-1)
        return x + self.post_mlp_norm(self.down(F.silu(gate) * up))

    def heads(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, Dh], keys and values [B, Hkv, T, Dh]; queries and keys are rotated."""
        sizes = [self.config.heads, self.config.kv_heads, self.config.kv_heads]
        qkv = self.qkv(self.attention_norm(x).to(self.qkv.weight.dtype))
        qkv = qkv.unflatten(-1, (-1, self.config.head_dim))  # [B, T, H + 2 Hkv, Dh]
        q, k, v = qkv.split(sizes, dim=-2)
        qk = qkv[..., : sum(sizes[:2]), :]
        if self.config.qk_norm:
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=-2)
        qk = rotate(qk, rotation).to(v.dtype).transpose(1, 2)  # one rotation serves both
        q, k = qk.split(sizes[:2], dim=1)
        return q, k, v.transpose(1, 2)


class Transformer(nn.Module):
    """Tokens to hidden states. The residual stream is fp32 (or better) even for bf16 weights."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.config = config
        # True: store only the input of each block, and compute the block again in the backward pass
        self.checkpoint_blocks = False
        # True: packed rows are trained on by `varlen_attention`, where `can_use_varlen`
        self.varlen = False
        # The dtype that `parallel.forward` computes products in; None: that of the weights
        self.autocast: torch.dtype | None = None
        self.embed = nn.Embedding(config.vocab_size, config.dim, **factory)
        blocks = [Block(config, layer, **factory) for layer in range(config.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.dim, config.norm_eps, **factory)
        self.head = None
        if not config.tied:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False, **factory)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the output head, which is the embedding itself in a tied model."""
        return self.embed.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        attend: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None = None,
        parents: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] after the final norm, for tokens [B, T].

        documents [B, T]: the number of the document that each token belongs to; a document is a run
            of equal numbers (packed rows; padding is simply a last document). Attention stays
            within a document and positions restart in it. None: a row is one document.
        parents [B, T]: the number of an earlier document in the row that this token's document
            continues, or -1. It sees all of that one too, and its positions go on from there: so K
            responses share one prompt.
        positions [B, T]: the rotary positions. None: they count from 0 in each document.
        attend(layer, q [B, H, T, Dh], k, v [B, Hkv, T, Dh]) -> [B, H, T, Dh]: takes the place of
            causal attention. q and k are rotated. This is where a sampler keeps its keys and
            values; it must give `positions`.
        """
        if attend is None:
            counted, visible = positions_and_mask(tokens, documents, parents)
            if positions is None:
                positions = counted
            attend = partial(causal_attention, visible)

        rotation = rotations(self.config, positions)
        x = self.embed(tokens)
        x = x.to(wide(x.dtype))
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                # Nothing in a block is random: no generator has to be kept for the second time.
                x = checkpoint(
                    block, x, rotation, attend, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = block(x, rotation, attend)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] for hidden [..., D]. Training never calls it: kernels.linear_logprob_entropy."""
        return F.linear(hidden.to(self.head_weight.dtype), self.head_weight)


def causal_attention(visible: Tensor | None, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of q [B, H, T, Dh] over k, v [B, Hkv, T, Dh]; H / Hkv queries share a key.

    visible [B, 1, T, T]: which keys a query sees. None: all up to itself.
    """
    group = q.shape[1] // k.shape[1]
    if group > 1 and q.is_cuda and q.dtype == torch.float32:
        # Here PyTorch's rules for choosing a kernel would pick one that holds all T x T scores, to
        # save this copy of keys and values. (Read in its source, not measured on a GPU.)
        k = k.repeat_interleave(group, 1)
        v = v.repeat_interleave(group, 1)
        group = 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=visible is None, enable_gqa=group > 1
    )


def varlen_attention(runs: Runs, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`causal_attention` within the runs of packed rows, without a mask: a GPU's kernel computes no
    pair that is not needed. It needs what `can_use_varlen` asks for.
    """
    # Imported here, because it brings the compiler with it, which makes every command start later.
    from torch.nn.attention.varlen import varlen_attn

    height = q.shape[0]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B * T, heads, Dh], no copies
    if runs.keys is not None:
        # By way of fp32: the gradient adds up there what all of a stem's responses ask of its keys.
        k, v = (x.to(wide(x.dtype)).index_select(0, runs.keys).to(x.dtype) for x in (k, v))
    mixed = varlen_attn(
        *(q, k, v, runs.query_starts, runs.key_starts, runs.most_queries, runs.most_keys),
        window_size=(-1, 0),  # causal: a run's last query sees all of its keys
        enable_gqa=True,
    )
    return mixed.unflatten(0, (height, -1)).transpose(1, 2)


def can_use_varlen(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Has PyTorch a kernel for `varlen_attention` there: bf16 on CUDA, from an A100 (sm_80) on?"""
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and torch.cuda.get_device_capability(device) >= BFLOAT16_SINCE
        and config.head_dim % 8 == 0
        and config.head_dim <= 256
    )


# Rotary positions (RoPE, arXiv 2104.09864): queries and keys are turned by an angle that grows with
# the position, so that their product depends on the distance between two tokens alone.


def rotations(config: ModelConfig, positions: Tensor) -> Tensor:
    """A unit complex number for each pair of a head: [B, T, 1, rope_dim / 2] for [B, T]."""
    frequencies = inverse_frequencies(config, positions.device)
    angles = positions[..., None, None].float() * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x [B, T, H, Dh] with its first pairs turned; dimensions beyond rope_dim stay as they are."""
    rope_dim = 2 * rotation.shape[-1]
    x = x.to(wide(x.dtype))
    pairs = x[..., :rope_dim].unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(pairs) * rotation
    turned = torch.view_as_real(turned).flatten(-2)
    if rope_dim == x.shape[-1]:
        return turned
    return torch.cat([turned, x[..., rope_dim:]], dim=-1)


@lru_cache
def inverse_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """[rope_dim / 2] radians per position, fp32, in transformers' order of operations."""
    dim = config.rope_dim or config.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = dict(config.rope_scaling)
    if scaling.get("rope_type") == "linear":
        frequencies = frequencies / scaling["factor"]
    elif scaling.get("rope_type") == "llama3":
        # Slow waves are stretched by the factor, fast ones are kept, those in between are blended.
        # What counts as slow: how often a wave turns within the context of pretraining.
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low = scaling["low_freq_factor"]
        high = scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - keep) * frequencies / scaling["factor"] + keep * frequencies
    return frequencies.to(device)


@torch.no_grad()
def random_init(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> Transformer:
    """A fresh model: normal weights of variance 1 / fan-in.

    The matrices that write to the residual stream start smaller, by sqrt(2 layers): there are two
    of them in every block, and all add to one stream.
    """
    model = Transformer(config, dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.fill_(0.0)
        elif parameter.ndim == 1:
            parameter.fill_(1.0)  # a norm
        else:
            std = parameter.shape[1] ** -0.5
            if name.endswith(("out.weight", "down.weight")):
                std /= math.sqrt(2 * config.layers)
            parameter.normal_(0.0, std, generator=generator)
    return model


# Hugging Face folders. How they are read and written is pretrained.py's business.


def read_config(folder: Path) -> ModelConfig:
    """The shape of the model in a Hugging Face folder. UserError if we cannot compute it."""
    return ModelConfig(**pretrained.read_fields(folder))


def without_weights(path: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model in a Hugging Face folder on the meta device: shapes, and no memory for weights."""
    return Transformer(read_config(model_folder(path)), dtype, device="meta")


def load_pretrained(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Transformer:
    """The model in a Hugging Face folder, or in a finished run of nanoT1.

    UserError, one line, for a folder that is not whole or not understood.
    """
    model = without_weights(path, dtype).to_empty(device=device)
    parts = {name: (parameter, 0) for name, parameter in model.named_parameters()}
    pretrained.fill(model_folder(path), model.config, parts)
    return model


def save_pretrained(
    model: Transformer, path: str | Path, tokenizer=None, weights: dict[str, Tensor] | None = None
) -> None:
    """Write a Hugging Face folder, whole or not at all.

    tokenizer: its files are written too. weights: the full parameters by name, for a model whose
    own are sharded over processes.
    """
    if weights is None:
        weights = dict(model.named_parameters())
    pretrained.write_folder(Path(path), model.config, weights, tokenizer)
