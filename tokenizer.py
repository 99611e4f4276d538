"""Text to tokens and back: the `tokenizers` library, with special tokens that a text cannot spell.

    tokenizer = load_tokenizer("path/to/Qwen2.5-0.5B-Instruct")
    tokenizer.encode("2 + 2 =")                               # special tokens in it are only text
    tokenizer.chat([{"role": "user", "content": "2 + 2?"}])   # the model's chat template, encoded

The library defines `tokenizer.json` and reads every kind of it: byte-level BPE (Qwen, Llama 3,
GLM) and SentencePiece's (Llama 2). Added here are the chat template, the tokens that end a turn,
and `MARK`, by which a template's special tokens are told from those that a message spells.

`demo_tokenizer` makes a small tokenizer of the same format, so that nothing else needs to know
where a tokenizer came from.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

import hub
from cli import UserError, parse_json, read_json

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# For a folder without a template (a base model). No space ends the prompt: it belongs to the first
# token of the answer.
PLAIN_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}Question: \
{{ message['content'] }}
{% elif message['role'] == 'assistant' %}Answer: {{ message['content'] }}{{ eos_token }}
{% else %}{{ message['content'] }}
{% endif %}{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"""
TEMPLATE_ERRORS = (  # jinja2's own, and those of the Python operations that expressions stand for
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)
TODAY = datetime(2024, 7, 26)  # for templates that print a date: Llama 3's own, if it has no clock
THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>\s*")
OPENED = re.compile(THOUGHT.pattern + "$")  # at the end of a prompt,
PROMPT_END = 16  # within so many tokens
MARK = "\ufdd0"  # a code point that stands for nothing in Unicode: see `Tokenizer.chat`


