"""How much memory a process takes at most, told by Linux' `/proc` in a process of its own."""

import subprocess
import sys

# What a measured program begins with: `begin()` forgets the peak of the imports, `peak()` says the bytes since then.
MEMORY = """
def memory(entry):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(entry))

def begin():
    global before
    before = memory("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")

def peak():
    return memory("VmHWM") - before

"""


def measured(program, *arguments):
    """The number that a program prints last.

    Args:
        program: text in Python that calls `begin` and `peak`.
        *arguments: of its command line.
    """
    command = [sys.executable, "-c", MEMORY + program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])
