"""LoRA adapters (Hu et al. 2021): PEFT's folder read and written, the slots of a model, fresh adapters to train.

Knows the module tree and its sockets; knows no engine, no request, no training loop and no route.
"""
