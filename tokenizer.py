"""Text to tokens and back: tiktoken, built from the `tokenizer.json` of any byte-level BPE.

    tokenizer = load_tokenizer("path/to/Qwen2.5-0.5B-Instruct")
    tokenizer.encode("2 + 2 =")                               # special tokens in it are only text
    tokenizer.chat([{"role": "user", "content": "2 + 2?"}])   # the model's chat template, encoded

A text becomes tokens in four steps, each of which is read from the file and never guessed by the
model's name:

    added tokens are cut out -> the normal form -> a pattern cuts words -> each word's bytes merge

Whatever in the file would be computed differently here is refused.

`demo_tokenizer` makes a small tokenizer of the same format, so that nothing else needs to know
where a tokenizer came from.
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

# The regex inside the `ByteLevel` pre-tokenizer (GPT-2's).
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same when `Digits` has cut out the digits before it: a piece of text then ends before a digit,
# so its \s+(?!\S) stops there too.
GPT2_AFTER_DIGITS = r"%s|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
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
QUOTE = "\ufdd0"  # a code point that stands for nothing in Unicode: see `Tokenizer.chat`


class Tokenizer:
    """A byte-level BPE with its added tokens and chat template. Make one with `load_tokenizer`.

    eos_ids: the tokens that end a turn. vocab_size: one above the highest id.
    """

    def __init__(
        self, files: dict[str, bytes], source: str = "tokenizer", eos_ids: Iterable[int] = ()
    ):
        """files: the contents of FILES; all but the first may be absent.

        source: what errors call the folder. eos_ids: stop tokens known from its other files.
        """
        self.files = files
        self.source = source
        raw = parse_json(files["tokenizer.json"], f"{source}/tokenizer.json")
        settings_file = files.get("tokenizer_config.json", b"{}")
        settings = parse_json(settings_file, f"{source}/tokenizer_config.json")

        self._read_added_tokens(raw.get("added_tokens", []))
        self._read_model(raw)
        self.normal_forms = read_normalizer(raw.get("normalizer"), source)
        self.prefix, self.suffix = read_post_processor(raw.get("post_processor"), source)
        self.vocab_size = max(self.pieces) + 1
        self.special_texts = read_special_texts(settings)
        self.chat_template = read_chat_template(files, settings, source)

        self.eos_ids = set(eos_ids)
        eos = self.special_texts.get("eos_token")
        vocabulary = raw["model"]["vocab"] | self.added
        if eos in vocabulary:
            self.eos_ids.add(vocabulary[eos])
        self.eos_ids = sorted(self.eos_ids)

    def _read_added_tokens(self, tokens: list[dict]) -> None:
        for token in tokens:
            if token.get("single_word") or token.get("lstrip") or token.get("rstrip"):
                content = token["content"]
                raise self._refuse(f"added token {content!r} with single_word, lstrip or rstrip")
        self.added = {token["content"]: token["id"] for token in tokens}
        self.special = {token["content"] for token in tokens if token.get("special")}
        # Two regexes that cut added tokens out of a text: one for before the text is normalised,
        # one for after. Twice, by whether special tokens are among those to be found.
        late = {token["content"] for token in tokens if token.get("normalized")}
        every = self.added.keys()
        ordinary = every - self.special
        self.cuts = {
            True: (any_of(every - late), any_of(every & late)),
            False: (any_of(ordinary - late), any_of(ordinary & late)),
        }

    def _read_model(self, raw: dict) -> None:
        """Ranks for tiktoken. A rank is the order of merging; `ids` maps it to the token's id.

        tiktoken merges any two tokens whose bytes make a third, the library only the pairs that the
        file lists. With merges as BPE training leaves them, or with all such pairs listed (Llama
        3), that comes to the same.
        """
        model = raw.get("model") or {}
        self._check_model(model, raw.get("decoder") or {})
        vocab = model["vocab"]
        alphabet = byte_alphabet()

        # The first 256 ranks are the bytes themselves; -1 for a byte that the vocabulary lacks.
        ranks = {bytes([byte]): byte for byte in range(256)}
        self.ids = [vocab.get(char, -1) for char in sorted(alphabet, key=alphabet.get)]
        for text in self._merged_texts(model):
            piece = bytes(alphabet[char] for char in text)
            if piece not in ranks:
                ranks[piece] = len(self.ids)
                self.ids.append(vocab[text])

        # Some bytes never occur in UTF-8. The library drops absent bytes from a text.
        self.absent = bytes(byte for byte in range(256) if self.ids[byte] < 0)
        if self.absent and model.get("unk_token"):
            raise self._refuse("an unknown token for bytes that the vocabulary lacks")
        self.pieces = {}  # id -> bytes
        for piece, rank in ranks.items():
            if self.ids[rank] >= 0:
                self.pieces[self.ids[rank]] = piece
        for text, token in self.added.items():
            self.pieces[token] = text.encode()
        self.pattern = read_pattern(raw.get("pre_tokenizer"), self.source)
        self.bpe = tiktoken.Encoding(
            self.source, pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def _check_model(self, model: dict, decoder: dict) -> None:
        byte_level = decoder.get("type") == "ByteLevel"
        if model.get("type") != "BPE" or model.get("byte_fallback") or not byte_level:
            kind = model.get("type")
            raise self._refuse(
                f"a {kind} model that is not byte-level BPE (SentencePiece, for one)"
            )
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise self._refuse(f"model option {option} = {model[option]!r}")

    def _merged_texts(self, model: dict) -> list[str]:
        """What the merges make, in their order, in the visible characters of `byte_alphabet`."""
        texts = []
        for merge in model["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            texts.append(left + right)
        if model.get("ignore_merges"):
            # A whole word in the vocabulary is taken as it is. tiktoken always does so.
            alphabet = byte_alphabet()
            for text in model["vocab"]:
                if text not in self.added and all(char in alphabet for char in text):
                    texts.append(text)
        return texts

    def _refuse(self, what: str) -> UserError:
        return UserError(f"{self.source}/tokenizer.json: {what} is not supported")

    def encode(self, text: str, allow_special: bool = False, add_bos: bool = False) -> list[int]:
        """Token ids of a text.

        allow_special: False reads special tokens in the text as plain characters (a problem that
            spells `<|im_end|>` cannot end its turn); True reads them as the tokens, as transformers
            does.
        add_bos: True adds what the tokenizer's post-processor puts around a whole text (Llama 3's
            first token).
        """
        ids = self._encode(text, allow_special)
        return [*self.prefix, *ids, *self.suffix] if add_bos else ids

    def _encode(self, text: str, allow_special: bool, drop: str = "") -> list[int]:
        """`drop` is taken out of the plain texts between added tokens, after the cuts."""
        ids: list[int] = []
        raw_cut, normal_cut = self.cuts[allow_special]
        # A split gives text, token, text, token, ..., text: the odd parts are tokens.
        for i, part in enumerate(raw_cut.split(text)):
            if i % 2:
                ids.append(self.added[part])
                continue
            for form in self.normal_forms:
                part = unicodedata.normalize(form, part)
            for j, plain in enumerate(normal_cut.split(part)):
                if j % 2:
                    ids.append(self.added[plain])
                else:
                    ids += self._encode_plain(plain.replace(drop, "") if drop else plain)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        """Ids of a text without added tokens."""
        raw = text.encode("utf-8", errors="replace")  # half a surrogate pair becomes "?"
        if len(raw.translate(None, self.absent)) == len(raw):
            return [self.ids[rank] for rank in self.bpe.encode_ordinary(raw.decode())]
        # Some bytes are absent from the vocabulary. They leave a word after it has been cut out.
        ids = []
        for word in regex.findall(self.pattern, raw.decode()):
            known = word.encode().translate(None, self.absent)
            if known:
                ids += [self.ids[rank] for rank in self.bpe._encode_single_piece(known)]
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of some ids. Bytes that are not UTF-8, and unknown ids, become U+FFFD."""
        skipped = set()
        if skip_special:
            skipped = {self.added[text] for text in self.special}
        pieces = [self.pieces.get(token, b"\xff") for token in ids if token not in skipped]
        return b"".join(pieces).decode(errors="replace")

    def render(self, messages: list[dict], add_generation_prompt: bool = True, **variables) -> str:
        """The text of a conversation under the chat template.

        messages: {"role": ..., "content": ...} each. variables: what else a template may ask for.
        UserError if the template refuses.
        """
        variables = self.special_texts | variables
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
        """
        # The message's special tokens get a mark inside, so that they are not found as tokens in
        # the rendered text. `_encode` takes the marks out again.
        specials = any_of(self.special)
        quoted = []
        for message in messages:
            content = message.get("content")
            if isinstance(content, str):
                content = content.replace(QUOTE, "")  # a mark of the message's own
                content = specials.sub(lambda found: found[0][0] + QUOTE + found[0][1:], content)
            quoted.append(message | {"content": content})
        text = self.render(quoted, add_generation_prompt, **variables)
        return self._encode(text, allow_special=True, drop=QUOTE)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files, byte for byte as they were read, into an existing folder."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


# --- reading a folder -----------------------------------------------------------------------------


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a Hugging Face folder, or in a finished run's `model` folder.

    Its stop tokens are all that its files name. UserError for a folder without a tokenizer, or with
    one that is not whole or not understood.
    """
    path = Path(path)
    folders = [path / "model", path]
    folder = next((one for one in folders if (one / "tokenizer.json").is_file()), None)
    if folder is None:
        hint = ""
        if (path / "tokenizer.model").exists():
            hint = " (SentencePiece models are not supported)"
        raise UserError(f"{path} holds no tokenizer.json{hint}")

    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    eos_ids = []
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        if file.is_file():
            eos_ids += stop_ids(read_json(file), str(file))
    try:
        return Tokenizer(files, str(folder), eos_ids)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        # A part is missing, or of another kind.
        raise UserError(
            f"{folder}/tokenizer.json is not whole, or not byte-level BPE ({error!r})"
        ) from None


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


