"""Quantized weights: what checkpoints say of theirs, what is made at load, and the pass that sets both into a finished tree.

`scheme` and `sizes` know no torch, so that planning never imports it. Also the methods of `quire quantize`. This room
computes no product of a running model (quire/ops does) and reads no weights from files (quire/weights does).
"""
