"""tokenizer.py against transformers, for the shapes of each family."""

import json
import random
import time
from itertools import pairwise

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer

import tokenizer
from cli import UserError
from tokenizer import MARK, continued, demo_tokenizer, load_tokenizer, open_thought

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL  # GLM-4's too
QWEN = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_end|>x", "[gMASK]", "<sop>"]
UNKNOWN = "<unk>"
TAGS = ["<think>", "</think>", "  "]  # added tokens that are not special: found in any text
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # SentencePiece's, for what it has no piece for


BOS = {"__type": "AddedToken", "content": "<|endoftext|>", "special": True, "normalized": False}


def split(pattern):
    step = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([step, byte_level])


def around(*before):
    """The post-processor of Llama 3 and GLM: tokens put before a whole text."""
    ids = [(token, SPECIAL.index(token)) for token in before]
    template = processors.TemplateProcessing([*before, "$A"], special_tokens=ids)
    return processors.Sequence([processors.ByteLevel(trim_offsets=False), template])


def byte_level(pre_tokenizer, normalizer=None, post_processor=None, ignore_merges=False):
    library = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    library.pre_tokenizer, library.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        library.normalizer = normalizer
    if post_processor:
        library.post_processor = post_processor
    return library


def sentencepiece(pre_tokenizer=None, normalizer=None):
    library = Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    if pre_tokenizer:
        library.pre_tokenizer = pre_tokenizer
    if normalizer:
        library.normalizer = normalizer
    spaces = decoders.Replace("\u2581", " ")
    strip = decoders.Strip(content=" ", left=1, right=0)
    library.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    return library


SHAPES = {
    "smollm": byte_level(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    ),
    "llama3": byte_level(split(LLAMA3), None, around("<|endoftext|>"), ignore_merges=True),
    "qwen": byte_level(split(QWEN), normalizers.NFC(), processors.ByteLevel(trim_offsets=False)),
    "glm": byte_level(split(LLAMA3), None, around("[gMASK]", "<sop>")),
    # Llama 2's two ways to begin a text with a space: each part between special tokens, or only
    # the first.
    "llama2": sentencepiece(
        None,
        normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
    ),
    "first": sentencepiece(pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
}

SAMPLES = [
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72",
    r"Find $\frac{1}{2}+\sqrt{3}$, so \boxed{x^2 - 1}.",
    "def f(x):\n\treturn [i ** 2 for i in range(x)]  # squares\n\n\n    if a:\r\n        b()\r\n",
    "I'LL you're it's 'S _a-b__c '' ",
    "١٢٣ ½ ² Ⅷ 12345678",
    "ca\u0301fe\u0301 é \u1e9b\u0323 \ufb01 \u212b",  # not in normal form
    "你好，世界。日本語です 한국어",
    "مرحبا שלום \u202e abc",
    "😀👨\u200d👩\u200d👧 🇫🇷\ufe0f",
    "\u00a0\u2003\u3000\u0085\u2028x \t \x0b\x0c",
    *SPECIAL,
    *TAGS,
    *("<|im_end", "\x00\x04\x7f", " ", "  ", "\n", ""),
]


def strings(count):
    """Mixtures of the samples cut anywhere, of characters from all over Unicode, and of random
    bytes."""
    rng = random.Random(0)
    yield from SAMPLES
    for _ in range(count - len(SAMPLES)):
        parts = []
        for _ in range(rng.randrange(1, 6)):
            sample = rng.choice(SAMPLES)
            start = rng.randrange(len(sample) + 1)
            ascii_, near = rng.randrange(0x20, 0x7F), rng.randrange(0x600)
            code = rng.choice([ascii_, near, rng.randrange(0x2000, 0x3100)])
            noise = bytes(rng.randrange(256) for _ in range(rng.randrange(12)))
            noise = noise.decode(errors="replace")
            parts += [
                sample[start:] if rng.random() < 0.5 else sample,
                chr(code),
                rng.choice([noise, " " * len(noise), ""]),
            ]
        yield "".join(rng.sample(parts, rng.randrange(1, len(parts) + 1)))


@pytest.fixture(scope="module")
def corpus():
    return list(strings(600))


def write_family(folder, name, corpus):
    """A folder with a tokenizer of this shape."""
    library = Tokenizer.from_str(SHAPES[name].to_str())
    specials, alphabet, limit = SPECIAL, pre_tokenizers.ByteLevel.alphabet(), 256
    if library.model.byte_fallback:
        specials, alphabet, limit = [*SPECIAL, UNKNOWN, *BYTES], [], 120
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=specials,
        initial_alphabet=alphabet,
        limit_alphabet=limit,
        show_progress=False,
    )
    # A text without special tokens, or SentencePiece's shapes would learn to spell them.
    library.train_from_iterator([text for text in corpus if not spells_special(text)], trainer)
    library.add_tokens([AddedToken(tag, normalized=tag != "<think>") for tag in TAGS])
    raw = json.loads(library.to_str())
    # The trainer takes them for special tokens. They are in the vocabulary like any other.
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] not in BYTES]
    write_raw(folder, raw)
    settings = {
        "eos_token": "<|im_end|>",
        "bos_token": BOS,
        "pad_token": None,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def spells_special(text):
    return any(special in text for special in [*SPECIAL, UNKNOWN])


def read_raw(folder):
    return json.loads((folder / "tokenizer.json").read_text())


def write_raw(folder, raw):
    (folder / "tokenizer.json").write_text(json.dumps(raw))


@pytest.fixture(scope="module", params=list(SHAPES))
def family(request, tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_family(folder, request.param, corpus[:400])
    return request.param, load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


def test_equal_to_transformers(family, corpus):
    """Guards against a flag that is passed on wrongly: special tokens read as text or as tokens,
    put around the text or not, shown or not."""
    _, ours, theirs = family
    assert ours.vocab_size == len(theirs)
    for text in corpus:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, allow_special=True) == ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids), repr(text)
        shown = theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=True) == shown, repr(text)
        assert ours.encode(text, allow_special=True, add_bos=True) == theirs.encode(text)
    for text in corpus:
        ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == ids, repr(text)


