"""PARE's recovery training (arXiv 2605.27336, section 3.4): data, recipes, stages and checkpoints."""
