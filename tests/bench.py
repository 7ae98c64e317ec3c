"""One backbone, one budget: the five papers and an autoregressive baseline side by side; what the fused heads
and compilation give.

    python tests/bench.py table --preset=bench10-cpu   # train and sample every row, write out/bench/table.md
    python tests/bench.py ar --preset=bench10-cpu      # the autoregressive baseline alone, like a paper file
    python tests/bench.py claims                       # one line per claim, on the table's finished runs
    python tests/bench.py heads --paper=langflow --preset=owt --batch=2   # fused against plain heads
    python tests/bench.py compile --paper=langflow     # eager against compiled blocks
    python tests/bench.py backbone                     # the trunk's step with a fused and with a plain head

`table` keeps finished rows and goes on where it stopped. Times are processor times on a CPU (one thread;
other programs disturb them little) and wall times on a GPU. Ratios are of medians over alternating steps in
one process. Memory is what a step adds to interpreter, weights, averages and optimiser state, in a child
process for each form.
"""
import contextlib
import dataclasses
import gc
import importlib
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common                                               # noqa: E402  (needs the path above)
import data                                                 # noqa: E402

PAPERS = ("langflow", "replaid", "flm", "nfdm", "elf")
NAMES = dict(ar="autoregressive", langflow="LangFlow", replaid="RePlaid", flm="FLM", nfdm="NFDM", elf="ELF",
             fmlm="FMLM")
FMLM = ("--stage=distill", "--lr=1e-3", "--beta2=0.95", "--boundary_prob=4")
STEPS = (1, 4, 16, 64, 256)     # sampling steps of the table
SAMPLES = 64                    # samples behind each cell
ROWS = 512                      # validation sequences behind the bound, at most
SHARED = ("data", "tokenizer", "length", "d_model", "n_layer", "n_head", "mlp_ratio", "batch", "steps")


# --- 1. the autoregressive baseline -------------------------------------------------------------------------


@dataclasses.dataclass
class Config(common.Config):
    """The baseline has no keys of its own."""


_CPU = dict(d_model=64, n_layer=3, n_head=4, cond_dim=64, length=64, gate_init=0.5, batch=32, lr=5e-3,
            warmup=50, lr_schedule="cosine", ema=0.998)
PRESETS = {
    "tiny": dict(_CPU, steps=1600),
    "bench10-cpu": dict(_CPU, steps=5000),
    "bench10": dict(data="wikitext103", tokenizer="gpt2", length=256, d_model=384, n_layer=6, n_head=6,
                    cond_dim=128, gate_init=0.5, batch=64, steps=8000, lr=6e-4, warmup=200,
                    lr_schedule="cosine", ema=0.999),
}


