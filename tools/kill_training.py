"""Kills `quire train` at random instants, over and over, and says whether the adapter is the same as without.

    python tools/kill_training.py --kills 20

Each start goes on with --resume; a kill comes at a moment drawn from the time that the whole run takes, loading included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = ("red", "blue", "nine", "tree", "house", "fox", "river", "seven")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="quire-tiny")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    source = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "data.jsonl"
        data.write_text("".join(json.dumps(row(source)) + "\n" for _ in range(60)), encoding="utf-8")
        words = [sys.executable, "-m", "quire.cli", "train", options.model, "--data", str(data), "--validation-split", "0.1"]
        words += ["--max-steps", str(options.steps), "--save-steps", "3", "--eval-steps", "5", "--lora-dropout", "0.05"]
        words += ["--early-stopping-patience", "100", "--r", "8"]
        begin = time.monotonic()
        subprocess.run([*words, "--output", str(folder / "whole")], check=True, capture_output=True)
        took = time.monotonic() - begin
        killed = 0
        while True:
            process = subprocess.Popen(
                [*words, "--output", str(folder / "killed"), "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            if killed == options.kills:
                break
            time.sleep(source.uniform(0, took))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                killed += 1
                kept = sorted(int(path.name[11:]) for path in (folder / "killed").glob("checkpoint-*"))
                print(f"kill {killed}: checkpoints {kept}", flush=True)
            elif process.returncode == 0:
                # It came to its end: begin again, so that every kill hits something.
                if not same(folder):
                    return 1
                subprocess.run(["rm", "-r", str(folder / "killed")], check=True)
            process.wait()
        process.wait()
        return 0 if same(folder) else 1


def same(folder: Path) -> bool:
    digests = [
        hashlib.sha256((folder / name / "adapter_model.safetensors").read_bytes()).hexdigest() for name in ("whole", "killed")
    ]
    print("the same bytes" if digests[0] == digests[1] else f"OTHER bytes: {digests}", flush=True)
    return digests[0] == digests[1]


def row(source: random.Random) -> dict[str, object]:
    words = [source.choice(WORDS) for _ in range(source.randint(2, 6))]
    question, answer = " ".join(words), " ".join(reversed(words))
    return {"messages": [{"role": "user", "content": f"Reverse: {question}"}, {"role": "assistant", "content": answer}]}


if __name__ == "__main__":
    sys.exit(main())
