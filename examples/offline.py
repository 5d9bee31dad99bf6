"""Complete a batch of prompts in this process: python examples/offline.py [MODEL]"""

import sys

from quire import LLM, SamplingParams

llm = LLM(model=sys.argv[1] if len(sys.argv) > 1 else "quire-tiny")
prompts = ["def is_even(number):\n", "class Stack:\n", "import os\n\n\ndef size_of(path):\n"]
params = SamplingParams(temperature=0.7, top_p=0.9, n=2, seed=7, max_tokens=32)
for output in llm.generate(prompts, params):
    for sample in output.outputs:
        print(f"--- {output.prompt!r}, sample {sample.index}, ended by {sample.finish_reason}")
        print(output.prompt + sample.text)
