"""What stops a run, by name."""


class CheckpointNotSavedError(OSError):
    """A checkpoint could not be written; earlier ones are whole."""


class DamagedCheckpointError(ValueError):
    """A checkpoint is not as it was written."""


class ForeignCheckpointError(ValueError):
    """A checkpoint belongs to another run: another model, optimizer, data set or setting."""


class NonFiniteLossError(ArithmeticError):
    """The loss, or a weight, is NaN or infinite.

    Attributes:
        step: int, batches trained in the whole run, this one included.
        epoch: int, from 0.
        batch: int, index of the batch in its epoch, from 0.
        checkpoint: path of the last good checkpoint, or `None`.
    """

    def __init__(self, what, step, epoch, batch, checkpoint=None):
        self.what, self.step, self.epoch, self.batch, self.checkpoint = what, step, epoch, batch, checkpoint
        kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint."
        super().__init__(f"{what} step {step} (batch {batch} of epoch {epoch}, both counted from 0). {kept}")

    def naming(self, checkpoint):
        """The same with a checkpoint."""
        return NonFiniteLossError(self.what, self.step, self.epoch, self.batch, checkpoint)
