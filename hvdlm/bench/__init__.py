"""``hvdlm bench``: what communication costs on the person's own cluster."""
