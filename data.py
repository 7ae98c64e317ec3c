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
import heapq
import math
import os
import re
import sysconfig
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


class UserError(Exception):
    """A mistake of the user, told in one line: what is wrong, with which value, and what to do."""


# --- 1. tokenizers ------------------------------------------------------------------------------
# A tokenizer has name, vocab, bos, eos, pad (id or None), encode(text) -> ids, decode(ids) -> str.

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


class Words:
    """Closed vocabulary of words joined by spaces (the grammar); pad is the last id."""
    bos = eos = None

    def __init__(self, name, words, pad):
        self.name, self.words, self.pad, self.vocab = name, list(words), pad, len(words)
        self._id = {w: i for i, w in enumerate(self.words)}

    def encode(self, text):
        missing = [w for w in text.split() if w not in self._id]
        if missing:
            raise UserError(f"word {missing[0]!r} is not among the {self.vocab} words of {self.name}")
        return np.array([self._id[w] for w in text.split()], dtype=np.int64)

    def decode(self, ids):
        return " ".join(self.words[int(i)] for i in ids if 0 <= int(i) < self.vocab and int(i) != self.pad)


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
GRAMMAR_N_ADJ = (.5, .35, .15)
P_PLURAL, P_CLAUSE, P_TRANSITIVE, P_ADVERB, GRAMMAR_LENGTH = .5, .4, .6, .35, 16
GRAMMAR_WORDS = [*GRAMMAR_DET, *GRAMMAR_ADJ, *GRAMMAR_NOUN, *(n + "s" for n in GRAMMAR_NOUN),
                 *(v + s for v in GRAMMAR_VT for s in ("s", "")), *(v + s for v in GRAMMAR_VI for s in ("s", "")),
                 *GRAMMAR_ADV, "that", ".", "<pad>"]


def grammar_tokenizer():
    return Words("grammar", GRAMMAR_WORDS, pad=len(GRAMMAR_WORDS) - 1)


def grammar_entropy():
    """Exact entropy of one sentence in nats: every sentence has one derivation, so choices add up (13.5089)."""
    def h(p):
        return -sum(x * math.log(x) for x in p if x > 0)
    det = sum(h([p[k] for p in GRAMMAR_DET.values()]) for k in (0, 1)) / 2
    np0 = math.log(2) + det + h(GRAMMAR_NOUN.values())
    n_adjectives = sum(k * p for k, p in enumerate(GRAMMAR_N_ADJ))
    phrase = np0 + h(GRAMMAR_N_ADJ) + n_adjectives * h(GRAMMAR_ADJ.values())
    vt, both = h(GRAMMAR_VT.values()), lambda p: h([p, 1 - p])
    return (phrase + both(P_CLAUSE) + P_CLAUSE * (vt + np0) + both(P_TRANSITIVE) + P_TRANSITIVE * (vt + phrase)
            + (1 - P_TRANSITIVE) * h(GRAMMAR_VI.values()) + both(P_ADVERB) + P_ADVERB * h(GRAMMAR_ADV.values()))


def grammar_sample(n, seed):
    """n sentences of the grammar as ids [n, 16], padded; drawn column by column, absent words squeezed out."""
    rng, ids = np.random.default_rng(seed), {w: i for i, w in enumerate(GRAMMAR_WORDS)}
    pad = ids["<pad>"]

    def pick(table, form=lambda w: w):
        words = [ids[form(w)] for w in table]
        p = np.array(list(table.values()))
        return np.array(words)[np.searchsorted(np.cumsum(p)[:-1], rng.random(n), side="right")]

    def noun_phrase(adjectives):
        plural = rng.random(n) < P_PLURAL
        det = [pick({w: p[k] for w, p in GRAMMAR_DET.items() if p[k]}) for k in (0, 1)]
        noun = [pick(GRAMMAR_NOUN), pick(GRAMMAR_NOUN, lambda w: w + "s")]
        columns = [np.where(plural, det[1], det[0])]
        if adjectives:
            count = np.searchsorted(np.cumsum(GRAMMAR_N_ADJ)[:-1], rng.random(n), side="right")
            columns += [np.where(count > k, pick(GRAMMAR_ADJ), pad) for k in (0, 1)]
        return columns + [np.where(plural, noun[1], noun[0])], plural

    def verb(table, plural):
        return np.where(plural, pick(table), pick(table, lambda w: w + "s"))

    subject, plural = noun_phrase(True)
    clause = [np.full(n, ids["that"]), verb(GRAMMAR_VT, plural), *noun_phrase(False)[0]]
    some = rng.random(n) < P_CLAUSE
    transitive = rng.random(n) < P_TRANSITIVE
    action = np.where(transitive, verb(GRAMMAR_VT, plural), verb(GRAMMAR_VI, plural))
    target = [np.where(transitive, c, pad) for c in noun_phrase(True)[0]]
    adverb = np.where(rng.random(n) < P_ADVERB, pick(GRAMMAR_ADV), pad)
    rows = np.stack([*subject, *(np.where(some, c, pad) for c in clause), action, *target, adverb,
                     np.full(n, ids["."]), np.full(n, pad)], axis=1)
    order = np.argsort(rows == pad, axis=1, kind="stable")
    return np.take_along_axis(rows, order, axis=1)[:, :GRAMMAR_LENGTH]


