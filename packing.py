"""Sequences of any length into rows of one length, and per-token values into the same places and back.

    packed = pack([Example(prompt + response, [(len(prompt), len(prompt) + len(response))]), ...])
    logprob, entropy = parallel.score(scorer, packed)                    # [R, T] each
    old = packed.place(log_probs_by_sequence)                            # [R, T], to compare them with
    by_sequence = packed.extract(logprob)

Padding each sequence to the longest would waste most of the work where lengths vary as chains of thought do. Here short
ones share a row; attention and positions stay within a sequence (`model.Transformer`, `documents`).
"""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Example:
    """A sequence to train on: `spans` are the [start, end) token ranges to be predicted (responses, stop included).

    A mask made from token values (`token != pad`) breaks as soon as the stop token is the padding, or stands in the
    prompt; spans are counted when prompt and response are put together.
    """

    tokens: list[int]
    spans: list[tuple[int, int]]

    @property
    def targets(self) -> int:
        """How many tokens are trained on. The first token of a sequence cannot be predicted from anything."""
        return sum(end - max(start, 1) for start, end in self.spans)


@dataclasses.dataclass(frozen=True)
class Packed:
    """Sequences packed into R rows of T tokens. Position t of a document predicts its token t + 1.

    tokens[R, T] int64; documents[R, T] int64, the number of the document in its row (padding: one more document), or
    None where every row holds one document; targets[R, T] int64, the next token of the document (0 where there is
    none); mask[R, T] bool, true where the target is trained on; index[N] int64, the same positions in flattened form,
    sequence after sequence in the order in which they were given; counts[i], how many of them are sequence i's.
    """

    tokens: Tensor
    documents: Tensor | None
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


def pack(examples: list[Example], row_length: int = 0) -> Packed:
    """Fill rows of `row_length` tokens (at least the longest sequence) by first-fit decreasing."""
    lengths = [len(example.tokens) for example in examples]
    capacity = max([row_length, *lengths])
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(examples)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, room in enumerate(free) if room >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(capacity)
        rows[row].append(i)
        free[row] -= lengths[i]
    height, width = max(len(rows), 1), capacity - min(free) if rows else 1
    tokens = torch.zeros(height, width, dtype=torch.long)
    targets = torch.zeros_like(tokens)
    documents = torch.zeros_like(tokens)
    positions: list[list[int]] = [[]] * len(examples)
    for r, row in enumerate(rows):
        column = 0
        for number, i in enumerate(row):
            end = column + lengths[i]
            tokens[r, column:end] = torch.tensor(examples[i].tokens)
            targets[r, column : end - 1] = tokens[r, column + 1 : end]
            documents[r, column:] = number
            origin = r * width + column - 1  # the position before a token is the one that predicts it
            positions[i] = [origin + t for start, stop in examples[i].spans for t in range(max(start, 1), stop)]
            column = end
        documents[r, column:] = len(row)
    index = torch.tensor([p for sequence in positions for p in sequence], dtype=torch.long)
    mask = torch.zeros(height * width, dtype=torch.bool)
    mask[index] = True
    # One document per row: causal attention alone keeps it from the padding, which comes after it. No mask to build.
    alone = all(len(row) == 1 for row in rows)
    counts = [len(sequence) for sequence in positions]
    return Packed(tokens, None if alone else documents, targets, mask.view(height, width), index, counts)
