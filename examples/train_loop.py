"""A training loop of one's own from Quire's parts: python examples/train_loop.py DATA.jsonl OUTPUT [MODEL]

What `quire train` does besides (checkpoints, evaluation, several runs in one batch) is in quire/train/run.py. Here is the
core: rows to tokens, rows of a step to packed batches, one pass there and back, AdamW, and PEFT's folder at the end.
"""

import math
import sys
from pathlib import Path

import torch

from quire.assemble import assemble
from quire.lora.adapter import write_adapter
from quire.lora.new import new_adapter
from quire.lora.slots import Slots
from quire.models.config import read_model_config
from quire.text.tokenizer import Tokenizer
from quire.train import objective
from quire.train.config import TrainingConfig
from quire.train.data import read_dataset
from quire.train.door import stop_tokens
from quire.train.examples import cut
from quire.train.flat import FlatParameters
from quire.train.passes import Share, learn, places
from quire.train.schedule import Order, rate
from quire.weights.hub import resolve

config = TrainingConfig(r=16, lora_alpha=32, num_train_epochs=3, learning_rate=2e-4, per_device_train_batch_size=8)
data, output = Path(sys.argv[1]), Path(sys.argv[2])
folder = resolve(sys.argv[3] if len(sys.argv) > 3 else "quire-tiny")

# The model as it serves, and the rows as the server would see them, with a weight for each token.
shape = read_model_config(folder)
tokenizer = Tokenizer.from_folder(folder)
model = assemble(folder, shape, shape.dtype)
ends = stop_tokens(folder, shape)
dataset = read_dataset(data, tokenizer, config, longest=shape.max_position_embeddings, ends=ends)
print(dataset.summary(), *dataset.notes, sep="\n")

# A fresh adapter, moved into flat buffers, and placed into a slot: its rows go through it from now on.
flat = FlatParameters(new_adapter(model, config.lora_config(), config.seed))
slots = Slots(model)
slot = slots.take()
slots.place(slot, flat.adapter)

# Which tensors belong to which layer, each with the place of its gradient.
gradients = {id(tensor): flat.gradients[name] for name, tensor in flat.tensors.items()}
trained = {}
for module, place in places(model, list(flat.adapter.parts)).items():
    pairs = trained.setdefault(place, [])
    pairs += [(tensor, gradients[id(tensor)]) for _, tensor in flat.adapter.parts[module].tensors()]

order = Order(len(dataset.examples), config)
for step in range(order.total_steps):
    examples = [dataset.examples[row] for row in order.step(step)]
    # Gradients are normalised by the learned tokens of the whole step, so they do not depend on how it is cut.
    total = math.fsum(weight for example in examples for weight in example.weights[1:])
    flat.gradient.zero_()
    loss = 0.0
    for micro in cut(examples, config.micro_batch_tokens):
        share = Share(micro, slot, trained=trained)
        weights = share.weights()
        share.weigh = lambda losses, w=weights, t=total: objective.supervised(losses, w, t)[1]
        for _ in learn(model, [share]):
            pass  # after each layer, something else could run here: a server, say
        loss += objective.supervised(share.losses, weights, total)[0]
    norm = flat.update(config, step, rate(config, step, order.total_steps))
    print(f"step {step + 1}/{order.total_steps} loss {loss:.4f} norm {norm:.3f}", flush=True)

write_adapter(output, flat.adapter.frozen(), base_name=str(folder))
print(f"wrote {output}; trained {len(flat):,} numbers with {torch.get_num_threads()} threads")
