"""Quire beside every engine that is installed, on the same workloads, in one sitting: `python -m benchmarks.engines`."""
