"""Which unit goes where: a pure state machine, and the driver that performs what it decides."""
