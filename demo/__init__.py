"""The offline main job: train the tiny Wan, and run it dense against trimmed."""
