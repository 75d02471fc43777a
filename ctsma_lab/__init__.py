"""What only a screen needs: report pages of a run, tables and figures of the README."""
