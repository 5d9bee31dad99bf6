"""`python -m benchmarks NAME [options]`: run one benchmark and record it; without a name, list them."""

from __future__ import annotations

import argparse
import importlib
import json
import sys

from benchmarks.record import record

NAMES = (
    *("scheduler", "throughput", "kernels", "quality", "kv_quality", "startup"),
    *("training", "training_kernels", "adapters", "jobs"),
)


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in NAMES:
        for name in NAMES:
            print(f"{name:16} {importlib.import_module(f'benchmarks.{name}').__doc__.splitlines()[0]}")
        return 0 if not arguments else 2
    name = arguments[0]
    benchmark = importlib.import_module(f"benchmarks.{name}")
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=benchmark.__doc__)
    parser.add_argument("--no-record", action="store_true", help="print only")
    benchmark.add_arguments(parser)
    options = parser.parse_args(arguments[1:])
    outcome = benchmark.run(options)
    print(json.dumps(outcome.numbers, indent=1))
    print(outcome.headline)
    if not options.no_record:
        asked = {key: value for key, value in vars(options).items() if key != "no_record"}
        print(f"recorded in {record(name, asked, outcome)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
