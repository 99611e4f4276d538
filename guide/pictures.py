"""The pictures of GUIDE.md, into this folder.

    python guide/pictures.py

step.png        how the data flows through one step
advantages.png  leave-one-out advantages of 64 responses, by how many of them are right
clip.png        PPO's clipped objective, by the sign of the advantage
numbers.png     the entropy of two tokens and its gradient; how long the anchor remembers
packed.png      a packed row: which token sees which. Drawn from what packing.py really makes
batch.png       the sampler's batch before and after a sequence ends
"""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import packing
import rl
from packing import Example

FOLDER = Path(__file__).resolve().parent
BLUE, RED, GREEN, GOLD, GREY = "#3465a4", "#c0392b", "#3a7d44", "#d9a521", "#8a8a8a"
PALE = {BLUE: "#cfdcee", RED: "#f3d0cb", GREEN: "#d3e6d5", GOLD: "#f6e7bd", GREY: "#ececec"}


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, facecolor="white")


def blank(figure: Figure, width: float, height: float) -> Axes:
    """Axes without a frame, from (0, 0) to (width, height)."""
    axes = figure.add_axes([0, 0, 1, 1])
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return axes


# --- the step -------------------------------------------------------------------------------------


def box(axes: Axes, x: float, y: float, title: str, text: str, color: str) -> None:
    """A box of 2.3 by 1.1 whose lower left corner is (x, y)."""
    shape = FancyBboxPatch(
        (x, y), 2.3, 1.1, boxstyle="round,pad=0.05", facecolor=PALE[color], edgecolor=color, lw=1.3
    )
    axes.add_patch(shape)
    axes.text(x + 1.15, y + 0.84, title, ha="center", va="center", fontsize=10, weight="bold")
    axes.text(x + 1.15, y + 0.36, text, ha="center", va="center", fontsize=8.5, linespacing=1.3)


def arrow(axes: Axes, start: tuple, end: tuple, bend: float = 0.0) -> None:
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=13,
            lw=1.3,
            color="#444",
            connectionstyle=style,
        )
    )


def draw_step(path: Path) -> None:
    figure = Figure(figsize=(9.6, 4.3))
    axes = blank(figure, 11.9, 5.35)
    top, middle, bottom = 4.1, 2.15, 0.2
    columns = (0.3, 3.3, 6.3, 9.3)
    upper = [
        ("problem", "from a file, or\nmade by program", GREY),
        ("prompt", "the question as a\nchat, in tokens", GREY),
        ("K responses", "sampled at $\\tau$ = 1.2,\nwith log-probs", BLUE),
        ("verdicts", "right or wrong?\nunexpected pattern?", GREEN),
    ]
    lower = [
        ("update", "AdamW; then\nthe anchor moves", RED),
        ("loss", "clipped ratio,\nentropy bonus", RED),
        ("log-probs", "of the policy as it is\nnow; its entropy", BLUE),
        ("advantages", "reward, penalty, KL;\nleave-one-out", GREEN),
    ]
    for x, content in zip(columns, upper):
        box(axes, x, top, *content)
    for x, content in zip(columns, lower):
        box(axes, x, bottom, *content)
    for left, right in pairwise(columns):
        arrow(axes, (left + 2.38, top + 0.55), (right - 0.08, top + 0.55))
        arrow(axes, (right - 0.08, bottom + 0.55), (left + 2.38, bottom + 0.55))
    arrow(axes, (10.45, top - 0.1), (10.45, bottom + 1.2))

    box(axes, 0.3, middle, "policy", "the weights\nthat learn", GOLD)
    box(axes, 3.3, middle, "anchor", "a slow average\nof the policy", GOLD)
    arrow(axes, (1.45, bottom + 1.2), (1.45, middle - 0.1))
    arrow(axes, (2.68, middle + 0.55), (3.22, middle + 0.55))
    arrow(axes, (2.0, middle + 1.2), (6.9, top - 0.08))
    axes.text(5.75, middle + 1.22, "weights, back to the sampler", fontsize=8.5, color="#444")
    arrow(axes, (5.68, middle + 0.35), (9.22, bottom + 1.0), bend=-0.1)
    axes.text(7.75, middle + 0.12, "its log-probs: the KL", fontsize=8.5, color="#444")
    save(figure, path)


