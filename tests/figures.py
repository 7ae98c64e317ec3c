"""The README's pictures as SVG files, written with the standard library from runs of the equal-budget table.

    python tests/figures.py watch --paper=langflow     # a sampling run, animated: noise turns into words
    python tests/figures.py settle                     # which position settles when
    python tests/figures.py curves                     # bound against tokens trained
    python tests/figures.py frontier                   # judge perplexity and entropy against sampling steps
    python tests/figures.py schedules                  # noise levels a paper trains at, before and after learning
    python tests/figures.py all

Runs are read from --out=out/bench (python tests/bench.py table), files go to --to=tests/figures.
"""
import html
import json
import math
import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import bench                                                                # noqa: E402  (needs the path above)
import common                                                               # noqa: E402
import data                                                                 # noqa: E402

COLOURS = dict(ar="#444444", langflow="#1f77b4", replaid="#ff7f0e", flm="#2ca02c", nfdm="#d62728", elf="#9467bd",
               fmlm="#17a589")
SANS, MONO = "font-family:Helvetica,Arial,sans-serif", "font-family:Menlo,Consolas,'DejaVu Sans Mono',monospace"


# --- 1. a small plotting helper -----------------------------------------------------------------------------


def document(width, height, parts, style=""):
    """SVG text: white background (readable on dark pages), sans-serif text, then the parts."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
            f"<style>text{{{SANS};font-size:12px;fill:#222}}{style}</style>"
            f'<rect width="{width}" height="{height}" fill="#fff"/>' + "".join(parts) + "</svg>\n")


def text(x, y, words, anchor="middle", **attributes):
    extra = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in attributes.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{html.escape(str(words), quote=False)}</text>'


def line(points, colour, width=1.8, dash=""):
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"'
            + (f' stroke-dasharray="{dash}"' if dash else "") + "/>")


def ticks(low, high, log):
    """About five round values in [low, high]: 1, 2, 5 times powers of ten, or powers of two or ten on a log axis."""
    if log:
        base = 2 if high / low < 1000 else 10
        exponents = range(math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9) + 1)
        return [base ** e for e in exponents][::1 + len(exponents) // 7]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Panel:
    """Axes in a box at (left, top) with the given limits; `parts` collects what is drawn."""

    def __init__(self, left, top, width, height, x, y, title="", x_label="", y_label="", log_x=False, log_y=False):
        self.box, self.limits, self.logs, self.parts = (left, top, width, height), (x, y), (log_x, log_y), []
        for value in ticks(*x, log_x):
            at = self.x(value)
            self.parts += [line([(at, top), (at, top + height)], "#e6e6e6", 1), text(at, top + height + 16, f"{value:g}")]
        for value in ticks(*y, log_y):
            at = self.y(value)
            self.parts += [line([(left, at), (left + width, at)], "#e6e6e6", 1), text(left - 6, at + 4, f"{value:g}", "end")]
        self.parts.append(f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>')
        self.parts += [text(left + width / 2, top - 8, title, font_weight="bold"),
                       text(left + width / 2, top + height + 34, x_label)]
        turn = left - 42, top + height / 2
        self.parts.append(text(*turn, y_label, transform=f"rotate(-90 {turn[0]:.1f} {turn[1]:.1f})"))

    def _share(self, value, axis):
        (low, high), log = self.limits[axis], self.logs[axis]
        value = min(max(value, low), high)
        return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)

    def x(self, value):
        return self.box[0] + self.box[2] * self._share(value, 0)

    def y(self, value):
        return self.box[1] + self.box[3] * (1 - self._share(value, 1))

    def curve(self, points, colour, marks=True, **how):
        """Points (x, y); one point alone is a diamond."""
        at = [(self.x(x), self.y(y)) for x, y in points]
        self.parts.append(line(at, colour, **how))
        size = 2.6 if len(at) > 1 else 5
        self.parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{colour}"/>' for x, y in at if marks]

    def level(self, value, label, colour="#777"):
        """A dashed horizontal line with its name."""
        left, _, width, _ = self.box
        at = self.y(value)
        self.parts += [line([(left, at), (left + width, at)], colour, 1.2, "5 4"),
                       text(left + width - 4, at - 4, label, "end", fill=colour)]


def legend(x, y, names, gap=18):
    """Coloured names below each other."""
    return [part for i, name in enumerate(names) for part in (
        line([(x, y + gap * i - 4), (x + 18, y + gap * i - 4)], COLOURS[name], 3),
        text(x + 24, y + gap * i, bench.NAMES[name], "start"))]


# --- 2. recording a sampling run ----------------------------------------------------------------------------


def finished(out, names=tuple(bench.NAMES)):
    """Names of the rows whose checkpoint lies in the folder of the table."""
    found = [n for n in names if (out / n / "ckpt.pt").exists()]
    if not found:
        raise data.UserError(f"no finished run under {out}: python tests/bench.py table --out={out}")
    return found


def record(name, out, n, steps, seed):
    """(frames [K, n, L], corpus): the guess after every step of one sampling run, the result last."""
    Paper, Cfg, _, _ = bench.paper(name)
    model, cfg, corpus, _, _ = common.load_run(Paper, Cfg, common.start_world(), out / name, lambda note: None)
    frames = []
    ids = common.draw(model, corpus, n, steps, seed, watch=lambda k, tokens: frames.append(tokens.cpu().clone()))
    if not torch.equal(frames[-1], ids):        # some samplers decode once more after their last step
        frames.append(ids)
    return torch.stack(frames), corpus


def settled_from(frames):
    """For each position the frame from which it keeps its final token: [n, L] int64."""
    changed = frames != frames[-1]
    order = torch.arange(1, len(frames) + 1)[:, None, None]
    return (changed * order).amax(0)


def characters(corpus, ids):
    """One printable string per token of a row."""
    return [common.show(corpus, i[None]) or "·" for i in ids]


# --- 3. figures ---------------------------------------------------------------------------------------------


def watch(o):
    """An animated sampling run: text that will still change is light, text that stays is dark."""
    frames, corpus = record(o["paper"], o["out"], o["n"], o["steps"], o["seed"])
    n, L = frames.shape[1:]
    since, dt = settled_from(frames), o["seconds"] / len(frames)
    total, parts, fade = o["seconds"] + 3.0, [], 'class="c"'         # the result stays for three seconds
    width, height = 40 + round(8.43 * max(len("".join(characters(corpus, row))) for row in frames[-1])), 52 + 26 * n
    for k, frame in enumerate(frames):
        rows = []
        for i in range(n):
            runs = []
            for token, stays in zip(characters(corpus, frame[i]), (since[i] <= k).tolist()):
                if not runs or runs[-1][0] != stays:
                    runs.append([stays, ""])
                runs[-1][1] += token
            spans = "".join(html.escape(t, quote=False) if stays else f"<tspan {fade}>{html.escape(t, quote=False)}</tspan>"
                            for stays, t in runs)
            rows.append(f'<text class="t" x="20" y="{56 + 26 * i}" xml:space="preserve">{spans}</text>')
        bar = f'<rect x="20" y="{height - 10}" width="{(width - 40) * (k + 1) / len(frames):.0f}" height="3" fill="#1f77b4"/>'
        last = k == len(frames) - 1
        parts.append(f'<g class="{"l" if last else "f"}" style="animation-delay:{k * dt:.2f}s">' + "".join(rows) + bar + "</g>")
    share, rest = 100 * dt / total, 100 * (3.0 + dt) / total
    style = (f".t{{{MONO};font-size:14px;white-space:pre}}.c{{fill:#c9b18f}}"
             f".f,.l{{opacity:0;animation:f {total:.2f}s step-end infinite}}.l{{animation-name:l}}"
             f"@keyframes f{{0%{{opacity:1}}{share:.3f}%{{opacity:0}}}}@keyframes l{{0%{{opacity:1}}{rest:.3f}%{{opacity:0}}}}"
             "@media(prefers-reduced-motion:reduce){.f{animation:none}.l{animation:none;opacity:1}}")
    title = f"{bench.NAMES[o['paper']]}: {o['steps']} steps from noise to text; light characters will still change"
    return document(width, height, [text(20, 24, title, "start", font_weight="bold"), *parts], style)


def settle(o):
    """Token-time pictures: position across, sampling step down, dark where the token is final."""
    names, parts, size, top = finished(o["out"]), [], 200, 40
    for j, name in enumerate(names):
        frames, corpus = record(name, o["out"], 1, o["steps"], o["seed"])
        K, _, L = frames.shape
        since, left = settled_from(frames)[0], 46 + j * (size + 26)
        same, stays = frames[:, 0] == frames[-1, 0], torch.arange(K)[:, None] >= since
        for state, colour in ((stays, COLOURS[name]), (same & ~stays, "#cccccc")):
            path = ""
            for k, row in enumerate(state.int().tolist()):          # runs of equal cells, one rectangle each
                edges = [i for i in range(L + 1) if (row[i] if i < L else 0) != (row[i - 1] if i else 0)]
                path += "".join(f"M{a},{k}h{b - a}v1h{a - b}z" for a, b in zip(edges[::2], edges[1::2]))
            parts.append(f'<path transform="translate({left} {top}) scale({size / L:.4f} {size / K:.4f})" d="{path}" '
                         f'fill="{colour}" shape-rendering="crispEdges"/>')
        parts += [f'<rect x="{left}" y="{top}" width="{size}" height="{size}" fill="none" stroke="#999"/>',
                  text(left + size / 2, top - 10, bench.NAMES[name], font_weight="bold"),
                  text(left + size / 2, top + size + 18, f"position, 1 to {L}"),
                  text(left - 6, top + 10, 1, "end"), text(left - 6, top + size, K, "end")]
    turn = 18, top + size / 2
    parts.append(text(*turn, "sampling step", transform=f"rotate(-90 {turn[0]} {turn[1]})"))
    note = "colour: the guess is the final token and stays; grey: it is, but will change and come back; white: another token"
    parts.append(text(46, top + size + 42, note, "start"))
    return document(max(720, 52 + len(names) * (size + 26)), top + size + 56, parts)


def curves(o):
    """Bound (autoregressive: exact) on validation text against tokens trained."""
    rows, series = bench.finished_rows(o["out"]), {}
    for row in rows:
        cfg = row["config"]
        points = [(r["step"] * cfg["batch"] * cfg["length"] / 1e6, r["value"])
                  for r in common.read_metrics(o["out"] / row["name"]) if r["kind"] in ("val", "final") and "value" in r]
        if points:
            series[row["name"]] = points
    if not series:
        raise data.UserError(f"no finished row under {o['out']}: python tests/bench.py table --out={o['out']}")
    references = data.load(cfg["data"], tokenizer=cfg["tokenizer"], length=cfg["length"]).references()
    values = [y for points in series.values() for _, y in points] + list(references.values())
    p = Panel(62, 34, 420, 280, (0, max(x for points in series.values() for x, _ in points)),
              (min(values) - 0.1, max(references["unigram"] + 0.6, np.quantile(values, 0.8))),
              "validation bound", "tokens trained, millions", "nats per token")
    for name, value in references.items():
        p.level(value, name)
    for name, points in series.items():
        p.curve(points, COLOURS[name], dash="6 3" if name == "ar" else "")
    return document(660, 370, p.parts + legend(500, 50, series))


def frontier(o):
    """Judge perplexity and entropy of samples against sampling steps."""
    rows = bench.finished_rows(o["out"])
    if not rows:
        raise data.UserError(f"no finished row under {o['out']}: python tests/bench.py table --out={o['out']}")
    samples = {r["name"]: sorted((int(k), s) for k, s in r["samples"].items()) for r in rows}
    held_out, unigram = (rows[0]["references"][k] for k in ("held-out text", "unigram text"))
    steps = [k for s in samples.values() for k, _ in s]
    x, parts = (min(steps) * 0.8, max(steps) * 1.25), []
    ppl = [math.exp(s["nll"]) for v in samples.values() for _, s in v] + [math.exp(held_out["nll"]), math.exp(unigram["nll"])]
    entropy = [s["entropy"] for v in samples.values() for _, s in v] + [held_out["entropy"]]
    left = Panel(62, 34, 330, 280, x, (min(ppl) * 0.8, max(ppl) * 1.25), "judge perplexity", "sampling steps", "", True, True)
    right = Panel(450, 34, 330, 280, x, (min(entropy) - 0.1, max(entropy) + 0.15), "entropy of a sample, nats",
                  "sampling steps", "", True)
    left.level(math.exp(held_out["nll"]), "held-out text")
    left.level(math.exp(unigram["nll"]), "unigram text")
    right.level(held_out["entropy"], "held-out text")
    for name, points in samples.items():
        left.curve([(k, math.exp(s["nll"])) for k, s in points], COLOURS[name])
        right.curve([(k, s["entropy"]) for k, s in points], COLOURS[name])
    return document(960, 370, parts + left.parts + right.parts + legend(800, 50, samples))


@torch.no_grad()
def noise_levels(name, model, u, x):
    """-log SNR at the quantiles u (0: least noise) of a paper's training noise; x: embedded text for NFDM."""
    if name == "langflow":
        return model.proposal.gamma_of(u.float())
    if name == "replaid":
        return model.schedule(u)[0]
    if name == "nfdm":
        out = []
        for t in model.times.draw(u).float():
            mu, sigma = model.process(x, t[None])[:2]
            out.append((sigma.square().mean() / mu.square().mean()).log())
        return torch.stack(out)
    if name == "flm":
        t = model.time.t_of(1 - u)
        return 2 * torch.log((1 - t) / t)
    c = model.cfg                                                           # ELF: t is logit-normal, sigma = noise scale
    t = torch.sigmoid(c.denoiser_p_mean + c.denoiser_p_std * torch.special.ndtri(1 - u))
    return 2 * torch.log(c.denoiser_noise_scale * (1 - t) / t)