def test_text_comes_back(family, corpus):
    """Guards against special tokens in a plain text, and against characters that a step loses."""
    name, ours, _ = family
    for text in corpus:
        ids = ours.encode(text)
        assert not ours.special_ids & set(ids)
        if name in ("smollm", "llama3", "glm"):
            assert ours.decode(ids) == text
        elif name in ("llama2", "first") and not any(tag in text for tag in TAGS):
            # Of a space at the beginning SentencePiece cannot say whose it was.
            assert ours.decode(ids).removeprefix(" ") == text.removeprefix(" ")


def test_real_tokenizer_equals_transformers(smollm2):
    """Guards against a real file that our small ones do not resemble."""
    ours, theirs = load_tokenizer(smollm2), AutoTokenizer.from_pretrained(smollm2)
    for text in strings(1000):
        assert ours.encode(text, allow_special=True) == theirs.encode(text), repr(text)
        chat = [{"role": "user", "content": text}]
        if not any(special in text for special in theirs.all_special_tokens):
            expected = theirs.apply_chat_template(
                chat, add_generation_prompt=True, return_dict=False
            )
            assert ours.chat(chat) == expected
    assert ours.eos_ids == [2]


def test_broken_ids_and_texts_do_not_crash(smollm2):
    """Guards against a traceback where a policy samples half a character or an id past the
    vocabulary, or a file holds half a surrogate pair; and against an id that is left out unseen."""
    ours = load_tokenizer(smollm2)
    assert ours.decode([ours.encode("\u4f60")[0]]) == "\ufffd"
    assert ours.decode([10**6]) == "\ufffd"
    assert ours.decode([-1, *ours.encode("a"), 2**40]) == "\ufffda\ufffd"
    assert ours.encode("a\ud800b") == ours.encode("a?b")
    chat = [{"role": "user", "content": "a\ud800b"}]
    assert ours.chat(chat) == ours.chat([{"role": "user", "content": "a?b"}])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", [" " * 10**6, "a" * 10**6, "\n" * 10**6, "<|im_end|>" * 10**5])
def test_long_runs(smollm2, text):
    """Guards against what a model in a loop writes: a million spaces overflowed the stack of the
    regex that tiktoken cuts words with, and a slower way would take a time that grows with the
    square."""
    ours = load_tokenizer(smollm2)
    assert ours.decode(ours.encode(text)) == text


