"""Fine-tune and use a model through OpenAI's client; only base_url is another. Start a server first:

    quire serve --enable-fine-tuning

then run this file. The model learns to name the department that a customer's sentence is for.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import random
import time

from openai import OpenAI

SENTENCES = {
    "billing": ["I was charged twice for {}", "my invoice for {} is wrong", "please refund {}", "the price of {} changed"],
    "shipping": ["where is my {}", "when will {} arrive", "the parcel with {} is lost", "send {} to another address"],
    "support": ["{} does not start", "how do I reset {}", "{} shows an error", "my {} is broken"],
}
THINGS = ["the lamp", "the phone", "the radio", "the clock", "the kettle", "the printer", "the camera", "the heater"]


def rows() -> list[tuple[str, str]]:
    """(sentence, department) in a fixed order that mixes them."""
    made = [(text.format(thing), kind) for kind, texts in SENTENCES.items() for text, thing in itertools.product(texts, THINGS)]
    random.Random(0).shuffle(made)
    return made


def as_file(data: list[tuple[str, str]]) -> io.BytesIO:
    """OpenAI's JSON lines."""
    lines = (
        json.dumps({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": kind}]})
        for text, kind in data
    )
    return io.BytesIO("\n".join(lines).encode())


def right(client: OpenAI, model: str, data: list[tuple[str, str]]) -> int:
    """How many sentences get their department."""
    found = 0
    for text, kind in data:
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=8
        )
        found += (answer.choices[0].message.content or "").strip() == kind
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none")
    options = parser.parse_args()
    client = OpenAI(base_url=options.base_url, api_key=options.api_key)
    base = client.models.list().data[0].id
    data = rows()
    training, held_out = data[:-24], data[-24:]
    files = [
        client.files.create(file=(name, as_file(part)), purpose="fine-tune").id
        for name, part in (("training.jsonl", training), ("validation.jsonl", held_out))
    ]
    job = client.fine_tuning.jobs.create(
        model=base,
        training_file=files[0],
        validation_file=files[1],
        suffix="departments",
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": 8}}},
        extra_body={"lora": {"learning_rate": 2e-3}},  # Quire's own settings are under this one key
    )
    told: set[str] = set()
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.5)
        job = client.fine_tuning.jobs.retrieve(job.id)
        for event in reversed(client.fine_tuning.jobs.list_events(job.id, limit=100).data):
            if event.id not in told:
                told.add(event.id)
                print(event.message)
    if job.status != "succeeded" or job.fine_tuned_model is None:
        raise SystemExit(f"the job has {job.status}: {job.error}")
    for model in (base, job.fine_tuned_model):
        print(f"{model}: {right(client, model, held_out)} of {len(held_out)} sentences that it has not seen")


if __name__ == "__main__":
    main()
