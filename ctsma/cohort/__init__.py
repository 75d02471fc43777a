"""Reading a cohort: the manifest, the images it names, and the folds by subject.

Numpy arrays are (z, y, x); physical points are (x, y, z) in LPS millimetres (+x to the patient's
left, +y to the back, +z to the head), which is SimpleITK's physical space.
"""

from .images import read_volume, write_volume
from .manifest import image_path, read_knee_volume, read_manifest
from .splits import check_splits, make_splits, read_splits, splits_path, stored_splits
