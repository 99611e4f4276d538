"""What `sft.py` and `rl.py` share, so that one process and many run the same code.

    python sft.py ...                                       # a World of one: no process group
    torchrun --standalone --nproc_per_node=4 sft.py ...     # gloo on CPU, NCCL on GPUs

Read in this order: the ranks and what they tell each other; the `Scorer` (the model and the head's
log-probs as one module that FSDP2 can shard); how work is spread; checkpoints. The run's folder and
its metrics are `runfolder.py`'s.

One rule makes every number independent of how the work was cut: *a step's loss is divided once, by
the number of tokens of the whole step*. So gradients are summed (never averaged) over micro-batches
and over ranks, and a rank with nothing to train on adds zeros.
"""

import contextlib
import dataclasses
import heapq
import itertools
import json
import math
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

import pretrained
from cli import UserError, WriteError, sync_folder, uninterrupted, write_text, writing
from devices import pick_device
from kernels import linear_logprob_entropy
from model import (
    Transformer,
    can_use_varlen,
    model_folder,
    save_pretrained,
    varlen_attention,
)
from packing import Example, Packed, Unit, fill_rows, integers, pack, share_stems
from tensor_parallel import SlicedTransformer
from tokenizer import Tokenizer

# Said of every save by one process alone.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

# --- ranks ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class World:
    """Which process this is, of how many, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Rank 0 writes the files and talks to the terminal."""
        return self.rank == 0


def start(device: str = "auto") -> World:
    """Join the ranks that torchrun started; without it, a World of one, with no process group."""
    device = pick_device(device)
    on_gpu = device.startswith("cuda")
    ranked = bool(os.environ.get("RANK"))
    if ranked:
        check_environment(on_gpu)
        if on_gpu:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    number = torch.device(device).index or 0
    if on_gpu and number >= torch.cuda.device_count():
        raise UserError(f"{device}: this machine has {torch.cuda.device_count()} CUDA devices")
    if on_gpu:
        let_segments_grow()
        torch.cuda.set_device(number)  # FSDP computes on the current device
    if not ranked:
        return World(0, 1, torch.device(device))
    place = torch.device(device)
    try:
        dist.init_process_group(backends(place), device_id=place if on_gpu else None)
    except (ValueError, RuntimeError) as error:  # an address that nobody answers at, say
        reason = str(error).split("\n")[0]
        raise UserError(f"cannot join the ranks that torchrun has started: {reason}") from None
    return World(dist.get_rank(), dist.get_world_size(), place)


