"""Who runs when: sequences that are evicted and go on later, the memory they share, and CUDA graphs
that are used again. None of it may change what is drawn."""

import dataclasses
import gc
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sample import BLOCK, CONFIG, CONTEXT, EOS, MODEL, PARAMS, spread_out_model, tokens_of
from test_sample import PROMPTS as ALL_PROMPTS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
import sample
from decode import CPUDecoder, GPUDecoder, KVCache, ModelDecoder, as_rows, row_sizes
from model import Transformer
from sample import Batch, Queue, Sampler, SamplingParams

PROMPTS = ALL_PROMPTS[1::2]  # of 2, 15, 17, 31, 33 and 4 tokens
POSITION = 2 * (CONFIG.layers + 1) * CONFIG.kv_heads * CONFIG.head_dim * 4  # bytes, in fp32
ROW = 80  # the longest sequence has 33 + 40 tokens: in blocks
LEAST = (ROW + 33) * POSITION  # one such row, and its prompt


@pytest.fixture(scope="module")
def reference():
    """Six completions of every prompt in one batch, where nobody is evicted."""
    return Sampler(MODEL, eos_ids=[EOS]).generate(PROMPTS, 6, PARAMS)


@pytest.fixture
def counted(monkeypatch):
    """What happened: rows evicted, tokens that were prefilled again, rows at each decode step; and
    the least that a row drew before it was evicted, beside the longest row when it started."""
    counts = {"evicted": 0, "again": 0, "rows": [], "gained": 9.0}
    begun = {}  # seed -> tokens of the sequence, and of the longest one, when it started
    add = Batch.add
    take = Batch.evict
    step = Batch.step

    def started(batch, sequences):
        rows = add(batch, sequences)
        for sequence in sequences:
            begun[sequence.seed] = (len(sequence.tokens), batch.longest + 1)
        return rows

    def evict(batch, count):
        before = [sequence.seed for sequence in batch.sequences]
        positions = batch.position[: batch.live].tolist()
        taken = take(batch, count)
        counts["evicted"] += count
        counts["again"] += sum(len(sequence.tokens) - 1 for sequence in taken)
        gone = {sequence.seed for sequence in taken}
        for sequence in taken:
            before_it, longest = begun[sequence.seed]
            gained = (len(sequence.tokens) - before_it) / longest
            counts["gained"] = min(counts["gained"], gained)
        staying = [position for seed, position in zip(before, positions) if seed not in gone]
        assert len(taken) == count and max(staying) == max(positions), "the longest was evicted"
        return taken

    def watched(batch, rows):
        counts["rows"].append(rows)
        step(batch, rows)

    monkeypatch.setattr(Batch, "add", started)
    monkeypatch.setattr(Batch, "evict", evict)
    monkeypatch.setattr(Batch, "step", watched)
    return counts


def assert_equal(results, expected) -> None:
    for row, others in zip(results, expected, strict=True):
        for completion, other in zip(row, others, strict=True):
            assert completion.tokens == other.tokens
            assert completion.finish_reason == other.finish_reason
            assert completion.logprobs == pytest.approx(other.logprobs, abs=1e-4)


# --- eviction -------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    extra=st.integers(0, 400),
    max_batch=st.sampled_from([1, 2, 7, 36]),
    prefill_tokens=st.sampled_from([1, 60, 4096]),
)
def test_any_budget_draws_the_same(reference, extra, max_batch, prefill_tokens):
    """A sequence that comes back with a token lost or drawn twice, with another's keys, log-probs
    or end; an endless wait for room, from the least budget on."""
    sampler = Sampler(
        MODEL,
        max_batch=max_batch,
        eos_ids=[EOS],
        cache_bytes=LEAST + extra * POSITION,
        prefill_tokens=prefill_tokens,
    )
    expected = [row[:3] for row in reference]
    assert_equal(sampler.generate(PROMPTS, 3, PARAMS), expected)


