"""How sure a figure is: its interval over videos, and whether two models differ.

Questions about one video stand or fall together: it is videos that are drawn again, or exchanged.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
DRAWS = 2000
MIN_VIDEOS = 5
"""Of fewer videos nothing can be said."""
NORMAL = NormalDist()


def numbered(names: Sequence[str]) -> np.ndarray:
    """Each name's number, from 0: equal names have one."""
    return np.unique(np.asarray(names), return_inverse=True)[1]


def tail(num_videos: int) -> float:
    """The share that each end of an interval leaves out.

    A bootstrap of n videos is too narrow by √((n − 1)/n), and by the step from the normal to
    Student's distribution. So its percentiles are taken further out: the expanded percentile
    interval (Hesterberg 2015). Student's quantile is its expansion by Cornish and Fisher.
    """
    z, v = NORMAL.inv_cdf((1 + LEVEL) / 2), num_videos - 1
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    return NORMAL.cdf(-t * math.sqrt(num_videos / v))


def sums(values_EF: np.ndarray, video_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sum_VF, count_VF) of each column inside each video; nan does not count."""
    counts_EF = ~np.isnan(values_EF)
    shape = (video_E.max() + 1, values_EF.shape[1])
    sum_VF, count_VF = np.zeros(shape), np.zeros(shape)
    np.add.at(sum_VF, video_E, np.where(counts_EF, values_EF, 0.0))
    np.add.at(count_VF, video_E, counts_EF)
    return sum_VF, count_VF


def intervals(values_EF: np.ndarray, video_E: np.ndarray, seed: int = 0) -> np.ndarray:
    """bounds_F2: the 95 % interval of each column's mean by the bootstrap over videos; nan where
    fewer than five have a value, or their means are alike: what is drawn again then says nothing.

    values_EF: a row an episode, nan where it does not count. video_E: its video's number.
    """
    sum_VF, count_VF = sums(values_EF, video_E)
    num_videos = len(sum_VF)
    weights_BV = np.random.default_rng(seed).multinomial(
        num_videos, np.full(num_videos, 1 / num_videos), DRAWS
    )
    counts_BF = weights_BV @ count_VF
    means_BF = weights_BV @ sum_VF / np.where(counts_BF > 0, counts_BF, np.nan)
    bounds = np.full((values_EF.shape[1], 2), np.nan)
    for f, num in enumerate((count_VF > 0).sum(0)):
        if num < MIN_VIDEOS:
            continue
        low, high = np.nanquantile(means_BF[:, f], [tail(num), 1 - tail(num)])
        if high - low > 1e-9:
            bounds[f] = low, high
    return bounds


def sign_flip(difference_V: np.ndarray, seed: int = 0) -> float:
    """p of the two-sided test that two models score alike: under it each video's difference could
    as well have the other sign. difference_V: sums of a video's differences."""
    signs_BV = np.random.default_rng(seed).choice([-1.0, 1.0], (DRAWS, len(difference_V)))
    seen = abs(difference_V.sum()) - 1e-9
    return (1 + (abs(signs_BV @ difference_V) >= seen).sum()) / (1 + DRAWS)


def pass_at(k: int, num_right: int, num: int) -> float:
    """The chance that at least one of k answers is right, where `num_right` of `num` were: without
    bias (Chen et al. 2021, equation 1)."""
    return 1.0 - math.comb(num - num_right, k) / math.comb(num, k)
