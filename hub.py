"""Models and data sets by name: what Hugging Face's hub has, fetched once and then kept.

    python sample.py --model Qwen/Qwen2.5-0.5B-Instruct "What is 3/4 of 28?"
    python rl.py --model Qwen/Qwen2.5-0.5B --data openai/gsm8k:main/train --out runs/rl
    python tasks.py --show gsm8k                     # three problems, how many, the prompt

A path that exists always wins. Otherwise a model is ORG/NAME, or ORG/NAME@REVISION (a branch, a tag
or a commit), and a data set ORG/NAME[:CONFIG][/SPLIT][@REVISION], or a name in `KNOWN`.

huggingface_hub does the fetching: it shows its progress, keeps files in its own cache (HF_HOME),
goes on where a download was interrupted, and locks each file, so that of several ranks on a machine
one fetches and the others wait. Of a model only what we read is fetched: config, tokenizer and
safetensors, not the same weights in three other formats.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from cli import UserError

PART = r"[\w.-]+"
MODEL = re.compile(rf"({PART}/{PART})(?:@(\S+))?")
DATA = re.compile(rf"({PART}/{PART})(?::({PART}))?(?:/({PART}))?(?:@(\S+))?")
"""ORG/NAME:CONFIG/SPLIT@REVISION. (A hub's data set is always ORG/NAME here: "gsm8k" is `KNOWN`'s.)
"""
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
SPLITS = ("train", "test", "validation", "valid", "dev", "eval")
DATA_FILES = (".jsonl", ".json", ".parquet", ".csv", ".jsonl.gz", ".json.gz")


@dataclass(frozen=True)
class Known:
    """A data set that has a short name here."""

    source: str
    """As `fetch_data` takes it."""
    fields: dict[str, str] = field(default_factory=dict)
    """Ours -> its own, where tasks.py would not find them by itself."""
    options: tuple[str, ...] = ()
    """Its columns of answers to choose from, the right one first."""


KNOWN = {
    "gsm8k": Known("openai/gsm8k:main/test"),
    "gsm8k-train": Known("openai/gsm8k:main/train"),
    "math": Known("DigitalLearningGmbH/MATH-lighteval:data/train"),  # beside a folder a subject
    "math500": Known("HuggingFaceH4/MATH-500/test"),
    "aime24": Known("HuggingFaceH4/aime_2024/train"),
    "aime25": Known("math-ai/aime25/test"),
    "amc23": Known("math-ai/amc23/test"),
    "omni-math": Known("KbsdJames/Omni-MATH/test"),
    "olympiadbench": Known("Hothan/OlympiadBench:OE_TO_maths_en_COMP"),
    "gpqa-diamond": Known(
        "Idavidrein/gpqa:gpqa_diamond",
        fields={"problem": "Question", "answer": "Correct Answer"},
        options=(
            "Correct Answer",
            "Incorrect Answer 1",
            "Incorrect Answer 2",
            "Incorrect Answer 3",
        ),
    ),
    "t1-sft": Known("zai-org/T1:sft"),
    "t1-rl": Known("zai-org/T1:rl-data"),
}
"""Names as they were on the hub in 2026; what was never fetched by a test may have moved. The 500
problems of Omni-MATH that T1 is measured on have no name there: `omni-math` has all 4,428."""


def named(name: str) -> Known:
    """The data set of that name: of `KNOWN`, or as the hub calls it."""
    return KNOWN.get(name, Known(name))


# --- fetching -------------------------------------------------------------------------------------


@lru_cache
def fetch_model(name: str) -> Path:
    """The folder of the model ORG/NAME[@REVISION]. UserError if there is none to be had."""
    # Imported here: few commands need it, and it would make each start a quarter of a second later.
    from huggingface_hub import snapshot_download

    match = MODEL.fullmatch(name)
    if not match:
        raise UserError(f"no such folder: {name} (a model of Hugging Face's hub is ORG/NAME)")
    repo, revision = match.groups()
    # The pattern * also matches in folders, where other formats lie: original/, onnx/, ...
    return asked(
        f"no such folder: {name}, and as a model",
        lambda: Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=list(MODEL_FILES), ignore_patterns=["*/*"]
            )
        ),
    )


@lru_cache
def fetch_data(name: str) -> tuple[Path, ...]:
    """The files of the data set ORG/NAME[:CONFIG][/SPLIT][@REVISION], in order of their names."""
    from huggingface_hub import HfApi, hf_hub_download

    match = DATA.fullmatch(name)
    if not match or name.endswith(DATA_FILES):  # data/train.jsonl is a file that is not there
        raise UserError(
            f"no such file: {name} (a data set of Hugging Face's hub is ORG/NAME[:CONFIG][/SPLIT])"
        )
    repo, config, split, revision = match.groups()
    what = f"no such file: {name}, and as a data set"
    of_data = {"repo_type": "dataset", "revision": revision}
    try:
        files = asked(what, lambda: HfApi().list_repo_files(repo, **of_data))
    except UserError:
        files = files_kept(repo, of_data)
        if not choose_files(files, config, split):
            raise
    chosen = choose_files(files, config, split)
    if not chosen:
        found = [file for file in files if file.endswith(DATA_FILES)]
        wanted = " ".join(part for part in (config, split) if part)
        raise UserError(
            f"{repo} has no data files of {wanted or 'any kind that can be read'}; it has "
            f"{', '.join(found[:8]) or 'none'}{' ...' if len(found) > 8 else ''}"
        )
    paths = []
    for file in chosen:
        path = asked(
            what,
            lambda file=file: hf_hub_download(repo, file, **of_data),
        )
        paths.append(Path(path))
    return tuple(paths)


def files_kept(repo: str, of_data: dict[str, Any]) -> list[str]:
    """The files of a data set that were fetched before: for where there is no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, **of_data, local_files_only=True))
    except LocalEntryNotFoundError:
        return []
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def choose_files(files: list[str], config: str | None, split: str | None) -> list[str]:
    """The data files of a configuration and a split, by their names.

    Both must stand in the path as words: main/test-00000-of-00001.parquet is of main and of test,
    and not of `est`. Where no configuration is asked for, a split that lies in several folders is
    refused, since that would be a mixture. A file that is alone, or alone in its configuration, and
    names none of the usual splits, is whichever of them is asked for.
    """

    def has(file: str, word: str | None) -> bool:
        whole = rf"(?<![a-zA-Z0-9]){re.escape(word or '')}(?![a-zA-Z0-9])"
        return word is None or bool(re.search(whole, file))

    def is_all(data: list[str]) -> bool:
        if len(data) != 1 or split not in (None, *SPLITS):
            return False
        return not any(has(data[0], name) for name in SPLITS)

    data = [file for file in files if file.endswith(DATA_FILES)]
    if not is_all(data):
        data = [file for file in data if has(file, config)]
    if not is_all(data):
        data = [file for file in data if has(file, split)]
    folders = sorted({str(Path(file).parent) for file in data})
    if len(folders) > 1:
        raise UserError(
            f"the split lies in several folders ({', '.join(folders[:8])}): name one, as "
            "ORG/NAME:CONFIG/SPLIT"
        )
    return sorted(data)


def asked(what: str, fetch: Callable[[], Any]) -> Any:
    """`fetch()`, with one line for whatever the hub, the network or the disk has against it."""
    from huggingface_hub import errors
    from huggingface_hub.utils import disable_progress_bars

    http_error = errors.HfHubHTTPError.__bases__[0]  # of the HTTP library that it uses
    if os.environ.get("LOCAL_RANK", "0") != "0":
        disable_progress_bars()
    try:
        return fetch()
    except errors.GatedRepoError:
        raise UserError(
            f"{what} it is gated: accept its terms on its page of the hub, then `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{what} it is unknown to the hub (or private: `hf auth login`)") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{what} it has no such revision") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(f"{what} it cannot be fetched: the hub does not answer") from None
    except (errors.HfHubHTTPError, http_error, errors.HFValidationError, RuntimeError) as error:
        # RuntimeError: of hf_xet, which fetches large files.
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{what} it cannot be fetched: {reason}") from None
    except OSError as error:  # no room, no right to write
        raise UserError(f"{what} it cannot be kept: {error.strerror or error}") from None