@pytest.mark.parametrize("rows", [2, 3])
def test_sequences_are_evicted_and_come_back(reference, counted, rows):
    """Eviction that never happens: each row counted at its longest."""
    budget = LEAST + (rows - 1) * ROW * POSITION
    results = Sampler(MODEL, eos_ids=[EOS], cache_bytes=budget).generate(PROMPTS, 6, PARAMS)
    assert_equal(results, reference)
    drawn = sum(len(completion.tokens) for row in results for completion in row)
    assert counted["evicted"] > 0
    assert sum(counted["rows"]) == drawn  # no token was drawn twice
    assert max(counted["rows"]) > rows  # more than would fit at their longest


@pytest.mark.parametrize("rows", [2, 4])
def test_nobody_is_evicted_again_and_again(counted, rows):
    """Rows that start where the others leave no room to grow: each is evicted after a few tokens,
    and more is prefilled than drawn."""
    prompts = [[i % 50, 3 * i % 50, 5] for i in range(30)]
    budget = (rows * CONTEXT + 64) * POSITION
    sampler = Sampler(MODEL, eos_ids=[EOS], cache_bytes=budget, prefill_tokens=64)
    results = sampler.generate(prompts, 1, SamplingParams(150, 1.2, seed=1))
    assert counted["evicted"] > 3
    assert counted["gained"] >= 1
    drawn = sum(len(completions[0].tokens) for completions in results)
    assert counted["again"] <= 2 * drawn


def test_with_room_for_all_nobody_is_evicted(reference, counted):
    """Work done twice where memory is plenty."""
    plenty = 2 * 6 * len(PROMPTS) * ROW * POSITION  # a quarter of it is for prompts
    results = Sampler(MODEL, eos_ids=[EOS], cache_bytes=plenty).generate(PROMPTS, 6, PARAMS)
    assert_equal(results, reference)
    assert counted["evicted"] == 0
    assert max(counted["rows"]) == 6 * len(PROMPTS)


def test_a_sequence_that_was_evicted_may_end_by_its_limit(counted):
    """A limit counted from where a sequence came back, not from its prompt's end; the log-probs of
    before the eviction lost."""
    params = SamplingParams(40, temperature=1.2)
    expected = Sampler(MODEL).generate(PROMPTS, 3, params)
    tight = Sampler(MODEL, cache_bytes=LEAST + 2 * ROW * POSITION)
    results = tight.generate(PROMPTS, 3, params)
    assert counted["evicted"] > 0
    assert_equal(results, expected)
    for row in results:
        for completion in row:
            assert len(completion.tokens) == len(completion.logprobs) == 40