class Tokenizer:
    """The library's tokenizer with a chat template. Make one with `load_tokenizer`.

    eos_ids: the tokens that end a turn. vocab_size: one above the highest id. special_ids: the
    special tokens. special_texts: what a template calls eos_token, bos_token and so on.
    """

    def __init__(
        self,
        files: dict[str, bytes],
        source: str = "tokenizer",
        eos_ids: Iterable[int] = (),
        template_args: str = "",
    ):
        """files: the contents of FILES; all but the first may be absent.

        source: what errors call the folder. eos_ids: stop tokens known from its other files.
        template_args: JSON, what else the chat template is to know: '{"enable_thinking": false}'.
        """
        self.template_args = parse_json(template_args or "{}", "--template-args")
        self.files = files
        self.source = source
        self.library = self._read_library()
        self.known_ids = set(self.library.get_vocab().values())
        self.vocab_size = max(self.known_ids, default=-1) + 1
        added = self.library.get_added_tokens_decoder()
        specials = {number: token for number, token in added.items() if token.special}
        self.special_ids = set(specials)
        self._add_marked(specials)

        settings_file = files.get("tokenizer_config.json", b"{}")
        settings = parse_json(settings_file, f"{source}/tokenizer_config.json")
        try:
            self.special_texts = read_special_texts(settings)
            self.chat_template = read_chat_template(files, settings, source)
            eos = self.library.token_to_id(self.special_texts.get("eos_token", ""))
        except (LookupError, TypeError) as error:
            raise UserError(
                f"{source}/tokenizer_config.json is not understood ({error!r})"
            ) from None
        self.eos_ids = sorted({*eos_ids, eos} - {None})

    def _read_library(self) -> tokenizers.Tokenizer:
        with self._library_errors():
            library = tokenizers.Tokenizer.from_buffer(self.files["tokenizer.json"])
        # A file keeps the length that its author last cut or filled texts to.
        library.no_truncation()
        library.no_padding()
        return library

    def _add_marked(self, specials: dict[int, AddedToken]) -> None:
        """A second tokenizer, `marked`: special tokens are plain text to it unless MARK precedes.

        `meant` maps its ids of the marked texts to the ids of the tokens.
        """
        self.marked = self._read_library()
        self.marked.encode_special_tokens = True  # the library's name for: they are plain text
        tokens = {}
        for number, token in specials.items():
            # Not `normalized` nor `single_word`: a mark that is not found would stay in the text.
            tokens[number] = AddedToken(
                MARK + token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False
            )
        self.marked.add_tokens(list(tokens.values()))
        self.meant = {
            self.marked.token_to_id(token.content): number for number, token in tokens.items()
        }

        texts = [re.escape(token.content) for token in specials.values()]
        longest_first = "|".join(sorted(texts, key=len, reverse=True))
        # Not before a mark: see `_quoted`.
        self.unmarked = re.compile(f"({longest_first or '(?!)'})(?!{MARK})")

    @contextmanager
    def _library_errors(self) -> Iterator[None]:
        """What the library refuses becomes a UserError: its exceptions, and panics of its Rust."""
        try:
            yield
        except BaseException as error:
            # A panic is no Exception, and its class cannot be imported.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = " ".join(str(error).split())
            raise UserError(f"{self.source}/tokenizer.json: {reason}") from None

    def encode(self, text: str, allow_special: bool = False, add_bos: bool = False) -> list[int]:
        """Token ids of a text.

        allow_special: False reads special tokens in the text as plain characters: a problem that
            spells `<|im_end|>` cannot end its turn. (Unless the model finds them by itself: a
            Unigram model may have them among its words.) True reads them as the tokens, as
            transformers does.
        add_bos: True adds what the tokenizer's post-processor puts around a whole text (Llama 3's
            first token).
        """
        if allow_special:
            return self._encode(self.library, text, add_bos)
        return self._encode_marked(text.replace(MARK, ""), add_bos)

    def _encode_marked(self, text: str, add_bos: bool = False) -> list[int]:
        ids = self._encode(self.marked, text, add_bos)
        return [self.meant.get(token, token) for token in ids]

    def _encode(self, library: tokenizers.Tokenizer, text: str, add_bos: bool) -> list[int]:
        text = text.encode("utf-8", errors="replace").decode()  # half a surrogate pair becomes "?"
        with self._library_errors():
            return library.encode(text, add_special_tokens=add_bos).ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of some ids. Bytes that are not UTF-8, and unknown ids, become U+FFFD."""
        runs: list[list[int]] = [[]]
        for token in ids:
            if token not in self.known_ids:  # the library would leave it out
                runs.append([])
            elif not (skip_special and token in self.special_ids):
                runs[-1].append(token)
        with self._library_errors():
            texts = [self.library.decode(run, skip_special_tokens=False) for run in runs]
        return "\ufffd".join(texts)

    def render(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> str:
        """The text of a conversation under the chat template.

        messages: {"role": ..., "content": ...} each. variables: what else a template may ask for.
        UserError if the template refuses.
        """
        absent = {"tools": None, "documents": None}  # templates ask whether they are none
        variables = absent | self.special_texts | self.template_args | variables
        try:
            template = compile_template(self.chat_template)
            return template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **variables
            )
        except TEMPLATE_ERRORS as error:
            raise UserError(
                f"{self.source}: the chat template refuses this conversation: {error}"
            ) from None

    def chat(
        self, messages: list[dict], add_generation_prompt: bool = True, **variables
    ) -> list[int]:
        """Token ids of a conversation.

        Special tokens count where the template writes them, and are plain text inside a message.
        Where no message spells one, the ids are those of transformers: the conversation is encoded
        as one text, and spaces beside a token with `lstrip` or `rstrip` belong to it. Only a token
        with `single_word` or `normalized` counts here even where transformers overlooks it.
        """
        text = self.render(self._quoted(messages), add_generation_prompt, **variables)
        parts = self.unmarked.split(text)
        for i, part in enumerate(parts):
            # A split gives text, token, text, token, ..., text: the odd parts are tokens.
            parts[i] = MARK + part if i % 2 else part.replace(MARK, "")
        return self._encode_marked("".join(parts))

    def _quoted(self, value):
        """A message, with a mark behind every character of the special tokens that it spells.

        So they are not found in the rendered text, neither whole nor in part.
        """
        if isinstance(value, dict):
            return {key: self._quoted(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._quoted(item) for item in value]
        if not isinstance(value, str):
            return value
        value = value.replace(MARK, "")  # a mark of the message's own
        return self.unmarked.sub(lambda found: MARK.join(found[0]) + MARK, value)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files, byte for byte as they were read, into an existing folder."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


# --- reading a folder -----------------------------------------------------------------------------


def load_tokenizer(path: str | Path, template_args: str = "") -> Tokenizer:
    """The tokenizer in a Hugging Face folder, in a finished run's `model` folder, or of a model of
    the hub (hub.py).

    Its stop tokens are all that its files name. template_args: see `Tokenizer`. UserError for a
    folder without a tokenizer, or with one that is not whole.
    """
    path = Path(path) if Path(path).exists() else hub.fetch_model(str(path))
    folders = [path / "model", path]
    folder = next((one for one in folders if (one / "tokenizer.json").is_file()), None)
    if folder is None:
        hint = ""
        if (path / "tokenizer.model").exists():
            hint = ", only a tokenizer.model (transformers' AutoTokenizer turns it into one)"
        raise UserError(f"{path} holds no tokenizer.json{hint}")

    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    eos_ids = []
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        if file.is_file():
            eos_ids += stop_ids(read_json(file), str(file))
    return Tokenizer(files, str(folder), eos_ids, template_args)


def require_stop_token(tokenizer: Tokenizer, vocab_size: int, model: str) -> None:
    """UserError if none of a model's `vocab_size` tokens ends a response: it is not to be trained.

    model: what the error calls it.
    """
    if not any(0 <= token < vocab_size for token in tokenizer.eos_ids):
        raise UserError(
            f"{model} names no stop token, so no response would ever end: name it as eos_token in "
            "its tokenizer_config.json, or as eos_token_id in its generation_config.json"
        )


def stop_ids(raw: dict, where: str) -> list[int]:
    """The `eos_token_id` of a config.json or generation_config.json: none, one, or a list."""
    ids = raw.get("eos_token_id")
    if ids is None:
        return []
    if not isinstance(ids, list):
        ids = [ids]
    if not all(isinstance(token, int) for token in ids):
        raise UserError(f"{where}: eos_token_id is {ids}")
    return ids


def read_special_texts(settings: dict) -> dict[str, str]:
    """eos_token, bos_token and others, as chat templates know them (tokenizer_config.json)."""
    texts = {}
    for key, value in settings.items():
        if key.endswith("_token") and value:
            # A token is given by its text, or by an object that holds it.
            texts[key] = value["content"] if isinstance(value, dict) else value
    return texts


# --- chat templates -------------------------------------------------------------------------------


def read_chat_template(files: dict[str, bytes], settings: dict, source: str) -> str:
    """The template of a folder: a file of its own, or in its settings, or else the plain one."""
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{source}/chat_template.jinja: not UTF-8 ({error})") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        by_name = {entry["name"]: entry["template"] for entry in template}
        if "default" not in by_name:
            raise UserError(
                f"{source}/tokenizer_config.json: of its chat templates ({', '.join(by_name)}) "
                "none is the default: put the one to use into a file chat_template.jinja"
            )
        template = by_name["default"]
    return template or PLAIN_TEMPLATE


def open_thought(prompt: str, response: str = "") -> str | None:
    """The tag of a thought that has begun and not ended, "think" say; None where there is none.

    It begins in the response, or at the end of the prompt: some templates open it (R1-Distill).
    """
    found = THOUGHT.search(response) or OPENED.search(prompt)
    return found[1] if found and f"</{found[1]}>" not in response else None


def continued(prompt: str, response: str) -> str:
    """The response, without an opening of its thought that stands at the prompt's end already."""
    opened = OPENED.search(prompt)
    if not opened or not response.startswith(f"<{opened[1]}>"):
        return response
    if response.startswith(opened[0]):
        return response.removeprefix(opened[0])
    return THOUGHT.sub("", response, count=1)


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks what an assistant wrote, for loss masks of transformers. Not here."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's protocol)

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache
def compile_template(source: str) -> jinja2.Template:
    """A template, with the names that transformers gives to it.

    Templates are downloaded code: they run in a sandbox. Their clock stands still: the same
    conversation is the same tokens on another day, in a resumed run and in an evaluation.
    """

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return TODAY.strftime(form)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # jinja2's own would escape < and & for HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, GenerationTag]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(source)


