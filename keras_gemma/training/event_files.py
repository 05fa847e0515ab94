"""TensorBoard's event files, written without TensorFlow and from any thread."""

import time
from pathlib import Path

import keras


class EventFiles:
    """Curves of scalars, one folder a run, as TensorBoard shows them.

    `keras.callbacks.TensorBoard` writes through TensorFlow's summaries from the thread that trains, for which it
    makes Keras wait for the device at every step.

    Args:
        log_dir: path of the folder.

    Raises:
        ImportError: without the package `tensorboard`.
    """

    def __init__(self, log_dir):
        self.log_dir = Path(log_dir)
        self._writers = {}
        try:
            import tensorboard  # noqa: F401
        except ImportError as error:
            raise ImportError("`log_dir` needs the package tensorboard: pip install tensorboard") from error

    def open(self, run):
        """Begins a file now, which takes seconds for the first one, and not with its first point."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if run not in self._writers and _is_first_process():
            self._writers[run] = EventFileWriter(str(self.log_dir / run), flush_secs=10)

    def write(self, run, step, values):
        """Adds a point at `step` to the curve of every name in the dict `values` of floats."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        if not values or not _is_first_process():
            return
        self.open(run)
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writers[run].add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=points)))

    def write_text(self, run, step, name, text):
        """Adds Markdown, a string, at `step` to the texts called `name`."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.text.summary import text_pb

        if not _is_first_process():
            return
        self.open(run)
        self._writers[run].add_event(Event(wall_time=time.time(), step=step, summary=text_pb(name, text)))

    def close(self):
        """Writes what is held back. The next point opens a file of its own."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


def _is_first_process():
    if keras.backend.backend() != "jax":
        return True
    import jax

    return jax.process_index() == 0
