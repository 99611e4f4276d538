"""Does `python t1.py` show what it promises? Reads what it printed from the standard input.

Bars lie below what three seeds reached, for another machine's rounding makes another run.
"""

import re
import sys

GAIN = 6  # points from SFT to RL at the largest budget; seeds 0, 1, 2: 28, 15, 23
RISE = 4  # points that RL's curve rises from the smallest budget to the largest: 45, 20, 9

text = sys.stdin.read()
rows = re.findall(r"^ *(\d+) +([\d.]+)% +([\d.]+)%$", text, flags=re.M)
curve = [(float(sft), float(rl)) for _, sft, rl in rows]
if len(curve) < 5:
    sys.exit("t1.py printed no table")
(_, rl_first), (sft_last, rl_last) = curve[0], curve[-1]
print(f"t1.py: {sft_last} % after SFT, {rl_last} % after RL; RL's curve rises from {rl_first} %")
if rl_last - sft_last < GAIN:
    sys.exit(f"RL gained less than {GAIN} points")
if rl_last - rl_first < RISE:
    sys.exit(f"RL's curve rises less than {RISE} points")