def backends(device: torch.device) -> str:
    """Who carries messages between ranks. Left to itself, torch would take NCCL alone on a GPU
    machine, and what is summed on the CPU (losses, metrics) would find nobody.
    """
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def let_segments_grow() -> None:
    """Let CUDA's allocator extend its segments, unless the user has set it up otherwise.

    Almost every micro-batch has another shape: in segments of fixed sizes gaps would be left. To be
    called before CUDA is used: the allocator reads this once.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if not any(os.environ.get(name) for name in names):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def check_environment(on_gpu: bool) -> None:
    """UserError if the variables that torchrun sets are not all there, or make no sense.

    A cluster, or an old shell, may have set some of them.
    """
    numbers = ["RANK", "WORLD_SIZE", "MASTER_PORT"]
    if on_gpu:
        numbers.append("LOCAL_RANK")
    advice = "start with torchrun, which sets them all, or unset RANK to run one process"
    missing = [name for name in (*numbers, "MASTER_ADDR") if not os.environ.get(name)]
    if missing:
        raise UserError(f"RANK is set, but not {', '.join(missing)}: {advice}")
    for name in numbers:
        if not re.fullmatch("[0-9]+", os.environ[name]):
            raise UserError(f"{name} is {os.environ[name]!r} and no whole number: {advice}")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= size:
        raise UserError(f"RANK is {rank}, but there are {size} ranks (WORLD_SIZE): {advice}")


@contextlib.contextmanager
def session(device: str = "auto") -> Iterator[World]:
    """`with session() as world:` around a command. A UserError on any rank ends all, printed once.
    So does Ctrl-C, or SIGTERM: rank 0 speaks.

    The first rank to fail leaves a note in the store that torchrun keeps, outside of all ranks, and
    exits; the others find out when their next collective breaks (or torchrun ends them), see the
    note and leave without a word.
    """
    world = start(device)
    try:
        yield world
    except (Exception, KeyboardInterrupt) as error:
        if world.size == 1:
            raise
        # Leaving without a goodbye (destroy_process_group), which could wait for stuck ranks.
        # The store is our one private call to torch: rendezvous hands out none.
        notes = dist.distributed_c10d._get_default_store()
        interrupted = isinstance(error, KeyboardInterrupt)
        bad_input = isinstance(error, UserError)
        try:
            failures = notes.add("failed", int(bad_input))
            interruptions = notes.add("interrupted", int(interrupted))
        except RuntimeError:  # torchrun has left: it was interrupted, too
            failures, interruptions = int(bad_input), 1
        if interrupted:
            speaks = world.main and not failures  # torchrun ends the ranks of one that failed
        elif bad_input:
            speaks = failures == 1
        else:
            speaks = not failures and not interruptions  # a bug of ours, with its traceback
        if speaks:
            raise
        raise SystemExit(130 if interrupted else 2) from None
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(value: float | Tensor) -> float | Tensor:
    """The sum over all ranks, each of which calls it: a float for a number (added in fp64), a new
    tensor for a tensor.
    """
    if not dist.is_initialized():
        return value
    if isinstance(value, Tensor):
        total = value.detach().clone()
        dist.all_reduce(total)
        return total
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in the ranks' order, on every rank (pickled: for small things)."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def share_out(
    work: Callable[[list[Any]], list[Any]],
    items: list[Any],
    costs: list[int],
    world: World,
    team: int = 1,
) -> list[Any]:
    """`work(items)`, one result for each item in their order, done by all ranks together.

    Each rank works on some of the items, by their costs as many as the others; then all of them get
    all results (pickled). Every rank calls it, with the same items. team: so many neighbouring
    ranks do the same work together, and the first of them reports it.
    """
    mine = balance(costs, world.size // team)[world.rank // team]
    done = work([items[i] for i in mine])
    reported = list(zip(mine, done, strict=True)) if world.rank % team == 0 else []
    results: list[Any] = [None] * len(items)
    for share in gather_objects(reported):
        for i, result in share:
            results[i] = result
    return results


def same_on_all_ranks(config: dict[str, Any]) -> None:
    """UserError naming the first setting on which two ranks disagree (other flags, other code)."""
    first, *others = gather_objects(config)
    for rank, other in enumerate(others, start=1):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise UserError(
                    f"ranks disagree on {name}: {first.get(name)} on 0, {other.get(name)} on {rank}"
                )


# --- the model over ranks -------------------------------------------------------------------------


class Scorer(nn.Module):
    """The transformer and its head's log-probs as *one* module, so that FSDP2 can shard all of it.

    The head's weight is used outside `Transformer.forward` (`kernels.linear_logprob_entropy` needs
    no logits). A sharded parameter is whole only inside the forward of the module that holds it,
    and its gradient is only reduced if it was used there: hence the loss's expensive half lives in
    here.
    """

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, packed: Packed, temperature: float) -> tuple[Tensor, Tensor]:
        hidden, targets = trained_places(self.model, packed)
        weight = self.model.head_weight
        hidden = hidden.to(weight.dtype)
        logprob, entropy = linear_logprob_entropy(hidden, weight, targets, temperature)
        if len(packed.index) == 0:
            return logprob[:0].clone(), entropy[:0].clone()  # FSDP warns of outputs that are views
        return logprob, entropy


def trained_places(model: Transformer, packed: Packed) -> tuple[Tensor, Tensor]:
    """(hidden [M, D], targets [M]): the stream where a trained token is predicted, and that token.

    Where nothing is trained on, one place all the same, to be cut off behind the head: the other
    ranks wait in the collectives of the same forward and backward, so all of the graph has to run.
    """
    attend = partial(varlen_attention, packed.runs) if model.varlen else None
    hidden = model(packed.tokens, packed.documents, packed.positions, attend, packed.parents)
    hidden = hidden.flatten(0, 1)
    if len(packed.index):
        return hidden[packed.index], packed.targets
    return hidden[:1], packed.targets.new_zeros(1)


def shard(
    model: Transformer,
    world: World,
    dtype: torch.dtype | None = None,
    checkpoint_activations: bool = False,
    offload: bool = False,
    wrap: Callable[[Transformer], nn.Module] = Scorer,
) -> Any:
    """`wrap(model)`, ready to be trained on `world`: in place.

    model: fp32 master weights, the same on every rank; or on meta, and then it gets memory for what
    this rank keeps of it, to be filled by `load_weights` or from a checkpoint.
    checkpoint_activations: recompute them. offload: masters, gradients and AdamW's moments stay in
    the host's memory.

    `dtype` (bf16) is what the matrix products run in; the masters, the gradients' sum and AdamW
    stay fp32, because an Adam step of 1e-5 vanishes in a bf16 weight.

    More than one rank: FSDP2, one group of parameters per block and one for the rest; parameters
    become DTensors, and gradients come out as the SUM over ranks, sharded alike. One rank: autocast
    (see `forward`). It rounds what products take, where FSDP rounds every weight, so norms and
    embeddings stay fp32. FSDP would do here as well, but its bookkeeping takes a CPU longer than a
    small model takes an H100: a step of Qwen2.5-0.5B (2,048 tokens) waited half of its time for it.
    """
    scorer = wrap(model)
    model.checkpoint_blocks = checkpoint_activations
    held = model.embed.weight.dtype
    mixed = dtype is not None and dtype != held
    model.varlen = can_use_varlen(model.config, dtype or held, world.device)
    plain = world.size == 1 and not offload
    if plain:
        model.autocast = dtype if mixed else None
    else:
        apply_fsdp(scorer, world, dtype if mixed else None, offload)
    home = torch.device("cpu") if offload else world.device
    if model.embed.weight.is_meta:
        model.to_empty(device=home)  # after sharding: a rank never has memory for all of it
    return scorer.to(home) if plain else scorer


def apply_fsdp(scorer: nn.Module, world: World, dtype: torch.dtype | None, offload: bool) -> None:
    """FSDP2 with the rules of `shard`. dtype: of the matrix products; None: the masters'."""
    if not dist.is_initialized():  # a process alone is a group of one
        dist.init_process_group(
            backends(world.device), store=dist.HashStore(), rank=0, world_size=1
        )
    mesh = init_device_mesh(world.device.type, (world.size,))
    # cast_forward_inputs=False: the stream between blocks stays fp32, and so do the rotary angles
    precision = MixedPrecisionPolicy(cast_forward_inputs=False)
    if dtype:
        precision = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    where = OffloadPolicy()
    if offload:
        where = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")  # CUDA's to pin
    for module in [*scorer.model.blocks, scorer]:
        fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=where)
        module.set_gradient_divide_factor(1.0)  # a sum, not a mean: the rule at the top
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other reduction