# --- curves ---------------------------------------------------------------------------------------


def tidy(axes: Axes, **labels: str) -> None:
    axes.set(**labels)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_advantages(path: Path, samples: int = 64) -> None:
    right = torch.arange(1, samples)
    rewards = (
        torch.arange(samples) < right[:, None]
    ).double()  # a group for each count of right ones
    advantages = rl.leave_one_out(rewards)
    figure = Figure(figsize=(6.4, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(right, advantages[:, 0], color=GREEN, label="of each right response")
    axes.plot(right, advantages[:, -1], color=RED, label="of each wrong response")
    axes.axhline(0, color="black", lw=0.8)
    for count in (38, 59):
        up, down = advantages[count - 1, 0].item(), advantages[count - 1, -1].item()
        axes.plot([count, count], [up, down], color=GREY, ls=":", lw=1.2)
        axes.annotate(f"{up:+.2f}", (count, up), (2, 5), textcoords="offset points", fontsize=9)
        axes.annotate(f"{down:+.2f}", (count, down), (5, 2), textcoords="offset points", fontsize=9)
    tidy(axes, xlabel=f"right responses among K = {samples}", ylabel="leave-one-out advantage")
    axes.set(xlim=(0, 66), ylim=(-1.1, 1.1))
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    save(figure, path)


def draw_clip(path: Path, low: float = 0.2, high: float = 0.2) -> None:
    ratio = np.linspace(0.4, 1.6, 400)
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, advantage in zip(panels, (1.0, -1.0)):
        objective = np.minimum(ratio * advantage, ratio.clip(1 - low, 1 + high) * advantage)
        axes.plot(ratio, ratio * advantage, color=GREY, ls="--", lw=1.2, label="not clipped")
        axes.plot(ratio, objective, color=BLUE, lw=2.2, label="PPO's objective")
        axes.plot([1], [advantage], "o", color="black", ms=5)
        tidy(axes, xlabel="ratio w = $\\pi$ / $\\pi_{old}$", ylabel="what is maximised, a token")
    panels[0].set_title("A > 0: make this token likelier", fontsize=10)
    panels[1].set_title("A < 0: make this token rarer", fontsize=10)
    panels[0].axvspan(1 + high, 1.6, color=PALE[RED], alpha=0.6, lw=0)
    panels[1].axvspan(0.4, 1 - low, color=PALE[RED], alpha=0.6, lw=0)
    panels[0].text(1.4, 0.55, "far enough:\nno gradient", ha="center", fontsize=9)
    panels[1].text(0.6, -1.45, "far enough:\nno gradient", ha="center", fontsize=9)
    panels[0].annotate(
        "start: w = 1", (1, 1), (0.62, 1.18), fontsize=9, arrowprops={"arrowstyle": "-"}
    )
    panels[1].annotate(
        "start: w = 1", (1, -1), (1.12, -0.72), fontsize=9, arrowprops={"arrowstyle": "-"}
    )
    panels[0].legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0.0, 0.98))
    save(figure, path)


