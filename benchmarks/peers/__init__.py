"""What WanTrim is measured against: step caches, merged tokens, chance."""
