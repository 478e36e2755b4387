"""
4. A policy is a function of the parameter's name and its ScaleVector, which knows where it sits.
Under unified γ_a of v and up decays, which o and down can take over; under AP every γ_a, which its
own matrix can; in the standard form nothing, since there is no γ_a.
"""
from conftest import UNIFIED, tiny_gpt

from norms import weight_decay_groups


def only_a_foldable_output_side(name, vector):
    return vector.absorbable and not vector.input_norm


def test_a_new_decay():
    every = {"q", "k", "v", "gate", "up", "head"}
    for keys, maps in ((UNIFIED, {"v", "up"}), ({"scale_placement": "after"}, every), ({}, set())):
        groups = weight_decay_groups(tiny_gpt(**keys), 0.1, only_a_foldable_output_side)
        decayed = [name for g in groups if g["name"] == "scale_decayed" for name, _ in g["params"]]
        assert {name.split(".")[-3] for name in decayed} == maps
        assert all(".scale_out." in name for name in decayed)
