"""tasks.py: a judge that cannot be bribed, problem sets that do not leak, and errors that name the
line.
"""

import bz2
import datetime
import gzip
import io
import json
import lzma
import sys
import zipfile
import zlib
from itertools import combinations_with_replacement, islice, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cli
import tasks
import verify
from cli import UserError
from tasks import Problem, Task, countdown_problem
from verify import Verdict

PROBLEM = countdown_problem([2, 3, 7], 8)


def judged(expression, problem=PROBLEM):
    return tasks.judge_countdown(problem, f"so \\boxed{{{expression}}}").outcome


# --- countdown ------------------------------------------------------------------------------------


@pytest.mark.parametrize("expression", ["7+3-2", "(7-2)+3", "3 + 7 - 2", "((7))+(3-2)"])
def test_right_expressions(expression):
    """Guards against a judge that knows only one way of writing a solution."""
    assert judged(expression) == "correct"


@pytest.mark.parametrize(
    "expression, numbers, target",
    [
        ("2**3", [2, 3], 8),  # a power is no operator of the task (eval pays for it)
        ("7//2", [2, 7], 3),  # nor is whole division
        ("2^3", [2, 3], 8),
        ("7+1", [1, 2, 7], 8),  # a number is missing
        ("2*2*2", [2, 2], 8),  # a number is used more often than given
        ("7+3-2+0", [2, 3, 7], 8),  # a number is added
        ("73", [3, 7], 73),  # digits are not joined
        ("7+3-2", [2, 3, 7], 9),  # the value is not the target
        ("8", [2, 3, 7], 8),
        ("7+3-2=8", [2, 3, 7], 8),
        ("9**9**9", [9, 9, 9], 1),  # and it returns at once
        ("--7+3-2", [2, 3, 7], 8),
        ("__import__('os')", [2, 3, 7], 8),
        ("", [2, 3, 7], 8),
    ],
)
def test_wrong_expressions(expression, numbers, target):
    """Guards against the holes of judges that `eval`: each of these must score 0."""
    assert judged(expression, countdown_problem(numbers, target)) in ("wrong", "unparsed")


def test_division_is_an_option_and_exact():
    """Guards against / accepted where the task does not allow it, and against a division that
    rounds.
    """
    assert judged("6/3*2", countdown_problem([2, 3, 6], 4)) == "unparsed"
    assert judged("6/3*2", countdown_problem([2, 3, 6], 4, "+-*/")) == "correct"
    assert (
        judged("7/2*4", countdown_problem([2, 4, 7], 14, "+-*/")) == "correct"
    )  # 7/2 is exactly 3.5
    assert judged("7/2+0", countdown_problem([0, 2, 7], 3, "+-*/")) == "wrong"
    assert judged("7/(2-2)", countdown_problem([2, 2, 7], 3, "+-*/")) in ("wrong", "unparsed")


def test_only_the_last_box_counts():
    """Guards against a response that boxes everything it thinks of."""
    assert not tasks.judge_countdown(PROBLEM, "\\boxed{7+3-2} or \\boxed{7+3+2}").correct
    assert tasks.judge_countdown(PROBLEM, "7+3-2").outcome == "no_answer"


@pytest.mark.parametrize("numbers, operators", [(3, "+-*"), (4, "+-*"), (3, "+-*/")])
def test_every_problem_has_a_solution(numbers, operators):
    """Guards against unsolvable problems, which no reward could ever teach."""
    for problem in islice(tasks.countdown(1, numbers=numbers, operators=operators), 50):
        target, drawn, allowed = tasks.read_countdown(problem.answer)
        assert len(drawn) == numbers and allowed == operators
        assert judged(tasks.ways(drawn, operators)[target].expression, problem) == "correct"


