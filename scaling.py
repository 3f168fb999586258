"""Scaling laws: from a handful of small runs to the next big one, with honest error bars.

    python scaling.py                                # recovers a known law from noisy runs
    python scaling.py fit runs.jsonl --predict 1e21 1e22     # three methods side by side, plots
    python scaling.py plan --budget-minutes 20               # which runs to make
    python scaling.py sweep --budget-minutes 20 --out sweep  # make them, fit, predict, check
    python scaling.py coordinate-check                       # muP: do activations keep their scale?
    python scaling.py learning-rates                         # muP: does the best rate stay put?
    python scaling.py account --model gpt2-xl --tokens 9e9 --gpu h100 --gpus 8

Follows Kaplan et al. 2020 (arXiv:2001.08361), Hoffmann et al. 2022 (Chinchilla, 2203.15556) and its
replication by Besiroglu et al. 2024 (2404.10102), Muennighoff et al. 2023 (repeated data,
2305.16264), Yang et al. 2022 (muP, 2203.03466), McCandlish et al. 2018 (gradient noise, 1812.06162)
and DeepSeek-AI 2024 (2401.02954). N parameters, D tokens, C FLOPs of training, L loss in nats.
"""

import argparse
import csv
import json
import math
import os
import sys
import time
from collections import namedtuple
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

import numpy as np

# ---- runs --------------------------------------------------------------------------------------

NAMES = {  # column of a run -> what people call it
    "N": ("N", "n", "parameters", "params", "num_parameters"),
    "D": ("D", "d", "tokens", "num_tokens", "train_tokens"),
    "C": ("C", "c", "compute_budget", "compute", "flops", "budget"),
    "L": ("L", "loss", "final_loss", "val_loss"),
}


def make_runs(records, source="runs"):
    """Records (dicts) -> runs: a numpy record array with the columns N, D, C and L.

    Of N, D and C two are enough: C = 6 N D. Raises ValueError that names the missing column, or the
    first row that cannot be a run.
    """
    def number(value):
        try:
            return float(value)
        except (TypeError, ValueError):
            return math.nan

    def column(names):
        name = next((n for n in names if records and n in records[0]), None)
        return name and np.array([number(r.get(name)) for r in records])

    N, D, C, L = map(column, NAMES.values())
    missing = ["L"] * (L is None) + ["two of N, D, C"] * (sum(v is None for v in (N, D, C)) > 1)
    if missing:
        names = "; ".join(f"{column}: {' or '.join(names[2:4])}" for column, names in NAMES.items())
        raise ValueError(f"{source}: {len(records)} runs without {' and '.join(missing)} ({names})")
    N = C / (6 * D) if N is None else N
    D = C / (6 * N) if D is None else D
    C = 6 * N * D if C is None else C
    bad = ~np.all([np.isfinite(v) & (v > 0) for v in (N, D, C, L)], axis=0)
    if bad.any():
        raise ValueError(f"{source}: run {int(np.argmax(bad)) + 1} has a value that is not a "
                         f"positive number; remove it or train it again ({bad.sum()} such)")
    return np.rec.fromarrays([N, D, C, L], names="N,D,C,L")


def read_runs(path):
    """Runs of a .json (a list), .jsonl or .csv file. Raises ValueError as `make_runs` does."""
    text = Path(path).read_text()
    try:
        if str(path).endswith(".csv"):
            records = list(csv.DictReader(text.splitlines()))
        elif str(path).endswith(".jsonl"):
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = json.loads(text or "[]")
        if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
            raise ValueError("not a list of runs")
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    return make_runs(records, str(path))


def by_budget(runs):
    """The runs of each compute budget, in order of size; a step of 5 % in C begins another one."""
    runs = runs[np.argsort(runs.C, kind="stable")]
    starts = np.flatnonzero(np.diff(np.log(runs.C)) > 0.05) + 1
    return [here[np.argsort(here.N)] for here in np.split(runs, starts)]


# ---- power laws and IsoFLOP curves -------------------------------------------------------------


class PowerLaw(namedtuple("PowerLaw", "coefficient exponent")):
    """y = coefficient * x ** exponent"""

    def __call__(self, x):
        return self.coefficient * np.asarray(x, float) ** self.exponent


def fit_power_law(x, y):
    """Least squares of log y on log x: `PowerLaw`. Raises ValueError without two different x."""
    x, y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    if len(x) < 2 or np.ptp(x) == 0:
        raise ValueError(f"a power law needs two different budgets, {len(np.unique(x))} given: add "
                         "runs at another compute budget")
    slope, intercept = np.polyfit(x, y, 1)
    return PowerLaw(float(np.exp(intercept)), float(slope))


def isoflop_minima(runs, method="quadratic"):
    """The size of lowest loss at each compute budget (Hoffmann's approach 2).

    "min" takes the lowest run, as it is. "quadratic" fits L = a (ln N)^2 + b ln N + c to a budget's
    runs and takes the bottom of the parabola, -b / 2a. Returns a record array like runs, a row a
    budget, with a column `edge`: true where the best size is the smallest or largest of its budget,
    or beyond, so that its true place is not known. Raises ValueError with fewer than three sizes.
    """
    minima = []
    for here in by_budget(runs):
        x, budget, best = np.log(here.N), here.C.min(), int(np.argmin(here.L))
        n, loss, edge = here.N[best], here.L[best], best in (0, len(x) - 1)
        if method == "quadratic":
            if len(np.unique(x)) < 3:
                raise ValueError(f"a parabola needs three sizes at a budget, {budget:.3g} FLOPs "
                                 f"has {len(np.unique(x))}: add runs of other sizes there")
            a, b, c = np.polyfit(x, here.L, 2)
            bottom = -b / (2 * a) if a > 0 else math.nan
            edge = not x[0] < bottom < x[-1]
            if not edge:
                n, loss = math.exp(bottom), c - b * b / (4 * a)
        minima.append((n, budget / (6 * n), budget, loss, edge))
    return np.rec.fromrecords(minima, names="N,D,C,L,edge")


