import numpy as np


def staircase(k: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The ranks (i, j) < n with (i + 1)(j + 1) <= k, in order of i, then j: about k ln k pairs.

    Of two rankings added, only these pairs can be among the k best sums: every pair (i', j') with i' <= i and j' <= j
    is at least as good, and there are (i + 1)(j + 1) of them.
    """
    i, j = np.indices((min(k, n), min(k, n))).reshape(2, -1)
    kept = (i + 1) * (j + 1) <= k
    return i[kept], j[kept]


def product_key_topk(x: np.ndarray, y: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of all sums s_{i n + j} = x_i + y_j, best first (product keys, arXiv 1907.05242, section 3.1).

    x, y: float32 [..., n], k <= n^2. Returns sums [..., k] and expert numbers i n + j, int64 [..., k]. Of equal sums
    the expert with the smaller number comes first.
    """
    sums = (x[..., :, None] + y[..., None, :]).reshape(*x.shape[:-1], -1)
    best = np.argsort(-sums, axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(sums, best, -1), best


def product_key_experts(
    x: np.ndarray, indices: np.ndarray, weights: np.ndarray, down: np.ndarray, up: np.ndarray, act
) -> np.ndarray:
    """y = sum_k w_k act(x . d_k) u_k over experts of one hidden unit each (PEER, arXiv 2407.04153, eq. 3).

    x: float32 [T, d]; indices: int [T, k]; weights: float32 [T, k]; down, up: [n_experts, d]. Returns float32 [T, d].
    """
    hidden = np.einsum("td,tkd->tk", x, down[indices])
    return np.einsum("tk,tkd->td", act(hidden) * weights, up[indices])
