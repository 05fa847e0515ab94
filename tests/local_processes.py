"""Processes on this machine that meet at a port, each with its own log."""

import os
import socket
import subprocess
import sys


def start(count, program, folder, *arguments, **environment):
    """Starts `python program PORT COUNT PROCESS arguments...` so many times.

    Args:
        count: int.
        program: path of a Python file.
        folder: path, where `process_N.log` takes all that process N writes.
        *arguments: what else the program is given, as strings.
        **environment: variables of the environment besides those that are there.

    Returns:
        A list of `subprocess.Popen` and a list of the paths of their logs.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", **environment}
    logs = [folder / f"process_{process}.log" for process in range(count)]
    started = []
    for process, log in enumerate(logs):
        command = [sys.executable, program, *map(str, (port, count, process, *arguments))]
        with log.open("w") as file:
            started.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    return started, logs