@torch.no_grad()
def load_weights(scorer: Any, path: str | Path) -> None:
    """Fill what `shard` has made of a model on meta from a Hugging Face folder.

    Each rank reads the rows that it keeps, and no others. What a `wrap` has added is left alone.
    """
    parts = {}
    for name, parameter in scorer.model.named_parameters():
        parts[name] = (local(parameter), first_row(parameter))
    pretrained.fill(model_folder(path), scorer.model.config, parts)


def first_row(parameter: Tensor) -> int:
    """Which of a parameter's rows is the first that this rank keeps: they are cut by
    `torch.chunk`.
    """
    if not isinstance(parameter, DTensor):
        return 0
    # The mesh is of all ranks. It is not asked: in a process that has had other runs, torch may
    # hand out the mesh of one of these, whose group is gone.
    return dist.get_rank() * math.ceil(len(parameter) / dist.get_world_size())


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes. With --offload that is not where its parameters are."""
    parameter = next(module.parameters())
    if isinstance(parameter, DTensor):
        return torch.device(parameter.device_mesh.device_type)
    return parameter.device


def log_probs(scorer: Scorer, packed: Packed, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(logprob [M], entropy [M]), fp32: of each trained token, and of the whole distribution that
    it came from. Only these places ever meet the vocabulary.
    """
    return forward(scorer, packed, temperature)


def forward(module: nn.Module, packed: Packed, *more: Any) -> Any:
    """`module(packed, *more)` on the module's device, its products in the dtype of `shard`."""
    device = device_of(module)
    dtype = module.model.autocast
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        result = module(packed.to(device), *more)
    if isinstance(module, FSDPModule) and not torch.is_grad_enabled():
        module.reshard()  # FSDP keeps the root whole for a backward that will not come
    return result


