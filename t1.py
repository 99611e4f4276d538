"""T1 (arXiv 2501.11651) in one file: imitation teaches a policy to try, RL teaches it to think on.

    python t1.py [--seed 1] [--steps 60]      # about five minutes on two cores

It reads from top to bottom: problems and chains, a transformer, SFT, RL, inference scaling.
GUIDE.md says why. rl.py is the same for real models and many GPUs, and tests hold it to this file.
"""

import argparse
import copy
import functools
import itertools
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- 1. Problems (reach a target with four numbers, + and -), and chains that try, fail, verify ---
WORDS = [*map(str, range(37)), "+", "-", "=", "no", "yes", "check", "target", "<end>"]
ID = {word: i for i, word in enumerate(WORDS)}
PROMPT, WAY = 6, 15  # words: "3 5 7 9 target 4"; three sums, "9 - 7 = 2 2 + 5 = 7 7 - 3 = 4"


@functools.cache
def ways(numbers: str) -> dict[str, list[str]]:
    """{target: all ways to it}. A way: an order of the four numbers and three signs, worked out."""
    found: dict[str, list[str]] = {}
    orders = itertools.permutations(map(int, reversed(numbers.split())))  # large ones first
    for order, signs in itertools.product(orders, itertools.product("+-", repeat=3)):
        terms = [y if sign == "+" else -y for sign, y in zip(signs, order[1:])]
        values = list(itertools.accumulate([order[0], *terms]))
        if min(values) > 0:
            sums = zip(values, signs, order[1:], values[1:])
            way = " ".join(f"{x} {sign} {y} = {z}" for x, sign, y, z in sums)
            found.setdefault(str(values[-1]), []).append(way)
    return found


def problems(heldout: bool) -> list[str]:
    """All prompts with numbers up to 9. A fifth of the sets of numbers is held out."""
    sets = itertools.combinations_with_replacement(map(str, range(1, 10)), 4)
    texts = random.Random("held out").sample(list(map(" ".join, sets)), 495)
    chosen = texts[:99] if heldout else texts[99:]
    return [f"{numbers} target {target}" for numbers in chosen for target in ways(numbers)]


def chain(prompt: str, rng: random.Random) -> str | None:
    """T1's data: three attempts, at three values, merged up to the first right one; or None."""
    numbers, target = prompt.split(" target ")
    found, text = ways(numbers), ""
    for value in rng.sample(list(found), min(3, len(found))):
        way = found[value][0]
        if value == target:
            return f"{text}{way} yes check {way} <end>"
        text += f"{way} no "
    return None


def outcome(prompt: str, response: str) -> float:
    """1 if what stands behind the last "check" is a way to the target, else 0."""
    numbers, target = prompt.split(" target ")
    answer = response.rpartition("check ")[2].removesuffix(" <end>")
    return float("check" in response and answer in ways(numbers)[target])


# --- 2. An ordinary transformer with a KV cache, the log-probs of a text, and a sampler -----------
DIM, LAYERS, HEADS, CONTEXT = 64, 4, 2, 240
linear = functools.partial(nn.Linear, bias=False)


