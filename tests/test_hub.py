"""hub.py against a server of this file's own, which answers as Hugging Face's hub does.

Each fetch runs in a process of its own, because huggingface_hub reads HF_ENDPOINT and HF_HOME when
it is imported. No test needs the network.
"""

import errno
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import cli
import cot
import evaluate
import hub
import tasks
from cli import UserError
from model import ModelConfig, random_init, save_pretrained
from tokenizer import demo_tokenizer

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0" * 39 + "1"
MB = 2**20


class Handler(http.server.BaseHTTPRequestHandler):
    """GET and HEAD of what `server.root` holds: models/ORG/NAME/... and datasets/ORG/NAME/..."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        kind = "datasets" if "datasets" in parts[:2] else "models"
        if parts[0] == "api":
            self.answer_api(kind, parts)
        else:
            self.answer_file(kind, parts)

    def answer_api(self, kind: str, parts: list[str]) -> None:
        repo = "/".join(parts[2:4])
        if repo in self.server.refused:
            status, code = self.server.refused[repo]
            return self.reply(status, b"{}", {"X-Error-Code": code} if code else {})
        folder = self.server.root / kind / repo
        if not folder.is_dir():
            return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if "revision" in parts and parts[-1] not in ("main", COMMIT):
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        if "tree" in parts:
            rows = []
            for name, path in zip(names, files):
                digest = hashlib.sha1(path.read_bytes()).hexdigest()
                size = path.stat().st_size
                rows.append({"type": "file", "path": name, "size": size, "oid": digest})
            return self.reply(200, json.dumps(rows).encode())
        about = {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "tags": []}
        about["siblings"] = [{"rfilename": name} for name in names]
        return self.reply(200, json.dumps(about).encode())

    def answer_file(self, kind: str, parts: list[str]) -> None:
        place = parts.index("resolve")
        name = "/".join(parts[place + 2 :])
        path = self.server.root / kind / "/".join(parts[place - 2 : place]) / name
        if not path.is_file():
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        headers["Accept-Ranges"] = "bytes"
        if self.command == "GET":
            self.server.sent.append((name, self.headers.get("Range")))
        begin = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self.reply(206 if begin else 200, content[begin:], headers, name)

    def reply(self, status: int, body: bytes, headers: dict | None = None, name: str = "") -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if name and name == self.server.cut:
            self.server.cut = ""
            self.wfile.write(body[: 16 * MB])
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(body)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> Path:
    """A tiny model with files that we do not read, and a data set of two configurations."""
    root = tmp_path_factory.mktemp("hub")
    tokenizer = demo_tokenizer(cot.WORDS)
    shape = ModelConfig(
        tokenizer.vocab_size, 16, 1, 2, 1, 8, 32, context=256, eos_ids=tuple(tokenizer.eos_ids)
    )
    folder = root / "models" / "org" / "tiny"
    save_pretrained(random_init(shape, 0), folder, tokenizer)
    (folder / "pytorch_model.bin").write_bytes(b"the same weights once more")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.safetensors").write_bytes(b"and again")
    (root / "models" / "org" / "large").mkdir()
    (root / "models" / "org" / "large" / "model.safetensors").write_bytes(os.urandom(24 * MB))
    data = root / "datasets" / "org" / "sums"
    for config in ("main", "hard"):
        (data / config).mkdir(parents=True)
        for split in ("train", "test"):
            row = {"Question": f"{config} {split}?", "Solution": r"so \boxed{7}"}
            (data / config / f"{split}-00000-of-00001.jsonl").write_text(json.dumps(row) + "\n")
    (data / "README.md").write_text("sums")
    return root


@pytest.fixture
def server(repositories):
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.root = repositories
    made.sent = []  # (file, range asked for) of every file that was sent
    made.refused = {}  # repository -> (status, the hub's code)
    made.cut = ""  # the file that breaks off at its first sending
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def environment(server, home: Path, **more: str) -> dict[str, str]:
    endpoint = f"http://127.0.0.1:{server.server_port}"
    wanted = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return os.environ | wanted | more


FETCH = (
    "import cli, dataclasses, hub, sys\n"
    "@dataclasses.dataclass\n"
    "class Config:\n"
    "    name: str\n"
    "    what: str = 'model'\n"
    "cli.run(lambda c: print(getattr(hub, 'fetch_' + c.what)(c.name)), Config)\n"
)


def start(server, home: Path, name: str, what: str = "model", **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, "--name", name, "--what", what],
        cwd=ROOT,
        env=environment(server, home, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fetch(server, home: Path, name: str, what: str = "model", **more: str) -> tuple[int, str, str]:
    """(exit code, standard output, last line of standard error) of a process that fetches."""
    process = start(server, home, name, what, **more)
    out, err = process.communicate(timeout=120)
    return process.returncode, out.strip(), (err.strip().split("\n") or [""])[-1]


def test_a_model_is_fetched_once_and_only_what_is_read(server, tmp_path):
    """Bug: three formats of the same weights are fetched, or all of it at every start, or a model
    that is there cannot be used without a network."""
    code, folder, _ = fetch(server, tmp_path, "org/tiny")
    sent = [name for name, _ in server.sent]
    assert code == 0 and Path(folder, "model.safetensors").exists()
    assert "pytorch_model.bin" not in sent and "original/consolidated.safetensors" not in sent
    assert len(sent) == len(set(sent))
    server.sent.clear()
    assert fetch(server, tmp_path, "org/tiny@main")[:2] == (0, folder)
    assert fetch(server, tmp_path, "org/tiny", HF_HUB_OFFLINE="1")[:2] == (0, folder)
    assert server.sent == []


def test_an_interrupted_download_goes_on(server, tmp_path):
    """Bug: a connection that breaks at 90 % of 60 GB begins anew, or leaves half a file."""
    server.cut = "model.safetensors"
    code, folder, _ = fetch(server, tmp_path, "org/large")
    if code:  # this version of huggingface_hub does not try again by itself
        code, folder, _ = fetch(server, tmp_path, "org/large")
    whole = (server.root / "models/org/large/model.safetensors").read_bytes()
    assert code == 0 and Path(folder, "model.safetensors").read_bytes() == whole
    begins = [int(asked[6:].split("-")[0]) for _, asked in server.sent if asked]
    assert len(server.sent) == 2 and begins[0] >= 4 * MB


def test_two_ranks_fetch_once(server, tmp_path):
    """Bug: eight ranks of a machine fetch the same 60 GB at once, over each other's files."""
    ranks = [start(server, tmp_path, "org/tiny", LOCAL_RANK=str(rank)) for rank in range(2)]
    found = [rank.communicate(timeout=120)[0].strip() for rank in ranks]
    sent = [name for name, _ in server.sent]
    assert found[0] == found[1] and Path(found[0], "config.json").exists()
    assert len(sent) == len(set(sent))


