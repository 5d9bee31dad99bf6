"""Converts a checkpoint folder with llama.cpp's own converter: `to_gguf.py LLAMA_SOURCE FOLDER TARGET`.

The converter knows tokenizers by a digest and refuses one that it has not seen; the benchmark's is new to it. Prompts are ids,
so how text is split does not matter, and it is told one that it knows. Runs in the environment of `transformers`.
"""

from __future__ import annotations

import sys


def main(source: str, folder: str, target: str) -> None:
    sys.path[:0] = [source, f"{source}/gguf-py"]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    import convert_hf_to_gguf

    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", target, "--outtype", "bf16"]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main(*sys.argv[1:4])