def test_training_and_heldout_problems_share_no_numbers():
    """Guards against leakage, also of a problem with its numbers in another order; for any two
    seeds.
    """
    heldout = list(islice(tasks.countdown(0, heldout=True), 1_100))
    training = list(islice(tasks.countdown(7), 5_000))
    assert len({problem.question for problem in heldout}) == 1_100 >= 1_024

    def sets(problems):
        return {tuple(sorted(tasks.read_countdown(problem.answer)[1])) for problem in problems}

    assert not sets(heldout) & sets(training)
    assert all(zlib.crc32(repr(list(drawn)).encode()) % 10 == 0 for drawn in sets(heldout))


def test_problems_are_reproducible_and_distinct():
    """Guards against a stream that depends on the process (hash seeds), repeats itself, or ignores
    its seed.
    """

    def stream(seed):
        return [problem.question for problem in islice(tasks.countdown(seed), 3_000)]

    assert (
        stream(3) == stream(3) and len(set(stream(3))) == 3_000 and stream(3)[:50] != stream(4)[:50]
    )


@pytest.mark.parametrize("numbers, operators, largest", [(3, "*", 20), (2, "+", 49), (2, "/", 20)])
def test_a_heldout_stream_that_runs_dry_says_so(numbers, operators, largest):
    """Guards against a hang: numbers that no way combines (9*9*9 > 99), and more problems asked for
    than there are; and against held-out problems that are counted twice."""
    held = [
        list(drawn)
        for drawn in combinations_with_replacement(range(1, largest + 1), numbers)
        if zlib.crc32(repr(list(drawn)).encode()) % 10 == 0
    ]
    count = sum(len(tasks.ways(drawn, operators)) for drawn in held)
    stream = tasks.countdown(0, heldout=True, numbers=numbers, operators=operators, largest=largest)
    assert len({problem.question for problem in islice(stream, count)}) == count > 0
    with pytest.raises(
        UserError, match=f"only {count} distinct problems of {numbers} numbers from 1 to {largest}"
    ):
        next(stream)


def test_training_problems_begin_again_when_all_have_come():
    """Guards against a long run that dies when its problems are used up, one that sees some of them
    more often than others, and a stream without any problem that never ends."""
    stream = tasks.countdown(0, numbers=2, operators="+", largest=9)
    pairs = [(a, b) for a in range(1, 10) for b in range(a, 10)]
    trained = [pair for pair in pairs if zlib.crc32(repr(list(pair)).encode()) % 10 != 0]

    def epoch():
        return [
            tuple(sorted(tasks.read_countdown(problem.answer)[1]))
            for problem in islice(stream, len(trained))
        ]

    first, second = epoch(), epoch()
    assert sorted(first) == sorted(second) == trained and first != second
    with pytest.raises(UserError, match="only 0 distinct"):
        next(tasks.countdown(0, numbers=2, operators="/", largest=2, heldout=True))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 49), min_size=3, max_size=3))
def test_ways_are_all_there_are(numbers):
    """Guards against values that are missed, and ways that do not lead to them: a chain would call
    a reachable target unreachable. The reference: every order of the numbers, both bracketings, by
    hand."""
    combine = {"+": lambda x, y: x + y, "-": lambda x, y: abs(x - y), "*": lambda x, y: x * y}
    fits = range(1, tasks.LARGEST + 1)
    values = {
        combine[q](combine[p](a, b), c)
        for a, b, c in permutations(numbers)
        for p in "+-*"
        for q in "+-*"
        if combine[p](a, b) in fits and combine[q](combine[p](a, b), c) in fits
    }
    found = tasks.ways(numbers, "+-*")
    assert found.keys() == values
    for value, walk in found.items():
        exact, used = verify.exact_arithmetic(walk.expression, "+-*")
        assert exact == value == walk.value and sorted(used) == sorted(numbers)


def test_numbers_without_a_way():
    """Guards against problems made of numbers that cannot be combined, and a stream begun with an
    unknown operator.
    """
    assert not tasks.ways([49, 49, 49], "+") and tasks.ways([49, 49, 49], "+-")
    for operators in ("", "x"):
        with pytest.raises(UserError, match="--operators"):
            next(tasks.countdown(0, operators=operators))


