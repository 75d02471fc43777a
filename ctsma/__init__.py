"""CT-SMA: subchondral trabecular biomarkers from knee CT, learned under an MR teacher.

Rooms, left to right; a room imports only rooms to its left:
cohort, simulation, registration, biomarkers, patches, networks, distillation, agreement, diagnosis, figures,
intake, study, report, cli.
"""

__version__ = "0.1.0"
