"""The stack of one machine: Redis, Ray, and the servers as Ray actors."""