@pytest.mark.parametrize(
    "name, refusal, message",
    [
        ("org/nobody", None, "unknown to the hub .or private: `hf auth login`."),
        ("org/tiny@v9", None, "no such revision"),
        ("org/tiny", (401, "GatedRepo"), "is gated: accept its terms .* `hf auth login`"),
        ("org/tiny", (401, ""), "unknown to the hub .or private|cannot be fetched: .*401"),
        ("org/tiny", (500, ""), "cannot be fetched"),
    ],
)
def test_what_the_hub_refuses_is_one_line(server, tmp_path, name, refusal, message):
    """Bug: pages of somebody else's traceback for a mistyped name."""
    if refusal:
        server.refused[name] = refusal
    code, out, line = fetch(server, tmp_path, name)
    assert code == 2 and out == ""
    assert line.startswith(f"error: no such folder: {name}")
    assert hub.re.search(message, line), line


def test_no_network_is_one_line(server, tmp_path):
    """Bug: minutes of retries, and then a traceback, on a machine without a network."""
    code, _, line = fetch(server, tmp_path, "org/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 2 and "the hub does not answer" in line


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "cannot be kept: No space left"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be kept: Permission denied"),
        (RuntimeError("xet: connection closed\nand more"), "cannot be fetched: xet: connection"),
    ],
)
def test_what_breaks_a_download_is_one_line(error, message):
    """Bug: after an hour of fetching, a traceback."""

    def fail():
        raise error

    with pytest.raises(UserError, match=f"^no such folder: m, and as a model it {message}") as said:
        hub.asked("no such folder: m, and as a model", fail)
    assert "\n" not in str(said.value)