def envelope(curves, points=200):
    """Approach 1: the lowest loss that any run has reached at each amount of compute.

    curves: a list of (N, tokens (S,), losses (S,)), one training curve each, losses smoothed.
    Only compute (6 N tokens) from where two runs had begun to where but one was left counts.
    Returns rows as `isoflop_minima` does. Raises ValueError where no two curves overlap.
    """
    C = [6 * n * np.asarray(d, float) for n, d, _ in curves]
    low, high = (sorted(c[end] for c in C)[nth] if len(C) > 1 else math.nan
                 for end, nth in ((0, 1), (-1, -2)))
    if not low < high:
        raise ValueError("an envelope needs two curves with some compute in common: add runs of "
                         "other sizes, or log earlier losses")
    grid = np.geomspace(low, high, points)
    losses = np.array([np.interp(grid, c, np.asarray(y, float), np.inf, np.inf)
                       for c, (_, _, y) in zip(C, curves)])  # (runs, points)
    sizes = np.array([n for n, _, _ in curves])
    N = sizes[losses.argmin(0)]
    edge = np.isin(N, (sizes.min(), sizes.max()))
    return np.rec.fromarrays([N, grid / (6 * N), grid, losses.min(0), edge], names="N,D,C,L,edge")


# ---- minimising many small functions at once ---------------------------------------------------


@np.errstate(all="ignore")  # a trial step may overflow: it is then not taken
def batched_bfgs(f, x, iterations=200, tolerance=1e-9):
    """Minimise S independent functions of P numbers together (Nocedal & Wright, algorithm 6.1).

    f(x (S, P), rows (S,)) -> values (S,), gradients (S, P); `rows` says which functions x belongs
    to. Each iteration tries one step in every row: taken where f falls enough (Armijo's rule), else
    shorter the next time. A row without progress starts again from the steepest descent; it is done
    when that gains nothing either, or its gradient is below `tolerance`. Returns (x, values).
    """
    x, S, eye = x.copy(), len(x), np.eye(x.shape[1])
    value, grad = f(x, np.arange(S))
    H = np.tile(eye, (S, 1, 1))  # inverse Hessians; the identity after a restart
    fresh, length, alive = np.ones(S, bool), np.full(S, np.inf), np.arange(S)
    for _ in range(iterations):
        step = -np.einsum("spq,sq->sp", H[alive], grad[alive])
        first = np.where(fresh[alive], 0.1 / (np.abs(step).max(1) + 1e-300), 1.0)
        length[alive] = np.minimum(length[alive], np.minimum(first, 1.0))
        trial = x[alive] + length[alive, None] * step
        v, dv = f(trial, alive)
        good = v <= value[alive] + 1e-4 * length[alive] * (step * grad[alive]).sum(1)
        won, lost, v, dv = alive[good], alive[~good], v[good], dv[good]
        s, y, gain = trial[good] - x[won], dv - grad[won], value[won] - v
        x[won], value[won], grad[won] = trial[good], v, dv
        length[won], length[lost] = np.inf, 0.4 * length[lost]
        # H <- (I - r s y') H (I - r y s') + r s s', r = 1 / s'y; a fresh H is first I s'y / y'y
        sy = (s * y).sum(1)
        scale = np.where(fresh[won], sy / (y * y).sum(1), 1.0)[:, None, None]
        r, s, y = 1 / sy[:, None, None], s[:, :, None], y[:, None, :]
        left = eye - r * s * y
        new = left @ (H[won] * scale) @ left.transpose(0, 2, 1) + r * s * s.transpose(0, 2, 1)
        curved = sy > 1e-14
        H[won[curved]] = new[curved]
        stuck = np.concatenate([won[~(gain >= tolerance * np.abs(v))], lost[length[lost] < 1e-10]])
        done = np.concatenate([stuck[fresh[stuck]], won[np.abs(dv).max(1) < tolerance]])
        fresh[won], fresh[stuck] = False, True
        H[stuck], length[stuck] = eye, np.inf
        alive = np.setdiff1d(alive, done)
        if not len(alive):
            break
    return x, value


def huber(r, delta):
    """Huber's loss over delta, and its derivative: r^2 / 2 delta inside, |r| - delta / 2 outside.

    Divided by delta it is of the size of |r|: the mean of the plain form is about 1e-6 here, below
    the default tolerances of solvers, which is how a published fit stopped early (Besiroglu 2024).
    """
    a = np.abs(r)
    return np.where(a <= delta, r * r / (2 * delta), a - delta / 2), np.clip(r / delta, -1, 1)


# ---- the loss as a function of parameters and tokens -------------------------------------------


class ChinchillaFit(namedtuple("ChinchillaFit", "E A B alpha beta objective", defaults=[0.0])):
    """L(N, D) = E + A / N^alpha + B / D^beta, with the objective's value at the fit."""


HOFFMANN = ChinchillaFit(1.69, 406.4, 410.7, 0.34, 0.28)  # as published, Chinchilla's own


def chinchilla_objective(runs, weights, delta):
    """f for batched_bfgs: sum_i w_i Huber(log L_hat_i - log L_i), weights (S, n) or (1, n).

    Parameters (a, b, e, alpha, beta): log L_hat = logsumexp(a - alpha n, b - beta d, e) with n and
    d the logs of N and D less their means, so that a hardly depends on alpha, and b on beta.
    """
    n, d, target = np.log(runs.N), np.log(runs.D), np.log(runs.L)
    n, d = n - n.mean(), d - d.mean()

    def f(x, rows):
        a, b, e, alpha, beta = (x[:, i:i + 1] for i in range(5))  # (S, 1)
        u, v = np.exp(a - alpha * n), np.exp(b - beta * d)  # (S, n)
        w = weights[rows] if len(weights) > 1 else weights
        total = u + v + np.exp(e)
        value, slope = huber(np.log(total) - target, delta)
        slope = w * slope / total
        u, v = slope * u, slope * v
        return (w * value).sum(1), np.stack(
            [u.sum(1), v.sum(1), (slope * np.exp(e)).sum(1), -(u @ n), -(v @ d)], 1)

    return f


def to_fit(x, runs, value):
    """One row of centred parameters -> ChinchillaFit."""
    a, b, e, alpha, beta = x
    with np.errstate(over="ignore"):  # the fit to a poor sample may be no law at all
        A, B = np.exp((a + alpha * np.log(runs.N).mean(), b + beta * np.log(runs.D).mean()))
    return ChinchillaFit(*map(float, (np.exp(e), A, B, alpha, beta, value)))


