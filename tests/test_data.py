"""data.py: golden values, packing, preparation and its faults, batches, metrics. No network, no big files.

CORPORA_FROM=FOLDER python -m pytest tests/test_data.py --slow      also the corpora whose files FOLDER holds
"""
import http.server
import io
import json
import lzma
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import numpy as np
import pytest
import torch

import data
import grammar
from data import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = json.loads((ROOT / "tests" / "golden" / "data.json").read_text())


@pytest.fixture(scope="module")
def prose():
    return data.load("prose", "char", 64)


@pytest.fixture(scope="module")
def gpt2():
    try:
        return data.BPE("gpt2")
    except UserError as e:
        pytest.skip(f"GPT-2's vocabulary is not at hand: {e}")


def fails(match, action, *args, **keys):
    """The call ends in a UserError of one line that matches."""
    with pytest.raises(UserError, match=match) as caught:
        action(*args, **keys)
    assert "\n" not in str(caught.value)


def story(n, seed=0, words=("low", "lower", "new", "newer", "wide", "it's", "2024,", "the")):
    rng = np.random.default_rng(seed)
    picks = (rng.integers(0, len(words), rng.integers(3, 40)) for _ in range(n))
    return [" ".join(words[i] for i in pick) + " ." for pick in picks]


def ptb_folder(path, sizes=dict(train=2500, valid=1200)):
    path.mkdir(exist_ok=True)
    for seed, (split, n) in enumerate(sizes.items()):
        with lzma.open(path / f"ptb.{split}.txt.xz", "wt") as f:
            f.writelines(f" {line}\n" for line in story(n, seed))
    return path


PTB = dict(tokenizer="bpe300", length=32, check=False, workers=1)


# --- golden values ------------------------------------------------------------------------------

def test_gpt2_ids_equal_golden(gpt2):
    for text, ids in GOLDEN["gpt2"]:
        assert list(gpt2.encode(text)) == ids and (not ids or gpt2.decode(ids) in (text, ""))


def test_gpt2_ids_equal_tiktoken_on_a_megabyte(gpt2, prose):
    import tiktoken
    text = data.prose_text()[0]
    assert np.array_equal(gpt2.encode(text), tiktoken.get_encoding("gpt2").encode_ordinary(text))


def test_detokenisers_equal_golden():
    names = {"wt": "wikitext", "scientific_papers": "papers"}
    for name, cases in GOLDEN["detokenizers"].items():
        for before, after in cases:
            assert data.DETOKENIZERS[names.get(name, name)](before) == after, name


def test_packing_equals_golden():
    docs = GOLDEN["packing"]["docs"]
    for case in GOLDEN["packing"]["cases"]:
        rows, end = case["rows_per_batch"], [case["eos"]] * case["insert_eos"]
        batches = [sum((d + end for d in docs[i:i + rows]), []) for i in range(0, len(docs), rows)]
        blocks = [data.pack(np.array(b), case["block"], case["bos"], case["eos"])[0] for b in batches]
        assert np.concatenate(blocks).tolist() == case["blocks"]


def test_trained_bpe_equals_golden():
    case = GOLDEN["bpe"]
    merges = data.train_bpe(case["text"], case["vocab_size"])
    assert merges == case["tokens_from_256"]
    assert data.BPE("bpe", merges).encode(case["text"]).tolist() == case["ids"]


def test_gen_ppl_mask_entropy_and_pooling_equal_golden():
    case = GOLDEN["gen_ppl"]
    counted = data.scored_targets(np.array(case["ids"]), case["eos"])
    assert counted.tolist() == np.array(case["counted_targets_bool"], dtype=bool).tolist()
    assert math.exp(np.array(case["nll"])[counted].mean()) == pytest.approx(case["ppl_bool"], rel=1e-12)
    rows, values = zip(*GOLDEN["entropy_nats"])
    assert data.entropies(rows) == pytest.approx(values, abs=1e-12)
    assert data.entropy(rows) == pytest.approx(GOLDEN["entropy_mean_nats"], abs=1e-12)


def test_words_and_repetition_equal_golden():
    case, ids = GOLDEN["nfdm_metrics"], {}
    assert [data.WORD.findall(t) for t in case["generated"]] == case["tokens"]
    rows = [[ids.setdefault(w, len(ids)) for w in words] for words in case["tokens"]]
    for n, value in case["repetition"].items():     # texts of different lengths, counted together
        codes = np.concatenate([data.grams([row], int(n)).ravel() for row in rows])
        assert 1 - np.unique(codes).size / codes.size == pytest.approx(value, abs=1e-12)
    same = rows[0][:8], rows[0][:8]
    assert data.distinct_n(same, 2) == 0.5 and data.distinct_n(same, 9) == 0


def test_grammar_equals_golden():
    """The source of known entropy that other tests may use: grammar.py beside this file."""
    case = GOLDEN["grammar"]
    assert grammar.entropy() == pytest.approx(case["H_nats"], rel=1e-9)
    for sentence, logprob in case["samples"]:
        assert grammar.logprob(sentence) == pytest.approx(logprob, rel=1e-12)
    for wrong in ("the dog run .", "a dogs run .", "the dog that see a cat runs .",
                  "the dog that sees a big cat runs .", "the", ""):
        assert grammar.logprob(wrong) == -math.inf
    rng = random.Random(0)
    nll = -np.array([grammar.logprob(" ".join(grammar.sentence(rng))) for _ in range(1024)])
    assert abs(nll.mean() - case["H_nats"]) < 5 * nll.std() / 32


# --- tokenizers ---------------------------------------------------------------------------------

