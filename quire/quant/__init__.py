"""Quantized weights: what checkpoints say of theirs, what is made at load, and the pass that sets both into a finished tree.

`scheme` and `sizes` know no torch, so that planning never imports it. This room computes no product (quire/ops does) and
reads no file (quire/weights does).
"""
