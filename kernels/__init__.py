"""The kernels: everything over a vocabulary, and the small work of a decode step.

Five files, to be read in this order. Each holds the derivation, a PyTorch version and a Triton
kernel, and picks by device (CUDA: Triton; anything else: PyTorch).

    softmax.py          online softmax: the idea that the next three are built on
    logprob.py          log-prob of the target and entropy of the row, with both gradients
    linear_logprob.py   the same from hidden states and the head's weight, without storing logits
    sampling.py         temperature, top-p, min-p and the draw itself; its random numbers are a
                        function of (seed, position, token) and of nothing else
    decoding.py         norms, rotary positions and the gate for one token of each sequence

The first four are log-probs, entropies and draws: the only part of nanoT1 that touches logits.
"""

from .decoding import add_norm, rotary_write, silu_mul
from .linear_logprob import linear_logprob_entropy
from .logprob import logprob_entropy
from .sampling import sample_token
from .softmax import log_softmax, softmax

__all__ = [
    "add_norm",
    "linear_logprob_entropy",
    "log_softmax",
    "logprob_entropy",
    "rotary_write",
    "sample_token",
    "silu_mul",
    "softmax",
]
