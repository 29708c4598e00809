"""Models, losses, metrics and data handling for the notebooks."""

import os

# These must be set before torch and albumentations are imported. OpenMP threads that sleep while waiting
# are slow to wake, and threads that spin for long compete for cores. On two cores, ResNet18 trained 1.4
# times faster with a short spin than with none. The last line disables albumentations' online update check.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
