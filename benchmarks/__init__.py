"""Speed and quality of WanTrim and its peers, measured offline."""