def grammar_logprob(words):
    """Log-probability in nats of one sentence (a string, or ids with padding); -inf outside the language."""
    if not isinstance(words, str):
        ids = [int(i) for i in words]
        end = ids.index(len(GRAMMAR_WORDS) - 1) if len(GRAMMAR_WORDS) - 1 in ids else len(ids)
        if any(i != len(GRAMMAR_WORDS) - 1 for i in ids[end:]):
            return -math.inf
        words = grammar_tokenizer().decode(ids)
    words, at, total = words.split() + ["", "", ""], 0, 0.

    def take(table, suffix=""):
        nonlocal at, total
        stem = next((w for w in table if w + suffix == words[at]), None)
        if stem is None or not table[stem]:
            raise LookupError
        total, at = total + math.log(table[stem]), at + 1

    def choose(yes, p):
        nonlocal total
        total += math.log(p if yes else 1 - p)
        return yes

    def noun_phrase(adjectives):
        nonlocal at, total
        start, count = at, 0
        at += 1
        while adjectives and count < 2 and words[at] in GRAMMAR_ADJ:
            take(GRAMMAR_ADJ)
            count += 1
        total += math.log(GRAMMAR_N_ADJ[count]) if adjectives else 0.
        plural = words[at].endswith("s")
        take(GRAMMAR_NOUN, "s" if plural else "")
        end, at = at, start
        take({w: p[plural] for w, p in GRAMMAR_DET.items()})
        at = end
        return choose(plural, P_PLURAL)

    try:
        plural = noun_phrase(True)
        if choose(words[at] == "that", P_CLAUSE):
            at += 1
            take(GRAMMAR_VT, "" if plural else "s")
            noun_phrase(False)
        if choose(words[at].removesuffix("s") in GRAMMAR_VT, P_TRANSITIVE):
            take(GRAMMAR_VT, "" if plural else "s")
            noun_phrase(True)
        else:
            take(GRAMMAR_VI, "" if plural else "s")
        if choose(words[at] in GRAMMAR_ADV, P_ADVERB):
            take(GRAMMAR_ADV)
    except LookupError:
        return -math.inf
    return total if words[at:] == [".", "", "", ""] else -math.inf


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


def grammar(length=GRAMMAR_LENGTH, n=100_000):
    """The grammar of known entropy: n training sentences and 4,096 others, padded to `length`."""
    if length < GRAMMAR_LENGTH:
        raise UserError(f"the grammar needs --length={GRAMMAR_LENGTH} or more, not {length}")
    tok = grammar_tokenizer()
    rows = {k: np.pad(grammar_sample(m, seed), ((0, 0), (0, length - GRAMMAR_LENGTH)), constant_values=tok.pad)
            for k, m, seed in (("train", n, 1), ("val", 4096, 2))}
    return row_corpus("grammar", tok, rows, grammar_entropy())


def markov(V=8, L=6, seed=0, n=100_000):
    """A Markov source of known entropy (corpus.entropy, nats per row); corpus.chain is (start, transitions)."""
    pi, P = markov_chain(V, seed)
    rows = {k: markov_sample(pi, P, m, L, [seed, s]) for k, m, s in (("train", n, 1), ("val", 4096, 2))}
    corpus = row_corpus(f"markov{V}", Words(f"markov{V}", [f"s{i}" for i in range(V)], None), rows,
                        markov_entropy(pi, P, L))
    corpus.chain = pi, P
    return corpus


def newdiego(length=2, n=100_000):
    """Two dependent tokens: New York .45, San Diego .45, New Diego .10. One factorised step cannot sample it (FLM)."""
    if length != 2:
        raise UserError(f"newdiego has rows of two tokens: --length=2, not {length}")
    names, p = np.array([[0, 1], [2, 3], [0, 3]]), np.array([.45, .45, .10])
    rows = {k: names[np.random.default_rng([11, s]).choice(3, m, p=p)] for k, m, s in (("train", n, 1), ("val", 4096, 2))}
    return row_corpus("newdiego", Words("newdiego", ["New", "York", "San", "Diego"], None), rows,
                      float(-(p * np.log(p)).sum()))


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
    if path.is_file() and path.suffix == ".tsv":
        return pairs_file(path, tokenizer, length, max_source)
    if path.exists():
        return text_corpus(path, tokenizer, length)
    raise UserError(f"no corpus, file or folder is called {name!r}; `python data.py` lists the corpora")


# --- 5. metrics of token rows and of text -------------------------------------------------------

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
    out = []
    for row in rows:
        p = np.unique(_array(row), return_counts=True)[1] / max(len(row), 1)
        out.append(-(p * np.log(p)).sum())
    return np.array(out)


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