# --- the cache's memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 16, 17, 73, 160, 1000, 10_000])
@pytest.mark.parametrize("block", [16, 256])
def test_sizes_of_rows(limit, block):
    """A limit that no size holds, sizes that are no blocks, or so far apart that memory is left
    empty."""
    sizes = row_sizes(limit, block)
    assert sizes[-1] - block < limit <= sizes[-1]
    assert all(size % block == 0 for size in sizes)
    for size, following in pairwise(sizes):
        assert size < following <= size + max(block, size // 4)
    assert len(sizes) < 25 * (1 + limit / block / 400)


DECODERS = {
    "model": ModelDecoder,
    "cpu": lambda model: CPUDecoder(model, pack=False),
    "gpu": GPUDecoder,
}


@pytest.mark.parametrize("kind", DECODERS)
@torch.inference_mode()
def test_a_layout_keeps_rows_and_addresses(kind):
    """Keys and values mixed up when the memory is cut anew, in any order of dimensions; memory that
    moves although there is enough of it (graphs would read the old one)."""
    cache = KVCache(DECODERS[kind](MODEL))
    cache.restart(limit=200, budget=1000)
    cache.lay_out(rows=12, capacity=16, keep=0)
    shape = (12, CONFIG.kv_heads, 16, CONFIG.head_dim)
    numbers = torch.arange(torch.Size(shape).numel()).view(shape).float()
    for layer in range(CONFIG.layers):
        cache.write_layer(slice(12), layer, numbers + layer, -numbers - layer)

    def places():
        return [tensor.data_ptr() for pair in cache.layers for tensor in pair]

    def check(rows, length):
        for layer, (keys, values) in enumerate(cache.view(rows, length)):
            assert torch.equal(keys, numbers[:rows, :, :length] + layer)
            assert torch.equal(values, -keys)
            made = cache.allocate(*keys.shape[::2])
            for tensor, like in zip((keys, values), made):
                order = sorted(range(4), key=tensor.stride)
                assert order == sorted(range(4), key=like.stride)

    before = places()
    for rows, capacity in ((6, 32), (2, 80), (12, 16), (3, 64)):
        assert cache.holds(rows, capacity)
        cache.lay_out(rows, capacity, keep=2)
        check(2, 16)
        assert places() == before
    assert not cache.holds(4, 64)
    cache.lay_out(4, 64, keep=2)
    check(2, 16)
    assert places() != before


def test_one_key_head_lies_as_before():
    """A dimension of size 1, whose place in memory no stride tells: `view` must still flatten."""
    tensor = torch.zeros(6, 1, 16, 8)
    assert as_rows(tensor, 3, 32).is_contiguous()
    transposed = torch.zeros(6, 16, 1, 8).transpose(1, 2)
    assert as_rows(transposed, 3, 32).transpose(1, 2).view(96, 8).is_contiguous()


# --- the decode step waits for nobody -------------------------------------------------------------

WAITS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "isin", "masked_select", "equal")


class NoHost(TorchDispatchMode):
    """Refuses the operations that wait for a device, or whose shapes depend on its numbers."""

    def __init__(self, device):
        super().__init__()
        self.device = torch.device(device)
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        waits = name in WAITS or "unique" in name
        if name.startswith("index"):
            indices = [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, torch.Tensor)]
            if name != "index_select" and "fill" not in name:
                waits |= any(index.dtype == torch.bool for index in indices)
        out = None if waits else func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            waits |= isinstance(leaf, torch.Tensor) and leaf.device != self.device
        assert not waits, f"{name} waits for the device"
        self.count += 1
        return out


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: torch.isin(x, x[:2]),
        lambda x: x.masked_select(x > 0),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, torch.ones(())),
        lambda x: bool(x.any()),
    ],
)
def test_what_waits_is_refused(waiting):
    """A guard that lets everything through."""
    x = torch.arange(5.0)
    with NoHost("cpu") as mode, pytest.raises(AssertionError, match="waits for the device"):
        x + 1
        waiting(x)
    assert mode.count >= 1
    meta = torch.zeros(5, device="meta")
    with NoHost("meta"), pytest.raises(AssertionError, match="waits for the device"):
        torch.empty_like(meta, device="cpu")


def gumbel(logits, temperature, top_p, min_p, seeds, positions):
    """A draw without the tricks of a CPU."""
    logprobs = (logits.float() / temperature).log_softmax(1)
    token = (logprobs - torch.empty_like(logprobs).exponential_().log()).argmax(1)
    return token, logprobs.gather(1, token[:, None])[:, 0]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("top_p, min_p", [(1.0, 0.0), (0.9, 0.0), (1.0, 0.1), (0.9, 0.1)])