# --- the demo's tokenizer -------------------------------------------------------------------------

DEMO_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] }}<|end|>"
    "{% else %}<|user|>{{ message['content'] }}<|assistant|>{% endif %}{% endfor %}"
)
DEMO_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|end|>",
    "pad_token": "<|end|>",
}


def demo_tokenizer(words: list[str]) -> Tokenizer:
    """A small tokenizer: 256 bytes, the numbers 10 to 99, the given words, and special tokens.

    These are <|user|>, <|assistant|> and <|end|>. Text is cut at the given words (the longest that
    fits, anywhere) and at digits, two by two; all else is bytes.
    """
    byte_chars = byte_alphabet()
    texts = [*byte_chars, *map(str, range(10, 100))]
    words = [word for word in words if len(word.encode()) > 1 and not word.isdigit()]
    for word in words:
        texts.append("".join(byte_chars[byte] for byte in word.encode()))
    vocab = {text: number for number, text in enumerate(dict.fromkeys(texts))}  # each once

    # Without merges, a piece is either in the vocabulary as a whole or its bytes.
    library = tokenizers.Tokenizer(models.BPE(vocab, [], ignore_merges=True))
    longest_first = sorted(words, key=len, reverse=True)
    pieces = "|".join([*map(re.escape, longest_first), "[0-9]{1,2}"])
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = Sequence([Split(Regex(pieces), "isolated"), byte_level])
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|user|>", "<|assistant|>", "<|end|>"])
    files = {
        "tokenizer.json": library.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(DEMO_SETTINGS, indent=1).encode(),
        "chat_template.jinja": DEMO_TEMPLATE.encode(),
    }
    return Tokenizer(files, "demo")


def byte_alphabet() -> list[str]:
    """GPT-2's way to write the 256 bytes as visible characters.

    The bytes that print in Latin-1 stand for themselves, the rest are 256, 257, ...
    """
    alphabet = set(ByteLevel.alphabet())
    rest = iter(sorted(char for char in alphabet if ord(char) >= 256))
    return [chr(byte) if chr(byte) in alphabet else next(rest) for byte in range(256)]
