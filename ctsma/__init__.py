"""CT-SMA: subchondral trabecular biomarkers from knee CT, learned under an MR network.

A module imports only modules that stand before it in the order of tests/test_structure.py.
"""

__version__ = "0.2.0"
