"""Ids and labels outside the vocabulary, numbers that are no ids, gaps in a padding mask, weights that are not finite:
what no model can make sense of is refused on its way into one.

An embedding would take another row for such an id, or give NaN, which one step of training spreads over all weights.

batches ─→ checked ─→ Keras
           └ TokenRules.refuse(x, y, sample_weight), of every batch in the memory of the host
"""

import collections.abc
import dataclasses

import keras
import numpy as np
from keras.src.trainers.data_adapters import get_data_adapter
from keras.src.trainers.data_adapters.data_adapter import DataAdapter
from keras.src.trainers.data_adapters.generator_data_adapter import GeneratorDataAdapter

from keras_gemma.distribution.filled_up import FilledUp

PACKED_INPUTS = ("segment_ids", "positions")


@dataclasses.dataclass(frozen=True)
class TokenRules:
    """What holds for the batches of a model.

    Args:
        vocabulary_size: int. Ids are from 0 to one less.
        has_labels: bool, whether targets are ids as well, in the shape of `token_ids`.
        padded_on_the_right: bool, whether rows begin with a token. Otherwise they may be padded on both sides.
    """

    vocabulary_size: int
    has_labels: bool = True
    padded_on_the_right: bool = False

    def refuse(self, x, y=None, sample_weight=None):
        """Raises a `ValueError` for the first thing that breaks a rule.

        Args:
            x: a dict with `token_ids` `[…, T]` and `padding_mask` of the same shape, and where rows are packed
                `segment_ids` or `positions`; anything else passes.
            y, sample_weight: as of `keras.Model.fit`. What is no NumPy array passes.
        """
        if not isinstance(x, dict) or not isinstance(token_ids := x.get("token_ids"), np.ndarray):
            return
        refuse_ids_outside(token_ids, self.vocabulary_size, "token_ids")
        mask = x.get("padding_mask")
        if isinstance(mask, np.ndarray):
            is_packed = any(x.get(name) is not None for name in PACKED_INPUTS)
            self._refuse_mask(mask, token_ids.shape, is_packed)
        if self.has_labels and isinstance(y, np.ndarray) and y.shape == token_ids.shape:
            refuse_ids_outside(y, self.vocabulary_size, "y")
        if isinstance(sample_weight, np.ndarray) and not np.isfinite(sample_weight).all():
            place = np.argwhere(~np.isfinite(sample_weight))[0]
            raise ValueError(f"`sample_weight` is finite. Received: {sample_weight[tuple(place)]} at {place.tolist()}")

    def _refuse_mask(self, mask, shape, is_packed):
        if mask.shape != shape:
            raise ValueError(
                f"'padding_mask' has the shape of 'token_ids'. Received: shape={mask.shape} beside shape={shape}"
            )
        is_token = mask != 0
        if mask.dtype != bool and not np.array_equal(is_token, mask):
            raise ValueError(
                "'padding_mask' is 1 or true where a token is, and 0 or false where none is. "
                f"Received: {mask[mask != is_token][0]}"
            )
        if is_packed or not is_token.size:
            return
        begins = is_token[..., 1:] & ~is_token[..., :-1]
        if not begins.any():
            return
        blocks = begins.sum(-1) + is_token[..., 0]
        if self.padded_on_the_right:
            self._refuse_rows(begins.any(-1), "ends with its padding")
        self._refuse_rows(blocks > 1, "has its tokens side by side, and padding on the outside alone")

    def _refuse_rows(self, is_wrong, rule):
        if is_wrong.any():
            row = np.argwhere(is_wrong)[0].tolist()
            raise ValueError(
                f"A row {rule}. Received: a 'padding_mask' with padding before a token in row {row}. Rows of several "
                "texts need 'segment_ids', as `pack=True` makes them"
            )


def refuse_ids_outside(ids, vocabulary_size, name):
    """Raises a `ValueError` for an array with numbers that are no ids of a vocabulary."""
    if not _are_integers(ids):
        raise ValueError(f"`{name}` are token ids, which are integers. Received: dtype={ids.dtype}")
    if not ids.size or (ids.min() >= 0 and ids.max() < vocabulary_size):
        return
    place = np.argwhere((ids < 0) | (ids >= vocabulary_size))[0]
    wrong = int(ids[tuple(place)])
    hint = ". Tokens that are not learned have weight 0 in `sample_weight`" if name == "y" and wrong < 0 else ""
    raise ValueError(
        f"`{name}` are token ids from 0 to {vocabulary_size - 1}, the vocabulary of the model. "
        f"Received: {wrong} at {place.tolist()}{hint}"
    )


