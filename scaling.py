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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

# ---- files -------------------------------------------------------------------------------------


def write_whole(path, text):
    """Write beside, then rename: a kill leaves the old file or the new one."""
    beside = Path(f"{path}.tmp")
    beside.write_text(text)
    os.replace(beside, path)


@contextmanager
def figure(path, panels):
    """A row of `panels` axes, written to the PNG file `path` at the end."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    drawing, axes = plt.subplots(1, panels, figsize=(5.4 * panels, 4.6), dpi=100)
    yield axes
    for axis in axes:
        axis.legend(fontsize=7)
    drawing.tight_layout()
    drawing.savefig(f"{path}.tmp", format="png")
    plt.close(drawing)
    os.replace(f"{path}.tmp", path)


# ---- runs --------------------------------------------------------------------------------------

NAMES = {  # column of a run -> what people call it
    "N": ("N", "n", "parameters", "params", "num_parameters"),
    "C": ("C", "c", "compute_budget", "compute", "flops", "budget"),
    "D": ("D", "d", "tokens", "num_tokens", "train_tokens"),
    "L": ("L", "loss", "final_loss", "val_loss"),
}


@dataclass
class Runs:
    """Runs as columns of equal length: parameters, tokens, training FLOPs, final loss (nats)."""

    N: np.ndarray
    D: np.ndarray
    C: np.ndarray
    L: np.ndarray

    def __len__(self):
        return len(self.N)

    def take(self, rows):
        return Runs(self.N[rows], self.D[rows], self.C[rows], self.L[rows])

    def budgets(self):
        """Compute budgets in rising order; runs within 5 % of each other share one."""
        order = np.sort(self.C)
        first = np.concatenate([[True], np.diff(np.log(order)) > 0.05])
        return order[first]

    def at(self, budget):
        """The runs of one budget, in order of size."""
        rows = np.flatnonzero(np.abs(np.log(self.C / budget)) < 0.05)
        return self.take(rows[np.argsort(self.N[rows])])


def make_runs(records, source="runs"):
    """Records (dicts) -> Runs. Of N, D and C two are enough: C = 6 N D.

    Raises ValueError that names the missing column, or the first row that cannot be a run.
    """
    columns = {}
    for column, names in NAMES.items():
        name = next((n for n in names if records and n in records[0]), None)
        if name:
            columns[column] = np.array([float(r.get(name) or math.nan) for r in records])
    missing = [c for c in "L" if c not in columns]
    missing += ["two of N, D, C"] if sum(c in columns for c in "NDC") < 2 else []
    if missing:
        names = "; ".join(f"{c}: {' or '.join(NAMES[c][2:4])}" for c in "NDCL")
        raise ValueError(f"{source}: {len(records)} runs without {' and '.join(missing)} ({names})")
    if "N" not in columns:
        columns["N"] = columns["C"] / (6 * columns["D"])
    columns.setdefault("D", columns.get("C", math.nan) / (6 * columns["N"]))
    columns.setdefault("C", 6 * columns["N"] * columns["D"])
    bad = ~np.all([np.isfinite(v) & (v > 0) for v in columns.values()], axis=0)
    if bad.any():
        raise ValueError(f"{source}: run {int(np.argmax(bad)) + 1} has a value that is not a "
                         f"positive number; remove it or train it again ({bad.sum()} such)")
    return Runs(**columns)


def read_runs(path):
    """Runs of a .json (a list), .jsonl or .csv file."""
    text = Path(path).read_text()
    try:
        if str(path).endswith(".csv"):
            records = list(csv.DictReader(text.splitlines()))
        elif str(path).endswith(".jsonl"):
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = json.loads(text or "[]")
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise ValueError(f"{path}: not a list of runs")
    return make_runs(records, str(path))


# ---- power laws and IsoFLOP curves -------------------------------------------------------------


@dataclass
class PowerLaw:
    """y = coefficient * x ** exponent"""

    coefficient: float
    exponent: float

    def __call__(self, x):
        return self.coefficient * np.asarray(x, float) ** self.exponent


def fit_power_law(x, y):
    """Least squares of log y on log x: `PowerLaw`. Two points at least."""
    x, y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    if len(x) < 2 or np.ptp(x) == 0:
        raise ValueError(f"a power law needs two different budgets, {len(np.unique(x))} given: add "
                         "runs at another compute budget")
    slope, intercept = np.polyfit(x, y, 1)
    return PowerLaw(float(np.exp(intercept)), float(slope))


@dataclass
class Minima:
    """The best model of each budget: arrays over budgets; `edge` where it lies outside its runs."""

    C: np.ndarray
    N: np.ndarray
    L: np.ndarray
    edge: np.ndarray

    @property
    def D(self):
        return self.C / (6 * self.N)

    def inside(self):
        return Minima(*(getattr(self, k)[~self.edge] for k in ("C", "N", "L", "edge")))


def isoflop_minima(runs, method="quadratic"):
    """The size of lowest loss at each compute budget (Hoffmann's approach 2): `Minima`.

    "min" takes the lowest run, as it is. "quadratic" fits L = a (ln N)^2 + b ln N + c to a budget's
    runs and takes the bottom of the parabola, -b / 2a. Either way a best size at, or beyond, the
    smallest or largest run of its budget is marked as `edge`: its true place is not known.
    """
    rows = []
    for budget in runs.budgets():
        here = runs.at(budget)
        x, y = np.log(here.N), here.L
        best, edge = int(np.argmin(y)), int(np.argmin(y)) in (0, len(y) - 1)
        n, loss = here.N[best], y[best]
        if method == "quadratic":
            if len(np.unique(x)) < 3:
                raise ValueError(f"a parabola needs three sizes at a budget, {budget:.3g} FLOPs "
                                 f"has {len(np.unique(x))}: add runs of other sizes there")
            a, b, c = np.polyfit(x, y, 2)
            bottom = -b / (2 * a) if a > 0 else math.nan
            edge = not x[0] < bottom < x[-1]
            if not edge:
                n, loss = math.exp(bottom), c - b * b / (4 * a)
        rows.append((budget, n, loss, edge))
    C, N, L, edge = zip(*rows)
    return Minima(np.array(C), np.array(N), np.array(L), np.array(edge))


def envelope(curves, points=200):
    """Approach 1: the lowest loss that any run has reached at each amount of compute: `Minima`.

    curves: a list of (N, tokens (S,), losses (S,)), one training curve each, losses smoothed;
    FLOPs are 6 N tokens. Only compute that at least two runs reached counts.
    """
    C = [6 * n * np.asarray(d, float) for n, d, _ in curves]
    low, high = sorted(c[0] for c in C)[1], sorted(c[-1] for c in C)[-2]
    grid = np.geomspace(low, high, points)
    losses = np.array([np.interp(grid, c, np.asarray(y, float), np.inf, np.inf)
                       for c, (_, _, y) in zip(C, curves)])  # (runs, points)
    best = losses.argmin(0)
    sizes = np.array([n for n, _, _ in curves])
    N = sizes[best]
    return Minima(grid, N, losses.min(0), np.isin(N, (sizes.min(), sizes.max())))


# ---- minimising many small functions at once ---------------------------------------------------


@np.errstate(all="ignore")  # a trial step may overflow: it is then not taken
def batched_bfgs(f, x, iterations=200, tolerance=1e-9):
    """Minimise S independent functions of P numbers together (Nocedal & Wright, algorithm 6.1).

    f(x (S, P), rows (S,)) -> values (S,), gradients (S, P); `rows` says which functions x belongs
    to. Every row takes its own step length by backtracking and stops on its own, when its gradient
    or the gain of a restart from the steepest descent is below `tolerance`. Returns (x, values).
    """
    x, (S, P) = x.copy(), x.shape
    value, grad = f(x, np.arange(S))
    H = np.tile(np.eye(P), (S, 1, 1))  # inverse Hessians; the identity after a restart
    fresh, alive = np.ones(S, bool), np.arange(S)
    for _ in range(iterations):
        g, h = grad[alive], H[alive]
        step = -np.einsum("spq,sq->sp", h, g)
        length = np.where(fresh[alive], np.minimum(1.0, 0.1 / (np.abs(step).max(1) + 1e-300)), 1.0)
        new_x, new_value, new_grad = backtrack(f, x[alive], value[alive], g, step, length, alive)
        gain, s, y = value[alive] - new_value, new_x - x[alive], new_grad - g
        sy = (s * y).sum(1)
        ok = sy > 1e-14  # positive curvature; 0 where no step was taken
        H[alive[ok]] = bfgs_update(h[ok], s[ok], y[ok], sy[ok], fresh[alive[ok]])
        stuck = ~(gain >= tolerance * np.abs(new_value))
        done = stuck & fresh[alive] | (np.abs(new_grad).max(1) < tolerance)
        H[alive[stuck]], fresh[alive] = np.eye(P), stuck
        x[alive], value[alive], grad[alive] = new_x, new_value, new_grad
        alive = alive[~done]
        if not len(alive):
            break
    return x, value


def backtrack(f, x, value, grad, step, length, rows):
    """Shorten each row's step until f falls enough (Armijo's rule); rows that never do stay."""
    x, value, new_grad, todo = x.copy(), value.copy(), grad.copy(), np.arange(len(x))
    slope = (step * grad).sum(1)
    for _ in range(25):
        trial = x[todo] + length[todo, None] * step[todo]
        v, dv = f(trial, rows[todo])
        good = v <= value[todo] + 1e-4 * length[todo] * slope[todo]
        won, todo = todo[good], todo[~good]
        x[won], value[won], new_grad[won] = trial[good], v[good], dv[good]
        length[todo] *= 0.4
        if not len(todo):
            break
    return x, value, new_grad


def bfgs_update(H, s, y, sy, fresh):
    """H <- (I - r s y') H (I - r y s') + r s s', r = 1 / s'y; on a first step H = I s'y / y'y."""
    scale = np.where(fresh, sy / (y * y).sum(1), 1.0)
    H = H * scale[:, None, None]
    r = (1 / sy)[:, None, None]
    left = np.eye(s.shape[1]) - r * s[:, :, None] * y[:, None, :]
    return left @ H @ left.transpose(0, 2, 1) + r * s[:, :, None] * s[:, None, :]


def huber(r, delta):
    """Huber's loss over delta, and its derivative: r^2 / 2 delta inside, |r| - delta / 2 outside.

    Divided by delta it is of the size of |r|: the mean of the plain form is about 1e-6 here, below
    the default tolerances of solvers, which is how a published fit stopped early (Besiroglu 2024).
    """
    a = np.abs(r)
    return np.where(a <= delta, r * r / (2 * delta), a - delta / 2), np.clip(r / delta, -1, 1)


# ---- the loss as a function of parameters and tokens -------------------------------------------


@dataclass
class ChinchillaFit:
    """L(N, D) = E + A / N^alpha + B / D^beta, with the objective's value at the fit."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    objective: float = 0.0


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


