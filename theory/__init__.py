"""The paper's theorems as functions, and their pictures."""
