"""model.py against transformers, family by family, and against itself: packing, hooks, folders,
refusals."""

import json

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Glm4Config,
    GlmConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

import model
import packing
import pretrained
from cli import UserError
from model import (
    ModelConfig,
    Transformer,
    load_pretrained,
    model_folder,
    random_init,
    save_pretrained,
)
from tokenizer import demo_tokenizer, load_tokenizer

SHAPE = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
FAMILIES = {
    "llama2": LlamaConfig(**SHAPE | {"num_key_value_heads": 4}),
    "llama, tied, biases, wide heads": LlamaConfig(
        **SHAPE, head_dim=24, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama3 scaling": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama linear scaling": LlamaConfig(**SHAPE, rope_parameters=LINEAR),
    "qwen2": Qwen2Config(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True),
    "qwen3, biases": Qwen3Config(**SHAPE, head_dim=8, attention_bias=True),
    "glm": GlmConfig(**SHAPE, head_dim=32),
    "glm4": Glm4Config(**SHAPE, head_dim=24, attention_bias=True, partial_rotary_factor=1 / 3),
    "glm4, no bias": Glm4Config(**SHAPE, head_dim=16, attention_bias=False),
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def reference(request, tmp_path_factory):
    """A transformers model whose every weight, biases and norms too, is random; and the folder that
    it is saved in."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(FAMILIES[request.param]).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    folder = tmp_path_factory.mktemp("reference")
    theirs.save_pretrained(folder)
    return theirs, folder


def layers_of(ours: Transformer, tokens: torch.Tensor, **inputs) -> list[torch.Tensor]:
    """The residual stream before each block, as transformers' `output_hidden_states`, and after the
    final norm."""
    seen = []
    see = lambda block, args: seen.append(args[0])  # noqa: E731
    hooks = [block.register_forward_pre_hook(see) for block in ours.blocks]
    seen.append(ours(tokens, **inputs))
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def test_every_layer_equals_transformers(reference):
    """Wrong norms, biases, rotary pairs, grouping of heads: every layer must agree, also beyond the
    scaled context."""
    theirs, folder = reference
    ours = load_pretrained(folder)
    tokens = torch.randint(0, 99, (2, 200))
    expected = theirs(tokens, output_hidden_states=True)
    for mine, his in zip(layers_of(ours, tokens), expected.hidden_states, strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.logits(ours(tokens)), expected.logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_long_positions_equal_transformers(reference):
    """Rotary angles computed in low precision, or scaled wrongly, drift at positions in the
    thousands."""
    theirs, folder = reference
    ours = load_pretrained(folder)
    tokens, positions = torch.randint(0, 99, (1, 60)), torch.arange(9000, 9060)[None]
    expected = theirs(tokens, position_ids=positions).logits
    found = ours.logits(ours(tokens, positions=positions))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_bf16_is_no_worse_than_transformers(reference):
    """Norms or rotations rounded to bf16 midway: our error against fp32 may not exceed
    transformers' own."""
    theirs, folder = reference
    ours = load_pretrained(folder, dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in ours.parameters())
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    # The truth: the same rounded weights, but computed with in fp32.
    theirs = AutoModelForCausalLM.from_config(theirs.config)
    theirs.load_state_dict(rounded.state_dict())
    tokens = torch.randint(0, 99, (4, 100))
    assert all(stream.dtype == torch.float32 for stream in layers_of(ours, tokens))
    truth = theirs.float()(tokens).logits
    our_error = (ours.logits(ours(tokens)).float() - truth).square().mean().sqrt()
    assert our_error <= 1.02 * (rounded(tokens).logits.float() - truth).square().mean().sqrt()


def test_a_saved_model_names_every_stop_token(tmp_path):
    """Guards against a model that never stops elsewhere: a base model's config.json names one token
    (Qwen2.5: <|endoftext|>), its tokenizer the one that ends a turn. We stop at both."""
    tokenizer = demo_tokenizer(["a"])
    [end] = tokenizer.eos_ids
    shape = ModelConfig(tokenizer.vocab_size, 32, 1, 4, 4, 8, 48, eos_ids=(3,))
    save_pretrained(random_init(shape, 0), tmp_path / "first", tokenizer)
    ids = {"eos_token_id": [3, -1, 9999]}  # the last two are none of its tokens
    (tmp_path / "first" / "generation_config.json").write_text(json.dumps(ids))
    save_pretrained(load_pretrained(tmp_path / "first"), tmp_path / "saved", tokenizer)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "saved" / name).read_text())["eos_token_id"] == [3, end]
    assert load_tokenizer(tmp_path / "saved").eos_ids == [3, end]


