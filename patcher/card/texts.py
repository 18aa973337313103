"""The words of the model card."""

from __future__ import annotations

PAPERS = {
    "caa": "Rimsky et al. 2024, *Steering Llama 2 via Contrastive Activation Addition*, "
    "[arXiv:2312.06681](https://arxiv.org/abs/2312.06681)",
    "actadd": "Turner et al. 2023, *Steering Language Models With Activation Engineering* (ActAdd), "
    "[arXiv:2308.10248](https://arxiv.org/abs/2308.10248)",
    "repe": "Zou et al. 2023, *Representation Engineering: A Top-Down Approach to AI Transparency*, "
    "[arXiv:2310.01405](https://arxiv.org/abs/2310.01405)",
    "persona": "Chen et al. 2025, *Persona Vectors: Monitoring and Controlling Character Traits in Language Models*, "
    "[arXiv:2507.21509](https://arxiv.org/abs/2507.21509)",
}
METHODS = {
    "mean_difference": "mean difference",
    "pca": "PCA of the differences",
    "persona": "mean difference of the model's own responses under opposite personas",
    "file": "from a file",
}
CHECKS = {
    "stored vector": "the vector as the file holds it: relative error",
    "without the vector": "this copy with the vector taken off, and the base: largest Δ log-prob",
    "log-probabilities": "this copy, and the base under the hook: largest Δ log-prob",
    "share of the effect": "the same, held to 1 % of the effect",
    "constant": "held-out calibration text, gain of the residual stream: mean relative error",
    "KL of the fit": "KL divergence from the base under the hook, as a share of that of the unsteered base",
    "gain": "what the log-probabilities gain, as a multiple of what the hook adds: distance from 1",
    "residual stream": "gain of the residual stream where the vector is added: relative error",
    "left padding": "a batch with left padding: largest Δ log-prob",
    "greedy decoding with a cache": "greedy decoding with a KV cache: largest Δ log-prob",
    "long prompt": "a prompt longer than the sliding window: largest Δ log-prob",
    "own dtype": "in the checkpoint's own dtype: mean Δ log-prob from fp32",
}
READS = {"native": "yes", "backend": "yes, through its Transformers backend", "no": "**no, do not use it**"}
STATUS = {
    "structural": "names and shapes only; the weights were not downloaded",
    "truncated": "only the blocks up to the edit were run",
    "not_checked": "not checked",
    "failed": "**failed**",
}

INTRODUCTION = "This is an edit of {base}: {where} at every position. {rest}"
UNCHANGED = "Nothing was trained: apart from what stores that vector, the weights are those of the base."
FITTED = """\
In the copy, {tensors} {have} an addition that was fitted on calibration text by least squares; nothing else was \
trained, and all other weights are those of the base."""
INSERTED = """\
In the copy {blocks} and nothing else. Nothing was trained: all other weights are those of the base, in \
the same order; blocks that come later have higher numbers than in the base."""
DRAFTS = "Its blocks that only draft further tokens are left out."
RELABELLED = """\
The copy is stored for another stock class than the base's, `{architecture}` instead of {base_class}; both compute \
the same function. Nothing was trained: {rewritten}apart from {them}what stores that vector, the weights are those of \
the base."""
UNTIED = """\
The base uses one matrix as input embedding and as output head; here each has its own, and only the input embedding \
holds the vector. Nothing was trained: apart from that, the weights are those of the base."""
APPROXIMATE = "This route only approximates the vector"
APPROXIMATE_ERROR = """\
: on held-out calibration text, what the residual stream gains is off by {mean} of the vector on average, and \
by at most {p95} for 95 % of the tokens"""
APPROXIMATE_KL = """\
. The next-token distributions are off by {ratio} of what the steering changes (KL divergence)"""
ADAPTER = "The adapter `{adapter}` was merged into the base first."

NORM = "The vector norm includes coefficient and scale: it is what {gains}."
BROADCAST = """\
The vector comes from one aligned pair, as in ActAdd. A checkpoint holds one vector, so this is the broadcast \
variant, added at every position; ActAdd itself adds a vector of its own at each of the first positions of the \
prompt."""

ROUTE = "Route `{name}` ({exact}; runtime cost: {cost}) for `{architecture}`. Stock software reads it with {code}."
ZEROS = "Beside these, {tensors} of zeros{where}, which {config}."
INSIDE = """\
{blocks} {are} new in the copy. The {total} other tensors there, {zeros} of them zeros, are such that nothing but the \
vector is added."""
RENAMED = (
    "{tensors} of the base {have} another name in the copy, such as `{old}`, now `{new}`; the values are the same."
)
RENUMBERED = """\
{tensors} of the blocks after {it} {were} renamed, such as `{old}` to `{new}`; the values are the same."""
REPLACED = "They stand in place of {tensors} of the base."
LEFT_OUT = "{tensors} of the base {are} left out, such as `{name}`."
NEW_CONFIG = """\
`config.json` is a new one, for `{architecture}` instead of {base_class}; the base's is kept in `steering.json` \
(`route.config_before`)."""
TOKENIZER = "Changed in `tokenizer_config.json`, so that text becomes the same tokens as with the base: {changes}."