class AR(nn.Module):
    """Next-token prediction by the shared trunk, causal, with time held at 0: the yardstick of the table."""

    def __init__(self, cfg):
        super().__init__()
        self.start = cfg.vocab                      # an extra input row: what stands before the first token
        self.backbone = common.DiT(
            cfg.d_model, cfg.n_layer, cfg.n_head, cfg.cond_dim, cfg.mlp_ratio, cfg.dropout, cfg.length,
            vocab=cfg.vocab + 1, out=cfg.vocab, causal=True, gate_init=cfg.gate_init)
        self.head = self.backbone.output_layer.linear

    def features(self, tokens):
        """u [B, L, D]; u_i has seen the tokens before i and predicts token i."""
        before = torch.cat([torch.full_like(tokens[:, :1], self.start), tokens[:, :-1]], dim=1)
        E = self.backbone.vocab_embed.embedding
        return self.backbone(F.embedding(before, E), self.backbone.cond(E.new_zeros(len(tokens))))

    def loss(self, batch):
        """(cross-entropy in nats per token, no metrics)."""
        tokens, mask, dtype = batch["tokens"], batch.get("mask"), self.head.bias.dtype
        counts = torch.ones_like(tokens, dtype=dtype) if mask is None else mask.to(dtype)   # [B, L]
        length = batch["global_len"].double().mean() if "global_len" in batch else counts.sum(1).mean()
        loss, _ = common.token_ce(self.features(tokens), self.head.weight, self.head.bias, tokens,
                                  counts / (len(tokens) * length))
        return loss, {}

    @torch.no_grad()
    def nll(self, tokens, mask=None):
        """-ln p(tokens) [B] in nats per sequence, exact."""
        _, nll = common.token_ce(self.features(tokens), self.head.weight, self.head.bias, tokens,
                                 torch.ones_like(tokens, dtype=self.head.bias.dtype))
        return dict(nll=(nll if mask is None else nll * mask).sum(1))

    def describe_nll(self):
        return "exact"

    @torch.no_grad()
    def sample(self, n, length, steps, known=None, known_mask=None, watch=None):
        """Ancestral sampling: one network call a token, whatever `steps` says; no cache, so static shapes."""
        tokens = torch.zeros(n, length, dtype=torch.int64, device=self.head.bias.device)
        for i in range(length):
            u = self.features(tokens)[:, i]
            logits = F.linear(u, self.head.weight.to(u.dtype), self.head.bias.to(u.dtype)).double()
            drawn = torch.multinomial(logits.softmax(-1), 1)[:, 0]
            tokens[:, i] = drawn if known is None else torch.where(known_mask[:, i], known[:, i], drawn)
            if watch is not None:
                watch(i, tokens)
        return tokens


# --- 2. papers by name, timing, memory ----------------------------------------------------------------------


def paper(name):
    """(class, Config, PRESETS, module) of a paper file, of `fmlm` (stage 2 of flm.py) or of the baseline."""
    if name not in NAMES:
        raise data.UserError(f"{name}: no such row; one of {', '.join(NAMES)}")
    file = {"fmlm": "flm"}.get(name, name)
    module = sys.modules[__name__] if name == "ar" else importlib.import_module(file)
    cls, = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__
            and issubclass(c, nn.Module) and hasattr(c, "loss") and hasattr(c, "sample")]
    return cls, module.Config, module.PRESETS, module


def options(argv, **defaults):
    """--key=value pairs as a dict, types as those of the defaults."""
    chosen = dict(defaults)
    for arg in argv:
        key, eq, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or not eq or key not in defaults:
            near = common.nearest(key, defaults)
            raise data.UserError(f"unknown option '{arg}'{near}; options: {', '.join(defaults)}")
        chosen[key] = common.parse_value(key, text, type(defaults[key]))
    return chosen


def paper_config(argv, **defaults):
    """(Paper, cfg, module, own options): own options, then any key of the configuration of `--paper=`."""
    own = options([a for a in argv if a.split("=")[0][2:] in defaults], **defaults)
    Paper, Cfg, presets, module = paper(own["paper"])
    rest = [a for a in argv if a.split("=")[0][2:] not in defaults]
    _, overrides, _ = common.parse(["bench", *rest], Paper, Cfg, presets)
    cfg = common.make_config(Cfg, presets, overrides.get("preset", "tiny"), overrides)
    if not cfg.vocab:                           # no corpus is needed: the tokens are random
        cfg.vocab = data.load("prose", length=cfg.length).vocab if cfg.tokenizer == "char" else 50257
    cfg.unigram_entropy = cfg.unigram_entropy or math.log(cfg.vocab)
    if not torch.cuda.is_available():
        torch.set_num_threads(cfg.threads)
    return Paper, cfg, module, own


def bare_run(Paper, cfg, world):
    """A run without corpus or folder: model, averages and optimisers."""
    return common.Run(Paper, cfg, world, None, pathlib.Path(os.devnull))


