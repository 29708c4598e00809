"""Models, losses, metrics and data handling that the notebooks call."""

import os

# All three must be set before torch and albumentations load. OpenMP threads that wait asleep are
# slow to wake and those that spin for long take turns from one another: a short spin trained
# ResNet18 1.4 times faster on two cores than none. albumentations looks for updates online.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
