"""The equal-budget driver: the autoregressive row, the plain forms of the heads, the table, the figures."""
import itertools
import json
import math
import types
import xml.etree.ElementTree as ET

import pytest
import torch

import bench
import common
import data
import figures


def small_ar(V=3, L=3, seed=0):
    torch.manual_seed(seed)
    cfg = bench.Config(vocab=V, length=L, d_model=16, n_layer=2, n_head=2, cond_dim=8, gate_init=0.5)
    model = bench.AR(cfg).double().eval()
    for p in model.parameters():                # the head starts at zero: give every weight something to say
        torch.nn.init.normal_(p, std=0.4)
    return model


def all_rows(V, L):
    return torch.tensor(list(itertools.product(range(V), repeat=L)))


def test_autoregressive_probabilities_of_all_sequences_add_up_to_one():
    # fails if a position sees itself or what follows, or if the start token is a token
    p = torch.exp(-small_ar().nll(all_rows(3, 3))["nll"])
    assert p.std() > 0.01
    assert float(p.sum().detach()) == pytest.approx(1, abs=1e-9)


def test_autoregressive_samples_follow_the_model():
    model, n = small_ar(), 5_000
    torch.manual_seed(1)
    rows = model.sample(n, 3, steps=1)
    counts = torch.bincount(rows @ torch.tensor([9, 3, 1]), minlength=27) / n
    p = torch.exp(-model.nll(all_rows(3, 3))["nll"]).detach()
    assert ((counts - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-4).all()


def test_autoregressive_sampling_keeps_known_tokens():
    known, mask = torch.full((4, 3), 2), torch.tensor([True, False, True]).expand(4, 3)
    rows = small_ar().sample(4, 3, steps=1, known=known, known_mask=mask)
    assert (rows[:, 0] == 2).all() and (rows[:, 2] == 2).all()


def test_autoregressive_loss_is_its_nll_per_token():
    model, tokens = small_ar(), all_rows(3, 3)
    loss, _ = model.loss(dict(tokens=tokens))
    assert float(loss.detach()) == pytest.approx(float(model.nll(tokens)["nll"].mean()) / 3, abs=1e-12)


def head_inputs(V=11, D=6, De=4, B=2, L=5):
    g = torch.Generator().manual_seed(0)
    draw = {k: torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True) for k, shape in dict(
        u=(B, L, D), W=(V, D), b=(V,), skip=(B, L, De), E=(V, De)).items()}
    return draw, torch.randint(V, (B, L), generator=g), torch.rand(B, L, generator=g, dtype=torch.float64)


def gradients(loss, inputs):
    return torch.autograd.grad(loss, list(inputs.values()))


def test_plain_heads_compute_what_the_fused_ones_compute():
    # otherwise `heads` would compare two different things
    x, targets, weight = head_inputs()
    for cap in (0.0, 3.0):
        pairs = []
        for ce, embed in ((common.token_ce, common.expected_embedding),
                          (bench.plain_token_ce, bench.plain_expected_embedding)):
            loss, nll = ce(**x, targets=targets, weight=weight, cap=cap)
            x_hat, nll2 = embed(**x, values=x["E"], targets=targets, cap=cap)
            total = loss + x_hat.square().sum() + (weight * nll2).sum()
            pairs.append([loss, nll, x_hat, nll2, *gradients(total, x)])
        for a, b in zip(*pairs):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_plain_elbo_head_computes_what_replaids_computes():
    import replaid
    x, targets, _ = head_inputs()
    x = dict(u=x["u"], W=x["W"], b=x["b"], zb=x["skip"], E=x["E"], x=torch.randn(2, 5, 4, dtype=torch.float64,
                                                                                requires_grad=True))
    w = dict(w_mse=torch.tensor([0.3, 0.7]).double().requires_grad_(), w_ce=torch.tensor([0.5, 0.1]).double())
    pairs = []
    for f in (replaid.elbo_head, bench.plain_elbo_head):
        loss, sq, ce = f(**x, **w, targets=targets, live=torch.tensor([True, False]))
        pairs.append([loss, sq, ce, *gradients(loss, {**x, "w": w["w_mse"]})])
    for a, b in zip(*pairs):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_plain_soft_loss_computes_what_flms_computes():
    import flm
    torch.manual_seed(0)
    head, u = torch.nn.Linear(6, 11).double(), torch.randn(3, 4, 6).double().requires_grad_()
    q, weight = torch.rand(12, 11).double(), torch.rand(3, 4).double()
    for mse in (False, True):
        forms = flm.soft_loss, bench.plain_soft_loss
        a, b = (f(u, head, weight, lambda part: q[part], 5.0, mse) for f in forms)
        torch.testing.assert_close(a, b)
        inputs = dict(u=u, W=head.weight, b=head.bias)
        for x, y in zip(gradients(a[0], inputs), gradients(b[0], inputs)):
            torch.testing.assert_close(x, y)


