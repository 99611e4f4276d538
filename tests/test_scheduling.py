"""The decode step waits for nobody."""

import pytest
import torch
from test_sample import BLOCK, CONFIG, MODEL
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from model import Transformer
from sample import Batch, SamplingParams

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
