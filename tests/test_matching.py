import html
import itertools
import json
import random
import re
import sys
import textwrap
import threading
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gist_rag.errors import BadInput
from gist_rag.matching import PassageMatcher
from gist_rag.store import GistStore, pack
from gist_rag.types import GistState, Passage, content_key, normalise
from gist_rag.windows import SPACELESS, WINDOW, MemoryIndex, find_heads, window_numbers

PASSAGES = [
    'The Loch Ness monster was first described as a "monster" on 2 May 1933.\n\nAlex Campbell\'s '
    "report in the Inverness Courier spoke of an enormous animal rolling in the water.",
    "Crème brûlée — also known as burnt cream 🍮 — is a dessert consisting of a rich custard.\n"
    "\tIt is topped with a layer of hardened caramelised sugar & served <slightly> chilled.",
    "C:\\Windows\\System32 holds the system's 64-bit libraries, whereas 32-bit ones are kept "
    "elsewhere.\u00a0Its name has not changed since Windows NT 3.1 came out in 1993.",
]
SHORT = "The capital of France is Paris."
LONG = "Photosynthesis converts light energy into chemical energy that is stored in sugars"
CJK = (
    "東京は日本の首都であり、世界でも有数の大都市である。関東平野の南部に位置し、"
    "人口はおよそ千四百万人で、政治と経済の中心となっている。"
)

SCRIPTS = {
    "japanese": CJK,
    "chinese": (
        "北京是中华人民共和国的首都，位于华北平原的北部边缘。\n全市常住人口超过两千一百万，是全国的政治中心、文化中心“与”国际交"
        "往中心；面积一万六千四百一十平方千米。"
    ),
    "korean": (
        "서울은 대한민국의 수도이자 최대 도시이며, 한강을 끼고 있다."
        '\n인구는 약 950만 명으로 "세계에서" 손꼽히는 대도시권을 이루고 있다고 알려져 있다.'
    ),
    "thai": (
        "กรุงเทพมหานครเป็นเมืองหลวงและนครที่มีประชากรมากที่สุดของประเ"
        "ทศไทย\nเป็นศูนย์กลางการปกครอง การศึกษา การคมนาคมขนส่ง 'การเงิ"
        "น' และการสื่อสาร"
    ),
    "arabic": (
        "القاهرة هي عاصمة جمهورية مصر العربية وأكبر وأهم مدنها على ال"
        'إطلاق،\nوتُعدّ أكبر مدينة عربية من حيث "تعداد السكان" والمساح'
        "ة (453 كم²)."
    ),
    "hindi": (
        "नई दिल्ली भारत की राजधानी है। यह भारत सरकार का केंद्र है\nऔर "
        "यहाँ 'संसद भवन', राष्ट्रपति भवन तथा सर्वोच्च न्यायालय स्थित "
        "हैं।"
    ),
    "hebrew": (
        "יְרוּשָׁלַיִם היא בירת מדינת ישראל והעיר הגדולה ביותר בה,\nומ"
        'תגוררים בה כמיליון תושבים "נכון לשנת 2023" לפי הלמ״ס.'
    ),
    "russian": (
        "Москва — столица России, город федерального значения.\nНаселе"
        "ние: 13 миллионов «человек» (2023), это крупнейший город Евр"
        "опы."
    ),
    "mixed": (
        "SQLite 3.40 版では、`PRAGMA journal_mode=WAL` を使うと 読み取りと書き込みを並行し"
        'て実行できる。\nDefault is "DELETE" — 詳細は公式文書を参照 👩‍💻 のこと。'
    ),
}
"""One passage in each, with the quotes, breaks and joined letters that it is written with."""


class InMemory:
    """Passages in a ``MemoryIndex``."""

    def __init__(self, store):
        self.index = MemoryIndex()

    def add(self, *passages):
        for passage in passages:
            self.index.add(passage)

    def discard(self, passage):
        self.index.discard(content_key(passage))


class InStore:
    """Passages in a space of their own of a store, beside the passages of all other tests."""

    numbers = itertools.count()

    def __init__(self, store):
        self.store, self.space = store, f"space {next(self.numbers)}"
        store.add_space(self.space, {})
        self.index = store.index(self.space)

    def add(self, *passages):
        self.store.put_many(self.space, [(Passage(p), GIST) for p in passages])

    def discard(self, passage):
        self.store.delete(content_key(passage), self.space)


