"""Manifest, knees, splits and image I/O: the one door through which images come in.

Convention, said once: numpy arrays are (z, y, x); physical points are (x, y, z) in LPS millimetres
(+x to the patient's left, +y to the back, +z to the head), which is SimpleITK's physical space.
"""

from .casework import map_knees, recorded_seconds
from .images import anatomical_plane, read_volume, write_volume
from .manifest import check_data, image_path, read_knee_volume, read_manifest, table_one
from .names import BIOMARKERS, BONES, COMPARTMENTS, IMAGES, InputFault
from .provenance import content_key, sha256_file, source_sha256, write_json, write_results, write_text
from .run import Run
from .splits import check_splits, make_splits, read_splits, splits_path, stored_splits
