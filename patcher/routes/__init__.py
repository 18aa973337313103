"""The ways to store a steering edit in tensors that stock code reads, and the planner that chooses one."""