def one_batch(cfg, world):
    """Stands in for common.training_batches: the same random rows at every step."""
    rows = common.Rows(0, 0, 0, cfg.batch // cfg.accum, cfg.batch // cfg.accum)
    tokens = torch.randint(cfg.vocab, (rows.n_local, cfg.length), device=world.device)
    return itertools.repeat(dict(tokens=tokens, rows=rows))


def seconds(f, world):
    """Processor time of f() on a CPU, wall time to the end of its kernels on a GPU."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
        t0 = time.perf_counter()
        f()
        torch.cuda.synchronize()
        return time.perf_counter() - t0
    t0 = time.process_time()
    f()
    return time.process_time() - t0


def alternate(steps, world, rounds):
    """{name: [seconds] * rounds} of callables that take turns, after one untimed turn each."""
    for f in steps.values():
        f()
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, f in steps.items():
            times[name].append(seconds(f, world))
    return times


def report(times, base):
    """Lines: median and minimum of each variant, and its median over that of `base`."""
    return [f"{name:10}{1e3 * np.median(v):9.1f} ms (min {1e3 * min(v):.1f}), "
            f"{np.median(v) / np.median(times[base]):.2f} of {base}" for name, v in times.items()]


def report_memory(added):
    for name, m in added.items():
        print(f"{name:10}{m / 2 ** 20:9.0f} MiB added by a step, {m / added['plain']:.2f} of plain")


def process_memory(key):
    """VmRSS or VmHWM (its peak) of this process in bytes, on Linux; ru_maxrss would start at the parent's peak."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(key)).split()[1])


def step_memory(step, world):
    """Bytes that two runs of `step` add at their peak; the process must not have had a higher one before."""
    gc.collect()
    gpu = world.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(world.device)
    before = torch.cuda.memory_allocated(world.device) if gpu else process_memory("VmRSS")
    for _ in range(2):
        step()
    return (torch.cuda.max_memory_allocated(world.device) if gpu else process_memory("VmHWM")) - before


def child(*argv):
    """Last line of this file's output when run with argv in a process of its own."""
    out = subprocess.run([sys.executable, __file__, *argv], check=True, capture_output=True, text=True).stdout
    return out.splitlines()[-1]


# --- 3. the table -------------------------------------------------------------------------------------------


def command(name, preset, out, steps):
    """The command line that trains a row, as a user would type it."""
    script = [str(ROOT / "tests" / "bench.py"), "ar"] if name == "ar" else [
        str(ROOT / f"{'flm' if name == 'fmlm' else name}.py")]
    extra = [f"--steps={steps}"] * bool(steps)
    if name == "fmlm":
        extra += [*FMLM, f"--teacher={out / 'flm' / 'ckpt.pt'}"]
    return [*script, f"--preset={preset}", f"--out={out / name}", *extra]


def train_row(name, preset, out, steps):
    """Train a row, or go on with it: dict(cpu_s, wall_s, peak_gb, done), times added up over restarts."""
    file, log = out / f"{name}.usage.json", out / f"{name}.log"
    total = json.loads(file.read_text()) if file.exists() else dict(cpu_s=0.0, wall_s=0.0, peak_gb=0.0)
    if total.get("done"):
        return total
    with open(log, "a") as f:
        t0 = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command(name, preset, out, steps)], stdout=f, stderr=f)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:               # the child got the signal too: it saves and leaves
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    total["cpu_s"] += usage.ru_utime + usage.ru_stime
    total["wall_s"] += time.perf_counter() - t0
    total["peak_gb"] = max(total["peak_gb"], usage.ru_maxrss / 1e6)
    total["done"] = process.returncode == 0
    common.write_atomic(file, json.dumps(total))
    if not total["done"]:
        raise data.UserError(f"{name} stopped with exit code {process.returncode}: "
                             + (log.read_text().splitlines() or ["no output"])[-1] + f" ({log})")
    return total


def judged(corpus, ids):
    """Judge nll in nats per token with its standard error over samples, and entropy, of ids [n, L]."""
    nll = corpus.judge().token_nll(ids).mean(1)
    return dict(nll=float(nll.mean()), se=float(nll.std() / len(nll) ** 0.5), entropy=data.entropy(ids))


