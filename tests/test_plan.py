"""benchmarks/plan.py: the plan of a training run adds up, its activations are those that a real
block keeps, and the flags that it names make a run fit."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro

import rl
from cli import UserError
from model import Block, ModelConfig, causal_attention, random_init, rotations, save_pretrained

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "plan.py"
sys.path.insert(0, str(FILE.parent))

import plan as planning  # noqa: E402
from plan import GB, outcome, plan, saved_bytes, table  # noqa: E402

QWEN_32B = ModelConfig(152064, 5120, 64, 40, 8, 128, 27648, family="qwen2", qkv_bias=True)
QWEN_14B = ModelConfig(152064, 5120, 48, 40, 8, 128, 13824, family="qwen2", qkv_bias=True)
QWEN_7B = ModelConfig(152064, 3584, 28, 28, 4, 128, 18944, family="qwen2", qkv_bias=True)
QWEN_1_5B = ModelConfig(
    151936, 1536, 28, 12, 2, 128, 8960, family="qwen2", qkv_bias=True, tied=True
)
SMALL = ModelConfig(vocab_size=64, dim=64, layers=3, heads=4, kv_heads=2, head_dim=16, mlp_dim=160)

CONFIG_32B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 27648,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


def rl_run(gpus: int, max_tokens: int, **flags):
    """The flags of T1's own RL: 32 prompts of 64 responses."""
    return planning.Config("", gpus, max_tokens=max_tokens, **flags)


def sft_run(gpus: int, max_tokens: int, **flags):
    return planning.Config("", gpus, max_tokens=max_tokens, sft=True, **flags)


# --- what is counted ------------------------------------------------------------------------------


def test_7b_by_hand():
    """Guards against a part that is forgotten, counted twice, or not divided: Qwen2.5-7B on 8 GPUs.
    Every number here is from its config.json, with a pencil."""
    parts = plan(QWEN_7B, rl_run(8, 8192, recompute=True), at_once=10)
    matrices = 3584 * (28 + 4 + 4) * 128 + 28 * 128 * 3584 + 3 * 3584 * 18944
    block = matrices + (28 + 4 + 4) * 128 + 2 * 3584  # biases of q, k and v; two norms
    outside = 2 * 152064 * 3584 + 3584
    assert 28 * block + outside == 7_615_616_512
    shard = 4 * 7_615_616_512 // 8
    assert parts["fp32 masters"] == parts["anchor, fp32"] == parts["gradients, fp32"] == shard
    assert parts["AdamW, two moments"] == 2 * shard
    assert parts["weights to compute with"] == (2 + 4) * (2 * block + outside)
    assert parts["sampler's copy"] == 2 * 7_615_616_512
    assert parts["KV cache"] == 10 * 8192 * 28 * 2 * 4 * 128 * 2
    # A block keeps, per token: of two norms the input and its quotient in fp32 and the result in
    # bf16, the projections, the turned queries and keys, what attention gives, gate and up, and two
    # products of them.
    kept = 2 * (4 + 4 + 2) * 3584 + 2 * 128 * ((28 + 8) + (28 + 4) + 28) + 2 * 18944 * (2 + 1 + 1)
    stream = 4 * 3584
    activations = 8192 * (kept + (28 + 4) * stream)
    assert parts["activations"] == pytest.approx(activations, rel=0.002)
    training = 4 * shard + parts["gradients, fp32"] + parts["weights to compute with"]
    assert (
        parts["in training"]
        == training
        + parts["activations"]
        + parts["sampler's copy"]
        + (
            parts["KV cache"]  # 19.9 GB: no quarter of 80 GB
        )
    )