@pytest.mark.parametrize(
    "answer", ["22", "22 from 3", "22 from 3 5 with ^", "x from 3 5 with +", "22 from 3 5"]
)
def test_countdown_answers_are_checked(answer):
    """Guards against a problem file whose mistakes become zero rewards."""
    with pytest.raises(UserError, match="countdown"):
        tasks.read_countdown(answer)


@pytest.mark.parametrize(
    "response, kind",
    [
        ("7+3=10, 10-2=8 is 8\ncheck ok\n\\boxed{(7+3)-2}", "correct"),
        ("7+3=10, 10+2=12 is 8\ncheck ok\n\\boxed{(7+3)+2}", "false claim"),
        ("7+3=10, 10-2=8 not 8\n7+3=10, 10+2=8 is 8\n\\boxed{(7+3)+2}", "wrong arithmetic"),
        (
            "7+3=11, 11-2=9 not 8\n7+3=10, 10+2=12 is 8\n\\boxed{(7+3)+2}",
            "false claim",
        ),  # the claimed attempt counts
        ("7+3=10, 10+3=13 is 8\n\\boxed{(7+3)+3}", "wrong numbers"),
        ("7/0=3, 3+5=8 is 8\n\\boxed{(7+3)+2}", "wrong arithmetic"),
        (f"7+3=10, {'1' * 5000}+5=8 is 8\n\\boxed{{(7+3)+2}}", "wrong arithmetic"),
        (f"7+3=10, 5+5={'1' * 5000} is 8\n\\boxed{{(7+3)+2}}", "wrong arithmetic"),
        ("\\boxed{7+3-}", "malformed"),
        ("\\boxed{7+3**2}", "malformed"),
        ("7+3=10, 10+2=12 not 8\n", "no answer"),
    ],
)
def test_failures_are_told_apart(response, kind):
    """Guards against a table of failures that says another reason than the true one."""
    assert tasks.diagnose_countdown(PROBLEM, response) == kind
    assert (kind == "correct") == tasks.judge_countdown(PROBLEM, response).correct


def test_attempts_are_counted_by_what_they_came_to():
    """Guards against a check, a box, or half an attempt counted as an attempt: `beyond_shown` rests
    on the count.
    """
    response = (
        "7+3=10, 10+2=12 not 8\n7*2=14, 14-3=11 not 8\n7+3=10, 10-2=8 is 8\n"
        "check (7+3)-2=10-2=8 ok\n"
    )
    assert tasks.attempts(response + "\\boxed{(7+3)-2}") == ["12", "11", "8"]
    assert tasks.attempts("7+3=10, 10+2=12 not 8\n7+3=10, 10-") == ["12"]
    assert tasks.attempts("so x = 3 is 8 less than 11") == []


@settings(deadline=None)
@given(st.text(alphabet="0123456789+-*/()^. {}\\boxed=yesno,\n", max_size=80))
def test_judge_and_diagnosis_agree_on_anything(text):
    """Guards against a crash on what a policy may say, and against the two functions contradicting
    each other.
    """
    for response in (text, f"\\boxed{{{text}}}"):
        assert tasks.judge_countdown(PROBLEM, response).correct == (
            tasks.diagnose_countdown(PROBLEM, response) == "correct"
        )


# --- problem files --------------------------------------------------------------------------------


def load(tmp_path, *lines):
    path = tmp_path / "problems.jsonl"
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )
    return tasks.load(path)


GOOD = {"problem": "1+1?", "answer": "2"}


def test_problem_files(tmp_path):
    """Guards against GSM8K's worked answers taken as the reference, and numbers in JSON refused as
    answers.
    """
    rows = load(
        tmp_path,
        GOOD,
        "\n",
        {"question": "q\u2028r", "answer": "3*3=9\n#### 9"},
        {"problem": "p", "answer": 5},
        {"problem": "numbers 2 3 7, target 8", "answer": PROBLEM.answer, "task": "countdown"},
    )
    assert rows == [Problem("1+1?", "2"), Problem("q\u2028r", "9"), Problem("p", "5"), PROBLEM]


