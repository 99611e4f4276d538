"""Sequences of any length into rows of one length, with one value for every trained token.

    for places, packed in parallel.micro_batches(examples, ...):
        logprob, entropy = parallel.log_probs(scorer, packed)   # [M] each, M trained tokens
        ratio = (logprob - old[places]).exp()                   # `old`: one value for each of them

The tokens that a loss is computed on are counted through, example after example. A list with one
number for each of them is a flat tensor, here and everywhere in nanoT1; nobody has to know where in
a row a token stands.

Padding each sequence to the longest would waste most of the work where lengths vary as chains of
thought do. Here short ones share a row; attention and positions stay within a sequence. A model
learns that from `positions_and_mask`, or, where a GPU's attention needs no mask, from `Runs`.

K responses to one prompt share more. What precedes the prompt's last token, their *stem*, stands in
a row once, and each response continues it:

    tokens      p p p | q a a a . | q b b . | other sequence . | padding     q: the prompt's last
    documents   0 0 0 | 1 1 1 1 1 | 2 2 2 2 | 3 3 3 3 3 3 3 3  | 4 4 4 4
    parents     - - - | 0 0 0 0 0 | 0 0 0 0 | - - - - - - - -  | - - - -

Only the work is less: log-probs and gradients are those of K whole sequences. (Each response has
the last token of the prompt for itself, because that position predicts its first own token.)
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Example:
    """A sequence to train on: `spans` are the [start, end) token ranges to be predicted (responses,
    stop included).

    They are counted when prompt and response are put together. A mask made from token values
    (`token != pad`) breaks as soon as the stop token is the padding, or stands in the prompt.
    """

    tokens: list[int]
    spans: list[tuple[int, int]]
    positions: list[int] | None = None  # of each token; None: 0, 1, 2, ...

    @property
    def trained(self) -> list[int]:
        """Where the trained tokens stand. (Nothing comes before the first to predict it from.)"""
        return [t for start, end in self.spans for t in range(max(start, 1), end)]

    @property
    def targets(self) -> int:
        """How many tokens are trained on."""
        return sum(end - max(start, 1) for start, end in self.spans)

    @property
    def stem(self) -> tuple[int, ...]:
        """What sequences with the same prompt can share: the tokens before the one that predicts
        the first target.

        Nothing where the positions are its own: the same tokens at other positions have other keys.
        """
        if not self.spans or self.positions is not None:
            return ()
        return tuple(self.tokens[: max(self.spans[0][0] - 1, 0)])


@dataclasses.dataclass(frozen=True)
class Packed:
    """Sequences packed into R rows of T tokens, with M trained tokens in them."""

    tokens: Tensor  # [R, T]
    documents: Tensor | None  # [R, T] the number of a run of tokens in its row; None: one run each
    parents: Tensor | None  # [R, T] the run that this one continues (-1: none); None: none does
    positions: Tensor  # [R, T] of each token in its sequence
    runs: "Runs"  # the same rows, for attention that needs no mask
    index: Tensor  # [M] where a trained token is predicted *from*, in the flattened rows
    targets: Tensor  # [M] the trained tokens, sequence after sequence as they were given

    def to(self, device: torch.device) -> "Packed":
        """The same on another device."""
        return moved(self, device)


@dataclasses.dataclass(frozen=True)
class Runs:
    """What variable-length attention has to know of packed rows: their runs, row after row.

    The queries of a run are its own tokens; its keys are its own and, before them, those of the run
    that it continues. The last of its queries sees all of its keys, the one before it all but the
    last, and so on. The padding at a row's end is a run, too.

    `most_queries` and `most_keys` are known here and need not be asked of a device, which would
    have to finish all its work first.
    """

    query_starts: Tensor  # [runs + 1] int32: where each run's queries start, and where the last end
    key_starts: Tensor  # [runs + 1] int32: the same of the keys
    keys: Tensor | None  # [keys] where they stand in the flattened rows; None: each once, in order
    most_queries: int  # of a run
    most_keys: int

    def to(self, device: torch.device) -> "Runs":
        """The same on another device."""
        return moved(self, device)


def moved(record: Any, device: torch.device) -> Any:
    """A dataclass with all that can move on another device."""
    changes = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor | Runs):
            changes[field.name] = value.to(device)
    return dataclasses.replace(record, **changes)


# --- which sequences stand together ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Unit:
    """Sequences that stand together: one, or several behind one copy of the stem they share."""

    members: list[int]  # which of the examples
    length: int  # tokens, the stem counted once


def share_stems(
    examples: list[Example], dim: int | None, most: int = sys.maxsize
) -> tuple[list[Unit], int]:
    """(units, how long a row should be): sequences with one stem stand together, as many as a row
    holds. A row is `cheapest_row` long, `most` at most.

    dim: the model's width. None: attention needs no mask (`Runs`), so that a longer row does not
    make it dearer.
    """
    families: dict[tuple[int, ...], list[int]] = {}
    for i, example in enumerate(examples):
        families.setdefault(example.stem, []).append(i)
    shared, alone = [], []
    for stem, members in families.items():
        if stem and len(members) > 1:
            shared.append(members)
        else:
            alone += members

    row_length = most
    if dim is not None:
        stems = [len(examples[i].stem) for members in shared for i in members]
        cheapest = cheapest_row(sum(stems) / max(1, len(stems)), dim)
        row_length = min(cheapest, most)
    units = []
    for members in shared:
        units += split_family(members, examples, row_length)
    units += [Unit([i], len(examples[i].tokens)) for i in sorted(alone)]
    return units, row_length


def cheapest_row(stem: float, dim: int) -> int:
    """How long rows should be in which stems of `stem` tokens are shared: s + sqrt(s (3 dim + s)).

    A row of T tokens has room for T - s tokens of responses, so the matrix products cost
    T / (T - s) per token of a response: the less, the longer the row. But attention goes over the
    whole row, and is taken to cost T / (3 dim) of the matrix products (at half of their speed).

        cost(T) = T / (T - s) * (1 + T / (3 dim))
        d log cost / dT = 1/T - 1/(T - s) + 1/(3 dim + T) = 0
        T (T - s) = s (3 dim + T), or T^2 - 2 s T - 3 dim s = 0, whose root above s is the above.
    """
    return round(stem + math.sqrt(stem * (3 * dim + stem)))


def split_family(members: list[int], examples: list[Example], row_length: int) -> list[Unit]:
    """Sequences with one stem, the longest first, cut into units that fit into a row."""
    stem = len(examples[members[0]].stem)
    room = max(row_length, *(len(examples[i].tokens) for i in members))
    units = []
    unit: list[int] = []
    length = stem
    for i in sorted(members, key=lambda i: (-len(examples[i].tokens), i)):
        own = len(examples[i].tokens) - stem
        if length + own > room:
            units.append(Unit(unit, length))
            unit = []
            length = stem
        unit.append(i)
        length += own
    return [*units, Unit(unit, length)]


def fill_rows(lengths: list[int], row_length: int = 0) -> tuple[list[list[int]], int]:
    """First-fit decreasing: which of `lengths` each row holds, and how wide the rows are.

    A row has room for `row_length`, or for the longest of them if that is longer.
    """
    capacity = max([row_length, *lengths])
    rows: list[list[int]] = []
    filled: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = (r for r, used in enumerate(filled) if used + lengths[i] <= capacity)
        row = next(fitting, len(rows))
        if row == len(rows):
            rows.append([])
            filled.append(0)
        rows[row].append(i)
        filled[row] += lengths[i]
    return rows, max(filled, default=1)


# --- the rows -------------------------------------------------------------------------------------


class Row:
    """A row as it is filled, run after run."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.documents: list[int] = []
        self.parents: list[int] = []
        self.positions: list[int] = []
        self.runs: list[tuple[range, int]] = []  # (where it stands, the run it continues or -1)

    def add(self, tokens: Sequence[int], positions: Sequence[int], parent: int = -1) -> int:
        """Append a run of tokens, which continues the run `parent` if there is one; its number."""
        number = len(self.runs)
        start = len(self.tokens)
        self.runs.append((range(start, start + len(tokens)), parent))
        self.tokens += tokens
        self.documents += [number] * len(tokens)
        self.parents += [parent] * len(tokens)
        self.positions += positions
        return number

    def add_unit(self, members: list[Example]) -> list[int]:
        """Append a unit: its stem, if it has one to share, and what is each member's own.

        Returns for each member where in the row its first token stands; or would stand, if the
        stem's copy were right before what is its own.
        """
        stem = 0
        parent = -1
        if len(members) > 1:
            shared = members[0].stem
            stem = len(shared)
            parent = self.add(shared, range(stem))
        starts = []
        for example in members:
            starts.append(len(self.tokens) - stem)
            positions = example.positions or range(len(example.tokens))
            self.add(example.tokens[stem:], positions[stem:], parent)
        return starts

    def pad(self, width: int) -> None:
        """Fill the row up to `width` with a run of zeros, if it is not full."""
        missing = width - len(self.tokens)
        if missing:
            self.add([0] * missing, [0] * missing)