def enough_runs(N, D, L, parameters):
    """N, D, L (n,) as runs. Raises ValueError if so many parameters cannot be fitted to them."""
    runs = make_runs([dict(N=n, D=d, L=y) for n, d, y in zip(N, D, L)])
    sizes, lengths = len(np.unique(runs.N)), len(np.unique(runs.D))
    if len(runs) < parameters or sizes < 2 or lengths < 2:
        raise ValueError(f"{parameters} parameters cannot be fitted to {len(runs)} runs of {sizes} "
                         "sizes: add runs of other sizes and tokens")
    return runs


def fit_chinchilla(N, D, L, delta=1e-3):
    """Hoffmann's approach 3: `ChinchillaFit` to N parameters, D tokens and losses L, each (n,).

    162 starts differ in how the loss divides at the mean run and in the exponents. All go 60
    iterations together, the best ten of them to the end. Raises ValueError with fewer than five
    runs, or when all have one size or one number of tokens.
    """
    runs, starts, slopes = enough_runs(N, D, L, 5), [], (0.1, 0.35, 0.7)
    for e, share, alpha, beta in product((0.3, 0.6, 0.95), (0.02, 0.2, 1.0), slopes, slopes):
        a, b, c = np.log(runs.L.min() * np.array((share, (1.02 - e) / 2, e)))
        starts += [(a, b, c, alpha, beta), (b, a, c, alpha, beta)]
    f = chinchilla_objective(runs, np.ones((1, len(runs))), delta)
    x, value = batched_bfgs(f, np.array(starts), 60)
    best = np.argsort(np.where(np.isfinite(value), value, np.inf))[:10]
    x, value = batched_bfgs(f, x[best], 4000, 1e-12)
    return to_fit(x[value.argmin()], runs, value.min())


class KaplanFit(namedtuple("KaplanFit", "Nc Dc alphaN alphaD")):
    """L(N, D) = ((Nc / N)^(alphaN / alphaD) + Dc / D)^alphaD (Kaplan et al., equation 1.5)."""


def fit_kaplan(N, D, L, delta=1e-3):
    """Kaplan's form by the same Huber loss on log L: it has no irreducible loss."""
    runs = enough_runs(N, D, L, 4)
    n, d, target = np.log(runs.N), np.log(runs.D), np.log(runs.L)

    def f(x, rows):  # parameters: log Nc - mean of n, log Dc - mean of d, log alphaN, log alphaD
        c, e, aN, aD = x[:, :1], x[:, 1:2], np.exp(x[:, 2:3]), np.exp(x[:, 3:])
        u, v = aN / aD * (c + n.mean() - n), e + d.mean() - d
        m = np.logaddexp(u, v)
        p = np.exp(u - m)  # the share of the size term
        value, slope = huber(aD * m - target, delta)
        grads = (p * aN, (1 - p) * aD, aD * p * u, aD * (m - p * u))
        return value.sum(1), np.stack([(slope * g).sum(1) for g in grads], 1)

    far, slow = (0, 10, 20, 30), np.log((0.03, 0.1, 0.3))
    x, value = batched_bfgs(f, np.array(list(product(far, far, slow, slow))), 2000)
    c, e, aN, aD = x[np.nanargmin(value)]
    with np.errstate(over="ignore"):
        return KaplanFit(*map(float, np.exp((c + n.mean(), e + d.mean(), aN, aD))))


def effective_data(D, unique, R_star=15.39):
    """Tokens of fresh data worth as much as D tokens drawn from `unique` (Muennighoff, eq. 5).

    U + U R* (1 - exp(-R / R*)), R = D / U - 1 repetitions: four epochs count nearly in full.
    """
    unique = np.minimum(D, unique)
    return unique + unique * R_star * (1 - np.exp(-(D / unique - 1) / R_star))


def predict_loss(fit, N, D, unique=None):
    """Loss (nats) of N parameters on D tokens; of which only `unique` are different, if given."""
    D = np.asarray(D, float) if unique is None else effective_data(np.asarray(D, float), unique)
    if isinstance(fit, KaplanFit):
        return ((fit.Nc / N) ** (fit.alphaN / fit.alphaD) + fit.Dc / D) ** fit.alphaD
    return fit.E + fit.A / np.asarray(N, float)**fit.alpha + fit.B / D**fit.beta


def compute_optimal(fit, C):
    """(N, D, loss) of least loss at C = 6 N D FLOPs (Hoffmann, equation 4).

    N = G (C / 6)^(beta / (alpha + beta)), G = (alpha A / beta B)^(1 / (alpha + beta)).
    """
    C = np.asarray(C, float)
    with np.errstate(all="ignore"):  # not a number where the exponents are not positive
        G = np.float64(fit.alpha * fit.A / (fit.beta * fit.B)) ** (1 / (fit.alpha + fit.beta))
        N = G * (C / 6) ** (fit.beta / (fit.alpha + fit.beta))
        return N, C / (6 * N), predict_loss(fit, N, C / (6 * N))


# ---- error bars --------------------------------------------------------------------------------


def interval(values, level=0.95):
    """(low, high) percentiles along the first axis that hold `level` of the values; NaNs left out.

    >>> interval(range(101), 0.9)
    (5.0, 95.0)
    """
    tail = 50 * (1 - level)
    return tuple(np.nanpercentile(np.asarray(values, float), [tail, 100 - tail], axis=0))


def bootstrap(runs, statistic, samples=1000, seed=0):
    """statistic(runs) -> (K,) of resampled runs, resampling within each budget: (samples, K).

    Samples that `statistic` refuses with a ValueError (fewer than three sizes left at a budget) are
    left out. Raises ValueError when that is all of them.
    """
    rng, groups, values = np.random.default_rng(seed), by_budget(runs), []
    for _ in range(samples):
        sample = [here[rng.integers(len(here), size=len(here))] for here in groups]
        with suppress(ValueError):
            values.append(statistic(np.concatenate(sample).view(np.recarray)))
    if not values:
        raise ValueError("no bootstrap sample can be fitted: add runs, five sizes at every budget")
    return np.array(values)


