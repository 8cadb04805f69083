"""The machine: devices, ranks, launching, interruption."""