def measure(name, out, n=SAMPLES, steps=STEPS, rows=ROWS, iters=20):
    """Everything the table says about a trained row, from its checkpoint: bound, samples, step time, cost."""
    Paper, Cfg, _, _ = paper(name)
    world = common.start_world()
    model, cfg, corpus, folder, step = common.load_run(Paper, Cfg, world, out / name)
    micro, gpu = common.micro_batch(cfg, world), world.device.type == "cuda"
    flops = common.flops_per_token(model, cfg)
    row = dict(name=name, config=dataclasses.asdict(cfg), step=step,
               params=sum(p.numel() for p in model.parameters()), mflop=flops / 1e6,
               torch=torch.__version__, cores=os.cpu_count(), threads=cfg.threads,
               device=torch.cuda.get_device_name() if gpu else "cpu", corpus=corpus.describe())
    if hasattr(model, "nll"):
        row["bound"] = common.score(model, corpus, world, rows, micro)
        row["estimator"] = model.describe_nll() if hasattr(model, "describe_nll") else "SDE bound"
    else:
        row["val"] = common.score(model, corpus, world, rows, micro)
    row["bytes_per_token"] = corpus.bytes_per_token("val")
    row["samples"] = {}
    for k in [cfg.length] if Paper is AR else steps:
        drawn = []
        cost = seconds(lambda: drawn.append(common.draw(model, corpus, n, k, micro=micro)), world)
        row["samples"][str(k)] = dict(judged(corpus, drawn[0]), seconds=cost,
                                      s_per_1000=1e3 * cost / drawn[0].numel())
    row["text"] = common.show(corpus, drawn[0][0])
    total = corpus.n_rows("val")
    held_out = corpus.rows("val", np.linspace(0, total - 1, min(n * 8, total)).astype(int))
    row["references"] = {
        "held-out text": judged(corpus, held_out["tokens"]),
        "unigram text": judged(corpus, corpus.random_rows(n * 8, corpus.length, corpus.unigrams())),
        "uniform noise": judged(corpus, corpus.random_rows(n * 8, corpus.length))}
    del model
    run, batches = bare_run(Paper, cfg, world), one_batch(cfg, world)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    times = [seconds(lambda: run.train_step(batches), world) for _ in range(3 + iters)][3:]
    row["step_ms"] = 1e3 * float(np.median(times))
    row["tok_s"] = cfg.batch * cfg.length / np.median(times)
    row["mfu"] = common.mfu(row["tok_s"] * flops, world).strip()
    if gpu:
        row["gpu_peak_gb"] = common.peak_memory(world)
    return row


def cell(s):
    return f"{s['nll']:.2f} / {math.exp(s['nll']):.1f} / {s['entropy']:.2f}"