def pack(examples: list[Example], row_length: int = 0, units: list[Unit] | None = None) -> Packed:
    """Rows of about `row_length` tokens, see `fill_rows`.

    units: of all the examples; by default each stands alone.
    """
    if units is None:
        units = [Unit([i], len(example.tokens)) for i, example in enumerate(examples)]
    filled, width = fill_rows([unit.length for unit in units], row_length)
    rows = []
    starts = [0] * len(examples)  # of each example, in the flattened rows
    for r, chosen in enumerate(filled):
        row = Row()
        for unit in (units[u] for u in chosen):
            columns = row.add_unit([examples[i] for i in unit.members])
            for i, column in zip(unit.members, columns):
                starts[i] = r * width + column
        rows.append(row)
    rows = rows or [Row()]

    # One run per row: causal attention alone keeps it from the padding, which comes after it.
    one_each = all(len(row.runs) <= 1 for row in rows)
    for row in rows:
        row.pad(width)

    def grid(name: str) -> Tensor:
        """[R, T] of that attribute of the rows."""
        return integers([getattr(row, name) for row in rows])

    index = []
    targets = []
    for example, start in zip(examples, starts):
        index += [start + t - 1 for t in example.trained]  # the place before a token predicts it
        targets += [example.tokens[t] for t in example.trained]
    shared = any(len(unit.members) > 1 for unit in units)
    return Packed(
        tokens=grid("tokens"),
        documents=None if one_each else grid("documents"),
        parents=grid("parents") if shared else None,
        positions=grid("positions"),
        runs=find_runs(rows, width),
        index=integers(index),
        targets=integers(targets),
    )


