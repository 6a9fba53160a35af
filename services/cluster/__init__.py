"""One machine's stack: Ray, Redis and the three roles as actors."""
