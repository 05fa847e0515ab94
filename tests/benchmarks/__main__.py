"""Speed and memory beside the peers, in one run:

    python tests/benchmarks                        # everything, about half an hour on two cores
    python tests/benchmarks --only generation --repeats 5
    python tests/benchmarks --only planning        # compiled for TPUs, with the extra `plan`; half an hour more
    python tests/benchmarks --only post_training   # beside TRL: `pip install trl` first

Prints a table of ratios and writes `results.json` and `results.png` into `--output`.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import depth
import generation
import planning
import post_training
import processes
import training

BENCHMARKS = {
    "generation": generation,
    "training": training,
    "processes": processes,
    "depth": depth,
    "planning": planning,
    "post_training": post_training,
}
# They compare more than two numbers.
WITH_OWN_TABLE = ("depth", "planning", "post_training")
# They take other libraries, and as long as the others together.
WHEN_ASKED_FOR = ("planning", "post_training")


def rows_of(name, results):
    """One row a ratio: what was measured, against whom, how many times theirs ours is, and what it should be."""
    if name == "generation":
        return [(r["case"], "keras_hub", "speed", r["ratio"], f"≥ {r['target']}") for r in results]
    if name == "processes":
        return [
            (f"{r['processes']} processes, {r['case']}", "1 process", "time", r["ratio"], f"{r['cores']} cores")
            for r in results
            if r["processes"] > 1
        ]
    rows = []
    for result in results:
        ours = result["keras_gemma"]
        for peer in ("keras_hub", "transformers"):
            theirs, wanted = result[peer], result["targets"].get(peer, {})
            speed = ours["tokens_per_second"] / theirs["tokens_per_second"]
            rows.append((result["case"], peer, "speed", speed, f"≥ {wanted['speed']}" if "speed" in wanted else ""))
            memory = ours["peak_gib"] / theirs["peak_gib"]
            rows.append((result["case"], peer, "memory", memory, f"≤ {wanted['memory']}" if "memory" in wanted else ""))
    return rows


def print_table(rows):
    width = max(len(case) for case, *_ in rows)
    print(f"{'case':{width}}  {'beside':12}  {'what':6}  ours / theirs  wanted")
    for case, peer, what, ratio, wanted in rows:
        print(f"{case:{width}}  {peer:12}  {what:6}  {ratio:13.2f}  {wanted}")


def draw(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [f"{case}\n{what} beside {peer}" for case, peer, what, *_ in rows]
    colours = ["tab:blue" if what == "speed" else "tab:orange" for _, _, what, *_ in rows]
    figure, axes = plt.subplots(figsize=(9, 0.6 * len(rows) + 1), layout="constrained")
    bars = axes.barh(labels, [ratio for _, _, _, ratio, _ in rows], color=colours)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("ours / theirs (speed: more is better; memory and time: less is better)")
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=BENCHMARKS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("."))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    names = [arguments.only] if arguments.only else [name for name in BENCHMARKS if name not in WHEN_ASKED_FOR]
    results = {name: BENCHMARKS[name].run(arguments.repeats) for name in names}
    (arguments.output / "results.json").write_text(json.dumps(results, indent=4))
    for name in results.keys() & WITH_OWN_TABLE:
        print("\n".join(BENCHMARKS[name].table(results.pop(name))))
    if rows := [row for name, of_name in results.items() for row in rows_of(name, of_name)]:
        print_table(rows)
        draw(rows, arguments.output / "results.png")


if __name__ == "__main__":
    sys.exit(main())
