"""Training of LoRA adapters on the weights that serve: JSON lines in, PEFT's folder out.

Uses the same model, operations and chat templates as serving. Knows no engine, no request and no route: a server drives a
run piece by piece (run.py, together.py), and samples come from a function that is handed in.
"""
