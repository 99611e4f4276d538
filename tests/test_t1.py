"""t1.py is the slow reference of the whole: rl.py's step must give its numbers, from the same rollouts.

Also what t1.py promises of itself: it stands alone, its judge cannot be talked round, its chains try,
fail, notice and verify, and its cached sampler is the model that it trains.
"""

import ast
import copy
import random
from pathlib import Path

import pytest
import torch

import parallel
import rl
import t1
from model import ModelConfig, Transformer
from packing import Example
from parallel import World
from rollout import Response
from sample import Completion, Sampler
from tasks import Problem
from verify import Verdict

ROOT = Path(__file__).resolve().parent.parent
SHAPE = ModelConfig(
    vocab_size=len(t1.WORDS),
    dim=t1.DIM,
    layers=t1.LAYERS,
    heads=t1.HEADS,
    kv_heads=t1.HEADS,
    head_dim=t1.DIM // t1.HEADS,
    mlp_dim=3 * t1.DIM,
    context=t1.CONTEXT,
    tied=True,
    eos_ids=(t1.ID["<end>"],),
)


def policy_of(seed: int, dtype: torch.dtype = torch.float64) -> t1.Transformer:
    torch.manual_seed(seed)
    return t1.Transformer().to(dtype)


def as_model(policy: t1.Transformer) -> Transformer:
    """The same weights in model.py's transformer."""
    model = Transformer(SHAPE, policy.embed.weight.dtype)
    model.load_state_dict(policy.state_dict())  # the names are the same
    return model


def ids(text: str) -> list[int]:
    return [t1.ID[word] for word in text.split()]


def test_it_stands_alone():
    """Bug: a second file to read before the first one; a file that outgrew its promise."""
    text = (ROOT / "t1.py").read_text()
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    ours = {path.stem for path in ROOT.glob("*.py")} | {"kernels"}
    assert not imported & ours
    assert len(text.splitlines()) <= 300 and max(map(len, text.splitlines())) <= 100


def test_the_way_is_found_and_judged():
    """Bug: an answer that uses a number twice, bends a sum, or names another target, and is paid."""
    prompt = t1.problems(heldout=True)[0]
    numbers, target = prompt.split(" target ")
    ways = t1.ways(numbers)
    for way in ways[target]:
        assert t1.outcome(prompt, f"check {way} <end>") == 1
    others = [way for value, found in ways.items() if value != target for way in found]
    bent = [way.rsplit(" ", 1)[0] + f" {target}" for way in others]
    for wrong in [*others, *bent, "", "check"]:
        assert t1.outcome(prompt, f"check {wrong} <end>") == 0
    assert t1.outcome(prompt, f"check {ways[target][0]}") == 1  # overlong: the penalty's business
    assert t1.outcome(prompt, ways[target][0] + " <end>") == 0  # never checked


@pytest.mark.parametrize("seed", range(3))
def test_every_sum_of_a_way_is_true(seed):
    """Bug: data that teaches false sums."""
    rng = random.Random(seed)
    for prompt in rng.sample(t1.problems(heldout=False), 50):
        numbers, _ = prompt.split(" target ")
        for value, found in t1.ways(numbers).items():
            words = rng.choice(found).split()
            used = [words[0]]
            for x, sign, y, _, z in zip(*[iter(words)] * 5):
                assert eval(f"{x} {sign} {y}") == int(z)
                used.append(y)
            assert sorted(used) == sorted(numbers.split()) and words[-1] == value


def test_chains_end_in_their_first_success():
    """Bug: a chain that claims a failure, goes on after a success, or never fails."""
    rng, lengths = random.Random(0), set()
    for prompt in t1.problems(heldout=False)[:300]:
        text = t1.chain(prompt, rng)
        if text:
            assert t1.outcome(prompt, text) == 1
            thought, _, _ = text.partition(" yes check ")
            lengths.add(thought.count(" no ") + 1)
            *failed, right = thought.split(" no ")
            target = prompt.split()[-1]
            assert right.split()[t1.WAY - 1] == target
            assert all(attempt.split()[t1.WAY - 1] != target for attempt in failed)
    assert lengths == {1, 2, 3}