def bootstrap_chinchilla(runs, samples=4000, delta=1e-3, seed=0):
    """Fits to resampled runs, 250 at once: list of `ChinchillaFit`, `samples` long.

    Each starts from the fit to all runs. A sample is a row of weights, how often each run was
    drawn (multinomial), so that the logs of N and D are shared.
    """
    whole = fit_chinchilla(runs.N, runs.D, runs.L, delta)
    n, d = np.log(runs.N).mean(), np.log(runs.D).mean()
    start = np.array([math.log(whole.A) - whole.alpha * n, math.log(whole.B) - whole.beta * d,
                      math.log(whole.E), whole.alpha, whole.beta])
    weights = np.random.default_rng(seed).multinomial(
        len(runs), np.full(len(runs), 1 / len(runs)), samples).astype(float)  # (samples, n)
    fits = []
    for w in np.split(weights, range(250, samples, 250)):
        f = chinchilla_objective(runs, w, delta)
        x, values = batched_bfgs(f, np.tile(start, (len(w), 1)), 3000, 1e-8)
        fits += [to_fit(row, runs, v) for row, v in zip(x, values)]
    return fits


# ---- the three methods side by side ------------------------------------------------------------


def size_law(fit):
    """The power law of N in C that a `ChinchillaFit` amounts to: `PowerLaw`."""
    return PowerLaw(float(compute_optimal(fit, 1.0)[0]), fit.beta / (fit.alpha + fit.beta))


def analyse(runs, budgets, path, samples=500, drop_edges=False):
    """Fit by three methods, print what each says at `budgets` with 95 % intervals, draw to `path`.

    Returns (ChinchillaFit, its bootstrap samples).
    """
    print(f"{len(runs)} runs, {len(by_budget(runs))} budgets from {runs.C.min():.3g} to "
          f"{runs.C.max():.3g} FLOPs")
    laws, ranges = {}, {}  # by method; ranges of the exponent and of N at each budget: (1 + K,)

    def law_of(minima):
        minima = minima[~minima.edge] if drop_edges else minima
        return fit_power_law(minima.C, minima.N)

    def numbers(law):
        return [law.exponent, *law(budgets)]

    for method, label in (("min", "lowest run"), ("quadratic", "parabola in ln N")):
        minima = isoflop_minima(runs, method)
        if minima.edge.any():
            at = ", ".join(f"{c:.3g}" for c in minima.C[minima.edge])
            print(f"warning: {method}: the best size is the smallest or largest run at {at} FLOPs; "
                  + ("left out" if drop_edges else "add sizes there, or --drop-edges"))
        laws[label] = law_of(minima)
        ranges[label] = interval(bootstrap(
            runs, lambda r, method=method: numbers(law_of(isoflop_minima(r, method))), samples))
    fit = fit_chinchilla(runs.N, runs.D, runs.L)
    fits = bootstrap_chinchilla(runs, samples)
    laws["L(N, D), Huber"] = size_law(fit)
    ranges["L(N, D), Huber"] = interval([numbers(size_law(f)) for f in fits])
    for i, name in enumerate(["exponent of N in C", *(f"N at {c:.3g} FLOPs" for c in budgets)]):
        print(f"\n{name:<24}{'':>12}  95 %")
        for label, (low, high) in ranges.items():
            print(f"  {label:<22}{numbers(laws[label])[i]:>12.4g}  {low[i]:.4g} to {high[i]:.4g}")
    print_law(runs, budgets, fit, fits)
    draw(runs, laws, fit, fits, path)
    return fit, fits


def print_law(runs, budgets, fit, fits):
    """The law's parameters, what it says at `budgets`, and how well it and Kaplan's form fit."""
    print("\nL(N, D) = E + A / N^alpha + B / D^beta")
    for name in ("E", "A", "B", "alpha", "beta"):
        low, high = interval([getattr(f, name) for f in fits])
        print(f"  {name:<6}{getattr(fit, name):>12.5g}  {low:.4g} to {high:.4g}")
    for c in budgets:
        n, d, loss = compute_optimal(fit, c)
        low, high = interval([compute_optimal(f, c)[2] for f in fits])
        print(f"  at {c:.3g} FLOPs: {n:.4g} parameters, {d:.4g} tokens ({d / n:.1f} each), "
              f"loss {loss:.4f} ({low:.4f} to {high:.4f})")
    kaplan = fit_kaplan(runs.N, runs.D, runs.L)
    print(f"scatter of the runs about it {scatter(runs, fit):.2%}; about Kaplan's form, alphaN "
          f"{kaplan.alphaN:.3f}, alphaD {kaplan.alphaD:.3f}, no irreducible loss: "
          f"{scatter(runs, kaplan):.2%}")


@np.errstate(all="ignore")  # a form that does not fit at all may overflow
def scatter(runs, fit):
    """Deviation of the runs' log losses from the fit: noise, and what the form cannot follow."""
    return np.std(np.log(runs.L / predict_loss(fit, runs.N, runs.D)))


@contextmanager
def figure(path, panels):
    """A row of `panels` axes, written to the PNG file `path` at the end."""
    from matplotlib.figure import Figure
    drawing = Figure((5.4 * panels, 4.6), dpi=100, layout="tight")
    axes = drawing.subplots(1, panels)
    yield axes
    for axis in axes:
        axis.legend(fontsize=7)
    drawing.savefig(f"{path}.tmp", format="png")
    os.replace(f"{path}.tmp", path)
    print(f"{path}: the plots")


