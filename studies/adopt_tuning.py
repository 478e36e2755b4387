"""Ours: DNP does not depend on the size of a matrix, so a baseline whose initialization and weight
decay are not tuned may be what it gains on. Exploratory: three seeds each; what is best here is to
be confirmed on the ten seeds of studies/adopt.py."""
from studies.adopt import BASELINE, BUT_THE_HEAD, rows as adopted
from studies.common import CPU_MODEL, SEEDS

title = "A better-tuned baseline"
question = "is DNP's gain more than another initialization or weight decay?"
CHANGES = {**{f"weight decay {x:g}": {"weight_decay": x} for x in (0.0, 0.03, 0.3, 1.0)},
           **{f"init_std {x:g}": {"init_std": x} for x in (0.03, 0.06, 0.25)}}
rows = {row: adopted[row] for row in (BASELINE, BUT_THE_HEAD)}
for base in list(rows):
    rows |= {f"{base} with {words}": {**rows[base], **keys} for words, keys in CHANGES.items()}
comparisons = {(BUT_THE_HEAD, BASELINE): {},
               **{(row, row.partition(" with ")[0]): {} for row in rows if " with " in row}}
picture = "forest"
scales = {"cpu": {"seeds": SEEDS, "tuned": (), "models": {
    "0.23M": {**CPU_MODEL, "learning_rates": (4e-3,)}}}}