def test_byte_level_tokenizers_round_trip_any_text():
    rng = np.random.default_rng(0)
    text = "".join(map(chr, rng.integers(0, 0xD800, 3000))) + "\0 \r\n\t\x7f\U0001f642<|endoftext|>"
    for tok in (data.BPE("byte"), data.make_tokenizer("bpe400", " ".join(story(200)))):
        ids = tok.encode(text)
        assert tok.decode(ids) == text and max(ids) < tok.vocab
        raw = bytes(rng.integers(0, 256, 5000).astype(np.uint8))        # bytes that are no text at all
        assert tok.encoding.decode_bytes(list(raw)) == raw


def test_trained_bpe_equals_recounting_after_every_merge():
    text = " ".join(story(60, 5))
    pieces = [list(p.encode()) for p in __import__("regex").findall(data.PIECES, text)]
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < 300:
        counts = data.Counter(pair for p in pieces for pair in zip(p, p[1:]))
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        tokens.append(tokens[best[0]] + tokens[best[1]])
        for p in pieces:
            i = 0
            while i + 1 < len(p):
                if (p[i], p[i + 1]) == best:
                    p[i:i + 2] = [len(tokens) - 1]
                i += 1
    assert data.train_bpe(text, 300) == [t.decode("latin-1") for t in tokens[256:]]


def test_wordpiece_follows_the_rules_of_bert(tmp_path):
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cafe",
             "##s", "un", "##do", "!", "\u6570"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    tok, id = data.WordPiece.from_file(tmp_path / "vocab.txt"), words.index
    assert tok.encode("Caf\u00e9s! undo\u6570x \0\ufffd cafe" + "s" * 100).tolist() == [
        *map(id, ("cafe", "##s", "!", "un", "##do", "\u6570")), 100, 100]
    assert tok.decode([id("un"), id("##do"), id("!"), 0]) == "undo!"
    (tmp_path / "other.txt").write_text("a\nb")
    fails("not the vocabulary of bert", data.WordPiece.from_file, tmp_path / "other.txt")


def test_unigram_finds_the_best_split_and_merges_unknowns(tmp_path):
    pieces = {"<pad>": 0., "</s>": 0., "<unk>": 0., "\u2581": -2., "a": -3., "b": -3., "ab": -4.,
              "\u2581ab": -9.}
    model = b""
    for piece, score in pieces.items():
        text = piece.encode()
        inner = b"\x0a" + bytes([len(text)]) + text + b"\x15" + np.float32(score).tobytes() + b"\x18\x01"
        model += b"\x0a" + bytes([len(inner)]) + inner
    (tmp_path / "m").write_bytes(model + b"\x12\x02\x18\x01")         # a trainer block follows the pieces
    tok = data.Unigram.from_file(tmp_path / "m")
    assert tok.vocab == 8 + 100
    # -6 beats -9; zz is one unknown; NFKC
    assert tok.encode(" ab  abzzb\uff41").tolist() == [3, 6, 3, 6, 2, 5, 4]
    assert tok.decode([3, 6, 3, 5, 1, 4]) == "ab b"
    (tmp_path / "m").write_bytes(model[:-7])
    fails("not T5's", data.Unigram.from_file, tmp_path / "m")


# --- built-in corpora and text of your own ------------------------------------------------------

def test_prose_is_split_by_content_and_has_the_known_entropies(prose):
    train, val = (set(t.split("\n\n")) for t in data.prose_text())
    assert not train & val and all(data.zlib.crc32(p.encode()) % 10 == 0 for p in val)
    assert 0.08 < len(val) / len(train | val) < 0.12
    refs = prose.references()
    assert refs["unigram"] / math.log(2) == pytest.approx(4.55, abs=0.05)       # bits per character
    assert refs["bigram"] / math.log(2) == pytest.approx(3.57, abs=0.05)
    assert prose.unigram_entropy == pytest.approx(refs["unigram"], abs=0.01)
    assert prose.bytes_per_token() == 1 and prose.decode(prose.encode("Hello.")) == "Hello."
    fails("does not occur", prose.encode, "\u6570")


def test_bytes_of_all_tokens_add_up_to_the_text(tmp_path):
    text = "\n".join(story(400)) + " na\u00efve caf\u00e9 "
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    for tokenizer in ("byte", "bpe300"):
        corpus = data.load(str(tmp_path / "t.txt"), tokenizer, 16)
        n = {s: len(corpus.splits[s]) for s in ("train", "val")}
        assert sum(round(corpus.bytes_per_token(s) * n[s]) for s in n) == len(text.encode())