def draw(runs, laws, fit, fits, path):
    """IsoFLOP curves with their minima, N_opt and D_opt against C, the loss surface: one PNG."""
    minima = isoflop_minima(runs)
    with figure(path, 3) as (iso, opt, surface):
        for i, here in enumerate(by_budget(runs)):
            color = (i / len(minima), 0.3, 0.6)
            iso.plot(here.N, here.L, "o", color=color, ms=4, label=f"{minima.C[i]:.2g} FLOPs")
            x = np.linspace(np.log(here.N[0]), np.log(here.N[-1]), 60)
            parabola = np.polyfit(np.log(here.N), here.L, 2)
            iso.plot(np.exp(x), np.polyval(parabola, x), "-", color=color, lw=0.8)
        iso.plot(minima.N, minima.L, "kx", label="bottom of the parabola")
        iso.set(xscale="log", xlabel="parameters N", ylabel="loss (nats)", title="IsoFLOP curves")
        grid = np.geomspace(minima.C[0], minima.C[-1] * 100, 50)
        for i, (label, law) in enumerate(laws.items()):
            opt.plot(grid, law(grid), color=f"C{i}", label=f"N, {label}: C^{law.exponent:.3f}")
            opt.plot(grid, grid / (6 * law(grid)), "--", color=f"C{i}", lw=0.8)
        opt.fill_between(grid, *interval([compute_optimal(f, grid)[0] for f in fits]), alpha=0.2,
                         color=f"C{i}", label="95 %")
        opt.plot(minima.C, minima.N, "ko", ms=4)
        opt.plot(minima.C, minima.D, "k^", ms=4, label="D (dashed): C / 6N")
        opt.set(xscale="log", yscale="log", xlabel="compute C (FLOPs)", title="best N and D")
        n, d = np.meshgrid(*(np.geomspace(v.min(), v.max()) for v in (runs.N, runs.D)))
        surface.clabel(surface.contour(n, d, predict_loss(fit, n, d), 15), fontsize=7)
        surface.plot(runs.N, runs.D, "k.", ms=3, label="runs")
        surface.set(xscale="log", yscale="log", xlabel="parameters N", ylabel="tokens D",
                    title="fitted loss (nats)")


def synthetic_runs(N, D):
    """Runs of Hoffmann's law with 1 % noise: to try a method, or a plan, on a known truth."""
    noise = np.exp(0.01 * np.random.default_rng(0).standard_normal(len(N)))
    return make_runs([dict(N=n, D=d, L=y) for n, d, y in
                      zip(N, D, predict_loss(HOFFMANN, N, D) * noise)])


def demonstrate(args):
    """Five budgets, nine sizes at each: does the analysis find the law they were made by?"""
    print("No command given: a demonstration on 45 synthetic runs of the law\n"
          "L = 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28 with 1 % noise.\n")
    C = np.repeat((1e19, 3e19, 1e20, 3e20, 1e21), 9)
    N = compute_optimal(HOFFMANN, C)[0] * np.tile(np.geomspace(0.2, 5, 9), 5)
    analyse(synthetic_runs(N, C / (6 * N)), [1e23], args.out, samples=1000)
    n, d, loss = compute_optimal(HOFFMANN, 1e23)
    print(f"\nthe truth: at 1e+23 FLOPs {n:.4g} parameters, {d:.4g} tokens, loss {loss:.4f}, "
          f"exponent {size_law(HOFFMANN).exponent:.4f}\npython scaling.py --help for the commands")


def fit_command(args):
    """Fit runs of a .json, .jsonl or .csv file by three methods, predict and draw."""
    runs = read_runs(args.runs)
    budgets = args.predict or [float(runs.C.max()) * 10]
    analyse(runs, budgets, args.out, args.samples, args.drop_edges)


# ---- what to run -------------------------------------------------------------------------------


def write_whole(path, text):
    """Write beside, then rename: a kill leaves the old file or the new one."""
    Path(f"{path}.tmp").write_text(text)
    os.replace(f"{path}.tmp", path)


class Ledger:
    """An account on disk, in FLOPs or seconds: reserves for a run, then charges what it took."""

    def __init__(self, path, budget=math.inf):
        self.path, self.budget, self.amounts = Path(path), budget, {}  # run -> reserved or charged
        if self.path.exists():
            self.budget, self.amounts = json.loads(self.path.read_text())
            if budget not in (math.inf, self.budget):
                raise ValueError(f"{path}: has a budget of {self.budget:g}, not {budget:g}; use it "
                                 "or another folder")

    def spent(self):
        return sum(self.amounts.values())

    def submit(self, run, amount):
        """Reserve; returns the run's key. ValueError: submitted before, or over budget with it."""
        key = json.dumps(run, sort_keys=True)
        if key in self.amounts:
            raise ValueError(f"this run was submitted before: {key}")
        if self.spent() + amount > self.budget:
            raise ValueError(f"over budget: {self.spent():.4g} of {self.budget:.4g} is spent or "
                             f"reserved, the run asks for {amount:.4g}")
        self.charge(key, amount)
        return key

    def charge(self, key, amount):
        """Replace a run's reservation by what it took."""
        self.amounts[key] = amount
        write_whole(self.path, json.dumps([self.budget, self.amounts], indent=1))


T, B, VOCABULARY = 128, 16, 1024  # of the sweep's models and batches
WIDTHS = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 512)


