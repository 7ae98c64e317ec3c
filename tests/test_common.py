"""The shared rooms: backbone, vocabulary heads, draws over the global batch, Muon."""
import dataclasses
import types

import pytest
import torch
import torch.nn.functional as F

import common
from conftest import golden


def plain_logits(u, W, b, skip, E, cap):
    z = u @ W.T + b + (0 if skip is None else skip @ E.T)
    return cap * torch.tanh(z / cap) if cap else z


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setitem(common.CHUNK_ELEMENTS, "cpu", 1)        # 64 rows, the least: 150 rows are three chunks


def head_inputs(with_skip, n=150, D=6, De=5, V=11):
    torch.manual_seed(1)
    u, W, b, skip, E = (torch.randn(*s, dtype=torch.float64, requires_grad=True)
                        for s in ((n, D), (V, D), (V,), (n, De), (V, De)))
    y, w = torch.randint(V, (n,)), torch.rand(n, dtype=torch.float64)
    return u, W, b, skip if with_skip else None, E if with_skip else None, y, w


@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_token_ce_equals_the_plain_form(with_skip, cap, small_chunks):
    u, W, b, skip, E, y, w = head_inputs(with_skip)
    params = [p for p in (u, W, b, skip, E) if p is not None]
    want = (w * F.cross_entropy(plain_logits(u, W, b, skip, E, cap), y, reduction="none")).sum()
    grads = torch.autograd.grad(2 * want, params)
    loss, nll = common.token_ce(u, W, b, y, w, skip, E, cap)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    assert not nll.requires_grad
    for got, g in zip(torch.autograd.grad(2 * loss, params), grads):
        torch.testing.assert_close(got, g, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_expected_embedding_equals_the_plain_form(with_skip, cap, small_chunks):
    u, W, b, skip, E, y, w = head_inputs(with_skip)
    values = E if with_skip else torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    params = [p for p in (u, W, b, skip, values) if p is not None]
    z = plain_logits(u, W, b, skip, E, cap)
    want_x, want_nll = z.softmax(-1) @ values, F.cross_entropy(z, y, reduction="none")
    probe = torch.randn_like(want_x)
    grads = torch.autograd.grad((want_x * probe).sum() + (w * want_nll ** 2).sum(), params)
    x_hat, nll = common.expected_embedding(u, W, b, values, skip, E, y, cap)
    torch.testing.assert_close(x_hat, want_x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(nll, want_nll, rtol=1e-12, atol=1e-12)
    for got, g in zip(torch.autograd.grad((x_hat * probe).sum() + (w * nll ** 2).sum(), params), grads):
        torch.testing.assert_close(got, g, rtol=1e-10, atol=1e-10)
    assert torch.equal(common.greedy(u, W, b, skip, E, cap), z.argmax(-1))


def small_dit(**kw):
    torch.manual_seed(0)
    net = common.DiT(32, 2, 2, cond_dim=16, length=8, out=7, **kw).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


def test_explicit_attention_equals_sdpa_and_supports_forward_mode():
    net = small_dit()
    h, t = torch.randn(3, 8, 32, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    torch.testing.assert_close(net(h, net.cond(t), explicit=True), net(h, net.cond(t)))
    f = lambda t: net(h, net.cond(t), explicit=True)
    _, tangent = torch.func.jvp(f, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(tangent, (f(t + 1e-6) - f(t - 1e-6)) / 2e-6, rtol=1e-6, atol=1e-7)


def test_causal_trunk_sees_only_the_past():
    net = small_dit(causal=True)
    h, c = torch.randn(1, 8, 32, dtype=torch.float64), torch.randn(1, 16, dtype=torch.float64)
    later = h.clone()
    later[:, 5:] += 1
    assert torch.equal(net(h, c)[:, :5], net(later, c)[:, :5]) and not torch.equal(net(h, c), net(later, c))
    torch.testing.assert_close(net(h, c), net(h, c, explicit=True))


def test_backbone_depends_on_relative_positions_and_rows_are_independent():
    net = small_dit()
    h, c = torch.randn(2, 8, 32, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
    torch.testing.assert_close(net(h, c)[:1], net(h[:1], c[:1]))
    cos, sin = (x.double() for x in common.rope_tables(20, 16))
    q, k = torch.randn(2, 1, 1, 5, 16, dtype=torch.float64).unbind(0)
    scores = [common.rope(q, cos[i:i + 5], sin[i:i + 5]) @ common.rope(k, cos[i:i + 5], sin[i:i + 5]).mT for i in (0, 9)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-6, atol=1e-6)     # tables are float32


def test_fresh_blocks_are_the_identity():
    net = common.DiT(32, 2, 2, cond_dim=16, length=8, out=7)
    h = torch.randn(2, 8, 32)
    assert torch.equal(net.blocks[0](h, torch.randn(2, 16), net.cos, net.sin), h)


def test_backbone_compiles_without_graph_breaks():
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    net, counter = common.DiT(32, 3, 2, cond_dim=16, length=8, out=7), CompileCounter()
    for block in net.blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    h, c = torch.randn(2, 8, 32), torch.randn(2, 16)
    net(h.requires_grad_(), c).sum().backward()         # training
    with torch.no_grad():
        net(h.detach(), c)                  # self-conditioning pass, sampling
    assert counter.frame_count == 2         # one graph with, one without gradient; shared by all blocks


def test_rows_are_functions_of_the_global_batch():
    whole = common.Rows(3, 7, 0, 24, 24)
    parts = [common.Rows(3, 7, i, 8, 24) for i in (0, 8, 16)]
    for draw in (lambda r: r.uniform(), lambda r: r.subset(4), lambda r: r.roles((0.2, 0.4, 0.4))):
        assert torch.equal(draw(whole), torch.cat([draw(p) for p in parts]))
        assert not torch.equal(draw(whole), draw(dataclasses.replace(whole, step=8)))
    assert torch.equal((whole.uniform() * 24).long().sort().values, torch.arange(24))      # one per stratum
    assert torch.equal(whole.subset(4).view(6, 4).sum(1), torch.ones(6, dtype=torch.int64))
    counts = torch.stack([torch.bincount(common.Rows(0, s, 0, 24, 24).roles((0.2, 0.8)), minlength=2) for s in range(400)])
    assert counts.sum(1).eq(24).all() and abs(counts[:, 0].double().mean() - 4.8) < 0.1    # 4 or 5, 4.8 on average


def test_newton_schulz_gram_form_equals_the_plain_form():
    x = torch.randn(2, 6, 40, dtype=torch.float64)
    y = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-8)
    for _ in range(5):
        A = y @ y.mT
        y = 3.4445 * y + (-4.7750 * A + 2.0315 * A @ A) @ y
    torch.testing.assert_close(common.newton_schulz(x, torch.float64), y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(common.newton_schulz(x.mT, torch.float64), y.mT, rtol=1e-9, atol=1e-9)


def test_muon_skips_a_bad_step_and_is_transposition_invariant():
    torch.manual_seed(0)
    a = torch.nn.Parameter(torch.randn(4, 9))
    b = torch.nn.Parameter(a.detach().T.clone())
    opt = common.Muon([a, b], lr=0.1, transposed=[b])
    for _ in range(3):
        a.grad = torch.randn(4, 9)
        b.grad = a.grad.T.clone()
        opt.step()
    torch.testing.assert_close(a.T, b, rtol=1e-4, atol=1e-5)
    before, state = a.detach().clone(), {k: v.clone() for k, v in opt.state[a].items()}
    a.grad[:] = float("nan")
    opt.found_inf = torch.ones(())
    opt.step()
    assert torch.equal(a, before) and all(torch.equal(v, opt.state[a][k]) for k, v in state.items())


# --- the training step -----------------------------------------------------------------------------

@dataclasses.dataclass
class ToyConfig(common.Config):
    bad_loss: float = 0.0           # added to the loss of step 1


class Toy(torch.nn.Module):
    """Fits w to 1. The loss of step 1 can be made non-finite while its gradient stays as it is."""
    val_keys = ("error",)

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.w = cfg, torch.nn.Parameter(torch.zeros(3))

    def loss(self, batch):
        error = (self.w - 1).square().mean()
        return error + (self.cfg.bad_loss if batch["rows"].step == 1 else 0.0), {"error": error.detach()}


def toy_run(tmp_path, **keys):
    cfg = common.make_config(ToyConfig, {"tiny": {}}, "tiny", dict(steps=4, warmup=0, lr=0.1, batch=4, length=4, **keys))
    run = common.Run(Toy, cfg, common.World(), None, tmp_path)
    batches = iter(lambda: {"rows": common.Rows(0, run.step, 0, 4, 4)}, None)
    return run, batches


def test_a_loss_that_is_not_finite_skips_the_step_even_when_its_gradient_is(tmp_path):
    run, batches = toy_run(tmp_path, bad_loss=float("inf"))
    weights = []
    for _ in range(3):
        run.train_step(batches)
        weights.append(run.model.w.detach().clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    means = run.flush()
    assert means["skipped"] == 1
    assert means["loss"] == means["error"] < 1              # the mean of the two good steps, not inf


def test_a_window_of_skipped_steps_reports_nan_and_counts(tmp_path):
    run, batches = toy_run(tmp_path, bad_loss=float("nan"))
    run.step = 1
    run.train_step(batches)
    means = run.flush()
    assert means["loss"] != means["loss"] and means["skipped"] == 1 and run.bad == 1


def test_score_of_a_paper_without_a_likelihood_is_the_mean_of_its_keys(tmp_path):
    run, _ = toy_run(tmp_path)
    corpus = types.SimpleNamespace(n_rows=lambda split: 10, length=4,
                                   rows=lambda split, i: {"tokens": torch.zeros(len(i), 4, dtype=torch.int64)})
    val = common.score(run.model, corpus, common.World(), 0, 4)
    assert val == {"error": 1.0, "rows": 10}
