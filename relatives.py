"""What people compare T1 with, where it differs from T1: GRPO, Dr. GRPO, DAPO and REINFORCE.

One pure function for each piece: baselines, rewards, terms and averages of the loss. `rl.RECIPES`
says which of them make up which algorithm. (RLSP, which has a critic, is a file of its own:
rlsp.py.)

Different from their papers: a group whose advantages are all zero is dropped, as T1's are, before
the loss is averaged. In GRPO such a group would still have a KL term; and the mean, or Dr. GRPO's
constant, would count its responses.
"""

from typing import Any

import torch
from torch import Tensor

from cli import UserError
from rollout import Response, lengths, outcome

# --- the baseline: rewards [P, K] -> advantages [P, K] --------------------------------------------


def group_mean(rewards: Tensor) -> Tensor:
    """Dr. GRPO (arXiv 2503.20783): each reward less its prompt's mean. [P, K] -> [P, K]."""
    return rewards - rewards.mean(dim=1, keepdim=True)


def group_normalised(rewards: Tensor) -> Tensor:
    """GRPO (arXiv 2402.03300): also divided by the prompt's deviation. [P, K] -> [P, K]."""
    if rewards.shape[1] < 2:
        raise UserError("GRPO's baseline needs at least 2 samples per prompt, to compare them")
    return group_mean(rewards) / (rewards.std(dim=1, keepdim=True) + 1e-4)


def batch_mean(rewards: Tensor) -> Tensor:
    """REINFORCE with the plainest baseline, the mean of the whole batch. [P, K] -> [P, K]."""
    return rewards - rewards.mean()


# --- the reward: responses -> [N] -----------------------------------------------------------------


def outcome_and_length(responses: list[Response], config: Any) -> Tensor:
    """DAPO (arXiv 2503.14476): the outcome, less for the last fifth of the length. [N]."""
    buffer = max(1, config.max_tokens // 5)
    return outcome(responses) + soft_overlong(lengths(responses), config.max_tokens, buffer)


def soft_overlong(lengths: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """0 up to max_tokens - buffer, then falling linearly to -1 at max_tokens. [N] -> [N]."""
    return ((max_tokens - buffer - lengths) / buffer).clamp(-1, 0)


# --- the loss -------------------------------------------------------------------------------------


def k3_kl(logprob: Tensor, anchor_logprob: Tensor) -> Tensor:
    """GRPO's KL, a term of the loss: r - log r - 1 with r = anchor / policy. [M] -> [M], >= 0."""
    log_ratio = anchor_logprob - logprob
    return log_ratio.exp() - log_ratio - 1


# How a loss is averaged: the weight of each response's tokens, [N], in a sum that is then divided
# by the number of all tokens.


def every_token(lengths: Tensor, max_tokens: int) -> Tensor:
    """DAPO: every token weighs the same. [N] -> [N]. (And ours of T1, which does not say.)"""
    return torch.ones_like(lengths, dtype=torch.float32)


def every_response(lengths: Tensor, max_tokens: int) -> Tensor:
    """GRPO: every response weighs the same; so a token of a long wrong answer weighs less."""
    return lengths.float().mean() / lengths


def by_the_limit(lengths: Tensor, max_tokens: int) -> Tensor:
    """Dr. GRPO: every token weighs the same, and a batch of short responses less than of long."""
    return torch.ones_like(lengths) * (lengths.float().mean() / max_tokens)
