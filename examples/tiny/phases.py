"""Stages of a run, each a folder that comes into being when the stage is done; what is done is not done again.

phases = Phases("work", {"steps": 100})
folder = phases.run("tuned", lambda folder: ...)  # writes into `folder`, which is renamed at the end
"""

import json
import shutil
import time
from pathlib import Path


class Phases:
    """
    Args:
        folder: path, made if missing.
        settings: dict of what the stages depend on, as `json` writes it.

    Raises:
        ValueError: for a folder with stages of other settings.
    """

    def __init__(self, folder, settings):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "settings.json"
        if file.exists() and json.loads(file.read_text()) != settings:
            raise ValueError(
                f"{folder} has stages of other settings, {file.read_text().strip()}: remove it, or choose another "
                f"folder. Received: {json.dumps(settings)}"
            )
        file.write_text(json.dumps(settings) + "\n")
        self.names = []

    def run(self, name, make):
        """The folder of a stage, after `make(folder)` where it is not there yet."""
        self.names.append(name)
        done = self.folder / name
        if done.exists():
            print(f"--- {name}: done before")
            return done
        print(f"--- {name}", flush=True)
        partial = self.folder / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        began = time.monotonic()
        make(partial)
        seconds = time.monotonic() - began
        (partial / "seconds.json").write_text(json.dumps(round(seconds, 1)))
        print(f"--- {name}: {seconds:.0f} s", flush=True)
        return partial.rename(done)

    def seconds(self):
        """How long each stage took, in the run that did it."""
        return {name: json.loads((self.folder / name / "seconds.json").read_text()) for name in self.names}
