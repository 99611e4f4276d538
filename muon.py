"""Muon (Keller Jordan, 2024; arXiv 2502.16982): momentum, made orthogonal before each step.

    optimizers = make_optimizers(scorer, "muon", lr)   # Muon for the blocks' matrices, else AdamW

The gradient of a weight matrix is a sum of outer products. A few of them are large (what every
example wants) and drown the many small ones (single facts). Muon keeps the singular vectors of the
momentum and sets all singular values to about 1, so that rare facts are learned as fast as common
ones. The demo's model has to learn thousands of sums by heart: see "Muon beside AdamW" in
benchmarks/RESULTS.md.

The momentum M = U S V' becomes U V' without a singular value decomposition (Newton-Schulz): the odd
polynomial p(x) = 3.4445 x - 4.7750 x^3 + 2.0315 x^5, applied five times to M / |M|, drives the
singular values to between 0.65 and 1.25, all but those below about |M| / 500. The coefficients are
those of the reference implementation. The result is scaled by 0.4 sqrt(larger side). The root mean
square of an update is then about twice AdamW's, and both can take the same learning rate.

Made for models that fit one GPU: every rank holds the whole matrices of one shape while they are
made orthogonal. `qkv` and `gate_up` count as one matrix each. torch.optim.Muon does the same in
bf16, one matrix at a time; many CPUs have no bf16, and small matrices want batches.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from parallel import adamw, whole


class Muon(torch.optim.Optimizer):
    """For matrices [rows, columns] only, whole or sharded.

    Embeddings, heads and vectors belong to AdamW.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self) -> None:
        """One update from every `.grad`. Every rank calls it: matrices are gathered whole."""
        [group] = self.param_groups
        lr = group["lr"]
        beta = group["momentum"]
        alike = defaultdict(list)  # by shape: one batched product instead of many small ones
        for parameter in group["params"]:
            if parameter.grad is None:  # on all ranks alike: nothing was learned there
                continue
            momentum = self.state[parameter]["momentum"].lerp_(parameter.grad, 1 - beta)
            ahead = parameter.grad.lerp(momentum, beta)  # Nesterov's look-ahead
            alike[parameter.shape].append((parameter, ahead))
        for shape, pairs in alike.items():
            matrices = torch.stack([whole(ahead) for _, ahead in pairs])
            updates = orthogonal(matrices) * (0.4 * max(shape) ** 0.5)
            for (parameter, _), update in zip(pairs, updates):
                if isinstance(parameter, DTensor):
                    # All ranks have computed the same update, and each takes its part of it.
                    update = DTensor.from_local(update, parameter.device_mesh, [Replicate()])
                    update = update.redistribute(placements=parameter.placements)
                    update = update.to(parameter.device)  # the host, with --offload
                parameter.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr)


def orthogonal(matrices: Tensor) -> Tensor:
    """[N, rows, columns] -> the same singular vectors, all singular values about 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):  # x <- p(x), with x^3 = (x x') x and x^5 = (x x')^2 x
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.mT if tall else x


def make_optimizers(
    scorer: nn.Module, kind: str, lr: float, weight_decay: float = 0.0
) -> dict[str, torch.optim.Optimizer]:
    """The optimizers of a run, by name.

    kind: "adamw" for all parameters, or "muon": Muon for the matrices of the model's blocks, AdamW
    for everything else. weight_decay: on matrices only.
    """
    if kind == "adamw":
        return {"adamw": adamw(scorer.parameters(), lr, weight_decay)}
    matrices = [p for p in scorer.model.blocks.parameters() if p.ndim == 2]
    taken = set(matrices)
    rest = [parameter for parameter in scorer.parameters() if parameter not in taken]
    return {"adamw": adamw(rest, lr, weight_decay), "muon": Muon(matrices, lr, weight_decay)}
