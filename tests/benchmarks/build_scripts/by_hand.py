"""What anyone writes in ten minutes: read the pairs one prompt at a time, put a bias on the module, save.

    python by_hand.py BASE PAIRS OUTPUT LAYER COEFFICIENT DTYPE DEVICE

PAIRS is a JSON-lines file of ``question`` and two answers. The last line printed is the seconds of each stage, as JSON.
"""

import json
import sys
import time
from pathlib import Path

start = time.perf_counter()
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

base, pairs, output, layer, coefficient, dtype, device = sys.argv[1:]
imported = time.perf_counter()
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).to(device).eval()
block = model.model.layers[int(layer)]
loaded = time.perf_counter()

read = []
# The answer is "(A)" or "(B)": the letter is the last token but one.
block.register_forward_hook(
    lambda _module, _inputs, output: read.append((output if torch.is_tensor(output) else output[0])[0, -2].float())
)
differences = []
with torch.no_grad():
    for line in Path(pairs).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for side in ("answer_matching_behavior", "answer_not_matching_behavior"):
            model(tokenizer(row["question"] + row[side], return_tensors="pt").input_ids.to(device))
        differences.append(read[-2] - read[-1])
vector = torch.stack(differences).mean(0) * float(coefficient)
done = time.perf_counter()

block.mlp.down_proj.bias = torch.nn.Parameter(vector.to(model.dtype))
model.save_pretrained(output)
tokenizer.save_pretrained(output)
saved = time.perf_counter()
stages = {"start": imported - start, "load": loaded - imported, "read": done - loaded, "save": saved - done}
print(json.dumps(stages))