@pytest.mark.parametrize("stops", [0, 1, 40])
@torch.inference_mode()
def test_no_operation_of_a_step_waits_for_the_host(monkeypatch, device, top_p, min_p, stops):
    """A hidden .item() or nonzero in the step: a stall for each token on CUDA, and nothing that a
    graph could capture. torch.isin is one, for many stop tokens."""
    if device == "cpu":  # there the draw sorts with NumPy; on "meta" it is what a device does
        monkeypatch.setattr(kernels, "sample_token", gumbel)
    model = Transformer(CONFIG, torch.bfloat16, device=device)
    if device == "cpu":
        model.load_state_dict(MODEL.state_dict())
    params = SamplingParams(40, 1.2, top_p, min_p)
    batch = Batch(model, params, list(range(stops)), slots=4, limit=64)
    batch.reserve(4, BLOCK)
    batch.live = 4
    batch.position += 1
    batch.end += 64
    batch.done.fill_(False)
    batch.decode()  # makes what is made once
    with NoHost(device) as mode:
        batch.decode()
    assert mode.count > 50


# --- graphs ---------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """The operations of a step as a graph holds them: addresses of tensors from outside, numbers."""

    def __init__(self):
        super().__init__()
        self.made = set()
        self.operations = []
        self.outside = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        entry = [str(func)]
        for leaf in tree_leaves((args, kwargs)):
            if not isinstance(leaf, torch.Tensor):
                entry.append(repr(leaf))
                continue
            storage = leaf.untyped_storage()
            place = "made"
            if storage._cdata not in self.made:
                place = leaf.data_ptr()
                self.outside[storage._cdata] = StorageWeakRef(storage)
            entry.append((place, leaf.dtype, tuple(leaf.shape), leaf.stride()))
        self.operations.append(entry)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()._cdata
                if storage not in self.outside:
                    self.made.add(storage)
        return out


class FakeGraph:
    """Replays by doing the step again, if that is what the graph holds: the same operations with
    the same numbers on tensors that are alive, at the same addresses. Or else it fails."""

    current = None  # (batch, rows) of the step that runs
    captures = 0
    replays = 0

    def replay(self):
        if self.fresh:  # a capture does nothing; ours has done the step already
            self.fresh = False
            return
        FakeGraph.replays += 1
        batch, rows = self.step
        assert not any(storage.expired() for storage in self.outside), "it reads freed memory"
        with Recorder() as recorder:
            batch.step(rows)
        assert recorder.operations == self.operations, "a graph would do something else"