# --- the parts of tokenizer.json ------------------------------------------------------------------


def any_of(texts: Iterable[str]) -> re.Pattern:
    """A regex that finds, leftmost first, the longest of some texts; of no texts, nothing."""
    longest_first = sorted(texts, key=len, reverse=True)
    choices = "|".join(map(re.escape, longest_first))
    return re.compile(f"({choices or '(?!)'})")


@lru_cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's way to write bytes as visible characters: character -> byte.

    The bytes that print in Latin-1 stand for themselves, the rest are 256, 257, ...
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    for i, byte in enumerate(rest):
        alphabet[chr(256 + i)] = byte
    return alphabet


def read_pattern(pre_tokenizer: dict | None, source: str) -> str:
    """One regex that cuts a text as all pre-tokenizers, one after the other, would cut it."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    shapes = [step and step.get("type") for step in steps]
    refusal = UserError(
        f"{source}/tokenizer.json: pre-tokenizers {shapes} are not supported in this form"
    )
    if not shapes or shapes[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        raise refusal
    gpt2 = steps[-1].get("use_regex", True)
    if shapes == ["ByteLevel"]:
        return GPT2 if gpt2 else r"[\s\S]+"
    if shapes == ["Digits", "ByteLevel"] and gpt2:
        digits = r"\p{N}" if steps[0].get("individual_digits") else r"\p{N}+"
        return GPT2_AFTER_DIGITS % digits
    if shapes == ["Split", "ByteLevel"] and not gpt2:
        split = steps[0]
        pattern = split["pattern"].get("Regex") or re.escape(split["pattern"]["String"])
        kind = (split["behavior"], split["invert"])
        if kind == ("Removed", True):
            return pattern
        if kind == ("Isolated", False):
            # What lies between two matches is a word too.
            return rf"{pattern}|(?:(?!{pattern})[\s\S])+"
    raise refusal


def steps_of(part: dict | None, name: str) -> list[dict]:
    """A part of tokenizer.json as a list of steps: none, one, or the sequence in it."""
    if not part:
        return []
    return part.get(name, [part])


def read_normalizer(normalizer: dict | None, source: str) -> list[str]:
    """The normal forms that a text is brought into, in this order."""
    forms = [step["type"] for step in steps_of(normalizer, "normalizers")]
    for form in forms:
        if form not in NORMAL_FORMS:
            raise UserError(f"{source}/tokenizer.json: normalizer {form} is not supported")
    return forms


def read_post_processor(processor: dict | None, source: str) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a whole text."""
    prefix: list[int] = []
    suffix: list[int] = []
    for step in steps_of(processor, "processors"):
        if step["type"] == "ByteLevel":
            continue  # it only trims offsets, which nobody reads here
        if step["type"] != "TemplateProcessing":
            raise UserError(
                f"{source}/tokenizer.json: post-processor {step['type']} is not supported"
            )
        side = prefix
        for item in step["single"]:
            if "Sequence" in item:  # the text itself
                side = suffix
            else:
                side += step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
    return prefix, suffix


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
        template = by_name.get("default")
    return template or PLAIN_TEMPLATE


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks what an assistant wrote, for loss masks of transformers. Not here."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's protocol)

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache
def compile_template(source: str) -> jinja2.Template:
    """A template, with the names that transformers gives to it.

    Templates are downloaded code: they run in a sandbox.
    """

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

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
DEMO_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def demo_tokenizer(words: list[str]) -> Tokenizer:
    """A small tokenizer: 256 bytes, the numbers 10 to 99, the given words, and special tokens.

    These are <|user|>, <|assistant|> and <|end|>. Text is cut at the given words (the longest that
    fits, anywhere) and at digits, two by two; all else is bytes.
    """
    char_of = {byte: char for char, byte in byte_alphabet().items()}

    def spell(text: str) -> str:
        return "".join(char_of[byte] for byte in text.encode())

    texts = [char_of[byte] for byte in range(256)]
    texts += [str(number) for number in range(10, 100)]
    longer = [word for word in words if len(word.encode()) > 1 and not word.isdigit()]
    texts += dict.fromkeys(map(spell, longer))  # each once
    vocab = {text: number for number, text in enumerate(texts)}
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    specials = []
    for text in ("<|user|>", "<|assistant|>", "<|end|>"):
        specials.append({"id": len(vocab) + len(specials), "content": text, **flags})
    raw = {
        "version": "1.0",
        "added_tokens": specials,
        "pre_tokenizer": demo_pre_tokenizer(words),
        "decoder": DEMO_BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": all_merges(vocab),
        },
    }
    files = {
        "tokenizer.json": json.dumps(raw, ensure_ascii=False, indent=1).encode(),
        "tokenizer_config.json": json.dumps(DEMO_SETTINGS, indent=1).encode(),
        "chat_template.jinja": DEMO_TEMPLATE.encode(),
    }
    return Tokenizer(files, "demo")


def demo_pre_tokenizer(words: list[str]) -> dict:
    """Cuts a text at the longest word that fits, at two digits, or at any one character."""
    longest_first = sorted(words, key=len, reverse=True)
    escaped = [re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", word) for word in longest_first]
    pattern = "|".join([*escaped, "[0-9]{1,2}", r"[\s\S]"])
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [split, DEMO_BYTE_LEVEL]}


def all_merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """All ways to make an entry of two others: with them, every implementation merges alike."""
    merges = []
    for text in vocab:
        for cut in range(1, len(text)):
            if text[:cut] in vocab and text[cut:] in vocab:
                merges.append((text[:cut], text[cut:]))
    return merges