_slot = torch.zeros(1, 1, 1, 8)
GIST = pack(GistState.uniform(_slot, _slot, torch.zeros(1), span=1, num_tokens=1), "bf16")
HOMES = {"memory": InMemory, "store": InStore}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with GistStore.open(tmp_path_factory.mktemp("store")) as store:
        yield store


@pytest.fixture(params=HOMES)
def home(request, store):
    """An empty home of each kind."""
    return HOMES[request.param](store)


@pytest.fixture
def matcher_of(home):
    def make(*passages):
        home.add(*passages)
        return PassageMatcher(home.index)

    return make


def found(matcher, text):
    return [match.content for match in matcher.find(text)]


def spans(matcher, text):
    return [text[match.start : match.end] for match in matcher.find(text)]


# How chains write passages into prompts.

KEPT = {
    "identical": lambda p: p,
    "newlines to spaces": lambda p: p.replace("\n", " "),
    "collapsed and stripped": lambda p: " ".join(p.split()),
    "crlf": lambda p: p.replace("\n", "\r\n"),
    "xml tags": lambda p: f"<document><content>{p}</content></document>",
    "numbered": lambda p: f"[1] {p}",
    "quoted": lambda p: f'"{p}"',
    "typographic quotes": lambda p: f"„{p}“",
    "emphasis": lambda p: f"_{p}_",
    "indented": lambda p: textwrap.indent(p, "    "),
    "filled": lambda p: textwrap.fill(p, 60, break_long_words=False, break_on_hyphens=False),
    "json": json.dumps,
    "json, not ascii": lambda p: json.dumps(p, ensure_ascii=False),
    "json with slashes": lambda p: json.dumps(p).replace("/", "\\/"),
    "json list": lambda p: json.dumps([{"text": p, "score": 0.5}]),
    "repr": repr,
    "ascii": ascii,
    "str of a list": lambda p: str([p]),
}
CHANGED = {
    "truncated": lambda p: p[:120],
    "lower case": str.lower,
    "html escaped": html.escape,
    "markdown quote": lambda p: textwrap.indent(textwrap.fill(p, 60), "> "),
    "one character edited": lambda p: p.replace("3", "4", 1) if "3" in p else p.replace("z", "s"),
    "one character missing": lambda p: p[:70] + p[71:],
}


@pytest.mark.parametrize("write", KEPT.values(), ids=KEPT)
def test_passages_are_found_however_the_chain_writes_them(write, matcher_of):
    prompt = "Context:\n" + "\n\n".join(map(write, PASSAGES)) + "\nQuestion: who reported it?"
    assert found(matcher_of(*PASSAGES), prompt) == [content_key(p) for p in PASSAGES]


@pytest.mark.parametrize("write", KEPT.values(), ids=KEPT)
def test_passages_in_every_script_are_found_however_the_chain_writes_them(write, matcher_of):
    prompt = "Context:\n" + "\n\n".join(map(write, SCRIPTS.values())) + "\nQuestion: 誰?"
    assert found(matcher_of(*SCRIPTS.values()), prompt) == list(map(content_key, SCRIPTS.values()))


