"""Text to tokens and back: tiktoken, built from the `tokenizer.json` of any byte-level BPE, and its chat template.

    tokenizer = load_tokenizer("path/to/Qwen2.5-0.5B-Instruct")
    tokenizer.encode("2 + 2 =")                                 # special tokens in the text are only text
    tokenizer.chat([{"role": "user", "content": "2 + 2?"}])     # the model's own chat template, then encode

The pattern that cuts text into words, the merges, the added tokens and the normaliser are read from the file, never
guessed by the model's name; whatever would be computed differently here is refused. `demo_tokenizer` writes a small
tokenizer of the same format, so that nothing else needs to know where a tokenizer came from.
"""

import json
import re
import unicodedata
from collections.abc import Iterable
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox
import regex  # comes with tiktoken
import tiktoken

from cli import UserError, parse_json, read_json

# The regex inside the `ByteLevel` pre-tokenizer (GPT-2's), and the same when `Digits` has cut out the digits before it:
# its \s+(?!\S) then also stops looking at a digit, where the piece ends.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_AFTER_DIGITS = r"%s|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# For a folder without a template (a base model). No space ends the prompt: it belongs to the answer's first token.
PLAIN_TEMPLATE = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}Question: \
{{ message['content'] }}
{% elif message['role'] == 'assistant' %}Answer: {{ message['content'] }}{{ eos_token }}
{% else %}{{ message['content'] }}
{% endif %}{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"""
# What a template can raise: jinja2's own errors, and those of the Python operations that its expressions stand for.
TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError
)  # fmt: skip
QUOTE = "\ufdd0"  # a code point that stands for nothing in Unicode: see `Tokenizer.chat`


class Tokenizer:
    """A byte-level BPE with its added tokens and chat template. Make one with `load_tokenizer`."""

    def __init__(self, files: dict[str, bytes], source: str = "tokenizer", eos_ids: Iterable[int] = ()):
        """files: the contents of FILES (all but the first may be absent). eos_ids: known from elsewhere."""
        self.files, self.source = files, source
        raw = parse_json(files["tokenizer.json"], f"{source}/tokenizer.json")
        settings = parse_json(files.get("tokenizer_config.json", b"{}"), f"{source}/tokenizer_config.json")
        self._read_added_tokens(raw)
        self._read_model(raw)
        self.normal_forms = read_normalizer(raw.get("normalizer"), source)
        self.prefix, self.suffix = read_post_processor(raw.get("post_processor"), source)
        names = {key: value for key, value in settings.items() if key.endswith("_token") and value}
        # a token is given by its text, or by an object that holds it
        self.special_texts = {key: text["content"] if isinstance(text, dict) else text for key, text in names.items()}
        eos = (raw["model"]["vocab"] | self.added).get(self.special_texts.get("eos_token"))
        self.eos_ids = sorted({*eos_ids, *([] if eos is None else [eos])})
        self.vocab_size = max(self.pieces) + 1
        self.chat_template = read_chat_template(files, settings, source)

    def _read_added_tokens(self, raw: dict) -> None:
        tokens = raw.get("added_tokens", [])
        for token in tokens:
            if token.get("single_word") or token.get("lstrip") or token.get("rstrip"):
                raise self._refuse(f"added token {token['content']!r} with single_word, lstrip or rstrip")
        self.added = {token["content"]: token["id"] for token in tokens}
        self.special = {token["content"] for token in tokens if token.get("special")}
        # Tokens marked `normalized` are looked for in the normalised text, the others before. [allow_special] -> both.
        late = {token["content"] for token in tokens if token.get("normalized")}
        every, ordinary = self.added.keys(), self.added.keys() - self.special
        self.cuts = {True: (any_of(every - late), any_of(every & late))}
        self.cuts[False] = any_of(ordinary - late), any_of(ordinary & late)

    def _read_model(self, raw: dict) -> None:
        """Ranks for tiktoken. A rank is the order of merging, which an id need not be: `ids` maps one to the other.

        tiktoken merges any two tokens whose bytes make a third, the library only the pairs that the file lists. With
        merges as BPE training leaves them, or with all such pairs listed (Llama 3), that comes to the same.
        """
        model, decoder = raw.get("model") or {}, raw.get("decoder") or {}
        if model.get("type") != "BPE" or model.get("byte_fallback") or decoder.get("type") != "ByteLevel":
            raise self._refuse(f"a {model.get('type')} model that is not byte-level BPE (SentencePiece, for one)")
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise self._refuse(f"model option {option} = {model[option]!r}")
        vocab, alphabet = model["vocab"], byte_alphabet()
        ranks = {bytes([byte]): byte for byte in range(256)}
        ids = [vocab.get(char, -1) for char in sorted(alphabet, key=alphabet.get)]
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        texts = [left + right for left, right in merges]
        if model.get("ignore_merges"):  # a whole word in the vocabulary is taken as it is; tiktoken always does so
            texts += [text for text in vocab if all(char in alphabet for char in text) and text not in self.added]
        for text in texts:
            piece = bytes(alphabet[char] for char in text)
            if piece not in ranks:
                ranks[piece] = len(ids)
                ids.append(vocab[text])
        self.ids = ids
        # Bytes that the vocabulary lacks (some never occur in UTF-8): the library drops them from the text.
        self.absent = bytes(byte for byte in range(256) if ids[byte] < 0)
        if self.absent and model.get("unk_token"):
            raise self._refuse("an unknown token for bytes that the vocabulary lacks")
        self.pieces = {token: piece for piece, rank in ranks.items() if (token := ids[rank]) >= 0}
        self.pieces |= {token: text.encode() for text, token in self.added.items()}
        self.pattern = read_pattern(raw.get("pre_tokenizer"), self.source)
        self.bpe = tiktoken.Encoding(self.source, pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={})

    def _refuse(self, what: str) -> UserError:
        return UserError(f"{self.source}/tokenizer.json: {what} is not supported")

    def encode(self, text: str, allow_special: bool = False, add_bos: bool = False) -> list[int]:
        """Token ids of a text.

        allow_special: False reads special tokens in the text as plain characters (a problem that spells `<|im_end|>`
            cannot end its turn); True reads them as the tokens, as transformers does.
        add_bos: True adds what the tokenizer's post-processor puts around a whole text (Llama 3's first token).
        """
        ids = self._encode(text, allow_special)
        return [*self.prefix, *ids, *self.suffix] if add_bos else ids

    def _encode(self, text: str, allow_special: bool, drop: str = "") -> list[int]:
        """The cuts give text, token, text, token, ..., text; `drop` is taken out of the texts."""
        ids: list[int] = []
        raw_cut, normal_cut = self.cuts[allow_special]
        for i, part in enumerate(raw_cut.split(text)):
            if i % 2:
                ids.append(self.added[part])
                continue
            for form in self.normal_forms:
                part = unicodedata.normalize(form, part)
            for j, plain in enumerate(normal_cut.split(part)):
                ids += [self.added[plain]] if j % 2 else self._encode_plain(plain.replace(drop, "") if drop else plain)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        raw = text.encode("utf-8", errors="replace")  # half a surrogate pair is no text: it becomes "?"
        if len(raw.translate(None, self.absent)) == len(raw):
            return [self.ids[rank] for rank in self.bpe.encode_ordinary(raw.decode())]
        words = (word.encode().translate(None, self.absent) for word in regex.findall(self.pattern, raw.decode()))
        return [self.ids[rank] for word in words if word for rank in self.bpe._encode_single_piece(word)]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of some ids. Bytes that are not UTF-8, and ids beyond the vocabulary, become U+FFFD."""
        skipped = {self.added[text] for text in self.special} if skip_special else ()
        return b"".join(self.pieces.get(token, b"\xff") for token in ids if token not in skipped).decode(
            errors="replace"
        )

    def render(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> str:
        """The text of a conversation under the chat template; messages are {"role": ..., "content": ...}."""
        try:
            template = compile_template(self.chat_template)
            variables = self.special_texts | variables
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
        except TEMPLATE_ERRORS as error:
            raise UserError(f"{self.source}: the chat template refuses this conversation: {error}") from None

    def chat(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> list[int]:
        """Token ids of a conversation. Special tokens count where the template writes them, not inside a message."""
        specials = any_of(self.special)
        quoted = []
        for message in messages:  # a mark inside a token makes it plain text; `_encode` takes the mark out again
            if isinstance(content := message.get("content"), str):
                content = specials.sub(lambda match: match[0][0] + QUOTE + match[0][1:], content.replace(QUOTE, ""))
            quoted.append(message | {"content": content})
        return self._encode(self.render(quoted, add_generation_prompt, **variables), allow_special=True, drop=QUOTE)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files, byte for byte as they were read, into a folder that exists."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a Hugging Face folder, or in a finished run's `model` folder."""
    folder = next((f for f in (Path(path) / "model", Path(path)) if (f / "tokenizer.json").is_file()), None)
    if folder is None:
        hint = " (SentencePiece models are not supported)" if (Path(path) / "tokenizer.model").exists() else ""
        raise UserError(f"{path} holds no tokenizer.json{hint}")
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    eos_ids = set()
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            eos_ids |= set(stop_ids(read_json(folder / name), str(folder / name)))
    try:
        return Tokenizer(files, str(folder), eos_ids)
    except (LookupError, TypeError, AttributeError, ValueError) as error:  # a part is missing, or of another kind
        raise UserError(f"{folder}/tokenizer.json is not whole, or not byte-level BPE ({error!r})") from None


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


def any_of(texts: Iterable[str]) -> re.Pattern:
    """A regex that finds, leftmost first, the longest of some texts (and nothing, if there are none)."""
    return re.compile("(" + ("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)") + ")")


@lru_cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's way to write bytes as visible characters: those of Latin-1 that print, and for the rest 256, 257, ..."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def read_pattern(pre_tokenizer: dict | None, source: str) -> str:
    """One regex that cuts a text into the words that the pre-tokenizers, one after the other, would make of it."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    shapes = [step and step.get("type") for step in steps]
    refusal = UserError(f"{source}/tokenizer.json: pre-tokenizers {shapes} are not supported in this form")
    if not shapes or shapes[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise refusal
    gpt2 = steps[-1].get("use_regex", True)
    if shapes == ["ByteLevel"]:
        return GPT2 if gpt2 else r"[\s\S]+"
    if shapes == ["Digits", "ByteLevel"] and gpt2:
        return GPT2_AFTER_DIGITS % (r"\p{N}" if steps[0].get("individual_digits") else r"\p{N}+")
    if shapes == ["Split", "ByteLevel"] and not gpt2:
        split = steps[0]
        pattern = split["pattern"].get("Regex") or re.escape(split["pattern"]["String"])
        if (split["behavior"], split["invert"]) == ("Removed", True):
            return pattern
        if (split["behavior"], split["invert"]) == ("Isolated", False):
            return rf"{pattern}|(?:(?!{pattern})[\s\S])+"  # what lies between two matches is a word too
    raise refusal


def read_normalizer(normalizer: dict | None, source: str) -> list[str]:
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    for step in steps:
        if step["type"] not in NORMAL_FORMS:
            raise UserError(f"{source}/tokenizer.json: normalizer {step['type']} is not supported")
    return [step["type"] for step in steps]


def read_post_processor(processor: dict | None, source: str) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a whole text."""
    prefix, suffix = [], []
    for step in (processor or {}).get("processors", [processor] if processor else []):
        if step["type"] == "TemplateProcessing":
            target = prefix
            for item in step["single"]:
                if "Sequence" in item:
                    target = suffix
                else:
                    target += step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
        elif step["type"] != "ByteLevel":  # ByteLevel only trims offsets, which nobody reads here
            raise UserError(f"{source}/tokenizer.json: post-processor {step['type']} is not supported")
    return prefix, suffix


def read_chat_template(files: dict[str, bytes], settings: dict, source: str) -> str:
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{source}/chat_template.jinja: not UTF-8 ({error})") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template or PLAIN_TEMPLATE


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks what an assistant wrote, for loss masks that transformers makes; here it does nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's protocol)

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache
def compile_template(source: str) -> jinja2.Template:
    """A template with the names that transformers gives to it. Templates are downloaded code: they run in a sandbox."""

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, GenerationTag]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment.from_string(source)


def demo_tokenizer(words: list[str]) -> Tokenizer:
    """A small tokenizer: 256 bytes, the numbers 10 to 99, the given words, <|user|>, <|assistant|> and <|end|>.

    Text is cut at the given words (the longest that fits, anywhere) and at digits, two by two; all else is bytes.
    """
    char_of = {byte: char for char, byte in byte_alphabet().items()}
    spell = lambda text: "".join(char_of[byte] for byte in text.encode())  # noqa: E731
    texts = [char_of[byte] for byte in range(256)] + [str(number) for number in range(10, 100)]
    texts += dict.fromkeys(spell(word) for word in words if len(word.encode()) > 1 and not word.isdigit())
    vocab = {text: number for number, text in enumerate(texts)}
    # All ways to make each entry of two others: with them, merging agrees in every implementation.
    merges = [
        (text[:cut], text[cut:])
        for text in texts
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    specials = ["<|user|>", "<|assistant|>", "<|end|>"]
    escape = lambda word: re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", word)  # noqa: E731
    pattern = "|".join([*map(escape, sorted(words, key=len, reverse=True)), "[0-9]{1,2}", r"[\s\S]"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    raw = {
        "version": "1.0",
        "added_tokens": [{"id": len(vocab) + i, "content": text, **flags} for i, text in enumerate(specials)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": merges,
        },
    }
    template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] }}<|end|>"
        "{% else %}<|user|>{{ message['content'] }}<|assistant|>{% endif %}{% endfor %}"
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    files = {
        "tokenizer.json": json.dumps(raw, ensure_ascii=False, indent=1).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=1).encode(),
        "chat_template.jinja": template.encode(),
    }
    return Tokenizer(files, "demo")
