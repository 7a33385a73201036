"""What a config would need on a slice, before anybody pays for one: `qstar plan`."""
