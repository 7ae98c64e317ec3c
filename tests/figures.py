"""The README's pictures as SVG files, written with the standard library from runs of the equal-budget table.

    python tests/figures.py watch --paper=langflow     # a sampling run, animated: noise turns into words
    python tests/figures.py settle                     # which position settles when
    python tests/figures.py curves                     # bound against tokens trained
    python tests/figures.py frontier                   # judge perplexity and entropy against sampling steps
    python tests/figures.py schedules                  # noise levels of training, before and after learning
    python tests/figures.py all

Runs are read from --out=out/bench (python tests/bench.py table), for `watch` also from a run folder
(--out=out/langflow-tiny); files go to --to=tests/figures.
"""
import html
import json
import math
import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import bench                                                # noqa: E402  (needs the path above)
import common                                               # noqa: E402
import data                                                 # noqa: E402

COLOURS = dict(ar="#444444", langflow="#1f77b4", replaid="#ff7f0e", flm="#2ca02c", nfdm="#d62728",
               elf="#9467bd", fmlm="#17a589")
SANS = "font-family:Helvetica,Arial,sans-serif"
MONO = "font-family:Menlo,Consolas,'DejaVu Sans Mono',monospace"


# --- 1. a small plotting helper -----------------------------------------------------------------------------


def document(width, height, parts, style=""):
    """SVG text: white background (readable on dark pages), sans-serif text, then the parts."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}">'
            f"<style>text{{{SANS};font-size:12px;fill:#222}}{style}</style>"
            f'<rect width="{width}" height="{height}" fill="#fff"/>' + "".join(parts) + "</svg>\n")


def escape(words):
    return html.escape(str(words), quote=False)


def text(x, y, words, anchor="middle", **attributes):
    extra = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in attributes.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'


def line(points, colour, width=1.8, dash=""):
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"'
            + (f' stroke-dasharray="{dash}"' if dash else "") + "/>")


def frame(x, y, width, height):
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="none" stroke="#999"/>'


def ticks(low, high, log):
    """About five round values in [low, high]: 1, 2, 5 times powers of 10; on a log axis powers of 2 or 10."""
    if log:
        base = 2 if high / low < 1000 else 10
        exponents = range(math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9) + 1)
        return [base ** e for e in exponents][::1 + len(exponents) // 7]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class Panel:
    """Axes in a box at (left, top) with the given limits; `parts` collects what is drawn."""

    def __init__(self, left, top, width, height, x, y, title="", x_label="", y_label="", log_x=False,
                 log_y=False):
        self.box, self.limits, self.logs, self.parts = (left, top, width, height), (x, y), (log_x, log_y), []
        for value in ticks(*x, log_x):
            at = self.x(value)
            self.parts += [line([(at, top), (at, top + height)], "#e6e6e6", 1),
                           text(at, top + height + 16, f"{value:g}")]
        for value in ticks(*y, log_y):
            at = self.y(value)
            self.parts += [line([(left, at), (left + width, at)], "#e6e6e6", 1),
                           text(left - 6, at + 4, f"{value:g}", "end")]
        self.parts += [frame(left, top, width, height),
                       text(left + width / 2, top - 8, title, font_weight="bold"),
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
        """Points (x, y), joined; one point alone is a larger dot."""
        at = [(self.x(x), self.y(y)) for x, y in points]
        self.parts.append(line(at, colour, **how))
        size = 2.6 if len(at) > 1 else 5
        if marks:
            self.parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{colour}"/>' for x, y in at]

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


def load(name, out):
    """(model with averaged weights, cfg, corpus) of a row of the table, or of the run folder `out` itself."""
    Paper, Cfg, _, _ = bench.paper(name)
    run = out if (out / "ckpt.pt").exists() else out / name
    return common.load_run(Paper, Cfg, common.start_world(), run)[:3]


def record(name, out, n, steps, seed):
    """(frames [K, n, L], corpus): the guess after every step of one sampling run, the result last."""
    (model, _, corpus), frames = load(name, out), []

    def keep(k, tokens):
        frames.append(tokens.cpu().clone())
    ids = common.draw(model, corpus, n, steps, seed, micro=n, watch=keep)
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
    total, parts = o["seconds"] + 3.0, []                           # the result stays for three seconds
    longest = max(len("".join(characters(corpus, row))) for row in frames[-1])
    width, height = 40 + round(8.43 * longest), 52 + 26 * n
    for k, frame in enumerate(frames):
        rows = []
        for i in range(n):
            runs = []
            for token, stays in zip(characters(corpus, frame[i]), (since[i] <= k).tolist()):
                if not runs or runs[-1][0] != stays:
                    runs.append([stays, ""])
                runs[-1][1] += token
            spans = "".join(escape(t) if stays else f'<tspan class="c">{escape(t)}</tspan>'
                            for stays, t in runs)
            rows.append(f'<text class="t" x="20" y="{56 + 26 * i}" xml:space="preserve">{spans}</text>')
        done = round((width - 40) * (k + 1) / len(frames))
        bar = f'<rect x="20" y="{height - 10}" width="{done}" height="3" fill="#1f77b4"/>'
        kind = "l" if k == len(frames) - 1 else "f"
        parts.append(f'<g class="{kind}" style="animation-delay:{k * dt:.2f}s">{"".join(rows)}{bar}</g>')
    share, rest = 100 * dt / total, 100 * (3.0 + dt) / total
    style = (f".t{{{MONO};font-size:14px;white-space:pre}}.c{{fill:#c9b18f}}"
             f".f,.l{{opacity:0;animation:f {total:.2f}s step-end infinite}}.l{{animation-name:l}}"
             f"@keyframes f{{0%{{opacity:1}}{share:.3f}%{{opacity:0}}}}"
             f"@keyframes l{{0%{{opacity:1}}{rest:.3f}%{{opacity:0}}}}"
             "@media(prefers-reduced-motion:reduce){.f{animation:none}.l{animation:none;opacity:1}}")
    name = bench.NAMES[o["paper"]]
    title = f"{name}: {o['steps']} steps from noise to text; light characters will still change"
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
            scale = f"translate({left} {top}) scale({size / L:.4f} {size / K:.4f})"
            parts.append(f'<path transform="{scale}" d="{path}" fill="{colour}" '
                         'shape-rendering="crispEdges"/>')
        parts += [frame(left, top, size, size),
                  text(left + size / 2, top - 10, bench.NAMES[name], font_weight="bold"),
                  text(left + size / 2, top + size + 18, f"position, 1 to {L}"),
                  text(left - 6, top + 10, 1, "end"), text(left - 6, top + size, K, "end")]
    turn = 18, top + size / 2
    parts.append(text(*turn, "sampling step", transform=f"rotate(-90 {turn[0]} {turn[1]})"))
    note = "colour: the guess is final; grey: it is the final token but will change; white: another"
    parts.append(text(46, top + size + 42, note, "start"))
    return document(max(720, 52 + len(names) * (size + 26)), top + size + 56, parts)


def table_rows(out):
    rows = bench.finished_rows(out)
    if not rows:
        raise data.UserError(f"no finished row under {out}: python tests/bench.py table --out={out}")
    return rows


def curves(o):
    """Bound (autoregressive: exact) on validation text against tokens trained."""
    rows, series = table_rows(o["out"]), {}
    for row in rows:
        cfg = row["config"]
        points = [(r["step"] * cfg["batch"] * cfg["length"] / 1e6, r["value"])
                  for r in common.read_metrics(o["out"] / row["name"]) if "value" in r]
        if points:
            series[row["name"]] = points
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
    rows = table_rows(o["out"])
    samples = {r["name"]: sorted((int(k), s) for k, s in r["samples"].items()) for r in rows}
    held_out, unigram = (rows[0]["references"][k] for k in ("held-out text", "unigram text"))
    steps, cells = zip(*(pair for pairs in samples.values() for pair in pairs))
    ppl = [math.exp(s["nll"]) for s in (*cells, held_out, unigram)]
    entropy = [s["entropy"] for s in (*cells, held_out)]
    x = min(steps) * 0.8, max(steps) * 1.25
    left = Panel(62, 34, 330, 280, x, (min(ppl) * 0.8, max(ppl) * 1.25), "judge perplexity", "sampling steps",
                 log_x=True, log_y=True)
    right = Panel(450, 34, 330, 280, x, (min(entropy) - 0.1, max(entropy) + 0.15),
                  "entropy of a sample, nats", "sampling steps", log_x=True)
    left.level(math.exp(held_out["nll"]), "held-out text")
    left.level(math.exp(unigram["nll"]), "unigram text")
    right.level(held_out["entropy"], "held-out text")
    for name, points in samples.items():
        left.curve([(k, math.exp(s["nll"])) for k, s in points], COLOURS[name])
        right.curve([(k, s["entropy"]) for k, s in points], COLOURS[name])
    return document(960, 370, left.parts + right.parts + legend(800, 50, samples))


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
    c = model.cfg                               # ELF: t is logit-normal, sigma the noise scale
    t = torch.sigmoid(c.denoiser_p_mean + c.denoiser_p_std * torch.special.ndtri(1 - u))
    return 2 * torch.log(c.denoiser_noise_scale * (1 - t) / t)


SCHEDULES = dict(langflow="learned: a Gumbel law", replaid="learned: a monotone net",
                 flm="fixed by the vocabulary", nfdm="learned: process and times", elf="fixed: logit-normal")


def schedules(o):
    """Noise level against its quantile in training, for each paper, before and after training."""
    names, parts = finished(o["out"], bench.PAPERS), []
    u = torch.linspace(0.005, 0.995, 100, dtype=torch.float64)
    for j, name in enumerate(names):
        model, cfg, corpus = load(name, o["out"])
        fresh, values = common.build(type(model), cfg, common.World()), []
        for m in (fresh, model.cpu()):
            x = m.embed(corpus.rows("val", range(16))["tokens"]) if name == "nfdm" else None
            values.append(noise_levels(name, m, u, x).tolist())
        limits = min(map(min, values)) - 0.5, max(map(max, values)) + 0.5
        p = Panel(62 + j * 210, 50, 160, 200, (0, 1), limits, bench.NAMES[name],
                  "quantile of the training noise", "-log SNR" if j == 0 else "")
        p.curve(zip(u.tolist(), values[0]), "#aaa", marks=False, dash="4 3")
        p.curve(zip(u.tolist(), values[1]), COLOURS[name], marks=False, width=2.5)
        parts += p.parts + [text(142 + j * 210, 26, SCHEDULES[name])]
    note = ("grey: at the start; colour: after training. Embeddings differ in width and norm: compare "
            "shapes, not levels, between panels")
    parts.append(text(40, 314, note, "start"))
    return document(max(860, 40 + 210 * len(names)), 328, parts)


FIGURES = dict(watch=watch, settle=settle, curves=curves, frontier=frontier, schedules=schedules)


def main(argv):
    verb = argv[0] if argv else "--help"
    if verb not in (*FIGURES, "all"):
        print(__doc__)
        return 0 if verb == "--help" else 2
    try:
        o = bench.options(argv[1:], out="out/bench", to=str(bench.ROOT / "tests" / "figures"),
                          paper="langflow", n=4, steps=48, seed=0, seconds=7.0)
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