def refuse_rows_outside(rows, vocabulary_size, name="Token ids"):
    """As `refuse_ids_outside`, for a list of lists of ids.

    Returns:
        The rows.
    """
    for number, row in enumerate(rows):
        ids = np.asarray(row)
        if ids.size and not (_are_integers(ids) and ids.min() >= 0 and ids.max() < vocabulary_size):
            wrong = next(one for one in row if not _are_integers(np.asarray(one)) or not 0 <= one < vocabulary_size)
            raise ValueError(
                f"{name} are integers from 0 to {vocabulary_size - 1}, the vocabulary of the model. "
                f"Received: {wrong!r} in row {number}"
            )
    return rows


def _are_integers(ids):
    return np.issubdtype(ids.dtype, np.integer)


def checked(batches, rules, shuffle=False, class_weight=None):
    """Batches that are refused on their way into Keras where they break a rule.

    Args:
        batches: what `keras.Model.fit` takes as `x`.
        rules: `TokenRules`.
        shuffle, class_weight: as of `keras.Model.fit`, which would have passed them on.

    Returns:
        What `keras.Model.fit` takes as `x`. It raises a `ValueError` when a batch is drawn; TensorFlow's data sets an
        error of their own with the same words.
    """
    if isinstance(batches, FilledUp):
        # Before rows are cut out: processes that have the same batches refuse them together.
        batches.source = Checked(batches.source, rules)
        return batches
    return Checked(get_data_adapter(batches, shuffle=shuffle, class_weight=class_weight), rules)


def is_iterator(batches):
    """Whether batches can be drawn once alone, whatever Keras or this package put around them."""
    while isinstance(batches, (Checked, FilledUp)):
        batches = batches.source
    return isinstance(batches, (collections.abc.Iterator, GeneratorDataAdapter))


class Checked(DataAdapter):
    """What Keras draws batches from.

    Args:
        source: the `DataAdapter` of the batches as they are.
        rules: `TokenRules`.
    """

    def __init__(self, source, rules):
        self.source = source
        self._rules = rules

    def get_numpy_iterator(self):
        return map(self._passed, self.source.get_numpy_iterator())

    def get_jax_iterator(self):
        return map(self._passed, self.source.get_jax_iterator())

    def get_torch_dataloader(self):
        return _Mapped(self.source.get_torch_dataloader(), self._passed)

    def get_tf_dataset(self):
        import tensorflow as tf

        def pass_on(*parts):
            element = parts if len(parts) > 1 else parts[0]
            leaves = keras.tree.flatten(element)

            def check(*arrays):
                left = iter(arrays)
                known = [next(left) if isinstance(leaf, tf.Tensor) else None for leaf in leaves]
                self._passed(keras.tree.pack_sequence_as(element, known))
                return np.int32(0)

            tf.numpy_function(check, [leaf for leaf in leaves if isinstance(leaf, tf.Tensor)], tf.int32)
            return element

        return self.source.get_tf_dataset().map(pass_on).prefetch(tf.data.AUTOTUNE)

    def _passed(self, batch):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        in_memory = keras.tree.map_structure(_as_numpy, (x, y, sample_weight))
        self._rules.refuse(*in_memory)
        return batch

    @property
    def num_batches(self):
        return self.source.num_batches

    @property
    def batch_size(self):
        return self.source.batch_size

    @property
    def has_partial_batch(self):
        return self.source.has_partial_batch

    @property
    def partial_batch_size(self):
        return self.source.partial_batch_size

    def on_epoch_begin(self):
        self.source.on_epoch_begin()

    def on_epoch_end(self):
        self.source.on_epoch_end()


class _Mapped:
    def __init__(self, loader, function):
        self._loader = loader
        self._function = function

    def __iter__(self):
        return map(self._function, self._loader)


def _as_numpy(leaf):
    # A tensor of torch in the memory of the host is a NumPy array at no cost; on a device it stays there.
    if getattr(getattr(leaf, "device", None), "type", None) != "cpu" or not hasattr(leaf, "detach"):
        return leaf
    try:
        return leaf.detach().numpy()
    except TypeError:
        # NumPy has no bfloat16.
        return leaf
