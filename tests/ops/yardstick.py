"""How exact this machine's own products are: libraries add up long sums in different orders on different processors."""

import functools

import numpy as np
import torch


@functools.cache
def product_error(terms: int, dtype: torch.dtype) -> float:
    """Relative error, by norm, of torch's product over `terms` terms against one in higher precision."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(8, terms, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(terms, 8, generator=generator, dtype=torch.float64).to(dtype)
    exact = a.numpy().astype(np.longdouble) @ b.numpy().astype(np.longdouble)
    error = (torch.mm(a, b).numpy() - exact).astype(np.float64)
    return float(np.linalg.norm(error) / np.linalg.norm(exact.astype(np.float64)))