def test_text_that_cannot_be_used_ends_in_one_line(tmp_path):
    cases = {"empty.txt": b"", "blank.txt": b" \n\n", "latin.txt": "caf\u00e9".encode("latin-1"),
             "bin.txt": b"a\0b" * 500, "short.txt": b"abc", "one.txt": b"a"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        for tokenizer in ("char", "byte", "bpe300"):
            said = "no text|not UTF-8|binary file|less than one row"
            fails(said, data.load, str(tmp_path / name), tokenizer)
    (tmp_path / "folder").mkdir()
    fails("holds no text", data.load, str(tmp_path / "folder"))
    fails("no corpus, file or folder", data.load, str(tmp_path / "nothing"))
    fails("tokenizer 'bpe7'", data.load, "prose", "bpe7")
    fails("at least one token", data.load, "prose", "char", 0)
    (tmp_path / "folder" / "b.md").write_text("b" * 500)
    (tmp_path / "folder" / "a.txt").write_text("a" * 500)
    corpus = data.load(str(tmp_path / "folder"), "char", 16)
    assert corpus.decode(corpus.rows("train", [0])["tokens"][0]) == "a" * 16
    assert corpus.n_rows("val") == 501 // 16                    # 1,001 characters are few: half is validation


def test_a_batch_is_a_function_of_seed_and_step_alone(prose):
    for corpus in (prose, data.load("markov4", length=4), data.load("reverse")):
        whole = corpus.train_batch(3, 7, 0, 8, 8)
        halves = [corpus.train_batch(3, 7, first, 4, 8) for first in (0, 4)]
        for key, value in whole.items():
            parts = [h[key] for h in halves]
            assert torch.equal(value, parts[0] if key.startswith("global") else torch.cat(parts)), key
        assert torch.equal(whole["tokens"], corpus.train_batch(3, 7, 0, 8, 8)["tokens"])
        assert not torch.equal(whole["tokens"], corpus.train_batch(3, 8, 0, 8, 8)["tokens"])
        assert not torch.equal(whole["tokens"], corpus.train_batch(4, 7, 0, 8, 8)["tokens"])


def test_an_epoch_of_blocks_shows_every_row_once():
    rows = np.arange(40).reshape(10, 4)
    splits = {"train": data.Split([rows.ravel()], 0)}
    corpus = data.Corpus("ten", data.Words([str(i) for i in range(40)]), 4, "blocks", splits)
    seen = torch.cat([corpus.train_batch(0, step, 0, 4, 4)["tokens"] for step in range(5)])
    assert sorted(seen[:10, 0].tolist()) == sorted(seen[10:, 0].tolist()) == list(range(0, 40, 4))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_markov_source_has_the_stated_entropy():
    corpus = data.markov(4, 6)
    held_out = corpus.rows("val", range(4096))["tokens"]
    bigram = corpus.judge().token_nll(held_out, order=2).sum(1)
    assert abs(bigram.mean() - corpus.entropy) < 5 * bigram.std() / 64
    start, transitions = data.markov_chain(4)
    assert np.allclose(start @ transitions, start)


def test_pairs_are_padded_with_eos_and_carry_lengths(tmp_path):
    (tmp_path / "p.tsv").write_text("".join(f"abc{i}\txyz{i}\n" for i in range(30)))
    corpus = data.load(str(tmp_path / "p.tsv"), "char", 12)
    assert corpus.conditional and corpus.has_mask and corpus.special["eos"] == 1
    batch = corpus.rows("train", [0, 1])
    for row, mask, c in zip(batch["tokens"], batch["mask"], batch["cond_len"]):
        n = int(mask.sum())
        assert corpus.decode(row[:c]).startswith("abc") and corpus.decode(row[c:]).startswith("xyz")
        assert (row[n:] == 1).all() and (row[:n] > 1).all() and mask[:n].all()
    short = data.load(str(tmp_path / "p.tsv"), "char", 12, max_source=2)
    assert short.rows("train", [0])["cond_len"].item() == 2
    batch = corpus.train_batch(0, 0, 2, 2, 6)
    assert batch["global_len"].shape == batch["global_cond"].shape == (6,)
    assert batch["global_len"][2:4].tolist() == batch["mask"].sum(1).tolist()


def test_every_source_is_on_one_side_and_no_side_is_empty(tmp_path):
    (tmp_path / "p.tsv").write_text("a\tb\nc\td\na\te\n" + "".join(f"x{i}\ty\n" for i in range(40)))
    corpus, found = data.load(str(tmp_path / "p.tsv"), "byte", 8), {}
    for split in ("train", "val"):
        rows = corpus.rows(split, range(corpus.n_rows(split)))
        found[split] = {corpus.decode(t[:c]) for t, c in zip(rows["tokens"], rows["cond_len"])}
    assert not found["train"] & found["val"] and len(found["val"]) == 4 and len(found["train"]) == 38
    (tmp_path / "p.tsv").write_text("a\tb\nc\td\n")
    corpus = data.load(str(tmp_path / "p.tsv"), "byte", 8)
    assert corpus.n_rows("train") == corpus.n_rows("val") == 1


@pytest.mark.parametrize("line, said", [
    ("no tab", "line 3: 0 tabs"), ("a\t", "line 3: the target is empty"),
    ("\tb", "line 3: the source is empty"), ("a\tb\tc", "line 3: 2 tabs")])
def test_a_broken_pair_is_named_by_line(tmp_path, line, said):
    (tmp_path / "p.tsv").write_text("ab\tcd\nef\tgh\n" + line + "\nij\tkl\n")
    fails(said, data.load, str(tmp_path / "p.tsv"), "char", 12, 11)
    (tmp_path / "p.tsv").write_text("ab\tcd\n")
    fails("at least 2", data.load, str(tmp_path / "p.tsv"))
    fails("leaves no room", data.load, str(tmp_path / "p.tsv"), "char", 12, 12)


def test_reverse_is_a_disjoint_conditional_task():
    corpus, words = data.load("reverse"), {}
    for split in ("train", "val"):
        batch = corpus.rows(split, range(500 if split == "train" else corpus.n_rows("val")))
        rows = zip(batch["tokens"], batch["cond_len"])
        pairs = [(corpus.decode(row[:c]), corpus.decode(row[c:])) for row, c in rows]
        words[split] = {word for word, _ in pairs}
        assert all(word[::-1] == reverse for word, reverse in pairs)
    assert not words["train"] & words["val"] and {len(w) for w in words["val"]} == set(range(4, 11))


@pytest.mark.parametrize("header", [b"", np.array([20240520, 1, 500] + [0] * 253, dtype="<i4").tobytes()])
def test_token_shards_are_read_with_and_without_a_header(tmp_path, monkeypatch, header):
    real = data.BPE                                 # bytes stand for GPT-2's tokens; 256 ends a text
    monkeypatch.setattr(data, "BPE", lambda name: real("byte", reserved=True))
    for k, name in enumerate(("x_train_000001.bin", "x_train_000002.bin", "x_val_000000.bin")):
        ids = np.arange(k * 50, k * 50 + 1010) % 200 + 40
        (tmp_path / name).write_bytes(header + ids.astype("<u2").tobytes())
    corpus = data.load(str(tmp_path), length=100)
    assert corpus.n_rows("train") == 20 and corpus.n_rows("val") == 10 and corpus.bytes_per_token() == 1
    assert corpus.rows("val", [1])["tokens"][0, :3].tolist() == [40, 41, 42]
    assert corpus.rows("train", [11])["tokens"][0, 0] == 50 + 90 + 40   # the second file from its id 90 on
    steps = torch.cat([corpus.train_batch(0, step, 0, 8, 8)["tokens"] for step in range(50)]).diff(dim=1)
    assert set(steps.unique().tolist()) == {1, -199}            # no window runs from one file into the next
    one = data.load(str(tmp_path / "x_train_000001.bin"), length=100)
    assert one.n_rows("train") == 9 and one.rows("val", [0])["tokens"][0, 0] == (1010 - 101) % 200 + 40
    fails("gpt2, not byte", data.load, str(tmp_path), "byte", 100)
    (tmp_path / "x_train_000002.bin").write_bytes(header + np.array([257] * 1000, dtype="<u2").tobytes())
    fails("000002.bin holds the id 257", data.load, str(tmp_path), "gpt2", 100)
    (tmp_path / "x_train_000002.bin").write_bytes(header)
    assert data.load(str(tmp_path), length=100).n_rows("train") == 10
    fails("no .bin file has the 200 ids", data.load, str(tmp_path / "x_train_000002.bin"), "gpt2", 100)


# --- metrics ------------------------------------------------------------------------------------

def test_judge_equals_a_literal_witten_bell_and_sums_to_one():
    rng = np.random.default_rng(0)
    train, V = rng.integers(0, 4, (50, 7)), 5

    def p(context, w):                                          # the definition, word for word
        lower, n = p(context[1:], w) if context else 1 / V, len(context)
        after = [r[i + n] for r in train for i in range(7 - n) if list(r[i:i + n]) == context]
        return (after.count(w) + len(set(after)) * lower) / (len(after) + len(set(after))) if after else lower
    judge, rows = data.NgramJudge(train, V), rng.integers(0, V, (6, 7))
    want = [[-math.log(p(list(r[max(0, i - 2):i]), r[i])) for i in range(7)] for r in rows]
    assert judge.token_nll(rows) == pytest.approx(np.array(want), rel=1e-12)
    ends = np.concatenate([np.tile([[1, 2]], (V, 1)), np.arange(V)[:, None]], axis=1)
    assert np.exp(-judge.token_nll(ends)[:, 2]).sum() == pytest.approx(1, rel=1e-12)


def test_judge_ranks_text_above_shuffled_text_above_noise(prose):
    table, lines = prose.sample_metrics(prose.rows("val", range(0, 600, 10))["tokens"])
    nll = {k: v["judge_nll"] for k, v in table.items()}
    assert nll["samples"] < 2.1 and abs(nll["samples"] - nll["held-out text"]) < 0.3
    assert nll["held-out text"] + 2 < nll["unigram text"] < nll["uniform noise"] - 2
    assert table["samples"]["words_in_corpus"] > 0.9 and len(lines) > 4
    assert prose.copied(prose.rows("train", range(50))["tokens"]) == 1 > table["samples"]["copied_8grams"]
    assert prose.copied(prose.random_rows(50, 64)) == 0 and table["uniform noise"]["words_in_corpus"] < 0.5


# --- preparation --------------------------------------------------------------------------------

def test_a_prepared_corpus_opens_as_written_and_a_second_run_does_nothing(tmp_path, capsys):
    source, root = ptb_folder(tmp_path / "from"), tmp_path / "corpora"
    assert "absent" in next(line for line in data.listing(root).splitlines() if line.startswith("ptb "))
    meta = data.read_meta(data.prepare("ptb", source, root, **PTB))
    before = {p: p.stat().st_mtime_ns for p in (root / "ptb").iterdir()}
    data.prepare("ptb", source, root, **PTB)
    assert "nothing to do" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in (root / "ptb").iterdir()}
    assert "ready (bpe300-32: train, val)" in data.listing(root)
    assert data.is_ready("ptb", root) and not data.is_ready("lm1b", root)
    corpus = data.load("ptb", "bpe300", 32, root=root)
    tok, lines = corpus.tok, story(1200, 1)
    ids = (np.concatenate([tok.encode(t) for t in lines[i:i + 1000]]) for i in (0, 1000))
    blocks = np.concatenate([data.pack(part, 32, tok.eos, tok.eos)[0] for part in ids])
    assert np.array_equal(corpus.rows("val", range(corpus.n_rows("val")))["tokens"].numpy(), blocks)
    assert meta["splits"]["val"]["tokens"] == sum(len(tok.encode(t)) for t in lines)
    total = sum(len(t) for t in lines)
    per_token = total / meta["splits"]["val"]["tokens"] * 30 / 32
    assert corpus.bytes_per_token() == pytest.approx(per_token, rel=1e-3)
    fails("prepared with packing=compat", data.prepare, "ptb", source, root, **PTB, packing="global")
    fails(r"python data.py ptb --tokenizer=bpe300 --length=64", data.load, "ptb", "bpe300", 64, root=root)
    fails(r"not prepared; run: python data.py lm1b$", data.load, "lm1b", length=128, root=root)


