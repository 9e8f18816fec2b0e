"""Where a run's history goes besides its folder."""