def chinchilla_starts(runs):
    """162 starting points, (S, 5): how the loss divides at the mean run, and the two exponents."""
    rows, slopes = [], (0.1, 0.35, 0.7)
    for e, share, alpha, beta in product((0.3, 0.6, 0.95), (0.02, 0.2, 1.0), slopes, slopes):
        a, b, c = np.log(runs.L.min() * np.array((share, (1.02 - e) / 2, e)))
        rows += [(a, b, c, alpha, beta), (b, a, c, alpha, beta)]
    return np.array(rows)


def fit_chinchilla(N, D, L, delta=1e-3, starts=None, iterations=400):
    """Hoffmann's approach 3: `ChinchillaFit` to N parameters, D tokens and losses L, each (n,).

    All starts go 60 iterations together, the best ten of them to the end. Raises ValueError with
    fewer than five runs, or when all have one size or one number of tokens.
    """
    runs = make_runs([dict(N=n, D=d, L=y) for n, d, y in zip(N, D, L)])
    if len(runs) < 5 or len(np.unique(runs.N)) < 2 or len(np.unique(runs.D)) < 2:
        raise ValueError(f"five parameters cannot be fitted to {len(runs)} runs of "
                         f"{len(np.unique(runs.N))} sizes: add runs of other sizes and tokens")
    f = chinchilla_objective(runs, np.ones((1, len(runs))), delta)
    x, value = batched_bfgs(f, chinchilla_starts(runs) if starts is None else starts, 60)
    best = np.argsort(np.where(np.isfinite(value), value, np.inf))[:10]
    x, value = batched_bfgs(f, x[best], iterations, 1e-12)
    return to_fit(x[value.argmin()], runs, value.min())