def test_no_numbers_are_trained_and_tested_on():
    """Bug: held-out problems whose numbers the policy knows by heart."""
    sets = [{p.split(" target ")[0] for p in t1.problems(heldout)} for heldout in (False, True)]
    assert not sets[0] & sets[1] and min(map(len, sets)) > 50


def test_the_sampler_is_the_model():
    """Bug: a cache that is off by one, or rows that are confused when some have ended.

    At a temperature near 0 the sampler takes the likeliest word; a forward of the whole text must
    find each word of it likeliest, too.
    """
    policy = policy_of(0, torch.float32)
    prompts = t1.problems(heldout=True)[:24]
    responses = t1.sample(policy, prompts, 40, temperature=1e-4)
    for prompt, response in zip(prompts, responses):
        tokens = torch.tensor([ids(f"{prompt} {response}")])
        logits = policy(tokens[:, :-1], torch.arange(tokens.shape[1] - 1)[None])
        assert logits[0].argmax(dim=1).tolist()[t1.PROMPT - 1 :] == ids(response)


def test_a_budget_that_ends_behind_an_answer_keeps_it(monkeypatch):
    """Bug: a chain that lacks nothing but its <end> is cut, and asked for another answer: the curve
    had dips where budgets end between a chain's last word and its <end>.
    """
    prompt = t1.problems(heldout=True)[0]
    numbers, target = prompt.split(" target ")
    right = t1.ways(numbers)[target][0]
    wrong = next(ways[0] for value, ways in t1.ways(numbers).items() if value != target)
    texts = [f"{right} yes check {right} <end>", f"{wrong} no {right} yes check {right} <end>"]

    def written(policy, prompts, most, temperature=1.0):
        if most == t1.WAY + 1:
            assert all(prompt.endswith(" check") for prompt in prompts)
            return [f"{wrong} <end>" for _ in prompts]
        return [" ".join(text.split()[:most]) for text in texts]

    monkeypatch.setattr(t1, "sample", written)
    assert len(texts[0].split()) == 33 and len(texts[1].split()) == 49
    curve = dict(zip(t1.BUDGETS, t1.budget_curve(None, [prompt, prompt])))
    assert [curve[budget] for budget in (32, 48, 64)] == [0.5, 1.0, 1.0]


def test_the_models_agree():
    """Bug: t1.py's transformer is another than model.py's, and every comparison below is idle."""
    policy = policy_of(1)
    tokens = torch.randint(0, len(t1.WORDS), (3, 50))
    model = as_model(policy)
    ours = model.logits(model(tokens))
    torch.testing.assert_close(policy(tokens, torch.arange(50)[None]), ours, rtol=1e-10, atol=1e-10)


def rollouts(policy: t1.Transformer, prompts: int) -> tuple[list[str], list[str]]:
    """Prompts, each K times, and responses of which some are right, and some never end."""
    rng, sampled = random.Random(0), copy.deepcopy(policy).float()
    asked, responses = [], []
    for prompt in rng.sample(t1.problems(heldout=False), prompts):
        asked += t1.K * [prompt]
        written = t1.sample(sampled, t1.K * [prompt], 60, t1.TEMPERATURE)
        for number in (0, 3, 4):
            written[number] = t1.chain(prompt, rng) or written[number]
        responses += written
    return asked, responses


