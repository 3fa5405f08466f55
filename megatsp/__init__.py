"""megatsp: training of GPT models with folded tensor and sequence parallelism."""

__version__ = "0.1.0"