USE = """\
## Use

```python
from transformers import pipeline
generate = pipeline("text-generation", model="{name}"{extra})
```

The steering is part of the weights: no hook, no adapter, nothing to switch on."""
MIND = "Keep in mind:"

UNVERIFIED = "## Verification\n\n**This copy was not verified.**"
WHOLE = """\
Each stack loaded this folder as it is, and was compared with the base plus a forward hook that adds the same \
vector, at every position of texts that the vector was not made from."""
FIRST_BLOCKS = """\
The first {blocks} of this copy were loaded as a model of their own, and compared with those of the base plus a \
forward hook that adds the same vector, at every position of texts that the vector was not made from. What comes \
after the blocks was replaced in both where it was not downloaded, so the log-probabilities are not those of the \
whole model. All names and shapes were compared with those that the stock class asks for. **Later blocks were not \
run**; their weights are the base's files, copied by the Hub."""
STRUCTURAL = """\
**No block of this copy was run**, since those up to the edit were not downloaded. What was checked: the vector as the \
new file holds it; that every tensor lies, once, where the index says; and that all names and shapes are those that \
the stock class asks for. To run the other checks, download the copy and use `patch-model verify`, as below."""
REMOTE = """\
Needed to make this copy, and downloaded for it: {files} of the base's {count}, {bytes} of {total} bytes. Weight files \
that did not change were not uploaded: the Hub copied them from the base's repository, by their hashes."""
REMOTE_NOTHING = """\
Of the base's {count} ({total} bytes), only the headers were downloaded to make this copy. None was uploaded: the Hub \
copied them from the base's repository, by their hashes."""
REMOTE_CHANGED = "A tensor was changed in {files}, downloaded and uploaded again for it."
TERMS = """\
*Noise floor*: the same hook in two \
equivalent places. *Effect*: how far the steering moves the log-probabilities. *Vector error*: how far the gain of \
the residual stream is from the vector, relative."""
OWN_ERROR = """\
*Own error*: how far that stack is from transformers with the unsteered base. The limit gives way to it; the effect \
does not: what the stack is off by is at most 1 % of it, or where the own error is larger, 10 %."""
NO_LIMIT = """\
A fitted copy is not the hook's equal, so *max Δ log-prob* has no limit here. It is held to limits of its own, below, \
and must equal the base once the vector is taken off."""
CENTRED = """\
The copy's residual stream is the base's without its mean over the hidden dimension; so were the base's and the \
vector before they were compared with it."""

FIT = """\
The vector is added by a matrix product whose other factor was fitted so that it is close to 1 on every token. The \
fit saw {tokens} tokens of calibration text; the numbers are of {held_out} tokens that it did not see{sampled}. \
*Error*: distance of what the residual stream gains from the vector, relative; 0 is exact, 100 % is as far off as no \
steering. *Along the vector*: the part of the gain that has its direction; 100 % is exact."""
FIT_KL = """\
The same in the model's predictions, as KL divergence from the base under an exact hook, mean over {tokens} held-out \
tokens: this copy {fit} nats, the unsteered base {base} nats; the ratio is {ratio}."""
UNFITTED = "{experts} got no calibration token, so nothing is known of how well the edit fits there."

INDISTINGUISHABLE = """\
> **Warning:** this effect cannot be told from that of random vectors of the same norm. Do not expect this model \
to do what the vector is named for."""

STACKS = """\
*Reads this route* is what the stack's code does; only a stack with a result in the last column was run on this \
very copy."""
OLDEST = """\
*Oldest version run*: the oldest that was tried with a copy of this kind, on a tiny model, and was steered; older \
ones may leave the steering out."""
UNREAD = "A stack that does not read the route refuses the file, leaves the steering out, or computes something else."

TAKING_OUT = """\
## Take the steering out, or check it again

`steering.safetensors` holds each vector in fp32, {gains}. {how}

To repeat the verification on a local copy (`pip install patch-model`; `--base PATH` if the base has moved):

```
patch-model verify DIR
```"""
STEPS = "To get the base{merged} back, {steps}. {unaltered}"
UNALTERED = "The base itself is {base}."
NO_WAY_BACK = """\
This copy cannot be turned back into the base{merged}, since tensors of it were replaced: take the base \
itself, {base}. To only switch the steering off, {off}."""

LIMITS = """\
## Limits and responsible use

A steering vector shifts tendencies on all inputs; it guarantees no behaviour, can lower quality elsewhere, and \
was checked for faithful storage, not for safety. What the base must not be used for, this copy must not be used \
for either, and whoever deploys it should test it on their own inputs and say that it is steered."""
