"""Speed, memory and compiled size of kernels/, beside PyTorch and torch.compile, or Liger and cut-cross-entropy.

    python benchmarks/kernels_bench.py              # on a GPU: every row of ours
    python benchmarks/kernels_bench.py --peers      # on a GPU: the loss beside those of others
    python benchmarks/kernels_bench.py --smoke      # anywhere: the same rows end to end, at toy size
    python benchmarks/kernels_bench.py --resources  # compile for six kinds of GPU, sm_80 to sm_120 (no GPU needed)
    python benchmarks/kernels_bench.py --memory     # the CPU's peak in one step at N 4,096, V 151,936, D 896 (minutes)

Prints Markdown. Times are medians after a warm-up, by CUDA events, of contenders that take turns within one run; before
each turn a GPU clears a large buffer, which empties its cache and gives the CPU the time to start the kernels. "of
limit" is the share of what the chip could do at best: for 1, 2 and 4 the bytes that must move (each input and output
once) at the bandwidth of a copy measured in the same run; for 3, the 6 N V D operations of a plain step at the rate of
a large matrix product measured in the same run (ours does 8: it computes the logits twice). A peer that is not
installed (pip install liger-kernel cut-cross-entropy), or fails, is one line.
"""

import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli
import kernels
from benchmarks.rows import RowFile, fits, skipping
from devices import pick_device
from kernels.decoding import add_norm_kernel, rotary_write_kernel, silu_mul_kernel
from kernels.jit import triton
from kernels.logprob import accumulate_kernel, gradient_kernel
from kernels.sampling import sample_kernel
from kernels.softmax import softmax_kernel

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CAPABILITIES = (80, 86, 89, 90, 100, 120)  # A100; RTX 30; RTX 40, L40; H100, H200; B200; RTX 50


@dataclass
class Config:
    smoke: bool = False
    """Toy sizes, to see that every row runs."""
    peers: bool = False
    """The loss beside those of others (Liger, Cut Cross Entropy), instead."""
    json: str = ""
    """File to append a line of JSON to for each row. Default: benchmarks/gpu.jsonl on a GPU, none elsewhere."""
    resources: bool = False
    """Only the table of registers, spills and shared memory (and for the flags below: only their table)."""
    memory: bool = False
    """Only the CPU's peak memory in one training step."""


# ----------------------------------------------------------------------------------------------------------- compiling


def compile_kernels(capability: int, dtypes: list[str]):
    """Yields (name, resources) of every kernel for one compute capability.

    At the tile sizes that V = 151,936, D = 5,120 and heads of 128 get (Qwen2.5-32B).
    """
    sizes = {"DEEP": 4, "LANES": 2048}
    for dtype in dtypes:
        yield (
            f"softmax ({dtype})",
            _compile(softmax_kernel, capability, dtype, {"LOG": False, **sizes}, 8),
        )
        yield (
            f"log-prob, entropy: forward ({dtype})",
            _compile(accumulate_kernel, capability, dtype, sizes, 8),
        )
        yield (
            f"log-prob, entropy: backward ({dtype})",
            _compile(gradient_kernel, capability, dtype, {"BLOCK": 4096}, 8),
        )
        for cut in (False, True):
            constants = {"CUT": cut, "LANES": 4096}
            yield (
                f"sampling, min-p {cut} ({dtype})",
                _compile(sample_kernel, capability, dtype, constants, 32),
            )
        for name, kernel, constants, warps in (
            ("decoding: add, norm", add_norm_kernel, {"LANES": 8192}, 16),
            ("decoding: rotary, write", rotary_write_kernel, {"NORM": False, "LANES": 128}, 1),
            ("decoding: norm, rotary, write", rotary_write_kernel, {"NORM": True, "LANES": 128}, 1),
            ("decoding: silu, times", silu_mul_kernel, {"BLOCK": 1024}, 4),
        ):
            yield f"{name} ({dtype})", _compile(kernel, capability, dtype, constants, warps)