def markdown(rows):
    """The table as Markdown from finished rows (dicts as `measure` makes them, with `usage`)."""
    first = rows[0]
    cfg, gpu = first["config"], first["device"] != "cpu"
    differing = [f"{r['name']}: {k}={r['config'][k]}" for r in rows for k in SHARED
                 if r["config"][k] != cfg[k]]
    tokens = cfg["steps"] * cfg["batch"] * cfg["length"]
    memory = "GPU memory" if gpu else "peak memory of the process"
    lines = [
        f"`python tests/bench.py table --preset={cfg['preset']} --steps={cfg['steps']}`", "",
        f"Preset `{cfg['preset']}`, {first['corpus']}. Trunk: {cfg['n_layer']} blocks of width "
        f"{cfg['d_model']}; {cfg['steps']:,} steps of {cfg['batch']} x {cfg['length']} tokens = "
        f"{tokens / 1e6:.1f}M tokens a row. "
        + (f"{first['device']}, torch {first['torch']}." if gpu else
           f"CPU, {first['threads']} thread of {first['cores']} cores, torch {first['torch']}; times are "
           "processor times."),
        "", *["**Not the same budget:** " + "; ".join(differing), ""] * bool(differing),
        f"| model | parameters | MFLOP/token | tokens/s | step |{' MFU |' * gpu} {memory} | training "
        "| bound, nats/token | bits/byte | estimator |", "|---|" + "---:|" * (8 + gpu) + "---|"]
    for r in rows:
        usage, bound = r["usage"], r.get("bound")
        val = ", ".join(f"{k} {v:.3f}" for k, v in r.get("val", {}).items() if k != "rows")
        lines.append(
            f"| {NAMES[r['name']]} | {common.count(r['params'])} | {r['mflop']:.2f} | {r['tok_s']:,.0f} | "
            f"{r['step_ms']:.0f} ms |" + f" {r['mfu'].removeprefix('mfu ')} |" * gpu
            + f" {r.get('gpu_peak_gb', usage['peak_gb']):.2f} GB | "
            f"{common.duration(usage['wall_s' if gpu else 'cpu_s'])} | "
            + (f"{bound['value']:.3f} ± {bound['se']:.3f} | "
               f"{bound['value'] / math.log(2) / r['bytes_per_token']:.2f} | {r['estimator']} |"
               if bound else f"none | none | no bound; {val} |"))
    columns = sorted({int(k) for r in rows for k in r["samples"]})
    titles = [f"{k} step{'s' * (k > 1)}" for k in columns]
    lines += ["", "Samples: judge nll in nats/token / judge perplexity / entropy of a sample in nats. The "
              f"judge is a trigram model fitted on training text; {SAMPLES} samples a cell. Read nll and "
              "entropy together: text that repeats itself is low in both.", "",
              "| model | s per 1,000 tokens | " + " | ".join(titles) + " |",
              "|---|---:|" + "---:|" * len(columns)]
    for r in rows:
        timed = r["samples"].get("64") or r["samples"][max(r["samples"], key=int)]
        cells = [cell(r["samples"][str(k)]) if str(k) in r["samples"] else "" for k in columns]
        lines.append(f"| {NAMES[r['name']]} | {timed['s_per_1000']:.2f} | " + " | ".join(cells) + " |")
    for label, s in first["references"].items():
        lines.append(f"| {label} | | " + " | ".join([cell(s)] + [""] * (len(columns) - 1)) + " |")
    lines += ["", "Seconds are those at 64 steps (autoregressive: a step a token, uncached), samplers the "
              "presets' defaults. The last three rows are validation text, tokens drawn from the training "
              "unigrams and uniform tokens; they have no steps. FMLM is the FLM of this table distilled for as many "
              "steps again.", "",
              "One sample of each row, not chosen, at its largest number of steps:", ""]
    lines += [f"- {NAMES[r['name']]}: `{r['text'].replace('`', ' ')}`" for r in rows]
    return "\n".join(lines) + "\n"


def finished_rows(out):
    files = [out / f"{name}.json" for name in NAMES]
    return [json.loads(f.read_text()) for f in files if f.exists()]


def table(argv):
    """Train, measure and tabulate; finished rows are kept, a stopped one goes on."""
    o = options(argv, preset="bench10-cpu" if not torch.cuda.is_available() else "bench10", out="out/bench",
                papers=",".join(NAMES), steps=0)
    out = pathlib.Path(o["out"])
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in o["papers"].split(","):
        paper(name)
        file = out / f"{name}.json"
        if not file.exists():
            print("python " + " ".join(command(name, o["preset"], out, o["steps"])), flush=True)
            try:
                usage = train_row(name, o["preset"], out, o["steps"])
                row = json.loads(child("row", f"--name={name}", f"--out={out}"))
                common.write_atomic(file, json.dumps({**row, "usage": usage}))
            except (data.UserError, subprocess.CalledProcessError) as e:
                print(f"{e}\n{getattr(e, 'stderr', '') or ''}", file=sys.stderr, flush=True)
                failed += 1
    rows = finished_rows(out)
    if rows:
        common.write_atomic(out / "table.md", markdown(rows))
        print(markdown(rows))
    return 2 if failed else 0


def row(argv):
    o = options(argv, name="ar", out="out/bench")
    with contextlib.redirect_stdout(sys.stderr):
        result = measure(o["name"], pathlib.Path(o["out"]))
    print(json.dumps(result))


# --- 4. claims on finished runs -----------------------------------------------------------------------------

