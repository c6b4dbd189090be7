"""Operations of a pack of rows: Triton kernels for GPUs, torch everywhere else."""