@pytest.mark.parametrize("view", [str, json.dumps], ids=["text", "json"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_changed_passages_in_every_script_stay_text(script, view, matcher_of):
    passage = SCRIPTS[script]
    half = len(passage) // 2
    changed = [passage[:-1], passage[1:], passage[:half] + passage[half + 1 :]]
    changed.append(passage[:half] + "あ" + passage[half + 1 :])
    assert found(matcher_of(passage), "\n\n".join(map(view, changed))) == []


@pytest.mark.parametrize("write", CHANGED.values(), ids=CHANGED)
def test_changed_passages_stay_text(write, matcher_of):
    passages = [p for p in PASSAGES if write(p) != p]
    assert passages
    assert found(matcher_of(*PASSAGES), "\n\n".join(map(write, passages))) == []


def test_a_passage_in_another_unicode_normal_form_stays_text(matcher_of):
    decomposed = unicodedata.normalize("NFD", PASSAGES[1])
    assert found(matcher_of(PASSAGES[1]), decomposed) == []


# Where a match begins and ends.


def test_a_match_covers_the_passage_and_nothing_else(matcher_of):
    text = f'<d id="1"> {PASSAGES[0]}\n</d>'
    assert spans(matcher_of(PASSAGES[0]), text) == [PASSAGES[0]]


def test_a_match_in_json_covers_the_escapes(matcher_of):
    text = json.dumps({"a": "\n", "passage": PASSAGES[1]})
    (span,) = spans(matcher_of(PASSAGES[1]), text)
    assert json.loads(f'"{span}"') == PASSAGES[1]
    assert "\\ud83c\\udf6e" in span


def test_a_match_takes_leading_and_trailing_punctuation(matcher_of):
    passage = f'«"{LONG}"»...'
    assert spans(matcher_of(passage), f"See {passage} there.") == [passage]


def test_an_escaped_quote_at_the_edge_belongs_to_the_match(matcher_of):
    text = json.dumps(f'"{LONG}"')
    assert spans(matcher_of(f'"{LONG}"'), text) == [f'\\"{LONG}\\"']


@pytest.mark.parametrize("before", ["\n", "\t", "\r\n", '"', "/", "é\n"])
def test_an_escape_before_a_passage_does_not_hide_it(before, matcher_of):
    assert spans(matcher_of(LONG), json.dumps(before + LONG)) == [LONG]


def test_the_letter_of_an_escape_is_not_the_beginning_of_a_passage(matcher_of):
    passage = "nice " + LONG
    assert found(matcher_of(passage), json.dumps("\nice " + LONG)) == []


@pytest.mark.parametrize(
    "glued", ["x{}", "1{}", "e\u0301{}", "{}s", "{}9", "{}\u0301", "{}\\u0301", "{}\u200d"]
)
def test_a_passage_glued_to_a_letter_or_accent_stays_text(glued, matcher_of):
    assert found(matcher_of(LONG), glued.format(LONG)) == []


def test_lone_surrogates_in_a_prompt_do_no_harm(matcher_of):
    text = "\ud800 " + LONG + " \udfff"
    assert spans(matcher_of(LONG), text) == [LONG]
    assert found(matcher_of(LONG), LONG[:40] + "\ud800" + LONG[41:]) == []
    assert spans(matcher_of(LONG), f"\\ud800 \\U0000d800 {LONG}") == [LONG]


@pytest.mark.parametrize("before", ["文書：", "次の文書を読む", "Document", ""])
@pytest.mark.parametrize("write", [str, json.dumps], ids=["text", "json"])
def test_scripts_without_spaces_are_found_inside_a_run_of_letters(before, write, matcher_of):
    text = write(before + CJK + "質問")
    (span,) = spans(matcher_of(CJK), text)
    assert json.loads(f'"{span}"') == CJK


def test_a_latin_passage_is_found_right_after_a_script_without_spaces(matcher_of):
    assert spans(matcher_of(LONG), "文書" + LONG + "質問") == [LONG]


# Several passages.


def test_a_passage_that_stands_twice_is_found_twice(matcher_of):
    assert spans(matcher_of(LONG), f"{LONG}\n\n{LONG}") == [LONG, LONG]


def test_the_longest_of_two_passages_with_one_beginning_wins(matcher_of):
    longer = LONG + ", and it releases oxygen."
    matcher = matcher_of(LONG, longer)
    assert spans(matcher, longer) == [longer]
    assert spans(matcher, f"{LONG}, and more.") == [LONG]


def test_the_longest_wins_in_json_too(matcher_of):
    longer = LONG + '\nor "food".'
    assert found(matcher_of(LONG, longer), json.dumps(longer)) == [content_key(longer)]


def test_the_leftmost_of_two_overlapping_passages_wins(matcher_of):
    words = [f"word{i}" for i in range(30)]
    left, right = " ".join(words[:20]), " ".join(words[10:])
    assert spans(matcher_of(left, right), " ".join(words)) == [left]


def test_a_lead_does_not_reach_into_the_match_before(matcher_of):
    first, second = LONG + "!!!", "!!!" + LONG
    assert spans(matcher_of(first, second), LONG + "!!!" + LONG) == [first]


def test_passages_with_a_shared_head_are_told_apart(matcher_of):
    head = "Copyright 2026 The Example Authors. Licensed under the terms of "
    passages = [f"{head}licence {'x' * i} of file {i}." for i in range(50)]
    assert spans(matcher_of(*passages), "\n".join(passages)) == passages


# What is indexed.


@pytest.mark.parametrize("passage", [SHORT, "-" * 40 + SHORT, "-=" * 100, LONG[:47]])
def test_short_passages_are_not_looked_for(matcher_of, passage):
    matcher = matcher_of(passage)
    assert found(matcher, passage) == []
    assert "too short" in matcher.why_not(passage, passage)


def test_min_chars_may_be_as_low_as_the_window(home):
    passage = "Thirty-two characters, not more."
    home.add(passage)
    assert spans(PassageMatcher(home.index, min_chars=32), f"{passage} Yes.") == [passage]
    with pytest.raises(BadInput, match="32 or more"):
        PassageMatcher(home.index, min_chars=10)


def test_adding_twice_counts_once(home, matcher_of):
    matcher = matcher_of(LONG, LONG.replace(" ", "\n"))
    home.add(LONG)
    home.discard(LONG)
    assert found(matcher, LONG) == []


def test_a_discarded_passage_is_no_longer_found(home, matcher_of):
    twin = LONG[:-6] + "starch"
    matcher = matcher_of(LONG, twin)
    home.discard(LONG)
    home.discard(LONG)
    assert spans(matcher, f"{LONG}\n{twin}") == [twin]
    home.discard(twin)
    assert found(matcher, twin) == []
    home.add(twin)
    assert spans(matcher, twin) == [twin]


@pytest.mark.parametrize(
    ("passage", "prompt", "reason"),
    [
        (SHORT, SHORT, "too short (31 < 48 characters)"),
        (CJK, CJK, "not indexed"),
        (LONG, "What is light?", "does not occur"),
        (LONG, f"> {LONG}", "found at characters 2 to 84"),
        (LONG, f"{LONG}9", "occurs, but joined to a letter"),
        (
            LONG,
            f"1. {LONG[:50]}",
            "differs at character 50: expected ' energy that is stor', found ''",
        ),
        (
            LONG,
            json.dumps("\n" + LONG.replace("light", "LIGHT")),
            "character 24: expected 'light energy into ch', found 'LIGHT energy into ch'",
        ),
    ],
    ids=["short", "unknown", "absent", "found", "glued", "truncated", "edited"],
)
def test_why_not_names_the_reason(passage, prompt, reason, matcher_of):
    assert reason in matcher_of(LONG).why_not(passage, prompt)


def test_searching_is_safe_while_others_add_and_discard(home, matcher_of):
    matcher = matcher_of(LONG)
    twins = [f"{LONG} {i}" for i in range(300 if isinstance(home, InMemory) else 5)]
    done = threading.Event()

    def write():
        for _ in range(30):
            home.add(*twins)
            for twin in twins:
                home.discard(twin)
        done.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    writer = threading.Thread(target=write)
    try:
        writer.start()
        while not done.is_set():
            assert spans(matcher, f"{LONG}.") == [LONG]
    finally:
        writer.join()
        sys.setswitchinterval(interval)
    assert spans(matcher, twins[0]) == [LONG]


# Any passages in any text, against the definition.

WORDS = st.sampled_from(["ab", "abc", "d", "é1", '"ab', "d,", "(d)"])
PASSAGE = st.lists(WORDS, min_size=14, max_size=24).map(" ".join).filter(lambda p: len(p) >= 45)
SEPARATOR = st.sampled_from(["", " ", "\n\n", " \t", "</d>\n<d>", "ab ", "\n- "])
SPACE = st.sampled_from([" ", "\n", "  ", "\r\n\t", "\u00a0"])


@st.composite
def corpora(draw):
    """Passages (prefixes and suffixes of each other among them) and a text that holds some."""
    passages = draw(st.lists(PASSAGE, min_size=1, max_size=4))
    passages += [p[: draw(st.integers(40, 60))] for p in passages[:2]]
    passages += [p[draw(st.integers(0, 12)) :] for p in passages[:2]]
    pieces = draw(st.lists(st.one_of(st.sampled_from(passages), PASSAGE), max_size=5))
    text = "".join(draw(SEPARATOR) + piece for piece in pieces) + draw(SEPARATOR)
    return passages, text


def small_matcher_of(home, passages):
    """A matcher for a fresh home of the same kind, and what it is to find."""
    home = type(home)(getattr(home, "store", None))
    home.add(*passages)
    known = {folded for p in passages if len((folded := normalise(p)).lstrip('"(,) ')) >= 32}
    return PassageMatcher(home.index, min_chars=32), known


def slow_find(known, text):
    """The definition: at each place, from left to right, the longest passage that fits."""

    def is_glued(at):
        return 0 < at < len(text) and text[at - 1].isalnum() and text[at].isalnum()

    result, at = [], 0
    while at < len(text):
        ends = [at + len(p) for p in known if text.startswith(p, at)]
        ends = [end for end in ends if not is_glued(at) and not is_glued(end)]
        if ends:
            result.append(text[at : max(ends)])
        at = max(ends, default=at + 1)
    return result


EXAMPLES = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@EXAMPLES
@given(corpus=corpora())
def test_find_agrees_with_its_definition(home, corpus):
    passages, text = corpus
    matcher, known = small_matcher_of(home, passages)
    folded = normalise(text)
    assert spans(matcher, folded) == slow_find(known, folded)


@EXAMPLES
@given(corpus=corpora(), data=st.data())
def test_every_span_reads_as_its_passage(home, corpus, data):
    passages, text = corpus
    matcher, _ = small_matcher_of(home, passages)
    spaced = "".join(data.draw(SPACE) if char == " " else char for char in text)
    matches = matcher.find(spaced)
    assert [m.content for m in matches] == found(matcher, text)
    assert all(content_key(spaced[m.start : m.end]) == m.content for m in matches)
    assert all(a.end <= b.start for a, b in pairwise(matches))


@EXAMPLES
@given(corpus=corpora(), ensure_ascii=st.booleans())
def test_every_span_in_json_decodes_to_its_passage(home, corpus, ensure_ascii):
    passages, text = corpus
    matcher, _ = small_matcher_of(home, passages)
    encoded = json.dumps(text, ensure_ascii=ensure_ascii)
    for match in matcher.find(encoded):
        span = encoded[match.start : match.end]
        assert match.content in (content_key(span), content_key(inside_json(span)))


def inside_json(span):
    """A piece of a JSON string, decoded; JSON's own quotes, which a passage may begin or end with,
    stay."""
    head, body, tail = re.fullmatch(r'("?)((?:[^"\\]|\\.)*)("?)', span, re.DOTALL).groups()
    return head + json.loads(f'"{body}"') + tail


NUMBERS = [4077824538, 3859318785]


def test_window_numbers_stay_as_they_are():
    """Stores hold them: a change needs another format."""
    text = "é " * 20 + LONG
    assert window_numbers(text, [0, 40], 7).tolist() == NUMBERS
    many = window_numbers(text, [40] * 20_000, 7)
    assert set(many.tolist()) == {NUMBERS[1]}


@given(st.text(st.sampled_from("aZ9_ -.é\u0301\u0e01漢字かな\u2003\U00020000\udc80"), max_size=80))
def test_heads_are_words_and_each_letter_of_a_script_without_spaces(text):
    words = re.compile(rf"[^\W_{SPACELESS}]+|[^\W_]")
    begins = [word.start() for word in words.finditer(text)]
    assert find_heads(text) == [at for at in begins if at + WINDOW <= len(text)]


def test_window_numbers_are_spread_evenly():
    rng = random.Random(0)
    text = "".join(rng.choices("abcdef gh", k=50_000))
    numbers = window_numbers(text, range(len(text) - 32))
    distinct = np.unique(numbers)
    assert len(distinct) > len(numbers) - 10
    assert distinct.min() >= 0
    assert distinct.max() < 2**32
    buckets = np.bincount(numbers >> 26, minlength=64)
    assert buckets.max() < 1.3 * buckets.min()
