"""Pure functions of tensors: no parameters, no model, differentiable where their mathematics is."""