@pytest.mark.parametrize(
    "lines, message",
    [
        ([GOOD, "{broken\n"], "line 2: not JSON"),
        ([GOOD, "\n", "[1]\n"], "line 3: expected an object"),
        ([GOOD, {"answer": "2"}], "line 2: no `problem`"),
        ([{"problem": " ", "answer": "2"}], "line 1: no `problem`"),
        ([GOOD, GOOD, {"problem": "p"}], "line 3: no `answer`"),
        ([{"problem": "p", "answer": ""}], "line 1: no `answer`"),
        ([GOOD | {"task": "chess"}], "line 1: task 'chess'"),
        ([GOOD | {"task": ["math"]}], "line 1: task ['math']"),
        ([GOOD, GOOD | {"task": "countdown"}], "line 2: not a countdown answer"),
        ([GOOD | {"answer": "999 from 1 2 with +", "task": "countdown"}], "line 1: the countdown"),
        ([GOOD | {"answer": "8 from 2 4 9 with +-*", "task": "countdown"}], "has no solution"),
        ([GOOD | {"problem": "\u200b \ufeff"}], "line 1: no `problem`"),
        ([GOOD | {"answer": "\u200b"}], "line 1: no `answer`"),
        ([GOOD, "\n", {"problem": "p", "answer": " "}], "line 3: no `answer`"),
        ([{"problem": "p", "answer": [1]}], "line 1: `answer` is a list"),
        ([{"problem": "p", "answer": {"x": 1}}], "line 1: `answer` is a dict"),
        ([{"problem": "p", "answer": True}], "line 1: `answer` is a bool"),
        (['{"problem": "p", "answer": NaN}\n'], "line 1: `answer` is nan"),
        (['{"problem": "p", "answer": -Infinity}\n'], "line 1: `answer` is -inf"),
        ([""], "holds no problems"),
        (["1" * 5000 + "\n"], "line 1"),
        (["[" * 100_000 + "\n"], "line 1"),
    ],
)
def test_bad_problem_files_name_the_place(tmp_path, lines, message):
    """Guards against a traceback, or worse a problem silently skipped, after hours of a run."""
    with pytest.raises(UserError, match=r"problems\.jsonl") as error:
        load(tmp_path, *lines)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "answer",
    ["He has 2.\n#### ", "####", "\\boxed{}", "\\boxed{ }", "$$", "$ $", "\\text{}", "\\(\\)"]
    + ["\\,", "~", ".", "}", "x" * 100_000, "1}", "\\boxed{5", "\\quad", "\\left(\\right)", "()"]
    + ["<answer></answer>", "\ud800", "5\ud800", "5\\", "\\text{(B) }12"],
)
def test_answers_that_nothing_can_match_are_refused(tmp_path, answer):
    """Guards against a problem whose every right response is wrong, and nobody is told."""
    with pytest.raises(
        UserError, match=r"problems\.jsonl, line 2: `answer` holds nothing"
    ) as error:
        load(tmp_path, GOOD, {"problem": "p", "answer": answer})
    assert len(str(error.value).removeprefix(str(tmp_path))) < 200 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "answer", [0, -3, 1.5, 10**400, 1e22, "No", "(B)", "nan", "{1}", ">", "-", "a < b", "\\{\\}"]
)
def test_odd_answers_that_can_be_matched_are_read(tmp_path, answer):
    """Guards against a check of answers that refuses those of real problem sets."""
    assert load(tmp_path, {"problem": "p", "answer": answer})[0].answer == str(answer)


def test_what_cannot_be_seen_is_no_part_of_an_answer(tmp_path):
    """Guards against a space of no width in a reference, which makes every right response wrong."""
    for answer in ("\u200b5\ufeff", "\u20601\u200b/2", "\u200b#### 5"):
        (problem,) = load(tmp_path, {"problem": "p", "answer": answer})
        assert problem.answer in ("5", "1/2")


