"""The model card, README.md of an exported folder: strategy, data, tokens, losses, commit."""
import contextlib
import json
import subprocess
from pathlib import Path

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
---

# {title}

A language model trained to study scale vectors (arXiv 2605.26895).

| | |
| --- | --- |
{rows}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("."{trust_load})
tokenizer = AutoTokenizer.from_pretrained("."{trust_load})
```

```sh
lm_eval --model hf --model_args pretrained=.{trust_eval} --tasks lambada_openai
```
"""


def model_card(run, model, keys, step, encoding, name, why):
    """The text of README.md. keys: the run's config.json; name: the stock class, or None; why: the
    reason for the one or the other."""
    c = model.config
    event = last_evaluation(run, step)
    kind = f"stock `{name}`" if name else "our own code, in this folder"
    vectors = model.num_params("scale_vectors")

    facts = {
        "architecture": f"{kind}: {why}",
        "parameters": f"{model.num_params():,} as trained, {vectors:,} of them in scale vectors",
        "scale vectors": f"{strategy(c)}, scale_weight_decay={keys.get('scale_weight_decay')}",
        "Gemma-style norms": f"qk_norm={c.qk_norm}, post_norm={c.post_norm}",
        "data": f"{keys.get('dataset')}, tokenizer {encoding.name}",
        "vocabulary": f"{c.vocab_size:,} rows, {vocabulary(encoding)}",
        "steps": f"{step:,}",
        "tokens": tokens_seen(event),
        "validation loss": validation_loss(event),
        "optimizer": ", ".join([
            f"{keys.get('optimizer')}",
            f"learning_rate={keys.get('learning_rate')}",
            f"weight_decay={keys.get('weight_decay')}",
        ]),
        "code": f"commit {commit() or 'unknown'} at the export",
    }
    return CARD.format(
        title=Path(run).resolve().name,
        rows="".join(f"| {key} | {value} |\n" for key, value in facts.items()),
        trust_load="" if name else ", trust_remote_code=True",
        trust_eval="" if name else ",trust_remote_code=True",
    )


def strategy(c):
    """One line on the scale vectors of a GPTConfig."""
    if not c.scale_vectors:
        return "none: normalizations only"
    keys = ("scale_heterogeneous", "scale_placement", "scale_placement_on", "scale_reparam")
    return ", ".join(f"{key}={getattr(c, key)}" for key in keys)


def vocabulary(encoding):
    if not is_known(encoding):
        return "token ids without a known tokenizer"
    return (f"{encoding.n_vocab:,} of them tokens; padding was kept, because the softmax is over "
            f"all rows")


def is_known(encoding):
    """False where the data's text is token ids of an unknown tokenizer (lib.data.TokenIds)."""
    return encoding.eot_token is not None


def tokens_seen(event):
    if event is None:
        return "not logged"
    return f"{event['tokens']:,}, at the last evaluation (step {event['step']:,})"


def validation_loss(event):
    if event is None or event.get("val_loss") is None:
        return "not evaluated"
    bits = f", {event['val_bpb']:.4f} bits/byte" if event.get("val_bpb") else ""
    return f"{event['val_loss']:.4f} nats/token{bits}"


def last_evaluation(run, step):
    """The last eval event of a run's log up to a checkpoint's step, or None."""
    path = Path(run).expanduser() / "log.jsonl"
    if not path.exists():
        return None
    for line in reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        event = None
        with contextlib.suppress(ValueError):  # a crash may have cut a line
            event = json.loads(line)
        if not isinstance(event, dict) or event.get("event") != "eval":
            continue
        if isinstance(event.get("step"), int) and event["step"] <= step:
            return event
    return None


def commit():
    """The repository's commit, with a note if files differ from it. None where there is no git."""
    try:
        name = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return None
    return name + (" (with changes)" if changed else "")


def git(*arguments):
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    done = subprocess.run(command, capture_output=True, check=True)
    return done.stdout.decode("utf-8", "replace").strip()
