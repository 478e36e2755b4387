"""One file an experiment. results/ has what they found, machinery/ what runs them."""