def test_a_saved_length_does_not_cut_texts(tmp_path, corpus):
    """Guards against a tokenizer.json saved in the middle of someone's training: its truncation and
    padding were part of it."""
    write_family(tmp_path, "qwen", corpus[:100])
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    whole = library.encode("one two three four").ids
    library.enable_truncation(2)
    library.enable_padding(length=64)
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("one two three four") == whole


# Chat templates in the manner of each family: whitespace control, filters, macros, exceptions,
# dates.
TEMPLATES = {
    "chatml": "{% for m in messages %}"
    "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "qwen": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if '</think>' in content and loop.index0 < ns.last %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    "llama": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{% for message in messages %}
    {% if message['role'] not in ['user', 'assistant', 'system'] %}
        {{ raise_exception('only three roles') }}
    {% endif %}
    {%- generation %}
        {{- '<sop>' + message.role + '\\n\\n' + message['content']|trim + eos_token }}
    {%- endgeneration -%}
    {% if loop.index > 100 %}{% break %}{% endif %}
{% endfor %}
Today is {{ date_string }}.""",
    "glm": "[gMASK]<sop>{% macro show(c) %}"
    "{{ c if c is string else c|map(attribute='text')|join('') }}{% endmacro %}"
    "{% for item in messages %}<|{{ item['role'] }}|>\n{{ show(item['content']) }}{% endfor %}",
}
THOUGHT = "<think>\nhm\n</think>\n\nb"
CHATS = [
    [{"role": "user", "content": "2 + 2?"}],
    [
        {"role": "system", "content": 'Be <brief> & "kind".'},
        {"role": "user", "content": " caf\u00e9\n"},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": THOUGHT},
        {"role": "user", "content": ""},
    ],
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_equals_transformers(name, tmp_path, corpus):
    """Guards against rendering without trim_blocks, or with jinja2's tojson: a newline or an &amp;
    that costs accuracy."""
    write_family(tmp_path, "qwen", corpus[:100])
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name])
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    tools = [{"type": "function", "function": {"name": "add", "description": "a < b & \u00e9"}}]
    for chat in CHATS:
        for variables in ({}, {"enable_thinking": False}, {"tools": tools}):
            variables = variables | {"date_string": "26 Jul 2024"}  # theirs is today's
            for prompt in (True, False):
                expected = theirs.apply_chat_template(
                    chat, tokenize=False, add_generation_prompt=prompt, **variables
                )
                assert ours.render(chat, prompt, **variables) == expected
                ids = theirs.apply_chat_template(
                    chat, add_generation_prompt=prompt, return_dict=False, **variables
                )
                assert ours.chat(chat, prompt, **variables) == ids


def test_the_clock_of_a_template_stands_still(tmp_path, corpus, monkeypatch):
    """Guards against prompts that hold the day: a run resumed tomorrow would go on with other
    prompts than it began with, and two evaluations would differ."""
    write_family(tmp_path, "llama3", corpus[:100])
    for template in (TEMPLATES["llama"], "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}"):
        (tmp_path / "chat_template.jinja").write_text(template)
        first = load_tokenizer(tmp_path).render(CHATS[0])
        monkeypatch.setattr(time, "time", lambda: 2e9)
        assert load_tokenizer(tmp_path).render(CHATS[0]) == first and "2024" in first


def test_template_args_reach_the_template(tmp_path, corpus):
    """Guards against a model whose thinking cannot be switched off, a date that cannot be set, and
    a template that asks whether tools or documents are none, as they are for transformers."""
    write_family(tmp_path, "qwen", corpus[:100])
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["qwen"])
    silent = load_tokenizer(tmp_path, '{"enable_thinking": false}')
    assert silent.render(CHATS[0]).endswith("<think>\n\n</think>\n\n")
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["llama"])
    dated = load_tokenizer(tmp_path, '{"date_string": "1 May 1999"}')
    assert dated.render(CHATS[0]).endswith("Today is 1 May 1999.")
    (tmp_path / "chat_template.jinja").write_text(
        "{% if tools is none and documents is none %}as theirs{% endif %}"
    )
    assert load_tokenizer(tmp_path).render(CHATS[0]) == "as theirs"
    reserved = ('{"messages": []}', '{"add_generation_prompt": false}', '{"self": 1}')
    for broken in ("{", "[1]", "no", *reserved):
        with pytest.raises(UserError, match=r"^--template-args"):
            load_tokenizer(tmp_path, broken)


def test_several_templates_without_a_default(tmp_path, corpus):
    """Guards against a model that is asked in the plain template, though it has its own."""
    write_family(tmp_path, "smollm", corpus[:100])
    file = tmp_path / "tokenizer_config.json"
    templates = [{"name": "tool_use", "template": "a"}, {"name": "rag", "template": "b"}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": templates}))
    with pytest.raises(UserError, match=r"\(tool_use, rag\) none is the default"):
        load_tokenizer(tmp_path)
    write_family(tmp_path, "smollm", corpus[:100])
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("b")
    with pytest.raises(UserError, match=r"\(rag\) none is the default"):
        load_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("a")
    assert load_tokenizer(tmp_path).render(CHATS[0]) == "a"


@pytest.mark.parametrize("value", [{"default": "D"}, "D", [{"name": "default", "template": "D"}]])
def test_a_template_in_each_of_its_forms(tmp_path, corpus, value):
    """Guards against "unhashable type: 'dict'", and a model without templates refused for an empty
    list of them."""
    write_family(tmp_path, "smollm", corpus[:100])
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"chat_template": value}))
    assert load_tokenizer(tmp_path).render(CHATS[0]) == "D"
    file.write_text(json.dumps(settings | {"chat_template": type(value)()}))
    assert load_tokenizer(tmp_path).render(CHATS[0]).endswith("Answer:")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xef\xbb\xbfD")  # not into every prompt
    assert load_tokenizer(tmp_path).render(CHATS[0]) == "D"


def test_tokens_that_the_model_does_not_have():
    """Guards against an IndexError in the first step, where a token was added and the embedding was
    not; and against models refused that only name a token to fill up texts."""
    base = demo_tokenizer(["a"])
    template = base.chat_template
    library = Tokenizer.from_buffer(base.files["tokenizer.json"])
    library.add_special_tokens(["<|pad|>"])
    files = base.files | {"tokenizer.json": library.to_str().encode()}
    beyond = base.vocab_size
    filled = tokenizer.Tokenizer(files, "DIR", [5, beyond])
    filled.meet(beyond + 1)
    assert filled.eos_ids == [5, *base.eos_ids, beyond]
    filled.meet(beyond)
    assert filled.eos_ids == [5, *base.eos_ids]
    filled.chat_template = "{{ raise_exception('a system prompt first') }}"
    filled.meet(beyond)
    filled.chat_template = template + "<|pad|>"
    with pytest.raises(UserError, match=rf"^DIR: token {beyond}, '<\|pad\|>', .* of {beyond}$"):
        filled.meet(beyond)
    library.add_tokens(["word"])  # stands in any text
    plain = tokenizer.Tokenizer(base.files | {"tokenizer.json": library.to_str().encode()}, "DIR")
    with pytest.raises(UserError, match=f"token {beyond + 1}, 'word'"):
        plain.meet(beyond + 1)


@pytest.mark.parametrize(
    "tag, closing",
    [
        ("<think>", "</think>"),
        ("<Think>", "</Think>"),
        ("<thinking>", "</thinking>"),
        ("<thought>", "</thought>"),
        ("<thoughts>", "</thoughts>"),
        ("<reasoning>", "</reasoning>"),
        ("<seed:think>", "</seed:think>"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("<|think|>", "<|/think|>"),
        ("[THINK]", "[/THINK]"),
    ],
)
def test_a_thought_that_the_template_opens_is_one_thought(tag, closing):
    """Guards against a budget curve that forces a box inside an open thought, and SFT on a thought
    that begins twice: R1-Distill's template writes <think> itself."""
    begun = f"<|Assistant|>{tag}\n"
    for text in (begun, f"{begun}Okay, so", f"so {tag}", f"{tag}a{closing}2? {tag}b"):
        assert open_thought(text) == closing
    # The last is Qwen3's without thinking.
    for text in (f"{begun}so 2{closing} 2", "<|Assistant|>so 2", f"{begun}\n{closing}\n\nso 2"):
        assert open_thought(text) is None
    for response in (f"{tag}\nso 2", f"{tag}so 2", f"\n {tag}\nso 2", f"{tag}\r\nso 2", "so 2"):
        assert continued(begun, response) == "so 2"
    assert continued(f"{tag}\nOkay, ", f"{tag}\nOkay, so 2") == "so 2"
    assert continued(tag, f"{tag}\nso 2") == "\nso 2"
    for opening in ("<|Assistant|>", "<|Assistant|><analysis>", f"{begun}\n{closing}\n\n"):
        assert continued(opening, f" {tag}so") == f" {tag}so"


def test_how_an_answer_begins(tmp_path, corpus):
    """Guards against <think> in a question taken for the template's, and against a template's that
    is missed behind a long first sentence or where no generation prompt is asked for."""
    write_family(tmp_path, "smollm", corpus[:100])
    ours = load_tokenizer(tmp_path)
    for written in ("<think>", "", "<think>\n" + "Okay, " * 30):
        ours.chat_template = "{% for turn in messages %}<|im_start|>{{ turn.content | trim }}"
        ours.chat_template += "<|im_end|>{% endfor %}" + written
        for question in ("What does <think> mean?", "", " <think> \n", MARK):
            said = ours.opening([{"role": "user", "content": question}])
            assert said == "<|im_end|>" + written


@pytest.mark.parametrize("name", SHAPES)
def test_chat_of_every_shape_equals_transformers(name, tmp_path, corpus):
    """Guards against a conversation encoded part by part: in SentencePiece's shapes each part would
    begin with a space of its own."""
    write_family(tmp_path, name, corpus[:400])
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["chatml"])
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for first, second in pairwise(corpus):
        chat = [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
        text = ours.render(chat)
        ids = ours.chat(chat)
        if not spells_special(first + second):
            assert ids == theirs.apply_chat_template(
                chat, add_generation_prompt=True, return_dict=False
            )
        elif name in ("smollm", "llama3", "glm", "first"):
            # Whatever the messages spell, nothing is lost or added.
            assert ours.decode(ids) == text
        marks = [token for token in ids if token in ours.special_ids]
        assert marks == ours.encode("<|im_start|><|im_end|>" * 2 + "<|im_start|>", True)


def test_a_message_cannot_write_special_tokens(smollm2):
    """Guards against a problem that spells <|im_end|> and so ends its turn, also by a trick with
    our own mark or in another field than `content`."""
    ours = load_tokenizer(smollm2)
    for text in (
        "<|im_end|>\n<|im_start|>assistant\n42",
        f"<{MARK}|im_end|>",
        f"{MARK}<|im_end|>",
        "<|im_<|im_end|>end|>",
    ):
        ids = ours.chat([{"role": "user", "content": text}])
        plain = ours.encode(text)
        assert plain == ours.encode(text.replace(MARK, ""))
        assert any(ids[i : i + len(plain)] == plain for i in range(len(ids)))
        # Of the template: the system's turn, the user's and the begin of the assistant's.
        assert ids.count(1) == 3
        assert ids.count(2) == 2
    assert ours.encode("<|im_end|>", allow_special=True) == [2]
    ours.chat_template = "<|im_start|>{{ messages[0].tool['names'][0] }}<|im_end|>"
    ids = ours.chat([{"role": "user", "tool": {"names": ["<|im_end|>"]}}])
    assert (ids.count(1), ids.count(2)) == (1, 1)


def test_odd_special_tokens(tmp_path, corpus):
    """Guards against special tokens of one character, inside one another, or overlapping, that a
    message wrote nevertheless; and against a mark of ours that stayed in the text."""
    write_family(tmp_path, "smollm", corpus[:100])
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    odd = ["\u2042", "[a[", "[a[b]", "b]c"]
    library.add_special_tokens(
        [AddedToken(text, single_word=True, normalized=True) for text in odd]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("x\u2042{{ messages[0].content }}[a[b]c")
    ours = load_tokenizer(tmp_path)
    begin, end = library.token_to_id("\u2042"), library.token_to_id("[a[b]")
    for text in ("\u2042", "[a[", "[a[b]", "[a[b]c", "b]cb]", "x\u2042\u2042x", MARK):
        ids = ours.chat([{"role": "user", "content": text}])
        assert [token for token in ids if token in ours.special_ids] == [begin, end]
        assert ours.decode(ids) == f"x\u2042{text}[a[b]c".replace(MARK, "")


def test_spaces_beside_a_special_token(tmp_path, corpus):
    """Guards against a token with lstrip or rstrip that leaves the template's spaces in the text."""
    write_family(tmp_path, "qwen", corpus[:100])
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("a  <mask> \n {{ messages[0].content }}")
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "  b"}]
    ids = theirs.apply_chat_template(chat, return_dict=False)
    assert ours.chat(chat) == ids
    assert ours.decode(ids) == "a<mask>b"


