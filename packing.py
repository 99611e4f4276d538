"""Sequences of any length into rows of one length, and per-token values into the same places and back.

    packed = pack([Example(prompt + response, [(len(prompt), len(prompt) + len(response))]), ...])
    logprob, entropy = parallel.score(scorer, packed)                    # [R, T] each
    old = packed.place(log_probs_by_sequence)                            # [R, T], to compare them with
    by_sequence = packed.extract(logprob)

Padding each sequence to the longest would waste most of the work where lengths vary as chains of thought do. Here short
ones share a row; attention and positions stay within a sequence: see `positions_and_mask`, which the model calls.

K responses to one prompt share more: what precedes the prompt's last token, their `stem`, stands in a row once, and
each response continues it (`parents`). Only the work is less: log-probs and gradients are those of K whole sequences.
(Each response has the last token of the prompt for itself, because that is the position that predicts its first one.)
"""

import dataclasses
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Example:
    """A sequence to train on: `spans` are the [start, end) token ranges to be predicted (responses, stop included).

    A mask made from token values (`token != pad`) breaks as soon as the stop token is the padding, or stands in the
    prompt; spans are counted when prompt and response are put together.
    """

    tokens: list[int]
    spans: list[tuple[int, int]]
    positions: list[int] | None = None  # of each token; None: 0, 1, 2, ...

    @property
    def stem(self) -> tuple[int, ...]:
        """What sequences with the same prompt can share: the tokens before the one that predicts the first target.

        Nothing where the positions are its own: the same tokens at other positions have other keys.
        """
        if not self.spans or self.positions is not None:
            return ()
        return tuple(self.tokens[: max(self.spans[0][0] - 1, 0)])

    @property
    def targets(self) -> int:
        """How many tokens are trained on. The first token of a sequence cannot be predicted from anything."""
        return sum(end - max(start, 1) for start, end in self.spans)


@dataclasses.dataclass(frozen=True)
class Packed:
    """Sequences packed into R rows of T tokens. Position t of a document predicts its token t + 1.

    tokens[R, T] int64; documents[R, T] int64, the number of the document in its row (padding: one more document), or
    None where every row holds one document; parents[R, T] int64, the document that this one continues (-1: none), or
    None where none does; positions[R, T] int64, of each token, or None where all count from 0 in their document;
    targets[R, T] int64, the next token of the document (0 where there is none); mask[R, T] bool, true where the target
    is trained on; index[N] int64, the same positions in flattened form, sequence after sequence in the order in which
    they were given; counts[i], how many of them are sequence i's.
    """

    tokens: Tensor
    documents: Tensor | None
    parents: Tensor | None
    positions: Tensor | None
    targets: Tensor
    mask: Tensor
    index: Tensor
    counts: list[int]

    def place(self, values: list[float | Tensor]) -> Tensor:
        """fp32[R, T] from one entry per sequence: a number (its advantage), or one per trained token."""
        grid = torch.zeros(self.mask.shape, device=self.index.device)
        if len(self.index):
            flat = [torch.as_tensor(v, dtype=torch.float32).expand(n) for v, n in zip(values, self.counts, strict=True)]
            grid.view(-1)[self.index] = torch.cat(flat).to(grid.device)
        return grid

    def extract(self, grid: Tensor) -> list[Tensor]:
        """The inverse of `place`: from [R, T], each sequence's values at its trained tokens."""
        return list(grid.flatten()[self.index].split(self.counts))

    def to(self, device: torch.device) -> "Packed":
        tensors = {
            f.name: v.to(device) for f in dataclasses.fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)


@dataclasses.dataclass(frozen=True)
class Unit:
    """Sequences that stand together: one, or several behind one copy of the stem they share."""

    members: list[int]  # which of the examples
    length: int  # tokens, the stem counted once


def share_stems(examples: list[Example], dim: int, most: int = sys.maxsize) -> tuple[list[Unit], int]:
    """(units, how long a row should be): sequences with one stem, as many together as a row holds, or their longest.

    The row's length, `most` at most, is s + sqrt(s (3 dim + s)): s the mean length of a shared stem, dim the model's
    width. In rows of T tokens a stem is repeated the less often the longer they are: T / (T - s) times the tokens of
    the responses. But attention goes over the whole row, and is taken to cost T / (3 dim) of the matrix products (half
    of their speed). The product of the two is least there.
    """
    families: dict[tuple[int, ...], list[int]] = {}
    for i, example in enumerate(examples):
        families.setdefault(example.stem, []).append(i)
    shared = [(len(stem), members) for stem, members in families.items() if stem and len(members) > 1]
    mean = sum(stem * len(members) for stem, members in shared) / max(1, sum(len(members) for _, members in shared))
    row_length = min(round(mean + math.sqrt(mean * (3 * dim + mean))), most)
    units, together = [], {i for _, members in shared for i in members}
    for stem, members in shared:
        unit, length, room = [], stem, max(row_length, *(len(examples[i].tokens) for i in members))
        for i in sorted(members, key=lambda i: (-len(examples[i].tokens), i)):
            own = len(examples[i].tokens) - stem
            if length + own > room:
                units.append(Unit(unit, length))
                unit, length = [], stem
            unit, length = [*unit, i], length + own
        units.append(Unit(unit, length))
    units += [Unit([i], len(example.tokens)) for i, example in enumerate(examples) if i not in together]
    return units, row_length


