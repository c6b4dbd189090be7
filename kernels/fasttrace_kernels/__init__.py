"""Operations of a pack of rows: Triton kernels for GPUs, numba for attention on CPUs, torch everywhere else."""
