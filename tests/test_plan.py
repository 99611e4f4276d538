"""benchmarks/plan.py: the plan of a training run adds up, and its activations are those that a real
block keeps."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cli import UserError
from model import Block, ModelConfig, causal_attention, random_init, rotations, save_pretrained

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "plan.py"
sys.path.insert(0, str(FILE.parent))

import plan as planning  # noqa: E402
from plan import GB, plan, saved_bytes, table  # noqa: E402

QWEN_32B = ModelConfig(152064, 5120, 64, 40, 8, 128, 27648, family="qwen2", qkv_bias=True)
QWEN_14B = ModelConfig(152064, 5120, 48, 40, 8, 128, 13824, family="qwen2", qkv_bias=True)
SMALL = ModelConfig(vocab_size=64, dim=64, layers=3, heads=4, kv_heads=2, head_dim=16, mlp_dim=160)


def rl(gpus: int, max_tokens: int, **flags):
    """The flags of T1's own RL: 32 prompts of 64 responses, activations recomputed."""
    return planning.Config("", gpus, max_tokens=max_tokens, recompute=True, **flags)


def sft(gpus: int, max_tokens: int, **flags):
    return planning.Config(
        "", gpus, max_tokens=max_tokens, sft=True, **({"recompute": True} | flags)
    )


def test_what_is_divided_and_what_is_whole():
    """Sixteen bytes per parameter are divided among the GPUs; the sampler's copy, two bytes, is
    not."""
    parameters = 32_763_876_352
    for gpus in (8, 16, 64):
        held = plan(QWEN_32B, sft(gpus, 8192))
        assert held["fp32 masters"] == held["gradients, fp32"] == 4 * parameters // gpus
        assert held["AdamW, two moments"] == 8 * parameters // gpus
        assert (
            held["inference copy, bf16"] == held["KV cache, bf16"] == held["EMA anchor, fp32"] == 0
        )
        held = plan(QWEN_32B, rl(gpus, 8192), at_once=10)
        assert held["inference copy, bf16"] == 2 * parameters
        assert held["EMA anchor, fp32"] == 4 * parameters // gpus
        # 64 layers, keys and values of 8 heads of 128, 2 bytes each: 256 KiB per position
        assert held["KV cache, bf16"] == 10 * 8192 * 262144


def test_training_and_sampling_take_turns():
    """The peak is the larger phase, not their sum: the cache is freed before the backward pass
    needs memory."""
    short = plan(QWEN_32B, rl(64, 1024), at_once=1)
    long = plan(QWEN_32B, rl(64, 1024), at_once=1000)
    always = ("fp32 masters", "AdamW, two moments", "EMA anchor, fp32", "inference copy, bf16")
    training = ("gradients, fp32", "gathered by FSDP", "activations")
    assert short["peak"] == sum(short[name] for name in (*always, *training))
    assert long["peak"] == sum(long[name] for name in always) + long["KV cache, bf16"]


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


def test_checkpointing_saves_activations():
    """With checkpointing a block keeps only its input: a plan without that would refuse runs that
    fit."""
    kept = plan(QWEN_32B, sft(8, 8192, recompute=False))["activations"]
    assert kept > 10 * plan(QWEN_32B, sft(8, 8192))["activations"]


def fits(text: str) -> bool:
    """Of a table's lines, the one that a user looks for."""
    (line,) = (line for line in text.splitlines() if line.startswith("fits "))
    return {"yes": True, "no": False}[line.split()[-1]]


def test_table_says_whether_it_fits():
    """Qwen2.5-32B by supervised fine-tuning: not on 8 GPUs of 80 GB, but on 16. The line that a
    user reads."""
    text = table(QWEN_32B, sft(8, 8192))
    assert text.startswith("32.76B parameters")
    assert not fits(text) and fits(table(QWEN_32B, sft(16, 8192)))
    assert "KV cache" not in text and "sequences at once" not in text
    assert plan(QWEN_32B, sft(8, 8192))["peak"] > planning.USABLE * 80 * GB
    assert fits(table(QWEN_32B, sft(8, 8192, gpu_gb=141)))
    with pytest.raises(UserError, match="--gpu-gb"):
        table(QWEN_32B, sft(8, 8192, gpu_gb=0))


def test_table_counts_the_sequences_that_fit():
    """Guards against a plan that calls a run impossible because 64 sequences do not fit at once:
    the sampler decodes fewer. Of 72 GB, 36.8 are held; half of the rest holds 8 sequences of 10,240
    tokens, 192 KiB each position."""
    text = table(QWEN_14B, rl(32, 10_240))
    assert re.search(r"^sequences at once +8$", text, re.MULTILINE) and fits(text)
    assert not fits(table(QWEN_32B, rl(64, 10_240)))  # the sampler's whole copy alone is 65.5 GB
    assert fits(table(QWEN_32B, rl(64, 10_240, gpu_gb=141)))


def test_time_by_hand():
    """Guards against hours that forget the second forward of --recompute, attention, or that a GPU
    decodes its share of the responses in rounds. T1's 14B on 32 H100s, as the README has it."""
    weights = 48 * (5120 * (5120 + 2 * 1024) + 5120 * 5120 + 3 * 5120 * 13824) + 152064 * 5120
    operations = 8 * (weights + 48 * 10_240 * 5120)
    assert planning.training_operations(QWEN_14B, 10_240, True) == pytest.approx(
        operations, rel=1e-3
    )  # norms, biases
    training = 2048 * 10_240 * (operations * 12 / 8) / (32 * 0.4 * 989e12)
    cache = 8 * 10_240 * 2 * 2 * 48 * 1024
    sampling = (2048 / 32 / 8) * 10_240 * 1.4 * (2 * 14.77e9 + cache / 2) / 3.35e12
    text = table(QWEN_14B, rl(32, 10_240, micro_tokens=10_240))
    assert f"sampling {sampling / 60:.1f}, training {training / 60:.1f};" in text.splitlines()[-1]
    assert "not measured" in text and "not measured" not in table(
        QWEN_14B, rl(32, 10_240, gpu_gb=64)
    )


def test_table_counts_what_a_forward_pass_holds():
    """Guards against activations of one sequence where --micro-tokens lets more into a forward
    pass, cache for more responses than a GPU has to draw, and nonsense that is planned all the
    same."""
    sizes = (100, 10_240, 16_384, 20_480)
    plans = [table(QWEN_32B, rl(64, 10_240, micro_tokens=tokens)) for tokens in sizes]
    assert plans[0] == plans[1] and len(set(plans)) == 3
    assert re.search(r"^sequences at once +2$", table(QWEN_14B, rl(1024, 10_240)), re.MULTILINE)
    for bad in ({"gpus": 0}, {"max_tokens": 0}, {"micro_tokens": 0}, {"samples": 0}):
        with pytest.raises(UserError, match="must be at least 1"):
            table(QWEN_14B, rl(**({"gpus": 8, "max_tokens": 1024} | bad)))


def test_the_command_reads_a_folder(tmp_path):
    """Guards against a command that cannot find the project's modules from another folder, or that
    wants weights; without --max-tokens it plans for all of the model's context."""
    save_pretrained(random_init(SMALL, 0), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    command = [sys.executable, str(FILE), "--model", "model", "--gpus", "2"]
    for words, length in (([], 2048), (["--max-tokens", "100", "--sft"], 100)):
        done = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"sequences of {length} tokens; GB on each of 2 GPUs" in done.stdout and fits(
            done.stdout
        )
    done = subprocess.run(
        [*command, "--prompts", "0"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: --prompts must be at least 1")
