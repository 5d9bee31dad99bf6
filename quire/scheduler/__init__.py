"""What runs in the next step, and in which KV blocks. Knows no torch, no clock, no I/O: the planner's simulator, the
property tests and the engine run the same code."""
