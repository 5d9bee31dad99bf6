"""The parts that decoders are built of. A layer knows its weights and the batch; it knows no checkpoint and no engine."""
