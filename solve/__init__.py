"""A wanted speed-up, solved for a run."""