@pytest.mark.parametrize(
    "answer", ["14 from 2 4 7 with +-*/", "4 from 2 8 2 with -", "9 from 2 2 2 2 with +"]
)
def test_countdowns_with_a_solution(tmp_path, answer):
    """Guards against a search for solutions that is narrower than the judge: 7/2*4 is 14."""
    row = {"problem": "p", "answer": answer, "task": "countdown"}
    assert load(tmp_path, row)[0].answer == answer


def test_halves_of_surrogate_pairs(tmp_path):
    """Guards against a run that dies of UnicodeEncodeError when it first shows such a problem, and
    an evaluation that dies when it writes its --curate file."""
    line = '{"problem": "\\ud83d? \\ud83d\\ude00", "answer": 1, "more": [{"\\udc00": "\\udc00"}]}\n'
    assert load(tmp_path, line) == [Problem("\ufffd? \U0001f600", "1")]
    cli.write_jsonl(tmp_path / "again", cli.read_jsonl(tmp_path / "problems.jsonl"))


def test_a_field_that_is_null_is_not_there(tmp_path):
    """Guards against the other name of a field passed over, or a default, for a null: a Parquet
    file with rows of two kinds has one in every row."""
    row = {"problem": None, "question": "x", "answer": 1, "task": None, "prompt": None}
    for empty in (None, "", " ", "\ufeff", []):
        assert load(tmp_path, row | {"problem": empty}) == [Problem("x", "1")]
    assert load(tmp_path, {"problem": "x", "answer": " ", "solution": "1"}) == [Problem("x", "1")]


CHAT = [{"role": "user", "content": "1+1?"}]


def test_chats_as_prompts(tmp_path):
    """Guards against a system prompt or earlier turns that are dropped, an instruction that lands
    in another turn than the last, and a chat that only some of the fields may hold."""
    system = {"role": "system", "content": "Be short."}
    told = [system, *CHAT, {"role": "assistant", "content": "2"}, {"role": "user", "content": "?"}]
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]  # as OpenAI has them
    in_parts = {"prompt": [{"role": "user", "content": parts}], "answer": "2"}
    assert load(tmp_path, in_parts) == [Problem("1+1?", "2")]
    one, two, three, four = load(
        tmp_path,
        {"prompt": "1+1?", "answer": "2"},
        {"prompt": CHAT, "answer": "2"},
        {"messages": CHAT, "answer": "2"},
        {"prompt": told, "answer": "2"},
    )
    assert one == two == three == Problem("1+1?", "2")
    assert four.question == "?" and hash(four)
    asked = tasks.messages(four)
    assert asked[:3] == told[:3]
    assert asked[3]["content"] == "?" + tasks.TASKS["math"].instruction


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([*CHAT, {"role": "assistant", "content": "2"}], "ends in a turn of the assistant"),
        ([{"role": "system", "content": "Be short."}], "ends in a turn of the system"),
        ([{"role": "user"}], "must be a list of objects with `role` and `content`"),
        (["1+1?"], "must be a list of objects with `role` and `content`"),
        ([{"role": "user", "content": " "}], "no `problem`"),
        ([], "no `problem`"),
        ({"role": "user", "content": "1+1?"}, "` is a dict, no text and no chat"),
        (5, "` is a int, no text and no chat"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "must be a list of objects"),
        ([{"role": "user", "content": ["1+1?"]}], "must be a list of objects"),
    ],
)
@pytest.mark.parametrize("name", ["prompt", "messages"])
def test_chats_that_ask_nothing_are_refused(tmp_path, name, prompt, message):
    """Guards against a solution that stands in the prompt, and tracebacks for other lists."""
    with pytest.raises(UserError, match=r"problems\.jsonl, line 2: ") as error:
        load(tmp_path, GOOD, {name: prompt, "answer": "2"})
    assert message in str(error.value)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_marked_and_packed_files(tmp_path, pack, mark, newline):
    """Guards against a byte order mark taken for a character of line 1, and against gzipped files
    refused: they are known by how they begin, not by their names."""
    lines = [json.dumps(GOOD).encode(), b"", b'{"question": "q", "answer": "\xc3\xa9"}']
    path = tmp_path / "problems.jsonl"
    path.write_bytes(pack(mark + newline.join(lines)))
    assert tasks.load(path) == [Problem("1+1?", "2"), Problem("q", "é")]