def _compile(kernel, capability, dtype, constants, warps):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(("columns", "stride", "out_stride", "state_stride", "start"), "i32")
    types |= dict.fromkeys(("heads", "kv_heads", "head_dim", "rope_dim"), "i32")
    types |= dict.fromkeys(("scale", "min_p", "eps"), "fp32")
    types |= dict.fromkeys(("logits", "out", "added", "weight", "gate_up"), f"*{dtype}")
    types |= dict.fromkeys(("qkv", "q_weight", "k_weight", "keys", "values"), f"*{dtype}")
    types |= dict.fromkeys(("targets", "seeds", "positions", "token", "places"), "*i64")
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    aligned = [i for i, type_ in enumerate(signature.values()) if type_[0] == "*" or type_ == "i32"]
    source = ASTSource(
        kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = {
        name: int(value)
        for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage.stdout)
    }
    return {
        "registers": found["REG"],
        "spilled bytes": found["STACK"]
        + found["LOCAL"],  # a spill lives on the stack, in local memory
        "shared bytes": compiled.metadata.shared,
    }


def print_resources():
    heads = " | ".join(f"sm_{c}: registers, spilled, shared" for c in CAPABILITIES)
    print(f"| kernel | {heads} |\n|---|" + "---|" * len(CAPABILITIES))
    columns = [dict(compile_kernels(c, ["bf16", "fp32"])) for c in CAPABILITIES]
    for name in columns[0]:
        print(
            f"| {name} | "
            + " | ".join(", ".join(str(v) for v in column[name].values()) for column in columns)
            + " |"
        )


# -------------------------------------------------------------------------------------------------------------- memory


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def print_cpu_memory(rows=4096, vocabulary=151936, width=896):
    """Peak of the process above what was there before the step, less the gradients that the step must leave behind."""
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = (torch.randn(vocabulary, width) * 0.02).requires_grad_()
    targets = torch.randint(vocabulary, (rows,))
    before, peak, done = resident(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    logprob, entropy = kernels.linear_logprob_entropy(hidden, weight, targets, 1.2)
    (logprob.mean() + 0.01 * entropy.mean()).backward()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    gradients = 4 * (hidden.numel() + weight.numel())
    logits = 4 * rows * vocabulary
    extra = peak[0] - before - gradients
    print(
        f"One step on the CPU, N {rows:,}, V {vocabulary:,}, D {width}, fp32, {torch.get_num_threads()} thread(s)\n"
    )
    print(
        "| the logits would take | peak above the start | of it the gradients | the rest | rest / logits | seconds |"
    )
    print("|---|---|---|---|---|---|")
    sizes = " | ".join(
        f"{size / 2**20:,.0f} MiB" for size in (logits, peak[0] - before, gradients, extra)
    )
    print(f"| {sizes} | {extra / logits:.4f} | {seconds:.0f} |")


# --------------------------------------------------------------------------------------------------------------- timing


def median_ms(functions: dict, repeats: int) -> dict[str, float]:
    """Median milliseconds of each, taking turns; a contender that fails is reported by its error instead."""
    times = {name: [] for name in functions}
    for turn in range(repeats + 2):
        for name, function in functions.items():
            if isinstance(times[name], str):
                continue
            try:
                _busy()
                begin = _now()
                function()
                end = _now()
                if turn >= 2:
                    times[name].append(_elapsed(begin, end))
            except Exception as error:  # whatever a peer does: the others have their turn
                times[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:60]}"
    return {
        name: value if isinstance(value, str) else statistics.median(value)
        for name, value in times.items()
    }


def _busy() -> None:
    """Occupy the GPU for about 0.7 ms, as training does: kernels wait for it, not for their launch."""
    if CUDA:
        torch.empty(2**31, dtype=torch.uint8, device=DEVICE).zero_()


def _now():
    if not CUDA:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(begin, end):
    if not CUDA:
        return 1000 * (end - begin)
    end.synchronize()
    return begin.elapsed_time(end)


