"""Brute-force float64 oracles: the equations once more, written loop by loop over plain Python floats.

Slow and obvious on purpose, sharing no code with the package: one index is one loop, as in the papers.
"""

from __future__ import annotations

import math


def group_of(index: int, num_generations: int) -> range:
    """Indices of all samples in the group of ``index``."""
    start = index // num_generations * num_generations
    return range(start, start + num_generations)


def group_advantages(rewards: list[float], num_generations: int, min_std: float = 0.0) -> list[float]:
    advantages = []
    for i, reward in enumerate(rewards):
        scored = [rewards[j] for j in group_of(i, num_generations) if not math.isnan(rewards[j])]
        if math.isnan(reward) or len(scored) < 2:
            advantages.append(0.0)
            continue
        mean = math.fsum(scored) / len(scored)
        variance = math.fsum((r - mean) ** 2 for r in scored) / (len(scored) - 1)
        std = math.sqrt(variance) if max(scored) > min(scored) else 0.0
        advantages.append((reward - mean) / (std + 1e-4) if std > min_std else 0.0)
    return advantages


def cosine(p: list[float], q: list[float]) -> float:
    norms = math.sqrt(math.fsum(x * x for x in p)) * math.sqrt(math.fsum(x * x for x in q))
    return math.fsum(x * y for x, y in zip(p, q)) / norms if norms > 0 else 0.0


def opposite_sign_similarity(
    code_vectors: list[list[list[float]]], advantages: list[float], num_generations: int
) -> list[list[float]]:
    similarity = []
    for i, image in enumerate(code_vectors):
        row = []
        for t in range(len(image)):
            cosines = []
            for j in group_of(i, num_generations):
                if j != i and advantages[i] * advantages[j] <= 0:
                    cosines.append(cosine(image[t], code_vectors[j][t]))
            row.append(math.fsum(cosines) / len(cosines) if cosines else 0.0)
        similarity.append(row)
    return similarity


def advantage_weights(similarity: list[list[float]], num_generations: int, normalization: str) -> list[list[float]]:
    weights = [[(1 - s) / 2 for s in row] for row in similarity]
    if normalization == "none":
        return weights
    normalized = []
    for i, row in enumerate(weights):
        members = [m for j in group_of(i, num_generations) for m in weights[j]]
        mean = math.fsum(members) / len(members)
        normalized.append([m / mean for m in row])
    return normalized


def kl_weights(
    similarity: list[list[float]], a: float, b: float, clip: tuple[float, float], form: str
) -> list[list[float]]:
    if form == "graded":
        return [[a + b * (s + 1) / 2 for s in row] for row in similarity]
    return [[a + b * min(max(s + 1, clip[0]), clip[1]) for s in row] for row in similarity]


def token_entropy(logits: list[float]) -> float:
    total = math.fsum(math.exp(x) for x in logits)
    entropy = 0.0
    for x in logits:
        p = math.exp(x) / total
        entropy -= p * math.log(p) if p > 0 else 0.0
    return entropy


def entropy_reward(
    rewards: list[float],
    policy_entropy: list[float],
    ref_entropy: list[float],
    num_generations: int,
    scope: str,
    center: bool,
) -> list[float]:
    def bonus(i: int) -> float:
        return 1 / (1 + (ref_entropy[i] - policy_entropy[i]) ** 2)

    result = []
    for i, reward in enumerate(rewards):
        scored = [j for j in group_of(i, num_generations) if not math.isnan(rewards[j])]
        best = max((rewards[j] for j in scored), default=math.nan)
        chosen = scored if scope == "all" else [j for j in scored if rewards[j] == best]
        if math.isnan(reward) or i not in chosen:
            result.append(0.0)
            continue
        mean = math.fsum(bonus(j) for j in chosen) / len(chosen)
        result.append(bonus(i) - (mean if center else 0.0))
    return result


def policy_loss(
    logps: list[list[float]],
    old_logps: list[list[float]],
    ref_logps: list[list[float]],
    advantages: list[list[float]],
    beta: float,
    kl_weights: list[list[float]],
    epsilon_low: float,
    epsilon_high: float,
) -> float:
    terms = []
    for i, row in enumerate(logps):
        for t, logp in enumerate(row):
            ratio = math.exp(logp - old_logps[i][t])
            clipped = min(max(ratio, 1 - epsilon_low), 1 + epsilon_high)
            surrogate = min(ratio * advantages[i][t], clipped * advantages[i][t])
            d = ref_logps[i][t] - logp
            terms.append(-surrogate + beta * kl_weights[i][t] * (math.exp(d) - d - 1))
    return math.fsum(terms) / len(terms)
