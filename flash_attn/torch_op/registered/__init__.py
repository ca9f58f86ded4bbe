"""What torch asks of an op beside its kernels: derivatives, batching rules, FLOPs, and what it refuses without data."""