def extra_bytes(function, inputs: tuple) -> int:
    """Peak device memory above the start of the call, the gradients of the inputs included."""
    if not CUDA:
        return 0
    for tensor in inputs:
        tensor.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def limits(smoke: bool) -> tuple[float, float]:
    """(bytes per ms of a copy, read plus written; operations per ms of a bf16 matrix product), measured here."""
    n = 2**20 if smoke else 2**31
    side = 256 if smoke else 8192
    source, target = (
        torch.empty(n, dtype=torch.uint8, device=DEVICE).random_(),
        torch.empty(n, dtype=torch.uint8, device=DEVICE),
    )
    a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    ms = median_ms({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, 10)
    print(
        f"copy: {2 * n / ms['copy'] / 1e9:.2f} TB/s; matrix product: {2 * side**3 / ms['matmul'] / 1e9:.0f} TFLOP/s\n"
    )
    return 2 * n / ms["copy"], 2 * side**3 / ms["matmul"]


def print_rows(
    title: str, functions: dict, limit_ms: float, repeats: int, file: RowFile, memory: tuple = ()
):
    """Time and print contenders. memory: the inputs that get gradients, if memory is measured, too."""
    times = median_ms(functions, repeats)
    ours = times["ours"]
    for name, value in times.items():
        if isinstance(value, str):
            print(f"| {title} | {name} | skipped: {value} | | | |")
            continue
        numbers = {"ms": value, "of limit": limit_ms / value}
        ratio = extra = ""
        if isinstance(ours, float):
            numbers["time / ours"] = value / ours
            ratio = f"{value / ours:.2f}x"
        if memory:
            numbers["extra MiB"] = extra_bytes(functions[name], memory) / 2**20
            extra = f"{numbers['extra MiB']:,.0f} MiB"
        print(
            f"| {title} | {name} | {value:.3f} | {ratio} | {limit_ms / value:.0%} | {extra} |",
            flush=True,
        )
        file.add("kernels", f"{title}: {name}", **numbers)


# ----------------------------------------------------------------------------------------------------- what is compared


def plain_logprob_entropy(logits, targets, temperature):
    logp = torch.log_softmax(logits.float() / temperature, dim=-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def plain_linear(hidden, weight, targets, temperature):
    return plain_logprob_entropy(hidden @ weight.T, targets, temperature)


def plain_sample(logits):
    logp = torch.log_softmax(logits.float() / 1.2, dim=-1)
    token = (logp - torch.empty_like(logp).exponential_().log()).argmax(-1)
    return token, logp.gather(1, token[:, None])[:, 0]


def compiled(function):
    return torch.compile(function, dynamic=False) if CUDA else function


def step(function, inputs, targets, entropy: float, backward: bool = True):
    """A closure: forward, or forward and backward of mean log-prob + entropy * mean entropy."""

    def run():
        for tensor in inputs:
            tensor.grad = None
        with torch.set_grad_enabled(backward):
            out = function(*inputs, targets, 1.2)
        if backward:
            (out[0].mean() + entropy * out[1].mean() if entropy else out[0].mean()).backward()

    return run


def peers() -> dict:
    """Fused losses of others, as function(hidden, weight, targets, temperature) -> (-loss,): no entropy among them."""
    found = {}
    with skipping("Liger", Exception):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger"] = lambda h, w, y, t: (-liger(w, h, y),)
    with skipping("Cut Cross Entropy", Exception):
        from cut_cross_entropy import linear_cross_entropy

        found["CCE"] = lambda h, w, y, t: (-linear_cross_entropy(h, w, y),)
        found["CCE, no filter"] = lambda h, w, y, t: (
            -linear_cross_entropy(h, w, y, impl="cce_exact"),
        )
    return found


def print_from_logits(smoke: bool, bandwidth: float, file: RowFile):
    rows, vocabulary = (4, 1000) if smoke else (8192, 151936)
    repeats = 2 if smoke else 10
    logits = torch.randn(rows, vocabulary, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    traffic = rows * vocabulary * 2  # bytes of reading the logits once
    table = {"ours": kernels.softmax, "PyTorch": lambda z: torch.softmax(z, -1)}
    table["torch.compile"] = compiled(lambda z: torch.softmax(z.float(), -1).to(z.dtype))
    with torch.no_grad():
        softmaxes = {name: (lambda f=f, z=logits: f(z)) for name, f in table.items()}
        print_rows("1 softmax", softmaxes, 2 * traffic / bandwidth, repeats, file)
    table = {"ours": kernels.logprob_entropy, "PyTorch": plain_logprob_entropy}
    table["torch.compile"] = compiled(plain_logprob_entropy)
    for title, backward, factor in (
        ("2 log-prob, entropy: forward", False, 1),
        ("2 forward + backward", True, 3),
    ):
        functions = {name: step(f, [logits], targets, 0.01, backward) for name, f in table.items()}
        print_rows(title, functions, factor * traffic / bandwidth, repeats, file)
    del logits, softmaxes, functions  # on a GPU: 2.5 GB and as much again of gradient
    for dtype in (torch.bfloat16, torch.float32):
        batch = rows if smoke else 1024
        z = torch.randn(batch, vocabulary, device=DEVICE, dtype=dtype)
        seeds, positions = (
            torch.arange(batch, device=DEVICE),
            torch.zeros(batch, dtype=torch.int64, device=DEVICE),
        )
        fast = compiled(plain_sample)
        functions = {
            "ours": lambda z=z, s=seeds, p=positions: kernels.sample_token(z, 1.2, 1.0, 0.0, s, p),
            "ours, min-p 0.05": lambda z=z, s=seeds, p=positions: kernels.sample_token(
                z, 1.2, 1.0, 0.05, s, p
            ),
            "ours, top-p 0.95": lambda z=z, s=seeds, p=positions: kernels.sample_token(
                z, 1.2, 0.95, 0.0, s, p
            ),
            "PyTorch": lambda z=z: plain_sample(z),
            "torch.compile": lambda z=z, f=fast: f(z),
        }
        print_rows(
            f"4 sampling, {str(dtype)[6:]}",
            functions,
            z.numel() * z.element_size() / bandwidth,
            repeats,
            file,
        )


def linear_contenders(hidden, weight, targets, others: dict | None) -> tuple[dict, dict]:
    """(forward, forward and backward) of ours and of `others`, or else of PyTorch, by name.

    The others' loss has no entropy: ours stands beside them with it and without."""
    inputs = [hidden, weight]
    ours = kernels.linear_logprob_entropy
    plain = {}
    if others is None:
        others = {}
        plain = {"PyTorch": plain_linear, "torch.compile": compiled(plain_linear)}
    forward = {
        name: step(f, inputs, targets, 0.0, False)
        for name, f in ({"ours": ours} | plain | others).items()
    }
    both = {
        "ours": step(ours, inputs, targets, 0.01),
        "ours, no entropy": step(ours, inputs, targets, 0.0),
    }
    both |= {name: step(f, inputs, targets, 0.01) for name, f in plain.items()}
    both |= {f"{name}, no entropy": step(f, inputs, targets, 0.0) for name, f in others.items()}
    return forward, both


def print_linear(smoke: bool, rate: float, width: int, others: dict | None, file: RowFile):
    rows, vocabulary = (16, 1000) if smoke else (8192, 151936)
    repeats = 2 if smoke else 5
    hidden = torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = (
        (torch.randn(vocabulary, width, device=DEVICE) / width**0.5).bfloat16().requires_grad_()
    )
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    forward, both = linear_contenders(hidden, weight, targets, others)
    limit = 2 * rows * vocabulary * width / rate
    print_rows(f"3 D {width}: forward", forward, limit, repeats, file)
    title = f"3 D {width}: forward + backward"
    print_rows(title, both, 3 * limit, repeats, file, memory=(hidden, weight))
    gradients = 2 * (hidden.numel() + weight.numel())
    print(f"(D {width}: the gradients are {gradients / 2**20:,.0f} MiB of each extra memory, the logits would take "
          f"{4 * rows * vocabulary / 2**20:,.0f} MiB in fp32)")  # fmt: skip


def print_tables(config: Config, file: RowFile) -> None:
    """Every row that fits: ours beside PyTorch, or the loss beside its peers."""
    others = peers() if config.peers else None
    bandwidth, rate = limits(config.smoke)
    print("| what | who | ms | time / ours | of limit | extra memory |\n|---|---|---|---|---|---|")
    # Logits of 8,192 x 151,936 and their gradient; then a head in fp32, in bf16, and two gradients.
    logits_bytes = 0 if config.smoke else 4 * 8192 * 151936
    if not config.peers and fits("1, 2, 4: from logits", logits_bytes, DEVICE):
        with skipping("1, 2, 4: from logits"):
            print_from_logits(config.smoke, bandwidth, file)
    for width in (64,) if config.smoke else (896, 3584, 5120):
        if fits(f"3 D {width}", 10 * 151936 * width, DEVICE):
            with skipping(f"3 D {width}"):
                print_linear(config.smoke, rate, width, others, file)


def main(config: Config) -> None:
    if config.resources:
        return print_resources()
    if config.memory:
        return print_cpu_memory()
    if not (CUDA or config.smoke):
        raise cli.UserError(
            "no GPU here: the rows are not measured; try --smoke, --resources or --memory"
        )
    if CUDA:
        pick_device("cuda")  # says what Triton's kernels still need
    name = (
        torch.cuda.get_device_name()
        if CUDA
        else f"CPU (toy sizes, TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET', 0)})"
    )
    print(
        f"{name}, torch {torch.__version__}, triton {triton.__version__ if triton else 'absent'}\n"
    )
    print_tables(config, RowFile(config.json, keep=CUDA and not config.smoke))


if __name__ == "__main__":
    cli.run(main, Config)
