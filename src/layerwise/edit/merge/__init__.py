"""Several models to one."""