SCHEDULES = dict(langflow="learned: a Gumbel law", replaid="learned: a monotone net", flm="fixed by the vocabulary",
                 nfdm="learned: process and times", elf="fixed: logit-normal")


def schedules(o):
    """Noise level against its quantile in training, for each paper, before and after training."""
    names, parts, u = finished(o["out"], bench.PAPERS), [], torch.linspace(0.005, 0.995, 100, dtype=torch.float64)
    for j, name in enumerate(names):
        Paper, Cfg, _, _ = bench.paper(name)
        model, cfg, corpus, _, _ = common.load_run(Paper, Cfg, common.start_world(), o["out"] / name, lambda note: None)
        fresh, tokens = common.build(Paper, cfg, common.World()), corpus.rows("val", range(16))["tokens"]
        values = [noise_levels(name, m, u, m.embed(tokens) if name == "nfdm" else None).tolist() for m in (fresh, model)]
        p = Panel(62 + j * 210, 50, 160, 200, (0, 1), (min(map(min, values)) - 0.5, max(map(max, values)) + 0.5),
                  bench.NAMES[name], "quantile of the training noise", "-log SNR" if j == 0 else "")
        p.curve(zip(u.tolist(), values[0]), "#aaa", marks=False, dash="4 3")
        p.curve(zip(u.tolist(), values[1]), COLOURS[name], marks=False, width=2.5)
        parts += p.parts + [text(142 + j * 210, 26, SCHEDULES[name])]
    parts.append(text(40, 314, "grey: at the start; colour: after training. Embeddings differ in width and norm: compare "
                      "shapes, not levels, between panels", "start"))
    return document(max(860, 40 + 210 * len(names)), 328, parts)


FIGURES = dict(watch=watch, settle=settle, curves=curves, frontier=frontier, schedules=schedules)


def main(argv):
    verb = argv[0] if argv else "--help"
    if verb not in (*FIGURES, "all"):
        print(__doc__)
        return 0 if verb == "--help" else 2
    try:
        o = bench.options(argv[1:], out="out/bench", to=str(bench.ROOT / "tests" / "figures"), paper="langflow", n=4,
                          steps=48, seed=0, seconds=7.0)
        o.update(out=pathlib.Path(o["out"]), to=pathlib.Path(o["to"]))
        o["to"].mkdir(parents=True, exist_ok=True)
        for name in FIGURES if verb == "all" else [verb]:
            file = o["to"] / f"{name}.svg"
            common.write_atomic(file, FIGURES[name](o))
            print(f"{file}  {file.stat().st_size / 1e3:.0f} kB")
    except data.UserError as e:
        print(f"figures: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
