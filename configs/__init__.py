"""Models and recipes: each file assigns values to the keys of train.py."""
