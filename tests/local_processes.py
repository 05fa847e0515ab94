"""Processes on this machine that meet at a port, each with its own log."""

import os
import socket
import subprocess
import sys
import time


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


def run(count, program, folder, *arguments, seconds, **environment):
    """Starts processes as `start` does, and waits until all have ended.

    Args:
        seconds: int, for all of them together.

    Returns:
        A list of their exit statuses, and all that they wrote, as a string.

    Raises:
        AssertionError: with all that they wrote, where one still runs after that; none does any more.
    """
    started, logs = start(count, program, folder, *arguments, **environment)
    deadline = time.monotonic() + seconds
    try:
        statuses = [process.wait(timeout=max(0, deadline - time.monotonic())) for process in started]
    except subprocess.TimeoutExpired:
        running = [str(number) for number, process in enumerate(started) if process.poll() is None]
        raise AssertionError(
            f"Processes {', '.join(running)} of {count} still run after {seconds} s\n\n{_written(logs)}"
        ) from None
    finally:
        for process in started:
            process.kill()
            process.wait()
    return statuses, _written(logs)


def _written(logs):
    return "\n\n".join(log.read_text() for log in logs)
