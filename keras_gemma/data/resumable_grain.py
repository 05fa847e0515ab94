"""As `resumable`, for Grain's iterators. Apart, because Grain need not be installed."""

import json

import grain

from keras_gemma.data.resumable import OTHER_BATCH
from keras_gemma.data.resumable import digest


class IteratedBatches(grain.IterDataset):
    """Batches that come one after the other from an iterator with a state."""

    def __init__(self, source, endless):
        super().__init__(source)
        self._endless = endless
        self._start = None
        self._first = None
        self._drawn = None
        self._trained_count = 0

    def __iter__(self):
        # Before the first epoch Keras draws some batches to see what they are like, and there may be none left.
        start = None if self._first is None else self._start
        self._drawn = _Drawn(self._parent, start, self._endless)
        return self._drawn

    def begin_epoch(self, place):
        if self._first is None:
            self._first = place
        elif not self._endless:
            self._first, self._start = place, None

    def _drawn_count(self, place):
        return (place.step - self._first.step) if self._endless else (place.batch - self._first.batch)

    def trained(self, place):
        """Forgets what is needed for earlier places only."""
        self._trained_count = self._drawn_count(place)
        self._drawn.forget(before=self._trained_count)

    def batches_of_epoch(self, steps):
        """How many batches an epoch's first `steps` steps hold; the last execution of several may be short."""
        if self._endless or not self._drawn.is_over:
            return steps
        return min(steps, self._first.batch + self._drawn.count)

    def state(self, place):
        # Without `steps_per_epoch` every epoch begins with a new iterator.
        is_over = not self._endless and not place.batch
        return {**self._drawn.state(self._trained_count), "is over": is_over}

    def restore(self, state, place):
        if not self._begins_as_saved(state):
            raise ValueError(OTHER_BATCH.format(place=place))
        self._start = None if state["is over"] else state

    def _begins_as_saved(self, state):
        try:
            return _Drawn(self._parent, state, self._endless).begins_as_saved
        except (LookupError, TypeError, ValueError, StopIteration):
            # The state of an iterator over other data, or a place behind their end.
            return False

    def fingerprint(self):
        return {"kind": "grain.IterDataset"}


class _Drawn(grain.DatasetIterator):
    """An iterator that keeps its state before each batch until that batch is trained.

    A state is the one *before* the last trained batch, with that batch's digest: drawing it again shows whether the
    data are still the same.
    """

    def __init__(self, source, start, endless):
        super().__init__()
        self._source = source
        self._endless = endless
        self._iterator = iter(source)
        self.is_over = False
        self.count = -1
        self._kept = {}
        if start is None:
            self.count = 0
        else:
            self._iterator.set_state(json.loads(start["before"]))
            next(self)
            self.begins_as_saved = self.state(0)["last_batch"] == start["last_batch"]

    def __next__(self):
        before = self._state()
        try:
            batch = next(self._iterator)
        except StopIteration:
            if not self._endless:
                self.is_over = True
                raise
            self._iterator = iter(self._source)
            batch = next(self._iterator, None)
            if batch is None:
                raise ValueError("A data set without batches cannot be trained on.") from None
        self.count += 1
        self._kept[self.count] = before, batch
        return batch

    def _state(self):
        # Written out at once: an iterator may go on changing what it returned.
        return json.dumps(self._iterator.get_state())

    def state(self, count):
        before, batch = self._kept[count]
        return {"before": before, "last_batch": digest(batch)}

    def forget(self, before):
        for count in [count for count in self._kept if count < before]:
            del self._kept[count]

    def get_state(self):
        return self._iterator.get_state()

    def set_state(self, state):
        self._iterator.set_state(state)