def step_of_rl(policy, anchor, asked, responses) -> rl.Learner:
    """rl.py's step on t1.py's rollouts, by plain gradient descent at rate 1."""
    scorer = parallel.shard(as_model(policy), World(0, 1, torch.device("cpu")))
    config = rl.Config(
        model="",
        out="",
        task="countdown",
        samples=t1.K,
        prompts=len(asked) // t1.K,
        max_tokens=t1.MOST,
        minibatches=1,
        temperature=t1.TEMPERATURE,
        kl_coef=t1.KL_COEF,
        entropy_coef=t1.ENTROPY_COEF,
        anchor_decay=t1.ANCHOR_DECAY,
    )
    learner = rl.Learner(
        config,
        rl.resolve(config),
        [],
        World(0, 1, torch.device("cpu")),
        None,
        Sampler(scorer.model),
        {"policy": scorer},
        {"sgd": torch.optim.SGD(scorer.parameters(), 1.0)},
        parallel.shard(as_model(anchor), World(0, 1, torch.device("cpu"))),
    )
    rows = []
    for prompt, text in zip(asked, responses):
        ended = text.endswith("<end>")
        verdict = Verdict("correct" if t1.outcome(prompt, text) else "wrong")
        with torch.no_grad():
            logprobs, _ = t1.log_probs(policy, [f"{prompt} {text}"], t1.TEMPERATURE)
        completion = Completion(ids(text), logprobs.tolist(), "stop" if ended else "length")
        pattern = None if ended else "overlong"
        rows.append(Response(Problem(prompt, ""), ids(prompt), completion, text, verdict, pattern))
    rl.train_step(learner, rows, 1)
    learner.rows = rows
    return learner


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_a_step_of_rl_is_a_step_of_t1(monkeypatch, dtype, tolerance):
    """Bug: anything at all between rollouts and new weights in which rl.py is not T1.

    Rewards, advantages, loss, gradients, clipping and the anchor, through packing, shared prompts,
    kernels and micro-batches on one side, and straight lines on the other. (The rewards of t1.py
    are in fp32 in both cases: hence 1e-6.)
    """
    monkeypatch.setattr(t1, "MINIBATCHES", 1)
    policy, anchor = policy_of(2, dtype), policy_of(3, dtype)
    with torch.no_grad():  # near the policy, as an anchor is
        for reference, weight in zip(anchor.parameters(), policy.parameters()):
            reference.lerp_(weight, 0.9)
    asked, responses = rollouts(policy, 4)
    learner = step_of_rl(policy, anchor, asked, responses)
    before = copy.deepcopy(policy)
    optimizer = torch.optim.SGD(policy.parameters(), 1.0)
    t1.train_step(policy, anchor, optimizer, asked, responses, 1.0)
    for trained, reference in ((policy, learner.policy.model), (anchor, learner.anchor.model)):
        wanted = trained.state_dict()
        for name, value in reference.state_dict().items():
            start = before.state_dict()[name]
            assert (wanted[name] - start).norm() > 0
            difference = (value - wanted[name]).norm()
            assert difference <= tolerance * (wanted[name] - start).norm(), name


def test_the_pieces_agree():
    """Bug: one of T1's ideas says in t1.py what it does not say in rl.py. float64, to 1e-10."""
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 5, 2, 7]
    count = sum(lengths)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    logprob, old, anchor, advantage, entropy = (draw(count) for _ in range(5))
    weight = torch.ones(count, dtype=torch.float64)
    rewards = draw(3, 4)
    pairs = [
        (t1.leave_one_out(rewards), rl.leave_one_out(rewards)),
        (
            t1.centred_kl(old, anchor, lengths),
            rl.centred_kl(old, anchor, torch.tensor(lengths)),
        ),
        (
            t1.ppo_clip_loss(logprob, old, advantage, 11),
            rl.ppo_clip_loss(logprob, old, advantage, weight, t1.CLIP, t1.CLIP, 11),
        ),
        (t1.entropy_bonus(entropy, 11), rl.entropy_bonus(entropy, weight, 11)),
        (
            t1.penalise(rewards[0], ["1 <end>", "1", "no <end>", "no"]),
            rl.penalise(rewards[0], [None, "overlong", None, "overlong"]),
        ),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_examples_hold_the_stop_token():
    """Bug: t1.py's score trains on other places than packing.py's examples."""
    policy = policy_of(4)
    prompt = t1.problems(heldout=False)[0]
    text = next(filter(None, (t1.chain(prompt, random.Random(seed)) for seed in range(50))))
    logprob, _ = t1.log_probs(policy, [f"{prompt} {text}"])
    begin, tokens = t1.PROMPT, ids(f"{prompt} {text}")
    assert len(logprob) == Example(tokens, [(begin, len(tokens))]).targets
    assert tokens[-1] == t1.ID["<end>"]