def test_32b_over_two_sampler_ranks_by_hand():
    """Guards against a vocabulary that is cut, too, or norms and cache that are not: each of two
    GPUs has half of the heads, of their biases, and of the MLP."""
    parts = plan(QWEN_32B, rl_run(64, 16_384, sampler_ranks=2), at_once=10)
    matrices = 5120 * (40 + 8 + 8) * 128 + 40 * 128 * 5120 + 3 * 5120 * 27648
    biases = (40 + 8 + 8) * 128
    outside = 2 * 152064 * 5120 + 5120
    assert 64 * (matrices + biases + 2 * 5120) + outside == 32_763_876_352
    half = 64 * ((matrices + biases) // 2 + 2 * 5120) + outside
    assert parts["sampler's copy"] == 2 * half
    assert parts["KV cache"] == 10 * 16_384 * 64 * 2 * 4 * 128 * 2
    assert parts["fp32 masters"] == 4 * 32_763_876_352 // 64  # training knows nothing of it


def test_what_is_divided_and_what_is_whole():
    """Sixteen bytes per parameter are divided among the GPUs; the sampler's copy, two bytes, is
    not. SFT has neither it nor an anchor."""
    for gpus in (8, 16, 64):
        parts = plan(QWEN_32B, sft_run(gpus, 8192))
        shard = 4 * 32_763_876_352 // gpus
        assert parts["fp32 masters"] == parts["gradients, fp32"] == shard
        assert parts["AdamW, two moments"] == 2 * shard
        assert parts["sampler's copy"] == parts["KV cache"] == parts["anchor, fp32"] == 0
        parts = plan(QWEN_32B, rl_run(gpus, 8192))
        assert parts["sampler's copy"] == 2 * 32_763_876_352
        assert parts["anchor, fp32"] == shard


def test_training_and_sampling_take_turns():
    """Guards against a sum of both phases: a large sampler gives copy and cache back while the
    policy is trained. A small one keeps them, and a plan that forgot it would promise too much."""
    run = rl_run(64, 1024, recompute=True)
    always = ("fp32 masters", "AdamW, two moments", "anchor, fp32")
    training = (*always, "gradients, fp32", "weights to compute with", "activations")
    sampling = (*always, "sampler's copy", "KV cache")
    for shape, at_once, stays in ((QWEN_32B, 1, False), (QWEN_7B, 10, True), (QWEN_7B, 200, False)):
        parts = plan(shape, run, at_once)
        sampler = parts["sampler's copy"] + parts["KV cache"]
        assert (sampler <= 20 * GB) == stays
        trained = sum(parts[name] for name in training)
        assert parts["in training"] == trained + sampler * stays
        assert parts["in sampling"] == sum(parts[name] for name in sampling)
        assert parts["peak"] == max(parts["in training"], parts["in sampling"])


def test_a_recipe_holds_what_its_kl_needs():
    """Guards against an anchor that is counted though a recipe has no KL, and against a first
    policy that is counted beside the fixed anchor that it is."""
    copies = {}
    for recipe in rl.RECIPES:
        for start_kl in (False, True):
            parts = plan(QWEN_7B, rl_run(8, 1024, recipe=recipe, start_kl=start_kl))
            held = parts["anchor, fp32"] + parts["first policy, fp32"]
            copies[recipe, start_kl] = held / parts["fp32 masters"]
    for recipe in ("dr_grpo", "dapo", "reinforce"):
        assert copies[recipe, False] == 0 and copies[recipe, True] == 1
    assert copies["grpo", False] == copies["grpo", True] == 1
    assert copies["t1", False] == 1 and copies["t1", True] == 2


def test_float32_holds_more_and_alone_needs_no_copy():
    """Guards against a plan of float32 that counts two bytes, forgets the mask of its attention, or
    gives a lone GPU the copy that it does not make."""
    two = plan(QWEN_1_5B, rl_run(2, 4096, dtype="float32", recompute=True))
    half = plan(QWEN_1_5B, rl_run(2, 4096))
    for name in ("sampler's copy", "KV cache"):
        assert two[name] == 2 * half[name]
    # Per token of a block: of two norms the input, its quotient and the result; the turned queries
    # and keys; keys and values once for each of 12 heads; what attention gives; gate and up, and
    # two products of them.
    heads = 128 * ((12 + 2) + 12 + 12 + 12)
    block = 4 * (2 * 3 * 1536 + heads + 8960 * (2 + 1 + 1))
    mask = (1 + 4) * 8192 * 4096
    activations = 8192 * (block + (28 + 4) * 4 * 1536) + mask  # the mask is a twentieth
    assert two["activations"] == pytest.approx(activations, rel=0.005)
    alone = plan(QWEN_1_5B, rl_run(1, 4096, dtype="float32"))
    assert alone["sampler's copy"] == alone["weights to compute with"] == 0 < alone["KV cache"]
    offloaded = plan(QWEN_1_5B, rl_run(1, 4096, dtype="float32", offload=True))
    assert offloaded["sampler's copy"] == 4 * 1_543_714_304  # it cannot sample from the host


def test_offload_leaves_what_computes():
    """Guards against states that are counted on the GPU and on the host, or on neither: 20 bytes
    per parameter, Qwen2.5-1.5B on one card."""
    run = rl_run(1, 2048, recompute=True, offload=True)
    parts = plan(QWEN_1_5B, run)
    for name in ("fp32 masters", "AdamW, two moments", "anchor, fp32", "gradients, fp32"):
        assert parts[name] == 0
    host = planning.on_host(QWEN_1_5B, run)
    assert host["offloaded"] == (4 + 8 + 4 + 4) * 1_543_714_304
    assert host["checkpoint"] == (4 + 8 + 4) * 1_543_714_304
    assert host["loading"] == 4 * 1_543_714_304 + 4 * 151936 * 1536  # the largest tensor
    there = plan(QWEN_1_5B, dataclasses.replace(run, offload=False))
    assert parts["activations"] == there["activations"]
    # FSDP gathers two blocks and the root group; their fp32 shards come from the host. Without it,
    # autocast rounds all of the weights.
    block, outside = planning.counts(QWEN_1_5B).block, planning.counts(QWEN_1_5B).outside
    assert parts["weights to compute with"] == (2 + 4 + 4) * (2 * block + outside)
    assert there["weights to compute with"] == 2 * (1_543_714_304 + block)
    elsewhere = planning.on_host(QWEN_1_5B, rl_run(4, 2048))
    assert elsewhere["offloaded"] == 0 and elsewhere["loading"] == 4 * 151936 * 1536


def test_saved_bytes_are_those_of_a_real_block():
    """The meta pass must see what a real one keeps (a stand-in attention that saved T x T scores
    would not)."""
    tokens, seen = 256, {}
    block = Block(SMALL, 0, dtype=torch.bfloat16)
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}

    def keep(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(1, tokens, SMALL.dim, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(
            x,
            rotations(SMALL, torch.arange(tokens)[None]),
            lambda *args: causal_attention(None, *args),
        )
    real = sum(
        tensor.untyped_storage().nbytes() for key, tensor in seen.items() if key not in weights
    )
    assert abs(saved_bytes(SMALL, tokens) / real - 1) < 0.1


def test_recompute_saves_activations():
    """With --recompute a block keeps only its input: a plan without that would refuse runs that
    fit."""
    kept = plan(QWEN_32B, sft_run(8, 8192))["activations"]
    assert kept > 10 * plan(QWEN_32B, sft_run(8, 8192, recompute=True))["activations"]


# --- whether it fits, and with which flags --------------------------------------------------------


def fits(text: str) -> bool:
    """Of a table's lines, the one that a user looks for."""
    (line,) = (line for line in text.splitlines() if line.startswith("fits "))
    return {"yes": True, "no": False}[line.split()[-1]]


def named_flags(text: str, script: str = "rl.py") -> list[str]:
    """The line to copy, in words."""
    begin = f"the flags of {script}:"
    (line,) = (line for line in text.splitlines() if line.startswith(begin))
    return line.removeprefix(begin).split()


RUNS = {
    "32B": (QWEN_32B, rl_run(64, 16_384), "--recompute --sampler-ranks 2"),
    "14B": (QWEN_14B, rl_run(32, 10_240), "--recompute"),
    "7B": (QWEN_7B, rl_run(8, 8192), "--recompute"),
    "7B, 141 GB": (QWEN_7B, rl_run(8, 8192, gpu_gb=141), ""),
    "7B, 36 GB": (QWEN_7B, rl_run(8, 2048, gpu_gb=36), "--recompute --micro-tokens 4096"),
    "7B, 24 GB": (
        QWEN_7B,
        rl_run(16, 2048, gpu_gb=24),
        "--recompute --micro-tokens 2048 --sampler-ranks 2",
    ),
    "1.5B, 24 GB": (QWEN_1_5B, rl_run(1, 2048, gpu_gb=24), "--recompute --offload"),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_flags_that_are_named_make_it_fit(name: str):
    """Guards against a line to copy that is not the plan that was printed, against flags that do
    not help, and against one that costs time and is not needed."""
    shape, asked, expected = RUNS[name]
    text = table(shape, asked)
    words = named_flags(text)
    length = ["--max-tokens", str(asked.max_tokens)]
    assert fits(text) and sorted(words) == sorted([*expected.split(), *length])
    size = ["--model", "", "--gpus", str(asked.gpus), "--gpu-gb", str(asked.gpu_gb)]
    copied = tyro.cli(planning.Config, args=[*size, *words])
    assert outcome(shape, copied).missing == 0
    again = table(shape, copied)
    assert "planned with" not in again and named_flags(again) == words
    # Without any one of them it does not fit.
    for field in dataclasses.fields(asked):
        before = getattr(asked, field.name)
        if before != getattr(copied, field.name):
            less = dataclasses.replace(copied, **{field.name: before})
            assert outcome(shape, less).missing > 0, field.name


def test_what_a_plan_adds_it_says():
    """Guards against a "yes" of another run than the one that was asked for, and says how much was
    missing."""
    text = table(QWEN_32B, rl_run(64, 16_384))
    asked = outcome(QWEN_32B, rl_run(64, 16_384)).missing / GB
    assert (
        f"{asked:.1f} GB are missing as asked: planned with --recompute --sampler-ranks 2" in text
    )
    fitting = rl_run(64, 16_384, recompute=True, sampler_ranks=4)
    text = table(QWEN_32B, fitting)
    assert "as asked" not in text
    assert named_flags(text)[2:] == ["--recompute", "--sampler-ranks", "4"]


def test_choices_cost_more_and_more():
    """Guards against --offload where a third more time would do, against micro-batches shorter than
    a sequence, and against groups of GPUs that do not divide."""
    choices = list(planning.choices(QWEN_7B, rl_run(8, 3000)))
    assert choices[0] == rl_run(8, 3000)
    assert choices[1] == rl_run(8, 3000, recompute=True)
    assert [c.micro_tokens for c in choices[:6:2]] == [None, 4096, 3000]
    assert [c.sampler_ranks for c in choices[:18:6]] == [1, 2, 4]  # four key heads: no 8
    assert not any(c.offload for c in choices[:18]) and all(c.offload for c in choices[18:])
    assert len(choices) == len(set(choices)) == 36
    assert {c.sampler_ranks for c in planning.choices(QWEN_7B, rl_run(6, 3000))} == {1, 2}
    assert {c.sampler_ranks for c in planning.choices(QWEN_7B, sft_run(8, 3000))} == {1}


def test_nothing_fits_says_what_is_missing():
    """Guards against a "no" that leaves a user alone: 32B needs 65.5 GB for its copy on one GPU."""
    run = rl_run(1, 1024, gpu_gb=24)
    text = table(QWEN_32B, run)
    assert not fits(text) and "the flags of" not in text and "TFLOP/s" not in text
    best = planning.first_that_fits(QWEN_32B, run)
    row = 1024 * 65 * 2 * 8 * 128 * 2  # one layer more than there are
    lacking = (2 * 32_763_876_352 + row / 0.8 - 0.9 * 24 * GB) / GB
    assert outcome(QWEN_32B, best).missing / GB == pytest.approx(lacking, abs=1e-6)
    assert f"{lacking:.1f} GB are missing on each GPU" in text


def test_sft_has_flags_of_its_own():
    """Guards against rl.py's flags in a plan for sft.py. 32B fits 16 GPUs of 80 GB with
    --recompute, 8 only with --offload."""
    text = table(QWEN_32B, sft_run(16, 8192))
    assert fits(text) and named_flags(text, "sft.py") == ["--max-length", "8192", "--recompute"]
    assert "KV cache" not in text and "sequences at once" not in text
    text = table(QWEN_32B, sft_run(8, 8192))
    assert fits(text) and named_flags(text, "sft.py")[-2:] == ["--recompute", "--offload"]
    with pytest.raises(UserError, match=r"sft.py has no --sampler-ranks"):
        table(QWEN_32B, sft_run(8, 8192, sampler_ranks=2))


def test_table_counts_the_sequences_that_fit():
    """Guards against a plan that calls a run impossible because all sequences do not fit at once:
    the sampler decodes fewer. Of 72 GB, 36.9 are held; four fifths of the rest, less a prefill of
    4,096 tokens, hold 13 sequences of 10,240 tokens, 49 layers of 4 KiB each position."""
    text = table(QWEN_14B, rl_run(32, 10_240, recompute=True))
    assert re.search(r"^sequences at once +13 ", text, re.MULTILINE) and fits(text)
    positions = int(0.8 * (72e9 - 4 * 4 * 14_770_033_664 / 32 - 2 * 14_770_033_664) / (49 * 4096))
    assert (positions - 4096) // 10_240 == 13
    # A GPU has 64 responses to draw, however many would fit.
    text = table(QWEN_14B, rl_run(32, 512, recompute=True))
    assert re.search(r"^sequences at once +64 ", text, re.MULTILINE)


def test_time_by_hand():
    """Guards against hours that forget the second forward of --recompute, attention, a pass of the
    anchor, or that a GPU decodes its share of the responses in rounds. T1's 14B on 32 H100s."""
    weights = 48 * (5120 * (5120 + 2 * 1024) + 5120 * 5120 + 3 * 5120 * 13824) + 152064 * 5120
    operations = 8 * (weights + 48 * 10_240 * 5120)
    assert planning.training_operations(QWEN_14B, 10_240, True) == pytest.approx(
        operations, rel=1e-3
    )  # norms, biases
    rate = 32 * 0.4 * 989e12
    tokens = 2048 * 10_240
    cache = 13 * 10_240 * 2 * 2 * 48 * 1024
    sampling = 5 * 10_240 * 1.4 * (2 * 14.77e9 + cache / 2) / 3.35e12  # 64 responses, 13 at once
    for recipe, forwards in (("t1", 2), ("dapo", 1)):
        text = table(QWEN_14B, rl_run(32, 10_240, recompute=True, recipe=recipe))
        training = tokens * operations * (1 + forwards * 2 / 8) / rate
        assert f"training {training / 60:.1f};" in text
        if recipe == "t1":
            assert f"sampling {sampling / 60:.1f}," in text
    assert "our targets" in text
    for flags in ({"gpu_gb": 64}, {"offload": True}, {"dtype": "float32", "gpu_gb": 141}):
        assert "our targets" not in table(QWEN_14B, rl_run(32, 10_240, recompute=True, **flags))


def test_table_counts_what_a_forward_pass_holds():
    """Guards against activations of one sequence where --micro-tokens lets more into a forward
    pass, cache for more responses than a GPU has to draw, and nonsense that is planned all the
    same."""
    sizes = (100, 10_240, 16_384, 20_480)
    held = [
        plan(QWEN_32B, rl_run(64, 10_240, micro_tokens=tokens))["activations"] for tokens in sizes
    ]
    assert held[0] == held[1] < held[2] < held[3]
    assert outcome(QWEN_14B, rl_run(1024, 10_240)).at_once == 2
    assert outcome(QWEN_14B, rl_run(1024, 10_240, sampler_ranks=4)).at_once == 8
    for bad in ({"gpus": 0}, {"max_tokens": 0}, {"micro_tokens": 0}, {"samples": 0}):
        with pytest.raises(UserError, match="must be at least 1"):
            table(QWEN_14B, rl_run(**({"gpus": 8, "max_tokens": 1024} | bad)))
    with pytest.raises(UserError, match="--gpu-gb"):
        table(QWEN_32B, sft_run(8, 8192, gpu_gb=0))
    with pytest.raises(UserError, match="--recipe ppo is none of t1, grpo"):
        table(QWEN_14B, rl_run(8, 1024, recipe="ppo"))
    for gpus, ranks in ((8, 3), (2, 4), (32, 16)):
        with pytest.raises(UserError, match=f"--sampler-ranks {ranks} must divide"):
            table(QWEN_14B, rl_run(gpus, 1024, sampler_ranks=ranks))


def test_flags_mean_the_same_in_rl():
    """Guards against a line to copy that leaves out a flag because it is at the plan's default,
    where rl.py has another. (--dtype: rl.py's own default is bfloat16 on a GPU.)"""
    known = {field.name: field.default for field in dataclasses.fields(rl.Config)}
    shared = [field for field in dataclasses.fields(planning.Config) if field.name in known]
    assert len(shared) >= 8
    for field in shared:
        if field.name not in ("dtype", "model"):
            assert field.default == known[field.name], field.name


# --- the command ----------------------------------------------------------------------------------


def test_the_command_reads_a_folder(tmp_path):
    """Guards against a command that cannot find the project's modules from another folder, or that
    wants weights; without --max-tokens it plans for all of the model's context."""
    save_pretrained(random_init(SMALL, 0), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    command = [sys.executable, str(FILE), "--model", "model", "--gpus", "2"]
    for words, length in (([], 2048), (["--max-tokens", "100", "--sft"], 100)):
        done = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"sequences of {length} tokens; GB on each of 2 GPUs" in done.stdout
        assert fits(done.stdout)
    done = subprocess.run(
        [*command, "--prompts", "0"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: --prompts must be at least 1")


def test_the_papers_32b_fits_80_gb(tmp_path):
    """Guards against the promise of the guide: T1's largest run, as the command has it there."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_32B))
    size = ["--gpus", "64", "--gpu-gb", "80", "--max-tokens", "16384"]
    command = [sys.executable, str(FILE), "--model", str(tmp_path), *size]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("32.76B parameters, sequences of 16384 tokens; GB on each of 64")
    assert re.search(r"^fits 80 GB \(90%\) +yes$", done.stdout, re.MULTILINE)


def test_the_guide_quotes_the_plan():
    """Guards against figures in the guide's table that the code has left behind."""
    guide = (FILE.parent.parent / "GUIDE.md").read_text()
    rows = re.findall(
        r"^\| (\d+B) on (\d+) GPUs \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| yes \| `(.+)` \|$",
        guide,
        re.MULTILINE,
    )
    assert len(rows) == 2
    for name, gpus, tokens, training, sampling, flags in rows:
        run = rl_run(int(gpus), int(tokens.replace(",", "")))
        shape = {"14B": QWEN_14B, "32B": QWEN_32B}[name]
        found = planning.first_that_fits(shape, run)
        parts = outcome(shape, found).parts
        assert planning.flags_of(found, beside=run) == flags
        assert f"{parts['in training'] / GB:.1f}" == training
        assert f"{parts['in sampling'] / GB:.1f}" == sampling
