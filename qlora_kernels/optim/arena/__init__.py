"""The memory that holds an optimizer's states: its layout, and what of it is where during a step."""
