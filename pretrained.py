"""Hugging Face folders: config.json and *.safetensors into our fields and parameters, and back.

Used by model.py and, shard by shard, by parallel.py; a reader of T1 has no need of this file. In
order: finding a folder, its config.json, which of its tensors make which of our parameters
(`layout`), reading them, writing a folder.

Whatever in a folder would be computed differently here is refused, as a UserError of one line: a
model that is almost right trains to something that is quietly wrong.
"""

import hashlib
import json
import math
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import hub
from cli import UserError, read_json, sync_folder
from tokenizer import FILES, stop_ids

if TYPE_CHECKING:  # model.py imports this file
    from model import ModelConfig

FAMILIES = ("llama", "qwen2", "qwen3", "glm", "glm4")  # Hugging Face's `model_type`
GLM = ("glm", "glm4")
HF_NAMES = {  # our fields that config.json holds as they are
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_dim": "intermediate_size",
    "bos_id": "bos_token_id",
    "norm_eps": "rms_norm_eps",
    "context": "max_position_embeddings",
    "tied": "tie_word_embeddings",
    "qkv_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "pad_id": "pad_token_id",
}
ROPE_KEYS = {  # what each `rope_type` is parametrised by, beside its theta
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
SHARD_BYTES = 5_000_000_000  # a safetensors file is no larger than this, unless one tensor is
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def model_folder(path: str | Path) -> Path:
    """The Hugging Face folder that `path` means: itself, the `model` folder of a run, or what the
    hub has of that name (ORG/NAME, ORG/NAME@REVISION), fetched.

    A run has a config.json of its own, with the command's flags; it has no model_type.
    """
    path = Path(path) if Path(path).exists() else hub.fetch_model(str(path))
    for folder in (path / "model", path):
        file = folder / "config.json"
        if file.is_file() and "model_type" in read_json(file):
            return folder
    if (path / "checkpoints").is_dir():
        raise UserError(
            f"{path} holds no model yet: the run has not finished. Go on with --resume, or write "
            "the policy of a checkpoint of RL to a folder with rl.py --export DIR"
        )
    raise UserError(
        f"{path} holds no model: neither a Hugging Face config.json nor a finished run's "
        "model/config.json"
    )


def fingerprint(path: str | Path) -> str:
    """The same for folders with the same model: config.json, tokenizer, and weights byte for byte.

    All bytes are read, a second or two per GB: a sample of them could miss a few tensors.
    """
    folder = model_folder(path)
    names = ("config.json", "generation_config.json", *FILES, *file_names(folder))
    digest = hashlib.sha256()
    for name in names:
        try:
            with open(folder / name, "rb") as file:
                contents = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            continue  # not every folder has all of them; what is needed is missed on loading
        except OSError as error:
            raise UserError(f"cannot read {folder / name}: {error.strerror}") from None
        digest.update(f"{name} {contents}\n".encode())
    return digest.hexdigest()


# --- config.json ----------------------------------------------------------------------------------


def read_fields(folder: Path) -> dict:
    """The fields of a ModelConfig, from config.json and generation_config.json."""
    where = f"{folder}/config.json"
    raw = read_json(folder / "config.json")
    raw = {key: value for key, value in raw.items() if value is not None}
    family = raw.get("model_type")
    if family not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise UserError(f"{where}: model_type {family!r} is not supported (only {supported})")
    fields = read_sizes(raw, where)
    refuse_unsupported(raw, where)

    rope = read_rope(raw, where)
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_dim"] = int(fields["head_dim"] * rope.pop("partial_rotary_factor"))
    if rope["rope_type"] != "default":
        fields["rope_scaling"] = tuple(sorted(rope.items()))
    if fields["heads"] % fields["kv_heads"] or fields["rope_dim"] % 2:
        raise UserError(
            f"{where}: key/value heads must divide the heads, and rotary dimensions be even"
        )

    # What a family has whatever config.json says, and what it reads from there.
    fields["family"] = family
    fields["qkv_bias"] = family == "qwen2" or fields.get("qkv_bias", family in GLM)
    fields["out_bias"] = fields["qkv_bias"] and family in ("llama", "qwen3")
    fields["mlp_bias"] = family == "llama" and fields.get("mlp_bias", False)
    fields["qk_norm"] = family == "qwen3"
    fields["post_norms"] = family == "glm4"

    generation = folder / "generation_config.json"
    if generation.is_file():
        raw |= read_json(generation)  # its stop tokens count
    known = range(fields["vocab_size"])
    fields["eos_ids"] = tuple(id for id in stop_ids(raw, str(folder)) if id in known)
    return fields


def read_sizes(raw: dict, where: str) -> dict:
    """The fields of HF_NAMES. The sizes among them are there and above 0."""
    fields = {ours: raw[theirs] for ours, theirs in HF_NAMES.items() if theirs in raw}
    fields.setdefault("context", 2048)  # transformers' own default
    if raw["model_type"] == "llama":
        fields.setdefault("kv_heads", fields.get("heads"))
    for name in ("vocab_size", "dim", "layers", "heads", "kv_heads", "mlp_dim", "context"):
        check_size(fields, name, int, where)
    if raw["model_type"] in ("llama", "qwen2"):
        fields.setdefault("head_dim", fields["dim"] // fields["heads"])
    check_size(fields, "head_dim", int, where)
    check_size(fields, "norm_eps", float, where)
    return fields


def check_size(fields: dict, name: str, kind: type, where: str) -> None:
    value = fields.get(name, "missing")
    if not isinstance(value, kind) or value <= 0:
        raise UserError(f"{where}: {HF_NAMES[name]} is {value}")


def refuse_unsupported(raw: dict, where: str) -> None:
    """UserError if an option that transformers heeds, and we do not, would change the result."""
    kinds = {
        "layer_types": list,
        "max_window_layers": int,
        "rope_scaling": dict,
        "rope_parameters": dict,
    }
    for key, kind in kinds.items():
        if key in raw and not isinstance(raw[key], kind):
            raise UserError(f"{where}: {key} is {raw[key]}")
    windows = raw.get("layer_types") or []
    if not windows and raw.get("use_sliding_window") and raw.get("sliding_window"):
        above = raw["num_hidden_layers"] - raw.get("max_window_layers", 28)
        windows = ["sliding_attention"] * above
    problems = {
        f"hidden_act {raw.get('hidden_act')}": raw.get("hidden_act", "silu")
        not in ("silu", "swish"),
        "attention_dropout": raw.get("attention_dropout"),
        "quantization_config": raw.get("quantization_config"),
        "sliding-window attention": any(kind != "full_attention" for kind in windows),
    }
    for what, present in problems.items():
        if present:
            raise UserError(f"{where}: {what} is not supported")


def read_rope(raw: dict, where: str) -> dict:
    """Rotary parameters: rope_theta, partial_rotary_factor, rope_type and its ROPE_KEYS.

    transformers 5 keeps them all in `rope_parameters`; older folders have some of them in
    `rope_scaling`, and the rest beside it.
    """
    glm = raw["model_type"] in GLM
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    rope["rope_type"] = str(rope.pop("type", None) or rope.get("rope_type", "default"))
    rope.setdefault("rope_theta", raw.get("rope_theta", 10_000.0))
    whole = 0.5 if glm else 1.0
    rope.setdefault("partial_rotary_factor", raw.get("partial_rotary_factor", whole))
    if rope["rope_type"] == "llama3":
        key = "original_max_position_embeddings"
        trained = raw.get(key) or rope.get(key)
        rope[key] = trained or raw.get("max_position_embeddings", 2048)
    if rope["rope_type"] not in ROPE_KEYS:
        supported = list(ROPE_KEYS)
        raise UserError(
            f"{where}: rope_type {rope['rope_type']} is not supported (only {supported})"
        )
    numbers = {"rope_theta", "partial_rotary_factor", *ROPE_KEYS[rope["rope_type"]]}
    expected = {"rope_type", *numbers}
    if rope.keys() != expected:
        raise UserError(f"{where}: rope parameters {sorted(rope)}, expected {sorted(expected)}")
    if rope["partial_rotary_factor"] != 1.0 and not glm:
        raise UserError(f"{where}: partial_rotary_factor is not supported for {raw['model_type']}")
    for key in sorted(numbers):
        if not isinstance(rope[key], int | float) or not 0 < rope[key] < math.inf:
            raise UserError(f"{where}: {key} is {rope[key]}")
    return rope


def config_to_hf(config: "ModelConfig", dtype: torch.dtype) -> dict:
    """config.json as transformers 5 reads it; the rotary parameters also where 4 and vLLM look."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta} | dict(config.rope_scaling)
    if config.family in GLM:
        rope["partial_rotary_factor"] = (config.rope_dim or config.head_dim) / config.head_dim
    eos = list(config.eos_ids) or None
    if len(config.eos_ids) == 1:
        eos = config.eos_ids[0]
    fields = {theirs: getattr(config, ours) for ours, theirs in HF_NAMES.items()}
    return {
        "architectures": [f"{config.family.capitalize()}ForCausalLM"],
        "model_type": config.family,
        **fields,
        "eos_token_id": eos,
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None,
        "hidden_act": "silu",
        "dtype": str(dtype).removeprefix("torch."),
    }


# --- which tensors make which parameters ----------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A tensor on disk, and where it goes: `rows` rows of one of our parameters.

    pair_heads: this many heads in it have their rotary pairs apart, all first members before all
    second ones. Ours stand pair after pair. Attention sees only products of q and k, which do not
    depend on the order of their dimensions, as long as it is the same for both.
    """

    name: str
    rows: int
    pair_heads: int = 0

    @property
    def grain(self) -> int:
        """How many rows change places among themselves: those of a head, or none (1)."""
        return self.rows // self.pair_heads if self.pair_heads else 1

    def from_disk(self, tensor: Tensor) -> Tensor:
        """Rows of the piece, of whole heads, in our order."""
        if not self.pair_heads:
            return tensor
        return tensor.unflatten(0, (-1, 2, self.grain // 2)).transpose(1, 2).flatten(0, 2)

    def to_disk(self, tensor: Tensor) -> Tensor:
        """The inverse of `from_disk`, in memory of its own."""
        if self.pair_heads:
            tensor = tensor.unflatten(0, (-1, self.grain // 2, 2)).transpose(1, 2).flatten(0, 2)
        return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def layout(config: "ModelConfig") -> dict[str, list[Piece]]:
    """For each of our parameters the tensors on disk that it is made of, from its first row on."""
    table: dict[str, list[Piece]] = {}

    def add(name: str, *pieces: Piece, bias: bool = False) -> None:
        kinds = ["weight", "bias"] if bias else ["weight"]
        for kind in kinds:
            named = [replace(piece, name=f"{piece.name}.{kind}") for piece in pieces]
            table[f"{name}.{kind}"] = named

    dim = config.dim
    glm = config.family in GLM  # has the pairs side by side on disk too, and gate and up as one
    add("embed", Piece("model.embed_tokens", config.vocab_size))
    for layer in range(config.layers):
        ours = f"blocks.{layer}"
        theirs = f"model.layers.{layer}"
        add(f"{ours}.attention_norm", Piece(f"{theirs}.input_layernorm", dim))
        add_attention(add, config, ours, f"{theirs}.self_attn")
        # Their name for the norm before the MLP: it follows attention.
        add(f"{ours}.mlp_norm", Piece(f"{theirs}.post_attention_layernorm", dim))
        gate_up = [
            Piece(f"{theirs}.mlp.gate_proj", config.mlp_dim),
            Piece(f"{theirs}.mlp.up_proj", config.mlp_dim),
        ]
        if glm:
            gate_up = [Piece(f"{theirs}.mlp.gate_up_proj", 2 * config.mlp_dim)]
        add(f"{ours}.gate_up", *gate_up, bias=config.mlp_bias)
        add(f"{ours}.down", Piece(f"{theirs}.mlp.down_proj", dim), bias=config.mlp_bias)
        if config.post_norms:
            add(f"{ours}.post_attention_norm", Piece(f"{theirs}.post_self_attn_layernorm", dim))
            add(f"{ours}.post_mlp_norm", Piece(f"{theirs}.post_mlp_layernorm", dim))
    add("norm", Piece("model.norm", dim))
    if not config.tied:
        add("head", Piece("lm_head", config.vocab_size))
    return table


def add_attention(add, config: "ModelConfig", ours: str, theirs: str) -> None:
    """The attention of one block, with `layout`'s `add`."""
    apart = config.family not in GLM  # the rotary pairs on disk
    heads = config.heads
    kv_heads = config.kv_heads
    head_dim = config.head_dim
    add(
        f"{ours}.qkv",
        Piece(f"{theirs}.q_proj", heads * head_dim, heads * apart),
        Piece(f"{theirs}.k_proj", kv_heads * head_dim, kv_heads * apart),
        Piece(f"{theirs}.v_proj", kv_heads * head_dim),
        bias=config.qkv_bias,
    )
    if config.qk_norm:
        add(f"{ours}.q_norm", Piece(f"{theirs}.q_norm", head_dim, 1 * apart))
        add(f"{ours}.k_norm", Piece(f"{theirs}.k_norm", head_dim, 1 * apart))
    add(f"{ours}.out", Piece(f"{theirs}.o_proj", config.dim), bias=config.out_bias)


# --- reading --------------------------------------------------------------------------------------


def find_tensors(folder: Path, config: "ModelConfig") -> dict[str, Path]:
    """For every tensor of the model the file that holds it.

    UserError if one is missing, or if there is one that the model has no place for.
    """
    files: dict[str, Path] = {}
    for name in file_names(folder):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: {name} is missing (weights are read from safetensors files only)"
            )
        try:
            with safe_open(folder / name, framework="pt") as opened:
                files |= dict.fromkeys(opened.keys(), folder / name)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{folder / name} is truncated or not a safetensors file ({error})"
            ) from None

    wanted = {piece.name for pieces in layout(config).values() for piece in pieces}
    missing = wanted - files.keys()
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} tensors are missing, the first is {min(missing)}"
        )
    extra = files.keys() - wanted
    extra = {name for name in extra if not name.endswith("rotary_emb.inv_freq")}  # a constant
    if config.tied and "lm_head.weight" in extra and head_is_embedding(files):
        extra -= {"lm_head.weight"}
    if extra:
        raise UserError(
            f"{folder}: {len(extra)} tensors do not belong to the model, the first is {min(extra)}"
        )
    return files


def file_names(folder: Path) -> list[str]:
    """The safetensors files of a folder: one, or those that the index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{index}: weight_map should name a file for each tensor")
    return sorted(set(names))


def mapped(file: Path, name: str) -> Tensor:
    """A tensor of a safetensors file, mapped into memory: only what is used of it is ever read.

    Each file is opened anew. While a mapping lasts, all that was read counts as this process's.
    """
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def head_is_embedding(files: dict[str, Path]) -> bool:
    """Whether the head that is stored beside a tied model's embedding is a copy of it."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    head, embedding = (mapped(files[name], name) for name in names)
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return False
    # As bytes: a NaN is equal to itself, and is named by `read_rows`.
    return torch.equal(head.view(torch.uint8), embedding.view(torch.uint8))


@torch.no_grad()
def fill(folder: Path, config: "ModelConfig", parts: dict[str, tuple[Tensor, int]]) -> None:
    """Read parameters that have memory but no values yet.

    parts: by the parameter's name, the memory, and which of the parameter's rows is the first in
    it: 0 and all of them, or the rows that a rank keeps. No others are read, and at most one tensor
    is in memory beside them.
    """
    files = find_tensors(folder, config)
    table = layout(config)
    other = os.environ.get("RANK", "0") != "0"  # one bar for all ranks
    for name, (part, first) in tqdm(parts.items(), "loading", delay=3, disable=other):
        above = 0  # the parameter's rows before this piece's
        for piece in table[name]:
            begin = max(first - above, 0)
            end = min(first + len(part) - above, piece.rows)
            if begin < end:
                rows = read_rows(files[piece.name], piece, begin, end, part.shape[1:])
                start = above + begin - first
                part[start : start + len(rows)].copy_(rows)
            above += piece.rows


def read_rows(file: Path, piece: Piece, begin: int, end: int, columns: torch.Size) -> Tensor:
    """The rows [begin, end) of a piece, in our order. columns: the shape of one of them.

    UserError for a tensor of another shape, or with a value that is not finite: such a model says
    nothing, and never learns.
    """
    tensor = mapped(file, piece.name)
    shape = [piece.rows, *columns]
    if list(tensor.shape) != shape or tensor.dtype not in FLOATS:
        raise UserError(
            f"{file}: {piece.name} is {tensor.dtype} {list(tensor.shape)}, "
            f"config.json asks for floats {shape}"
        )
    first = begin // piece.grain * piece.grain  # whole heads: their rows are in another order
    heads_end = math.ceil(end / piece.grain) * piece.grain
    tensor = tensor[first:heads_end]
    if not tensor.isfinite().all():
        raise UserError(
            f"{file}: {piece.name} holds NaN or infinity: the model is broken, use an earlier one"
        )
    return piece.from_disk(tensor)[begin - first : end - first]


# --- writing --------------------------------------------------------------------------------------


def write_folder(
    path: Path, config: "ModelConfig", weights: dict[str, Tensor], tokenizer=None
) -> None:
    """Write a folder, whole or not at all: until it is complete and on disk it is .NAME.partial."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process
    try:
        partial.mkdir(parents=True)
        write_files(partial, config, weights, tokenizer)
        publish(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # what a failure leaves fills the disk


def write_files(
    folder: Path, config: "ModelConfig", weights: dict[str, Tensor], tokenizer=None
) -> None:
    """Write everything that a folder holds, and flush it to the disk."""
    if tokenizer is not None:
        # Whoever samples from the folder is to stop where we do: base models name one token in
        # config.json, and end their turns with another.
        known = [token for token in tokenizer.eos_ids if token < config.vocab_size]
        config = replace(config, eos_ids=tuple(sorted({*config.eos_ids, *known})))
    texts = write_weights(folder, config, weights)
    raw = config_to_hf(config, weights["norm.weight"].dtype)
    texts["config.json"] = raw
    ids = {key: value for key, value in raw.items() if key.endswith("_token_id")}
    texts["generation_config.json"] = ids
    for name, value in texts.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder)
    for file in (*folder.iterdir(), folder):
        sync_folder(file)  # on disk, before it gets the name that says so


def publish(partial: Path, path: Path) -> None:
    """Give a folder that is complete its name, in place of what had it."""
    old = path.with_name(f".{path.name}.old")
    if path.exists():  # a rename cannot replace a folder that holds files
        # Not removed before now: if a crash left no `path`, then `old` is the only copy.
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def write_weights(folder: Path, config: "ModelConfig", weights: dict[str, Tensor]) -> dict:
    """Write the safetensors files. Where there are several, returns {name of the index: index}."""
    shards = split_into_shards(config, weights)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # Only one shard at a time is copied to the host's memory.
        tensors = {piece.name: piece.to_disk(part) for piece, part in shard.items()}
        try:
            save_file(tensors, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:
            # A full disk, which is an OSError everywhere else: "...: ... (os error 28)".
            code = re.search(r"os error (\d+)", str(error))
            reason = os.strerror(int(code[1])) if code else str(error)
            raise OSError(reason) from None
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) == 1:
        return {}
    return {"model.safetensors.index.json": {"metadata": {}, "weight_map": weight_map}}


def split_into_shards(
    config: "ModelConfig", weights: dict[str, Tensor]
) -> list[dict[Piece, Tensor]]:
    """The parts of all parameters, in files of SHARD_BYTES at most."""
    shards: list[dict[Piece, Tensor]] = [{}]
    size = 0
    for name, pieces in layout(config).items():
        parts = weights[name].split([piece.rows for piece in pieces])
        for piece, part in zip(pieces, parts):
            if shards[-1] and size + part.nbytes > SHARD_BYTES:
                shards.append({})
                size = 0
            shards[-1][piece] = part
            size += part.nbytes
    return shards