class FakeCapture:
    def __init__(self, graph, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.graph = graph

    def __enter__(self):
        self.recorder = Recorder()
        self.recorder.__enter__()

    def __exit__(self, *error):
        self.recorder.__exit__(*error)
        FakeGraph.captures += 1
        self.graph.fresh = True
        self.graph.step = FakeGraph.current
        self.graph.operations = self.recorder.operations
        self.graph.outside = list(self.recorder.outside.values())


@pytest.fixture
def graphs(monkeypatch):
    """CUDA's way of stepping, on a CPU; a decoder whose `bind` makes a tensor that a step reads."""
    step = Batch.step
    bind = ModelDecoder.bind
    call = ModelDecoder.__call__

    def watched_step(batch, rows):
        FakeGraph.current = (batch, rows)
        step(batch, rows)

    def watched_bind(decoder, cache):
        bind(decoder, cache)
        decoder.starts = torch.arange(len(cache[0][0])) if cache else None

    def watched_call(decoder, tokens, positions):
        return call(decoder, tokens + 0 * decoder.starts, positions)

    monkeypatch.setattr(Batch, "step", watched_step)
    monkeypatch.setattr(ModelDecoder, "bind", watched_bind)
    monkeypatch.setattr(ModelDecoder, "__call__", watched_call)
    monkeypatch.setattr(kernels.sampling, "first_minimum", lambda x: x.argmin(1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", FakeCapture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(sample, "can_capture", lambda device: True)
    monkeypatch.setattr(FakeGraph, "captures", 0)
    monkeypatch.setattr(FakeGraph, "replays", 0)
    return FakeGraph


WIDE = SamplingParams(max_tokens=24, temperature=1.2, min_p=0.01, seed=3)


def change(model: Transformer, seed: int) -> Transformer:
    """Other weights in the same tensors."""
    model.load_state_dict(spread_out_model(seed).state_dict(), strict=False)
    return model


def one_layer() -> Transformer:
    """A model in the dtype that only ModelDecoder computes in."""
    return change(Transformer(dataclasses.replace(CONFIG, layers=1), torch.float64), 0)


def test_graphs_live_as_long_as_what_they_read_lies_where_it_lay(graphs, monkeypatch):
    """Graphs captured anew for each call (dozens of slow steps each); one that is replayed with the
    last call's weights, temperature, or stop tokens, or on memory that was freed."""
    model = one_layer()
    other = one_layer()
    sampler = Sampler(model, max_batch=12, eos_ids=[EOS])

    def captured(prompts, params):
        """How many graphs a call captures. It must draw what is drawn without graphs."""
        other.load_state_dict(model.state_dict())
        with monkeypatch.context() as plain:
            plain.setattr(sample, "can_capture", lambda device: False)
            expected = Sampler(other, eos_ids=sampler.eos_ids).generate(prompts, 3, params)
        before = graphs.captures, graphs.replays
        assert_equal(sampler.generate(prompts, 3, params), expected)
        assert graphs.replays > before[1]
        return graphs.captures - before[0]

    def settled(prompts, params):
        """Whether new graphs were captured; and then, none any more."""
        # A shape is captured when it comes for the second time.
        new = captured(prompts, params) + captured(prompts, params)
        assert captured(prompts, params) == 0
        return new > 0

    assert settled(PROMPTS, WIDE)
    kept = sampler.kept
    change(model, 1)
    settled(PROMPTS, WIDE)
    settled(PROMPTS[:4], SamplingParams(30, 1.2, min_p=0.01))  # a smaller call fits
    hot = SamplingParams(24, 1.5, seed=4)
    assert settled(PROMPTS, hot)
    assert captured(PROMPTS, hot) == captured(PROMPTS, WIDE) == 0  # those of both are there
    assert sampler.kept is kept

    sampler.eos_ids = [EOS, 3]
    assert settled(PROMPTS, WIDE)
    assert sampler.kept is not kept
    for parameter in model.parameters():  # the same weights elsewhere
        parameter.data = parameter.data.clone()
    assert settled(PROMPTS, WIDE)
    assert settled([[1] * 60, *PROMPTS[:2]], WIDE)  # longer than the rows that are there
    sampler.release()
    assert settled(PROMPTS, WIDE)


def test_graphs_with_evictions(graphs, counted):
    """A graph of another size of rows, or of a cache that moved; buckets that the budget has no
    room for."""
    model = one_layer()
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(sample, "can_capture", lambda device: False)
        expected = Sampler(model, eos_ids=[EOS]).generate(PROMPTS, 4, WIDE)
    assert counted["evicted"] == 0
    # Two thirds of the bytes that POSITION counts for each layer, and float64 takes twice as many.
    budget = 2 * 2 * (64 + 33 + 2 * 64) * POSITION // 3
    sampler = Sampler(model, eos_ids=[EOS], cache_bytes=budget)
    for _ in range(2):  # a shape is captured when it comes for the second time
        assert_equal(sampler.generate(PROMPTS, 4, WIDE), expected)
    captures = graphs.captures
    assert_equal(sampler.generate(PROMPTS, 4, WIDE), expected)
    assert graphs.captures == captures > 0
    assert counted["evicted"] > 0


def test_a_graph_of_a_cache_that_moved_is_not_replayed(graphs):
    """The proof that the tests above can fail: graphs kept over a move of the cache."""
    sampler = Sampler(one_layer(), max_batch=12, eos_ids=[EOS])
    sampler.generate(PROMPTS, 3, WIDE)
    batch = sampler.kept
    batch.cache.layers[0] = batch.cache.moved(0, 12, batch.cache.capacity, 0)
    gc.collect()
    with pytest.raises(AssertionError, match="freed memory"):
        for captured in batch.graphs.values():
            captured.decoder.bind(batch.cache.view(*captured.decoder.cache[0][0].shape[::2]))
        sampler.generate(PROMPTS, 3, WIDE)


def test_a_stream_that_is_left_half_way_keeps_its_batch(graphs):
    """Two answers at once, drawn into the same rows."""
    sampler = Sampler(one_layer(), eos_ids=[EOS])
    expected = tokens_of(sampler.generate(PROMPTS[:1], 1, WIDE))[0][0]
    first = sampler.stream(PROMPTS[0], WIDE)
    begun = [next(first) for _ in range(3)]
    assert list(sampler.stream(PROMPTS[0], WIDE)) == expected
    assert begun + list(first) == expected


def test_on_a_cpu_nothing_is_kept():
    """Packed copies of old weights that serve new ones."""
    sampler = Sampler(MODEL, eos_ids=[EOS])
    sampler.generate(PROMPTS[:2], 2, PARAMS)
    assert sampler.kept is None


def test_buckets_are_few_and_hold_the_rows(graphs):
    """A graph for each number of rows; a bucket above the slots or the memory."""
    batch = Batch(one_layer(), WIDE, [], slots=300, limit=160)
    batch.restart(WIDE, 300, 160, 300 * 16)
    buckets = [batch.bucket(rows, 16) for rows in range(1, 301)]
    assert sorted(set(buckets)) == [8, 16, 32, 64, 128, 192, 256, 300]
    assert all(bucket >= rows for rows, bucket in enumerate(buckets, start=1))
    assert batch.bucket(130, 32) == 150


def test_ranks_with_the_same_free_memory_decide_alike(counted, monkeypatch):
    """Schedules that depend on anything but prompts, draws and `free_memory`: ranks that share one
    model would wait for one another for ever."""
    schedules = []
    for free in (3 * LEAST, 3 * LEAST, 8 * LEAST):
        monkeypatch.setattr(sample, "free_memory", lambda device, free=free: free)
        counted["rows"] = []
        Sampler(MODEL, eos_ids=[EOS]).generate(PROMPTS, 6, PARAMS)
        schedules.append(counted["rows"])
    assert schedules[0] == schedules[1] != schedules[2]


def test_a_batch_that_is_used_again_takes_the_steps_of_a_new_one(graphs, counted, monkeypatch):
    """A rank that could keep its batch, beside one that could not: with other numbers of rows they
    would wait for one another for ever."""
    schedules = []
    sampler = Sampler(one_layer(), eos_ids=[EOS])

    def free(device):
        held = sampler.kept.cache.nbytes if sampler.kept else 0
        return 30 * LEAST - held

    monkeypatch.setattr(sample, "free_memory", free)
    sampler.generate(PROMPTS, 6, WIDE)
    for release in (False, True):
        if release:
            sampler.release()
        kept = sampler.kept
        counted["rows"] = []
        sampler.generate(PROMPTS[:5], 2, WIDE)
        assert (sampler.kept is kept) != release
        schedules.append(counted["rows"])
    assert schedules[0] == schedules[1]


def test_evicted_sequences_come_last_and_the_longest_first():
    """Fresh prompts that wait behind what was evicted: the last to end would then be the longest."""
    queue = Queue(MODEL, [sample.new_job(0, [1, 2], [0]), sample.new_job(1, [1] * 30, [1])], 64)
    batch = Batch(MODEL, PARAMS, [], slots=9, limit=80)
    for index, length in ((2, 5), (3, 20)):
        queue.evicted.append(sample.Sequence(index, 0, 0, 1, [1] * length))
    queue.evicted.sort(key=lambda sequence: -len(sequence.tokens))
    queue.unstarted += 2
    with torch.inference_mode():
        queue.refill(batch)
    assert [sequence.index for sequence in batch.sequences] == [1, 0, 3, 2]
    assert queue.unstarted == 0
