"""A decoder-only transformer (Llama, Qwen2, Qwen3, GLM-4) and its Hugging Face folders, in and out.

One `Transformer` serves every family; what differs between them is a field of `Config`: biases, norms on the queries
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cli import UserError

FAMILIES = ("llama", "qwen2", "qwen3", "glm", "glm4")
SHARD_BYTES = 5_000_000_000  # largest safetensors file that `save_pretrained` writes, as transformers does


@dataclass(frozen=True)
class Config:
    """The shape of a transformer. `family` is Hugging Face's `model_type`, and decides the tensors' names on disk."""

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
    rope_scaling: tuple[tuple[str, float | str], ...] = ()  # Hugging Face's rope parameters as sorted pairs (hashable)
    tied: bool = False  # the head is the embedding's transpose
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each head's query and key (Qwen3)
    post_norms: bool = False  # RMSNorm on what each half of a block adds to the stream (glm4)
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------


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
    """Attention, then a gated MLP; each reads a normalised copy of the residual stream and adds to it."""

    def __init__(self, config: Config, layer: int, **factory):
        super().__init__()
        self.config, self.layer = config, layer
        dim, eps = config.dim, config.norm_eps
        query_rows, kv_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.attention_norm = RMSNorm(dim, eps, **factory)
        self.qkv = nn.Linear(dim, query_rows + 2 * kv_rows, bias=config.qkv_bias, **factory)
        self.q_norm = RMSNorm(config.head_dim, eps, **factory) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, eps, **factory) if config.qk_norm else nn.Identity()
        self.out = nn.Linear(query_rows, dim, bias=config.out_bias, **factory)
        self.post_attention_norm = RMSNorm(dim, eps, **factory) if config.post_norms else nn.Identity()
        self.mlp_norm = RMSNorm(dim, eps, **factory)
        self.gate_up = nn.Linear(dim, 2 * config.mlp_dim, bias=config.mlp_bias, **factory)
        self.down = nn.Linear(config.mlp_dim, dim, bias=config.mlp_bias, **factory)
        self.post_mlp_norm = RMSNorm(dim, eps, **factory) if config.post_norms else nn.Identity()

    def forward(self, x: Tensor, rotation: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        config, dtype = self.config, self.qkv.weight.dtype
        heads = self.qkv(self.attention_norm(x).to(dtype)).unflatten(-1, (-1, config.head_dim))
        q, k, v = heads.split([config.heads, config.kv_heads, config.kv_heads], dim=-2)
        q = rotate(self.q_norm(q), rotation).to(v.dtype)
        k = rotate(self.k_norm(k), rotation).to(v.dtype)
        mixed = attend(self.layer, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + self.post_attention_norm(self.out(mixed.transpose(1, 2).flatten(-2)))

        gate, up = self.gate_up(self.mlp_norm(x).to(dtype)).chunk(2, dim=-1)
        return x + self.post_mlp_norm(self.down(F.silu(gate) * up))


class Transformer(nn.Module):
    """Tokens to hidden states. The residual stream is fp32 (or better) even where the weights are bf16."""

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
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
    ) -> Tensor:
        """Hidden states [B, T, D] after the final norm, for tokens [B, T].

        documents [B, T]: number of the document that each token belongs to, in runs (packed rows; padding is simply a
            last document). Attention stays within a run and positions restart in it. None: a row is one document.
        positions [B, T]: overrides the rotary positions, which otherwise count from 0 in each document.
        attend(layer, q [B, H, T, Dh], k, v [B, Hkv, T, Dh]) -> [B, H, T, Dh]: replaces causal attention. q and k are
            rotated. This is where a sampler keeps its keys and values; it must give `positions`.
        """
        place = torch.arange(tokens.shape[1], device=tokens.device)
        start = None if documents is None else document_starts(documents)
        if positions is None:
            positions = place[None] if start is None else place - start
        if attend is None:
            visible = None if start is None else ((place >= start[..., None]) & (place <= place[:, None]))[:, None]
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
        weight = self.head_weight
        return F.linear(hidden.to(weight.dtype), weight)


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32 for bf16 and fp16, else the dtype itself (float64 references stay float64)."""
    return torch.promote_types(dtype, torch.float32)


