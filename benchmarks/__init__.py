"""One script per question; each says what fraction of a limit or of a peer was reached. `python -m benchmarks` lists them."""

import os

# What contestants start with: as it was before Quire, once it is imported, told MKL and OpenMP how to behave.
ENVIRONMENT = dict(os.environ)
