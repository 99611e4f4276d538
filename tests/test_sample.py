"""The sampler: what it draws, that nobody else in the batch can change it, and what it says about
its own draws."""

import dataclasses
import random
import signal
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models
from torch.multiprocessing.reductions import StorageWeakRef

import cli
import cot
import kernels
import sample
from cli import UserError
from decode import CPUDecoder, can_pack
from model import ModelConfig, Transformer, load_pretrained, random_init, save_pretrained
from sample import Batch, Completion, Queue, Sampler, SamplingParams, sequence_seed
from tokenizer import Tokenizer, demo_tokenizer, load_tokenizer

EOS = 7
CONTEXT = 160
CONFIG = ModelConfig(
    vocab_size=50,
    dim=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    context=CONTEXT,
    rope_theta=100.0,
)
BLOCK = 16  # of the cache on CPU


def spread_out_model(seed: int = 0) -> Transformer:
    """Weights so large that attention matters, and a head for which the next token is neither
    certain nor uniform."""
    model = Transformer(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                scale = 1.0 if name == "embed.weight" else 2.0 * parameter.shape[1] ** -0.5
                parameter.normal_(0.0, scale, generator=generator)
    return model


MODEL = spread_out_model()
RNG = random.Random(0)
# Prompts of 1 token (nothing to prefill), around one and two blocks of the cache, and short ones.
TWO = 2 * BLOCK
LENGTHS = (1, 2, 5, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 2, TWO - 1, TWO, TWO + 1, 3, 4)
PROMPTS = [[RNG.randrange(50) for _ in range(length)] for length in LENGTHS]
PARAMS = SamplingParams(max_tokens=40, temperature=1.2, top_p=0.95, min_p=0.01, seed=3)


def tokens_of(results) -> list[list[list[int]]]:
    return [[completion.tokens for completion in row] for row in results]


def flat(results) -> list:
    return [completion for row in results for completion in row]


@pytest.fixture(scope="module")
def reference():
    """Four completions of every prompt, all in one batch: what every other arrangement must
    reproduce."""
    return Sampler(MODEL, eos_ids=[EOS]).generate(PROMPTS, 4, PARAMS)


def distribution(
    logits: torch.Tensor, temperature: float, top_p: float, min_p: float
) -> torch.Tensor:
    """Log-probabilities of one row in float64, straight from the definitions."""
    p = (logits.double() / temperature).softmax(-1)
    order = p.argsort(descending=True)
    before = p[order].cumsum(-1) - p[order]
    keep = torch.zeros_like(p, dtype=torch.bool)
    keep[order[before < top_p]] = True
    keep &= p >= min_p * p.max()
    return p.masked_fill(~keep, 0).log() - p[keep].sum().log()


# --- what is drawn --------------------------------------------------------------------------------


@torch.inference_mode()
def test_greedy_equals_transformers(smollm2):
    """A wrong position, mask or cache slot for some length in a ragged batch, or a stop token
    handled otherwise."""
    transformers = pytest.importorskip("transformers")
    text = "The capital of France is Paris. Once upon a time there was a dog who said: "
    ids = load_tokenizer(smollm2).encode(text * 5)
    lengths = (1, 2, 7, 31, 32, 33, 60)
    prompts = [ids[first : first + length] for length in lengths for first in (0, 4, 11)]
    sampler = Sampler(load_pretrained(smollm2), max_batch=16, eos_ids=[2])
    ours = sampler.generate(prompts, 1, SamplingParams(6, 0.0))
    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    # Three of a length at a time, because their generate pads ragged ones.
    for first in range(0, len(prompts), 3):
        group = torch.tensor(prompts[first : first + 3])
        theirs = reference.generate(
            group,
            attention_mask=torch.ones_like(group),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=2,
        )
        for row, completions in zip(theirs[:, group.shape[1] :].tolist(), ours[first : first + 3]):
            expected = row[: row.index(2) + 1] if 2 in row else row
            assert completions[0].tokens == expected


def test_greedy_is_the_argmax_of_a_fresh_forward():
    """Temperature 0 dividing by zero, or drawing; its log-probs are those of temperature 1."""
    params = SamplingParams(20, temperature=0.0)
    results = Sampler(MODEL, eos_ids=[EOS]).generate(PROMPTS, 2, params)
    for prompt, (first, second) in zip(PROMPTS, results):
        assert first == second
        sequence = torch.tensor([prompt + first.tokens])
        logits = MODEL.logits(MODEL(sequence))[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == first.tokens
        chosen = logits.log_softmax(-1).gather(1, sequence[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(first.logprobs), chosen, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "temperature, top_p, min_p",
    [(1.0, 1, 0), (1.2, 1, 0), (0.7, 0.8, 0), (1.2, 1, 0.1), (1.3, 0.9, 0.05)],
)
def test_logprobs_are_those_of_a_fresh_forward(temperature, top_p, min_p):
    """Log-probs of the raw policy where T, top-p or min-p changed what was drawn; a stale or
    misplaced cache entry."""
    params = SamplingParams(30, temperature, top_p, min_p)
    results = Sampler(MODEL, max_batch=5, eos_ids=[EOS]).generate(PROMPTS, 2, params)
    for prompt, row in zip(PROMPTS, results):
        for completion in row:
            sequence = torch.tensor([prompt + completion.tokens])
            with torch.no_grad():
                logits = MODEL.logits(MODEL(sequence))[0, len(prompt) - 1 : -1]
            found = torch.tensor(completion.logprobs)
            rows = [distribution(z, temperature, top_p, min_p) for z in logits]
            expected = torch.stack([row[t] for row, t in zip(rows, completion.tokens)])
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
            if (top_p, min_p) == (1, 0):  # what the trainer computes
                targets = torch.tensor(completion.tokens)
                trained, _ = kernels.logprob_entropy(logits, targets, temperature)
                torch.testing.assert_close(found, trained, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "temperature, top_p, min_p",
    [(1.0, 1, 0), (1.5, 1, 0), (1.2, 0.8, 0), (1.2, 1, 0.1), (0.8, 0.9, 0.05)],
)
def test_frequencies_match_the_distribution(temperature, top_p, min_p):
    """Draws that are correlated between samples of one prompt, or from another distribution than
    the one reported."""
    count, prompt = 6000, PROMPTS[4]
    params = SamplingParams(1, temperature, top_p, min_p, seed=1)
    drawn = Sampler(MODEL, max_batch=count).generate([prompt], count, params)[0]
    with torch.no_grad():
        logits = MODEL.logits(MODEL(torch.tensor([prompt])))[0, -1]
    p = distribution(logits, temperature, top_p, min_p).exp()
    first = torch.tensor([completion.tokens[0] for completion in drawn])
    seen = torch.bincount(first, minlength=len(p)).double()
    assert not seen[p == 0].any()
    likely = count * p >= 5
    chi_square = ((seen - count * p)[likely] ** 2 / (count * p)[likely]).sum()
    freedom = int(likely.sum())
    assert freedom > 3
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations


# --- nobody else can change a completion ----------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_a_completion_does_not_depend_on_the_batch(reference, data):
    """Refilling into a slot with old keys, a mask one short at a block boundary, rows mixed up when
    one is moved."""
    order = data.draw(st.permutations(range(len(PROMPTS))))
    order = order[: data.draw(st.integers(1, len(PROMPTS)))]
    n = data.draw(st.integers(1, 4))
    max_batch = data.draw(st.integers(1, 50))
    prefill_tokens = data.draw(st.sampled_from([1, 64, 130, 4096]))
    sampler = Sampler(MODEL, max_batch=max_batch, eos_ids=[EOS], prefill_tokens=prefill_tokens)
    results = sampler.generate([PROMPTS[i] for i in order], n, PARAMS, keys=order)
    for i, row in zip(order, results):
        for completion, expected in zip(row, reference[i][:n]):
            assert completion.tokens == expected.tokens
            assert completion.finish_reason == expected.finish_reason
            assert completion.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


@pytest.mark.parametrize("max_tokens", [BLOCK - 1, BLOCK, BLOCK + 1])
def test_block_boundaries(max_tokens):
    """A completion whose last token needs the first position of a new block (a neighbour crashed
    there)."""
    params = SamplingParams(max_tokens, temperature=1.0)
    together = tokens_of(Sampler(MODEL).generate(PROMPTS, 1, params))
    assert all(len(row[0]) == max_tokens for row in together)
    for i in (0, 3, 4, 5):
        alone = Sampler(MODEL).generate([PROMPTS[i]], 1, params, keys=[i])
        assert tokens_of(alone) == [together[i]]


def test_a_longer_limit_only_continues(reference):
    """A draw that depends on max_tokens: the first tokens must not change when more are allowed."""
    params = dataclasses.replace(PARAMS, max_tokens=9)
    shorter = Sampler(MODEL, eos_ids=[EOS]).generate(PROMPTS, 4, params)
    for short, whole in zip(flat(shorter), flat(reference)):
        assert short.tokens == whole.tokens[:9]


def test_samples_seeds_and_keys_differ():
    """The same draws for all K samples of a prompt (K = 1 in disguise), for equal prompts, or for
    another seed."""
    sampler = Sampler(MODEL)
    completions = tokens_of(sampler.generate([PROMPTS[2]] * 2, 8, SamplingParams(20)))
    completions += tokens_of(sampler.generate([PROMPTS[2]], 8, SamplingParams(20, seed=1)))
    assert len({tuple(tokens) for row in completions for tokens in row}) == 24
    words = [(seed, key, index) for seed in range(12) for key in range(12) for index in range(12)]
    seeds = {sequence_seed(*word) for word in words}
    assert len(seeds) == len(words)
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)


def test_samples_can_be_drawn_in_parts():
    """Guards against ranks that share a prompt's K samples and draw the same ones twice."""
    whole = Sampler(MODEL, eos_ids=[EOS]).generate(PROMPTS[:3], 4, SamplingParams(20))
    sampler = Sampler(MODEL, eos_ids=[EOS])
    part = sampler.generate(PROMPTS[1:3], 2, SamplingParams(20), keys=[1, 2], firsts=[2, 0])
    assert tokens_of(part) == tokens_of([whole[1][2:4], whole[2][0:2]])


def test_stream_is_generate():
    """A chat that draws otherwise than the sampler that is tested."""
    sampler = Sampler(MODEL, eos_ids=[EOS])
    for prompt in PROMPTS[:6]:
        completion = sampler.generate([prompt], 1, PARAMS)[0][0]
        assert list(sampler.stream(prompt, PARAMS)) == completion.tokens


# --- how it ends ----------------------------------------------------------------------------------


def test_stop_token_ends_and_is_included(reference):
    """The stop token dropped (its log-prob would never be trained), or tokens after it kept."""
    free = Sampler(MODEL).generate(PROMPTS, 4, PARAMS)
    reasons = set()
    for completion, unstopped in zip(flat(reference), flat(free)):
        stopped = EOS in unstopped.tokens
        length = unstopped.tokens.index(EOS) + 1 if stopped else PARAMS.max_tokens
        assert completion.tokens == unstopped.tokens[:length]
        assert completion.logprobs == pytest.approx(unstopped.logprobs[:length], abs=1e-4)
        assert completion.finish_reason == ("stop" if stopped else "length")
        reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}


def test_the_text_of_a_completion():
    """The stop token read as text, or the last token of one that was cut short left out."""

    class Numbers:
        def decode(self, tokens, skip_special):
            assert skip_special
            return " ".join(map(str, tokens))

    assert Completion([1, 2, EOS], [0.0] * 3, "stop").text(Numbers()) == "1 2"
    assert Completion([1, 2, 3], [0.0] * 3, "length").text(Numbers()) == "1 2 3"


def test_several_stop_tokens():
    """Only the first of several stop tokens (Llama 3 has three) being looked at."""
    eos = {3, 11, 30}
    for completion in flat(Sampler(MODEL, eos_ids=sorted(eos)).generate(PROMPTS, 4, PARAMS)):
        assert not eos & set(completion.tokens[:-1])
        assert (completion.tokens[-1] in eos) == (completion.finish_reason == "stop")


def test_one_token(reference):
    """max_tokens = 1 drawing two, or a stop token as the very last allowed one reported as
    truncation."""
    params = dataclasses.replace(PARAMS, max_tokens=1)
    results = Sampler(MODEL, eos_ids=list(range(25))).generate(PROMPTS, 4, params)
    for completion, expected in zip(flat(results), flat(reference)):
        assert completion.tokens == expected.tokens[:1]
        assert completion.finish_reason == ("stop" if completion.tokens[0] < 25 else "length")


def test_a_stop_token_in_the_prompt_ends_nothing():
    """Ends found by looking for the stop token in the whole row: a chat's earlier turns are full of
    them."""
    prompt = [EOS, 1, EOS, EOS]
    completion = Sampler(MODEL, eos_ids=[EOS]).generate([prompt], 1, SamplingParams(12, 0.0))[0][0]
    tokens = torch.tensor([prompt + completion.tokens])
    assert MODEL.logits(MODEL(tokens))[0, 3:-1].argmax(-1).tolist() == completion.tokens
    assert len(completion.tokens) > 1


def test_context_is_the_limit():
    """Rotary positions beyond what the model was made for, or a buffer overrun, when max_tokens
    asks for more."""
    prompt = [1] * (CONTEXT - 3)
    completion = Sampler(MODEL).generate([prompt], 1, SamplingParams(50))[0][0]
    assert (len(completion.tokens), completion.finish_reason) == (3, "length")
    with pytest.raises(UserError, match=f"context of {CONTEXT}"):
        Sampler(MODEL).generate([[1], [1] * CONTEXT], 1, SamplingParams(1))
    with pytest.raises(UserError, match="empty prompt"):
        Sampler(MODEL).generate([[1], []], 1, SamplingParams(1))


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"temperature": -1},
        {"temperature": 1e-40},
        {"temperature": 9e-4},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 2},
    ],
)
def test_bad_parameters(bad):
    """A negative temperature or an empty nucleus that samples something all the same; NaN from
    logits / 1e-40."""
    with pytest.raises(UserError, match=next(iter(bad))):
        SamplingParams(**({"max_tokens": 4} | bad))


