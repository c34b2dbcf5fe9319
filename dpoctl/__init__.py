"""dpoctl: the experiments of "Direct Preference Optimization" (Rafailov et al., 2023) as a chain of commands."""

__version__ = "0.1.0"