def test_folder_round_trip_is_bitwise(reference, tmp_path):
    """Rows of q and k are reordered on the way in: on the way out each must be back, and
    transformers must agree."""
    theirs, folder = reference
    ours = load_pretrained(folder)
    save_pretrained(ours, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again) is type(theirs)
    expected, found = theirs.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    kept = ("rope_parameters", "pad_token_id", "tie_word_embeddings", "rms_norm_eps")
    for key in (*kept, "max_position_embeddings"):
        assert getattr(again.config, key) == getattr(theirs.config, key), key
    assert again.generation_config.eos_token_id == 2
    loaded = load_pretrained(tmp_path / "saved")
    assert loaded.config == ours.config
    for (name, mine), (_, his) in zip(ours.named_parameters(), loaded.named_parameters()):
        assert torch.equal(mine, his), name


@torch.no_grad()
def test_real_weights_equal_transformers(smollm2):
    """Thirty real layers: logits to 1e-4 in fp32. (Against float64 our error is as large as
    transformers'.)"""
    from tokenizer import load_tokenizer

    ours, theirs = load_pretrained(smollm2), AutoModelForCausalLM.from_pretrained(smollm2)
    text = "Natalia sold clips to 48 of her friends in April, and half as many in May. How many?"
    tokens = torch.tensor([load_tokenizer(smollm2).chat([{"role": "user", "content": text}])])
    torch.testing.assert_close(ours.logits(ours(tokens)), theirs(tokens).logits, rtol=0, atol=1e-4)
    # A bf16 copy is the rounded file.
    up = load_file(smollm2 / "model.safetensors")["model.layers.7.mlp.up_proj.weight"]
    half = load_pretrained(smollm2, torch.bfloat16).blocks[7].gate_up.weight
    assert torch.equal(half[ours.config.mlp_dim :], up.bfloat16())


SMALL = ModelConfig(
    vocab_size=50,
    dim=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    qk_norm=True,
    family="qwen3",
    bos_id=1,
    eos_ids=(2, 3),
)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other():
    """A packed row must give what each document gives alone: a leak, or positions that run on,
    would change it."""
    ours = random_init(SMALL, 0, torch.float64)
    tokens = torch.randint(0, 50, (2, 20))
    first = [5] * 1 + [3] * 9 + [4] * 10
    second = [0] * 13 + [1] * 3 + [0] * 4  # the second run of 0 is a new document
    documents = torch.tensor([first, second])
    packed = ours(tokens, documents)
    runs = [(0, 0, 1), (0, 1, 10), (0, 10, 20), (1, 0, 13), (1, 13, 16), (1, 16, 20)]
    for row, start, end in runs:
        alone = ours(tokens[row : row + 1, start:end])
        torch.testing.assert_close(packed[row : row + 1, start:end], alone)


def test_positions_of_documents():
    """Rotary positions are relative, so that a wrong start hardly shows in a result: here the
    numbers themselves."""
    documents = torch.tensor([[5, 3, 3, 4, 4, 4], [0, 0, 1, 0, 0, 0]])
    positions, _ = packing.positions_and_mask(documents, documents, None)
    assert positions.tolist() == [[0, 0, 1, 0, 1, 2], [0, 1, 0, 0, 1, 2]]


def test_future_tokens_have_no_gradient():
    """A mask off by one lets a position read its own target: position t may not depend on tokens
    after t."""
    ours = random_init(SMALL, 0)
    seen = []
    ours.embed.register_forward_hook(lambda _, __, out: seen.append(out.retain_grad() or out))
    for documents in (None, torch.zeros(1, 10, dtype=torch.int64)):
        ours(torch.arange(10)[None], documents)[0, 4].sum().backward()
        reached = seen[-1].grad[0].abs().sum(-1) > 0
        assert reached.tolist() == [True] * 5 + [False] * 5


