"""Prediction from one CT by a model directory, the networks that a finished run has exported."""