def fill_rows(lengths: list[int], row_length: int = 0) -> tuple[list[list[int]], int]:
    """First-fit decreasing: which of `lengths` each row holds, and how wide the rows are.

    A row has room for `row_length`, or for the longest of them if that is longer.
    """
    capacity = max([row_length, *lengths])
    rows: list[list[int]] = []
    filled: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, used in enumerate(filled) if used + lengths[i] <= capacity), len(rows))
        if row == len(rows):
            rows.append([])
            filled.append(0)
        rows[row].append(i)
        filled[row] += lengths[i]
    return rows, max(filled, default=1)


def pack(examples: list[Example], row_length: int = 0, units: list[Unit] | None = None) -> Packed:
    """Rows of about `row_length` tokens, see `fill_rows`. units: of all the examples; by default each stands alone."""
    units = [Unit([i], len(example.tokens)) for i, example in enumerate(examples)] if units is None else units
    rows, width = fill_rows([unit.length for unit in units], row_length)
    height = max(len(rows), 1)
    tokens = torch.zeros(height, width, dtype=torch.long)
    targets = torch.zeros_like(tokens)
    documents = torch.zeros_like(tokens)
    own_positions = any(example.positions is not None for example in examples)
    positions = torch.zeros_like(tokens) if own_positions else None
    parents = torch.full_like(tokens, -1)
    trained: list[list[int]] = [[]] * len(examples)  # flat indices of the places that predict a target
    for r, row in enumerate(rows):
        runs: list[tuple[list[int], int]] = []  # tokens, and the number of the run that they continue
        column = 0
        for unit in (units[u] for u in row):
            parent, cut = -1, 0
            if len(unit.members) > 1:
                stem = examples[unit.members[0]].stem
                parent, cut = len(runs), len(stem)
                runs.append((list(stem), -1))
                if own_positions:
                    positions[r, column : column + cut] = torch.arange(cut)
                column += cut
            for i in unit.members:
                origin = r * width + column - cut - 1  # the position before a token is the one that predicts it
                trained[i] = [origin + t for start, stop in examples[i].spans for t in range(max(start, 1), stop)]
                runs.append((examples[i].tokens[cut:], parent))
                begin, column = column, column + len(examples[i].tokens) - cut
                if own_positions:
                    own = examples[i].positions or list(range(len(examples[i].tokens)))
                    positions[r, begin:column] = torch.tensor(own[cut:])
        tokens[r, :column] = torch.tensor([token for run, _ in runs for token in run])
        targets[r, :column] = torch.tensor([token for run, _ in runs for token in (*run[1:], 0)])
        documents[r] = len(runs)
        documents[r, :column] = torch.tensor([number for number, (run, _) in enumerate(runs) for _ in run])
        parents[r, :column] = torch.tensor([parent for run, parent in runs for _ in run])
    index = torch.tensor([p for sequence in trained for p in sequence], dtype=torch.long)
    mask = torch.zeros(height * width, dtype=torch.bool)
    mask[index] = True
    # One document per row: causal attention alone keeps it from the padding, which comes after it. No mask to build.
    alone = all(len(row) == 1 for row in rows) and all(len(unit.members) == 1 for unit in units)
    counts = [len(sequence) for sequence in trained]
    parents = parents if (parents >= 0).any() else None
    documents = None if alone else documents
    return Packed(tokens, documents, parents, positions, targets, mask.view(height, width), index, counts)


def positions_and_mask(
    tokens: Tensor, documents: Tensor | None, parents: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What packing means to a model: each token's position [B or 1, T], and which keys each query sees [B, 1, T, T].

    Documents are runs of equal numbers; where some have parents, they are numbered 0, 1, ... in their row. None for the
    keys: all up to the query itself.
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)
    if documents is None:
        return place[None], None
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=False)
    start = torch.where(begins, place, 0).cummax(dim=1).values
    positions, visible = place - start, place >= start[..., None]
    if parents is not None:
        lengths = torch.zeros_like(documents).scatter_add_(1, documents, torch.ones_like(documents))  # by number
        positions = positions + torch.where(parents < 0, 0, lengths.gather(1, parents.clamp(min=0)))
        visible = visible | (documents[:, None] == parents[..., None])
    return positions, (visible & (place <= place[:, None]))[:, None]