def test_forms_are_swapped_in_and_put_back():
    import replaid
    cfg, before = types.SimpleNamespace(noise="projected"), (common.token_ce, replaid.elbo_head)
    with pytest.raises(KeyError):
        with bench.form("vocab", replaid, cfg):
            assert common.token_ce is bench.plain_token_ce and replaid.elbo_head is bench.plain_elbo_head
            assert cfg.noise == "vocab"
            raise KeyError
    assert (common.token_ce, replaid.elbo_head) == before and cfg.noise == "projected"


@pytest.mark.parametrize("name", bench.PAPERS)
def test_bench_presets_are_one_budget(name):
    # the point of the table: same corpus, trunk, batch and steps in every row, on both devices
    for preset in ("bench10-cpu", "bench10"):
        reference, (_, Cfg, presets, _) = bench.Config(**bench.PRESETS[preset]), bench.paper(name)
        cfg = Cfg(**presets[preset])
        assert {k: getattr(cfg, k) for k in bench.SHARED} == {k: getattr(reference, k) for k in bench.SHARED}


def quick_row(name, **changes):
    samples = {k: dict(nll=2.5, se=0.1, entropy=2.7, s_per_1000=0.4) for k in ("1", "64")}
    config = {k: 1 for k in bench.SHARED} | dict(preset="p", steps=1000, batch=32, length=64)
    row = dict(name=name, config=config, params=1000, mflop=1.0, tok_s=100.0, step_ms=5.0, mfu="",
               device="cpu", torch="2", threads=1, cores=2, corpus="c", samples=samples, text="a`b",
               bytes_per_token=1.0, usage=dict(cpu_s=61, wall_s=99, peak_gb=0.5),
               references={"held-out text": samples["1"]})
    return row | changes


def test_the_table_names_what_is_not_a_bound_and_not_the_budget():
    rows = [quick_row("langflow", bound=dict(value=2 * math.log(2), se=0.01), estimator="SDE bound"),
            quick_row("elf", val=dict(l2=0.5, ce=2.0, rows=9),
                      config=quick_row("elf")["config"] | dict(batch=16))]
    text = bench.markdown(rows)
    assert "| 1.386 ± 0.010 | 2.00 | SDE bound |" in text
    assert "| none | none | no bound; l2 0.500, ce 2.000 |" in text
    assert "**Not the same budget:** elf: batch=16" in text and "1m01s" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {11, 5}                                    # header, rule and every row agree
    assert "Not the same" not in bench.markdown(rows[:1])


def test_a_finished_row_is_kept_and_a_failed_one_names_its_log(tmp_path, capsys):
    row = quick_row("ar", bound=dict(value=1.0, se=0.1), estimator="exact")
    (tmp_path / "ar.json").write_text(json.dumps(row))
    assert bench.main(["table", f"--out={tmp_path}", "--papers=ar"]) == 0       # nothing is trained
    assert not (tmp_path / "ar.log").exists() and "autoregressive" in (tmp_path / "table.md").read_text()
    assert bench.main(["table", f"--out={tmp_path}", "--papers=langflow", "--preset=nonsense"]) == 2
    assert "exit code 2" in capsys.readouterr().err
    assert bench.main(["table", "--papers=gpt"]) == 2 and bench.main(["table", "--stepz=1"]) == 2


def test_a_row_from_the_command_line_to_the_figures(tmp_path, monkeypatch):
    # train two steps as a user would, measure in process with few samples, draw every figure
    usage = bench.train_row("ar", "bench10-cpu", tmp_path, 2)
    assert usage["done"] and usage["cpu_s"] > 0
    row = bench.measure("ar", tmp_path, n=4, rows=32, iters=1) | dict(usage=usage)
    assert row["references"]["held-out text"]["nll"] < row["references"]["uniform noise"]["nll"]
    assert row["step"] == 2 and list(row["samples"]) == ["64"] and 2 < row["bound"]["value"] < 6
    (tmp_path / "ar.json").write_text(json.dumps(row))
    o = dict(out=tmp_path, paper="ar", n=2, steps=4, seed=0, seconds=1.0)
    for name in ("watch", "settle", "curves", "frontier"):
        svg = figures.FIGURES[name](o)
        assert ET.fromstring(svg).tag.endswith("svg") and len(svg) < 200_000, name
    with pytest.raises(data.UserError, match="no finished run"):
        figures.schedules(o)


def test_settled_from_is_the_first_frame_after_the_last_change():
    frames = torch.tensor([[[1, 2, 3]], [[1, 9, 3]], [[1, 2, 4]], [[1, 2, 3]]])
    assert figures.settled_from(frames).tolist() == [[0, 2, 3]]


def test_ticks_are_round_and_inside():
    assert figures.ticks(1, 256, True) == [1, 2, 4, 8, 16, 32, 64, 128, 256][::2]
    assert figures.ticks(0, 5.12, False) == [0, 1, 2, 3, 4, 5]
