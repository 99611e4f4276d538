"""A decoder-only transformer (Llama, Qwen2, Qwen3, GLM-4) and its Hugging Face folders, in and out.

One `Transformer` serves every family; what differs between them is a field of `ModelConfig`: biases, norms on the queries
and keys, extra norms after each half of a block, how much of a head is rotated.

    model = load_pretrained("path/to/Qwen2.5-0.5B")        # config.json + *.safetensors
    hidden = model(tokens)                                 # [B, T, D]: logits are made elsewhere, see kernels/
    save_pretrained(model, "path/to/result")               # loads in transformers, vLLM, ...

Two layouts differ from Hugging Face's, for speed, and are converted only when a folder is read or written:
- query, key and value are one `qkv` projection, gate and up are one `gate_up`: two matrix products instead of five;
- rotary pairs lie next to each other, (x0, x1), (x2, x3), ..., so that a rotation is one complex product. Hugging Face
  pairs dimension i with i + head_dim / 2 (except in GLM): the rows of q and k are reordered. Attention sees only
  dot products of q and k, which do not depend on the order of their dimensions.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from cli import UserError, read_json
from packing import positions_and_mask

FAMILIES = ("llama", "qwen2", "qwen3", "glm", "glm4")  # Hugging Face's `model_type`
GLM = ("glm", "glm4")
HF_NAMES = {  # our fields that config.json holds as they are
    "vocab_size": "vocab_size", "dim": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "mlp_dim": "intermediate_size", "bos_id": "bos_token_id",
    "norm_eps": "rms_norm_eps", "context": "max_position_embeddings", "tied": "tie_word_embeddings",
    "qkv_bias": "attention_bias", "mlp_bias": "mlp_bias", "pad_id": "pad_token_id",
}  # fmt: skip
ROPE_KEYS = {  # what each `rope_type` is parametrised by, beside its theta
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip
SHARD_BYTES = 5_000_000_000  # a safetensors file is no larger than this, unless a single tensor is


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
    context: int = 2048  # positions the model was made for; rotary positions work beyond, untrained
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_dim: int | None = None  # rotated dimensions of a head; None: all of them
    rope_scaling: tuple[tuple[str, float | str], ...] = ()  # (key, value) of rope_type and its ROPE_KEYS; (): unscaled
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
    """Attention, then a gated MLP; each reads a normalised copy of the residual stream and adds to it.

    (decode.CPUBlock does the same sums for one token of each row, faster.)
    """

    def __init__(self, config: ModelConfig, layer: int, **factory):
        super().__init__()
        self.config, self.layer = config, layer
        dim, eps = config.dim, config.norm_eps
        query_rows, kv_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.attention_norm = RMSNorm(dim, eps, **factory)
        self.qkv = nn.Linear(dim, query_rows + 2 * kv_rows, bias=config.qkv_bias, **factory)
        self.q_norm = RMSNorm(config.head_dim, eps, **factory) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps, **factory) if config.qk_norm else None
        self.out = nn.Linear(query_rows, dim, bias=config.out_bias, **factory)
        self.post_attention_norm = RMSNorm(dim, eps, **factory) if config.post_norms else nn.Identity()
        self.mlp_norm = RMSNorm(dim, eps, **factory)
        self.gate_up = nn.Linear(dim, 2 * config.mlp_dim, bias=config.mlp_bias, **factory)
        self.down = nn.Linear(config.mlp_dim, dim, bias=config.mlp_bias, **factory)
        self.post_mlp_norm = RMSNorm(dim, eps, **factory) if config.post_norms else nn.Identity()

    def forward(self, x: Tensor, rotation: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        config, dtype, kv_heads = self.config, self.qkv.weight.dtype, self.config.kv_heads
        heads = self.qkv(self.attention_norm(x).to(dtype)).unflatten(-1, (-1, config.head_dim))
        q, k, v = heads.split([config.heads, kv_heads, kv_heads], dim=-2)
        qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=-2) if config.qk_norm else heads[..., :-kv_heads, :]
        q, k = rotate(qk, rotation).to(v.dtype).transpose(1, 2).split([config.heads, kv_heads], dim=1)
        mixed = attend(self.layer, q, k, v.transpose(1, 2))
        x = x + self.post_attention_norm(self.out(mixed.transpose(1, 2).flatten(-2)))

        gate, up = self.gate_up(self.mlp_norm(x).to(dtype)).chunk(2, dim=-1)
        return x + self.post_mlp_norm(self.down(F.silu(gate) * up))


class Transformer(nn.Module):
    """Tokens to hidden states. The residual stream is fp32 (or better) even where the weights are bf16."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.config = config
        self.checkpoint_blocks = False  # True: recompute each block in the backward pass, to store only its input
        self.embed = nn.Embedding(config.vocab_size, config.dim, **factory)
        self.blocks = nn.ModuleList(Block(config, layer, **factory) for layer in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps, **factory)
        self.head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False, **factory)

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

        documents [B, T]: number of the document that each token belongs to, in runs (packed rows; padding is simply a
            last document). Attention stays within a run and positions restart in it. None: a row is one document.
        parents [B, T]: number of an earlier document in the row that this token's document continues, or -1: it sees
            all of that one too, and its positions go on from there. So K responses share one prompt.
        positions [B, T]: overrides the rotary positions, which otherwise count from 0 in each document.
        attend(layer, q [B, H, T, Dh], k, v [B, Hkv, T, Dh]) -> [B, H, T, Dh]: replaces causal attention. q and k are
            rotated. This is where a sampler keeps its keys and values; it must give `positions`.
        """
        if attend is None:
            places, visible = positions_and_mask(tokens, documents, parents)
            positions = places if positions is None else positions
            attend = partial(causal_attention, visible)

        rotation = rotations(self.config, positions)
        x = self.embed(tokens)
        x = x.to(wide(x.dtype))
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, attend, use_reentrant=False)
            else:
                x = block(x, rotation, attend)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] for hidden [..., D]. Training never calls this: see kernels.linear_logprob_entropy."""
        return F.linear(hidden.to(self.head_weight.dtype), self.head_weight)


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32 for bf16 and fp16, else the dtype itself (float64 references stay float64)."""
    return torch.promote_types(dtype, torch.float32)


def causal_attention(visible: Tensor | None, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention; visible [B, 1, T, T] says which keys a query sees, None means all up to itself."""
    group = q.shape[1] // k.shape[1]
    if group > 1 and q.is_cuda and (visible is not None or q.dtype == torch.float32):
        # By its dispatch rules PyTorch would hold all T x T scores here, to save this copy. Not measured on a GPU.
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None, enable_gqa=group > 1)