def test_files_that_were_joined(tmp_path):
    """Guards against the byte order mark of a second file, refused for its place."""
    path = tmp_path / "problems.jsonl"
    path.write_bytes(2 * b'\xef\xbb\xbf{"problem": "1+1?", "answer": "2"}\n')
    assert tasks.load(path) == 2 * [Problem("1+1?", "2")]


def test_formats_that_are_not_read(tmp_path):
    """Guards against "'utf-8' codec can't decode byte 0xfd", of which nobody learns what to do."""
    text = json.dumps(GOOD).encode()
    pack = io.BytesIO()
    with zipfile.ZipFile(pack, "w") as packed:
        packed.writestr("problems.jsonl", text)
    path = tmp_path / "problems.jsonl"
    for content, what in (
        (bz2.compress(text), "a bzip2 file: unpack"),
        (lzma.compress(text), "an xz file: unpack"),
        (pack.getvalue(), "a zip file: unpack"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 1\n",
            "Git LFS's pointer",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"problems\.jsonl is .*{what}"):
            tasks.load(path)


@pytest.mark.parametrize("cut", [slice(0, 15), slice(0, -9), slice(0, 2)])
def test_cut_gzip_files(tmp_path, cut):
    """Guards against a traceback for a download that was cut off."""
    path = tmp_path / "problems.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode())[cut])
    with pytest.raises(UserError, match=r"cannot read .*problems\.jsonl\.gz"):
        tasks.load(path)


def test_parquet_files(tmp_path):
    """Guards against Parquet refused, rows whose nulls or dates are not what JSON would hold, and
    an error that does not name the row."""
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    path = tmp_path / "train.parquet"
    rows = [
        {"problem": "1+1?", "answer": "2", "prompt": None, "day": datetime.date(2025, 1, 2)},
        {"problem": None, "answer": "3", "prompt": CHAT, "day": None},
    ]
    parquet.write_table(Table.from_pylist(rows), path)
    assert tasks.load(path) == [Problem("1+1?", "2"), Problem("1+1?", "3")]
    assert cli.read_jsonl(path)[0] == {"problem": "1+1?", "answer": "2", "day": "2025-01-02"}
    parquet.write_table(Table.from_pylist([GOOD, {"problem": "p"}]), path)
    with pytest.raises(UserError, match=r"train\.parquet, row 2: no `answer`"):
        tasks.load(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cannot read .*train\.parquet"):
        tasks.load(path)


@pytest.mark.parametrize(
    "rows, message",
    [
        ("1+1?,2\np,1,234\n", "problems.csv, row 2: more fields than the header has"),
        (f"1+1?,2\n{'x' * 200_000},1\n", "cannot read .*problems.csv: field larger"),
        ("1+1?,2\np\n", "problems.csv, row 2: no `answer`"),
    ],
)
def test_broken_csv_files(tmp_path, rows, message):
    """Guards against a traceback, and against 1,234 that is read as 1 for the want of quotes."""
    path = tmp_path / "problems.csv"
    path.write_text("problem,answer\n" + rows)
    with pytest.raises(UserError, match=message):
        tasks.load(path)


def test_parquet_columns_that_json_does_not_have(tmp_path):
    """Guards against a question that begins with b', a picture beside it that bars the file, and a
    traceback for a time in nanoseconds, even in a column that is not used."""
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import array, table, timestamp

    path = tmp_path / "train.parquet"
    columns = {"problem": ["été".encode()], "answer": [b"5"], "picture": [b"\x89PNG"]}
    parquet.write_table(table(columns), path)
    assert cli.read_jsonl(path) == [{"problem": "été", "answer": "5"}]
    times = {"problem": ["p"], "answer": ["1"], "at": array([1], timestamp("ns"))}
    parquet.write_table(table(times), path)
    with pytest.raises(UserError, match=r"cannot read .*train\.parquet: Nanosecond"):
        tasks.load(path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    """Guards against a traceback where the library is not installed, as it need not be."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and more")
    with pytest.raises(UserError, match=r"train\.parquet is a Parquet file.* pip install pyarrow"):
        tasks.load(tmp_path / "train.parquet")


def test_absent_and_binary_files(tmp_path):
    """Guards against a traceback for a mistyped path, a folder, or a file that is no text."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.jsonl", tmp_path, tmp_path / "binary"):
        with pytest.raises(UserError, match=r"cannot read|no such file"):
            tasks.load(path)


def test_the_benchmarks_load(shared):
    """Guards against a field name or an answer format of a real problem set that we do not know."""
    counts = {"aime2024": 30, "amc23": 40, "gsm8k_test": 1319, "math500": 500}
    for name, count in counts.items():
        problems = tasks.load(shared / "data" / f"{name}.jsonl")
        assert len(problems) == count and all(
            problem.answer and "####" not in problem.answer for problem in problems
        )


def test_three_problems_are_shown(tmp_path, capsys):
    """Guards against `tasks.py --show` that shows other than what a model is given, or fails where
    there are fewer than three."""
    path = tmp_path / "sums.jsonl"
    path.write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": "2+2?", "answer": "4"}\n')
    tasks.main(tasks.Config(str(path)))
    shown = capsys.readouterr().out
    assert f"{path}: 2 problems" in shown
    assert "--- 1, task math" in shown and "--- 2, task math" in shown
    for problem in tasks.load(path):
        for message in tasks.messages(problem):
            assert f"{message['role']}: {message['content']}" in shown
        assert f"reference: {problem.answer}" in shown


@pytest.mark.parametrize(
    "response, expected",
    [
        ("so \\boxed{4} and 5", "4"),
        ("The answer is 12.\n", "12"),
        ("adds up\n#### 7", "7"),
        ("2 and 3 make 5 apples", "5"),
    ],
)
def test_answers_outside_a_box(response, expected):
    """Guards against a foreign model scored 0 for its format; but a box, where there is one, is
    what counts.
    """
    assert verify.is_correct(tasks.boxed(response), expected)


def test_no_answer_is_invented():
    """Guards against an empty box where the response names no number at all."""
    assert tasks.boxed("I do not know") == "I do not know"


# --- reward ---------------------------------------------------------------------------------------


def test_scores_keep_their_order_over_judges():
    """Guards against verdicts that change places when maths and countdown are mixed (maths goes
    through a pool).
    """
    maths, responses = (
        Problem("1+1?", "2"),
        ["\\boxed{7+3-2}", "\\boxed{2}", "\\boxed{7}", "\\boxed{3}", "\\boxed{2}"],
    )
    verdicts = tasks.judge_all([PROBLEM, maths, PROBLEM, maths, maths], responses)
    assert [verdict.correct for verdict in verdicts] == [True, True, False, False, True]


def test_only_maths_problems_are_told_of_the_box():
    """Guards against an instruction that the demo's small vocabulary would spell byte by byte."""
    assert tasks.messages(PROBLEM)[0]["content"] == PROBLEM.question
    assert "\\boxed{}" in tasks.messages(Problem("1+1?", "2"))[0]["content"]


def half_right(problem: Problem, response: str) -> Verdict:
    return Verdict("correct") if problem.answer in response else Verdict("wrong", score=0.5)


def test_a_task_of_ones_own(monkeypatch, tmp_path):
    """Guards against a task whose instruction, answers or failures are those of maths, and a graded
    score that is lost on its way through the pool of judges."""
    own = Task(
        half_right,
        instruction=" Say it.",
        read_answer=str.upper,
        diagnose=lambda problem, response: "too quiet",
    )
    monkeypatch.setitem(tasks.TASKS, "shout", own)
    (problem,) = load(tmp_path, {"problem": "hello?", "answer": "yes", "task": "shout"})
    assert problem == Problem("hello?", "YES", "shout")
    assert tasks.messages(problem)[0]["content"] == "hello? Say it."
    verdicts = tasks.judge_all([problem, problem], ["no", "YES"])
    assert [verdict.score for verdict in verdicts] == [0.5, 1.0]
    assert tasks.diagnose(problem, "no", verdicts[0]) == "too quiet"
    monkeypatch.setitem(tasks.TASKS, "math", tasks.Task(half_right))
    (verdict,) = tasks.judge_all([Problem("1+1?", "2")], ["3"])
    assert verdict.score == 0.5  # another judge of maths is not passed over for the pool


def test_failures_of_a_task_without_a_diagnosis():
    """Guards against failures of maths named by countdown's reasons."""
    assert tasks.diagnose(Problem("1+1?", "2"), "3", Verdict("no_answer")) == "no answer"


def test_scores_follow_from_outcomes():
    """Guards against a wrong answer that is worth something only because no score was given."""
    assert [Verdict(name).score for name in ("correct", "wrong", "timeout")] == [1.0, 0.0, 0.0]
    assert Verdict("correct", score=0.25).score == 0.25 and Verdict("correct", score=0.25).correct


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 4), st.integers(2, 4))
def test_repeats_against_brute_force(tokens, ngram, times):
    """Guards against an n-gram window off by one at either end."""
    grams = [tuple(tokens[i : i + ngram]) for i in range(len(tokens)) if i + ngram <= len(tokens)]
    assert tasks.repeats(tokens, ngram, times) == any(grams.count(gram) >= times for gram in grams)