@dataclass
class KaplanFit:
    """L(N, D) = ((Nc / N)^(alphaN / alphaD) + Dc / D)^alphaD (Kaplan et al., equation 1.5)."""

    Nc: float
    Dc: float
    alphaN: float
    alphaD: float


def fit_kaplan(N, D, L, delta=1e-3):
    """Kaplan's form by the same Huber loss on log L: it has no irreducible loss."""
    runs = make_runs([dict(N=n, D=d, L=y) for n, d, y in zip(N, D, L)])
    n, d, target = np.log(runs.N), np.log(runs.D), np.log(runs.L)
    center_n, center_d = n.mean(), d.mean()

    def f(x, rows):  # parameters: log Nc - mean, log Dc - mean, log alphaN, log alphaD
        c, e, aN, aD = x[:, :1], x[:, 1:2], np.exp(x[:, 2:3]), np.exp(x[:, 3:])
        u, v = aN / aD * (c + center_n - n), e + center_d - d
        m = np.logaddexp(u, v)
        p = np.exp(u - m)  # the share of the size term
        value, slope = huber(aD * m - target, delta)
        grads = (p * aN, (1 - p) * aD, aD * p * u, aD * (m - p * u))
        return value.sum(1), np.stack([(slope * g).sum(1) for g in grads], 1)

    far, slow = (0, 10, 20, 30), np.log((0.03, 0.1, 0.3))
    starts = np.array([(c, e, a, b) for c in far for e in far for a in slow for b in slow])
    x, value = batched_bfgs(f, starts, 600)
    c, e, aN, aD = x[np.nanargmin(value)]
    with np.errstate(over="ignore"):
        return KaplanFit(*map(float, np.exp((c + center_n, e + center_d, aN, aD))))


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
    rng, values = np.random.default_rng(seed), []
    groups = [np.flatnonzero(np.abs(np.log(runs.C / c)) < 0.05) for c in runs.budgets()]
    for _ in range(samples):
        rows = np.concatenate([rng.choice(g, len(g)) for g in groups])
        with suppress(ValueError):
            values.append(statistic(runs.take(rows)))
    if not values:
        raise ValueError("no bootstrap sample can be fitted: add runs, five sizes at every budget")
    return np.array(values)


def bootstrap_chinchilla(runs, samples=4000, delta=1e-3, seed=0, block=250):
    """Fits to resampled runs, all at once: list of `ChinchillaFit`, `samples` long.

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
    for w in np.split(weights, range(block, samples, block)):
        f = chinchilla_objective(runs, w, delta)
        x, values = batched_bfgs(f, np.tile(start, (len(w), 1)), 300, 1e-8)
        fits += [to_fit(row, runs, v) for row, v in zip(x, values)]
    return fits


# ---- the three methods side by side ------------------------------------------------------------


def isoflop_law(runs, method, drop_edges=False, warn=False):
    """The power law of N in C through each budget's best size."""
    minima = isoflop_minima(runs, method)
    if warn and minima.edge.any():
        at = ", ".join(f"{c:.3g}" for c in minima.C[minima.edge])
        print(f"warning: {method}: the best size is the smallest or largest run at {at} FLOPs; "
              + ("left out" if drop_edges else "add sizes there, or --drop-edges"))
    minima = minima.inside() if drop_edges else minima
    return fit_power_law(minima.C, minima.N)


