"""Sentences of exactly known entropy and probability, for tests: a small grammar with agreement of number.

A likelihood bound stays above `entropy()`; samples can be scored exactly by `logprob`.
"""
import math


def weights(words, probabilities, ending=""):
    return {w + ending: p for w, p in zip(words.split(), probabilities)}


# symbol: {expansion: probability}; a word is a symbol without a rule. _s, _p: singular, plural
RULES = {
    "S": {"S_s": .5, "S_p": .5}, "NP": {"NP_s": .5, "NP_p": .5}, "NP0": {"NP0_s": .5, "NP0_p": .5},
    "DET_s": weights("the a this", (.5, .3, .2)), "DET_p": weights("the some these", (.5, .3, .2)),
    "ADJS": {"": .5, "ADJ": .35, "ADJ ADJ": .15}, "ADJ": weights("big red old tiny", (.4, .3, .2, .1)),
    "ADVS": {"": .65, "ADV": .35}, "ADV": weights("here now often", (.5, .3, .2))}
for n, noun, verb in ("_s", "", "s"), ("_p", "s", ""):
    RULES |= {
        "S" + n: {f"NP{n} VP{n} ADVS .": .6, f"NP{n} that VT{n} NP0 VP{n} ADVS .": .4},
        "VP" + n: {f"VT{n} NP": .6, f"VI{n}": .4},
        "NP" + n: {f"DET{n} ADJS N{n}": 1.}, "NP0" + n: {f"DET{n} N{n}": 1.},
        "N" + n: weights("dog cat bird fox cow", (.3, .25, .2, .15, .1), noun),
        "VT" + n: weights("see like chase help", (.4, .3, .2, .1), verb),
        "VI" + n: weights("run sleep sing", (.5, .3, .2), verb)}


def entropy(symbol="S"):
    """Exact entropy in nats (of a sentence 13.5089): one derivation for every string, so choices add up."""
    return sum(p * (sum(map(entropy, words.split())) - math.log(p))
               for words, p in RULES.get(symbol, {}).items())


def sentence(rng, symbol="S"):
    """The words of one random sentence, 15 at most; rng: a random.Random."""
    if symbol not in RULES:
        return [symbol]
    chosen, = rng.choices(list(RULES[symbol]), RULES[symbol].values())
    return [w for part in chosen.split() for w in sentence(rng, part)]


def logprob(text):
    """Log-probability of a sentence in nats; -inf outside the language."""
    def probability(symbols, words):                # that the symbols become these words
        if not symbols:
            return float(not words)
        first, *rest = symbols
        if first not in RULES:
            return probability(rest, words[1:]) if words[:1] == [first] else 0.
        return sum(p * probability(part.split() + rest, words) for part, p in RULES[first].items())
    p = probability(["S"], text.split())
    return math.log(p) if p else -math.inf