@torch.no_grad()
def test_attend_hook_with_a_cache_equals_one_forward():
    """decode.ModelDecoder: one token at a time with keys and values kept, at given positions,
    equals the whole row."""
    ours = random_init(SMALL, 0)
    tokens = torch.randint(0, 50, (3, 12))
    cache = {}

    def attend(layer, q, k, v):
        assert q.shape == (3, 4, 1, 8) and k.shape == v.shape == (3, 2, 1, 8)
        old = cache.get(layer, (k[:, :, :0], v[:, :, :0]))
        cache[layer] = k, v = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    steps = [
        ours(tokens[:, t : t + 1], positions=torch.full((3, 1), t), attend=attend)
        for t in range(12)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), ours(tokens), rtol=1e-5, atol=1e-5)


def test_checkpointed_blocks_give_the_same_gradients():
    """Recomputing a block must not change what it computed (a mask or rotation lost on the way
    would)."""
    ours, documents = random_init(SMALL, 0), torch.tensor([[0] * 4 + [1] * 5])
    gradients = []
    for flag in (False, True):
        ours.checkpoint_blocks = flag
        ours.zero_grad()
        ours(torch.arange(9)[None], documents).square().sum().backward()
        found = [parameter.grad for parameter in ours.parameters()]
        gradients.append([gradient for gradient in found if gradient is not None])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*gradients, strict=True))


def test_autocast_multiplies_in_bf16_and_adds_in_fp32():
    """Mixed precision: products in bf16, yet fp32 hidden states and fp32 gradients for the fp32
    masters."""
    ours = random_init(SMALL, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = ours(torch.arange(9)[None], torch.tensor([[0] * 4 + [1] * 5]))
    assert hidden.dtype == torch.float32
    exact = ours(torch.arange(9)[None], torch.tensor([[0] * 4 + [1] * 5]))
    assert 0 < (hidden - exact).abs().max() < 0.1
    hidden.sum().backward()
    assert ours.blocks[0].qkv.weight.grad.dtype == torch.float32


def test_meta_device_needs_no_memory():
    """A 32B model's shape must be at hand without its 130 GB (for --plan, and for sharding before
    loading)."""
    shape = ModelConfig(152064, 5120, 64, 40, 8, 128, 27648, family="qwen2", qkv_bias=True)
    large = Transformer(shape, device="meta")
    count = sum(parameter.numel() for parameter in large.parameters())
    assert count == 32_763_876_352  # Qwen2.5-32B
    assert large(torch.zeros(1, 8, dtype=torch.int64, device="meta")).shape == (1, 8, 5120)


def test_random_init_is_a_function_of_the_seed():
    """A resumed or repeated run starts from the same weights, whatever else drew random numbers
    before."""
    first, second, other = random_init(SMALL, 7), random_init(SMALL, 7), random_init(SMALL, 8)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert not torch.equal(first.head_weight, other.head_weight)
    tied = random_init(ModelConfig(50, 32, 1, 4, 4, 8, 48, tied=True), 0)
    assert tied.head_weight.shape == (50, 32)


def test_a_sampling_pass_leaves_training_possible():
    """Cached rotary frequencies made inside inference_mode must not poison a later backward
    pass."""
    model.inverse_frequencies.cache_clear()
    ours = random_init(SMALL, 0)
    with torch.inference_mode():
        ours(torch.arange(5)[None])
    ours(torch.arange(5)[None]).sum().backward()


# Folders


def test_sharded_folders(tmp_path, monkeypatch):
    """Large models come in several files with an index; ours must be split alike and read by
    both."""
    ours = random_init(SMALL, 0)
    monkeypatch.setattr(pretrained, "SHARD_BYTES", 20_000)
    save_pretrained(ours, tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    again = load_pretrained(tmp_path / "sharded")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters()))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    again = load_pretrained(tmp_path / "theirs")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters()))
    next((tmp_path / "theirs").glob("model-00002*")).unlink()
    with pytest.raises(UserError, match=r"model-00002.* is missing"):
        load_pretrained(tmp_path / "theirs")
    for broken in (["model-00001"], {"lm_head.weight": 3}, None):
        index = tmp_path / "theirs" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": broken}))
        with pytest.raises(UserError, match=r"index.json: weight_map should name a file"):
            load_pretrained(tmp_path / "theirs")