class Block(nn.Module):
    """Attention, then a gated MLP. Each reads a normalised copy of the stream, and adds to it."""

    def __init__(self):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(DIM, 1e-5), nn.RMSNorm(DIM, 1e-5)
        self.qkv, self.out = linear(DIM, 3 * DIM), linear(DIM, DIM)
        self.gate_up, self.down = linear(DIM, 6 * DIM), linear(3 * DIM, DIM)

    def forward(self, x: Tensor, rotation: Tensor, cache: Tensor | None, start: int) -> Tensor:
        """x [B, T, D]. cache [2, B, length, H, Dh]: keys and values of the words before `start`."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1))  # [B, T, 3, H, Dh]
        pairs = torch.view_as_complex(qkv[:, :, :2].unflatten(-1, (-1, 2)))  # of q and k
        (q, k), v = torch.view_as_real(pairs * rotation).flatten(-2).unbind(2), qkv[:, :, 2]
        if cache is not None:
            end = start + x.shape[1]
            cache[0, :, start:end], cache[1, :, start:end] = k, v
            k, v = cache[:, :, :end]
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(len(WORDS), DIM)  # the output matrix, too
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(DIM, 1e-5)
        nn.init.normal_(self.embed.weight, std=DIM**-0.5)

    def forward(self, tokens: Tensor, positions: Tensor, cache=None, start: int = 0) -> Tensor:
        """Logits [B, T, V] of the next word, for tokens [B, T] at the positions [B or 1, T]."""
        frequencies = 1 / 10_000 ** (torch.arange(0, DIM // HEADS, 2) / (DIM // HEADS))
        angles = positions[:, :, None, None, None] * frequencies
        rotation = torch.polar(torch.ones_like(angles), angles)  # rotary: pairs as complex numbers
        x = self.embed(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, rotation, None if cache is None else cache[layer], start)
        return F.linear(self.norm(x), self.embed.weight)


def log_probs(policy, texts: list[str], temperature=1.0, positions=None) -> tuple[Tensor, Tensor]:
    """(log-prob, entropy) of each word of the responses, text after text: both flat, [W]."""
    words = [torch.tensor([ID[word] for word in text.split()]) for text in texts]
    tokens = nn.utils.rnn.pad_sequence(words, batch_first=True)
    places = torch.arange(1, tokens.shape[1])  # logits at place t - 1 are for the word at t
    lengths = torch.tensor([[len(text)] for text in words])
    trained = (places >= PROMPT) & (places < lengths)  # the response, with its own <end>
    positions = torch.arange(CONTEXT)[None] if positions is None else positions
    logits = policy(tokens[:, :-1], positions[:, : len(places)])[trained]
    # The temperature divides the logits here, too: what is trained is the policy that sampled.
    logprobs = (logits / temperature).log_softmax(dim=1)
    chosen = logprobs.gather(1, tokens[:, 1:][trained][:, None]).squeeze(1)
    return chosen, -(logprobs.exp() * logprobs).sum(dim=1)


@torch.no_grad()
def sample(policy: Transformer, prompts: list[str], most: int, temperature=1.0) -> list[str]:
    """Responses of at most so many words to prompts of one length. An ordinary cached sampler."""
    tokens = torch.tensor([[ID[word] for word in prompt.split()] for prompt in prompts])
    count, start = tokens.shape
    cache = torch.zeros(LAYERS, 2, count, start + most, HEADS, DIM // HEADS)
    written = torch.full((count, most), ID["<end>"])
    rows = torch.arange(count)  # the responses that are still in the batch
    unended = torch.ones(count, dtype=torch.bool)  # which of these have no <end> yet
    logits = policy(tokens, torch.arange(start)[None], cache)
    for place in range(start, start + most):
        words = torch.multinomial((logits[:, -1] / temperature).softmax(dim=1), 1)
        written[rows, place - start] = words[:, 0]
        unended &= words[:, 0] != ID["<end>"]
        if unended.float().mean() < 0.8:  # take those that have ended out of the batch
            rows, words, cache = rows[unended], words[unended], cache[:, :, unended]
            unended = unended[unended]
        if len(rows) == 0:
            break
        logits = policy(words, torch.tensor([[place]]), cache, place)
    texts = [" ".join(WORDS[i] for i in response) for response in written.tolist()]
    return ["".join(text.partition("<end>")[:2]) for text in texts]


# --- 3. SFT ---------------------------------------------------------------------------------------
SFT_STEPS, SFT_BATCH, SFT_LR = 900, 32, 4e-3


def train_sft(policy: Transformer, prompts: list[str], rng: random.Random) -> None:
    """Imitation: the mean log-prob of the chains' words goes up."""
    texts = [f"{p} {found}" for p in prompts for _ in range(30) if (found := chain(p, rng))]
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(SFT_STEPS):
        # 70 % of the batches spread over all 240 positions: else those behind 71 are never trained.
        positions = None
        if rng.random() < 0.7:
            positions = torch.rand(SFT_BATCH, CONTEXT).argsort(dim=1)[:, :72].sort(dim=1).values
        logprob, _ = log_probs(policy, rng.sample(texts, SFT_BATCH), positions=positions)
        loss = -logprob.mean()
        loss.backward()
        update(policy, optimizer, SFT_LR * min((step + 1) / 100, 1 - step / SFT_STEPS))
        print(f"\rSFT {step + 1} of {SFT_STEPS}: loss {loss:.3f}", end="", flush=True)


def update(policy: Transformer, optimizer: torch.optim.Optimizer, rate: float) -> None:
    nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


# --- 4. RL ----------------------------------------------------------------------------------------
# y_i: one of K responses to a prompt x. pi: the policy; pi_old: before the step; ref: the anchor.
PROMPTS, K, TEMPERATURE, MOST = 64, 16, 1.2, 160  # T1: 32 prompts, K = 64, at 1.2
RL_LR, MINIBATCHES, CLIP, KL_COEF, ENTROPY_COEF, ANCHOR_DECAY = 3e-4, 2, 0.2, 2e-4, 1e-3, 0.99


def penalise(rewards: Tensor, responses: list[str]) -> Tensor:
    """r'_i = -1 if y_i never ends, else r_i. (T1: or repeats itself, or is garbled.) [K] -> [K]."""
    endless = [not response.endswith("<end>") for response in responses]
    return torch.where(torch.tensor(endless), -1.0, rewards)


def centred_kl(old: Tensor, ref: Tensor, lengths: list[int]) -> Tensor:
    """k_i - mean k of the group, k_i = sum_t log pi_old(y_it) / ref(y_it), in nats. [W] -> [K]."""
    kl = torch.stack([log_ratios.sum() for log_ratios in (old - ref).split(lengths)])
    return kl - kl.mean()