def document_starts(documents: Tensor) -> Tensor:
    """[B, T]: where the run of equal document numbers that holds each token begins, for documents [B, T]."""
    place = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=False)
    return torch.where(begins, place, 0).cummax(dim=1).values


def causal_attention(visible: Tensor | None, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention; visible [B, 1, T, T] says which keys a query sees, None means all up to itself."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None, enable_gqa=grouped)


def rotations(config: Config, positions: Tensor) -> Tensor:
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
def inverse_frequencies(config: Config, device: torch.device) -> Tensor:
    """[rope_dim / 2] radians per position, fp32, in the same operations as transformers so that they agree bitwise."""
    dim = config.rope_dim or config.head_dim
    frequencies = 1.0 / (config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    scaling = dict(config.rope_scaling)
    if scaling.get("rope_type") == "linear":
        frequencies = frequencies / scaling["factor"]
    elif scaling.get("rope_type") == "llama3":  # slow waves are stretched, fast ones kept, those between blended
        factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
        wavelength = 2 * math.pi / frequencies
        turns = scaling["original_max_position_embeddings"] / wavelength  # within the context of pretraining
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - keep) * frequencies / factor + keep * frequencies
    return frequencies.to(device)


def random_init(config: Config, seed: int, dtype: torch.dtype = torch.float32) -> Transformer:
    """A fresh model: normal weights of variance 1 / fan-in, smaller where a block writes to the residual stream."""
    model = Transformer(config, dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = 0.02 if name in ("embed.weight", "head.weight") else parameter.shape[1] ** -0.5
            if name.endswith(("out.weight", "down.weight")):
                std /= math.sqrt(2 * config.layers)
            parameter.normal_(0.0, std, generator=generator)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face folders
# ---------------------------------------------------------------------------------------------------------------------


def model_folder(path: str | Path) -> Path:
    """The Hugging Face folder that `path` means: itself, or the `model` folder that a run of nanoT1 left in it."""
    path = Path(path)
    for folder in (path / "model", path):
        if (folder / "config.json").is_file() and "model_type" in read_json(folder / "config.json"):
            return folder
    if not path.exists():
        raise UserError(f"no such folder: {path}")
    raise UserError(f"{path} holds no model: neither a Hugging Face config.json nor a finished run's model/config.json")


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object, found {type(value).__name__}")
    return value


def read_config(folder: Path) -> Config:
    """The Config of a Hugging Face folder. UserError for anything in it that this file would compute differently."""
    raw = read_json(folder / "config.json")
    return config_from_hf(raw, folder)


def config_from_hf(raw: dict, folder: Path) -> Config:
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{folder}: model_type {family!r} is not supported (one of: {', '.join(FAMILIES)})")
    glm = family in ("glm", "glm4")
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope_type = rope.pop("rope_type", rope.pop("type", "default"))
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    partial_rotary = rope.pop("partial_rotary_factor", raw.get("partial_rotary_factor", 0.5 if glm else 1.0))
    theta = rope.pop("rope_theta", raw.get("rope_theta", 10_000.0))
    attention_bias = raw.get("attention_bias", glm) or family == "qwen2"
    eos = raw.get("eos_token_id")
    return Config(
        family=family,
        vocab_size=raw["vocab_size"],
        dim=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=raw["num_attention_heads"],
        kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=head_dim,
        mlp_dim=raw["intermediate_size"],
        context=raw.get("max_position_embeddings", 2048),
        norm_eps=raw["rms_norm_eps"],
        rope_theta=theta,
        rope_dim=int(head_dim * partial_rotary) if glm else None,
        rope_scaling=() if rope_type == "default" else tuple(sorted({**rope, "rope_type": rope_type}.items())),
        tied=raw.get("tie_word_embeddings", False),
        qkv_bias=attention_bias,
        out_bias=attention_bias and family in ("llama", "qwen3"),
        mlp_bias=family == "llama" and raw.get("mlp_bias", False),
        qk_norm=family == "qwen3",
        post_norms=family == "glm4",
        bos_id=raw.get("bos_token_id"),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )


def config_to_hf(config: Config, dtype: torch.dtype) -> dict:
    """config.json as transformers reads it."""
    rope = {"rope_theta": config.rope_theta, "rope_type": "default", **dict(config.rope_scaling)}
    glm = config.family in ("glm", "glm4")
    architecture = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "glm": "Glm", "glm4": "Glm4"}[config.family]
    raw = {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) or None,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if config.family != "qwen2":
        raw["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        raw["mlp_bias"] = config.mlp_bias
    if glm:
        rope["partial_rotary_factor"] = (config.rope_dim or config.head_dim) / config.head_dim
    return raw


@dataclass(frozen=True)
class Piece:
    """One tensor on disk: its name, the rows of our parameter that it fills, and how many heads of it are rotary."""

    name: str
    rows: int
    rotary_heads: int = 0


def layout(config: Config) -> Iterator[tuple[str, list[Piece]]]:
    """Our parameters' names, each with the Hugging Face tensors that make it up, top to bottom."""
    dim, head_dim = config.dim, config.head_dim
    # GLM's rotary pairs are neighbours on disk too; everywhere else they are to be brought together.
    reorder = config.family not in ("glm", "glm4")
    q, kv = Piece("q", config.heads * head_dim), config.kv_heads * head_dim
    q_heads, k_heads = (config.heads, config.kv_heads) if reorder else (0, 0)
    yield "embed.weight", [Piece("model.embed_tokens.weight", config.vocab_size)]
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield ours + "attention_norm.weight", [Piece(theirs + "input_layernorm.weight", dim)]
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            yield (
                ours + f"qkv.{kind}",
                [
                    Piece(theirs + f"self_attn.q_proj.{kind}", q.rows, q_heads),
                    Piece(theirs + f"self_attn.k_proj.{kind}", kv, k_heads),
                    Piece(theirs + f"self_attn.v_proj.{kind}", kv),
                ],
            )
        if config.qk_norm:
            yield ours + "q_norm.weight", [Piece(theirs + "self_attn.q_norm.weight", head_dim, 1)]
            yield ours + "k_norm.weight", [Piece(theirs + "self_attn.k_norm.weight", head_dim, 1)]
        for kind in ("weight", "bias") if config.out_bias else ("weight",):
            yield ours + f"out.{kind}", [Piece(theirs + f"self_attn.o_proj.{kind}", dim)]
        # transformers names the norm before the MLP after what it follows
        yield ours + "mlp_norm.weight", [Piece(theirs + "post_attention_layernorm.weight", dim)]
        for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
            if config.family in ("glm", "glm4"):
                yield ours + f"gate_up.{kind}", [Piece(theirs + f"mlp.gate_up_proj.{kind}", 2 * config.mlp_dim)]
            else:
                names = (theirs + f"mlp.gate_proj.{kind}", theirs + f"mlp.up_proj.{kind}")
                yield ours + f"gate_up.{kind}", [Piece(name, config.mlp_dim) for name in names]
            yield ours + f"down.{kind}", [Piece(theirs + f"mlp.down_proj.{kind}", dim)]
        if config.post_norms:
            yield ours + "post_attention_norm.weight", [Piece(theirs + "post_self_attn_layernorm.weight", dim)]
            yield ours + "post_mlp_norm.weight", [Piece(theirs + "post_mlp_layernorm.weight", dim)]
    yield "norm.weight", [Piece("model.norm.weight", dim)]
    if not config.tied:
        yield "head.weight", [Piece("lm_head.weight", config.vocab_size)]


def pair_up(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from Hugging Face's order (all first members of the pairs, then all second) to pair by pair."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def pair_down(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `pair_up`."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def weight_files(folder: Path) -> dict[str, Path]:
    """Which safetensors file holds each tensor of a folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / name for name in read_json(index)["weight_map"].values()})
    else:
        files = [folder / "model.safetensors"]
    where = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{folder}: {file.name} is missing")
        try:
            with safe_open(file, framework="pt") as tensors:
                where.update(dict.fromkeys(tensors.keys(), file))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is truncated or no safetensors file ({error})") from None
    return where


@torch.no_grad()
def load_pretrained(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Transformer:
    """The model in a Hugging Face folder or a finished run. UserError for a folder that is not whole and understood."""
    folder = model_folder(path)
    config = read_config(folder)
    where = weight_files(folder)
    model = Transformer(config, dtype, device="meta").to_empty(device=device)
    parameters = dict(model.named_parameters())
    wanted = {piece.name for _, pieces in layout(config) for piece in pieces}
    check_names(folder, wanted, set(where), config.tied)
    open_files = {file: safe_open(file, framework="pt") for file in set(where.values())}
    for name, pieces in layout(config):
        for part, piece in zip(parameters[name].split([piece.rows for piece in pieces]), pieces):
            tensor = open_files[where[piece.name]].get_tensor(piece.name)
            if tensor.shape != part.shape:
                raise UserError(
                    f"{folder}: {piece.name} has shape {list(tensor.shape)}, config.json says {list(part.shape)}"
                )
            part.copy_(pair_up(tensor, piece.rotary_heads) if piece.rotary_heads else tensor)
    return model


def check_names(folder: Path, wanted: set[str], found: set[str], tied: bool) -> None:
    if missing := sorted(wanted - found):
        raise UserError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
    harmless = {name for name in found if name.endswith("rotary_emb.inv_freq")}  # old Llama folders store a constant
    if tied:
        harmless.add("lm_head.weight")
    if extra := sorted(found - wanted - harmless):
        raise UserError(f"{folder}: {len(extra)} tensors are unknown to its model_type, the first is {extra[0]}")


@torch.no_grad()
def save_pretrained(model: Transformer, path: str | Path, tokenizer=None, weights: dict[str, Tensor] | None = None):
    """Write a Hugging Face folder, whole or not at all (a killed process leaves PATH.partial, never half a PATH).

    tokenizer: its files go into the folder too. weights: full tensors by parameter name, where the model's own are
    sharded over processes (FSDP).
    """
    path = Path(path)
    partial_path = path.with_name(path.name + ".partial")
    shutil.rmtree(partial_path, ignore_errors=True)
    partial_path.mkdir(parents=True)
    weights = weights or dict(model.named_parameters())
    shards: list[dict[str, Tensor]] = [{}]
    for name, pieces in layout(model.config):
        parts = weights[name].detach().cpu().split([piece.rows for piece in pieces])
        for part, piece in zip(parts, pieces):
            tensor = (pair_down(part, piece.rotary_heads) if piece.rotary_heads else part).contiguous().clone()
            if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
                shards.append({})
            shards[-1][piece.name] = tensor
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        one = len(shards) == 1
        name = "model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, partial_path / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(t.nbytes for shard in shards for t in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial_path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    raw = config_to_hf(model.config, next(iter(weights.values())).dtype)
    (partial_path / "config.json").write_text(json.dumps(raw, indent=2))
    generation = {key: raw[key] for key in ("bos_token_id", "eos_token_id") if raw[key] is not None}
    (partial_path / "generation_config.json").write_text(json.dumps(generation, indent=2))
    if tokenizer is not None:
        tokenizer.save(partial_path)
    for file in partial_path.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    old = path.with_name(path.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial_path.rename(path)
    shutil.rmtree(old, ignore_errors=True)