CLAIMS = (      # run, what is varied, options of `sample` or `eval`; nothing is trained here
    ("langflow", "nll", "ODE likelihood, full chain rule (a bound)",
     dict(likelihood="ode", divergence="chain")),
    ("langflow", "nll", "ODE likelihood without self-conditioning (a bound)",
     dict(likelihood="ode", divergence="none")),
    ("langflow", "nll", "ODE likelihood, self-conditioning detached (NOT a bound)",
     dict(likelihood="ode", divergence="detached")),
    ("langflow", "nll", "SDE bound without self-conditioning", dict(divergence="none")),
    ("langflow", "nll", "SDE bound", {}),
    ("langflow", "sample", "16 steps, Euler", dict(steps=16)),
    ("langflow", "sample", "16 steps, Heun (31 calls)", dict(steps=16, solver="heun")),
    ("replaid", "sample", "16 steps, ancestral", dict(steps=16)),
    ("replaid", "sample", "16 steps, DDIM", dict(steps=16, sampler="ddim")),
    ("replaid", "sample", "16 steps, DPM-Solver++ 2M", dict(steps=16, sampler="dpmpp")),
    ("replaid", "sample", "16 steps, ancestral, score temperature 0.9", dict(steps=16, tau=0.9)),
    ("nfdm", "sample", "16 steps, marginal", dict(steps=16)),
    ("nfdm", "sample", "16 steps, ODE", dict(steps=16, sampler="ode")),
    ("elf", "sample", "16 steps, ODE, w = 3", dict(steps=16)),
    ("elf", "sample", "16 steps, ODE, w = 1 (no guidance)", dict(steps=16, w=1.0)),
    ("elf", "sample", "16 steps, SDE, churn 1.5, w = 3", dict(steps=16, sampler="sde")),
    ("elf", "sample", "64 steps, ODE, w = 3", dict(steps=64)),
    ("elf", "sample", "64 steps, SDE, churn 0.25, w = 3", dict(steps=64, sampler="sde", churn=0.25)),
    ("elf", "sample", "64 steps, SDE, churn 1.5, w = 3", dict(steps=64, sampler="sde")),
    ("flm", "sample", "1 step", dict(steps=1)),
    ("fmlm", "sample", "1 step", dict(steps=1)),
    ("fmlm", "sample", "4 steps", dict(steps=4)),
    ("fmlm", "sample", "4 steps, full re-noising", dict(steps=4, churn=1.0)),
)


def claims(argv):
    """One line per claim that finished runs of the table can show; runs that do not exist are named."""
    o = options(argv, out="out/bench", n=SAMPLES, rows=32, papers=",".join(NAMES))
    world, out, loaded = common.start_world(), pathlib.Path(o["out"]), None
    for name, kind, text, how in CLAIMS:
        if name not in o["papers"].split(","):
            continue
        if not (out / name / "ckpt.pt").exists():
            print(f"{name:9}| {text}: no run {out / name}; python tests/bench.py table --papers={name}")
            continue
        if loaded != name:
            Paper, Cfg, _, _ = paper(name)
            model, cfg, corpus, _, _ = common.load_run(Paper, Cfg, world, out / name)
            loaded, micro = name, common.micro_batch(cfg, world)
        if kind == "nll":
            val = common.score(model, corpus, world, o["rows"], micro, **how)
            print(f"{name:9}| {text}: {val['value']:.3f} ± {val['se']:.3f} nats/token, {val['rows']} rows",
                  flush=True)
        else:
            s = judged(corpus, common.draw(model, corpus, o["n"], micro=micro, **how))
            print(f"{name:9}| {text}: judge nll {s['nll']:.2f} ± {s['se']:.2f}, entropy {s['entropy']:.2f}",
                  flush=True)


# --- 5. fused against plain heads ---------------------------------------------------------------------------


def plain_logits(u, W, b, skip, E, cap):
    z = F.linear(u, W.to(u.dtype)).to(b.dtype) + b
    if skip is not None:
        z = z + F.linear(skip.to(b.dtype), E.to(b.dtype))
    return cap * torch.tanh(z / cap) if cap else z