# --- what it holds and does -----------------------------------------------------------------------


def test_a_weight_update_takes_effect():
    """Keys and values (or graphs) of the old weights serving the new ones: stale rollouts look
    almost right."""
    model = spread_out_model()
    sampler = Sampler(model, eos_ids=[EOS])
    before = sampler.generate(PROMPTS, 2, PARAMS)
    with torch.no_grad():
        for parameter, other in zip(model.parameters(), spread_out_model(seed=1).parameters()):
            parameter.copy_(other)
    after = sampler.generate(PROMPTS, 2, PARAMS)
    fresh = Sampler(spread_out_model(seed=1), eos_ids=[EOS])
    assert tokens_of(after) == tokens_of(fresh.generate(PROMPTS, 2, PARAMS))
    assert tokens_of(after) != tokens_of(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_draw_what_the_cpu_draws():
    """A graph replayed with another shape's rows or length, a moved cache or old weights: all else
    here is eager."""
    shape = dataclasses.replace(CONFIG, context=640)
    model = Transformer(shape)
    long = [RNG.randrange(50) for _ in range(300)]
    prompts = [*PROMPTS, long[:250], long]
    params = SamplingParams(40, temperature=0.0)
    on_cuda = Transformer(shape, device="cuda")
    eos = None
    sampler = Sampler(on_cuda, max_batch=5)
    for seed in (0, 1):  # the second time with other weights in the same tensors
        model.load_state_dict(spread_out_model(seed).state_dict())
        on_cuda.load_state_dict(model.state_dict())
        if eos is None:  # a token that does end some completion, half-way
            eos = Sampler(model).generate(prompts, 1, params)[0][0].tokens[20]
            sampler.eos_ids = [eos]
        expected = Sampler(model, eos_ids=[eos]).generate(prompts, 6, params)
        assert tokens_of(sampler.generate(prompts, 6, params)) == tokens_of(expected)


def test_free_memory_counts_what_the_page_cache_would_give_back(monkeypatch):
    """After a large download nearly all memory is page cache: counted as taken, it left the sampler
    no rows."""
    text = "MemFree:  10 kB\nMemAvailable:   2000 kB\n"
    monkeypatch.setattr(sample.Path, "read_text", lambda path: text)
    assert sample.free_memory(torch.device("cpu")) == 2000 * 1024
    monkeypatch.setattr(sample.Path, "read_text", lambda path: Path("/absent").read_bytes())
    assert sample.free_memory(torch.device("cpu")) == 8 * 2**30


def v1(limit: object, usage: int) -> dict[str, object]:
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": usage}


def v2(limit: object, usage: int) -> dict[str, object]:
    return {"memory.max": limit, "memory.current": usage}


UNLIMITED = 9223372036854771712  # what version 1 says for "no limit"
NO_LIMIT = float("inf")
ROOT_OF_V1 = {"memory": v1(UNLIMITED, 900)}
GROUPS = {  # /proc/self/cgroup, the files of each group, the bytes that are left
    "none": ("", {}, NO_LIMIT),
    "v2": ("0::/a\n", {"a": v2(100, 30)}, 70),
    "v2, throttled": ("0::/a\n", {"a": v2("max", 30) | {"memory.high": 90}}, 60),
    "v2, no limit": ("0::/a\n", {"a": v2("max", 30)}, NO_LIMIT),
    "v2, the outer is less": ("0::/a/b\n", {"a": v2(100, 80), "a/b": v2(90, 30)}, 20),
    "v2, the inner is less": ("0::/a/b\n", {"a": v2(100, 80), "a/b": v2(40, 30)}, 10),
    "v2, the outer alone": ("0::/a/b\n", {"a": v2(100, 80), "a/b": v2("max", 30)}, 20),
    "v2, in a container": ("0::/\n", {"": v2(100, 30)}, 70),
    "v2, the host's path": ("0::/docker/7\n", {"": v2(100, 30)}, 70),
    "v2, above the limit": ("0::/a\n", {"a": v2(100, 130)}, 0),
    "v2 beside v1": ("4:memory:/\n0::/a\n", {"unified/a": v2(100, 30)} | ROOT_OF_V1, 70),
    "v1": ("5:cpu:/c\n4:memory:/a\n", {"memory/a": v1(100, 30), "memory/c": v1(9, 8)}, 70),
    "v1, no limit": ("4:memory:/a\n", {"memory/a": v1(UNLIMITED, 30)}, UNLIMITED - 30),
    "v1, nested": ("4:memory:/a/b\n", {"memory/a": v1(50, 30), "memory/a/b": v1(40, 5)}, 20),
    "v1, shared": ("4:cpu,memory:/a\n", {"memory/a": v1(100, 30)}, 70),
    "v1, mounted as both": ("4:cpu,memory:/a\n", {"cpu,memory/a": v1(100, 30)}, 70),
    "v1, the host's path": ("4:memory:/docker/7\n", {"memory": v1(100, 30)}, 70),
    "v2, cached": (
        "0::/a\n",
        {"a": v2(100, 90) | {"memory.stat": "file 60\ninactive_file 40\nactive_file 20\n"}},
        70,
    ),
    "v1, cached": (
        "4:memory:/a\n",
        {
            "memory/a": v1(100, 90)
            | {"memory.stat": "inactive_file 1\ntotal_inactive_file 40\ntotal_active_file 20\n"}
        },
        70,
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_containers_memory_is_its_limit(tmp_path, monkeypatch, name):
    """Bug: a container of 2 GB on a machine of 64: the cache is sized by the machine, and the
    kernel kills the process."""
    mine, groups, left = GROUPS[name]
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(mine)
    (tmp_path / "proc" / "meminfo").write_text("MemAvailable: 2000 kB\n")
    for path, files in groups.items():
        folder = tmp_path / "sys" / "fs" / "cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (folder / file).write_text(f"{content}\n")
    assert sample.container_memory(tmp_path) == left
    monkeypatch.setattr(sample, "Path", lambda path: tmp_path if path == "/" else Path(path))
    assert sample.free_memory(torch.device("cpu")) == min(left, 2000 * 1024)


def test_a_machine_without_control_groups_has_no_such_limit(tmp_path):
    """Bug: the sampler of a machine that is no Linux ends in a traceback."""
    assert sample.container_memory(tmp_path) == NO_LIMIT


@pytest.mark.parametrize("budget", [90_000, 130_000, 300_000])
def test_memory_budget_is_respected(reference, monkeypatch, budget):
    """A cache that grows past its budget (the crash comes hours into a run), counted where it is
    largest: in a move."""
    peaks = []  # bytes of keys and values
    prefixes = []  # bytes of the prompts' that are ready
    made = []
    allocate = CPUDecoder.allocate
    prefill_next = Queue.prefill_next

    def watched(decoder, rows, capacity):
        pair = allocate(decoder, rows, capacity)
        made.extend((StorageWeakRef(tensor.untyped_storage()), tensor.nbytes) for tensor in pair)
        alive = sum(nbytes for storage, nbytes in made if not storage.expired())
        peaks.append(alive + (prefixes[-1] if prefixes else 0))
        return pair

    def watched_prefill(queue):
        prefill_next(queue)
        tensors = [tensor for job in queue.ready for pair in job.prefix for tensor in pair]
        storages = [tensor.untyped_storage() for tensor in tensors]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        prefixes.append(sum(sizes.values()))

    monkeypatch.setattr(CPUDecoder, "allocate", watched)
    monkeypatch.setattr(Queue, "prefill_next", watched_prefill)
    results = Sampler(MODEL, eos_ids=[EOS], cache_bytes=budget).generate(PROMPTS, 4, PARAMS)
    assert max(peaks) <= budget
    assert tokens_of(results) == tokens_of(reference)


@pytest.mark.parametrize(
    "slots, max_tokens, copies, packed",
    [(2, 40, 9, True), (1, 40, 9, False), (9, 8, 9, False), (2, 8, 9, True), (2, 40, 4, False)],
)
def test_weights_are_packed_only_where_it_pays(monkeypatch, slots, max_tokens, copies, packed):
    """A copy of the weights made for one sequence or a few steps, or where memory is short (7B
    models are 28 GB)."""
    if not can_pack(MODEL.head_weight):
        pytest.skip("this torch has no MKL")
    asked = []
    initialise = Batch.__init__

    def watched(batch, *args):
        asked.append(args[-1])
        initialise(batch, *args)

    monkeypatch.setattr(Batch, "__init__", watched)
    weights = sum(parameter.nbytes for parameter in MODEL.parameters())
    monkeypatch.setattr(sample, "free_memory", lambda device: copies * weights)
    sampler = Sampler(MODEL, max_batch=slots, cache_bytes=1 << 20)
    sampler.generate(PROMPTS[:2], 4, SamplingParams(max_tokens))
    assert asked == [packed]


def test_bf16_on_a_cpu():
    """The decode step that a GPU takes, in a batch on a CPU: its log-probs are the policy's, up to
    bf16's rounding."""
    model, errors = spread_out_model().bfloat16(), []
    results = Sampler(model, max_batch=5, eos_ids=[EOS]).generate(PROMPTS, 2, SamplingParams(20))
    for prompt, row in zip(PROMPTS, results):
        for completion in row:
            sequence = torch.tensor([prompt + completion.tokens])
            with torch.no_grad():
                logits = model.logits(model(sequence))[0, len(prompt) - 1 : -1].float()
            chosen = logits.log_softmax(-1).gather(1, sequence[0, len(prompt) :, None])[:, 0]
            errors.append(torch.tensor(completion.logprobs) - chosen)
    assert torch.cat(errors).abs().mean() < 0.05  # a wrong key or mask: about 1


def test_a_sequence_that_cannot_fit_is_refused():
    """An out-of-memory crash half-way, or an endless wait for room that never comes."""
    with pytest.raises(UserError, match="KV cache"):
        Sampler(MODEL, cache_bytes=20_000).generate(PROMPTS, 1, PARAMS)


def test_each_prompt_is_prefilled_once(monkeypatch):
    """Prefilling a prompt for each of its K samples: most of the work of short completions."""
    prefilled = []
    decoded = []
    step = Batch.step
    model = spread_out_model()
    model.register_forward_pre_hook(lambda module, args: prefilled.append(tuple(args[0].shape)))

    def watched(batch, rows):
        decoded.append(rows)
        step(batch, rows)

    monkeypatch.setattr(Batch, "step", watched)
    Sampler(model, max_batch=3).generate([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]], 7, SamplingParams(4))
    assert prefilled == [(2, 4)]
    assert sum(decoded) == 2 * 7 * 4  # and no decode step is spent on a finished or an empty row
    assert max(decoded) == 3


def test_nothing_to_do():
    """No prompts, or none of their samples wanted."""
    assert Sampler(MODEL).generate([], 4, PARAMS) == []
    assert Sampler(MODEL).generate([[1], [2]], 0, PARAMS) == [[], []]


# --- the command ----------------------------------------------------------------------------------


def test_show_prints_whole_characters(smollm2, capsys):
    """Half of an emoji printed as a replacement character, or characters lost when the stream ends
    in one."""
    tokenizer = load_tokenizer(smollm2)
    text = "a🙂é汉字 done"
    assert sample.show(tokenizer, iter(tokenizer.encode(text) + [2])) == text
    assert capsys.readouterr().out == text + "\n"


def test_show_keeps_the_spaces_between_tokens(capsys):
    """Words run together where a decoder drops the space that begins a text: SentencePiece's does,
    also before a special token that is not shown."""
    pieces = [
        "\u2581two",
        "\u2581and",
        "\u2581",
        "\u2581two",
        "</s>",
        "\u2581make",
        "\u2581",
        "four",
    ]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    library = tokenizers.Tokenizer(models.WordLevel(vocab))
    library.decoder = decoders.Metaspace()
    library.add_special_tokens(["</s>"])
    tokenizer = Tokenizer({"tokenizer.json": library.to_str().encode()})
    ids = [vocab[piece] for piece in pieces]
    assert tokenizer.decode(ids, skip_special=True) == "two and  two make four"
    assert sample.show(tokenizer, iter(ids)) == "two and  two make four"
    assert capsys.readouterr().out == "two and  two make four\n"


def test_ctrl_c_keeps_what_was_said(smollm2, capsys):
    """Ctrl-C in the middle of an answer ending the chat, or forgetting the half that was read."""
    tokenizer = load_tokenizer(smollm2)

    def interrupted():
        yield from tokenizer.encode("half an")
        raise KeyboardInterrupt

    assert sample.show(tokenizer, interrupted()) == "half an"


class Letters:
    """A tokenizer of one token per letter, without a template."""

    def chat(self, messages):
        return [ord(letter) % 50 for message in messages for letter in message["content"]]

    def decode(self, tokens, skip_special):
        return "." * len(tokens)


def test_a_chat_forgets_to_leave_room_and_survives_a_question_that_is_too_long(monkeypatch, capsys):
    """Answers that shrink to one token as the context fills; a question too long that ended the
    chat."""
    questions, prompts = iter(["a" * 50, "b" * 49, "c" * 200, "d" * 30]), []
    stream = Sampler.stream

    def watched(sampler, prompt, params):
        prompts.append(len(prompt))
        return stream(sampler, prompt, params)

    def ask(_):
        for question in questions:
            return question
        raise EOFError

    monkeypatch.setattr(Sampler, "stream", watched)
    monkeypatch.setattr("builtins.input", ask)
    params = SamplingParams(max_tokens=60, temperature=0.0)
    before = signal.signal(signal.SIGTERM, cli.interrupt)
    sample.chat(Sampler(MODEL, eos_ids=[]), Letters(), params)
    assert signal.signal(signal.SIGTERM, before) == signal.SIG_DFL  # it ends more than an answer
    # 50 + 60 + 49 fit the context of 160, but would leave room for one token.
    assert prompts == [50, 49, 200, 30]
    answer, second, refusal, last = capsys.readouterr().out.splitlines()
    assert len(answer) == len(second) == len(last) == 60
    assert refusal == f"error: a prompt of 200 tokens fills the model's context of {CONTEXT}"


@pytest.mark.parametrize(
    ("max_tokens", "note"),
    [
        (7, "[cut off at --max-tokens 7]"),
        (10_240, "[cut off after 155 tokens: the model's context"),
    ],
)
def test_an_answer_that_was_cut_off_says_so(capsys, max_tokens, note):
    """An answer without its end taken for a model that answers nonsense; which limit it was."""
    params = SamplingParams(max_tokens, temperature=0.0)
    prompt = [1, 2, 3, 4, 5]
    said = sample.answer(Sampler(MODEL, eos_ids=[]), Letters(), prompt, params)
    out, err = capsys.readouterr()
    assert out == said + "\n" and err.startswith(note)
    first = next(Sampler(MODEL).stream(prompt, params))
    sample.answer(Sampler(MODEL, eos_ids=[first]), Letters(), prompt, params)
    assert capsys.readouterr().err == ""  # it ended by itself


@pytest.mark.parametrize(
    ("flags", "length"),
    [
        ({}, "cut off after {room} tokens: the model's context is full"),
        ({"max_tokens": 9}, "cut off at --max-tokens 9"),
    ],
)
def test_the_command_answers_as_far_as_the_context_goes(tmp_path, capsys, flags, length):
    """Answers cut at 1,024 tokens, whatever the model has room for, and nothing said of it."""
    tokenizer = demo_tokenizer(cot.WORDS)
    ends = tuple(tokenizer.eos_ids)
    shape = dataclasses.replace(CONFIG, context=1100, tied=True, eos_ids=ends)
    model = random_init(dataclasses.replace(shape, vocab_size=tokenizer.vocab_size), 0)
    model.embed.weight.data[list(ends)] = 0  # a logit of 0 is never the largest: it does not stop
    save_pretrained(model, tmp_path / "model", tokenizer)
    question = "numbers 3 5 7, target 22"
    room = shape.context - len(tokenizer.chat([{"role": "user", "content": question}]))
    asked = {"model": str(tmp_path / "model"), "question": question, "temperature": 0} | flags
    sample.main(sample.Config(**asked, device="cpu", n=2))
    out = capsys.readouterr().out
    assert f"--- 1: {length.format(room=f'{room:,}')}" in out
    sample.main(sample.Config(**asked, device="cpu"))
    assert length.format(room=f"{room:,}") in capsys.readouterr().err


@pytest.mark.parametrize("flags", [{"n": 2}, {"verify": "3"}, {"n": 0, "question": "1+2?"}])
def test_bad_flags(flags):
    """Flags that need a question accepted without one, and silently ignored by the chat."""
    with pytest.raises(UserError, match="--n"):
        sample.main(sample.Config(model="absent", **flags))
