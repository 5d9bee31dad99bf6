"""One script per question; each says what fraction of a limit or of a peer was reached. `python -m benchmarks` lists them."""