def draw_numbers(path: Path) -> None:
    p = np.linspace(0.001, 0.999, 500)
    entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
    slope = -p * (np.log(p) + entropy)
    figure = Figure(figsize=(8.6, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(p, entropy, color=BLUE, label="H")
    left.plot(p, slope, color=RED, label="dH/dz of this token")
    left.axhline(0, color="black", lw=0.8)
    at = int(np.abs(p - 0.9).argmin())
    left.plot([0.9, 0.9], [entropy[at], slope[at]], "o", color="black", ms=4)
    left.annotate("0.325", (0.9, entropy[at]), (0.71, 0.30), fontsize=9)
    left.annotate("-0.198", (0.9, slope[at]), (0.86, -0.29), fontsize=9)
    left.set_title("two tokens, p and 1 - p", fontsize=10)
    tidy(left, xlabel="p", ylabel="nats")
    left.set(ylim=(-0.33, 0.93))
    left.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)

    steps = np.arange(0, 301)
    for decay, color in ((0.9, GOLD), (0.99, BLUE), (0.999, GREEN)):
        right.plot(steps, decay**steps, color=color, label=f"decay {decay}")
    right.plot([56], [0.99**56], "o", color="black", ms=4)
    right.annotate("56 steps: 0.57", (56, 0.99**56), (66, 0.62), fontsize=9)
    right.set_title("share of the start that is left in the anchor", fontsize=10)
    tidy(right, xlabel="steps", ylabel="")
    right.set(ylim=(0, 1.18))
    right.legend(frameon=False, fontsize=9, loc="upper right", ncols=3)
    save(figure, path)


# --- a packed row ---------------------------------------------------------------------------------


def packed_row() -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """(token labels, trained [T], visible [T, T]) of a row: three responses behind one prompt, one
    behind another. The prompt's last token stands once in front of each response."""
    first, second = [1, 2, 3, 4], [5, 6, 7]
    responses = [[10, 11, 12], [20, 21], [30, 31, 32]]
    sequences = [(first, response) for response in responses] + [(second, [40, 41])]
    examples = []
    for prompt, response in sequences:
        span = (len(prompt), len(prompt) + len(response))
        examples.append(Example(prompt + response, [span]))
    units, _ = packing.share_stems(examples, dim=16, most=30)
    packed = packing.pack(examples, 30, units)
    visible = packing.positions_and_mask(packed.tokens, packed.documents, packed.parents)[1]
    names = {1: "p1", 2: "p2", 3: "p3", 4: "p4", 5: "q1", 6: "q2", 7: "q3"}
    for letter, start, length in (("a", 10, 3), ("b", 20, 2), ("c", 30, 3), ("d", 40, 2)):
        names |= {start + i: f"{letter}{i + 1}" for i in range(length)}
    labels = [names[int(token)] for token in packed.tokens[0]]
    trained = torch.zeros(len(labels), dtype=torch.bool)
    trained[packed.index] = True  # all of it is one row
    return labels, trained, visible[0, 0]


def draw_packed(path: Path) -> None:
    labels, trained, visible = packed_row()
    colors = {"p": GREY, "q": GREY, "a": BLUE, "b": GREEN, "c": RED, "d": GOLD}
    kinds = [label[0] for label in labels]
    for i, label in enumerate(labels):  # the copies of the prompt's last token belong to a response
        if label in ("p4", "q3"):
            kinds[i] = labels[i + 1][0]
    shades = ["#ffffff", *(PALE[colors[kind]] for kind in "pabcd")]
    numbers = {"p": 1, "q": 1, "a": 2, "b": 3, "c": 4, "d": 5}
    length = len(labels)
    grid = np.zeros((length, length))
    for query in range(length):
        for key in range(length):
            if visible[query, key]:
                grid[query, key] = numbers[kinds[query]]
    figure = Figure(figsize=(7.2, 6.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(grid, cmap=ListedColormap(shades), vmin=0, vmax=5)
    axes.set_xticks(range(length), labels, fontsize=8.5)
    predicts = []
    for i, label in enumerate(labels):
        predicts.append(f"{label} \u2192 {labels[i + 1]}" if trained[i] else label)
    axes.set_yticks(range(length), predicts, fontsize=8.5)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set(
        xlabel="... sees this token (coloured)",
        ylabel="this token ... (\u2192: and is trained to predict)",
    )
    axes.set_xticks(np.arange(length + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(length + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#dddddd", lw=0.7)
    axes.tick_params(which="both", length=0)
    for tick, kind in zip(axes.get_xticklabels(), kinds):
        tick.set_color(colors[kind])
    for tick, kind in zip(axes.get_yticklabels(), kinds):
        tick.set_color(colors[kind])
    note = "p1 p2 p3: the stem, which stands\nonce for three responses a, b, c.\n\n"
    note += "p4, the prompt's last token, stands\nin front of each response, for it\n"
    note += "predicts the first token. The last\ntoken of each is its stop token.\n\n"
    note += "q, d: another prompt and its\nresponse, which see nothing\nof the others."
    axes.text(length - 0.8, 0.0, note, fontsize=9, ha="right", va="top", backgroundcolor="white")
    save(figure, path)


# --- the sampler's batch --------------------------------------------------------------------------


def draw_rows(axes: Axes, x: float, rows: list[tuple[str, int, str]], title: str) -> None:
    """Rows of a batch from the top: (name, tokens in its cache, colour)."""
    cell, height = 0.3, 0.52
    axes.text(x, 4.35, title, fontsize=10, weight="bold", va="center")
    for number, (name, filled, color) in enumerate(rows):
        y = 3.45 - 0.72 * number
        axes.text(x - 0.1, y + height / 2, f"row {number}", fontsize=9, ha="right", va="center")
        for column in range(12):
            face = PALE[color] if column < filled else "white"
            edge = "white" if column < filled else "#dddddd"
            axes.add_patch(
                Rectangle(
                    (x + cell * column, y), cell, height, facecolor=face, edgecolor=edge, lw=0.8
                )
            )
        axes.text(x + 0.1, y + height / 2, name, fontsize=9, va="center")


def draw_batch(path: Path) -> None:
    figure = Figure(figsize=(9.6, 3.7))
    axes = blank(figure, 11.6, 4.65)
    before = [
        ("prompt 1, sample 1", 8, BLUE),
        ("prompt 1, sample 2, stop", 9, GREY),
        ("prompt 1, sample 3", 8, BLUE),
        ("prompt 2, sample 1", 10, GREEN),
    ]
    after = [
        ("prompt 1, sample 1", 9, BLUE),
        ("prompt 2, sample 1", 11, GREEN),
        ("prompt 1, sample 3", 9, BLUE),
        ("prompt 2, sample 2", 4, GREEN),
    ]
    left, right = 1.0, 7.6
    draw_rows(axes, left, before, "row 1 has written its stop token")
    draw_rows(axes, right, after, "one step later")
    edge = left + 12 * 0.3
    middle = {number: 3.45 - 0.72 * number + 0.26 for number in range(4)}
    arrow(axes, (edge + 0.1, middle[3]), (right - 0.75, middle[1]), bend=0.0)
    axes.text(edge + 0.2, middle[1], "the last row\nmoves into\nthe gap", fontsize=9, va="center")
    queue = "queue: prompt 2, samples 2, 3, 4; prompt 3, ..."
    axes.text(left, 0.42, queue, fontsize=9, va="center", color=GREEN)
    arrow(axes, (left + 4.8, 0.42), (right - 0.75, middle[3] - 0.05), bend=0.12)
    note = "The queue fills the end. The prompt's keys\nand values are copied, not computed."
    axes.text(right - 0.7, 0.42, note, fontsize=9, va="center")
    save(figure, path)


PICTURES = {
    "step.png": draw_step,
    "advantages.png": draw_advantages,
    "clip.png": draw_clip,
    "numbers.png": draw_numbers,
    "packed.png": draw_packed,
    "batch.png": draw_batch,
}


def main(folder: Path = FOLDER) -> None:
    for name, draw in PICTURES.items():
        draw(folder / name)
        print(folder / name)


if __name__ == "__main__":
    main()
