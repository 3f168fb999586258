"""scaling.py against known laws, finite differences, brute force and hand-made tables."""

import json
import math

import numpy as np
import pytest
import torch

import scaling

TRUTH = scaling.ChinchillaFit(1.8, 480.0, 2085.0, 0.35, 0.37)


def law_runs(noise=0.0, seed=0, sizes=7, spread=4.0, budgets=(1e18, 1e19, 1e20)):
    rng, rows = np.random.default_rng(seed), []
    for C in budgets:
        for N in scaling.compute_optimal(TRUTH, C)[0] * np.geomspace(1 / spread, spread, sizes):
            D = C / (6 * N)
            loss = 1.8 + 480.0 / N**0.35 + 2085.0 / D**0.37
            rows.append(dict(N=N, D=D, C=C, L=loss * math.exp(noise * rng.standard_normal())))
    return scaling.make_runs(rows)


# ---- reading -------------------------------------------------------------------------------------


def test_runs_are_read_from_three_formats_under_the_names_people_use(tmp_path):
    course = [{"parameters": 1000, "compute_budget": 6e9, "final_loss": 3.5}] * 2
    (tmp_path / "a.json").write_text(json.dumps(course))
    (tmp_path / "a.jsonl").write_text("".join(
        json.dumps({"N": 1000, "tokens": 1e6, "loss": 3.5}) + "\n\n" for _ in range(2)))
    (tmp_path / "a.csv").write_text("params,flops,val_loss\n1000,6e9,3.5\n1000,6e9,3.5\n")
    for name in ("a.json", "a.jsonl", "a.csv"):
        runs = scaling.read_runs(tmp_path / name)
        assert len(runs) == 2 and [here.C.min() for here in scaling.by_budget(runs)] == [6e9]
        assert (runs.N[0], runs.D[0], runs.C[0], runs.L[0]) == pytest.approx((1000, 1e6, 6e9, 3.5))