def test_a_model_without_its_files(server, tmp_path):
    """Bug: a repository that holds weights alone ends in a traceback, after they were fetched."""
    done = subprocess.run(
        [sys.executable, "sample.py", "--model", "org/large", "1+1?"],
        cwd=ROOT,
        env=environment(server, tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert hub.re.search("error: .*(tokenizer|config).json", done.stderr), done.stderr[-500:]


def test_a_data_set_by_configuration_and_split(server, tmp_path):
    """Bug: the test split is trained on, or two configurations are mixed."""
    code, out, _ = fetch(server, tmp_path, "org/sums:hard/test", "data")
    assert code == 0 and "hard/test-00000-of-00001.jsonl" in out and "main" not in out
    assert [name for name, _ in server.sent] == ["hard/test-00000-of-00001.jsonl"]
    server.sent.clear()
    code, again, _ = fetch(server, tmp_path, "org/sums:hard/test", "data", HF_HUB_OFFLINE="1")
    assert code == 0 and again == out and server.sent == []
    code, _, line = fetch(server, tmp_path, "org/sums:hard/train", "data", HF_HUB_OFFLINE="1")
    assert code == 2 and "the hub does not answer" in line
    code, _, line = fetch(server, tmp_path, "org/sums/test", "data")
    assert code == 2 and "lies in several folders (hard, main)" in line
    code, _, line = fetch(server, tmp_path, "org/sums:main/dev", "data")
    assert code == 2 and "no data files of main dev; it has hard/test" in line


def test_commands_take_names(server, tmp_path):
    """Bug: names work in one place (weights) and not in another (tokenizer, fingerprint, data)."""
    flags = ["--limit", "1", "--n", "2", "--max-tokens", "4", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "evaluate.py", "--model", "org/tiny", "--data", "org/sums:main/test"]
        + flags,
        cwd=ROOT,
        env=environment(server, tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "org/tiny" in done.stdout and (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    "config, split, chosen",
    [
        ("main", "test", ["main/test-0.parquet"]),
        ("socratic", None, "several|no"),
        (None, "train", "lies in several folders"),
        ("socratic", "train", ["socratic/train-0.parquet", "socratic/train-1.parquet"]),
        ("main", "est", []),
    ],
)
def test_files_are_chosen_by_whole_words(config, split, chosen):
    """Bug: `test` finds latest.json, and `est` finds test."""
    files = [
        *("README.md", "main/test-0.parquet", "main/train-0.parquet"),
        *("socratic/train-0.parquet", "socratic/train-1.parquet", "latest.png"),
    ]
    if chosen == "several|no":
        assert hub.choose_files(files, config, split) == files[3:5]
    elif isinstance(chosen, str):
        with pytest.raises(UserError, match=chosen):
            hub.choose_files(files, config, split)
    else:
        assert hub.choose_files(files, config, split) == chosen


def test_a_file_that_is_alone():
    """Bug: a repository with training data alone answers for the test split."""
    assert hub.choose_files(["data.parquet", "README.md"], None, "test") == ["data.parquet"]
    assert hub.choose_files(["train.parquet", "README.md"], None, "test") == []
    assert hub.choose_files(["train.parquet"], None, "train") == ["train.parquet"]
    of_kinds = ["easy/easy.parquet", "hard/hard.parquet"]  # each alone in its configuration
    assert hub.choose_files(of_kinds, "hard", "train") == ["hard/hard.parquet"]
    assert hub.choose_files([*of_kinds, "hard/more.parquet"], "hard", "train") == []
    assert hub.choose_files(["hard/silver.parquet"], "hard", "gold") == []


def test_a_path_that_exists_wins(tmp_path, monkeypatch):
    """Bug: a file that is called as a data set is passed over for the hub's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k").write_text('{"problem": "1+1?", "answer": 2}\n')
    monkeypatch.setattr(hub, "fetch_data", lambda name: pytest.fail(f"asked for {name}"))
    assert tasks.load("gsm8k") == [tasks.Problem("1+1?", "2")]


def test_known_names_are_well_formed():
    """Bug: a slip in the table shows only when somebody has a network."""
    for name, known in hub.KNOWN.items():
        assert hub.DATA.fullmatch(known.source), name
        assert not hub.DATA.fullmatch(name), f"{name} would be taken for the hub's"


@pytest.mark.parametrize(
    "name, files, chosen",
    [
        ("gsm8k", ["main/test-0.parquet", "main/train-0.parquet", "socratic/test-0.parquet"], 0),
        ("math", ["data/train-0.parquet", "data/test-0.parquet", "algebra/train-0.parquet"], 0),
        ("math500", ["test.jsonl"], 0),
        ("aime24", ["data/train-00000-of-00001.parquet"], 0),
        ("omni-math", ["test.jsonl"], 0),
        (
            "olympiadbench",
            [
                "OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet",
                "OlympiadBench/OE_TO_maths_zh_COMP/OE_TO_maths_zh_COMP.parquet",
                "OlympiadBench/TP_TO_maths_en_COMP/TP_TO_maths_en_COMP.parquet",
            ],
            0,
        ),
        ("gpqa-diamond", ["gpqa_diamond.csv", "gpqa_extended.csv", "gpqa_main.csv"], 0),
        ("t1-sft", ["sft.jsonl", "rl-data.jsonl"], 0),
        ("t1-rl", ["sft.jsonl", "rl-data.jsonl"], 1),
    ],
)
def test_known_names_find_their_file(name, files, chosen):
    """Bug: a split is asked for that no path names (OlympiadBench), or one lies in the folder of
    each subject, too (MATH). The paths are the hub's, as other projects cite them; others' files
    were left out."""
    _, config, split, _ = hub.DATA.fullmatch(hub.KNOWN[name].source).groups()
    assert hub.choose_files(files, config, split) == [files[chosen]]


# --- fields and options ---------------------------------------------------------------------------


def write(tmp_path, *rows) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "row, fields, problem",
    [
        ({"Problem": "1+1?", "Answer": 2}, "", ("1+1?", "2")),
        ({"question": "q", "final_answer": ["3"]}, "", ("q", "3")),
        ({"problem": "q", "solution": r"a \boxed{1} b \boxed{4}"}, "", ("q", "4")),
        ({"problem": "q", "answer": "", "solution": r"\boxed{4}"}, "", ("q", "4")),
        ({"problem": "q", "answer": 0, "solution": r"\boxed{4}"}, "", ("q", "0")),
        ({"text": "q", "gold": "5", "answer": "x"}, "problem=text,answer=gold", ("q", "5")),
    ],
)
def test_fields_are_found_or_named(tmp_path, row, fields, problem):
    """Bug: a data set must be rewritten before it can be used; or 0 is taken for no answer."""
    [found] = tasks.load(write(tmp_path, row), fields)
    assert (found.question, found.answer) == problem


@pytest.mark.parametrize(
    "fields, message",
    [
        ("problem=text", "line 1: no field `text` .it has problem, answer"),
        ("x=y", "--fields takes"),
    ],
)
def test_bad_fields_are_one_line(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        tasks.load(write(tmp_path, {"problem": "q", "answer": "1"}), fields)


def test_options_are_shuffled_and_the_letter_follows(tmp_path):
    """Bug: the letter stays where it was, or the right option is always A."""
    options = ["A)seven", "B)eight", "C)nine", "D)ten"]
    rows = [{"question": f"{i}?", "options": options, "correct": "C"} for i in range(40)]
    letters = []
    for problem in tasks.load(write(tmp_path, *rows)):
        lines = problem.question.split("\n")[1:]
        assert sorted(line[4:] for line in lines) == ["eight", "nine", "seven", "ten"]
        assert f"({problem.answer}) nine" in lines and problem.task == "choice"
        letters.append(problem.answer)
    assert set(letters) == set("ABCD")
    again = tasks.load(write(tmp_path, *rows), seed=1)
    assert [problem.answer for problem in again] != letters
    judged = tasks.judge_all([again[0]], [f"so \\boxed{{{again[0].answer}}}"])
    assert judged[0].correct


def test_several_orders_of_the_options(tmp_path):
    """Bug: --shuffles asks in one order, or problem by problem instead of order by order."""
    rows = [{"question": f"{i}?", "options": [*"wxyz"], "correct": "C"} for i in range(3)]
    config = evaluate.Config([], data=str(write(tmp_path, *rows)), shuffles=4)
    problems, lines = evaluate.read_problems(config)
    firsts = [problem.question.split("\n")[0] for problem in problems]
    assert firsts == ["0?", "1?", "2?"] * 4 and len(lines) == 12
    assert len({problem.answer for problem in problems[::3]}) > 1


@pytest.mark.parametrize("answer", ["C", "(C)", 2, "nine", "C) nine"])
def test_the_right_option_by_letter_number_or_text(tmp_path, answer):
    options = ["A) seven", "B) eight", "C) nine"]
    row = {"problem": "?", "options": options, "answer": answer}
    [problem] = tasks.load(write(tmp_path, row))
    assert f"({problem.answer}) nine" in problem.question


@pytest.mark.parametrize("answer", ["", "()", "AB", "E", "ten", 3])
def test_an_answer_that_is_no_option_is_refused(tmp_path, answer):
    """Bug: no letter, or two, pass for the first of them."""
    row = {"problem": "?", "options": ["seven", "eight", "nine"], "correct": answer}
    with pytest.raises(UserError, match=r"line 1: the answer .* is none of its 3 options"):
        tasks.load(write(tmp_path, row))


def test_options_that_are_written_stay_as_they_were_put(tmp_path):
    """Bug: what --curate has written is shuffled once more, and its letter names another option."""
    options = ["seven", "eight", "nine", "ten"]
    path = write(
        tmp_path, *({"problem": f"{i}?", "options": options, "answer": "nine"} for i in range(9))
    )
    rows = tasks.read_source(path)
    problems = tasks.load(path)
    cli.write_jsonl(tmp_path / "curated.jsonl", list(rows.values()))
    assert tasks.load(tmp_path / "curated.jsonl", seed=5) == problems


def test_options_of_a_chat(tmp_path):
    """Bug: a chat becomes the text of a Python list, or loses its earlier turns."""
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Which?"}]
    row = {"messages": chat, "options": ["one", "two"], "answer": "B"}
    [problem] = tasks.load(write(tmp_path, row))
    assert problem.earlier == (("system", "Be short."),)
    assert (
        problem.question.startswith("Which?\n(A) ")
        and f"({problem.answer}) two" in problem.question
    )


def test_options_that_speak_of_others_stay(tmp_path):
    """Bug: "both A and B" is shuffled away from what A and B were."""
    row = {"problem": "?", "options": ["x", "y", "Both A and B", "z"], "answer": "C"}
    for seed in range(5):
        [problem] = tasks.load(write(tmp_path, row), seed=seed)
        assert problem.question.endswith("(A) x\n(B) y\n(C) Both A and B\n(D) z")


def test_columns_of_options(tmp_path, monkeypatch):
    """GPQA: the right answer stands in a column of its own, in a CSV file."""
    path = tmp_path / "gpqa_diamond.csv"
    path.write_text(
        "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\n"
        '"Which, of these?",nine,one,two,"thr,ee"\n'
    )
    monkeypatch.setattr(hub, "fetch_data", lambda name: (path,))
    [problem] = tasks.load("gpqa-diamond")
    assert problem.question.startswith("Which, of these?\n(A) ")
    assert f"({problem.answer}) nine" in problem.question and "thr,ee" in problem.question