def integers(values: list) -> Tensor:
    """A tensor of lists of int. numpy reads a list of 8,192 six times as fast as torch does."""
    return torch.from_numpy(np.array(values, dtype=np.int64))


def find_runs(rows: list[Row], width: int) -> Runs:
    """The runs of all rows, which are `width` long."""
    query_counts = []  # of each run
    key_counts = []
    keys = []  # where they stand, run after run
    for r, row in enumerate(rows):
        for own, parent in row.runs:
            before = range(0)
            if parent >= 0:
                before, _ = row.runs[parent]
            query_counts.append(len(own))
            key_counts.append(len(before) + len(own))
            for span in (before, own):
                keys.append(r * width + torch.arange(span.start, span.stop))
    return Runs(
        query_starts=torch.tensor([0, *itertools.accumulate(query_counts)], dtype=torch.int32),
        key_starts=torch.tensor([0, *itertools.accumulate(key_counts)], dtype=torch.int32),
        keys=None if key_counts == query_counts else torch.cat(keys),
        most_queries=max(query_counts),
        most_keys=max(key_counts),
    )


def positions_and_mask(
    tokens: Tensor, documents: Tensor | None, parents: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What packing means to a model: (each token's position [B or 1, T], which keys each query sees
    [B, 1, T, T]). None for the keys: all up to the query itself.

    Documents are runs of equal numbers; where some have parents, they are numbered 0, 1, ... in
    their row.
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)
    if documents is None:
        return place[None], None
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=False)
    start = torch.where(begins, place, 0).cummax(dim=1).values
    positions = place - start
    visible = place >= start[..., None]
    if parents is not None:
        ones = torch.ones_like(documents)
        lengths = torch.zeros_like(documents).scatter_add_(1, documents, ones)  # of each run
        before = lengths.gather(1, parents.clamp(min=0))
        positions = positions + torch.where(parents < 0, 0, before)
        visible = visible | (documents[:, None] == parents[..., None])
    return positions, (visible & (place <= place[:, None]))[:, None]