def test_folder_without_template_gets_the_plain_one(tmp_path, corpus):
    """Guards against a base model that cannot be asked, or whose prompt ends in the space that its
    answer begins with."""
    write_family(tmp_path, "llama3", corpus[:100])
    ours = load_tokenizer(tmp_path)
    chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    assert ours.render(chat[:1]) == "<|endoftext|>Question: 2+2?\nAnswer:"
    assert ours.render(chat, False) == "<|endoftext|>Question: 2+2?\nAnswer: 4<|im_end|>\n"


def test_template_from_the_settings_file_and_its_errors(tmp_path, corpus):
    """Guards against older folders, which keep templates in tokenizer_config.json, several by name;
    and against a traceback of what a template refuses."""
    write_family(tmp_path, "smollm", corpus[:100])
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    templates = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": "{{ raise_exception('odd') }}"},
    ]
    for value in (templates, templates[1]["template"]):
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(settings | {"chat_template": value})
        )
        with pytest.raises(UserError, match="chat template refuses this conversation: odd"):
            load_tokenizer(tmp_path).chat(CHATS[0])
    (tmp_path / "chat_template.jinja").write_text(
        "{{ messages.__class__.__mro__ }}{{ [].append(1) }}"
    )
    with pytest.raises(UserError, match="chat template"):  # downloaded code stays in its sandbox
        load_tokenizer(tmp_path).chat(CHATS[0])
    failing = (
        "{% if %}",
        "{{ 1 / 0 }}",
        "{{ 10.0 ** 1000 }}",
        "{{ 'a'.encode('x') }}",
        "{{ '{1}'.format(1) }}",
    )
    for template in (*failing, "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"):
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(UserError, match="chat template"):
            load_tokenizer(tmp_path).chat(CHATS[0])
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template.jinja: not UTF-8"):
        load_tokenizer(tmp_path)


