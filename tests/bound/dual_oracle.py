"""The dual bound once more, as plainly as possible: float64, one image, one class, matrices and loops.

Written from the formulas, without the project's code, for the tests to compare with. Layers are tuples (matrix, kind,
low, high, norm, rows, columns, lo, hi): kind "line" is min(max(z, low), high), kind "pairs" clipped MaxMin; ends may be
infinite, masks are boolean arrays.
"""

import itertools
import math

import numpy as np


def activation(kind, low, high, z):
    """The outputs of a layer's activation. low, high: arrays, one entry per unit or per pair."""
    if kind == "line":
        return np.minimum(np.maximum(z, low), high)
    a, b = np.split(z, 2)
    return np.concatenate([np.minimum(np.maximum(a, b), high), np.maximum(np.minimum(a, b), low)])


def bound(layers, centers, slope, epsilon, g, delta, c, pixels=None):
    """The bound on the drop of slope . h in the ball, for given multipliers. pixels: ends of the steps of the input."""
    last = len(layers) - 1
    total, above, behind = 0.0, 0.0, slope
    for number in range(last, -1, -1):
        matrix, kind, low, high, norm, rows, _, lo, hi = layers[number]
        mu, nu = above + delta[number], above
        t = matrix @ c[number]
        reference = np.zeros(len(behind)) if number == last else c[number + 1]
        if kind == "line":
            for i in range(len(t)):
                if rows[i]:
                    box = lo[i], hi[i]
                    unit = (behind[i], g[number][i], t[i], reference[i], mu, nu)
                    total += best_of_line(centers[number][i], low[i], high[i], unit, box)
        else:
            half = len(t) // 2
            for i in range(half):
                both = [i, i + half]
                unit = (behind[both], g[number][both], t[both], reference[both], mu, nu)
                box = list(zip(lo[both], hi[both]))
                total += best_of_pair(centers[number][both], low[i], high[i], unit, box)
        behind = matrix.T @ g[number]
        above = norm**2 * mu
    return total + best_input(behind, c[0], above, epsilon, pixels)


def best_of_line(z, low, high, unit, box):
    a, g, t, c, mu, nu = unit
    value = min(max(z, low), high)

    def terms(d):
        change = min(max(z + d, low), high) - value
        return a * change - g * d - mu / 2 * (d - t) ** 2 + nu / 2 * (change - c) ** 2

    # Where the output rests; where it moves, change = d + (z - value).
    tops = [t - g / mu, (a - g + mu * t + nu * (z - value - c)) / (mu - nu)]
    ends = [end - z for end in (low, high) if math.isfinite(end)] + [end for end in box if math.isfinite(end)]
    return max(terms(min(max(d, box[0]), box[1])) for d in tops + ends)


def best_of_pair(z, low, high, unit, box):
    a, g, t, c, mu, nu = unit
    outputs = activation("pairs", np.array([low]), np.array([high]), z)

    def terms(d):
        change = activation("pairs", np.array([low]), np.array([high]), z + d) - outputs
        return a @ change - g @ d - mu / 2 * ((d - t) @ (d - t)) + nu / 2 * ((change - c) @ (change - c))

    best = -math.inf
    (lo_a, hi_a), (lo_b, hi_b) = box
    lines = {0: ((lo_a, hi_a), z[0]), 1: ((lo_b, hi_b), z[1])}
    for larger, first_moves, second_moves in itertools.product((0, 1), (True, False), (True, False)):
        smaller = 1 - larger
        # The parabolas of the two steps in this piece: linear coefficient at a step of 0, curvature.
        pull_x = mu * t[larger] - g[larger]
        pull_y = mu * t[smaller] - g[smaller]
        q_x, q_y = mu, mu
        if first_moves:
            pull_x, q_x = pull_x + a[0] + nu * (z[larger] - outputs[0] - c[0]), mu - nu
        if second_moves:
            pull_y, q_y = pull_y + a[1] + nu * (z[smaller] - outputs[1] - c[1]), mu - nu
        limits = []
        for which, moves, threshold, below in (
            (larger, first_moves, high, True),
            (smaller, second_moves, low, False),
        ):
            (lo, hi), center = lines[which]
            edge = threshold - center
            limits.append((lo, min(hi, edge)) if moves == below else (max(lo, edge), hi))
        (lo_x, hi_x), (lo_y, hi_y) = limits
        if lo_x > hi_x or lo_y > hi_y or math.inf in (lo_x, lo_y) or -math.inf in (hi_x, hi_y):
            continue
        x, y = min(max(pull_x / q_x, lo_x), hi_x), min(max(pull_y / q_y, lo_y), hi_y)
        gap = z[smaller] - z[larger]
        if x - y < gap:
            lo_x, hi_x = max(lo_x, lo_y + gap), min(hi_x, hi_y + gap)
            if lo_x > hi_x:
                continue
            x = min(max((pull_x + pull_y + q_y * gap) / (q_x + q_y), lo_x), hi_x)
            y = x - gap
        step = np.empty(2, dtype=z.dtype)
        step[larger], step[smaller] = x, y
        best = max(best, terms(step))
    return best


def best_input(a, c, nu, epsilon, pixels):
    pull = a - nu * c
    if pixels is None:
        return nu / 2 * (epsilon**2 + c @ c) + epsilon * np.linalg.norm(pull)
    lo, hi = pixels

    def at(lam):
        total = lam / 2 * epsilon**2 + nu / 2 * (c @ c)
        for p, below, above in zip(pull, lo, hi):
            steps = [below, above]
            if lam > nu:
                steps.append(min(max(p / (lam - nu), below), above))
            total += max(p * d + (nu - lam) / 2 * d * d for d in steps)
        return total

    least, most = 0.0, nu + np.linalg.norm(pull) / epsilon
    for _ in range(200):
        first, second = least + (most - least) / 3, most - (most - least) / 3
        least, most = (least, second) if at(first) <= at(second) else (first, most)
    return at(most)