def test_saving_replaces_and_an_interrupted_save_leaves_the_old_folder(tmp_path, monkeypatch):
    """Killed while writing: the folder there before must stay whole, and the next save must not
    trip over the rest."""
    first, second = random_init(SMALL, 0), random_init(SMALL, 1)
    save_pretrained(first, tmp_path / "model")
    with monkeypatch.context() as patch:
        # It dies between the weights and config.json.
        patch.setattr(pretrained, "config_to_hf", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_pretrained(second, tmp_path / "model")
    assert torch.equal(load_pretrained(tmp_path).head_weight, first.head_weight)
    save_pretrained(second, tmp_path / "model", weights=dict(second.named_parameters()))
    assert torch.equal(load_pretrained(tmp_path).head_weight, second.head_weight)
    assert load_pretrained(tmp_path).config.eos_ids == (2, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_touches_nothing_of_others_and_keeps_the_last_good_copy(tmp_path, monkeypatch):
    """A user's own model.old deleted in silence; or, after a crash between the two renames, the
    only copy."""
    for neighbour in ("model.old", "model.partial"):
        (tmp_path / neighbour).mkdir()
        (tmp_path / neighbour / "mine").write_text("precious")
    for seed in (0, 1):
        save_pretrained(random_init(SMALL, seed), tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.old", "model.partial"}
    for neighbour in ("model.old", "model.partial"):
        assert (tmp_path / neighbour / "mine").read_text() == "precious"
    (tmp_path / "model").rename(tmp_path / ".model.old")  # as the crash leaves it
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "config_to_hf", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_pretrained(random_init(SMALL, 2), tmp_path / "model")
    load_pretrained(tmp_path / ".model.old")
    save_pretrained(random_init(SMALL, 2), tmp_path / "model")
    assert not (tmp_path / ".model.old").exists()


def test_run_folder_is_recognised(tmp_path):
    """A run has a config.json of its own, its flags: --model RUN must mean RUN/model and never read
    the flags."""
    save_pretrained(random_init(SMALL, 0), tmp_path / "model")
    (tmp_path / "config.json").write_text('{"steps": 10}')
    assert model_folder(tmp_path) == model_folder(tmp_path / "model") == tmp_path / "model"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        (
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "sliding-window",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type yarn is not supported"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
            "rope_type dynamic is not supported",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope parameters .* expected"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "rope parameters .* expected",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported for qwen3"),
        ({"num_key_value_heads": 3}, "key/value heads must divide"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is 2"),
        (
            {"model_type": "llama", "head_dim": None, "num_attention_heads": 0},
            "num_attention_heads is 0",
        ),
        (
            {"model_type": "llama", "head_dim": None, "num_attention_heads": "2"},
            "num_attention_heads is 2",
        ),
        ({"max_position_embeddings": "long"}, "max_position_embeddings is long"),
        ({"eos_token_id": "end"}, r"eos_token_id is \['end'\]"),
        ({"layer_types": 3}, "layer_types is 3"),
        (
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": "a"},
            "max_window_layers is a",
        ),
        ({"rope_scaling": "x"}, "rope_scaling is x"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "big"}}, "rope_theta is big"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "factor is 4"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type .* is not supported"),
        (
            {"num_hidden_layers": 3},
            "11 tensors are missing, the first is model.layers.2.input_layernorm.weight",
        ),
        ({"num_hidden_layers": 1}, "11 tensors do not belong to the model"),
        ({"vocab_size": 51}, r"embed_tokens.weight is torch.float32 \[50, 32\]"),
    ],
)
def test_what_cannot_be_computed_is_refused(tmp_path, changes, message):
    """An option read over in silence gives a model that is subtly wrong: each must be one clear
    line."""
    save_pretrained(random_init(SMALL, 0), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    raw = json.loads(path.read_text())
    if "rope_scaling" in changes:
        del raw["rope_parameters"]
    if "eos_token_id" in changes:
        (path.parent / "generation_config.json").unlink()
    raw |= changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path)


def test_harmless_options_are_accepted(tmp_path):
    """Refusing too much is a bug too: Qwen folders carry window settings that are switched off."""
    save_pretrained(random_init(SMALL, 0), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    off = {
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 1,
        "attention_dropout": 0.0,
        "layer_types": ["full_attention"] * 2,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | off))
    load_pretrained(tmp_path)


def test_broken_folders_are_refused(tmp_path):
    """Missing, empty, truncated, half-written: never a traceback from deep inside, never a
    half-filled model."""
    for path, message in ((tmp_path / "absent", "no such folder"), (tmp_path, "holds no model")):
        with pytest.raises(UserError, match=message):
            load_pretrained(path)
    folder = tmp_path / "model"
    save_pretrained(random_init(SMALL, 0), folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[:-1], whole[:100], b"", b"{}"):
        weights.write_bytes(broken)
        with pytest.raises(UserError, match="truncated"):
            load_pretrained(folder)
    tensors = load_file_from(whole, tmp_path)
    integers = {"model.norm.weight": tensors["model.norm.weight"].to(torch.int8)}
    save_file(tensors | integers, weights)
    with pytest.raises(UserError, match=r"torch.int8"):
        load_pretrained(folder)
    save_file({**tensors, "model.layers.0.self_attn.q_proj.lora_A": torch.zeros(2)}, weights)
    with pytest.raises(UserError, match=r"do not belong to the model, the first is .*lora_A"):
        load_pretrained(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"model.safetensors is missing"):
        load_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"cannot read .*config.json"):
        load_pretrained(folder)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"cannot read .*config.json"):
        load_pretrained(folder)