def rotations(config: ModelConfig, positions: Tensor) -> Tensor:
    """Unit complex numbers [B, T, 1, rope_dim / 2] by which the pairs of each head are turned (RoPE, 2104.09864)."""
    angles = positions[..., None, None].float() * inverse_frequencies(config, positions.device)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x [B, T, H, Dh] with its first pairs turned; the dimensions beyond rope_dim pass unchanged."""
    rope_dim = 2 * rotation.shape[-1]
    x = x.to(wide(x.dtype))
    turned = torch.view_as_complex(x[..., :rope_dim].unflatten(-1, (-1, 2))) * rotation
    turned = torch.view_as_real(turned).flatten(-2)
    return turned if rope_dim == x.shape[-1] else torch.cat([turned, x[..., rope_dim:]], dim=-1)


@lru_cache
def inverse_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """[rope_dim / 2] radians per position, fp32, in transformers' order of operations."""
    dim = config.rope_dim or config.head_dim
    frequencies = 1.0 / (config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    scaling = dict(config.rope_scaling)
    if scaling.get("rope_type") == "linear":
        frequencies = frequencies / scaling["factor"]
    elif scaling.get("rope_type") == "llama3":  # slow waves are stretched, fast ones kept, those between blended
        factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in pretraining's context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - keep) * frequencies / factor + keep * frequencies
    return frequencies.to(device)


@torch.no_grad()
def random_init(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> Transformer:
    """A fresh model: normal weights of variance 1 / fan-in, smaller where a block writes to the residual stream."""
    model = Transformer(config, dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            adds = name.endswith(("out.weight", "down.weight"))  # 2 * layers of them, to one stream
            std = parameter.shape[1] ** -0.5 / (math.sqrt(2 * config.layers) if adds else 1.0)
            parameter.normal_(0.0, std, generator=generator)
    return model


def model_folder(path: str | Path) -> Path:
    """The Hugging Face folder that `path` means: itself, or the `model` folder that a run of nanoT1 left in it."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no such folder: {path}")
    for folder in (path / "model", path):  # a run's own config.json, its flags, has no model_type
        if (folder / "config.json").is_file() and "model_type" in read_json(folder / "config.json"):
            return folder
    raise UserError(f"{path} holds no model: neither a Hugging Face config.json nor a finished run's model/config.json")


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face folder. UserError for anything in it that would be computed differently here."""
    where = f"{folder}/config.json"
    raw = {key: value for key, value in read_json(folder / "config.json").items() if value is not None}
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{where}: model_type {family!r} is not supported (only {', '.join(FAMILIES)})")
    fields = {"context": ModelConfig.context} | {
        ours: raw[theirs] for ours, theirs in HF_NAMES.items() if theirs in raw
    }
    if family == "llama":
        fields = {"kv_heads": fields.get("heads")} | fields
    for ours in ("vocab_size", "dim", "layers", "heads", "kv_heads", "mlp_dim", "context", "head_dim", "norm_eps"):
        if ours == "head_dim" and family in ("llama", "qwen2"):
            fields.setdefault("head_dim", fields["dim"] // fields["heads"])
        if not isinstance(fields.get(ours), float if ours == "norm_eps" else int) or fields[ours] <= 0:
            raise UserError(f"{where}: {HF_NAMES[ours]} is {fields.get(ours, 'missing')}")
    refuse_unsupported(raw, where)
    rope = read_rope(raw, where)
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_dim"] = int(fields["head_dim"] * rope.pop("partial_rotary_factor"))
    if fields["heads"] % fields["kv_heads"] or fields["rope_dim"] % 2:
        raise UserError(f"{where}: key/value heads must divide the heads, and rotary dimensions be even")
    fields["qkv_bias"] = family == "qwen2" or fields.get("qkv_bias", family in GLM)
    generation = folder / "generation_config.json"
    eos = (raw | (read_json(generation) if generation.is_file() else {})).get("eos_token_id")
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token, int) for token in eos):
        raise UserError(f"{folder}: eos_token_id is {eos}")
    return ModelConfig(
        **fields | {"mlp_bias": family == "llama" and fields.get("mlp_bias", False)},
        family=family,
        rope_scaling=() if rope["rope_type"] == "default" else tuple(sorted(rope.items())),
        out_bias=fields["qkv_bias"] and family in ("llama", "qwen3"),
        qk_norm=family == "qwen3",
        post_norms=family == "glm4",
        eos_ids=tuple(eos),
    )


def refuse_unsupported(raw: dict, where: str) -> None:
    """UserError if an option that these families read, and this file does not, is set to change the result."""
    kinds = {"layer_types": list, "max_window_layers": int, "rope_scaling": dict, "rope_parameters": dict}
    for key, kind in kinds.items():
        if not isinstance(raw.get(key, kind()), kind):
            raise UserError(f"{where}: {key} is {raw[key]}")
    windows = raw.get("layer_types") or []
    if not windows and raw.get("use_sliding_window") and raw.get("sliding_window"):
        windows = ["sliding_attention"] * (raw["num_hidden_layers"] - raw.get("max_window_layers", 28))
    problems = {
        f"hidden_act {raw.get('hidden_act')}": raw.get("hidden_act", "silu") not in ("silu", "swish"),
        "attention_dropout": raw.get("attention_dropout"),
        "quantization_config": raw.get("quantization_config"),
        "sliding-window attention": any(kind != "full_attention" for kind in windows),
    }
    for what in (what for what, present in problems.items() if present):
        raise UserError(f"{where}: {what} is not supported")


def read_rope(raw: dict, where: str) -> dict:
    """Rotary parameters: rope_theta, partial_rotary_factor, rope_type and the keys of ROPE_KEYS for that type.

    transformers 5 keeps them all in `rope_parameters`; older folders have `rope_scaling` and the rest beside it.
    """
    glm = raw["model_type"] in GLM
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    rope["rope_type"] = str(rope.pop("type", None) or rope.get("rope_type", "default"))
    rope.setdefault("rope_theta", raw.get("rope_theta", 10_000.0))
    rope.setdefault("partial_rotary_factor", raw.get("partial_rotary_factor", 0.5 if glm else 1.0))
    if rope["rope_type"] == "llama3":
        trained = raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = trained or raw.get("max_position_embeddings", 2048)
    if rope["rope_type"] not in ROPE_KEYS:
        raise UserError(f"{where}: rope_type {rope['rope_type']} is not supported (only {list(ROPE_KEYS)})")
    expected = {"rope_type", "rope_theta", "partial_rotary_factor", *ROPE_KEYS[rope["rope_type"]]}
    if rope.keys() != expected:
        raise UserError(f"{where}: rope parameters {sorted(rope)}, expected {sorted(expected)}")
    if rope["partial_rotary_factor"] != 1.0 and not glm:
        raise UserError(f"{where}: partial_rotary_factor is not supported for {raw['model_type']}")
    for key in sorted(expected - {"rope_type"}):
        if not isinstance(rope[key], int | float) or not 0 < rope[key] < math.inf:
            raise UserError(f"{where}: {key} is {rope[key]}")
    return rope


def config_to_hf(config: ModelConfig, dtype: torch.dtype) -> dict:
    """config.json as transformers 5 reads it, with the rotary parameters also where version 4 and vLLM look."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta, **dict(config.rope_scaling)}
    if config.family in GLM:
        rope["partial_rotary_factor"] = (config.rope_dim or config.head_dim) / config.head_dim
    return {
        "architectures": [f"{config.family.capitalize()}ForCausalLM"],
        "model_type": config.family,
        **{theirs: getattr(config, ours) for ours, theirs in HF_NAMES.items()},
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None,
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None,
        "hidden_act": "silu",
        "dtype": str(dtype).removeprefix("torch."),
    }


@dataclass(frozen=True)
class Piece:
    """A tensor on disk, and where it goes: so many rows of one of our parameters."""

    name: str
    rows: int
    pair_heads: int = 0  # this many heads, whose rotary pairs are to be brought together: see the top of the file

    def from_disk(self, tensor: Tensor) -> Tensor:
        """Rows of each head from (all first members of the pairs, all second members) to pair after pair."""
        heads = self.pair_heads
        return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2) if heads else tensor

    def to_disk(self, tensor: Tensor) -> Tensor:
        """The inverse of `from_disk`, in memory of its own."""
        if self.pair_heads:
            tensor = tensor.unflatten(0, (self.pair_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def layout(config: ModelConfig) -> dict[str, list[Piece]]:
    """For each of our parameters the Hugging Face tensors that it is made of, from its first row to its last."""
    table: dict[str, list[Piece]] = {}

    def add(name: str, *pieces: tuple, bias: bool = False) -> None:
        for kind in ("weight", "bias") if bias else ("weight",):
            table[f"{name}.{kind}"] = [Piece(f"{theirs}.{kind}", *rest) for theirs, *rest in pieces]

    dim, head_dim, mlp_dim = config.dim, config.head_dim, config.mlp_dim
    q, kv = config.heads * head_dim, config.kv_heads * head_dim
    # heads with pairs to bring together in q, k and their norms; GLM has them together on disk as well
    q_pairs, k_pairs, norm_pairs = (0, 0, 0) if config.family in GLM else (config.heads, config.kv_heads, 1)
    add("embed", ("model.embed_tokens", config.vocab_size))
    for layer in range(config.layers):
        block, hf = f"blocks.{layer}", f"model.layers.{layer}"
        attention, mlp = f"{hf}.self_attn", f"{hf}.mlp"
        heads = (f"{attention}.q_proj", q, q_pairs), (f"{attention}.k_proj", kv, k_pairs), (f"{attention}.v_proj", kv)
        add(f"{block}.attention_norm", (f"{hf}.input_layernorm", dim))
        add(f"{block}.qkv", *heads, bias=config.qkv_bias)
        if config.qk_norm:
            add(f"{block}.q_norm", (f"{attention}.q_norm", head_dim, norm_pairs))
            add(f"{block}.k_norm", (f"{attention}.k_norm", head_dim, norm_pairs))
        add(f"{block}.out", (f"{attention}.o_proj", dim), bias=config.out_bias)
        add(f"{block}.mlp_norm", (f"{hf}.post_attention_layernorm", dim))  # their name: it follows attention
        gate_up = [(f"{mlp}.gate_proj", mlp_dim), (f"{mlp}.up_proj", mlp_dim)]
        gate_up = [(f"{mlp}.gate_up_proj", 2 * mlp_dim)] if config.family in GLM else gate_up
        add(f"{block}.gate_up", *gate_up, bias=config.mlp_bias)
        add(f"{block}.down", (f"{mlp}.down_proj", dim), bias=config.mlp_bias)
        if config.post_norms:
            add(f"{block}.post_attention_norm", (f"{hf}.post_self_attn_layernorm", dim))
            add(f"{block}.post_mlp_norm", (f"{hf}.post_mlp_layernorm", dim))
    add("norm", ("model.norm", dim))
    if not config.tied:
        add("head", ("lm_head", config.vocab_size))
    return table


@torch.no_grad()
def load_pretrained(path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Transformer:
    """The model in a Hugging Face folder or a finished run. UserError for a folder that is not whole and understood."""
    folder = model_folder(path)
    config = read_config(folder)
    table, tensors = layout(config), open_tensors(folder)
    wanted = {piece.name for pieces in table.values() for piece in pieces}
    if missing := sorted(wanted - tensors.keys()):
        raise UserError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    extra = {name for name in tensors.keys() - wanted if not name.endswith("rotary_emb.inv_freq")}  # a constant
    if config.tied and "lm_head.weight" in extra:  # harmless if it is what the model is tied to
        head, embedding = (tensors[name].get_tensor(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        extra -= {"lm_head.weight"} if torch.equal(head, embedding) else set()
    if extra:
        raise UserError(f"{folder}: {len(extra)} tensors do not belong to the model, the first is {min(extra)}")
    model = Transformer(config, dtype, device="meta").to_empty(device=device)
    for name, parameter in tqdm(model.named_parameters(), "loading", len(table), delay=3):
        rows = [piece.rows for piece in table[name]]
        for part, piece in zip(parameter.split(rows), table[name]):
            tensor = tensors[piece.name].get_tensor(piece.name)
            if tensor.shape != part.shape or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                found = f"{tensor.dtype} {list(tensor.shape)}"
                raise UserError(f"{folder}: {piece.name} is {found}, config.json asks for floats {list(part.shape)}")
            part.copy_(piece.from_disk(tensor))
    return model


def open_tensors(folder: Path) -> dict[str, safe_open]:
    """For every tensor in a folder the open safetensors file that holds it (nothing is read before `get_tensor`)."""
    index, tensors = folder / "model.safetensors.index.json", {}
    weight_map = read_json(index).get("weight_map") if index.is_file() else {"": "model.safetensors"}
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: weight_map should name a file for each tensor")
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing (weights are read from safetensors files only)")
        try:
            file = safe_open(folder / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name} is truncated or not a safetensors file ({error})") from None
        tensors |= dict.fromkeys(file.keys(), file)
    return tensors


def save_pretrained(model: Transformer, path: str | Path, tokenizer=None, weights: dict | None = None) -> None:
    """Write a Hugging Face folder, whole or not at all: until it is complete and on disk it is called .NAME.partial.

    tokenizer: its files go too. weights: the full parameters by name, if the model's own are sharded over processes.
    """
    path = Path(path)
    partial_path, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    shutil.rmtree(partial_path, ignore_errors=True)
    partial_path.mkdir(parents=True)
    weights = dict(model.named_parameters()) if weights is None else weights
    shards: list[dict[Piece, Tensor]] = [{}]
    for name, pieces in layout(model.config).items():
        for piece, part in zip(pieces, weights[name].split([piece.rows for piece in pieces])):
            if shards[-1] and sum(tensor.nbytes for tensor in shards[-1].values()) + part.nbytes > SHARD_BYTES:
                shards.append({})
            shards[-1][piece] = part
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {piece.name: piece.to_disk(part) for piece, part in shard.items()}  # one shard in memory at a time
        save_file(tensors, partial_path / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    raw = config_to_hf(model.config, weights["norm.weight"].dtype)
    ids = {key: value for key, value in raw.items() if key.endswith("_token_id")}
    texts = {"config.json": raw, "generation_config.json": ids}
    if len(shards) > 1:
        texts["model.safetensors.index.json"] = {"metadata": {}, "weight_map": weight_map}
    for name, value in texts.items():
        (partial_path / name).write_text(json.dumps(value, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(partial_path)

    for file in (*partial_path.iterdir(), partial_path):  # on disk before the name says so
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if path.exists():  # a rename cannot replace a folder that holds files
        shutil.rmtree(old, ignore_errors=True)  # not before: without `path` it is what a crash left, the only copy
        path.rename(old)
    partial_path.rename(path)
    shutil.rmtree(old, ignore_errors=True)