def model_flags(width):
    """train.py's flags of a model of this width: two layers or more, heads of 16, d_ff 8/3 D."""
    return dict(d_model=width, num_layers=max(2, round(width / 48)), num_heads=width // 16,
                d_ff=8 * width // 3 // 16 * 16, vocab_size=VOCABULARY, context_length=T)


def planned_run(width, C):
    """The run of this width nearest to C FLOPs, in whole steps: dict of C, N, D, steps, width.

    FLOPs are exact, N is without the token table, which computes nothing.
    """
    import torch

    from model import ModelConfig, Transformer
    with torch.device("meta"):
        model = Transformer(ModelConfig(qk_norm=True, tie_embeddings=False, **model_flags(width)))
    flops = model.flops_per_token(T)
    steps, N = max(20, round(C / flops / (B * T))), model.num_parameters(embeddings=False)
    return dict(C=steps * B * T * flops, N=N, D=steps * B * T, steps=steps, width=width)


def plan_runs(flops, budgets=4, sizes=5, ratio=2.5, tokens_per_parameter=20):
    """Runs that spend `flops` in all: `budgets` a factor `ratio` apart, `sizes` models at each.

    Sizes go up and down in steps from the N where D = tokens_per_parameter * N. Returns a list of
    `planned_run`s, the cheapest budget first.
    """
    if sizes > len(WIDTHS) or ratio <= 1:
        raise ValueError(f"--sizes {sizes} --ratio {ratio:g}: there are {len(WIDTHS)} sizes, and "
                         "each budget must be larger than the one before")
    smallest = flops / (sizes * sum(ratio**i for i in range(budgets)))
    planned = []
    for i in range(budgets):
        ladder = [planned_run(w, smallest * ratio**i) for w in WIDTHS]
        off = [abs(math.log(r["D"] / r["N"] / tokens_per_parameter)) for r in ladder]
        first = min(max(0, int(np.argmin(off)) - sizes // 2), len(ladder) - sizes)
        planned += ladder[first:first + sizes]
    return planned


def print_plan(planned, flops_per_second, ratio):
    """The runs, what they cost, and what they will tell: simulated on Hoffmann's law.

    It is of another scale, but intervals depend on where the runs lie more than on the law.
    """
    print(f"{'FLOPs':>10}{'parameters':>12}{'tokens':>12}{'tokens/N':>9}{'width':>6}{'steps':>7}"
          f"{'seconds':>9}")
    for r in planned:
        print(f"{r['C']:>10.3g}{r['N']:>12,}{r['D']:>12,}{r['D'] / r['N']:>9.1f}{r['width']:>6}"
              f"{r['steps']:>7,}{r['C'] / flops_per_second:>9.0f}")
    total = sum(r["C"] for r in planned)
    print(f"{len(planned)} runs, {total:.3g} FLOPs, {total / flops_per_second / 60:.1f} minutes at "
          f"{flops_per_second:.3g} FLOP/s")
    runs = synthetic_runs(*(np.array([r[k] for r in planned], float) for k in "ND"))
    C = ratio * max(runs.C)
    low, high = interval([compute_optimal(f, C) for f in bootstrap_chinchilla(runs, 300)])
    print(f"they will tell, for {C:.3g} FLOPs and runs with 1 % noise, the best size to a factor "
          f"of {(high[0] / low[0]) ** 0.5:.2f} and its loss to {high[2] / low[2] / 2 - 0.5:.1%} "
          "(half of the 95 % interval)")


def plan_command(args):
    """Which small runs to make for a budget, and what they will tell."""
    flops = args.flops or 60 * args.budget_minutes * args.flops_per_second
    planned = plan_runs(flops, args.budgets, args.sizes, args.ratio)
    print_plan(planned, args.flops_per_second, args.ratio)
    lr, batch = deepseek_hyperparameters(flops)
    print(f"for one run of {flops:.3g} FLOPs DeepSeek's fits say: learning rate {lr:.2g}, "
          f"{batch:,.0f} tokens a batch")


# ---- a sweep with train.py ---------------------------------------------------------------------


def data_flags(args):
    return [f"--cache={args.cache}", *(["--data", *args.data] if args.data else [])]


def train_run(run, args, wait=False):
    """The record (dict) of a planned run: read if it is finished, else trained with train.py.

    Runs of one width share a folder: train.py keeps the checkpoint from which the learning rate
    fell (warm-up, stable, decay), so that a longer run branches off there, as if trained alone.
    With `wait` another process is training it.
    """
    import train
    width, steps = run["width"], run["steps"]
    out, done = Path(args.out) / f"{width}", Path(args.out) / f"{width}-{steps}.json"
    while wait and not done.exists():
        time.sleep(1)
    if done.exists():
        return json.loads(done.read_text())
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in model_flags(width).items()]
    flags += [f"--steps={steps}", f"--batch-size={B}", f"--out={out}", f"--dtype={args.dtype}",
              "--eval-every=0", "--save-every=200", "--keep=1", "--compile=off", "--seed=0",
              "--log-every=100000", "--sample-prompts", "--no-tie-embeddings", *data_flags(args)]
    start = time.time()
    train.main(flags)
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    record = run | dict(L=last["val_loss"], bits_per_byte=last["bits_per_byte"],
                        seconds=round(time.time() - start, 1))
    write_whole(done, json.dumps(record))
    return record


def take_share(planned):
    """This process's part of the runs under torchrun, whole widths: (runs, is it the first?).

    train.py, imported later, no longer finds what torchrun has set: every process trains alone.
    """
    rank, world = (int(os.environ.pop(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    widths = sorted({r["width"] for r in planned})
    return [r for r in planned if widths.index(r["width"]) % world == rank], rank == 0


def sweep(args):
    """Train a plan's runs, fit the law on all of them, predict the best larger run, and train it.

    The larger run's budget is `ratio` times the largest of the plan's. A killed sweep goes on
    where it was: every finished run has a file, and train.py continues an unfinished one.
    """
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    planned = plan_runs(60 * args.budget_minutes * args.flops_per_second / 1.5, args.budgets,
                        args.sizes, args.ratio)  # the other third is for the larger run
    mine, first = take_share(planned)
    if not first:
        return [train_run(run, args) for run in mine]
    print_plan(planned, args.flops_per_second, args.ratio)
    ledger = Ledger(out / "budget.json", 1.01 * sum(run["C"] for run in planned))  # in FLOPs
    records = []
    for run in mine + [run for run in planned if run not in mine]:
        key = json.dumps(run, sort_keys=True)
        if key not in ledger.amounts:
            ledger.submit(run, run["C"])
        records.append(train_run(run, args, wait=run not in mine))
        ledger.charge(key, run["C"])
        write_whole(out / "runs.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    check_prediction(make_runs(records), args)


def check_prediction(runs, args):
    """Fit the law to the runs, predict a run `ratio` times larger, train that and compare."""
    C = float(runs.C.max()) * args.ratio
    fit, fits = analyse(runs, [C], Path(args.out) / "scaling.png")
    N = float(compute_optimal(fit, C)[0])
    run = min((planned_run(w, C) for w in WIDTHS), key=lambda r: abs(math.log(r["N"] / N)))
    predicted = float(predict_loss(fit, run["N"], run["D"]))
    low, high = interval([predict_loss(f, run["N"], run["D"]) for f in fits])
    print(f"\nheld-out run: {run['N']:,} parameters, {run['D']:,} tokens, {run['C']:.3g} FLOPs; "
          f"predicted loss {predicted:.4f} ({low:.4f} to {high:.4f})")
    actual = train_run(run, args)["L"]
    print(f"actual loss {actual:.4f}: the prediction is off by {predicted / actual - 1:+.2%}; the "
          f"runs themselves scatter about the fit by {scatter(runs, fit):.2%}")


# ---- muP: rates that transfer across width -----------------------------------------------------


def small_model(width, parametrization, base_width, lr, seed):
    """A two-layer Transformer and its AdamW, in muP ("mup") or as usual ("standard").

    Both start alike: matrices with std fan_in^-1/2, table with 1, head at zero (Yang et al.,
    appendix D.2). They differ in Adam's rates: muP multiplies those of matrices and head, whose
    fan-in grows, by base_width / width (table 3); table and norms keep theirs. Attention heads have
    one size at every width, so attention needs no change.
    """
    import torch

    import train
    from model import ModelConfig, Transformer
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(
        d_model=width, num_layers=2, num_heads=width // 32, d_ff=2 * width, vocab_size=VOCABULARY,
        context_length=64, tie_embeddings=False))
    table, head = model.embed.weight, model.lm_head.weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not table]
    others = [p for p in model.parameters() if p.ndim == 1 or p is table]
    with torch.no_grad():
        for p in matrices:
            p.normal_(std=p.shape[1] ** -0.5) if p is not head else p.zero_()
        table.normal_(std=1.0)
    factor = base_width / width if parametrization == "mup" else 1.0
    return model, train.AdamW([dict(params=matrices, lr=lr * factor), dict(params=others, lr=lr)],
                              lr=lr, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)


def train_small(model, optimizer, steps, batch):
    """Train on batch() -> (inputs, targets), until a loss is not finite: losses in nats, a list."""
    losses = []
    while len(losses) < steps and np.isfinite(losses).all():
        loss = model.loss(*batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def activation_changes(width, parametrization, lr, steps, tokens, base_width, seed):
    """Root mean square of what `steps` steps on one batch change in that batch's activations.

    {name: number} for the last layer's attention and feed-forward, the residual stream, the logits.
    One batch of 128 tokens: updates add up along the directions of its tokens, and with more of
    them than the width they would look random.
    """
    import torch
    model, optimizer = small_model(width, parametrization, base_width, lr, seed)
    rows = np.stack([tokens[1000 * (seed * 4 + i):][:33] for i in range(4)]).astype(np.int64)
    inputs, targets = torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])
    last, seen = model.layers[-1], {}  # name: output of the latest forward pass
    for name, part in dict(attention=last.attn, ffn=last.ffn, residual=last,
                           logits=model.lm_head).items():
        part.register_forward_hook(lambda _, __, y, name=name: seen.update({name: y.detach()}))
    model(inputs)
    before = dict(seen)
    train_small(model, optimizer, steps, lambda: (inputs, targets))
    model(inputs)
    return {n: float((seen[n] - before[n]).square().mean().sqrt()) for n in before}


def corpus_tokens(args, flag):
    """The default corpus of train.py (or --data) as one array of ids."""
    import train
    return np.asarray(train.prepare_data(train.make_parser().parse_args(
        [flag, *data_flags(args)])).train[0])


def by_width(args, columns, measure):
    """Print measure(parametrisation, width, seed) -> [a number a column], averaged over seeds.

    Returns {(parametrisation, width): [a number a column]}.
    """
    table = {}
    for kind in ("standard", "mup"):
        print(f"{kind + ', width':<16}" + "".join(f"{c:>11}" for c in columns))
        for width in args.widths:
            row = np.mean([measure(kind, width, seed) for seed in range(args.seeds)], axis=0)
            print(f"{width:<16}" + "".join(f"{v:>11.4f}" for v in row), flush=True)
            table[kind, width] = row
    return table


def coordinate_check(args):
    """Do activations keep their scale? What a few steps change in them, by width.

    muP's promise is that the change does not depend on width; in the standard one it grows.
    """
    tokens, lr = corpus_tokens(args, f"--vocab-size={VOCABULARY}"), 2.0**-8
    print(f"change after {args.steps} steps of AdamW at {lr:g}, mean of {args.seeds} seeds")
    table = by_width(args, ("attention", "ffn", "residual", "logits"),
                     lambda kind, width, seed: list(activation_changes(
                         width, kind, lr, args.steps, tokens, args.widths[0], seed).values()))
    for kind in ("standard", "mup"):
        rows = np.array([table[kind, width] for width in args.widths])
        print(f"{kind}, max/min".ljust(16), *(f"{v:>10.2f}" for v in rows.max(0) / rows.min(0)))


def learning_rates(args):
    """Does the best learning rate stay put? Loss after short runs, by width and rate; and a plot.

    The loss is the mean of the last tenth of a run. In muP the best rate is the same at all widths.
    """
    import train
    tokens, rates = corpus_tokens(args, f"--vocab-size={VOCABULARY}"), 2.0 ** np.arange(-9.5, -4)

    def final_loss(kind, width, lr, seed):
        np.random.seed(seed)  # the same batches for all
        losses = train_small(*small_model(width, kind, args.widths[0], lr, seed), args.steps,
                             lambda: train.get_batch(tokens, 8, 64, "cpu"))
        return np.mean(losses[-max(1, args.steps // 10):])

    table = by_width(args, [f"{lr:.2g}" for lr in rates], lambda kind, width, seed: [
        final_loss(kind, width, lr, seed) for lr in rates])
    with figure(args.out, 2) as panels:
        for (kind, width), losses in table.items():
            print(f"{kind}, width {width}: best at {rates[np.nanargmin(losses)]:.2g}")
            panel = panels[("standard", "mup").index(kind)]
            panel.plot(rates, losses, "o-", label=f"width {width}")
            panel.set(xscale="log", xlabel="learning rate", ylabel="loss (nats)", title=kind)


# ---- batch size and learning rate --------------------------------------------------------------


def gradient_noise_scale(small, big, b_small, b_big):
    """The simple noise scale tr(Sigma) / |G|^2, in the units of the batch sizes.

    small, big: mean squared norms |g|^2 of gradients over batches of b_small and b_big (McCandlish
    et al., appendix A.1). Batches well below it waste steps, well above it waste data.
    """
    signal = (b_big * big - b_small * small) / (b_big - b_small)
    noise = (small - big) / (1 / b_small - 1 / b_big)
    return noise / signal if signal > 0 else math.inf


def deepseek_hyperparameters(C):
    """(learning rate, batch in tokens) at C FLOPs: DeepSeek LLM's fits, equation 1 there."""
    return 0.3118 * C**-0.125, 0.2920 * C**0.3271


def fit_hyperparameter(C, value, loss, tolerance=0.0025):
    """The power law of a hyperparameter's best value in compute, fitted as DeepSeek LLM does.

    C, value, loss (n,): FLOPs of each run, its learning rate or batch size, its final loss. All
    runs within `tolerance` of their budget's lowest loss count as best: `PowerLaw`.
    """
    C, value, loss = (np.asarray(a, float) for a in (C, value, loss))
    near = loss <= (1 + tolerance) * np.array([loss[C == c].min() for c in C])
    return fit_power_law(C[near], value[near])


def noise(args):
    """Gradient noise scale of a checkpoint on its data, in tokens."""
    import torch

    import train
    from model import Transformer
    model, batches = Transformer.from_pretrained(args.model, dtype=torch.float32), 32
    T = min(model.config.context_length, 256)
    tokens = corpus_tokens(args, f"--tokenizer={args.model}/tokenizer.json")
    np.random.seed(0)
    total, small = 0, []
    for _ in range(batches):
        model.zero_grad()
        model.loss(*train.get_batch(tokens, 4, T, "cpu")).backward()
        grad = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        small.append(grad.square().sum().item())
        total = total + grad
    big = (total / batches).square().sum().item()
    scale = gradient_noise_scale(float(np.mean(small)), big, 4 * T, 4 * T * batches)
    print(f"gradient noise scale of {args.model}: {scale:,.0f} tokens, from {batches} batches of "
          f"{4 * T}")


# ---- accounting --------------------------------------------------------------------------------

# Dense bf16 TFLOP/s, memory in GB, and dollars an hour to rent (2025, an order of magnitude).
GPUS = {"a100": (312, 80, 1.5), "h100": (989, 80, 2.5), "h200": (989, 141, 3.0),
        "b200": (2250, 192, 5.0)}


def account(args):
    """FLOPs, days, dollars and bytes of a training run on named GPUs."""
    from model import count_only
    if args.gpu not in GPUS:
        raise ValueError(f"--gpu {args.gpu}: one of {', '.join(GPUS)}")
    model = count_only(args.model)
    T, D = model.config.context_length, args.tokens
    N, without = model.num_parameters(), model.num_parameters(embeddings=False)
    exact, (peak, memory, price) = model.flops_per_token(T) * D, GPUS[args.gpu]
    seconds = exact / (args.gpus * peak * 1e12 * args.mfu)
    print(f"""\
parameters      {N:,}; {without:,} without token and position tables
FLOPs, exact    {exact:.4g}, attention products at length {T} included
FLOPs, 6ND      {6 * N * D:.4g} with the tables, {6 * without * D:.4g} without
tokens          {D:.4g}, {D / N:.1f} a parameter
time            {seconds / 86400:.3g} days on {args.gpus} x {args.gpu} at {args.mfu:.0%} MFU
cost            {seconds / 3600 * args.gpus * price:,.0f} dollars at {price} an hour each
memory          {16 * N / 1e9:.2f} GB of fp32 weights, gradients and AdamW's two moments; \
{args.gpus} x {memory} GB there""")


# ---- command line ------------------------------------------------------------------------------

FLAGS = dict(  # (default, help); a list takes several values
    predict=([], "FLOPs to predict at; ten times the largest budget without"),
    samples=(500, "bootstrap samples"),
    drop_edges=(False, "leave out budgets whose best size is its smallest or largest"),
    out=("scaling.png", "file of the plots; of a sweep, the folder of its runs"),
    budget_minutes=(20.0, "minutes for the whole sweep"),
    flops=(0.0, "budget in FLOPs, instead of minutes"),
    flops_per_second=(7e10, "training speed of this machine on these models"),
    budgets=(4, "compute budgets"), sizes=(5, "model sizes at each"),
    ratio=(2.5, "between one budget and the next"),
    data=([], "text files, as for train.py; Python's own library without"),
    cache=("data", "folder for tokens"),
    dtype=("auto", "of matrix products, as for train.py"),
    widths=([64, 128, 256, 512], "widths of the models"),
    steps=(4, "steps of a run"), seeds=(4, "runs to average"),
    model=("gpt2-xl", "folder of a checkpoint; for account also gpt2, gpt2-medium, -large, -xl"),
    tokens=(1e11, "training tokens"), gpu=("h100", f"one of {', '.join(GPUS)}"),
    gpus=(8, "how many"), mfu=(0.4, "share of the peak that is reached"))
COMMANDS = {  # (function, its flags, defaults of its own)
    "fit": (fit_command, "predict samples drop_edges out", {}),
    "plan": (plan_command, "budget_minutes flops flops_per_second budgets sizes ratio", {}),
    "sweep": (sweep, "budget_minutes flops_per_second budgets sizes ratio data cache dtype out",
              dict(out="sweep")),
    "coordinate-check": (coordinate_check, "widths steps seeds data cache", {}),
    "learning-rates": (learning_rates, "widths steps seeds data cache out",
                       dict(steps=120, seeds=3, out="learning_rates.png")),
    "noise": (noise, "model data cache", dict(model="out")),
    "account": (account, "model tokens gpu gpus mfu", {}),
}


def positive(text):
    """The number of a flag, an int if it is one; no flag here takes 0 or less."""
    value = int(text) if text.isdecimal() else float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return value


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="scaling.png", help="plots (default: %(default)s)")
    parser.set_defaults(run=demonstrate)
    commands = parser.add_subparsers(title="commands")
    for name, (run, flags, defaults) in COMMANDS.items():
        text = run.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=text, description=text,
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        if run == fit_command:
            command.add_argument("runs", help="file of runs: L and two of N, D, C")
        for flag in flags.split():
            default, text = FLAGS[flag]
            kind = dict(action="store_true") if default is False else dict(
                type=str if isinstance(default, str) or flag == "data" else positive)
            if isinstance(default, list):
                kind["nargs"] = "*"
            command.add_argument(f"--{flag.replace('_', '-')}", default=default, help=text, **kind)
        command.set_defaults(run=run, **defaults)
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"scaling.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
