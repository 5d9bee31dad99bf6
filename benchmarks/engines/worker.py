"""One engine in a process of its own: loads, then answers lines of JSON on standard input with lines of JSON.

Runs under the engine's own Python, so that it may use nothing but the standard library and the engine. What an engine prints
goes to standard error; answers have the descriptor that was standard output. The end of the input ends the process.

    {"prompts": [[..]], "output": 128, "adapters": null}  ->  {"seconds": 1.5, "tokens": [[..]]}
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from benchmarks.engines import adapters


def main(arguments: list[str]) -> None:
    name, options = arguments[0], json.loads(arguments[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        engine = adapters.ENGINES[name](**options)
    except Exception as error:
        answer(error=_words(error), kind=type(error).__name__)
        os._exit(1)
    answer(ready=True, weight_bytes=getattr(engine, "weight_bytes", None), about=getattr(engine, "about", None))
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            begin = time.perf_counter()
            tokens = engine.generate(asked["prompts"], asked["output"], asked.get("adapters"))
            seconds = time.perf_counter() - begin
            answer(seconds=seconds, tokens=[[int(token) for token in row] for row in tokens])
        except Exception as error:  # one workload that fails does not end the others
            answer(error=_words(error), kind=type(error).__name__)
    close = getattr(engine, "close", None)
    if close is not None:
        close()
    # Threads of an engine that wait for each other must not hold the process.
    os._exit(0)


def _words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


if __name__ == "__main__":
    main(sys.argv[1:])