def report(runs, budgets, samples=500, drop_edges=False):
    """Print N, D and loss predicted at `budgets` by each method, with 95 % intervals.

    Returns ({method: PowerLaw of N in C}, ChinchillaFit, its bootstrap samples) for drawing.
    """
    print(f"{len(runs)} runs, {len(runs.budgets())} budgets from {runs.C.min():.3g} to "
          f"{runs.C.max():.3g} FLOPs")
    laws, ranges = {}, {}  # by method; ranges of the exponent and of N at each budget: (1 + K,)
    for method, label in (("min", "lowest run"), ("quadratic", "parabola in ln N")):
        def numbers(r, method=method):
            law = isoflop_law(r, method, drop_edges)
            return [law.exponent, *law(budgets)]

        laws[label] = isoflop_law(runs, method, drop_edges, warn=True)
        ranges[label] = interval(bootstrap(runs, numbers, samples))
    fit = fit_chinchilla(runs.N, runs.D, runs.L)
    fits = bootstrap_chinchilla(runs, samples)
    label = "L(N, D), Huber"
    laws[label] = PowerLaw(float(compute_optimal(fit, 1.0)[0]), fit.beta / (fit.alpha + fit.beta))
    ranges[label] = interval([[f.beta / (f.alpha + f.beta), *compute_optimal(f, budgets)[0]]
                              for f in fits])
    for i, name in enumerate(["exponent of N in C", *(f"N at {c:.3g} FLOPs" for c in budgets)]):
        print(f"\n{name:<24}{'':>12}  95 %")
        for label, law in laws.items():
            value, (low, high) = law(budgets[i - 1]) if i else law.exponent, ranges[label]
            print(f"  {label:<22}{value:>12.4g}  {low[i]:.4g} to {high[i]:.4g}")
    print_law(runs, budgets, fit, fits)
    return laws, fit, fits


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


def draw(runs, laws, fit, fits, path):
    """IsoFLOP curves with their minima, N_opt and D_opt against C, the loss surface: one PNG."""
    budgets, minima = runs.budgets(), isoflop_minima(runs)
    with figure(path, 3) as (iso, opt, surface):
        for i, budget in enumerate(budgets):
            here, color = runs.at(budget), (i / len(budgets), 0.3, 0.6)
            iso.plot(here.N, here.L, "o", color=color, ms=4, label=f"{budget:.2g} FLOPs")
            x = np.linspace(np.log(here.N[0]), np.log(here.N[-1]), 60)
            iso.plot(np.exp(x), np.polyval(np.polyfit(np.log(here.N), here.L, 2), x), "-",
                     color=color, lw=0.8)
        iso.plot(minima.N, minima.L, "kx", label="bottom of the parabola")
        iso.set(xscale="log", xlabel="parameters N", ylabel="loss (nats)", title="IsoFLOP curves")
        grid = np.geomspace(budgets[0], budgets[-1] * 100, 50)
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


# ---- what to run -------------------------------------------------------------------------------


class Ledger:
    """An account of compute on disk: reserve when a run is submitted, charge what it took.

    submit() refuses a run submitted before and one whose reservation would pass the budget;
    charge() replaces a reservation by the actual amount. Units are the caller's (seconds, FLOPs).
    """

    def __init__(self, path, budget=None):
        self.path, self.entries, self.budget = Path(path), {}, budget
        if self.path.exists():
            stored = json.loads(self.path.read_text())
            self.entries, self.budget = stored["entries"], stored["budget"]
            if budget not in (None, self.budget):
                raise ValueError(f"{path}: has a budget of {self.budget:g}, not {budget:g}; use it "
                                 "or another folder")
        if self.budget is None:
            raise ValueError(f"{path}: a new ledger needs a budget")

    def spent(self):
        """Charged, or still reserved."""
        return sum(e["reserved"] if e["actual"] is None else e["actual"]
                   for e in self.entries.values())

    def submit(self, run, amount):
        key = json.dumps(run, sort_keys=True)
        if key in self.entries:
            raise ValueError(f"this run was submitted before: {key}")
        if self.spent() + amount > self.budget:
            raise ValueError(f"over budget: {self.spent():.4g} of {self.budget:.4g} is spent or "
                             f"reserved, the run asks for {amount:.4g}")
        self.entries[key] = dict(reserved=amount, actual=None)
        self.save()
        return key

    def charge(self, key, actual):
        self.entries[key]["actual"] = actual
        self.save()

    def save(self):
        write_whole(self.path, json.dumps(dict(budget=self.budget, entries=self.entries), indent=1))


T, B, VOCABULARY = 128, 16, 1024  # of the sweep's models and batches
WIDTHS = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 512)