@pytest.mark.parametrize(
    "text, question, broken",
    [
        ("Then α ≤ ½·x², so ∑ = 7 → done.\n", "", False),
        ("𝑥 + ℝ and ﬁne", "", False),
        ("the naïve façade", "", False),
        (
            "5 \u00b5m at 90\u00ba, la 1\u00aa, \u210f\u03c9, \u2113, \uff21, \u2138 and \u2135\u2080",
            "",
            False,
        ),
        ("broken \ufffd bytes", "", True),
        ("a bell \x07", "", True),
        ("so 答案 is", "", True),
        ("所以答案是 7", "有多少苹果", False),
        ("и затем", "", True),
        ("и затем 答案", "сколько", True),
        ("りんごは全部で七コです。〆", "リンゴは何個ですか", False),
        ("リンゴとバターは７個", "全部でいくつ？", False),
        ("リンゴと苺", "ｲｸﾂ", False),
        ("三角形의 넓이", "삼각형의 넓이는?", False),
        ("りんご", "有多少苹果", True),
        ("답은 3", "有多少苹果", True),
        ("りんご", "삼각형의 넓이는?", True),
        ("답은 3", "リンゴは何個ですか", True),
        ("リンゴ and 答案", "How many?", True),
    ],
)
def test_garbled_text(text, question, broken):
    """Guards against mathematics punished as garbage, and against mixed languages that go
    unpunished.
    """
    assert tasks.garbled(text, question) == broken


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"numbers": 5}, "--numbers must be 2, 3 or 4"),
        ({"largest": 1}, "--largest 1: from 2 to 99"),
        ({"largest": 100}, "--largest 100: from 2 to 99"),
        ({"operators": "+^"}, "--operators '\\+\\^'"),
        ({"operators": ""}, "--operators ''"),
    ],
)
def test_flags_that_no_countdown_has_are_refused_before_the_first_problem(flags, message):
    """Guards against a command that loads its models, and only then finds the flag wrong: a stream
    checks its flags when it is made, not when it is first read."""
    with pytest.raises(UserError, match=message):
        tasks.countdown(0, **flags)