def plain_token_ce(u, W, b, targets, weight, skip=None, E=None, cap=0.0):
    """common.token_ce as one writes it first: logits [..., V], log_softmax, gather."""
    logp = plain_logits(u, W, b, skip, E, cap).log_softmax(-1)
    nll = -logp.gather(-1, targets[..., None])[..., 0]
    return (weight * nll).sum(), nll.detach()


def plain_expected_embedding(u, W, b, values, skip=None, E=None, targets=None, cap=0.0):
    """common.expected_embedding as one writes it first."""
    logp = plain_logits(u, W, b, skip, E, cap).log_softmax(-1)
    nll = None if targets is None else -logp.gather(-1, targets[..., None])[..., 0]
    return logp.exp() @ values, nll


def plain_elbo_head(u, W, b, zb, E, x, w_mse, w_ce, targets, live, chunk=None):
    """replaid.elbo_head by materialised logits; rows that are not live see a constant E."""
    sq, ce = torch.empty_like(x[..., 0]), torch.empty_like(x[..., 0])
    for rows, matrix in ((live.bool(), E), (~live.bool(), E.detach())):
        if rows.any():
            x_hat, nll = plain_expected_embedding(u[rows], W, b, matrix, zb[rows], matrix, targets[rows])
            sq, ce = sq.index_put((rows,), (x[rows] - x_hat).square().sum(-1)), ce.index_put((rows,), nll)
    loss = (w_mse[:, None] * sq).sum() + (w_ce[:, None] * ce).sum()
    return loss, sq.detach(), ce.detach()


def plain_soft_loss(u, head, weight, target, cap, mse=False):
    """flm.soft_loss by materialised logits and targets."""
    logp = plain_logits(u.flatten(0, 1), head.weight, head.bias, None, None, cap).log_softmax(-1)
    q = target(slice(0, len(logp)))
    rows = (logp.exp() - q).square().sum(-1) if mse else -(q * logp).sum(-1)
    return (weight.flatten() * rows).sum(), rows.detach().view(weight.shape)


@contextlib.contextmanager
def form(name, module, cfg):
    """The heads as they are (fused), written out (plain), or FLM as published (vocab: noise in V as well)."""
    swaps = [] if name == "fused" else [
        (common, "token_ce", plain_token_ce), (common, "expected_embedding", plain_expected_embedding)]
    if name != "fused" and hasattr(module, "elbo_head"):
        swaps.append((module, "elbo_head", plain_elbo_head))
    if name != "fused" and hasattr(module, "soft_loss"):
        swaps.append((module, "soft_loss", plain_soft_loss))
    if name == "vocab":
        swaps.append((cfg, "noise", "vocab"))
    kept = [(owner, key, getattr(owner, key)) for owner, key, _ in swaps]
    for owner, key, value in swaps:
        setattr(owner, key, value)
    try:
        yield
    finally:
        for owner, key, value in kept:
            setattr(owner, key, value)


def fill_state(run):
    """Give the optimisers their state, by one step with gradients of zero."""
    for p in run.params:
        p.grad = torch.zeros_like(p)
    for opt in run.optimizers:
        opt.found_inf, opt.grad_scale = torch.zeros((), device=run.world.device), None
        opt.step()
        opt.zero_grad(set_to_none=True)


def heads(argv):
    """Whole training steps with fused and with plain heads: time, and memory added by a step."""
    Paper, cfg, module, o = paper_config(argv, paper="langflow", iters=5, form="")
    world = common.start_world()
    forms = ["fused", "plain"] + ["vocab"] * hasattr(cfg, "noise")
    run, batches = bare_run(Paper, cfg, world), one_batch(cfg, world)

    def step(name):
        with form(name, module, cfg):
            run.train_step(batches)

    if o["form"]:                               # the child: memory of one form
        fill_state(run)
        print(step_memory(lambda: step(o["form"]), world))
        return
    print(f"{o['paper']} preset {cfg.preset}: V {cfg.vocab}, {cfg.batch} x {cfg.length} tokens, "
          f"D {cfg.d_model}, {cfg.n_layer} blocks, "
          f"{common.count(sum(p.numel() for p in run.params))} parameters, {world.device.type}, "
          f"torch {torch.__version__}", flush=True)
    for line in report(alternate({f: lambda f=f: step(f) for f in forms}, world, o["iters"]), "plain"):
        print(line, flush=True)
    del run
    report_memory({f: float(child("heads", *argv, f"--form={f}")) for f in forms})