def model_flags(width):
    """train.py's flags of a model of this width: two layers or more, heads of 16, d_ff 8/3 D."""
    return dict(d_model=width, num_layers=max(2, round(width / 48)), num_heads=width // 16,
                d_ff=8 * width // 3 // 16 * 16, vocab_size=VOCABULARY, context_length=T)


def count(sizes):
    """(parameters without the token table, which computes nothing; exact FLOPs a token)."""
    import torch

    import model as model_py
    config = model_py.ModelConfig(qk_norm=True, tie_embeddings=False, **sizes)
    with torch.device("meta"):
        model = model_py.Transformer(config)
    return model.num_parameters(embeddings=False), model.flops_per_token(T)


def planned_run(width, C):
    """The run of this width nearest to C FLOPs, in whole steps."""
    n, f = count(model_flags(width))
    steps = max(20, round(C / f / (B * T)))
    return dict(C=steps * B * T * f, N=n, D=steps * B * T, steps=steps, width=width)


def plan_runs(flops, budgets=4, sizes=5, ratio=2.5, tokens_per_parameter=20):
    """Runs that spend `flops` in all: `budgets` a factor `ratio` apart, `sizes` models at each.

    Sizes go up and down in steps from the N where D = tokens_per_parameter * N. Returns a list of
    dicts with C, N, D, steps and width, the cheapest budget first.
    """
    smallest = flops / (sizes * sum(ratio**i for i in range(budgets)))
    planned = []
    for i in range(budgets):
        ladder = [planned_run(w, smallest * ratio**i) for w in WIDTHS]
        off = [abs(math.log(r["D"] / r["N"] / tokens_per_parameter)) for r in ladder]
        first = min(max(0, int(np.argmin(off)) - sizes // 2), len(ladder) - sizes)
        planned += ladder[first:first + sizes]
    return planned


def print_plan(planned, flops_per_second, ratio):
    """The runs, what they cost, and what they will tell: simulated with 1 % noise on a known law.

    The law is Hoffmann's, L = 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28: at another scale, but the
    width of an interval depends on where the runs lie more than on the law.
    """
    print(f"{'FLOPs':>10}{'parameters':>12}{'tokens':>12}{'tokens/N':>9}{'width':>6}{'steps':>7}"
          f"{'seconds':>9}")
    for r in planned:
        print(f"{r['C']:>10.3g}{r['N']:>12,}{r['D']:>12,}{r['D'] / r['N']:>9.1f}{r['width']:>6}"
              f"{r['steps']:>7,}{r['C'] / flops_per_second:>9.0f}")
    total = sum(r["C"] for r in planned)
    print(f"{len(planned)} runs, {total:.3g} FLOPs, {total / flops_per_second / 60:.1f} minutes at "
          f"{flops_per_second:.3g} FLOP/s")
    N, D = (np.array([r[k] for r in planned], float) for k in "ND")
    noise = np.exp(0.01 * np.random.default_rng(0).standard_normal(len(N)))
    runs, C = Runs(N, D, 6 * N * D, predict_loss(HOFFMANN, N, D) * noise), 6 * ratio * max(N * D)
    best = [compute_optimal(f, C) for f in bootstrap_chinchilla(runs, 300)]
    low, high = interval(best)
    print(f"they will tell, for {C:.3g} FLOPs and runs with 1 % noise, the best size to a factor "
          f"of {(high[0] / low[0]) ** 0.5:.2f} and its loss to {high[2] / low[2] / 2 - 0.5:.1%} "
          "(half of the 95 % interval)")


# ---- a sweep with train.py ---------------------------------------------------------------------


def train_run(run, args, seed=0):
    """Train one planned run with train.py; returns its record. A finished one is only read.

    Runs of one width share a folder: train.py keeps the checkpoint from which the learning rate
    fell (warm-up, stable, decay), so that a longer run branches off there, as if trained alone.
    """
    import train
    out = Path(args.out) / f"{run['width']}-{seed}"
    done = Path(args.out) / f"{run['width']}-{run['steps']}-{seed}.json"
    if done.exists():
        return json.loads(done.read_text())
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in model_flags(run["width"]).items()]
    flags += [f"--steps={run['steps']}", f"--batch-size={B}", f"--out={out}", f"--seed={seed}",
              f"--cache={args.cache}", "--eval-every=0", "--save-every=200", "--compile=off",
              f"--dtype={args.dtype}", "--log-every=100000", "--sample-prompts", "--keep=1"]
    flags += ["--data", *args.data] if args.data else []
    start = time.time()
    train.main(flags)
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    record = dict(N=run["N"], D=run["D"], C=run["C"], L=last["val_loss"],
                  bits_per_byte=last["bits_per_byte"], width=run["width"], steps=run["steps"],
                  seed=seed, seconds=round(time.time() - start, 1))
    write_whole(done, json.dumps(record))
    return record


def take_share(planned):
    """This process's part of the runs under torchrun, whole widths: (runs, whether it is the first)

    Every process then trains alone, with its share of the cores: several runs at a time.
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
    ledger = Ledger(out / "ledger.json", 1.01 * sum(run["C"] for run in planned))  # in FLOPs
    records = []
    for run in mine + [run for run in planned if run not in mine]:
        request = {k: run[k] for k in ("width", "steps", "N")}
        key = json.dumps(request, sort_keys=True)
        if key not in ledger.entries:
            ledger.submit(request, run["C"])
        while run not in mine and not (out / f"{run['width']}-{run['steps']}-0.json").exists():
            time.sleep(1)  # another process has it
        records.append(train_run(run, args))
        ledger.charge(key, records[-1]["C"])
        write_whole(out / "runs.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    check_prediction(make_runs(records), args)


def check_prediction(runs, args):
    """Fit the law to the runs, predict a run `ratio` times larger, train that and compare."""
    C = float(runs.C.max()) * args.ratio
    laws, fit, fits = report(runs, [C])
    draw(runs, laws, fit, fits, Path(args.out) / "scaling.png")
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


def small_model(width, parametrization, base_width, seed, layers=2):
    """A Transformer in muP or in the standard parametrisation, and its parameter groups.

    Both start alike: matrices with std fan_in^-1/2, tables with 1, the head at zero (Yang et al.,
    appendix D.2). They differ in Adam's rates: muP multiplies those of the matrices and of the
    head, whose fan-in grows, by base_width / width (table 3); tables and norms keep theirs. The
    heads have one size at every width, so attention needs no change.
    """
    import torch

    import model as model_py
    torch.manual_seed(seed)
    sizes = dict(d_model=width, num_layers=layers, num_heads=width // 32, d_ff=2 * width,
                 vocab_size=VOCABULARY, context_length=64)
    model = model_py.Transformer(model_py.ModelConfig(tie_embeddings=False, **sizes))
    matrices, others = [], []
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and name != "embed.weight":
                p.normal_(std=p.shape[1] ** -0.5) if name != "lm_head.weight" else p.zero_()
                matrices.append(p)
            else:
                others.append(p)
        model.embed.weight.normal_(std=1.0)
    factor = base_width / width if parametrization == "mup" else 1.0
    return model, [dict(params=matrices, factor=factor), dict(params=others, factor=1.0)]


def train_small(model, groups, lr, steps, batch):
    """AdamW at a constant rate on batch(step) -> (inputs, targets); the losses in nats, a list."""
    import train
    optimizer = train.AdamW([g | dict(lr=lr * g["factor"]) for g in groups], lr=lr,
                            betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)
    losses = []
    for step in range(steps):
        loss = model.loss(*batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    return losses


def activation_changes(width, parametrization, lr, steps, tokens, base_width, seed):
    """Root mean square of what `steps` steps on one batch change in that batch's activations.

    {name: number} of the last layer's attention and feed-forward outputs, of the residual stream
    and of the logits. One batch of 128 tokens: updates add up along the directions of its tokens,
    and with more of them than the width they would look random.
    """
    import torch
    model, groups = small_model(width, parametrization, base_width, seed)
    rows = np.stack([tokens[1000 * (seed * 4 + i):][:33] for i in range(4)]).astype(np.int64)
    inputs, targets = torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])
    last = model.layers[-1]

    def outputs():
        seen, watched = {}, {"attention": last.attn, "feed-forward": last.ffn, "residual": last}
        hooks = [m.register_forward_hook(lambda _, __, y, n=n: seen.update({n: y}))
                 for n, m in watched.items()]
        with torch.no_grad():
            seen["logits"] = model(inputs)
        for hook in hooks:
            hook.remove()
        return seen

    before = outputs()
    train_small(model, groups, lr, steps, lambda step: (inputs, targets))
    return {n: float((y - before[n]).square().mean().sqrt()) for n, y in outputs().items()}


def corpus_tokens(args, *flags):
    """The default corpus of train.py (or --data) as one array of ids."""
    import train
    flags = [*flags, f"--cache={args.cache}", *(["--data", *args.data] if args.data else [])]
    return np.asarray(train.prepare_data(train.make_parser().parse_args(flags)).train[0])


def coordinate_check(args):
    """Print how much a few steps change the activations, by width, in both parametrisations.

    muP's promise is that the change does not depend on width; in the standard one it grows.
    Returns {(parametrisation, activation): [one number a width]}.
    """
    tokens, table = corpus_tokens(args, f"--vocab-size={VOCABULARY}"), {}
    print(f"change after {args.steps} steps of AdamW at {args.lr:g}, mean of {args.seeds} seeds")
    print(f"{'width':<24}" + "".join(f"{w:>9}" for w in args.widths) + f"{'max/min':>9}")
    for kind in ("standard", "mup"):
        runs = [[activation_changes(w, kind, args.lr, args.steps, tokens, args.widths[0], seed)
                 for seed in range(args.seeds)] for w in args.widths]
        for name in runs[0][0]:
            row = [float(np.mean([s[name] for s in seeds])) for seeds in runs]
            table[kind, name] = row
            print(f"{kind + ' ' + name:<24}" + "".join(f"{v:>9.4f}" for v in row)
                  + f"{max(row) / min(row):>9.2f}")
    return table


def learning_rates(args):
    """Loss after short runs, by width and learning rate, in both parametrisations; and a plot.

    Returns {(parametrisation, width): [mean loss of the last tenth over the seeds, one a rate]}.
    """
    import train
    tokens, table = corpus_tokens(args, f"--vocab-size={VOCABULARY}"), {}
    for kind in ("standard", "mup"):
        print(f"{kind + ', width':<16}" + "".join(f"{lr:>8.2g}" for lr in args.rates)
              + f"{'best':>9}")
        for width in args.widths:
            losses = []
            for lr in args.rates:
                runs = []
                for seed in range(args.seeds):
                    np.random.seed(seed)  # the same batches for all
                    model, groups = small_model(width, kind, args.widths[0], seed)
                    run = train_small(model, groups, lr, args.steps,
                                      lambda step: train.get_batch(tokens, 8, 64, "cpu"))
                    runs.append(np.mean(run[-max(1, args.steps // 10):]))
                losses.append(float(np.mean(runs)))
            table[kind, width] = losses
            print(f"{width:<16}" + "".join(f"{v:>8.4f}" for v in losses)
                  + f"{args.rates[int(np.nanargmin(losses))]:>9.2g}", flush=True)
    draw_rates(table, args.rates, args.out)
    return table


def draw_rates(table, rates, path):
    with figure(path, 2) as panels:
        for panel, kind in zip(panels, ("standard", "mup")):
            for (name, width), losses in table.items():
                if name == kind:
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


def critical_batch_size(steps, examples):
    """E_min / S_min of (S / S_min - 1)(E / E_min - 1) = 1, from runs that reach one loss.

    steps, examples (n,): what runs of different batch sizes took. Least squares on 1 / S being
    linear in 1 / E: S_min / S + E_min / E = 1.
    """
    A = np.stack([1 / np.asarray(steps, float), 1 / np.asarray(examples, float)], 1)  # (n, 2)
    (s_min, e_min), *_ = np.linalg.lstsq(A, np.ones(len(A)), rcond=None)
    return float(e_min / s_min)


def deepseek_hyperparameters(C):
    """(learning rate, batch in tokens) at C FLOPs: DeepSeek LLM's fits, equation 1 there."""
    return 0.3118 * C**-0.125, 0.2920 * C**0.3271


def fit_hyperparameter(C, value, loss, tolerance=0.0025):
    """The power law of a hyperparameter's best value in compute, fitted as DeepSeek LLM does.

    C, value, loss (n,): FLOPs of each run, its learning rate or batch size, its final loss. All
    runs within `tolerance` of their budget's lowest loss count as best: `PowerLaw`.
    """
    C, value, loss = (np.asarray(a, float) for a in (C, value, loss))
    lowest = np.array([loss[C == c].min() for c in C])
    near = loss <= lowest * (1 + tolerance)
    return fit_power_law(C[near], value[near])


def noise(args):
    """Measure the gradient noise scale of a checkpoint on its data, in tokens."""
    import torch

    import model as model_py
    import train
    model = model_py.Transformer.from_pretrained(args.model, dtype=torch.float32)
    length = min(model.config.context_length, 256)
    tokens = corpus_tokens(args, f"--tokenizer={args.model}/tokenizer.json")
    np.random.seed(0)
    total, small = None, []
    for _ in range(args.batches):
        inputs, targets = train.get_batch(tokens, 4, length, "cpu")
        model.zero_grad()
        model.loss(inputs, targets).backward()
        grad = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        small.append(grad.square().sum().item())
        total = grad if total is None else total + grad
    big = (total / args.batches).square().sum().item()
    scale = gradient_noise_scale(float(np.mean(small)), big, 4 * length, 4 * length * args.batches)
    print(f"gradient noise scale of {args.model}: {scale:,.0f} tokens, from {args.batches} batches "
          f"of {4 * length}")
    return scale


# ---- accounting --------------------------------------------------------------------------------

# Dense bf16 TFLOP/s, memory in GB, and dollars an hour to rent (2025, an order of magnitude).
GPUS = {"a100": (312, 80, 1.5), "h100": (989, 80, 2.5), "h200": (989, 141, 3.0),
        "b200": (2250, 192, 5.0)}


def account(args):
    """FLOPs, days, dollars and bytes of a training run on named GPUs."""
    import model as model_py
    model = model_py.count_only(args.model, args.context_length or None)
    N, without = model.num_parameters(), model.num_parameters(embeddings=False)
    exact = model.flops_per_token(model.config.context_length) * args.tokens
    if args.gpu not in GPUS:
        raise ValueError(f"--gpu {args.gpu}: one of {', '.join(GPUS)}")
    peak, memory, price = GPUS[args.gpu]
    seconds = exact / (args.gpus * peak * 1e12 * args.mfu)
    rows = [
        ("parameters", f"{N:,}; {without:,} without token and position tables"),
        ("FLOPs, exact", f"{exact:.4g}, attention products at length "
         f"{model.config.context_length} included"),
        ("FLOPs, 6ND", f"{6 * N * args.tokens:.4g} with the tables, "
         f"{6 * without * args.tokens:.4g} without"),
        ("tokens", f"{args.tokens:.4g}, {args.tokens / N:.1f} a parameter"),
        ("time", f"{seconds / 86400:.3g} days on {args.gpus} x {args.gpu} at {args.mfu:.0%} MFU"),
        ("cost", f"{seconds / 3600 * args.gpus * price:,.0f} dollars at {price} an hour each"),
        ("memory", f"{16 * N / 1e9:.2f} GB of fp32 weights, gradients and AdamW's two moments; "
         f"{args.gpus} x {memory} GB there"),
    ]
    for name, text in rows:
        print(f"{name:<16}{text}")


# ---- command line ------------------------------------------------------------------------------


HOFFMANN = ChinchillaFit(1.69, 406.4, 410.7, 0.34, 0.28)  # Chinchilla's fit as published


def synthetic_runs(budgets=(1e19, 3e19, 1e20, 3e20, 1e21), sizes=9, sigma=0.01, seed=0):
    """Runs of HOFFMANN's law times exp(sigma noise)."""
    C = np.repeat(budgets, sizes)
    N = compute_optimal(HOFFMANN, C)[0] * np.tile(np.geomspace(0.2, 5, sizes), len(budgets))
    noise = np.exp(sigma * np.random.default_rng(seed).standard_normal(len(N)))
    return Runs(N, C / (6 * N), C, predict_loss(HOFFMANN, N, C / (6 * N)) * noise)


def demonstrate(args):
    print("No command given: a demonstration on 45 synthetic runs of the law\n"
          "L = 1.69 + 406.4 / N^0.34 + 410.7 / D^0.28 with 1 % noise.\n")
    runs = synthetic_runs()
    draw(runs, *report(runs, [1e23], samples=1000), args.out)
    n, d, loss = compute_optimal(HOFFMANN, 1e23)
    print(f"\nthe truth: at 1e+23 FLOPs {n:.4g} parameters, {d:.4g} tokens, loss {loss:.4f}, "
          f"exponent {0.28 / (0.34 + 0.28):.4f}\n{args.out}: the plots; "
          "python scaling.py --help for the commands")


def fit_command(args):
    runs = read_runs(args.runs)
    budgets = args.predict or [float(runs.C.max()) * 10]
    draw(runs, *report(runs, budgets, args.samples, args.drop_edges), args.out)
    print(f"{args.out}: the plots")


def plan_command(args):
    flops = args.flops or 60 * args.budget_minutes * args.flops_per_second
    print_plan(plan_runs(flops, args.budgets, args.sizes, args.ratio), args.flops_per_second,
               args.ratio)
    lr, batch = deepseek_hyperparameters(flops)
    print(f"for one run of {flops:.3g} FLOPs DeepSeek's fits say: learning rate {lr:.2g}, "
          f"{batch:,.0f} tokens a batch")


# Flags: (default, help). A list as default takes several numbers.
CORPUS = dict(data=([], "text files, as for train.py; Python's own library without"),
              cache=("data", "folder for tokens"))
PLANNING = dict(
    budget_minutes=(20.0, "minutes for the whole sweep"),
    flops_per_second=(7e10, "training speed of this machine on these models"),
    budgets=(4, "compute budgets"), sizes=(5, "model sizes at each"),
    ratio=(2.5, "between one budget and the next"))
WIDTH_FLAG = dict(widths=([64, 128, 256, 512], "widths of the models"))
COMMANDS = {
    "fit": (fit_command, "fit runs of a .json, .jsonl or .csv file by three methods", dict(
        predict=([], "FLOPs to predict at; ten times the largest budget without"),
        samples=(500, "bootstrap samples"),
        drop_edges=(False, "leave out budgets whose best size is its smallest or largest"),
        out=("scaling.png", "file of the plots"))),
    "plan": (plan_command, "which small runs to make for a budget", PLANNING | dict(
        flops=(0.0, "budget in FLOPs, instead of minutes"))),
    "sweep": (sweep, "make the planned runs with train.py, fit, predict, check",
              PLANNING | CORPUS | dict(
                  out=("sweep", "folder of the runs"),
                  dtype=("auto", "of matrix products, as for train.py"))),
    "coordinate-check": (coordinate_check, "do activations keep their scale?",
                         CORPUS | WIDTH_FLAG | dict(
                             steps=(4, "steps before looking"),
                             lr=(2.0**-8, "learning rate at the first width"),
                             seeds=(4, "seeds to average"))),
    "learning-rates": (learning_rates, "does the best learning rate stay put?",
                       CORPUS | WIDTH_FLAG | dict(
                           rates=([2.0**-(e + 0.5) for e in range(9, 3, -1)], "learning rates"),
                           steps=(120, "steps of a run"), seeds=(3, "runs to average"),
                           out=("learning_rates.png", "file of the plot"))),
    "noise": (noise, "gradient noise scale of a checkpoint", CORPUS | dict(
        model=("out", "folder of the checkpoint"),
        batches=(32, "batches of four windows to look at"))),
    "account": (account, "FLOPs, time, cost and memory of a training run", dict(
        model=("gpt2-xl", "folder of a config.json, or gpt2, gpt2-medium, gpt2-large, gpt2-xl"),
        context_length=(0, "tokens a window, 0 for the model's own"),
        tokens=(1e11, "training tokens"), gpu=("h100", f"one of {', '.join(GPUS)}"),
        gpus=(8, "how many"), mfu=(0.4, "share of the peak that is reached"))),
}


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="scaling.png", help="plots (default: %(default)s)")
    parser.set_defaults(run=demonstrate)
    commands = parser.add_subparsers(title="commands")
    for name, (run, help, flags) in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run)
        if name == "fit":
            command.add_argument("runs", help="file of runs: L and two of N, D, C")
        for flag, (default, text) in flags.items():
            if default is False:
                kind = dict(action="store_true")
            elif isinstance(default, list):
                kind = dict(nargs="*", type=type(default[0]) if default else
                            float if flag == "predict" else str)
            else:
                kind = dict(type=type(default))
            command.add_argument(f"--{flag.replace('_', '-')}", default=default,
                                 help=f"{text} (default: {default})".replace("%", "%%"), **kind)
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
