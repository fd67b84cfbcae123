"""Ways to have the Jacobian of the task losses."""
