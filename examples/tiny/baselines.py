"""What a language model has to beat, in bits per byte of held-out text: a compressor and a Kneser-Ney 5-gram.

xz_bits_per_byte(train_bytes, held_out_bytes).conditional
kneser_ney_bits_per_byte(train_ids, held_out_ids, len(held_out_bytes), vocabulary_size)
"""

import lzma
from typing import NamedTuple

import numpy as np

BOS_ID = 2


class XzBitsPerByte(NamedTuple):
    """`alone`: the held-out text by itself. `conditional`: what it adds to an archive of the training text."""

    alone: float
    conditional: float


def xz_bits_per_byte(train_bytes: bytes, held_out_bytes: bytes) -> XzBitsPerByte:
    """Bits per byte of `xz -9e`, its dictionary made large enough to reach back to the start of the training text."""
    alone = _xz_size(held_out_bytes)
    added = _xz_size(train_bytes + held_out_bytes) - _xz_size(train_bytes)
    return XzBitsPerByte(8 * alone / len(held_out_bytes), 8 * added / len(held_out_bytes))


def _xz_size(data: bytes) -> int:
    smallest = 1 << 26  # the dictionary of preset 9
    dictionary = max(smallest, 1 << (len(data) - 1).bit_length())
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=[lzma2]))


def kneser_ney_bits_per_byte(
    train_ids: np.ndarray,
    held_out_ids: np.ndarray,
    held_out_bytes: int,
    vocabulary_size: int,
    order: int = 5,
    bos_id: int = BOS_ID,
) -> float:
    """Bits per byte of an interpolated modified Kneser-Ney model over tokens.

    Args:
        train_ids: 1D integers; each document is bos, its tokens, eos.
        held_out_ids: 1D integers, likewise. Every token but bos counts, eos included.
        held_out_bytes: bytes of the held-out text in UTF-8.
    """
    model = KneserNey(train_ids, vocabulary_size, order, bos_id)
    stream, predicted = model.pad(held_out_ids)
    rows = np.lib.stride_tricks.sliding_window_view(stream, order)[predicted[order - 1 :]]
    return float(-np.log2(model.probabilities(rows)).sum() / held_out_bytes)


class KneserNey:
    """Interpolated Kneser-Ney with three discounts; below the unigrams stands the uniform distribution.

    Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), equations 20 and 26.

    An n-gram is known by its number: its row in `grams[n]`, the sorted keys
    `number of its first n-1 tokens · V + last token`.
    """

    def __init__(self, ids: np.ndarray, vocabulary_size: int, order: int = 5, bos_id: int = BOS_ID):
        self.vocabulary_size, self.order, self.bos_id = vocabulary_size, order, bos_id
        stream, predicted = self.pad(ids)
        self.grams: dict[int, np.ndarray] = {}
        counts, ending_here, shorter = {}, np.zeros(len(stream) + 1, np.int64), None
        for n in range(1, order + 1):
            # The context of a token is the (n-1)-gram that ends one place before it.
            keys = np.concatenate([[0], ending_here[:-1]])[: len(stream)] * vocabulary_size + stream
            self.grams[n], first, numbers = np.unique(keys, return_index=True, return_inverse=True)
            counts[n] = np.bincount(numbers, weights=predicted, minlength=len(self.grams[n])).astype(np.int64)
            if n > 1:
                # Below the highest order a gram counts by how many different tokens were seen before it.
                seen = counts[n] > 0
                counts[n - 1] = np.bincount(shorter[first[seen]], minlength=len(self.grams[n - 1]))
            ending_here = shorter = numbers
        self.levels = {n: self._level(n, counts[n]) for n in range(1, order + 1)}

    def pad(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Opens each document with order - 1 bos, so that no context reaches into the document before.

        Returns:
            The padded stream and, for each place, whether its token is predicted.
        """
        ids = np.asarray(ids, np.int64)
        if not len(ids) or ids[0] != self.bos_id:
            raise ValueError(f"Documents must open with bos ({self.bos_id}), received {ids[:3]} at the start.")
        stream = np.repeat(ids, np.where(ids == self.bos_id, self.order - 1, 1))
        return stream, stream != self.bos_id

    def _level(self, n: int, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The discounted share of each n-gram in its context, and the mass each context leaves to shorter grams."""
        contexts = self.grams[n] // self.vocabulary_size
        size = len(self.grams[n - 1]) if n > 1 else 1
        total = np.bincount(contexts, weights=counts, minlength=size)
        discount = self._discounts(counts)[np.minimum(counts, 3)]
        left = np.bincount(contexts, weights=discount, minlength=size)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = (counts - discount) / total[contexts]
            left = np.where(total > 0, left / total, 1.0)
        return np.nan_to_num(share), left

    @staticmethod
    def _discounts(counts: np.ndarray) -> np.ndarray:
        """D(0) = 0, D(1), D(2), D(3 and more), from how many grams occur once, twice, three and four times."""
        n1, n2, n3, n4 = np.maximum(np.bincount(np.minimum(counts, 5), minlength=6)[1:5], 1)
        y = n1 / (n1 + 2 * n2)
        return np.clip([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3], 0, [0, 1, 2, 3])

    def _numbers(self, rows: np.ndarray) -> np.ndarray:
        """The number of the n-gram in each row, -1 where training never saw it."""
        numbers = np.zeros(len(rows), np.int64)
        for n in range(1, rows.shape[1] + 1):
            keys = numbers * self.vocabulary_size + rows[:, n - 1]
            places = np.minimum(np.searchsorted(self.grams[n], keys), len(self.grams[n]) - 1)
            numbers = np.where((numbers >= 0) & (self.grams[n][places] == keys), places, -1)
        return numbers

    def probabilities(self, rows: np.ndarray) -> np.ndarray:
        """The probability of the last token of each row `[n, order]` after the `order - 1` tokens before it."""
        result = np.full(len(rows), 1 / self.vocabulary_size)
        for n in range(1, self.order + 1):
            share, left = self.levels[n]
            grams, contexts = self._numbers(rows[:, -n:]), self._numbers(rows[:, -n:-1])
            result = result * np.where(contexts >= 0, left[contexts], 1.0) + np.where(grams >= 0, share[grams], 0.0)
        return result
