"""Tables, plots and the picture that README and docs/ show, made from bench/results/ and from the code."""
