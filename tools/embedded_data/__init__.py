"""What quire-tiny learns from: Python's standard library, and conversations that are generated here from a seed.

`exchange` holds the type and the held-out rule, the other files one field of skills each, `conversations` puts
exchanges together into dialogues, `corpus` reads the standard library. This room knows no torch, no model and no
tokenizer: it gives text and messages. The same seed and the same Python give the same data, in any process.
"""