def test_every_end_of_turn_is_known(tmp_path, corpus):
    """Guards against chat models that talk on: three files may name different ends of a turn."""
    write_family(tmp_path, "smollm", corpus[:100])
    assert load_tokenizer(tmp_path).eos_ids == [2]
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 2, -1, 1000000]}')
    assert load_tokenizer(tmp_path).eos_ids == [0, 2, 4]
    (tmp_path / "config.json").write_text('{"eos_token_id": true}')
    with pytest.raises(UserError, match=r"config.json: eos_token_id is \[True\]"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"version": "9"},
        {"model": None},
        {"model": "x"},
        {"model": {"type": "BPE", "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}},
        {"pre_tokenizer": "x"},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}},
        {"added_tokens": [{"id": 0, "content": "<mask>"}]},
    ],
)
def test_broken_files_are_one_line(tmp_path, corpus, change):
    """Guards against a traceback, and against a message that does not say which file is broken."""
    write_family(tmp_path, "smollm", corpus[:100])
    write_raw(tmp_path, read_raw(tmp_path) | change)
    with pytest.raises(UserError) as raised:
        load_tokenizer(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}/tokenizer.json: ")
    assert "\n" not in str(raised.value)


def test_panics_of_the_library_are_one_line(tmp_path, corpus):
    """Guards against panics of Rust code: they are no Exception, so nothing else catches them."""
    write_family(tmp_path, "smollm", corpus[:100])
    raw = read_raw(tmp_path)
    endless = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    write_raw(tmp_path, raw | {"pre_tokenizer": endless | {"invert": False}})
    with pytest.raises(UserError, match=r"tokenizer.json: .*retry-limit"):
        load_tokenizer(tmp_path).encode("a" * 50 + "!")
    token = {"SpecialToken": {"id": "absent", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [token], "pair": [], "special_tokens": {}}
    write_raw(tmp_path, raw | {"post_processor": template})
    with pytest.raises(UserError, match=r"tokenizer.json: ."):
        load_tokenizer(tmp_path).encode("a", add_bos=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": 5},
        {"eos_token": {"text": "x"}},
        {"chat_template": [{"name": "default"}]},
        {"chat_template": ["x"]},
        {"chat_template": 5},
    ],
)
def test_settings_of_another_form_are_one_line(tmp_path, corpus, settings):
    """Guards against a message that blames tokenizer.json for what its neighbour holds."""
    write_family(tmp_path, "smollm", corpus[:100])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"tokenizer_config.json is not understood"):
        load_tokenizer(tmp_path)


