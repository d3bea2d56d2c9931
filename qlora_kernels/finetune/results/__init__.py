"""What a run leaves behind: its folder, the report and the loss curve."""
