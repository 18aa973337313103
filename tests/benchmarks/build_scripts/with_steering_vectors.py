"""The same copy with the library steering-vectors, called as its documentation does, and ``save_pretrained``.

    python with_steering_vectors.py BASE PAIRS OUTPUT LAYER COEFFICIENT DTYPE DEVICE

See ``by_hand.py`` for the arguments and the output.
"""

import json
import sys
import time
from pathlib import Path

start = time.perf_counter()
import torch  # noqa: E402
from steering_vectors import train_steering_vector  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

base, pairs, output, layer, coefficient, dtype, device = sys.argv[1:]
imported = time.perf_counter()
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).to(device).eval()
loaded = time.perf_counter()

rows = [json.loads(line) for line in Path(pairs).read_text(encoding="utf-8").splitlines()]
texts = [
    tuple(row["question"] + row[side] for side in ("answer_matching_behavior", "answer_not_matching_behavior"))
    for row in rows
]
found = train_steering_vector(model, tokenizer, texts, layers=[int(layer)], read_token_index=-2)
vector = found.layer_activations[int(layer)].float() * float(coefficient)
done = time.perf_counter()

model.model.layers[int(layer)].mlp.down_proj.bias = torch.nn.Parameter(vector.to(model.dtype))
model.save_pretrained(output)
tokenizer.save_pretrained(output)
saved = time.perf_counter()
stages = {"start": imported - start, "load": loaded - imported, "read": done - loaded, "save": saved - done}
print(json.dumps(stages))