# --- 6. compilation, backbone -------------------------------------------------------------------------------


def compiled(argv):
    """Training steps with eager and with compiled blocks and heads, alternating."""
    Paper, cfg, _, o = paper_config(argv, paper="langflow", iters=10)
    world, bodies = common.start_world(), ("_ce_chunk", "_embed_chunk", "_embed_grad_chunk")
    batches, runs, heads_of = one_batch(cfg, world), {}, {}
    for name in ("eager", "compiled"):          # compilation replaces the chunk bodies of common's heads
        how = dataclasses.replace(cfg, compile="true" if name == "compiled" else "false")
        runs[name] = bare_run(Paper, how, world)
        heads_of[name] = {f: getattr(common, f) for f in bodies}

    def step(name):
        vars(common).update(heads_of[name])
        runs[name].train_step(batches)

    t0 = time.perf_counter()
    step("compiled")
    print(f"{o['paper']} preset {cfg.preset}: D {cfg.d_model}, {cfg.n_layer} blocks, V {cfg.vocab}, "
          f"{cfg.batch} x {cfg.length}, {world.device.type}, torch {torch.__version__}; "
          f"first step (compiling) {time.perf_counter() - t0:.0f} s", flush=True)
    for line in report(alternate({n: lambda n=n: step(n) for n in runs}, world, o["iters"]), "eager"):
        print(line)


def backbone_step(V, name, world, D=256, L=128, B=8):
    """Forward and backward of the shared trunk with tokens in and their cross-entropy out."""
    torch.manual_seed(0)
    model = common.DiT(D, 4, 4, 128, length=L, vocab=V, out=V, gate_init=0.5).to(world.device)
    model.amp = world.device.type == "cuda"
    tokens = torch.randint(V, (B, L), device=world.device)
    weight = torch.full((B, L), 1 / (B * L), device=world.device)
    ce, head = common.token_ce if name == "fused" else plain_token_ce, model.output_layer.linear

    def step():
        c = model.cond(weight[:, 0])
        u = model(F.embedding(tokens, model.vocab_embed.embedding), c)
        ce(u, head.weight, head.bias, tokens, weight)[0].backward()
        model.zero_grad(set_to_none=True)
    return step


def backbone(argv):
    """The shared trunk with tokens in and cross-entropy out, at a small and at a large vocabulary."""
    o = options(argv, vocab=0, form="", iters=7)
    world = common.start_world()
    if world.device.type == "cpu":
        torch.set_num_threads(1)
    if o["form"]:
        print(step_memory(backbone_step(o["vocab"], o["form"], world), world))
        return
    for V in (1024, 50257) if not o["vocab"] else (o["vocab"],):
        print(f"V {V:,}, width 256, 4 blocks, 8 x 128 tokens, {world.device.type}, torch {torch.__version__}")
        steps = {f: backbone_step(V, f, world) for f in ("fused", "plain")}
        for line in report(alternate(steps, world, o["iters"]), "plain"):
            print(line, flush=True)
        report_memory({f: float(child("backbone", f"--vocab={V}", f"--form={f}")) for f in steps})


def main(argv):
    verbs = dict(table=table, row=row, claims=claims, heads=heads, compile=compiled, backbone=backbone)
    if argv and argv[0] == "ar":
        return common.main(AR, Config, PRESETS, argv[1:])
    if not argv or argv[0] not in verbs:
        print(__doc__)
        return 0 if argv in ([], ["--help"]) else 2
    try:
        return verbs[argv[0]](argv[1:]) or 0
    except data.UserError as e:
        print(f"bench: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