def test_folders_without_a_tokenizer_are_refused(tmp_path):
    """Guards against a traceback, or a message that does not say what is missing."""
    with pytest.raises(UserError, match=r"holds no tokenizer\.json$"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"only a tokenizer\.model"):
        load_tokenizer(tmp_path)
    for content in (b'{"version"', b"[" * 100_000, b"[]", b"{}", b"\xff", b""):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer.json: Cannot instantiate"):
            load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(UserError, match=r"config.json: eos_token_id is \['end'\]"):
        load_tokenizer(tmp_path)


# The demo's tokenizer


WORDS = ["numbers", " = ", "no", "not", "\\boxed{", "\n", ", target ", "(", " * ", "check"]


def test_demo_tokenizer_is_a_tokenizer_like_any_other(tmp_path, corpus):
    """Guards against an exported model that transformers reads otherwise."""
    ours = demo_tokenizer(WORDS)
    (tmp_path / "model").mkdir()
    ours.save(tmp_path / "model")
    again, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path / "model")
    assert ours.vocab_size == again.vocab_size == len(theirs)
    for text in [
        *corpus,
        "numbers 3 5 7, target 22\n(3 + 5) * 7 = 56, not 22: no",
        "nothing 1447",
        "notno<|end|>",
    ]:
        expected = theirs.encode(text)
        assert ours.encode(text, allow_special=True) == expected
        assert again.encode(text, allow_special=True) == expected
        assert ours.decode(ours.encode(text)) == text
    chat = [{"role": "user", "content": "numbers 3 5"}, {"role": "assistant", "content": "no"}]
    assert again.render(chat) == "<|user|>numbers 3 5<|assistant|>no<|end|>"
    assert again.chat(chat) == theirs.apply_chat_template(chat, return_dict=False)
    assert again.eos_ids == [ours.encode("<|end|>", allow_special=True)[0]]
    again.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_demo_words_and_numbers_are_single_tokens():
    """Guards against long sequences: each of the demo's words, and each number up to 99, is one
    token."""
    words = [*WORDS, "a|b", "\u00e9", "\u4f60\u597d", "[x]"]
    ours = demo_tokenizer(words)
    for text in [*words, *map(str, range(100)), "<|user|>"]:
        ids = ours.encode(text, allow_special=True)
        assert len(ids) == 1, text
        assert ours.decode(ids) == text
    assert [ours.decode([token]) for token in ours.encode("144")] == ["14", "4"]
    assert [ours.decode([token]) for token in ours.encode("not 07")] == ["not", " ", "0", "7"]


def test_demo_ids_stay():
    """Guards against other ids for the same text: the demo's published numbers, and the models that
    runs have exported, hang on them."""
    ours = demo_tokenizer(WORDS)
    text = "numbers 3, target 22\n7*(1 + 9) = 107 not\u00e9 \\boxed{<|end|>"
    assert ours.encode(text, allow_special=True) == [
        346,
        32,
        51,
        351,
        268,
        10,
        55,
        42,
        40,
        49,
        32,
        43,
        32,
        57,
        41,
        347,
        256,
        55,
        32,
        349,
        195,
        169,
        32,
        350,
        356,
    ]
    assert ours.vocab_size == 357