@pytest.mark.parametrize("text,words", [
    ("[]", ["without L and two of N, D, C"]),
    ('[{"N": 1e6, "loss": 2.0}]', ["two of N, D, C"]),
    ('[{"N": 1e6, "C": 1e15}]', ["without L", "final_loss"]),
    ('[{"N": 1, "C": 6, "loss": 2}, {"N": 1, "C": 6, "loss": NaN}]', ["run 2"]),
    ('[{"N": -1e6, "C": 1e15, "loss": 2}]', ["run 1", "positive"]),
    ('{"N": 3}', ["not a list of runs"]),
    ('[{"N": 1, "C": 6, "loss": 2}, {"N": 2, "C": 6, "loss": 3}]', ["two different budgets"]),
    ("nonsense", ["Expecting value"]),
    ('[{"N": 1, "C": 6, "loss": 2}, {"N": "big", "C": 6, "loss": 3}]', ["runs.json", "run 2"]),
])
def test_bad_files_end_in_one_line(text, words, tmp_path, capsys):
    (tmp_path / "runs.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        scaling.main(["fit", str(tmp_path / "runs.json"), "--out", str(tmp_path / "p.png")])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert all(w in message for w in words), message


def test_one_budget_says_to_add_another(tmp_path, capsys):
    rows = [{"N": n, "C": 1e15, "loss": (math.log(n) - 14) ** 2 + 3} for n in (5e5, 1e6, 2e6, 4e6)]
    (tmp_path / "runs.json").write_text(json.dumps(rows))
    with pytest.raises(SystemExit):
        scaling.main(["fit", str(tmp_path / "runs.json")])
    assert "add runs at another compute budget" in capsys.readouterr().err


# ---- fits ----------------------------------------------------------------------------------------


def test_power_law_of_an_exact_one():
    law = scaling.fit_power_law([1, 10, 1000], [2, 2 * 10**0.4, 2 * 1000**0.4])
    assert (law.coefficient, law.exponent) == pytest.approx((2, 0.4))
    assert law(100.0) == pytest.approx(2 * 100**0.4)


def test_isoflop_minima_of_exact_parabolas():
    """L = 3 + (ln N - c)^2 with c = 14 and 16.2: the bottoms are known, the lowest runs too."""
    rows = [dict(N=math.exp(x), C=C, L=3 + (x - c) ** 2)
            for C, c in ((1e15, 14.0), (1e17, 16.2)) for x in (12.5, 13.6, 14.7, 15.8, 16.9, 18)]
    runs = scaling.make_runs(rows)
    bottom = scaling.isoflop_minima(runs, "quadratic")
    assert np.log(bottom.N) == pytest.approx([14.0, 16.2]) and bottom.L == pytest.approx([3, 3])
    assert np.log(scaling.isoflop_minima(runs, "min").N) == pytest.approx([13.6, 15.8])
    assert not bottom.edge.any() and bottom.D == pytest.approx(bottom.C / bottom.N / 6)


def test_a_minimum_at_the_edge_is_marked_warned_about_and_left_out(tmp_path, capsys):
    rows = [dict(N=math.exp(x), C=C, L=3 + (x - c) ** 2) for C, c in
            ((1e15, 14.0), (1e16, 15.0), (1e17, 30.0)) for x in (13.0, 14.2, 15.1, 16.0)]
    for method in ("min", "quadratic"):
        edge = scaling.isoflop_minima(scaling.make_runs(rows), method)
        assert edge.edge.tolist() == [False, False, True] and len(edge) == 3
    (tmp_path / "r.json").write_text(json.dumps(rows))
    flags = ["fit", str(tmp_path / "r.json"), "--samples", "20", "--out", str(tmp_path / "p.png")]
    scaling.main(flags)
    assert "1e+17 FLOPs; add sizes there" in capsys.readouterr().out
    scaling.main([*flags, "--drop-edges"])
    out = capsys.readouterr().out
    assert "left out" in out and "0.4343" in out  # (15 - 14) / ln 10: the two others' exponent


def test_chinchilla_recovers_an_exact_law():
    runs = law_runs()
    fit = scaling.fit_chinchilla(runs.N, runs.D, runs.L)
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(fit, name) == pytest.approx(getattr(TRUTH, name), rel=1e-4), name


def test_no_grid_of_starts_beats_the_fit():
    """Random restarts of a slow, plain gradient-free search find nothing lower."""
    runs = law_runs(noise=0.01)
    fit = scaling.fit_chinchilla(runs.N, runs.D, runs.L)
    f = scaling.chinchilla_objective(runs, np.ones((1, len(runs))), 1e-3)
    rng = np.random.default_rng(0)
    x = np.array([[math.log(fit.A) - fit.alpha * np.log(runs.N).mean(),
                   math.log(fit.B) - fit.beta * np.log(runs.D).mean(), math.log(fit.E), fit.alpha,
                   fit.beta]])
    assert f(x, np.array([0]))[0][0] == pytest.approx(fit.objective, rel=1e-6)
    for scale in (1.0, 0.1, 1e-2, 1e-3):
        trials = x + scale * rng.standard_normal((20_000, 5))
        with np.errstate(all="ignore"):
            assert np.nanmin(f(trials, np.arange(20_000))[0]) > fit.objective - 1e-9
    far = x[0] + rng.uniform(-1.0, 1.0, (500, 5)) * (4, 4, 2, 0.5, 0.5)  # 500 other places to start
    assert np.nanmin(scaling.batched_bfgs(f, far, 500)[1]) > fit.objective - 1e-6


@pytest.mark.parametrize("fit, needed", [(scaling.fit_chinchilla, 5), (scaling.fit_kaplan, 4)])
def test_a_fit_needs_as_many_runs_as_it_has_parameters(fit, needed):
    runs = law_runs()[:needed - 1]
    with pytest.raises(ValueError, match=f"{needed} parameters .* {needed - 1} runs of"):
        fit(runs.N, runs.D, runs.L)


def test_gradients_by_finite_differences():
    runs = law_runs(noise=0.05, sizes=4)
    weights = np.random.default_rng(0).integers(0, 3, (2, len(runs))).astype(float)
    f = scaling.chinchilla_objective(runs, weights, 1e-3)
    x, rows = np.array([[0.1, -0.2, 0.4, 0.3, 0.2], [-1.0, 0.5, 0.7, 0.4, 0.6]]), np.arange(2)
    _, grad = f(x, rows)
    for i in range(5):
        h = np.zeros((2, 5))
        h[:, i] = 1e-7
        slope = (f(x + h, rows)[0] - f(x - h, rows)[0]) / 2e-7
        assert slope == pytest.approx(grad[:, i], rel=1e-4, abs=1e-4)


def test_bfgs_on_rosenbrocks_valley():
    def f(x, rows):
        a, b = x.T
        value = (1 - a) ** 2 + (10.0 + rows) * (b - a * a) ** 2
        return value, np.stack([-2 * (1 - a) - 4 * (10.0 + rows) * a * (b - a * a),
                                2 * (10.0 + rows) * (b - a * a)], 1)

    starts = np.random.default_rng(0).uniform(-2, 2, (50, 2))
    x, value = scaling.batched_bfgs(f, starts, 500, 1e-12)
    assert x == pytest.approx(np.ones((50, 2)), abs=1e-4) and value.max() < 1e-8


def test_huber_is_torchs():
    r = np.linspace(-0.01, 0.01, 41)
    theirs = torch.nn.functional.huber_loss(torch.tensor(r), torch.zeros(41, dtype=torch.double),
                                            delta=1e-3, reduction="none")
    assert scaling.huber(r, 1e-3)[0] * 1e-3 == pytest.approx(theirs.numpy())


def test_kaplan_recovers_its_own_law():
    truth = scaling.KaplanFit(8.8e13, 5.4e13, 0.076, 0.095)
    n, d = (g.ravel() for g in np.meshgrid(np.geomspace(1e6, 1e9, 6), np.geomspace(1e8, 1e11, 6)))
    loss = ((8.8e13 / n) ** (0.076 / 0.095) + 5.4e13 / d) ** 0.095
    fit = scaling.fit_kaplan(n, d, loss)
    assert scaling.predict_loss(fit, n, d) == pytest.approx(loss, rel=1e-5)
    assert (fit.alphaN, fit.alphaD) == pytest.approx((truth.alphaN, truth.alphaD), rel=1e-3)


def test_compute_optimal_against_a_search():
    N, D, loss = scaling.compute_optimal(TRUTH, 1e21)
    grid = np.geomspace(1e7, 1e12, 200_001)
    losses = scaling.predict_loss(TRUTH, grid, 1e21 / (6 * grid))
    assert grid[losses.argmin()] == pytest.approx(N, rel=1e-3)
    assert loss == pytest.approx(losses.min()) and 6 * N * D == pytest.approx(1e21)


def test_envelope_of_two_curves_switches_where_they_cross():
    """L = 1 / sqrt(C) falls for both; the larger model starts later and ends lower."""
    tokens = np.geomspace(1e3, 1e6, 400)
    small = (100.0, tokens, np.maximum(4.0, 40 / (6 * 100 * tokens) ** 0.1))
    large = (1000.0, tokens, 55 / (6 * 1000 * tokens) ** 0.12)
    best = scaling.envelope([small, large], 50)
    here = [min(np.interp(c, 6 * n * d, y) for n, d, y in (small, large)) for c in best.C]
    assert best.L == pytest.approx(here) and {100.0, 1000.0} == set(best.N)


def test_an_envelope_needs_curves_that_overlap():
    one, far = (1e6, [1.0, 2.0], [3.0, 2.0]), (1e9, [1.0, 2.0], [3.0, 2.0])
    for curves in ([one], [one, far]):
        with pytest.raises(ValueError, match="in common"):
            scaling.envelope(curves)


def test_repeated_data_counts_less_and_less():
    assert scaling.effective_data(5e9, 1e10) == 5e9  # less than there is: all of it is fresh
    four, forty = scaling.effective_data(np.array([4e9, 40e9]), 1e9)
    assert 0.9 < four / 4e9 < 1 and forty < 16e9  # U + U R* = 16.39e9 at most
    assert forty == pytest.approx(1e9 * (1 + 15.39 * (1 - math.exp(-39 / 15.39))))
    fresh, repeated = (scaling.predict_loss(TRUTH, 1e9, 4e10, unique) for unique in (None, 1e9))
    assert repeated > fresh


# ---- intervals -----------------------------------------------------------------------------------


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """20 repetitions at 95 %: fewer than 16 would happen once in 400 times by chance."""
    hits, truth = 0, float(scaling.compute_optimal(TRUTH, 1e22)[2])
    for seed in range(20):
        runs = law_runs(0.01, seed, sizes=16, spread=20.0, budgets=(1e17, 1e18, 1e19, 1e20, 1e21))
        fits = scaling.bootstrap_chinchilla(runs, 200, seed=seed)
        low, high = scaling.interval([float(scaling.compute_optimal(f, 1e22)[2]) for f in fits])
        hits += low <= truth <= high
        assert high - low < 0.5
    assert hits >= 16


def test_bootstrap_of_a_mean_has_the_textbook_width():
    rng = np.random.default_rng(1)
    L = 3 + 0.1 * rng.standard_normal(400)
    runs = scaling.make_runs([dict(N=1e6, C=1e15, L=v) for v in L])
    samples = scaling.bootstrap(runs, lambda r: [r.L.mean()], 2000)
    (low,), (high,) = scaling.interval(samples)
    assert samples.shape == (2000, 1)
    assert high - low == pytest.approx(2 * 1.96 * L.std() / 20, rel=0.08)


# ---- planning and running ------------------------------------------------------------------------


def test_the_ledger_reserves_charges_and_refuses(tmp_path):
    ledger = scaling.Ledger(tmp_path / "l.json", 100.0)
    key = ledger.submit({"width": 64}, 60.0)
    with pytest.raises(ValueError, match="submitted before"):
        ledger.submit({"width": 64}, 1.0)
    with pytest.raises(ValueError, match="over budget"):
        ledger.submit({"width": 128}, 41.0)
    ledger.charge(key, 30.0)  # it took less than reserved
    again = scaling.Ledger(tmp_path / "l.json")
    again.submit({"width": 128}, 70.0)
    assert again.spent() == 100.0
    with pytest.raises(ValueError, match="has a budget of 100"):
        scaling.Ledger(tmp_path / "l.json", 50.0)


def test_the_plan_spends_its_budget_on_different_models():
    planned = scaling.plan_runs(2e13)
    assert sum(r["C"] for r in planned) == pytest.approx(2e13, rel=0.05)
    assert len({(r["width"], r["steps"]) for r in planned}) == len(planned) == 20
    for run in planned:
        assert run["C"] == pytest.approx(6 * run["N"] * run["D"], rel=0.3)  # attention comes on top


def test_a_sweep_goes_on_where_it_was_and_checks_its_prediction(tmp_path, monkeypatch, capsys):
    """With losses of a known law in train.py's place; the first attempt dies in the seventh run."""
    made = []

    def fake(flags):
        value = dict(f[2:].split("=") for f in flags if "=" in f)
        made.append((value["d-model"], value["steps"]))
        if len(made) == 7:
            raise KeyboardInterrupt
        N = scaling.planned_run(int(value["d-model"]), 1e12)["N"]
        D = int(value["steps"]) * scaling.B * scaling.T
        out = tmp_path / "sweep" / value["out"].split("/")[-1]
        out.mkdir(parents=True, exist_ok=True)
        loss = 1.0 + 40 / N**0.35 + 300 / D**0.4
        (out / "log.jsonl").write_text(json.dumps(dict(val_loss=loss, bits_per_byte=1.0)))

    import train
    monkeypatch.setattr(train, "main", fake)
    flags = ["sweep", "--budget-minutes", "20", "--out", str(tmp_path / "sweep")]
    with pytest.raises(KeyboardInterrupt):
        scaling.main(flags)
    scaling.main(flags)
    assert len(made) == 22 and made[6] == made[7]  # 20, one of them twice, and the held-out one
    steps = {width: [int(n) for w, n in made[:21] if w == width] for width, _ in made}
    assert max(map(len, steps.values())) > 2  # a longer run branches off a shorter one's folder
    assert all(list(n) == sorted(n) for n in steps.values())
    out = capsys.readouterr().out
    error = float(out.split("off by ")[1].split("%")[0])
    assert abs(error) < 0.2 and (tmp_path / "sweep" / "scaling.png").exists()
    assert len(scaling.read_runs(tmp_path / "sweep" / "runs.jsonl")) == 20


def test_a_real_run_is_trained_once(tmp_path):
    lines = [f"{i} and {i + 1} are neighbours." for i in range(3000)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    args = scaling.make_parser().parse_args(
        ["sweep", "--out", str(tmp_path / "s"), "--cache", str(tmp_path / "c"), "--dtype", "fp32",
         "--data", str(tmp_path / "text.txt")])
    (tmp_path / "s").mkdir()
    run = scaling.planned_run(32, 2e10)
    record = scaling.train_run(run, args)
    assert 0 < record["L"] < math.log(scaling.VOCABULARY) and record["N"] == run["N"]
    assert scaling.train_run(run, args) == record


# ---- muP, batch size, accounting -----------------------------------------------------------------


def test_mup_keeps_activations_where_standard_rates_let_them_grow():
    tokens = np.random.default_rng(0).integers(0, scaling.VOCABULARY, 20_000)
    change = {(kind, w): [scaling.activation_changes(w, kind, 2**-8, 4, tokens, 64, s)["logits"]
                          for s in range(2)]
              for kind in ("mup", "standard") for w in (64, 256)}
    assert change["mup", 64] == change["standard", 64]  # the base width is the same model
    ratio = {k: np.mean(change[k, 256]) / np.mean(change[k, 64]) for k in ("mup", "standard")}
    assert 0.8 < ratio["mup"] < 1.2 and ratio["standard"] > 2, ratio


def test_the_sweep_over_rates_prints_a_table_and_draws_it(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n".join(f"{i} and {i + 1} meet." for i in range(3000)))
    scaling.main(["learning-rates", "--widths", "32", "--steps", "2", "--seeds", "1",
                  "--data", str(tmp_path / "text.txt"), "--cache", str(tmp_path / "c"),
                  "--out", str(tmp_path / "rates.png")])
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith("32 ")]
    assert len(rows) == 2 and len(rows[0]) == 7 and rows[0] == rows[1]  # the base width: the same
    assert "mup, width 32: best at" in out and (tmp_path / "rates.png").stat().st_size > 5_000


def test_gradient_noise_scale_of_known_noise():
    """g = G + noise / sqrt(B) per example: |G|^2 = 4, trace of the covariance 1000."""
    rng, d = np.random.default_rng(0), 1000

    def squared(batch):
        g = 2 / math.sqrt(d) + rng.standard_normal((4000, d)) / math.sqrt(batch)
        return (g * g).sum(1).mean()

    scale = scaling.gradient_noise_scale(squared(8), squared(512), 8, 512)
    assert scale == pytest.approx(250, rel=0.1)


def test_hyperparameter_fit_takes_all_runs_that_are_nearly_best():
    """Best rate 0.3 C^-1/8; a flat valley on both sides of it counts, far rates do not."""
    C = np.repeat([1e12, 1e14, 1e16], 5)
    rate = 0.3 * C**-0.125 * np.tile([0.1, 0.9, 1.0, 1 / 0.9, 3.0], 3)
    loss = 2 + np.tile([0.3, 0.001, 0.0, 0.001, 0.5], 3)
    law = scaling.fit_hyperparameter(C, rate, loss)
    assert (law.coefficient, law.exponent) == pytest.approx((0.3, -0.125))
    assert scaling.deepseek_hyperparameters(1e20)[0] == pytest.approx(0.3118 * 10**-2.5)


@pytest.mark.parametrize("words, named", [
    (["plan", "--budgets", "0"], "--budgets"), (["plan", "--flops-per-second", "0"], "--flops-per"),
    (["plan", "--ratio", "1"], "--ratio"), (["plan", "--sizes", "20"], "--sizes"),
    (["account", "--gpus", "0"], "--gpus"), (["account", "--mfu", "-1"], "--mfu"),
    (["fit", "runs.json", "--predict", "1e21", "nan"], "--predict")])
def test_numbers_that_are_none_are_refused_by_name(words, named, capsys):
    with pytest.raises(SystemExit) as end:
        scaling.main(words)
    assert end.value.code == 2 and named in capsys.readouterr().err


def test_processes_share_a_sweep_by_width(monkeypatch):
    planned, shares = scaling.plan_runs(2e13), []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        mine, first = scaling.take_share(planned)
        assert first == (rank == 0)
        shares.append({(r["width"], r["steps"]) for r in mine})
    assert sum(map(len, shares)) == len(planned) == len(set.union(*shares))
    widths = [{w for w, _ in share} for share in shares]
    assert all(a.isdisjoint(b) for a in widths for b in widths if a is not b)


def test_account_prints_the_textbook_figures(capsys):
    scaling.main(["account", "--model", "gpt2-xl", "--tokens", "1e9", "--gpus", "1"])
    out = capsys.readouterr().out
    assert "1,557,611,200" in out and "9.346e+18 with the tables" in out  # 6 N D
    assert "24.92 GB" in out  # 16 bytes a parameter


def test_the_demonstration_recovers_its_law(tmp_path, capsys):
    scaling.main(["--out", str(tmp_path / "demo.png")])
    out = capsys.readouterr().out
    assert "the truth" in out and (tmp_path / "demo.png").stat().st_size > 20_000