def test_what_is_no_folder_says_how_to_get_one(tmp_path, monkeypatch):
    """A hub's name that cannot be fetched, and a run under way: the line says what to do."""

    def offline(*args, **flags):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "rl" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "rl" / "config.json").write_text('{"recipe": "t1"}')
    for name, message in (
        ("Qwen/Qwen2.5-0.5B", "no such folder: Qwen/Qwen2.5-0.5B, .* the hub does not answer"),
        ("Qwen2.5-0.5B", r"no such folder: Qwen2.5-0.5B \(a model .* is ORG/NAME\)"),
        ("runs/sft/", "no such folder: runs/sft"),
        ("runs/sft", "no such folder: runs/sft"),
        ("runs/rl", "has not finished.* --resume.* rl.py --export DIR"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_pretrained(name)
        assert "\n" not in str(error.value)


def test_fingerprints_are_of_contents(tmp_path):
    """A fingerprint that looks at names, times or sizes, or only at some of the weights."""
    save_pretrained(random_init(SMALL, 0), tmp_path / "run" / "model")
    save_pretrained(random_init(SMALL, 0), tmp_path / "other")
    (tmp_path / "other" / "README.md").write_text("of no account")
    one = pretrained.fingerprint(tmp_path / "run")
    assert one == pretrained.fingerprint(tmp_path / "other")
    weights = tmp_path / "other" / "model.safetensors"
    whole = weights.read_bytes()
    for place in (len(whole) // 2, len(whole) - 1):
        changed = bytearray(whole)
        changed[place] ^= 1
        weights.write_bytes(changed)
        assert pretrained.fingerprint(tmp_path / "other") != one
    weights.write_bytes(whole)
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    assert pretrained.fingerprint(tmp_path / "other") != one


def load_file_from(content: bytes, folder) -> dict[str, torch.Tensor]:
    (folder / "copy.safetensors").write_bytes(content)
    return load_file(folder / "copy.safetensors")


def test_a_stored_copy_of_a_tied_head_must_be_that_copy(tmp_path):
    """Some tied folders store lm_head too. Equal: fine. Different: which one is meant? Refused."""
    ours = random_init(ModelConfig(50, 32, 1, 4, 4, 8, 48, tied=True), 0)
    save_pretrained(ours, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    assert torch.equal(load_pretrained(tmp_path).head_weight, ours.head_weight)
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError, match="lm_head"):
        load_pretrained(tmp_path)
