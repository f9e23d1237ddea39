"""Several tasks of different kinds with one shared body."""