def test_packing_modes_insert_eos_and_processes(tmp_path):
    source, metas = ptb_folder(tmp_path / "from"), {}
    for key, extra in dict(one={}, two=dict(workers=2), all=dict(packing="global"), eos=dict(insert_eos=True),
                           pad=dict(packing="pad")).items():
        path = data.prepare("ptb", source, tmp_path / key, **{**PTB, **extra})
        metas[key] = data.read_meta(path)["splits"]["train"]
    assert metas["one"] == metas["two"] and len(metas["one"]["sha256"]) == 64   # whatever the number of cores
    batches = [story(2500)[i:i + 1000] for i in (0, 1000, 2000)]
    tok = data.load("ptb", "bpe300", 32, root=tmp_path / "one").tok
    counts = [sum(len(tok.encode(t)) for t in b) for b in batches]
    assert metas["one"]["blocks"] == sum(c // 30 for c in counts) < metas["all"]["blocks"] + 2
    assert metas["all"]["blocks"] == sum(counts) // 30
    assert metas["eos"]["blocks"] == sum((c + len(b)) // 30 for c, b in zip(counts, batches))
    padded = data.load("ptb", "bpe300", 24, root=tmp_path / "pad")
    row, n = padded.rows("train", [0]), len(tok.encode(story(1)[0])) + 2
    assert padded.has_mask and row["tokens"][0, 0] == tok.eos and row["mask"].sum() == min(24, n)


def test_detokenised_characters_and_padded_gpt2_ids(tmp_path, gpt2):
    """A table of the raw characters had no `?`, which stands for <unk>; GPT-2 had no id to pad with."""
    (tmp_path / "ptb.train.txt").write_text("the <unk> dog\n" * 99)
    data.prepare("ptb", tmp_path, tmp_path, **{**PTB, "tokenizer": "char"})
    assert "?" in data.load("ptb", length=32, root=tmp_path).tok.words
    data.prepare("ptb", tmp_path, tmp_path / "b", **{**PTB, "tokenizer": "gpt2"}, packing="pad")
    row = data.load("ptb", length=32, root=tmp_path / "b").rows("train", [0])
    assert gpt2.decode(row["tokens"][0, 1:4]) == "the ? dog" and row["mask"].sum() == 5
    for name in ("gpt2", "byte"):                   # their rows begin with the id that ends them
        if name == "byte":
            data.prepare("ptb", tmp_path, tmp_path / "b", **{**PTB, "tokenizer": name}, packing="pad")
        corpus = data.load("ptb", name, length=32, root=tmp_path / "b")
        assert corpus.decode(corpus.rows("train", [0])["tokens"][0]) == "the ? dog"


def test_words_stories_and_meaning_texts(tmp_path):
    stories = story(300, 3, ("He", "didn't", "go", "to", "Mr.", "Li's", "house.", "rare"))[:250]
    for split in ("train", "valid"):
        lines = (json.dumps([s]) for s in stories + ["odd words"])
        (tmp_path / f"roc_{split}.json").write_text("\n".join(lines))
    data.prepare("roc", tmp_path, tmp_path, workers=1)
    corpus = data.load("roc", length=16, root=tmp_path)
    row = corpus.rows("val", [250])["tokens"][0]
    assert row.tolist() == [0, 2, 2, 1] + 12 * [3] and not corpus.has_mask      # UNK UNK; PAD counts
    text = corpus.decode(corpus.rows("val", [0])["tokens"][0])
    assert all(w in text.split() for w in ("did", "n't")) or "didn't" not in stories[0]
    (tmp_path / "trainset.csv").write_text("mr,ref\n" + '"name[A], food[B]","A, serves\nB."\n' * 12)
    (tmp_path / "src1_valid.txt").write_text("name : A | food : B||A , serves B . \n")
    data.prepare("e2e", tmp_path, tmp_path, workers=1)
    corpus = data.load("e2e", root=tmp_path)
    assert corpus.n_rows("train") == 12 and corpus.vocab == 4 + 5
    for split, i in (("train", 3), ("val", 0)):
        assert corpus.decode(corpus.rows(split, [i])["tokens"][0]) == "A , serves B ."


def test_parallel_text_and_text8_and_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "text8.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("text8", "the quick brown fox jumps over " * 2000)
    data.prepare("text8", tmp_path, tmp_path, check=False, workers=1)
    corpus = data.load("text8", length=256, root=tmp_path)
    assert corpus.vocab == 27 and corpus.n_rows("train") == 62000 * 18 // 20 // 256
    assert corpus.n_rows("test") == 3100 // 256
    whole, keys = (tmp_path / "text8.zip").read_bytes(), dict(check=False, workers=1)
    (tmp_path / "text8.zip").write_bytes(whole[:len(whole) // 2])
    fails("text8.zip is truncated or damaged", data.prepare, "text8", tmp_path, tmp_path / "b", **keys)
    (tmp_path / "ptb.valid.txt.xz").write_bytes(lzma.compress(b"a b c\n" * 9999)[:-20])
    fails("ptb.valid.txt.xz is truncated or damaged", data.prepare, "ptb", tmp_path, tmp_path / "b", **PTB)
    assert not list((tmp_path / "b").rglob("*.json"))
    fails("none of the files of roc", data.prepare, "roc", tmp_path, tmp_path / "b")


def test_a_vocabulary_becomes_part_of_the_corpus(tmp_path):
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "low", "new", "##er",
             "."]
    source = ptb_folder(tmp_path / "from")
    (source / "tokenizers").mkdir()
    vocabulary = source / "tokenizers" / "bert-base-uncased-vocab.txt"
    vocabulary.write_text("\n".join(words))
    keys = dict(PTB, tokenizer="bert-base-uncased", insert_eos=True)
    data.prepare("ptb", source, tmp_path, **keys)
    vocabulary.write_text("other\nwords")
    corpus = data.load("ptb", length=32, root=tmp_path)
    row = corpus.rows("val", [0])["tokens"][0]
    assert corpus.vocab == 107 and row[0] == row[-1] == 101 and 102 not in row
    assert "newer" in corpus.decode(row)
    fails("not the vocabulary of bert", data.prepare, "ptb", source, tmp_path / "b", **keys)
    vocabulary.unlink()
    fails("needs bert-base-uncased-vocab.txt", data.prepare, "ptb", source, tmp_path / "b", **keys)


def test_news_from_its_archive(tmp_path):
    folders = "1-billion/training-monolingual.tokenized.shuffled/news.en-00001-of-00100", \
        "1-billion/heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050"
    with tarfile.open(tmp_path / data.LM1B, "w:gz") as archive:
        for name, lines in zip(folders, (story(1200), story(40, 1))):
            content = "".join(f"{line} It 's late .\n" for line in lines).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    keys = dict(tokenizer="bpe300", length=32, check=False, workers=1)
    meta = data.read_meta(data.prepare("lm1b", tmp_path, tmp_path, **keys))
    assert [meta["splits"][s]["documents"] for s in ("train", "val")] == [1200, 40] and meta["insert_eos"]
    corpus = data.load("lm1b", "bpe300", 32, root=tmp_path)
    text = "".join(corpus.decode(row[1:-1]) for row in corpus.rows("val", range(42))["tokens"])
    assert "It's" in text and " 's" not in text
    whole = (tmp_path / data.LM1B).read_bytes()
    (tmp_path / data.LM1B).write_bytes(whole[:len(whole) // 2])
    fails("tar.gz is truncated or damaged", data.prepare, "lm1b", tmp_path, tmp_path / "b", **keys)


def test_documents_in_json_lines(tmp_path):
    keys = dict(tokenizer="bpe300", length=32, workers=1)
    for split, n in (("train", 86), ("valid", 9)):
        lines = (json.dumps({"text": t}) + "\n" for t in story(n))
        (tmp_path / f"openwebtext_{split}.jsonl").write_text("".join(lines))
    meta = data.read_meta(data.prepare("openwebtext", tmp_path, tmp_path, **keys))
    assert [meta["splits"][s]["documents"] for s in ("train", "val")] == [86, 9]
    (tmp_path / "openwebtext_train.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    fails("train.jsonl is truncated", data.prepare, "openwebtext", tmp_path, tmp_path / "b", **keys)


def test_wrong_checksum_is_refused_by_name(tmp_path):
    source = ptb_folder(tmp_path / "from")
    said = "ptb.train.txt.xz is not the published ptb.train.txt"
    fails(said, data.prepare, "ptb", source, tmp_path, "bpe300", 32)
    assert not list(tmp_path.glob("ptb/*.json"))


def test_pairs_of_files_must_have_equal_lengths(tmp_path):
    for split, n in (("train", 40), ("val", 20)):
        for side in ("de", "en"):
            (tmp_path / f"{split}.{side}").write_text("".join(f"{t}\n" for t in story(n, 7)))
    keys = dict(tokenizer="bpe300", workers=1)
    data.prepare("multi30k", tmp_path, tmp_path, **keys)
    corpus = data.load("multi30k", "bpe300", 128, root=tmp_path)
    batch, text = corpus.rows("val", [5]), story(6, 7)[5]       # the same text on both sides
    c, n, row = int(batch["cond_len"]), int(batch["mask"].sum()), batch["tokens"][0]
    ids = corpus.encode(text)
    assert c == min(64, len(ids)) and row[:c].tolist() == ids[:c] and row[c:n].tolist() == ids[:128 - c]
    assert corpus.n_rows("train") == 40 and (row[n:] == corpus.tok.eos).all()
    (tmp_path / "val.en").write_text("one\n")
    fails("val.de.*val.en.*line 2", data.prepare, "multi30k", tmp_path, tmp_path / "b", **keys)


def test_killed_preparation_leaves_nothing_that_opens(tmp_path):
    (tmp_path / "text8").write_text("the quick brown fox jumps over the lazy dog " * 400_000)
    command = [sys.executable, ROOT / "data.py", "text8", f"--from={tmp_path}", f"--out={tmp_path / 'c'}"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 60
    while not list((tmp_path / "c").rglob("*_train.bin")) and time.time() < deadline:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not list((tmp_path / "c").rglob("*.json"))
    fails("not prepared; run: python data.py text8", data.load, "text8", length=256, root=tmp_path / "c")
    assert "partial" in data.listing(tmp_path / "c")
    data.prepare("text8", tmp_path, tmp_path / "c", workers=1)
    assert data.load("text8", length=256, root=tmp_path / "c").n_rows("train") > 1000
    assert not list((tmp_path / "c").rglob("*.part"))


def test_damage_to_a_prepared_corpus_is_told_in_one_line(tmp_path):
    meta = data.prepare("ptb", ptb_folder(tmp_path / "from"), tmp_path, **PTB)
    tokens, text, rng = meta.parent / "bpe300-32_val.bin", meta.read_bytes(), np.random.default_rng(0)
    good = tokens.read_bytes()
    for content, said in ((good[:-2], "bytes, its meta says"), (good + b"\0\0", "bytes, its meta says"),
                          (good[:1000] + b"\xff\xff" + good[1002:], "id 65535, beyond the vocabulary")):
        tokens.write_bytes(content)
        fails(said, data.load, "ptb", "bpe300", 32, root=tmp_path)
    tokens.write_bytes(good)
    for _ in range(300):                            # flipped, cut, doubled and foreign meta files
        i, broken = rng.integers(len(text)), bytearray(text)
        kind = rng.integers(4)
        broken = [broken[:i], broken + broken[i:], bytearray(b'{"a": [1]}')][kind] if kind < 3 else broken
        if kind == 3:
            broken[i] ^= 1 << rng.integers(8)
        meta.write_bytes(broken)
        try:
            changed = json.loads(broken) != json.loads(text)
        except ValueError:
            changed = True
        if changed:
            fails("is damaged", data.load, "ptb", "bpe300", 32, root=tmp_path)
    meta.write_bytes(text)
    tokens.unlink()
    fails("has 0 bytes", data.load, "ptb", "bpe300", 32, root=tmp_path)


class Server(http.server.BaseHTTPRequestHandler):
    content, cut, asked = bytes(range(256)) * 4096, 0, []

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.asked.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:Server.cut or None])

    def log_message(self, *args):
        pass


def test_download_resumes_and_checks(tmp_path):
    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, sha = f"http://127.0.0.1:{server.server_port}/f", data.hashlib.sha256(Server.content).hexdigest()
    try:
        Server.cut = 600_000
        fails("stopped at 600,000 of 1,048,576 bytes|failed", data.download, url, tmp_path / "f", sha)
        Server.cut = 0
        data.download(url, tmp_path / "f", sha)
        assert (tmp_path / "f").read_bytes() == Server.content and Server.asked == [0, 600_000]
        fails("wrong checksum", data.download, url, tmp_path / "g", "0" * 64)
        assert not list(tmp_path.glob("g*"))
    finally:
        server.shutdown()
        server.server_close()
    fails("download of .* failed", data.download, url, tmp_path / "h")


def test_command_line_errors_are_one_line_and_status_2(tmp_path, capsys):
    cases = {"openwebtxt": "openwebtext", "ptb --lenght=3": "--lenght=3", "ptb --length=x": "--length",
             "ptb --packing=tight": "compat", "ptb --check=maybe": "check", "ptb --from=none": "not a folder",
             f"ptb --from={tmp_path}": "none of the files", f"ptb --from={tmp_path} --length=2": "length=2"}
    for argv, said in cases.items():
        fails(said, data.main, [*argv.split(), f"--out={tmp_path / 'c'}"])
    for name in data.RECIPES:
        fails(f"none of the files of {name}", data.prepare, name, tmp_path, tmp_path / "d")
    data.main([f"--out={tmp_path / 'c'}"])
    out = capsys.readouterr().out
    assert all(name in out for name in data.RECIPES) and "absent" in out
    done = subprocess.run([sys.executable, str(ROOT / "data.py"), "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


# --- optional packages --------------------------------------------------------------------------

def test_generative_perplexity_equals_a_direct_computation(gpt2):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50257, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    scorer = transformers.GPT2LMHeadModel(config).eval()
    total, count = {False: 0., True: 0.}, {False: 0, True: 0}
    texts = ["The dog runs.<|endoftext|>It sleeps.<|endoftext|><|endoftext|>",
             "<|endoftext|>A cat<|endoftext|> sat.", "", "words " * 80]
    for text in texts:
        ids = gpt2.encoding.encode(text, allowed_special="all")[:64]
        seen = int(ids[:1] == [50256])
        for j in range(1, len(ids)):
            with torch.no_grad():
                nll = -scorer(torch.tensor([ids[:j]])).logits[0, -1].log_softmax(0)[ids[j]].item()
            seen += ids[j] == 50256
            for every in (False, True):
                if every or ids[j] != 50256 or seen == 1:
                    total[every], count[every] = total[every] + nll, count[every] + 1
    for every in (False, True):
        ours = data.generative_perplexity(texts, scorer, every_eos=every, limit=64)
        assert ours == pytest.approx(math.exp(total[every] / count[every]), rel=1e-4)
    assert count[True] == count[False] + 2 + 1      # two late EOS in the first text, one in the second


def test_bleu_equals_golden():
    pytest.importorskip("sacrebleu")
    case = GOLDEN["bleu"]
    for hyp, ref, score in ((case["hyp"], case["ref"], case["corpus_bleu_lc_eff"]),
                            (case["hyp"][:1], case["ref"][:1], case["first_only"]),
                            (["the cat"], ["the cat"], case["short"])):
        assert data.bleu(hyp, ref)["bleu"] == pytest.approx(score, rel=1e-9)


def test_rouge_equals_golden():
    pytest.importorskip("rouge_score")
    for case in GOLDEN["rouge"]:
        want = {k: case[k] for k in ("rouge1", "rouge2", "rougeL")}
        assert data.rouge([case["hyp"]], [case["ref"]]) == pytest.approx(want, rel=1e-9)


def test_pairs_are_scored_with_or_without_the_packages(monkeypatch):
    corpus = data.load("reverse")
    rows = corpus.rows("val", range(6))["tokens"].clone()
    rows[0, :] = corpus.special["eos"]                          # one of six answers is empty
    monkeypatch.setitem(sys.modules, "sacrebleu", None)         # as if it were not installed
    record, lines = corpus.pair_metrics(rows)
    assert record["exact"] == pytest.approx(5 / 6) and "bleu" not in record
    assert any("pip install sacrebleu" in line for line in lines)


# --- the real files -----------------------------------------------------------------------------

# (corpus, options): {split: (tokens before packing, blocks)}, as published or measured with the official code
PUBLISHED = [("ptb", {}, {"val": (78_403, 74), "test": (87_374, 83)}),
             ("ptb", dict(insert_eos=True), {"val": (78_403 + 3_370, 77), "test": (87_374 + 3_761, 86)}),
             ("wikitext2", {}, {"test": (270_438, 262)}),
             ("wikitext2", dict(insert_eos=True), {"test": (274_796, 267)}),
             ("lambada", {}, {"val": (423_590, 412)}),
             ("lambada", dict(insert_eos=True), {"val": (428_743, 417)}),
             ("ag_news", {}, {"val": (391_395, 380)}),
             ("ag_news", dict(insert_eos=True), {"val": (398_995, 386)})]


@pytest.mark.slow
@pytest.mark.parametrize("name, options, splits", PUBLISHED)
def test_real_corpora_have_the_published_counts(tmp_path, gpt2, name, options, splits):
    if "CORPORA_FROM" not in os.environ:
        pytest.skip("set CORPORA_FROM to a folder with the files of the corpora")
    meta = data.read_meta(data.prepare(name, os.environ["CORPORA_FROM"], tmp_path, **options))
    for split, (tokens, blocks) in splits.items():
        assert (meta["splits"][split]["tokens"], meta["splits"][split]["blocks"]) == (tokens, blocks)
    assert data.load(name, length=1024, root=tmp_path).describe()


# corpora without a published count: (tokens, first 8 ids, last 8 ids), of pairs those of the targets; from
# readers that share no code with the preparation but the tokenizers themselves
COUNTED = {
    ("text8", "train"): (6190042, [0, 1, 14, 1, 18, 3, 8, 9], [0, 15, 6, 0, 20, 8, 5, 0]),
    ("text8", "val"): (343891, [13, 1, 12, 9, 11, 9, 19, 0], [4, 9, 6, 6, 9, 3, 21, 12]),
    ("text8", "test"): (343892, [20, 0, 9, 6, 0, 14, 15, 20], [14, 5, 0, 14, 9, 14, 5, 0]),
    ("tinyshakespeare", "train"): (1003854, [18, 47, 56, 57, 58, 1, 15, 47], [51, 43, 57, 1, 46, 43, 56, 43]),
    ("tinyshakespeare", "val"): (111540, [12, 0, 0, 19, 30, 17, 25, 21], [61, 39, 49, 47, 52, 45, 8, 0]),
    ("multi30k", "train"): (
        452297, [2759, 1021, 6, 1945, 5069, 7, 33, 1067], [28, 20735, 11, 8022, 16, 8, 2458, 5]),
    ("multi30k", "val"): (
        15937, [71, 563, 13, 1076, 33, 12115, 7282, 2400], [2147, 18, 9, 18, 3013, 17, 63, 5]),
    ("multi30k", "test"): (15412, [71, 388, 16, 46, 5470, 3, 547, 3], [28, 3, 9, 4180, 16, 8, 2357, 5]),
    ("xsum", "test"): (
        1663, [3, 9, 6098, 1390, 12, 5936, 165, 293], [147, 1157, 5533, 2440, 5827, 1442, 3, 5]),
    ("roc", "val"): (261172, [0, 4, 5, 6, 7, 8, 9, 10], [772, 487, 934, 8, 14, 596, 11, 1]),
    ("roc", "test"): (259232, [0, 1882, 34, 1397, 71, 8, 48, 1826], [123, 2, 21, 90, 127, 192, 11, 1]),
    ("e2e", "train"): (1026141, [0, 4, 5, 6, 7, 8, 9, 10], [83, 79, 64, 30, 105, 106, 15, 1]),
    ("e2e", "val"): (125694, [0, 174, 37, 11, 112, 64, 30, 105], [267, 39, 117, 118, 33, 12, 15, 1]),
    ("e2e", "test"): (137319, [0, 121, 40, 41, 64, 30, 105, 106], [57, 187, 69, 7, 4, 54, 15, 1])}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({name for name, _ in COUNTED}))
def test_real_corpora_have_the_counted_ids(tmp_path, name):
    if "CORPORA_FROM" not in os.environ:
        pytest.skip("set CORPORA_FROM to a folder with the files of the corpora")
    path = data.prepare(name, os.environ["CORPORA_FROM"], tmp_path)
    meta = data.read_meta(path)
    assert set(meta["splits"]) == {split for corpus, split in COUNTED if corpus == name}
    for split in meta["splits"]:
        ids = np.fromfile(path.with_name(f"{path.stem}_{split}.bin"), dtype="<u2")
        if meta["layout"] == "pairs":               # source, target, source, ...
            ends = np.fromfile(path.with_name(f"{path.stem}_{split}.idx"), dtype="<i8")
            ids = np.concatenate([ids[a:b] for a, b in zip(ends[1::2], ends[2::2])])
        assert (len(ids), ids[:8].tolist(), ids[-8:].tolist()) == COUNTED[name, split]


@pytest.mark.slow
def test_bert_and_t5_ids_equal_golden():
    folder = pathlib.Path(os.environ.get("CORPORA_FROM", "none")) / "tokenizers"
    if not folder.is_dir():
        pytest.skip("set CORPORA_FROM to a folder with tokenizers/, the vocabulary files of BERT and T5")
    for name, tok in (("bert-base-uncased", data.WordPiece.from_file(folder / "bert-base-uncased-vocab.txt")),
                      ("t5", data.Unigram.from_file(folder / "t5-spiece.model"))):
        for text, ids in GOLDEN[name]:
            assert tok.encode(text).tolist() == ids
