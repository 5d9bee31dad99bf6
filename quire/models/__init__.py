"""Model families: one shared decoder and one small file per family with only its differences.

`config` and `registry` know no torch, so that planning never imports it; the family files are mathematics only.
"""
