"""What was measured about a model: recording it, its file, its picture."""
