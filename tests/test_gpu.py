"""What needs a GPU: bf16 heads, compiled blocks, FlexAttention, training steps without a host sync.

Skipped without one, but for the first two tests: they look for the operations that would make a step wait.
"""
import importlib
import pathlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import common

PAPERS = {"langflow": "LangFlow", "replaid": "RePlaid", "flm": "FLM", "nfdm": "NFDM", "elf": "ELF"}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def setup(name, world, **keys):
    """(run, its batches) of a paper's tiny preset."""
    module = importlib.import_module(name)
    Paper = getattr(module, PAPERS[name])
    cfg = common.make_config(module.Config, module.PRESETS, "tiny", dict(length=32, batch=16, **keys))
    corpus = common.load_corpus(Paper, cfg)
    run = common.Run(Paper, cfg, world, corpus, pathlib.Path("/nowhere"))
    return run, common.training_batches(corpus, cfg, world, 0)


class Waits(TorchDispatchMode):
    """Notes the operations whose result the host has to know: .item(), .nonzero(), boolean indexing."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        if name.startswith("index") and name != "index_select":
            if any(i is not None and i.dtype == torch.bool for i in args[1]):
                name = "nonzero"                    # boolean indexing
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero"):
            self.found.add(name)
        return func(*args, **(kwargs or {}))


# LangFlow finds the self-conditioned rows, NFDM checks the ids: on the host, from what never left it.
ON_THE_HOST = {"langflow": {"nonzero"}, "nfdm": {"_local_scalar_dense"}}


@pytest.mark.parametrize("name", PAPERS)
def test_a_loss_asks_the_host_for_nothing(name):
    run, batches = setup(name, common.World())
    with Waits() as waits:
        run.model.loss(next(batches))[0].backward()
    assert waits.found <= ON_THE_HOST.get(name, set())


def test_the_watch_sees_a_wait():
    with Waits() as waits:
        x = torch.arange(4)
        x[x > 1].sum().item()
    assert waits.found == {"nonzero", "_local_scalar_dense"}


def gpu_world():
    torch.cuda.set_device(0)
    return common.World(device=torch.device("cuda", 0))


@needs_gpu
@pytest.mark.parametrize("name", PAPERS)
def test_compiled_bf16_steps_run_without_a_sync_and_learn(name):
    run, batches = setup(name, gpu_world(), steps=60, warmup=0, val_every=0)
    for _ in range(3):                              # compilation may wait
        run.train_step(batches)
    first = run.flush()["loss"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(40):
            run.train_step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    last = run.flush()
    assert last["skipped"] == 0 and last["loss"] < first
    with run.averaged() as model:
        ids = model.sample(2, 32, 4)
    assert ids.shape == (2, 32) and 0 <= int(ids.min()) and int(ids.max()) < run.cfg.vocab


@needs_gpu
def test_heads_in_bf16_agree_with_float64():
    torch.manual_seed(0)
    N, D, V = 4096, 256, 50257
    u, W = torch.randn(N, D, device="cuda").bfloat16(), torch.randn(V, D, device="cuda") / 16
    b, y = torch.randn(V, device="cuda"), torch.randint(V, (N,), device="cuda")
    u.requires_grad_(), W.requires_grad_()
    weight = torch.full((N,), 1 / N, device="cuda")
    loss, nll = common.token_ce(u, W, b, y, weight)
    loss.backward()
    exact = u.detach().double().requires_grad_(), W.detach().bfloat16().double().requires_grad_()
    want = F.cross_entropy(exact[0] @ exact[1].T + b.double(), y)
    want.backward()
    assert abs(loss.item() - want.item()) < 1e-3
    for got, ref in zip((u.grad, W.grad), (exact[0].grad, exact[1].grad)):
        assert ((got - ref).norm() / ref.norm()).item() < 2e-2


@needs_gpu
def test_a_head_never_holds_all_logits():
    N, D, V = 16384, 64, 50257
    u, W = (torch.randn(n, D, device="cuda", requires_grad=True) for n in (N, V))
    b, y = torch.zeros(V, device="cuda"), torch.randint(V, (N,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    common.token_ce(u, W, b, y, torch.ones(N, device="cuda"))[0].backward()
    assert torch.cuda.max_memory_allocated() - before < 0.85 * 4 * N * V       # one float32 [N, V] tensor


@needs_gpu
def test_flex_attention_with_a_softcap_equals_the_explicit_form():
    q, k, v = torch.randn(3, 2, 4, 128, 64, device="cuda").unbind(0)
    flex = torch.compile(common.attention, dynamic=False)
    explicit = common.attention(q, k, v, 50.0, explicit=True)
    torch.testing.assert_close(flex(q, k, v, 50.0), explicit, rtol=2e-2, atol=2e-2)


@needs_gpu
@pytest.mark.parametrize("name", PAPERS)
def test_command_line_on_a_gpu(name, tmp_path, capsys):
    module = importlib.import_module(name)
    run = lambda *argv: common.main(getattr(module, PAPERS[name]), module.Config, module.PRESETS,
                                    [*argv, f"--out={tmp_path / 'run'}"])
    run("--preset=tiny", "--steps=20", "--log_every=10", "--val_every=0", "--sample_every=0")
    run("sample", "--n=2", "--steps=4")
    run("eval", "--rows=32", "--n=4", "--steps=4")
    assert "held-out" in capsys.readouterr().out