@torch.no_grad()
def values_of_all(
    function: Callable[[Packed], Tensor],
    examples: list[Example],
    tokens: int | None,
    dim: int | None,
    world: World,
) -> Tensor:
    """What `function`, packed rows -> [M], says of every trained token of `examples`: on all ranks.

    tokens, dim: see `micro_batches`.
    """
    count = sum(example.targets for example in examples)
    values = torch.zeros(0)
    for places, packed in micro_batches(examples, tokens, dim, world):
        found = function(packed).cpu()
        if not len(values):
            values = found.new_zeros(count)
        values[places] = found
    return sum_over_ranks(values)  # each token is some rank's, and 0 on the others


def adamw(
    parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0
) -> torch.optim.AdamW:
    """AdamW. Matrices decay, vectors (norms, biases) do not: a norm's gain rescales a layer."""
    parameters = list(parameters)
    matrices = {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay}
    vectors = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=lr, betas=(0.9, 0.95), fused=True)


def clip_grad_norm(scorer: nn.Module, max_norm: float) -> float:
    """Scale the gradients down to the global norm `max_norm`; the norm that they had."""
    return whole(nn.utils.clip_grad_norm_(scorer.parameters(), max_norm)).item()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; a plain tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all ranks, which all have to call it; a plain one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_parameters(
    scorer: Scorer, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The transformer's parameters, gathered one at a time, on the device that computes.

    dtype: each rank rounds its part to it first, so that fewer bytes travel; None: as they are.
    Every rank has to walk through all.
    """
    device = device_of(scorer)
    for name, parameter in scorer.model.named_parameters():
        yield name, whole(parameter.detach().to(device, dtype))


@torch.no_grad()
def copy_weights(source: Scorer, target: Transformer) -> None:
    """Copy the policy into a plain model of any dtype or device (the sampler's), on every rank.

    Or what this rank holds of one into its slices. One whole parameter at a time is gathered, in
    the type in which it is to be kept. Memory that `free_weights` has given back comes back.
    """
    dtype = target.embed.weight.dtype
    for name, gathered in whole_parameters(source, dtype):
        copy = target.get_parameter(name)
        if isinstance(target, SlicedTransformer):
            gathered = target.slice_of(name, gathered)
        if not copy.untyped_storage().size():
            copy.untyped_storage().resize_(copy.nbytes)
        copy.copy_(gathered)


def free_weights(model: Transformer) -> None:
    """Give the memory of the weights back, until `copy_weights` fills them again."""
    for parameter in model.parameters():
        parameter.untyped_storage().resize_(0)


def save_model(scorer: Scorer, path: Path, tokenizer: Tokenizer, world: World) -> None:
    """Write the policy as a Hugging Face folder, from rank 0's memory. Every rank calls it.

    UserError, and nothing is written, if not every weight is finite.
    """
    weights = {name: whole.cpu() for name, whole in whole_parameters(scorer) if world.main}
    for name, whole in weights.items():
        if not whole.isfinite().all():
            raise UserError(f"{path} is not written: {name} holds NaN or infinity; lower --lr")
    if world.main:
        with writing(path):
            save_pretrained(scorer.model, path, tokenizer, weights)
    barrier()


# --- work over ranks ------------------------------------------------------------------------------


def balance(lengths: list[int], bins: int) -> list[list[int]]:
    """Spread items over `bins`: the longest first, each to the bin that has the least so far."""
    heap = [(0, b) for b in range(bins)]
    filled: list[list[int]] = [[] for _ in range(bins)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, b = heapq.heappop(heap)
        filled[b].append(i)
        heapq.heappush(heap, (load + lengths[i], b))
    return filled


MICRO_TOKENS = {"cpu": 2_048, "cuda": 8_192}
"""Of a micro-batch. A CPU is fastest while a layer's temporaries fit into its caches."""


def micro_batches(
    examples: list[Example], tokens: int | None, dim: int | None, world: World
) -> Iterator[tuple[Tensor, Packed]]:
    """This rank's part of a step: `examples`, the same on every rank, in micro-batches.

    Yields (places [M], packed): `packed` has M trained tokens, and the m-th of them is number
    `places[m]` of all trained tokens of `examples`. A micro-batch is no larger, padding included,
    than `tokens` tokens (None: what suits the device) or the longest sequence. dim: `row_dim`.
    Every rank gets as many micro-batches as the others, because FSDP's collectives must match; some
    may be empty.
    """
    tokens = MICRO_TOKENS[world.device.type] if tokens is None else tokens
    units, row_length = share_stems(examples, dim, tokens)
    first = [0, *itertools.accumulate(example.targets for example in examples)]
    for part in spread([unit.length for unit in units], row_length, tokens, world):
        chosen: list[int] = []  # the examples of this micro-batch
        renumbered = []
        for unit in (units[u] for u in part):
            members = range(len(chosen), len(chosen) + len(unit.members))
            renumbered.append(Unit(list(members), unit.length))
            chosen += unit.members
        places = [place for i in chosen for place in range(first[i], first[i + 1])]
        packed = pack([examples[i] for i in chosen], row_length, renumbered)
        yield integers(places), packed


def row_dim(model: Transformer) -> int | None:
    """What `micro_batches` has to know of a model to choose how long rows are: its width, if
    attention goes over the whole row. None: it does not, and a micro-batch is one row.
    """
    return None if model.varlen else model.config.dim


def spread(lengths: list[int], row_length: int, tokens: int, world: World) -> list[list[int]]:
    """Which units each micro-batch of this rank holds: as few and as even as fit into `tokens`.

    The units that share a stem stay whole, so that responses to one prompt stay together.
    """

    def fits(part: list[int]) -> bool:
        rows, width = fill_rows([lengths[u] for u in part], row_length)
        return len(rows) * width <= tokens or len(part) <= 1

    count = max(1, math.ceil(sum(lengths) / (tokens * world.size)))  # of each rank, at least
    parts = balance(lengths, count * world.size)
    while not all(fits(part) for part in parts):
        count += 1 + count // 16  # not by ones: it may have to double, if no two units fit together
        parts = balance(lengths, count * world.size)
    return parts[world.rank :: world.size]


# --- checkpoints ----------------------------------------------------------------------------------


def named_tensors(
    parts: dict[str, nn.Module | torch.optim.Optimizer | Tensor],
) -> dict[str, Tensor]:
    """Everything in `parts` under one flat naming, whole or sharded, sharing the parts' memory.

    Of an optimizer, its moments by parameter number (one that AdamW has not touched yet gets the
    zeros it starts from). Its learning rates are not state here: they follow from the step.
    """
    tensors = {}
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            found = part.state_dict()
        elif isinstance(part, torch.optim.Optimizer):
            found = moments_of(part)
        else:
            tensors[name] = part
            continue
        tensors |= {f"{name}.{key}": value for key, value in found.items()}
    return tensors


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state, by number of the parameter and name."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = {}
    for number, parameter in enumerate(parameters):
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        found |= {f"{number}.{key}": value.detach() for key, value in state.items()}
    return found


def random_state(world: World) -> dict[str, Tensor]:
    """This rank's generators. (Only torch's: all else in nanoT1 draws from seeds of its own.)"""
    states = {f"random.cpu.{world.rank}": torch.get_rng_state()}
    if world.device.type == "cuda":
        states[f"random.cuda.{world.rank}"] = torch.cuda.get_rng_state(world.device)
    return states


class Checkpoints:
    """Writes a run's checkpoints, `folder`/step-NNNNNN: whole or not at all, whenever it is killed.

    `save` waits for the checkpoint before it and returns when everything is copied to the host's
    memory (for policy, anchor and AdamW 16 bytes per parameter, over all ranks). The copy is
    written under another name, flushed to the disk and renamed while training goes on. Then all but
    the last `keep` are removed, and but those whose step is a multiple of `keep_every`, if that is
    not 0.
    """

    def __init__(self, folder: Path, world: World, keep: int = 2, keep_every: int = 0):
        self.folder = folder
        self.world = world
        self.keep = keep
        self.keep_every = keep_every
        self.thread = ThreadPoolExecutor(1)
        self.written: Future | None = None  # ends when the last checkpoint is complete
        if world.main:
            for partial in folder.glob("step-*.partial"):
                shutil.rmtree(partial)  # a killed process left it
        # Collectives of their own: of a group that two threads use, each gets the other's messages.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def save(self, step: int, parts: dict[str, Any], state: dict[str, Any]) -> None:
        """Every rank calls it. parts: modules, optimizers and tensors, see `named_tensors`.

        state: what JSON can hold (data position, counters).
        """
        self.finish()
        final = self.folder / f"step-{step:06d}"
        partial = final.with_suffix(".partial")
        text = json.dumps({"step": step, "ranks": self.world.size} | state)
        with uninterrupted():  # a checkpoint that has been begun is one that `finish` knows of
            if self.world.main:
                with writing(final):
                    partial.mkdir(parents=True)
            barrier()
            written = dcp.async_save(
                named_tensors(parts) | random_state(self.world),
                process_group=self.group,
                no_dist=self.group is None,
                storage_writer=FileSystemWriter(partial),  # flushes every file to the disk
            )
            self.written = self.thread.submit(self.publish, written, partial, final, text)

    def publish(self, written: Future, partial: Path, final: Path, state: str) -> None:
        """Rename what is whole. On rank 0 `written` ends when all ranks' parts are written."""
        written.result()
        if not self.world.main:
            return
        write_text(partial / "state.json", state)
        sync_folder(partial)
        partial.rename(final)
        sync_folder(self.folder)
        for old in complete_checkpoints(self.folder)[: -self.keep]:
            if self.keep_every and step_of(old) % self.keep_every == 0:
                continue
            removed = old.rename(old.with_suffix(".partial"))  # half of one must not look complete
            shutil.rmtree(removed)

    def finish(self) -> None:
        """Wait until the last checkpoint is complete; what went wrong with it is raised here."""
        try:
            if self.written:
                self.written.result()  # interrupted here, it is still to be waited for
        except (CheckpointException, OSError) as error:  # a full disk, most likely
            self.written = None
            free = shutil.disk_usage(self.folder).free
            raise WriteError(
                f"cannot write a checkpoint into {self.folder}, where {free / 1e9:.1f} GB are "
                f"free: {reason_of(error)}"
            ) from None


def reason_of(error: BaseException) -> str:
    """What the system said when a checkpoint could not be written, in a few words.

    torch wraps the errors of all ranks. Where it loses the system's own, its own has to do.
    """
    while isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.strerror:
            return found.strerror
        found = found.__cause__ or found.__context__
    return str(error).split("\n")[0]


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    found = [path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def same_kind(value: Any, like: Any) -> bool:
    """Whether `value`, read from JSON, can stand for `like`: both numbers, or of one type.

    None says nothing of what may come.
    """
    numbers = (int, float)
    if type(like) in numbers:
        return type(value) in numbers
    like = json.loads(json.dumps(like))  # a tuple comes back as a list
    return like is None or type(value) is type(like)


DAMAGE = (
    *(CheckpointException, LookupError, TypeError, OSError),
    *(ValueError, RuntimeError, EOFError, pickle.PickleError),
)
"""What torch raises when it reads a damaged checkpoint."""


def load_checkpoint(
    path: Path, parts: dict[str, Any], world: World, needed: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Fill `parts` in place from a checkpoint of any number of ranks; its state.

    The generators too, where this rank had one. The state holds `step` and what is `needed`: by
    name, values of the kind. UserError if the checkpoint is damaged, or of another model.
    """
    tensors = named_tensors(parts)
    try:
        stored = FileSystemReader(path).read_metadata().state_dict_metadata
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for name, like in ({"step": 0} | (needed or {})).items():
            if not same_kind(state[name], like):  # or missing: as damaged as the rest
                raise TypeError(name)
        for name, tensor in tensors.items():
            if name not in stored:
                raise UserError(f"checkpoint {path} does not hold {name}")
            size = stored[name].size
            if size != tensor.shape:
                raise UserError(
                    f"checkpoint {path}: {name} has shape {[*size]}, expected {[*tensor.shape]}"
                )
        generators = {name: value for name, value in random_state(world).items() if name in stored}
        dcp.load(
            tensors | generators,
            storage_reader=FileSystemReader(path),
            no_dist=not dist.is_initialized(),
        )
    except DAMAGE as error:  # torch's own would be pages, one for every tensor
        before = [
            other for other in complete_checkpoints(path.parent) if step_of(other) < step_of(path)
        ]
        rest = f"step {step_of(before[-1])}" if before else "the start"
        raise UserError(
            f"checkpoint {path} is damaged ({type(error).__name__}): remove it to go on from {rest}"
        ) from None
    for name, value in generators.items():
        if ".cpu." in name:
            torch.set_rng_state(value)
        else:
            torch.cuda.set_rng_state(value, world.device)
    return state