def leave_one_out(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean of the other K - 1 rewards of the prompt. [P prompts, K] -> [P, K]."""
    others = rewards.sum(dim=1, keepdim=True) - rewards
    return rewards - others / (rewards.shape[1] - 1)


def ppo_clip_loss(logprob: Tensor, old: Tensor, advantage: Tensor, count: int) -> Tensor:
    """-1/M sum_it min(w A, clip(w, 1 - e, 1 + e) A), w = pi(y_it) / pi_old(y_it), M = count.
    [W] each. Where w = 1 its gradient is that of -A log pi: the plain policy gradient."""
    ratio = (logprob - old).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    return -surrogate.sum() / count


def entropy_bonus(entropy: Tensor, count: int) -> Tensor:
    """1/M sum_it H(pi(. | x, y_<t)), H over all words, in nats. [W] -> scalar."""
    return entropy.sum() / count


@torch.no_grad()
def update_anchor(anchor: Transformer, policy: Transformer) -> None:
    """ref <- a ref + (1 - a) pi."""
    for slow, fast in zip(anchor.parameters(), policy.parameters()):
        slow.lerp_(fast, 1 - ANCHOR_DECAY)


def train_step(policy, anchor, optimizer, asked: list[str], responses: list[str], rate: float):
    """One step of T1 on K responses to each prompt, prompt after prompt."""
    groups = []
    for i in range(0, len(asked), K):
        prompt, group = asked[i], responses[i : i + K]
        texts = [f"{prompt} {response}" for response in group]
        lengths = [len(response.split()) for response in group]
        rewards = penalise(torch.tensor([outcome(prompt, response) for response in group]), group)
        if rewards.unique().numel() > 1:  # else all advantages are 0 (but for the KL: thousandths)
            with torch.no_grad():  # log-probs before the first update, and the anchor's
                old, _ = log_probs(policy, texts, TEMPERATURE)
                ref, _ = log_probs(anchor, texts, TEMPERATURE)
            rewards = rewards - KL_COEF * centred_kl(old, ref, lengths)
            [advantages] = leave_one_out(rewards[None])  # a batch of one group, [1, K]
            groups.append((texts, old, advantages.repeat_interleave(torch.tensor(lengths))))
    for turn in range(MINIBATCHES):  # every second group; by the second update pi is not pi_old
        minibatch = groups[turn::MINIBATCHES]
        count = sum(len(old) for _, old, _ in minibatch)
        for texts, old, advantage in minibatch:
            logprob, entropy = log_probs(policy, texts, TEMPERATURE)
            loss = ppo_clip_loss(logprob, old, advantage, count)
            (loss - ENTROPY_COEF * entropy_bonus(entropy, count)).backward()
        update(policy, optimizer, rate)
    update_anchor(anchor, policy)


# --- 5. Inference scaling: accuracy against thinking budget ---------------------------------------
BUDGETS = (32, 48, 64, 96, 128, 160)  # words; an attempt has 16


def budget_curve(policy: Transformer, prompts: list[str]) -> list[float]:
    """Thoughts written anew for each budget. Where one is cut, "check" asks for the answer."""
    curve = []
    for budget in BUDGETS:
        thoughts = sample(policy, prompts, budget)
        words = [thought.split() for thought in thoughts]
        cut = [i for i, w in enumerate(words) if w[-1] != "<end>" and w[-1 - WAY] != "check"]
        begun = [f"{prompts[i]} {thoughts[i]} check" for i in cut]
        for i, answer in zip(cut, sample(policy, begun, WAY + 1) if begun else []):
            thoughts[i] += f" check {answer}"
        curve.append(sum(map(outcome, prompts, thoughts)) / len(prompts))
    for prompt, thought in list(zip(prompts, thoughts))[::200]:  # of the largest budget
        print(f"  {prompt} : " + thought.replace(" no ", " no\n      "))
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="decides weights, chains and samples")
    parser.add_argument("--steps", type=int, default=36, help="steps of RL")
    flags = parser.parse_args()
    torch.manual_seed(flags.seed)
    rng = random.Random(flags.seed)
    training, heldout = problems(heldout=False), problems(heldout=True)[:500]
    policy = Transformer()
    train_sft(policy, training, rng)
    print("\n\nHeld-out problems, after SFT:")
    before = budget_curve(policy, heldout)
    anchor = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
    for step in range(flags.steps):
        asked = [prompt for prompt in rng.sample(training, PROMPTS) for _ in range(K)]
        responses = sample(policy, asked, MOST, TEMPERATURE)
        train_step(policy, anchor, optimizer, asked, responses, RL_LR * min(1, (step + 1) / 4))
        right = sum(map(outcome, asked, responses)) / len(asked)
        print(f"\rRL {step + 1} of {flags.steps}: {right:.1%} right", end="", flush=True)
    print("\n\nThe same, after RL:")
    after = budget_curve(policy, heldout)
    print("\nwords of thought    right after SFT    after RL")
    for budget, sft, rl in zip(BUDGETS, before, after):
        print(f"{budget:16}{sft:19.1%}{rl:12.1%}")


if __name__ == "__main__":
    main()
