"""Jobs on clusters: one description, rendered for each target as text, submitted, followed and cancelled."""
