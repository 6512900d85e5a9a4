"""The kernels of the project, one file an operator: its definition, its forms, its fake and its gradient."""
